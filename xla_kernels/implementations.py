"""Which implementations run on this machine, and the choice among them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.export
from jax import lax

from . import library

#: Instruction sets of the compiled kernels, fastest first.
SIMD_LEVELS = ("avx512vbmi", "avx512bw", "avx2", "neon", "portable")

_NAMES = ("reference", "xla", "cpu")


def available_implementations() -> dict[str, Any]:
    """Tell what runs on this machine, and why the rest does not.

    Returns:
      A dict: ``"implementations"`` maps each name to True or the reason against it; ``"simd"`` is
      the instruction set of ``"cpu"`` in use (None without it); ``"simd_levels"`` maps every level
      to True or the reason; ``"default"`` is what ``implementation=None`` means on this platform.

    Example:
      >>> available_implementations()["implementations"]["xla"]
      True
    """
    loaded = library.load()
    compiled = loaded.handle is not None
    on_cpu = jax.default_backend() == "cpu"
    return {
        "implementations": {
            "reference": True,
            "xla": True,
            "cpu": True if compiled else loaded.reason,
        },
        "simd": library.simd_level(),
        "simd_levels": {level: library.level_reason(level) or True for level in SIMD_LEVELS},
        "default": "cpu" if compiled and on_cpu else "xla",
    }


def resolve(implementation: str | None) -> str:
    """Turn the argument ``implementation`` into a name, ``"auto"`` where the platform decides.

    Raises:
      ValueError: an unknown name, or one that cannot run, with the reason.
    """
    if implementation is None:
        return "auto" if library.available() else "xla"
    if implementation not in _NAMES:
        raise ValueError(f"implementation must be None or one of {_NAMES}, got {implementation!r}")
    if implementation == "cpu" and library.load().handle is None:
        raise ValueError(f"implementation='cpu' cannot run: {library.load().reason}")
    return implementation


def choose(name: str, compiled: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> Any:
    """Run the implementation `resolve` named; ``"auto"`` leaves the choice to the lowering."""
    if name == "auto":
        # Also right where jax.export lowers one trace for several platforms.
        return lax.platform_dependent(*args, cpu=compiled, default=plain)
    return compiled(*args) if name == "cpu" else plain(*args)


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """List the checks to disable for `jax.export` of programs with compiled kernels.

    An exported program with kernels runs only where this package has registered them: import
    `xla_kernels` and call `available_implementations` before it is loaded. Without them
    (``implementation="xla"``) a program needs nothing.

    Example:
      >>> len(export_checks()) == len(library.TARGETS)
      True
    """
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in library.TARGETS]
