"""Learn the weight of the score-aware loss by gradient, beside a sweep of its parameter.

    python examples/learned_weight.py --dataset glove.hdf5

The surrogate of recall is the cross-entropy of each training query's best row among its 64 best
rows, scored by the quantized rows. T moves it in two ways. The codebook is the solution of the
joint system of section 7.5 for the present codes, differentiated implicitly: conjugate gradients
run again on the cotangent (``lax.custom_linear_solve``). The codes are a soft assignment, whose
costs depend on T. Between steps of T, Lloyd's algorithm goes on with the weight reached.

The sweep learns a codebook for each T of a grid, all in one compiled program. Both are judged by
recall 1@1 and 1@10 of hard codes on other queries. Without a data set the rows are synthetic.

Of real data only the sweep and the first step of the learner have been run: whether it reaches the
best T of the sweep is not known.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import avq_jax

FIT = {"num_codewords": 16, "num_iterations": 10}


def load(path, rows, queries, seed=0):
    """Unit rows, training queries and test queries."""
    draw = np.random.default_rng(seed)
    if path is None:
        centers = draw.standard_normal((50, 32))
        x, q = (
            centers[draw.integers(50, size=n)] + 0.8 * draw.standard_normal((n, 32))
            for n in (rows, 2 * queries)
        )
    else:
        from avq_jax.evaluation import read_hdf5

        data = read_hdf5(path)
        x = data.train[np.sort(draw.choice(len(data.train), rows, replace=False))]
        q = data.test[: 2 * queries]
    x, q = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, q))
    x, q = jnp.asarray(x, jnp.float32), jnp.asarray(q, jnp.float32)
    return x, q[:queries], q[queries:]


def scaling_of(T, x):
    return avq_jax.scaling(avq_jax.Threshold(T), jnp.linalg.norm(x, axis=1), dim=x.shape[1])


def recalls(x_tilde, queries, best):
    """Recall 1@1 and 1@10 of quantized rows."""
    found = jax.lax.top_k(queries @ x_tilde.T, 10)[1]
    hit = found == best[:, None]
    return jnp.mean(hit[:, 0]), jnp.mean(jnp.any(hit, axis=1))


@functools.partial(jax.jit, static_argnames="m")
def sweep(key, x, queries, best, grid, *, m):
    """Recalls at every T of a grid: learning and coding under vmap."""

    def one(T):
        state, _ = avq_jax.fit(key, x, scaling_of(T, x), num_subspaces=m, **FIT)
        return recalls(avq_jax.decode(state.codebook, state.codes), queries, best)

    return jax.vmap(one)(grid)


def surrogate(log_T, state, x, queries, candidates, temperature, sharpness):
    """Cross-entropy of the best row among candidates ``[b, c]``, the best first."""
    scaling = scaling_of(jnp.exp(log_T), x)
    # Theorem 4.2 / section 7.5 for fixed codes: implicit in T.
    book = avq_jax.solve_codebook(state.codebook, x, state.codes, scaling)
    soft = avq_jax.soft_quantize(book, x, scaling, temperature=temperature)
    scores = jnp.einsum("bd,bcd->bc", queries, soft[candidates])
    return -jnp.mean(jax.nn.log_softmax(sharpness * scores, axis=1)[:, 0])


@functools.partial(jax.jit, static_argnames="optimizer")
def learn_step(log_T, moments, state, x, queries, candidates, *, optimizer, settings):
    value, slope = jax.value_and_grad(surrogate)(log_T, state, x, queries, candidates, *settings)
    updates, moments = optimizer.update(slope, moments)
    return optax.apply_updates(log_T, updates), moments, value, slope


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", help="ann-benchmarks HDF5 file")
    parser.add_argument("--output", help="write the results as JSON")
    for name, value in (
        ("rows", 4000),
        ("queries", 400),
        ("subspaces", 16),
        ("steps", 40),
        ("start", 0.05),
        ("rate", 0.1),
        ("temperature", 0.01),
        ("sharpness", 20.0),
    ):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    arguments = parser.parse_args(argv)
    m, key = arguments.subspaces, jax.random.key(0)
    x, training, test = load(arguments.dataset, arguments.rows, arguments.queries)
    candidates = avq_jax.brute_force(training, x, k=64).ids
    best = avq_jax.brute_force(test, x, k=1).ids[:, 0]

    grid = jnp.array([0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4], jnp.float32)
    begin = time.perf_counter()
    swept = np.stack(sweep(key, x, test, best, grid, m=m), axis=1)
    print(f"sweep of {len(grid)} T in one program, {time.perf_counter() - begin:.1f} s")
    for T, (first, tenth) in zip(grid.tolist(), swept, strict=True):
        print(f"  T = {T:.2f}: recall 1@1 {first:.3f}, 1@10 {tenth:.3f}")

    log_T = jnp.log(jnp.float32(arguments.start))
    scaling = scaling_of(arguments.start, x)
    state, _ = avq_jax.fit(key, x, scaling, num_subspaces=m, progress=False, **FIT)
    optimizer = optax.adam(arguments.rate)
    moments, history = optimizer.init(log_T), []
    settings = arguments.temperature, arguments.sharpness
    for i in range(arguments.steps):
        log_T, moments, value, slope = learn_step(
            log_T, moments, state, x, training, candidates, optimizer=optimizer, settings=settings
        )
        if not np.isfinite(value):
            raise FloatingPointError(f"the surrogate became {value} at step {i}")
        state = avq_jax.lloyd_update(state, x, scaling_of(jnp.exp(log_T), x))
        history.append({"T": float(jnp.exp(log_T)), "surrogate": float(value)})
        if i % 5 == 0 or i == arguments.steps - 1:
            print(f"step {i}: T = {history[-1]['T']:.3f}, surrogate {value:.4f}, d {slope:.4f}")
    learned = np.stack(sweep(key, x, test, best, jnp.exp(log_T)[None], m=m), axis=1)[0]
    print(f"learned T = {jnp.exp(log_T):.3f}: recall 1@1 {learned[0]:.3f}, 1@10 {learned[1]:.3f}")
    if arguments.output:
        report = {
            "settings": {
                k: v for k, v in vars(arguments).items() if k not in ("dataset", "output")
            },
            "sweep": [
                {"T": T, "1@1": float(r[0]), "1@10": float(r[1])}
                for T, r in zip(grid.tolist(), swept, strict=True)
            ],
            "history": history,
            "learned": {
                "T": float(jnp.exp(log_T)),
                "1@1": float(learned[0]),
                "1@10": float(learned[1]),
            },
        }
        with open(arguments.output, "w") as file:
            file.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
