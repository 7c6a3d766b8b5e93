"""What each primitive does to the labels of its operands: one table of rules.

A rule is the operation itself, done to arrays of labels. What has no rule freezes every
axis that it takes, which is safe, and is told.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from jaxcomp.program.axes import (
    Axis,
    Book,
    Rule,
    Span,
    Value,
    freeze,
    is_zero,
    nonzero,
)
from jaxcomp.program.moves import (
    broadcast,
    concatenate,
    dynamic_slice,
    dynamic_update_slice,
    gather,
    pad,
    picked,
    reshape,
    rev,
    slice_,
    split,
    squeeze,
    stack,
    transpose,
    unstack,
)
from jaxcomp.program.products import convolution, dot


Zeros = list[np.ndarray]  # of each operand, along one axis


def elementwise(
    zero: Callable[[Any, list[Value], Zeros], np.ndarray],
    bad: Callable[[Any, list[Value], Zeros], np.ndarray] | None = None,
) -> Rule:
    """The rule of what is done entry by entry: axes are the same, pair by pair.

    Args:
      zero: (equation, what is known of the operands, where each is zero) -> where the
        result is.
      bad: the same -> where the result is not finite.
    """

    def rule(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
        shape = eqn.outvars[0].aval.shape
        if eqn.primitive.name in ("add", "add_any") and all(x.made for x in ins):
            _streams(book, ins)
        axes: list[Axis | str] = []
        for a, n in enumerate(shape):
            full = [v.aval.ndim > 0 and v.aval.shape[a] == n for v in eqn.invars]
            parts = [x.axes[a] if w else "" for x, w in zip(ins, full, strict=True)]
            mine = [part for part, w in zip(parts, full, strict=True) if w]
            found = book.same(mine, book.name(eqn))
            if isinstance(found, str):
                axes.append(found)
                continue
            known = [
                np.full(n, is_zero(x)) | (isinstance(part, Axis) and part.zero)
                for x, part in zip(ins, parts, strict=True)
            ]
            lost = np.zeros(n, bool) if bad is None else bad(eqn, ins, known)
            book.not_exact(found.labels[lost], f"{book.name(eqn)} of zero")
            axes.append(Axis(found.labels, zero(eqn, ins, known) & ~lost))
        if eqn.primitive.name in SAME:
            return [ins[0]._replace(axes=tuple(axes))]
        return [Value(tuple(axes))]

    return rule


def _streams(book: Book, ins: list[Value]) -> None:
    """Marks what two branches with widths of their own add up in."""
    for x, y in zip(*(v.axes for v in ins), strict=False):
        if isinstance(x, str) or isinstance(y, str):
            continue
        if len(x.labels) == len(y.labels):
            apart = book.labels.roots(x.labels) != book.labels.roots(y.labels)
            book.kind("stream", x.labels[apart])


def _all(eqn: Any, ins: list[Value], zeros: Zeros) -> np.ndarray:
    return np.all(zeros, axis=0)


def _any(eqn: Any, ins: list[Value], zeros: Zeros) -> np.ndarray:
    return np.any(zeros, axis=0)


def _first(eqn: Any, ins: list[Value], zeros: Zeros) -> np.ndarray:
    return zeros[0]


def _cases(eqn: Any, ins: list[Value], zeros: Zeros) -> np.ndarray:
    return np.all(zeros[1:], axis=0)


def _never(eqn: Any, ins: list[Value], zeros: Zeros) -> np.ndarray:
    return np.zeros_like(zeros[0])


def _clamp(eqn: Any, ins: list[Value], zeros: Zeros) -> np.ndarray:
    low, high = ins[0].number, ins[2].number
    inside = low is not None and high is not None and low <= 0 <= high
    return zeros[1] & bool(inside)


def _pow(eqn: Any, ins: list[Value], zeros: Zeros) -> np.ndarray:
    power = _power(eqn, ins)
    return zeros[0] & bool(power is not None and power > 0)


def _power(eqn: Any, ins: list[Value]) -> Any:
    """To which power, if that is known."""
    return eqn.params["y"] if "y" in eqn.params else ins[1].number


def _zero_by_zero(eqn: Any, ins: list[Value], zeros: Zeros) -> np.ndarray:
    return zeros[1]


def _no_root(eqn: Any, ins: list[Value], zeros: Zeros) -> np.ndarray:
    power = _power(eqn, ins)
    return zeros[0] & bool(power is None or power < 0)


def reduce_sum(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """Removing a slice is the same as setting it to zero, if a sum sees only that."""
    x, axes, shape = ins[0], eqn.params["axes"], eqn.invars[0].aval.shape
    lengths: list[Any] = []
    for a in axes:
        axis = x.axes[a]
        if isinstance(axis, str):
            lengths.append(shape[a])
        else:
            lengths.append(axis.labels)
            lost = axis.labels[~(axis.zero | is_zero(x))]
            book.not_exact(lost, f"{book.name(eqn)} adds up what is not zero")
    span = Span(math.prod(shape[a] for a in axes), tuple(lengths))
    return [Value(_without(x, axes).axes, span=span)]


def reduction(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """What looks at all entries of some axes, which then have to stay."""
    for a in eqn.params["axes"]:
        book.freeze(ins[0].axes[a], book.name(eqn))
    return [Value(_without(ins[0], eqn.params["axes"]).axes)]


def _without(x: Value, axes: Sequence[int]) -> Value:
    return picked(x, [a for a in range(len(x.axes)) if a not in axes])


def along(key: str) -> Rule:
    """The rule of what runs along one axis, and treats all others alike."""

    def rule(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
        found: list[Axis | str] = []
        taken = eqn.params[key] % len(ins[0].axes)
        for a, axes in enumerate(zip(*(x.axes for x in ins), strict=True)):
            if a == taken:
                axes = (*axes, book.name(eqn))  # which freezes all of them
            found.append(book.same(axes, book.name(eqn)))
        return [Value(tuple(found)) for _ in eqn.outvars]

    return rule


def top_k(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """The best along one axis, and where they are."""
    axes = list(ins[0].axes)
    at = eqn.params.get("axis", -1)
    axes[at] = book.freeze(axes[at], book.name(eqn))
    return [Value(tuple(axes)), Value(tuple(map(nonzero, axes)))]


def window(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """Windows of one entry leave an axis as it is."""
    params = eqn.params
    if len(eqn.outvars) > 1:
        return freeze(book, eqn, ins)
    axes = list(ins[0].axes)
    shapes = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    rows = zip(*shapes, params["window_dimensions"], params["padding"], strict=True)
    for a, (before, after, size, ends) in enumerate(rows):
        if before != after or size != 1 or tuple(ends) != (0, 0):
            axes[a] = book.freeze(axes[a], book.name(eqn))
    if eqn.primitive.name == "reduce_window":  # of a function that is not known
        axes = list(map(nonzero, axes))
    return [Value(tuple(axes))]


def made(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """What comes from nothing follows whatever it meets."""
    freeze(book, eqn, ins)
    return [Value(tuple(map(book.fresh, v.aval.shape))) for v in eqn.outvars]


def tile(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """Copies end to end: what goes of one goes of all."""
    axes: list[Axis | str] = []
    for axis, n in zip(ins[0].axes, eqn.params["reps"], strict=True):
        if isinstance(axis, Axis):
            axis = axis.moved(partial(np.tile, reps=n))
        axes.append(axis)
    return [Value(tuple(axes), number=ins[0].number)]


def barrier(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """Nothing happens."""
    return ins


# Entry by entry, by what becomes of a zero.
SAME = (
    *("convert_element_type", "reduce_precision", "copy", "copy_p", "name"),
    *("stop_gradient", "sharding_constraint", "reshard", "device_put"),
)
ZERO_STAYS = (
    *("neg", "sign", "abs", "floor", "ceil", "round", "sqrt", "cbrt", "square"),
    *("sin", "tan", "tanh", "asin", "atan", "sinh", "asinh", "atanh"),
    *("erf", "erf_inv", "expm1", "log1p", "real", "imag", "conj"),
    *("shift_left", "shift_right_logical", "shift_right_arithmetic"),
)
ZERO_GOES = (
    *("exp", "exp2", "logistic", "cos", "cosh", "acos", "erfc", "not"),
    *("is_finite", "eq", "le", "ge"),
    *("atan2", "nextafter", "igamma", "igammac", "complex"),
    *("population_count", "clz", "bitcast_convert_type", "one_minus_square"),
    *("bessel_i0e", "bessel_i1e"),
)
NOT_AT_ZERO = (*("rsqrt", "log", "log2", "lgamma", "digamma", "polygamma", "acosh"),)
ALL_ZERO = ("add", "add_any", "sub", "max", "min", "or", "xor", "gt", "lt", "ne")
REDUCTIONS = (
    *("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
    *("reduce_xor", "argmax", "argmin"),
)
WINDOWS = (
    *("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"),
)

RULES: dict[str, Rule] = {
    **dict.fromkeys((*SAME, *ZERO_STAYS), elementwise(_first)),
    **dict.fromkeys(ZERO_GOES, elementwise(_never)),
    **dict.fromkeys(ALL_ZERO, elementwise(_all)),
    **dict.fromkeys(("mul", "and"), elementwise(_any)),
    **dict.fromkeys(("div", "rem"), elementwise(_first, _zero_by_zero)),
    **dict.fromkeys(NOT_AT_ZERO, elementwise(_never, _first)),
    **dict.fromkeys(("pow", "integer_pow"), elementwise(_pow, _no_root)),
    "select_n": elementwise(_cases),
    "clamp": elementwise(_clamp),
    "transpose": transpose,
    "squeeze": squeeze,
    "broadcast_in_dim": broadcast,
    "reshape": reshape,
    "slice": slice_,
    "split": split,
    "rev": rev,
    "concatenate": concatenate,
    "stack": stack,
    "unstack": unstack,
    "pad": pad,
    "tile": tile,
    "gather": gather,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "dot_general": dot,
    "conv_general_dilated": convolution,
    "reduce_sum": reduce_sum,
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin"), along("axis")),
    "sort": along("dimension"),
    "top_k": top_k,
    **dict.fromkeys(WINDOWS, window),
    **dict.fromkeys(("iota", "random_bits"), made),
    "optimization_barrier": barrier,
}
