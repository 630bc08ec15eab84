"""Classify among more than 100,000 classes, and search the last layer by codes (section 7.6).

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wn      # nothing is installed
    python examples/extreme_classification.py --wordnet wn/usr/share/wordnet --output FILE.json

An input is an entry of WordNet, its words and its gloss, as hashed n-grams: words, pairs of
neighbours, and pieces of four letters of the entry's own words. Its labels are the synsets that the
entry points at (its hypernym, its derived forms, its parts, ...), as the labels of Amazon-670k are
the items related to an item. Classes are all synsets that are pointed at. A tenth of the entries or
less is held out, for validation and test: their texts are never trained on, and a class has on the
average three entries to be learned from.

The linear baseline is the nearest class by TF-IDF of the same n-grams, a class being the mean of
its training entries; all is learned from the same pairs. The network is a bag of embeddings, a
hidden layer and its ReLU, and the classes, trained by a softmax over the labels of the batch and a
sample of the classes (:func:`avq_jax.softmax_cross_entropy`), with gradients of these rows alone.

Then the class rows are quantized, under the reconstruction loss and under the score-aware loss, and
the held-out entries' best class by exact inner product is looked for among the best by codes:
recall 1@1, 1@10, 1@100, and how often the best by codes is right. The weight of the score-aware
loss is chosen on the validation entries, at the fewest bits, among thresholds and powers.

``extreme_classification.json``: 116,650 entries, 113,595 classes, 2,000 test entries. The best
class is right for .270 of them (256 wide) and .253 (1,024 wide), by the linear baseline for .222,
with a standard error of about .01; training took 2 and 3 minutes of CPU. Recall 1@1 at 256, 512,
1024, 2048 bits, reconstruction: .204, .473, .780, .961 (256 wide), .180, .299, .331, .533 (1,024
wide); score-aware: .282, .596, .862, .958 and .185, .292, .358, .640. The weights chosen were
p = 8, the edge of the grid, and p = 2; chosen at 256 bits, they are not the best for all sizes.

Without WordNet the entries are synthetic, and say nothing but that the script runs.
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import re
import sys
import time
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse

import avq_jax

POSITIONS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}


class Entries(NamedTuple):
    """N-grams ``int32[n, g]`` (-1 is none), and of each entry the classes it points at."""

    grams: Any
    labels: list
    num_classes: int


def wordnet(folder, buckets, width):
    """Entries of WordNet's data files; those that point at nothing are left out."""
    place, texts, points = {}, [], []
    for name, position in POSITIONS.items():
        for line in (pathlib.Path(folder) / f"data.{name}").read_text("latin1").splitlines():
            if line.startswith("  "):
                continue  # the licence
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            count = int(fields[3], 16)
            lemmas = [re.sub(r"\(.*\)", "", f) for f in fields[4 : 4 + 2 * count : 2]]
            place[position + fields[0]] = len(texts)
            texts.append(ngrams(" ".join(lemmas), gloss))
            # A count, then symbol, offset, position, and which words, of each pointer.
            rest = fields[4 + 2 * count :]
            pointers = rest[1 : 1 + 4 * int(rest[0])]
            pairs = zip(pointers[1::4], pointers[2::4], strict=True)
            points.append({p.replace("s", "a") + offset for offset, p in pairs})
    targets = [sorted(place[p] for p in each) for each in points]
    number = {t: i for i, t in enumerate(sorted({t for each in targets for t in each}))}
    kept = [i for i, each in enumerate(targets) if each]
    grams = np.full((len(kept), width), -1, np.int32)
    for row, i in zip(grams, kept, strict=True):
        hashed = [zlib.crc32(g.encode()) % buckets for g in texts[i][:width]]
        row[: len(hashed)] = hashed
    return Entries(grams, [[number[t] for t in targets[i]] for i in kept], len(number))


def ngrams(lemmas, gloss):
    own, words = (re.findall(r"[a-z0-9']+", t.lower().replace("_", " ")) for t in (lemmas, gloss))
    pieces = [f"<{w}>"[i : i + 4] for w in own for i in range(len(w) - 1)]
    pairs = [f"{a} {b}" for a, b in itertools.pairwise(words)]
    return list(dict.fromkeys([*(f"+{w}" for w in own), *words, *own, *pairs, *pieces]))


def synthetic(buckets, width, classes=300, entries=3000):
    """Entries of a class share half of their n-grams."""
    draw = np.random.default_rng(0)
    own = draw.integers(buckets, size=(classes, width))
    label = draw.integers(classes, size=entries)
    noise = draw.integers(buckets, size=(entries, width))
    grams = np.where(draw.random((entries, width)) < 0.5, own[label], noise)
    return Entries(grams.astype(np.int32), [[int(y)] for y in label], classes)


