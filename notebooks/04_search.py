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
# # Searching a tree of codes (sections 2 and 5.3)
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# Upload this notebook there; the first cell installs the package where it is missing.
#
# A search in three steps, as in the authors' talk: a k-means tree skips all rows but those of a few
# leaves, the codes of these are scored by table look-ups, and the best few are scored again exactly.
# The number of leaves and of rescored rows trade time for recall. This notebook shows where recall is
# lost, and draws Figure 4b, recall 10@10 against speed, beside the peers that are installed.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("avq_jax") is None:
    source = "avq-jax[demo]"  # or a checkout, or the git+https address of one
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", source])

# %%
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread for every side

import contextlib
import time

import jax
import matplotlib.pyplot as plt
import numpy as np

import avq_jax
from avq_jax.evaluation import glove_50d, read_hdf5, split_queries

SIZE = os.environ.get("AVQ_SIZE", "small")  # "tiny" only proves that every cell runs
FILE = os.environ.get("AVQ_DATASET", "").split(os.pathsep)[0]  # an ann-benchmarks HDF5 file
ROWS, QUERIES = {"tiny": (500, 20), "small": (20_000, 1_000)}[SIZE]


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
print(f"{name}: {n:,} unit rows of {d} dimensions, {len(queries):,} held-out queries")

# %% [markdown]
# ## Building
#
# The talk parts 1.2 million rows into 2,000 leaves, and so does this notebook at full size. For fewer
# rows it takes about the square root of their number, as `build` does by default. What a leaf's
# centroid leaves over is quantized under the score-aware loss, along the direction of the original
# row.

