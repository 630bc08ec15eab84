// Work sharing over a borrowed thread pool, without ever waiting for work that nobody has begun.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace xla_kernels {

// A pool to borrow threads from; the default has none.
struct Pool {
  virtual ~Pool() = default;
  virtual int64_t num_threads() const { return 0; }
  virtual void schedule(std::function<void()> task) { task(); }
};

// Threads worth using: those of the pool, and no more than the processors this thread may run on.
inline int64_t usable_threads(const Pool& pool) {
  int64_t threads = pool.num_threads();
  if (threads <= 1) return 1;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    const int64_t allowed = CPU_COUNT(&set);
    threads = allowed < threads ? allowed : threads;
  }
#endif
  return threads < 1 ? 1 : threads;
}

// Runs work(0) ... work(tasks - 1), in order where threads is 1. Tasks are claimed from a counter;
// the caller claims until none is left and then waits only for tasks that a running thread has
// claimed. Helpers that the pool starts too late find nothing to do. So a pool whose threads are
// all blocked in calls like this one still makes progress, which waiting for scheduled tasks to
// begin would not.
inline void parallel_for(Pool& pool, int64_t threads, int64_t tasks,
                         const std::function<void(int64_t)>& work) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t i = 0; i < tasks; ++i) work(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    int64_t tasks = 0;
    const std::function<void(int64_t)>* work = nullptr;  // valid while done < tasks
    void run() {
      for (int64_t i = next.fetch_add(1); i < tasks; i = next.fetch_add(1)) {
        (*work)(i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  auto shared = std::make_shared<Shared>();
  shared->tasks = tasks;
  shared->work = &work;
  const int64_t helpers = (threads < tasks ? threads : tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.schedule([shared] { shared->run(); });
  shared->run();
  while (shared->done.load(std::memory_order_acquire) < tasks) std::this_thread::yield();
}

}  // namespace xla_kernels