def split(entries, held_out, seed=0):
    """Row numbers of training, validation and test entries."""
    order = np.random.default_rng(seed).permutation(len(entries.labels))
    return order[2 * held_out :], order[:held_out], order[held_out : 2 * held_out]


def precision(best, labels):
    """Share of the entries whose best class ``[b]`` is one of their labels."""
    return float(np.mean([b in y for b, y in zip(best.tolist(), labels, strict=True)]))


def idf(grams, buckets):
    found = np.bincount(grams[grams >= 0], minlength=buckets)
    return np.log((1 + len(grams)) / (1 + found)).astype(np.float32)


def linear_baseline(entries, train, asked, buckets):
    """The nearest class of each entry asked, by TF-IDF; a class is the mean of its entries."""

    def unit(a):
        norms = np.sqrt(np.asarray(a.multiply(a).sum(axis=1)).ravel())
        return (scipy.sparse.diags(1 / np.maximum(norms, 1e-9)) @ a).tocsr()

    row, at = np.nonzero(entries.grams >= 0)
    ones, shape = np.ones(len(row), np.float32), (len(entries.grams), buckets)
    x = scipy.sparse.csr_matrix((ones, (row, entries.grams[row, at])), shape)
    x = unit(x.multiply(idf(entries.grams[train], buckets)[None]).tocsr())
    pairs = np.array([(c, i) for i in train for c in entries.labels[i]])
    ones, shape = np.ones(len(pairs), np.float32), (entries.num_classes, len(entries.grams))
    classes = unit(scipy.sparse.csr_matrix((ones, pairs.T), shape) @ x).T
    parts = np.array_split(asked, -(-len(asked) // 200))
    return np.concatenate([np.argmax((x[part] @ classes).toarray(), axis=1) for part in parts])


def hidden(params, rows):
    """``[b, width]`` from the embeddings ``[b, g, e]`` of n-grams; those left out are zero."""
    bag = rows.sum(axis=1)
    bag = bag * jax.lax.rsqrt(jnp.mean(bag * bag, axis=1, keepdims=True) + 1e-3)
    return jax.nn.relu(bag @ params["dense"] + params["bias"])


def embedded(table, grams):
    return avq_jax.gather_rows(table, grams.reshape(-1)).reshape(*grams.shape, -1)


@jax.jit
def encoded(params, grams):
    return hidden(params, embedded(params["grams"], grams))


def states(params, grams):
    """``[n, width]`` hidden states, by parts of one shape."""
    parts = [grams[i : i + 1024] for i in range(0, len(grams), 1024)]
    padded = [np.pad(p, ((0, 1024 - len(p)), (0, 0)), constant_values=-1) for p in parts]
    return np.concatenate([np.asarray(encoded(params, p)) for p in padded])[: len(grams)]


def initial(key, entries, train, width, arguments):
    """Random embeddings, scaled by IDF; a class row is the mean of its entries' hidden states."""
    key_grams, key_dense = jax.random.split(key)
    scale = 0.02 * idf(entries.grams[train], arguments.buckets)[:, None]
    shape = arguments.embedding, width
    params = {
        "grams": scale * jax.random.normal(key_grams, (arguments.buckets, arguments.embedding)),
        "dense": jax.random.normal(key_dense, shape) * (2 / arguments.embedding) ** 0.5,
        "bias": jnp.zeros(width),
    }
    found = states(params, entries.grams[train])
    found -= found.mean(axis=0)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    classes = np.zeros((entries.num_classes, width), np.float32)
    for row, i in zip(found, train, strict=True):
        classes[entries.labels[i]] += row
    classes *= 0.3 / np.maximum(np.linalg.norm(classes, axis=1, keepdims=True), 1e-9)
    return {**params, "classes": jnp.asarray(classes)}


def classes_of(key, labels, num_classes, sampled):
    """The labels of a batch, and one class drawn from each of equal ranges, for all classes."""
    own = jnp.unique(labels, size=len(labels), fill_value=num_classes)
    size = num_classes / sampled
    drawn = (size * (jnp.arange(sampled) + jax.random.uniform(key, (sampled,)))).astype(jnp.int32)
    drawn = jnp.minimum(drawn, num_classes - 1)
    again = jnp.isin(drawn, own) | jnp.append(False, drawn[1:] == drawn[:-1])
    ids = jnp.concatenate([jnp.where(own < num_classes, own, -1), jnp.where(again, -1, drawn)])
    weight = jnp.where(jnp.arange(len(ids)) < len(own), 0.0, math.log(size))
    weight = jnp.where(ids < 0, -jnp.inf, weight)
    return avq_jax.SoftmaxClasses(ids, weight, jnp.searchsorted(own, labels), jnp.zeros(len(own)))


def train_step(key, params, moments, grams, labels, *, optimizers, sampled):
    """A step on a batch: gradients of its n-grams' and classes' rows, and of the hidden layer."""
    keys = dict(zip(("kept", "classes"), jax.random.split(key), strict=True))
    grams = jnp.where(jax.random.bernoulli(keys["kept"], 0.8, grams.shape), grams, -1)
    dense = {name: params[name] for name in ("dense", "bias")}
    bags = embedded(params["grams"], grams)
    classes = classes_of(keys["classes"], labels, len(params["classes"]), sampled)
    rows = avq_jax.gather_rows(params["classes"], classes.ids)

    def loss(dense, bags, rows):
        return avq_jax.softmax_cross_entropy(hidden(dense, bags), rows, classes).mean()

    value, (of_dense, of_bags, of_rows) = jax.value_and_grad(loss, (0, 1, 2))(dense, bags, rows)
    moments = dict(moments)
    updates, moments["dense"] = optimizers["dense"].update(of_dense, moments["dense"])
    params = {**params, **optax.apply_updates(dense, updates)}
    of_grams = avq_jax.SparseRows(grams.reshape(-1), of_bags.reshape(grams.size, -1))
    sparse = {
        "grams": avq_jax.coalesce(of_grams),
        "classes": avq_jax.SparseRows(classes.ids, of_rows),
    }
    for name, gradient in sparse.items():
        params[name], moments[name] = avq_jax.sparse_update(
            optimizers[name], gradient, moments[name], params[name]
        )
    return params, moments, value


def train(key, entries, rows, width, arguments):
    """The parameters after training on the entries ``rows``, each with one of its labels an epoch.

    A loss that is not finite raises ``FloatingPointError``.
    """
    keys = dict(zip(("start", "steps"), jax.random.split(key), strict=True))
    params = initial(keys["start"], entries, rows, width, arguments)
    batch = min(arguments.batch, len(rows))
    count = len(rows) // batch
    optimizers = {
        name: optax.adam(optax.linear_schedule(rate, rate / 50, count * arguments.epochs), b2=0.99)
        for name, rate in (("grams", 0.02), ("classes", 0.01), ("dense", 0.002))
    }
    dense = {name: params[name] for name in ("dense", "bias")}
    tables = {"grams": params["grams"], "classes": params["classes"], "dense": dense}
    moments = {name: optimizers[name].init(table) for name, table in tables.items()}
    sampled = min(arguments.sampled, entries.num_classes)
    step = functools.partial(train_step, optimizers=optimizers, sampled=sampled)
    step = jax.jit(step, donate_argnames=("params", "moments"))
    draw = np.random.default_rng(0)
    for epoch in range(arguments.epochs):
        begin = time.process_time()
        order, losses = draw.permutation(rows), []
        labels = np.array([draw.choice(entries.labels[i]) for i in order], np.int32)
        for i in range(count):
            at = slice(i * batch, (i + 1) * batch)
            key = jax.random.fold_in(keys["steps"], epoch * count + i)
            part = entries.grams[order[at]], labels[at]
            params, moments, loss = step(key, params, moments, *part)
            losses.append(loss)
        mean = float(np.mean(losses))
        if not np.isfinite(mean):
            raise FloatingPointError(f"the loss became {mean} in epoch {epoch}")
        print(f"width {width}, epoch {epoch}: loss {mean:.3f}, "
              f"{time.process_time() - begin:.0f} CPU s", flush=True)  # fmt: skip
    return params


def quantized(rows, bits, weight, sample):
    """Class rows as their codes have them; codewords are learned from a sample of the rows."""
    width = rows.shape[1]
    scaling = avq_jax.scaling(weight, np.linalg.norm(rows, axis=1), dim=width)
    # Codes of four bits, or of eight where there would be less than a coordinate for four.
    each = 4 if bits // 4 <= width else 8
    few = np.random.default_rng(0).permutation(len(rows))[:sample]
    state, _ = avq_jax.fit(
        jax.random.key(0),
        rows[few],
        avq_jax.Scaling(*(h[few] for h in scaling)),
        num_subspaces=bits // each,
        num_codewords=2**each,
        num_iterations=6,
        progress=False,
    )
    return avq_jax.decode(state.codebook, avq_jax.encode(state.codebook, rows, scaling))


def judge(found, truth, labels):
    recall = {f"1@{n}": float(avq_jax.recall_1_at_n(found, truth, n=n)) for n in (1, 10, 100)}
    return {**recall, "precision@1": precision(found[:, 0], labels)}


def weights(rows):
    """Weight functions to choose from: thresholds in units of the package's default, powers."""
    T = float(avq_jax.default_threshold(np.linalg.norm(rows, axis=1), dim=rows.shape[1]))
    thresholds = {f"T = {share * T:.3g}": avq_jax.Threshold(share * T) for share in (1, 2, 3)}
    return {**thresholds, **{f"p = {p}": avq_jax.Power(float(p)) for p in (2, 4, 8)}}


def table(params, entries, parts, arguments):
    """Table 1 of the paper, for one width."""
    # A vector taken from all class rows changes no softmax and no ranking, and shortens them.
    rows = np.asarray(params["classes"] - params["classes"].mean(axis=0))
    norms, width = np.linalg.norm(rows, axis=1), rows.shape[1]
    asked = {name: states(params, entries.grams[part]) for name, part in parts.items()}
    labels = {name: [entries.labels[i] for i in part] for name, part in parts.items()}

    def best(name, rows):
        return np.asarray(avq_jax.brute_force(asked[name], rows, k=min(100, len(rows))).ids)

    def coded(name, bits, weight):
        found = best(name, quantized(rows, bits, weight, arguments.sample))
        return judge(found, truth[name], labels[name])

    truth = {name: best(name, rows) for name in parts}
    tried = {}
    for name, weight in weights(rows).items():
        tried[name] = coded("validation", arguments.bits[0], weight)["1@1"]
        print(f"  {name}: recall 1@1 of the validation entries {tried[name]:.3f}", flush=True)
    name = max(tried, key=tried.__getitem__)
    weight = weights(rows)[name]
    result = {
        "width": width,
        "precision@1": {name: precision(truth[name][:, 0], labels[name]) for name in parts},
        "weight": name,
        "eta at the median norm": float(avq_jax.eta(weight, np.median(norms), dim=width)),
        "validation recall 1@1 of the weights": tried,
        "codes": [],
    }
    for bits in arguments.bits:
        for loss, w in (("reconstruction", avq_jax.Uniform()), ("score-aware", weight)):
            row = coded("test", bits, w)
            result["codes"].append({"bits": bits, "loss": loss, **row})
            told = "".join(f" {k} {v:.3f}" for k, v in row.items())
            print(f"  {bits:5} bits {loss:15}{told}", flush=True)
    return result


def environment():
    """Machine and versions, as the benchmarks record them."""
    sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
    import record

    return record.environment("optax")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wordnet", help="folder of WordNet's data files; synthetic without")
    parser.add_argument("--output", help="write the results as JSON")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--bits", type=int, nargs="+", default=[256, 512, 1024, 2048])
    for name, value in (
        ("held-out", 2000),
        ("buckets", 1 << 17),
        ("ngrams", 64),
        ("embedding", 256),
        ("epochs", 6),
        ("batch", 512),
        ("sampled", 2048),
        ("sample", 30_000),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    arguments = parser.parse_args(argv)
    if arguments.wordnet:
        entries = wordnet(arguments.wordnet, arguments.buckets, arguments.ngrams)
    else:
        entries = synthetic(arguments.buckets, arguments.ngrams)
    rows, validation, test = split(entries, arguments.held_out)
    parts = {"validation": validation, "test": test}
    report: dict = {
        "environment": environment(),
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("wordnet", "output")},
        "entries": len(entries.labels),
        "classes": entries.num_classes,
        "labels": sum(len(y) for y in entries.labels),
        "linear baseline, precision@1": {
            name: precision(
                linear_baseline(entries, rows, part, arguments.buckets),
                [entries.labels[i] for i in part],
            )
            for name, part in parts.items()
        },
        "widths": [],
    }
    print(f"{report['entries']:,} entries, {report['classes']:,} classes; precision@1 of TF-IDF "
          f"{report['linear baseline, precision@1']['test']:.3f}")  # fmt: skip
    for width in arguments.widths:
        begin = time.process_time()
        params = train(jax.random.key(0), entries, rows, width, arguments)
        trained = time.process_time() - begin
        result = {**table(params, entries, parts, arguments), "training_cpu_s": trained}
        print(f"width {width}: precision@1 {result['precision@1']['test']:.3f}", flush=True)
        report["widths"].append(result)
        if arguments.output:
            with open(arguments.output, "w") as file:
                file.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
