#include "top_k.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "collector.h"
#include "flagged.h"
#include "table.h"

namespace xla_kernels {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Queries whose tables and collectors are alive at a time.
constexpr int64_t kTile = 256;
// Rows below which a second thread does not pay.
constexpr int64_t kRowsPerShard = 16384;
// A sample of the rows is one block in so many.
constexpr int64_t kSampled = 32;

struct AlignedBytes {
  explicit AlignedBytes(int64_t bytes) : storage(new uint8_t[static_cast<size_t>(bytes) + 64]) {
    data = storage.get() + (64 - reinterpret_cast<uintptr_t>(storage.get()) % 64) % 64;
  }
  std::unique_ptr<uint8_t[]> storage;
  uint8_t* data;
};

// Subspaces of 16 entries each; a code beyond the table reads the last entry, as in exact_score.
void pad_table(const float* table, int64_t num_subspaces, int64_t num_codewords, float* out) {
  for (int64_t s = 0; s < num_subspaces; ++s) {
    for (int64_t j = 0; j < 16; ++j) {
      out[s * 16 + j] = table[s * num_codewords + std::min(j, num_codewords - 1)];
    }
  }
}

void prefetch_row(const Codes& codes, int64_t row) {
  const uint8_t* block = codes.block(row / codes.block_rows());
  const int64_t within = row % codes.block_rows();
  const int64_t at = codes.layout == Layout::kDwords ? 4 * (within & 15) : within;
  for (int64_t g = 0; g < codes.groups; ++g) __builtin_prefetch(block + 64 * g + at);
}

// Four rows of kLanes codes at once, 16 codewords a subspace: one row alone waits for its own sums.
void score_four(const float* table, const Codes& codes, const int32_t* rows, float* sums) {
  const uint8_t* at[4];
  float sum[4] = {};
  for (int r = 0; r < 4; ++r) at[r] = codes.block(rows[r] >> 5) + (rows[r] & 31);
  const int64_t m = codes.num_subspaces;
  int64_t s = 0;
  for (; s + 2 <= m; s += 2) {
    const float* low = table + 16 * s;
    for (int r = 0; r < 4; ++r) {
      const uint8_t byte = at[r][16 * s];  // half a group, 32 bytes, holds two subspaces
      sum[r] += low[byte & 15];
      sum[r] += low[16 + (byte >> 4)];
    }
  }
  for (int r = 0; r < 4; ++r) sums[r] = s < m ? sum[r] + table[16 * s + (at[r][16 * s] & 15)] : sum[r];
}

struct Scorer final : ExactScorer {
  const float* table = nullptr;
  const TopKArguments* arguments = nullptr;
  const Kernels* kernels = nullptr;

