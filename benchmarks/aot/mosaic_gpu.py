"""What Mosaic GPU, Pallas' newer route to NVIDIA's, makes of decoding: no product code, a finding.

It has no gather, so 16 words a subspace must be picked by arithmetic: a binary tree of selects on
the bits of the code, in the registers from which the tensor cores take their left operand. Codes
whose words lie on a line (`fit_scalar`) need one multiply and one add instead. One program decodes
64 points of 64 columns, a code a column, and multiplies them with 128 queries.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import SingleDeviceSharding

POINTS, COLUMNS, QUERIES = 64, 64, 128


def _body(codes, words, queries, out, codes_ref, words_ref, q_ref, out_ref, total, bar, *, kind):
    rows = pl.ds(lax.axis_index("x") * POINTS, POINTS)
    plgpu.copy_gmem_to_smem(codes.at[rows], codes_ref, bar.at[0])
    plgpu.copy_gmem_to_smem(words, words_ref, bar.at[1])
    plgpu.copy_gmem_to_smem(queries, q_ref, bar.at[2])
    for i in range(3):
        plgpu.barrier_wait(bar.at[i])
    layout = plgpu.Layout.WGMMA
    code = plgpu.load(codes_ref, (), layout=layout)
    if kind == "affine":
        x = code.astype(jnp.float32) * 0.5 + 1.0
    else:
        code = code.astype(jnp.int32)
        values = [
            lax.broadcast_in_dim(
                plgpu.load(words_ref, (w,), layout=layout.reduce(0)), (POINTS, COLUMNS), (1,)
            )
            for w in range(16)
        ]
        for bit in range(4):
            high = (code & (1 << bit)) != 0
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [jnp.where(high, above, below) for below, above in pairs]
        x = values[0]
    plgpu.wgmma(total, x.astype(jnp.bfloat16), q_ref)
    plgpu.wgmma_wait(0)
    out_ref[...] = total[...]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_ref, out.at[rows])
    plgpu.wait_smem_to_gmem(0)


def compiled(kind: str, device, n: int):
    """The program, ``kind`` "select" or "affine", compiled for a device of a topology."""
    sharding = SingleDeviceSharding(device)
    wide = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    narrow = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    code = jnp.bfloat16 if kind == "affine" else jnp.int32
    run = plgpu.kernel(
        functools.partial(_body, kind=kind),
        out_shape=jax.ShapeDtypeStruct((n, QUERIES), jnp.float32),
        grid=(n // POINTS,),
        grid_names=("x",),
        scratch_shapes=[
            plgpu.SMEM((POINTS, COLUMNS), code, transforms=narrow if kind == "affine" else wide),
            plgpu.SMEM((16, COLUMNS), jnp.float32),
            plgpu.SMEM((COLUMNS, QUERIES), jnp.bfloat16, transforms=narrow),
            plgpu.SMEM((POINTS, QUERIES), jnp.float32, transforms=wide),
            plgpu.ACC((POINTS, QUERIES)),
            plgpu.Barrier(num_barriers=3),
        ],
    )
    shapes = (
        ((n, COLUMNS), code),
        ((16, COLUMNS), jnp.float32),
        ((COLUMNS, QUERIES), jnp.bfloat16),
    )
    arrays = [jax.ShapeDtypeStruct(*pair, sharding=sharding) for pair in shapes]
    return jax.jit(run).lower(*arrays).compile()
