// Coordinate-descent assignment of product codes under a score-aware loss.
#pragma once

#include <cstdint>

#include "threads.h"

namespace xla_kernels {

struct EncodeArguments {
  const float* rows = nullptr;         // [n, m * s]
  const float* directions = nullptr;   // [n, m * s]
  const float* orthogonal = nullptr;   // [n], factor a of ||r||^2
  const float* weight = nullptr;       // [n], factor w of <u, r>^2
  const float* codewords = nullptr;    // [m, k, s]
  int64_t n = 0, m = 0, k = 0, s = 0;
  int64_t max_sweeps = 0;
  uint8_t* codes = nullptr;            // [n, m]
};

void encode(const EncodeArguments& arguments, Pool& pool);

// Rows [first, first + 16) (fewer at the end), with scratch of encode_scratch() floats.
using EncodeBlock = void (*)(const EncodeArguments& arguments, int64_t first, float* scratch);
inline int64_t encode_scratch(const EncodeArguments& a) { return 2 * a.m * a.k * 16 + a.m * 16; }

EncodeBlock encode_block_portable();
EncodeBlock encode_block_avx2();    // null without AVX2 in the build
EncodeBlock encode_block_avx512();  // null without AVX-512 in the build

}  // namespace xla_kernels
