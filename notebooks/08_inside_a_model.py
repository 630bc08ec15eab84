# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inside a model: gradients, joint training, approximate softmax
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# Upload this notebook there; the first cell installs the package where it is missing.
#
# Everything in this package is a function over pytrees, so a search can stand inside a model. Three
# uses, each beyond the paper: the gradient of a search, codes that are trained together with an
# encoder, and a softmax over many classes of which only a few are looked at.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("avq_jax") is None:
    source = "avq-jax[demo]"  # or a checkout, or the git+https address of one
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", source])

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import avq_jax
from avq_jax.evaluation import glove_50d, split_queries

SIZE = os.environ.get("AVQ_SIZE", "small")  # "tiny" only proves that every cell runs
ROWS, QUERIES, STEPS = {"tiny": (500, 20, 20), "small": (20_000, 1_000, 1_000)}[SIZE]
if os.environ.get("AVQ_DATASET"):
    ROWS = 399_000  # all words: the full size


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


x, queries = split_queries(0, unit(glove_50d()[1][: ROWS + QUERIES]), QUERIES)
n, d = x.shape
truth = np.asarray(avq_jax.brute_force(queries, x, k=10).ids)
print(f"GloVe 6B, 50 dimensions: {n:,} unit rows, {len(queries):,} held-out queries")

# %% [markdown]
# ## The gradient of a search
#
# The best score as a function of the query is piecewise linear; its gradient is the row that was
# found. An index is an argument of the compiled function, not a constant in it.

# %%
index = avq_jax.build(
    jax.random.key(0), x, num_leaves=round(n**0.5), num_subspaces=d // 2, progress=False
)


@jax.jit
def best(index, q):
    return avq_jax.search(index, q, k=1, leaves_to_search=index.num_leaves).scores[0]


slope = jax.grad(best, argnums=1)(index, queries[0])
assert np.allclose(slope, x[truth[0, 0]], atol=1e-6)
print(f"the gradient is row {truth[0, 0]}, to {np.abs(slope - x[truth[0, 0]]).max():.1e}")

# %% [markdown]
# ## Codes trained with the encoder
#
# Rows are projected to fewer dimensions, quantized there, and carried back; projections and
# codewords learn together from the score-aware loss of what comes back. `quantize` gives hard codes
# forward and, backward, the gradient of the straight-through estimator or of the rotation trick.
# Either is an estimate, not the gradient of the loss, and the better the nearer rows are to their
# codewords, which the commitment loss sees to: with a tenth of it here the loss under the
# straight-through estimator falls for a hundred steps and then rises, and under the rotation trick
# it rises a little even so. The start is the usual order of things, principal components and then
# codebooks, which is also the baseline.

# %%
WIDTH, M = 20, 10
T = avq_jax.default_threshold(np.ones(n), dim=d)
eta = float(avq_jax.eta(avq_jax.Threshold(T), 1.0, dim=d))


def scaling(rows):
    return avq_jax.Scaling(jnp.full(rows, eta), jnp.ones(rows))


axes = np.linalg.eigh(x.T @ x)[1][:, ::-1][:, :WIDTH].astype(np.float32)
start, _ = avq_jax.fit(jax.random.key(0), x @ axes, None, num_subspaces=M,
                          num_iterations=2 if SIZE == "tiny" else 25, progress=False)  # fmt: skip
baseline = {"down": jnp.asarray(axes), "codebook": start.codebook, "up": jnp.asarray(axes.T)}


def quantized(parameters, x, estimator="straight-through"):
    z = avq_jax.quantize(parameters["codebook"], x @ parameters["down"], estimator=estimator)
    return z.x_tilde @ parameters["up"], z


def objective(parameters, x, estimator):
    x_tilde, z = quantized(parameters, x, estimator)
    whole = avq_jax.score_aware_loss(x, x_tilde, scaling(len(x))).mean()
    return whole + z.commitment_loss.mean(), whole


