#include "tree_search.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "collector.h"
#include "scan.h"
#include "table.h"
#include "top_k.h"

namespace xla_kernels {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Queries that share a pass over the leaves; their tables stay in the second-level cache.
constexpr int64_t kTile = 512;
// A batch scans this many of each query's best leaves first: thresholds rise before the rest. Where
// they decide which others are scanned, every query scans a few more.
constexpr int64_t kFirst = 2;
constexpr int64_t kSure = 4;
// Slots of a leaf that are scanned for a floor, times those that are kept.
constexpr int64_t kFloorSlots = 16;
// Norm of the integer query. With vectors of norm <= 32000 sums stay below 2^30.
constexpr float kQueryNorm = 32000.0f;
constexpr int64_t kPrefetchRows = 12;
// Queries whose leaves are ranked, and whose candidates are scored, at a time.
constexpr int64_t kTogether = 8;
// Codes of the first leaf that are asked for while the tables are made.
constexpr int64_t kFirstBytes = 4096;
// Candidates of a tile of queries beyond which a thread returns its buffers after a call.
constexpr int64_t kRetained = int64_t{1} << 18;
// Results up to which candidates are inserted one by one.
constexpr int64_t kInserted = 32;

template <typename T>
class Aligned {
 public:
  // Keeps what it has where that is enough: a worker searches many queries with the same buffers.
  T* reserve(int64_t count) {
    if (count > size_) {
      storage_.reset(new uint8_t[static_cast<size_t>(count) * sizeof(T) + 64]);
      size_ = count;
    }
    const auto address = reinterpret_cast<uintptr_t>(storage_.get());
    return reinterpret_cast<T*>(storage_.get() + (64 - address % 64) % 64);
  }

 private:
  std::unique_ptr<uint8_t[]> storage_;
  int64_t size_ = -1;
};

struct Leaf {
  int32_t number;
  float score;
};

// Float estimates of slots: <q, centroid> + (gain *) sum of table entries (+ offset).
struct SlotScorer final : ExactScorer {
  const TreeSearchArguments* a = nullptr;
  const TreeKernels* tree = nullptr;
  const float* query = nullptr;
  const float* table = nullptr;
  void score(const int32_t* slots, int64_t count, float* scores) const override {
    for (int64_t i = 0; i < count; ++i) scores[i] = score_one(slots[i]);
  }
  float score_one(int32_t slot) const {
    const int64_t block = slot / a->codes.block_rows();
    const int64_t leaf =
        std::upper_bound(a->starts, a->starts + a->num_leaves + 1, block) - a->starts - 1;
    const float shared = tree->dot(query, a->centroids + leaf * a->dim, a->dim);
    float sum = exact_score(table, a->num_codewords, a->codes, nullptr, nullptr, slot);
    if (a->slot_level != nullptr) sum *= a->levels[a->slot_level[slot] & (a->num_levels - 1)];
    return shared + sum + (a->slot_offset != nullptr ? a->slot_offset[slot] : 0.0f);
  }
  int32_t place(int32_t slot) const override { return a->slot_rows[slot]; }
};

// One query between the ranking of its leaves and its results.
struct Search {
  std::vector<Leaf> leaves;  // best first
  size_t first = 0;          // as many of them are scanned before the others
  Collector collector;
  ScanQuery query;
  TableBounds bounds;
  SlotScorer scorer;
  float norm = 0;
  bool finite = true;
};

// A query that probes a leaf, and the score of the leaf.
struct Visit {
  int32_t search;
  float score;
};

// Buffers of a thread, kept from one call to the next: allocating them costs a single query more
// than ranking its leaves.
struct Scratch {
  std::vector<Search> searches;
  std::vector<uint64_t> best, found;
  std::vector<int32_t> slots, estimates, table;
  std::vector<int64_t> begins;
  std::vector<Visit> visits;
  std::vector<ScanQuery> batch;
  Aligned<float> tables, padded;
  Aligned<uint8_t> expanded, rounded;
  Aligned<int16_t> rounded_query;
  Aligned<int32_t> products, keys, group_products;
  std::vector<int32_t> numbers;
};

class Worker {
 public:
  Worker(const TreeSearchArguments& a, Scratch& scratch)
      : a_(a),
        scratch_(scratch),
        scan_(*kernels()),
        tree_(tree_kernels()),
        stride_(table_stride(a.codes.layout, a.num_codewords)),
        rounded_bytes_(rounded_table_bytes(a.codes.layout, a.codes.num_subspaces, a.num_codewords)),
        expanded_bytes_(
            (scan_.expanded_bytes(a.codes.layout, a.codes.groups, stride_) + 63) / 64 * 64),
        table_floats_((a.codes.num_subspaces * a.num_codewords + 15) / 16 * 16),
        tiles_((a.num_leaves + 15) / 16),
        pairs_((a.dim + 1) / 2),
        spilled_(a.rescore > 0 && a.retrieve > a.rescore),
        adaptive_(a.deviations < std::numeric_limits<float>::infinity()),
        terms_{nullptr, a.slot_offset, a.slot_level, a.levels, static_cast<int32_t>(a.num_levels)},
        first_(adaptive_ ? kSure : kFirst),
        // Without rescoring the byte tables choose a few more than k for the float tables to rank.
        kept_(std::min(a.candidates    ? a.retrieve
                       : a.rescore > 0 ? std::max(a.retrieve, a.rescore)
                                       : 2 * a.k + 32,
                       a.codes.num_rows)) {}

