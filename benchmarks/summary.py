"""The table at the head of the README: a line a result, ours beside the best of the others."""

import json
import pathlib
from typing import Any

SEARCHES = ("glove6b-100", "sentences-384", "sift-128")
CODES = (
    ("glove6b-100", 100),
    ("glove6b-100", 200),
    ("sentences-384", 128),
    ("sentences-384", 256),
    ("sift-128", 128),
)
RESULTS_USED = (
    *(f"search_{name}" for name in SEARCHES),
    *(f"quality_{name}_{bits}" for name, bits in CODES),
    "mips_glove6b-100",
    "adc",
    "softmax",
)
PEERS = ("ScaNN", "FAISS", "SymphonyQG")


def table(results: pathlib.Path) -> str:
    """Lines of the table from the files of ``RESULTS_USED``."""
    read = {name: json.loads((results / f"{name}.json").read_text()) for name in RESULTS_USED}
    lines = ["| what | avq_jax | beside it |", "|---|---|---|"]
    for name in SEARCHES:
        lines.append(_search(read[f"search_{name}"]))
    for name, bits in CODES:
        lines.append(_codes(read[f"quality_{name}_{bits}"]))
    lines += [_raw(read["mips_glove6b-100"]), _scan(read["adc"]), _softmax(read["softmax"])]
    return "\n".join(lines)


def _line(what: str, ours: str, peers: dict[str, str]) -> str:
    beside = ", ".join(f"{name} {value}" for name, value in peers.items())
    return f"| {what} | {ours} | {beside} |"


def _short(name: str) -> str:
    return name.split(",")[0].split(" ")[0]


def _search(result: dict[str, Any]) -> str:
    single, batch = (result["at_recall"][f"{kind}_us at 0.95"] for kind in ("single", "batch"))
    peers = {
        _short(side): f"{single[side]:.0f} ({batch[side]:.0f})"
        for side in single
        if side.startswith(PEERS) and single[side] and batch[side]
    }
    return _line(
        f"{result['rows']:,} rows of `{result['dataset']}`, recall 10@10 of .95: us a query on one "
        "core (in a batch)",
        f"{single['avq_jax']:.0f} ({batch['avq_jax']:.0f})",
        peers,
    )


def _codes(result: dict[str, Any]) -> str:
    """Codes alone: no tree, at most half a byte for a scale more than the peers have."""
    rows = [row for group in result["groups"].values() for row in group["results"]]
    rows = [row for row in rows if "queries" not in row and "leaves" not in row["name"]]
    theirs = [r for r in rows if r["name"].startswith(PEERS) and r["bits"] <= result["bits"]]
    ours = [r for r in rows if not r["name"].startswith(PEERS) and r["bits"] <= result["bits"] + 4]
    best = {side: max(row["1@10"] for row in found) for side, found in _sides(theirs).items()}
    first = max(ours, key=lambda row: row["1@10"])
    return _line(
        f"recall 1@10 of `{result['dataset']}` by codes of {result['bits']} bits alone",
        f"{first['1@10']:.3f} ({first['name']}, {first['bits']:g} bits)",
        {side: f"{recall:.3f}" for side, recall in best.items()},
    )


def _sides(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    sides: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        sides.setdefault(_short(row["name"]), []).append(row)
    return sides


def _raw(result: dict[str, Any]) -> str:
    recall = {side: told["points"][-1]["recall"] for side, told in result["sides"].items()}
    peers = {_short(side): f"{r:.3f}" for side, r in recall.items() if side.startswith(PEERS)}
    what = f"inner products of raw `{result['dataset']}`, all leaves, 100 rescored: recall 10@10"
    return _line(what, f"{recall['avq_jax']:.3f}", peers)


def _scan(result: dict[str, Any]) -> str:
    case = (331_479, 50, 64)
    (row,) = (r for r in result["adc"] if (r["n"], r["m"], r["batch"]) == case)
    time = row["ns_per_point_and_query_cpu"]
    return _line(
        "flat scan of 331,479 x 50 codes of 4 bits for the best 100, 64 queries at once: ns a row "
        "and query, exact (by rounded tables)",
        f"{time['exact']:.2f} ({time['rounded']:.2f})",
        {"FAISS": f"{time['faiss']:.2f} (rounded)"},
    )


def _softmax(result: dict[str, Any]) -> str:
    name, layer = next(iter(result["layers"].items()))
    row = layer["held_out"]["settings"][layer["chosen"]]
    return _line(
        f"output layer of {name}, {layer['classes']:,} classes, loss and gradients: CPU ms "
        "(gap of perplexity)",
        f"{row['approximate_ms']:.0f} ({row['perplexity_gap_percent']:.2f} %)",
        {"the full layer": f"{row['full_ms']:.0f}"},
    )
