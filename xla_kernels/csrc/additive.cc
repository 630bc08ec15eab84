#include "additive.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "scan.h"

namespace xla_kernels {

void assign_additive(const AdditiveArguments& a, Pool& pool) {
  if (a.m == 0) return;
  AdditiveRow row = additive_row_portable();
  const char* level = kernels()->name;
  if (std::strcmp(level, "avx2") == 0 && additive_row_avx2() != nullptr) row = additive_row_avx2();
  if (std::strncmp(level, "avx512", 6) == 0 && additive_row_avx512() != nullptr) {
    row = additive_row_avx512();
  }
  constexpr int64_t kRowsPerTask = 64;
  const int64_t tasks = (a.n + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t threads = tasks > 1 ? usable_threads(pool) : 1;
  parallel_for(pool, threads, tasks, [&](int64_t task) {
    const int64_t floats = additive_scratch(a) + 16;
    const std::unique_ptr<float[]> storage(new float[static_cast<size_t>(floats)]);
    float* scratch = storage.get() + (64 - reinterpret_cast<uintptr_t>(storage.get()) % 64) % 64 / 4;
    const int64_t end = std::min((task + 1) * kRowsPerTask, a.n);
    for (int64_t i = task * kRowsPerTask; i < end; ++i) row(a, i, scratch);
  });
}

}  // namespace xla_kernels
