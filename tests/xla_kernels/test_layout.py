import jax.numpy as jnp
import numpy as np
import pytest

from xla_kernels import PackedCodes, pack_codes, unpack_codes
from xla_kernels import layout as layouts
from xla_kernels.layout import LAYOUTS, code_rows


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (31, 4), (33, 5), (64, 0), (129, 50)], ids=str)
def test_unpack_inverts_pack(layout, shape):
    codes = np.random.default_rng(0).integers(0, 16, shape).astype(np.uint8)
    packed = pack_codes(codes, num_codewords=16, layout=layout)
    np.testing.assert_array_equal(unpack_codes(packed), codes)
    assert packed.shape == shape
    if shape[0]:
        rows = jnp.asarray([[0, shape[0] - 1], [shape[0] // 2, 0]], jnp.int32)
        np.testing.assert_array_equal(code_rows(packed, rows), codes[rows])


@pytest.mark.parametrize("num_codewords", [16, 40])
@pytest.mark.parametrize("n", [0, 100, 128, 1000])
def test_parts_give_the_same(monkeypatch, n, num_codewords):
    monkeypatch.setattr(layouts, "PART", 128)
    codes = np.random.default_rng(1).integers(0, num_codewords, (n, 5)).astype(np.uint8)
    asked = []

    def part(first, end):
        asked.append(end - first)
        return codes[first:end]

    packed = layouts.pack_parts(part, (n, 5), num_codewords=num_codewords)
    whole = pack_codes(codes, num_codewords=num_codewords)
    np.testing.assert_array_equal(packed.data, whole.data)
    assert (packed.shape, packed.layout) == (whole.shape, whole.layout)
    assert sum(asked) == n
    assert packed.layout in layouts.POINTS_LAST or max(asked) <= 128


def test_layout_of_a_group_as_documented():
    codes = np.zeros((32, 4), np.uint8)
    codes[3, 2], codes[19, 2] = 5, 9
    dwords = pack_codes(codes, num_codewords=16, layout="dwords").data
    assert dwords[0, 0, 4 * 3 + 2] == 5 + 16 * 9
    codes[7, 2], codes[7, 3] = 6, 11
    lanes = pack_codes(codes, num_codewords=16, layout="lanes").data
    assert lanes[0, 0, 32 + 7] == 6 + 16 * 11


@pytest.mark.parametrize(
    ("codes", "arguments", "message"),
    [
        (np.zeros((2, 2), np.int32), {"num_codewords": 16}, "codes must be uint8"),
        (np.zeros(2, np.uint8), {"num_codewords": 16}, "codes must be uint8"),
        (np.zeros((2, 2), np.uint8), {"num_codewords": 0}, "num_codewords"),
        (np.zeros((2, 2), np.uint8), {"num_codewords": 257}, "num_codewords"),
        (np.zeros((2, 2), np.uint8), {"num_codewords": 16, "layout": "rows"}, "layout"),
        (np.zeros((2, 2), np.uint8), {"num_codewords": 17, "layout": "lanes"}, "16 codewords"),
    ],
)
def test_bad_arguments_are_named(codes, arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_codes(codes, **arguments)


def test_one_array_leaf():
    import jax

    packed = pack_codes(np.zeros((5, 3), np.uint8), num_codewords=16)
    assert len(jax.tree.leaves(packed)) == 1
    assert isinstance(jax.tree.map(lambda x: x, packed), PackedCodes)
