// row_dot.inc for one instruction set.
#include "dot.h"
#include "target.h"

namespace xla_kernels {

#if 1
namespace {


#include "row_dot.inc"


}  // namespace

RowDot row_dot_portable() { return row_dot; }
#else
RowDot row_dot_portable() { return nullptr; }
#endif

}  // namespace xla_kernels