  int64_t kept() const { return kept_; }

  // Only ranks, into [num_queries, leaves_to_search].
  void rank_only(int64_t first, int64_t count, int32_t* leaves) {
    ranked_ = leaves;
    if (scratch_.searches.size() < kTogether) scratch_.searches.resize(kTogether);
    for (int64_t i = 0; i < count; i += kTogether) {
      const int64_t some = std::min(kTogether, count - i);
      const int64_t at = (first + i) * a_.leaves_to_search;
      std::fill(leaves + at, leaves + at + some * a_.leaves_to_search, -1);
      rank(first + i, scratch_.searches.data(), some);
    }
  }

  void run(int64_t first, int64_t count) {
    if (static_cast<int64_t>(scratch_.searches.size()) < count) scratch_.searches.resize(static_cast<size_t>(count));
    float* tables = scratch_.tables.reserve(table_floats_ * count);
    uint8_t* expanded = scratch_.expanded.reserve(expanded_bytes_ * count);
    for (int64_t i = 0; i < count; i += kTogether) {
      rank(first + i, &scratch_.searches[static_cast<size_t>(i)], std::min(kTogether, count - i));
    }
    for (int64_t i = 0; i < count; ++i) {
      prepare(first + i, scratch_.searches[static_cast<size_t>(i)], tables + i * table_floats_,
              expanded + i * expanded_bytes_);
    }
    if (count < 8) {
      for (int64_t i = 0; i < count; ++i) scan_all(scratch_.searches[static_cast<size_t>(i)]);
    } else {
      scan_by_leaf(count);
    }
    for (int64_t i = 0; i < count; i += kTogether) {
      finish(first + i, &scratch_.searches[static_cast<size_t>(i)], std::min(kTogether, count - i));
    }
  }

 private:
  void prepare(int64_t q, Search& search, float* table, uint8_t* expanded) {
    // Without a leaf there is nothing to find.
    search.finite = search.finite && !search.leaves.empty();
    if (!search.finite) return;
    const float* query = a_.queries + q * a_.dim;
    build(query, table, expanded, search);
    search.scorer.a = &a_;
    search.scorer.tree = &tree_;
    search.scorer.query = query;
    search.scorer.table = table;
    search.collector.start(kept_, Collector::capacity_for(kept_, a_.codes.num_rows),
                           terms_.affine(), 0, search.bounds.base, search.bounds.delta,
                           &search.scorer, scan_.count);
    search.collector.ascending = false;
    if (a_.floor != nullptr) raise(a_.floor[q], search);
    search.query.table = expanded;
    search.query.collector = &search.collector;
    search.query.valid = a_.usable + (a_.usable_queries == 1 ? 0 : q * a_.codes.num_rows);
    search.query.centre = search.bounds.base;
    // Entries that are rounded down lie half a step lower in the mean. Without gains that is the
    // same for all rows.
    if (a_.slot_level != nullptr) {
      search.query.centre += 0.5f * search.bounds.delta * static_cast<float>(search.bounds.width);
    }
    search.query.delta = search.bounds.delta;
    search.query.error = 0;
  }

  // Estimates below the floor do not matter from the start.
  static void raise(float floor, Search& search) {
    if (!(floor > kMinusInfinity)) return;
    if (search.collector.affine) {
      search.collector.float_threshold = floor;
      return;
    }
    // One step more for the rounding of an estimate, and one as the threshold itself does not pass.
    const double key = (static_cast<double>(floor) - search.bounds.base) / search.bounds.delta - 2;
    if (key > -2e9) search.collector.threshold = static_cast<int32_t>(std::min(key, 2e9));
  }