def train(estimator):
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))

    @jax.jit
    def step(carry, key):
        parameters, state = carry
        batch = jnp.asarray(x)[jax.random.randint(key, (512,), 0, n)]
        gradient, whole = jax.grad(objective, has_aux=True)(parameters, batch, estimator)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(parameters, updates), state), whole

    carry = baseline, optimizer.init(baseline)
    carry, history = jax.lax.scan(step, carry, jax.random.split(jax.random.key(1), STEPS))
    return carry[0], np.asarray(history)


trained, curves = {"components, then codes": baseline}, {}
for estimator in ("rotation",) if SIZE == "tiny" else ("straight-through", "rotation"):
    trained[estimator], curves[estimator] = train(estimator)
recall = {}
for name, parameters in trained.items():
    rows = np.asarray(quantized(parameters, x)[0])
    ids = np.asarray(avq_jax.brute_force(queries, rows, k=10).ids)
    recall[name] = avq_jax.recall_1_at_n(ids, truth, n=10)
    loss = float(avq_jax.score_aware_loss(x, rows, scaling(n)).mean())
    print(f"{name:24} score-aware loss {loss:.4f}, recall 1@10 {recall[name]:.3f} at {4 * M} bits")

figure, panel = plt.subplots(figsize=(6, 3.6), layout="constrained")
for name, curve in curves.items():
    window = max(STEPS // 50, 1)
    means = curve[: STEPS // window * window].reshape(-1, window).mean(axis=1)
    panel.plot(window * (1 + np.arange(len(means))), means, label=name)
panel.set(xlabel=f"step (means of {window})", ylabel="score-aware loss of a batch")
panel.legend()
panel.grid(alpha=0.3)
if SIZE != "tiny":
    assert min(recall["straight-through"], recall["rotation"]) > recall["components, then codes"]

# %% [markdown]
# ## A softmax over few of many classes
#
# $\log Z = \log \sum_i e^{\langle h, x_i \rangle}$ from the k best classes, which a search finds, and
# a sample of the others, weighted by how many each stands for. The bounds hold with probability
# $1 - \delta$ for each query. The sharper the softmax, the more of Z is in the best classes; but what
# is left is less even too, and a small sample of it says less. So the error of the sharper one is the
# larger until most of Z is in the classes found.

# %%
figure, panel = plt.subplots(figsize=(6, 3.6), layout="constrained")
counts = [32] if SIZE == "tiny" else [16, 64, 256, 1_024]
print(f"k best classes found and k sampled, of {n:,}; means over {len(queries[:200])} queries")
print(f"{'temperature':>11}{'k':>8}{'Z in the best':>16}{'error of Z':>17}{'within the bounds':>20}")
for temperature in (0.2,) if SIZE == "tiny" else (0.2, 0.05):
    hidden = queries[:200] / temperature
    exact = jax.nn.logsumexp(hidden @ x.T, axis=1)
    errors = []
    for k in counts:
        got = avq_jax.log_sum_exp(
            jax.random.key(3), index, hidden, k=k, num_samples=k,
            leaves_to_search=index.num_leaves, rescore=2 * k,
        )  # fmt: skip
        inside = float(((got.lower <= exact) & (exact <= got.upper)).mean())
        errors.append(float(jnp.abs(jnp.exp(got.value - exact) - 1).mean()))
        scores = avq_jax.brute_force(hidden, x, k=k).scores
        share = float(jnp.exp(jax.nn.logsumexp(scores, axis=1) - exact).mean())
        print(f"{temperature:>11}{k:>8}{share:>16.1%}{errors[-1]:>17.4f}{inside:>20.1%}")
    panel.plot(counts, errors, marker="o", label=f"temperature {temperature}")
panel.set(xscale="log", yscale="log", xlabel="classes found, and sampled", ylabel="mean relative error of Z")
panel.set_xticks(counts, [str(k) for k in counts])
panel.minorticks_off()
panel.legend()
panel.grid(alpha=0.3)
plt.show()
