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
# # Recall of the codes (sections 5.1 and 5.2)
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# Upload this notebook there; the first cell installs the package where it is missing.
#
# Figures 3a, 3b and 4a: what the score-aware loss changes when everything else stays the same, and
# how its codes compare with others of equal size. The codes alone are scored, exhaustively and
# without rescoring, so only quantization is measured.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("avq_jax") is None:
    source = "avq-jax[demo]"  # or a checkout, or the git+https address of one
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", source])

# %%
import contextlib
import os

import jax
import matplotlib.pyplot as plt
import numpy as np

import avq_jax
from avq_jax.evaluation import glove_50d, read_hdf5, split_queries

SIZE = os.environ.get("AVQ_SIZE", "small")  # "tiny" only proves that every cell runs
FILE = os.environ.get("AVQ_DATASET", "").split(os.pathsep)[0]  # an ann-benchmarks HDF5 file
ROWS, QUERIES = {"tiny": (500, 20), "small": (5_000, 500)}[SIZE]
if FILE:
    # At most, of a file: even so it takes more than ten minutes on one core, most of them for Figure
    # 4a. The README's tables are on all rows.
    ROWS, QUERIES = 100_000, 2_000
ITERATIONS = {"tiny": 2, "small": 15 if FILE else 8}[SIZE]
LEARNED = 30_000  # rows that codebooks are learned on, at most


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


if FILE:
    data = read_hdf5(FILE)
    picks = np.random.default_rng(0).permutation(len(data.train))[:ROWS]
    name, x, queries = data.name, unit(data.train[np.sort(picks)]), unit(data.test[:QUERIES])
else:
    name = "GloVe 6B, 50 dimensions, the most frequent words"
    x, queries = split_queries(0, unit(glove_50d()[1][: ROWS + QUERIES]), QUERIES)
n, d = x.shape
truth = np.asarray(avq_jax.brute_force(queries, x, k=100).ids)
best = np.einsum("bd,bd->b", queries, x[truth[:, 0]])
print(f"{name}: {n:,} unit rows of {d} dimensions, {len(queries):,} held-out queries")

# %% [markdown]
# `constant(eta)` is the loss of a given $\eta$ for rows of equal norm. `learn` fits product codes
# of 16 codewords, `measure` encodes all rows and searches what the codes stand for.

# %%
sample = x[np.sort(np.random.default_rng(0).permutation(n)[:LEARNED])]


def constant(eta, rows=n):
    return avq_jax.Scaling(np.full(rows, eta, np.float32), np.ones(rows, np.float32))


def learn(m, eta):
    state, _ = avq_jax.fit(
        jax.random.key(0), sample, constant(eta, len(sample)), num_subspaces=m,
        num_iterations=ITERATIONS, progress=False,
    )  # fmt: skip
    return state.codebook


def searched(rows):
    """Recall 1@N for N = 1 to 100, and the relative error of the true best row's score."""
    ids = np.asarray(avq_jax.brute_force(queries, rows, k=100).ids)
    estimate = np.einsum("bd,bd->b", queries, np.asarray(rows)[truth[:, 0]])
    curve = np.cumsum((ids == truth[:, :1]).mean(axis=0))
    return curve, avq_jax.relative_error(estimate, best)


def measure(codec, eta):
    codes = avq_jax.encode(codec, x, constant(eta))
    return searched(avq_jax.decode(codec, codes))