  // The leaves of largest <q, ranking vector> (+ offset), from products in 16-bit integers: vectors and
  // queries are scaled so that their norms are near 32000, an error of 1e-4 of the norms.
  void rank(int64_t first, Search* searches, int64_t count) {
    int16_t* rounded = scratch_.rounded_query.reserve(2 * pairs_ * kTogether);
    int32_t* products = scratch_.products.reserve(tiles_ * 16 * kTogether);
    float ups[kTogether] = {};
    for (int64_t i = 0; i < count; ++i) {
      const float* query = a_.queries + (first + i) * a_.dim;
      int16_t* out = rounded + i * 2 * pairs_;
      float peak = 0, poison = 0;
      if (a_.chosen != nullptr) {
        take_leaves(first + i, searches[i]);
        if (!searches[i].leaves.empty()) tree_.measure(query, a_.dim, &peak, &poison);
        searches[i].finite = poison == 0.0f && peak < 1e18f;
        continue;
      }
      tree_.measure(query, a_.dim, &peak, &poison);
      searches[i].finite = poison == 0.0f && peak < 1e18f;
      if (a_.rescore > 0 && a_.row_queries != a_.queries) {
        float row_peak = 0;
        tree_.measure(a_.row_queries + (first + i) * a_.row_dim, a_.row_dim, &row_peak, &poison);
        searches[i].finite = searches[i].finite && poison == 0.0f && row_peak < 1e18f;
      }
      if (!searches[i].finite) {
        std::fill(out, out + 2 * pairs_, int16_t{0});
        continue;
      }
      const float down = peak > 0 ? 1.0f / peak : 0.0f;
      const float norm = peak * std::sqrt(tree_.scaled_square(query, a_.dim, down));
      searches[i].norm = norm;
      ups[i] = norm > 0 ? kQueryNorm / norm : 0.0f;
      tree_.round_query(query, a_.dim, ups[i], out);
      if (a_.dim & 1) out[a_.dim] = 0;
    }
    if (a_.chosen != nullptr) return;
    if (a_.num_groups > 0) {
      rank_groups(first, searches, count, rounded, ups);
      return;
    }
    tree_.leaf_products(a_.tiles, tiles_, pairs_, rounded, count, products);
    for (int64_t i = 0; i < count; ++i) {
      if (!searches[i].finite) continue;
      int32_t* keys = products + i * tiles_ * 16;
      add_offset(keys, a_.num_leaves, unit_of(ups[i], a_.centroid_scale), a_.leaf_offset, nullptr);
      choose_leaves(first + i, keys, nullptr, a_.num_leaves, searches[i]);
    }
  }

  // The chosen leaves of a query, those that have slots.
  void take_leaves(int64_t q, Search& search) {
    const int32_t* chosen = a_.chosen + q * a_.leaves_to_search;
    search.leaves.clear();
    search.first = 0;
    for (int64_t i = 0; i < a_.leaves_to_search; ++i) {
      const int32_t l = chosen[i];
      if (l < 0 || l >= a_.num_leaves || a_.starts[l] == a_.starts[l + 1]) continue;
      search.leaves.push_back({l, tree_.dot(a_.queries + q * a_.dim, a_.centroids + l * a_.dim, a_.dim)});
      // With a floor no threshold has to rise first.
      search.first += i < first_ && a_.floor == nullptr;
    }
  }

