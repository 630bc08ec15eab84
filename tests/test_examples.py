"""Every example runs at small size."""

import argparse
import importlib.util
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import avq_jax

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "extreme_classification": [
        *("--widths=16", "--bits", "16", "128", "--held-out=100", "--epochs=1"),
        *("--buckets=512", "--ngrams=8", "--embedding=8", "--sampled=64"),
    ],
    "two_tower": ["--epochs", "2", "--warm", "1", "--width", "8", "--subspaces", "2", "--decays=1"],
    "learned_weight": ["--steps", "2", "--rows", "200", "--queries", "16", "--subspaces", "8"],
}


# Examples with tests of their own.
ELSEWHERE = {"serve"}


def test_every_example_is_run():
    found = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert found == set(SMALL) | ELSEWHERE


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def promoting():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, []) for name in SMALL), ("learned_weight", ["--weight", "network", "--raw"])],
)
def test_runs(name, options, capsys, promoting):
    example(name).main([*SMALL[name], *options])
    assert capsys.readouterr().out


def test_two_tower_keeps_the_last_interactions_from_training():
    module = example("two_tower")
    users = np.array([0, 1, 0, 0, 1, 1, 0])
    items = np.array([3, 0, 1, 2, 4, 2, 0])
    data = module.split(users, items)
    assert data.test.item.tolist() == [0, 2]
    assert data.validation.item.tolist() == [2, 4]
    assert sorted(data.train.item.tolist()) == [0, 1, 3]
    # The latest comes first, and nothing from an interaction on.
    assert data.test.recent[0, :4].tolist() == [2, 1, 3, 5]
    assert data.validation.recent[0, :3].tolist() == [1, 3, 5]
    assert np.flatnonzero(data.seen["validation"][0]).tolist() == [1, 3]
    assert np.flatnonzero(data.seen["test"][0]).tolist() == [1, 2, 3]


def test_two_tower_counts_hits_among_items_not_seen():
    module = example("two_tower")
    scores, seen = np.array([[4.0, 3.0, 2.0, 1.0]]), np.array([[True, False, False, False]])
    found = [bool(module.hits(scores, np.array([i]), seen, k=2)[0]) for i in (1, 2, 3)]
    assert found == [True, True, False]


def test_two_tower_stops_at_a_loss_that_is_not_finite(promoting):
    module = example("two_tower")
    data = module.split(*module.interactions(None))
    start = module.initial(jax.random.key(0), data.shape, 4)
    optimizer = optax.chain(optax.sgd(1.0), optax.scale_by_schedule(lambda i: 1e30 * (i == 2)))
    epochs = module.train(
        start, data.train, loss=module.float_loss, epochs=5, optimizer=optimizer, seed=0
    )
    good = [next(epochs) for _ in range(3)]  # a step each
    with pytest.raises(FloatingPointError, match="the loss became nan at step 3"):
        next(epochs)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(good))


@pytest.mark.full
def test_learned_weight_stops_with_the_last_good_parameters(promoting):
    module = example("learned_weight")
    x, queries, _ = module.load(None, 100, 8)
    candidates = avq_jax.brute_force(queries, x, k=16).ids
    arguments = argparse.Namespace(subspaces=8, steps=3, rate=1e3, temperature=0.002)
    options = {"family": module.FAMILIES["threshold"], "arguments": arguments}
    with pytest.raises(FloatingPointError, match=r"at step \d") as caught:
        module.learn(jax.random.key(0), x, queries, candidates, 0.1, **options)
    assert all(np.isfinite(v) for v in caught.value.params.values())


def test_wordnet_is_read_and_held_out_entries_are_apart(tmp_path):
    module = example("extreme_classification")
    licence = "  1 This software and database is being provided to you"
    entity = "00000010 03 n 01 entity 0 001 ~ 00000020 n 0000 | that which is perceived  "
    thing = (
        "00000020 03 n 02 Thing 0 queer_thing 0 002 @ 00000010 n 0000 + 00000030 v 0201 | a thing"
    )
    be = '00000030 42 v 01 be 0 000 01 + 00 00 | have being; "I am"  '
    odd = "00000040 00 s 01 odd(p) 0 001 + 00000020 n 0101 | not even"
    files = {"noun": [licence, entity, thing], "verb": [licence, be], "adj": [odd], "adv": []}
    for name, lines in files.items():
        text = "".join(f"{line}\n" for line in lines)
        (tmp_path / f"data.{name}").write_text(text, "latin1")
    entries = module.wordnet(tmp_path, buckets=1 << 30, width=12)
    # The verb points at nothing, and is no entry; classes are entity, thing, be.
    assert entries.num_classes == 3
    assert entries.labels == [[1], [0, 2], [1]]
    assert entries.grams.shape == (3, 12)
    assert (entries.grams[:, 0] >= 0).all()
    assert (entries.grams[2] == -1).any()
    grams = module.ngrams("Thing queer_thing", "a thing")
    assert {"+thing", "a", "a thing", "<thi", "ing>"} <= set(grams)
    parts = module.split(entries, 1)
    assert sorted(np.concatenate(parts).tolist()) == [0, 1, 2]
    assert [len(part) for part in parts] == [1, 1, 1]


@pytest.mark.full
def test_sampled_classes_stand_for_all(promoting):
    """Over draws, the estimate of the sum over all classes is right on the average."""
    module = example("extreme_classification")
    logits = jax.random.normal(jax.random.key(0), (50,))
    labels = np.array([3, 40, 3])

    @jax.jit
    @jax.vmap
    def total(key):
        classes = module.classes_of(key, labels, 50, 10)
        at = jax.numpy.where(classes.ids < 0, 0, classes.ids)
        return jax.numpy.sum(jax.numpy.exp(logits[at] + classes.log_weight)), classes

    totals, classes = total(jax.random.split(jax.random.key(1), 4000))
    error = float(totals.std()) / 4000**0.5
    assert abs(float(totals.mean() - jax.numpy.exp(logits).sum())) < 4 * error
    ids = np.asarray(classes.ids)
    np.testing.assert_array_equal(np.take_along_axis(ids, np.asarray(classes.labels), 1)[0], labels)
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in ids[:50])
