"""An index as named arrays: through JSON, through Orbax, and when something was changed."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import avq_jax

from .conftest import SIZES, D

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"


def assert_same(one, two, queries):
    assert str(one) == str(two)
    # The header has the sha256 of every array.
    assert avq_jax.to_arrays(one)[0] == avq_jax.to_arrays(two)[0]
    a, b = (avq_jax.search(index, queries, k=5) for index in (one, two))
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.scores, b.scores)


@pytest.fixture(scope="module")
def full(rows):
    """Everything that an index may have."""
    options = {
        "rescore_dtype": "bfloat16",
        "scanned_dim": 8,
        "num_groups": 3,
        "soar_lambda": 1.0,
        "scale": 4,
    }
    ids = 2**40 + np.arange(len(rows))
    return avq_jax.build(jax.random.key(0), rows, ids=ids, **options, **SIZES)


def test_through_json(indexes, exact_indexes, full, queries):
    for index in (full, indexes["l2"], exact_indexes["cosine"]):
        header, arrays = avq_jax.to_arrays(index)
        assert all(array.size for array in arrays.values())
        again = avq_jax.from_arrays(json.loads(json.dumps(header)), arrays)
        assert_same(again, index, queries)


def test_what_was_changed_is_refused(index):
    header, arrays = avq_jax.to_arrays(index)
    flipped = arrays["codes"].copy()
    flipped[7, 1] ^= 1
    wide = arrays["rows"].astype(np.float64)
    for found, error in [
        (arrays | {"codes": flipped}, "array 'codes' is not the one"),
        (arrays | {"rows": wide}, "array 'rows' is not the one"),
        (arrays | {"rows": arrays["rows"][:, : D - 1]}, "array 'rows' is not the one"),
        ({"rows": arrays["rows"]}, "arrays must be"),
    ]:
        with pytest.raises(avq_jax.IndexFormatError, match=error):
            avq_jax.from_arrays(header, found)
    for changed in ({**header, "metric": "l2"}, {}, {**header, "dim": object()}):
        with pytest.raises(avq_jax.IndexFormatError, match="header"):
            avq_jax.from_arrays(changed, arrays)
    with pytest.raises(ValueError, match="compact"):
        avq_jax.to_arrays(avq_jax.remove(index, [3]))


@pytest.mark.filterwarnings("ignore::UserWarning:orbax")
@pytest.mark.filterwarnings("default::ResourceWarning")
class TestOrbax:
    def test_the_page(self, tmp_path, queries):
        pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
        block, _ = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
        scope = {"folder": tmp_path}
        exec(compile(block, PAGE.name, "exec"), scope)
        assert_same(scope["again"], scope["index"], np.asarray(scope["x"][:50]))
        np.testing.assert_array_equal(
            scope["found"]["params"]["encoder"], scope["params"]["encoder"]
        )

    def test_in_a_new_process(self, tmp_path, full, queries):
        """No template of the arrays: names and shapes are those of the checkpoint."""
        ocp = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
        header, arrays = avq_jax.to_arrays(full)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            saved = ocp.args.Composite(
                index=ocp.args.StandardSave(arrays), header=ocp.args.JsonSave(header)
            )
            checkpointer.save(tmp_path / "a", saved)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            wanted = ocp.args.Composite(
                index=ocp.args.StandardRestore(), header=ocp.args.JsonRestore()
            )
            found = checkpointer.restore(tmp_path / "a", wanted)
        assert_same(avq_jax.from_arrays(found["header"], found["index"]), full, queries)
