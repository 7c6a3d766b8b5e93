"""What the leaves of a checkpoint hold, one leaf at a time in memory."""

import io
from collections import ChainMap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxcomp import _check
from jaxcomp.difference import array_of, leaves_of
from jaxcomp.entropy import order0_entropy
from jaxcomp.node import TiedTensor, is_compressed
from jaxcomp.storage.leaves import code_counts
from jaxcomp.storage.planes import encode_array
from jaxcomp.storage.predict import coded_bytes
from jaxcomp.tree import is_matrix


_PIECE = 1 << 20  # values that are counted at a time
_RUN = 1 << 10  # values of a sample that lie side by side
_SAMPLE = 1 << 20  # values of a large leaf that are sorted and coded
_BINS = 12
_BLOCKS = " ▁▂▃▄▅▆▇█"
_SMALL = 4096  # bytes; what is shorter is not worth a word


class Inspected(NamedTuple):
    """One leaf in plain numbers; what `inspect_tree` says of samples holds here."""

    path: str
    what: str  # what was done to it, or what kind of a leaf it is
    shape: tuple[int, ...]
    dtype: str
    size: int  # values
    zeros: int  # values that are exactly 0
    odd: int  # NaNs and infinities
    low: float | None  # of the finite values; None if there are none
    high: float | None
    distinct: int  # distinct values
    entropy: float  # bits per value, of the distinct values or of the codes
    histogram: tuple[int, ...]  # values in 12 bins
    nbytes: int  # bytes held
    coded: int  # of these, the bytes that lossless coding leaves, about
    hint: str  # what could be done to it
    is_sampled: bool


