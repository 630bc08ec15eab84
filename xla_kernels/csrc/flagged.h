// The k best rows of plain 4-bit codes, found in two steps: a scan that never branches flags the rows
// whose rounded sums pass, and these are scored exactly while their codes are still in a cache.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "codes.h"
#include "scan.h"
#include "table.h"

namespace xla_kernels {

// One query over one range of the rows.
class FlaggedQuery {
 public:
  // expanded: Kernels::expand of the rounded table; table: the exact one, 16 entries a subspace.
  // Not exact: rows whose rounding was unusually large may be missed.
  void start(const Codes& codes, const uint8_t* expanded, const float* table,
             const TableBounds& bounds, int64_t k, bool exact, const Kernels& kernels);

  void restart();  // forgets what was found and expected

  // Begins with the threshold that k rows are likely to pass, as `sum` is reached by as many of a
  // sample; where fewer pass in the end, holds() is false and the scan has to be repeated.
  void expect(int32_t sum);
  bool holds() const;

  // Rows that were flagged: after threshold() was read in any order, and above all before.
  void add(const int32_t* rows, int64_t count);
  void finish();  // after the last

  const uint8_t* expanded() const { return expanded_; }
  int32_t threshold() const { return threshold_; }  // sums above it may matter; at least -1
  // The rows found, k or a few more, and their scores as ordered(); in no order.
  int64_t size() const { return size_; }
  const int32_t* keys() const { return keys_.get(); }
  const int32_t* rows() const { return keys_.get() + limit_ + kTogether; }

 private:
  static constexpr int64_t kTogether = 32;  // rows scored together

  void trim();
  void raise(double sum);

  const Codes* codes_ = nullptr;
  const Kernels* kernels_ = nullptr;
  const uint8_t* expanded_ = nullptr;
  const float* table_ = nullptr;
  double base_ = 0, delta_ = 1, likely_ = 0, slack_ = 0;
  int64_t k_ = 0, limit_ = 0, size_ = 0, num_waiting_ = 0;
  int32_t threshold_ = -1, expected_ = 0;
  int32_t bar_ = 0, bar_row_ = 0;  // the last of the k best: rows must be better, or equal and before it
  int32_t waiting_[kTogether] = {};
  std::unique_ptr<int32_t[]> keys_;
  int64_t stored_ = 0;
};

// Whether ranges of so many blocks of these codes can be scanned so by the functions in use, and are
// long enough for a sample of their rows to spare flagging most that come before k good ones.
bool can_flag(const Codes& codes, int64_t blocks, int64_t k, const Kernels& kernels);

// Scans blocks [begin, end) for all queries. valid: a byte for each row, for all of them, or null.
void scan_flagged(const Codes& codes, int64_t begin, int64_t end, const uint8_t* valid, int64_t k,
                  FlaggedQuery* queries, int64_t num_queries, const Kernels& kernels);

}  // namespace xla_kernels
