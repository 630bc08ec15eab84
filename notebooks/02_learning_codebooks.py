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
# # Learning codebooks (section 4)
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# Upload this notebook there; the first cell installs the package where it is missing.
#
# A codebook is learned by alternating two steps, like k-means: assign each row to the codeword of
# least score-aware loss, then move the codewords to the minimum of that loss (Theorem 4.2 for
# vector quantization, the joint system of section 7.5 for product quantization). Neither step can
# raise the loss. This notebook watches both algorithms of the package, Lloyd's and stochastic
# gradients, and shows why two shortcuts that are often taken are not the paper's method.

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

import avq_jax
from avq_jax.evaluation import glove_50d, read_hdf5, split_queries

SIZE = os.environ.get("AVQ_SIZE", "small")  # "tiny" only proves that every cell runs
FILE = os.environ.get("AVQ_DATASET", "").split(os.pathsep)[0]  # an ann-benchmarks HDF5 file
ROWS, QUERIES = {"tiny": (500, 20), "small": (10_000, 1_000)}[SIZE]
ITERATIONS = 2 if SIZE == "tiny" else 20
LEARNED = 100_000  # rows that codebooks are learned on, at most


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


if FILE:
    data = read_hdf5(FILE)
    name, x, queries = data.name, unit(data.train), unit(data.test)
else:
    name = "GloVe 6B, 50 dimensions, the most frequent words"
    x, queries = split_queries(0, unit(glove_50d()[1][: ROWS + QUERIES]), QUERIES)
n, d = x.shape
truth = np.asarray(avq_jax.brute_force(queries, x, k=100).ids)
sample = x[np.sort(np.random.default_rng(0).permutation(n)[:LEARNED])]
print(f"{name}: {n:,} unit rows of {d} dimensions, {len(queries):,} held-out queries; "
      f"codebooks are learned on {len(sample):,} of the rows")  # fmt: skip

# %% [markdown]
# ## The loss
#
# All rows have norm 1, so one $\eta$ serves all of them. `default_threshold` keeps it near 6 in
# every dimension (its limit, Eq. 3, near 4).

# %%
T = avq_jax.default_threshold(np.ones(n), dim=d)
weight = avq_jax.Threshold(T)
whole = avq_jax.scaling(weight, np.ones(n, np.float32), dim=d)
aware = avq_jax.scaling(weight, np.ones(len(sample), np.float32), dim=d)
print(f"T = {float(T):.3f}, eta = {float(avq_jax.eta(weight, 1.0, dim=d)):.2f}")

# %% [markdown]
# ## Vector quantization: one codebook for the whole row
#
# `num_subspaces=1`. `History` has the loss after every iteration, and the share of codewords that
# some row uses: codewords that die are put on the rows that are served worst.

# %%
K = 16 if SIZE == "tiny" else 64
curves, used = {}, {}
for label, scaling in {"reconstruction": None, "score-aware": aware}.items():
    state, history = avq_jax.fit(
        jax.random.key(0), sample, scaling, num_subspaces=1, num_codewords=K, init="random",
        num_iterations=ITERATIONS, progress=False,
    )  # fmt: skip
    curves[label] = history
    used[label] = counts = np.bincount(np.asarray(state.codes)[:, 0], minlength=K)
    # The mean of a cluster is shorter than its rows, an error along each of them. Codewords of the
    # score-aware loss are longer, so that <x~, x> comes near <x, x> for rows at an angle to them.
    length = float(jnp.linalg.norm(state.codebook.codewords[0], axis=1).mean())
    print(f"{label}: codewords used {history.usage[-1]:.0%}, rows a codeword {counts.min()} to "
          f"{counts.max()}, mean length of a codeword {length:.3f}")  # fmt: skip

figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for label, history in curves.items():
    axes[0].plot(1 + np.arange(len(history.loss)), history.loss / history.loss[0], label=label)
axes[0].set(xlabel="iteration", ylabel="loss / loss after the first", title=f"VQ, {K} codewords")
axes[0].legend()
axes[0].xaxis.get_major_locator().set_params(integer=True)
for label, counts in used.items():
    axes[1].step(1 + np.arange(K), np.sort(counts)[::-1], where="mid", label=label)
axes[1].set(xlabel="codeword, by use", ylabel="rows", ylim=(0, None), title="Rows of each codeword")
axes[1].yaxis.set_major_formatter("{x:,.0f}")
for label, history in curves.items():
    assert (np.diff(history.loss) <= 0).all(), label

# %% [markdown]
# ## Product quantization: Lloyd's algorithm and stochastic gradients
#
# Subspaces of five columns with eight codewords each. One iteration of Lloyd's algorithm reads
# every row once, so both are drawn over passes through the data. The loss is that of all rows
# learned on, assigned anew.
#
# The joint system of the codebook step is that of section 7.5, but for a slip there: on its right
# hand side $B_i x_i$ must be $B_i^T x_i$, the row sorted into the places of its codewords.

