"""Every example runs at small size."""

import importlib.util
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "two_tower": ["--epochs", "1", "--more", "1", "--width", "8", "--subspaces", "2"],
    "learned_weight": ["--steps", "1", "--rows", "200", "--queries", "16"],
}


# Examples with tests of their own.
ELSEWHERE = {"serve"}


def test_every_example_is_run():
    found = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert found == set(SMALL) | ELSEWHERE


@pytest.mark.full
@pytest.mark.parametrize("name", SMALL)
def test_runs(name, capsys):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        module.main(SMALL[name])
    assert capsys.readouterr().out
