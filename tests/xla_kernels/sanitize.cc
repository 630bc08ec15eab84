// Random shapes through the C++ core under AddressSanitizer and UndefinedBehaviorSanitizer, at every
// instruction set of this processor, against plain loops. Built by `cmake -DXLA_KERNELS_SANITIZE=ON`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "additive.h"
#include "candidates.h"
#include "dot.h"
#include "encode.h"
#include "table.h"
#include "top_k.h"
#include "tree_search.h"

using namespace xla_kernels;

namespace {

std::mt19937 random_bits(1);
int64_t up_to(int64_t most) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(most + 1)); }

// A pool of real threads, so that races show under ThreadSanitizer too.
struct Threads final : Pool {
  ~Threads() override {
    for (auto& thread : running) thread.join();
  }
  int64_t num_threads() const override { return 3; }
  void schedule(std::function<void()> task) override { running.emplace_back(std::move(task)); }
  std::vector<std::thread> running;
};

void fail(const char* what) {
  std::fprintf(stderr, "FAILED at %s: %s\n", kernels()->name, what);
  std::exit(1);
}

// Heap blocks of the exact size: one byte too far is an error.
std::vector<uint8_t> pack(const std::vector<uint8_t>& codes, Codes* view) {
  const int64_t n = view->num_rows, m = view->num_subspaces;
  std::vector<uint8_t> data(static_cast<size_t>(view->num_blocks() * view->groups * 64));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t s = 0; s < m; ++s) {
      const int64_t size = view->block_rows(), v = i % size;
      uint8_t* block = data.data() + i / size * view->groups * 64;
      const uint8_t code = codes[static_cast<size_t>(i * m + s)];
      if (view->layout == Layout::kBytes) {
        block[s * 64 + v] = code;
      } else if (view->layout == Layout::kDwords) {
        block[s / 4 * 64 + 4 * (v % 16) + s % 4] |= static_cast<uint8_t>(code << (v < 16 ? 0 : 4));
      } else {
        block[s / 4 * 64 + s / 2 % 2 * 32 + v] |= static_cast<uint8_t>(code << (s % 2 * 4));
      }
    }
  }
  view->data = data.data();
  return data;
}

// Tables are rounded alike at every level.
void check_round(const float* table, Layout layout, int64_t m, int64_t num_codewords) {
  const auto bytes = static_cast<size_t>(rounded_table_bytes(layout, m, num_codewords)) + 1;
  std::vector<uint8_t> own(bytes), plain(bytes);
  const TableBounds a = round_table(table, layout, m, num_codewords, *kernels(), own.data());
  const TableBounds b = round_table(table, layout, m, num_codewords, *portable_kernels(), plain.data());
  if (a.finite != b.finite || a.bounded != b.bounded) fail("round: finite");
  if (!a.bounded) return;
  if (a.base != b.base || a.delta != b.delta || a.width != b.width || a.lost != b.lost || own != plain) {
    fail("round: bounds or bytes");
  }
}