# %%
M, K = d // 5, 8
begin = time.perf_counter()
lloyd_state, lloyd = avq_jax.fit(
    jax.random.key(0), sample, aware, num_subspaces=M, num_codewords=K, init="k-means++",
    num_iterations=ITERATIONS, progress=False,
)  # fmt: skip
seconds = [time.perf_counter() - begin]
batch, every = 256, max(len(sample) // 256, 1)
seen = []
final, _ = avq_jax.fit_sgd(
    jax.random.key(0), sample, aware, num_subspaces=M, num_codewords=K, batch_size=batch,
    num_steps=(2 if SIZE == "tiny" else 20) * every, log_every=every, progress=False,
    callback=lambda state: seen.append(float(state.loss)),
)  # fmt: skip
seconds.append(time.perf_counter() - begin - seconds[0])

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(1 + np.arange(len(lloyd.loss)), lloyd.loss, marker=".", label="Lloyd")
axes.plot((1 + np.arange(len(seen))) * every * batch / len(sample), seen, marker=".", label="SGD (Adam)")
axes.set(xlabel="passes over the rows", ylabel=r"mean loss of a row ($h_\perp = 1$)")
axes.set_title(f"PQ {M} x {K}")
axes.xaxis.get_major_locator().set_params(integer=True)
axes.legend()
axes.grid(alpha=0.3)
print(f"Lloyd: final loss {lloyd.loss[-1]:.4f} in {seconds[0]:.1f} s; SGD: {float(final.loss):.4f} in "
      f"{seconds[1]:.1f} s, compilation included")  # fmt: skip

# %% [markdown]
# ## From a row to a score
#
# `encode` gives a row's codeword in each subspace, `decode` what the codes stand for. A query is
# multiplied with all codewords once, `lookup_table`; then the score of any row is a sum of M entries
# of the table, which is the inner product with the decoded row.

# %%
book = lloyd_state.codebook
codes = avq_jax.encode(book, x[:3], jax.tree.map(lambda leaf: leaf[:3], whole))
table = np.asarray(avq_jax.lookup_table(book, queries[0]))
print(f"codebook {book.codewords.shape}, table of a query {table.shape}")
print(f"a row: {x[0].nbytes} bytes; its codes, {M} x {np.log2(K):.0f} bits: {np.asarray(codes.codes[0])}")
for row, decoded in enumerate(np.asarray(avq_jax.decode(book, codes))):
    looked_up = table[np.arange(M), np.asarray(codes.codes[row])].sum()
    print(f"row {row}: score {queries[0] @ x[row]:+.4f}, from its codes {looked_up:+.4f}")
    assert abs(looked_up - queries[0] @ decoded) < 1e-5

# %% [markdown]
# ## What the loss is, and what it is not
#
# The loss of a row couples all its subspaces through one number, $\langle r, x \rangle$: an error
# along x in one subspace can be undone in another. Two shortcuts leave this out:
#
# - *a loss in each subspace*, of the part of x that lies there: codebooks are learned for m small
#   problems that no query ever asks, and end at a higher loss of the whole row. Encoded under the loss
#   of the whole row they find about as much at the sizes tried here;
# - *Euclidean encoding*, the nearest codeword of each subspace, whatever loss the codebooks were
#   learned under. It costs more: recall falls for every codebook.
#
# Below are all combinations at the same size, scored exhaustively from the codes alone.

# %%
sizes = dict(num_subspaces=M, num_codewords=K, num_iterations=ITERATIONS, progress=False)


def apart(key):
    """Codebooks of M separate problems, each with the same eta along its own part of x."""
    words = []
    for j, part in enumerate(np.split(sample[:, : M * (d // M)], M, axis=1)):
        state, _ = avq_jax.fit(
            jax.random.fold_in(key, j), part, aware, num_subspaces=1, num_codewords=K,
            num_iterations=ITERATIONS, progress=False,
        )  # fmt: skip
        words.append(state.codebook.codewords[0])
    return avq_jax.Codebook(jnp.stack(words), dim=d)


key = jax.random.key(1)
plain, _ = avq_jax.fit(key, sample, None, **sizes)
joint, _ = avq_jax.fit(key, sample, aware, **sizes)
books = {"reconstruction": plain.codebook, "joint, section 7.5": joint.codebook}
if SIZE == "tiny":
    print("skipped at this size: each subspace apart")
elif d % M == 0:
    books["each subspace apart"] = apart(key)
else:
    print(f"skipped: {d} columns do not split into {M} equal parts")

found, losses = {}, {}
print(f"{'codebooks':22}{'encoding':14}{'1@1':>8}{'1@10':>8}{'10@10':>8}{'loss':>9}")
for learned, book in books.items():
    for encoding, scaling in {"Euclidean": None, "score-aware": whole}.items():
        codes = avq_jax.encode(book, x, scaling)
        rows = avq_jax.decode(book, codes)
        ids = np.asarray(avq_jax.brute_force(queries, rows, k=10).ids)
        loss = float(avq_jax.score_aware_loss(x, rows, whole).mean())
        r1 = avq_jax.recall_1_at_n(ids, truth, n=1)
        r10 = avq_jax.recall_1_at_n(ids, truth, n=10)
        kk = avq_jax.recall_k_at_k(ids, truth, k=10)
        found[learned, encoding], losses[learned, encoding] = r10, loss
        print(f"{learned:22}{encoding:14}{r1:8.3f}{r10:8.3f}{kk:8.3f}{loss:9.4f}")

# %%
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for shift, encoding in ((-0.2, "Euclidean"), (0.2, "score-aware")):
    values = [found[learned, encoding] for learned in books]
    bars = axes.bar(np.arange(len(books)) + shift, values, 0.38, label=f"{encoding} encoding")
    axes.bar_label(bars, fmt="%.3f", fontsize=8)
axes.set(ylabel="recall 1@10", title=f"{M} codes of {np.log2(K):.0f} bits, no rescoring")
axes.set_xticks(np.arange(len(books)), books)
axes.margins(y=0.25)
axes.legend(loc="upper left", ncols=2)
if SIZE != "tiny":
    for learned in books:
        assert found[learned, "score-aware"] > found[learned, "Euclidean"]
    assert min(losses, key=losses.get) == ("joint, section 7.5", "score-aware")
plt.show()
