"""Every notebook source runs from top to bottom, at the size that only proves this."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Run by test-full; all of them where AVQ_NOTEBOOKS=all.
FEW = ("01", "04", "07", "09")
SOURCES = sorted((ROOT / "notebooks").glob("[0-9]*.py"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Compiled steps are shared between the processes, and compiled quickly."""
    return {
        **os.environ,
        "AVQ_SIZE": "tiny",
        "MPLBACKEND": "Agg",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


@pytest.mark.full
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_runs(source, environment):
    if source.stem[:2] not in FEW and os.environ.get("AVQ_NOTEBOOKS") != "all":
        pytest.skip("takes long; make test-models and make notebooks run it")
    pytest.importorskip("matplotlib")
    run = subprocess.run(
        [sys.executable, str(source)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_begins_alike_and_uses_public_names(source):
    text = source.read_text()
    cells = text.split("# %%")
    assert "[markdown]\n# # " in cells[1], "no title"
    assert "colab-badge" in cells[1]
    assert "pip" in cells[2], "the first cell installs the package"
    for module in re.findall(r"^(?:from|import) (avq_jax[\w.]*)", text, re.M):
        assert module in ("avq_jax", "avq_jax.evaluation", "avq_jax.serving"), module
    assert not re.search(r"avq_jax(\.\w+)*\._", text), "a private name"
