// XLA FFI handlers of the int8 scan and of rescoring.
#include "dot.h"
#include "ffi_support.h"

namespace xla_kernels {
namespace {

ffi::Error DotTopK(ffi::ThreadPool threads, ffi::Buffer<ffi::S8> queries, ffi::Buffer<ffi::U8> data,
                   ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::PRED> valid,
                   ffi::Result<ffi::Buffer<ffi::F32>> scores,
                   ffi::Result<ffi::Buffer<ffi::S32>> ids, int64_t num_rows) {
  DotArguments a;
  const auto shape = queries.dimensions();
  XLA_KERNELS_REQUIRE(shape.size() == 2 && shape[1] <= 32768,
                      "queries must be int8[b, at most 32768], got " + shape_of(queries));
  XLA_KERNELS_REQUIRE(num_rows >= 0 && num_rows <= INT32_MAX - 64, "num_rows out of range");
  a.num_queries = shape[0];
  a.width = shape[1];
  a.rows.num_rows = num_rows;
  a.rows.groups = (a.width + 3) / 4;
  const auto packed = data.dimensions();
  XLA_KERNELS_REQUIRE(packed.size() == 3 && packed[0] == a.rows.num_blocks() &&
                          packed[1] == a.rows.groups && packed[2] == 64,
                      "rows must be uint8[" + std::to_string(a.rows.num_blocks()) + ", " +
                          std::to_string(a.rows.groups) + ", 64], got " + shape_of(data));
  const auto scales = scale.dimensions();
  XLA_KERNELS_REQUIRE(scales.size() == 1 && (scales[0] == 0 || scales[0] == num_rows),
                      "scale must be float32[n] or empty, got " + shape_of(scale));
  const auto mask = valid.dimensions();
  XLA_KERNELS_REQUIRE(mask.size() == 2 && (mask[0] == 0 || ((mask[0] == 1 || mask[0] == a.num_queries) &&
                                                            mask[1] == num_rows)),
                      "valid must be bool[0 or 1 or b, n], got " + shape_of(valid));
  const auto out = scores->dimensions();
  XLA_KERNELS_REQUIRE(out.size() == 2 && out[0] == a.num_queries && ids->dimensions() == out,
                      "results must be [b, k], got " + shape_of(*scores));
  a.queries = queries.typed_data();
  a.rows.data = data.typed_data();
  a.scale = optional_row(scale);
  a.valid = reinterpret_cast<const uint8_t*>(valid.typed_data());
  a.valid_queries = num_rows == 0 ? 0 : mask[0];
  a.k = out[1];
  a.scores = scores->typed_data();
  a.ids = ids->typed_data();
  if (a.k == 0) return ffi::Error::Success();
  XlaPool pool(threads);
  dot_top_k(a, pool);
  return ffi::Error::Success();
}

ffi::Error RescoreTopK(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> queries, ffi::AnyBuffer rows,
                       ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::S32> candidates,
                       ffi::Result<ffi::Buffer<ffi::F32>> scores,
                       ffi::Result<ffi::Buffer<ffi::S32>> ids, bool euclidean) {
  RescoreArguments a;
  const auto shape = queries.dimensions();
  const auto stored = rows.dimensions();
  XLA_KERNELS_REQUIRE(shape.size() == 2, "queries must be float32[b, d], got " + shape_of(queries));
  XLA_KERNELS_REQUIRE(stored.size() == 2 && stored[1] == shape[1] && stored[0] <= INT32_MAX,
                      "rows must have the width of queries, got " + shape_of(rows));
  switch (rows.element_type()) {
    case ffi::F32:
      a.type = RowType::kFloat32;
      break;
    case ffi::BF16:
      a.type = RowType::kBfloat16;
      break;
    case ffi::S8:
      a.type = RowType::kInt8;
      break;
    default:
      return ffi::Error::InvalidArgument("rows must be float32, bfloat16 or int8");
  }
  a.num_queries = shape[0];
  a.width = shape[1];
  a.num_rows = stored[0];
  const auto scales = scale.dimensions();
  XLA_KERNELS_REQUIRE(scales.size() == 1 && (scales[0] == 0 || scales[0] == a.num_rows),
                      "scale must be float32[n] or empty, got " + shape_of(scale));
  const auto wanted = candidates.dimensions();
  XLA_KERNELS_REQUIRE(wanted.size() == 2 && wanted[0] == a.num_queries,
                      "candidates must be int32[b, r], got " + shape_of(candidates));
  const auto out = scores->dimensions();
  XLA_KERNELS_REQUIRE(out.size() == 2 && out[0] == a.num_queries && ids->dimensions() == out,
                      "results must be [b, k], got " + shape_of(*scores));
  a.queries = queries.typed_data();
  a.rows = rows.untyped_data();
  a.scale = optional_row(scale);
  a.candidates = candidates.typed_data();
  a.num_candidates = wanted[1];
  XLA_KERNELS_REQUIRE(!euclidean || a.type == RowType::kFloat32,
                      "Euclidean rescoring needs float32 rows");
  a.euclidean = euclidean;
  a.k = out[1];
  a.scores = scores->typed_data();
  a.ids = ids->typed_data();
  if (a.k == 0) return ffi::Error::Success();
  XlaPool pool(threads);
  rescore_top_k(a, pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xla_kernels

using namespace xla_kernels;  // NOLINT: the macros below paste names at file scope

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(xla_kernels_dot_top_k, DotTopK,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("num_rows"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(xla_kernels_rescore_top_k, RescoreTopK,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<bool>("euclidean"));

#pragma GCC visibility pop
