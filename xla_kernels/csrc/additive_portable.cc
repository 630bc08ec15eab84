// additive_row.inc for one instruction set.
#include "additive.h"
#include "target.h"

namespace xla_kernels {
namespace {

constexpr int kLanes = 4;
typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline float lowest(Floats v) {
  float least = v[0];
  for (int l = 1; l < kLanes; ++l) least = v[l] < least ? v[l] : least;
  return least;
}

// The first lane that equals x, or -1.
inline int first_lane(Floats v, float x) {
  for (int l = 0; l < kLanes; ++l) {
    if (v[l] == x) return l;
  }
  return -1;
}

#include "additive_row.inc"

}  // namespace

AdditiveRow additive_row_portable() { return additive_row; }

}  // namespace xla_kernels
