"""The compiled assignment."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from ..varying import ffi_call


def assign_codes(
    rows: jax.Array,
    codewords: jax.Array,
    directions: jax.Array,
    orthogonal: jax.Array,
    weight: jax.Array,
    *,
    max_sweeps: int,
) -> jax.Array:
    """Codes ``uint8[n, m]``; see `xla_kernels.assign_codes`."""

    @custom_vmap
    def call(*args: jax.Array) -> jax.Array:
        out = jax.ShapeDtypeStruct((args[0].shape[0], args[4].shape[0]), jnp.uint8)
        return ffi_call("xla_kernels_encode", out, *args, max_sweeps=np.int64(max_sweeps))

    @call.def_vmap
    def _fold(size: int, batched: Any, *args: jax.Array) -> tuple[jax.Array, bool]:
        if batched[4]:  # another codebook each: one after another
            whole = [
                x if b else jnp.broadcast_to(x[None], (size, *x.shape))
                for x, b in zip(args, batched, strict=True)
            ]
            return jax.lax.map(lambda one: call(*one), tuple(whole)), True
        flat = []
        for x, b in zip(args[:4], batched[:4], strict=True):
            whole_x = x if b else jnp.broadcast_to(x[None], (size, *x.shape))
            flat.append(whole_x.reshape(size * whole_x.shape[1], *whole_x.shape[2:]))
        codes = call(*flat, args[4])
        return codes.reshape(size, -1, codes.shape[1]), True

    return call(rows, directions, orthogonal, weight, codewords)
