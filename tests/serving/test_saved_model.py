"""The SavedModel of docs/serving.md, where TensorFlow is installed and reads what JAX writes."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import avq_jax

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"


@pytest.mark.filterwarnings("ignore")  # TensorFlow has some of its own
def test_the_page(tmp_path):
    tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed")
    version = tuple(int(part) for part in tf.__version__.split(".")[:2])
    if jax.__version_info__ >= (0, 10) and version <= (2, 21):
        pytest.skip("TensorFlow up to 2.21 does not read the StableHLO of jax 0.10 and newer")
    _, block = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    scope = {"folder": tmp_path}
    exec(compile(block, PAGE.name, "exec"), scope)
    for count in (1, 3, 70):
        queries = np.asarray(scope["x"][:count])
        want = avq_jax.search(scope["index"], queries, k=5)
        got = scope["served"](queries=tf.constant(queries))
        np.testing.assert_array_equal(got["rows"].numpy(), np.asarray(want.ids))
        np.testing.assert_allclose(got["scores"].numpy(), np.asarray(want.scores), rtol=1e-5)
