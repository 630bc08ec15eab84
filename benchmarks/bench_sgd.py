"""Minibatch gradient descent against Lloyd's algorithm: final loss of all rows (section 4).

    python benchmarks/bench_sgd.py --dataset FILE.hdf5

Unit rows, codewords of 16, the loss by the limit eta of Equation (3): T = 0.2 at width 100 is
4.125.
"""

import json
import time

import jax
import numpy as np
import record

import avq_jax
from avq_jax.evaluation import read_hdf5


def timed(function):
    begin = time.perf_counter()
    result = jax.block_until_ready(function())
    return result, round(time.perf_counter() - begin, 1)


def final_loss(state, x, scaling):
    """Mean loss of the rows encoded anew, with no memory of the learning."""
    codes = avq_jax.encode(state.codebook, x, scaling)
    each = avq_jax.score_aware_loss(x, avq_jax.decode(state.codebook, codes), scaling)
    return float(each.mean())


def main():
    parser = record.arguments(
        __doc__.partition("\n")[0],
        rows=100_000,
        threshold=0.2,
        iterations=25,
        steps=2_000,
        batch_size=1_024,
        seed=0,
    )
    parser.add_argument("--subspaces", type=int, nargs="+", default=[50, 25])
    arguments = parser.parse_args()

    data = read_hdf5(arguments.dataset)
    draw = np.random.default_rng(arguments.seed)
    rows = min(arguments.rows, len(data.train))
    x = data.train[np.sort(draw.choice(len(data.train), rows, replace=False))]
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    ratio = float(avq_jax.eta_limit(arguments.threshold, 1.0, dim=x.shape[1]))
    scaling = avq_jax.Scaling(np.full(rows, ratio, np.float32), np.ones(rows, np.float32))

    report = {
        "environment": record.environment("optax"),
        "what": "mean loss of all rows, k = 16; Lloyd's algorithm and minibatch descent",
        "dataset": data.name,
        "rows": rows,
        "eta": ratio,
        "seed": arguments.seed,
        "iterations": arguments.iterations,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "results": [],
    }
    for m in arguments.subspaces:
        key = jax.random.key(arguments.seed)
        (lloyd, past), lloyd_s = timed(
            lambda key=key, m=m: avq_jax.fit(
                key,
                x,
                scaling,
                num_subspaces=m,
                num_iterations=arguments.iterations,
                progress=False,
            )
        )
        (sgd, history), sgd_s = timed(
            lambda key=key, m=m: avq_jax.fit_sgd(
                key,
                x,
                scaling,
                num_subspaces=m,
                num_steps=arguments.steps,
                batch_size=arguments.batch_size,
                progress=False,
            )
        )
        encoded = final_loss(lloyd, x, scaling), final_loss(sgd, x, scaling)
        row = {
            "num_subspaces": m,
            "lloyd_loss": float(lloyd.loss),
            "lloyd_loss_encoded_anew": encoded[0],
            "lloyd_iterations": len(past.loss),
            "lloyd_seconds": lloyd_s,
            "sgd_loss": float(sgd.loss),
            "sgd_loss_encoded_anew": encoded[1],
            "sgd_seconds": sgd_s,
            "ratio": float(sgd.loss) / float(lloyd.loss),
            "ratio_encoded_anew": encoded[1] / encoded[0],
            "sgd_history": [round(float(v), 6) for v in history.loss],
        }
        report["results"].append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "sgd_history"}), flush=True)
    record.write("sgd", report, arguments.output)


if __name__ == "__main__":
    main()
