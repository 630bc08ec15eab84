// The steps of round_table() for 16 codewords, a vector for each subspace.
#include "table.h"

#if defined(__x86_64__) && !defined(XLA_KERNELS_NO_SIMD)
#include <immintrin.h>

#include "target.h"

namespace xla_kernels {

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")

namespace {

#include "lanes_avx512.inc"

}  // namespace

void measure16_avx512(const float* table, int64_t num_subspaces, float* lows, TableMeasures* out) {
  const __m512 most = _mm512_set1_ps(1e9f);
  TableMeasures measures;
  __mmask16 not_finite = 0;
  for (int64_t s = 0; s < num_subspaces; ++s) {
    const __m512 entries = _mm512_loadu_ps(table + 16 * s);
    not_finite |= _mm512_fpclass_ps_mask(entries, 0x99);  // NaN of both kinds, both infinities
    if (measures.integers) {
      const __m512 whole = _mm512_cvtepi32_ps(_mm512_cvttps_epi32(entries));
      const __mmask16 small = _mm512_cmp_ps_mask(_mm512_abs_ps(entries), most, _CMP_LT_OQ);
      measures.integers = _mm512_mask_cmp_ps_mask(small, entries, whole, _CMP_EQ_OQ) == 0xffff;
    }
    lows[s] = lane_min(entries);
    measures.add(lows[s], lane_max(entries));
  }
  measures.finite = not_finite == 0;
  *out = measures;
}

void round_down16_avx512(const float* table, int64_t num_subspaces, const float* lows, float scale,
                          int32_t top, uint8_t* out, TableLosses* losses) {
  for (int64_t s = 0; s < num_subspaces; ++s) {
    const __m512 above = _mm512_sub_ps(_mm512_loadu_ps(table + 16 * s), _mm512_set1_ps(lows[s]));
    const __m512 x = _mm512_mul_ps(above, _mm512_set1_ps(scale));
    const __m512i q = _mm512_min_epi32(_mm512_cvttps_epi32(x), _mm512_set1_epi32(top));
    const __m512 remainder = _mm512_sub_ps(x, _mm512_cvtepi32_ps(q));
    const float largest = lane_max(remainder);
    losses->largest += largest > 0 ? largest : 0.0f;
    losses->total += lane_sum(remainder);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * s), _mm512_cvtepi32_epi8(q));
  }
}

TARGET_END

}  // namespace xla_kernels
#endif
