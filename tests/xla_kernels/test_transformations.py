"""The kernels under every JAX transformation (DESIGN: organised by transformation)."""

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xla_kernels import adc_scores, adc_top_k, assign_codes, export_checks, library, pack_codes

from .oracle import numpy_scores, numpy_top_k

N, M, K, B = 700, 6, 16, 8
RNG = np.random.default_rng(0)
CODES = RNG.integers(0, K, (N, M)).astype(np.uint8)
TABLES = jnp.asarray(RNG.integers(-50, 50, (B, M, K)), jnp.float32)

# None is what users get: the compiled kernel where it is built, else plain XLA.
IMPLEMENTATIONS = [
    None,
    pytest.param("xla", marks=pytest.mark.full),
    pytest.param("cpu", marks=pytest.mark.full),
    pytest.param("reference", marks=pytest.mark.full),
]


@pytest.fixture(params=IMPLEMENTATIONS, ids=str)
def implementation(request):
    if request.param == "cpu" and library.load().handle is None:
        pytest.skip(f"no compiled kernels: {library.load().reason}")
    return request.param


def kernel_calls(function, *args):
    """How many compiled kernels a program calls."""
    return jax.jit(function).lower(*args).as_text().count("@xla_kernels_")


def test_jit_traces_once(implementation):
    packed = pack_codes(CODES, num_codewords=K)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def search(tables, packed):
        return adc_top_k(tables, packed, 5, implementation=implementation)

    for i in range(3):
        tables = TABLES + i
        scores, ids = search(tables, packed)
        want = numpy_top_k(tables, CODES, 5)
        np.testing.assert_array_equal(scores, want[0])
        np.testing.assert_array_equal(ids, want[1])


def test_vmap_over_queries_and_masks(implementation):
    valid = jnp.asarray(RNG.random((B, N)) < 0.5)
    packed = pack_codes(CODES, num_codewords=K)

    def one(table, mask):
        scores, ids = adc_top_k(table[None], packed, 5, valid=mask, implementation=implementation)
        return scores[0], ids[0]

    scores, ids = jax.vmap(one)(TABLES, valid)
    want = numpy_top_k(TABLES, CODES, 5, valid=np.asarray(valid))
    np.testing.assert_array_equal(ids, want[1])
    np.testing.assert_array_equal(scores, want[0])


@pytest.mark.usefixtures("compiled")
def test_nested_vmap_is_one_call():
    packed = pack_codes(CODES, num_codewords=K)

    def one(table):
        return adc_top_k(table[None], packed, 5, implementation="cpu")[1][0]

    def scores(table):
        return adc_scores(table[None], packed, implementation="cpu")[0]

    nested = TABLES.reshape(2, 2, 2, M, K)
    function = jax.vmap(jax.vmap(jax.vmap(one)))
    assert kernel_calls(function, nested) == 1
    want = numpy_top_k(TABLES, CODES, 5)[1]
    np.testing.assert_array_equal(function(nested).reshape(B, 5), want)
    assert kernel_calls(jax.vmap(jax.vmap(scores)), nested.reshape(2, 4, M, K)) == 1
    np.testing.assert_array_equal(jax.vmap(scores)(TABLES), numpy_scores(TABLES, CODES))


def test_vmap_over_codes_and_gains(implementation):
    codes = jnp.asarray(RNG.integers(0, K, (3, 90, M)), jnp.uint8)
    gain = jnp.asarray(RNG.integers(1, 4, (3, 90)), jnp.float32)

    def one(codes, gain):
        return adc_top_k(TABLES[:2], codes, 4, gain=gain, implementation=implementation)

    scores, ids = jax.vmap(one)(codes, gain)
    for i in range(3):
        want = numpy_top_k(TABLES[:2], codes[i], 4, gain=np.asarray(gain[i]))
        np.testing.assert_array_equal(ids[i], want[1])
        np.testing.assert_array_equal(scores[i], want[0])


def test_vmap_over_masks_alone(implementation):
    valid = jnp.asarray(RNG.random((3, N)) < 0.5)

    def one(mask):
        return adc_top_k(TABLES[:1], CODES, 4, valid=mask, implementation=implementation)[1]

    got = jax.vmap(one)(valid)
    for i in range(3):
        want = numpy_top_k(TABLES[:1], CODES, 4, valid=np.asarray(valid[i]))[1]
        np.testing.assert_array_equal(got[i], want)


def one_hot_loss(tables, gain, offset, ids):
    """The same selected scores as a dense product, for JAX to differentiate."""
    one_hot = jax.nn.one_hot(jnp.asarray(CODES), K)
    scores = jnp.einsum("bmk,nmk->bn", tables, one_hot) * gain[None] + offset[None]
    picked = jnp.take_along_axis(scores, ids, axis=1)
    return (picked**2).sum()


