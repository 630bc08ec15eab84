// Scans for AVX-512 without VBMI (Skylake-X, Cascade Lake): kLanes, a whole group a vector.
//
// The four 128-bit lanes of a group are points 0-15 and 16-31 of subspaces 0 and 1, then of 2 and 3,
// so one pshufb looks up two subspaces, its table holding a subspace's 16 entries twice.
#include "scan.h"
#include "table.h"

#if defined(__x86_64__) && !defined(XLA_KERNELS_NO_SIMD)
#include <immintrin.h>

#include <cstring>

#include "target.h"

namespace xla_kernels {
namespace {

int64_t expanded_bytes(Layout layout, int64_t groups, int64_t stride) {
  if (layout == Layout::kLanes) return groups * 128;
  return portable_kernels()->expanded_bytes(layout, groups, stride);
}

void expand(const uint8_t* rounded, Layout layout, int64_t groups, int64_t stride, void* out) {
  if (layout != Layout::kLanes) return portable_kernels()->expand(rounded, layout, groups, stride, out);
  auto* to = static_cast<uint8_t*>(out);
  for (int64_t g = 0; g < groups; ++g) {
    UNROLL
    for (int c = 0; c < 4; ++c) {
      // Low nibbles hold subspaces 0 and 2, high nibbles 1 and 3.
      uint8_t* lanes = to + 128 * g + 64 * (c & 1) + 32 * (c >> 1);
      std::memcpy(lanes, rounded + 64 * g + 16 * c, 16);
      std::memcpy(lanes + 16, rounded + 64 * g + 16 * c, 16);
    }
  }
}

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,bmi2,popcnt")

#include "affine_avx512.inc"

// 128 groups: 128 pairs of at most 254 a lane, and two lanes are added at the end.
constexpr int64_t kPart = 128;

template <int kQueries>
inline void sum_part(const uint8_t* block, int64_t from, int64_t to, const ScanQuery* queries,
                     __m512i (&sums)[kQueries]) {
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i even[kQueries], odd[kQueries];
  UNROLL
  for (int q = 0; q < kQueries; ++q) even[q] = odd[q] = _mm512_setzero_si512();
  for (int64_t g = from; g < to; ++g) {
    const __m512i bytes = _mm512_loadu_si512(block + 64 * g);
    prefetch_ahead(block + 64 * g);
    const __m512i first = _mm512_and_si512(bytes, nibble);
    const __m512i second = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
    UNROLL
    for (int q = 0; q < kQueries; ++q) {
      const uint8_t* table = static_cast<const uint8_t*>(queries[q].table) + 128 * g;
      const __m512i pair = _mm512_add_epi8(_mm512_shuffle_epi8(_mm512_load_si512(table), first),
                                           _mm512_shuffle_epi8(_mm512_load_si512(table + 64), second));
      even[q] = _mm512_add_epi16(even[q], pair);
      odd[q] = _mm512_add_epi16(odd[q], _mm512_srli_epi16(pair, 8));
    }
  }
  UNROLL
  for (int q = 0; q < kQueries; ++q) {
    even[q] = _mm512_sub_epi16(even[q], _mm512_slli_epi16(odd[q], 8));
    const __m256i e = _mm256_add_epi16(_mm512_castsi512_si256(even[q]),
                                       _mm512_extracti64x4_epi64(even[q], 1));
    const __m256i o = _mm256_add_epi16(_mm512_castsi512_si256(odd[q]),
                                       _mm512_extracti64x4_epi64(odd[q], 1));
    const __m256i a = _mm256_unpacklo_epi16(e, o);  // points 0-7 and 16-23
    const __m256i b = _mm256_unpackhi_epi16(e, o);  // points 8-15 and 24-31
    sums[q] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_permute2x128_si256(a, b, 0x20)),
                                 _mm256_permute2x128_si256(a, b, 0x31), 1);
  }
}

