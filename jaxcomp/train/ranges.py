"""Ranges of activations, for training with activations of few bits.

Pure functions on one array. A range is float[2], its low and its high end; zero is
always inside. The caller carries it from step to step, like batch statistics.
"""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp._extremes import unit_near
from jaxcomp.prune.top import top_masks
from jaxcomp.quant.grid import in_steps, scale_for


def moving_range(
    limits: jax.Array, x: jax.Array, decay: float | jax.Array = 0.99
) -> jax.Array:
    """The range so far, moved towards the extremes of ``x``.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 3.1: exponential
    moving averages of the least and the greatest activation. Departs from the paper at
    the start: the first range is that of ``x`` itself.

    Args:
      limits: float[2], the range so far; ``jnp.zeros(2)`` at the start.
      x: float[*shape], activations. Their gradient does not see the range.
      decay: share of the old range in the new one, in [0, 1].

    Returns:
      float[2], in the dtype of ``limits``.

    Raises:
      TypeError: ``x`` or ``limits`` is not floating point.
      ValueError: ``limits`` is not two numbers, or ``decay`` is out of range.

    >>> limits = moving_range(jnp.zeros(2), jnp.array([1.0, -2.0]))
    >>> moving_range(limits, jnp.array([1.0, 2.0]), decay=0.5)
    Array([-1. ,  1.5], dtype=float32)
    """
    x = jax.lax.stop_gradient(_check.floating("moving_range", x))
    limits = _checked("moving_range", limits)
    known = _check.number("moving_range", "decay", decay)
    if known is not None and not 0 <= known <= 1:
        raise ValueError(f"moving_range needs 0 <= decay <= 1, got {decay}.")
    now = _extremes(x).astype(limits.dtype)
    decay = jnp.asarray(decay, limits.dtype)
    unseen = jnp.all(limits == 0)
    return jnp.where(unseen, now, decay * limits + (1 - decay) * now)


def percentile_range(x: jax.Array, percentile: float = 99.9) -> jax.Array:
    """The range of ``x`` without the few values of the largest magnitude.

    Wu, Judd, Zhang, Isaev and Micikevicius, "Integer Quantization for Deep Learning
    Inference: Principles and Empirical Evaluation", arXiv:2004.09602: the percentile of
    the magnitudes, there from a histogram, here the exact one. Departs from the paper
    in the ends: they are not those of a symmetric grid, but stay at the extremes of
    ``x`` where these are nearer to 0.

    Args:
      x: float[*shape], activations.
      percentile: share of the values that are inside, in percent, in (0, 100]. The
        magnitude is that of an entry: the least that so many do not exceed.

    Returns:
      float[2], at least float32. Nothing is sorted.

    Raises:
      TypeError: ``x`` is not floating point.
      ValueError: ``percentile`` is out of range.

    >>> percentile_range(jnp.array([0.0, 1.0, 2.0, 3.0, -90.0]), percentile=80)
    Array([-3.,  3.], dtype=float32)
    >>> percentile_range(jnp.array([0.0, 1.0, 2.0, 3.0, 90.0]), percentile=80)
    Array([0., 3.], dtype=float32)
    """
    x = jax.lax.stop_gradient(_check.floating("percentile_range", x))
    if not 0 < percentile <= 100:
        raise ValueError(
            f"percentile_range needs 0 < percentile <= 100, got {percentile}."
        )
    x = x.astype(_check.wide(x.dtype))
    size = jnp.abs(x)
    inside = -int(-Fraction(str(percentile)) * x.size // 100)
    beyond = top_masks([size], inside)[0]
    reach = jnp.max(jnp.where(beyond, 0, size), initial=0)
    return jnp.clip(_extremes(x), -reach, reach)


def fake_quantize_range(x: jax.Array, limits: jax.Array, bits: int = 8) -> jax.Array:
    """``x`` clipped into a range and rounded there, with the gradient of the clipping.

    Jacob et al., arXiv:1712.05877, sections 2.1 and 3: ``2**bits`` levels whose zero
    point is an integer, so that 0 is one of them; for that the levels at the ends move
    by up to half a step. In the range of ``x`` itself the values are those of
    `quantize_affine` with ``axis=None``.

    Args:
      x: float[*shape], activations.
      limits: float[2], the range, as `moving_range` and `percentile_range` give it. It
        is widened to hold 0, and gets no gradient. Do not pass the zeros of the start:
        in an empty range everything is 0.
      bits: width of a code, 2 to 8 bits.

    Returns:
      float[*shape]. The gradient of ``x`` is 1 in the range, both ends included, and 0
      outside.

    Raises:
      TypeError: ``x`` or ``limits`` is not floating point.
      ValueError: ``limits`` is not two numbers, or ``bits`` is out of range.

    >>> x, limits = jnp.array([-1.0, 0.4, 3.0, 9.0]), jnp.array([0.0, 3.0])
    >>> fake_quantize_range(x, limits, bits=2)
    Array([0., 0., 3., 3.], dtype=float32)
    >>> jax.grad(lambda x: jnp.sum(fake_quantize_range(x, limits, bits=2)))(x)
    Array([0., 1., 1., 0.], dtype=float32)
    """
    x = _check.floating("fake_quantize_range", x)
    levels = 2 ** _check.integer_within("fake_quantize_range", "bits", bits, 2, 8) - 1
    limits = jax.lax.stop_gradient(_checked("fake_quantize_range", limits))
    limits = _extremes(limits.astype(_check.wide(x.dtype)))
    fixed = jax.lax.stop_gradient(x)
    wide = fixed.astype(limits.dtype)
    kept = jnp.where((limits[0] <= wide) & (wide <= limits[1]), x, fixed)
    return _on_grid(fixed, limits, levels) + (kept - fixed)  # the difference is 0


@partial(jax.jit, static_argnums=2)  # as `quantize_affine` is: it divides alike
def _on_grid(x: jax.Array, limits: jax.Array, levels: int) -> jax.Array:
    low, high = limits
    unit = unit_near(jnp.maximum(high, -low))  # high - low may overflow
    scale = scale_for((high * unit - low * unit) / levels / unit, 1, x.dtype)
    zero = jnp.clip(in_steps(-low, scale), 0, levels)
    steps = in_steps(jnp.clip(x.astype(limits.dtype), low, high), scale)
    codes = jnp.clip(steps + zero, 0, levels)
    most = float(jnp.finfo(x.dtype).max)  # a scale rounded up may step over it
    values = (codes - zero) * scale.astype(codes.dtype)
    return jnp.clip(values, -most, most).astype(x.dtype)


def _checked(caller: str, limits: jax.Array) -> jax.Array:
    limits = _check.floating(caller, limits)
    if limits.shape != (2,):
        raise ValueError(
            f"{caller} needs limits of shape [2], low and high, got "
            f"{_check.describe(limits)}. Begin with jnp.zeros(2)."
        )
    return limits


def _extremes(x: jax.Array) -> jax.Array:
    """float[2]: the least and the greatest value, or 0."""
    return jnp.stack([jnp.min(x, initial=0), jnp.max(x, initial=0)])
