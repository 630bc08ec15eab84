// Inner products of int8 rows with int8 queries, all rows; and exact rescoring of chosen rows.
#pragma once

#include <cstdint>

#include "scan.h"
#include "threads.h"

namespace xla_kernels {

// Rows plus 128 as uint8[blocks, groups, 64]: a block is 16 rows, a group 4 components, and byte
// 4 v + c is component c of the group of row v, so vpdpbusd adds four products into the row's lane.
struct ByteRows {
  const uint8_t* data = nullptr;
  int64_t num_rows = 0;
  int64_t groups = 0;
  int64_t num_blocks() const { return (num_rows + 15) / 16; }
  const uint8_t* block(int64_t i) const { return data + i * groups * 64; }
};

// Appends rows of blocks [begin, end); a query's table is its int8 components, 4 * groups of them,
// and its shift takes the 128 off again: -128 times their sum.
using DotScan = void (*)(const ByteRows& rows, const RowTerms& terms, int64_t begin, int64_t end,
                         const ScanQuery* queries, int64_t num_queries);
void dot_scan_portable(const ByteRows& rows, const RowTerms& terms, int64_t begin, int64_t end,
                       const ScanQuery* queries, int64_t num_queries);
DotScan dot_scan_avx512vnni();  // null where the build lacks it

struct DotArguments {
  const int8_t* queries = nullptr;  // [num_queries, width]
  int64_t num_queries = 0;
  int64_t width = 0;
  ByteRows rows;
  const float* scale = nullptr;     // [num_rows] or null
  const uint8_t* valid = nullptr;   // as in TopKArguments
  int64_t valid_queries = 0;
  int64_t k = 0;
  float* scores = nullptr;          // scale * integer product
  int32_t* ids = nullptr;
};

void dot_top_k(const DotArguments& arguments, Pool& pool);

enum class RowType : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

struct RescoreArguments {
  const float* queries = nullptr;      // [num_queries, width]
  int64_t num_queries = 0;
  int64_t width = 0;
  const void* rows = nullptr;          // [num_rows, width]
  RowType type = RowType::kFloat32;
  int64_t num_rows = 0;
  const float* scale = nullptr;        // [num_rows] or null
  const int32_t* candidates = nullptr; // [num_queries, num_candidates], rows out of range are skipped
  int64_t num_candidates = 0;
  bool euclidean = false;              // scores are -||q - x||^2; float rows only
  int64_t k = 0;
  float* scores = nullptr;
  int32_t* ids = nullptr;
};

void rescore_top_k(const RescoreArguments& arguments, Pool& pool);

// <query, row> of `width` components in float32, 16 partial sums.
using RowDot = float (*)(const float* query, const void* row, RowType type, int64_t width);
RowDot row_dot_portable();
RowDot row_dot_avx2();    // null without it in the build
RowDot row_dot_avx512();  // null without it in the build

}  // namespace xla_kernels
