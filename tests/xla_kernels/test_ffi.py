"""The foreign functions called directly: wrong shapes and attributes are errors, not crashes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xla_kernels import library

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


# A good call of every other target: operands by name, results, attributes.
S8, S16 = jnp.int8, jnp.int16
GOOD = {
    "adc_scores": (
        {
            "tables": ((2, 5, 16), F32),
            "data": ((2, 2, 64), U8),
            "gain": ((0,), F32),
            "offset": ((40,), F32),
        },
        {"scores": ((2, 40), F32)},
        {"num_rows": np.int64(40), "num_subspaces": np.int64(5), "layout": np.int32(1)},
    ),
    "dot_top_k": (
        {
            "queries": ((2, 10), S8),
            "data": ((3, 3, 64), U8),
            "scale": ((40,), F32),
            "valid": ((1, 40), PRED),
        },
        {"scores": ((2, 3), F32), "ids": ((2, 3), I32)},
        {"num_rows": np.int64(40)},
    ),
    "rescore_top_k": (
        {
            "queries": ((2, 10), F32),
            "rows": ((40, 10), F32),
            "scale": ((40,), F32),
            "candidates": ((2, 7), I32),
        },
        {"scores": ((2, 3), F32), "ids": ((2, 3), I32)},
        {"euclidean": np.bool_(False)},
    ),
    "encode": (
        {
            "rows": ((7, 10), F32),
            "directions": ((7, 10), F32),
            "orthogonal": ((7,), F32),
            "weight": ((7,), F32),
            "codewords": ((5, 3, 2), F32),
        },
        {"codes": ((7, 5), U8)},
        {"max_sweeps": np.int64(3)},
    ),
    "additive": (
        {
            "rows": ((7, 10), F32),
            "directions": ((7, 2, 10), F32),
            "orthogonal": ((7,), F32),
            "weights": ((7, 2), F32),
            "start": ((7, 3), U8),
            "words": ((10, 3, 16), F32),
            "norms": ((3, 16), F32),
            "pairs": ((3, 9, 3, 16), F32),
            "kicks": ((2, 2, 2), I32),
        },
        {"codes": ((7, 3), U8)},
        {"sweeps": np.int64(3)},
    ),
    "tree_search": (
        {
            "queries": ((2, 8), F32),
            "centroids": ((3, 8), F32),
            "tiles": ((1, 4, 16, 2), S16),
            "centroid_scale": ((), F32),
            "leaf_offset": ((3,), F32),
            "spread": ((3,), F32),
            "group_tiles": ((0, 4, 16, 2), S16),
            "group_scale": ((), F32),
            "group_offset": ((0,), F32),
            "group_starts": ((0,), I32),
            "starts": ((4,), I32),
            "codewords": ((4, 2, 16), F32),
            "codes": ((2, 1, 64), U8),
            "slot_offset": ((64,), F32),
            "slot_level": ((64,), U8),
            "levels": ((16,), F32),
            "slot_rows": ((64,), I32),
            "usable": ((1, 64), PRED),
            "rows": ((40, 8), S8),
            "row_scale": ((40,), F32),
            "row_queries": ((2, 0), F32),
        },
        {"scores": ((2, 3), F32), "ids": ((2, 3), I32)},
        {
            "layout": np.int32(1),
            "leaves_to_search": np.int64(2),
            "leaves_ranked": np.int64(3),
            "deviations": np.float32(3),
            "rescore": np.int64(5),
            "retrieve": np.int64(5),
            "euclidean": np.bool_(False),
        },
    ),
    "tree_leaves": (
        {
            "queries": ((2, 8), F32),
            "tiles": ((1, 4, 16, 2), S16),
            "centroid_scale": ((), F32),
            "leaf_offset": ((3,), F32),
            "group_tiles": ((0, 4, 16, 2), S16),
            "group_scale": ((), F32),
            "group_offset": ((0,), F32),
            "group_starts": ((0,), I32),
        },
        {"leaves": ((2, 2), I32)},
        {"num_leaves": np.int64(3), "leaves_ranked": np.int64(3)},
    ),
    "tree_scan": (
        {
            "queries": ((2, 8), F32),
            "centroids": ((3, 8), F32),
            "spread": ((3,), F32),
            "starts": ((4,), I32),
            "codewords": ((4, 2, 16), F32),
            "codes": ((2, 1, 64), U8),
            "slot_offset": ((64,), F32),
            "slot_level": ((64,), U8),
            "levels": ((16,), F32),
            "slot_rows": ((64,), I32),
            "usable": ((1, 64), PRED),
            "leaves": ((2, 2), I32),
            "floor": ((2, 1), F32),
        },
        {"scores": ((2, 9), F32), "ids": ((2, 9), I32)},
        {"layout": np.int32(1), "retrieve": np.int64(5), "last": np.bool_(False)},
    ),
    "best_candidates": (
        {"scores": ((3, 2, 9), F32), "rows": ((3, 2, 9), I32)},
        {"best_scores": ((2, 4), F32), "best_rows": ((2, 4), I32)},
        {"retrieve": np.int64(4), "keep": np.int64(4)},
    ),
}

# Beside another number of axes and another dtype of each operand: sizes that do not fit together,
# as shapes, and attributes out of range.
BAD = {
    "adc_scores": [
        {"tables": (2, 4, 16)},
        {"tables": (2, 5, 17)},
        {"data": (1, 2, 64)},
        {"gain": (39,)},
        {"offset": (41,)},
        {"scores": (2, 39)},
        {"num_rows": np.int64(-1)},
        {"num_subspaces": np.int64(2**62)},
        {"layout": np.int32(9)},
    ],
    "dot_top_k": [
        {"queries": (2, 13)},
        {"queries": (2, 40000)},
        {"data": (2, 3, 64)},
        {"data": (3, 3, 63)},
        {"scale": (39,)},
        {"valid": (3, 40)},
        {"valid": (1, 39)},
        {"scores": (1, 3)},
        {"ids": (2, 4)},
        {"num_rows": np.int64(-1)},
        {"num_rows": np.int64(2**40)},
    ],
    "rescore_top_k": [
        {"queries": (2, 9)},
        {"rows": (40, 11)},
        {"scale": (39,)},
        {"candidates": (3, 7)},
        {"rows": jnp.dtype("int8"), "euclidean": np.bool_(True)},
        {"scores": (3, 3)},
        {"ids": (2, 4)},
    ],
    "encode": [
        {"codewords": (5, 300, 2)},
        {"codewords": (5, 0, 2)},
        {"codewords": (4, 3, 2)},
        {"directions": (7, 9)},
        {"orthogonal": (6,)},
        {"weight": (8,)},
        {"codes": (7, 4)},
    ],
    "additive": [
        {"directions": (7, 2, 9)},
        {"orthogonal": (8,)},
        {"weights": (7, 3)},
        {"start": (6, 3)},
        {"words": (10, 3, 15)},
        {"words": (9, 3, 16)},
        {"norms": (3, 32)},
        {"pairs": (3, 17, 3, 16)},
        {"pairs": (3, 9, 2, 16)},
        {"pairs": (3, 0, 3, 16)},
        {"kicks": (2, 2, 3)},
        {"codes": (7, 4)},
        {"sweeps": np.int64(0)},
    ],
    "tree_search": [
        {"queries": (2, 7)},
        {"centroids": (4, 8)},
        {"tiles": (2, 4, 16, 2)},
        {"leaf_offset": (2,)},
        {"spread": (2,)},
        {"group_scale": (1,)},
        {"group_starts": (3,)},  # zeros do not rise to the number of leaves
        {"group_starts": (1, 3)},
        {"starts": (3,)},
        {"codewords": (3, 2, 16)},
        {"codewords": (4, 2, 17)},
        {"codes": (3, 1, 64)},
        {"slot_offset": (63,)},
        {"slot_level": (63,)},
        {"slot_level": (0,)},
        {"levels": (17,)},
        {"levels": (4, 4)},
        {"slot_rows": (63,)},
        {"usable": (3, 64)},
        {"usable": (1, 63)},
        {"rows": (40, 7)},
        {"rows": (0, 8)},
        {"row_scale": (39,)},
        {"euclidean": np.bool_(True)},  # of float32 rows alone
        {"scores": (3, 3)},
        {"ids": (2, 4)},
        {"layout": np.int32(-1)},
        {"leaves_to_search": np.int64(0)},
        {"leaves_ranked": np.int64(0)},
        {"deviations": np.float32(-1)},
        {"row_queries": (3, 0)},
        {"row_queries": (2, 9)},
        {"rescore": np.int64(2)},
    ],
    "tree_leaves": [
        {"queries": (2, 9)},
        {"tiles": (2, 4, 16, 2)},
        {"centroid_scale": (1,)},
        {"leaf_offset": (2,)},
        {"group_scale": (1,)},
        {"group_starts": (3,)},
        {"group_starts": (1, 3)},
        {"leaves": (3, 2)},
        {"num_leaves": np.int64(0)},
        {"num_leaves": np.int64(17)},
        {"leaves_ranked": np.int64(0)},
    ],
    "tree_scan": [
        {"queries": (2, 7)},
        {"centroids": (4, 8)},
        {"spread": (2,)},
        {"starts": (3,)},
        {"codewords": (3, 2, 16)},
        {"codes": (3, 1, 64)},
        {"slot_offset": (63,)},
        {"slot_level": (63,)},
        {"levels": (17,)},
        {"slot_rows": (63,)},
        {"usable": (3, 64)},
        {"leaves": (3, 2)},
        {"leaves": (2, 0)},
        {"floor": (2, 2)},
        {"floor": (3, 1)},
        {"floor": (2,)},
        {"scores": (3, 9)},
        {"ids": (2, 8)},
        {"layout": np.int32(-1)},
        {"retrieve": np.int64(-1)},
        {"retrieve": np.int64(0), "last": np.bool_(True)},
    ],
    "best_candidates": [
        {"scores": (3, 2, 8)},
        {"rows": (2, 2, 9)},
        {"best_scores": (3, 4)},
        {"best_rows": (2, 5)},
        {"retrieve": np.int64(0)},
        {"keep": np.int64(0)},
    ],
}


def call(target, change):
    operands, results, attributes = GOOD[target]

    def changed(specs):
        for name, (shape, dtype) in specs.items():
            new = change.get(name, shape)
            yield (new, dtype) if isinstance(new, tuple) else (shape, new)

    args = [jnp.zeros(*spec) for spec in changed(operands)]
    out = [jax.ShapeDtypeStruct(*spec) for spec in changed(results)]
    attributes = attributes | {x: change[x] for x in attributes if x in change}
    return jax.block_until_ready(
        jax.ffi.ffi_call(f"xla_kernels_{target}", out)(*args, **attributes)
    )


def changes(target):
    operands, results, attributes = GOOD[target]
    for name, (shape, dtype) in (operands | results).items():
        yield {name: (*shape, 1)}
        yield {name: jnp.dtype("float16")}
        yield {name: jnp.dtype("int32" if dtype != I32 else "uint32")}
    for name, value in attributes.items():
        # Equal numbers of another type would share a program.
        yield {name: np.int32(7) if isinstance(value, np.floating) else np.float32(0.5)}
    yield from BAD[target]


def test_every_target_is_called_with_what_is_wrong():
    names = {"adc_top_k", *GOOD}
    assert {f"xla_kernels_{name}" for name in names} == set(library.TARGETS)
    assert BAD.keys() == GOOD.keys()


@pytest.mark.parametrize("target", GOOD)
def test_good_calls_of_each_target(target):
    call(target, {})


@pytest.mark.parametrize(
    ("target", "change"),
    [(target, change) for target in GOOD for change in changes(target)],
    ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}={v}" for k, v in x.items()),
)
def test_bad_calls_of_each_target_are_errors(target, change):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        call(target, change)
