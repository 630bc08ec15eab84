// A query's lookup table, exact and rounded to bytes.
#pragma once

#include <cmath>
#include <cstdint>

#include "codes.h"
#include "scan.h"

namespace xla_kernels {

// Entries of a subspace are stored at a stride that the lookups address directly: 16 for kDwords
// and kLanes; 64, 128 or 256 for kBytes.
int64_t table_stride(Layout layout, int64_t num_codewords);

// Largest rounded entry. kDwords sums into 32 bits and uses all 8 bits; the others add two entries
// in a byte before they widen, so an entry has 7 bits and the pair cannot overflow.
inline int32_t table_max(Layout layout) { return layout == Layout::kDwords ? 255 : 127; }

// The float sum of a row, computed in float32 from subspace 0 upward, lies between
// base + delta * q and base + delta * (q + width), where q is the sum of its rounded entries:
// every entry is rounded down, and width counts the largest remainder of each subspace plus the
// rounding of the float sum itself. A scan that keeps rows within width of the best misses none.
struct TableBounds {
  float base = 0;
  float delta = 1;
  int32_t width = 0;
  // What rounding takes from a sum on average over all codes, in units of delta.
  float lost = 0;
  // Finite: all entries are. Otherwise the query has no results.
  bool finite = true;
  // Bounded: sums of entries cannot overflow float32. Otherwise rows are scored exactly, one by one.
  bool bounded = true;
};

// What rounding needs to know of a table before it begins.
struct TableMeasures {
  double base = 0;                 // sum of the smallest entries of the subspaces
  float range = 0, magnitude = 0;  // the widest subspace; sum of the largest magnitudes
  bool finite = true, integers = true;

  void add(float low, float high) {
    range = high - low > range ? high - low : range;
    magnitude += std::fabs(low) > std::fabs(high) ? std::fabs(low) : std::fabs(high);
    base += low;
  }
};

// What it took away: sums over the subspaces of the largest remainder, and of all remainders.
struct TableLosses {
  float largest = 0, total = 0;
};

// Rounds table (num_subspaces x num_codewords) to bytes at the layout's stride, padded with zeros to
// groups_of(layout, num_subspaces) groups. All `kernels` give the same.
TableBounds round_table(const float* table, Layout layout, int64_t num_subspaces,
                        int64_t num_codewords, const Kernels& kernels, uint8_t* out);

// Kernels::measure16 and round_down16 with AVX-512 (not in other builds).
void measure16_avx512(const float* table, int64_t num_subspaces, float* lows, TableMeasures* out);
void round_down16_avx512(const float* table, int64_t num_subspaces, const float* lows, float scale,
                          int32_t top, uint8_t* out, TableLosses* losses);

inline int64_t rounded_table_bytes(Layout layout, int64_t num_subspaces, int64_t num_codewords) {
  const int64_t per_group = layout == Layout::kBytes ? 1 : 4;
  return groups_of(layout, num_subspaces) * per_group * table_stride(layout, num_codewords);
}

inline float finish_score(float sum, const float* gain, const float* offset, int64_t row) {
  if (gain != nullptr) sum *= gain[row];
  if (offset != nullptr) sum += offset[row];
  return sum + 0.0f;  // -0 becomes 0
}

// Score of one row, summed in float32 from subspace 0 upward as the reference does. Codes beyond
// the table read its last entry: a corrupt code gives a wrong score but no wild read.
inline float exact_score(const float* table, int64_t num_codewords, const Codes& codes,
                         const float* gain, const float* offset, int64_t row) {
  float sum = 0;
  const uint32_t last = static_cast<uint32_t>(num_codewords - 1);
  visit_row(codes, row, [&](int64_t s, uint32_t code) {
    sum += table[s * num_codewords + (code < last ? code : last)];
  });
  return finish_score(sum, gain, offset, row);
}

}  // namespace xla_kernels