void check_top_k(Pool& pool, int64_t most_rows) {
  TopKArguments a;
  a.codes.layout = static_cast<Layout>(up_to(2));
  a.codes.num_rows = up_to(3) == 0 ? up_to(most_rows) : up_to(200);
  a.codes.num_subspaces = up_to(5) == 0 ? up_to(700) : up_to(20);
  a.num_codewords = 1 + up_to(a.codes.layout == Layout::kBytes ? 255 : 15);
  if (up_to(2) == 0) a.num_codewords = 16;  // which vectors hold
  a.codes.groups = groups_of(a.codes.layout, a.codes.num_subspaces);
  a.num_queries = up_to(12);
  a.k = 1 + up_to(50);
  const bool many = up_to(5) == 0;  // enough rows and queries for a threshold from a sample
  const bool plain = many && up_to(1) == 0;
  if (plain) {  // rows are flagged first, where the level does that
    a.codes.layout = Layout::kDwords;
    a.num_codewords = up_to(1) == 0 ? 16 : 1 + up_to(15);
  }
  if (many) {
    a.codes.num_rows = 9600 + up_to(6000);
    a.codes.num_subspaces = up_to(9);
    a.codes.groups = groups_of(a.codes.layout, a.codes.num_subspaces);
    a.num_queries = plain ? 1 + up_to(11) : 8 + up_to(4);
    a.k = plain ? 1 + up_to(47) : 48;
  }
  a.exact = up_to(4) != 0;
  const int64_t n = a.codes.num_rows, m = a.codes.num_subspaces, k = a.num_codewords;
  std::vector<uint8_t> codes(static_cast<size_t>(n * m));
  for (auto& code : codes) code = static_cast<uint8_t>(up_to(k - 1));
  const std::vector<uint8_t> data = pack(codes, &a.codes);
  const int64_t kind = up_to(4);
  std::vector<float> tables(static_cast<size_t>(a.num_queries * m * k));
  std::normal_distribution<float> normal;
  for (auto& t : tables) {
    t = kind == 0 ? 7.0f : kind == 1 ? static_cast<float>(up_to(100)) : normal(random_bits);
    if (kind == 2) t *= 1e30f;
    if (kind == 3 && up_to(200) == 0) t = up_to(1) != 0 ? NAN : INFINITY;
  }
  a.tables = tables.data();
  std::vector<float> gain(static_cast<size_t>(n)), offset(static_cast<size_t>(n));
  for (auto& g : gain) g = normal(random_bits);
  for (auto& o : offset) o = up_to(50) == 0 ? NAN : normal(random_bits);
  if (!plain && up_to(1) != 0 && n > 0) a.terms.gain = gain.data();
  if (!plain && up_to(1) != 0 && n > 0) a.terms.offset = offset.data();
  a.valid_queries = n == 0 ? 0 : up_to(2) == 0 ? a.num_queries : up_to(1);
  std::vector<uint8_t> valid(static_cast<size_t>(a.valid_queries * n));
  for (auto& v : valid) v = up_to(2) != 0;
  a.valid = valid.data();
  std::vector<float> scores(static_cast<size_t>(a.num_queries * a.k));
  std::vector<int32_t> ids(scores.size());
  a.scores = scores.data();
  a.ids = ids.data();
  top_k(a, pool);

  ScoresArguments all;
  all.tables = a.tables;
  all.num_queries = a.num_queries;
  all.num_codewords = k;
  all.codes = a.codes;
  all.terms = a.terms;
  std::vector<float> every(static_cast<size_t>(a.num_queries * n));
  all.scores = every.data();
  all_scores(all, pool);

  for (int64_t q = 0; q < a.num_queries; ++q) {
    const float* table = a.tables + q * m * k;
    check_round(table, a.codes.layout, m, k);
    bool finite = true;
    for (int64_t i = 0; i < m * k; ++i) finite &= std::isfinite(table[i]);
    std::vector<std::pair<float, int32_t>> want;
    for (int64_t i = 0; i < n; ++i) {
      float sum = 0;
      for (int64_t s = 0; s < m; ++s) sum += table[s * k + codes[static_cast<size_t>(i * m + s)]];
      if (a.terms.gain != nullptr) sum *= gain[static_cast<size_t>(i)];
      if (a.terms.offset != nullptr) sum += offset[static_cast<size_t>(i)];
      const float got = every[static_cast<size_t>(q * n + i)];
      if (!(got == sum || (std::isnan(got) && std::isnan(sum)))) fail("a score");
      const bool usable = a.valid_queries == 0 ||
                          valid[static_cast<size_t>((a.valid_queries == 1 ? 0 : q) * n + i)] != 0;
      if (usable && sum > -INFINITY) want.emplace_back(-sum, static_cast<int32_t>(i));
    }
    if (!finite) want.clear();
    std::sort(want.begin(), want.end());
    for (int64_t j = 0; j < a.k; ++j) {
      const bool there = j < static_cast<int64_t>(want.size());
      const int32_t id = ids[static_cast<size_t>(q * a.k + j)];
      const float score = scores[static_cast<size_t>(q * a.k + j)];
      if (!there && (id != -1 || score != -INFINITY)) fail("padding");
      if (!there || !a.exact) continue;
      if (id != want[static_cast<size_t>(j)].second) fail("an id");
      if (score != -want[static_cast<size_t>(j)].first) fail("a best score");
    }
  }
}