template <bool kAffine>
inline void append_sums(const int32_t* sums, const Codes& codes, const RowTerms& terms, int64_t row,
                        const ScanQuery& query) {
  if (!kAffine) {
    append_block(sums, 32, codes, terms, row, query);
    return;
  }
  for (int64_t j = 0; j < 32 && row + j < codes.num_rows; j += 16) {
    const __m512i keys =
        _mm512_add_epi32(_mm512_loadu_si512(sums + j), _mm512_set1_epi32(query.shift));
    const Terms16 own = load_terms(terms, row + j, codes.num_rows);
    append_affine(query, keys, own, row + j, codes.num_rows);
  }
}

template <int kQueries, bool kAffine>
void scan_blocks(const Codes& codes, const RowTerms& terms, int64_t begin, int64_t end,
                 const ScanQuery* queries) {
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t* block = codes.block(i);
    int32_t totals[kQueries][32];
    for (int64_t from = 0; from == 0 || from < codes.groups; from += kPart) {
      const int64_t to = from + kPart < codes.groups ? from + kPart : codes.groups;
      __m512i sums[kQueries];
      sum_part<kQueries>(block, from, to, queries, sums);
      const bool whole = codes.groups <= kPart;
      UNROLL
      for (int q = 0; q < kQueries; ++q) {
        if (whole && !kAffine) {
          const int64_t bar =
              static_cast<int64_t>(queries[q].collector->threshold) - queries[q].shift;
          if (bar >= 65535) continue;
          const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(static_cast<uint16_t>(bar)));
          if (bar >= 0 && _mm512_cmpgt_epu16_mask(sums[q], limit) == 0) continue;
        }
        alignas(64) uint16_t part[32];
        _mm512_store_si512(part, sums[q]);
        for (int v = 0; v < 32; ++v) totals[q][v] = part[v] + (from == 0 ? 0 : totals[q][v]);
        if (whole) append_sums<kAffine>(totals[q], codes, terms, i * 32, queries[q]);
      }
    }
    if (codes.groups <= kPart) continue;
    UNROLL
    for (int q = 0; q < kQueries; ++q) {
      append_sums<kAffine>(totals[q], codes, terms, i * 32, queries[q]);
    }
  }
}

template <bool kAffine>
void scan_all(const Codes& codes, const RowTerms& terms, int64_t begin, int64_t end,
              const ScanQuery* queries, int64_t num_queries) {
  const int64_t piece = 1 + (256 << 10) / (codes.groups * 64 + 1);
  for (int64_t from = begin; from < end; from += piece) {
    const int64_t to = from + piece < end ? from + piece : end;
    int64_t q = 0;
    for (; q + 8 <= num_queries; q += 8) scan_blocks<8, kAffine>(codes, terms, from, to, queries + q);
    for (; q + 2 <= num_queries; q += 2) scan_blocks<2, kAffine>(codes, terms, from, to, queries + q);
    for (; q < num_queries; ++q) scan_blocks<1, kAffine>(codes, terms, from, to, queries + q);
  }
}

void scan(const Codes& codes, const RowTerms& terms, int64_t begin, int64_t end, int64_t,
          int64_t stride, const ScanQuery* queries, int64_t num_queries) {
  if (codes.layout != Layout::kLanes) {
    portable_kernels()->scan(codes, terms, begin, end, end, stride, queries, num_queries);
  } else if (terms.affine()) {
    scan_all<true>(codes, terms, begin, end, queries, num_queries);
  } else {
    scan_all<false>(codes, terms, begin, end, queries, num_queries);
  }
}

int64_t count(const int32_t* keys, int64_t size, int32_t pivot) {
  const __m512i bar = _mm512_set1_epi32(pivot);
  int64_t total = 0, i = 0;
  for (; i + 16 <= size; i += 16) {
    total += _mm_popcnt_u32(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys + i), bar));
  }
  for (; i < size; ++i) total += keys[i] >= pivot;
  return total;
}

TARGET_END

const Kernels kKernels = {"avx512bw", expanded_bytes, expand, scan, count, nullptr, nullptr, nullptr, nullptr,
                          nullptr, measure16_avx512, round_down16_avx512};

}  // namespace

const Kernels* avx512bw_kernels() {
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("bmi2");
  return runs ? &kKernels : nullptr;
}

}  // namespace xla_kernels

#else

namespace xla_kernels {
const Kernels* avx512bw_kernels() { return nullptr; }
}  // namespace xla_kernels

#endif
