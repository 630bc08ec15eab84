// Iterated local search for additive codes under a score-aware loss.
#pragma once

#include <cstdint>

#include "threads.h"

namespace xla_kernels {

// k is padded to a multiple of 16: kp. Words of one codebook lie side by side, one a lane.
struct AdditiveArguments {
  const float* rows = nullptr;        // [n, d]
  const float* directions = nullptr;  // [n, r, d]
  const float* orthogonal = nullptr;  // [n], factor a of ||x - x~||^2
  const float* weights = nullptr;     // [n, r], factors w of <u, x - x~>^2
  const float* words = nullptr;       // [d, m, kp], zero in the padding
  const float* norms = nullptr;       // [m, kp], ||c||^2
  const float* pairs = nullptr;       // [m, k, m, kp], 2 <c, c'>, zero within a codebook
  const uint8_t* start = nullptr;     // [n, m], or null to start greedily
  const int32_t* kicks = nullptr;     // [rounds, size, 2], codebook and codeword
  int64_t n = 0, d = 0, r = 0, m = 0, k = 0, kp = 0;
  int64_t sweeps = 0, rounds = 0, size = 0;
  uint8_t* codes = nullptr;  // [n, m]
};

void assign_additive(const AdditiveArguments& arguments, Pool& pool);

// One row, with scratch of additive_scratch() floats, aligned to 64 bytes.
using AdditiveRow = void (*)(const AdditiveArguments& arguments, int64_t row, float* scratch);
inline int64_t additive_scratch(const AdditiveArguments& a) {
  // Costs, costs of the best, their base, one projection a direction; a codebook's costs; codes of
  // two states; three totals a direction.
  return (3 + a.r) * a.m * a.kp + a.kp + 2 * ((a.m + 15) / 16 * 16) + 3 * a.r + 64;
}

AdditiveRow additive_row_portable();
AdditiveRow additive_row_avx2();    // null without AVX2 in the build
AdditiveRow additive_row_avx512();  // null without AVX-512 in the build

}  // namespace xla_kernels