# %%
LEAVES = 2_000 if n > 200_000 else round(n**0.5)
M = max(m for m in range(1, d // 2 + 1) if d % m == 0)
begin = time.process_time()
index = avq_jax.build(
    jax.random.key(0), x, metric="cosine", num_leaves=LEAVES, num_subspaces=M, progress=False
)
print(f"{index}, built in {time.process_time() - begin:.1f} CPU s")
print(index.bytes_per_row)

# %% [markdown]
# ## Where recall is lost
#
# With all leaves and without rescoring only the codes lose. Rescoring repairs their order. What is
# left at few leaves are true neighbours in leaves that were not looked at; no rescoring finds them.

# %%
probes = [p for p in (1, 2, 4, 8, 16, 32, 64, 128, 256) if p < LEAVES] + [LEAVES]
if SIZE == "tiny":
    probes = [2, LEAVES]
rescored = [0, 20] if SIZE == "tiny" else [0, 20, 50, 100]
figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
recall = {}
for rescore in rescored:
    for probe in probes:
        find = avq_jax.searcher(index, k=10, leaves_to_search=probe, rescore=rescore)
        recall[rescore, probe] = avq_jax.recall_k_at_k(find(queries).ids, truth, k=10)
    label = f"rescore {rescore}" if rescore else "codes alone"
    axes.plot(probes, [recall[rescore, p] for p in probes], marker=".", label=label)

axes.set(xscale="log", xlabel="leaves searched", ylabel="recall 10@10")
axes.set_title(f"{LEAVES:,} leaves of {n:,} rows")
axes.xaxis.set_major_formatter("{x:g}")
axes.legend()
axes.grid(alpha=0.3)
assert recall[rescored[-1], LEAVES] >= recall[0, LEAVES]

# %% [markdown]
# `explain` tells for one row at which step it was lost.

# %%
find = avq_jax.searcher(index, k=10, leaves_to_search=2, rescore=20)
found = find(queries).ids
for row in range(len(queries)):
    lost = np.setdiff1d(truth[row, :10], found[row])
    if lost.size:
        print(avq_jax.explain(index, queries[row], int(lost[0]), k=10, leaves_to_search=2, rescore=20))
        break

# %% [markdown]
# ## Figure 4b: recall against speed
#
# One query after another from Python, NumPy in and out, one thread for every side where it can be
# set. Sides take turns and times are medians over rounds. A busy machine moves all curves; compare
# them only within one run. Peers that are not installed are told. Some of them take long to build:
# of a larger file 100,000 rows are taken here, and the README has fewer peers on all of them.

# %%
base = x[np.sort(np.random.default_rng(0).permutation(n)[:100_000])]
nearest = np.asarray(avq_jax.brute_force(queries, base, k=10).ids)
leaves = round(len(base) ** 0.5)


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


def ours():
    index = avq_jax.build(
        jax.random.key(0), base, metric="cosine", num_leaves=leaves, num_subspaces=M, progress=False
    )
    settings = [(1, 10), (1, 20), (2, 20), (3, 30), (5, 40), (8, 50), (14, 70), (25, 100)]
    for probe, rescore in settings[2:3] if SIZE == "tiny" else settings:
        if probe < leaves:
            yield avq_jax.searcher(index, k=10, leaves_to_search=probe, rescore=rescore)


def scann():
    import scann

    builder = scann.scann_ops_pybind.builder(base, 10, "dot_product")
    tree = builder.tree(
        num_leaves=leaves, num_leaves_to_search=10, training_sample_size=len(base), spherical=True,
        quantize_centroids=True, avq=2.5, soar_lambda=1.5, overretrieve_factor=2.0,
    )  # fmt: skip
    T = avq_jax.default_threshold(np.ones(len(base)), dim=d)
    peer = tree.score_ah(d // M, anisotropic_quantization_threshold=T).reorder(100).build()
    peer.set_num_threads(1)
    for probe, reorder in ((1, 10), (2, 20), (3, 30), (5, 40), (8, 50), (14, 70), (25, 100)):
        yield lambda q, a=probe, r=reorder: peer.search(
            q, final_num_neighbors=10, leaves_to_search=a, pre_reorder_num_neighbors=r
        )[0]


def faiss():
    import faiss

    faiss.omp_set_num_threads(1)
    codes = faiss.index_factory(d, f"IVF{leaves},PQ{M}x4fsr", faiss.METRIC_INNER_PRODUCT)
    codes.train(base)
    codes.add(base)
    peer = faiss.IndexRefineFlat(codes, faiss.swig_ptr(base))
    for probe, factor in ((1, 2), (2, 3), (4, 4), (8, 6), (16, 8), (24, 10), (40, 12)):

        def find(q, a=probe, f=factor):
            codes.nprobe, peer.k_factor = a, f
            return peer.search(q[None], 10)[1][0]

        yield find


def hnswlib():
    import hnswlib

    peer = hnswlib.Index("ip", d)
    peer.init_index(len(base), M=16, ef_construction=200)
    peer.set_num_threads(1)
    peer.add_items(base)
    for ef in (10, 20, 40, 80, 160, 320):

        def find(q, ef=ef):
            peer.set_ef(ef)
            return peer.knn_query(q, 10, num_threads=1)[0][0]

        yield find


def annoy():
    import annoy

    peer = annoy.AnnoyIndex(d, "angular")
    for row, vector in enumerate(base):
        peer.add_item(row, vector)
    peer.build(50, n_jobs=1)
    for nodes in (200, 500, 1_000, 2_000, 5_000):
        yield lambda q, s=nodes: np.array((peer.get_nns_by_vector(q, 10, s) + [-1] * 10)[:10])


def pynndescent():
    import pynndescent

    peer = pynndescent.NNDescent(base, metric="cosine", n_neighbors=30, n_jobs=1)
    peer.prepare()
    for epsilon in (0.0, 0.05, 0.1, 0.2, 0.3):
        yield lambda q, e=epsilon: peer.query(q[None], k=10, epsilon=e)[0][0]


def ngtpy():
    import tempfile

    import ngtpy

    folder = tempfile.mkdtemp()
    ngtpy.create(folder, d, distance_type="Cosine")
    peer = ngtpy.Index(folder)
    peer.batch_insert(base, num_threads=1)
    for epsilon in (0.0, 0.05, 0.1, 0.15, 0.2, 0.3):
        yield lambda q, e=epsilon: np.array([i for i, _ in peer.search(q, 10, epsilon=e)])


def nmslib():
    import nmslib

    peer = nmslib.init(method="hnsw", space="cosinesimil")
    peer.addDataPointBatch(base)
    peer.createIndex({"M": 16, "efConstruction": 200, "indexThreadQty": 1})
    for ef in (10, 20, 40, 80, 160, 320):

        def find(q, ef=ef):
            peer.setQueryTimeParams({"efSearch": ef})
            return peer.knnQuery(q, k=10)[0]

        yield find


# %%
sides = {"avq_jax": ours}
if SIZE == "tiny":
    print("skipped at this size: all peers")
else:
    for peer in (scann, faiss, hnswlib, annoy, pynndescent, ngtpy, nmslib):
        if importlib.util.find_spec(peer.__name__) is None:
            print(f"skipped: {peer.__name__} is not installed")
        else:
            sides[peer.__name__] = peer

finders, built = [], {}
for side, make in sides.items():
    begin = time.process_time()
    with quiet():
        finders += [(side, find) for find in make()]
    built[side] = time.process_time() - begin

few = queries[: 20 if SIZE == "tiny" else 300]
ROUNDS = 1 if SIZE == "tiny" else 5
times = {number: [] for number in range(len(finders))}
recalls = []
for _, find in finders:  # also compiles and warms up
    ids = np.stack([np.asarray(getattr(r, "ids", r)) for r in map(find, queries[:1_000])])
    recalls.append(avq_jax.recall_k_at_k(ids.astype(np.int64), nearest[:1_000], k=10))
for _ in range(ROUNDS):
    for number, (_, find) in enumerate(finders):
        begin = time.perf_counter()
        for q in few:
            find(q)
        times[number].append((time.perf_counter() - begin) / len(few))

# %%
figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
for side in sides:
    points = [
        (recalls[i], 1 / np.median(times[i])) for i, (owner, _) in enumerate(finders) if owner == side
    ]
    front = sorted(p for p in points if not any(o[0] > p[0] and o[1] >= p[1] for o in points))
    axes.plot(*zip(*front), marker="o", markersize=4, label=side)
    print(f"{side}, built in {built[side]:.1f} CPU s; recall 10@10 at queries a second:\n    "
          + ", ".join(f"{r:.3f} at {speed:,.0f}" for r, speed in front))  # fmt: skip
axes.set(xlabel="recall 10@10", ylabel="queries a second, one at a time", yscale="log")
axes.yaxis.set_major_formatter("{x:,.0f}")
axes.set_title(f"{len(base):,} rows, {d} dimensions")
axes.legend()
axes.grid(alpha=0.3, which="both")
plt.show()
