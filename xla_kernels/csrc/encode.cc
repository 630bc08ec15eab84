#include "encode.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "scan.h"

namespace xla_kernels {

void encode(const EncodeArguments& a, Pool& pool) {
  EncodeBlock block = encode_block_portable();
  const char* level = kernels()->name;
  if (std::strcmp(level, "avx2") == 0 && encode_block_avx2() != nullptr) block = encode_block_avx2();
  if (std::strncmp(level, "avx512", 6) == 0 && encode_block_avx512() != nullptr) {
    block = encode_block_avx512();
  }
  constexpr int64_t kRowsPerTask = 256;
  const int64_t tasks = (a.n + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t threads = tasks > 1 ? usable_threads(pool) : 1;
  parallel_for(pool, threads, tasks, [&](int64_t task) {
    const int64_t floats = encode_scratch(a) + 16;
    const std::unique_ptr<float[]> storage(new float[static_cast<size_t>(floats)]);
    float* scratch = storage.get() + (64 - reinterpret_cast<uintptr_t>(storage.get()) % 64) % 64 / 4;
    const int64_t end = std::min((task + 1) * kRowsPerTask, a.n);
    for (int64_t first = task * kRowsPerTask; first < end; first += 16) block(a, first, scratch);
  });
}

}  // namespace xla_kernels