  void score(const int32_t* rows, int64_t count, float* scores) const override {
    const TopKArguments& a = *arguments;
    const bool vector = kernels->exact_rows != nullptr && gatherable(a.codes);
    const float* entries = table;
    std::vector<float> padded;
    if (vector && a.num_codewords != 16) {
      padded.resize(static_cast<size_t>(a.codes.num_subspaces) * 16);
      pad_table(table, a.codes.num_subspaces, a.num_codewords, padded.data());
      entries = padded.data();
    }
    constexpr int64_t kStep = 16;
    for (int64_t i = 0; i < std::min(kStep, count); ++i) prefetch_row(a.codes, rows[i]);
    for (int64_t i = 0; i < count; i += kStep) {
      const int64_t end = std::min(i + kStep, count);
      for (int64_t j = end; j < std::min(end + kStep, count); ++j) prefetch_row(a.codes, rows[j]);
      if (vector) {
        kernels->exact_rows(entries, a.codes, rows + i, end - i, scores + i);
        for (int64_t j = i; j < end; ++j) {
          scores[j] = finish_score(scores[j], a.terms.gain, a.terms.offset, rows[j]);
        }
      } else if (end - i == kStep && a.codes.layout == Layout::kLanes && a.num_codewords == 16) {
        for (int64_t j = i; j < end; j += 4) score_four(table, a.codes, rows + j, scores + j);
        for (int64_t j = i; j < end; ++j) {
          scores[j] = finish_score(scores[j], a.terms.gain, a.terms.offset, rows[j]);
        }
      } else {
        for (int64_t j = i; j < end; ++j) {
          scores[j] = exact_score(table, a.num_codewords, a.codes, a.terms.gain, a.terms.offset,
                                  rows[j]);
        }
      }
    }
  }
};

// One tile of queries: tables, and a collector for each query and shard of the rows.
class Tile {
 public:
  Tile(const TopKArguments& arguments, int64_t first, int64_t count, int64_t threads)
      : a_(arguments),
        kernels_(*kernels()),
        first_(first),
        count_(count),
        stride_(table_stride(a_.codes.layout, a_.num_codewords)),
        rounded_bytes_(rounded_table_bytes(a_.codes.layout, a_.codes.num_subspaces, a_.num_codewords)),
        expanded_bytes_(
            (kernels_.expanded_bytes(a_.codes.layout, a_.codes.groups, stride_) + 63) / 64 * 64),
        expanded_(expanded_bytes_ * count),
        bounds_(static_cast<size_t>(count)),
        scorers_(static_cast<size_t>(count)),
        live_() {
    // Threads take queries where there are enough, else shards of the rows.
    const int64_t by_queries = (count + 7) / 8;
    const int64_t blocks = a_.codes.num_blocks();
    if (threads > 1 && by_queries < threads) {
      const int64_t most = std::max<int64_t>(1, a_.codes.num_rows / kRowsPerShard);
      shards_ = std::min(most, 2 * threads);
    }
    blocks_per_shard_ = std::max<int64_t>(1, (blocks + shards_ - 1) / shards_);
    const int64_t rows_per_shard =
        std::min(blocks_per_shard_ * a_.codes.block_rows(), a_.codes.num_rows);
    capacity_ = Collector::capacity_for(a_.k, rows_per_shard);
    affine_ = a_.terms.gain != nullptr || a_.terms.offset != nullptr;
    // Masks of their own keep queries from sharing what is flagged.
    flagged_ = !affine_ && a_.valid_queries <= 1 &&
               can_flag(a_.codes, blocks_per_shard_, a_.k, kernels_);
  }

  int64_t shards() const { return shards_; }
  int64_t groups_of_queries() const { return static_cast<int64_t>(live_.size() + 7) / 8; }

  void prepare() {
    AlignedBytes rounded(rounded_bytes_);
    for (int64_t q = 0; q < count_; ++q) {
      const auto i = static_cast<size_t>(q);
      const float* table = table_of(q);
      bounds_[i] = round_table(table, a_.codes.layout, a_.codes.num_subspaces, a_.num_codewords,
                               kernels_, rounded.data);
      scorers_[i].table = table;
      scorers_[i].arguments = &a_;
      scorers_[i].kernels = &kernels_;
      if (!bounds_[i].finite || !bounds_[i].bounded) continue;
      kernels_.expand(rounded.data, a_.codes.layout, a_.codes.groups, stride_,
                      expanded_.data + q * expanded_bytes_);
      live_.push_back(q);
    }
    const size_t scans = live_.size() * static_cast<size_t>(shards_);
    if (!flagged_) {
      collectors_.resize(scans);
      return;
    }
    found_.resize(scans);
    if (a_.num_codewords == 16) return;
    padded_.resize(live_.size() * static_cast<size_t>(a_.codes.num_subspaces) * 16);
    for (size_t j = 0; j < live_.size(); ++j) {
      pad_table(table_of(live_[j]), a_.codes.num_subspaces, a_.num_codewords, padded_of(j));
    }
  }

