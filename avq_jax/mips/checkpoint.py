"""An index as named arrays and a header in values of JSON, for checkpoints of any library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from avq_jax.mips import safe_files
from avq_jax.mips.file_format import FORMAT_VERSION, arrays_of, check_header, header_of, index_of
from avq_jax.mips.index import Index
from avq_jax.mips.safe_files import IndexFormatError

__all__ = ["from_arrays", "to_arrays"]

_WHERE = "header"


def to_arrays(index: Index) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Take an index apart into what :func:`avq_jax.save` writes.

    The leaves of the pytree itself are laid out for one processor, and some are empty, which
    checkpoint libraries refuse. These arrays are none of both.

    Args:
      index: from :func:`avq_jax.build`.

    Returns:
      A header in values of JSON, which has the shape and sha256 of each array, and the arrays by
      name.

    Raises:
      TypeError: not an index.
      ValueError: an index with room for rows to come.

    >>> import avq_jax, jax
    >>> header, arrays = to_arrays(avq_jax.build(jax.random.key(0), jax.numpy.eye(40)))
    >>> header["metric"], {name: array.shape for name, array in arrays.items()}
    ('dot', {'rows': (40, 40)})
    """
    if not isinstance(index, Index):
        raise TypeError(f"index must be an avq_jax.Index; got {type(index).__name__}")
    arrays = arrays_of(index)
    specs = {name: safe_files.spec_of(array) for name, array in arrays.items()}
    return json.loads(safe_files.dump_header(header_of(index, specs))), arrays


def from_arrays(
    header: Mapping[str, Any], arrays: Mapping[str, Any], *, weight: Any = None
) -> Index:
    """Put an index together again, in the layout of this processor.

    Args:
      header: of :func:`to_arrays`, also after a round trip through JSON.
      arrays: of :func:`to_arrays`, as NumPy or JAX arrays.
      weight: as of :func:`avq_jax.load`.

    Returns:
      :class:`avq_jax.Index`, whose searches are those of the first one.

    Raises:
      IndexFormatError: a damaged header, or arrays that are not those it tells of.
      ValueError: ``weight`` given for an index whose own weight is known.

    >>> import avq_jax, jax
    >>> from_arrays(*to_arrays(avq_jax.build(jax.random.key(0), jax.numpy.eye(40))))
    Index(40 rows x 40, dot, exact scoring of float32 rows)
    """
    try:
        text = safe_files.spell(dict(header))
    except (TypeError, ValueError) as error:
        raise IndexFormatError(f"header must have values of JSON alone ({error})") from None
    fields = safe_files.parse_header(text, where=_WHERE, newest=FORMAT_VERSION)
    specs = check_header(fields, _WHERE)
    if set(arrays) != set(specs):
        raise IndexFormatError(f"arrays must be {sorted(specs)}; got {sorted(arrays)}")
    found = {name: np.asarray(arrays[name]) for name in specs}
    for name, array in found.items():
        # Shape and type before the hash, which knows no others.
        kind = safe_files.NAMES.get(array.dtype), array.shape
        if kind != specs[name][:2] or safe_files.spec_of(array) != specs[name]:
            raise IndexFormatError(f"the array {name!r} is not the one that its header tells of")
    return index_of(fields, found, weight, _WHERE)
