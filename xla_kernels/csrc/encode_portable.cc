// encode_block.inc for one instruction set.
#include "encode.h"
#include "target.h"

#define ENCODE_LANES 4

namespace xla_kernels {

#if 1
namespace {


#include "encode_block.inc"


}  // namespace

EncodeBlock encode_block_portable() { return encode_block; }
#else
EncodeBlock encode_block_portable() { return nullptr; }
#endif

}  // namespace xla_kernels
