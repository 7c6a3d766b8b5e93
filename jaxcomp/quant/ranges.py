"""How much of a group's values a grid spans: all, a percentile, what has least error.

A `Range` is a function, asked for the ratio of the widest range that a grid shall take:
what is beyond is clipped, and what is left is rounded more finely.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp._extremes import divided


Rounded = Callable[[jax.Array], jax.Array]

# (groups, rounded) -> ratio: float[channels, groups, group] in the arithmetic dtype,
# and what gives their dense values on the grid of a ratio, to ratios in (0, 1].
Range = Callable[[jax.Array, Rounded], jax.Array]

_RATIOS = 100


def largest(groups: jax.Array, rounded: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The widest: the largest magnitude of each group is on the grid.

    >>> largest(jnp.ones((2, 3, 4)), lambda ratio: ratio).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    del rounded
    return jnp.ones(groups.shape[:2], groups.dtype)


@functools.cache  # one function for one number: jit compiles for each function
def percentile(q: float) -> Range:
    """A range that reaches a percentile of the magnitudes of a group.

    By nearest rank, found by counting and without a sort. Exact zeros have no say, so
    that a pruned array keeps its range.

    Args:
      q: percent, above 0 and at most 100, e.g. 99.9.

    Raises:
      ValueError: ``q`` is out of range.

    >>> import jaxcomp as jc
    >>> x = jnp.array([1.0, 2.0, 3.0, 40.0])
    >>> jc.quantize(x, bits=3, axis=None, reach=percentile(75)).dense()
    Array([1., 2., 3., 3.], dtype=float32)
    """
    if not 0 < q <= 100:
        raise ValueError(f"percentile needs 0 < q <= 100, in percent, got {q}.")

    def reach(groups: jax.Array, rounded: Callable) -> jax.Array:
        del rounded
        size = jnp.abs(groups.astype(jnp.float32))
        bits = jax.lax.bitcast_convert_type(size, jnp.int32)  # in the order of sizes
        live = jnp.sum(bits > 0, axis=-1, dtype=jnp.int32)
        rank = jnp.ceil(live.astype(jnp.float32) * (q / 100)).astype(jnp.int32)

        def bit(i: jax.Array, low: jax.Array) -> jax.Array:
            trial = low | (jnp.int32(1 << 30) >> i)
            below = (bits > 0) & (bits < trial[..., None])
            fewer = jnp.sum(below, axis=-1, dtype=jnp.int32) < rank
            return jnp.where(fewer, trial, low)

        none = jnp.zeros(groups.shape[:2], jnp.int32)
        found = jax.lax.fori_loop(0, 31, bit, none)
        found = jax.lax.bitcast_convert_type(found, jnp.float32)
        most = jnp.max(size, axis=-1, initial=0)
        tiny = float(jnp.finfo(jnp.float32).tiny)
        fits = (most >= tiny) & (found >= tiny)
        ratio = jnp.where(fits, found, 1) / jnp.where(fits, most, 1)
        return jnp.where(fits, jnp.clip(ratio, tiny, 1), 1).astype(groups.dtype)

    return reach


@functools.cache
def least_error(power: float = 2.0) -> Range:
    """A range that has the least error: the sum of ``|x - rounded| ** power``.

    The search of Frantar et al., "GPTQ", arXiv:2210.17323, in the authors' code, which
    takes a power of 2.4 and ratios of 1 down to 0.2 in steps of 0.01; here down to
    0.01, for grids of few levels.

    Args:
      power: of the errors; 2 is least squares, above it large errors count more.

    Raises:
      ValueError: ``power`` is not positive.

    >>> import jaxcomp as jc
    >>> x = jnp.array([1.0, 1.0, 1.0, 1.0, 8.0])
    >>> node = jc.quantize(x, bits=2, axis=None, reach=least_error(0.5))
    >>> node.dense().round(1).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    known = _check.number("least_error", "power", power)
    if known is None or not known > 0:
        raise ValueError(f"least_error needs a power above 0, got {power}.")

    def reach(groups: jax.Array, rounded: Callable) -> jax.Array:
        most = jnp.max(jnp.abs(groups), axis=-1, initial=0)

        def tried(i: jax.Array, best: tuple) -> tuple[jax.Array, jax.Array]:
            ratio = jnp.ones_like(most) * ((_RATIOS - i) / _RATIOS).astype(most.dtype)
            # As shares of the largest, so that no power overflows.
            off = divided(jnp.abs(groups - rounded(ratio)), most[..., None])
            error = jnp.sum(off**known, axis=-1)
            better = error < best[0]
            return jnp.where(better, error, best[0]), jnp.where(better, ratio, best[1])

        start = jnp.full_like(most, jnp.inf), jnp.ones_like(most)
        return jax.lax.fori_loop(0, _RATIOS, tried, start)[1]

    return reach
