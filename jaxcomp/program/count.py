"""What a program costs: parameters, multiply-adds, memory, read off its equations."""

import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jaxcomp.node import TiedTensor, densify, flatten
from jaxcomp.program.releases import closed, scan_split
from jaxcomp.program.views import View, is_move, moved
from jaxcomp.program.walk import (
    PRODUCTS,
    called,
    functions,
    multiplies,
    spent,
    trace,
    walk,
)


class Weight(NamedTuple):
    """What one parameter has to do."""

    path: str
    shape: tuple[int, ...]
    size: int
    uses: int  # products that it enters, a scan counted once
    multiply_adds: int  # of these products, all turns of a scan counted


class Count(NamedTuple):
    """What `count` found; prints as a table."""

    weights: tuple[Weight, ...]
    parameters: int
    multiply_adds: int  # of all products, those of two activations too
    activation_bytes: int  # that live at once, if nothing is fused
    loops: int  # loops and kernels whose turns are not known, and count as one

    def __str__(self) -> str:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("weight", no_wrap=True)
        table.add_column("shape", no_wrap=True)
        for name in ("parameters", "uses", "multiply-adds"):
            table.add_column(name, justify="right", no_wrap=True)
        for w in self.weights:
            shape = ",".join(map(str, w.shape))
            table.add_row(
                w.path, shape, f"{w.size:,}", str(w.uses), f"{w.multiply_adds:,}"
            )
        table.add_section()
        table.add_row(
            "total", "", f"{self.parameters:,}", "", f"{self.multiply_adds:,}"
        )
        text = io.StringIO()
        # A path is neither markup nor folded, however long it is.
        plain = {"markup": False, "emoji": False, "color_system": None}
        Console(file=text, width=10_000, **plain).print(table)  # type: ignore[arg-type]
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        lines.append(f"Activations: {self.activation_bytes:,} bytes at once.")
        if self.loops:
            lines.append(
                f"Loops of unknown length, counted as one turn: {self.loops:,}."
            )
        return "\n".join(lines)


def count(f: Callable[..., Any], params: Any, *inputs: Any) -> Count:
    """Parameters, multiply-adds and activation memory of ``f(params, *inputs)``.

    Nothing is computed or allocated; shapes will do. Multiply-adds are those of dots
    and convolutions, whatever enters them; of a convolution those at the padding too,
    and of a transposed one those at the zeros between the entries.
    Of the branches of a `jax.lax.cond` the one with the most counts. A while loop, a
    kernel and what a `jax.shard_map` does on one device count once, and the table says
    so. What a view of a parameter takes is counted among the activations.

    Args:
      f: (params, *inputs) -> any pytree.
      params: any pytree of arrays, `jax.ShapeDtypeStruct` and nodes.
      *inputs: arrays or shapes.

    Returns:
      A `Count`; ``print`` shows a table.

    >>> import jax.numpy as jnp
    >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}
    >>> found = count(f, params, jnp.ones((5, 3)))
    >>> found.parameters, found.multiply_adds, found.activation_bytes
    (6, 30, 40)
    """
    leaves = flatten(params)[1]
    traced = trace(f, jax.eval_shape(densify, params), *inputs)
    tally = _Tally(len(traced.params))
    values = [View(i) for i in range(len(traced.params))]
    tally.run(traced.jaxpr, traced.consts, [*values, *(None for _ in traced.inputs)], 1)
    sizes = [0 if isinstance(x, TiedTensor) else np.size(x) for x in leaves]
    shapes = [tuple(x.shape) for x in traced.params]
    rows = zip(traced.paths, shapes, sizes, tally.uses, tally.products, strict=True)
    weights = tuple(Weight(*row) for row in rows)
    return Count(
        weights,
        sum(w.size for w in weights),
        tally.total,
        _peak(traced.jaxpr),
        tally.loops,
    )


