"""Search end to end by the kernels for accelerators."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import avq_jax
from xla_kernels import implementations
from xla_kernels.layout import repack_codes
from xla_kernels.tree_search import api


def build(metric="dot", n=600, d=16, **options):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)).astype(np.float32)
    index = avq_jax.build(jax.random.key(0), x, metric=metric, num_leaves=6, **options)
    return index, jnp.asarray(rng.normal(size=(5, d)), jnp.float32)


@pytest.fixture
def interpreted(monkeypatch):
    """Pallas kernels run as plain JAX."""
    whole = api._pallas
    monkeypatch.setattr(
        api, "_pallas", lambda name, options: whole(name, {**options, "interpret": True})
    )
    monkeypatch.setattr(implementations, "require_pallas", lambda *_: None)


@pytest.mark.usefixtures("interpreted")
class TestSearch:
    @pytest.mark.parametrize(
        ("name", "metric", "options"),
        [
            ("pallas_tpu", "dot", {"soar_lambda": 1.0}),
            ("pallas_gpu", "l2", {"scanned_dim": 8}),
            pytest.param("pallas_tpu", "l2", {"scanned_dim": 8}, marks=pytest.mark.full),
            pytest.param("pallas_gpu", "dot", {"soar_lambda": 1.0}, marks=pytest.mark.full),
            pytest.param("pallas_tpu", "cosine", {}, marks=pytest.mark.full),
        ],
        ids=str,
    )
    def test_ids_are_those_of_plain_xla(self, name, metric, options):
        index, queries = build(metric, **options)
        settings = {"k": 5, "leaves_to_search": 4, "rescore": 60}
        wanted = avq_jax.search(index, queries, implementation="xla", **settings)
        found = avq_jax.search(index, queries, implementation=name, **settings)
        # The last candidates, which bfloat16 may swap, hardly hold one of the five best rows.
        assert (np.asarray(found.ids) == wanted.ids).mean() > 0.95
        same = np.asarray(found.ids) == wanted.ids
        np.testing.assert_allclose(
            np.asarray(found.scores)[same], np.asarray(wanted.scores)[same], rtol=1e-5, atol=1e-5
        )

    def test_sharded(self):
        index, queries = build()
        mesh = jax.make_mesh((2,), ("shards",), devices=jax.devices()[:2])
        parts = avq_jax.shard(index, mesh, axis="shards")
        settings = {"k": 5, "leaves_to_search": 4, "rescore": 60}
        found = avq_jax.search_sharded(parts, queries, implementation="pallas_tpu", **settings)
        wanted = avq_jax.search(index, queries, implementation="xla", **settings)
        assert (np.asarray(found.ids) == wanted.ids).mean() > 0.95

    def test_masks_and_fewer_bins(self):
        index, queries = build()
        allowed = np.zeros(index.num_rows, bool)
        allowed[::2] = True
        settings = {"k": 5, "leaves_to_search": 6, "rescore": 0, "implementation": "pallas_tpu"}
        found = avq_jax.search(index, queries, allowed=allowed, **settings)
        assert (np.asarray(found.ids) % 2 == 0).all()
        assert (np.asarray(found.ids) >= 0).all()
        fewer = avq_jax.search(index, queries, recall_target=0.5, **settings)
        assert (np.asarray(fewer.ids) >= 0).all()
        with pytest.raises(ValueError, match="recall_target must be a number"):
            avq_jax.search(index, queries, recall_target=1.5)


class TestChoice:
    @pytest.mark.parametrize(
        ("platform", "layout", "name"),
        [("tpu", "nibbles", "pallas_tpu"), ("gpu", "columns", "pallas_gpu")],
    )
    def test_a_device_takes_its_kernel(self, monkeypatch, platform, layout, name):
        index, queries = build()
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        chosen = []
        whole = api._pallas
        monkeypatch.setattr(api, "_pallas", lambda *a: chosen.append(a[0]) or whole(*a))
        packed = index.tree.packed
        packed = packed._replace(codes=repack_codes(packed.codes, layout))
        jax.make_jaxpr(lambda q: api.tree_search(packed, q, k=3, leaves_to_search=2))(queries)
        assert chosen == [name]

    def test_codes_are_packed_for_it(self, monkeypatch):
        from xla_kernels.layout import default_layout

        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        assert [default_layout(k) for k in (16, 17)] == ["nibbles", "columns"]

    def test_a_tree_it_cannot_search_is_said(self, monkeypatch):
        index, queries = build()
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        monkeypatch.setattr(api.pallas, "unsupported", lambda *_: "too wide")
        packed = index.tree.packed
        with pytest.warns(UserWarning, match="plain XLA, not pallas_tpu: too wide"):
            api.tree_search(packed, queries, k=3, leaves_to_search=2)


@pytest.mark.parametrize(("name", "platform"), [("tpu", "tpu"), ("gpu", "cuda")])
def test_search_is_lowered_for_its_platform(name, platform):
    """A smoke test: lowering alone also passes what a device's compiler would refuse."""
    index, queries = build()
    layout = "nibbles" if name == "tpu" else "columns"
    packed = index.tree.packed
    tree = index.tree._replace(packed=packed._replace(codes=repack_codes(packed.codes, layout)))
    index = avq_jax.Index(tree, index.store, None, None, index.metric, index.num_rows, index.dim, 4)
    run = functools.partial(avq_jax.search, k=5, recall_target=0.9, implementation=f"pallas_{name}")
    checks = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    exported = jax.export.export(jax.jit(run), platforms=[platform], disabled_checks=checks)(
        index, queries
    )
    text = exported.mlir_module()
    assert {"tpu": "tpu_custom_call", "gpu": "triton"}[name] in text
    assert [aval.shape for aval in exported.out_avals] == [(5, 5), (5, 5)]


def test_a_sharded_search_is_lowered_for_tpus():
    index, queries = build()
    mesh = jax.make_mesh((2,), ("shards",), devices=jax.devices()[:2])
    parts = avq_jax.shard(index, mesh, axis="shards")
    run = functools.partial(avq_jax.search_sharded, k=5, implementation="pallas_tpu")
    exported = jax.export.export(jax.jit(lambda p, q: tuple(run(p, q))), platforms=["tpu"])(
        parts, queries
    )
    assert exported.nr_devices == 2
    assert "tpu_custom_call" in exported.mlir_module()
