"""A data set of real SIFT descriptors in the layout of ann-benchmarks, from a folder of images.

    python benchmarks/make_sift.py --images photographs --output sift-128.hdf5

Every tenth image gives queries, the others base rows, so no image is on both sides. Norms are
nearly equal: the metric is cosine. Debian's packages `opencv-doc` and `lomiri-wallpapers-16.04`
hold photographs and drawings enough for some hundred thousand descriptors. It is not SIFT1M.
"""

import argparse
import sys

import h5py
import numpy as np

import avq_jax
from avq_jax.evaluation import sift_descriptors


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", required=True, help="folder with images, searched deeply")
    parser.add_argument("--output", required=True, help="HDF5 file to write")
    parser.add_argument("--per-image", type=int, default=4000, help="default 4000")
    parser.add_argument("--queries", type=int, default=5000, help="default 5000")
    args = parser.parse_args(argv)
    base, asked = sift_descriptors(args.images, per_image=args.per_image)
    asked = asked[: args.queries]

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    exact = avq_jax.brute_force(unit(asked), unit(base), k=100)
    with h5py.File(args.output, "w") as file:
        file.attrs["distance"] = "angular"
        # Coordinates are whole numbers from 0 to 255.
        for name, rows in (("train", base), ("test", asked)):
            file.create_dataset(name, data=rows.astype(np.uint8), compression="gzip")
        file["neighbors"] = np.asarray(exact.ids, np.int32)
        file["distances"] = 1 - np.asarray(exact.scores, np.float32)
    print(f"{args.output}: {len(base):,} rows, {len(asked):,} queries of 128 dimensions")


if __name__ == "__main__":
    sys.exit(main())
