"""Shared test set-up: eight host devices, quick compilation, strict promotion, shape checks."""

import gc
import os
import pathlib

from jaxlib import version

# Before jax is imported: shard_map tests run on eight host devices.
FLAGS = ["--xla_force_host_platform_device_count=8"]
# Most of the suite's time is compilation: LLVM's optimizations and XLA's MLIR emitters are 4/5 of
# it, and the programs of tests run too briefly to gain from either. AVQ_TEST_COMPILE=default
# (make test-full, make test-optimized) compiles as users do.
if os.environ.get("AVQ_TEST_COMPILE") != "default":
    FLAGS.append("--xla_backend_optimization_level=0")
    # One module a program: small ones gain nothing by being compiled in parts, a tenth of the time.
    FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")
    if version.__version_info__ < (0, 11):  # later ones have no other emitters
        FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

from jaxtyping import install_import_hook  # noqa: E402  (after the flags)

# Every annotated shape of the package is checked while the tests run.
install_import_hook(["avq_jax", "xla_kernels"], "beartype.beartype")

import jax  # noqa: E402  (after the two settings above)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Programs are compiled once for both workers, for the short suite and the longer one, and for the
# next run. Removed by make clean.
CACHE = pathlib.Path(__file__).resolve().parent.parent / ".pytest_cache" / "xla"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Each compiled program keeps a few memory mappings, of which Linux grants a process 65,530; a
# worker that reaches the limit is aborted by LLVM. Dropped programs are read from the cache again.
MAPPINGS = pathlib.Path("/proc/self/maps")
ENOUGH = 30_000


class Room:
    """Between two files, drops compiled programs if they hold many mappings."""

    def pytest_runtest_teardown(self, item, nextitem):
        if nextitem is None or nextitem.path == item.path or not MAPPINGS.exists():
            return
        with MAPPINGS.open("rb") as lines:
            many = sum(1 for _ in lines) > ENOUGH
        if many:
            jax.clear_caches()
            gc.collect()


def pytest_configure(config):
    config.pluginmanager.register(Room())
