"""Tree search on accelerators: leaves ranked by XLA, windows of them scanned by a Pallas kernel.

Queries go in batches. Of a batch: products with the centroids, the leaves of each query, a work
list, the kernel, the best slots, and again for what windows are left (`worklist`); then exact
scores as in plain XLA. Everything is one program of static shapes. Memory holds a work list and its
results, at most a score for each slot that a query scans; nothing for each row and query, and of
the rows only the slots' offsets and marks, brought together once a call.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..layout import POINTS_LAST, code_columns
from ..varying import match_varying, varying_axes
from .effort import SURE_LEAVES, Effort
from .folding import folded
from .packed import PackedTree
from .worklist import Plan, Round, Sizes, plan_of, round_of, windows_of
from .xla import (
    Candidates,
    best_leaves,
    best_of_slots,
    cut_or_pad,
    highest_estimates,
    kept_slots,
    leaf_scores,
    lookup_table,
)

# Queries that share a product with the centroids: always as many, so that a query gets the same
# bits whatever the batch around it.
_TILE = 128


class Kernel(NamedTuple):
    """A kernel and how it runs: ``pallas_tpu`` or ``pallas_gpu`` and their options."""

    name: str
    recall_target: float
    sizes: Sizes | None
    interpret: Any


def _module(name: str) -> Any:
    # Loaded when it is asked for: Pallas takes a while to import.
    return importlib.import_module(f".{name}", __package__)


def unsupported(tree: PackedTree, queries: Any, name: str) -> str | None:
    """Why the kernel cannot search a tree; None where it can."""
    m, s, k = tree.codewords.shape
    if not isinstance(queries.shape[0], int):
        return "it is for batches of a fixed size"
    columns = m * k if _is_additive(tree) else 2 * -(-s // 2) * -(-m // 8) * 8
    if not _module(name).fits(columns):
        what = "additive codes as columns of ones" if _is_additive(tree) else "decoded rows"
        return f"{what} are {columns} columns, too many for its memory"
    return None


def _is_additive(tree: PackedTree) -> bool:
    m, s, _ = tree.codewords.shape
    return m > 1 and s == tree.centroids.shape[1]


def tree_search(
    tree: PackedTree,
    queries: jax.Array,
    rows: jax.Array | None,
    row_scale: jax.Array | None,
    row_queries: jax.Array | None,
    usable: jax.Array | None,
    leaves: jax.Array | None = None,
    *,
    effort: Effort,
    euclidean: bool,
    kernel: Kernel,
) -> tuple[jax.Array, jax.Array]:
    """Scores ``float32[b, k]`` and rows ``int32[b, k]``; see `api.tree_search`."""
    wider = row_queries is not None

    def search(queries: Any, own: Any, usable: Any, rest: Any) -> Any:
        row_queries, leaves = own
        tree, rows, row_scale = rest
        if 0 in (queries.shape[0], tree.slot_rows.shape[0]):
            shape = (queries.shape[0], effort.k)
            return jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, -1, jnp.int32)
        full = row_queries if wider and effort.rescore else queries
        finite = jnp.isfinite(queries).all(axis=1) & jnp.isfinite(full).all(axis=1)
        queries, full = (jnp.where(finite[:, None], q, 0) for q in (queries, full))
        batch = functools.partial(
            _batch, rows=rows, row_scale=row_scale, effort=effort,
            euclidean=euclidean, kernel=kernel,
        )  # fmt: skip
        if usable.shape[0] > 1:

            def one(args: Any) -> Any:
                own = tree._replace(usable=args[3][None])
                some = jax.tree.map(lambda x: x[None], args[:3])
                found = batch(own, slot_terms(own), *some)
                return jax.tree.map(lambda x: x[0], found)

            scores, ids = jax.lax.map(one, (queries, full, leaves, usable))
        else:
            tree = tree._replace(usable=usable)
            run = functools.partial(batch, tree, slot_terms(tree))
            scores, ids = _in_blocks(run, parts_of(kernel)[1].batch, queries, full, leaves)
        return jnp.where(finite[:, None], scores, -jnp.inf), jnp.where(finite[:, None], ids, -1)

    call = folded(search, k=effort.k, slots=tree.slot_rows.shape[0])
    row_queries = queries[:, :0] if row_queries is None else row_queries
    usable = tree.usable if usable is None else usable
    return call(queries, (row_queries, leaves), usable, (tree, rows, row_scale))


def candidates(
    tree: PackedTree,
    queries: jax.Array,
    leaves: jax.Array,
    floor: jax.Array,
    *,
    effort: Effort,
    width: int,
    kernel: Kernel,
) -> tuple[jax.Array, jax.Array]:
    """Estimates ``float32[b, width]`` and rows of slots; see `parts.tree_candidates`."""
    del floor  # what may be left out costs nothing here
    b = queries.shape[0]
    if 0 in (b, tree.slot_rows.shape[0]):
        return jnp.full((b, width), -jnp.inf, jnp.float32), jnp.full((b, width), -1, jnp.int32)
    finite = jnp.isfinite(queries).all(axis=1, keepdims=True)
    terms = slot_terms(tree)

    def run(queries: jax.Array, leaves: jax.Array) -> Any:
        shared, _ = _leaf_scores(tree, queries, effort)
        found = scan_leaves(tree, terms, queries, shared, leaves, effort, kernel)
        rows = tree.slot_rows[jnp.maximum(found.slots, 0)]
        rows = jnp.where(found.scores > -jnp.inf, rows, -1)
        return cut_or_pad((found.scores, rows), width)

    queries, leaves = jnp.where(finite, queries, 0), jnp.where(finite, leaves, -1)
    return _in_blocks(run, parts_of(kernel)[1].batch, queries, leaves)


def parts_of(kernel: Kernel) -> tuple[Any, Sizes]:
    """The module of a kernel, and its sizes for this machine's device."""
    module = _module(kernel.name)
    kind = jax.devices()[0].device_kind
    return module, kernel.sizes or module.SIZES.get(kind, module.DEFAULT)


