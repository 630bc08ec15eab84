#include "tree_search.h"

namespace xla_kernels {
namespace {

#include "tree_level.inc"

void leaf_products(const int16_t* tiles, int64_t num_tiles, int64_t num_pairs, const int16_t* query,
                   int64_t num_queries, int32_t* out) {
  for (; num_queries > 0; --num_queries, query += 2 * num_pairs, out += num_tiles * kLanes) {
    for (int64_t t = 0; t < num_tiles; ++t) {
      int32_t sum[kLanes] = {};
      for (int64_t p = 0; p < num_pairs; ++p) {
        const int16_t* pair = tiles + (t * num_pairs + p) * 2 * kLanes;
        for (int j = 0; j < kLanes; ++j) {
          sum[j] += pair[2 * j] * query[2 * p] + pair[2 * j + 1] * query[2 * p + 1];
        }
      }
      for (int j = 0; j < kLanes; ++j) out[t * kLanes + j] = sum[j];
    }
  }
}

const TreeKernels kKernels = {leaf_products, build_table,  round16,  measure,  scaled_square,
                              round_query,   dot,          dot_bfloat16, dot_int8, distance};

}  // namespace

const TreeKernels* tree_portable() { return &kKernels; }

}  // namespace xla_kernels
