"""avq_jax in the form of ann-benchmarks (github.com/erikbern/ann-benchmarks).

Copy this folder to ``ann_benchmarks/algorithms/avq_jax`` there. Outside ann-benchmarks the class
stands alone: :func:`main` runs it on a file.

    python benchmarks/ann_benchmarks/module.py --dataset glove6b-100.hdf5
"""

import sys

import numpy as np

try:
    from ..base.module import BaseANN
except ImportError:  # outside ann-benchmarks

    class BaseANN:
        """The methods that ann-benchmarks gives its algorithms."""

        def get_batch_results(self):
            return self.res

        def __str__(self):
            return self.name


METRICS = {"angular": "cosine", "euclidean": "l2", "ip": "dot"}


class AvqJax(BaseANN):
    """An index of avq_jax; query arguments are leaves searched and candidates rescored.

    >>> x = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    >>> algorithm = AvqJax("euclidean", {})
    >>> algorithm.fit(x)
    >>> algorithm.set_query_arguments(1, 100)
    >>> algorithm.query(x[3], 1).tolist()
    [3]
    >>> algorithm.batch_query(x[:2], 1)
    >>> algorithm.get_batch_results().tolist()
    [[0], [1]]
    """

    def __init__(self, metric, build):
        if metric not in METRICS:
            raise NotImplementedError(f"metric must be one of {', '.join(METRICS)}; got {metric}")
        self.metric, self.options = METRICS[metric], dict(build)
        self.index, self.effort, self.handles = None, {}, {}

    @property
    def name(self):
        """What is drawn beside a point."""
        told = {**self.options, **self.effort}
        return f"avq_jax({', '.join(f'{key}={value}' for key, value in told.items())})"

    def fit(self, x):
        """Build the index."""
        import jax

        import avq_jax

        self.index = avq_jax.build(
            jax.random.key(0), x, metric=self.metric, progress=False, **self.options
        )
        self.handles = {}

    def set_query_arguments(self, leaves_to_search, rescore):
        """Choose the effort of the queries to come."""
        self.effort = {"leaves_to_search": leaves_to_search, "rescore": rescore}
        self.handles = {}

    def _handle(self, n):
        import avq_jax

        if n not in self.handles:
            effort = dict(self.effort)
            if effort.get("rescore"):
                effort["rescore"] = max(n, effort["rescore"])
            self.handles[n] = avq_jax.searcher(self.index, k=n, **effort)
        return self.handles[n]

    def query(self, q, n):
        """Row numbers of the n nearest of one query."""
        return self._handle(n)(q).ids

    def batch_query(self, queries, n):
        """Row numbers for many queries, kept for ``get_batch_results``."""
        self.res = self._handle(n)(queries).ids

    def get_memory_usage(self):
        """Kilobytes of the index."""
        return self.index.num_bytes / 1024

    def done(self):
        """Let go of the index."""
        self.index, self.handles = None, {}


def main():
    """Recall and time of some settings on an ann-benchmarks file."""
    import time

    import h5py

    arguments = sys.argv[1:]
    if len(arguments) != 2 or arguments[0] != "--dataset":
        raise SystemExit("usage: module.py --dataset FILE.hdf5")
    with h5py.File(arguments[1]) as file:
        x, queries = file["train"][:], file["test"][:1000]
        truth, metric = file["neighbors"][:1000, :10], file.attrs.get("distance", "angular")
    algorithm = AvqJax(metric.decode() if isinstance(metric, bytes) else metric, {})
    algorithm.fit(np.asarray(x, np.float32))
    print(f"{algorithm.get_memory_usage() / 1024:.0f} MB")
    for leaves, rescore in ((10, 60), (30, 100), (60, 200)):
        algorithm.set_query_arguments(leaves, rescore)
        algorithm.query(queries[0], 10)
        begin = time.perf_counter()
        found = [algorithm.query(q, 10) for q in queries]
        seconds = (time.perf_counter() - begin) / len(queries)
        hits = sum(
            len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, truth, strict=True)
        )
        print(f"{algorithm}: recall {hits / truth.size:.4f}, {seconds * 1e6:.0f} us a query")


if __name__ == "__main__":
    main()
