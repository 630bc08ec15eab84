"""The house rules that no type checker sees: who imports whom, documentation, sizes, names."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import avq_jax

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for package in ("avq_jax", "xla_kernels")
    for path in (ROOT / package).rglob("*.py")
    if "__pycache__" not in path.parts
)

# What each package may import of avq_jax, beside itself and the shared leaves.
SHARED = {"checks", "progress"}
ALLOWED = {
    "checks": set(),
    "progress": set(),
    "loss": set(),
    "quantization": {"loss"},
    "mips": {"loss", "quantization"},
    "layers": {"loss", "quantization", "mips"},
    "serving": {"loss", "quantization", "mips"},
    "evaluation": {"loss", "quantization", "mips"},
}
LINES = 400
# Tuning measures recall; imported when called, so that the packages load in one direction.
LATE = {"avq_jax/mips/tuning.py": {"evaluation"}}
# The search for additive codes is compiled: in plain XLA it takes twenty times as long.
KERNELS_FROM = {"quantization", "mips", "layers", "serving"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path):
    """Absolute dotted names that a module imports, at any depth of its code."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            yield base
            for alias in node.names:
                yield (*base, alias.name)


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
class TestEveryModule:
    def test_import_direction(self, path):
        name = module_name(path)
        layer = name[1] if len(name) > 1 else ""
        late = LATE.get(relative(path), set())
        for target in imported(path):
            if name[0] == "xla_kernels":
                known = target[0] in sys.stdlib_module_names | {"jax", "jaxlib", "numpy"}
                assert known or target[0] == name[0], f"xla_kernels imports {'.'.join(target)}"
            elif layer in ALLOWED:
                if target[0] == "xla_kernels":
                    assert layer in KERNELS_FROM, f"{layer} imports {'.'.join(target)}"
                if target[0] == "avq_jax":
                    assert len(target) > 1, f"{layer} imports the flat names of avq_jax"
                    assert target[1] in ALLOWED[layer] | SHARED | late | {layer}, (
                        f"{layer} imports {'.'.join(target)}"
                    )

    def test_documented_small_and_named_for_its_content(self, path):
        assert path.stem not in ("utils", "util", "helpers", "misc", "common")
        text = path.read_text()
        assert len(text.splitlines()) <= LINES
        assert not text.strip() or ast.get_docstring(ast.parse(text)), "no module docstring"


@pytest.mark.parametrize("name", LATE)
def test_late_imports_are_late(name):
    for node in ast.parse((ROOT / name).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            assert not set((node.module or "").split(".")) & LATE[name]


def test_every_package_has_a_rule():
    layers = {p.name for p in (ROOT / "avq_jax").iterdir() if (p / "__init__.py").exists()}
    assert layers <= set(ALLOWED)


@pytest.mark.parametrize("name", avq_jax.__all__)
def test_public_names_are_documented(name):
    value = getattr(avq_jax, name)
    text = inspect.getdoc(value)
    assert text
    # Records that functions return, and errors, show themselves in the examples of functions.
    record = isinstance(value, type) and issubclass(value, tuple | Exception)
    if callable(value) and not record:
        assert ">>>" in text, f"{name} has no example"


def test_public_names_are_sorted_and_exist():
    assert list(avq_jax.__all__) == sorted(avq_jax.__all__)
    assert all(hasattr(avq_jax, name) for name in avq_jax.__all__)


def test_no_name_is_undefined():
    # Off in the linter and the type checker, which take the axes of a shape, "n" or "*rest", for
    # names. All others must exist.
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("needs ruff (avq-jax[test])")
    places = ["avq_jax", "xla_kernels", "benchmarks", "examples", "tests"]
    found = subprocess.run(
        [ruff, "check", "--select", "F821", "--output-format", "concise", "--exit-zero", *places],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    names = re.findall(r"^(\S+): F821 .*`(\w+)`", found, re.MULTILINE)
    assert [place for place, name in names if not re.fullmatch("[a-z]|rest", name)] == []
