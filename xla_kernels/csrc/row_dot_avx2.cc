// row_dot.inc for one instruction set.
#include "dot.h"
#include "target.h"

namespace xla_kernels {

#if defined(__x86_64__) && !defined(XLA_KERNELS_NO_SIMD)
namespace {

TARGET_BEGIN("avx2")
#include "row_dot.inc"
TARGET_END

}  // namespace

RowDot row_dot_avx2() { return row_dot; }
#else
RowDot row_dot_avx2() { return nullptr; }
#endif

}  // namespace xla_kernels
