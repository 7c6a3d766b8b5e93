"""Labels through what moves entries: reshapes, slices, gathers."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from jaxcomp.program.axes import Axis, Book, Rule, Value, is_zero, nonzero


def transpose(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    return [picked(ins[0], eqn.params["permutation"])]


def squeeze(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    gone = eqn.params["dimensions"]
    return [picked(ins[0], [a for a in range(len(ins[0].axes)) if a not in gone])]


def picked(x: Value, axes: Sequence[int]) -> Value:
    """A value with only these of its axes."""
    return x._replace(axes=tuple(x.axes[a] for a in axes))


def broadcast(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """Axes keep their labels; new ones follow what they meet."""
    x, before, after = ins[0], eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    axes = [book.fresh(n, is_zero(x)) for n in after]
    for old, new in enumerate(eqn.params["broadcast_dimensions"]):
        if before[old] == after[new]:
            axes[new] = x.axes[old]
    same = math.prod(before) == math.prod(after)
    return [x._replace(axes=tuple(axes), leaf=x.leaf if same else None)]


def _each(move: Callable[[Any, int, np.ndarray], list[np.ndarray]]) -> Rule:
    """The rule of what takes whole slices, each axis by itself.

    Args:
      move: (equation, axis, what is along it) -> of each result what is along it.
    """

    def rule(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
        x = ins[0]
        axes: list[list[Axis | str]] = [[] for _ in eqn.outvars]
        for a, axis in enumerate(x.axes):
            parts: list[Axis | str] = [axis for _ in eqn.outvars]
            if isinstance(axis, Axis):
                both = move(eqn, a, axis.labels), move(eqn, a, axis.zero)
                parts = [Axis(*pair) for pair in zip(*both, strict=True)]
            for found, part in zip(axes, parts, strict=True):
                if isinstance(part, Axis) and len(part.labels) == 1:
                    part = book.freeze(part, book.name(eqn))  # the last one stays
                found.append(part)
        return [Value(tuple(a), leaf=x.leaf, number=x.number) for a in axes]

    return rule


def _sliced(eqn: Any, axis: int, x: np.ndarray) -> list[np.ndarray]:
    first, last = (eqn.params[f"{end}_indices"][axis] for end in ("start", "limit"))
    strides = eqn.params["strides"]
    return [x[first : last : 1 if strides is None else strides[axis]]]


def _parts(eqn: Any, axis: int, x: np.ndarray) -> list[np.ndarray]:
    if axis != eqn.params["axis"]:
        return [x for _ in eqn.outvars]
    return np.split(x, np.cumsum(eqn.params["sizes"])[:-1])


def _reversed(eqn: Any, axis: int, x: np.ndarray) -> list[np.ndarray]:
    return [x[::-1] if axis in eqn.params["dimensions"] else x]


slice_, split, rev = _each(_sliced), _each(_parts), _each(_reversed)


def concatenate(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """End to end along one axis, alike along all others."""
    along, why = eqn.params["dimension"], book.name(eqn)
    found: list[Axis | str] = []
    for a, axes in enumerate(zip(*(x.axes for x in ins), strict=True)):
        if a != along or all(isinstance(axis, str) for axis in axes):
            found.append(book.same(axes, why))
        else:
            lengths = [v.aval.shape[a] for v in eqn.invars]
            parts = []
            for axis, n in zip(axes, lengths, strict=True):
                if isinstance(axis, str):  # it stays, whatever goes of the others
                    reason = axis or why
                    axis = Axis(book.labels.fresh(n), np.zeros(n, bool))
                    book.freeze(axis, reason)
                parts.append(axis)
            found.append(Axis(*map(np.concatenate, zip(*parts, strict=True))))
    return [Value(tuple(found))]


def stack(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """Alike along all axes, and one more."""
    axes = [
        book.same(each, book.name(eqn))
        for each in zip(*(x.axes for x in ins), strict=True)
    ]
    axes.insert(eqn.params["axis"], book.name(eqn))
    return [Value(tuple(axes))]


def unstack(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """Every slice along one axis, which has to stay."""
    x, taken = ins[0], eqn.params["axis"]
    book.freeze(x.axes[taken], book.name(eqn))
    rest = picked(x, [a for a in range(len(x.axes)) if a != taken])
    return [rest._replace(span=None) for _ in eqn.outvars]


def pad(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """What is put at the ends follows what it meets."""
    x, filled = ins
    axes: list[Axis | str] = []
    for axis, (low, high, inside) in zip(
        x.axes, eqn.params["padding_config"], strict=True
    ):
        if min(low, high) < 0 or inside:
            axis = book.freeze(axis, book.name(eqn))
        if isinstance(axis, Axis):
            first, last = (book.labels.fresh(n) for n in (low, high))
            zero = np.pad(axis.zero, (low, high), constant_values=is_zero(filled))
            axis = Axis(np.concatenate([first, axis.labels, last]), zero)
        axes.append(axis)
    return [Value(tuple(axes))]


def reshape(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """Of axes that become one, one lends its labels; of those that one becomes, too.

    The others stay. Which one it is turns out later: options that lead nowhere are
    banned, and the program is walked again.
    """
    x, before, after = ins[0], eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    found: list[Axis | str] = ["" for _ in after]
    for olds, news in blocks(before, after):
        axes: list[Any] = [x.axes[a] for a in olds]
        live = [
            isinstance(a, Axis) and not book.labels.is_frozen(a.labels).all()
            for a in axes
        ]
        if len(olds) == len(news) == 1:
            found[news[0]] = axes[0]
        elif len(news) == 1 and (taken := book.choice(live)) is not None:
            for i, axis in enumerate(axes):
                if i != taken:
                    book.freeze(axis, book.name(eqn))
            axis = axes[taken]
            found[news[0]] = axis.moved(
                partial(_spread, [before[a] for a in olds], taken)
            )
            book.chose(taken, axis.labels)
        elif live == [True] and (taken := book.choice([True] * len(news))) is not None:
            rows = partial(_rows, [after[a] for a in news], taken)
            labels, zero = map(rows, axes[0])
            for column in labels.T[1:]:
                book.labels.join(labels[:, 0], column)
            for a in news:
                found[a] = book.name(eqn)
            found[news[taken]] = Axis(labels[:, 0], np.all(zero, axis=1))
            book.chose(taken, labels[:, 0])
        else:
            reasons = [book.freeze(axis, book.name(eqn)) for axis in axes]
            for a in news:
                found[a] = next(filter(None, reasons), "")
    return [x._replace(axes=tuple(found))]


def blocks(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Which axes of a shape become which of another; those of length 1 are left out.

    >>> blocks((2, 3, 1, 4), (6, 2, 2))
    [([0, 1], [0]), ([3], [1, 2])]
    """
    olds = [a for a, n in enumerate(before) if n != 1]
    news = [a for a, n in enumerate(after) if n != 1]
    found = []
    while olds and news:
        left, right = [olds.pop(0)], [news.pop(0)]
        a, b = before[left[0]], after[right[0]]
        while a != b:
            if a < b:
                left.append(olds.pop(0))
                a *= before[left[-1]]
            else:
                right.append(news.pop(0))
                b *= after[right[-1]]
        found.append((left, right))
    return found