  // The leaves of the best groups: as many groups as hold `leaves_ranked` leaves.
  void rank_groups(int64_t first, Search* searches, int64_t count, const int16_t* rounded,
                   const float* ups) {
    const int64_t tiles = (a_.num_groups + 15) / 16;
    int32_t* groups = scratch_.group_products.reserve(tiles * 16 * kTogether);
    tree_.leaf_products(a_.group_tiles, tiles, pairs_, rounded, count, groups);
    for (int64_t i = 0; i < count; ++i) {
      if (!searches[i].finite) continue;
      int32_t* keys = groups + i * tiles * 16;
      add_offset(keys, a_.num_groups, unit_of(ups[i], a_.group_scale), a_.group_offset, nullptr);
      scratch_.best.resize(static_cast<size_t>(a_.num_groups));
      for (int64_t g = 0; g < a_.num_groups; ++g) {
        scratch_.best[static_cast<size_t>(g)] = leaf_key(keys[g], static_cast<int32_t>(g));
      }
      std::sort(scratch_.best.begin(), scratch_.best.end());
      scratch_.numbers.clear();
      int32_t* products = scratch_.products.reserve(tiles_ * 16 * kTogether);
      int32_t* leaf_keys = scratch_.keys.reserve(a_.num_leaves);
      for (const uint64_t key : scratch_.best) {
        if (static_cast<int64_t>(scratch_.numbers.size()) >= a_.leaves_ranked) break;
        const auto g = static_cast<int64_t>(key & 0xffffffffu);
        const int64_t begin = a_.group_starts[g], end = a_.group_starts[g + 1];
        const int64_t tile = begin / 16, last = (end + 15) / 16;
        if (begin == end) continue;
        tree_.leaf_products(a_.tiles + tile * pairs_ * 32, last - tile, pairs_,
                            rounded + i * 2 * pairs_, 1, products);
        for (int64_t l = begin; l < end; ++l) {
          leaf_keys[scratch_.numbers.size()] = products[l - tile * 16];
          scratch_.numbers.push_back(static_cast<int32_t>(l));
        }
      }
      const auto found = static_cast<int64_t>(scratch_.numbers.size());
      const int32_t* numbers = scratch_.numbers.data();
      add_offset(leaf_keys, found, unit_of(ups[i], a_.centroid_scale), a_.leaf_offset, numbers);
      choose_leaves(first + i, leaf_keys, numbers, found, searches[i]);
    }
  }

  static float unit_of(float up, float scale) { return up > 0 ? 1.0f / (up * scale) : 0.0f; }

  // Integer products to keys in the order of the products with an offset added, in place.
  static void add_offset(int32_t* keys, int64_t count, float unit, const float* offset,
                         const int32_t* numbers) {
    if (offset == nullptr) return;
    for (int64_t i = 0; i < count; ++i) {
      const float more = offset[numbers != nullptr ? numbers[i] : i];
      keys[i] = ordered(static_cast<float>(keys[i]) * unit + more);
    }
  }

  // The best of some leaves, which are those of `numbers`, or all where that is null.
  void choose_leaves(int64_t q, const int32_t* keys, const int32_t* numbers, int64_t count,
                     Search& search) {
    const float* query = a_.queries + q * a_.dim;
    const int64_t wanted = std::min(a_.leaves_to_search, count);
    const int32_t bar = wanted < count
                            ? kth_largest(keys, count, wanted, 8 + wanted / 2, scan_.count)
                            : INT32_MIN;
    scratch_.best.resize(static_cast<size_t>(count) + 1);
    size_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
      const auto l = numbers != nullptr ? numbers[i] : static_cast<int32_t>(i);
      scratch_.best[found] = leaf_key(keys[i], l);
      found += keys[i] >= bar;
    }
    scratch_.best.resize(found);
    std::sort(scratch_.best.begin(), scratch_.best.end());
    scratch_.best.resize(static_cast<size_t>(wanted));
    if (ranked_ != nullptr) {
      int32_t* out = ranked_ + q * a_.leaves_to_search;
      for (const uint64_t key : scratch_.best) *out++ = static_cast<int32_t>(key & 0xffffffffu);
      return;
    }
    search.leaves.clear();
    for (const uint64_t key : scratch_.best) {
      const auto l = static_cast<int32_t>(key & 0xffffffffu);
      search.leaves.push_back({l, tree_.dot(query, a_.centroids + l * a_.dim, a_.dim)});
    }
    search.first = std::min(static_cast<size_t>(first_), search.leaves.size());
    const uint8_t* soon = a_.codes.block(a_.starts[search.leaves[0].number]);
    for (int64_t i = 0; i < kFirstBytes; i += 64) __builtin_prefetch(soon + i);
  }

  // Ascending keys are descending scores, then ascending leaves.
  static uint64_t leaf_key(int32_t score, int32_t leaf) {
    return (static_cast<uint64_t>(static_cast<uint32_t>(score) ^ 0x7fffffffu) << 32) |
           static_cast<uint32_t>(leaf);
  }

