"""Section 4 of the paper: codebooks learned under the score-aware loss."""

from avq_jax.quantization.additive import AdditiveCodebook, fit_additive
from avq_jax.quantization.binary import BinaryCodec, fit_binary
from avq_jax.quantization.codebook import Codebook
from avq_jax.quantization.codec import Codes, decode, encode, lookup_table
from avq_jax.quantization.fine_tuning import RankingHistory, fit_ranking
from avq_jax.quantization.learned_rotation import choose_rotation, fit_rotated
from avq_jax.quantization.lloyd import History, LloydState, fit, lloyd_init, lloyd_update
from avq_jax.quantization.quips import MahalanobisCodebook, fit_quips
from avq_jax.quantization.rabitq import Unbiased, error_norms, rabitq, score_bounds
from avq_jax.quantization.ranking import ranking_loss
from avq_jax.quantization.rotation import Rotated, rotation
from avq_jax.quantization.scalar import fit_scalar
from avq_jax.quantization.scale import Scaled, fit_scale
from avq_jax.quantization.sgd import fit_sgd
from avq_jax.quantization.sharded import fit_sharded

__all__ = [
    "AdditiveCodebook",
    "BinaryCodec",
    "Codebook",
    "Codes",
    "History",
    "LloydState",
    "MahalanobisCodebook",
    "RankingHistory",
    "Rotated",
    "Scaled",
    "Unbiased",
    "choose_rotation",
    "decode",
    "encode",
    "error_norms",
    "fit",
    "fit_additive",
    "fit_binary",
    "fit_quips",
    "fit_ranking",
    "fit_rotated",
    "fit_scalar",
    "fit_scale",
    "fit_sgd",
    "fit_sharded",
    "lloyd_init",
    "lloyd_update",
    "lookup_table",
    "rabitq",
    "ranking_loss",
    "rotation",
    "score_bounds",
]
