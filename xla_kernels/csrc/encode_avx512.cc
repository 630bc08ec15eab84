// encode_block.inc for one instruction set.
#include "encode.h"
#include "target.h"

#define ENCODE_LANES 8  // 16 lanes of scratch would leave the first-level cache

namespace xla_kernels {

#if defined(__x86_64__) && !defined(XLA_KERNELS_NO_SIMD)
namespace {

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")
#include "encode_block.inc"
TARGET_END

}  // namespace

EncodeBlock encode_block_avx512() { return encode_block; }
#else
EncodeBlock encode_block_avx512() { return nullptr; }
#endif

}  // namespace xla_kernels
