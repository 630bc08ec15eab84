"""Kernels for asymmetric distance computation; imports jax and numpy only."""
