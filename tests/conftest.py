"""Shared test set-up: eight host devices, strict promotion, run-time shape checks, a cache."""

import os
import pathlib

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

# Most of the suite's time is compilation: programs are compiled once for both workers, for the
# short suite and the longer one, and for the next run. Removed by make clean.
CACHE = pathlib.Path(__file__).resolve().parent.parent / ".pytest_cache" / "xla"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
