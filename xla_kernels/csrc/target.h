// Functions between TARGET_BEGIN and TARGET_END may use an instruction set that the rest of the
// library must not. Headers are included before: inline functions of the standard library compiled
// here with wider instructions could otherwise be the copy that the linker keeps for everyone.
#pragma once

#define XLA_KERNELS_PRAGMA(x) _Pragma(#x)

#if defined(__clang__)
#define TARGET_BEGIN(features)    \
  XLA_KERNELS_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define TARGET_BEGIN(features)      \
  _Pragma("GCC push_options") XLA_KERNELS_PRAGMA(GCC target(features))
#define TARGET_END _Pragma("GCC pop_options")
#endif

// Register arrays stay in registers only if the loops over them are unrolled.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
