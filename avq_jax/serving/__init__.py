"""Serving: an index, and a model before it, as one exported program that needs jax alone."""

from avq_jax.serving.export import export
from avq_jax.serving.runtime import Exported, ExportError, load_exported

__all__ = ["ExportError", "Exported", "export", "load_exported"]
