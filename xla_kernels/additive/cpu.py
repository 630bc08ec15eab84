"""The compiled search."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from ..varying import ffi_call

# Arguments that come with the rows; the others are shared.
_ROWS = 5


def assign_additive_codes(*args: jax.Array, max_sweeps: int) -> jax.Array:
    """Codes ``uint8[n, m]``; see `xla_kernels.assign_additive_codes` and csrc/additive.h."""

    @custom_vmap
    def call(*args: jax.Array) -> jax.Array:
        out = jax.ShapeDtypeStruct((args[0].shape[0], args[6].shape[0]), jnp.uint8)
        # In the order of the components of a word, so that it is a row of the product.
        words = args[5].transpose(2, 0, 1)
        args = (*args[:5], words, *args[6:])
        return ffi_call("xla_kernels_additive", out, *args, sweeps=np.int64(max_sweeps))

    @call.def_vmap
    def _fold(size: int, batched: Any, *args: jax.Array) -> tuple[jax.Array, bool]:
        def whole(x: jax.Array, mapped: bool) -> jax.Array:
            return x if mapped else jnp.broadcast_to(x[None], (size, *x.shape))

        if any(batched[_ROWS:]):  # other codebooks each: one after another
            each = tuple(whole(x, b) for x, b in zip(args, batched, strict=True))
            return jax.lax.map(lambda one: call(*one), each), True
        flat = []
        for x, b in zip(args[:_ROWS], batched[:_ROWS], strict=True):
            all_rows = whole(x, b)
            flat.append(all_rows.reshape(size * all_rows.shape[1], *all_rows.shape[2:]))
        codes = call(*flat, *args[_ROWS:])
        return codes.reshape(size, -1, codes.shape[1]), True

    return call(*args)
