"""Times masks, grids and codebooks beside others, and as they grow to 100 M weights.

`OMP_NUM_THREADS=2 python benchmarks/trees.py` takes some twenty minutes and needs
PyTorch and scikit-learn. Ways take turns in one process; medians are compared. Memory
is the most that a process of its own held, less what it held before. Grids are timed
twice: as the first call of a program has it, whose result needs memory that the system
hands out page by page, and again where the process holds enough of it (glibc only).
"""

import ctypes
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc


SIZE = 22_713_216  # weights of all-MiniLM-L6-v2
LEAVES = 24
SPARSITY = 0.9
ROUNDS = 7
LIBC = ctypes.CDLL(None)  # glibc


def seconds(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def medians(
    ways: dict[str, Callable[[], Any]],
    rounds: int = ROUNDS,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Way -> median seconds; each is run once before, which compiles it."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, run in ways.items():
            before()
            taken = seconds(run)
            if turn:
                times[way].append(taken)
    return {way: statistics.median(found) for way, found in times.items()}


def weights(size: int, leaves: int = 1) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    rows = size // leaves // 384
    return {
        f"layer_{i}": jnp.asarray(rng.standard_normal((rows, 384), dtype=np.float32))
        for i in range(leaves)
    }


def table(title: str, found: dict[str, float], base: str, notes: Any = None) -> None:
    print(
        f"\n{title}\n\n| way | median s | times `{base}` | |\n| --- | --- | --- | --- |"
    )
    for way, taken in found.items():
        note = (notes or {}).get(way, "")
        print(f"| {way} | {taken:.3f} | {taken / found[base]:.2f} | {note} |")


def global_mask() -> None:
    import torch
    import torch.nn.utils.prune as torch_prune

    params = weights(SIZE, LEAVES)
    lowered = jax.jit(
        lambda p: jc.prune.masks(p, SPARSITY, budget=jc.prune.global_budget)
    ).lower(params)
    start = time.perf_counter()
    masks = lowered.compile()
    compiling = time.perf_counter() - start
    flat = np.concatenate([np.asarray(w).reshape(-1) for w in params.values()])
    layers = [torch.nn.Linear(384, w.shape[0], bias=False) for w in params.values()]
    for layer, w in zip(layers, params.values(), strict=True):
        layer.weight.data = torch.from_numpy(np.array(w))

    def by_torch() -> None:
        pairs = [(layer, "weight") for layer in layers]
        torch_prune.global_unstructured(
            pairs, pruning_method=torch_prune.L1Unstructured, amount=SPARSITY
        )
        for layer in layers:
            torch_prune.remove(layer, "weight")
            layer.weight.data = layer.weight.data  # as it is now: zeros stay

    def by_numpy() -> np.ndarray:
        size = np.abs(flat)
        zeros = round(SPARSITY * size.size)
        return size > np.partition(size, zeros - 1)[zeros - 1]

    found = medians(
        {
            "torch `global_unstructured`": by_torch,
            "`numpy.partition`, and the mask": by_numpy,
            "`prune.masks`, jitted": lambda: masks(params),
        }
    )
    title = f"**Global mask** of {LEAVES} leaves, {flat.size:,} weights, 90% zeros."
    table(title, found, "`prune.masks`, jitted")
    print(f"\nCompiling took {compiling:.1f} s, once.")


def clustering() -> None:
    from sklearn.cluster import KMeans

    x = next(iter(weights(2**20).values()))
    values = np.asarray(x).reshape(-1, 1)
    sought = KMeans(256, n_init=1, random_state=0)
    found = medians(
        {
            "scikit-learn `KMeans(256, n_init=1)`": lambda: sought.fit(values).labels_,
            "`palettize`": lambda: jc.palettize(x, 256).codes,
        },
        rounds=3,
    )
    ours = float(np.sum((np.asarray(jc.palettize(x, 256).dense()) - x) ** 2))
    notes = {
        "scikit-learn `KMeans(256, n_init=1)`": f"error {sought.inertia_:.3f}",
        "`palettize`": f"error {ours:.3f}",
    }
    title = f"**256 clusters** of {values.size:,} weights; errors are sums of squares."
    table(title, found, "`palettize`", notes)


def grids() -> None:
    params = weights(SIZE, LEAVES)
    ways: dict[str, Callable[[], Any]] = {}
    copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    ways["copy of the tree"] = lambda: copied(params)
    for bits, axis in ((8, 0), (4, 0), (2, 0), (4, -1)):
        quantized = partial(jc.quantize_tree, bits=bits, axis=axis, group=64)
        name = f"{bits} bits, axis {axis}, group 64"
        ways[f"quantize, {name}"] = partial(quantized, params)
        ways[f"densify, {name}"] = partial(jc.densify, quantized(params))
    shared = jc.share_tree(params, clusters=16)
    ways["densify, 16 clusters"] = partial(jc.densify, shared)
    title = f"**Grids**, {SIZE:,} weights in {LEAVES} leaves, results in"
    found = medians(ways, before=lambda: LIBC.malloc_trim(0))
    table(f"{title} new memory.", found, "copy of the tree")
    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD: what is freed stays with the process.
    for setting, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**30)):
        LIBC.mallopt(setting, value)
    table(f"{title} memory that is held.", medians(ways), "copy of the tree")


