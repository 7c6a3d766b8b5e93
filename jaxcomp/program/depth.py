"""Residual blocks: what adds to a stream, and the function without it."""

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.node import densify, flatten
from jaxcomp.program.releases import source
from jaxcomp.program.walk import bind, called, trace, walk
from jaxcomp.tree import shared_keys


class Block(NamedTuple):
    """What is added to a stream and is computed from it."""

    name: str  # what its parameters have in common
    paths: tuple[str, ...]  # parameters that nothing else needs
    line: str  # where it is added, e.g. "net.py:12"
    place: tuple[int, ...]  # of the sum, in the nest of calls
    stream: int  # which operand of the sum is the stream


class WithoutBlocks(NamedTuple):
    """What `drop_blocks` gives."""

    function: Callable[..., Any]  # (params that are left, *inputs) -> as before
    params: Any  # those that are left


def residual_blocks(
    f: Callable[..., Any], params: Any, *inputs: Any
) -> tuple[Block, ...]:
    """The blocks of ``f`` that can be the identity: ``x + block(x)``.

    A sum is that of a block if one operand is computed from the other, and some
    parameters are there for it alone. Sums in the body of a loop are not looked at, nor
    are those in a call with a derivative of its own.

    Args:
      f: (params, *inputs) -> any pytree.
      params: any pytree of arrays, shapes and nodes.
      *inputs: arrays or shapes.

    Returns:
      The blocks in the order of the program. One may lie in another.

    >>> f = lambda p, x: (x + jnp.tanh(x @ p["block"])) @ p["head"]
    >>> params = {"block": jnp.ones((3, 3)), "head": jnp.ones((3, 2))}
    >>> [block.name for block in residual_blocks(f, params, jnp.ones((1, 3)))]
    ['block']
    """
    flow = _flow(f, params, inputs)
    made = {v: 1 << i for i, v in enumerate(flow.inputs)}  # of what, itself included
    found = []
    for i, op in enumerate(flow.ops):
        if op.is_sum:
            for stream, x, branch in ((0, *op.ins), (1, *op.ins[::-1])):
                top = made.get(x, 0).bit_length()
                if top and made.get(branch, 0) >> (top - 1) & 1:
                    found.append((i, stream))
        before = 0
        for v in op.ins:
            before |= made.get(v, 0)
        if before:  # not of parameters alone
            made |= {v: before | 1 << len(made) for v in op.outs}
    needed = _needed(flow, ())
    blocks = []
    for i, stream in found:
        op = flow.ops[i]
        block = Block("", (), op.line, op.place, stream)
        left = _needed(flow, (block,))
        paths = tuple(path for path in needed if path not in left)
        if paths:
            blocks.append(
                block._replace(name=_name(paths, [*flow.params], op.line), paths=paths)
            )
    return tuple(blocks)


def drop_blocks(
    f: Callable[..., Any], params: Any, blocks: Sequence[Block], *inputs: Any
) -> WithoutBlocks:
    """``f`` with the identity in place of some blocks.

    Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You
    Expect", arXiv:2403.03853, remove layers; here it is whatever `residual_blocks`
    finds.

    Args:
      f: (params, *inputs) -> any pytree.
      params: any pytree of arrays; nodes are densified.
      blocks: some of those that `residual_blocks` found.
      *inputs: arrays or shapes, of the shapes that ``f`` takes.

    Returns:
      `WithoutBlocks`, the function and the parameters that it needs: of a dict the keys
      of the others are gone, elsewhere they are None. The function traces ``f`` where
      it is called, so call it under `jax.jit`.

    Raises:
      ValueError: for inputs of other shapes a block is not there.

    >>> f = lambda p, x: (x + jnp.tanh(x @ p["block"])) @ p["head"]
    >>> params = {"block": jnp.ones((3, 3)), "head": jnp.ones((3, 2))}
    >>> blocks = residual_blocks(f, params, jnp.ones((1, 3)))
    >>> g, left = drop_blocks(f, params, blocks, jnp.ones((1, 3)))
    >>> list(left), g(left, jnp.ones((1, 3)))
    (['head'], Array([[3., 3.]], dtype=float32))
    """
    params = densify(params)
    shapes = jax.eval_shape(lambda: params)
    flow = _flow(f, shapes, inputs)
    left = _needed(flow, blocks)
    gone = {path for path in _needed(flow, ()) if path not in left}
    jax.eval_shape(lambda p: _without(f, p, inputs, blocks), shapes)  # all are there

    def g(params: Any, *inputs: Any) -> Any:
        table = dict(zip(*flatten(densify(params))[:2], strict=True))
        paths, leaves, treedef = flatten(shapes)
        full = [
            jnp.zeros(x.shape, x.dtype) if path in gone else table[path]
            for path, x in zip(paths, leaves, strict=True)
        ]
        return _without(f, jax.tree.unflatten(treedef, full), inputs, blocks)

    return WithoutBlocks(g, _less(params, gone))


