"""The best rows of codes without JAX's dispatch: NumPy in and out, for serving loops."""

import ctypes
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import library
from ..layout import POINTS_LAST, PackedCodes, block_size
from . import cpu
from .api import FactoredTables, adc_top_k

_POINTERS = ("codewords", "codes", "gain", "offset", "valid")
_NUMBERS = (
    "num_rows",
    "num_subspaces",
    "num_codewords",
    "layout",
    "k",
    "exact",
    "width",
)


class _Arguments(ctypes.Structure):
    """`XlaKernelsAdcTopK` of csrc/adc_c.cc."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [
        (name, ctypes.c_int64) for name in _NUMBERS
    ]


def direct_adc_top_k(
    codes: Any,
    *,
    k: int,
    codewords: Any = None,
    gain: Any = None,
    offset: Any = None,
    valid: Any = None,
    recall_target: float = 1.0,
) -> Callable[[Any], tuple[np.ndarray, np.ndarray]]:
    """Bind `adc_top_k` to its codes, once, as a function of NumPy queries.

    A call through `jax.jit` costs about ten microseconds whatever it computes, as much as a scan of
    40,000 rows of 50 codes. Calls of this function run on the calling thread alone, without the
    interpreter lock, so threads of a server may share it.

    Args:
      codes: `PackedCodes`, or ``uint8[n, m]`` where codewords are given; concrete.
      k: results a query, at least 1; may exceed n.
      codewords: ``float[m, k, s]``: the function takes queries and computes their tables, as
        `FactoredTables`. None: it takes the tables.
      gain: ``float[n]`` or None, factor of a row's sum.
      offset: ``float[n]`` or None, added to a row's sum.
      valid: ``bool[n]`` or None: rows that may be returned.
      recall_target: as of `adc_top_k`.

    Returns:
      A function from ``float32[b, m * s]`` (padded with zeros where narrower), or from tables
      ``float32[b, m, k]``, to scores ``float32[b, k]`` and rows ``int32[b, k]``, those of
      `adc_top_k`. It raises ValueError for another shape. Without compiled kernels for the codes'
      device it calls `adc_top_k`.

    Raises:
      TypeError: arrays of a trace.
      ValueError: whatever `adc_top_k` refuses, or codes that are not packed without codewords.

    Example:
      >>> codes = np.array([[0, 0], [1, 0], [1, 1]], np.uint8)
      >>> codewords = np.array([[[1.0], [2.0]], [[10.0], [20.0]]], np.float32)
      >>> find = direct_adc_top_k(codes, k=2, codewords=codewords)
      >>> scores, ids = find(np.array([[1.0, 1.0]], np.float32))
      >>> scores.tolist(), ids.tolist()
      ([[22.0, 12.0]], [[2, 1]])
    """
    operands = (codes, codewords, gain, offset, valid)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands)):
        raise TypeError("direct_adc_top_k needs concrete arrays; inside jit call adc_top_k instead")
    if not isinstance(codes, PackedCodes):
        codes = jnp.asarray(codes)
    # Copies of what the caller may write to later.
    codewords, gain, offset, valid = (
        None if x is None else jnp.asarray(x) for x in (codewords, gain, offset, valid)
    )
    if codewords is not None:
        num_codewords, width = _words(codewords)
        shape: tuple[int, ...] = (codes.shape[-1] * width if codes.shape else 0,)
    elif isinstance(codes, PackedCodes):
        num_codewords, width = codes.num_codewords, -1
        shape = (codes.num_subspaces, num_codewords)
    else:
        raise ValueError("codes must be packed, by pack_codes, or codewords must be given")

    def general(queries: Any) -> tuple[jax.Array, jax.Array]:
        tables = queries if codewords is None else FactoredTables(queries, codewords)
        options = {"gain": gain, "offset": offset, "valid": valid, "recall_target": recall_target}
        return adc_top_k(tables, codes, k, **options)

    def check(queries: Any) -> np.ndarray:
        rows = np.asarray(queries, np.float32)
        if codewords is not None and rows.ndim == 2 and rows.shape[1] < shape[0]:
            rows = np.pad(rows, ((0, 0), (0, shape[0] - rows.shape[1])))
        if rows.shape[1:] != shape or rows.ndim != len(shape) + 1:
            what = "tables" if codewords is None else "queries"
            wanted = ", ".join(str(x) for x in ("b", *shape))
            raise ValueError(f"{what} must be float32[{wanted}], got {list(rows.shape)}")
        return rows

    if isinstance(codes, PackedCodes) and codes.layout not in POINTS_LAST:
        _require_whole(codes)
    # The checks of adc_top_k, for one query.
    jax.eval_shape(general, jax.ShapeDtypeStruct((1, *shape), np.float32))
    handle = library.load().handle
    devices = {device.platform for leaf in jax.tree.leaves(codes) for device in _devices(leaf)}
    if handle is None or devices - {"cpu"}:

        def plain(queries: Any) -> tuple[np.ndarray, np.ndarray]:
            scores, ids = general(check(queries))
            return np.asarray(scores), np.asarray(ids)

        return plain

    packed = cpu.packed_codes(codes, num_codewords)
    # Views of device arrays; they live as long as the function.
    held = {
        "codes": np.ascontiguousarray(np.asarray(packed.data)),
        "codewords": _held(codewords, np.float32, (0, 2, 1)),
        "gain": _held(gain, np.float32),
        "offset": _held(offset, np.float32),
        "valid": _held(valid, np.bool_),
    }
    arguments = _Arguments(
        num_rows=packed.num_rows,
        num_subspaces=packed.num_subspaces,
        num_codewords=num_codewords,
        layout=cpu.LAYOUT_NUMBERS[packed.layout],
        width=width,
        k=k,
        exact=recall_target == 1.0,
        **{name: array.ctypes.data for name, array in held.items() if array is not None},
    )
    run = handle.xla_kernels_adc_top_k_direct
    run.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64, ctypes.c_void_p]
    run.restype = None
    address = ctypes.addressof(arguments)
    address_of: Any = (ctypes.c_char * 0).from_buffer
    float32 = np.dtype(np.float32)

    def find(queries: Any) -> tuple[np.ndarray, np.ndarray]:
        if (
            type(queries) is not np.ndarray
            or queries.dtype != float32
            or queries.shape[1:] != shape
        ):
            queries = check(queries)
        b = len(queries)
        results = np.empty((2, b, k), np.float32)
        # A copy as bytes and a view of the buffer cost a tenth of what `ndarray.ctypes` does.
        run(address, queries.tobytes(), b, address_of(results))
        return results[0], results[1].view(np.int32)

    find.held = arguments, held  # type: ignore[attr-defined]
    return find


def _require_whole(packed: PackedCodes) -> None:
    """Refuse codes that are not what `pack_codes` made: the kernel would read beyond them."""
    n, m = packed.shape
    groups = m if packed.layout == "bytes" else -(-m // 4)
    wanted = -(-n // block_size(packed.layout)), groups, 64
    most = 256 if packed.layout == "bytes" else 16
    if packed.data.shape != wanted or packed.data.dtype != np.uint8 or packed.num_codewords > most:
        raise ValueError(
            f"codes.data must be uint8{list(wanted)} of at most {most} codewords, got "
            f"{packed.data.dtype}{list(packed.data.shape)} of {packed.num_codewords}"
        )


def _words(codewords: jax.Array) -> tuple[int, int]:
    if codewords.ndim != 3:
        raise ValueError(f"codewords must be float[m, k, s], got shape {list(codewords.shape)}")
    return codewords.shape[1], codewords.shape[2]


def _devices(leaf: Any) -> Any:
    return leaf.devices() if isinstance(leaf, jax.Array) else ()


def _held(value: Any, kind: Any, axes: tuple[int, ...] | None = None) -> np.ndarray | None:
    if value is None or value.size == 0:
        return None
    value = np.asarray(value, kind)
    return np.ascontiguousarray(value if axes is None else value.transpose(axes))
