"""The demonstration: word vectors quantized, indexed and searched; run by ``make demo``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import avq_jax
from avq_jax.evaluation import glove_50d

__all__ = ["main"]

_PLOT_DEPTH = 100


class _Row(NamedTuple):
    """A line of the table: 100 results a query, and the time of asking for ten."""

    name: str
    ids: np.ndarray
    code_bytes: float
    row_bytes: float
    seconds: float


def _held_out(num_queries: int, seed: int) -> tuple[Any, ...]:
    """Base words and vectors, and held-out ones among the most frequent 50,000."""
    words, vectors = glove_50d()
    pick = np.random.default_rng(seed).choice(50_000, num_queries, replace=False)
    base = np.ones(len(words), bool)
    base[pick] = False
    return words[base], vectors[base], words[pick], vectors[pick]


def _timed(find: Callable, queries: np.ndarray) -> tuple[np.ndarray, float]:
    """Row numbers found for all queries at once, and seconds a query once compiled."""
    find(queries)
    start = time.perf_counter()
    ids = np.asarray(find(queries).ids)
    return ids, (time.perf_counter() - start) / len(queries)


def _bytes(index: avq_jax.Index) -> float:
    """Bytes a row that scoring codes, and rescoring, read."""
    store = 0 if index.store is None else index.store.rows.nbytes / index.num_rows
    return index.code_bytes + store


def _print_table(rows: list[_Row], truth: np.ndarray) -> None:
    head = ("", "recall 1@10", "recall 10@10", "code bytes", "all bytes", "queries/s")
    print("\n" + f"{head[0]:<34}" + "".join(f"{h:>14}" for h in head[1:]))
    for row in rows:
        one = float(avq_jax.recall_1_at_n(row.ids, truth, n=10))
        ten = float(avq_jax.recall_k_at_k(row.ids, truth, k=10))
        print(
            f"{row.name:<34}{one:>14.3f}{ten:>14.3f}{row.code_bytes:>14.1f}{row.row_bytes:>14.1f}"
            f"{1 / row.seconds:>14.0f}"
        )


def _print_neighbours(words, base_words, ids, count: int) -> None:
    print("\nNearest words by the whole engine, best first:")
    for word, row in zip(words[:count], ids[:count], strict=True):
        print(f"  {word:>16}: {', '.join(base_words[i] for i in row[:8] if i >= 0)}")


def _plot(rows: list[_Row], truth: np.ndarray, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    depth = np.unique(np.geomspace(1, _PLOT_DEPTH, 25).astype(int))
    for row in rows:
        recall = [float(avq_jax.recall_1_at_n(row.ids, truth, n=int(n))) for n in depth]
        axes.plot(depth, recall, marker=".", label=row.name)
    axes.set(
        xscale="log",
        xlabel="N results",
        ylabel="Recall 1@N",
        title="GloVe 6B, 50 dimensions: true nearest word among the first N",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration.

    Args:
      argv: command-line arguments; ``None`` takes those of the process. ``--help`` tells them.

    Returns:
      Exit status, 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m avq_jax.demo",
        description="Learn anisotropic codebooks on 400,000 real word vectors (GloVe 6B, "
        "50 dimensions), build an index, search held-out words, compare.",
    )
    parser.add_argument("--queries", type=int, default=500, help="held-out words (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices")
    parser.add_argument("--plot", default="demo.png", help="where to write the figure")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    progress = False if args.quiet else None

    base_words, base, words, queries = _held_out(args.queries, args.seed)
    print(
        f"{len(base):,} word vectors of {base.shape[1]} dimensions, {len(queries)} held-out words"
    )
    key = jax.random.key(args.seed)
    rows_on_device = jnp.asarray(base)

    def exact(k):
        return lambda q: avq_jax.brute_force(q, rows_on_device, k=k, metric="cosine")

    truth = np.asarray(exact(_PLOT_DEPTH)(queries).ids)
    _, seconds = _timed(exact(10), queries)
    rows = [_Row("exact", truth, 0.0, 4.0 * base.shape[1], seconds)]
    kinds: dict[str, dict[str, Any]] = {
        "PQ, reconstruction loss": {"weight": avq_jax.Uniform(), "num_leaves": 1},
        "PQ, score-aware loss": {"num_leaves": 1},
        "engine: tree, score-aware, rescored": {},
    }
    for name, options in kinds.items():
        start = time.perf_counter()
        whole = not options
        index = avq_jax.build(
            key,
            base,
            metric="cosine",
            num_subspaces=25,
            rescore_dtype="float32" if whole else None,
            progress=progress,
            **options,
        )
        built = time.perf_counter() - start
        ids = np.asarray(avq_jax.searcher(index, k=_PLOT_DEPTH)(queries).ids)
        _, seconds = _timed(avq_jax.searcher(index, k=10), queries)
        print(f"{name}: built in {built:.1f} s", file=sys.stderr)
        rows.append(_Row(name, ids, index.code_bytes, _bytes(index), seconds))

    _print_table(rows, truth)
    _print_neighbours(words, base_words, rows[-1].ids, 8)
    _plot(rows, truth, args.plot)
    print(f"\nFigure: {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
