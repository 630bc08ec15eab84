"""Checks of user input, made once at the Python edge and shared by every layer.

Array helpers take whatever a user holds (NumPy of any dtype and layout, ``np.memmap``, lists, JAX
arrays, dlpack exporters) and give float32 in C order. Host input stays a NumPy array, JAX input
stays a JAX array, so nothing is copied that already fits. A traced array has no values to look
at: only its rank, width and dtype are checked then.
"""

import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = [
    "as_count",
    "as_float32",
    "as_queries",
    "as_recall_target",
    "as_rows",
    "check_finite",
    "is_number",
    "is_traced",
]


def is_traced(*arrays: Any) -> bool:
    """Whether any leaf of the arguments is a tracer, whose values cannot be looked at.

    >>> is_traced(np.zeros(3))
    False
    """
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays))


def as_count(value: Any, *, name: str, minimum: int = 1) -> int:
    """Give ``value`` as a Python int that is at least ``minimum``.

    Args:
        value: an int or anything with ``__index__``; a bool is not a count.
        name: what the error message calls it.
        minimum: the smallest value allowed.

    Returns:
        The int.

    Raises:
        TypeError: not an integer, or only known while tracing.
        ValueError: below ``minimum``.

    >>> as_count(np.int64(3), name="k")
    3
    """
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} must be a Python int, got a traced value: it sets a shape, so pass it "
            f"from outside jit (static_argnames=[{name!r}])"
        )
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if count < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {count}")
    return count


def is_number(value: Any) -> bool:
    """Whether a value is a real number, of Python or NumPy; a bool is none.

    >>> is_number(np.float32(1)), is_number(True)
    (True, False)
    """
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def as_recall_target(value: Any) -> float:
    """Give a ``recall_target`` as a float in (0, 1].

    >>> as_recall_target(1)
    1.0
    """
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"recall_target must be a number in (0, 1]; got {value!r}")
    return float(value)


def as_float32(x: Any, *, name: str) -> Float[Array | np.ndarray, "..."]:
    """Give ``x`` as float32 in C order, without a copy where it is that already.

    Args:
        x: numbers of any real dtype, layout and container.
        name: what the error message calls it.

    Returns:
        A NumPy array, or a JAX array if ``x`` is one (or exports dlpack only). It may share the
        memory of ``x``. A value too large for float32 becomes infinite; ``check_finite`` sees it.

    Raises:
        TypeError: the dtype is not real numbers (text, objects, complex).
        ValueError: a ragged list.

    >>> as_float32([[1, 2], [3, 4]], name="x").dtype
    dtype('float32')
    """
    if isinstance(x, jax.Array):
        _check_real(x.dtype, name)
        return x if x.dtype == jnp.float32 else x.astype(jnp.float32)
    if not hasattr(x, "__array__") and hasattr(x, "__dlpack__"):
        return as_float32(jnp.from_dlpack(x), name=name)
    try:
        host = np.asarray(x)
    except ValueError as error:
        raise ValueError(f"{name} must be a rectangular array of numbers: {error}") from None
    if host.size == 0 and host.dtype == object:
        host = host.astype(np.float32)
    _check_real(host.dtype, name)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(host, dtype=np.float32, order="C")


def _check_real(dtype: Any, name: str) -> None:
    if not (
        jnp.issubdtype(dtype, jnp.floating)
        or jnp.issubdtype(dtype, jnp.integer)
        or dtype == np.bool_
    ):
        raise TypeError(f"{name} must hold real numbers, got dtype {dtype}")


def as_rows(
    x: Any, *, name: str = "x", min_rows: int = 1, finite: bool = True
) -> Float[Array | np.ndarray, "n d"]:
    """Give a matrix of data rows as finite float32 in C order.

    Args:
        x: [n, d], numbers of any real dtype, layout and container.
        name: what the error message calls it.
        min_rows: the fewest rows allowed.
        finite: look for NaN and Inf (one pass over the data; skipped for a tracer).

    Returns:
        float32 [n, d]; NumPy for host input, JAX for JAX input. It may share the memory of ``x``.

    Raises:
        TypeError: not real numbers.
        ValueError: not two axes, no columns, fewer than ``min_rows`` rows, or NaN/Inf (the first
            such row and their count are named).

    >>> as_rows([[1, 2], [3, 4]]).shape
    (2, 2)
    >>> as_rows([[1.0, float("nan")]])
    Traceback (most recent call last):
    ...
    ValueError: x must be finite: 1 of 1 rows hold NaN or Inf, the first is row 0
    """
    rows = as_float32(x, name=name)
    if rows.ndim != 2:
        raise ValueError(f"{name} must have two axes (rows, width), got shape {rows.shape}")
    if rows.shape[1] < 1:
        raise ValueError(f"{name} must have at least one column, got shape {rows.shape}")
    if rows.shape[0] < min_rows:
        raise ValueError(f"{name} must have at least {min_rows} row(s), got {rows.shape[0]}")
    if finite:
        check_finite(rows, name=name)
    return rows


def as_queries(
    queries: Any, *, width: int, name: str = "queries"
) -> tuple[Float[Array | np.ndarray, "b d"], bool]:
    """Give one query or a batch of them as float32 rows.

    NaN and Inf pass: a search answers such a row with ids -1 and leaves the others alone.

    Args:
        queries: [d] or [b, d], numbers of any real dtype, layout and container.
        width: the d of the rows to be searched.
        name: what the error message calls it.

    Returns:
        float32 [b, d], and whether the input was a single query, so that the caller squeezes
        the answer.

    Raises:
        TypeError: not real numbers.
        ValueError: not one or two axes, or another width.

    >>> rows, single = as_queries([1, 2, 3], width=3)
    >>> rows.shape, single
    ((1, 3), True)
    """
    rows = as_float32(queries, name=name)
    if rows.ndim == 2 and rows.shape[1] == width:
        return rows, False
    if rows.ndim == 1 and rows.shape[0] == width:
        return rows[None, :], True
    if rows.ndim == 1 and rows.shape[0] == 0:  # the empty list: no queries
        return rows.reshape(0, width), False
    if rows.ndim not in (1, 2):
        raise ValueError(f"{name} must have one axis or two (b, width), got shape {rows.shape}")
    raise ValueError(
        f"{name} must be as wide as the rows searched, {width}, got width {rows.shape[-1]} "
        f"(shape {rows.shape})"
    )


def check_finite(x: Float[Array | np.ndarray, "n *rest"], *, name: str) -> None:
    """Raise if a row of ``x`` holds NaN or Inf; a tracer passes unseen.

    Args:
        x: [n, ...], floating point.
        name: what the error message calls it.

    Raises:
        ValueError: names the first such row and their count.

    >>> check_finite(np.ones((2, 3)), name="x")
    """
    if is_traced(x) or x.size == 0:
        return
    if isinstance(x, np.ndarray):
        # A finite sum of squares proves every term finite, at the speed of one BLAS pass.
        flat = x.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.vdot(flat, flat)):
                return
        bad = ~np.isfinite(x.reshape(x.shape[0], -1)).all(axis=1)
    else:
        # Also while something else is traced around a concrete array.
        with jax.ensure_compile_time_eval():
            bad = np.asarray(_bad_rows(x))
    count = int(bad.sum())
    if count:
        raise ValueError(
            f"{name} must be finite: {count} of {len(bad)} rows hold NaN or Inf, "
            f"the first is row {int(bad.argmax())}"
        )


@jax.jit
def _bad_rows(x: Any) -> Any:
    return ~jnp.isfinite(x.reshape(x.shape[0], -1)).all(axis=1)
