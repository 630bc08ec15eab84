"""SIFT descriptors of images: real rows whose dimensions are correlated (sections 7.7 and 7.8)."""

import importlib
import os
import pathlib
from typing import Any

import numpy as np

from avq_jax.checks import as_count
from avq_jax.progress import steps

__all__ = ["sift_descriptors"]

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")


def sift_descriptors(
    folder: str | os.PathLike[str],
    *,
    per_image: Any = 2000,
    query_every: Any = 10,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Describe the images of a folder; some images are held out whole, their rows are queries.

    These are not the descriptors of SIFT1M, on which the paper's Table 2 is made. Norms are
    nearly equal; scale the rows to 1 for search by cosine.

    Args:
        folder: searched with its subfolders for BMP, JPEG, PNG and TIFF files.
        per_image: descriptors of one image, at most: the strongest.
        query_every: one image of so many gives queries and no base rows, at least 2.
        seed: of the order of the rows, which is random.
        progress: whether to show a bar over the images; None shows it where somebody looks.

    Returns:
        base rows float32 [n, 128] and queries float32 [b, 128], raw: 0 to 255 a coordinate.

    Raises:
        ImportError: OpenCV is missing; the message names the package.
        TypeError: a count is not an integer.
        ValueError: a count out of its range, or a folder without enough images to describe.

    >>> base, queries = sift_descriptors("photographs")  # doctest: +SKIP

    Reference: Lowe, Distinctive Image Features from Scale-Invariant Keypoints, 2004.
    """
    per_image = as_count(per_image, name="per_image")
    query_every = as_count(query_every, name="query_every", minimum=2)
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as error:
        raise ImportError(
            "sift_descriptors needs OpenCV: pip install opencv-python-headless"
        ) from error
    detector = cv2.SIFT_create(nfeatures=per_image)
    files = sorted(p for p in pathlib.Path(folder).rglob("*") if p.suffix.lower() in _SUFFIXES)
    described = []
    for number in steps(len(files), "images", progress):
        # A file that is not an image after all, or an image without structure, has no rows.
        image = cv2.imread(str(files[number]), cv2.IMREAD_GRAYSCALE)
        rows = None if image is None else detector.detectAndCompute(image, None)[1]
        if rows is not None and len(rows):
            described.append(np.asarray(rows[:per_image], np.float32))
    if len(described) < query_every:
        raise ValueError(
            f"folder must hold at least query_every={query_every} images that can be described; "
            f"{str(folder)!r} has {len(described)}"
        )
    draw = np.random.default_rng(seed)
    last = query_every - 1
    asked = np.concatenate(described[last::query_every])
    base = np.concatenate([rows for i, rows in enumerate(described) if i % query_every != last])
    return draw.permutation(base), draw.permutation(asked)
