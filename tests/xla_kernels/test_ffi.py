"""The foreign functions called directly: wrong shapes and attributes are errors, not crashes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("compiled")

F32, I32, U8, PRED = jnp.float32, jnp.int32, jnp.uint8, jnp.bool_


def call_top_k(
    tables=(2, 5, 16),
    data=(2, 2, 64),
    gain=(0,),
    offset=(0,),
    valid=(0, 40),
    out=(2, 3),
    ids=None,
    dtypes=(F32, U8, F32, F32, PRED),
    **attributes,
):
    attributes = {
        "num_rows": np.int64(40),
        "num_subspaces": np.int64(5),
        "layout": np.int32(1),
        "exact": np.bool_(True),
    } | attributes
    shapes = (tables, data, gain, offset, valid)
    args = [jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    results = (jax.ShapeDtypeStruct(out, F32), jax.ShapeDtypeStruct(ids or out, I32))
    return jax.block_until_ready(
        jax.jit(lambda *x: jax.ffi.ffi_call("xla_kernels_adc_top_k", results)(*x, **attributes))(
            *args
        )
    )


def test_good_call():
    scores, ids = call_top_k()
    np.testing.assert_array_equal(ids, [[0, 1, 2]] * 2)
    np.testing.assert_array_equal(scores, np.zeros((2, 3)))


@pytest.mark.parametrize(
    "change",
    [
        {"tables": (2, 4, 16)},
        {"tables": (2, 5)},
        {"tables": (2, 5, 17)},
        {"tables": (2, 5, 0)},
        {"data": (1, 2, 64)},
        {"data": (2, 2, 63)},
        {"data": (2, 128)},
        {"data": (2, 3, 64)},
        {"gain": (39,)},
        {"offset": (40, 1)},
        {"valid": (3, 40)},
        {"valid": (2, 41)},
        {"valid": (40,)},
        {"out": (3, 3)},
        {"out": (6,)},
        {"ids": (2, 4)},
        {"num_rows": np.int64(-1)},
        {"num_rows": np.int64(2**40)},
        {"num_subspaces": np.int64(-5)},
        {"num_subspaces": np.int64(2**62)},
        {"layout": np.int32(7)},
        {"layout": np.int32(-1)},
        {"layout": np.int64(1)},
        {"dtypes": (F32, jnp.int8, F32, F32, PRED)},
        {"dtypes": (jnp.bfloat16, U8, F32, F32, PRED)},
    ],
    ids=str,
)
def test_bad_calls_are_errors(change):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        call_top_k(**change)
    call_top_k()  # the process lives on


@pytest.mark.parametrize("words", [(5, 300, 2), (5, 0, 2), (4, 3, 2), (10,)], ids=str)
def test_bad_encode_calls_are_errors(words):
    args = [jnp.zeros(s, F32) for s in ((7, 10), (7, 10), (7,), (7,), words)]
    out = jax.ShapeDtypeStruct((7, 5), U8)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        jax.block_until_ready(
            jax.ffi.ffi_call("xla_kernels_encode", out)(*args, max_sweeps=np.int64(3))
        )
