#include "tree_search.h"

#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

namespace xla_kernels {
namespace {

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")

// The sums of tree_level.inc, lane for lane; its scalar tail costs as much as all the rest.
#define XLA_KERNELS_OWN_DOT
inline float sum_lanes(const float* lane);
float dot(const float* query, const float* row, int64_t dim) {
  __m512 sum = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= dim; i += 16) {
    sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(query + i), _mm512_loadu_ps(row + i)));
  }
  if (i < dim) {
    const auto tail = static_cast<__mmask16>((1u << (dim - i)) - 1u);
    const __m512 last = _mm512_mul_ps(_mm512_maskz_loadu_ps(tail, query + i),
                                      _mm512_maskz_loadu_ps(tail, row + i));
    sum = _mm512_mask_add_ps(sum, tail, sum, last);
  }
  alignas(64) float lane[16];
  _mm512_store_ps(lane, sum);
  return sum_lanes(lane);
}

#include "tree_level.inc"

// Four tiles at a time: their sums are independent chains of vpdpwssd.
void leaf_products(const int16_t* tiles, int64_t num_tiles, int64_t num_pairs, const int16_t* query,
                   int32_t* out) {
  int64_t t = 0;
  const int64_t step = num_pairs * 2 * kLanes;
  for (; t + 4 <= num_tiles; t += 4) {
    const int16_t* pair = tiles + t * step;
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (int64_t p = 0; p < num_pairs; ++p, pair += 2 * kLanes) {
      int32_t two;
      std::memcpy(&two, query + 2 * p, 4);
      const __m512i q = _mm512_set1_epi32(two);
      a = _mm512_dpwssd_epi32(a, _mm512_loadu_si512(pair), q);
      b = _mm512_dpwssd_epi32(b, _mm512_loadu_si512(pair + step), q);
      c = _mm512_dpwssd_epi32(c, _mm512_loadu_si512(pair + 2 * step), q);
      d = _mm512_dpwssd_epi32(d, _mm512_loadu_si512(pair + 3 * step), q);
    }
    _mm512_storeu_si512(out + t * kLanes, a);
    _mm512_storeu_si512(out + (t + 1) * kLanes, b);
    _mm512_storeu_si512(out + (t + 2) * kLanes, c);
    _mm512_storeu_si512(out + (t + 3) * kLanes, d);
  }
  for (; t < num_tiles; ++t) {
    const int16_t* pair = tiles + t * step;
    __m512i a = _mm512_setzero_si512();
    for (int64_t p = 0; p < num_pairs; ++p, pair += 2 * kLanes) {
      int32_t two;
      std::memcpy(&two, query + 2 * p, 4);
      a = _mm512_dpwssd_epi32(a, _mm512_loadu_si512(pair), _mm512_set1_epi32(two));
    }
    _mm512_storeu_si512(out + t * kLanes, a);
  }
}

TARGET_END

const TreeKernels kKernels = {leaf_products, build_table, round16, dot,
                              dot_bfloat16,  dot_int8,    distance};

}  // namespace

const TreeKernels* tree_avx512() {
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni");
  return runs ? &kKernels : nullptr;
}

}  // namespace xla_kernels

#else

namespace xla_kernels {
const TreeKernels* tree_avx512() { return nullptr; }
}  // namespace xla_kernels

#endif
