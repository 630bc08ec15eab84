#include "dot.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "collector.h"
#include "top_k.h"
#include "tree_search.h"

namespace xla_kernels {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int64_t kTile = 1024;
constexpr int64_t kRowsPerShard = 16384;

struct DotScorer final : ExactScorer {
  const ByteRows* rows = nullptr;
  const int8_t* query = nullptr;  // padded to whole groups
  int32_t shift = 0;
  const float* scale = nullptr;

  void score(const int32_t* wanted, int64_t count, float* scores) const override {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = wanted[i];
      const uint8_t* lane = rows->block(row / 16) + 4 * (row % 16);
      int32_t sum = shift;
      for (int64_t g = 0; g < rows->groups; ++g) {
        for (int c = 0; c < 4; ++c) sum += lane[64 * g + c] * query[4 * g + c];
      }
      scores[i] = finish_key(sum, row);
    }
  }
  float finish_key(int32_t key, int64_t row) const {
    const float score = static_cast<float>(key);
    return (scale == nullptr ? score : score * scale[row]) + 0.0f;
  }
};

}  // namespace

void dot_scan_portable(const ByteRows& rows, const RowTerms& terms, int64_t begin, int64_t end,
                       const ScanQuery* queries, int64_t num_queries) {
  Codes shape;  // append_block asks it for the number of rows alone
  shape.num_rows = rows.num_rows;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t q = 0; q < num_queries; ++q) {
      const auto* query = static_cast<const int8_t*>(queries[q].table);
      const uint8_t* block = rows.block(i);
      int32_t sums[16] = {};
      for (int64_t g = 0; g < rows.groups; ++g) {
        for (int v = 0; v < 16; ++v) {
          for (int c = 0; c < 4; ++c) sums[v] += block[64 * g + 4 * v + c] * query[4 * g + c];
        }
      }
      append_block(sums, 16, shape, terms, i * 16, queries[q]);
    }
  }
}

void dot_top_k(const DotArguments& a, Pool& pool) {
  const bool vnni = std::strcmp(kernels()->name, "avx512vbmi") == 0 && dot_scan_avx512vnni() != nullptr;
  const DotScan scan = vnni ? dot_scan_avx512vnni() : dot_scan_portable;
  const CountAtLeast count = kernels()->count;
  const bool affine = a.scale != nullptr;
  const int64_t n = a.rows.num_rows, blocks = a.rows.num_blocks();
  const int64_t threads = a.num_queries * n >= 2 * kRowsPerShard ? usable_threads(pool) : 1;
  const int64_t padded = a.rows.groups * 4;
  for (int64_t first = 0; first < a.num_queries; first += kTile) {
    const int64_t tile = std::min(kTile, a.num_queries - first);
    std::vector<int8_t> queries(static_cast<size_t>(tile * padded + 64));
    std::vector<DotScorer> scorers(static_cast<size_t>(tile));
    for (int64_t q = 0; q < tile; ++q) {
      const int8_t* from = a.queries + (first + q) * a.width;
      std::copy(from, from + a.width, queries.begin() + q * padded);
      DotScorer& scorer = scorers[static_cast<size_t>(q)];
      scorer.rows = &a.rows;
      scorer.query = queries.data() + q * padded;
      scorer.scale = a.scale;
      for (int64_t t = 0; t < a.width; ++t) scorer.shift -= 128 * from[t];
    }
    const int64_t groups = (tile + 7) / 8;
    const int64_t most = std::max<int64_t>(1, n / kRowsPerShard);
    const int64_t shards = threads > groups ? std::min(most, 2 * threads) : 1;
    const int64_t per_shard = std::max<int64_t>(1, (blocks + shards - 1) / shards);
    const int64_t capacity = Collector::capacity_for(a.k, std::min(per_shard * 16, n));
    std::vector<Collector> collectors(static_cast<size_t>(tile * shards));
    const int64_t shares = threads == 1 ? std::min<int64_t>(groups, 1) : std::min(groups, 2 * threads);
    RowTerms terms;
    terms.gain = a.scale;
    parallel_for(pool, threads, shares * shards, [&](int64_t task) {
      const int64_t share = task / shards, shard = task % shards;
      const int64_t from = groups * share / shares * 8;
      const int64_t to = std::min(groups * (share + 1) / shares * 8, tile);
      std::vector<ScanQuery> scanned(static_cast<size_t>(to - from));
      for (int64_t q = from; q < to; ++q) {
        ScanQuery& query = scanned[static_cast<size_t>(q - from)];
        DotScorer& scorer = scorers[static_cast<size_t>(q)];
        query.collector = &collectors[static_cast<size_t>(q * shards + shard)];
        query.collector->start(a.k, capacity, affine, 0, 0.0f, 1.0f, &scorer, count);
        query.table = scorer.query;
        query.shift = scorer.shift;
        if (a.valid_queries != 0) {
          query.valid = a.valid + (a.valid_queries == 1 ? 0 : (first + q) * n);
        }
      }
      const int64_t begin = shard * per_shard, end = std::min(begin + per_shard, blocks);
      if (begin < end) scan(a.rows, terms, begin, end, scanned.data(), to - from);
    });
    parallel_for(pool, threads, tile, [&](int64_t q) {
      // Keys are exact: scores follow from them without another look at the rows.
      std::vector<uint64_t> keys;
      std::vector<float> scores;
      for (int64_t s = 0; s < shards; ++s) {
        Collector& part = collectors[static_cast<size_t>(q * shards + s)];
        part.shrink();
        scores.resize(static_cast<size_t>(part.size));
        for (int64_t i = 0; i < part.size; ++i) {
          float score = static_cast<float>(part.low[i]) + 0.0f;
          if (affine) scorers[static_cast<size_t>(q)].score(part.rows + i, 1, &score);
          if (score > kMinusInfinity) keys.push_back(best_key(score, part.rows[i]));
        }
      }
      const int64_t at = (first + q) * a.k;
      write_best(keys.data(), static_cast<int64_t>(keys.size()), a.k, a.scores + at, a.ids + at);
    });
  }
}