  void build(const float* query, float* table, uint8_t* expanded, Search& search) {
    const int64_t m = a_.codes.num_subspaces;
    const int64_t step = a_.width == a_.dim ? 0 : a_.width;
    const int64_t columns = step == 0 ? a_.dim : m * a_.width;
    const float* padded = query;
    if (columns != a_.dim) {
      float* copy = scratch_.padded.reserve(columns);
      std::memcpy(copy, query, sizeof(float) * static_cast<size_t>(a_.dim));
      std::fill(copy + a_.dim, copy + columns, 0.0f);
      padded = copy;
    }
    tree_.build_table(a_.codewords, padded, m, a_.width, step, a_.num_codewords, table);
    uint8_t* rounded = scratch_.rounded.reserve(rounded_bytes_);
    if (a_.num_codewords == 16 && stride_ == 16) {
      std::memset(rounded + m * 16, 0, static_cast<size_t>(rounded_bytes_ - m * 16));
      search.bounds.width = 0;  // to the nearest; an earlier query may have left another
      tree_.round16(table, m, table_max(a_.codes.layout), rounded, &search.bounds.base,
                    &search.bounds.delta);
    } else {
      search.bounds = round_table(table, a_.codes.layout, m, a_.num_codewords, scan_, rounded);
      search.finite = search.bounds.finite && search.bounds.bounded;
    }
    scan_.expand(rounded, a_.codes.layout, a_.codes.groups, stride_, expanded);
  }

  // Sets the term of a leaf: in units of the rounded sums, or apart from them where gains are.
  void set_leaf(ScanQuery& query, float score) const {
    if (a_.slot_level != nullptr) {
      query.shift = 0;
      query.addend = score;
      return;
    }
    const float shift = score / query.delta;
    // A leaf beyond what 32 bits hold is far better or worse than all others.
    query.shift = static_cast<int32_t>(std::lrintf(std::max(-5e8f, std::min(5e8f, shift))));
    query.addend = 0;
  }

  // Where a scan of a leaf ends. A floor is worth some slots a query, not all of a large leaf: they
  // are read for this query alone.
  int64_t end_of(int64_t leaf) const {
    if (!a_.last) return a_.starts[leaf + 1];
    const int64_t blocks = kFloorSlots * a_.retrieve / a_.codes.block_rows() + 1;
    return std::min<int64_t>(a_.starts[leaf + 1], a_.starts[leaf] + blocks);
  }

