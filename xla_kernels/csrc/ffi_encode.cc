// XLA FFI handler of the coordinate-descent assignment.
#include "encode.h"
#include "ffi_support.h"

namespace xla_kernels {
namespace {

ffi::Error Encode(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> rows,
                  ffi::Buffer<ffi::F32> directions, ffi::Buffer<ffi::F32> orthogonal,
                  ffi::Buffer<ffi::F32> weight, ffi::Buffer<ffi::F32> codewords,
                  ffi::Result<ffi::Buffer<ffi::U8>> codes, int64_t max_sweeps) {
  EncodeArguments a;
  const auto words = codewords.dimensions();
  XLA_KERNELS_REQUIRE(words.size() == 3 && words[1] >= 1 && words[1] <= 256,
                      "codewords must be float32[m, 1 to 256, s], got " + shape_of(codewords));
  const auto shape = rows.dimensions();
  XLA_KERNELS_REQUIRE(shape.size() == 2 && shape[1] == words[0] * words[2],
                      "rows must be float32[n, m * s], got " + shape_of(rows));
  XLA_KERNELS_REQUIRE(directions.dimensions() == shape,
                      "directions must have the shape of rows, got " + shape_of(directions));
  XLA_KERNELS_REQUIRE(orthogonal.dimensions().size() == 1 && orthogonal.dimensions()[0] == shape[0],
                      "orthogonal must be float32[n], got " + shape_of(orthogonal));
  XLA_KERNELS_REQUIRE(weight.dimensions() == orthogonal.dimensions(),
                      "weight must be float32[n], got " + shape_of(weight));
  XLA_KERNELS_REQUIRE(codes->dimensions().size() == 2 && codes->dimensions()[0] == shape[0] &&
                          codes->dimensions()[1] == words[0],
                      "codes must be uint8[n, m], got " + shape_of(*codes));
  a.n = shape[0];
  a.m = words[0];
  a.k = words[1];
  a.s = words[2];
  a.rows = rows.typed_data();
  a.directions = directions.typed_data();
  a.orthogonal = orthogonal.typed_data();
  a.weight = weight.typed_data();
  a.codewords = codewords.typed_data();
  a.max_sweeps = max_sweeps;
  a.codes = codes->typed_data();
  XlaPool pool(threads);
  encode(a, pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xla_kernels

using namespace xla_kernels;  // NOLINT: the macro below pastes names at file scope

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(xla_kernels_encode, Encode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("max_sweeps"));

#pragma GCC visibility pop
