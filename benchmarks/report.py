"""Write the tables of the README and of pages in docs/ from the results of the benchmarks.

python benchmarks/report.py          rewrites them
python benchmarks/report.py --check  fails if one is not what the results say
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import devices
import paper
import summary

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/accelerators.md", "docs/measured.md")


def _environment(result: dict) -> str:
    e = result["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in e["versions"].items() if v != "not installed")
    return f"{e['cpu']}, {e['threads']} thread(s), Python {e['python']}, {versions}."


def _codes(result: dict) -> str:
    lines = [
        f"{result['rows']:,} rows and {result['queries']:,} queries of `{result['dataset']}`, unit "
        "rows, cosine. Codes alone, scored exhaustively with float tables, no rescoring:",
        "",
        "| codes | loss | eta | recall 1@1 | 1@10 | 10@100 | relative error | fit + encode, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for code, rows in result["flat"].items():
        for row in rows:
            seconds = f"{row['fit_s'] + row['encode_s']:.0f}" if "fit_s" in row else "-"
            lines.append(
                f"| {code} | {row['name']} | {row['eta']:.3g} | {row['1@1']:.3f} "
                f"| {row['1@10']:.3f} | {row['10@100']:.3f} | {row['relative_error']:.4f} "
                f"| {seconds} |"
            )
    lines += [
        "",
        f"Learned on {result['sample']:,} rows. Residual codes behind a k-means tree, score-aware "
        "loss along the original row (exact eta, default T):",
        "",
        "| codes | leaves probed | rescored | recall 1@1 | 1@10 | 10@10 | 10@100 |",
        "|---|---|---|---|---|---|---|",
    ]
    for code, tree in result["tree"].items():
        for row in tree["rows"]:
            lines.append(
                f"| {code} | {row['probed']} | {row['rescore']} | {row['1@1']:.3f} "
                f"| {row['1@10']:.3f} | {row['10@10']:.3f} | {row['10@100']:.3f} |"
            )
    return "\n".join([*lines, "", _environment(result)])


def _search(result: dict) -> str:
    lines = [
        f"{result['rows']:,} rows and {result['queries']:,} queries of `{result['dataset']}`, "
        "recall 10@10, microseconds a query on one core, interpolated between settings; ours as "
        f"`build` makes it by default, {result['rescore_dtype']} rows for rescoring. Single: "
        "one query after another from Python; batch: all at once (for us in jit: one after another "
        "in `lax.map`). Build in CPU seconds, compilation included; bytes a row.",
        "",
        "| side | asked | 0.8 | 0.9 | 0.95 | 0.99 | build | bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side, built in result["build_cpu_s"].items():
        for kind in ("single", "batch"):
            at = [result["at_recall"][f"{kind}_us at {r}"] for r in (0.8, 0.9, 0.95, 0.99)]
            times = [a[side] for a in at]
            if any(times):
                cells = " | ".join(f"{t:.1f}" if t else "-" for t in times)
                size = result["bytes"][side]
                size = f"{size / result['rows']:.0f}" if size else "-"
                lines.append(f"| {side} | {kind} | {cells} | {built:.0f} | {size} |")
    return "\n".join([*lines, "", _environment(result)])


def _filters(result: dict) -> str:
    lines = [
        f"{result['rows']:,} rows and {result['queries']:,} queries of `{result['dataset']}`, unit "
        f"rows, {result['leaves']} leaves of {result['num_leaves']} searched, {result['rescore']} "
        f"rescored: recall 10@10 {result['unfiltered']['recall']:.3f} without a filter. Masks: "
        "rows at random, those nearest to one row, those nearest to any of 30 rows, a range of row "
        "numbers (words by frequency). Microseconds a query on one core: a prepared `searcher`, "
        f"{result['unfiltered']['handle_us']:.0f} without a filter; and one batch with the mask.",
        "",
        "| allowed | mask | recall 10@10 | searcher | batch |",
        "|---|---|---|---|---|",
    ]
    for row in result["masks"]:
        lines.append(
            f"| {100 * row['share']:g} % | {row['kind']} | {row['recall']:.3f} "
            f"| {row['handle_us']:.0f} | {row['batch_us']:.0f} |"
        )
    return "\n".join([*lines, "", _environment(result)])


def _options(result: dict) -> str:
    kinds = [
        f"{kind}_us at {target}" for target in (0.9, 0.95, 0.99) for kind in ("single", "batch")
    ]
    lines = [
        f"{result['rows']:,} rows of `{result['dataset']}`, unit rows. Microseconds a query on one "
        "core at recall 10@10: through `searcher`, and in a batch.",
        "",
        "| index | .90 | batch | .95 | batch | .99 | batch | build, CPU s | bytes a row |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, size in result["bytes_per_row"].items():
        times = [result["at_recall"][kind][name] for kind in kinds]
        cells = ["-" if time is None else f"{time:.1f}" for time in times]
        built = result["build_cpu_s"].get(name)
        cells += ["" if built is None else f"{built:.0f}", f"{size:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _environment(result)])


def _options_scale(result: dict) -> str:
    found = result["points"]
    lines = [
        f"The same for a score-aware scale (`build(scale=4)`), microseconds of {result['clock']} a "
        "query, and recall 10@10 of the same effort: 80 leaves and 500 rescored, or, of 50 codes, "
        "27 and 100. Codes are scanned four at a time, so that 28 take the time and memory of 25.",
        "",
        "| index | recall | single | batch | .95 | batch | .99 | batch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kinds = [f"{kind}_us at {target}" for target in (0.95, 0.99) for kind in ("single", "batch")]
    for name in result["bytes_per_row"]:
        own = [p for p in found if p["side"] == name and p["setting"] in ([80, 500], [27, 100])]
        point = own[-1]
        times = [point["single_us"], point["batch_us"]]
        times += [result["at_recall"][kind][name] for kind in kinds]
        cells = ["-" if time is None else f"{time:.1f}" for time in times]
        lines.append(f"| {name} | {point['recall']:.4f} | {' | '.join(cells)} |")
    lines += [
        "",
        "The codes alone, each row in one leaf, all leaves searched, nothing rescored:",
        "",
        "| index | bits | 1@10 | 10@100 |",
        "|---|---|---|---|",
        *(
            f"| {row['side']} | {row['bits']:.0f} | {row['1@10']:.3f} | {row['10@100']:.3f} |"
            for row in result["estimates"]
        ),
    ]
    load = " to ".join(f"{value:.0f}" for value in result["load_average"])
    lines += ["", f"{_environment(result)} The machine had other work, a load of {load}."]
    return "\n".join(lines)


def _mips(result: dict) -> str:
    work = result["codes_read_by_scann_at_0.87"]
    lines = [
        f"{result['rows']:,} raw rows and {result['queries']:,} queries of "
        f"`{result['dataset']}`, recall 10@10 by inner product, 600 leaves, 100 rescored. Codes "
        "read a query count both copies of spilled rows.",
        "",
        f"| index | at {work / 1000:.0f}k codes | all leaves | all, 10 rescored | build, s |",
        "|---|---|---|---|---|",
    ]
    for side, told in result["sides"].items():
        lines.append(
            f"| {side} | {told['recall_at_that_work']:.3f} | {told['points'][-1]['recall']:.3f} "
            f"| {told['all_leaves_rescore_10']:.3f} | {told['build_cpu_s']:.0f} |"
        )
    return "\n".join([*lines, "", _environment(result)])


def _adc(result: dict) -> str:
    lines = [
        "Flat scan of 4-bit codes with selection of the best 100, CPU nanoseconds a point and "
        "query on one core; ids of the exact modes equal a NumPy computation in the same run. "
        '"Exact" and "rounded" are jitted calls of `adc_top_k`, "direct" is one of '
        "`direct_adc_top_k`, from a query in NumPy to ids in NumPy as FAISS's.",
        "",
        "| rows | subspaces | queries at once | FAISS | exact | rounded | direct | FAISS / exact "
        "| FAISS / direct |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["adc"]:
        t = row["ns_per_point_and_query_cpu"]
        direct = "-", "-"
        if "direct" in t:
            direct = f"{t['direct']:.2f}", f"{row['faiss_over_direct']:.2f}"
        lines.append(
            f"| {row['n']:,} | {row['m']} | {row['batch']} | {t['faiss']:.2f} | {t['exact']:.2f} "
            f"| {t['rounded']:.2f} | {direct[0]} | {row['faiss_over_exact']:.2f} | {direct[1]} |"
        )
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    return "\n".join([*lines, "", f"{result['machine']['simd']}, 1 thread, {versions}."])


def _binary(result: dict) -> str:
    lines = [
        f"Binary codes ({result['rows']:,} rows, {result['queries']:,} queries of "
        f"`{result['dataset']}`, no rescoring), as the paper's Table 2:",
        "",
        "| bits | method | 1@1 | 1@10 | 10@10 | 10@100 |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["results"]:
        cells = [row[f"recall_{r}"] for r in ("1_at_1", "1_at_10", "10_at_10", "10_at_100")]
        cells = " | ".join(f"{cell:.3f}" for cell in cells)
        lines.append(f"| {row['bits']} | {row['method']} | {cells} |")
    return "\n".join([*lines, "", _environment(result)])


def _quality(result: dict) -> str:
    groups = list(result["groups"].values())
    lines = [
        f"{result['rows']:,} rows and {result['queries']:,} queries of `{result['dataset']}`, unit "
        f"rows, codes of about {result['bits']} bits scored exhaustively, no rescoring; T = "
        f"{result['T']:.3g}. Fit and encoding in CPU seconds; microseconds of a query's table; "
        "nanoseconds a row and query of the scan with its selection of 100.",
        "",
        "| codes | bits | recall 1@1 | 1@10 | 10@100 | fit | encode | table | scan |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def number(row: dict, name: str, digits: int) -> str:
        return f"{row[name]:.{digits}f}" if name in row else "-"

    rows = [row for name in result["groups"] for row in result["groups"][name]["results"]]
    asked = [row for row in rows if "queries" in row]
    rows = [row for row in rows if "queries" not in row]
    for row in sorted(rows, key=lambda row: -row["1@10"]):
        cells = [number(row, *c) for c in (("fit_s", 0), ("encode_s", 1), ("table_us", 1))]
        lines.append(
            # ScaNN takes "not a number" for no threshold.
            f"| {row['name'].replace('T=nan', 'no T')} | {row['bits']:g} | {row['1@1']:.3f} "
            f"| {row['1@10']:.3f} "
            f"| {row['10@100']:.3f} | {' | '.join(cells)} | {number(row, 'scan_ns', 2)} |"
        )
    if asked:
        lines += ["", "Known queries: a sample of the base; for QUIPS, the other half of them.", ""]
        lines += ["| codes | queries asked | recall 1@1 | 1@10 | 10@100 |", "|---|---|---|---|---|"]
    for row in asked:
        recalls = " | ".join(f"{row[name]:.3f}" for name in ("1@1", "1@10", "10@100"))
        lines.append(f"| {row['name']} | {row['queries']} | {recalls} |")
    return "\n".join([*lines, "", _environment(groups[0])])


def _weights(result: dict) -> str:
    measures = ("1@1", "1@10", "10@10", "10@100")
    lines = [
        f"{result['rows']:,} rows and {result['queries']:,} queries of `{result['dataset']}`, "
        f"codes of {result['codes']} learned on {result['sample']:,} rows and scored exhaustively, "
        "no rescoring. Raw rows, by inner product:",
        "",
        "| weight | its part in the loss | recall 1@1 | 1@10 | 10@10 | 10@100 |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["whose"]:
        cells = " | ".join(f"{row[m]:.3f}" for m in measures)
        lines.append(f"| `{row['weight']}` | {row['loss']} | {cells} |")
    lines += ["", "Unit rows, the best parameter of each family by 10@10:", ""]
    lines += ["| weight | eta | recall 1@1 | 1@10 | 10@10 | 10@100 |", "|---|---|---|---|---|---|"]
    best = {}
    for row in result["families"]:
        family = row["family"]
        if family not in best or row["10@10"] > best[family]["10@10"]:
            best[family] = row
    for family, row in best.items():
        cells = " | ".join(f"{row[m]:.3f}" for m in measures)
        name = f"{family.partition('(')[0]}({row['value']:g})"
        lines.append(f"| `{name}` | {row['eta']:.3g} | {cells} |")
    return "\n".join([*lines, "", _environment(result)])


def _softmax(result: dict) -> str:
    lines = [
        f"Loss and gradients of an output layer, a batch of {result['batch']}, both sides jitted, "
        "CPU milliseconds on one core; k classes by search for each query, l sampled. The gap is "
        "that of the mean perplexity, with its standard error: on the texts on which the setting "
        "in bold was chosen, and on held-out ones, where the times are from too.",
        "",
        "| layer | k | l | full | approximate | times faster | gap, % | held-out gap, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name, layer in result["layers"].items():
        sides = layer["choosing"], layer["held_out"]
        pairs = zip(*(side["settings"] for side in sides), strict=True)
        for number, (choosing, row) in enumerate(pairs):
            gaps = [
                f"{r['perplexity_gap_percent']:.2f} ± {r['standard_error_of_gap_percent']:.2f}"
                for r in (choosing, row)
            ]
            cells = [
                f"{name}, {layer['classes']:,} x {layer['width']}",
                *(str(row[key]) for key in ("k", "num_samples")),
                f"{row['full_ms']:.0f}",
                f"{row['approximate_ms']:.1f}",
                f"{row['times_faster']:.1f}",
                *gaps,
            ]
            bold = number == layer["chosen"]
            cells = [f"**{c}**" if bold else c for c in cells]
            lines.append(f"| {' | '.join(cells)} |")
        old, new = (side["perplexity"] for side in sides)
        text = ""
        if "texts" in layer:
            texts = (", ".join(layer[key]) for key in ("texts", "held_out_texts"))
            text = " (chosen on {}; held out {})".format(*texts)
        notes.append(f"Perplexity of {name} {old:.1f}, held out {new:.1f}{text}.")
    return "\n".join([*lines, "", *notes, _environment(result)])


def _attention(result: dict) -> str:
    columns = sorted(int(k) for k in result["share_of_the_k_best"])
    found = {(r["kind"], r["loss"], r["bits"], r["k"]): r["error"] for r in result["errors"]}
    texts, layers = ", ".join(result["texts"]), ", ".join(map(str, result["layers"]))
    lines = [
        f"Error of the attention output over a cache of {result['keys']:,} keys ({result['width']} "
        f"wide) of SmolLM2-135M, relative to the exact output: root mean square over "
        f"{result['queries']} positions, all heads, layers {layers} and the texts {texts}. The "
        "first four keys are always read; the others are coded without their mean, which no "
        "softmax sees. Exact search: what leaving out all but k keys costs. By codes: the k best "
        "by codes, without rescoring, weights from the keys. All: every key, scored by its code.",
        "",
        f"| keys found | bits a key | loss of the codes | {' | '.join(map(str, columns))} | all |",
        "|---|---|---|" + "---|" * (len(columns) + 1),
    ]

    def line(*cells: Any) -> str:
        return f"| {' | '.join(str(c) for c in cells)} |"

    shares = [f"{result['share_of_the_k_best'][str(k)]:.3f}" for k in columns]
    lines.append(line("weight of the keys read", "-", "-", *shares, "1"))
    errors = [f"{found['exact search', None, None, k]:.3f}" for k in columns]
    lines.append(line("exact search", "-", "-", *errors, "0"))
    for kind, loss, bits, _ in found:
        if kind == "codes alone":
            errors = [f"{found['by codes', loss, bits, k]:.3f}" for k in columns]
            alone = f"{found[kind, loss, bits, None]:.3f}"
            lines.append(line("by codes", bits, loss, *errors, alone))
    return "\n".join([*lines, "", _environment(result)])


def _extreme(result: dict) -> str:
    lines = [
        f"{result['entries']:,} entries of WordNet, {result['classes']:,} classes: an entry's "
        f"words and gloss as hashed n-grams, its labels the synsets it points at; "
        f"{result['settings']['held_out']:,} held-out entries asked. Recall is that of the exact "
        "best class; right: share of entries whose best class is one of their labels, for the "
        "linear baseline (TF-IDF, nearest class) "
        f"{result['linear baseline, precision@1']['test']:.3f}.",
        "",
        "| last layer | bits | loss | eta | recall 1@1 | 1@10 | 1@100 | right |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for width in result["widths"]:
        right = width["precision@1"]["test"]
        lines.append(f"| {width['width']} | float32 | - | - | 1 | 1 | 1 | {right:.3f} |")
        for row in width["codes"]:
            aware = row["loss"] == "score-aware"
            eta = f"{width['eta at the median norm']:.2f}" if aware else "1"
            recalls = " | ".join(f"{row[n]:.3f}" for n in ("1@1", "1@10", "1@100", "precision@1"))
            lines.append(
                f"| {width['width']} | {row['bits']} | {row['loss']} | {eta} | {recalls} |"
            )
    return "\n".join([*lines, "", _environment(result)])


TABLES: dict[str, Callable[[dict], str]] = {
    "codes": _codes,
    "search_glove6b-100": _search,
    "search_sentences-384": _search,
    "search_sift-128": _search,
    "filters_glove6b-100": _filters,
    "options_glove6b-100": _options,
    "options_scale_glove6b-100": _options_scale,
    "mips_glove6b-100": _mips,
    "adc": _adc,
    "binary": _binary,
    "binary_sift-128": _binary,
    "quality_glove6b-100_100": _quality,
    "quality_glove6b-100_200": _quality,
    "quality_sentences-384_128": _quality,
    "quality_sentences-384_256": _quality,
    "quality_sentences-384_384": _quality,
    "quality_sentences-384_768": _quality,
    "quality_sift-128_128": _quality,
    "quality_sift-128_256": _quality,
    "weights_glove6b-100": _weights,
    "softmax": _softmax,
    "attention": _attention,
    "extreme_classification": _extreme,
}


#: Results behind the table of scale, which is one of several files.
SCALE = ("streaming", "serving", "sharded", "sharded_10000000")


def _scale(streaming: dict, serving: dict, *sharded: dict) -> str:
    built, loaded, http = streaming["build"], streaming["load"], serving["http"]
    gigabytes = 1e-9 * built["peak_anonymous_bytes"]
    lines = [
        "| what | measured | file |",
        "|---|---|---|",
        f"| `build_to_disk` of {streaming['rows']:,} x {streaming['dim']} from a file, "
        f"{streaming['num_leaves']:,} leaves | {built['seconds']:.0f} s, "
        f"{built['cpu_seconds']:.0f} CPU s; {gigabytes:.2f} GB of memory of its own at most, "
        f"{1e-9 * built['peak_resident_bytes']:.1f} GB with pages of files | `streaming.json` |",
        f"| `load` of that index | {loaded['seconds']:.1f} s; "
        f"{1e-9 * loaded['peak_anonymous_bytes']:.2f} GB of memory of its own at most | "
        "`streaming.json` |",
        f"| HTTP service, {http['requests']:,} requests, {http['at_once']} at a time, "
        f"{serving['rows']:,} rows | {http['requests_a_second']:,.0f} requests a second, "
        f"{http['milliseconds']['p50']:.0f} ms (median), {http['milliseconds']['p99']:.0f} ms "
        f"(99 %); {http['wrong']} wrong | `serving.json` |",
        f"| one query by the exported program, plain XLA or with the compiled kernel; `searcher` "
        f"| {serving['exported_xla']['cpu_us']:.0f}, {serving['exported_cpu']['cpu_us']:.0f}; "
        f"{serving['searcher_cpu_us']:.0f} CPU us | `serving.json` |",
    ]
    for found, file in zip(sharded, SCALE[2:], strict=True):
        for effort in found["efforts"]:
            each = [one for one in effort["shards"] if one["leaves"] == "spread"]
            counts = ", ".join(str(one["shards"]) for one in each)
            spent = ", ".join(f"{one['cpu_us']:.0f}" for one in each)
            lines.append(
                f"| one query of a batch of {effort['queries']:,} on {counts} shards, "
                f"{found['rows']:,} rows, {effort['leaves_to_search']} leaves; `search` | {spent}; "
                f"{effort['search_cpu_us']:.0f} CPU us | `{file}.json` |"
            )
        if found["processes"]:
            gains = ", ".join(str(own["gain"]) for own in found["processes"])
            lines.append(
                "| two processes over loopback, a core and half of the leaves each, wall-clock "
                f"time of one process over theirs, {found['rows']:,} rows, batches as above "
                f"| {gains} | `{file}.json` |"
            )
    return "\n".join(lines)


def _between(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    # A page may name the markers of another, within a line.
    if f"\n{begin}\n" not in text:
        return text
    head, rest = text.split(f"\n{begin}\n")
    tail = rest.partition(f"{end}\n")[2]
    return f"{head}\n{begin}\n{table}\n{end}\n{tail}"


def render(text: str) -> str:
    """A page with every table between its markers replaced."""
    if all((RESULTS / f"{name}.json").exists() for name in paper.RESULTS_USED):
        text = _between(text, "paper", paper.table(RESULTS))
    if all((RESULTS / f"{name}.json").exists() for name in summary.RESULTS_USED):
        text = _between(text, "summary", summary.table(RESULTS))
    if devices.BASELINE.exists() and devices.ROOFLINE.exists():
        text = _between(text, "devices", devices.table())
        text = _between(text, "mosaic", devices.mosaic())
    if all((RESULTS / f"{name}.json").exists() for name in SCALE):
        found = (json.loads((RESULTS / f"{name}.json").read_text()) for name in SCALE)
        text = _between(text, "scale", _scale(*found))
    for name, table in TABLES.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            text = _between(text, name, table(json.loads(file.read_text())))
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare, exit 1 on a difference")
    check, different = parser.parse_args().check, False
    for name in PAGES:
        page = ROOT / name
        old = page.read_text()
        new = render(old)
        different |= old != new
        if not check:
            page.write_text(new)
    return int(check and different)


if __name__ == "__main__":
    sys.exit(main())