class Inspection(NamedTuple):
    """What `inspect_tree` found; prints as a table."""

    leaves: tuple[Inspected, ...]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the plain arrays."""
        return sum(row.size * _width(row.dtype) for row in self.leaves) // 8

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers: {"leaves": [...], "total": {...}}."""
        names = ("size", "zeros", "odd", "nbytes", "coded")
        sums = {n: sum(getattr(row, n) for row in self.leaves) for n in names}
        return {
            "leaves": [row._asdict() for row in self.leaves],
            "total": sums | {"dense_bytes": self.dense_bytes},
        }

    def __rich__(self) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)  # columns are many
        table.add_column("leaf", overflow="fold")
        table.add_column("array", no_wrap=True)
        table.add_column("what", overflow="fold", max_width=14)
        for name in ("zeros", "values", "bits"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("histogram", no_wrap=True)
        table.add_column("from, to", no_wrap=True)
        for name in ("bytes", "coded"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.leaves:
            table.add_row(*_cells(row), style="yellow" if row.odd else None)
        total = self.to_dict()["total"]
        table.add_section()
        table.add_row(
            "total",
            "",
            f"{total['odd']:,} NaN or inf" if total["odd"] else "",
            _percent(total["zeros"], total["size"]),
            *["", "", "", ""],
            _short(total["nbytes"]),
            _percent(total["coded"], total["nbytes"]),
            style="bold",
        )
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=110).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def inspect_tree(tree: Any) -> Inspection:
    """Looks at every leaf: its values, how they are spread, what they could take.

    Zeros, NaNs, infinities and the range are exact. Of an array of more than 2**20
    values, distinct values, entropy, histogram and coded size are those of 1,024 runs
    of 1,024 values, evenly spaced; `Inspected.is_sampled` tells. Distinct values are
    then more than that. The histogram has 12 bins from the least to the greatest value,
    but no farther than 4 standard deviations from the mean; the outermost bins count
    what is beyond.

    Args:
      tree: any pytree of concrete arrays and nodes, or a mapping from path to leaf that
        reads each when it is asked for, such as
        `jaxcomp.storage.container.open_file` gives.

    Returns:
      An `Inspection`; ``print`` shows a table, ``to_dict`` gives the numbers. For a
      node, ``nbytes`` is what it holds, and ``entropy`` that of its codes.

    Raises:
      ValueError: a leaf is tied to one that is not there.

    >>> row = inspect_tree({"kernel": jnp.array([[0.0, 1.0], [1.0, 2.0]])}).leaves[0]
    >>> row.zeros, row.distinct, row.entropy, row.high
    (1, 3, 1.5, 2.0)
    """
    leaves = leaves_of(tree)
    return Inspection(tuple(_inspected(path, leaves) for path in leaves))


def sparkline(counts: tuple[int, ...]) -> str:
    """Counts as blocks of eight heights; only nothing at all is blank.

    >>> sparkline((0, 1, 50, 100))
    ' ▁▄█'
    """
    most = max(counts, default=0)
    return "".join(_BLOCKS[-(-8 * n // most) if most else 0] for n in counts)


def _inspected(path: str, leaves: Any) -> Inspected:
    leaf = leaves[path]
    if not _is_numeric(leaf):
        kind = str(leaf.dtype) if _check.is_array(leaf) else type(leaf).__name__
        return _row(path, kind)
    shape, dtype = tuple(leaf.shape), str(leaf.dtype)
    if isinstance(leaf, TiedTensor):
        row = _row(path, leaf.describe())
        return row._replace(shape=shape, dtype=dtype)
    values = array_of(ChainMap({path: leaf}, leaves), path).reshape(-1)
    part = _sample(values)
    distinct = np.unique(_plain(part), return_counts=True)[1]
    row = _row(path, leaf.describe() if is_compressed(leaf) else dtype)._replace(
        shape=shape,
        dtype=dtype,
        size=values.size,
        distinct=distinct.size,
        histogram=_histogram(part),
        is_sampled=part.size < values.size,
        **_counts(values),
    )
    if is_compressed(leaf):
        counts = code_counts(leaf).values()
        bits = sum(float(c.sum()) * order0_entropy(c) for c in counts)
        nbytes = -(-leaf.nbits() // 8)
        coded = min(round(coded_bytes(leaf, 1)), nbytes)
        entropy = bits / max(leaf.size, 1)
        return row._replace(entropy=entropy, nbytes=nbytes, coded=coded)
    nbytes = -(-values.size * _width(dtype) // 8)
    stream = len(encode_array(part)) if part.size else 0
    coded = min(nbytes, round(stream * values.size / max(part.size, 1)))
    row = row._replace(entropy=order0_entropy(distinct), nbytes=nbytes, coded=coded)
    return row._replace(hint=_hint(row, leaf))


def _row(path: str, what: str) -> Inspected:
    """A row without values."""
    return Inspected(
        path=path,
        what=what,
        shape=(),
        dtype="",
        size=0,
        zeros=0,
        odd=0,
        low=None,
        high=None,
        distinct=0,
        entropy=0.0,
        histogram=(),
        nbytes=0,
        coded=0,
        hint="",
        is_sampled=False,
    )


def _is_numeric(leaf: Any) -> bool:
    is_key = _check.is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    return _check.is_array(leaf) and not is_key


def _sample(values: np.ndarray) -> np.ndarray:
    if values.size <= _SAMPLE:
        return values
    starts = np.linspace(0, values.size - _RUN, _SAMPLE // _RUN).astype(np.int64)
    return values[starts[:, None] + np.arange(_RUN)].reshape(-1)


def _plain(x: np.ndarray) -> np.ndarray:
    """As a dtype of NumPy's own, which holds the values of all others exactly."""
    return x if x.dtype.kind in "biufc" else x.astype(np.float32)


def _real(x: np.ndarray) -> np.ndarray:
    """As float64; of complex values the absolute ones."""
    plain = _plain(x)
    return (
        np.abs(plain).astype(np.float64)
        if plain.dtype.kind == "c"
        else plain.astype(np.float64)
    )


def _counts(values: np.ndarray) -> dict[str, Any]:
    """Zeros, NaNs and infinities, and the range of the rest."""
    zeros, odd, ends = 0, 0, list[float]()
    for start in range(0, values.size, _PIECE):
        piece = _real(values[start : start + _PIECE])
        finite = np.isfinite(piece)
        zeros += piece.size - int(np.count_nonzero(piece))
        odd += piece.size - int(np.count_nonzero(finite))
        if not finite.all():
            piece = piece[finite]
        if piece.size:
            ends += [float(piece.min()), float(piece.max())]
    low, high = min(ends, default=None), max(ends, default=None)
    return {"zeros": zeros, "odd": odd, "low": low, "high": high}


def _histogram(part: np.ndarray) -> tuple[int, ...]:
    x = _real(part)
    x = x[np.isfinite(x)]
    if not x.size:
        return ()
    with np.errstate(over="ignore"):  # where they nearly fill a float64
        center, spread = float(x.mean()), 4 * float(x.std())
        low, high = max(x.min(), center - spread), min(x.max(), center + spread)
        is_wide = 0 < high - low < np.inf
    if not is_wide:  # all in the middle
        return (0,) * (_BINS // 2) + (x.size,) + (0,) * (_BINS - _BINS // 2 - 1)
    counts = np.histogram(np.clip(x, low, high), _BINS, (low, high))[0]
    return tuple(counts.tolist())


def _hint(row: Inspected, leaf: Any) -> str:
    """What would make a plain array smaller, in a few words."""
    if row.nbytes < _SMALL:
        return "small"
    at_4_bits = -(-row.size // 2)
    if is_matrix(row.path, leaf) and not row.odd and at_4_bits < row.coded:
        return f"4 bits: {_percent(at_4_bits, row.nbytes)}"
    saves = row.coded < 0.99 * row.nbytes
    return f"lossless: {_percent(row.coded, row.nbytes)}" if saves else "noise"


def _width(dtype: str) -> int:
    """Bits of an element."""
    if not dtype:
        return 0
    known = jnp.dtype(dtype)
    if jnp.issubdtype(known, jnp.integer):
        return jnp.iinfo(known).bits
    if jnp.issubdtype(known, jnp.floating):
        return jnp.finfo(known).bits
    return 8 * known.itemsize


def _cells(row: Inspected) -> list[str]:
    if not row.dtype:
        return [escape(row.path), "", escape(row.what)]
    name = row.dtype
    for long, short in (("float", "f"), ("uint", "u"), ("int", "i")):
        name = name.replace(long, short)
    what = row.hint if row.what == row.dtype else row.what
    found = f"{row.odd:,} NaN or inf" if row.odd else ""
    return [
        escape(row.path),
        escape(f"{name}[{','.join(map(str, row.shape))}]"),
        escape("; ".join(filter(None, [found, what]))),
        _percent(row.zeros, row.size),
        _short(row.distinct) + "+" * row.is_sampled if row.size else "",
        f"{row.entropy:.1f}" if row.size else "",
        sparkline(row.histogram),
        ", ".join(_end(x) for x in (row.low, row.high) if x is not None),
        _short(row.nbytes) if row.nbytes else "",
        _percent(row.coded, row.nbytes),
    ]


def _end(x: float) -> str:
    """An end of a range in few characters."""
    return f"{x:.0f}" if 10 <= abs(x) < 100_000 else f"{x:.2g}"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""


def _short(number: int) -> str:
    """A number in at most five characters."""
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 10 ** (power + (power == 3)):
            return f"{number / 10**power:.3g}{letter}"
    return str(number)
