// Scans for AVX2: kLanes by pshufb, the layout that 16-byte table lanes want.
//
// 32 points a vector; two 7-bit entries are added as bytes, and the pair to 16-bit sums of the even
// and odd points: even also takes up the odd bytes in its upper halves, to be subtracted at the end
// (as in Quicker ADC, Andre et al. 2019, arXiv:1812.09162).
#include "scan.h"

#if defined(__x86_64__) && !defined(XLA_KERNELS_NO_SIMD)
#include <immintrin.h>

#include <cstring>

#include "target.h"

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

TARGET_BEGIN("avx2,fma,bmi2,popcnt")

// 128 groups hold 256 pairs of at most 254: 16 bits are not exceeded.
constexpr int64_t kPart = 128;

__attribute__((noinline)) void append(const Codes& codes, const RowTerms& terms, int64_t row,
                                      const ScanQuery& query, __m256i low, __m256i high) {
  alignas(32) uint16_t sums16[32];
  int32_t sums[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(sums16), low);
  _mm256_store_si256(reinterpret_cast<__m256i*>(sums16 + 16), high);
  for (int v = 0; v < 32; ++v) sums[v] = sums16[v];
  append_block(sums, 32, codes, terms, row, query);
}

// Whether any of 32 rows may matter by append_block's formula, which then looks again.
inline bool any_affine(const RowTerms& terms, int64_t row, int64_t num_rows, const ScanQuery& query,
                       __m256i low, __m256i high) {
  if (row + 32 > num_rows) return true;
  const __m256 delta = _mm256_set1_ps(query.delta), centre = _mm256_set1_ps(query.centre);
  const __m256 error = _mm256_set1_ps(query.error), addend = _mm256_set1_ps(query.addend);
  const __m256 bar = _mm256_set1_ps(query.collector->float_threshold);
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 found = _mm256_setzero_ps();
  UNROLL
  for (int j = 0; j < 4; ++j) {
    const __m256i half = j < 2 ? low : high;
    const __m128i words = j % 2 == 0 ? _mm256_castsi256_si128(half) : _mm256_extracti128_si256(half, 1);
    const __m256i keys = _mm256_add_epi32(_mm256_cvtepu16_epi32(words), _mm256_set1_epi32(query.shift));
    __m256 gain = _mm256_set1_ps(1.0f), offset = _mm256_setzero_ps();
    if (terms.level != nullptr) {
      const __m128i eight =
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(terms.level + row + 8 * j));
      const __m256i number = _mm256_cvtepu8_epi32(eight);
      if (terms.num_levels == 16) {
        // Each permutation takes the low three bits of a number; its fourth chooses between them.
        const __m256 first = _mm256_permutevar8x32_ps(_mm256_loadu_ps(terms.levels), number);
        const __m256 second = _mm256_permutevar8x32_ps(_mm256_loadu_ps(terms.levels + 8), number);
        gain = _mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(number, 28)));
      } else {
        gain = _mm256_i32gather_ps(terms.levels, number, 4);
      }
    } else if (terms.gain != nullptr) {
      gain = _mm256_loadu_ps(terms.gain + row + 8 * j);
    }
    if (terms.offset != nullptr) offset = _mm256_loadu_ps(terms.offset + row + 8 * j);
    const __m256 sum = _mm256_add_ps(centre, _mm256_mul_ps(delta, _mm256_cvtepi32_ps(keys)));
    const __m256 middle = _mm256_add_ps(_mm256_mul_ps(gain, sum), _mm256_add_ps(offset, addend));
    const __m256 slack =
        _mm256_add_ps(_mm256_mul_ps(_mm256_andnot_ps(sign, gain), error),
                      _mm256_mul_ps(_mm256_set1_ps(4e-7f), _mm256_andnot_ps(sign, offset)));
    // Not less than: NaN passes, its exact score decides.
    const __m256 above = _mm256_add_ps(middle, slack);
    found = _mm256_or_ps(found, _mm256_cmp_ps(above, bar, _CMP_NLT_UQ));
  }
  return _mm256_movemask_ps(found) != 0;
}