  // Some leaves of one query, from one place in their order to another.
  void scan_some(Search& search, size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const Leaf& leaf = search.leaves[i];
      set_leaf(search.query, leaf.score);
      const int64_t next = a_.starts[search.leaves[i + 1 < end ? i + 1 : i].number];
      scan_.scan(a_.codes, terms_, a_.starts[leaf.number], end_of(leaf.number), next, stride_,
                 &search.query, 1);
    }
  }

  void scan_all(Search& search) {
    if (!search.finite) return;
    size_t begin = 0;
    if (adaptive_) {
      begin = scan_first(search);
      pass_over(search);
    }
    scan_some(search, begin, search.leaves.size());
  }

  size_t scan_first(Search& search) {
    scan_some(search, 0, search.first);
    return search.first;
  }

  // Drops the leaves after the first whose estimates are unlikely to reach those held so far. A row
  // of leaf l stands for c + r with r of deviation `spread` in every coordinate, so <q, c + r> has
  // the mean <q, c> and the deviation ||q|| spread. With slot offsets, which make the estimate
  // (||q||^2 - ||q - c - r||^2) / 2, r is weighed by q - c and lowers the mean by ||r||^2 / 2.
  void pass_over(Search& search) const {
    const Collector& c = search.collector;
    if (c.size < kept_ || search.leaves.size() <= search.first) return;
    const int32_t bar = kth_largest(c.low, c.size, kept_, 0, scan_.count);
    const float least = estimate(search, bar);
    size_t kept = search.first;
    for (size_t i = kept; i < search.leaves.size(); ++i) {
      const Leaf& leaf = search.leaves[i];
      const float spread = a_.spread[leaf.number];
      float mean = leaf.score, norm = search.norm;
      if (a_.slot_offset != nullptr) {
        if (a_.leaf_offset != nullptr) mean += a_.leaf_offset[leaf.number];
        norm = std::sqrt(std::max(0.0f, norm * norm - 2.0f * mean));
        mean -= 0.5f * spread * spread * static_cast<float>(a_.dim);
      }
      search.leaves[kept] = leaf;
      kept += mean + a_.deviations * norm * spread >= least;
    }
    search.leaves.resize(kept);
  }

  // Every leaf once, for all queries of the tile that probe it.
  void scan_by_leaf(int64_t count) {
    scratch_.begins.assign(static_cast<size_t>(a_.num_leaves) + 1, 0);
    for (int64_t i = 0; i < count; ++i) {
      Search& search = scratch_.searches[static_cast<size_t>(i)];
      if (!search.finite) continue;
      scan_first(search);
      if (adaptive_) pass_over(search);
      for (size_t j = search.first; j < search.leaves.size(); ++j) ++scratch_.begins[static_cast<size_t>(search.leaves[j].number) + 1];
    }
    for (size_t l = 0; l < static_cast<size_t>(a_.num_leaves); ++l) scratch_.begins[l + 1] += scratch_.begins[l];
    scratch_.visits.resize(static_cast<size_t>(scratch_.begins.back()));
    for (int64_t i = 0; i < count; ++i) {
      const Search& search = scratch_.searches[static_cast<size_t>(i)];
      if (!search.finite) continue;
      for (size_t j = search.first; j < search.leaves.size(); ++j) {
        const Leaf& leaf = search.leaves[j];
        scratch_.visits[static_cast<size_t>(scratch_.begins[static_cast<size_t>(leaf.number)]++)] = {
            static_cast<int32_t>(i), leaf.score};
      }
    }
    // begins[l] now is the end of leaf l.
    int64_t at = 0;
    for (int64_t l = 0; l < a_.num_leaves; ++l) {
      const int64_t end = scratch_.begins[static_cast<size_t>(l)];
      if (at == end) continue;
      scratch_.batch.clear();
      for (; at < end; ++at) {
        const Visit& visit = scratch_.visits[static_cast<size_t>(at)];
        scratch_.batch.push_back(scratch_.searches[static_cast<size_t>(visit.search)].query);
        set_leaf(scratch_.batch.back(), visit.score);
      }
      scan_.scan(a_.codes, terms_, a_.starts[l], end_of(l), end_of(l), stride_,
                 scratch_.batch.data(), static_cast<int64_t>(scratch_.batch.size()));
    }
  }

  // Exact scores of the candidates of some queries, and their results.
  void finish(int64_t first, const Search* searches, int64_t count) {
    if (a_.candidates) {
      for (int64_t i = 0; i < count; ++i) write_candidates(first + i, searches[i]);
      return;
    }
    scratch_.slots.clear();
    size_t ends[kTogether];
    for (int64_t i = 0; i < count; ++i) {
      if (searches[i].finite) choose_slots(searches[i].collector);
      ends[i] = scratch_.slots.size();
    }
    // The rows of the next query are on their way while those of this one are scored.
    for (size_t i = 0; i < std::min<size_t>(kPrefetchRows, scratch_.slots.size()); ++i) prefetch(scratch_.slots[i]);
    size_t at = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t q = first + i;
      scratch_.found.clear();
      if (a_.rescore > 0) {
        const float* query = a_.row_queries + q * a_.row_dim;
        for (; at < ends[i]; ++at) {
          if (at + kPrefetchRows < scratch_.slots.size()) prefetch(scratch_.slots[at + kPrefetchRows]);
          keep(exact(query, scratch_.slots[at]), scratch_.slots[at]);
        }
      } else {
        for (; at < ends[i]; ++at) {
          const int32_t slot = scratch_.slots[at], row = a_.slot_rows[slot];
          if (row >= 0) keep(searches[i].scorer.score_one(slot), row);
        }
      }
      write_distinct(a_.scores + q * a_.k, a_.ids + q * a_.k);
    }
  }

  // Appends the best slots of a collector; for rescoring their rows.
  void choose_slots(const Collector& c) {
    const int32_t bar =
        c.size > kept_ ? kth_largest(c.low, c.size, kept_, 0, scan_.count) : INT32_MIN;
    const size_t begin = scratch_.slots.size();
    scratch_.slots.resize(begin + static_cast<size_t>(c.size) + 1);
    if (spilled_) scratch_.estimates.resize(static_cast<size_t>(c.size) + 1);
    size_t end = begin;
    for (int64_t i = 0; i < c.size; ++i) {
      scratch_.slots[end] = c.rows[i];
      if (spilled_) scratch_.estimates[end - begin] = c.low[i];
      end += c.low[i] >= bar;
    }
    if (a_.rescore > 0) {
      size_t kept = begin;
      for (size_t i = begin; i < end; ++i) {
        const int32_t row = a_.slot_rows[scratch_.slots[i]];
        scratch_.slots[kept] = row;
        if (spilled_) scratch_.estimates[kept - begin] = scratch_.estimates[i - begin];
        // A row number beyond the store is a corrupt index: never read there.
        kept += row >= 0 && row < a_.num_rows;
      }
      end = spilled_ ? begin + distinct(scratch_.slots.data() + begin, kept - begin) : kept;
    }
    scratch_.slots.resize(end);
  }

  void write_candidates(int64_t q, const Search& search) {
    float* scores = a_.scores + q * a_.k;
    int32_t* rows = a_.ids + q * a_.k;
    const Collector& c = search.collector;
    const int64_t size = search.finite && (!a_.last || c.size >= kept_) ? c.size : 0;
    const int32_t bar = size > kept_ || (a_.last && size > 0)
                            ? kth_largest(c.low, size, kept_, 0, scan_.count)
                            : INT32_MIN;
    int64_t written = 0;
    if (a_.last) {
      if (size > 0) scores[written++] = estimate(search, bar);
    } else if (scan_.count(c.low, size, bar) > a_.k) {
      // More that equal the last than there is room for: the lowest rows.
      scratch_.best.clear();
      for (int64_t i = 0; i < size; ++i) {
        const int32_t row = a_.slot_rows[c.rows[i]];
        if (c.low[i] >= bar && row >= 0) scratch_.best.push_back(best_key(estimate(search, c.low[i]), row));
      }
      written = std::min(a_.k, static_cast<int64_t>(scratch_.best.size()));
      write_best(scratch_.best.data(), static_cast<int64_t>(scratch_.best.size()), a_.k, scores, rows);
    } else {
      for (int64_t i = 0; i < size && written < a_.k; ++i) {
        const int32_t row = a_.slot_rows[c.rows[i]];
        scores[written] = estimate(search, c.low[i]);
        rows[written] = row;
        written += c.low[i] >= bar && row >= 0;
      }
    }
    std::fill(scores + written, scores + a_.k, kMinusInfinity);
    std::fill(rows + written, rows + a_.k, -1);
  }

  // What a key of the collector stands for; equal keys of a query are equal estimates everywhere.
  static float estimate(const Search& search, int32_t key) {
    return search.collector.affine
               ? from_ordered(key)
               : search.bounds.base + search.bounds.delta * static_cast<float>(key);
  }

  // The best `rescore` of the rows, each once, by the better estimate of its copies.
  size_t distinct(int32_t* rows, size_t count) {
    size_t places = 16;
    while (places < 2 * count) places *= 2;
    std::vector<int32_t>& table = scratch_.table;
    table.assign(places, -1);
    int32_t* estimates = scratch_.estimates.data();
    size_t size = 0;
    for (size_t i = 0; i < count; ++i) {
      const int32_t row = rows[i], estimate = estimates[i];
      size_t at = (static_cast<uint32_t>(row) * 2654435761u) & (places - 1);
      while (table[at] >= 0 && rows[table[at]] != row) at = (at + 1) & (places - 1);
      if (table[at] >= 0) {
        estimates[table[at]] = std::max(estimates[table[at]], estimate);
        continue;
      }
      table[at] = static_cast<int32_t>(size);
      rows[size] = row;
      estimates[size++] = estimate;
    }
    if (static_cast<int64_t>(size) <= a_.rescore) return size;
    const int32_t bar =
        kth_largest(estimates, static_cast<int64_t>(size), a_.rescore, 0, scan_.count);
    size_t kept = 0;
    for (size_t i = 0; i < size; ++i) {
      rows[kept] = rows[i];
      kept += estimates[i] >= bar;
    }
    return kept;
  }

  void keep(float score, int32_t row) {
    if (score > kMinusInfinity) scratch_.found.push_back(best_key(score, row));  // false for NaN
  }

  const void* row_at(int32_t row) const {
    const int64_t bytes = a_.store == StoreType::kFloat32 ? 4 : a_.store == StoreType::kBFloat16 ? 2 : 1;
    return static_cast<const uint8_t*>(a_.rows) + static_cast<int64_t>(row) * a_.row_dim * bytes;
  }

  float exact(const float* query, int32_t row) const {
    const void* at = row_at(row);
    switch (a_.store) {
      case StoreType::kFloat32: {
        const auto* x = static_cast<const float*>(at);
        return a_.euclidean ? -tree_.distance(query, x, a_.row_dim) : tree_.dot(query, x, a_.row_dim);
      }
      case StoreType::kBFloat16:
        return tree_.dot_bfloat16(query, static_cast<const uint16_t*>(at), a_.row_dim);
      case StoreType::kInt8:
        return a_.row_scale[row] * tree_.dot_int8(query, static_cast<const int8_t*>(at), a_.row_dim);
      default:
        return kMinusInfinity;
    }
  }

  void prefetch(int32_t row) const {
    if (a_.rescore <= 0) return;
    const auto* at = static_cast<const uint8_t*>(row_at(row));
    const int64_t bytes = static_cast<const uint8_t*>(row_at(row + 1)) - at;
    for (int64_t i = 0; i < bytes + 63; i += 64) __builtin_prefetch(at + std::min(i, bytes - 1));
  }

  // The k best rows, each once: a row that lies in two leaves has two slots.
  void write_distinct(float* scores, int32_t* ids) {
    const auto k = static_cast<size_t>(a_.k);
    if (a_.rescore > 0 && a_.k <= kInserted) return insert_distinct(scores, ids);
    size_t sorted = std::min(scratch_.found.size(), 2 * k + 8);
    for (;;) {
      if (sorted < scratch_.found.size()) {
        std::nth_element(scratch_.found.begin(), scratch_.found.begin() + static_cast<int64_t>(sorted), scratch_.found.end());
      }
      std::sort(scratch_.found.begin(), scratch_.found.begin() + static_cast<int64_t>(sorted));
      size_t written = 0;
      for (size_t i = 0; i < sorted && written < k; ++i) {
        const auto row = static_cast<int32_t>(scratch_.found[i] & 0xffffffffu);
        if (std::find(ids, ids + written, row) != ids + written) continue;
        const auto high = static_cast<uint32_t>(scratch_.found[i] >> 32) ^ 0x7fffffffu;
        scores[written] = from_ordered(static_cast<int32_t>(high));
        ids[written++] = row;
      }
      if (written == k || sorted == scratch_.found.size()) {
        std::fill(scores + written, scores + k, kMinusInfinity);
        std::fill(ids + written, ids + k, -1);
        return;
      }
      sorted = scratch_.found.size();
    }
  }

  // The same for few results: both slots of a row have its exact score, so its keys are equal.
  void insert_distinct(float* scores, int32_t* ids) const {
    uint64_t best[kInserted + 1];
    std::fill(best, best + a_.k + 1, ~uint64_t{0});
    for (const uint64_t key : scratch_.found) {
      if (key >= best[a_.k - 1]) continue;
      int64_t at = a_.k - 1;
      while (at > 0 && best[at - 1] > key) --at;
      if (at > 0 && best[at - 1] == key) continue;
      for (int64_t i = a_.k - 1; i > at; --i) best[i] = best[i - 1];
      best[at] = key;
    }
    for (int64_t i = 0; i < a_.k; ++i) {
      const bool found = best[i] != ~uint64_t{0};
      const auto high = static_cast<uint32_t>(best[i] >> 32) ^ 0x7fffffffu;
      scores[i] = found ? from_ordered(static_cast<int32_t>(high)) : kMinusInfinity;
      ids[i] = found ? static_cast<int32_t>(best[i] & 0xffffffffu) : -1;
    }
  }

  const TreeSearchArguments& a_;
  Scratch& scratch_;
  const Kernels& scan_;
  const TreeKernels& tree_;
  int64_t stride_, rounded_bytes_, expanded_bytes_, table_floats_, tiles_, pairs_;
  bool spilled_, adaptive_;
  RowTerms terms_;
  int64_t first_, kept_;
  int32_t* ranked_ = nullptr;
};

