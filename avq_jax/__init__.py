"""Anisotropic vector quantization and maximum inner product search in JAX."""
