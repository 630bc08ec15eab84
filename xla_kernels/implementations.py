"""Which implementations run on this machine, and the choice among them."""

from typing import Any

import jax

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
