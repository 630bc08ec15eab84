// XLA FFI handlers of the ADC kernels, and the plain C symbols that Python asks before it registers
// them. Handlers check every shape and give InvalidArgument; they never trust the caller.
#include "ffi_support.h"
#include "scan.h"
#include "top_k.h"

namespace xla_kernels {
namespace {

ffi::Error check_tables(const ffi::Buffer<ffi::F32>& tables, int64_t num_subspaces) {
  XLA_KERNELS_REQUIRE(tables.dimensions().size() == 3, "tables must be float32[b, m, k], got " +
                                                           shape_of(tables));
  XLA_KERNELS_REQUIRE(tables.dimensions()[1] == num_subspaces,
                      "tables must have " + std::to_string(num_subspaces) + " subspaces, got " +
                          shape_of(tables));
  return ffi::Error::Success();
}

ffi::Error check_terms(const ffi::Buffer<ffi::F32>& gain, const ffi::Buffer<ffi::F32>& offset,
                       int64_t num_rows, RowTerms* terms) {
  for (const auto* row : {&gain, &offset}) {
    const auto dims = row->dimensions();
    XLA_KERNELS_REQUIRE(dims.size() == 1 && (dims[0] == 0 || dims[0] == num_rows),
                        "gain and offset must be float32[n] or empty, got " + shape_of(*row));
  }
  terms->gain = optional_row(gain);
  terms->offset = optional_row(offset);
  return ffi::Error::Success();
}

ffi::Error AdcTopK(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> tables,
                   ffi::Buffer<ffi::U8> data, ffi::Buffer<ffi::F32> gain,
                   ffi::Buffer<ffi::F32> offset, ffi::Buffer<ffi::PRED> valid,
                   ffi::Result<ffi::Buffer<ffi::F32>> scores,
                   ffi::Result<ffi::Buffer<ffi::S32>> ids, int64_t num_rows, int64_t num_subspaces,
                   int32_t layout, bool exact) {
  TopKArguments a;
  if (auto error = check_tables(tables, num_subspaces); error.failure()) return error;
  a.num_queries = tables.dimensions()[0];
  a.num_codewords = tables.dimensions()[2];
  if (auto error = view_codes(data, num_rows, num_subspaces, a.num_codewords, layout, &a.codes);
      error.failure()) {
    return error;
  }
  if (auto error = check_terms(gain, offset, num_rows, &a.terms); error.failure()) return error;
  const auto mask = valid.dimensions();
  XLA_KERNELS_REQUIRE(mask.size() == 2 && (mask[0] == 0 || ((mask[0] == 1 || mask[0] == a.num_queries) &&
                                                            mask[1] == num_rows)),
                      "valid must be bool[0 or 1 or b, n], got " + shape_of(valid));
  const auto out = scores->dimensions();
  XLA_KERNELS_REQUIRE(out.size() == 2 && out[0] == a.num_queries && ids->dimensions() == out,
                      "results must be [b, k], got " + shape_of(*scores) + " and " +
                          shape_of(*ids));
  a.tables = tables.typed_data();
  a.valid = reinterpret_cast<const uint8_t*>(valid.typed_data());
  a.valid_queries = num_rows == 0 ? 0 : mask[0];
  a.k = out[1];
  if (a.k == 0) return ffi::Error::Success();
  a.exact = exact;
  a.scores = scores->typed_data();
  a.ids = ids->typed_data();
  XlaPool pool(threads);
  top_k(a, pool);
  return ffi::Error::Success();
}

ffi::Error AdcScores(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> tables,
                     ffi::Buffer<ffi::U8> data, ffi::Buffer<ffi::F32> gain,
                     ffi::Buffer<ffi::F32> offset, ffi::Result<ffi::Buffer<ffi::F32>> scores,
                     int64_t num_rows, int64_t num_subspaces, int32_t layout) {
  ScoresArguments a;
  if (auto error = check_tables(tables, num_subspaces); error.failure()) return error;
  a.num_queries = tables.dimensions()[0];
  a.num_codewords = tables.dimensions()[2];
  if (auto error = view_codes(data, num_rows, num_subspaces, a.num_codewords, layout, &a.codes);
      error.failure()) {
    return error;
  }
  if (auto error = check_terms(gain, offset, num_rows, &a.terms); error.failure()) return error;
  const auto out = scores->dimensions();
  XLA_KERNELS_REQUIRE(out.size() == 2 && out[0] == a.num_queries && out[1] == num_rows,
                      "scores must be [b, n], got " + shape_of(*scores));
  a.tables = tables.typed_data();
  a.scores = scores->typed_data();
  XlaPool pool(threads);
  all_scores(a, pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xla_kernels

using namespace xla_kernels;  // NOLINT: the macros below paste names at file scope

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(xla_kernels_adc_top_k, AdcTopK,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("num_rows")
                                  .Attr<int64_t>("num_subspaces")
                                  .Attr<int32_t>("layout")
                                  .Attr<bool>("exact"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(xla_kernels_adc_scores, AdcScores,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("num_rows")
                                  .Attr<int64_t>("num_subspaces")
                                  .Attr<int32_t>("layout"));

#pragma GCC visibility pop

extern "C" {
XLA_KERNELS_EXPORT int xla_kernels_abi() { return 6; }
XLA_KERNELS_EXPORT int xla_kernels_ffi_major() { return XLA_FFI_API_MAJOR; }
XLA_KERNELS_EXPORT int xla_kernels_ffi_minor() { return XLA_FFI_API_MINOR; }
XLA_KERNELS_EXPORT const char* xla_kernels_level() { return kernels()->name; }
XLA_KERNELS_EXPORT const char* xla_kernels_level_reason(const char* name) {
  return level_reason(name);
}
XLA_KERNELS_EXPORT int xla_kernels_set_level(const char* name) { return set_level(name) ? 1 : 0; }
}
