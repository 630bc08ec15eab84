"""The weight of a saved index, as values of JSON."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avq_jax.loss import Exponential, Power, Threshold, Uniform
from avq_jax.mips.safe_files import IndexFormatError

__all__ = ["UnknownWeight", "weight_from_json", "weight_to_json"]

# Name in the file: class and its parameters.
_WEIGHTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "Threshold": (Threshold, ("T",)),
    "Power": (Power, ("p",)),
    "Exponential": (Exponential, ("b",)),
    "Uniform": (Uniform, ()),
}


class UnknownWeight:
    """Stand-in for the user-defined weight of a loaded index; searching does not need it.

    >>> UnknownWeight("mine.Weight")
    UnknownWeight('mine.Weight')
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, t: Any) -> Any:
        """Raise, since the function itself is not in the file."""
        raise ValueError(
            f"the index was saved with the user-defined weight {self.name}, which a file cannot "
            "hold; give it to load(path, weight=...)"
        )

    def __repr__(self) -> str:
        return f"UnknownWeight({self.name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnknownWeight) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


jax.tree_util.register_static(UnknownWeight)


def weight_to_json(weight: Any) -> dict[str, Any]:
    """Name and parameters of a weight; of one defined by the user the name alone."""
    for name, (cls, fields) in _WEIGHTS.items():
        if type(weight) is cls:
            values = {field: np.asarray(getattr(weight, field)) for field in fields}
            if all(value.ndim == 0 for value in values.values()):
                # As text, since JSON has no infinity; repr gives every bit back.
                return {"name": name, "parameters": {k: repr(float(v)) for k, v in values.items()}}
    if isinstance(weight, UnknownWeight):
        return {"name": "custom", "class": weight.name}
    # A plain function comes wrapped in a Partial.
    kind = getattr(weight, "func", type(weight))
    return {"name": "custom", "class": f"{kind.__module__}.{kind.__qualname__}"}


def weight_from_json(found: Any, given: Any, where: str) -> Any:
    """Undo :func:`weight_to_json`, with the weight given where a user defined it.

    Raises:
      IndexFormatError: no weight that is known.
      ValueError: a weight given where the file has one.
    """
    try:
        if found["name"] == "custom":
            return UnknownWeight(str(found["class"])) if given is None else given
        cls, fields = _WEIGHTS[found["name"]]
        values = {key: float(text) for key, text in found["parameters"].items()}
        if set(values) != set(fields) or any(math.isnan(v) for v in values.values()):
            raise ValueError("parameters of another weight, or none")
        weight = cls(**{key: jnp.float32(value) for key, value in values.items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IndexFormatError(f"{where} is damaged: unreadable weight {found!r}") from error
    if given is not None:
        raise ValueError(
            f"weight must be None for {where}, which was saved with the built-in {weight}"
        )
    return weight
