"""What differs between two checkpoints, leaf by leaf, one leaf at a time in memory."""

import io
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxcomp import _check
from jaxcomp.node import DependentArray, flatten, is_compressed


_PIECE = 1 << 20  # values that are compared at a time


class Change(NamedTuple):
    """What became of one leaf, or of all of them, from the first tree to the second."""

    path: str
    what: (
        str  # "same", "changed", "only in the first", or dtypes and shapes that differ
    )
    size: int  # values that were compared
    changed: int  # of them, those that are not equal; two NaNs are
    error: float  # ||a - b|| / ||a||
    sqnr: float  # 10 log10(sum a^2 / sum (a - b)^2), in dB; infinite if nothing changed
    largest: float  # the largest |a - b|
    gained: int  # zeros that the second has and the first has not
    lost: int


class Difference(NamedTuple):
    """What `difference` found; prints as a table."""

    rows: tuple[Change, ...]
    total: Change  # its ``changed`` and the like are sums over the rows

    @property
    def is_same(self) -> bool:
        """Whether both have the same leaves, shapes, dtypes and values."""
        return self.total.what == "same"

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers: {"same": ..., "rows": [...], "total": {...}}."""
        return {
            "same": self.is_same,
            "rows": [row._asdict() for row in self.rows],
            "total": self.total._asdict(),
        }

    def __rich__(self) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("leaf", overflow="fold")
        table.add_column("what", overflow="fold")
        for name in ("values", "error", "SQNR dB", "largest", "zeros +", "zeros -"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*_cells(row), style="dim" if row.what == "same" else None)
        table.add_section()
        table.add_row(*_cells(self.total), style="bold")
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=110).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


class _Sums(NamedTuple):
    """What is known of the values of some leaves; sums, but for ``largest``."""

    size: int = 0
    changed: int = 0
    off: float = 0.0  # sum (a - b)^2
    norm: float = 0.0  # sum a^2
    largest: float = 0.0
    gained: int = 0
    lost: int = 0

    def plus(self, other: "_Sums") -> "_Sums":
        return _Sums(
            size=self.size + other.size,
            changed=self.changed + other.changed,
            off=self.off + other.off,
            norm=self.norm + other.norm,
            largest=max(self.largest, other.largest),
            gained=self.gained + other.gained,
            lost=self.lost + other.lost,
        )


def leaves_of(tree: Any) -> Mapping[str, Any]:
    """The leaves of a tree by path; a mapping such as `open_file`'s is that already.

    >>> list(leaves_of({"dense": [jnp.ones(2), 3]}))
    ['dense/0', 'dense/1']
    """
    if isinstance(tree, Mapping) and jax.tree_util.all_leaves([tree]):
        return tree  # no pytree, so what is in it is not to be seen by JAX
    return dict(zip(*flatten(tree)[:2], strict=True))


def array_of(leaves: Mapping[str, Any], path: str) -> Any:
    """The NumPy array that a leaf stands for; what is no array comes as it is.

    Raises:
      ValueError: the leaf is tied to one that is not there, or to itself.

    >>> import jaxcomp as jc
    >>> array_of({"w": jc.quantize(jnp.ones((1, 2)), bits=4)}, "w")
    array([[1., 1.]], dtype=float32)
    """

    def whole(name: str, seen: tuple[str, ...]) -> Any:
        leaf, seen = leaves[name], (*seen, name)
        if not isinstance(leaf, DependentArray):
            return leaf
        if leaf.source in seen or leaf.source not in leaves:
            raise ValueError(
                f"array_of needs the leaf that {path!r} is tied to, but "
                f"{leaf.source!r} is {'a circle' if leaf.source in seen else 'missing'}"
                ". Pass the whole tree."
            )
        return leaf.resolve(whole(leaf.source, seen))

    leaf = whole(path, ())
    if is_compressed(leaf):
        leaf = leaf.dense()
    is_plain = _check.is_array(leaf) and not _is_key(leaf)
    return np.asarray(leaf) if is_plain else leaf


def difference(a: Any, b: Any) -> Difference:
    """Compares two trees, compressed or not, by what their leaves stand for.

    Sums are of float64. Where paths differ, "." counts as "/", and the "/value" at the
    end of an ``nnx.State``'s does not count, as in `read_checkpoint`.

    Args:
      a: a pytree, or a mapping from path to leaf that reads each when it is asked for,
        such as `jaxcomp.storage.container.open_file` gives.
      b: another, to be compared with it.

    Returns:
      A `Difference`; ``print`` shows a table, ``to_dict`` gives the numbers. An error
      is infinite where a NaN, an infinity or a change met nothing to measure it by. In
      the total, error and SQNR are those of the leaves that are no integers.

    Raises:
      ValueError: a leaf is tied to one that is not there.

    >>> found = difference({"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([3.0, 0.0])})
    >>> found.rows[0].error, found.rows[0].largest, found.rows[0].gained
    (0.8, 4.0, 1)
    """
    first, second = leaves_of(a), leaves_of(b)
    pairs = _pairs(list(first), list(second))
    rows, total = [], _Sums()
    for in_first, in_second in pairs:
        path = in_first or in_second or ""
        if in_first is None or in_second is None:
            side = "first" if in_second is None else "second"
            rows.append(_change(path, f"only in the {side}", _Sums()))
            continue
        x, y = array_of(first, in_first), array_of(second, in_second)
        what, sums = _compared(x, y)
        rows.append(_change(path, what, sums))
        if not _is_inexact(x):  # position ids would drown all errors of weights
            sums = sums._replace(off=0.0, norm=0.0)
        total = total.plus(sums)
    is_same = all(row.what == "same" for row in rows)
    found = _change("total", "same" if is_same else "changed", total)
    return Difference(tuple(rows), found)


def _pairs(
    first: list[str], second: list[str]
) -> Iterator[tuple[str | None, str | None]]:
    """Each path of the first with its own of the second, and those without."""
    exact = set(first) & set(second)
    loose = [path for path in second if path not in exact]
    plain = {_plain(path): path for path in loose}
    if len(plain) < len(loose):  # two of them would match the same path
        plain = {path: path for path in loose}
    for path in first:
        yield path, path if path in exact else plain.pop(_plain(path), None)
    yield from ((None, path) for path in plain.values())


def _plain(path: str) -> str:
    return path.replace(".", "/").removesuffix("/value")


def _compared(x: Any, y: Any) -> tuple[str, _Sums]:
    if not _check.is_array(x) or not _check.is_array(y):
        same = type(x) is type(y) and x == y
        return ("same" if same else f"{_text(x)} -> {_text(y)}"), _Sums()
    if x.shape != y.shape or _is_key(x) != _is_key(y):
        return f"{_text(x)} -> {_text(y)}", _Sums()
    if _is_key(x):
        same = x.dtype == y.dtype and bool(jnp.all(x == y))
        return "same" if same else "changed", _Sums()
    one, two, sums = x.reshape(-1), y.reshape(-1), _Sums()
    for start in range(0, one.size, _PIECE):
        piece = slice(start, start + _PIECE)
        sums = sums.plus(_piece_sums(one[piece], two[piece]))
    if x.dtype != y.dtype:
        return f"{_text(x)} -> {_text(y)}", sums
    return "changed" if sums.changed else "same", sums


def _text(x: Any) -> str:
    return _check.describe(x) if _check.is_array(x) else repr(x)[:40]


def _is_inexact(x: Any) -> bool:
    return _check.is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.extended)


def _piece_sums(x: np.ndarray, y: np.ndarray) -> _Sums:
    a, b = _wide(x), _wide(y)
    with np.errstate(invalid="ignore", over="ignore"):
        # As they are, where they can be: a float64 cannot hold all int64.
        equal = x == y if x.dtype == y.dtype else a == b
        equal = equal | (np.isnan(a) & np.isnan(b))
        off = np.abs(np.where(equal, 0, a - b))
        off = np.where(np.isfinite(off), off, np.inf)
        size = np.abs(np.where(np.isfinite(a), a, 0))
        return _Sums(
            size=x.size,
            changed=x.size - int(np.count_nonzero(equal)),
            off=float(np.sum(off**2)),
            norm=float(np.sum(size**2)),
            largest=float(np.max(off, initial=0)),
            gained=int(np.count_nonzero((b == 0) & (a != 0))),
            lost=int(np.count_nonzero((a == 0) & (b != 0))),
        )


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def _change(path: str, what: str, sums: _Sums) -> Change:
    ratio = sums.off / sums.norm if sums.norm else math.inf if sums.off else 0.0
    return Change(
        path=path,
        what=what,
        size=sums.size,
        changed=sums.changed,
        error=math.sqrt(ratio),
        sqnr=-10 * math.log10(ratio) if ratio else math.inf,
        largest=sums.largest,
        gained=sums.gained,
        lost=sums.lost,
    )


def _cells(row: Change) -> list[str]:
    cells = [escape(row.path), escape(row.what), f"{row.size:,}" if row.size else ""]
    if not row.size:
        return cells
    if not row.changed:
        return [*cells, "0", "exact", "0", "", ""]
    return [
        *cells,
        f"{row.error:.3g}",
        f"{row.sqnr:.2f}",
        f"{row.largest:.3g}",
        f"{row.gained:,}",
        f"{row.lost:,}",
    ]
