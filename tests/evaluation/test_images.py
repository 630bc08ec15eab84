"""SIFT descriptors: which images are held out, caps, and faults; OpenCV itself where installed."""

import pathlib
import sys
import types

import numpy as np
import pytest

from avq_jax.evaluation import sift_descriptors


class Detector:
    """Stands in for OpenCV's: an image that is the number c has c descriptors of value c."""

    def detectAndCompute(self, image, mask):
        return None, np.full((image, 128), image, np.float32) if image else None


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Images 01 to 12 with as many descriptors as their number; 00 has none, one is unreadable."""
    module = types.ModuleType("cv2")
    module.IMREAD_GRAYSCALE = 0
    module.SIFT_create = lambda nfeatures: Detector()
    module.imread = lambda path, flag: (
        int(pathlib.Path(path).stem) if path.endswith(".png") else None
    )
    monkeypatch.setitem(sys.modules, "cv2", module)
    (tmp_path / "deep").mkdir()
    for number in range(13):
        (tmp_path / "deep" / f"{number:02}.png").touch()
    (tmp_path / "broken.jpg").touch()
    (tmp_path / "notes.txt").touch()
    return tmp_path


def test_images_are_held_out_whole(folder):
    base, asked = sift_descriptors(folder, query_every=4, progress=False)
    assert base.dtype == asked.dtype == np.float32
    assert sorted(asked[:, 0].tolist()) == sorted(4 * [4] + 8 * [8] + 12 * [12])
    assert sorted(set(base[:, 0].tolist())) == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert base.shape == (1 + 2 + 3 + 5 + 6 + 7 + 9 + 10 + 11, 128)
    again, _ = sift_descriptors(folder, query_every=4, progress=False)
    np.testing.assert_array_equal(again, base)
    other, _ = sift_descriptors(folder, query_every=4, seed=1, progress=False)
    assert (other != base).any()


def test_an_image_gives_at_most_so_many(folder):
    base, asked = sift_descriptors(folder, query_every=4, per_image=2, progress=False)
    assert len(base) == 1 + 8 * 2
    assert len(asked) == 3 * 2


def test_faults_name_the_argument(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"query_every=20 images .* has 12"):
        sift_descriptors(folder, query_every=20, progress=False)
    with pytest.raises(ValueError, match="query_every"):
        sift_descriptors(folder, query_every=1)
    with pytest.raises(TypeError, match="per_image"):
        sift_descriptors(folder, per_image=1.5)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="opencv-python-headless"):
        sift_descriptors(tmp_path)


def test_descriptors_of_real_images(tmp_path):
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    draw = np.random.default_rng(0)
    for number in range(3):
        image = np.kron(draw.integers(0, 255, (12, 12)), np.ones((10, 10))).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"{number}.png"), image)
    base, asked = sift_descriptors(tmp_path, query_every=3, per_image=50, progress=False)
    assert 0 < len(base) <= 100
    assert 0 < len(asked) <= 50
    # Descriptors are scaled to about 512 and rounded.
    np.testing.assert_allclose(np.linalg.norm(base, axis=1), np.full(len(base), 512), rtol=0.05)
