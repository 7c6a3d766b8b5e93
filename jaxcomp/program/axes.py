"""What must be removed together: labels on every index of every axis of every value.

A walk gives each index of each axis of each parameter a label and takes the labels
through the program. What an equation does to arrays it does to their labels, and some
labels turn out to be the same: what a product contracts, what a sum adds. Slices of
parameters under one label live or die together.

Beside each label goes whether the values there are zero once the parameters under that
label are: then removing them is the same as setting them to zero.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

from jaxcomp.program.derivatives import BACKWARD, FORWARD, derivative, floating
from jaxcomp.program.labels import Labels
from jaxcomp.program.releases import closed, scan_split, source
from jaxcomp.program.walk import bind, called, functions


class Axis(NamedTuple):
    """An axis from which something can go."""

    labels: np.ndarray  # int[length]
    zero: np.ndarray  # bool[length]: what is there is zero when its parameters are

    def moved(self, move: Callable[[np.ndarray], np.ndarray]) -> "Axis":
        """What becomes of it when entries are moved."""
        return Axis(move(self.labels), move(self.zero))


class Span(NamedTuple):
    """What a sum ran over: divided by ``entries`` it is a mean."""

    entries: int
    lengths: tuple[Any, ...]  # of each axis the labels, or the length if it is fixed


class Value(NamedTuple):
    """What is known of a value."""

    axes: tuple[Axis | str, ...]  # or why nothing can go from it
    made: bool = False  # computed from the inputs, not from parameters alone
    leaf: int | None = None  # the parameter that it is, moved
    number: Any = None  # what it is everywhere, if that is known
    span: Span | None = None  # what it is a sum over


class Step(NamedTuple):
    """An equation, what is known of what goes in and out, and what it calls."""

    eqn: Any
    ins: list[Value]
    outs: list[Value]
    plans: "list[Plan]"
    mean: Span | None  # it divides by the count of this


class Plan(NamedTuple):
    """The equations of a function with their axes."""

    jaxpr: Any
    consts: list[Any]
    known: list[Value]  # of the constants
    ins: list[Value]
    steps: list[Step]
    outs: list[Value]


class Product(NamedTuple):
    """Multiply-adds: ``factor`` times the lengths."""

    factor: int
    lengths: tuple[Any, ...]  # of each axis the labels, or the length if it is fixed


# (what is known so far, equation, of its operands) -> of its results
Rule = Callable[["Book", Any, list[Value]], Sequence[Value]]


class Book:
    """All that one walk finds out."""

    def __init__(
        self, rules: Mapping[str, Rule], banned: Mapping[tuple[int, ...], int]
    ):
        self.rules, self.banned = rules, banned
        self.labels = Labels()
        self.order: dict[int, None] = {}  # parameters, by first use
        self.inexact: list[tuple[int, np.ndarray, str]] = []  # 0 comes before 1
        self.kinds: list[tuple[str, np.ndarray]] = []
        self.products: list[Product] = []
        self.choices: dict[tuple[int, ...], tuple[int, np.ndarray]] = {}
        self._place: tuple[int, ...] = ()  # of the equation, in the nest of calls
        self._line = ""  # of the call that the equation is in
        self._turns = 1
        self._derivative = False

    # What rules say.

    def freeze(self, axis: "Axis | str", reason: str) -> str:
        """Nothing can go from this axis; gives what stands for such an axis."""
        if isinstance(axis, str):
            return axis
        self.labels.freeze(axis.labels, reason)
        return reason

    def same(self, axes: Sequence["Axis | str"], why: str) -> "Axis | str":
        """What axes that have to stay alike are together: zero where all are."""
        known = [axis for axis in axes if not isinstance(axis, str)]
        if len(known) < len(axes):
            reasons = (axis for axis in axes if isinstance(axis, str))
            reason = next(filter(None, reasons), why)
            for axis in known:
                self.freeze(axis, reason)
            return reason
        for axis in known[1:]:
            self.labels.join(known[0].labels, axis.labels)
        return Axis(known[0].labels, np.all([axis.zero for axis in known], axis=0))

    def fresh(self, length: int, zero: bool = False) -> "Axis | str":
        """An axis that comes from no parameter and follows what it meets."""
        if length <= 1:
            return ""
        return Axis(self.labels.fresh(length), np.full(length, zero))

    def not_exact(self, labels: np.ndarray, reason: str, rank: int = 1) -> None:
        """Removing these is not the same as setting them to zero."""
        if len(labels) and not self._derivative:
            self.inexact.append((rank, labels, reason))

    def kind(self, name: str, labels: np.ndarray) -> None:
        """What these are for, to name them by."""
        if not self._derivative:
            self.kinds.append((name, labels))

    def product(self, factor: int, axes: Sequence[Axis | int]) -> None:
        """Multiply-adds that the equation does; of each axis its length, if fixed."""
        if not self._derivative:
            lengths = tuple(a if isinstance(a, int) else a.labels for a in axes)
            self.products.append(Product(self._turns * factor, lengths))

    def choice(self, open_: Sequence[bool]) -> int | None:
        """Which of the options of this equation to take: the first that is left."""
        first = self.banned.get(self._place, 0)
        left = (i for i, free in enumerate(open_) if free and i >= first)
        return next(left, None)

    def chose(self, option: int, labels: np.ndarray) -> None:
        """What depends on the option that was taken."""
        self.choices[self._place] = option, labels

    def line(self, eqn: Any) -> str:
        """Where it is in the user's program, or where what it is part of was called."""
        return source(eqn) or self._line or "a line that is not known"

    def name(self, eqn: Any) -> str:
        """The primitive, and the line."""
        return f"{eqn.primitive.name} at {self.line(eqn)}"

    # The walk.

    def plan(self, jaxpr: Any, consts: Sequence[Any], ins: Sequence[Value]) -> Plan:
        """Takes labels through a function."""
        fixed = list(map(self.constant, consts))
        known = dict(zip(jaxpr.constvars, fixed, strict=True))
        known |= dict(zip(jaxpr.invars, ins, strict=True))

        def read(v: Any) -> Value:
            return self.constant(v.val) if isinstance(v, Literal) else known[v]

        steps, place, line = [], self._place, self._line
        for i, eqn in enumerate(jaxpr.eqns):
            self._place, self._line = (*place, i), line
            self._line = self.line(eqn) if functions(eqn) else line
            step = self._step(eqn, list(map(read, eqn.invars)))
            known.update(zip(eqn.outvars, step.outs, strict=True))
            steps.append(step)
        self._place, self._line = place, line
        outs = list(map(read, jaxpr.outvars))
        return Plan(jaxpr, list(consts), fixed, list(ins), steps, outs)

    def constant(self, value: Any) -> Value:
        """Of an array or a number that is written into the program."""
        known = is_number(value)
        axes = tuple(map(self.fresh, shape_of(value)))
        return Value(axes, number=value if known else None)

    def _step(self, eqn: Any, ins: list[Value]) -> Step:
        name = eqn.primitive.name
        made = any(x.made for x in ins)
        if inner := called(eqn):
            plans = [self.plan(*inner, ins)]
            outs = plans[0].outs
            if name in (FORWARD, BACKWARD) and not self._derivative:
                plans += self._derivatives(eqn, ins, outs)
            return Step(eqn, ins, outs, plans, None)
        if name in self._CALLS:
            plans, outs = self._CALLS[name](self, eqn, ins)
            return Step(eqn, ins, outs, plans, None)
        for x in ins:
            if x.leaf is not None:
                self.order.setdefault(x.leaf)
        rule = self.rules.get(name, freeze)
        outs = [x._replace(made=made) for x in rule(self, eqn, ins)]
        if all(x.number is not None for x in ins) and ins and not eqn.effects:
            outs = self._folded(eqn, ins, outs)
        if mean := mean_of(eqn, ins):
            for labels in mean.lengths:
                if not isinstance(labels, int):
                    why = f"a mean spans it, at {self.line(eqn)}"
                    self.not_exact(labels, why, rank=0)
        return Step(eqn, ins, outs, [], mean)

    def _folded(self, eqn: Any, ins: list[Value], outs: list[Value]) -> list[Value]:
        """Numbers that follow from numbers."""
        if any(v.aval.shape or not has_numbers(v.aval) for v in eqn.outvars):
            return outs
        with jax.ensure_compile_time_eval():
            found = bind(eqn, [x.number for x in ins])
        return [
            x._replace(number=np.asarray(value))
            for x, value in zip(outs, found, strict=True)
        ]

    def _scan(self, eqn: Any, ins: list[Value]) -> tuple[list[Plan], list[Value]]:
        params, where = eqn.params, self.line(eqn)
        fixed, carried = scan_split(params)
        split = fixed + carried
        rows = [_unstacked(self, x, f"scan at {where}") for x in ins[split:]]
        turns, self._turns = self._turns, self._turns * params["length"]
        plan = self._loop(
            closed(params["jaxpr"]), [*ins[:fixed]], ins[fixed:split], rows, where
        )
        self._turns = turns
        stacked = [Value(("", *x.axes), x.made) for x in plan.outs[carried:]]
        return [plan], [*map(_carried, plan.outs[:carried]), *stacked]

    def _while(self, eqn: Any, ins: list[Value]) -> tuple[list[Plan], list[Value]]:
        params, where = eqn.params, self.line(eqn)
        first = params["cond_nconsts"]
        split = first + params["body_nconsts"]
        body = self._loop(
            closed(params["body_jaxpr"]), ins[first:split], ins[split:], [], where
        )
        carry = [_carried(x) for x in body.ins[split - first :]]
        place, self._place = self._place, (*self._place, -1)
        asked = self.plan(*closed(params["cond_jaxpr"]), [*ins[:first], *carry])
        self._place = place
        return [asked, body], list(map(_carried, body.outs))

    def _loop(self, inner: Any, consts: Any, carry: Any, rows: Any, where: str) -> Plan:
        """A body whose carry is the same going in and coming out."""
        jaxpr, held = inner
        carry = list(map(_carried, carry))
        products = len(self.products)
        while True:
            del self.products[products:]
            plan = self.plan(jaxpr, held, [*consts, *carry, *rows])
            outs = plan.outs[: len(carry)]
            after = [
                self._alike([x, y], f"carried by a loop at {where}")
                for x, y in zip(carry, outs, strict=True)
            ]
            if all(map(_as_zero, carry, after)):
                return plan
            carry = after

    def _cond(self, eqn: Any, ins: list[Value]) -> tuple[list[Plan], list[Value]]:
        why = f"branches at {self.line(eqn)}"
        before = self.products
        plans: list[Plan] = []
        costs: list[list[Product]] = []
        for branch in eqn.params["branches"]:
            self.products = []
            place, self._place = self._place, (*self._place, len(plans))
            plans.append(self.plan(*closed(branch), ins[1:]))
            self._place = place
            costs.append(self.products)
        self.products = [*before, *max(costs, key=_full)]
        results = zip(*(plan.outs for plan in plans), strict=True)
        return plans, [_carried(self._alike(list(outs), why)) for outs in results]

    _CALLS = {"scan": _scan, "while": _while, "cond": _cond}

    def _alike(self, values: Sequence[Value], why: str) -> Value:
        """Of a value that is one of these."""
        axes = zip(*(x.axes for x in values), strict=True)
        found = tuple(self.same(each, why) for each in axes)
        return Value(found, made=any(x.made for x in values))

    def _derivatives(
        self, eqn: Any, ins: list[Value], outs: list[Value]
    ) -> "list[Plan]":
        """The function that a call has instead of its derivative, walked too."""
        if all(isinstance(axis, str) for x in (*ins, *outs) for axis in x.axes):
            return []
        moved = [_carried(ins[i]) for i in floating(eqn.invars)]
        found = [_carried(outs[i]) for i in floating(eqn.outvars)]
        forward = eqn.primitive.name == FORWARD
        place, self._place = self._place, (*self._place, -1)
        self._derivative = True
        plan = self.plan(*derivative(eqn), [*ins, *(moved if forward else found)])
        twins = [*outs, *found] if forward else moved
        for pair in zip(plan.outs, twins, strict=True):
            self._alike(pair, f"the derivative of a call at {self.line(eqn)}")
        self._derivative, self._place = False, place
        return [plan]


