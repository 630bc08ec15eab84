"""What every benchmark records beside its figures, and how it is written."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

__all__ = ["arguments", "environment", "write"]

RESULTS = pathlib.Path(__file__).parent / "results"


def arguments(
    description: str, *, dataset: bool = True, **defaults: Any
) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    if dataset:
        parser.add_argument("--dataset", required=True, help="ann-benchmarks HDF5 file")
    parser.add_argument("--output", default=None, help="JSON file; default benchmarks/results/")
    for name, value in defaults.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(value), default=value, help=f"default {value}")
    return parser


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    wide = [f for f in ("avx2", "avx512f", "avx512_vbmi", "avx512_vnni") if f in fields["flags"]]
    return f"{fields.get('model name', platform.machine())} ({', '.join(wide)})"


def _commit() -> str:
    here = pathlib.Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=False
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "-uno") else ""
    )


def environment(*packages: str) -> dict[str, Any]:
    """Machine, threads, versions and commit of a run."""
    versions = {}
    for name in ("jax", "jaxlib", "numpy", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": _cpu(),
        "threads": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def write(name: str, result: dict[str, Any], output: str | None) -> None:
    """Write a result as JSON, to ``benchmarks/results/NAME.json`` by default."""
    path = pathlib.Path(output) if output else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path.name}")
