"""What was done to every leaf of a tree, what it takes and what it cost."""

import csv
import io
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxcomp import _check
from jaxcomp.entropy import order0_entropy
from jaxcomp.node import densify, flatten, is_compressed
from jaxcomp.storage.leaves import code_counts, node_parts
from jaxcomp.tree import NOT_MATRICES, last_key, strays


class Row(NamedTuple):
    """One leaf, or all of them, in plain numbers."""

    path: str
    done: str  # what was done to the leaf, or why it was left alone
    shape: tuple[int, ...]
    dtype: str
    size: int  # weights
    zeros: int  # weights that are exactly 0
    values: int | None  # distinct values; None for the total
    bits: float  # stored bits per weight, as `CompressedArray.nbits` counts
    entropy: float  # bits per weight that an ideal order-0 coder leaves
    nbytes: int  # stored bytes
    dense_bytes: int  # bytes of the plain array
    error: float | None  # ||w - reference|| / ||reference||; None without a reference

    @property
    def ratio(self) -> float:
        """Dense bytes to stored bytes; infinite for a tied leaf, which stores none."""
        if not self.dense_bytes:
            return 1.0
        return self.dense_bytes / self.nbytes if self.nbytes else math.inf


class Report(NamedTuple):
    """What `report` found; prints as a table."""

    leaves: tuple[Row, ...]
    total: Row
    strays: int  # weights that moved from zero while training, see `strays`

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers: {"leaves": [...], "total": {...}, "strays": 0}."""
        return {
            "leaves": [row._asdict() | {"ratio": row.ratio} for row in self.leaves],
            "total": self.total._asdict() | {"ratio": self.total.ratio},
            "strays": self.strays,
        }

    def to_csv(self) -> str:
        """One line for each leaf and one for the total, under a line of names."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*Row._fields, "ratio"])
        for row in (*self.leaves, self.total):
            shape = "x".join(map(str, row.shape))
            writer.writerow([*row._replace(shape=shape), row.ratio])  # type: ignore[arg-type]
        return text.getvalue()

    def __rich__(self) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("leaf", overflow="fold")
        table.add_column("what", overflow="fold")
        table.add_column("array", no_wrap=True)
        numbers = ["zeros", "values", "bits", "coded", "bytes", "ratio"]
        for name in [*numbers, *(["error"] if self.total.error is not None else [])]:
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.leaves:
            table.add_row(*_cells(row))
        table.add_section()
        table.add_row(*_cells(self.total), style="bold")
        if self.strays:
            table.caption = (
                f"{self.strays:,} weights were found that moved from zero while "
                "training. Chain the pruning link last."
            )
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=110).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _cells(row: Row) -> list[str]:
    shape = ",".join(map(str, row.shape))
    cells = [
        escape(row.path),
        escape(row.done),
        f"{_short(row.dtype)}[{shape}]" if row.dtype else "",
        f"{row.zeros / row.size:.1%}" if row.size else "",
        "" if row.values is None else f"{row.values:,}",
        f"{row.bits:.2f}" if row.size else "",
        f"{row.entropy:.2f}" if row.size else "",
        f"{row.nbytes:,}",
        f"{row.ratio:.1f}x" if row.nbytes else "",
    ]
    return cells if row.error is None else [*cells, f"{row.error:.4f}"]


def _short(dtype: str) -> str:
    """A dtype as compilers print it: f32, bf16, u8."""
    for long, short in (("float", "f"), ("uint", "u"), ("int", "i")):
        dtype = dtype.replace(long, short)
    return dtype


def report(tree: Any, reference: Any = None, *, state: Any = None) -> Report:
    """Reads off every leaf what was done to it, what it takes and what it cost.

    Args:
      tree: any pytree of arrays and nodes, concrete.
      reference: the tree before compression, of the same paths and dense shapes; None
        leaves the errors out.
      state: of the optimizer; weights that its links found non-zero where they had put
        zeros are told below the table.

    Returns:
      A `Report`; ``print`` shows a table, ``to_dict`` and ``to_csv`` give the numbers.
      Bytes are those of the arrays as they are held; ``entropy`` ("coded" in the table)
      says what a file needs of them, in bits per weight: the order-0 entropy of the
      codes plus all other arrays; for a plain array, the entropy of its zeros plus the
      other weights in full, or that of its values plus a table, whichever is less.

    Raises:
      ValueError: ``reference`` has other paths or shapes.

    >>> import jaxcomp as jc
    >>> small = jc.quantize_tree({"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)})
    >>> report(small).total.nbytes
    576
    """
    paths, leaves, _ = flatten(tree)
    dense = flatten(densify(tree))[1]
    errors: list[tuple[float, float] | None] = [None] * len(leaves)
    if reference is not None:
        errors = _errors(paths, dense, reference)
    rows = [
        _row(path, leaf, array, _relative(error))
        for path, leaf, array, error in zip(paths, leaves, dense, errors, strict=True)
    ]
    summed = [sum(pair) for pair in zip(*(e for e in errors if e), strict=True)]
    size = sum(row.size for row in rows)
    total = Row(
        path="total",
        done="",
        shape=(),
        dtype="",
        size=size,
        zeros=sum(row.zeros for row in rows),
        values=None,
        bits=sum(row.bits * row.size for row in rows) / max(size, 1),
        entropy=sum(row.entropy * row.size for row in rows) / max(size, 1),
        nbytes=sum(row.nbytes for row in rows),
        dense_bytes=sum(row.dense_bytes for row in rows),
        error=_relative(tuple(summed)) if summed else None,
    )
    return Report(tuple(rows), total, strays(state))


