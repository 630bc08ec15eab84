"""Device-varying types inside `jax.shard_map`: constants and kernel results must carry them."""

from typing import Any

import jax
from jax import lax


def varying_axes(*arrays: jax.Array | None) -> frozenset:
    """Mesh axes over which any of the arrays varies; empty outside `jax.shard_map`."""
    axes: frozenset = frozenset()
    for array in arrays:
        if array is not None:
            kind = jax.typeof(array)
            # The field moved in jax 0.10.
            manual = getattr(kind, "manual_axis_type", None)
            axes |= getattr(kind, "vma", frozenset()) if manual is None else manual.varying
    return axes


def match_varying(array: jax.Array, axes: frozenset) -> jax.Array:
    """Mark an array as varying over at least these mesh axes."""
    missing = tuple(axes - varying_axes(array))
    if not missing:
        return array
    if hasattr(lax, "pcast"):
        return lax.pcast(array, missing, to="varying")
    return getattr(lax, "pvary")(array, missing)  # noqa: B009  (its name before jax 0.9)


def ffi_call(
    target: str, out: Any, *args: jax.Array, vmap_method: str | None = None, **attributes: Any
) -> Any:
    """`jax.ffi.ffi_call` whose results vary over the mesh axes that any argument varies over.

    XLA knows nothing of what a foreign function does: without the cast a wrong, replicated
    ``out_specs`` would be accepted. Inputs are row-major, whatever layout XLA prefers for them.
    """
    axes = varying_axes(*args)
    cast = [match_varying(x, axes) for x in args]
    results = jax.ffi.ffi_call(target, out, vmap_method=vmap_method)(*cast, **attributes)
    return jax.tree.map(lambda x: match_varying(x, axes), results)