  void scan(int64_t shard, int64_t from, int64_t to) {
    const int64_t begin = shard * blocks_per_shard_;
    const int64_t end = std::min(begin + blocks_per_shard_, a_.codes.num_blocks());
    if (begin >= end) return;
    if (flagged_) return scan_flags(shard, from, to, begin, end);
    std::vector<ScanQuery> queries(static_cast<size_t>(to - from));
    for (int64_t j = from; j < to; ++j) {
      const int64_t q = live_[static_cast<size_t>(j)];
      const TableBounds& bounds = bounds_[static_cast<size_t>(q)];
      ScanQuery& query = queries[static_cast<size_t>(j - from)];
      query.collector = &collectors_[static_cast<size_t>(j * shards_ + shard)];
      start(*query.collector, a_.k, q);
      query.table = expanded_.data + q * expanded_bytes_;
      query.valid = valid_of(q);
      // The float score lies within half the width around the centre.
      const float half = 0.5f * static_cast<float>(bounds.width);
      query.centre = bounds.base + bounds.delta * half;
      query.delta = bounds.delta;
      const float rounding = 4e-7f * (std::fabs(bounds.base) + bounds.delta * 256.0f *
                                      static_cast<float>(a_.codes.num_subspaces + 1));
      query.error = bounds.width == 0 && !affine_ ? 0.0f
                    : a_.exact ? bounds.delta * half * 1.000001f + rounding : 0.0f;
    }
    const int64_t rank = sampled_rank(to - from, (end - begin) * a_.codes.block_rows());
    if (rank > 0) expect(from, begin, end, rank, queries);
    kernels_.scan(a_.codes, a_.terms, begin, end, end, stride_, queries.data(), to - from);
    if (rank == 0) return;
    for (int64_t j = from; j < to; ++j) {
      ScanQuery& query = queries[static_cast<size_t>(j - from)];
      if (query.collector->holds_expected()) continue;
      start(*query.collector, a_.k, live_[static_cast<size_t>(j)]);
      kernels_.scan(a_.codes, a_.terms, begin, end, end, stride_, &query, 1);
    }
  }

  // Exact scores of the rows that any shard kept, and the k best of them.
  void finish(int64_t j) {
    const int64_t q = live_[static_cast<size_t>(j)];
    if (flagged_) return write_found(j);
    Collector* parts = &collectors_[static_cast<size_t>(j * shards_)];
    if (shards_ == 1) {
      parts[0].shrink();
      write(q, parts[0].rows, parts[0].size);
      return;
    }
    int64_t size = 0;
    for (int64_t s = 0; s < shards_; ++s) size += parts[s].size;
    Collector whole;
    const TableBounds& bounds = bounds_[static_cast<size_t>(q)];
    whole.start(a_.k, size + 64, affine_, parts[0].width, bounds.base, bounds.delta,
                &scorers_[static_cast<size_t>(q)], kernels_.count);
    for (int64_t s = 0; s < shards_; ++s) whole.append(parts[s]);
    whole.shrink();
    write(q, whole.rows, whole.size);
  }

  // Queries that the scan leaves out: not finite, no results; unbounded, every row exactly.
  void finish_others() {
    std::vector<int32_t> rows;
    for (int64_t q = 0; q < count_; ++q) {
      const TableBounds& bounds = bounds_[static_cast<size_t>(q)];
      if (bounds.finite && bounds.bounded) continue;
      rows.clear();
      if (bounds.finite) {
        const uint8_t* valid = valid_of(q);
        for (int64_t i = 0; i < a_.codes.num_rows; ++i) {
          if (valid == nullptr || valid[i] != 0) rows.push_back(static_cast<int32_t>(i));
        }
      }
      write(q, rows.data(), static_cast<int64_t>(rows.size()));
    }
  }

  int64_t num_live() const { return static_cast<int64_t>(live_.size()); }