def slot_terms(tree: PackedTree) -> jax.Array:
    """``float32[S]`` terms of the slots' scores, -inf where a slot may not be returned."""
    terms = tree.slot_offset if tree.slot_offset.shape[0] else jnp.float32(0)
    return jnp.where(tree.usable[0], terms, -jnp.inf)


def operands_of(module: Any, tree: PackedTree, queries: jax.Array, terms: jax.Array) -> Any:
    """What the entries of a work list share, laid out for the kernel of a module."""
    gain = None if tree.gains is None else tree.gains.levels[tree.gains.level.astype(jnp.int32)]
    return module.pack(*_factors(tree, queries), _columns(tree), terms, gain)


def _in_blocks(run: Any, size: int, *arrays: jax.Array | None) -> Any:
    """``run`` on blocks of at most ``size`` rows, one after another."""
    b = jax.tree.leaves(arrays)[0].shape[0]
    if b <= size:
        return run(*arrays)
    blocks = -(-b // size)

    def split(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, ((0, blocks * size - b), (0, 0)))
        return a.reshape(blocks, size, a.shape[1])

    found = jax.lax.map(lambda some: run(*some), jax.tree.map(split, arrays))
    return jax.tree.map(lambda x: x.reshape(blocks * size, *x.shape[2:])[:b], found)


def _batch(
    tree: PackedTree,
    terms: jax.Array,
    queries: jax.Array,
    full: jax.Array,
    leaves: jax.Array | None,
    *,
    rows: jax.Array | None,
    row_scale: jax.Array | None,
    effort: Effort,
    euclidean: bool,
    kernel: Kernel,
) -> tuple[jax.Array, jax.Array]:
    shared, rank = _leaf_scores(tree, queries, effort)
    if leaves is None:
        slots = best_slots(tree, terms, queries, shared, rank, effort, kernel)
    else:
        found = scan_leaves(tree, terms, queries, shared, leaves, effort, kernel)
        slots = jnp.where(found.scores > -jnp.inf, found.slots, -1)

    def finish(q: jax.Array, q_full: jax.Array, slots: jax.Array) -> Any:
        return best_of_slots(tree, q, q_full, slots, (rows, row_scale), effort, euclidean)

    return jax.vmap(finish)(queries, full, slots)


def _leaf_scores(
    tree: PackedTree, queries: jax.Array, effort: Effort
) -> tuple[jax.Array, jax.Array]:
    b = queries.shape[0]
    padded = jnp.pad(queries, ((0, -b % _TILE), (0, 0)))
    ranked = functools.partial(leaf_scores, tree, effort=effort)
    shared, rank = (x[:b] for x in _in_blocks(ranked, _TILE, padded))
    return shared, rank


def best_slots(
    tree: PackedTree,
    terms: jax.Array,
    queries: jax.Array,
    shared: jax.Array,
    rank: jax.Array,
    effort: Effort,
    kernel: Kernel,
) -> jax.Array:
    """Slots ``int32[b, c]`` of the probed leaves, best first by estimate, -1 where there are fewer.

    Of slots with equal estimates across the last place those of the lowest rows are taken.
    Estimates have bfloat16's digits.
    """
    leaves = best_leaves(rank, effort.leaves_to_search)
    best = scan_leaves(tree, terms, queries, shared, leaves, effort, kernel)
    return jnp.where(best.scores > -jnp.inf, best.slots, -1)


def scan_leaves(
    tree: PackedTree,
    terms: jax.Array,
    queries: jax.Array,
    shared: jax.Array,
    leaves: jax.Array,
    effort: Effort,
    kernel: Kernel,
) -> Candidates:
    """`best_slots` of some leaves ``int32[b, P]``, best first and -1 for none."""
    b = queries.shape[0]
    count = min(kept_slots(effort), tree.slot_rows.shape[0])
    probed, leaves = leaves >= 0, jnp.clip(leaves, 0, shared.shape[1] - 1)
    scanner = scanner_of(tree, terms, queries, leaves, effort, count, kernel)
    means = jnp.take_along_axis(shared, leaves, axis=1)
    sizes = jnp.where(probed, scanner.sizes, 0)
    axes = varying_axes(*jax.tree.leaves((tree, queries)))

    def scan(best: Candidates, sizes: jax.Array) -> Candidates:
        ends = jnp.cumsum(sizes, axis=1, dtype=jnp.int32)
        most = jnp.max(ends)

        def step(carry: Any) -> Any:
            best, begin = carry
            found, work = scanner.round(ends, begin)
            plan = scanner.plan
            return _merge(tree, best, found, work, means, plan), begin + plan.windows

        return jax.lax.while_loop(lambda c: c[1] < most, step, (best, most * 0))[0]

    none = match_varying(jnp.full((b, count), -1, jnp.int32), axes)
    best = Candidates(none.astype(jnp.float32) * jnp.inf, none)
    if effort.deviations < math.inf and leaves.shape[1] > SURE_LEAVES:
        sure = (jnp.arange(leaves.shape[1]) < SURE_LEAVES)[None, :]
        best = scan(best, jnp.where(sure, sizes, 0))
        last = min(effort.retrieve, count) - 1 if effort.rescore else count - 1
        highest = functools.partial(highest_estimates, tree, deviations=effort.deviations)
        likely = jax.vmap(highest)(queries, leaves, means) >= best.scores[:, last, None]
        best = scan(best, jnp.where(likely & ~sure, sizes, 0))
    else:
        best = scan(best, sizes)
    return best


class Scanner(NamedTuple):
    """The scan of the leaves that a batch of queries probes.

    Attributes:
      plan: its static numbers.
      sizes: ``int32[b, P]`` windows of the leaves.
      round: from running sums of the windows to be scanned, and the first to begin with, to the
        results of a round and its work list.
    """

    plan: Plan
    sizes: Any
    round: Callable[[jax.Array, jax.Array], tuple[jax.Array, Round]]


def scanner_of(
    tree: PackedTree,
    terms: jax.Array,
    queries: jax.Array,
    leaves: jax.Array,
    effort: Effort,
    count: int,
    kernel: Kernel,
) -> Scanner:
    """Lay out what the rounds of a scan share, which keeps ``count`` slots a query."""
    module, sizes = parts_of(kernel)
    plan = plan_of(tree, queries.shape[0], effort, count, kernel.recall_target, sizes)
    operands = operands_of(module, tree, queries, terms)
    axes = varying_axes(*jax.tree.leaves((tree, queries)))
    _, number = windows_of(tree, plan.points)

    def next_round(ends: jax.Array, begin: jax.Array) -> tuple[jax.Array, Round]:
        work = round_of(tree, leaves, ends, begin, plan)
        return module.scan(operands, work, plan, axes=axes, interpret=kernel.interpret), work

    return Scanner(plan, number[leaves], next_round)


def _merge(
    tree: PackedTree,
    best: Candidates,
    found: jax.Array,
    work: Round,
    means: jax.Array,
    plan: Plan,
) -> Candidates:
    """The best of what was known and of the bins that a round found."""
    b, count = best.scores.shape
    there = work.place >= 0
    found = found[jnp.maximum(work.place, 0)]  # [b, windows, bins]
    low = (1 << plan.bits) - 1
    bits = jax.lax.bitcast_convert_type(found, jnp.int32)
    scores = jax.lax.bitcast_convert_type(bits & ~low, jnp.float32)
    scores = scores + jnp.take_along_axis(means, work.rank, axis=1)[:, :, None]
    scores = jnp.where(there[:, :, None] & ~jnp.isnan(scores), scores, -jnp.inf)
    scores = jnp.concatenate([best.scores, scores.reshape(b, -1)], axis=1)
    bits = bits.reshape(b, -1)

    def slots_at(order: jax.Array) -> jax.Array:
        place = jnp.maximum(order - count, 0)
        turn = jnp.take_along_axis(bits, place, axis=1) & low
        start = jnp.take_along_axis(work.start, place // plan.bins, axis=1)
        slots = start + turn * plan.bins + place % plan.bins
        known = jnp.take_along_axis(best.slots, jnp.minimum(order, count - 1), axis=1)
        return jnp.where(order < count, known, slots)

    def lowest_rows() -> jax.Array:
        every = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        rows = tree.slot_rows[jnp.clip(slots_at(every), 0, tree.slot_rows.shape[0] - 1)]
        return jax.lax.sort((-scores, rows, every), num_keys=2)[2][:, :count]

    top, order = jax.lax.top_k(scores, count)
    # A tie across the last place: top_k takes the first scanned, the lowest row is wanted.
    last = jnp.min(top, axis=1, keepdims=True)
    tied = jnp.sum(scores == last, axis=1) > jnp.sum(top == last, axis=1)
    cut = jnp.any(tied & (last[:, 0] > -jnp.inf))
    order = jax.lax.cond(cut, lowest_rows, lambda: order.astype(jnp.int32))
    scores = jnp.take_along_axis(scores, order, axis=1)
    return Candidates(scores, slots_at(order).astype(jnp.int32))


def _factors(tree: PackedTree, queries: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Parts of the queries ``[b, m, s]`` and codewords ``[m, k, s]``, or tables ``[b, m, k]``."""
    if _is_additive(tree):
        return jax.vmap(lambda q: lookup_table(tree, q))(queries), None
    m, s, _ = tree.codewords.shape
    parts = jnp.pad(queries, ((0, 0), (0, m * s - queries.shape[1])))
    return parts.reshape(-1, m, s), tree.codewords.transpose(0, 2, 1)


def _columns(tree: PackedTree) -> jax.Array:
    """Codes with the slots last, as trees packed on a machine with an accelerator have them."""
    if tree.codes.layout in POINTS_LAST:
        return tree.codes.data
    return code_columns(tree.codes)
