"""The programs of the cases of compile.py, on arrays that exist in name only."""

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

LEAVES, PROBED, K, RESCORE = 1024, 30, 10, 100


def compiled(case: str, device, b: int, n: int, tpu: bool):
    """The program of a case for b queries and n rows, compiled for a device of a topology."""
    from xla_kernels import PackedCodes, PackedTree
    from xla_kernels.tree_search.packed import SlotGains

    _, shape, form = case.split("/")
    if form.startswith("mosaic"):
        import mosaic_gpu

        return mosaic_gpu.compiled(form.removeprefix("mosaic_"), device, n)
    m, k, s = map(int, shape.split("x"))
    narrow, d = tpu and k <= 16, m * s
    sharding = SingleDeviceSharding(device)

    def array(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    data = array((m, n), jnp.uint4 if narrow else jnp.uint8)
    codes = PackedCodes(data, n, m, k, "nibbles" if narrow else "columns")
    queries, rows = array((b, d)), array((n, d), jnp.bfloat16)
    name = "pallas_tpu" if tpu else "pallas_gpu"
    if form == "brute":
        return exact(queries, array((n, d)))
    if form in ("bins", "exact", "tables", "few"):
        factored = (queries, array((m, k, s)))
        tables = array((b, m, k)) if form == "tables" else factored
        return flat(name, tables, codes, 1.0 if form == "exact" else 0.95)
    tree = PackedTree(
        centroids=array((LEAVES, d)),
        tiles=array((0, d // 2, 16, 2), jnp.int16),
        centroid_scale=array(()),
        ranking=array((0, d)),
        leaf_offset=array((0,)),
        starts=array((LEAVES + 1,), jnp.int32),
        # Additive codewords are as long as a row.
        codewords=array((m, d if form == "tree_additive" else s, k)),
        codes=codes,
        slot_offset=array((0,)),
        slot_rows=array((n,), jnp.int32),
        usable=array((1, n), jnp.bool_),
        spread=array((LEAVES,)),
    )
    if form == "tree_scale":
        tree = tree._replace(gains=SlotGains(array((n,), jnp.uint8), array((16,))))
    if form == "tree_xla":
        return plain(tree, queries, rows)
    if form == "search":
        return whole(name, tree, queries, rows)
    return scan(name, tree, queries, 1.0 if form == "tree_exact" else 0.95, array)


def flat(name, tables, codes, target):
    """The flat scan and its selection."""
    from xla_kernels import FactoredTables, adc_top_k

    @jax.jit
    def run(tables, codes):
        tables = FactoredTables(*tables) if isinstance(tables, tuple) else tables
        return adc_top_k(tables, codes, K, recall_target=target, implementation=name)

    return run.lower(tables, codes).compile()


def exact(queries, rows):
    """The search of all rows that trees are measured by."""
    import avq_jax

    @jax.jit
    def run(queries, rows):
        return tuple(avq_jax.brute_force(queries, rows, k=K, recall_target=0.95))

    return run.lower(queries, rows).compile()


def plain(tree, queries, rows):
    """The tree in plain XLA, for its memory."""
    from xla_kernels import tree_search

    @jax.jit
    def run(tree, queries, rows):
        options = {"k": K, "leaves_to_search": PROBED, "rescore": RESCORE, "rows": rows}
        return tree_search(tree, queries, implementation="xla", **options)

    return run.lower(tree, queries, rows).compile()


def scan(name, tree, queries, target, array):
    """The kernel on a work list; what makes lists is part of `whole`."""
    from xla_kernels.tree_search import pallas, worklist
    from xla_kernels.tree_search.effort import Effort

    b, effort = queries.shape[0], Effort(K, PROBED, LEAVES, float("inf"), RESCORE, RESCORE)
    module, sizes = pallas.parts_of(pallas.Kernel(name, target, None, False))
    plan = worklist.plan_of(tree, b, effort, RESCORE, target, sizes)
    integers = [array((plan.entries,), jnp.int32) for _ in range(3)]
    found = [array((b, plan.windows), jnp.int32) for _ in range(3)]
    members = array((plan.entries, plan.group), jnp.int32)
    work = worklist.Round(*integers, members, array((), jnp.int32), *found)

    @jax.jit
    def run(tree, queries, work):
        operands = pallas.operands_of(module, tree, queries, pallas.slot_terms(tree))
        return module.scan(operands, work, plan, axes=None, interpret=False)

    return run.lower(tree, queries, work).compile()


def whole(name, tree, queries, rows):
    """All of `avq_jax.search`."""
    import avq_jax
    from avq_jax.mips.index import Tree
    from avq_jax.mips.rescoring import Store

    n, d = rows.shape
    store = Store(rows, None)
    index = avq_jax.Index(Tree(tree), store, None, None, "dot", n, d, PROBED)

    @jax.jit
    def run(index, queries):
        options = {"k": K, "rescore": RESCORE, "recall_target": 0.95}
        return tuple(avq_jax.search(index, queries, implementation=name, **options))

    return run.lower(index, queries).compile()
