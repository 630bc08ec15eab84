"""Compile the Pallas kernels with the compilers of their devices, with no device attached.

python benchmarks/aot/compile.py            compare with baseline.json (`make aot` does this)
python benchmarks/aot/compile.py --write    write it

Needs ``jax[tpu,cuda13]`` and what avq_jax imports. Each case is a process of its own, as a compiler
may take it down. Of each: memory beside operands and results, no array of a score for each row, and
for TPUs the bundles (instruction words) of a block of points, from the compiler's own dump; for
GPUs registers, spills and tensor-core instructions. Bundles say whether a change made the program
longer, not how fast it is. A target whose compiler is not installed is reported as skipped.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
BASELINE = HERE / "baseline.json"
TPUS = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
    "v4": "v4:2x2x1",
}
# Subspaces, codewords and columns a subspace.
SHAPES = [(m, k, s) for m, s in ((25, 4), (50, 2), (64, 2)) for k in (16, 256)]
B, N = 128, 1 << 20
CASES = [f"{target}/{m}x{k}x{s}/bins" for target in (*TPUS, "h100") for m, k, s in SHAPES]
CASES += [f"{target}/64x16x2/{form}" for target in ("v5e", "h100") for form in ("exact", "tables")]
# Few queries: what decoding alone takes.
CASES += [f"{target}/64x16x2/few" for target in TPUS]
# The tree in plain XLA, for its memory.
CASES += ["h100/64x16x2/tree_xla"]
# The scan of a tree's work list; with one slot a bin; the whole of `avq_jax.search`.
CASES += [f"{target}/{m}x{k}x{s}/tree" for target in (*TPUS, "h100") for m, k, s in SHAPES]
CASES += [f"{target}/64x16x2/tree_exact" for target in ("v5e", "h100")]
# A factor of each slot, and additive codes, whose queries are tables.
CASES += [f"{target}/64x16x2/tree_scale" for target in (*TPUS, "h100")]
CASES += [f"{target}/64x16x2/tree_additive" for target in ("v5e", "h100")]
CASES += [f"{target}/64x16x2/search" for target in (*TPUS, "h100")]
# Exact search: products and, on TPUs, approx_max_k.
CASES += [f"{target}/64x16x2/brute" for target in (*TPUS, "h100")]
# How Mosaic GPU decodes.
CASES += [f"h100/64x16x1/mosaic_{kind}" for kind in ("select", "affine")]
# Not the 128 columns of the rows, so that an array of scores is told from one of rows.
NARROW = ("tree", "tree_exact", "tree_scale", "tree_additive", "tree_xla", "search", "brute")
BATCHES = {"few": 16} | dict.fromkeys(NARROW, 120)
TOLERANCE = 0.15
# What the design promised, of the case it promised it for.
MOST_BUNDLES = {"v5e/64x16x2/bins": 50.0}


def measure(case: str) -> dict:
    """Compile one case, in this process, and say what the compiler made of it."""
    target, _, form = case.split("/")
    with tempfile.TemporaryDirectory() as dump:
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        # What XLA sorts and selects with would be dumped too, which takes longer than to compile.
        if form not in ("search", "brute"):
            dumped = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
            os.environ["LIBTPU_INIT_ARGS"] = dumped
        if target == "h100":
            os.environ |= {
                "XLA_FLAGS": f"--xla_dump_to={dump}",
                "MOSAIC_GPU_DUMP_PTX": "1",
                "MOSAIC_GPU_DUMP_TO": dump,
            }
        sys.path.insert(0, str(HERE.parent.parent))
        import programs
        from jax.experimental import topologies

        if target == "h100":
            topology = topologies.get_topology_desc(
                "h100",
                platform="cuda",
                target_config=(HERE / "h100.txtpb").read_text(),
                topology="1x1x1",
            )
        else:
            topology = topologies.get_topology_desc(TPUS[target], platform="tpu")
        narrow = target in TPUS
        program = programs.compiled(case, topology.devices[0], BATCHES.get(form, B), N, narrow)
        result = {"temp_bytes": program.memory_analysis().temp_size_in_bytes}
        text, b = program.as_text(), BATCHES.get(form, B)
        if form.startswith("mosaic"):
            return result | {"scores_of_all_rows": False} | gpu_figures(pathlib.Path(dump), "")
        result["scores_of_all_rows"] = bool(re.search(rf"\[{b},{N}\]|\[{N},{b}\]", text))
        if form in ("tree_xla", "brute") or (form == "search" and target in TPUS):
            return result
        kernel = "tree_windows" if form.startswith(("tree", "search")) else "adc_bins"
        read = gpu_figures if target == "h100" else tpu_figures
        return result | read(pathlib.Path(dump), kernel)


def tpu_figures(dump: pathlib.Path, kernel: str) -> dict:
    """Bundles for 128 points of the longest kernel, prologue and spills included."""
    found = []
    for analysis in dump.glob(f"*-{kernel}*schedule-analysis_final_bundles.txt"):
        (total,) = re.findall(r"total scheduled bundles: *(\d+)", analysis.read_text())
        stem = re.match(rf"(.*-{kernel}\.?\d*)-", analysis.name)[1]
        (final,) = (p for p in dump.glob(f"{stem}-*-final_bundles.txt") if "analy" not in p.name)
        codes = re.findall(r"window shape is u[48]\[\d+,(\d+)\]", final.read_text())
        points = -(-int(codes[0]) // 128) * 128
        found.append({"points": points, "bundles_per_128": round(int(total) * 128 / points, 2)})
    return max(found, key=lambda kernel: kernel["bundles_per_128"])


def gpu_figures(dump: pathlib.Path, kernel: str) -> dict:
    """Registers, spills and tensor-core instructions of the kernel."""
    import nvidia

    (ptxas,) = (p for root in nvidia.__path__ for p in pathlib.Path(root).rglob("bin/ptxas"))
    (ptx,) = (p for p in dump.glob("*.ptx") if f".entry {kernel}" in p.read_text())
    text = ptx.read_text()
    said = subprocess.run(
        [ptxas, "-v", "-arch=sm_90a", ptx, "-o", os.devnull],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "tensor_core_instructions": len(re.findall(r"wgmma\.mma_async|mma\.sync", text)),
        "selects": len(re.findall(r"\bselp\b", text)),
    }


def faults(case: str, found: dict, baseline: dict | None) -> list[str]:
    """What of a result breaks a rule."""
    wrong = []
    if found["scores_of_all_rows"]:
        wrong.append("an array holds a score of each row")
    # Exact search holds the best score of each 16 rows, and may copy them; all else far less.
    if found["temp_bytes"] > B * N * 4 // (4 if case.endswith("/brute") else 8):
        wrong.append(f"temporaries of {found['temp_bytes']:,} bytes")
    if found.get("spill_bytes"):
        wrong.append(f"{found['spill_bytes']} bytes spilled")
    if found.get("tensor_core_instructions") == 0:
        wrong.append("no tensor-core instruction")
    bundles = found.get("bundles_per_128", 0)
    if bundles > MOST_BUNDLES.get(case, float("inf")):
        wrong.append(f"{bundles} bundles, more than {MOST_BUNDLES[case]}")
    if baseline is None:
        wrong.append("not in the baseline")
    elif bundles > (1 + TOLERANCE) * baseline.get("bundles_per_128", 0):
        wrong.append(f"{bundles} bundles, {baseline['bundles_per_128']} in the baseline")
    return wrong


def installed(case: str) -> str | None:
    """Version of the compiler of a case's target; None where it is missing."""
    package = "jax-cuda13-plugin" if case.startswith("h100") else "libtpu"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", help="compile this one here and print the result")
    parser.add_argument("--only", default="", help="cases that begin so")
    parser.add_argument("--write", action="store_true", help="write the baseline")
    parser.add_argument("--missing", action="store_true", help="only cases not in the baseline")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case)))
        return
    before = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"cases": {}}
    results, failed = dict(before["cases"]), 0
    for case in (case for case in CASES if case.startswith(options.only)):
        if options.missing and case in before["cases"]:
            continue
        if installed(case) is None:
            print(f"SKIP {case}: its compiler is not installed", flush=True)
            continue
        run = subprocess.run(
            [sys.executable, __file__, "--case", case], capture_output=True, text=True, check=False
        )
        if run.returncode:
            failed += 1
            print(f"FAIL {case}: {run.stderr.strip()[-800:]}", flush=True)
            continue
        results[case] = json.loads(run.stdout.splitlines()[-1])
        known = results[case] if options.write else before["cases"].get(case)
        wrong = faults(case, results[case], known)
        failed += bool(wrong)
        print("FAIL" if wrong else "ok  ", case, results[case], *wrong, flush=True)
        if options.write:
            write(results)
    sys.exit(bool(failed))


def write(results: dict) -> None:
    """Write the baseline, after each case: a run takes minutes."""
    names = ("jax", "libtpu", "jax-cuda13-plugin")
    versions = {name: importlib.metadata.version(name) for name in names}
    text = {"batch": B, "rows": N, "versions": versions, "cases": results}
    BASELINE.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
