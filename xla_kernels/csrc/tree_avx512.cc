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
#define XLA_KERNELS_OWN_ROUND16
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

// kTiles tiles and kQueries queries at a time: their sums are independent chains of vpdpwssd.
template <int kQueries, int kTiles>
inline void products_of(const int16_t* tiles, int64_t num_pairs, const int16_t* queries, int32_t* out,
                        int64_t out_stride) {
  const int64_t step = num_pairs * 2 * kLanes;
  __m512i sums[kQueries][kTiles];
  UNROLL
  for (int q = 0; q < kQueries; ++q) {
    UNROLL
    for (int t = 0; t < kTiles; ++t) sums[q][t] = _mm512_setzero_si512();
  }
  for (int64_t p = 0; p < num_pairs; ++p) {
    __m512i pair[kTiles];
    UNROLL
    for (int t = 0; t < kTiles; ++t) pair[t] = _mm512_loadu_si512(tiles + t * step + p * 2 * kLanes);
    UNROLL
    for (int q = 0; q < kQueries; ++q) {
      int32_t two;
      std::memcpy(&two, queries + q * 2 * num_pairs + 2 * p, 4);
      const __m512i both = _mm512_set1_epi32(two);
      UNROLL
      for (int t = 0; t < kTiles; ++t) sums[q][t] = _mm512_dpwssd_epi32(sums[q][t], pair[t], both);
    }
  }
  UNROLL
  for (int q = 0; q < kQueries; ++q) {
    UNROLL
    for (int t = 0; t < kTiles; ++t) _mm512_storeu_si512(out + q * out_stride + t * kLanes, sums[q][t]);
  }
}

template <int kQueries, int kTiles>
inline void products_of_all(const int16_t* tiles, int64_t num_tiles, int64_t num_pairs,
                            const int16_t* queries, int32_t* out) {
  const int64_t step = num_pairs * 2 * kLanes, stride = num_tiles * kLanes;
  int64_t t = 0;
  for (; t + kTiles <= num_tiles; t += kTiles) {
    products_of<kQueries, kTiles>(tiles + t * step, num_pairs, queries, out + t * kLanes, stride);
  }
  for (; t < num_tiles; ++t) {
    products_of<kQueries, 1>(tiles + t * step, num_pairs, queries, out + t * kLanes, stride);
  }
}

void leaf_products(const int16_t* tiles, int64_t num_tiles, int64_t num_pairs, const int16_t* queries,
                   int64_t num_queries, int32_t* out) {
  int64_t q = 0;
  const int64_t from = 2 * num_pairs, to = num_tiles * kLanes;
  for (; q + 4 <= num_queries; q += 4) {
    products_of_all<4, 4>(tiles, num_tiles, num_pairs, queries + q * from, out + q * to);
  }
  for (; q < num_queries; ++q) {
    products_of_all<1, 4>(tiles, num_tiles, num_pairs, queries + q * from, out + q * to);
  }
}

#include "lanes_avx512.inc"

void round16(const float* table, int64_t num_subspaces, int32_t top, uint8_t* out, float* base,
             float* delta) {
  float range = 0, total = 0;
  for (int64_t s = 0; s < num_subspaces; ++s) {
    const __m512 entries = _mm512_loadu_ps(table + s * kLanes);
    const float low = lane_min(entries), height = lane_max(entries) - low;
    range = height > range ? height : range;
    total += low;
    std::memcpy(out + s * kLanes, &low, sizeof(low));  // until the step is known
  }
  *base = total;
  *delta = range > 1e-30f ? range / static_cast<float>(top) : 1.0f;
  const __m512 scale = _mm512_set1_ps(1.0f / *delta), half = _mm512_set1_ps(0.5f);
  for (int64_t s = 0; s < num_subspaces; ++s) {
    float low;
    std::memcpy(&low, out + s * kLanes, sizeof(low));
    const __m512 above = _mm512_sub_ps(_mm512_loadu_ps(table + s * kLanes), _mm512_set1_ps(low));
    const __m512i steps = _mm512_cvttps_epi32(_mm512_add_ps(_mm512_mul_ps(above, scale), half));
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_min_epi32(steps, _mm512_set1_epi32(top)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + s * kLanes), bytes);
  }
}

TARGET_END

const TreeKernels kKernels = {leaf_products, build_table,  round16,  measure,  scaled_square,
                              round_query,   dot,          dot_bfloat16, dot_int8, distance};

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
