// additive_row.inc for one instruction set.
#include "additive.h"
#include "target.h"

#if defined(__x86_64__) && !defined(XLA_KERNELS_NO_SIMD)
#include <immintrin.h>

namespace xla_kernels {
namespace {

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")
constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline float lowest(Floats v) { return _mm512_reduce_min_ps(reinterpret_cast<__m512>(v)); }

// The first lane that equals x, or -1.
inline int first_lane(Floats v, float x) {
  const __mmask16 lanes =
      _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), _mm512_set1_ps(x), _CMP_EQ_OQ);
  return lanes == 0 ? -1 : __builtin_ctz(static_cast<unsigned>(lanes));
}

#include "additive_row.inc"
TARGET_END

}  // namespace

AdditiveRow additive_row_avx512() { return additive_row; }

}  // namespace xla_kernels
#else
namespace xla_kernels {
AdditiveRow additive_row_avx512() { return nullptr; }
}  // namespace xla_kernels
#endif
