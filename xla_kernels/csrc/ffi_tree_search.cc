// XLA FFI handler of the tree search. It checks every shape and the layout of the leaves, so that
// no content of its operands can make it read outside them.
#include <algorithm>

#include "candidates.h"
#include "ffi_support.h"
#include "tree_search.h"

namespace xla_kernels {
namespace {

template <typename Buffer>
ffi::Error check_shape(const Buffer& buffer, std::initializer_list<int64_t> shape, bool or_empty,
                       const char* name) {
  const auto dims = buffer.dimensions();
  if (or_empty && buffer.element_count() == 0) return ffi::Error::Success();
  bool same = dims.size() == shape.size();
  size_t i = 0;
  for (const int64_t size : shape) same = same && dims[i++] == size;
  if (same) return ffi::Error::Success();
  std::string wanted;
  for (const int64_t size : shape) wanted += (wanted.empty() ? "[" : ", ") + std::to_string(size);
  return ffi::Error::InvalidArgument(std::string(name) + " must have shape " + wanted + "], got " +
                                     shape_of(buffer));
}

#define XLA_KERNELS_CHECK(call) \
  if (auto error = (call); error.failure()) return error

// What ranks groups of leaves, where there are any.
ffi::Error view_groups(const ffi::Buffer<ffi::S16>& group_tiles,
                       const ffi::Buffer<ffi::F32>& group_scale,
                       const ffi::Buffer<ffi::F32>& group_offset,
                       const ffi::Buffer<ffi::S32>& group_starts, TreeSearchArguments* a) {
  XLA_KERNELS_REQUIRE(group_starts.dimensions().size() == 1,
                      "group_starts must be int32[G + 1], got " + shape_of(group_starts));
  a->num_groups = std::max<int64_t>(group_starts.dimensions()[0] - 1, 0);
  XLA_KERNELS_CHECK(check_shape(group_tiles, {(a->num_groups + 15) / 16, (a->dim + 1) / 2, 16, 2},
                                false, "group_tiles"));
  XLA_KERNELS_CHECK(check_shape(group_offset, {a->num_groups}, true, "group_offset"));
  XLA_KERNELS_REQUIRE(group_offset.dimensions().size() == 1,
                      "group_offset must be float32[G or 0], got " + shape_of(group_offset));
  if (a->num_groups > 0) {
    const int32_t* from = group_starts.typed_data();
    bool whole = from[0] == 0 && from[a->num_groups] == a->num_leaves;
    for (int64_t g = 0; g < a->num_groups; ++g) whole = whole && from[g] <= from[g + 1];
    XLA_KERNELS_REQUIRE(whole, "group_starts must rise from 0 to the number of leaves");
    a->group_tiles = group_tiles.typed_data();
    a->group_scale = *group_scale.typed_data();
    a->group_offset = optional_row(group_offset);
    a->group_starts = from;
  }
  XLA_KERNELS_CHECK(check_shape(group_scale, {}, false, "group_scale"));
  return ffi::Error::Success();
}

// The slots of the leaves and their codes; a->dim, a->num_leaves and a->num_queries are set.
ffi::Error view_slots(const ffi::Buffer<ffi::F32>& spread, const ffi::Buffer<ffi::S32>& starts,
                      const ffi::Buffer<ffi::F32>& codewords, const ffi::Buffer<ffi::U8>& codes,
                      const ffi::Buffer<ffi::F32>& slot_offset,
                      const ffi::Buffer<ffi::U8>& slot_level, const ffi::Buffer<ffi::F32>& levels,
                      const ffi::Buffer<ffi::S32>& slot_rows,
                      const ffi::Buffer<ffi::PRED>& usable, int32_t layout,
                      TreeSearchArguments* a) {
  XLA_KERNELS_CHECK(check_shape(spread, {a->num_leaves}, false, "spread"));
  XLA_KERNELS_CHECK(check_shape(starts, {a->num_leaves + 1}, false, "starts"));
  const auto words = codewords.dimensions();
  XLA_KERNELS_REQUIRE(words.size() == 3 && words[0] > 0 && words[1] > 0 && words[0] * words[1] >= a->dim,
                      "codewords must be float32[m, s, k] with m * s >= d, got " +
                          shape_of(codewords));
  a->width = words[1];
  a->num_codewords = words[2];
  const auto slots = slot_rows.dimensions();
  XLA_KERNELS_REQUIRE(slots.size() == 1, "slot_rows must be int32[slots], got " + shape_of(slot_rows));
  XLA_KERNELS_CHECK(view_codes(codes, slots[0], words[0], a->num_codewords, layout, &a->codes));
  XLA_KERNELS_REQUIRE(slots[0] % a->codes.block_rows() == 0, "slots must fill whole blocks");
  XLA_KERNELS_CHECK(check_shape(slot_offset, {slots[0]}, true, "slot_offset"));
  XLA_KERNELS_CHECK(check_shape(slot_level, {slots[0]}, levels.element_count() == 0, "slot_level"));
  XLA_KERNELS_REQUIRE(levels.dimensions().size() == 1 &&
                          (levels.element_count() == 0 || levels.element_count() == 16 ||
                           levels.element_count() == 256),
                      "levels must be float32[0, 16 or 256], got " + shape_of(levels));
  const auto mask = usable.dimensions();
  XLA_KERNELS_REQUIRE(mask.size() == 2 && (mask[0] == 1 || mask[0] == a->num_queries) &&
                          mask[1] == slots[0],
                      "usable must be bool[1 or b, slots], got " + shape_of(usable));
  a->usable_queries = mask[0];
  const int32_t* begin = starts.typed_data();
  bool rising = begin[0] >= 0;
  for (int64_t l = 0; l < a->num_leaves; ++l) rising = rising && begin[l] <= begin[l + 1];
  XLA_KERNELS_REQUIRE(rising && begin[a->num_leaves] <= a->codes.num_blocks(),
                      "starts must rise from 0 to the number of blocks");
  a->spread = spread.typed_data();
  a->starts = begin;
  a->codewords = codewords.typed_data();
  a->slot_offset = optional_row(slot_offset);
  if (levels.element_count() > 0 && slots[0] > 0) {
    a->slot_level = slot_level.typed_data();
    a->levels = levels.typed_data();
    a->num_levels = static_cast<int64_t>(levels.element_count());
  }
  a->slot_rows = slot_rows.typed_data();
  a->usable = reinterpret_cast<const uint8_t*>(usable.typed_data());
  return ffi::Error::Success();
}

ffi::Error TreeSearch(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> queries,
                      ffi::Buffer<ffi::F32> centroids, ffi::Buffer<ffi::S16> tiles,
                      ffi::Buffer<ffi::F32> centroid_scale, ffi::Buffer<ffi::F32> leaf_offset,
                      ffi::Buffer<ffi::F32> spread, ffi::Buffer<ffi::S16> group_tiles,
                      ffi::Buffer<ffi::F32> group_scale, ffi::Buffer<ffi::F32> group_offset,
                      ffi::Buffer<ffi::S32> group_starts, ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::F32> codewords,
                      ffi::Buffer<ffi::U8> codes, ffi::Buffer<ffi::F32> slot_offset,
                      ffi::Buffer<ffi::U8> slot_level, ffi::Buffer<ffi::F32> levels,
                      ffi::Buffer<ffi::S32> slot_rows, ffi::Buffer<ffi::PRED> usable,
                      ffi::AnyBuffer rows, ffi::Buffer<ffi::F32> row_scale,
                      ffi::Buffer<ffi::F32> row_queries, ffi::Result<ffi::Buffer<ffi::F32>> scores,
                      ffi::Result<ffi::Buffer<ffi::S32>> ids, int32_t layout,
                      int64_t leaves_to_search, int64_t leaves_ranked, float deviations,
                      int64_t rescore, int64_t retrieve, bool euclidean) {
  TreeSearchArguments a;
  XLA_KERNELS_REQUIRE(queries.dimensions().size() == 2 && queries.dimensions()[1] > 0,
                      "queries must be float32[b, d], got " + shape_of(queries));
  a.num_queries = queries.dimensions()[0];
  a.dim = queries.dimensions()[1];
  XLA_KERNELS_REQUIRE(centroids.dimensions().size() == 2 && centroids.dimensions()[1] == a.dim,
                      "centroids must be float32[L, d], got " + shape_of(centroids));
  a.num_leaves = centroids.dimensions()[0];
  XLA_KERNELS_REQUIRE(a.num_leaves >= 1 && a.num_leaves < (1 << 30), "no leaves, or too many");
  XLA_KERNELS_CHECK(
      check_shape(tiles, {(a.num_leaves + 15) / 16, (a.dim + 1) / 2, 16, 2}, false, "tiles"));
  XLA_KERNELS_CHECK(check_shape(centroid_scale, {}, false, "centroid_scale"));
  XLA_KERNELS_CHECK(check_shape(leaf_offset, {a.num_leaves}, true, "leaf_offset"));
  XLA_KERNELS_CHECK(view_groups(group_tiles, group_scale, group_offset, group_starts, &a));
  XLA_KERNELS_CHECK(view_slots(spread, starts, codewords, codes, slot_offset, slot_level, levels,
                               slot_rows, usable, layout, &a));

  a.rescore = rescore;
  a.retrieve = retrieve;
  if (rescore > 0) {
    const auto store = rows.dimensions(), full = row_queries.dimensions();
    XLA_KERNELS_REQUIRE(full.size() == 2 && full[0] == a.num_queries,
                        "row_queries must be float32[b, d or 0], got " + shape_of(row_queries));
    // Of no width: the queries themselves.
    a.row_dim = full[1] > 0 ? full[1] : a.dim;
    a.row_queries = full[1] > 0 ? row_queries.typed_data() : queries.typed_data();
    XLA_KERNELS_REQUIRE(store.size() == 2 && store[1] == a.row_dim && store[0] > 0,
                        "rows must be [n, d], got " + shape_of(rows));
    a.num_rows = store[0];
    switch (rows.element_type()) {
      case ffi::F32: a.store = StoreType::kFloat32; break;
      case ffi::BF16: a.store = StoreType::kBFloat16; break;
      case ffi::S8: a.store = StoreType::kInt8; break;
      default: return ffi::Error::InvalidArgument("rows must be float32, bfloat16 or int8");
    }
    XLA_KERNELS_REQUIRE(!euclidean || a.store == StoreType::kFloat32,
                        "Euclidean rescoring needs float32 rows");
    XLA_KERNELS_CHECK(
        check_shape(row_scale, {a.num_rows}, a.store != StoreType::kInt8, "row_scale"));
    a.rows = rows.untyped_data();
    a.row_scale = optional_row(row_scale);
  } else {
    a.num_rows = INT32_MAX;
  }
  const auto out = scores->dimensions();
  XLA_KERNELS_REQUIRE(out.size() == 2 && out[0] == a.num_queries && ids->dimensions() == out,
                      "results must be [b, k], got " + shape_of(*scores));
  a.k = out[1];
  XLA_KERNELS_REQUIRE(leaves_to_search >= 1 && leaves_ranked >= 1,
                      "leaves_to_search and leaves_ranked must be at least 1");
  XLA_KERNELS_REQUIRE(deviations >= 0, "deviations must be at least 0");
  XLA_KERNELS_REQUIRE(rescore == 0 || rescore >= a.k, "rescore must be 0 or at least k");
  if (a.k == 0 || a.num_queries == 0) return ffi::Error::Success();

  a.queries = queries.typed_data();
  a.centroids = centroids.typed_data();
  a.tiles = tiles.typed_data();
  a.centroid_scale = *centroid_scale.typed_data();
  a.leaf_offset = optional_row(leaf_offset);
  a.euclidean = euclidean;
  a.leaves_to_search = leaves_to_search;
  a.leaves_ranked = leaves_ranked;
  a.deviations = deviations;
  a.scores = scores->typed_data();
  a.ids = ids->typed_data();
  XlaPool pool(threads);
  tree_search(a, pool);
  return ffi::Error::Success();
}

ffi::Error TreeLeaves(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> queries,
                      ffi::Buffer<ffi::S16> tiles, ffi::Buffer<ffi::F32> centroid_scale,
                      ffi::Buffer<ffi::F32> leaf_offset, ffi::Buffer<ffi::S16> group_tiles,
                      ffi::Buffer<ffi::F32> group_scale, ffi::Buffer<ffi::F32> group_offset,
                      ffi::Buffer<ffi::S32> group_starts,
                      ffi::Result<ffi::Buffer<ffi::S32>> leaves, int64_t num_leaves,
                      int64_t leaves_ranked) {
  TreeSearchArguments a;
  XLA_KERNELS_REQUIRE(queries.dimensions().size() == 2 && queries.dimensions()[1] > 0,
                      "queries must be float32[b, d], got " + shape_of(queries));
  a.num_queries = queries.dimensions()[0];
  a.dim = queries.dimensions()[1];
  a.num_leaves = num_leaves;
  XLA_KERNELS_REQUIRE(num_leaves >= 1 && num_leaves < (1 << 30), "no leaves, or too many");
  XLA_KERNELS_CHECK(
      check_shape(tiles, {(a.num_leaves + 15) / 16, (a.dim + 1) / 2, 16, 2}, false, "tiles"));
  XLA_KERNELS_CHECK(check_shape(centroid_scale, {}, false, "centroid_scale"));
  XLA_KERNELS_CHECK(check_shape(leaf_offset, {a.num_leaves}, true, "leaf_offset"));
  XLA_KERNELS_CHECK(view_groups(group_tiles, group_scale, group_offset, group_starts, &a));
  const auto out = leaves->dimensions();
  XLA_KERNELS_REQUIRE(out.size() == 2 && out[0] == a.num_queries && out[1] >= 1 &&
                          leaves_ranked >= 1,
                      "leaves must be int32[b, at least 1], got " + shape_of(*leaves));
  if (a.num_queries == 0) return ffi::Error::Success();
  a.queries = queries.typed_data();
  a.tiles = tiles.typed_data();
  a.centroid_scale = *centroid_scale.typed_data();
  a.leaf_offset = optional_row(leaf_offset);
  a.leaves_to_search = out[1];
  a.leaves_ranked = leaves_ranked;
  XlaPool pool(threads);
  rank_leaves(a, leaves->typed_data(), pool);
  return ffi::Error::Success();
}

ffi::Error TreeScan(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> queries,
                    ffi::Buffer<ffi::F32> centroids, ffi::Buffer<ffi::F32> spread,
                    ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::F32> codewords,
                    ffi::Buffer<ffi::U8> codes, ffi::Buffer<ffi::F32> slot_offset,
                    ffi::Buffer<ffi::U8> slot_level, ffi::Buffer<ffi::F32> levels,
                    ffi::Buffer<ffi::S32> slot_rows, ffi::Buffer<ffi::PRED> usable,
                    ffi::Buffer<ffi::S32> leaves, ffi::Buffer<ffi::F32> floor,
                    ffi::Result<ffi::Buffer<ffi::F32>> scores,
                    ffi::Result<ffi::Buffer<ffi::S32>> ids, int32_t layout, int64_t retrieve,
                    bool last) {
  TreeSearchArguments a;
  XLA_KERNELS_REQUIRE(queries.dimensions().size() == 2 && queries.dimensions()[1] > 0,
                      "queries must be float32[b, d], got " + shape_of(queries));
  a.num_queries = queries.dimensions()[0];
  a.dim = queries.dimensions()[1];
  XLA_KERNELS_REQUIRE(centroids.dimensions().size() == 2 && centroids.dimensions()[1] == a.dim,
                      "centroids must be float32[L, d], got " + shape_of(centroids));
  a.num_leaves = centroids.dimensions()[0];
  XLA_KERNELS_REQUIRE(a.num_leaves >= 1 && a.num_leaves < (1 << 30), "no leaves, or too many");
  XLA_KERNELS_CHECK(view_slots(spread, starts, codewords, codes, slot_offset, slot_level, levels,
                               slot_rows, usable, layout, &a));
  const auto chosen = leaves.dimensions(), out = scores->dimensions();
  XLA_KERNELS_REQUIRE(chosen.size() == 2 && chosen[0] == a.num_queries && chosen[1] >= 1,
                      "leaves must be int32[b, at least 1], got " + shape_of(leaves));
  XLA_KERNELS_REQUIRE(out.size() == 2 && out[0] == a.num_queries && ids->dimensions() == out,
                      "results must be [b, k], got " + shape_of(*scores));
  a.k = out[1];
  XLA_KERNELS_REQUIRE(retrieve >= 0 && (retrieve > 0 || !last),
                      "retrieve must be at least 0, and more for the last of so many");
  const auto least = floor.dimensions();
  XLA_KERNELS_REQUIRE(least.size() == 2 && least[0] == a.num_queries && least[1] <= 1,
                      "floor must be float32[b, 0 or 1], got " + shape_of(floor));
  if (a.k == 0 || a.num_queries == 0) return ffi::Error::Success();
  a.queries = queries.typed_data();
  a.row_queries = a.queries;
  a.row_dim = a.dim;
  a.centroids = centroids.typed_data();
  a.num_rows = INT32_MAX;
  a.chosen = leaves.typed_data();
  a.leaves_to_search = chosen[1];
  a.retrieve = retrieve;
  a.candidates = retrieve > 0;
  a.last = last;
  a.floor = least[1] > 0 ? floor.typed_data() : nullptr;
  a.scores = scores->typed_data();
  a.ids = ids->typed_data();
  XlaPool pool(threads);
  tree_search(a, pool);
  return ffi::Error::Success();
}

ffi::Error BestCandidates(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> scores,
                          ffi::Buffer<ffi::S32> rows, ffi::Result<ffi::Buffer<ffi::F32>> best_scores,
                          ffi::Result<ffi::Buffer<ffi::S32>> best_rows, int64_t retrieve,
                          int64_t keep) {
  CandidateArguments a;
  const auto shape = scores.dimensions(), out = best_scores->dimensions();
  XLA_KERNELS_REQUIRE(shape.size() == 3 && rows.dimensions() == shape,
                      "scores and rows must be [p, b, n], got " + shape_of(scores) + " and " +
                          shape_of(rows));
  XLA_KERNELS_REQUIRE(out.size() == 2 && out[0] == shape[1] && best_rows->dimensions() == out,
                      "results must be [b, w], got " + shape_of(*best_scores) + " and " +
                          shape_of(*best_rows));
  XLA_KERNELS_REQUIRE(retrieve >= 1 && keep >= 1, "retrieve and keep must be at least 1");
  a.scores = scores.typed_data();
  a.rows = rows.typed_data();
  a.parts = shape[0];
  a.num_queries = shape[1];
  a.size = shape[2];
  a.retrieve = retrieve;
  a.keep = keep;
  a.width = out[1];
  a.best_scores = best_scores->typed_data();
  a.best_rows = best_rows->typed_data();
  XlaPool pool(threads);
  best_candidates(a, pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xla_kernels

using namespace xla_kernels;  // NOLINT: the macros below paste names at file scope

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(xla_kernels_tree_search, TreeSearch,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S16>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S16>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int32_t>("layout")
                                  .Attr<int64_t>("leaves_to_search")
                                  .Attr<int64_t>("leaves_ranked")
                                  .Attr<float>("deviations")
                                  .Attr<int64_t>("rescore")
                                  .Attr<int64_t>("retrieve")
                                  .Attr<bool>("euclidean"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(xla_kernels_tree_leaves, TreeLeaves,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S16>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S16>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("num_leaves")
                                  .Attr<int64_t>("leaves_ranked"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(xla_kernels_tree_scan, TreeScan,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int32_t>("layout")
                                  .Attr<int64_t>("retrieve")
                                  .Attr<bool>("last"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(xla_kernels_best_candidates, BestCandidates,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("retrieve")
                                  .Attr<int64_t>("keep"));

#pragma GCC visibility pop