def _row(path: str, leaf: Any, dense: Any, error: float | None) -> Row:
    if not _is_numeric(dense):
        kind = type(leaf).__name__ if not _check.is_array(leaf) else str(leaf.dtype)
        return Row(path, f"skipped: {kind}", (), "", 0, 0, None, 0.0, 0.0, 0, 0, None)
    values = np.asarray(dense).reshape(-1)
    counts = np.unique(values, return_counts=True)[1]
    zeros = values.size - int(np.count_nonzero(values))
    width = _width(dense.dtype)
    nbits = leaf.nbits() if is_compressed(leaf) else values.size * width
    if is_compressed(leaf):
        coded = _coded_bits(leaf)
    else:
        mask = order0_entropy(np.array([zeros, values.size - zeros])) * values.size
        plain = mask + (values.size - zeros) * width
        shared = order0_entropy(counts) * values.size + counts.size * width
        coded = min(plain, shared)
    return Row(
        path=path,
        done=leaf.describe() if is_compressed(leaf) else _reason(path, leaf, zeros),
        shape=tuple(dense.shape),
        dtype=str(dense.dtype),
        size=values.size,
        zeros=zeros,
        values=counts.size,
        bits=nbits / max(values.size, 1),
        entropy=coded / max(values.size, 1),
        nbytes=-(-nbits // 8),
        dense_bytes=-(-values.size * width // 8),
        error=error,
    )


def _is_numeric(x: Any) -> bool:
    return _check.is_array(x) and not jnp.issubdtype(x.dtype, jax.dtypes.extended)


def _width(dtype: Any) -> int:
    """True bits of an element: ``nbytes`` says a whole byte for the sub-byte dtypes."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return 8 * dtype.itemsize


def _coded_bits(node: Any) -> float:
    """The entropy of a node's codes, and its other arrays in full, in bits."""
    held, arrays = code_counts(node), node_parts(node)[1]
    packed = sum(8 * arrays[name].size for name in held)
    entropy = sum(counts.sum() * order0_entropy(counts) for counts in held.values())
    return float(entropy) + node.nbits() - packed


def _reason(path: str, leaf: Any, zeros: int) -> str:
    """What became of a leaf that is a plain array."""
    if not _check.is_floating(leaf):
        return "skipped: not floating"
    if last_key(path) in NOT_MATRICES:
        return f"skipped: {last_key(path)}"
    if leaf.ndim < 2:
        return f"skipped: {leaf.ndim}-D"
    return "pruned" if zeros else "dense"


def _relative(error: tuple[float, float] | None) -> float | None:
    if error is None:
        return None
    off, norm = error
    return math.sqrt(off / norm) if norm else math.inf if off else 0.0


def _errors(
    paths: list[str], dense: list[Any], reference: Any
) -> list[tuple[float, float] | None]:
    """(squared distance, squared norm of the reference) of every numeric leaf."""
    named = dict(zip(*flatten(densify(reference))[:2], strict=True))
    odd = sorted(set(named) ^ set(paths))
    if odd:
        raise ValueError(
            f"report needs a reference with the same leaves, but only one of the two "
            f"trees has {odd[0]!r}."
        )

    def error(path: str, leaf: Any) -> tuple[float, float] | None:
        model = named[path]
        if not _is_numeric(leaf) or not _is_numeric(model):
            return None
        if leaf.shape != model.shape:
            raise ValueError(
                f"report needs a reference of the same shapes, but leaf {path!r} is "
                f"{_check.describe(leaf)} and there {_check.describe(model)}."
            )
        if not _check.is_floating(leaf):
            return None
        ours, theirs = (np.asarray(x).astype(np.float64) for x in (leaf, model))
        return float(np.sum((ours - theirs) ** 2)), float(np.sum(theirs**2))

    return [error(path, leaf) for path, leaf in zip(paths, dense, strict=True)]