// Calls run(worker, first, count) for tiles of the queries.
template <typename Run>
void in_tiles(const TreeSearchArguments& a, Pool& pool, Run run) {
  const int64_t threads = a.num_queries > 1 ? usable_threads(pool) : 1;
  const int64_t share = (a.num_queries + threads - 1) / std::max<int64_t>(threads, 1);
  const int64_t tile = std::max<int64_t>(1, std::min(kTile, share));
  const int64_t tiles = (a.num_queries + tile - 1) / tile;
  parallel_for(pool, threads, tiles, [&](int64_t t) {
    thread_local Scratch scratch;
    Worker worker(a, scratch);
    run(worker, t * tile, std::min(tile, a.num_queries - t * tile));
    if (tile * worker.kept() > kRetained) scratch = Scratch();
  });
}

}  // namespace

const TreeKernels& tree_kernels() {
  const char* level = kernels()->name;
  const TreeKernels* found = nullptr;
  if (std::strncmp(level, "avx512", 6) == 0) found = tree_avx512();
  if (found == nullptr && std::strncmp(level, "avx", 3) == 0) found = tree_avx2();
  return found != nullptr ? *found : *tree_portable();
}

void tree_search(const TreeSearchArguments& a, Pool& pool) {
  in_tiles(a, pool, [](Worker& worker, int64_t first, int64_t count) { worker.run(first, count); });
}

void rank_leaves(const TreeSearchArguments& a, int32_t* leaves, Pool& pool) {
  in_tiles(a, pool, [leaves](Worker& worker, int64_t first, int64_t count) {
    worker.rank_only(first, count, leaves);
  });
}

}  // namespace xla_kernels