def block_changes(
    f: Callable[..., Any],
    params: Any,
    batches: Iterable[Sequence[Any]],
    blocks: Sequence[Block],
) -> np.ndarray:
    """How much every block turns the stream: the least goes first.

    Block influence of Men et al., "ShortGPT", arXiv:2403.03853, section 3.2: one minus
    the cosine between the stream before a block and after it, along the last axis, the
    mean over all positions.

    Args:
      f: (params, *inputs) -> any pytree.
      params: any pytree of arrays and nodes.
      batches: tuples of inputs, at least one; the mean over them is taken.
      blocks: some of those that `residual_blocks` found.

    Returns:
      float64[blocks], 0 for a block that does nothing, at most 2.

    Raises:
      ValueError: there are no batches.
    """

    @jax.jit
    def changes(params: Any, inputs: Sequence[Any]) -> list[jax.Array]:
        seen: dict[tuple[int, ...], jax.Array] = {}
        _without(f, params, inputs, blocks, seen)
        return [seen[block.place] for block in blocks]

    sums, rows = np.zeros(len(blocks)), 0
    for inputs in batches:
        sums += np.array(changes(densify(params), tuple(inputs)), float)
        rows += 1
    if not rows:
        raise ValueError("block_changes needs at least one batch, got none.")
    return sums / rows


def _go(
    jaxpr: Any,
    consts: Any,
    values: Sequence[Any],
    visit: Callable[[Any, list[Any], tuple[int, ...]], Any],
    constant: Callable[[Any], Any] = lambda value: value,
    place: tuple[int, ...] = (),
) -> list[Any]:
    """A walk that knows where it is, and goes into calls without derivatives."""
    at = iter(range(len(jaxpr.eqns)))

    def step(eqn: Any, values: list[Any]) -> Any:
        here = (*place, next(at))
        if not eqn.primitive.name.startswith("custom_") and (inner := called(eqn)):
            return _go(*inner, values, visit, constant, here)
        return visit(eqn, values, here)

    return walk(jaxpr, consts, values, step, constant)


def _is_sum(eqn: Any) -> bool:
    """Whether it adds two arrays of one shape."""
    shapes = {v.aval.shape for v in (*eqn.invars, *eqn.outvars)}
    return eqn.primitive.name in ("add", "add_any") and len(shapes) == 1


