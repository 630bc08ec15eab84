"""Draw the curves of bench_search.py: recall against queries a second, a picture a data set.

python benchmarks/plot.py        rewrites benchmarks/results/search_*.png
"""

import json
import pathlib
import sys

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("Agg")

RESULTS = pathlib.Path(__file__).parent / "results"
# Colour by library, dashes for other ways to ask the same index.
COLOURS = {
    "avq_jax": "tab:red",
    "ScaNN": "tab:blue",
    "FAISS": "tab:green",
    "hnswlib": "tab:purple",
    "SymphonyQG": "tab:orange",
}


def pareto(points):
    """The settings that no other beats in both recall and speed, by recall."""
    best, kept = 0.0, []
    for recall, speed in sorted(points, reverse=True):
        if speed > best:
            best = speed
            kept.append((recall, speed))
    return kept[::-1]


def draw(result, path):
    """One panel for single queries, one for batches."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    sides = list(dict.fromkeys(point["side"] for point in result["points"]))
    for axis, kind in zip(axes, ("single", "batch"), strict=True):
        for side in sides:
            points = [
                (p["recall"], 1e6 / p[f"{kind}_us"])
                for p in result["points"]
                if p["side"] == side and p[f"{kind}_us"]
            ]
            if points:
                library = next(name for name in COLOURS if side.startswith(name))
                axis.plot(
                    *zip(*pareto(points), strict=True),
                    color=COLOURS[library],
                    linestyle="-" if "," not in side or library != "avq_jax" else "--",
                    marker="o" if "eager" not in side else "x",
                    markersize=3,
                    label=side,
                )
        axis.set(title=kind, xlabel="recall 10@10", yscale="log", xlim=(0.7, 1.0))
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7, loc="lower left")
    axes[0].set_ylabel("queries a second, one core")
    figure.suptitle(f"{result['dataset']}: {result['rows']:,} rows")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main():
    for file in sorted(RESULTS.glob("search_*.json")):
        draw(json.loads(file.read_text()), file.with_suffix(".png"))
        print(f"wrote {file.with_suffix('.png').name}")


if __name__ == "__main__":
    sys.exit(main())
