// Scans of block ranges, one set of functions for each instruction set.
#pragma once

#include <cstdint>

#include "codes.h"
#include "collector.h"

namespace xla_kernels {

// One query of a scan. Everything is caller-owned; a scan only appends to the collector.
struct ScanQuery {
  const void* table = nullptr;       // expanded for the instruction set (Kernels::expand)
  Collector* collector = nullptr;
  const uint8_t* valid = nullptr;    // one byte a row, or null
  // Added to every key: the rounded term of a tree leaf, in units of delta.
  int32_t shift = 0;
  // With gains: score = gain * (centre + delta * q +- error) + offset + addend, where the addend is
  // the term of a tree leaf, which no gain multiplies; the shift is 0 then.
  float centre = 0, delta = 1, error = 0, addend = 0;
};

// Terms of the rows: gains as floats, or as numbers of one of 16 or 256 levels.
struct RowTerms {
  const float* gain = nullptr;
  const float* offset = nullptr;
  const uint8_t* level = nullptr;
  const float* levels = nullptr;
  int32_t num_levels = 0;

  bool affine() const { return gain != nullptr || offset != nullptr || level != nullptr; }
  // A number beyond the levels wraps around, on every path alike.
  float gain_of(int64_t row) const {
    if (level != nullptr) return levels[level[row] & (num_levels - 1)];
    return gain != nullptr ? gain[row] : 1.0f;
  }
};

// Appends to every query's collector the rows of blocks [begin, end) that pass its threshold.
using Scan = void (*)(const Codes& codes, const RowTerms& terms, int64_t begin, int64_t end,
                      int64_t next,    // block that the caller will scan after these, to prefetch
                      int64_t stride,  // table_stride() of the tables
                      const ScanQuery* queries, int64_t num_queries);

struct TableLosses;
struct TableMeasures;

struct Kernels {
  const char* name;
  // Bytes of an expanded table, and the expansion of a rounded one (64-byte aligned output).
  int64_t (*expanded_bytes)(Layout layout, int64_t groups, int64_t stride);
  void (*expand)(const uint8_t* rounded, Layout layout, int64_t groups, int64_t stride, void* out);
  Scan scan;
  CountAtLeast count;
  // Exact float scores of blocks [begin, end) of one query into out[row]; null: one row at a time.
  void (*exact_scores)(const float* padded_table, const Codes& codes, int64_t begin, int64_t end,
                       float* out);
  // Exact float sums of chosen rows of kDwords codes; null: one row at a time. Tables as above,
  // 16 entries a subspace; codes must be gatherable().
  void (*exact_rows)(const float* padded_table, const Codes& codes, const int32_t* rows,
                     int64_t count, float* out);
  // For flagged.h, of kDwords codes; null: not here.
  // The largest sums in every step-th pair of blocks of [begin, end), `together` pairs at a time: 16
  // numbers, the largest in each lane, of query q from out + q * stride on; 1, 2, 4 or 8 queries. Where
  // `valid` is not null only of rows whose byte in it is not 0, and INT32_MIN where there are none.
  void (*maxima)(const Codes& codes, int64_t begin, int64_t end, int64_t step, int64_t together,
                 const uint8_t* const* tables, const uint8_t* valid, int64_t num_queries, int32_t* out,
                 int64_t stride) = nullptr;
  // The blocks of [begin, end) of which some sum is above its query's threshold: their numbers, and a
  // byte for each of their 32 rows with the bits of those queries: 2, 4 or 8. Returns how many; the
  // lists have room for all blocks (flags: 32 bytes each). Thresholds are at least -1; rows beyond the
  // last are rows, but not where `valid` tells which are.
  int64_t (*flag)(const Codes& codes, int64_t begin, int64_t end, int64_t next,
                  const uint8_t* const* tables, const int32_t* thresholds, const uint8_t* valid,
                  int64_t num_queries, uint8_t* flags, int32_t* found) = nullptr;
  // Of one query the rows themselves, in no order; fastest for ranges of a multiple of four blocks. The
  // scratch has room for a word a block and 32 more, rows for all rows and one more.
  int64_t (*flag_rows)(const Codes& codes, int64_t begin, int64_t end, int64_t next,
                       const uint8_t* table, int32_t threshold, const uint8_t* valid,
                       uint64_t* scratch, int32_t* rows) = nullptr;
  // The steps of round_table() for 16 codewords a subspace, a stride of 16 bytes; null: not here.
  void (*measure16)(const float* table, int64_t num_subspaces, float* lows,
                    TableMeasures* out) = nullptr;
  void (*round_down16)(const float* table, int64_t num_subspaces, const float* lows, float scale,
                       int32_t top, uint8_t* out, TableLosses* losses) = nullptr;
};

// exact_rows addresses 32-bit words by signed 32-bit indices.
inline bool gatherable(const Codes& codes) {
  return codes.layout == Layout::kDwords &&
         codes.num_blocks() * codes.groups < (int64_t{1} << 27);
}

// The functions of a level, or null where this build or processor lacks it.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512bw_kernels();
const Kernels* avx512vbmi_kernels();
const Kernels* neon_kernels();

// The functions in use, chosen once from the processor and XLA_KERNELS_SIMD.
const Kernels* kernels();
const char* level_reason(const char* name);  // empty, or why a level cannot run
bool set_level(const char* name);

// Appends rows of one block given its sums; the common slow path of the scans that have no faster.
inline void append_block(const int32_t* sums, int64_t count, const Codes& codes,
                         const RowTerms& terms, int64_t first_row, const ScanQuery& query) {
  Collector& out = *query.collector;
  const int64_t left = codes.num_rows - first_row;
  if (count > left) count = left;
  for (int64_t v = 0; v < count; ++v) {
    const int64_t row = first_row + v;
    if (query.valid != nullptr && query.valid[row] == 0) continue;
    const int32_t key = sums[v] + query.shift;
    if (!out.affine) {
      if (key <= out.threshold) continue;
      out.low[out.size] = key;
    } else {
      const float gain = terms.gain_of(row);
      const float offset = terms.offset != nullptr ? terms.offset[row] : 0.0f;
      const float sum = query.centre + query.delta * static_cast<float>(key);
      const float middle = gain * sum + (offset + query.addend);
      const float slack = (gain < 0 ? -gain : gain) * query.error +
                          4e-7f * (offset < 0 ? -offset : offset);
      const float above = middle + slack, below = middle - slack;
      if (above < out.float_threshold) continue;  // false for NaN: the exact score decides
      out.low[out.size] = below == below ? ordered(below) : INT32_MIN;
      out.high[out.size] = above == above ? ordered(above) : INT32_MAX;
    }
    out.rows[out.size++] = static_cast<int32_t>(row);
  }
  out.make_room();
}

}  // namespace xla_kernels
