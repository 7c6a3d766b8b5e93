"""Integer grids that are given: multiples of a step, levels of an interval."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp import bits as packing
from jaxcomp.quant.grid import (
    QTensor,
    in_steps,
    packed,
    placed,
    rounded,
    symmetric_zero,
    to_groups,
)
from jaxcomp.quant.uniform import spacing, zero_of


def quantize_step(x: jax.Array, step: float, bits: int | None = None) -> QTensor:
    """Rounds ``x`` to multiples of ``step``: ``round(x / step) * step``.

    Args:
      x: float[*shape].
      step: distance between two levels, in the unit of ``x``; positive.
      bits: width of a code, 2 to 16 bits; None takes the least that fits the values,
        which needs them at hand, so not under jit. Under jit, codes that do not fit
        saturate.

    Returns:
      A `QTensor` with one scale, ``step``.

    Raises:
      ValueError: ``step`` is not positive, ``bits`` is out of range, a value does not
        fit, or ``bits`` is None under jit.
      TypeError: ``x`` is not floating point.

    >>> quantize_step(jnp.array([0.26, -0.6, 1.0]), step=0.5).dense()
    Array([ 0.5, -0.5,  1. ], dtype=float32)
    """
    x = _check.floating("quantize_step", x)
    if not step > 0 or math.isinf(step):
        raise ValueError(f"quantize_step needs a positive finite step, got {step}.")
    info = jnp.finfo(x.dtype)
    if not float(info.tiny) <= step <= float(info.max):
        raise ValueError(
            f"quantize_step needs a step that {x.dtype} can hold, from {info.tiny} to "
            f"{info.max}, got step={step}."
        )
    groups = to_groups(x, (), max(1, x.size))
    scale = jnp.full(groups.shape[:2], step, x.dtype)
    if bits is not None:
        _check.integer_within("quantize_step", "bits", bits, 2, packing.WIDEST)
    if _check.is_concrete(x):
        steps = in_steps(groups, scale[..., None])
        if not bool(jnp.isfinite(steps).all()):  # a maximum may lose a NaN
            fault = next(v for v in np.asarray(steps).flat if not np.isfinite(v))
            raise ValueError(
                f"quantize_step needs finite values of |x / step|, got {fault} at "
                f"step={step}. Mend the values or take a larger step."
            )
        most = float(jnp.max(jnp.abs(steps), initial=0))
        limit = bits or packing.WIDEST
        fits = max(2, int(most).bit_length() + 1)
        if fits > limit:
            raise ValueError(
                f"quantize_step needs {fits} bits for values up to {most * step:.4g} "
                f"at step={step}, got at most {limit}. Take a larger step."
            )
        bits = bits or fits
    elif bits is None:
        raise ValueError(
            "quantize_step needs `bits` under jit, where it cannot see the values of "
            f"{_check.describe(x)}. Pass bits, or call it outside jit."
        )
    codes = packed(rounded(groups, scale, symmetric_zero(bits), bits), bits)
    return QTensor(codes, scale, None, bits, x.shape, (), max(1, x.size))


def quantize_interval(x: jax.Array, lo: float, hi: float, bits: int = 8) -> QTensor:
    """Rounds ``x`` to ``2**bits`` levels of a fixed interval; the rest is clamped.

    Jacob et al., arXiv:1712.05877, section 2.1: the interval is moved by less than half
    a step, so that 0 is on the grid.

    Args:
      x: float[*shape].
      lo: the least level, in the unit of ``x``, at most 0: zeros stay exactly zero.
      hi: the greatest level, at least 0, not both of them 0.
      bits: width of a code, 1 to 8 bits.

    Returns:
      A `QTensor` with one scale, ``(hi - lo) / (2**bits - 1)``.

    Raises:
      ValueError: not ``lo <= 0 <= hi``, or ``bits`` is out of range.
      TypeError: ``x`` is not floating point.

    >>> quantize_interval(jnp.array([-3.0, 0.4, 0.9]), -1, 2, bits=2).dense()
    Array([-1.,  0.,  1.], dtype=float32)
    """
    x = _check.floating("quantize_interval", x)
    _check.integer_within("quantize_interval", "bits", bits, 1, 8)
    low = _check.number("quantize_interval", "lo", lo)
    high = _check.number("quantize_interval", "hi", hi)
    most = float(jnp.finfo(x.dtype).max)
    low, high = (math.nan if end is None else end for end in (low, high))
    if not -most <= low <= 0 <= high <= most or low == high:
        raise ValueError(
            "quantize_interval needs finite lo <= 0 <= hi of the range of "
            f"{x.dtype}, not both 0, got lo={lo}, hi={hi}."
        )
    wide = _check.wide(x.dtype)
    group = max(1, x.size)
    shape = to_groups(x, (), group).shape[:2]
    lower, upper = jnp.full(shape, low, wide), jnp.full(shape, high, wide)
    scale = spacing(lower, upper, bits, x.dtype)
    return placed(x, scale, zero_of(lower, scale, bits), bits, (), group)
