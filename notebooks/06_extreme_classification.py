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
# # Extreme classification (section 7.6, Table 1)
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# Upload this notebook there; the first cell installs the package where it is missing.
#
# The last layer of a classifier with many classes is a maximum inner product search: the hidden state
# is the query, the rows of the weight matrix are the base. The paper trains an MLP on Amazon-670k
# (670,091 classes, 1,024 hidden units), a data set that is in no package.
#
# The real thing is `examples/extreme_classification.py`: a classifier of the entries of WordNet into
# more than 100,000 classes, with held-out entries, a linear baseline, and Table 1 for last layers of
# 256 and 1,024; its figures stand in the README. This notebook is the same in small, made to run in
# a minute: the classes are words, an input is a word's GloVe vector with noise, and the MLP is trained
# here. That it classifies well is no achievement. Sizes are set by bits a hidden unit, 1/4 to 2 as
# in the paper; at full size (`AVQ_DATASET` set) the layer is as wide as the paper's, so that they are
# 256 to 2,048 bits. What can be compared with the paper is the difference between the losses, not
# the recall.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("avq_jax") is None:
    source = "avq-jax[demo]"  # or a checkout, or the git+https address of one
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", source])

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import avq_jax
from avq_jax.evaluation import glove_50d

SIZE = os.environ.get("AVQ_SIZE", "small")  # "tiny" only proves that every cell runs
if SIZE == "small" and os.environ.get("AVQ_DATASET"):
    SIZE = "full"
CLASSES, HIDDEN, STEPS = {
    "tiny": (500, 32, 20), "small": (5_000, 64, 1_500), "full": (10_000, 1_024, 800)
}[SIZE]  # fmt: skip
BATCH = 128 if SIZE == "full" else 256
NOISE = 0.6  # length of the noise, in lengths of a vector

vectors = glove_50d()[1][:CLASSES]
vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
d = vectors.shape[1]

# %% [markdown]
# ## The classifier


# %%
def draw(key, labels):
    noise = jax.random.normal(key, (len(labels), d)) * NOISE / d**0.5
    return jnp.asarray(vectors)[labels] + noise


def hidden(parameters, x):
    x = jax.nn.relu(x @ parameters["first"] + parameters["bias"])
    return jax.nn.relu(x @ parameters["second"])


def loss(parameters, x, labels):
    logits = hidden(parameters, x) @ parameters["classes"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


keys = jax.random.split(jax.random.key(0), 4)
parameters = {
    "first": jax.random.normal(keys[0], (d, HIDDEN)) * (2 / d) ** 0.5,
    "bias": jnp.zeros(HIDDEN),
    "second": jax.random.normal(keys[1], (HIDDEN, HIDDEN)) * (2 / HIDDEN) ** 0.5,
    "classes": jax.random.normal(keys[2], (CLASSES, HIDDEN)) * HIDDEN**-0.5,
}
RATE = 2e-3 if SIZE == "full" else 1e-2
optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))


@jax.jit
def step(carry, key):
    parameters, state = carry
    labels = jax.random.randint(key, (BATCH,), 0, CLASSES)
    value, gradient = jax.value_and_grad(loss)(parameters, draw(key, labels), labels)
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(parameters, updates), state), value


carry, values = (parameters, optimizer.init(parameters)), []
begin = time.perf_counter()
for key in jax.random.split(keys[3], STEPS):
    carry, value = step(carry, key)
    values.append(float(value))
parameters = carry[0]
labels = jax.random.randint(jax.random.key(1), (20 if SIZE == "tiny" else 1_000,), 0, CLASSES)
queries = np.asarray(hidden(parameters, draw(jax.random.key(2), labels)))
rows = np.asarray(parameters["classes"])
truth = np.asarray(avq_jax.brute_force(queries, rows, k=100).ids)
print(f"loss {values[0]:.2f} to {values[-1]:.2f} in {STEPS} steps, "
      f"{time.perf_counter() - begin:.0f} s; of new inputs {(truth[:, 0] == labels).mean():.1%} "
      f"are classified right among {CLASSES:,}")  # fmt: skip

# %% [markdown]
# ## Table 1
#
# The base is not normalised: each row's own norm enters its $h_\parallel$ and $h_\perp$. Hidden
# states of a ReLU network are all positive, far from the even spread over the sphere that Theorem
# 3.2 assumes, so two thresholds are tried: the default of the package and half of it.

# %%
norms = np.linalg.norm(rows, axis=1)
T = avq_jax.default_threshold(norms, dim=HIDDEN)
losses = {"PQ": None}
for share in (0.5,) if SIZE == "tiny" else (0.5, 1.0):
    weight = avq_jax.Threshold(share * T)
    eta = float(avq_jax.eta(weight, float(np.median(norms)), dim=HIDDEN))
    losses[f"score-aware, eta {eta:.1f}"] = avq_jax.scaling(weight, norms, dim=HIDDEN)
table = {}
shares = (1.0,) if SIZE == "tiny" else (0.25, 0.5, 1.0, 2.0)
print(f"{'bits':>6} {'bits a unit':>12} {'loss':24}{'1@1':>8}{'1@10':>8}{'1@100':>8}")
for share in shares:
    m, k = int(HIDDEN * share) // 4, 16  # a code of four bits for 16 to 2 units
    for name, scaling in losses.items():
        state, _ = avq_jax.fit(
            jax.random.key(0), rows, scaling, num_subspaces=m, num_codewords=k,
            num_iterations=2 if SIZE == "tiny" else 8, progress=False,
        )  # fmt: skip
        decoded = avq_jax.decode(state.codebook, avq_jax.encode(state.codebook, rows, scaling))
        ids = np.asarray(avq_jax.brute_force(queries, decoded, k=100).ids)
        result = [avq_jax.recall_1_at_n(ids, truth, n=n) for n in (1, 10, 100)]
        table[share, name] = result
        print(f"{m * np.log2(k):>6.0f} {share:>12} {name:24}" + "".join(f"{r:8.3f}" for r in result))

# %%
figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
for name in losses:
    axes.plot(shares, [table[share, name][0] for share in shares], marker="o", label=name)
axes.set(xscale="log", xlabel="bits a hidden unit", ylabel="recall 1@1", title=f"{CLASSES:,} classes")
axes.set_xticks(shares, [f"{s:g}\n{int(HIDDEN * s)} bits" for s in shares])
axes.minorticks_off()
axes.legend()
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# When this was written, half of the default threshold gained one to five points of recall 1@1 at
# each size of the full run. The default one lost three at 512 bits and was as good as the other from
# 1,024 bits on; at 256 bits, where little is found at all, recall 1@100 fell under both. So in this
# task as in the paper's the loss gains, and here too it is the larger codes that gain under any T.
#
# The paper's Table 1 (Amazon-670k, 670,091 classes, 1,024 hidden units):
#
# | bits | bits a unit | loss | 1@1 | 1@10 | 1@100 |
# |---|---|---|---|---|---|
# | 256 | 1/4 | PQ | .652 | .995 | .999 |
# | 256 | 1/4 | score-aware | .656 | .996 | 1.000 |
# | 512 | 1/2 | PQ | .737 | .998 | 1.000 |
# | 512 | 1/2 | score-aware | .744 | .997 | 1.000 |
# | 1024 | 1 | PQ | .778 | 1.000 | 1.000 |
# | 1024 | 1 | score-aware | .812 | 1.000 | 1.000 |
# | 2048 | 2 | PQ | .782 | 1.000 | 1.000 |
# | 2048 | 2 | score-aware | .875 | 1.000 | 1.000 |
