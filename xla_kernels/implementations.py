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
#: Kernels for accelerators of `adc_top_k` and `tree_search`, and the platform each is for.
PALLAS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}


def available_implementations() -> dict[str, Any]:
    """Tell what runs on this machine, and why the rest does not.

    Returns:
      A dict: ``"implementations"`` maps each name to True or the reason against it; ``"simd"`` is
      the instruction set of ``"cpu"`` in use (None without it); ``"simd_levels"`` maps every level
      to True or the reason; ``"default"`` is what ``implementation=None`` means on this platform,
      and ``"tree_default"`` what it means for `tree_search`, if the tree fits the kernel.

    Example:
      >>> available_implementations()["implementations"]["xla"]
      True
    """
    loaded = library.load()
    compiled = loaded.handle is not None
    platform = jax.default_backend()
    default = "cpu" if compiled and platform == "cpu" else "xla"
    pallas = {other: name for name, other in PALLAS.items()}
    return {
        "implementations": {
            "reference": True,
            "xla": True,
            "cpu": True if compiled else loaded.reason,
            **{name: _pallas_reason(name) or True for name in PALLAS},
        },
        "simd": library.simd_level(),
        "simd_levels": {level: library.level_reason(level) or True for level in SIMD_LEVELS},
        "default": default,
        "tree_default": pallas.get(platform, default),
    }


def _pallas_reason(name: str) -> str | None:
    platform = jax.default_backend()
    if platform == PALLAS[name]:
        return None
    return f"it is for {PALLAS[name]} and the default device is {platform}; interpret=True runs it"


def require_pallas(name: str, interpret: Any, operands: Any) -> None:
    """Check that a Pallas kernel can run on arrays; inside a trace any platform may be meant.

    Raises:
      ValueError: the kernel would run on another platform than its own.
    """
    reason = _pallas_reason(name)
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands))
    if reason and not interpret and not traced:
        raise ValueError(f"implementation={name!r} cannot run: {reason}")


def resolve(implementation: str | None, *, pallas: bool = False) -> str:
    """Turn the argument ``implementation`` into a name, ``"auto"`` where the platform decides.

    Raises:
      ValueError: an unknown name, or one that cannot run, with the reason.
    """
    if implementation is None:
        return "auto" if library.available() else "xla"
    if pallas and implementation in PALLAS:
        return implementation
    if implementation not in _NAMES:
        names = (*_NAMES, *(PALLAS if pallas else ()))
        raise ValueError(f"implementation must be None or one of {names}, got {implementation!r}")
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
