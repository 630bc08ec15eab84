#include "flagged.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "collector.h"

namespace xla_kernels {
namespace {

// As ordered(), below the score of any row.
const int32_t kNothing = ordered(-std::numeric_limits<float>::infinity());

// Queries share a piece of the codes that stays in the second-level cache.
constexpr int64_t kPieceBytes = 256 << 10;
constexpr int64_t kBlockRows = 32;

// A sample of one pair of adjacent blocks in `step`, and the rank in it of a sum that the k-th best of
// all rows reaches, but for one query in six hundred. A small sample costs less, a large one lets fewer
// rows pass.
struct Sample {
  int64_t step, rank;

  Sample(int64_t step_, int64_t k) : step(step_) {
    const double mean = static_cast<double>(k) / static_cast<double>(step);
    rank = static_cast<int64_t>(std::ceil(mean + 3.3 * std::sqrt(mean))) + 1;
  }
  // Three blocks for each rank: 8 numbers a block are the largest in their lane.
  bool fits(int64_t blocks) const { return blocks / step >= 3 * rank; }
  static Sample of(int64_t blocks, int64_t k) {
    int64_t step = 32;
    while (step > 8 && !Sample(step, k).fits(blocks)) step /= 2;
    while (step < 256 && blocks / step > 512 && Sample(2 * step, k).fits(blocks)) step *= 2;
    return Sample(step, k);
  }
};

// Arrays that a thread keeps from one scan to the next: freed, large ones go back to the system.
struct Room {
  std::vector<uint64_t> words;
  std::vector<uint8_t> flags;
  std::vector<int32_t> found;

