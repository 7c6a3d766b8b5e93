"""What flows into every weight: statistics of activations, streamed over batches.

The program is walked with arrays, some of which are known to be a parameter, moved.
Where one meets an activation in a dot or a convolution, the other operand is the input
of that weight. There are no hooks, and no model code changes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp.node import densify, flatten
from jaxcomp.program.operands import Operand, inputs_of, layout_of, outputs_of
from jaxcomp.program.releases import closed, scan_split
from jaxcomp.program.statistics import Statistic
from jaxcomp.program.views import View, is_move, moved
from jaxcomp.program.walk import PRODUCTS, bind, called, multiplies, trace, walk
from jaxcomp.prune.oneshot import unique_names
from jaxcomp.tree import Where, is_matrix, select


Statistics = Mapping[str, Statistic]


class Observed(NamedTuple):
    """What is known of one weight. Axes are those of the parameter as it is stored.

    Attributes:
      inputs: name -> value. An array by channels has the lengths of ``stacked``, then
        the groups if there are several, then the lengths of ``axes``. A joint one, such
        as `second_moment`, goes over ``axes`` and ``window`` in C order instead.
      outputs: name -> value; the lengths of ``stacked``, then of ``units``.
      axes: contracted with the inputs; of a convolution the features.
      window: the other axes that a convolution contracts.
      units: what the outputs are indexed by.
      stacked: where every slice has inputs of its own: layers of a scan, experts.
      groups: of a grouped convolution, else 1.
      masked: whether the mask was applied in all its uses.
      reason: why it could not be observed; "" if it was.
    """

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    axes: tuple[int, ...]
    window: tuple[int, ...]
    units: tuple[int, ...]
    stacked: tuple[int, ...]
    groups: int
    masked: bool
    reason: str


def observe(
    f: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    statistics: Statistics,
    *,
    outputs: Statistics | None = None,
    where: Where = is_matrix,
    mask: Callable[..., jax.Array] | None = None,
) -> dict[str, Observed]:
    """Statistics of the inputs of every weight of ``f(params, *batch)``.

    A weight is a selected parameter, moved or cast, in a dot or a convolution with an
    activation. Looking up an embedding is no product. Several uses add up, all turns of
    a scan too; slices of a parameter count for the whole of it, and an input that some
    of them share counts once.

    Args:
      f: (params, *inputs) -> any pytree.
      params: any pytree of arrays and nodes.
      batches: tuples of inputs, each looked at once. Memory does not grow with their
        number, and ``f`` is traced once for each of their shapes.
      statistics: name -> what to know of the inputs, e.g. ``{"norm": norm}``.
      outputs: name -> what to know of the products themselves, without bias. What an
        activation function gives is the input of the next weight.
      where: (path, leaf) -> bool.
      mask: (*batch) -> bool[*leading axes of the inputs], False for padding. It is for
        what has these leading axes, or all of them as one. Elsewhere, as after pooling
        or in the turns of a scan over time, every row counts: see `Observed.masked`.

    Returns:
      path -> `Observed`, for each selected parameter. One has a reason in place of
      statistics if it meets no activation, is not always contracted along the same
      whole axes, or enters a branch, a while loop, a kernel or what a scan carries.

    Raises:
      ValueError: nothing is selected, all that is selected has a reason, there is no
        batch, or the mask fits nowhere.
      TypeError: a batch is no tuple, or the mask is not bool.

    >>> from jaxcomp.program.statistics import norm
    >>> f, params = lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((2, 3))}
    >>> found = observe(f, params, [(jnp.array([[3.0, 0.0]]),)] * 2, {"norm": norm})
    >>> found["kernel"].axes, found["kernel"].inputs["norm"]
    ((0,), Array([4.2426405, 0.       ], dtype=float32))
    """
    params = densify(params)
    paths, leaves, _ = flatten(params)
    chosen = jax.tree.leaves(select(params, where))
    taken = {i: np.shape(x) for i, x in enumerate(leaves) if chosen[i]}
    watch = _Watch(unique_names(paths), taken, (dict(statistics), dict(outputs or {})))

    @jax.jit
    def update(params: Any, batch: Any) -> _Found:
        traced = trace(f, params, *batch)
        if mask is not None:
            watch.mask = _bools(mask(*batch))
            watch.padding = watch.mask.shape
        values: list[Any] = [_Weight(x, View(i)) for i, x in enumerate(traced.params)]
        _, found = watch.inside(traced, [*values, *traced.inputs])
        watch.mask = None  # it was of this trace
        return found

    merge = jax.jit(watch.merged)
    total: _Found | None = None
    for batch in batches:
        if not isinstance(batch, tuple | list):
            raise TypeError(
                "observe needs batches that are tuples of inputs, got one of type "
                f"{type(batch).__name__}. Write (x,) for a single input."
            )
        found = update(params, tuple(batch))
        total = found if total is None else merge(total, found)
    if total is None:
        raise ValueError(
            "observe needs at least one batch, got none. An iterator gives them once: "
            "make it anew, or pass a list."
        )
    return watch.results(total)


def _bools(mask: Any) -> jax.Array:
    mask = jnp.asarray(mask)
    if mask.dtype != bool or not mask.ndim:
        raise TypeError(
            "observe needs a mask of bools, one for each position, got "
            f"{_check.describe(mask)}. Compare it with 0."
        )
    return mask


class _Weight(NamedTuple):
    """An array that is a parameter, moved."""

    value: Any
    view: View
    scans: tuple[bool, ...] = ()  # of each loop around it: does it slice the weight?


class _Key(NamedTuple):
    """What a state is about. Weights that share an input share its state."""

    side: int  # 0 for inputs, 1 for outputs
    lead: tuple[int, ...]  # lengths of the leading axes of the state
    scans: tuple[bool, ...]  # of each loop around it: has every turn its own?
    leaves: tuple[int, ...] = ()


_Found = dict[_Key, dict[str, Any]]


class _Site(NamedTuple):
    """An activation at a weight."""

    held: Any  # so that no other gets its id
    key: _Key
    leaves: set[int]
    masked: bool
    states: dict[str, Any]


class _Watch:
    """A walk that collects statistics."""

    def __init__(self, paths: list[str], shapes: dict[int, Any], asked: Any):
        self.paths, self.shapes, self.asked = paths, shapes, asked
        self.mask: jax.Array | None = None
        self.padding: tuple[int, ...] = ()  # the shape of the mask
        self.layouts: dict[int, Operand] = {}
        self.reasons: dict[int, str] = {}
        self.unmasked: set[int] = set()

    def inside(self, function: Any, values: list[Any]) -> tuple[list[Any], _Found]:
        """The results of a function as plain arrays, and what was found in it."""
        sites: dict[Any, _Site] = {}
        found: list[_Found] = []

        def visit(eqn: Any, values: list[Any]) -> Sequence[Any]:
            if not any(isinstance(v, _Weight) for v in values):
                return bind(eqn, values)
            if inner := called(eqn):
                return walk(*inner, values, visit)
            name = eqn.primitive.name
            if name == "scan":
                return self.scan(eqn, values, found)
            plain = bind(eqn, list(map(_plain, values)))
            if name in PRODUCTS:
                self.meet(sites, eqn, values, plain[0])
            elif multiplies(eqn):
                self.refuse(values, f"it enters a {name!r}, which is not looked into")
            if not is_move(eqn):
                return plain
            views = moved(eqn, values[0].view)
            pairs = zip(plain, views, strict=True)
            return [values[0]._replace(value=x, view=view) for x, view in pairs]

        outs = list(map(_plain, walk(*closed(function), values, visit)))
        for site in sites.values():
            key = site.key._replace(leaves=tuple(sorted(site.leaves)))
            found.append({key: site.states})
        return outs, reduce(self.merged, found, {})

    def merged(self, a: _Found, b: _Found) -> _Found:
        def both(key: _Key) -> dict[str, Any]:
            asked, x, y = self.asked[key.side], a[key], b[key]
            return {k: _mapped(asked[k].merge, key.lead)(x[k], y[k]) for k in asked}

        return a | b | {key: both(key) for key in a if key in b}

    def refuse(self, values: Sequence[Any], reason: str) -> None:
        for v in values:
            if isinstance(v, _Weight):
                self.reasons.setdefault(v.view.leaf, reason)

    def meet(self, sites: Any, eqn: Any, values: list[Any], result: Any) -> None:
        """A product: what a weight takes and gives in it joins the sites."""
        place = int(isinstance(values[1], _Weight))
        weight, x = values[place], values[1 - place]
        leaf = weight.view.leaf
        if isinstance(x, _Weight) or leaf not in self.shapes:
            return
        reason = layout = layout_of(eqn, place, weight.view, self.shapes[leaf])
        if not isinstance(layout, str):
            mine, (*orders, units) = layout
            known = self.layouts.setdefault(leaf, mine)._replace(units=mine.units)
            reason = "" if known == mine else "not all its uses contract the same axes"
            if units is None and self.asked[1]:
                reason = "only a part of its outputs is in one product"
        if reason:
            self.refuse([weight], reason)
            return
        # Products that differ in nothing else take the same of an activation.
        window = [self.shapes[leaf][axis] for axis in mine.window]
        same = (place, str(eqn.params), *window, *(order.tobytes() for order in orders))
        lead = len(mine.stacked) - len(weight.view.layers)
        takes = (x, inputs_of, orders, lead + (mine.groups > 1))
        gives = (result, outputs_of, [units, units], lead)
        for side, (held, rows_of, orders, lead) in enumerate((takes, gives)):
            at = (side, weight.scans, id(held), *same)
            kinds = {s.joint for s in self.asked[side].values()}
            if kinds and at not in sites:
                arrays = {kind: rows_of(eqn, place, held, kind) for kind in kinds}
                given = {k: self.rows(x, orders[k], lead) for k, x in arrays.items()}
                sites[at] = self.site(side, lead, weight, held, given)
            if kinds:
                sites[at].leaves.add(leaf)
                self.unmasked |= set() if sites[at].masked else {leaf}

    def site(self, side: int, lead: int, w: _Weight, held: Any, given: Any) -> _Site:
        """What is known of an activation that meets its first weight."""
        states = {}
        for name, statistic in self.asked[side].items():
            x, rows, _ = given[statistic.joint]
            of = _mapped(lambda x, rows=rows, s=statistic: s.of(x, rows), range(lead))
            try:
                states[name] = of(x)
            except Exception as error:
                path = self.paths[w.view.leaf]
                error.add_note(f"This is {name!r} at the weight {path!r}.")
                raise
        key = _Key(side, x.shape[:lead], w.scans)
        return _Site(held, key, set(), all(fits for *_, fits in given.values()), states)

    def rows(self, x: jax.Array, order: np.ndarray, lead: int) -> tuple[Any, Any, bool]:
        """An activation as a parameter has it, its rows' weights, whether masked."""
        x = x if np.all(np.diff(order) > 0) else x[..., order]
        rows, mask = x.shape[lead:-1], self.mask
        if mask is not None and mask.size == rows[0] != mask.shape[0]:
            mask = mask.reshape(-1)
        if mask is None or rows[: mask.ndim] != mask.shape:
            return x, jnp.ones(rows, jnp.float32), False
        mask = jnp.expand_dims(mask, range(mask.ndim, len(rows)))
        mask = jnp.broadcast_to(mask, rows)
        kept = jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))  # it may be NaN
        return kept, mask.astype(jnp.float32), True

    def scan(self, eqn: Any, values: list[Any], outer: list[_Found]) -> list[Any]:
        params, length = eqn.params, eqn.params["length"]
        fixed, carried = scan_split(params)
        split = fixed + carried
        self.refuse(values[fixed:split], "a scan carries it")
        consts = [_inside(v) for v in values[:fixed]]

        def turn(carry: list[Any], rows: list[Any]) -> tuple[Any, Any, _Found]:
            pairs = zip(values[split:], rows, strict=True)
            slices = [_inside(v, x, length) for v, x in pairs]
            outs, found = self.inside(params["jaxpr"], [*consts, *carry, *slices])
            return outs[:carried], outs[carried:], found

        def step(state: Any, rows: list[Any]) -> Any:
            carry, outs, found = turn(state[0], rows)
            own = {key: found.pop(key) for key in list(found) if key.scans[-1]}
            return (carry, self.merged(state[1], found)), (outs, own)

        plain = list(map(_plain, values))
        first = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in plain[split:]]
        _, _, found = jax.eval_shape(turn, plain[fixed:split], first)
        shared = {key: found[key] for key in found if not key.scans[-1]}
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shared)
        settings = {k: params[k] for k in ("length", "reverse", "unroll")}
        state = plain[fixed:split], empty
        state, (outs, own) = jax.lax.scan(step, state, plain[split:], **settings)
        for key, states in (state[1] | own).items():
            lead = (length, *key.lead) if key.scans[-1] else key.lead
            outer.append({key._replace(lead=lead, scans=key.scans[:-1]): states})
        return [*state[0], *outs]

    def results(self, total: _Found) -> dict[str, Observed]:
        for leaf in self.shapes.keys() - self.layouts.keys():
            self.reasons.setdefault(leaf, "it meets no activation")
        parts = {
            (side, leaf): tuple(k for k in total if k.side == side and leaf in k.leaves)
            for leaf in self.shapes.keys() - self.reasons.keys()
            for side in (0, 1)
        }

        @jax.jit
        def finished(total: _Found) -> dict[tuple[_Key, ...], dict[str, Any]]:
            out: dict[tuple[_Key, ...], dict[str, Any]] = {(): {}}
            for keys in {*parts.values()} - {()}:
                same = ({keys[0]: total[key]} for key in keys)
                ((key, state),) = reduce(self.merged, same).items()
                asked = self.asked[key.side].items()
                out[keys] = {k: _mapped(s.finish, key.lead)(state[k]) for k, s in asked}
            return out

        values = finished(total)  # shared as states are

        def value(side: int, leaf: int, axes: tuple[int, ...]) -> dict[str, Any]:
            keys = parts.get((side, leaf), ())
            lead, lengths = keys and keys[0].lead, [self.shapes[leaf][a] for a in axes]

            def shaped(x: jax.Array) -> jax.Array:
                return x.reshape(*lead, *lengths, *x.shape[len(lead) + 1 :])

            asked, found = self.asked[side], values[keys]
            alone = {name: x for name, x in found.items() if not asked[name].joint}
            return found | jax.tree.map(shaped, alone)

        rows = {}
        for leaf in self.shapes:
            mine = self.layouts.get(leaf, Operand(()))
            reason = self.reasons.get(leaf, "")
            inputs, outputs = value(0, leaf, mine.axes), value(1, leaf, mine.units)
            masked = not reason and self.padding != () and leaf not in self.unmasked
            rows[self.paths[leaf]] = Observed(inputs, outputs, *mine, masked, reason)
        if all(row.reason for row in rows.values()):
            path, row = next(iter(rows.items()))
            raise ValueError(
                f"observe needs a weight that it can observe, but of the {len(rows)} "
                f"selected there is none: {path!r}, for one, since {row.reason}."
            )
        if self.padding and not any(row.masked for row in rows.values()):
            raise ValueError(
                "observe needs a mask over the leading axes of inputs of weights, got "
                f"bool{list(self.padding)}, which fits none of them."
            )
        return rows


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, _Weight) else value


def _inside(value: Any, row: Any = None, length: int | None = None) -> Any:
    """A value in a turn of a scan, of which it is a row if there is a length."""
    if not isinstance(value, _Weight):
        return value if length is None else row
    if length is None:
        return value._replace(scans=(*value.scans, False))
    return _Weight(row, value.view.sliced(length), (*value.scans, True))


def _mapped(fn: Callable[..., Any], lead: Iterable[Any]) -> Callable[..., Any]:
    """``fn`` over as many leading axes."""
    return reduce(lambda fn, _: jax.vmap(fn), lead, fn)
