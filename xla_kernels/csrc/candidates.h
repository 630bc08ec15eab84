// The best of candidates that several devices found for the same queries.
#pragma once

#include <cstdint>

#include "threads.h"

namespace xla_kernels {

struct CandidateArguments {
  const float* scores = nullptr;  // [parts, num_queries, size]
  const int32_t* rows = nullptr;  // [parts, num_queries, size], -1 for none
  int64_t parts = 1;
  int64_t num_queries = 0;
  int64_t size = 0;
  // Of the `retrieve` best, and those that equal the last, the `keep` best distinct rows; where
  // keep >= retrieve all of them, copies too and in no order.
  int64_t retrieve = 0;
  int64_t keep = 0;
  int64_t width = 0;              // equals beyond it are cut, the highest rows first
  float* best_scores = nullptr;   // [num_queries, width], -inf for none
  int32_t* best_rows = nullptr;   // [num_queries, width], -1 for none
};

void best_candidates(const CandidateArguments& arguments, Pool& pool);

}  // namespace xla_kernels
