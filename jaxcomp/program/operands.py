"""Where a weight lies in a product: what of it is contracted, and with what."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.program.views import STAYS, View, index_map


class Operand(NamedTuple):
    """What the axes of a weight, or of its parameter, are to a product."""

    axes: tuple[int, ...]  # contracted; of a convolution the features
    window: tuple[int, ...] = ()
    units: tuple[int, ...] = ()
    stacked: tuple[int, ...] = ()
    groups: int = 1


def _operand(eqn: Any, place: int) -> Operand | None:
    """None if it is neither a dot nor a convolution of which this is the kernel."""
    params, name = eqn.params, eqn.primitive.name
    if name == "dot_general":
        contracted, batch = (sides[place] for sides in params["dimension_numbers"])
        rest = set(range(eqn.invars[place].aval.ndim)) - {*contracted, *batch}
        return Operand(tuple(sorted(contracted)), (), tuple(sorted(rest)), tuple(batch))
    if name != "conv_general_dilated" or place == 0 or params["batch_group_count"] > 1:
        return None
    unit, features, *window = params["dimension_numbers"].rhs_spec
    groups = params["feature_group_count"]
    return Operand((features,), tuple(sorted(window)), (unit,), (), groups)


def inputs_of(eqn: Any, place: int, x: jax.Array, joint: bool) -> jax.Array:
    """What meets a weight: float[*stacked, groups if any, *rows, channels].

    The channels go in C order of the axes of the weight. The joint ones of a
    convolution are all that one output sees.
    """
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        contracted, batch = numbers
        pairs = sorted(zip(contracted[place], contracted[1 - place], strict=True))
        return _by_channels(x, batch[1 - place], [axis for _, axis in pairs])
    batch, features, *space = numbers.lhs_spec
    x = jnp.transpose(x, (batch, *space, features))
    x = _patches(eqn, x) if joint else x
    groups = eqn.params["feature_group_count"]
    x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    _, channel, *window = numbers.rhs_spec
    axes = {channel: x.ndim - 1}
    if joint:
        axes |= {axis: 1 + len(space) + i for i, axis in enumerate(window)}
    x = _by_channels(x, [x.ndim - 2], [axes[axis] for axis in sorted(axes)])
    return x if groups > 1 else x[0]


def outputs_of(eqn: Any, place: int, y: jax.Array, joint: bool) -> jax.Array:
    """What a weight gives: float[*stacked, *rows, units], ``joint`` or not."""
    if eqn.primitive.name == "dot_general":
        contracted, batch = (len(sides[0]) for sides in eqn.params["dimension_numbers"])
        units = eqn.invars[place].aval.ndim - contracted - batch
        start = y.ndim - units if place else batch
        return _by_channels(y, range(batch), range(start, start + units))
    batch, features, *space = eqn.params["dimension_numbers"].out_spec
    return jnp.transpose(y, (batch, *space, features))


def _by_channels(x: jax.Array, first: Sequence[int], last: Sequence[int]) -> jax.Array:
    """Some axes first, the others as rows, at least one; the last as channels."""
    rows = [axis for axis in range(x.ndim) if axis not in (*first, *last)]
    x = jnp.transpose(x, (*first, *rows, *last))
    split = len(first) + len(rows)
    one = () if rows else (1,)
    return x.reshape(*x.shape[:split], *one, math.prod(x.shape[split:]))


def _patches(eqn: Any, x: jax.Array) -> jax.Array:
    """[batch, *space, features] -> [batch, *space of the output, *window, features]."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    around = zip(params["padding"], params["lhs_dilation"], strict=True)
    inner = [(*ends, dilation - 1) for ends, dilation in around]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *inner, (0, 0, 0)])
    for i, axis in enumerate(numbers.rhs_spec[2:]):
        step, apart = params["window_strides"][i], params["rhs_dilation"][i]
        reach = (eqn.outvars[0].aval.shape[numbers.out_spec[2 + i]] - 1) * step + 1
        starts = range(0, eqn.invars[1].aval.shape[axis] * apart, apart)
        pieces = [jax.lax.slice_in_dim(x, s, s + reach, step, 1 + i) for s in starts]
        x = jnp.stack(pieces, axis=-2)
    return x


def layout_of(eqn: Any, place: int, view: View, shape: tuple[int, ...]) -> Any:
    """What the axes of a parameter are to a product, whose operand is a view of it.

    Returns:
      (`Operand`, orders), or why there are none. An order says where the product has
      the entries of the parameter: the channels, the joint ones, the units; None for
      units of which it has only some.
    """
    seen = _operand(eqn, place)
    if seen is None:
        return f"it enters a {eqn.primitive.name!r}, which is not looked into"
    if 0 in shape:
        return "it has no elements"
    loops = len(view.layers)
    parts = [[loops + axis for axis in part] for part in seen[:3]]
    parts += [[axis] for axis in (*range(loops), *(loops + a for a in seen.stacked))]
    owned, places = parts, None
    single: list[int] = []
    if any(eqn and eqn.primitive.name not in STAYS for eqn, _ in view.chain):
        places, owned = index_map(view, shape), [[] for _ in parts]
        for axis, length in enumerate(shape):
            at = places // math.prod(shape[axis + 1 :]) % length
            moves = [np.any(np.diff(at, axis=a)) for a in range(at.ndim)]
            where = [i for i, part in enumerate(parts) if any(moves[a] for a in part)]
            if len(where) > 1:
                return f"its axis {axis} is mixed with others before it is multiplied"
            (owned[where[0]] if where else single if length == 1 else []).append(axis)
        # An axis of one entry does not move: it goes where one is missing.
        for i in (*range(3, len(parts)), 0, 2, 1):
            owned[i] += single[:1] if parts[i] and not owned[i] else []
            single = [axis for axis in single if axis not in owned[i]]

    def order(part: list[int], axes: list[int]) -> Any:
        size = math.prod(shape[axis] for axis in axes)
        if places is None:
            return np.arange(size)
        corner = tuple(slice(None) if a in part else 0 for a in range(places.ndim))
        found, at = np.unravel_index(places[corner].ravel(), shape), np.zeros(1, int)
        for axis in axes:
            at = at * shape[axis] + found[axis]
        return np.argsort(at) if np.array_equal(np.sort(at), np.arange(size)) else None

    joint = sorted(parts[0] + parts[1]), sorted(owned[0] + owned[1])
    pairs = ((parts[0], owned[0]), joint, *zip(parts[2:], owned[2:], strict=True))
    first, both, units, *turns = (order(*pair) for pair in pairs)
    if both is None:
        return f"only a part of its axes {tuple(joint[1])} meets an input"
    if any(turn is None or np.any(np.diff(turn) < 0) for turn in turns):
        return "it is stacked along what is not one of its axes"
    axes, window, made, *stacked = map(tuple, owned)
    whole = math.prod(shape[a] for part in owned for a in part) == math.prod(shape)
    found = Operand(axes, window, made, sum(stacked, ()), seen.groups)
    return found, (first, both, units if whole else None)