void check_dot(Pool& pool) {
  DotArguments a;
  const int64_t n = up_to(4) == 0 ? up_to(40000) : up_to(100);
  a.width = up_to(40);
  a.num_queries = up_to(12);
  a.k = 1 + up_to(20);
  a.rows.num_rows = n;
  a.rows.groups = (a.width + 3) / 4;
  std::vector<int8_t> rows(static_cast<size_t>(n * a.width)), queries(static_cast<size_t>(a.num_queries * a.width));
  for (auto& x : rows) x = static_cast<int8_t>(random_bits());
  for (auto& x : queries) x = static_cast<int8_t>(random_bits());
  std::vector<uint8_t> data(static_cast<size_t>(a.rows.num_blocks() * a.rows.groups * 64), 128);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t t = 0; t < a.width; ++t) {
      data[static_cast<size_t>((i / 16 * a.rows.groups + t / 4) * 64 + 4 * (i % 16) + t % 4)] =
          static_cast<uint8_t>(rows[static_cast<size_t>(i * a.width + t)] + 128);
    }
  }
  a.rows.data = data.data();
  a.queries = queries.data();
  std::vector<float> scores(static_cast<size_t>(a.num_queries * a.k));
  std::vector<int32_t> ids(scores.size());
  a.scores = scores.data();
  a.ids = ids.data();
  dot_top_k(a, pool);
  for (int64_t q = 0; q < a.num_queries; ++q) {
    std::vector<std::pair<int32_t, int32_t>> want;
    for (int64_t i = 0; i < n; ++i) {
      int32_t sum = 0;
      for (int64_t t = 0; t < a.width; ++t) {
        sum += rows[static_cast<size_t>(i * a.width + t)] * queries[static_cast<size_t>(q * a.width + t)];
      }
      want.emplace_back(-sum, static_cast<int32_t>(i));
    }
    std::sort(want.begin(), want.end());
    for (int64_t j = 0; j < a.k; ++j) {
      const int32_t id = ids[static_cast<size_t>(q * a.k + j)];
      if (id != (j < n ? want[static_cast<size_t>(j)].second : -1)) fail("an int8 id");
    }
  }
}

void check_rescore_and_encode(Pool& pool) {
  RescoreArguments r;
  r.num_queries = up_to(5);
  r.width = up_to(40);
  r.num_rows = up_to(60);
  r.num_candidates = up_to(30);
  r.k = 1 + up_to(40);
  r.type = static_cast<RowType>(up_to(2));
  const int64_t item = r.type == RowType::kFloat32 ? 4 : r.type == RowType::kBfloat16 ? 2 : 1;
  std::vector<float> queries(static_cast<size_t>(r.num_queries * r.width), 1.0f);
  std::vector<float> storage(static_cast<size_t>((r.num_rows * r.width * item + 3) / 4));
  std::vector<int32_t> wanted(static_cast<size_t>(r.num_queries * r.num_candidates));
  for (auto& id : wanted) id = static_cast<int32_t>(up_to(80)) - 10;
  std::vector<float> scores(static_cast<size_t>(r.num_queries * r.k));
  std::vector<int32_t> ids(scores.size());
  r.queries = queries.data();
  r.rows = storage.data();
  r.candidates = wanted.data();
  r.scores = scores.data();
  r.ids = ids.data();
  rescore_top_k(r, pool);
  for (int32_t id : ids) {
    if (id < -1 || id >= r.num_rows) fail("a rescored id");
  }

  EncodeArguments e;
  e.n = up_to(70);
  e.m = up_to(6);
  e.k = 1 + up_to(255);
  e.s = up_to(4);
  e.max_sweeps = up_to(5);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(e.n * e.m * e.s)), u(x.size()), words(static_cast<size_t>(e.m * e.k * e.s));
  std::vector<float> ones(static_cast<size_t>(e.n), 1.0f);
  for (auto* values : {&x, &u, &words}) {
    for (auto& value : *values) value = normal(random_bits);
  }
  if (!x.empty() && up_to(5) == 0) x[0] = NAN;
  std::vector<uint8_t> codes(static_cast<size_t>(e.n * e.m), 255);
  e.rows = x.data();
  e.directions = u.data();
  e.orthogonal = e.weight = ones.data();
  e.codewords = words.data();
  e.codes = codes.data();
  encode(e, pool);
  for (uint8_t code : codes) {
    if (code >= e.k) fail("a code");
  }
}

