#include "tree_search.h"

#include "target.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

namespace xla_kernels {
namespace {

TARGET_BEGIN("avx2")

#include "tree_level.inc"

void leaf_products(const int16_t* tiles, int64_t num_tiles, int64_t num_pairs, const int16_t* query,
                   int64_t num_queries, int32_t* out) {
  for (; num_queries > 0; --num_queries, query += 2 * num_pairs, out += num_tiles * kLanes) {
    for (int64_t t = 0; t < num_tiles; ++t) {
      __m256i low = _mm256_setzero_si256(), high = low;
      const int16_t* pair = tiles + t * num_pairs * 2 * kLanes;
      for (int64_t p = 0; p < num_pairs; ++p, pair += 2 * kLanes) {
        int32_t two;
        std::memcpy(&two, query + 2 * p, 4);
        const __m256i q = _mm256_set1_epi32(two);
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pair));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pair + kLanes));
        low = _mm256_add_epi32(low, _mm256_madd_epi16(a, q));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(b, q));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + t * kLanes), low);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + t * kLanes + 8), high);
    }
  }
}

TARGET_END

const TreeKernels kKernels = {leaf_products, build_table,  round16,  measure,  scaled_square,
                              round_query,   dot,          dot_bfloat16, dot_int8, distance};

}  // namespace

const TreeKernels* tree_avx2() { return __builtin_cpu_supports("avx2") ? &kKernels : nullptr; }

}  // namespace xla_kernels

#else

namespace xla_kernels {
const TreeKernels* tree_avx2() { return nullptr; }
}  // namespace xla_kernels

#endif
