// Packed codes and how a single code is read from them. See xla_kernels/layout.py for the layouts.
#pragma once

#include <cstdint>
#include <cstring>

namespace xla_kernels {

enum class Layout : int32_t { kDwords = 0, kLanes = 1, kBytes = 2 };

// A view of packed codes. A group is 64 bytes of one block: 4 subspaces x 32 points (kDwords,
// kLanes) or 1 subspace x 64 points (kBytes). Block i begins at data + i * groups * 64, so a scan
// may start at any block.
struct Codes {
  const uint8_t* data = nullptr;
  Layout layout = Layout::kDwords;
  int64_t num_rows = 0;
  int64_t num_subspaces = 0;
  int64_t groups = 0;

  int64_t block_rows() const { return layout == Layout::kBytes ? 64 : 32; }
  int64_t num_blocks() const { return (num_rows + block_rows() - 1) / block_rows(); }
  const uint8_t* block(int64_t i) const { return data + i * groups * 64; }
};

inline int64_t groups_of(Layout layout, int64_t num_subspaces) {
  return layout == Layout::kBytes ? num_subspaces : (num_subspaces + 3) / 4;
}

// Packed codes in memory whose size the caller has checked.
inline Codes view_of(const uint8_t* data, int64_t layout, int64_t num_rows, int64_t num_subspaces) {
  Codes codes;
  codes.data = data;
  codes.layout = static_cast<Layout>(layout);
  codes.num_rows = num_rows;
  codes.num_subspaces = num_subspaces;
  codes.groups = groups_of(codes.layout, num_subspaces);
  return codes;
}

// Calls visit(subspace, code) for the codes of one row, in the order of the subspaces.
template <typename Visit>
inline void visit_row(const Codes& codes, int64_t row, Visit&& visit) {
  const int64_t size = codes.block_rows();
  const uint8_t* block = codes.block(row / size);
  const int64_t v = row % size, m = codes.num_subspaces;
  switch (codes.layout) {
    case Layout::kDwords: {
      const int shift = v < 16 ? 0 : 4;
      const uint8_t* lane = block + 4 * (v & 15);
      for (int64_t s = 0; s < m; s += 4, lane += 64) {
        uint32_t four;
        std::memcpy(&four, lane, 4);
        four >>= shift;
        const int64_t left = m - s < 4 ? m - s : 4;
        for (int64_t c = 0; c < left; ++c) visit(s + c, (four >> (8 * c)) & 15u);
      }
      break;
    }
    case Layout::kLanes:
      for (int64_t s = 0; s < m; ++s) {
        const uint8_t byte = block[(s >> 2) * 64 + ((s >> 1) & 1) * 32 + v];
        visit(s, (s & 1) ? byte >> 4 : byte & 15);
      }
      break;
    case Layout::kBytes:
      for (int64_t s = 0; s < m; ++s) visit(s, block[s * 64 + v]);
      break;
  }
}

}  // namespace xla_kernels