# Subspaces of equal width, a code of four bits each: about one bit a column, and two.
DIVISORS = [m for m in range(1, d // 2 + 1) if d % m == 0]
LOW, HIGH = max(m for m in DIVISORS if m <= d // 4), DIVISORS[-1]
CODES = [LOW] if SIZE == "tiny" else [LOW, HIGH]

# %% [markdown]
# ## Figure 3a: recall 1@10 over the threshold T
#
# The paper learns codebooks under the reconstruction loss and encodes twice, "then" by the
# score-aware loss. Here are also codebooks learned under it (section 7.5). $\eta$ is the exact one:
# 1 at T = 0, which is the reconstruction loss, and 5.95 at T = 0.2 and d = 100, where the paper's
# limit has 4.125. At one bit a column it pays to learn the codebooks under the loss too; at two bits
# encoding under it has nearly all of the gain, or more.

# %%
grid = [0.1, 0.3] if SIZE == "tiny" else [0.0, 0.1, 0.2, 0.3, 0.4]
etas = [float(avq_jax.eta(avq_jax.Threshold(T), 1.0, dim=d)) for T in grid]
plain = {m: learn(m, 1.0) for m in CODES}
figure, axes = plt.subplots(
    1, len(CODES), figsize=(5 * len(CODES), 3.8), layout="constrained", squeeze=False
)
at_best = {}
for m, panel in zip(CODES, axes[0], strict=True):
    base = measure(plain[m], 1.0)[0][9]
    encoded = [measure(plain[m], eta)[0][9] for eta in etas]
    # T = 0 is the reconstruction loss itself.
    joint = [base if T == 0 else measure(learn(m, eta), eta)[0][9] for T, eta in zip(grid, etas)]
    at_best[m] = (base, max(encoded), max(joint))
    panel.axhline(base, color="gray", linestyle="--", label="reconstruction loss")
    panel.plot(grid, encoded, marker="o", label="score-aware encoding")
    panel.plot(grid, joint, marker="s", label="score-aware codebooks and encoding")
    panel.set(xlabel="T", ylabel="recall 1@10", title=f"{4 * m} bits, d = {d}")
    panel.grid(alpha=0.3)
    print(f"{4 * m} bits, recall 1@10; reconstruction loss {base:.3f}")
    print("T".rjust(8) + "eta".rjust(8) + "encoding".rjust(12) + "and codebooks".rjust(16))
    for T, eta, first, second in zip(grid, etas, encoded, joint, strict=True):
        print(f"{T:8.2f}{eta:8.2f}{first:12.3f}{second:16.3f}")
axes[0, -1].legend(loc="center right", fontsize=8)
if SIZE != "tiny":
    assert all(joint > base for base, _, joint in at_best.values())

# %% [markdown]
# ## Figure 3b: relative error of the best score
#
# $|\langle q, x \rangle - \langle q, \tilde x \rangle| / |\langle q, x \rangle|$ for the true best
# row of each query, over the size of the codes. A threshold of $T = 2 / \sqrt{d + 3}$ is the
# default of the package: its $\eta$ is about the same in every dimension.

# %%
T = avq_jax.default_threshold(np.ones(n), dim=d)
ETA = float(avq_jax.eta(avq_jax.Threshold(T), 1.0, dim=d))
sizes = CODES if SIZE == "tiny" else DIVISORS[-4:]
aware = {m: learn(m, ETA) for m in sizes}
plain |= {m: learn(m, 1.0) for m in sizes if m not in plain}
error = {
    "reconstruction loss": [measure(plain[m], 1.0)[1] for m in sizes],
    "score-aware loss": [measure(aware[m], ETA)[1] for m in sizes],
}
figure, axes = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
for label, values in error.items():
    axes.plot([4 * m for m in sizes], values, marker="o", label=label)
    print(f"{label}: " + ", ".join(f"{4 * m} bits {e:.4f}" for m, e in zip(sizes, values)))
axes.set(xlabel="bits a row", ylabel="relative error", ylim=(0, None), title=f"T = {T:.3f}")
axes.legend()
axes.grid(alpha=0.3)
if SIZE != "tiny":
    assert all(a < b for a, b in zip(error["score-aware loss"], error["reconstruction loss"]))

# %% [markdown]
# ## Figure 4a: recall 1@N against other codes of equal size
#
# The paper compares with LSQ and three variants of QUIPS. FAISS has LSQ, PQ and OPQ; of QUIPS no
# package is known, so it is this one's (`fit_quips`), with rows of the base as its sample queries:
# a test query is never a sample. ScaNN (the paper's own library) runs without its tree and without
# reordering; it rounds its tables to 8 bits. LSQ learns on fewer rows than the others, in 10
# iterations of its 25, and searches half as long for codes as it would by default: it is by far the
# slowest.
# Additive codes under the score-aware loss are this package's strongest at a given size; "+ scale"
# spends four bits a row more on a scale.


# %%
@contextlib.contextmanager
def quiet():
    """Libraries written in C++ report progress to the descriptor, past Python."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def peers(m):
    """Decoded rows of FAISS codecs, and ids of ScaNN, of 4 m bits; what is missing is told."""
    if SIZE == "tiny":
        print("skipped at this size: FAISS and ScaNN")
        return
    try:
        import faiss
    except ImportError:
        print("skipped: faiss is not installed")
    else:
        for label, factory in {"PQ": f"PQ{m}x4", "OPQ": f"OPQ{m},PQ{m}x4"}.items():
            index = faiss.index_factory(d, factory, faiss.METRIC_INNER_PRODUCT)
            index.train(sample)
            yield f"FAISS {label}", index.sa_decode(index.sa_encode(x))
        lsq = faiss.LocalSearchQuantizer(d, m, 4)
        lsq.encode_ils_iters, lsq.train_iters = 8, 10
        lsq.train(sample[: max(2_000, n // 10)])
        yield "FAISS LSQ", lsq.decode(lsq.compute_codes(x))
    try:
        import scann
    except ImportError:
        print("skipped: scann is not installed")
        return
    ah = scann.scann_ops_pybind.builder(x, 100, "dot_product").score_ah(
        d // m, anisotropic_quantization_threshold=T, hash_type="lut16"
    )
    yield "ScaNN AH", np.asarray(ah.build().search_batched(queries)[0], np.int64)


def ours(m):
    yield "PQ, reconstruction", plain[m], 1.0
    yield "PQ, score-aware", aware[m], ETA
    for variant in ("cov_x",) if SIZE == "tiny" else ("cov_x", "cov_q", "opt"):
        codec, _ = avq_jax.fit_quips(
            jax.random.key(0), sample, num_subspaces=m, variant=variant, progress=False,
            queries=None if variant == "cov_x" else x[-2_000:],
            num_iterations=2 if SIZE == "tiny" else 10,
        )  # fmt: skip
        yield f"QUIPS {variant}", codec, 1.0
    if SIZE == "tiny":
        print("skipped at this size: additive codes")
        return
    codec, _ = avq_jax.fit_additive(
        jax.random.key(0), sample, constant(ETA, len(sample)), num_codebooks=m,
        num_iterations=6 if FILE else 3, progress=False,
    )  # fmt: skip
    yield "additive, score-aware", codec, ETA
    yield "additive + scale", avq_jax.fit_scale(codec, sample, constant(ETA, len(sample))), ETA


COLORS = [*plt.get_cmap("tab10").colors, "black"]
figure, axes = plt.subplots(
    1, len(CODES), figsize=(5 * len(CODES) + 1.5, 4.2), layout="constrained", squeeze=False
)
for m, panel in zip(CODES, axes[0], strict=True):
    curves = {label: measure(codec, eta)[0] for label, codec, eta in ours(m)}
    with quiet():
        others = list(peers(m))
    for label, result in others:
        if result.dtype == np.int64:  # ids, scored by ScaNN itself
            curves[label] = np.cumsum((result == truth[:, :1]).mean(axis=0))
        else:
            curves[label] = searched(result)[0]
    print(f"{4 * m} bits".ljust(24) + "".join(f"{'1@' + str(k):>8}" for k in (1, 10, 100)))
    for label, curve in curves.items():
        print(label.ljust(24) + "".join(f"{curve[k - 1]:8.3f}" for k in (1, 10, 100)))
        dashed = label.startswith(("FAISS", "ScaNN", "QUIPS"))
        color = COLORS[list(curves).index(label) % len(COLORS)]
        panel.plot(np.arange(1, 101), curve, "--" if dashed else "-", color=color, label=label)
    panel.set(xscale="log", xlabel="N", ylabel="recall 1@N", title=f"{4 * m} bits, d = {d}")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.grid(alpha=0.3, which="both")
figure.legend(*panel.get_legend_handles_labels(), loc="outside right center", fontsize=8);

# %% [markdown]
# ## Weight functions
#
# Which w(t) matters little once its $\eta$ is right: only the ratio enters the loss of rows of
# equal norm. `Power(p)` reaches any $\eta$ as p + 1, in every dimension.

# %%
families = {
    "Threshold(T)": [avq_jax.Threshold(T) for T in ([0.2] if SIZE == "tiny" else [0.1, 0.2, 0.3, 0.4])],
    "Power(p)": [avq_jax.Power(p) for p in ([4.0] if SIZE == "tiny" else [0.0, 2.0, 4.0, 8.0, 16.0])],
    "Exponential(b)": [
        avq_jax.Exponential(b) for b in ([10.0] if SIZE == "tiny" else [5.0, 10.0, 20.0, 40.0])
    ],
}  # fmt: skip
figure, axes = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
for label, members in families.items():
    ratios = [float(avq_jax.eta(w, 1.0, dim=d)) for w in members]
    found = [measure(plain[CODES[-1]], r)[0][9] for r in ratios]
    axes.plot(ratios, found, marker="o", label=label)
axes.set(xscale="log", xlabel="eta", ylabel="recall 1@10")
axes.set_title(f"score-aware encoding, {4 * CODES[-1]} bits")
axes.xaxis.set_major_formatter("{x:g}")
axes.legend()
axes.grid(alpha=0.3, which="both")
plt.show()
