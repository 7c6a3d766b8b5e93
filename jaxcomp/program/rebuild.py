"""An equation of smaller arrays: shapes that it holds are those of what is kept."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxcomp.program.axes import Axis, Plan, Step, Value, length
from jaxcomp.program.coupling import Analysis
from jaxcomp.program.derivatives import BACKWARD, FORWARD, floating
from jaxcomp.program.releases import scan_split
from jaxcomp.program.walk import bind, spent


def taken(x: Any, indices: np.ndarray, axis: int) -> Any:
    """The slices at some indices of an axis, which are in order."""
    if len(indices) == x.shape[axis]:
        return x
    if len(indices) and indices[-1] - indices[0] == len(indices) - 1:
        first, last = int(indices[0]), int(indices[-1]) + 1
        return jax.lax.slice_in_dim(x, first, last, axis=axis)
    # All of them are there: nothing has to be filled.
    return jnp.take(
        x,
        indices,
        axis=axis,
        mode="clip",
        unique_indices=True,
        indices_are_sorted=True,
    )


class Run:
    """Goes through equations with arrays of which slices are gone."""

    def __init__(
        self,
        found: Analysis,
        gone: Mapping[tuple[str, int], np.ndarray],
        rebuilds: "Mapping[str, Rebuild]",
    ):
        self.rebuilds = rebuilds
        labels = found.book.labels
        lost = np.zeros(labels.size, bool)
        owners = {}
        for path, axes in zip(found.program.paths, found.own, strict=True):
            for axis, own in enumerate(axes):
                if isinstance(own, Axis):
                    owners[path, axis] = labels.roots(own.labels)
        for at, some in gone.items():
            lost[owners[at][some]] = True
        for at, roots in owners.items():
            if lost[roots].sum() != len(gone.get(at, ())):
                raise ValueError(
                    f"shrink cannot cut axis {at[1]} of {at[0]!r} alone: for inputs of "
                    "these shapes other slices depend on it. Find the groups for them."
                )
        stuck = lost & labels.is_frozen(np.arange(labels.size))
        if stuck.any():
            raise ValueError(
                "shrink needs groups that can be removed for inputs of these shapes, "
                f"got one that {labels.reason(int(np.flatnonzero(stuck)[0]))} freezes."
            )
        self.kept = ~lost[labels.roots(np.arange(labels.size))]
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
        rebuild = self.rebuilds.get(step.eqn.primitive.name)
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
                x = taken(x, np.flatnonzero(self.kept[axis.labels]), a)
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
        if not count:
            raise ValueError(
                "shrink needs something to be left of what a mean is taken over, got a "
                "`keep` that leaves nothing of it. Keep more groups."
            )
        divides = step.eqn.primitive.name == "div"
        at = 1 if step.ins[0].span is step.mean else 0
        args = list(args)
        args[at] = jnp.full_like(args[at], count if divides else 1 / count)
        return args


def _rebound(step: Step, args: list[Any], **changes: Any) -> list[Any]:
    return bind(step.eqn.replace(params={**step.eqn.params, **changes}), args)


def _broadcast(run: Run, step: Step, args: list[Any]) -> list[Any]:
    return _rebound(step, args, shape=run.shape(step))


def _reshape(run: Run, step: Step, args: list[Any]) -> list[Any]:
    return _rebound(step, args, new_sizes=run.shape(step))


def _slice(run: Run, step: Step, args: list[Any]) -> list[Any]:
    x, params = args[0], step.eqn.params
    strides = params["strides"] or (1,) * x.ndim
    for a, axis in enumerate(step.ins[0].axes):
        first, last = params["start_indices"][a], params["limit_indices"][a]
        full = step.eqn.invars[0].aval.shape[a]
        kept = run.kept[axis.labels] if isinstance(axis, Axis) else np.ones(full, bool)
        some = np.arange(full)[first : last : strides[a]]
        places = (np.cumsum(kept) - 1)[some[kept[some]]]
        x = taken(x, places, a)
    return [x]


def _split(run: Run, step: Step, args: list[Any]) -> list[Any]:
    axis = step.ins[0].axes[step.eqn.params["axis"]]
    if isinstance(axis, str):
        return bind(step.eqn, args)
    ends = np.cumsum(step.eqn.params["sizes"])[:-1]
    parts = np.split(run.kept[axis.labels], ends)
    return _rebound(step, args, sizes=tuple(int(part.sum()) for part in parts))


def _pad(run: Run, step: Step, args: list[Any]) -> list[Any]:
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


def _sliced(run: Run, step: Step, args: list[Any]) -> list[Any]:
    """A gather or a dynamic slice, which takes some axes whole."""
    shape, sizes = step.eqn.invars[0].aval.shape, step.eqn.params["slice_sizes"]
    triples = zip(args[0].shape, shape, sizes, strict=True)
    new = tuple(now if size == full else size for now, full, size in triples)
    return _rebound(step, args, slice_sizes=new)


def _made(run: Run, step: Step, args: list[Any]) -> list[Any]:
    """What is the same for those that stay: made at its full shape, then taken."""
    return [
        run.full(x, known)
        for x, known in zip(bind(step.eqn, args), step.outs, strict=True)
    ]


def _convolution(run: Run, step: Step, args: list[Any]) -> list[Any]:
    params = step.eqn.params
    if params["feature_group_count"] == 1:
        return bind(step.eqn, args)
    numbers = params["dimension_numbers"]
    each = args[1].shape[numbers.rhs_spec[1]]
    count = args[0].shape[numbers.lhs_spec[1]] // each
    return _rebound(step, args, feature_group_count=count)


def _checkpoint(run: Run, step: Step, args: list[Any]) -> list[Any]:
    keep = {k: step.eqn.params[k] for k in ("prevent_cse", "policy")}
    inner = jax.checkpoint(lambda args: run.plan(step.plans[0], args), **keep)
    return inner(args)


def _scan(run: Run, step: Step, args: list[Any]) -> list[Any]:
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


def _while(run: Run, step: Step, args: list[Any]) -> list[Any]:
    params, (asked, body) = step.eqn.params, step.plans
    first = params["cond_nconsts"]
    split = first + params["body_nconsts"]
    return jax.lax.while_loop(
        lambda carry: run.plan(asked, [*args[:first], *carry])[0],
        lambda carry: run.plan(body, [*args[first:split], *carry]),
        args[split:],
    )


def _cond(run: Run, step: Step, args: list[Any]) -> list[Any]:
    branches = [
        lambda *operands, plan=plan: run.plan(plan, operands) for plan in step.plans
    ]
    return jax.lax.switch(args[0], branches, *args[1:])


def _forward(run: Run, step: Step, args: list[Any]) -> list[Any]:
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


def _backward(run: Run, step: Step, args: list[Any]) -> list[Any]:
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


# (what is kept, an equation, its operands) -> its results
Rebuild = Callable[[Run, Step, list[Any]], Sequence[Any]]

REBUILDS: dict[str, Rebuild] = {
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