template <int kQueries>
__attribute__((always_inline)) inline void sum_part(const uint8_t* block, int64_t from, int64_t to, const ScanQuery* queries,
                     __m256i (&low)[kQueries], __m256i (&high)[kQueries]) {
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i even[kQueries], odd[kQueries];
  UNROLL
  for (int q = 0; q < kQueries; ++q) even[q] = odd[q] = _mm256_setzero_si256();
  for (int64_t g = from; g < to; ++g) {
    prefetch_ahead(block + 64 * g);
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 64 * g));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 64 * g + 32));
    const __m256i index[4] = {_mm256_and_si256(a, nibble),
                              _mm256_and_si256(_mm256_srli_epi16(a, 4), nibble),
                              _mm256_and_si256(b, nibble),
                              _mm256_and_si256(_mm256_srli_epi16(b, 4), nibble)};
    UNROLL
    for (int q = 0; q < kQueries; ++q) {
      const auto* table = static_cast<const __m128i*>(queries[q].table) + 4 * g;
      __m256i found[4];
      UNROLL
      for (int c = 0; c < 4; ++c) {
        found[c] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(table + c)),
                                       index[c]);
      }
      const __m256i x = _mm256_add_epi8(found[0], found[1]);
      const __m256i y = _mm256_add_epi8(found[2], found[3]);
      even[q] = _mm256_add_epi16(_mm256_add_epi16(even[q], x), y);
      odd[q] = _mm256_add_epi16(odd[q], _mm256_srli_epi16(x, 8));
      odd[q] = _mm256_add_epi16(odd[q], _mm256_srli_epi16(y, 8));
    }
  }
  UNROLL
  for (int q = 0; q < kQueries; ++q) {
    even[q] = _mm256_sub_epi16(even[q], _mm256_slli_epi16(odd[q], 8));
    const __m256i a = _mm256_unpacklo_epi16(even[q], odd[q]);  // points 0-7 and 16-23
    const __m256i b = _mm256_unpackhi_epi16(even[q], odd[q]);  // points 8-15 and 24-31
    low[q] = _mm256_permute2x128_si256(a, b, 0x20);
    high[q] = _mm256_permute2x128_si256(a, b, 0x31);
  }
}

template <int kQueries, bool kAffine>
void scan_blocks(const Codes& codes, const RowTerms& terms, int64_t begin, int64_t end,
                 const ScanQuery* queries) {
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t* block = codes.block(i);
    __m256i low[kQueries], high[kQueries];
    if (codes.groups > kPart) {
      int32_t sums[kQueries][32] = {};
      for (int64_t from = 0; from < codes.groups; from += kPart) {
        const int64_t to = from + kPart < codes.groups ? from + kPart : codes.groups;
        sum_part<kQueries>(block, from, to, queries, low, high);
        UNROLL
        for (int q = 0; q < kQueries; ++q) {
          alignas(32) uint16_t part[32];
          _mm256_store_si256(reinterpret_cast<__m256i*>(part), low[q]);
          _mm256_store_si256(reinterpret_cast<__m256i*>(part + 16), high[q]);
          for (int v = 0; v < 32; ++v) sums[q][v] += part[v];
        }
      }
      UNROLL
      for (int q = 0; q < kQueries; ++q) append_block(sums[q], 32, codes, terms, i * 32, queries[q]);
      continue;
    }
    sum_part<kQueries>(block, 0, codes.groups, queries, low, high);
    UNROLL
    for (int q = 0; q < kQueries; ++q) {
      if (kAffine) {
        if (!any_affine(terms, i * 32, codes.num_rows, queries[q], low[q], high[q])) continue;
      } else {
        // Sums are below 2^16: skip the block unless max(sum, bar) exceeds bar, unsigned.
        const int64_t bar = static_cast<int64_t>(queries[q].collector->threshold) - queries[q].shift;
        if (bar >= 65535) continue;
        if (bar >= 0) {
          const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(static_cast<uint16_t>(bar)));
          const __m256i most = _mm256_max_epu16(low[q], high[q]);
          const __m256i within = _mm256_cmpeq_epi16(_mm256_max_epu16(most, limit), limit);
          if (__builtin_expect(_mm256_movemask_epi8(within) == -1, 1)) continue;
        }
      }
      append(codes, terms, i * 32, queries[q], low[q], high[q]);
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
    for (; q + 4 <= num_queries; q += 4) scan_blocks<4, kAffine>(codes, terms, from, to, queries + q);
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
  const __m256i bar = _mm256_set1_epi32(pivot);
  __m256i less = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    less = _mm256_sub_epi32(less, _mm256_cmpgt_epi32(bar, x));
  }
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), less);
  int64_t total = i;
  for (int lane : lanes) total -= lane;
  for (; i < size; ++i) total += keys[i] >= pivot;
  return total;
}

TARGET_END

const Kernels kKernels = {"avx2", expanded_bytes, expand, scan, count, nullptr, nullptr};

}  // namespace

const Kernels* avx2_kernels() {
  const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  return runs ? &kKernels : nullptr;
}

}  // namespace xla_kernels

#else

namespace xla_kernels {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace xla_kernels

#endif
