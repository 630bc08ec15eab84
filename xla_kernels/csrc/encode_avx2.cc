// encode_block.inc for one instruction set.
#include "encode.h"
#include "target.h"

#define ENCODE_LANES 8

namespace xla_kernels {

#if defined(__x86_64__) && !defined(XLA_KERNELS_NO_SIMD)
namespace {

TARGET_BEGIN("avx2")
#include "encode_block.inc"
TARGET_END

}  // namespace

EncodeBlock encode_block_avx2() { return encode_block; }
#else
EncodeBlock encode_block_avx2() { return nullptr; }
#endif

}  // namespace xla_kernels