def _spread(sizes: list[int], at: int, x: np.ndarray) -> np.ndarray:
    """What is along one axis, along that which it becomes with the others."""
    shape = [-1 if i == at else 1 for i in range(len(sizes))]
    return np.broadcast_to(x.reshape(shape), sizes).reshape(-1)


def _rows(sizes: list[int], at: int, x: np.ndarray) -> np.ndarray:
    """[sizes[at], all others]: what belongs to each index of one axis."""
    return np.moveaxis(x.reshape(sizes), at, 0).reshape(sizes[at], -1)


def gather(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """Axes that are taken whole keep their labels; those that are looked up stay."""
    (x, indices), numbers = ins, eqn.params["dimension_numbers"]
    shape, why = eqn.invars[0].aval.shape, book.name(eqn)
    batching = numbers.operand_batching_dims
    axes = list(_whole(book, eqn, x, shape, batching).axes)
    found: list[Axis | str] = ["" for _ in eqn.outvars[0].aval.shape]
    gone = {*numbers.collapsed_slice_dims, *batching}
    windows = [a for a in range(len(shape)) if a not in gone]
    for a, at in zip(windows, numbers.offset_dims, strict=True):
        found[at] = axes[a]
    pairs = dict(zip(numbers.start_indices_batching_dims, batching, strict=True))
    places = [a for a in range(len(found)) if a not in numbers.offset_dims]
    for a, at in enumerate(places):  # the last axis of the indices is not among them
        axis = indices.axes[a]
        if a in pairs:
            mine = axes[pairs[a]]
            both = book.same([mine, axis], why)
            found[at] = both if isinstance(both, str) else mine
        else:
            found[at] = nonzero(axis)
    book.freeze(indices.axes[-1], why)
    return [Value(tuple(found))]


def dynamic_slice(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """Axes that are taken whole keep their labels."""
    return [_whole(book, eqn, ins[0], eqn.invars[0].aval.shape)]


def _whole(
    book: Book, eqn: Any, x: Value, shape: Sequence[int], but: Sequence[int] = ()
) -> Value:
    axes = list(x.axes)
    for a, (n, size) in enumerate(zip(shape, eqn.params["slice_sizes"], strict=True)):
        if n != size and a not in but:
            axes[a] = book.freeze(axes[a], book.name(eqn))
    return Value(tuple(axes))


def dynamic_update_slice(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """Axes that are written whole keep their labels."""
    found: list[Axis | str] = []
    shapes = (v.aval.shape for v in eqn.invars[:2])
    for n, size, axis, new in zip(*shapes, ins[0].axes, ins[1].axes, strict=True):
        parts = [axis, new] if n == size else [axis, new, book.name(eqn)]
        found.append(book.same(parts, book.name(eqn)))
    return [Value(tuple(found))]
