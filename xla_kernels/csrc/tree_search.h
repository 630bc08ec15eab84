// Search of quantized rows in the leaves of a k-means tree, without XLA.
//
// One query: scores of all leaves (or of groups, then of the leaves of the best), the best leaves,
// one lookup table, a scan of the codes of those leaves, the best candidates, their exact scores. A batch visits each leaf once for all the
// queries that probe it, so codes are read once and scanned for eight queries at a time.
#pragma once

#include <cstdint>
#include <limits>

#include "codes.h"
#include "threads.h"

namespace xla_kernels {

enum class StoreType : int32_t { kNone = 0, kFloat32 = 1, kBFloat16 = 2, kInt8 = 3 };

struct TreeSearchArguments {
  const float* queries = nullptr;  // [num_queries, dim]
  int64_t num_queries = 0;
  int64_t dim = 0;

  const float* centroids = nullptr;  // [num_leaves, dim]
  // int16[tiles of 16 leaves][pairs of columns][16][2]: what ranks leaves, times `centroid_scale`.
  const int16_t* tiles = nullptr;
  float centroid_scale = 1;
  const float* leaf_offset = nullptr;  // [num_leaves] or null; ranks leaves, not rows
  // Deviation of a coordinate of what the codes of a leaf stand for; with it `deviations` is finite.
  const float* spread = nullptr;       // [num_leaves]
  const int32_t* starts = nullptr;     // [num_leaves + 1] first block of each leaf
  int64_t num_leaves = 0;
  // Groups of neighbouring leaves, ranked before them; none where num_groups is 0.
  const int16_t* group_tiles = nullptr;  // as `tiles`
  float group_scale = 1;
  const float* group_offset = nullptr;   // [num_groups] or null
  const int32_t* group_starts = nullptr;  // [num_groups + 1] first leaf of each group
  int64_t num_groups = 0;

  // [num_subspaces, width, num_codewords]; words of width dim are added up, shorter ones stand side
  // by side.
  const float* codewords = nullptr;
  int64_t width = 0;
  int64_t num_codewords = 0;
  Codes codes;                          // of the slots
  const float* slot_offset = nullptr;   // [slots] or null
  // Factors of the slots' sums of table entries, not of their leaves' terms: numbers of 16 or 256
  // levels, or null.
  const uint8_t* slot_level = nullptr;  // [slots]
  const float* levels = nullptr;        // [num_levels]
  int64_t num_levels = 0;
  const int32_t* slot_rows = nullptr;   // [slots], -1 where a leaf ends inside a block
  const uint8_t* usable = nullptr;      // [usable_queries, slots], usable_queries is 1 or num_queries
  int64_t usable_queries = 1;

  StoreType store = StoreType::kNone;
  const void* rows = nullptr;         // [num_rows, row_dim]
  const float* row_queries = nullptr;  // [num_queries, row_dim], for exact scores
  int64_t row_dim = 0;
  const float* row_scale = nullptr;   // [num_rows] for kInt8
  int64_t num_rows = 0;
  bool euclidean = false;             // exact scores are -||q - x||^2, not <q, x>

  int64_t leaves_to_search = 1;
  int64_t leaves_ranked = 1;          // leaves of the best groups that are ranked, at least
  // After its best leaves a query passes over those whose estimates would have to lie more than so
  // many deviations beyond their mean to become candidates.
  float deviations = std::numeric_limits<float>::infinity();
  int64_t rescore = 0;                // 0: the scores are estimates
  int64_t retrieve = 0;               // slots kept for rescoring; their best rows are rescored
  int64_t k = 0;
  float* scores = nullptr;            // [num_queries, k]
  int32_t* ids = nullptr;             // [num_queries, k]

  // Leaves [num_queries, leaves_to_search] to scan, best first and -1 for none, instead of those that
  // rank best; leaves without slots cost nothing.
  const int32_t* chosen = nullptr;
  // Results are the slots of the `retrieve` best estimates by rounded tables, in no order, and as many
  // more that equal the last as k has room for: their rows, and those estimates.
  bool candidates = false;
  // With candidates: only the estimate of the last of the `retrieve` best, into [num_queries, k], or
  // -inf where there are fewer. Of a large leaf not all slots are scanned.
  bool last = false;
  // Estimates [num_queries] below which slots need not be found, or null.
  const float* floor = nullptr;
};

void tree_search(const TreeSearchArguments& arguments, Pool& pool);

// The leaves [num_queries, leaves_to_search] that rank best, best first and -1 for none.
void rank_leaves(const TreeSearchArguments& arguments, int32_t* leaves, Pool& pool);

// What differs between instruction sets.
struct TreeKernels {
  // Inner products of queries int16[num_queries][2 * num_pairs] with all tiles of centroids, into
  // int32[num_queries][tiles * 16].
  void (*leaf_products)(const int16_t* tiles, int64_t num_tiles, int64_t num_pairs,
                        const int16_t* queries, int64_t num_queries, int32_t* out);
  // table[s][j] = sum_w query[s * step + w] * codewords[s][w][j]; the query is padded with zeros.
  void (*build_table)(const float* codewords, const float* query, int64_t num_subspaces,
                      int64_t width, int64_t step, int64_t num_codewords, float* table);
  // Rounds a table of 16 codewords a subspace to bytes of step *delta above *base.
  void (*round16)(const float* table, int64_t num_subspaces, int32_t top, uint8_t* out, float* base,
                  float* delta);
  void (*measure)(const float* query, int64_t dim, float* peak, float* poison);
  float (*scaled_square)(const float* query, int64_t dim, float scale);
  void (*round_query)(const float* query, int64_t dim, float scale, int16_t* out);
  float (*dot)(const float* query, const float* row, int64_t dim);
  float (*dot_bfloat16)(const float* query, const uint16_t* row, int64_t dim);
  float (*dot_int8)(const float* query, const int8_t* row, int64_t dim);
  float (*distance)(const float* query, const float* row, int64_t dim);
};

// Those of the instruction set in use.
const TreeKernels& tree_kernels();

const TreeKernels* tree_portable();
const TreeKernels* tree_avx2();
const TreeKernels* tree_avx512();

}  // namespace xla_kernels