void check_additive(Pool& pool) {
  AdditiveArguments a;
  a.n = up_to(80);
  a.d = up_to(6);
  a.r = up_to(2);
  a.m = up_to(5);
  a.k = 1 + up_to(up_to(3) == 0 ? 255 : 19);
  a.kp = (a.k + 15) / 16 * 16;
  a.sweeps = 1 + up_to(3);
  a.rounds = up_to(4);
  a.size = up_to(3);
  std::normal_distribution<float> normal;
  auto floats = [&](int64_t count) {
    std::vector<float> v(static_cast<size_t>(count));
    for (float& x : v) x = normal(random_bits);
    return v;
  };
  auto rows = floats(a.n * a.d);
  const auto directions = floats(a.n * a.r * a.d), weights = floats(a.n * a.r);
  const auto words = floats(a.d * a.m * a.kp), norms = floats(a.m * a.kp);
  const auto pairs = floats(a.m * a.k * a.m * a.kp);
  const std::vector<float> ones(static_cast<size_t>(a.n), 1.0f);
  std::vector<uint8_t> start(static_cast<size_t>(a.n * a.m)), codes(start.size(), 255);
  for (auto& code : start) code = static_cast<uint8_t>(up_to(255));
  std::vector<int32_t> kicks(static_cast<size_t>(a.rounds * a.size * 2));
  for (auto& kick : kicks) kick = static_cast<int32_t>(up_to(20)) - 5;
  if (!rows.empty() && up_to(5) == 0) rows[0] = NAN;
  a.rows = rows.data();
  a.directions = directions.data();
  a.orthogonal = ones.data();
  a.weights = weights.data();
  a.words = words.data();
  a.norms = norms.data();
  a.pairs = pairs.data();
  a.start = up_to(1) == 0 ? nullptr : start.data();
  a.kicks = kicks.data();
  a.codes = codes.data();
  assign_additive(a, pool);
  for (uint8_t code : codes) {
    if (code >= a.k) fail("an additive code");
  }
}

