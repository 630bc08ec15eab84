import jax
import numpy as np
import pytest

from xla_kernels import assign_additive_codes

RNG = np.random.default_rng(0)


def problem(n, m, k, d, r=1, rounds=3, integer=False):
    def draw(*shape):
        if integer:
            return RNG.integers(-3, 4, shape).astype(np.float32)
        return RNG.normal(size=shape).astype(np.float32)

    kicks = np.stack([RNG.integers(0, max(m, 1), (rounds, 2)), RNG.integers(0, k, (rounds, 2))], -1)
    words = draw(m, k, d)
    if integer:  # centred by whole numbers
        words[:, -1] -= words.sum(axis=1)
    terms = {
        "directions": draw(n, r, d),
        "orthogonal": RNG.integers(1, 4, n).astype(np.float32),
        "weights": RNG.integers(0, 6, (n, r)).astype(np.float32),
        "kicks": kicks.astype(np.int32),
    }
    return draw(n, d), words, terms


def loss(row, words, codes, directions, orthogonal, weights):
    """Of one row, for codes [..., m], in float64."""
    r = row - words[np.arange(len(words)), codes].astype(np.float64).sum(axis=-2)
    return orthogonal * (r * r).sum(-1) + (weights * (r @ directions.T) ** 2).sum(-1)


def search(row, words, kicks, max_sweeps, directions, orthogonal, weights):
    """One row, straight from the definition; codes that are not set yet add the mean word."""
    m, k, _ = words.shape
    mean = np.concatenate([words, words.mean(axis=1, keepdims=True)], axis=1)

    def descend(codes, first):
        for _ in range(max_sweeps):
            before = codes.copy()
            for i in range(m):
                j = (first + i) % m
                tries = np.repeat(codes[None], k, axis=0)
                tries[:, j] = np.arange(k)
                codes[j] = loss(row, mean, tries, directions, orthogonal, weights).argmin()
            if (codes == before).all():
                break
        return codes

    best = descend(np.full(m, k), 0)
    for kick in kicks:
        codes = best.copy()
        for j, code in kick:
            codes[j] = code
        codes = descend(codes, (kick[-1][0] + 1) % m)
        pair = loss(row, words, np.stack([codes, best]), directions, orthogonal, weights)
        best = codes if pair[0] < pair[1] else best
    return best


class Suite:
    implementation = None

    def assign(self, rows, words, terms, **options):
        options = {"implementation": self.implementation} | options
        return np.asarray(assign_additive_codes(rows, words, **terms, **options))

    @pytest.mark.parametrize("shape", [(20, 3, 4, 2), (17, 4, 19, 3, 2), (5, 1, 1, 3, 0)], ids=str)
    def test_is_the_definition_on_integers(self, shape):
        rows, words, terms = problem(*shape, integer=True)
        want = [
            search(
                rows[i].astype(np.float64),
                words,
                terms["kicks"],
                10,
                terms["directions"][i],
                terms["orthogonal"][i],
                terms["weights"][i],
            )
            for i in range(len(rows))
        ]
        np.testing.assert_array_equal(self.assign(rows, words, terms), want)

    @pytest.mark.parametrize("shape", [(0, 3, 4, 2), (4, 0, 4, 2), (4, 3, 4, 0)], ids=str)
    def test_empty(self, shape):
        codes = self.assign(*problem(*shape))
        assert codes.shape == shape[:2]
        assert not codes.any()

    def test_other_rows_change_nothing_and_a_start_is_never_made_worse(self):
        rows, words, terms = problem(70, 6, 16, 5)
        whole = self.assign(rows, words, terms)
        kept = slice(5, 40)
        part = {key: x if key == "kicks" else x[kept] for key, x in terms.items()}
        np.testing.assert_array_equal(whole[kept], self.assign(rows[kept], words, part))

        start = RNG.integers(0, 16, (70, 6)).astype(np.uint8)
        after = self.assign(rows, words, terms, codes=start)
        for i, row in enumerate(rows):
            mine = {key: x[i] for key, x in terms.items() if key != "kicks"}
            pair = loss(row, words, np.stack([after[i], start[i], whole[i]]), **mine)
            assert pair[0] <= pair[1] * (1 + 1e-5)

    def test_kicks_out_of_range_do_nothing(self):
        rows, words, terms = problem(30, 4, 5, 3)
        wild = terms | {"kicks": np.array([[[-1, 0], [4, 0], [0, 5], [0, -1]]], np.int32)}
        none = terms | {"kicks": np.zeros((0, 4, 2), np.int32)}
        np.testing.assert_array_equal(
            self.assign(rows, words, wild), self.assign(rows, words, none)
        )

    def test_vmap(self):
        rows, words, terms = problem(24, 3, 4, 5)
        kicks = terms.pop("kicks")
        groups = {key: x.reshape(2, 12, *x.shape[1:]) for key, x in terms.items()}
        flat = self.assign(rows, words, terms | {"kicks": kicks})

        def one(x, terms, words):
            options = {"kicks": kicks, "implementation": self.implementation}
            return assign_additive_codes(x, words, **terms, **options)

        x = rows.reshape(2, 12, -1)
        mapped = jax.vmap(one, in_axes=(0, 0, None))(x, groups, words)
        np.testing.assert_array_equal(mapped.reshape(flat.shape), flat)
        other = np.stack([words, -words])
        both = jax.vmap(one)(x, groups, other)
        np.testing.assert_array_equal(both[0], flat[:12])


class TestReference(Suite):
    implementation = "reference"


@pytest.mark.usefixtures("compiled")
class TestCompiled(Suite):
    implementation = "cpu"

    @pytest.fixture(autouse=True)
    def level(self, simd):
        self.simd = simd

    def test_agrees_with_the_reference(self):
        rows, words, terms = problem(500, 9, 16, 12)
        got = self.assign(rows, words, terms)
        want = self.assign(rows, words, terms, implementation="reference")
        assert (got == want).all(axis=1).mean() > 0.995


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": np.zeros((2, 5), np.float32)}, "6 wide"),
        ({"rows": np.zeros((2, 6), np.int32)}, "rows must be"),
        ({"codewords": np.zeros((3, 257, 6), np.float32)}, "1 to 256"),
        ({"directions": np.zeros((3, 1, 6), np.float32)}, "directions must be"),
        ({"orthogonal": np.zeros(3, np.float32)}, "orthogonal must be"),
        ({"weights": np.zeros((2, 2), np.float32)}, "weights must be"),
        ({"kicks": np.zeros((2, 2, 3), np.int32)}, "kicks must be"),
        ({"codes": np.zeros((2, 2), np.uint8)}, "codes must be"),
        ({"max_sweeps": 0}, "max_sweeps"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "rows": np.zeros((2, 6), np.float32),
        "codewords": np.zeros((3, 4, 6), np.float32),
        "directions": np.zeros((2, 1, 6), np.float32),
        "orthogonal": np.ones(2, np.float32),
        "weights": np.ones((2, 1), np.float32),
        "kicks": np.zeros((1, 1, 2), np.int32),
    } | change
    with pytest.raises(ValueError, match=message):
        assign_additive_codes(arguments.pop("rows"), arguments.pop("codewords"), **arguments)
