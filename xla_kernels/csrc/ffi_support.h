// Checks and adapters shared by the XLA FFI handlers.
#pragma once

#include <functional>
#include <string>
#include <utility>

#include "codes.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace xla_kernels {

namespace ffi = xla::ffi;

struct XlaPool final : Pool {
  explicit XlaPool(ffi::ThreadPool& pool_) : pool(pool_) {}
  int64_t num_threads() const override { return pool.num_threads(); }
  void schedule(std::function<void()> task) override {
    pool.Schedule([task = std::move(task)]() { task(); });
  }
  ffi::ThreadPool& pool;
};

template <typename Buffer>
std::string shape_of(const Buffer& buffer) {
  std::string text = "[";
  for (size_t i = 0; i < buffer.dimensions().size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(buffer.dimensions()[i]);
  }
  return text + "]";
}

#define XLA_KERNELS_REQUIRE(condition, message)                       \
  do {                                                                \
    if (!(condition)) return ffi::Error::InvalidArgument(message);    \
  } while (false)

// An optional operand of n elements is passed as an empty array when it is absent.
template <typename Buffer>
const typename std::remove_pointer<decltype(std::declval<Buffer>().typed_data())>::type* optional_row(
    const Buffer& buffer) {
  return buffer.element_count() == 0 ? nullptr : buffer.typed_data();
}

// Fills codes from the packed array uint8[blocks, groups, 64] and its attributes, or says what is
// wrong with them.
inline ffi::Error view_codes(const ffi::Buffer<ffi::U8>& data, int64_t num_rows,
                             int64_t num_subspaces, int64_t num_codewords, int32_t layout,
                             Codes* codes) {
  XLA_KERNELS_REQUIRE(layout >= 0 && layout <= 2, "unknown code layout");
  codes->layout = static_cast<Layout>(layout);
  XLA_KERNELS_REQUIRE(num_rows >= 0 && num_rows <= INT32_MAX - 64, "num_rows out of range");
  XLA_KERNELS_REQUIRE(num_subspaces >= 0 && num_subspaces <= (1 << 20),
                      "num_subspaces out of range");
  const int64_t most = codes->layout == Layout::kBytes ? 256 : 16;
  XLA_KERNELS_REQUIRE(num_codewords >= 1 && num_codewords <= most,
                      "num_codewords " + std::to_string(num_codewords) +
                          " does not fit the code layout");
  codes->num_rows = num_rows;
  codes->num_subspaces = num_subspaces;
  codes->groups = groups_of(codes->layout, num_subspaces);
  const auto dims = data.dimensions();
  XLA_KERNELS_REQUIRE(dims.size() == 3 && dims[0] == codes->num_blocks() &&
                          dims[1] == codes->groups && dims[2] == 64,
                      "codes must be uint8[" + std::to_string(codes->num_blocks()) + ", " +
                          std::to_string(codes->groups) + ", 64], got " + shape_of(data));
  codes->data = data.typed_data();
  return ffi::Error::Success();
}

#define XLA_KERNELS_EXPORT __attribute__((visibility("default")))

}  // namespace xla_kernels
