"""Section 3 of the paper: the score-aware quantization loss."""

from avq_jax.loss.anisotropy import Scaling, eta, eta_limit, moments, scaling
from avq_jax.loss.known_queries import query_terms
from avq_jax.loss.score_aware import QueryTerms, residuals, row_norms, score_aware_loss
from avq_jax.loss.weights import Exponential, Power, Threshold, Uniform, Weight

__all__ = [
    "Exponential",
    "Power",
    "QueryTerms",
    "Scaling",
    "Threshold",
    "Uniform",
    "Weight",
    "eta",
    "eta_limit",
    "moments",
    "query_terms",
    "residuals",
    "row_norms",
    "scaling",
    "score_aware_loss",
]