def freeze(book: Book, eqn: Any, ins: list[Value]) -> list[Value]:
    """The rule of what has no rule: nothing can go from what it takes."""
    why = book.name(eqn)
    for x in ins:
        for axis in x.axes:
            book.freeze(axis, why)
    return [Value((why,) * len(v.aval.shape)) for v in eqn.outvars]


def has_numbers(x: Any) -> bool:
    """Whether it is of numbers, and not of random keys or tokens."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and not jax.dtypes.issubdtype(dtype, jax.dtypes.extended)


def is_number(x: Any) -> bool:
    """Whether it is one number, known now."""
    if isinstance(x, jax.core.Tracer):
        return False
    return isinstance(x, int | float | complex) or (not shape_of(x) and has_numbers(x))


def shape_of(x: Any) -> tuple[int, ...]:
    """Of an array, random keys too, or a number."""
    return tuple(getattr(x, "shape", ()))


def nonzero(axis: Axis | str) -> Axis | str:
    """An axis with the same labels of which nothing is known to be zero."""
    if isinstance(axis, str):
        return axis
    return Axis(axis.labels, np.zeros_like(axis.zero))


def is_zero(x: Value) -> bool:
    """Whether it is the number 0."""
    return x.number is not None and bool(x.number == 0)


def mean_of(eqn: Any, ins: list[Value]) -> Span | None:
    """What an equation averages over: the sum is divided by how many it added."""
    name = eqn.primitive.name
    if name not in ("div", "mul"):
        return None
    for x, other in (ins, ins[::-1]) if name == "mul" else (ins,):
        if x.span is not None and other.number is not None:
            wanted = x.span.entries if name == "div" else 1 / x.span.entries
            if np.isclose(float(other.number), wanted, rtol=1e-6, atol=0):
                return x.span
    return None


def _unstacked(book: Book, x: Value, reason: str) -> Value:
    book.freeze(x.axes[0], reason)
    return Value(x.axes[1:], x.made, x.leaf)


def _carried(x: Value) -> Value:
    """What holds of it in every turn."""
    return Value(x.axes, x.made)


def _as_zero(x: Value, y: Value) -> bool:
    pairs = zip(x.axes, y.axes, strict=True)
    return all(
        isinstance(a, str) or isinstance(b, str) or np.array_equal(a.zero, b.zero)
        for a, b in pairs
    )


def _full(products: list[Product]) -> float:
    sizes = ([p.factor, *map(length, p.lengths)] for p in products)
    return float(sum(np.prod(size, dtype=float) for size in sizes))


def length(labels: Any) -> int:
    """Of an axis that has labels or is a length itself."""
    return labels if isinstance(labels, int) else len(labels)