namespace {

// write_best() of keys of which some stand twice, as rows do that are named twice.
void write_best_once(std::vector<uint64_t>& keys, int64_t k, float* scores, int32_t* ids) {
  constexpr int64_t kInserted = 32;
  if (k > kInserted) {
    std::sort(keys.begin(), keys.end());
    keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
    return write_best(keys.data(), static_cast<int64_t>(keys.size()), k, scores, ids);
  }
  uint64_t best[kInserted];
  int64_t size = 0;
  for (const uint64_t key : keys) {
    if (size == k && key >= best[k - 1]) continue;
    int64_t at = size;
    while (at > 0 && best[at - 1] > key) --at;
    if (at > 0 && best[at - 1] == key) continue;
    size = std::min(size + 1, k);
    for (int64_t i = size - 1; i > at; --i) best[i] = best[i - 1];
    best[at] = key;
  }
  write_best(best, size, k, scores, ids);
}

}  // namespace

void rescore_top_k(const RescoreArguments& a, Pool& pool) {
  RowDot dot = row_dot_portable();
  const char* level = kernels()->name;
  if (std::strcmp(level, "avx2") == 0 && row_dot_avx2() != nullptr) dot = row_dot_avx2();
  if (std::strncmp(level, "avx512", 6) == 0 && row_dot_avx512() != nullptr) dot = row_dot_avx512();
  const auto distance = tree_kernels().distance;
  const int64_t item = a.type == RowType::kFloat32 ? 4 : a.type == RowType::kBfloat16 ? 2 : 1;
  const auto* rows = static_cast<const uint8_t*>(a.rows);
  const int64_t threads =
      a.num_queries * a.num_candidates * a.width > (1 << 20) ? usable_threads(pool) : 1;
  const int64_t bytes = a.width * item;
  const auto prefetch = [&](int32_t row) {
    const uint8_t* at = rows + row * bytes;
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte);
  };
  constexpr int64_t kTogether = 16;
  constexpr size_t kAhead = 12;
  const int64_t tasks = (a.num_queries + kTogether - 1) / kTogether;
  parallel_for(pool, threads, tasks, [&](int64_t task) {
    thread_local std::vector<int32_t> wanted;
    thread_local std::vector<uint64_t> keys;
    const int64_t first = task * kTogether, last = std::min(first + kTogether, a.num_queries);
    wanted.resize(static_cast<size_t>((last - first) * a.num_candidates + 1));
    size_t ends[kTogether];
    size_t size = 0;
    for (int64_t q = first; q < last; ++q) {
      const int32_t* from = a.candidates + q * a.num_candidates;
      for (int64_t i = 0; i < a.num_candidates; ++i) {
        wanted[size] = from[i];
        size += from[i] >= 0 && from[i] < a.num_rows;
      }
      ends[q - first] = size;
    }
    // The rows of the next query are on their way while those of this one are scored.
    for (size_t i = 0; i < std::min(kAhead, size); ++i) prefetch(wanted[i]);
    size_t at = 0;
    for (int64_t q = first; q < last; ++q) {
      keys.clear();
      for (; at < ends[q - first]; ++at) {
        if (at + kAhead < size) prefetch(wanted[at + kAhead]);
        const int32_t row = wanted[at];
        const float* query = a.queries + q * a.width;
        const uint8_t* x = rows + row * bytes;
        float score = a.euclidean ? -distance(query, reinterpret_cast<const float*>(x), a.width)
                                  : dot(query, x, a.type, a.width);
        if (a.scale != nullptr) score *= a.scale[row];
        score += 0.0f;
        if (score > kMinusInfinity) keys.push_back(best_key(score, row));
      }
      write_best_once(keys, a.k, a.scores + q * a.k, a.ids + q * a.k);
    }
  });
}

}  // namespace xla_kernels
