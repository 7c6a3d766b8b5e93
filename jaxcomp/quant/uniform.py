"""Integer grids whose range follows the values, symmetric and affine."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp._extremes import unit_near
from jaxcomp.node import dense_of
from jaxcomp.quant.grid import (
    Axis,
    QTensor,
    checked_settings,
    in_steps,
    placed,
    rounded,
    scale_for,
    stored,
    symmetric_zero,
    to_groups,
    valued,
)
from jaxcomp.quant.ranges import Range, largest
from jaxcomp.tree import Where, is_matrix, map_where


Scales = Callable[[jax.Array], Any]


def quantize(
    x: jax.Array,
    bits: int = 8,
    *,
    axis: Axis = -1,
    group: int | None = None,
    top: float | None = None,
    reach: Range = largest,
    scales: Scales | None = None,
) -> QTensor:
    """Rounds ``x`` to the nearest of ``2**bits - 1`` levels, symmetric around 0.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", arXiv:1712.05877, with the zero point at 0 and
    ranges by the largest magnitude.

    Args:
      x: float[*shape].
      bits: width of a code, 2 to 8 bits.
      axis: the axis, or axes, that keep a scale per index; None shares one. For a Flax
        kernel (in, out), -1 is a scale per output unit.
      group: entries that share a scale, in C order over all axes but ``axis``; None
        takes them all. The last group may be shorter.
      top: the step that the largest magnitude comes to; None is ``2**(bits-1) - 1``,
        the last level. Up to ``2**(bits-1)``: the grid then has one more level below,
        and what is beyond its ends is clipped. qwix and torchao take
        ``2**(bits-1) - 0.5``.
      reach: how much of the largest magnitude the grid spans: `quant.largest`,
        ``quant.percentile(99.9)``, ``quant.least_error()``.
      scales: float[channels, groups] -> the node that stands for the scales, e.g.
        ``partial(quantize_affine, bits=8, axis=None, group=256)`` for double
        quantization (Dettmers et al., arXiv:2305.14314); None keeps them in the dtype
        of ``x``.

    Returns:
      A `QTensor` with ``|dense - x| <= scale / 2`` where the grid spans ``x``, up to
      rounding in ``x.dtype``. Exact zeros stay exactly zero.

    Raises:
      ValueError: ``bits``, ``axis``, ``group`` or ``top`` is out of range.
      TypeError: ``x`` is not floating point.

    >>> quantize(jnp.array([[0.0, 0.5, -1.0]]), bits=3, axis=None).dense() * 3
    Array([[ 0.,  2., -3.]], dtype=float32)
    """
    if bits == 1 and not isinstance(bits, bool):
        raise ValueError(
            "quantize needs 2 <= bits <= 8, got 1, which leaves no level but 0. Call "
            "quantize_binary, or quantize_affine, which has two."
        )
    x, bits, kept, group = checked_settings("quantize", x, bits, axis, group)
    middle = symmetric_zero(bits)
    top = middle if top is None else top
    known = _check.number("quantize", "top", top)
    if known is None or not middle <= known <= middle + 1:
        raise ValueError(
            f"quantize needs {middle} <= top <= {middle + 1} for {bits} bits, the step "
            f"of the largest magnitude, got {top}."
        )
    scale, zero = _symmetric(x, bits, kept, group, known, reach)
    return placed(x, stored(scale, scales), zero, bits, kept, group)


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _symmetric(
    x: jax.Array,
    bits: int,
    axis: tuple[int, ...],
    group: int,
    top: float,
    reach: Range,
) -> tuple[jax.Array, Any]:
    """The scales, and the zeros where the grid has a level more below."""
    groups = to_groups(x, axis, group).astype(_check.wide(x.dtype))
    widest = jnp.max(jnp.abs(groups), axis=-1, initial=0)
    zero: Any = (middle := symmetric_zero(bits))
    if top > middle:
        zero = jnp.full((*widest.shape, 1), middle + 1, jnp.int32)

    def scale_at(ratio: jax.Array) -> jax.Array:
        return scale_for(widest * ratio, top, x.dtype)

    def dense_at(ratio: jax.Array) -> jax.Array:
        scale = scale_at(ratio)
        codes = rounded(groups.astype(x.dtype), scale, zero, bits)
        return valued(codes, scale, zero).astype(groups.dtype)

    return scale_at(reach(groups, dense_at)), None if top == middle else zero


def quantize_affine(
    x: jax.Array,
    bits: int = 8,
    *,
    axis: Axis = -1,
    group: int | None = None,
    reach: Range = largest,
    scales: Scales | None = None,
) -> QTensor:
    """Rounds ``x`` to the nearest of ``2**bits`` levels between its extremes and 0.

    Jacob et al., arXiv:1712.05877, section 2.1: the zero point is an integer inside the
    range, so that 0 is on the grid and zeros stay exactly zero.

    Args:
      x: float[*shape].
      bits: width of a code, 1 to 8 bits.
      axis: the axis, or axes, that keep a scale per index; None shares one.
      group: entries that share a scale, in C order over all axes but ``axis``.
      reach: how much of the range the grid spans, both ends alike; see `quantize`.
      scales: float[channels, groups] -> the node that stands for the scales; see
        `quantize`.

    Returns:
      A `QTensor` with ``|dense - x| <= scale / 2`` where the grid spans ``x``, up to
      rounding in ``x.dtype``.

    Raises:
      ValueError: ``bits``, ``axis`` or ``group`` is out of range.
      TypeError: ``x`` is not floating point.

    >>> quantize_affine(jnp.array([[0.0, 1.0, 3.0]]), bits=2, axis=None).dense()
    Array([[0., 1., 3.]], dtype=float32)
    """
    checked = checked_settings("quantize_affine", x, bits, axis, group, least=1)
    x, bits, kept, group = checked
    scale, low = _affine(x, bits, kept, group, reach)
    held = stored(scale, scales)
    zero = zero_of(low, dense_of(held), bits)
    return placed(x, held, zero, bits, kept, group)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _affine(
    x: jax.Array, bits: int, axis: tuple[int, ...], group: int, reach: Range
) -> tuple[jax.Array, jax.Array]:
    """The scales, and the lower ends of the ranges."""
    groups = to_groups(x, axis, group).astype(_check.wide(x.dtype))
    least = jnp.min(groups, axis=-1, initial=0)
    most = jnp.max(groups, axis=-1, initial=0)

    def scale_at(ratio: jax.Array) -> jax.Array:
        low, high = least * ratio, most * ratio
        return spacing(low, high, bits, x.dtype)

    def dense_at(ratio: jax.Array) -> jax.Array:
        scale = scale_at(ratio)
        zero = zero_of(least * ratio, scale, bits)
        codes = rounded(groups.astype(x.dtype), scale, zero, bits)
        return valued(codes, scale, zero).astype(groups.dtype)

    ratio = reach(groups, dense_at)
    return scale_at(ratio), least * ratio


def spacing(low: jax.Array, high: jax.Array, bits: int, dtype: Any) -> jax.Array:
    """The step of an affine grid from ``low`` to ``high``, between which 0 is."""
    unit = unit_near(jnp.maximum(high, -low))  # high - low may overflow
    width = (high * unit - low * unit) / (2**bits - 1) / unit
    return scale_for(width, 1, dtype)


@partial(jax.jit, static_argnums=2)
def zero_of(low: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    """int32[channels, groups, 1]: the code of 0."""
    steps = in_steps(-low, scale)
    return jnp.clip(steps, 0, 2**bits - 1).astype(jnp.int32)[..., None]


def quantize_tree(
    params: Any,
    grid: Callable[..., QTensor] = quantize,
    *,
    where: Where = is_matrix,
    **settings: Any,
) -> Any:
    """Turns the selected leaves of ``params`` into `QTensor`.

    Args:
      params: any pytree. Leaves that are compressed already are left as they are.
      grid: `quantize`, `quantize_affine`, `quantize_step`, or any function from
        float[*shape] to a node.
      where: (path, leaf) -> bool.
      **settings: what ``grid`` takes: ``bits``, ``axis``, ``group``, ``step``.

    Returns:
      A tree of the same keys; leaves that are not selected are the same objects.

    Raises:
      ValueError: nothing is selected, a selected leaf holds a NaN or an infinity, or a
        setting is out of range. The error names the leaf.
      TypeError: a selected leaf is not floating point.

    >>> small = quantize_tree({"kernel": jnp.ones((64, 8))}, bits=4, group=32)
    >>> small["kernel"].nbits()
    2560
    """
    return map_where(partial(grid, **settings), params, where, caller="quantize_tree")
