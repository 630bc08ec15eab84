"""Shared test set-up: eight host devices, strict promotion, run-time shape checks."""

import os

# Before jax is imported: shard_map tests run on eight host devices.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from jaxtyping import install_import_hook

# Every annotated shape of the package is checked while the tests run.
install_import_hook(["avq_jax", "xla_kernels"], "beartype.beartype")

import jax  # noqa: E402  (after the two settings above)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