def test_grad_for_tables_gains_and_offsets(implementation):
    tables = jnp.asarray(RNG.normal(size=(3, M, K)), jnp.float32)
    gain = jnp.asarray(RNG.uniform(0.5, 2, N), jnp.float32)
    offset = jnp.asarray(RNG.normal(size=N), jnp.float32)
    packed = pack_codes(CODES, num_codewords=K)

    def loss(tables, gain, offset):
        scores, ids = adc_top_k(
            tables, packed, 7, gain=gain, offset=offset, implementation=implementation
        )
        return (scores**2).sum(), ids

    (_, ids), got = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(tables, gain, offset)
    want = jax.grad(one_hot_loss, argnums=(0, 1, 2))(tables, gain, offset, ids)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), got, want)


def test_jvp_and_grad_of_vmap(implementation):
    packed = pack_codes(CODES, num_codewords=K)

    def best(table):
        return adc_top_k(table[None], packed, 3, implementation=implementation)[0].sum()

    def every(table):
        return (adc_scores(table[None], packed, implementation=implementation) ** 2).sum()

    tangent = jnp.ones_like(TABLES[0])
    _, moved = jax.jvp(best, (TABLES[0],), (tangent,))
    assert moved == 3 * M  # each of three sums grows by its M entries
    together = jax.grad(lambda t: jax.vmap(best)(t).sum())(TABLES)
    apart = jax.vmap(jax.grad(best))(TABLES)
    np.testing.assert_array_equal(together, apart)
    dense = jax.grad(
        lambda t: (jnp.einsum("mk,nmk->n", t, jax.nn.one_hot(jnp.asarray(CODES), K)) ** 2).sum()
    )(TABLES[0])
    np.testing.assert_allclose(jax.grad(every)(TABLES[0]), dense, rtol=1e-4)


def test_gradients_of_missing_results_are_zero(implementation):
    valid = jnp.zeros(N, jnp.bool_).at[3].set(True)

    def loss(tables):
        scores, ids = adc_top_k(tables, CODES, 4, valid=valid, implementation=implementation)
        return jnp.where(ids >= 0, scores, 0.0).sum()

    grad = jax.grad(loss)(TABLES)
    assert np.isfinite(grad).all()
    assert grad.sum() == B * M


def test_grad_through_a_lookup_table(implementation):
    """Queries and codebooks: the table is a product of both."""
    words = jnp.asarray(RNG.normal(size=(M, K, 2)), jnp.float32)
    queries = jnp.asarray(RNG.normal(size=(2, M, 2)), jnp.float32)

    def loss(queries, words, implementation):
        tables = jnp.einsum("bms,mks->bmk", queries, words)
        return adc_top_k(tables, CODES, 5, implementation=implementation)[0].sum()

    got = jax.grad(loss, argnums=(0, 1))(queries, words, implementation)
    want = jax.grad(loss, argnums=(0, 1))(queries, words, "reference")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, want)


def test_scan_and_cond(implementation):
    packed = pack_codes(CODES, num_codewords=K)

    @jax.jit
    def run(tables, packed):
        def step(total, table):
            scores, ids = jax.lax.cond(
                table[0, 0] > -1000,
                lambda: adc_top_k(table[None], packed, 2, implementation=implementation),
                lambda: (jnp.zeros((1, 2)), jnp.zeros((1, 2), jnp.int32)),
            )
            return total + scores.sum(), ids[0]

        return jax.lax.scan(step, jnp.zeros(()), tables)

    total, ids = run(TABLES, packed)
    want = numpy_top_k(TABLES, CODES, 2)
    np.testing.assert_array_equal(ids, want[1])
    assert total == want[0].sum()


def test_several_calls_in_one_program_with_a_busy_pool():
    """The program that blocks every pool thread in kernels at once must still finish."""
    rng = np.random.default_rng(1)
    codes = [
        pack_codes(rng.integers(0, K, (40000, 8), np.uint8), num_codewords=K) for _ in range(6)
    ]
    tables = jnp.asarray(rng.integers(-9, 9, (16, 8, K)), jnp.float32)

    @jax.jit
    def many(tables, codes):
        return [adc_top_k(tables, packed, 3)[1] for packed in codes]

    for _ in range(3):
        jax.block_until_ready(many(tables, codes))


