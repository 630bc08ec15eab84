"""Quantization and search inside a model: gradients, moving averages, softmax, memory."""

from avq_jax.layers.ema import EmaState, ema_init, ema_update, revive
from avq_jax.layers.implicit import solve_codebook
from avq_jax.layers.memory import memory_read, top_k_attention
from avq_jax.layers.quantize import Quantized, quantize, soft_quantize
from avq_jax.layers.refresh import refresh
from avq_jax.layers.sampling import SoftmaxSample, sample_softmax
from avq_jax.layers.softmax import (
    LogSumExp,
    SoftmaxClasses,
    log_sum_exp,
    softmax_classes,
    softmax_cross_entropy,
)
from avq_jax.layers.sparse import SparseRows, coalesce, gather_rows, sparse_update

__all__ = [
    "EmaState",
    "LogSumExp",
    "Quantized",
    "SoftmaxClasses",
    "SoftmaxSample",
    "SparseRows",
    "coalesce",
    "ema_init",
    "ema_update",
    "gather_rows",
    "log_sum_exp",
    "memory_read",
    "quantize",
    "refresh",
    "revive",
    "sample_softmax",
    "soft_quantize",
    "softmax_classes",
    "softmax_cross_entropy",
    "solve_codebook",
    "sparse_update",
    "top_k_attention",
]
