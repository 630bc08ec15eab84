// additive_row.inc for one instruction set.
#include "additive.h"
#include "target.h"

#if defined(__x86_64__) && !defined(XLA_KERNELS_NO_SIMD)
#include <immintrin.h>

namespace xla_kernels {
namespace {

TARGET_BEGIN("avx2")
constexpr int kLanes = 8;
typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline float lowest(Floats v) {
  const __m256 wide = reinterpret_cast<__m256>(v);
  __m128 x = _mm_min_ps(_mm256_castps256_ps128(wide), _mm256_extractf128_ps(wide, 1));
  x = _mm_min_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_min_ss(x, _mm_movehdup_ps(x)));
}

// The first lane that equals x, or -1.
inline int first_lane(Floats v, float x) {
  const int lanes = _mm256_movemask_ps(
      _mm256_cmp_ps(reinterpret_cast<__m256>(v), _mm256_set1_ps(x), _CMP_EQ_OQ));
  return lanes == 0 ? -1 : __builtin_ctz(static_cast<unsigned>(lanes));
}

#include "additive_row.inc"
TARGET_END

}  // namespace

AdditiveRow additive_row_avx2() { return additive_row; }

}  // namespace xla_kernels
#else
namespace xla_kernels {
AdditiveRow additive_row_avx2() { return nullptr; }
}  // namespace xla_kernels
#endif