// Every leaf probed and every slot rescored is exact search, whatever the codes say.
// The search in parts: leaves ranked, then scanned; candidates of odd and even leaves joined.
void check_parts(TreeSearchArguments a, Pool& pool) {
  const int64_t b = a.num_queries, probed = a.leaves_to_search, k = a.k;
  std::vector<int32_t> leaves(static_cast<size_t>(b * probed));
  rank_leaves(a, leaves.data(), pool);
  for (const int32_t l : leaves) {
    if (l < -1 || l >= a.num_leaves) fail("parts: a leaf out of range");
  }
  a.rescore = 0;
  a.store = StoreType::kNone;
  a.deviations = std::numeric_limits<float>::infinity();
  a.row_queries = a.queries;
  a.row_dim = a.dim;
  a.num_rows = INT32_MAX;
  std::vector<float> scores(static_cast<size_t>(b * k)), again = scores;
  std::vector<int32_t> ids(static_cast<size_t>(b * k)), same = ids;
  a.scores = scores.data();
  a.ids = ids.data();
  tree_search(a, pool);
  a.chosen = leaves.data();
  a.scores = again.data();
  a.ids = same.data();
  tree_search(a, pool);
  if (scores != again || ids != same) fail("parts: another search");

  a.candidates = true;
  a.retrieve = 1 + up_to(40);
  const int64_t width = a.retrieve + up_to(20);
  auto candidates = [&](std::vector<float>& scores, std::vector<int32_t>& rows) {
    scores.assign(static_cast<size_t>(b * a.k), 0);
    rows.assign(static_cast<size_t>(b * a.k), 0);
    a.scores = scores.data();
    a.ids = rows.data();
    tree_search(a, pool);
  };
  std::vector<float> whole, part, joined(static_cast<size_t>(2 * b * width)), floor;
  std::vector<int32_t> rows, part_rows, joined_rows(joined.size()), none, some;
  a.k = width;
  candidates(whole, rows);
  a.k = 1;
  a.last = true;
  candidates(floor, none);
  a.last = false;
  a.k = width;
  if (up_to(1) == 0) a.floor = floor.data();
  for (int32_t half = 0; half < 2; ++half) {
    some = leaves;
    for (int32_t& l : some) l = l % 2 == half ? l : -1;
    a.chosen = some.data();
    candidates(part, part_rows);
    std::copy_n(part.begin(), b * width, joined.begin() + half * b * width);
    std::copy_n(part_rows.begin(), b * width, joined_rows.begin() + half * b * width);
  }
  CandidateArguments c;
  c.scores = joined.data();
  c.rows = joined_rows.data();
  c.num_queries = b;
  c.parts = 2;
  c.size = width;
  c.retrieve = a.retrieve;
  c.keep = up_to(1) == 0 ? a.retrieve : 1 + up_to(10);
  c.width = c.keep < c.retrieve ? c.keep : width;
  std::vector<float> best(static_cast<size_t>(b * c.width));
  std::vector<int32_t> best_rows(best.size());
  c.best_scores = best.data();
  c.best_rows = best_rows.data();
  best_candidates(c, pool);
  // Of other codes a query that holds too many within the rounding of its table compares them exactly,
  // and a part of the leaves holds fewer.
  const bool alike = a.num_codewords == 16 || a.codes.num_rows <= 128;
  for (int64_t q = 0; q < b && c.keep >= c.retrieve && alike; ++q) {
    std::vector<float> one(whole.begin() + q * width, whole.begin() + (q + 1) * width);
    std::vector<float> two(best.begin() + q * c.width, best.begin() + (q + 1) * c.width);
    std::sort(one.begin(), one.end());
    std::sort(two.begin(), two.end());
    if (one != two) fail("parts: other candidates");
  }
}