  static Room& own() {
    thread_local Room room;
    return room;
  }
};

template <typename T>
T* at_least(int64_t size, std::vector<T>& kept) {
  if (static_cast<size_t>(size) > kept.size()) kept.resize(static_cast<size_t>(size));
  return kept.data();
}

// The queries that are scanned together: 8, 4, 2 or 1.
int64_t group_of(int64_t left) { return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

void expect(const Codes& codes, int64_t begin, int64_t end, const uint8_t* valid,
            const Sample& sample, FlaggedQuery* queries, const uint8_t* const* tables,
            int64_t num_queries, const Kernels& kernels) {
  const int64_t pairs = (end - begin + 2 * sample.step - 1) / (2 * sample.step);
  const int64_t together = std::max<int64_t>(1, pairs / (2 * sample.rank));
  const int64_t size = (pairs + together - 1) / together * 16;
  int32_t* sums = at_least(8 * size, Room::own().found);
  for (int64_t q = 0, count; q < num_queries; q += count) {
    count = group_of(num_queries - q);
    kernels.maxima(codes, begin, end, sample.step, together, tables + q, valid, count, sums, size);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t rank = std::min(sample.rank, size);
      const int32_t sum = kth_largest(sums + i * size, size, rank, 0, kernels.count);
      if (sum > INT32_MIN) queries[q + i].expect(sum);  // or few rows are valid
    }
  }
}

// Hands the flagged rows to their queries (Kernels::flag).
void hand_out(const uint8_t* flags, const int32_t* found, int64_t num_found, int64_t num_rows,
              FlaggedQuery* queries) {
  for (int64_t i = 0; i < num_found; ++i) {
    const int64_t first = found[i] * kBlockRows;
    for (int64_t w = 0; w < kBlockRows; w += 8) {
      uint64_t bits;
      std::memcpy(&bits, flags + i * kBlockRows + w, 8);
      for (; bits != 0; bits &= bits - 1) {
        const int at = __builtin_ctzll(bits);
        const int64_t row = first + w + at / 8;
        const auto passed = static_cast<int32_t>(row);
        if (row < num_rows) queries[at % 8].add(&passed, 1);
      }
    }
  }
}

void scan(const Codes& codes, int64_t begin, int64_t end, const uint8_t* valid, const Sample* sample,
          FlaggedQuery* queries, int64_t num_queries, const Kernels& kernels) {
  std::vector<const uint8_t*> tables(static_cast<size_t>(num_queries));
  for (int64_t q = 0; q < num_queries; ++q) tables[static_cast<size_t>(q)] = queries[q].expanded();
  if (sample != nullptr) {
    const int64_t whole = std::min(end, codes.num_rows / kBlockRows);
    expect(codes, begin, whole, valid, *sample, queries, tables.data(), num_queries, kernels);
  }
  // Flagged rows are scored while their codes are cached. Pieces of a multiple of four blocks: see flag_rows.
  // One query gains by fewer pieces, of long ranges.
  const int64_t all_bytes = (end - begin) * codes.groups * 64;
  const int64_t piece_bytes =
      num_queries == 1 ? std::clamp(all_bytes / 6, 2 * kPieceBytes, 5 * kPieceBytes) : kPieceBytes;
  const int64_t most = std::min(4 + piece_bytes / (codes.groups * 64 + 1) / 4 * 4,
                                (end - begin + 3) / 4 * 4);
  Room& room = Room::own();
  const bool odd = num_queries % 2 == 1;
  uint64_t* scratch = at_least(odd ? most + 32 : 0, room.words);
  uint8_t* flags = at_least(num_queries > 1 ? most * kBlockRows : 0, room.flags);
  int32_t* found = at_least(odd ? most * kBlockRows + 1 : most, room.found);
  // Without a sample the first piece is short: all of its rows pass.
  int64_t piece = sample != nullptr ? most : 4;
  for (int64_t from = begin, to; from < end; from = to, piece = std::min(2 * piece, most)) {
    to = std::min(from + piece, end);
    for (int64_t q = 0, count; q < num_queries; q += count) {
      count = group_of(num_queries - q);
      // What the next queries, or the next piece, will read is fetched in time.
      const int64_t next = q + count < num_queries ? from : to;
      if (count == 1) {
        const int64_t num_found =
            kernels.flag_rows(codes, from, to, next, queries[q].expanded(), queries[q].threshold(),
                              valid, scratch, found);
        queries[q].add(found, num_found);
        continue;
      }
      int32_t thresholds[8];
      for (int64_t i = 0; i < count; ++i) thresholds[i] = queries[q + i].threshold();
      const int64_t num_found =
          kernels.flag(codes, from, to, next, tables.data() + q, thresholds, valid, count, flags, found);
      hand_out(flags, found, num_found, codes.num_rows, queries + q);
    }
  }
  for (int64_t q = 0; q < num_queries; ++q) queries[q].finish();
}

}  // namespace

void FlaggedQuery::start(const Codes& codes, const uint8_t* expanded, const float* table,
                         const TableBounds& bounds, int64_t k, bool exact,
                         const Kernels& kernels) {
  codes_ = &codes;
  kernels_ = &kernels;
  expanded_ = expanded;
  table_ = table;
  base_ = bounds.base;
  delta_ = bounds.delta;
  // What rounding takes from a sum: the mean, and a bound for almost all rows; `width` for all.
  const double spread =
      bounds.width == 0 ? 0 : 0.6 * std::sqrt(static_cast<double>(codes.num_subspaces)) + 1;
  likely_ = std::max(0.0, static_cast<double>(bounds.lost) - spread);
  slack_ = bounds.width;
  if (!exact) slack_ = std::min(slack_, static_cast<double>(bounds.lost) + spread);
  k_ = k;
  limit_ = k + std::max<int64_t>(32, k / 2);
  if (stored_ < 2 * (limit_ + kTogether)) {
    stored_ = 2 * (limit_ + kTogether);
    keys_.reset(new int32_t[static_cast<size_t>(stored_)]);
  }
  restart();
}

void FlaggedQuery::restart() {
  size_ = num_waiting_ = 0;
  threshold_ = -1;
  bar_ = expected_ = kNothing;
  bar_row_ = INT32_MAX;
}

// Rows with sums of more than `sum`, or as much, matter.
void FlaggedQuery::raise(double sum) {
  const double least = std::min(sum - slack_, 1e9);
  threshold_ = std::max(threshold_, static_cast<int32_t>(std::floor(std::max(least, -1.0))));
}

void FlaggedQuery::expect(int32_t sum) {
  const double likely = sum + likely_;
  const auto score = static_cast<float>(base_ + delta_ * likely);
  expected_ = ordered(std::nextafter(score, std::numeric_limits<float>::infinity()));
  raise(likely - 1);
}

bool FlaggedQuery::holds() const {
  return expected_ == kNothing || kernels_->count(keys_.get(), size_, expected_) >= k_;
}

void FlaggedQuery::add(const int32_t* rows, int64_t count) {
  while (count > 0) {
    const int64_t more = std::min(kTogether - num_waiting_, count);
    std::copy(rows, rows + more, waiting_ + num_waiting_);
    rows += more;
    count -= more;
    num_waiting_ += more;
    if (num_waiting_ == kTogether) finish();
  }
}

void FlaggedQuery::finish() {
  float scores[kTogether];
  kernels_->exact_rows(table_, *codes_, waiting_, num_waiting_, scores);
  int32_t* keys = keys_.get();
  int32_t* rows = keys + limit_ + kTogether;
  for (int64_t i = 0; i < num_waiting_; ++i) {
    keys[size_] = ordered(scores[i] + 0.0f);  // -0 becomes 0
    rows[size_] = waiting_[i];
    size_ += keys[size_] > bar_ || (keys[size_] == bar_ && waiting_[i] < bar_row_);
  }
  num_waiting_ = 0;
  if (size_ >= limit_) trim();
}

// Leaves the k best, of equals the lowest rows, and raises the threshold: rows beyond all that came
// must score more.
void FlaggedQuery::trim() {
  int32_t* keys = keys_.get();
  int32_t* rows = keys + limit_ + kTogether;
  const int32_t kth = kth_largest(keys, size_, k_, 0, kernels_->count);
  const auto leave = [&](int32_t last_of_equals) {
    int64_t kept = 0;
    for (int64_t i = 0; i < size_; ++i) {
      const int32_t key = keys[i], row = rows[i];
      keys[kept] = key;
      rows[kept] = row;
      kept += key > kth || (key == kth && row <= last_of_equals);
    }
    size_ = kept;
  };
  bar_ = kth;
  bar_row_ = INT32_MAX;
  leave(bar_row_);
  if (size_ > k_) {
    std::vector<int32_t> equals;
    for (int64_t i = 0; i < size_; ++i) {
      if (keys[i] == kth) equals.push_back(rows[i]);
    }
    const auto last = equals.end() - 1 - (size_ - k_);
    std::nth_element(equals.begin(), last, equals.end());
    bar_row_ = *last;
    leave(bar_row_);
  }
  raise((static_cast<double>(from_ordered(kth)) - base_) / delta_);
}

bool can_flag(const Codes& codes, int64_t blocks, int64_t k, const Kernels& kernels) {
  return kernels.flag != nullptr && gatherable(codes) && Sample::of(blocks, k).fits(blocks);
}

void scan_flagged(const Codes& codes, int64_t begin, int64_t end, const uint8_t* valid, int64_t k,
                  FlaggedQuery* queries, int64_t num_queries, const Kernels& kernels) {
  // The last range of several may be too short.
  const int64_t blocks = std::min(end, codes.num_rows / kBlockRows) - begin;
  const Sample sample = Sample::of(blocks, k);
  const bool fits = sample.fits(blocks);
  scan(codes, begin, end, valid, fits ? &sample : nullptr, queries, num_queries, kernels);
  if (!fits) return;
  for (int64_t q = 0; q < num_queries; ++q) {
    if (queries[q].holds()) continue;
    queries[q].restart();
    scan(codes, begin, end, valid, nullptr, queries + q, 1, kernels);
  }
}

}  // namespace xla_kernels
