// XLA FFI handler of the search for additive codes.
#include "additive.h"
#include "ffi_support.h"

namespace xla_kernels {
namespace {

ffi::Error Additive(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> rows,
                    ffi::Buffer<ffi::F32> directions, ffi::Buffer<ffi::F32> orthogonal,
                    ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::U8> start,
                    ffi::Buffer<ffi::F32> words, ffi::Buffer<ffi::F32> norms,
                    ffi::Buffer<ffi::F32> pairs, ffi::Buffer<ffi::S32> kicks,
                    ffi::Result<ffi::Buffer<ffi::U8>> codes, int64_t sweeps) {
  AdditiveArguments a;
  const auto shape = rows.dimensions();
  XLA_KERNELS_REQUIRE(shape.size() == 2, "rows must be float32[n, d], got " + shape_of(rows));
  a.n = shape[0];
  a.d = shape[1];
  const auto along = directions.dimensions();
  XLA_KERNELS_REQUIRE(along.size() == 3 && along[0] == a.n && along[2] == a.d,
                      "directions must be float32[n, r, d], got " + shape_of(directions));
  a.r = along[1];
  XLA_KERNELS_REQUIRE(orthogonal.dimensions().size() == 1 && orthogonal.dimensions()[0] == a.n,
                      "orthogonal must be float32[n], got " + shape_of(orthogonal));
  const auto factors = weights.dimensions();
  XLA_KERNELS_REQUIRE(factors.size() == 2 && factors[0] == a.n && factors[1] == a.r,
                      "weights must be float32[n, r], got " + shape_of(weights));
  const auto table = words.dimensions();
  XLA_KERNELS_REQUIRE(table.size() == 3 && table[0] == a.d && table[2] % 16 == 0,
                      "words must be float32[d, m, kp], kp a multiple of 16, got " + shape_of(words));
  a.m = table[1];
  a.kp = table[2];
  const auto products = pairs.dimensions();
  XLA_KERNELS_REQUIRE(products.size() == 4 && products[0] == a.m && products[1] >= 1 &&
                          products[1] <= a.kp && products[1] <= 256 && products[2] == a.m &&
                          products[3] == a.kp,
                      "pairs must be float32[m, k, m, kp], got " + shape_of(pairs));
  a.k = products[1];
  XLA_KERNELS_REQUIRE(norms.dimensions().size() == 2 && norms.dimensions()[0] == a.m &&
                          norms.dimensions()[1] == a.kp,
                      "norms must be float32[m, kp], got " + shape_of(norms));
  const auto first = start.dimensions();
  XLA_KERNELS_REQUIRE(first.size() == 2 && (first[0] == a.n || first[0] == 0) && first[1] == a.m,
                      "start must be uint8[n or 0, m], got " + shape_of(start));
  const auto moves = kicks.dimensions();
  XLA_KERNELS_REQUIRE(moves.size() == 3 && moves[2] == 2,
                      "kicks must be int32[rounds, size, 2], got " + shape_of(kicks));
  XLA_KERNELS_REQUIRE(sweeps >= 1, "sweeps must be at least 1");
  XLA_KERNELS_REQUIRE(codes->dimensions().size() == 2 && codes->dimensions()[0] == a.n &&
                          codes->dimensions()[1] == a.m,
                      "codes must be uint8[n, m], got " + shape_of(*codes));
  a.rows = rows.typed_data();
  a.directions = directions.typed_data();
  a.orthogonal = orthogonal.typed_data();
  a.weights = weights.typed_data();
  a.words = words.typed_data();
  a.norms = norms.typed_data();
  a.pairs = pairs.typed_data();
  a.start = first[0] == 0 ? nullptr : start.typed_data();
  a.kicks = kicks.typed_data();
  a.rounds = moves[0];
  a.size = moves[1];
  a.sweeps = sweeps;
  a.codes = codes->typed_data();
  XlaPool pool(threads);
  assign_additive(a, pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xla_kernels

using namespace xla_kernels;  // NOLINT: the macro below pastes names at file scope

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(xla_kernels_additive, Additive,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("sweeps"));

#pragma GCC visibility pop
