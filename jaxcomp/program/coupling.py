"""Groups of slices that can only be removed together, found in a program."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcomp.node import densify, flatten
from jaxcomp.program.axes import Axis, Book, Plan, Product, Rule, Value, shape_of
from jaxcomp.program.rules import RULES
from jaxcomp.program.walk import Program, trace
from jaxcomp.prune.groups import Family, Member, Term
from jaxcomp.tree import shared_keys


class Frozen(NamedTuple):
    """An axis of a parameter of which some slices have to stay."""

    path: str
    axis: int
    slices: int  # how many of them
    reason: str  # the first: what looks at them, and the line of the source


class Groups(NamedTuple):
    """What `coupled_groups` found; prints as a list."""

    families: tuple[Family, ...]
    frozen: tuple[Frozen, ...]
    parameters: tuple[Term, ...]  # by how many groups of each family are kept
    multiply_adds: tuple[Term, ...]

    def __str__(self) -> str:
        lines = []
        for family in self.families:
            lines.append(f"{family.name}: {family.size} groups")
            for path, axis, indices in family.members:
                each = indices.shape[1]
                of_each = f", {each} of each" if each > 1 else ""
                lines.append(f"  {path} axis {axis}{of_each}")
            if not family.exact:
                lines.append(f"  not exact: {family.reason}")
        if self.frozen:
            lines.append("frozen:")
        for path, axis, slices, reason in self.frozen:
            lines.append(f"  {path} axis {axis} ({slices}): {reason}")
        return "\n".join(lines)


class Analysis(NamedTuple):
    """A program, its equations with their axes, and what was found out."""

    program: Program
    plan: Plan
    book: Book
    own: list[list[Axis | str]]  # the axes of each parameter


def coupled_groups(
    f: Callable[..., Any],
    params: Any,
    *inputs: Any,
    rules: Mapping[str, Rule] = RULES,
) -> Groups:
    """Finds which slices of parameters live and die together in ``f``.

    Fang et al., "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900, find such
    groups in a graph of layers, whose kinds they know. Here the traced program is
    walked, with a rule for each primitive: nothing is computed, shapes will do.

    Args:
      f: (params, *inputs) -> any pytree. An output with the path and the shape of a
        parameter, such as batch statistics that come back, is that parameter anew.
      params: any pytree of arrays, `jax.ShapeDtypeStruct` and nodes; all that has
        channels is among them, batch statistics too.
      *inputs: arrays or shapes.
      rules: primitive -> rule. A primitive without one freezes what it takes.

    Returns:
      `Groups`: families of groups, and why all other axes have to stay.

    >>> import jax.numpy as jnp
    >>> f = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
    >>> params = {"up": jnp.ones((3, 4)), "bias": jnp.ones(4), "down": jnp.ones((4, 2))}
    >>> found = coupled_groups(f, params, jnp.ones((5, 3)))
    >>> print(found.families[0].name, found.families[0].groups[0])
    units of up [('up', 1, [0]), ('bias', 0, [0]), ('down', 0, [0])]
    """
    found = analyse(f, jax.eval_shape(densify, params), inputs, rules)
    return grouped(found)


def analyse(
    f: Callable[..., Any], params: Any, inputs: Sequence[Any], rules: Mapping[str, Rule]
) -> Analysis:
    """Takes labels through a program, until the reshapes have found their way."""
    program = trace(f, params, *inputs)
    banned: dict[tuple[int, ...], int] = {}
    while True:
        found = _walked(program, rules, banned)
        live = _live(found)
        dead = {
            place: option + 1
            for place, (option, labels) in found.book.choices.items()
            if not live[found.book.labels.roots(labels)].any()
        }
        if not dead:
            return found
        banned |= dead  # there are so many options, and each is tried once


def _walked(program: Program, rules: Any, banned: Any) -> Analysis:
    book = Book(rules, banned)
    own = [[book.fresh(n, zero=True) for n in leaf.shape] for leaf in program.params]
    ins = [Value(tuple(axes), leaf=i) for i, axes in enumerate(own)]
    for i, x in enumerate(program.inputs):
        reason = "input" if len(program.inputs) == 1 else f"input {i}"
        ins.append(Value((reason,) * len(shape_of(x)), made=True))
    jaxpr = program.jaxpr
    used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars}
    used |= set(map(id, jaxpr.outvars))
    for v, axes in zip(jaxpr.invars, own, strict=False):
        for axis in axes if id(v) not in used else ():
            book.freeze(axis, "not used")
    plan = book.plan(program.jaxpr, program.consts, ins)
    shapes = [tuple(x.shape) for x in program.params]
    anew = _returned(program, shapes)
    for i, x in enumerate(plan.outs):
        if i in anew:
            for pair in zip(x.axes, own[anew[i]], strict=True):
                book.same(pair, "output")
        else:
            for axis in x.axes:
                book.freeze(axis, "output")
    return Analysis(program, plan, book, own)


def _returned(program: Program, shapes: list[tuple[int, ...]]) -> dict[int, int]:
    """Which results are parameters anew: number of the result -> of the leaf."""
    outs = jax.tree.unflatten(program.out_tree, range(program.out_tree.num_leaves))
    paths, places, _ = flatten(outs)
    avals = [v.aval for v in program.jaxpr.outvars]
    found = {}
    leaves = {path: leaf for leaf, path in enumerate(program.paths)}
    for path, place in zip(paths, places, strict=True):
        parts = path.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        own = next((leaves[end] for end in ends if end in leaves), None)
        if own is not None and avals[place].shape == shapes[own]:
            found[place] = own
    return found


def _live(found: Analysis) -> np.ndarray:
    """bool[labels]: roots that a parameter has and nothing freezes."""
    labels = found.book.labels
    live = np.zeros(labels.size, bool)
    for axes in found.own:
        for x in axes:
            if isinstance(x, Axis):
                live[labels.roots(x.labels)] = True
    return live & ~labels.is_frozen(np.arange(labels.size))


def grouped(found: Analysis) -> Groups:
    """Groups that are alike as families, first used first."""
    labels, live = found.book.labels, _live(found)
    order = [*found.book.order, *range(len(found.own))]
    owners = [
        (leaf, axis, labels.roots(x.labels))
        for leaf in dict.fromkeys(order)
        for axis, x in enumerate(found.own[leaf])
        if isinstance(x, Axis)
    ]
    # A number for what a group owns: equal for groups that are alike.
    alike = np.zeros(labels.size, object)
    for i, (_, _, roots) in enumerate(owners):
        some, counts = np.unique(roots[live[roots]], return_counts=True)
        alike[some] = [
            hash((x, i, n)) for x, n in zip(alike[some], counts, strict=True)
        ]
    kinds: dict[int, list[int]] = {}
    for root in dict.fromkeys(
        root for _, _, roots in owners for root in roots[live[roots]].tolist()
    ):
        kinds.setdefault(alike[root], []).append(root)
    names: dict[str, None] = {}
    families: list[Family] = []
    of = np.full(labels.size, -1)
    for mine in kinds.values():
        roots = np.array(mine)
        rank = np.full(labels.size, -1)
        rank[roots] = np.arange(len(roots))
        of[roots] = len(families)
        members = []
        for leaf, axis, own in owners:
            at = np.flatnonzero(rank[own] >= 0)
            if at.size:
                at = at[np.argsort(rank[own[at]], kind="stable")]
                rows = at.reshape(len(roots), -1).astype(np.int32)
                members.append(Member(found.program.paths[leaf], axis, rows))
        name = _name(found, roots, members, names)
        reason = _why(found, roots)
        families.append(Family(name, tuple(members), not reason, reason))
    frozen = [
        Frozen(
            found.program.paths[leaf],
            axis,
            int(stay.sum()),
            labels.reason(own[stay][0]),
        )
        for leaf, axis, own in sorted(owners, key=lambda owner: owner[:2])
        if (stay := ~live[own]).any()
    ]
    costs = [
        Product(
            1,
            tuple(
                n if isinstance(x, str) else x.labels
                for n, x in zip(leaf.shape, own, strict=True)
            ),
        )
        for leaf, own in zip(found.program.params, found.own, strict=True)
    ]
    terms = [
        tuple(_term(found, families, of, product) for product in products)
        for products in (costs, found.book.products)
    ]
    return Groups(tuple(families), tuple(frozen), *terms)


def _term(found: Analysis, families: Any, of: np.ndarray, product: Product) -> Term:
    lengths: list[Any] = []
    for x in product.lengths:
        if isinstance(x, int):
            lengths.append((x, ()))
            continue
        owners, counts = np.unique(of[found.book.labels.roots(x)], return_counts=True)
        pairs = dict(zip(owners.tolist(), counts.tolist(), strict=True))
        fixed = pairs.pop(-1, 0)
        parts = ((families[i].name, n / families[i].size) for i, n in pairs.items())
        lengths.append((fixed, tuple(parts)))
    return Term(product.factor, tuple(lengths))


def _why(found: Analysis, roots: np.ndarray) -> str:
    """Why removing these is not the same as setting them to zero, or ""."""
    mine = np.zeros(found.book.labels.size, bool)
    mine[roots] = True
    for _, labels, reason in sorted(found.book.inexact, key=lambda event: event[0]):
        if mine[found.book.labels.roots(labels)].any():
            return reason
    return ""


def _name(
    found: Analysis, roots: np.ndarray, members: list[Member], names: dict[str, None]
) -> str:
    mine = np.zeros(found.book.labels.size, bool)
    mine[roots] = True
    kinds = {
        kind
        for kind, labels in found.book.kinds
        if mine[found.book.labels.roots(labels)].any()
    }
    nouns = {"stream": "stream from", "heads": "heads of", "inner": "inner width of"}
    noun = next((nouns[kind] for kind in nouns if kind in kinds), "units of")
    path = members[0].path
    module = path.rpartition("/")[0] or path
    if noun == "heads of":
        module = "/".join(shared_keys([m.path for m in members])) or module
    name = f"{noun} {module}"
    number = 2
    while name in names:
        name = f"{noun} {module} ({number})"
        number += 1
    names[name] = None
    return name
