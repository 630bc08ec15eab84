"""Progress on long work: tqdm where it is installed, silence where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Iterator

__all__ = ["shown", "steps"]


def steps(count: int, label: str, show: bool | None) -> Iterator[int]:
    """``range(count)``, drawn as a progress bar.

    Args:
      count: number of steps.
      label: what the bar is about.
      show: ``None`` shows it when standard error is a terminal or in a notebook.

    >>> list(steps(3, "counting", False))
    [0, 1, 2]
    """
    if not shown(show):
        return iter(range(count))
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _lines(count, label)
    return iter(tqdm(range(count), desc=label, leave=False))


def shown(show: bool | None) -> bool:
    """Whether progress is shown, where ``None`` asks if anybody looks.

    >>> shown(True)
    True
    """
    return (sys.stderr.isatty() or "ipykernel" in sys.modules) if show is None else show


def _lines(count: int, label: str) -> Iterator[int]:
    for i in range(count):
        print(f"\r{label}: {i + 1}/{count}", end="", file=sys.stderr, flush=True)
        yield i
    print(file=sys.stderr)
