"""The compiled kernels: found, checked and registered with XLA, or a reason why they are not.

The shared library holds plain C symbols and no Python interface, so one build serves every Python.
XLA refuses a handler built against a newer FFI interface than its own, and such a refusal disables
the CPU backend for the whole process; so the interface version the library was built with is
compared with the one of the installed jaxlib before anything is registered.

``XLA_KERNELS_SIMD`` (``avx512vbmi``, ``avx512bw``, ``avx2``, ``neon`` or ``portable``) caps the
instruction set; it never enables one that the processor lacks. ``XLA_KERNELS_LIBRARY`` names
another library file, and ``XLA_KERNELS_DISABLE=1`` turns the compiled kernels off.
"""

import ctypes
import functools
import os
import pathlib
import re
import warnings
from typing import NamedTuple

import jax

#: Must equal `xla_kernels_abi` of csrc/ffi_adc.cc: a library of another version is not used.
ABI = 6

#: FFI targets, each a C symbol of the same name.
TARGETS = (
    "xla_kernels_adc_top_k",
    "xla_kernels_adc_scores",
    "xla_kernels_tree_search",
    "xla_kernels_tree_leaves",
    "xla_kernels_tree_scan",
    "xla_kernels_best_candidates",
    "xla_kernels_dot_top_k",
    "xla_kernels_rescore_top_k",
    "xla_kernels_additive",
    "xla_kernels_encode",
)


class Library(NamedTuple):
    """The loaded library, or None and the reason."""

    handle: ctypes.CDLL | None
    reason: str


def library_path() -> pathlib.Path:
    """Where the compiled library of this installation is expected."""
    override = os.environ.get("XLA_KERNELS_LIBRARY")
    if override:
        return pathlib.Path(override)
    return pathlib.Path(__file__).parent / "libxla_kernels.so"


def runtime_ffi_version() -> tuple[int, int] | None:
    """FFI interface version of the installed jaxlib, read from its headers; None if unreadable."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text()
    except OSError:
        return None
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    if found[0] is None or found[1] is None:
        return None
    return int(found[0].group(1)), int(found[1].group(1))


def ffi_version_problem(built: tuple[int, int], runtime: tuple[int, int] | None) -> str | None:
    """Why a library built against one FFI version must not be registered, or None if it may.

    Example:
      >>> ffi_version_problem((0, 1), (0, 3)) is None
      True
      >>> ffi_version_problem((0, 3), (0, 1))
      'built for XLA FFI 0.3, but the installed jaxlib has 0.1; rebuild with this jaxlib'
    """
    if runtime is None:
        return "the XLA FFI version of the installed jaxlib cannot be read"
    if built[0] != runtime[0] or built[1] > runtime[1]:
        return (
            f"built for XLA FFI {built[0]}.{built[1]}, but the installed jaxlib has "
            f"{runtime[0]}.{runtime[1]}; rebuild with this jaxlib"
        )
    return None


@functools.cache
def load() -> Library:
    """Load and register the compiled kernels once; never raises."""
    if os.environ.get("XLA_KERNELS_DISABLE") == "1":
        return Library(None, "disabled by XLA_KERNELS_DISABLE=1")
    path = library_path()
    if not path.exists():
        return Library(None, "not built (a pure-Python installation)")
    try:
        handle = ctypes.CDLL(str(path))
        # First: a library of another interface may lack a symbol of this one.
        if (abi := handle.xla_kernels_abi()) != ABI:
            return Library(None, f"library interface {abi}, this package needs {ABI}; rebuild")
        symbols = {name: getattr(handle, name) for name in TARGETS}
        built = (handle.xla_kernels_ffi_major(), handle.xla_kernels_ffi_minor())
        handle.xla_kernels_level.restype = ctypes.c_char_p
        handle.xla_kernels_level_reason.restype = ctypes.c_char_p
        handle.xla_kernels_level_reason.argtypes = [ctypes.c_char_p]
        handle.xla_kernels_set_level.argtypes = [ctypes.c_char_p]
    except (OSError, AttributeError) as error:
        return Library(None, f"cannot be loaded: {error}")
    problem = ffi_version_problem(built, runtime_ffi_version())
    if problem is not None:
        return Library(None, problem)
    for name, symbol in symbols.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(symbol), platform="cpu")
    return Library(handle, "")


def available() -> bool:
    """Whether compiled kernels are in use; the first time they are not, warns once."""
    library = load()
    if library.handle is None:
        _warn(library.reason)
    return library.handle is not None


@functools.cache
def _warn(reason: str) -> None:
    if "disabled by" not in reason:
        warnings.warn(
            f"xla_kernels runs plain XLA, without its compiled kernels: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )


def simd_level() -> str | None:
    """Instruction set in use, or None without compiled kernels."""
    handle = load().handle
    return None if handle is None else handle.xla_kernels_level().decode()


def level_reason(level: str) -> str:
    """Empty if this process can run a level, else why not."""
    library = load()
    if library.handle is None:
        return library.reason
    return library.handle.xla_kernels_level_reason(level.encode()).decode()


def set_simd_level(level: str) -> None:
    """Force a level in this process (a test's tool; users set ``XLA_KERNELS_SIMD``).

    Raises:
      ValueError: the level cannot run here.
    """
    reason = level_reason(level)
    handle = load().handle
    if reason or handle is None:
        raise ValueError(f"SIMD level {level!r} cannot run: {reason}")
    handle.xla_kernels_set_level(level.encode())
