// The tree search as a plain C function, for calls from a host language without XLA's dispatch.
#include <cmath>
#include <cstdint>

#include "tree_search.h"

using namespace xla_kernels;  // NOLINT: a C symbol

extern "C" {

// Mirrored by xla_kernels/tree_search/direct.py: only pointers and 64-bit integers, then floats.
struct XlaKernelsTreeSearch {
  const float* centroids;
  const int16_t* tiles;
  const float* leaf_offset;
  const float* spread;
  const int16_t* group_tiles;
  const float* group_offset;
  const int32_t* group_starts;
  const int32_t* starts;
  const float* codewords;
  const uint8_t* codes;
  const float* slot_offset;
  const uint8_t* slot_level;
  const float* levels;
  const int32_t* slot_rows;
  const uint8_t* usable;
  const void* rows;
  const float* row_scale;
  int64_t dim, num_leaves, width, num_codewords, layout, num_slots, num_subspaces, store, num_rows;
  int64_t row_dim, num_groups, euclidean, leaves_to_search, leaves_ranked, rescore, retrieve, k;
  int64_t num_levels;
  double centroid_scale, group_scale, deviations;
};

// Searches num_queries queries on the calling thread; results holds the scores [num_queries, k] and
// after them the rows. row_queries, for exact scores, may be the queries themselves. The caller has
// checked shapes and the rise of `starts` once for all calls. Returns 0, or 1, with nothing written,
// where a finite query is so large or small that it should be rescaled first.
__attribute__((visibility("default"))) int xla_kernels_tree_search_direct(
    const XlaKernelsTreeSearch* tree, const float* queries, const float* row_queries,
    int64_t num_queries, float* results) {
  for (int64_t q = 0; q < num_queries; ++q) {
    float peak = 0, poison = 0;
    for (int64_t i = 0; i < tree->row_dim; ++i) {
      const float x = row_queries[q * tree->row_dim + i];
      poison += x * 0.0f;
      peak = std::fabs(x) > peak ? std::fabs(x) : peak;
    }
    if (poison == 0.0f && peak != 0 && !(peak < 1e12f && peak > 1e-12f)) return 1;
  }
  TreeSearchArguments a;
  a.queries = queries;
  a.num_queries = num_queries;
  a.dim = tree->dim;
  a.centroids = tree->centroids;
  a.tiles = tree->tiles;
  a.centroid_scale = static_cast<float>(tree->centroid_scale);
  a.leaf_offset = tree->leaf_offset;
  a.spread = tree->spread;
  a.group_tiles = tree->group_tiles;
  a.group_scale = static_cast<float>(tree->group_scale);
  a.group_offset = tree->group_offset;
  a.group_starts = tree->group_starts;
  a.num_groups = tree->num_groups;
  a.starts = tree->starts;
  a.num_leaves = tree->num_leaves;
  a.codewords = tree->codewords;
  a.width = tree->width;
  a.num_codewords = tree->num_codewords;
  a.codes = view_of(tree->codes, tree->layout, tree->num_slots, tree->num_subspaces);
  a.slot_offset = tree->slot_offset;
  a.slot_level = tree->slot_level;
  a.levels = tree->levels;
  a.num_levels = tree->num_levels;
  a.slot_rows = tree->slot_rows;
  a.usable = tree->usable;
  a.store = static_cast<StoreType>(tree->store);
  a.rows = tree->rows;
  a.row_scale = tree->row_scale;
  a.row_queries = row_queries;
  a.row_dim = tree->row_dim;
  a.num_rows = tree->num_rows;
  a.euclidean = tree->euclidean != 0;
  a.leaves_to_search = tree->leaves_to_search;
  a.leaves_ranked = tree->leaves_ranked;
  a.deviations = static_cast<float>(tree->deviations);
  a.rescore = tree->rescore;
  a.retrieve = tree->retrieve;
  a.k = tree->k;
  a.scores = results;
  a.ids = reinterpret_cast<int32_t*>(results + num_queries * tree->k);
  Pool none;
  tree_search(a, none);
  return 0;
}
}
