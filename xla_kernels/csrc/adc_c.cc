// The flat search as a plain C function, for calls from a host language without XLA's dispatch.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "top_k.h"
#include "tree_search.h"

using namespace xla_kernels;  // NOLINT: a C symbol

extern "C" {

// Mirrored by xla_kernels/adc/direct.py: only pointers and 64-bit integers.
struct XlaKernelsAdcTopK {
  const float* codewords;  // [num_subspaces, width, num_codewords]
  const uint8_t* codes;
  const float* gain;
  const float* offset;
  const uint8_t* valid;
  int64_t num_rows, num_subspaces, num_codewords, layout, k, exact;
  int64_t width;  // -1: tables are given, and no codewords
};

// Finds the best rows on the calling thread; results holds the scores [num_queries, k] and after them
// the rows. queries: [num_queries, num_subspaces * width], or the tables where width is -1.
// The caller has checked shapes once for all calls.
__attribute__((visibility("default"))) void xla_kernels_adc_top_k_direct(
    const XlaKernelsAdcTopK* bound, const float* queries, int64_t num_queries, float* results) {
  // Queries whose tables exist at a time.
  constexpr int64_t kTogether = 256;
  TopKArguments a;
  a.num_codewords = bound->num_codewords;
  a.codes = view_of(bound->codes, bound->layout, bound->num_rows, bound->num_subspaces);
  a.terms.gain = bound->gain;
  a.terms.offset = bound->offset;
  a.valid = bound->valid;
  a.valid_queries = bound->valid != nullptr ? 1 : 0;
  a.k = bound->k;
  a.exact = bound->exact != 0;
  Pool none;
  const int64_t m = bound->num_subspaces, width = bound->width;
  const int64_t entries = m * bound->num_codewords;
  const bool factored = width >= 0;
  std::vector<float> tables(static_cast<size_t>(factored ? std::min(kTogether, num_queries) * entries : 0));
  for (int64_t first = 0; first < num_queries; first += kTogether) {
    a.num_queries = std::min(kTogether, num_queries - first);
    a.tables = factored ? tables.data() : queries + first * entries;
    for (int64_t q = 0; factored && q < a.num_queries; ++q) {
      tree_kernels().build_table(bound->codewords, queries + (first + q) * m * width, m, width, width,
                                 bound->num_codewords, tables.data() + q * entries);
    }
    a.scores = results + first * a.k;
    a.ids = reinterpret_cast<int32_t*>(results + (num_queries + first) * a.k);
    top_k(a, none);
  }
}
}
