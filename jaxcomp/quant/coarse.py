"""The coarsest grids: one magnitude for each group of weights, and zero.

Both are `QTensor`: codes of 2 bits that stand for -1, 0 and 1 times the scale. The file
codes them by how often they occur, so the two codes of a binary leaf take 1 bit each.
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
    packed,
    rounded,
    scale_for,
    symmetric_zero,
    to_groups,
)


BITS = 2


def quantize_ternary(
    x: jax.Array,
    *,
    axis: Axis = None,
    group: int | None = None,
    threshold: float | None = None,
) -> QTensor:
    """Rounds ``x`` to -1, 0 and 1 times the mean magnitude of its weights.

    Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits",
    arXiv:2402.17764: ``round(x / mean(|x|))``, clipped to -1 and 1. Departs from the
    paper where ``x`` has exact zeros: they have no say in the mean, so that a pruned
    array keeps its scale. With a ``threshold`` the scale is the mean magnitude of the
    weights above it, the least squared error for their choice; 0.7 is that of Li, Zhang
    and Liu, "Ternary Weight Networks", arXiv:1605.04711. For the least squared error of
    all take `quantize_searched` with ``bits=2``.

    Args:
      x: float[*shape].
      axis: the axis, or axes, that keep a scale per index; None, as in the paper,
        shares one.
      group: entries that share a scale, in C order over all axes but ``axis``; None
        takes them all. The last group may be shorter.
      threshold: weights above so many times the mean magnitude are not 0; not negative.
        None takes those from half the mean on, and the mean for a scale, as BitNet.

    Returns:
      A `QTensor` of 2 bits.

    Raises:
      ValueError: ``axis``, ``group`` or ``threshold`` is out of range.
      TypeError: ``x`` is not floating point.

    >>> quantize_ternary(jnp.array([0.25, -1.5, 2.0, 0.25])).dense()
    Array([ 0., -1.,  1.,  0.], dtype=float32)
    """
    settings = checked_settings("quantize_ternary", x, BITS, axis, group)
    if threshold is None:
        return _ternary(*settings)
    known = _check.number("quantize_ternary", "threshold", threshold)
    if known is not None and not 0 <= known < jnp.inf:
        raise ValueError(
            "quantize_ternary needs a finite threshold of at least 0, in mean "
            f"magnitudes, got {threshold}."
        )
    return _above(*settings, threshold)


def quantize_binary(
    x: jax.Array, *, axis: Axis = None, group: int | None = None
) -> QTensor:
    """Replaces every weight by its sign times the mean magnitude of the weights.

    Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional
    Neural Networks", arXiv:1603.05279, equation 6: the least squared error with two
    values. Departs from the paper where ``x`` has exact zeros: they stay 0 and have no
    say in the mean, so that a pruned array stays pruned. The paper has a scale for
    every filter, ``axis=-1`` for a Flax kernel.

    Args:
      x: float[*shape].
      axis: the axis, or axes, that keep a scale per index; None shares one.
      group: entries that share a scale, in C order over all axes but ``axis``; None
        takes them all. The last group may be shorter.

    Returns:
      A `QTensor` of 2 bits, whose code 0 only exact zeros have. It is a grid like any
      other: new values written into it (`QTensor.encode`) may round to 0.

    Raises:
      ValueError: ``axis`` or ``group`` is out of range.
      TypeError: ``x`` is not floating point.

    >>> quantize_binary(jnp.array([0.5, -1.5, 1.0, 0.0])).dense()
    Array([ 1., -1.,  1.,  0.], dtype=float32)
    """
    return _binary(*checked_settings("quantize_binary", x, BITS, axis, group))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _ternary(x: jax.Array, bits: int, axis: tuple[int, ...], group: int) -> QTensor:
    groups = to_groups(x, axis, group)
    scale = _mean_magnitude(groups)
    codes = packed(rounded(groups, scale, symmetric_zero(bits), bits), bits)
    return QTensor(codes, scale, None, bits, x.shape, axis, group)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _above(
    x: jax.Array, bits: int, axis: tuple[int, ...], group: int, threshold: jax.Array
) -> QTensor:
    groups = to_groups(x, axis, group)
    wide = groups.astype(_check.wide(x.dtype))
    mean = _mean_magnitude(groups).astype(wide.dtype)[..., None]
    unit = unit_near(mean)  # so that no product overflows
    taken = jnp.abs(wide) * unit > jnp.asarray(threshold, wide.dtype) * (mean * unit)
    signs = jnp.where(taken, jnp.sign(wide), 0).astype(jnp.int32)
    scale = _mean_magnitude(jnp.where(taken, groups, jnp.zeros((), groups.dtype)))
    codes = packed((signs + symmetric_zero(bits)).astype(jnp.uint16), bits)
    return QTensor(codes, scale, None, bits, x.shape, axis, group)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _binary(x: jax.Array, bits: int, axis: tuple[int, ...], group: int) -> QTensor:
    groups = to_groups(x, axis, group)
    signs = jnp.sign(groups).astype(jnp.int32) + symmetric_zero(bits)
    codes = packed(signs.astype(jnp.uint16), bits)
    return QTensor(codes, _mean_magnitude(groups), None, bits, x.shape, axis, group)


def _mean_magnitude(groups: jax.Array) -> jax.Array:
    """float[channels, groups]: of the entries that are not 0; the padding is."""
    size = jnp.abs(groups.astype(_check.wide(groups.dtype)))
    unit = unit_near(jnp.max(size, axis=-1, initial=0))  # so that no sum overflows
    total = jnp.sum(size * unit[..., None], axis=-1)
    count = jnp.maximum(jnp.sum(groups != 0, axis=-1, dtype=jnp.int32), 1)
    return scale_for(total / count.astype(total.dtype) / unit, 1, groups.dtype)