GROWN: dict[str, Callable[[jax.Array], Any]] = {
    "global mask": lambda x: jax.jit(
        lambda x: jc.prune.masks({"x": x}, SPARSITY, budget=jc.prune.global_budget)
    )(x),
    "`quantize`, 4 bits, group 64": lambda x: jc.quantize(x, 4, group=64),
    "`quantize_searched`, group 64": lambda x: jc.quantize_searched(x, 4, group=64),
    "`palettize`, 16": lambda x: jc.palettize(x, 16),
    "`palettize`, 256": lambda x: jc.palettize(x, 256),
    "`palettize_to_rate`, 3 bits": lambda x: jc.palettize_to_rate(x, 3.0),
    "`quantize_to_rate`, 3 bits": lambda x: jc.quantize_to_rate(x, 3.0),
}


def held(what: str) -> int:
    """kB of memory that this process holds, or held at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1])
    raise ValueError(f"no {what} in /proc/self/status")


def grow(way: str, size: int) -> None:
    """Prints seconds and peak memory of one way, in a process of its own."""
    x = next(iter(weights(size).values()))
    jax.block_until_ready(x)
    small = next(iter(weights(2**20).values()))
    jax.block_until_ready(GROWN[way](small))  # what does not depend on the shape
    Path("/proc/self/clear_refs").write_text("5")  # forget what was held before
    before = held("VmRSS")
    first = seconds(lambda: GROWN[way](x))
    after = held("VmHWM")
    again = seconds(lambda: GROWN[way](x))  # compiled for this shape
    print(f"{min(first, again):.3f} {(after - before) * 1024 / (4 * size):.2f}")


def growth() -> None:
    sizes = [1_000_000, 10_000_000, 100_000_000]
    print("\n**Growth**: ns per weight, and peak memory over the input's own bytes.\n")
    print("| way | " + " | ".join(f"{s:,}" for s in sizes) + " | memory at the last |")
    print("| --- " * (len(sizes) + 2) + "|")
    for way in GROWN:
        cells = []
        for size in sizes:
            run = [sys.executable, __file__, way, str(size)]
            out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
            taken, memory = map(float, out.split()[-2:])
            cells.append(f"{1e9 * taken / size:.1f}")
        print(f"| {way} | " + " | ".join(cells) + f" | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        grow(sys.argv[1], int(sys.argv[2]))
    else:
        names = ("jax", "numpy", "torch", "scikit-learn")
        print(platform.machine() + ", " + ", ".join(f"{n} {version(n)}" for n in names))
        for part in (global_mask, clustering, grids, growth):
            part()