@pytest.fixture(scope="module")
def mesh():
    if jax.device_count() < 8:
        pytest.skip("needs 8 host devices")
    return jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def test_shard_map_over_queries(implementation, mesh):
    tables = jax.device_put(TABLES, NamedSharding(mesh, P("x")))
    codes = jax.device_put(jnp.asarray(CODES), NamedSharding(mesh, P()))

    def local(tables, codes):
        return adc_top_k(tables, codes, 3, implementation=implementation)[1]

    split = jax.shard_map(local, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    np.testing.assert_array_equal(jax.jit(split)(tables, codes), numpy_top_k(TABLES, CODES, 3)[1])
    wrong = jax.shard_map(local, mesh=mesh, in_specs=(P("x"), P()), out_specs=P())
    with pytest.raises(ValueError, match=r"varying|replicat|vary"):
        jax.jit(wrong)(tables, codes)


def test_shard_map_over_rows_and_grad(implementation, mesh):
    rows = jnp.asarray(CODES[:640])
    rows = jax.device_put(rows, NamedSharding(mesh, P("x")))
    tables = jax.device_put(TABLES, NamedSharding(mesh, P()))

    def local(tables, codes):
        scores, ids = adc_top_k(tables, codes, 3, implementation=implementation)
        first = jax.lax.axis_index("x") * codes.shape[0]
        return scores, ids + first

    split = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("x")), out_specs=P(None, "x")))
    scores, ids = split(tables, rows)
    want_scores, want_ids = numpy_top_k(TABLES, CODES[:640], 3)
    best = np.argsort(-np.asarray(scores), axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(ids), best, 1), want_ids)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(scores), best, 1), want_scores)
    grad = jax.grad(lambda t: split(t, rows)[0].sum())(tables)
    assert grad.sum() == B * 8 * 3 * M


def test_encoding_in_shard_map_and_vmap(implementation, mesh):
    rows = jnp.asarray(RNG.normal(size=(64, M * 2)), jnp.float32)
    words = jnp.asarray(RNG.normal(size=(M, 5, 2)), jnp.float32)
    ones = jnp.ones(64)

    def local(rows, ones):
        return assign_codes(
            rows,
            words,
            direction=rows,
            orthogonal=ones,
            weight=ones,
            implementation=implementation,
        )

    whole = local(rows, ones)
    split = jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    placed = [jax.device_put(x, NamedSharding(mesh, P("x"))) for x in (rows, ones)]
    np.testing.assert_array_equal(jax.jit(split)(*placed), whole)
    mapped = jax.vmap(local)(rows.reshape(8, 8, M * 2), ones.reshape(8, 8))
    np.testing.assert_array_equal(mapped.reshape(64, M), whole)


@pytest.mark.usefixtures("compiled")
def test_platform_dependent_lowers_only_what_the_platform_needs():
    packed = pack_codes(CODES, num_codewords=K)

    def search(tables, packed):
        return adc_top_k(tables, packed, 3)

    traced = jax.jit(search).trace(TABLES, packed)
    assert "@xla_kernels_adc_top_k" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "@xla_kernels_adc" not in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.usefixtures("compiled")
def test_export_with_the_kernel():
    packed = pack_codes(CODES, num_codewords=K)

    def search(tables, packed):
        return adc_top_k(tables, packed, 3)

    flat, tree = jax.tree.flatten((TABLES, packed))
    exported = jax.export.export(
        jax.jit(lambda *leaves: search(*jax.tree.unflatten(tree, leaves))),
        disabled_checks=export_checks(),
    )(*flat)
    assert "xla_kernels_adc_top_k" in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(*flat)[1], numpy_top_k(TABLES, CODES, 3)[1])


def test_export_without_the_kernel_for_several_platforms():
    exported = jax.export.export(
        jax.jit(lambda t, c: adc_top_k(t, c, 3, implementation="xla")), platforms=["cpu", "tpu"]
    )(TABLES, jnp.asarray(CODES))
    assert "xla_kernels_adc" not in exported.mlir_module()
    np.testing.assert_array_equal(
        exported.call(TABLES, jnp.asarray(CODES))[1], numpy_top_k(TABLES, CODES, 3)[1]
    )


def test_donated_tables(implementation):
    packed = pack_codes(CODES, num_codewords=K)
    search = jax.jit(
        lambda t, p: (adc_top_k(t, p, 3, implementation=implementation)[1], t + 1),
        donate_argnums=0,
    )
    ids, after = search(TABLES + 0, packed)
    np.testing.assert_array_equal(ids, numpy_top_k(TABLES, CODES, 3)[1])
    np.testing.assert_array_equal(after, TABLES + 1)


def test_threads_give_equal_results():
    """Eight Python threads on one set of codes (FAULTS 31)."""
    from concurrent.futures import ThreadPoolExecutor

    packed = pack_codes(CODES, num_codewords=K)
    want = numpy_top_k(TABLES, CODES, 10)[1]
    with ThreadPoolExecutor(8) as pool:
        for ids in pool.map(lambda _: adc_top_k(TABLES, packed, 10)[1], range(32)):
            np.testing.assert_array_equal(ids, want)
