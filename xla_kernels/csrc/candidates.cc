#include "candidates.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "collector.h"
#include "scan.h"
#include "top_k.h"

namespace xla_kernels {
namespace {

// The best of each row, of candidates in order, until `keep` rows and those that equal the last.
size_t distinct(uint64_t* found, size_t count, size_t keep) {
  uint64_t seen[64] = {};  // a bit for the last 12 bits of a row: most rows need no comparison
  size_t kept = 0;
  for (size_t i = 0; i < count; ++i) {
    if (kept >= keep && found[i] >> 32 != found[keep - 1] >> 32) break;
    const auto row = static_cast<uint32_t>(found[i]);
    const auto same = [row](uint64_t c) { return static_cast<uint32_t>(c) == row; };
    uint64_t& word = seen[row / 64 % 64];
    const uint64_t bit = uint64_t{1} << (row % 64);
    if ((word & bit) != 0 && std::any_of(found, found + kept, same)) continue;
    word |= bit;
    found[kept++] = found[i];
  }
  return kept;
}

// Room for one query: its candidates as best_key(), and their scores as ordered().
struct Scratch {
  std::vector<uint64_t> found;
  std::vector<int32_t> keys;
};

void best_of(const CandidateArguments& a, int64_t q, Scratch& scratch) {
  const auto all = static_cast<size_t>(a.parts * a.size), width = static_cast<size_t>(a.width);
  scratch.found.resize(all + 1);
  scratch.keys.resize(all + 1);
  uint64_t* found = scratch.found.data();
  int32_t* keys = scratch.keys.data();
  size_t size = 0;
  for (int64_t p = 0; p < a.parts; ++p) {
    const float* scores = a.scores + (p * a.num_queries + q) * a.size;
    const int32_t* rows = a.rows + (p * a.num_queries + q) * a.size;
    for (int64_t i = 0; i < a.size; ++i) {
      // Lists end in rows of -1, mostly long before their width.
      if (i % 16 == 0 && i + 16 <= a.size) {
        int32_t none = -1;
        for (int64_t j = 0; j < 16; ++j) none &= rows[i + j];
        if (none < 0) {
          i += 15;
          continue;
        }
      }
      found[size] = best_key(scores[i], rows[i]);
      keys[size] = ordered(scores[i]);
      // False for NaN.
      size += rows[i] >= 0 && scores[i] > -std::numeric_limits<float>::infinity();
    }
  }
  size_t count = size;
  const auto most = static_cast<int64_t>(size);
  if (a.retrieve < most) {
    const int32_t bar = kth_largest(keys, most, a.retrieve, 0, kernels()->count);
    count = 0;
    for (size_t i = 0; i < size; ++i) {
      found[count] = found[i];
      count += keys[i] >= bar;
    }
  }
  if (a.keep < a.retrieve) {
    std::sort(found, found + count);
    count = distinct(found, count, static_cast<size_t>(a.keep));
  } else if (count > width) {  // more that equal the last than there is room for: the lowest rows
    std::nth_element(found, found + width, found + count);
  }
  count = std::min(count, width);
  float* best_scores = a.best_scores + q * a.width;
  int32_t* best_rows = a.best_rows + q * a.width;
  for (size_t i = 0; i < count; ++i) {
    best_scores[i] = from_ordered(static_cast<int32_t>(static_cast<uint32_t>(found[i] >> 32) ^ 0x7fffffffu));
    best_rows[i] = static_cast<int32_t>(found[i] & 0xffffffffu);
  }
  std::fill(best_scores + count, best_scores + width, -std::numeric_limits<float>::infinity());
  std::fill(best_rows + count, best_rows + width, -1);
}

}  // namespace

void best_candidates(const CandidateArguments& a, Pool& pool) {
  constexpr int64_t kTogether = 32;
  const int64_t tasks = (a.num_queries + kTogether - 1) / kTogether;
  parallel_for(pool, tasks > 1 ? usable_threads(pool) : 1, tasks, [&](int64_t t) {
    thread_local Scratch scratch;
    const int64_t end = std::min(a.num_queries, (t + 1) * kTogether);
    for (int64_t q = t * kTogether; q < end; ++q) best_of(a, q, scratch);
  });
}

}  // namespace xla_kernels