 private:
  void scan_flags(int64_t shard, int64_t from, int64_t to, int64_t begin, int64_t end) {
    // One shard after another, queries side by side.
    FlaggedQuery* found = &found_[static_cast<size_t>(shard * num_live() + from)];
    for (int64_t j = from; j < to; ++j) {
      const int64_t q = live_[static_cast<size_t>(j)];
      const float* table = padded_.empty() ? table_of(q) : padded_of(static_cast<size_t>(j));
      found[j - from].start(a_.codes, expanded_.data + q * expanded_bytes_, table,
                            bounds_[static_cast<size_t>(q)], a_.k, a_.exact, kernels_);
    }
    scan_flagged(a_.codes, begin, end, valid_of(0), a_.k, found, to - from, kernels_);
  }
  void write_found(int64_t j) {
    std::vector<uint64_t> keys;
    keys.reserve(static_cast<size_t>(2 * a_.k + 64));
    for (int64_t s = 0; s < shards_; ++s) {
      const FlaggedQuery& found = found_[static_cast<size_t>(s * num_live() + j)];
      for (int64_t i = 0; i < found.size(); ++i) {
        keys.push_back(best_key(from_ordered(found.keys()[i]), found.rows()[i]));
      }
    }
    const int64_t at = (first_ + live_[static_cast<size_t>(j)]) * a_.k;
    write_best(keys.data(), static_cast<int64_t>(keys.size()), a_.k, a_.scores + at, a_.ids + at);
  }
  float* padded_of(size_t j) {
    return padded_.data() + j * static_cast<size_t>(a_.codes.num_subspaces) * 16;
  }
  const float* table_of(int64_t q) const {
    return a_.tables + (first_ + q) * a_.codes.num_subspaces * a_.num_codewords;
  }
  const uint8_t* valid_of(int64_t q) const {
    if (a_.valid_queries == 0) return nullptr;
    return a_.valid + (a_.valid_queries == 1 ? 0 : (first_ + q) * a_.codes.num_rows);
  }
  void start(Collector& collector, int64_t k, int64_t q) {
    const TableBounds& bounds = bounds_[static_cast<size_t>(q)];
    collector.start(k, capacity_, affine_, a_.exact ? bounds.width : 0, bounds.base, bounds.delta,
                    &scorers_[static_cast<size_t>(q)], kernels_.count);
  }
  // Rank in a sample of one block in kSampled of a score that the k-th best of all rows reaches, but
  // for one query in ten thousand; 0 where k rows come together too soon for a sample to pay, and for
  // few queries, which wait for its blocks as long as for many.
  int64_t sampled_rank(int64_t num_queries, int64_t num_rows) const {
    if (num_queries < 8 || a_.k < 48 || num_rows < 200 * a_.k) return 0;
    const double mean = static_cast<double>(a_.k) / kSampled;
    return static_cast<int64_t>(std::ceil(mean + 4.5 * std::sqrt(mean))) + 1;
  }
  // A scan that begins without a threshold keeps about k ln(n / k) rows for a while, and each costs
  // more than scoring thirty. Here a sample supplies one; should it prove too high, which shows when
  // fewer than k rows reach it, the scan is repeated without.
  void expect(int64_t from, int64_t begin, int64_t end, int64_t rank,
              std::vector<ScanQuery>& queries) {
    Collector collectors[8];
    for (size_t first = 0; first < queries.size(); first += 8) {
      const size_t count = std::min<size_t>(8, queries.size() - first);
      ScanQuery sampled[8];
      for (size_t i = 0; i < count; ++i) {
        sampled[i] = queries[first + i];
        sampled[i].collector = &collectors[i];
        start(collectors[i], rank, live_[static_cast<size_t>(from) + first + i]);
      }
      for (int64_t block = begin; block < end; block += kSampled) {
        const int64_t next = block + kSampled < end ? block + kSampled : begin;
        kernels_.scan(a_.codes, a_.terms, block, block + 1, next, stride_, sampled,
                      static_cast<int64_t>(count));
      }
      for (size_t i = 0; i < count; ++i) queries[first + i].collector->expect(collectors[i]);
    }
  }
  // Scores rows exactly and writes the best. Rows come roughly in ascending order.
  void write(int64_t q, const int32_t* rows, int64_t size) {
    std::vector<float> scores(static_cast<size_t>(size));
    scorers_[static_cast<size_t>(q)].score(rows, size, scores.data());
    std::vector<uint64_t> keys;
    keys.reserve(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) {
      const float score = scores[static_cast<size_t>(i)];
      if (score > kMinusInfinity) keys.push_back(best_key(score, rows[i]));  // false for NaN
    }
    const int64_t at = (first_ + q) * a_.k;
    write_best(keys.data(), static_cast<int64_t>(keys.size()), a_.k, a_.scores + at, a_.ids + at);
  }

  const TopKArguments& a_;
  const Kernels& kernels_;
  int64_t first_, count_, stride_, rounded_bytes_, expanded_bytes_;
  AlignedBytes expanded_;
  std::vector<TableBounds> bounds_;
  std::vector<Scorer> scorers_;
  std::vector<int64_t> live_;
  std::vector<Collector> collectors_;
  std::vector<FlaggedQuery> found_;
  std::vector<float> padded_;  // tables of fewer than 16 codewords
  int64_t shards_ = 1, blocks_per_shard_ = 1, capacity_ = 0;
  bool affine_ = false, flagged_ = false;
};

}  // namespace

