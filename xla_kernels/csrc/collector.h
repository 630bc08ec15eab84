// The rows that may still be among the k best of one query.
#pragma once

#include <cstdint>
#include <memory>

namespace xla_kernels {

// Order-preserving map of floats to integers; NaN must be kept out.
inline int32_t ordered(float x) {
  union {
    float f;
    int32_t i;
  } u;
  u.f = x;
  return u.i ^ ((u.i >> 31) & 0x7fffffff);
}
inline float from_ordered(int32_t i) {
  union {
    float f;
    int32_t i;
  } u;
  u.i = i ^ ((i >> 31) & 0x7fffffff);
  return u.f;
}

// Counts keys >= pivot; supplied by the instruction set in use.
using CountAtLeast = int64_t (*)(const int32_t* keys, int64_t size, int32_t pivot);

int64_t count_at_least(const int32_t* keys, int64_t size, int32_t pivot);

// Some t such that k to k + slack of the keys are >= t, by bisection on the key range, or where equal
// keys leave none the largest t such that at least k are (1 <= k <= size).
int32_t kth_largest(const int32_t* keys, int64_t size, int64_t k, int64_t slack, CountAtLeast count);

// Scores rows exactly; used when the bounds alone cannot tell rows apart (ties, duplicates).
struct ExactScorer {
  virtual ~ExactScorer() = default;
  virtual void score(const int32_t* rows, int64_t count, float* scores) const = 0;
  // Equal scores: the row of the lowest place first.
  virtual int32_t place(int32_t row) const { return row; }
};

// A fixed buffer of candidate rows with a lower and an upper bound of each score as integer keys.
// Without gains a key is the sum of the rounded entries and high = low + width; with gains both are
// float bounds mapped by ordered(). A row whose high is below the k-th largest low cannot be among
// the k best. When limit rows are held, shrink() drops such rows and raises the threshold; the limit
// starts low, since an early threshold spares appending, and grows where many rows must be kept.
class Collector {
 public:
  // capacity is the buffer a query of k results needs for num_rows rows.
  static int64_t capacity_for(int64_t k, int64_t num_rows);

  void start(int64_t k, int64_t capacity, bool affine, int32_t width, float base, float delta,
             const ExactScorer* scorer, CountAtLeast count);

  // Scans append at size, up to 64 rows between two calls of make_room().
  void make_room() {
    if (size > limit) shrink();
  }
  void shrink();
  // Expects k rows that reach what the best rows of a sample reach, and begins with the threshold that
  // they would set. Until holds_expected() rows may have been left out wrongly.
  void expect(const Collector& sample);
  bool holds_expected() const { return count_(low, size, expected_) >= k; }
  // Appends the rows of another collector of the same query; capacity must hold them.
  void append(const Collector& other);

  // Rows with key > threshold (without gains), or not(high < float_threshold), may matter.
  int32_t threshold = INT32_MIN;
  float float_threshold = 0;
  int64_t size = 0;
  int64_t limit = 0;
  int32_t* low = nullptr;
  int32_t* high = nullptr;  // with gains only
  int32_t* rows = nullptr;
  int32_t width = 0;
  bool affine = false;
  // Rows are appended in ascending order, so that among equals the ones already held win. A scan of
  // ranges in another order clears this after start().
  bool ascending = true;
  int64_t k = 0;

 private:
  void shrink_exactly();
  void raise(int32_t kth);

  int32_t expected_ = INT32_MIN;
  float base_ = 0, delta_ = 1;
  const ExactScorer* scorer_ = nullptr;
  CountAtLeast count_ = nullptr;
  int64_t capacity_ = 0;
  std::unique_ptr<int32_t[]> storage_;
  int64_t stored_ = 0;
};

}  // namespace xla_kernels