class _Tally:
    """Products found on a walk; a value is the parameter that it views, or None."""

    def __init__(self, leaves: int):
        self.uses, self.products = [0] * leaves, [0] * leaves
        self.total = self.loops = 0

    def run(self, jaxpr: Any, consts: Any, values: list[Any], turns: int) -> list[Any]:
        return walk(
            jaxpr,
            consts,
            values,
            lambda eqn, values: self.visit(eqn, values, turns),
            constant=lambda value: None,
        )

    def visit(self, eqn: Any, values: list[Any], turns: int) -> list[Any]:
        nothing = [None] * len(eqn.outvars)
        name, params = eqn.primitive.name, eqn.params
        if inner := called(eqn):
            return self.run(*inner, values, turns)
        if name == "scan":
            fixed, carried = scan_split(params)
            length = params["length"]
            rows = [v and v.sliced(length) for v in values[fixed + carried :]]
            inside = [*values[:fixed], *[None] * carried, *rows]
            self.run(*closed(params["jaxpr"]), inside, turns * length)
            return nothing
        if name == "while":
            first, second = params["cond_nconsts"], params["body_nconsts"]
            asked, kept = values[:first], values[first : first + second]
            carry = [None] * (len(values) - first - second)
            self.loops += 1
            self.run(*closed(params["cond_jaxpr"]), [*asked, *carry], turns)
            self.run(*closed(params["body_jaxpr"]), [*kept, *carry], turns)
            return nothing
        if name == "cond":
            self.dearest(params["branches"], values[1:], turns)
            return nothing
        if name in PRODUCTS:
            products = turns * _multiply_adds(eqn)
            self.total += products
            for leaf in {v.leaf for v in values[:2] if v is not None}:
                self.uses[leaf] += 1
                self.products[leaf] += products
        elif multiplies(eqn):  # inside, e.g. of a shard_map or a kernel
            self.loops += 1
            for jaxpr in functions(eqn):
                unknown = [None] * len(jaxpr.invars)
                self.run(jaxpr, [None] * len(jaxpr.constvars), unknown, turns)
        if is_move(eqn) and values[0] is not None:
            return moved(eqn, values[0])
        return nothing

    def dearest(self, branches: Any, values: list[Any], turns: int) -> None:
        """Adds the branch with the most products."""
        found = []
        for branch in branches:
            tally = _Tally(len(self.uses))
            tally.run(*closed(branch), values, turns)
            found.append(tally)
        most = max(found, key=lambda tally: tally.total)
        self.uses = [a + b for a, b in zip(self.uses, most.uses, strict=True)]
        pairs = zip(self.products, most.products, strict=True)
        self.products = [a + b for a, b in pairs]
        self.total, self.loops = self.total + most.total, self.loops + most.loops


def _multiply_adds(eqn: Any) -> int:
    """Of a product: those of one number of the result, times its size."""
    (left, right), (out,) = (v.aval.shape for v in eqn.invars[:2]), eqn.outvars
    numbers = eqn.params.get("dimension_numbers")
    if eqn.primitive.name == "conv_general_dilated":
        # The input axis of a grouped kernel has the features of one group only.
        each = math.prod(right) // max(right[numbers.rhs_spec[0]], 1)
    else:
        ragged = eqn.params.get("ragged_dot_dimension_numbers")
        dots = numbers if ragged is None else ragged.dot_dimension_numbers
        each = math.prod(left[a] for a in dots[0][0])
    return out.aval.size * each


def _peak(jaxpr: Any) -> int:
    """The most bytes of results that live at once, without inputs and constants."""
    mine = {v for eqn in jaxpr.eqns for v in eqn.outvars}
    live = most = 0
    for eqn, done in zip(jaxpr.eqns, spent(jaxpr), strict=True):
        inside = max(map(_peak, functions(eqn)), default=0)
        outs = sum(map(_bytes, eqn.outvars))
        # What a call returns is among what lives inside it. What a scan stacks is not.
        rows = eqn.primitive.name == "scan" and eqn.outvars[scan_split(eqn.params)[1] :]
        inside += sum(map(_bytes, rows or ()))
        most = max(most, live + max(inside, outs))
        live += outs - sum(map(_bytes, done & mine))
    return most


def _bytes(v: Any) -> int:
    dtype = getattr(v.aval, "dtype", None)
    if dtype is None:
        return 0
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):  # random keys
        bits = 8 * dtype.itemsize
    else:
        bits = jax.dtypes.itemsize_bits(dtype)  # ``itemsize`` of 4 bits is a byte
    return -(-math.prod(v.aval.shape) * bits // 8)
