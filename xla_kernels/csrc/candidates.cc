#include "candidates.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "collector.h"
#include "scan.h"
#include "top_k.h"

namespace xla_kernels {
namespace {

struct Candidate {
  uint64_t key;  // best_key(): ascending keys are descending scores, then ascending rows
  int32_t place;
  bool operator<(const Candidate& other) const {
    return key != other.key ? key < other.key : place < other.place;
  }
  uint32_t score() const { return static_cast<uint32_t>(key >> 32); }
  uint32_t row() const { return static_cast<uint32_t>(key); }
};

// The best of each row, of candidates in order, until `keep` rows and those that equal the last.
size_t distinct(Candidate* found, size_t count, size_t keep) {
  size_t kept = 0;
  for (size_t i = 0; i < count; ++i) {
    if (kept >= keep && found[i].score() != found[keep - 1].score()) break;
    const uint32_t row = found[i].row();
    if (std::any_of(found, found + kept, [row](const Candidate& c) { return c.row() == row; })) {
      continue;
    }
    found[kept++] = found[i];
  }
  return kept;
}

constexpr int32_t kNothing = std::numeric_limits<int32_t>::min();

void places_of(const CandidateArguments& a, int64_t q, std::vector<int32_t>& keys,
               std::vector<Candidate>& found) {
  const float* scores = a.scores + q * a.size;
  const int32_t* rows = a.rows + q * a.size;
  int32_t* out = a.places + q * a.width;
  const auto size = static_cast<size_t>(a.size), width = static_cast<size_t>(a.width);
  keys.resize(size);
  for (size_t i = 0; i < size; ++i) {
    // False for NaN.
    const bool there = rows[i] >= 0 && scores[i] > -std::numeric_limits<float>::infinity();
    keys[i] = there ? ordered(scores[i]) : kNothing;
  }
  const int32_t bar = a.retrieve < a.size ? std::max(kth_largest(keys.data(), a.size, a.retrieve, 0,
                                                                 kernels()->count),
                                                     kNothing + 1)
                                          : kNothing + 1;
  size_t count = 0;
  const auto passing = static_cast<size_t>(kernels()->count(keys.data(), a.size, bar));
  if (a.keep >= a.retrieve && passing <= width) {
    for (size_t i = 0; i < size && count < width; ++i) {
      out[count] = static_cast<int32_t>(i);
      count += keys[i] >= bar;
    }
  } else {
    found.clear();
    for (size_t i = 0; i < size; ++i) {
      if (keys[i] >= bar) found.push_back({best_key(scores[i], rows[i]), static_cast<int32_t>(i)});
    }
    if (a.keep >= a.retrieve) {  // more that equal the last than there is room for: the lowest rows
      std::nth_element(found.begin(), found.begin() + static_cast<int64_t>(width), found.end());
      for (; count < width; ++count) out[count] = found[count].place;
      return;
    }
    std::sort(found.begin(), found.end());
    count = std::min(width, distinct(found.data(), found.size(), static_cast<size_t>(a.keep)));
    for (size_t i = 0; i < count; ++i) out[i] = found[i].place;
  }
  std::fill(out + count, out + width, -1);
}

}  // namespace

void best_places(const CandidateArguments& a, Pool& pool) {
  constexpr int64_t kTogether = 32;
  const int64_t tasks = (a.num_queries + kTogether - 1) / kTogether;
  parallel_for(pool, tasks > 1 ? usable_threads(pool) : 1, tasks, [&](int64_t t) {
    thread_local std::vector<int32_t> keys;
    thread_local std::vector<Candidate> found;
    const int64_t end = std::min(a.num_queries, (t + 1) * kTogether);
    for (int64_t q = t * kTogether; q < end; ++q) places_of(a, q, keys, found);
  });
}

}  // namespace xla_kernels
