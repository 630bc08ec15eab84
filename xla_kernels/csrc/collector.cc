#include "collector.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace xla_kernels {

int64_t count_at_least(const int32_t* keys, int64_t size, int32_t pivot) {
  int32_t count = 0;
  for (int64_t i = 0; i < size; ++i) count += keys[i] >= pivot;
  return count;
}

int32_t kth_largest(const int32_t* keys, int64_t size, int64_t k, int64_t slack, CountAtLeast count) {
  int32_t least = keys[0], most = keys[0];
  for (int64_t i = 0; i < size; ++i) {
    least = keys[i] < least ? keys[i] : least;
    most = keys[i] > most ? keys[i] : most;
  }
  // count(least) >= k holds; count(above) < k is kept.
  int64_t below = least, above = static_cast<int64_t>(most) + 1;
  while (above - below > 1) {
    const int64_t middle = below + (above - below) / 2;
    const int64_t found = count(keys, size, static_cast<int32_t>(middle));
    if (found >= k) {
      below = middle;
      if (found <= k + slack) break;
    } else {
      above = middle;
    }
  }
  return static_cast<int32_t>(below);
}

int64_t Collector::capacity_for(int64_t k, int64_t num_rows) {
  // Untouched memory costs nothing, and scoring rows early costs more than keeping them; 64 is one
  // block's append.
  return std::min(12 * k + 2048, num_rows + 64) + 64;
}

void Collector::start(int64_t k_, int64_t capacity, bool affine_, int32_t width_, float base,
                      float delta, const ExactScorer* scorer, CountAtLeast count) {
  k = k_;
  affine = affine_;
  ascending = true;
  width = width_;
  base_ = base;
  delta_ = delta;
  scorer_ = scorer;
  count_ = count;
  capacity_ = capacity;
  const int64_t needed = capacity * (affine ? 3 : 2);
  if (stored_ < needed) {
    storage_.reset(new int32_t[static_cast<size_t>(needed)]);
    stored_ = needed;
  }
  low = storage_.get();
  rows = low + capacity;
  high = affine ? rows + capacity : nullptr;
  size = 0;
  limit = std::min(k + 128, capacity - 64);
  threshold = expected_ = INT32_MIN;
  float_threshold = -std::numeric_limits<float>::infinity();
}

void Collector::expect(const Collector& sample) {
  if (sample.size < sample.k) return;
  expected_ = kth_largest(sample.low, sample.size, sample.k, 0, count_);
  raise(expected_);
}

void Collector::append(const Collector& other) {
  std::copy(other.low, other.low + other.size, low + size);
  std::copy(other.rows, other.rows + other.size, rows + size);
  if (affine) std::copy(other.high, other.high + other.size, high + size);
  size += other.size;
}

void Collector::raise(int32_t kth) {
  if (affine) {
    float_threshold = std::max(float_threshold, from_ordered(kth));
  } else {
    const int64_t bar = static_cast<int64_t>(kth) - width - 1;
    threshold = static_cast<int32_t>(
        std::max<int64_t>(threshold, std::max<int64_t>(bar, INT32_MIN)));
  }
}

void Collector::shrink() {
  if (size <= k) return;
  const int32_t kth = kth_largest(low, size, k, k / 8, count_);
  raise(kth);
  int64_t kept = 0;
  if (affine) {
    for (int64_t i = 0; i < size; ++i) {
      const bool keep = high[i] >= kth;
      low[kept] = low[i];
      high[kept] = high[i];
      rows[kept] = rows[i];
      kept += keep;
    }
  } else {
    // low + width >= kth, without overflow; threshold is kth - width - 1 or higher.
    const int32_t bar = threshold;
    for (int64_t i = 0; i < size; ++i) {
      const int32_t key = low[i];
      low[kept] = key;
      rows[kept] = rows[i];
      kept += key > bar;
    }
  }
  size = kept;
  if (size > limit - limit / 3) {
    limit = std::min(2 * limit, capacity_ - 64);
    // Too many rows within the bounds of the k-th: score them, so that the next must be better.
    if (size > limit - (limit - k) / 4) shrink_exactly();
  }
}

void Collector::shrink_exactly() {
  struct Scored {
    float negative;
    int32_t place;
    int32_t row;
    bool operator<(const Scored& other) const {
      return negative != other.negative ? negative < other.negative : place < other.place;
    }
  };
  std::vector<Scored> scored;
  scored.reserve(static_cast<size_t>(size));
  std::vector<float> scores(static_cast<size_t>(size));
  scorer_->score(rows, size, scores.data());
  for (int64_t i = 0; i < size; ++i) {
    const float score = scores[static_cast<size_t>(i)];
    if (score > -std::numeric_limits<float>::infinity()) scored.push_back({-score, scorer_->place(rows[i]), rows[i]});
  }
  // Best first, lowest place first among equals.
  if (static_cast<int64_t>(scored.size()) > k) {
    std::nth_element(scored.begin(), scored.begin() + (k - 1), scored.end());
    scored.resize(static_cast<size_t>(k));
    const float worst = -scored[static_cast<size_t>(k - 1)].negative;
    if (affine) {
      float_threshold = std::max(float_threshold, worst);
    } else {
      // A later row must score more (or, out of order, as much): q + width > (worst - base) / delta.
      const double q = (static_cast<double>(worst) - base_) / delta_;
      const double bar = q - width - (ascending ? 0 : 1);
      if (bar > threshold) {
        threshold = bar < 2e9 ? static_cast<int32_t>(std::floor(bar)) : 2000000000;
      }
    }
  }
  size = 0;
  for (const Scored& kept : scored) {
    rows[size] = kept.row;
    if (affine) {
      low[size] = high[size] = ordered(-kept.negative);
    } else {
      // The largest key that its score supports; width covers the rounding of this line too.
      const double q = (-static_cast<double>(kept.negative) - base_) / delta_;
      low[size] = q < -2e9 ? -2000000000 : q > 2e9 ? 2000000000 : static_cast<int32_t>(std::floor(q));
    }
    ++size;
  }
}

}  // namespace xla_kernels