def _without(
    f: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    blocks: Sequence[Block],
    seen: dict[tuple[int, ...], jax.Array] | None = None,
) -> Any:
    """``f`` with blocks left out; or, if ``seen`` is given, with them looked at."""
    program = trace(f, params, *inputs)
    stream = {block.place: block.stream for block in blocks}
    done = set()

    def visit(eqn: Any, values: list[Any], place: tuple[int, ...]) -> Any:
        if place not in stream:
            return bind(eqn, values)
        if not _is_sum(eqn):
            raise ValueError(
                "drop_blocks needs blocks that were found for inputs of these shapes, "
                f"got one that is added where there is a {eqn.primitive.name}."
            )
        done.add(place)
        x = values[stream[place]]
        if seen is None:
            return [x]
        (after,) = bind(eqn, values)
        seen[place] = jnp.mean(1 - _cosine(x, after))
        return [after]

    outs = _go(program.jaxpr, program.consts, [*program.params, *program.inputs], visit)
    if missing := stream.keys() - done:
        raise ValueError(
            "drop_blocks needs blocks that were found for inputs of these shapes, got "
            f"one at equation {sorted(missing)[0]}, which is not there."
        )
    return jax.tree.unflatten(program.out_tree, map(jnp.asarray, outs))


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """float32[...]: between the vectors along the last axis; 1 where both are 0."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    same = jnp.all(x == y, axis=-1)
    product = jnp.sum(x * y, axis=-1)
    return jnp.where(same, 1, product / jnp.where(lengths == 0, 1, lengths))


class _Op(NamedTuple):
    """An equation, of which values it makes which."""

    ins: list[int]
    outs: list[int]
    is_sum: bool
    acts: bool  # has effects
    line: str
    place: tuple[int, ...]


class _Flow(NamedTuple):
    """A program with the calls in it laid open."""

    ops: list[_Op]
    params: dict[str, int]  # path -> value
    inputs: list[int]
    outs: list[int]


def _flow(f: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> _Flow:
    program = trace(f, jax.eval_shape(densify, params), *inputs)
    number = count(1)
    ops: list[_Op] = []

    def visit(eqn: Any, values: list[int], place: tuple[int, ...]) -> list[int]:
        outs = [next(number) for _ in eqn.outvars]
        acts = bool(eqn.effects)
        ops.append(_Op(values, outs, _is_sum(eqn), acts, source(eqn), place))
        return outs

    owned = {path: next(number) for path in program.paths}
    given = [next(number) for _ in program.inputs]
    start = [*owned.values(), *given]
    outs = _go(program.jaxpr, program.consts, start, visit, lambda value: 0)
    return _Flow(ops, owned, given, outs)


def _needed(flow: _Flow, blocks: Sequence[Block]) -> list[str]:
    """Paths of the parameters that what comes out depends on."""
    stream = {block.place: block.stream for block in blocks}
    alive = set(flow.outs)
    for op in reversed(flow.ops):
        if op.acts or not alive.isdisjoint(op.outs):
            at = stream.get(op.place)
            alive.update(op.ins if at is None else [op.ins[at]])
    return [path for path, v in flow.params.items() if v in alive]


def _less(tree: Any, gone: set[str], path: tuple[str, ...] = ()) -> Any:
    """A tree without some of its leaves: keys of dicts are gone, others are None."""
    if type(tree) in (list, tuple):
        parts = (_less(x, gone, (*path, str(i))) for i, x in enumerate(tree))
        return type(tree)(parts)
    if type(tree) is dict:
        items = {k: _less(x, gone, (*path, str(k))) for k, x in tree.items()}
        empty = {k for k, x in items.items() if not jax.tree.leaves(x)}
        new = empty - {k for k in empty if not jax.tree.leaves(tree[k])}
        return {k: x for k, x in items.items() if k not in new}
    ends, leaves, treedef = flatten(tree)
    paths = ("/".join([*path, end] if end else path) for end in ends)
    kept = [None if p in gone else x for p, x in zip(paths, leaves, strict=True)]
    return jax.tree.unflatten(treedef, kept)


def _name(paths: Sequence[str], every: Sequence[str], line: str) -> str:
    """What paths have in common and not all have, or else the line."""
    for skip in (0, 1):  # the second may follow a collection, such as statistics
        shared, known = (
            shared_keys([path.split("/", skip)[-1] for path in some])
            for some in (paths, every)
        )
        if len(shared) > len(known):
            return "/".join(shared)
    return f"block at {line}"
