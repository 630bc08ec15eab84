"""Anisotropic vector quantization and maximum inner product search in JAX.

An implementation of "Accelerating Large-Scale Inference with Anisotropic Vector Quantization"
(Guo et al., 2020): the score-aware loss of section 3 in :mod:`avq_jax.loss`, codebooks learned
under it in :mod:`avq_jax.quantization`, and the search engine in :mod:`avq_jax.mips`.
"""

from importlib.metadata import PackageNotFoundError, version

from avq_jax.evaluation import (
    recall_1_at_n,
    recall_k_at_k,
    relative_error,
)
from avq_jax.layers import (
    EmaState,
    Quantized,
    ema_init,
    ema_update,
    quantize,
    revive,
    soft_quantize,
)
from avq_jax.loss import (
    Exponential,
    Power,
    QueryTerms,
    Scaling,
    Threshold,
    Uniform,
    eta,
    eta_limit,
    residuals,
    scaling,
    score_aware_loss,
)
from avq_jax.mips import (
    Index,
    IndexFormatError,
    SearchResult,
    brute_force,
    build,
    default_threshold,
    load,
    save,
    search,
    searcher,
    tune,
    user_ids,
)
from avq_jax.quantization import (
    BinaryCodec,
    Codebook,
    Codes,
    History,
    LloydState,
    decode,
    encode,
    fit,
    fit_binary,
    fit_sgd,
    lloyd_init,
    lloyd_update,
    lookup_table,
)

try:
    __version__ = version("avq-jax")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "BinaryCodec",
    "Codebook",
    "Codes",
    "EmaState",
    "Exponential",
    "History",
    "Index",
    "IndexFormatError",
    "LloydState",
    "Power",
    "Quantized",
    "QueryTerms",
    "Scaling",
    "SearchResult",
    "Threshold",
    "Uniform",
    "brute_force",
    "build",
    "decode",
    "default_threshold",
    "ema_init",
    "ema_update",
    "encode",
    "eta",
    "eta_limit",
    "fit",
    "fit_binary",
    "fit_sgd",
    "lloyd_init",
    "lloyd_update",
    "load",
    "lookup_table",
    "quantize",
    "recall_1_at_n",
    "recall_k_at_k",
    "relative_error",
    "residuals",
    "revive",
    "save",
    "scaling",
    "score_aware_loss",
    "search",
    "searcher",
    "soft_quantize",
    "tune",
    "user_ids",
]
