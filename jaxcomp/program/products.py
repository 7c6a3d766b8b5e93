"""Labels through dots and convolutions."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcomp.program.axes import Axis, Book, Value, freeze


def dot(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """What is contracted is the same, and so are batches; the rest passes through."""
    left, right = ins
    sums, batches = eqn.params["dimension_numbers"]
    both = left.made and right.made
    shape = eqn.invars[0].aval.shape
    found: list[Axis | str] = []
    for a, b in zip(*batches, strict=True):
        axis = _either(book, eqn, left.axes[a], right.axes[b])
        if isinstance(axis, Axis) and both:
            book.kind("heads", axis.labels)
        found.append(axis)
    for x, taken in ((left, (*sums[0], *batches[0])), (right, (*sums[1], *batches[1]))):
        found += [axis for a, axis in enumerate(x.axes) if a not in taken]
    inner = []
    for a, b in zip(*sums, strict=True):
        axis = _contracted(book, eqn, left.axes[a], right.axes[b])
        if isinstance(axis, Axis) and both:
            book.kind("inner", axis.labels)
        inner.append(axis)
    lengths = [shape[a] for a in sums[0]]
    lengths = _lengths([*eqn.outvars[0].aval.shape, *lengths], [*found, *inner])
    book.product(1, lengths)
    return [Value(tuple(found))]


def _either(book: Book, eqn: Any, x: Axis | str, y: Axis | str) -> Axis | str:
    """What two axes are together: zero where one of both is."""
    found = book.same([x, y], book.name(eqn))
    if isinstance(found, str) or isinstance(x, str) or isinstance(y, str):
        return found
    return Axis(found.labels, x.zero | y.zero)


def _contracted(book: Book, eqn: Any, x: Axis | str, y: Axis | str) -> Axis | str:
    """An axis that a product adds up."""
    found = _either(book, eqn, x, y)
    if isinstance(found, Axis):
        why = f"{book.name(eqn)} adds up what is not zero"
        book.not_exact(found.labels[~found.zero], why)
    return found


def _lengths(shape: Sequence[int], axes: Sequence[Axis | str]) -> list[Axis | int]:
    pairs = zip(shape, axes, strict=True)
    return [n if isinstance(axis, str) else axis for n, axis in pairs]


def convolution(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """Input features are the kernel's, and what it makes are the output's.

    Of a grouped convolution whole groups go: each with its inputs and its outputs, so
    that a depthwise one is the case of groups of one.
    """
    x, kernel = ins
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    if params["batch_group_count"] > 1:
        return freeze(book, eqn, ins)
    why, groups = book.name(eqn), params["feature_group_count"]
    before, window, after = (v.aval.shape for v in (*eqn.invars, *eqn.outvars))
    batch, features, *space = numbers.lhs_spec
    outs, inputs, *sizes = numbers.rhs_spec
    into = kernel.axes[inputs]
    made = kernel.axes[outs]
    if groups == 1:
        into = _contracted(book, eqn, x.axes[features], into)
    else:
        into = book.freeze(into, f"shared by the groups of {why}")
        made = _grouped(book, x.axes[features], made, groups, why)
    found: list[Axis | str] = [why for _ in after]
    found[numbers.out_spec[0]] = x.axes[batch]
    found[numbers.out_spec[1]] = made
    for i, (a, b, at) in enumerate(
        zip(space, sizes, numbers.out_spec[2:], strict=True)
    ):
        still = before[a] == after[at] and params["padding"][i] == (0, 0)
        if window[b] == 1 and still:
            found[at] = x.axes[a]
        else:
            found[at] = book.freeze(x.axes[a], why)
            book.freeze(kernel.axes[b], why)
    lengths = _lengths([*after, window[inputs]], [*found, into])
    book.product(math.prod(window[b] for b in sizes), lengths)
    return [Value(tuple(found))]


def _grouped(
    book: Book, came: Axis | str, made: Axis | str, groups: int, why: str
) -> Axis | str:
    """What a convolution by groups makes: groups are the same on both sides."""
    if isinstance(came, str) or isinstance(made, str):
        found = book.same([came, made], why)
        return why if isinstance(found, Axis) else found
    rows = [axis.labels.reshape(groups, -1) for axis in (came, made)]
    both = np.concatenate(rows, axis=1)
    for column in both.T[1:]:
        book.labels.join(both[:, 0], column)
    quiet = came.zero.reshape(groups, -1).all(axis=1)
    return Axis(made.labels, made.zero | np.repeat(quiet, len(made.zero) // groups))
