"""What a tree is built with: the arguments of every way of building, checked and resolved."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, NamedTuple, cast, get_args

from avq_jax.checks import as_count
from avq_jax.mips.partition import check_slots
from avq_jax.mips.projection import METHODS, Method
from xla_kernels import slots_per_block

__all__ = ["SCALE_BITS", "Codec", "TreeOptions", "group_count", "tree_options", "tree_sizes"]

Codec = Literal["product", "additive"]
SCALE_BITS = (4, 8)

# Below this many rows exact scoring is as fast as anything, and below this many a scan of all
# codes, which loses no row to an unprobed leaf.
_EXACT_ROWS = 20_000
_FLAT_ROWS = 50_000
# From so many leaves on ranking them all takes most of a query. Of 4,096 it takes a quarter, and
# groups save less than they lose at recalls of .99.
_GROUPED_LEAVES = 16384
# Fewest rows that a tree and codebooks are learned from.
_LEAST_ROWS = 32


class TreeOptions(NamedTuple):
    """Arguments of :func:`avq_jax.build` that a tree depends on; none is ``"auto"``.

    Attributes:
      num_leaves: L.
      num_subspaces: m.
      num_codewords: k.
      num_iterations: most iterations of k-means and of the codebook learner.
      sample_size: rows that centroids are learned from.
      soar_lambda: of second copies, ``None`` for none.
      balance: most rows of a leaf as a multiple of the mean, ``None`` for any number.
      spherical: whether centroids of k-means have length 1.
      num_groups: G, ``None`` for no upper level.
      scanned_dim: p, ``None`` for whole rows.
      projection: to p dimensions.
      codec: ``"product"`` or ``"additive"``.
      scale: bits of a scale a row, ``None`` for none.
    """

    num_leaves: int
    num_subspaces: int
    num_codewords: int
    num_iterations: int
    sample_size: int
    soar_lambda: float | None = None
    balance: float | None = None
    spherical: bool = False
    num_groups: int | None = None
    scanned_dim: int | None = None
    projection: Method = "pca"
    codec: Codec = "product"
    scale: int | None = None


def tree_options(
    n: int,
    d: int,
    *,
    metric: str,
    num_leaves: Any,
    num_subspaces: Any,
    num_codewords: Any,
    num_iterations: Any,
    sample_size: Any,
    soar_lambda: Any,
    spherical: bool,
    num_groups: Any,
    scanned_dim: Any,
    projection: Any,
    balance: Any = None,
    codec: Any = "product",
    scale: Any = None,
) -> TreeOptions | None:
    """Check the arguments of :func:`avq_jax.build` for ``[n, d]`` rows; called by what users call.

    Returns:
      :class:`TreeOptions`, or ``None`` where all rows are scored exactly.

    Raises:
      TypeError: sizes that are not integers.
      ValueError: sizes out of range, words that are not among those known.

    Warns:
      UserWarning: as of :func:`avq_jax.build`.
    """
    sample_size = as_count(sample_size, name="sample_size", minimum=256)
    num_iterations = as_count(num_iterations, name="num_iterations")
    if isinstance(soar_lambda, str):
        if soar_lambda != "auto":
            raise ValueError(f"soar_lambda must be a number, None or 'auto'; got {soar_lambda!r}")
        soar_lambda = 1.0 if n >= _FLAT_ROWS and metric != "l2" else None
    elif soar_lambda is not None and not 0 <= soar_lambda < math.inf:
        raise ValueError(f"soar_lambda must be None or a finite number >= 0; got {soar_lambda}")
    if balance is not None and not 1 < balance < math.inf:
        raise ValueError(f"balance must be None or a finite number above 1; got {balance}")
    if not isinstance(codec, str) or codec not in get_args(Codec):
        raise ValueError(f"codec must be one of {', '.join(get_args(Codec))}; got {codec!r}")
    if scale is not None and as_count(scale, name="scale") not in SCALE_BITS:
        raise ValueError(f"scale must be None or its bits, 4 or 8; got {scale}")
    if not isinstance(projection, str) or projection not in METHODS:
        raise ValueError(f"projection must be one of {', '.join(METHODS)}; got {projection!r}")
    width = d if scanned_dim is None else as_count(scanned_dim, name="scanned_dim")
    if width > d:
        raise ValueError(f"scanned_dim must be at most the width of x, {d}; got {width}")
    spilled = soar_lambda is not None
    sizes = tree_sizes(
        n,
        width,
        num_leaves,
        num_subspaces,
        num_codewords,
        spilled=spilled,
        codec=cast("Codec", codec),
    )
    num_groups = group_count(num_groups, 0 if sizes is None else sizes[0])
    if sizes is None:
        return None
    return TreeOptions(
        *sizes,
        int(num_codewords),
        num_iterations,
        sample_size,
        None if soar_lambda is None else float(soar_lambda),
        None if balance is None else float(balance),
        bool(spherical),
        num_groups,
        None if scanned_dim is None else width,
        cast("Method", projection),
        cast("Codec", codec),
        None if scale is None else int(scale),
    )


def tree_sizes(
    n: int,
    d: int,
    num_leaves: Any,
    num_subspaces: Any,
    num_codewords: Any,
    *,
    spilled: bool = False,
    codec: Codec = "product",
) -> tuple[int, int] | None:
    """Leaves and subspaces of the tree, or ``None`` where all rows are scored exactly."""
    k = as_count(num_codewords, name="num_codewords", minimum=2)
    if k > 256:
        raise ValueError(f"num_codewords must be at most 256, so that codes are bytes; got {k}")
    leaves = 1 if n < _FLAT_ROWS and not spilled else round(math.sqrt(n))
    if num_leaves is not None:
        leaves = as_count(num_leaves, name="num_leaves")
    m = math.ceil(d / 2) if d <= 128 else max(64, math.ceil(d / 4))
    if codec == "additive":
        m = math.ceil(m / 2)
    if num_subspaces is not None:
        m = as_count(num_subspaces, name="num_subspaces")
        if m > d:
            raise ValueError(f"num_subspaces must be at most the width of x, {d}; got {m}")
    if n < max(k, _LEAST_ROWS):
        warnings.warn(
            f"{n} rows are too few to learn {k} codewords a subspace from; "
            "the index scores all rows exactly",
            stacklevel=4,
        )
        return None
    if num_leaves is None and num_subspaces is None and n < _EXACT_ROWS:
        return None
    if leaves > n:
        warnings.warn(
            f"num_leaves = {leaves} is more than the {n} rows; using {n // 32 or 1}", stacklevel=4
        )
        leaves = n // 32 or 1
    check_slots(n + slots_per_block(k) * leaves)
    return leaves, m


def group_count(num_groups: Any, leaves: int) -> int | None:
    """Groups of so many leaves: the number asked for, or by ``"auto"`` sqrt(L) of very many.

    Raises:
      ValueError: more groups than leaves, another word than ``"auto"``.

    >>> group_count("auto", 1000), group_count("auto", 40_000), group_count(5, 1000)
    (None, 200, 5)
    """
    if isinstance(num_groups, str):
        if num_groups != "auto":
            raise ValueError(f"num_groups must be a number, None or 'auto'; got {num_groups!r}")
        return round(math.sqrt(leaves)) if leaves >= _GROUPED_LEAVES else None
    if num_groups is None:
        return None
    if (count := as_count(num_groups, name="num_groups")) > leaves:
        raise ValueError(
            f"num_groups must be at most the number of leaves, {leaves}; got {num_groups}"
        )
    return count
