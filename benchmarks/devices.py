"""The README's tables of devices: what their compilers made, and what arithmetic predicts."""

import json
import pathlib

HERE = pathlib.Path(__file__).parent
BASELINE, ROOFLINE = HERE / "aot" / "baseline.json", HERE / "results" / "roofline.json"
NAMES = {
    "v4": "TPU v4",
    "v5e": "TPU v5e",
    "v5p": "TPU v5p",
    "v6e": "TPU v6e",
    "tpu7x": "TPU 7x",
    "h100": "NVIDIA H100",
}


def table() -> str:
    """Both tables, from the committed report of the compilers and the roofline."""
    return "\n".join([*_compiled(), "", *_predicted()])


def _compiled() -> list[str]:
    report = json.loads(BASELINE.read_text())
    cases = report["cases"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    shapes = {case.split("/")[1] for case in cases if case.endswith("/tree")}
    lines = [
        f"Compiled by {versions}, with no device attached; 64 codes of 4 bits, {report['rows']:,} "
        "rows. Bundles are instruction words for 128 rows, of the flat scan with 128 queries and "
        "of a step of the tree's with 8:",
        "",
        "| device | kernels | flat scan | tree scan | all of `search`, 120 queries | state |",
        "|---|---|---|---|---|---|",
        "| CPU | C++ | | | | run and measured |",
    ]
    for device, name in NAMES.items():
        flat, tree = (cases[f"{device}/64x16x2/{form}"] for form in ("bins", "tree"))
        whole = cases.get(f"{device}/64x16x2/search")
        memory = "not in the report"
        if whole is not None:
            memory = f"{whole['temp_bytes'] / 1e6:.0f} MB of temporaries"
        made = (
            f"{case['registers']} registers, {case['spill_bytes']} spilled"
            if device == "h100"
            else f"{case['bundles_per_128']:.0f} bundles"
            for case in (flat, tree)
        )
        kernels = "`pallas_gpu` (Triton)" if device == "h100" else "`pallas_tpu`"
        lines.append(
            f"| {name} | {kernels} | {' | '.join(made)} | {memory} | compiled for, never run on |"
        )
    lines.append("| other GPUs | `pallas_gpu` | | | | neither compiled for nor run on |")
    listed = ", ".join(sorted(shapes, key=lambda s: [int(x) for x in s.split("x")]))
    one_hot = cases["v5e/64x16x2/tables"]["bundles_per_128"]
    lines += [
        "",
        f"Shapes compiled (codes x words x columns): {listed}. With tables as one-hot columns a "
        f"v5e's flat scan takes {one_hot:.0f} bundles.",
    ]
    return lines


def _predicted() -> list[str]:
    predicted = json.loads(ROOFLINE.read_text())["predicted"]
    lines = [
        "Predicted from published peaks and those bundles, nothing measured: millions of queries a "
        "second that scan 2^20 rows of those codes, all of them, 30 of 1,024 leaves, or as "
        "bfloat16; and the first batch at which the simpler scan takes no longer:",
        "",
        "| device | one query: codes / tree / bfloat16 | 128 queries | codes no faster than "
        "bfloat16 at | tree no faster than all codes at |",
        "|---|---|---|---|---|",
    ]
    for device, name in NAMES.items():
        row = predicted[device]
        flat, tree = row["queries_a_second_at_a_million_rows"], row["tree"]
        # The flat figures are of 10^6 rows.
        speeds = (
            " / ".join(
                f"{x / 1e6:.2g}"
                for x in (
                    flat["codes"][b] * 1e6 / 2**20,
                    tree["queries_a_second"][b],
                    flat["bfloat16"][b] * 1e6 / 2**20,
                )
            )
            for b in ("1", "128")
        )
        ends = (row["codes_stop_paying_at_batch"], tree["stops_paying_against_all_codes_at_batch"])
        told = (f"{end} {'query' if end == 1 else 'queries'}" if end else "none" for end in ends)
        counted = "" if row["instructions_counted"] else " (instructions not counted)"
        lines.append(f"| {name}{counted} | {' | '.join(speeds)} | {' | '.join(told)} |")
    return lines


def mosaic() -> str:
    """What Mosaic GPU makes of decoding by arithmetic."""
    cases = json.loads(BASELINE.read_text())["cases"]
    lines = [
        "| words of a code | selects in the program | registers a thread | bytes spilled | "
        "tensor-core instructions |",
        "|---|---|---|---|---|",
    ]
    for told, kind in (("any 16", "select"), ("on a line", "affine")):
        case = cases[f"h100/64x16x1/mosaic_{kind}"]
        lines.append(
            f"| {told} | {case['selects']} | {case['registers']} | {case['spill_bytes']} | "
            f"{case['tensor_core_instructions']} |"
        )
    return "\n".join(lines)
