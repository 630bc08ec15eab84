// Scans for 64-bit ARM: kLanes by tbl, 16 points at a time.
#include "scan.h"

#if defined(__aarch64__) && !defined(XLA_KERNELS_NO_SIMD)
#include <arm_neon.h>

#include <cstring>

namespace xla_kernels {
namespace {

int64_t expanded_bytes(Layout layout, int64_t groups, int64_t stride) {
  if (layout == Layout::kLanes) return groups * 64;
  return portable_kernels()->expanded_bytes(layout, groups, stride);
}

void expand(const uint8_t* rounded, Layout layout, int64_t groups, int64_t stride, void* out) {
  if (layout == Layout::kLanes) {
    std::memcpy(out, rounded, static_cast<size_t>(groups) * 64);
  } else {
    portable_kernels()->expand(rounded, layout, groups, stride, out);
  }
}

// 128 groups hold 256 pairs of at most 254: 16 bits are not exceeded.
constexpr int64_t kPart = 128;

// Sums of 32 points: vectors of 8 in the order of the points.
inline void sum_part(const uint8_t* block, int64_t from, int64_t to, const uint8_t* table,
                     uint16x8_t (&sums)[4]) {
  const uint8x16_t nibble = vdupq_n_u8(15);
  for (auto& sum : sums) sum = vdupq_n_u16(0);
  for (int64_t g = from; g < to; ++g) {
    for (int h = 0; h < 2; ++h) {
      const uint8x16_t first = vld1q_u8(table + 64 * g + 32 * h);
      const uint8x16_t second = vld1q_u8(table + 64 * g + 32 * h + 16);
      for (int half = 0; half < 2; ++half) {
        const uint8x16_t bytes = vld1q_u8(block + 64 * g + 32 * h + 16 * half);
        const uint8x16_t pair = vaddq_u8(vqtbl1q_u8(first, vandq_u8(bytes, nibble)),
                                         vqtbl1q_u8(second, vshrq_n_u8(bytes, 4)));
        sums[2 * half] = vaddw_u8(sums[2 * half], vget_low_u8(pair));
        sums[2 * half + 1] = vaddw_high_u8(sums[2 * half + 1], pair);
      }
    }
  }
}

void scan(const Codes& codes, const RowTerms& terms, int64_t begin, int64_t end, int64_t,
          int64_t stride, const ScanQuery* queries, int64_t num_queries) {
  if (codes.layout != Layout::kLanes) {
    portable_kernels()->scan(codes, terms, begin, end, end, stride, queries, num_queries);
    return;
  }
  const bool affine = terms.affine();
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t q = 0; q < num_queries; ++q) {
      const ScanQuery& query = queries[q];
      int32_t totals[32] = {};
      bool wanted = false;
      for (int64_t from = 0; from == 0 || from < codes.groups; from += kPart) {
        const int64_t to = from + kPart < codes.groups ? from + kPart : codes.groups;
        uint16x8_t sums[4];
        sum_part(codes.block(i), from, to, static_cast<const uint8_t*>(query.table), sums);
        const int64_t bar = static_cast<int64_t>(query.collector->threshold) - query.shift;
        if (codes.groups <= kPart && !affine && bar >= 0) {
          const uint16x8_t most = vmaxq_u16(vmaxq_u16(sums[0], sums[1]), vmaxq_u16(sums[2], sums[3]));
          if (vmaxvq_u16(most) <= bar) break;
        }
        wanted = true;
        for (int j = 0; j < 4; ++j) {
          uint16_t part[8];
          vst1q_u16(part, sums[j]);
          for (int v = 0; v < 8; ++v) totals[8 * j + v] += part[v];
        }
      }
      if (wanted) append_block(totals, 32, codes, terms, i * 32, query);
    }
  }
}

int64_t count(const int32_t* keys, int64_t size, int32_t pivot) {
  return count_at_least(keys, size, pivot);
}

const Kernels kKernels = {"neon", expanded_bytes, expand, scan, count, nullptr, nullptr};

}  // namespace

const Kernels* neon_kernels() { return &kKernels; }

}  // namespace xla_kernels

#else

namespace xla_kernels {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace xla_kernels

#endif
