// The k best rows of codes for a batch of queries, without XLA.
#pragma once

#include <cstdint>

#include "codes.h"
#include "scan.h"
#include "threads.h"

namespace xla_kernels {

struct TopKArguments {
  const float* tables = nullptr;  // [num_queries, num_subspaces, num_codewords]
  int64_t num_queries = 0;
  int64_t num_codewords = 0;
  Codes codes;
  RowTerms terms;
  const uint8_t* valid = nullptr;  // [valid_queries, num_rows], valid_queries is 0, 1 or num_queries
  int64_t valid_queries = 0;
  int64_t k = 0;
  bool exact = true;  // false: trust the rounded tables in choosing rows
  float* scores = nullptr;   // [num_queries, k]
  int32_t* ids = nullptr;    // [num_queries, k]
};

void top_k(const TopKArguments& arguments, Pool& pool);

// All scores, float [num_queries, num_rows].
struct ScoresArguments {
  const float* tables = nullptr;
  int64_t num_queries = 0;
  int64_t num_codewords = 0;
  Codes codes;
  RowTerms terms;
  float* scores = nullptr;
};

void all_scores(const ScoresArguments& arguments, Pool& pool);

// Writes the k best of (score, row) keys, best_key(), ascending; pads with -inf and -1. Reorders keys.
void write_best(uint64_t* keys, int64_t size, int64_t k, float* scores, int32_t* ids);

// Ascending keys are descending scores, then ascending rows.
inline uint64_t best_key(float score, int32_t row) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(ordered(score)) ^ 0x7fffffffu) << 32) |
         static_cast<uint32_t>(row);
}

}  // namespace xla_kernels
