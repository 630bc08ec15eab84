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
# # Export and serve
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
# Upload this notebook there; the first cell installs the package where it is missing.
#
# From an index to a service: files, an exported program that needs jax and flatbuffers alone, a model
# before the search, and changes while it runs.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("avq_jax") is None:
    source = "avq-jax[demo]"  # or a checkout, or the git+https address of one
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", source])

# %%
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import avq_jax
from avq_jax.evaluation import glove_50d, split_queries
from avq_jax.serving import export, load_exported

SIZE = os.environ.get("AVQ_SIZE", "small")  # "tiny" only proves that every cell runs
ROWS, QUERIES = {"tiny": (500, 20), "small": (50_000, 1_000)}[SIZE]
if os.environ.get("AVQ_DATASET"):
    ROWS = 399_000  # all words: the full size

words, vectors = glove_50d()
picked, held = split_queries(0, np.arange(ROWS + QUERIES)[:, None], QUERIES)
picked, held = picked[:, 0], held[:, 0]
x, queries = vectors[picked], vectors[held]
n, d = x.shape
truth = np.asarray(avq_jax.brute_force(queries, x, k=10, metric="cosine").ids)
print(f"GloVe 6B, 50 dimensions: {n:,} words, {len(queries):,} held-out words as queries")

# %% [markdown]
# ## Build, save, load
#
# The ids are the words' places in the list of all words. Arrays are stored under names with their
# hash, the header last: a save that is interrupted leaves the old index whole. Nothing is pickled.

# %%
index = avq_jax.build(
    jax.random.key(0), x, metric="cosine", ids=picked.astype(np.int64),
    num_leaves=round(n**0.5), num_subspaces=d // 2, progress=False,
)  # fmt: skip
folder = pathlib.Path(tempfile.mkdtemp())
avq_jax.save(index, folder / "words.avq")
index = avq_jax.load(folder / "words.avq")
print(index)

# %% [markdown]
# ## How hard to search
#
# `tune` chooses the cheapest settings for a recall on half of the queries and tells the recall on
# the other half.

# %%
if SIZE == "tiny":
    print("skipped at this size: tuning")
    settings = {"leaves_to_search": 20, "rescore": 50}
else:
    tuned = avq_jax.tune(index, queries, k=10, target_recall=0.9, true_ids=truth, progress=False)
    settings = {
        "leaves_to_search": tuned.leaves_to_search,
        "rescore": tuned.rescore,
        "adaptive": tuned.adaptive,
    }
    low, high = tuned.interval
    print(f"recall {tuned.recall:.3f} (95 % from {low:.3f} to {high:.3f}), "
          f"{1e6 * tuned.seconds:.0f} us a query")  # fmt: skip
print(settings)

# %% [markdown]
# ## In Python: a handle
#
# NumPy in and out, compiled once for each batch size; it may be called from many threads.

# %%
find = avq_jax.searcher(index, k=10, **settings)
found = find(queries)
print(f"recall 10@10 {avq_jax.recall_k_at_k(found.ids, truth, k=10):.3f}")
for row in range(3):
    near = words[avq_jax.user_ids(index, found.ids[row])]
    print(f"{words[held[row]]}: {', '.join(near[:6])}")

# %%
sizes = [4] if SIZE == "tiny" else [1, 4, 16, 64, 256]
rounds = 2 if SIZE == "tiny" else 30
times = []
for size in sizes:
    find(queries[:size])  # compiled here, not in the first request
    taken = []
    for start in range(rounds):
        batch = queries[(start * size) % (QUERIES - size) :][:size]
        begin = time.perf_counter()
        find(batch)
        taken.append((time.perf_counter() - begin) / size)
    times.append(1e6 * np.median(taken))
    print(f"batches of {size}: {times[-1]:.0f} us a query")
figure, axes = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
axes.plot(sizes, times, marker="o")
axes.set(xscale="log", xlabel="queries at once", ylabel="microseconds a query", ylim=(0, None))
axes.set_xticks(sizes, [str(size) for size in sizes])
axes.minorticks_off()
axes.grid(alpha=0.3)

# %% [markdown]
# ## As a program, with a model before the search
#
# The export holds a StableHLO program, its arrays and a loader. Here the model, one small layer, becomes
# part of it: the service takes its inputs. A program runs on the platforms it was exported for.


# %%
def encoder(parameters, inputs):
    return jnp.tanh(inputs @ parameters["weight"])


parameters = {"weight": jnp.eye(d) * 0.1}
export(
    index, folder / "service", k=10, encoder=encoder, params=parameters,
    inputs=jax.ShapeDtypeStruct((1, d), jnp.float32), platforms=("cpu",), **settings,
)  # fmt: skip
service = load_exported(folder / "service")
answer = service(queries[:4])
expected = avq_jax.search(index, encoder(parameters, queries[:4]), k=10, **settings)
assert (answer.ids == np.asarray(expected.ids)).mean() > 0.95  # the program is plain XLA
print(f"{words[held[0]]}: {', '.join(words[service.user_ids(answer.ids[0])][:6])}")
print("files:", ", ".join(sorted(p.name.split("-")[0] for p in (folder / "service").iterdir())))

# %% [markdown]
# A process without this package loads it by the `standalone.py` that lies beside the program.

# %%
if SIZE == "tiny":
    print("skipped at this size: another process")
else:
    code = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
from standalone import load_exported
print(load_exported(sys.argv[1])(np.load(sys.argv[2])).ids[0].tolist())
assert not any(name.startswith(("avq_jax", "xla_kernels")) for name in sys.modules)
"""
    np.save(folder / "queries.npy", queries[:4])
    command = [sys.executable, "-c", code, str(folder / "service"), str(folder / "queries.npy")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout
    assert out.strip() == str(answer.ids[0].tolist())
    print("another process:", out.strip())

# %% [markdown]
# ## Changes while it runs
#
# An index is a value: `add` and `remove` give another one, searches that are under way go on with
# the old. `reserve` makes room once; after that nothing is compiled again.

# %%
index = avq_jax.reserve(index, capacity=n + 1_000)
index, rows = avq_jax.add(index, queries[:100], ids=held[:100].astype(np.int64))
again = avq_jax.search(index, queries[:100], k=1, leaves_to_search=index.num_leaves, rescore=50)
print(f"added words found: {np.mean(avq_jax.user_ids(index, again.ids)[:, 0] == held[:100]):.0%}")
index = avq_jax.remove(index, rows)
again = avq_jax.search(index, queries[:100], k=1, leaves_to_search=index.num_leaves, rescore=50)
assert not np.isin(avq_jax.user_ids(index, again.ids), held[:100]).any()
print("removed words are found no more")
plt.show()
