"""4-bit and 8-bit block formats: NF4, the MX formats and NVFP4.

Short runs of weights share a scale that is itself stored in few bits. All of them are
`FloatTensor`, and differ in the levels and in the node of the scales.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp.quant.floats import (
    FloatTensor,
    checked_format,
    coded,
    floor_log2,
    placed,
    powers,
    quantize_float,
    scaled,
    valued,
)
from jaxcomp.quant.formats import top_of
from jaxcomp.quant.grid import Axis, checked_settings, to_groups
from jaxcomp.quant.ranges import Range, largest


Exponent = Callable[[jax.Array, Any], jax.Array]


def quantize_nf4(
    x: jax.Array,
    *,
    axis: Axis = None,
    group: int | None = 64,
    reach: Range = largest,
    scales: Callable[[jax.Array], Any] | None = None,
) -> FloatTensor:
    """Rounds ``x`` to 16 levels that are quantiles of a normal distribution.

    Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314.
    The scale is the largest magnitude of the group, 4.5 bits per weight in float32. Its
    double quantization is ``scales=partial(quantize_affine, bits=8, axis=None,
    group=256)``, 4.127 bits; departs from the paper there, whose 8-bit codes are floats
    around the mean. ``reach=least_error()`` has a lower error at the same size.

    Args:
      x: float[*shape].
      axis: the axis, or axes, that keep a scale per index; None, as in the paper, cuts
        the whole array into groups.
      group: entries that share a scale, in C order over all axes but ``axis``; None
        takes them all. The last group may be shorter.
      reach: how much of the largest magnitude the levels span; see `Range`.
      scales: float[channels, groups] -> the node or array that stands for the scales;
        None keeps them in ``x.dtype``.

    Returns:
      A `FloatTensor` of the format ``"nf4"``.

    Raises:
      ValueError: ``axis`` or ``group`` is out of range.
      TypeError: ``x`` is not floating point.

    >>> quantize_nf4(jnp.array([2.0, -0.1, 0.0, 0.9])).dense()
    Array([ 2.        , -0.18210007,  0.        ,  0.88141966], dtype=float32)
    """
    x, _, kept, group = checked_settings("quantize_nf4", x, 4, axis, group)
    return scaled(x, "nf4", kept, group, reach, scales)


def floor_exponent(groups: jax.Array, dtype: Any) -> jax.Array:
    """The exponents of the OCP rule: floor(log2 of the largest), less the dtype's.

    A group's largest value may be up to a third beyond the largest of the dtype, where
    it saturates.

    Args:
      groups: float[channels, groups, group].
      dtype: the float dtype of the elements.

    Returns:
      int32[channels, groups]; at least -126, also where all values are 0.

    >>> floor_exponent(jnp.array([[[3.0, -8.0], [7.9, 0.0]]]), jnp.float4_e2m1fn)
    Array([[1, 0]], dtype=int32)
    """
    widest = jnp.max(jnp.abs(groups.astype(jnp.float32)), axis=-1, initial=0)
    last = math.frexp(top_of(jnp.dtype(dtype).name))[1] - 1
    return jnp.maximum(floor_log2(widest) - last, -126)


def best_exponent(groups: jax.Array, dtype: Any) -> jax.Array:
    """Of `floor_exponent` and the next, the exponents with less squared error.

    Args:
      groups: float[channels, groups, group].
      dtype: the float dtype of the elements.

    Returns:
      int32[channels, groups]; on a tie that of `floor_exponent`.

    >>> best_exponent(jnp.array([[[7.9, 0.0], [6.1, 0.5]]]), jnp.float4_e2m1fn)
    Array([[1, 0]], dtype=int32)
    """
    format = jnp.dtype(dtype).name
    low = floor_exponent(groups, dtype)
    wide = groups.astype(jnp.float32)

    def error(exponent: jax.Array) -> jax.Array:
        scale = powers(exponent, jnp.float32).dense()
        dense = valued(coded(wide, scale, format), scale, format, jnp.float32)
        rest = (wide - dense) / powers(low, jnp.float32).dense()[..., None]
        return jnp.sum(rest * rest, axis=-1)  # near 1, so that no square is lost

    return jnp.where(error(low + 1) < error(low), low + 1, low)


def quantize_mx(
    x: jax.Array,
    dtype: Any = jnp.float4_e2m1fn,
    *,
    axis: Axis = -1,
    group: int | None = 32,
    exponent: Exponent = floor_exponent,
) -> FloatTensor:
    """Rounds ``x`` to a narrow float dtype with a power of 2 for every group.

    Rouhani et al., "Microscaling Data Formats for Deep Learning", arXiv:2310.10537, and
    the OCP Microscaling Formats specification 1.0: MXFP4 with float4_e2m1fn, 4.25 bits
    per weight, MXFP8 with float8_e4m3fn or float8_e5m2, 8.25 bits. Departs from the
    specification below ``2**-126``, which is the least power here.

    Args:
      x: float[*shape].
      dtype: a float dtype of at most 16 bits.
      axis: the axis, or axes, that keep a scale per index; None shares one.
      group: entries that share a scale, in C order over all axes but ``axis``; None
        takes them all. The last group may be shorter.
      exponent: the rule, `floor_exponent` or `best_exponent`, or any function of
        (float[channels, groups, group], dtype) to int32[channels, groups].

    Returns:
      A `FloatTensor` whose scales are a `FloatTensor` of powers.

    Raises:
      ValueError: ``axis`` or ``group`` is out of range.
      TypeError: ``x`` is not floating point, or ``dtype`` is not such a dtype.

    >>> quantize_mx(jnp.array([[7.9, 5.0, -0.3, 0.0]]), axis=None).dense()
    Array([[ 6. ,  4. , -0.5,  0. ]], dtype=float32)
    """
    format = checked_format("quantize_mx", dtype)
    x, _, kept, group = checked_settings("quantize_mx", x, 8, axis, group)
    scale = _shared_powers(x, format, kept, group, exponent)
    return placed(x, scale, format, kept, group)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _shared_powers(
    x: jax.Array, format: str, axis: tuple[int, ...], group: int, exponent: Exponent
) -> FloatTensor:
    groups = to_groups(x, axis, group).astype(jnp.float32)
    return powers(exponent(groups, jnp.dtype(format)), jnp.float32)


def quantize_nvfp4(
    x: jax.Array, *, axis: Axis = -1, group: int | None = 16
) -> FloatTensor:
    """Rounds ``x`` to E2M1 with an E4M3 scale for every group and one for the array.

    NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv:2509.25149: the scale
    of the array is ``max|x| / (6 * 448)``, that of a group its largest magnitude over 6
    times that, rounded to float8_e4m3fn. A group 2e-6 of the largest or less has the
    scale 0 and becomes zeros. 4.5 bits per weight.

    Args:
      x: float[*shape].
      axis: the axis, or axes, that keep a scale per index; None shares one.
      group: entries that share a scale, in C order over all axes but ``axis``; None
        takes them all. The last group may be shorter.

    Returns:
      A `FloatTensor` whose scales are a `FloatTensor` with one scale.

    Raises:
      ValueError: ``axis`` or ``group`` is out of range.
      TypeError: ``x`` is not floating point.

    >>> quantize_nvfp4(jnp.array([[6.0, 2.6, -0.2, 0.0]]), axis=None).dense()
    Array([[6., 3., 0., 0.]], dtype=float32)
    """
    x, _, kept, group = checked_settings("quantize_nvfp4", x, 4, axis, group)
    scale = quantize_float(_fits_six(x, kept, group), axis=None)
    return placed(x, scale, "float4_e2m1fn", kept, group)


@partial(jax.jit, static_argnums=(1, 2))
def _fits_six(x: jax.Array, axis: tuple[int, ...], group: int) -> jax.Array:
    groups = to_groups(x, axis, group).astype(_check.wide(x.dtype))
    return jnp.max(jnp.abs(groups), axis=-1, initial=0) / 6
