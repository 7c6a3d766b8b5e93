"""A function of fewer parameters: groups of slices really removed.

The program is walked once more with the smaller parameters. Where an equation holds a
shape, the shape is that of the indices that are kept; all else is bound as it was.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxcomp.node import densify, flatten
from jaxcomp.program.axes import Axis, Plan, Rule, Step, Value, length
from jaxcomp.program.coupling import Analysis, Groups, analyse, grouped
from jaxcomp.program.derivatives import BACKWARD, FORWARD, floating
from jaxcomp.program.releases import scan_split
from jaxcomp.program.rules import RULES
from jaxcomp.program.walk import bind, spent
from jaxcomp.prune.groups import Family, Keep, gone_slices


class Shrunk(NamedTuple):
    """What `shrink` gives."""

    function: Callable[..., Any]  # (smaller params, *inputs) -> as the function before
    params: Any  # the smaller ones
    widths: dict[str, tuple[int, ...]]  # path -> shape, of all that became smaller


def shrink(
    f: Callable[..., Any],
    params: Any,
    keep: Keep,
    *inputs: Any,
    rules: Mapping[str, Rule] = RULES,
) -> Shrunk:
    """Removes groups of slices, so that ``f`` computes less.

    The result is the function with the removed slices at zero, to float precision,
    where a family is exact. Where a mean spans a family, as layer norms do the residual
    stream, it is ``f`` as it would be if written for the smaller shapes.

    Args:
      f: (params, *inputs) -> any pytree.
      params: any pytree of arrays; nodes are densified.
      keep: name of a family of `coupled_groups` -> bool[groups], which stay. A family
        that is left out stays whole.
      *inputs: arrays or shapes, of the shapes that ``f`` takes.
      rules: as in `coupled_groups`.

    Returns:
      `Shrunk`, the function, the parameters, the widths. The function traces ``f``
      where it is called, so call it under `jax.jit`; it has derivatives and takes other
      shapes of inputs. Constants that ``f`` computes from a width of its own, such as
      the scale of attention, stay what they were.

    Raises:
      ValueError: a family is not known, a mask has the wrong length, or nothing is left
        of an axis.

    >>> f = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    >>> keep = {"units of up": np.array([True, False, True, False])}
    >>> g, smaller, widths = shrink(f, params, keep, jnp.ones((5, 3)))
    >>> widths, g(smaller, jnp.ones(3))
    ({'down': (2, 2), 'up': (3, 2)}, Array([6., 6.], dtype=float32))
    """
    params = densify(params)
    shapes = jax.eval_shape(lambda: params)
    found = analyse(f, shapes, inputs, rules)
    groups = grouped(found)
    slices = gone_slices("shrink", groups.families, keep)
    smaller = cut(params, params, groups, keep)
    new = jax.eval_shape(lambda: smaller)

    def g(params: Any, *inputs: Any) -> Any:
        params = densify(params)
        _check_shapes(params, new)
        found = analyse(f, shapes, inputs, rules)
        run = _Run(found, slices)
        leaves = [*flatten(params)[1], *found.program.inputs]
        outs = map(jnp.asarray, run.plan(found.plan, leaves))
        return jax.tree.unflatten(found.program.out_tree, outs)

    jax.eval_shape(g, new, *inputs)  # an axis of which nothing is left shows now
    pairs = zip(*flatten(shapes)[:2], flatten(new)[1], strict=True)
    widths = {path: b.shape for path, a, b in pairs if a.shape != b.shape}
    return Shrunk(g, smaller, widths)


def cut(tree: Any, params: Any, families: Groups | Sequence[Family], keep: Keep) -> Any:
    """Removes the same slices from what belongs to the parameters.

    Args:
      tree: the state of an optimizer, averages of parameters, parameters themselves.
      params: the parameters before, or their shapes.
      families: as found by `coupled_groups`.
      keep: as in `shrink`.

    Returns:
      ``tree`` with a cut in every leaf that has the shape of a parameter and a path
      that ends in its path; all other leaves as they are.

    Raises:
      ValueError: as `shrink`; or a leaf has the path of a parameter that is cut, but
        neither its shape nor a single entry, as in factored second moments.

    >>> f = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    >>> from jaxcomp.program import coupled_groups
    >>> groups = coupled_groups(f, params, jnp.ones((5, 3)))
    >>> keep = {"units of up": np.arange(4) < 3}
    >>> jax.tree.map(jnp.shape, cut({"mu": params}, params, groups, keep))
    {'mu': {'down': (3, 2), 'up': (3, 3)}}
    """
    if isinstance(families, Groups):
        families = families.families
    slices = gone_slices("cut", families, keep)
    owned: dict[str, dict[int, np.ndarray]] = {}
    for (path, axis), gone in slices.items():
        owned.setdefault(path, {})[axis] = gone
    paths, leaves, _ = flatten(params)
    shapes = dict(zip(paths, map(np.shape, leaves), strict=True))
    paths, leaves, treedef = flatten(tree)
    found = []
    for path, leaf in zip(paths, leaves, strict=True):
        parts = path.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        own = next((end for end in ends if end in owned), None)
        if own is None or np.size(leaf) == 1:
            found.append(leaf)
            continue
        if np.shape(leaf) != shapes[own]:
            raise ValueError(
                f"cut needs leaves shaped like the parameters, got {path!r} of shape "
                f"{np.shape(leaf)} for {own!r} of shape {shapes[own]}. Make this state "
                "anew from the smaller parameters."
            )
        for axis, gone in owned[own].items():
            kept = np.delete(np.arange(leaf.shape[axis]), gone)
            leaf = _taken(leaf, kept, axis)
        found.append(leaf)
    return jax.tree.unflatten(treedef, found)


def _taken(x: Any, indices: np.ndarray, axis: int) -> Any:
    if len(indices) == x.shape[axis]:
        return x
    first, last = int(indices[0]), int(indices[-1]) + 1
    if last - first == len(indices):
        return jax.lax.slice_in_dim(x, first, last, axis=axis)
    return jnp.take(x, indices, axis=axis)


def _check_shapes(params: Any, new: Any) -> None:
    paths, leaves, _ = flatten(params)
    wanted = dict(zip(*flatten(new)[:2], strict=True))
    for path, leaf in zip(paths, leaves, strict=True):
        if path not in wanted or np.shape(leaf) != wanted[path].shape:
            has = f"of shape {wanted[path].shape}" if path in wanted else "none there"
            raise ValueError(
                f"a function from shrink needs the smaller parameters, {has} at "
                f"{path!r}, got shape {np.shape(leaf)}."
            )


class _Run:
    """Goes through equations with arrays of which slices are gone."""

    def __init__(self, found: Analysis, slices: Mapping[tuple[str, int], np.ndarray]):
        labels = found.book.labels
        gone = np.zeros(labels.size, bool)
        owners = {}
        for path, axes in zip(found.program.paths, found.own, strict=True):
            for axis, own in enumerate(axes):
                if isinstance(own, Axis):
                    owners[path, axis] = labels.roots(own.labels)
        for at, some in slices.items():
            gone[owners[at][some]] = True
        for at, roots in owners.items():
            if gone[roots].sum() != len(slices.get(at, ())):
                raise ValueError(
                    f"shrink cannot cut axis {at[1]} of {at[0]!r} alone: for inputs of "
                    "these shapes other slices depend on it. Find the groups for them."
                )
        stuck = gone & labels.is_frozen(np.arange(labels.size))
        if stuck.any():
            raise ValueError(
                "shrink needs groups that can be removed for inputs of these shapes, "
                f"got one that {labels.reason(int(np.flatnonzero(stuck)[0]))} freezes."
            )
        self.kept = ~gone[labels.roots(np.arange(labels.size))]
        self._same: dict[int, bool] = {}

    def plan(self, plan: Plan, values: Sequence[Any]) -> list[Any]:
        consts = map(self.full, plan.consts, plan.known)
        known = dict(zip(plan.jaxpr.constvars, consts, strict=True))
        known |= dict(zip(plan.jaxpr.invars, values, strict=True))
        for step, done in zip(plan.steps, spent(plan.jaxpr), strict=True):
            args = [
                self.full(v.val, x) if isinstance(v, Literal) else known[v]
                for v, x in zip(step.eqn.invars, step.ins, strict=True)
            ]
            known.update(zip(step.eqn.outvars, self.step(step, args), strict=True))
            for v in done:
                known.pop(v)
        return [
            v.val if isinstance(v, Literal) else known[v] for v in plan.jaxpr.outvars
        ]

    def step(self, step: Step, args: list[Any]) -> Sequence[Any]:
        if self.unchanged(step):
            return bind(step.eqn, args)
        for x in step.outs:
            for axis in x.axes:
                if isinstance(axis, Axis) and not self.kept[axis.labels].any():
                    name = step.eqn.primitive.name
                    raise ValueError(
                        "shrink needs something to be left of every axis, got a `keep` "
                        f"that leaves nothing of what a {name} makes. Keep more groups."
                    )
        rebuild = REBUILDS.get(step.eqn.primitive.name)
        if rebuild is not None:
            return rebuild(self, step, args)
        if step.plans:  # a call
            return self.plan(step.plans[0], args)
        return bind(step.eqn, self.averaged(step, args))

    def unchanged(self, step: Step) -> bool:
        """Whether nothing is gone of what goes in, comes out or is inside."""
        known = [axis for x in (*step.ins, *step.outs) for axis in x.axes]
        lengths = step.mean.lengths if step.mean else ()
        same = all(self.length(x) == length(x) for x in lengths)
        return (
            same
            and all(isinstance(x, str) or self.kept[x.labels].all() for x in known)
            and all(map(self.whole, step.plans))
        )

    def whole(self, plan: Plan) -> bool:
        if id(plan) not in self._same:
            self._same[id(plan)] = all(map(self.unchanged, plan.steps))
        return self._same[id(plan)]

    def full(self, x: Any, known: Value) -> Any:
        """What is kept of an array that came at its full shape."""
        for a, axis in enumerate(known.axes):
            if isinstance(axis, Axis):
                x = _taken(x, np.flatnonzero(self.kept[axis.labels]), a)
        return x

    def length(self, labels: np.ndarray | int) -> int:
        return labels if isinstance(labels, int) else int(self.kept[labels].sum())

    def shape(self, step: Step) -> tuple[int, ...]:
        """Of the result of an equation."""
        pairs = zip(step.outs[0].axes, step.eqn.outvars[0].aval.shape, strict=True)
        return tuple(
            n if isinstance(x, str) else self.length(x.labels) for x, n in pairs
        )

    def averaged(self, step: Step, args: list[Any]) -> list[Any]:
        """The operands of a mean, which divides by how many are left."""
        if step.mean is None:
            return args
        count = int(np.prod([self.length(x) for x in step.mean.lengths]))
        divides = step.eqn.primitive.name == "div"
        at = 1 if step.ins[0].span is step.mean else 0
        args = list(args)
        args[at] = jnp.full_like(args[at], count if divides else 1 / count)
        return args


def _rebound(step: Step, args: list[Any], **changes: Any) -> list[Any]:
    return bind(step.eqn.replace(params={**step.eqn.params, **changes}), args)


def _broadcast(run: _Run, step: Step, args: list[Any]) -> list[Any]:
    return _rebound(step, args, shape=run.shape(step))


def _reshape(run: _Run, step: Step, args: list[Any]) -> list[Any]:
    return _rebound(step, args, new_sizes=run.shape(step))


def _slice(run: _Run, step: Step, args: list[Any]) -> list[Any]:
    x, params = args[0], step.eqn.params
    strides = params["strides"] or (1,) * x.ndim
    for a, axis in enumerate(step.ins[0].axes):
        first, last = params["start_indices"][a], params["limit_indices"][a]
        full = step.eqn.invars[0].aval.shape[a]
        kept = run.kept[axis.labels] if isinstance(axis, Axis) else np.ones(full, bool)
        some = np.arange(full)[first : last : strides[a]]
        places = (np.cumsum(kept) - 1)[some[kept[some]]]
        x = _taken(x, places, a)
    return [x]


def _split(run: _Run, step: Step, args: list[Any]) -> list[Any]:
    axis = step.ins[0].axes[step.eqn.params["axis"]]
    if isinstance(axis, str):
        return bind(step.eqn, args)
    ends = np.cumsum(step.eqn.params["sizes"])[:-1]
    parts = np.split(run.kept[axis.labels], ends)
    return _rebound(step, args, sizes=tuple(int(part.sum()) for part in parts))


def _pad(run: _Run, step: Step, args: list[Any]) -> list[Any]:
    ends = []
    for axis, end in zip(
        step.outs[0].axes, step.eqn.params["padding_config"], strict=True
    ):
        if isinstance(axis, Axis):
            low, high, inside = end
            kept = run.kept[axis.labels]
            end = (int(kept[:low].sum()), int(kept[len(kept) - high :].sum()), inside)
        ends.append(end)
    return _rebound(step, args, padding_config=tuple(ends))


def _sliced(run: _Run, step: Step, args: list[Any]) -> list[Any]:
    """A gather or a dynamic slice, which takes some axes whole."""
    shape, sizes = step.eqn.invars[0].aval.shape, step.eqn.params["slice_sizes"]
    triples = zip(args[0].shape, shape, sizes, strict=True)
    new = tuple(now if size == full else size for now, full, size in triples)
    return _rebound(step, args, slice_sizes=new)


def _made(run: _Run, step: Step, args: list[Any]) -> list[Any]:
    """What is the same for those that stay: made at its full shape, then taken."""
    return [
        run.full(x, known)
        for x, known in zip(bind(step.eqn, args), step.outs, strict=True)
    ]


def _convolution(run: _Run, step: Step, args: list[Any]) -> list[Any]:
    params = step.eqn.params
    if params["feature_group_count"] == 1:
        return bind(step.eqn, args)
    numbers = params["dimension_numbers"]
    each = args[1].shape[numbers.rhs_spec[1]]
    count = args[0].shape[numbers.lhs_spec[1]] // each
    return _rebound(step, args, feature_group_count=count)


def _checkpoint(run: _Run, step: Step, args: list[Any]) -> list[Any]:
    keep = {k: step.eqn.params[k] for k in ("prevent_cse", "policy")}
    inner = jax.checkpoint(lambda args: run.plan(step.plans[0], args), **keep)
    return inner(args)


def _scan(run: _Run, step: Step, args: list[Any]) -> list[Any]:
    params, plan = step.eqn.params, step.plans[0]
    fixed, carried = scan_split(params)
    consts, carry, rows = (
        args[:fixed],
        args[fixed : fixed + carried],
        args[fixed + carried :],
    )

    def turn(carry: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        out = run.plan(plan, [*consts, *carry, *rows])
        return out[:carried], out[carried:]

    settings = {k: params[k] for k in ("length", "reverse", "unroll")}
    carry, stacked = jax.lax.scan(turn, carry, rows, **settings)
    return [*carry, *stacked]


def _while(run: _Run, step: Step, args: list[Any]) -> list[Any]:
    params, (asked, body) = step.eqn.params, step.plans
    first = params["cond_nconsts"]
    split = first + params["body_nconsts"]
    return jax.lax.while_loop(
        lambda carry: run.plan(asked, [*args[:first], *carry])[0],
        lambda carry: run.plan(body, [*args[first:split], *carry]),
        args[split:],
    )


def _cond(run: _Run, step: Step, args: list[Any]) -> list[Any]:
    branches = [
        lambda *operands, plan=plan: run.plan(plan, operands) for plan in step.plans
    ]
    return jax.lax.switch(args[0], branches, *args[1:])


def _forward(run: _Run, step: Step, args: list[Any]) -> list[Any]:
    """A call with a ``custom_jvp``, whose rule is as much smaller."""
    if len(step.plans) == 1:
        return run.plan(step.plans[0], args)
    plan, rule = step.plans
    moved, found = floating(step.eqn.invars), floating(step.eqn.outvars)
    call = jax.custom_jvp(lambda *args: run.plan(plan, args))

    @call.defjvp
    def push(args: Any, tangents: Any) -> Any:
        outs = run.plan(rule, [*args, *(tangents[i] for i in moved)])
        results, after = outs[: len(step.outs)], iter(outs[len(step.outs) :])
        still = [np.zeros(np.shape(x), jax.dtypes.float0) for x in results]
        return results, [next(after) if i in found else x for i, x in enumerate(still)]

    return call(*args)


def _backward(run: _Run, step: Step, args: list[Any]) -> list[Any]:
    """A call with a ``custom_vjp``, whose rule is as much smaller."""
    if len(step.plans) == 1:
        return run.plan(step.plans[0], args)
    plan, rule = step.plans
    moved, found = floating(step.eqn.invars), floating(step.eqn.outvars)
    call = jax.custom_vjp(lambda *args: run.plan(plan, args))

    def pull(args: Any, after: Any) -> Any:
        outs = iter(run.plan(rule, [*args, *(after[i] for i in found)]))
        return tuple(next(outs) if i in moved else None for i in range(len(args)))

    call.defvjp(lambda *args: (run.plan(plan, args), args), pull)
    return call(*args)


REBUILDS: dict[str, Callable[[_Run, Step, list[Any]], Sequence[Any]]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "pad": _pad,
    "gather": _sliced,
    "dynamic_slice": _sliced,
    "iota": _made,
    "random_bits": _made,
    "conv_general_dilated": _convolution,
    "remat2": _checkpoint,
    "checkpoint": _checkpoint,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    FORWARD: _forward,
    BACKWARD: _backward,
}
