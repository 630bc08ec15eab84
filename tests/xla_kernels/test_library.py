"""Loading, versions and the environment variables, each in a process of its own."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from xla_kernels import available_implementations, library

ROOT = pathlib.Path(library.__file__).parents[1]

PROGRAM = """
import warnings
import numpy as np
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import xla_kernels
    codes = np.arange(600, dtype=np.uint8).reshape(100, 6) % 16
    tables = np.arange(96, dtype=np.float32).reshape(1, 6, 16) % 7
    for _ in range(2):
        ids = xla_kernels.adc_top_k(tables, codes, 5)[1]
said = [str(w.message) for w in seen if "xla_kernels" in str(w.message)]
have = xla_kernels.available_implementations()
print(ids.tolist(), have["simd"], have["default"], len(said), said)
"""


def run(**environment):
    # What the caller of the suite forces is not what these tests ask for.
    outer = {name: x for name, x in os.environ.items() if not name.startswith("XLA_KERNELS_")}
    environment = outer | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""} | environment
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    ).stdout


def expected_ids():
    import numpy as np

    from .oracle import numpy_top_k

    codes = np.arange(600, dtype=np.uint8).reshape(100, 6) % 16
    tables = np.arange(96, dtype=np.float32).reshape(1, 6, 16) % 7
    return str(numpy_top_k(tables, codes, 5)[1].tolist())


def test_compiled_kernels_are_present():
    """Fails where the sources are imported without the library, which would be silently slow."""
    if os.environ.get("XLA_KERNELS_EXPECTED", "1") == "0":
        pytest.skip("XLA_KERNELS_EXPECTED=0: a pure-Python installation is being tested")
    if os.environ.get("XLA_KERNELS_DISABLE") == "1":
        pytest.skip("XLA_KERNELS_DISABLE=1: plain XLA is being tested")
    if not library.library_path().exists():
        pytest.skip("NOT BUILT: the compiled kernels are missing, everything runs in plain XLA")
    assert available_implementations()["implementations"]["cpu"] is True


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("level", ["portable", "avx2"])
def test_environment_variable_caps_the_level(level):
    if available_implementations()["simd_levels"][level] is not True:
        pytest.skip(f"no {level} here")
    out = run(XLA_KERNELS_SIMD=level)
    assert out.startswith(f"{expected_ids()} {level} cpu 0")


def test_a_missing_library_warns_once_and_runs_xla(tmp_path):
    out = run(XLA_KERNELS_LIBRARY=str(tmp_path / "none.so"))
    assert out.startswith(f"{expected_ids()} None xla 1")
    assert "not built" in out


def test_a_broken_library_warns_once_and_runs_xla(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF nonsense")
    out = run(XLA_KERNELS_LIBRARY=str(broken))
    assert out.startswith(f"{expected_ids()} None xla 1")
    assert "cannot be loaded" in out


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ({"abi": library.ABI + 1}, f"library interface {library.ABI + 1}, this package needs"),
        ({"abi": library.ABI - 1}, f"library interface {library.ABI - 1}, this package needs"),
        ({"ffi_minor": 10_000}, "rebuild with this jaxlib"),
        ({"ffi_major": 7}, "rebuild with this jaxlib"),
    ],
    ids=str,
)
def test_a_library_of_another_version_is_refused_with_the_reason(tmp_path, versions, reason):
    versions = {"abi": library.ABI, "ffi_major": 0, "ffi_minor": 1} | versions
    source = "".join(
        f"int xla_kernels_{name}(void) {{ return {x}; }}\n" for name, x in versions.items()
    )
    others = (
        *library.TARGETS,
        *(f"xla_kernels_{x}" for x in ("level", "level_reason", "set_level")),
    )
    # Called, any of these would end the process.
    source += "".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in others)
    (tmp_path / "other.c").write_text(source)
    other = tmp_path / "other.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", other, tmp_path / "other.c"], check=True)
    out = run(XLA_KERNELS_LIBRARY=str(other))
    assert out.startswith(f"{expected_ids()} None xla 1")
    assert reason in out
    assert "rebuild" in out


def test_disabled_on_request_says_nothing():
    assert run(XLA_KERNELS_DISABLE="1").startswith(f"{expected_ids()} None xla 0")


def test_header_versions():
    runtime = library.runtime_ffi_version()
    assert runtime is not None
    assert library.ffi_version_problem(runtime, runtime) is None
    assert "rebuild" in library.ffi_version_problem((runtime[0], runtime[1] + 1), runtime)
    assert "rebuild" in library.ffi_version_problem((runtime[0] + 1, 0), runtime)
    assert "cannot be read" in library.ffi_version_problem((0, 1), None)


def test_forcing_an_impossible_level_raises():
    with pytest.raises(ValueError, match="cannot run"):
        library.set_simd_level("mmx")
