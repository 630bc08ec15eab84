// Scans in plain C++ for every layout: the fallback of all levels and the tests' second opinion.
//
// kLanes: a byte holds the codes of two subspaces of one point, so the tables of both are added
// beforehand into 256 entries and one look-up serves two subspaces.
#include <cstring>

#include "scan.h"

namespace xla_kernels {
namespace {

int64_t expanded_bytes(Layout layout, int64_t groups, int64_t stride) {
  if (layout == Layout::kLanes) return groups * 2 * 256 * 2;
  return groups * (layout == Layout::kBytes ? 1 : 4) * stride;
}

void expand(const uint8_t* rounded, Layout layout, int64_t groups, int64_t stride, void* out) {
  if (layout != Layout::kLanes) {
    std::memcpy(out, rounded, static_cast<size_t>(expanded_bytes(layout, groups, stride)));
    return;
  }
  auto* pairs = static_cast<uint16_t*>(out);
  for (int64_t p = 0; p < groups * 2; ++p) {
    const uint8_t* first = rounded + p * 32;
    const uint8_t* second = first + 16;
    for (int64_t byte = 0; byte < 256; ++byte) {
      pairs[p * 256 + byte] = static_cast<uint16_t>(first[byte & 15] + second[byte >> 4]);
    }
  }
}

void sum_lanes(const uint8_t* block, int64_t groups, const void* table, int32_t* sums) {
  const auto* pairs = static_cast<const uint16_t*>(table);
  for (int64_t p = 0; p < groups * 2; ++p, pairs += 256, block += 32) {
    for (int v = 0; v < 32; ++v) sums[v] += pairs[block[v]];
  }
}

void sum_dwords(const uint8_t* block, int64_t groups, const void* table, int32_t* sums) {
  const auto* entries = static_cast<const uint8_t*>(table);
  for (int64_t g = 0; g < groups; ++g, entries += 64, block += 64) {
    for (int v = 0; v < 16; ++v) {
      for (int c = 0; c < 4; ++c) {
        const uint8_t byte = block[4 * v + c];
        sums[v] += entries[16 * c + (byte & 15)];
        sums[16 + v] += entries[16 * c + (byte >> 4)];
      }
    }
  }
}

void sum_bytes(const uint8_t* block, int64_t groups, int64_t stride, const void* table,
               int32_t* sums) {
  const auto* entries = static_cast<const uint8_t*>(table);
  const auto mask = static_cast<uint8_t>(stride - 1);
  for (int64_t s = 0; s < groups; ++s, entries += stride, block += 64) {
    for (int v = 0; v < 64; ++v) sums[v] += entries[block[v] & mask];
  }
}

void scan(const Codes& codes, const RowTerms& terms, int64_t begin, int64_t end, int64_t,
          int64_t stride, const ScanQuery* queries, int64_t num_queries) {
  const int64_t size = codes.block_rows();
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t q = 0; q < num_queries; ++q) {
      int32_t sums[64] = {};
      switch (codes.layout) {
        case Layout::kLanes:
          sum_lanes(codes.block(i), codes.groups, queries[q].table, sums);
          break;
        case Layout::kDwords:
          sum_dwords(codes.block(i), codes.groups, queries[q].table, sums);
          break;
        case Layout::kBytes:
          sum_bytes(codes.block(i), codes.groups, stride, queries[q].table, sums);
          break;
      }
      append_block(sums, size, codes, terms, i * size, queries[q]);
    }
  }
}

const Kernels kPortable = {"portable", expanded_bytes, expand, scan, count_at_least, nullptr, nullptr};

}  // namespace

const Kernels* portable_kernels() { return &kPortable; }

}  // namespace xla_kernels
