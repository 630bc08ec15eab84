import numpy as np
import pytest

from xla_kernels import assign_codes

RNG = np.random.default_rng(0)


def problem(n, m, k, s, integer=False):
    def draw(*shape):
        if integer:
            return RNG.integers(-4, 5, shape).astype(np.float32)
        return RNG.normal(size=shape).astype(np.float32)

    rows, words = draw(n, m * s), draw(m, k, s)
    direction = draw(n, m * s)
    orthogonal = RNG.integers(1, 4, n).astype(np.float32)
    weight = RNG.integers(0, 6, n).astype(np.float32)
    terms = {"direction": direction, "orthogonal": orthogonal, "weight": weight}
    return rows, words, terms


def loss(rows, words, codes, direction, orthogonal, weight):
    m, s = words.shape[0], words.shape[2]
    decoded = words[np.arange(m), codes].reshape(len(rows), m * s).astype(np.float64)
    r = rows - decoded
    return orthogonal * (r * r).sum(1) + weight * (direction * r).sum(1) ** 2


def brute_descent(rows, words, direction, orthogonal, weight, max_sweeps):
    """One row and one subspace at a time, straight from the definition, in float64."""
    m, k, s = words.shape
    codes = np.zeros((len(rows), m), np.uint8)
    for i, x in enumerate(rows.astype(np.float64)):
        parts = x.reshape(m, 1, s)
        codes[i] = ((parts - words) ** 2).sum(2).argmin(1)
        for _ in range(max_sweeps):
            before = codes[i].copy()
            for j in range(m):
                tries = np.repeat(codes[i : i + 1], k, axis=0)
                tries[:, j] = np.arange(k)
                losses = loss(
                    np.repeat(rows[i : i + 1], k, axis=0),
                    words,
                    tries,
                    direction[i : i + 1],
                    orthogonal[i],
                    weight[i],
                )
                codes[i, j] = losses.argmin()
            if (before == codes[i]).all():
                break
    return codes


class Suite:
    implementation = None

    def assign(self, rows, words, terms, **options):
        options = {"implementation": self.implementation} | options
        return np.asarray(assign_codes(rows, words, **terms, **options))

    @pytest.mark.parametrize("shape", [(20, 3, 4, 2), (33, 5, 16, 1), (1, 1, 1, 3)], ids=str)
    def test_is_the_definition_on_integers(self, shape):
        rows, words, terms = problem(*shape, integer=True)
        want = brute_descent(rows, words, **terms, max_sweeps=10)
        np.testing.assert_array_equal(self.assign(rows, words, terms), want)

    @pytest.mark.parametrize("shape", [(0, 3, 4, 2), (4, 0, 4, 2), (4, 3, 4, 0)], ids=str)
    def test_empty(self, shape):
        rows, words, terms = problem(*shape)
        codes = self.assign(rows, words, terms)
        assert codes.shape == shape[:2]
        assert not codes.any()

    def test_no_sweeps_is_nearest_and_sweeps_never_raise_the_loss(self):
        rows, words, terms = problem(300, 10, 16, 2)
        start = self.assign(rows, words, terms, max_sweeps=0)
        nearest = ((rows.reshape(300, 10, 1, 2) - words[None]) ** 2).sum(3).argmin(2)
        assert (start == nearest).mean() > 0.999
        before = loss(rows, words, start, **terms)
        for sweeps in (1, 3, 10):
            after = loss(rows, words, self.assign(rows, words, terms, max_sweeps=sweeps), **terms)
            assert (after <= before * (1 + 1e-5)).all()
            before = after

    def test_other_rows_change_nothing(self):
        rows, words, terms = problem(70, 8, 256, 2)
        whole = self.assign(rows, words, terms)
        part = self.assign(rows[5:40], words, {key: x[5:40] for key, x in terms.items()})
        np.testing.assert_array_equal(whole[5:40], part)

    def test_agrees_with_the_reference(self):
        rows, words, terms = problem(2000, 50, 16, 2)
        got = self.assign(rows, words, terms)
        want = self.assign(rows, words, terms, implementation="reference")
        # Sums in the same order; only a compiler's contraction to fused products may differ.
        assert (got == want).all(axis=1).mean() > 0.999


class TestReference(Suite):
    implementation = "reference"


@pytest.mark.usefixtures("compiled")
class TestCompiled(Suite):
    implementation = "cpu"

    @pytest.fixture(autouse=True)
    def level(self, simd):
        self.simd = simd


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": np.zeros((2, 5), np.float32)}, "6 wide"),
        ({"rows": np.zeros((2, 6), np.int32)}, "rows must be"),
        ({"codewords": np.zeros((3, 257, 2), np.float32)}, "1 to 256"),
        ({"direction": np.zeros((3, 6), np.float32)}, "direction must have"),
        ({"orthogonal": np.zeros(3, np.float32)}, "orthogonal must be"),
        ({"weight": np.zeros((2, 1), np.float32)}, "weight must be"),
        ({"max_sweeps": -1}, "max_sweeps"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "rows": np.zeros((2, 6), np.float32),
        "codewords": np.zeros((3, 4, 2), np.float32),
        "direction": np.zeros((2, 6), np.float32),
        "orthogonal": np.ones(2, np.float32),
        "weight": np.ones(2, np.float32),
    } | change
    with pytest.raises(ValueError, match=message):
        assign_codes(arguments.pop("rows"), arguments.pop("codewords"), **arguments)