void check_tree_search(Pool& pool) {
  const int64_t dim = 1 + up_to(40), leaves = 1 + up_to(20), n = up_to(600), b = up_to(20);
  const int64_t m = 1 + up_to(dim - 1), k = 1 + up_to(12);
  const int64_t width = up_to(3) == 0 ? dim : (dim + m - 1) / m;
  const int64_t num_codewords = up_to(3) == 0 ? 2 + up_to(254) : 1 + up_to(15);
  std::uniform_real_distribution<float> draw(-1, 1);
  auto floats = [&](int64_t count) {
    std::vector<float> v(static_cast<size_t>(count));
    for (float& x : v) x = draw(random_bits);
    return v;
  };
  TreeSearchArguments a;
  const bool dwords = kernels() == avx512vbmi_kernels();
  a.codes.layout = num_codewords > 16 ? Layout::kBytes : dwords ? Layout::kDwords : Layout::kLanes;
  a.codes.num_subspaces = m;
  a.codes.groups = groups_of(a.codes.layout, m);
  const int64_t size = a.codes.block_rows();
  std::vector<int32_t> leaf(static_cast<size_t>(n)), starts(1, 0), slot_rows;
  for (int32_t& l : leaf) l = static_cast<int32_t>(up_to(leaves - 1));
  for (int64_t l = 0; l < leaves; ++l) {
    for (int64_t i = 0; i < n; ++i) {
      if (leaf[static_cast<size_t>(i)] == l) slot_rows.push_back(static_cast<int32_t>(i));
    }
    while (slot_rows.size() % static_cast<size_t>(size) != 0) slot_rows.push_back(-1);
    starts.push_back(static_cast<int32_t>(slot_rows.size() / static_cast<size_t>(size)));
  }
  const auto slots = static_cast<int64_t>(slot_rows.size());
  a.codes.num_rows = slots;
  std::vector<uint8_t> codes(static_cast<size_t>(slots * m)), usable;
  for (uint8_t& code : codes) code = static_cast<uint8_t>(up_to(num_codewords - 1));
  for (const int32_t row : slot_rows) usable.push_back(row >= 0);
  const std::vector<uint8_t> packed = pack(codes, &a.codes);
  const int64_t tiles = (leaves + 15) / 16, pairs = (dim + 1) / 2;
  std::vector<int16_t> tile(static_cast<size_t>(tiles * pairs * 32));
  for (int16_t& x : tile) x = static_cast<int16_t>(up_to(8000) - 4000);
  const int64_t row_dim = up_to(1) == 0 ? dim : 1 + up_to(60);
  const auto queries = floats(b * dim), centroids = floats(leaves * dim), rows = floats(n * row_dim);
  const auto wide = floats(b * row_dim), spread = floats(leaves);
  const auto& exact_queries = row_dim == dim ? queries : wide;
  const int64_t groups = 1 + up_to(5);
  std::vector<int32_t> group_starts(static_cast<size_t>(groups) + 1, 0);
  for (int64_t g = 1; g < groups; ++g) {
    group_starts[static_cast<size_t>(g)] = static_cast<int32_t>(up_to(leaves));
  }
  group_starts.back() = static_cast<int32_t>(leaves);
  std::sort(group_starts.begin(), group_starts.end());
  std::vector<int16_t> group_tile(static_cast<size_t>(pairs * 32));
  for (int16_t& x : group_tile) x = static_cast<int16_t>(up_to(8000) - 4000);
  const auto group_offset = floats(groups);
  const auto words = floats(m * width * num_codewords);
  const auto leaf_offset = floats(leaves), slot_offset = floats(slots);
  const int64_t num_levels = up_to(1) == 0 ? 16 : 256;
  const auto levels = floats(num_levels);
  std::vector<uint8_t> level(static_cast<size_t>(slots));
  for (uint8_t& one : level) one = static_cast<uint8_t>(up_to(255));  // beyond 16 they wrap around
  std::vector<float> scores(static_cast<size_t>(b * k));
  std::vector<int32_t> ids(static_cast<size_t>(b * k));
  a.queries = queries.data();
  a.num_queries = b;
  a.dim = dim;
  a.centroids = centroids.data();
  a.tiles = tile.data();
  a.centroid_scale = 4000;
  if (up_to(1) == 0) a.leaf_offset = leaf_offset.data();
  if (up_to(1) == 0) a.slot_offset = slot_offset.data();
  if (up_to(1) == 0 && slots > 0) {
    a.slot_level = level.data();
    a.levels = levels.data();
    a.num_levels = num_levels;
  }
  a.spread = spread.data();
  if (up_to(1) == 0) {
    a.num_groups = groups;
    a.group_tiles = group_tile.data();
    a.group_scale = 4000;
    a.group_starts = group_starts.data();
    if (a.leaf_offset != nullptr) a.group_offset = group_offset.data();
  }
  a.starts = starts.data();
  a.num_leaves = leaves;
  a.codewords = words.data();
  a.width = width;
  a.num_codewords = num_codewords;
  a.slot_rows = slot_rows.data();
  a.usable = usable.data();
  a.rows = rows.data();
  a.row_queries = exact_queries.data();
  a.row_dim = row_dim;
  a.num_rows = n;
  a.euclidean = up_to(1) == 0;
  a.k = k;
  a.scores = scores.data();
  a.ids = ids.data();
  const bool all = up_to(1) == 0 && n > 0;
  a.leaves_to_search = all ? leaves : 1 + up_to(leaves - 1);
  a.rescore = all ? std::max(k, slots) : up_to(1) == 0 || n == 0 ? 0 : k + up_to(60);
  a.leaves_ranked = std::min(leaves, a.leaves_to_search * (1 + up_to(3)));
  if (!all && up_to(1) == 0) a.deviations = 4 * std::fabs(draw(random_bits));
  a.retrieve = up_to(1) == 0 ? a.rescore : 2 * a.rescore;
  a.store = a.rescore > 0 ? StoreType::kFloat32 : StoreType::kNone;
  if (a.rescore == 0) a.num_rows = INT32_MAX;
  tree_search(a, pool);
  check_parts(a, pool);
  for (int64_t q = 0; q < b && a.rescore == 0; ++q) {
    for (int64_t j = 0; j < k; ++j) {
      const auto at = static_cast<size_t>(q * k + j);
      if (ids[at] < 0) continue;
      const auto found = std::find(slot_rows.begin(), slot_rows.end(), ids[at]);
      const int64_t slot = found - slot_rows.begin();
      const float* query = queries.data() + q * dim;
      double sum = 0, term = 0;
      for (int64_t s = 0; s < m; ++s) {
        const int64_t code = codes[static_cast<size_t>(slot * m + s)], step = width == dim ? 0 : width;
        for (int64_t w = 0; w < width && s * step + w < dim; ++w) {
          sum += query[s * step + w] * words[static_cast<size_t>((s * width + w) * num_codewords + code)];
        }
      }
      if (a.slot_level != nullptr) {
        sum *= levels[level[static_cast<size_t>(slot)] % static_cast<size_t>(num_levels)];
      }
      for (int64_t d = 0; d < dim; ++d) {
        term += query[d] * centroids[static_cast<size_t>(leaf[static_cast<size_t>(ids[at])] * dim + d)];
      }
      if (a.slot_offset != nullptr) sum += slot_offset[static_cast<size_t>(slot)];
      if (!(std::fabs(scores[at] - (sum + term)) < 1e-3)) fail("tree search: an estimate");
    }
  }
  for (int64_t q = 0; q < b; ++q) {
    std::vector<float> exact;
    for (int64_t i = 0; i < n; ++i) {
      float sum = 0;
      for (int64_t j = 0; j < row_dim; ++j) {
        const float x = rows[static_cast<size_t>(i * row_dim + j)];
        const float y = exact_queries[static_cast<size_t>(q * row_dim + j)];
        sum += a.euclidean ? -(x - y) * (x - y) : x * y;
      }
      exact.push_back(sum);
    }
    std::sort(exact.begin(), exact.end(), std::greater<float>());
    for (int64_t j = 0; j < k; ++j) {
      const int32_t id = ids[static_cast<size_t>(q * k + j)];
      if (id < -1 || id >= n) fail("tree search: id out of range");
      const float score = scores[static_cast<size_t>(q * k + j)];
      if (all && j < n && !(std::fabs(score - exact[static_cast<size_t>(j)]) < 1e-4f)) {
        fail("tree search: not exact");
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 150;
  for (const char* level : {"avx512vbmi", "avx512bw", "avx2", "neon", "portable"}) {
    if (!set_level(level)) {
      std::printf("%s: %s\n", level, level_reason(level));
      continue;
    }
    for (int i = 0; i < rounds; ++i) {
      Pool none;
      check_top_k(none, 20000);
      check_dot(none);
      check_rescore_and_encode(none);
      check_additive(none);
      check_tree_search(none);
      if (i % 5 == 0) {
        Threads threads;
        check_top_k(threads, 90000);
        check_dot(threads);
        check_additive(threads);
        check_tree_search(threads);
      }
    }
    std::printf("%s: %d rounds\n", level, rounds);
  }
  return 0;
}
