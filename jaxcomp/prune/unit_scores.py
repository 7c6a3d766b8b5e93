"""How much a whole unit is worth: one score for all weights of a slice along an axis.

The axis holds the units; the last one of a Flax kernel is its output. Every weight of a
unit has the score of the unit, so that `in_units` with the same axis removes it whole.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp._extremes import unit_near
from jaxcomp.prune.patterns import axis_of
from jaxcomp.prune.scores import Score
from jaxcomp.tree import map_where


MOST_BINS = 1024  # a table of units times bins must be counted in 32 bits


def random_units(key: jax.Array, axis: int = -1) -> Score:
    """A score that draws every unit's worth at random, apart from its weights.

    The baseline that every other score of units has to beat.

    Args:
      key: a JAX random key; each leaf gets a key of its own.
      axis: the axis that holds the units.

    Returns:
      A `Score`: tree of float[*shape] -> tree of float32[*shape], uniform in [0, 1),
      the same for all weights of a unit.

    Raises:
      ValueError: the score, if a leaf does not have the axis, or holds a NaN or an
        infinity.

    >>> random_units(jax.random.key(0))(jnp.zeros((2, 3)))[:, 0].std()
    Array(0., dtype=float32)
    """

    def score(params: Any) -> Any:
        keys = iter(jax.random.split(key, len(jax.tree.leaves(params))))

        def draw(x: jax.Array, axis: int) -> jax.Array:
            lengths = [1] * x.ndim
            lengths[axis] = x.shape[axis]
            return jax.random.uniform(next(keys), lengths, jnp.float32)

        return _by_unit("random_units", draw, axis)(params)

    return score


def unit_entropy(bins: int = 32, axis: int = -1) -> Score:
    """The entropy of a histogram of the unit's weights, in nats.

    Luo and Wu, "An Entropy-based Pruning Method for CNN Compression", arXiv:1706.05791,
    who take the entropy of a unit's activations over images, and remove units of the
    lowest. Here it is that of its weights, and needs no data.

    The bins are equally wide, between the least and the greatest weight of the unit, so
    that the score of ``a * w + b`` is that of ``w`` for ``a > 0``: exactly where that
    rounds nothing, else but for weights that rounding takes over the edge of a bin.

    Args:
      bins: bins of the histogram, 2 to 1024.
      axis: the axis that holds the units.

    Returns:
      A `Score`: tree of float[*shape] -> tree of float32[*shape], from 0 to
      ``log(bins)``. A unit of equal weights scores 0.

    Raises:
      ValueError: ``bins`` is out of range. The score raises if a leaf does not have the
        axis, or holds a NaN or an infinity.

    >>> unit_entropy(bins=4)(jnp.array([[0.0, 5.0], [0.1, 5.0], [1.0, 5.0]]))[0]
    Array([0.6365142, 0.       ], dtype=float32)
    """
    _check.integer_within("unit_entropy", "bins", bins, 2, MOST_BINS)
    return _by_unit("unit_entropy", partial(_entropy, bins=bins), axis)


def unit_density(axis: int = -1) -> Score:
    """The fraction of a unit's weights that are not 0.

    With `masks_above` and a threshold of ``1 - bound``, units with more than a fraction
    ``bound`` of zeros go whole.

    Args:
      axis: the axis that holds the units.

    Returns:
      A `Score`: tree of float[*shape] -> tree of float32[*shape], in [0, 1]; 0 for a
      unit without weights.

    Raises:
      ValueError: the score, if a leaf does not have the axis, or holds a NaN or an
        infinity.

    >>> unit_density()(jnp.array([[0.0, 2.0], [1.0, 3.0]]))
    Array([[0.5, 1. ],
           [0.5, 1. ]], dtype=float32)
    """
    return _by_unit("unit_density", _density, axis)


def _by_unit(
    caller: str, fn: Callable[[jax.Array, int], jax.Array], axis: int
) -> Score:
    """A score of what ``fn`` finds for the units of a leaf, along an axis from 0 on."""

    def of_leaf(x: jax.Array) -> jax.Array:
        found = fn(x, axis_of(caller, x, axis))
        return jnp.broadcast_to(found, x.shape)

    def score(params: Any) -> Any:
        return map_where(of_leaf, params, lambda *_: True, caller=caller)

    return score


@partial(jax.jit, static_argnames=("axis", "bins"))
def _entropy(x: jax.Array, axis: int, bins: int) -> jax.Array:
    """float32[..., 1, d, 1, ...]"""
    others = tuple(a for a in range(x.ndim) if a != axis)
    most = partial(jnp.max, axis=others, keepdims=True, initial=-jnp.inf)
    x = x.astype(_check.wide(x.dtype))
    x *= unit_near(most(jnp.abs(x)))  # a span may be flushed to 0, or overflow
    least = -most(-x)
    span = most(x) - least
    place = (x - least) * bins / jnp.where(span > 0, span, 1)
    place = jnp.minimum(place.astype(jnp.int32), bins - 1)
    place += bins * jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    units = x.shape[axis]
    counts = jnp.zeros(units * bins, jnp.int32).at[place.reshape(-1)].add(1)
    part = counts.reshape(units, bins) / max(x.size // max(units, 1), 1)
    found = jnp.sum(jax.scipy.special.entr(part), axis=1, dtype=jnp.float32)
    return found.reshape(span.shape)


@partial(jax.jit, static_argnames="axis")
def _density(x: jax.Array, axis: int) -> jax.Array:
    """float32[..., 1, d, 1, ...]"""
    others = tuple(a for a in range(x.ndim) if a != axis)
    some, none = (
        jnp.sum(found, axis=others, keepdims=True, dtype=jnp.int32)
        for found in (x != 0, x == 0)
    )
    # Counted, as XLA would multiply by the reciprocal of a known number of entries, and
    # 7/10 be less than 0.7.
    entries = jnp.maximum(some + none, 1)
    return some.astype(jnp.float32) / entries.astype(jnp.float32)
