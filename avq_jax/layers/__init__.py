"""Quantization and search inside a model: gradients, moving averages, softmax, memory."""

from avq_jax.layers.ema import EmaState, ema_init, ema_update, revive
from avq_jax.layers.quantize import Quantized, quantize, soft_quantize

__all__ = [
    "EmaState",
    "Quantized",
    "ema_init",
    "ema_update",
    "quantize",
    "revive",
    "soft_quantize",
]
