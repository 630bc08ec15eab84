// The instruction set in use: the best that the processor has, capped by XLA_KERNELS_SIMD.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "scan.h"

namespace xla_kernels {
namespace {

struct Level {
  const char* name;
  const Kernels* (*kernels)();
};

const Level kLevels[] = {
    {"avx512vbmi", avx512vbmi_kernels}, {"avx512bw", avx512bw_kernels}, {"avx2", avx2_kernels},
    {"neon", neon_kernels},             {"portable", portable_kernels},
};

const Kernels* choose() {
  const char* cap = std::getenv("XLA_KERNELS_SIMD");
  bool known = false;
  for (const Level& level : kLevels) known |= cap != nullptr && std::strcmp(cap, level.name) == 0;
  bool reached = !known;  // an unknown name caps nothing
  for (const Level& level : kLevels) {
    reached |= known && std::strcmp(cap, level.name) == 0;
    if (reached && level.kernels() != nullptr) return level.kernels();
  }
  return portable_kernels();
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

const Kernels* kernels() {
  const Kernels* chosen = in_use.load(std::memory_order_acquire);
  if (chosen == nullptr) {
    chosen = choose();
    in_use.store(chosen, std::memory_order_release);
  }
  return chosen;
}

const char* level_reason(const char* name) {
  for (const Level& level : kLevels) {
    if (std::strcmp(name, level.name) == 0) {
      return level.kernels() != nullptr ? "" : "this processor or build lacks it";
    }
  }
  return "unknown level";
}

bool set_level(const char* name) {
  for (const Level& level : kLevels) {
    if (std::strcmp(name, level.name) == 0 && level.kernels() != nullptr) {
      in_use.store(level.kernels(), std::memory_order_release);
      return true;
    }
  }
  return false;
}

}  // namespace xla_kernels