void write_best(uint64_t* keys, int64_t size, int64_t k, float* scores, int32_t* ids) {
  const int64_t found = std::min(size, k);
  if (size > k) std::nth_element(keys, keys + k, keys + size);
  std::sort(keys, keys + found);
  for (int64_t i = 0; i < found; ++i) {
    const auto high = static_cast<uint32_t>(keys[i] >> 32) ^ 0x7fffffffu;
    scores[i] = from_ordered(static_cast<int32_t>(high));
    ids[i] = static_cast<int32_t>(keys[i] & 0xffffffffu);
  }
  for (int64_t i = found; i < k; ++i) {
    scores[i] = kMinusInfinity;
    ids[i] = -1;
  }
}

void top_k(const TopKArguments& a, Pool& pool) {
  const int64_t threads = a.num_queries * a.codes.num_rows >= 2 * kRowsPerShard
                              ? usable_threads(pool) : 1;
  for (int64_t first = 0; first < a.num_queries; first += kTile) {
    const int64_t count = std::min(kTile, a.num_queries - first);
    Tile tile(a, first, count, threads);
    tile.prepare();
    // A task is a share of the queries (whole groups of eight) and a shard of the rows.
    const int64_t groups = tile.groups_of_queries();
    const int64_t shares = threads == 1 ? std::min<int64_t>(groups, 1) : std::min(groups, 2 * threads);
    parallel_for(pool, threads, shares * tile.shards(), [&](int64_t task) {
      const int64_t share = task / tile.shards(), shard = task % tile.shards();
      const int64_t from = groups * share / shares * 8;
      const int64_t to = std::min(groups * (share + 1) / shares * 8, tile.num_live());
      tile.scan(shard, from, to);
    });
    const int64_t live = tile.num_live(), pieces = std::min<int64_t>(live, 4 * threads);
    parallel_for(pool, threads, pieces, [&](int64_t piece) {
      for (int64_t j = live * piece / pieces; j < live * (piece + 1) / pieces; ++j) tile.finish(j);
    });
    tile.finish_others();
  }
}

void all_scores(const ScoresArguments& a, Pool& pool) {
  const Kernels& table = *kernels();
  const bool vector = a.codes.layout == Layout::kDwords && table.exact_scores != nullptr;
  const int64_t size = a.codes.block_rows(), blocks = a.codes.num_blocks();
  const int64_t per_task = 256, tasks_per_query = (blocks + per_task - 1) / per_task;
  const int64_t m = a.codes.num_subspaces, n = a.codes.num_rows;
  // Tables padded to 16 entries, one query after another.
  AlignedBytes padded(vector ? a.num_queries * m * 64 + 64 : 64);
  auto* entries = reinterpret_cast<float*>(padded.data);
  if (vector) pad_table(a.tables, a.num_queries * m, a.num_codewords, entries);
  const int64_t threads = a.num_queries * n >= 2 * kRowsPerShard ? usable_threads(pool) : 1;
  parallel_for(pool, threads, a.num_queries * tasks_per_query, [&](int64_t task) {
    const int64_t q = task / tasks_per_query;
    const int64_t begin = task % tasks_per_query * per_task;
    const int64_t end = std::min(begin + per_task, blocks);
    float* out = a.scores + q * n;
    const int64_t last = std::min(end * size, n);
    if (vector) {
      float sums[8 * 32];
      for (int64_t i = begin; i < end; i += 8) {
        const int64_t stop = std::min(i + 8, end);
        table.exact_scores(entries + q * m * 16, a.codes, i, stop, sums);
        const int64_t until = std::min(stop * 32, n);
        for (int64_t row = i * 32; row < until; ++row) {
          out[row] = finish_score(sums[row - i * 32], a.terms.gain, a.terms.offset, row);
        }
      }
      return;
    }
    const float* own = a.tables + q * m * a.num_codewords;
    for (int64_t row = begin * size; row < last; ++row) {
      out[row] = exact_score(own, a.num_codewords, a.codes, a.terms.gain, a.terms.offset, row);
    }
  });
}

}  // namespace xla_kernels
