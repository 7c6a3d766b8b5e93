"""Symmetric grids whose scales are searched for the least squared error.

The largest magnitude of a group is often far from the rest, and a grid that reaches it
is too coarse for all the others. A shorter grid clips it and is finer.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp._extremes import unit_near
from jaxcomp.quant.grid import (
    Axis,
    QTensor,
    checked_settings,
    in_steps,
    packed,
    rounded,
    scale_for,
    symmetric_zero,
    to_groups,
)


# Ratios to the scale of the largest magnitude: 1/48 to 96/48, that is 2% to 200%. Those
# above 1 leave high codes unused, which only helps groups of a few entries.
_RATIOS = 96
_WHOLE = 48
_REFINEMENTS = 2
_AT_ONCE = 2**16  # weights: 256 KB stay in the cache over all the ratios


def quantize_searched(
    x: jax.Array, bits: int = 4, *, axis: Axis = -1, group: int | None = None
) -> QTensor:
    """Rounds ``x`` to a symmetric grid whose scales have the least squared error.

    Choukroun, Kravchik, Yang and Kisilev, "Low-bit Quantization of Neural Networks for
    Efficient Inference", arXiv:1902.06822, for each group of weights. Departs from the
    paper in the search: 96 scales, from almost 0 to twice that of `quantize`, each
    moved to the least-squares scale ``sum(x * c) / sum(c * c)`` of its codes ``c``; the
    best is rounded with and moved again, twice.

    Args:
      x: float[*shape].
      bits: width of a code, 2 to 8 bits.
      axis: the axis, or axes, that keep a scale per index; None shares one.
      group: entries that share a scale, in C order over all axes but ``axis``; None
        takes them all.

    Returns:
      A `QTensor` like that of `quantize` with other scales. The squared error of a
      group is at most that of `quantize`, up to rounding; values beyond the grid are
      clipped, and zeros stay exactly zero.

    Raises:
      ValueError: ``bits``, ``axis`` or ``group`` is out of range.
      TypeError: ``x`` is not floating point.

    >>> quantize_searched(jnp.array([1.0, 1.0, -1.0, 2.0]), bits=2, axis=None).dense()
    Array([ 1.25,  1.25, -1.25,  1.25], dtype=float32)
    """
    return _searched(*checked_settings("quantize_searched", x, bits, axis, group))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _searched(x: jax.Array, bits: int, axis: tuple[int, ...], group: int) -> QTensor:
    groups = to_groups(x, axis, group)
    middle = symmetric_zero(bits)
    scale = jax.lax.map(
        partial(_best_scale, top=middle),
        groups.reshape(groups.shape[0] * groups.shape[1], group),
        batch_size=max(1, _AT_ONCE // group),
    ).reshape(groups.shape[:2])
    codes = packed(rounded(groups, scale, middle, bits), bits)
    return QTensor(codes, scale, None, bits, x.shape, axis, group)


def _best_scale(x: jax.Array, top: int) -> jax.Array:
    """float[]: the scale of one group, float[group], of codes ``-top`` to ``top``."""
    wide = _check.wide(x.dtype)
    values = x.astype(wide)
    widest = scale_for(jnp.max(jnp.abs(values)), top, x.dtype)  # that of `quantize`
    unit = unit_near(widest.astype(wide))
    divisor = widest.astype(wide) * unit

    def as_ratio(y: jax.Array) -> jax.Array:
        """``y / widest``: near 1, so that its square neither overflows nor is lost."""
        return y * unit / divisor

    def error(scale: jax.Array) -> jax.Array:
        """Of what `QTensor.dense` gives, with its roundings."""
        codes = jnp.clip(in_steps(x, scale), -top, top)
        dense = jnp.clip(codes * scale.astype(wide), -most, most).astype(x.dtype)
        return jnp.sum(as_ratio(values - dense.astype(wide)) ** 2)

    least, most = 2 * float(jnp.finfo(x.dtype).tiny), float(jnp.finfo(x.dtype).max)
    ratio = _best_ratio(as_ratio(values), top)
    moved = jnp.clip(widest.astype(wide) * ratio, least, most).astype(x.dtype)
    return jnp.where(error(moved) < error(widest), moved, widest)


def _best_ratio(steps: jax.Array, top: int) -> jax.Array:
    """float[]: the best scale for values between ``-top`` and ``top``."""

    def improved(best: tuple, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = jnp.clip(jnp.round(steps / ratio), -top, top)
        power = jnp.maximum(jnp.sum(codes * codes), 1)  # 0 where all codes are
        moved = jnp.sum(steps * codes) / power
        error = jnp.sum((steps - codes * ratio) ** 2)
        error = error - (moved - ratio) ** 2 * power  # as it is at the moved scale
        better = (error < best[0]) & (moved > 0)
        return jnp.where(better, error, best[0]), jnp.where(better, moved, best[1])

    def tried(i: jax.Array, best: tuple) -> tuple[jax.Array, jax.Array]:
        return improved(best, (i + 1).astype(steps.dtype) / _WHOLE)

    start = (jnp.array(jnp.inf, steps.dtype), jnp.ones((), steps.dtype))
    best = jax.lax.fori_loop(0, _RATIOS, tried, start)
    for _ in range(_REFINEMENTS):
        best = improved(best, best[1])
    return best[1]
