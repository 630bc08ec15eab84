// row_dot.inc for one instruction set.
#include "dot.h"
#include "target.h"

namespace xla_kernels {

#if defined(__x86_64__) && !defined(XLA_KERNELS_NO_SIMD)
namespace {

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")
#include "row_dot.inc"
TARGET_END

}  // namespace

RowDot row_dot_avx512() { return row_dot; }
#else
RowDot row_dot_avx512() { return nullptr; }
#endif

}  // namespace xla_kernels
