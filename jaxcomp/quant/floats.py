"""Values in narrow float formats, with and without scales.

The layout in channels and groups is that of `grid`.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp import bits as packing
from jaxcomp._extremes import divided
from jaxcomp.node import CompressedArray, dense_of, is_compressed
from jaxcomp.quant.formats import POWERS, levels, nearest, top_of, width
from jaxcomp.quant.grid import (
    Axis,
    checked_settings,
    from_groups,
    packed,
    scale_for,
    to_groups,
)
from jaxcomp.quant.ranges import Range, Rounded, largest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FloatTensor(CompressedArray):
    """Codes of a narrow float format: ``dense = level[code] * scale``.

    Zero is a level. Arithmetic is in float32 where the dtype is narrower.

    Attributes:
      codes: uint8[packed], codes of ``bits`` bits in [channels, groups, group] order,
        the ragged tail of each channel padded; see `bits.pack`. A code is the bit
        pattern of the format, or the rank of an NF4 level.
      scale: float[channels, groups], a node that stands for such an array, or None.
      format: dtype name of the codes, or ``"nf4"`` (static).
      bits: width of a code (static).
      name: dtype name of `dense` (static).
      shape: shape of `dense` (static).
      axis: axes that keep their own scales, not negative, in order (static).
      group: entries that share a scale (static).
    """

    codes: jax.Array
    scale: Any
    format: str = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axis: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})

    # No __post_init__: JAX rebuilds nodes around tracers, None and shapes.

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.name)

    def _layout(self) -> tuple[int, int, int]:
        """(channels, groups, group)"""
        channels = math.prod(self.shape[a] for a in self.axis)
        row = self.size // channels if channels else 0
        return channels, -(-row // self.group), self.group

    def _codes(self) -> jax.Array:
        """uint[channels, groups, group]"""
        layout = self._layout()
        flat = packing.unpack(self.codes, self.bits, math.prod(layout))
        return flat.reshape(layout)

    @jax.jit
    def dense(self) -> jax.Array:
        if self.codes.ndim > 1:  # a stack of nodes, as vmap makes
            return jax.vmap(FloatTensor.dense)(self)
        scale = None if self.scale is None else dense_of(self.scale)
        values = valued(self._codes(), scale, self.format, self.dtype)
        return from_groups(values.astype(self.dtype), self.shape, self.axis)

    def nbits(self) -> int:
        codes = self.codes.size * 8
        if self.scale is None:
            return codes
        if is_compressed(self.scale):
            return codes + self.scale.nbits()
        return codes + self.scale.size * jnp.finfo(self.scale.dtype).bits

    @jax.jit
    def encode(self, x: jax.Array) -> "FloatTensor":
        if self.codes.ndim > 1:
            return jax.vmap(FloatTensor.encode)(self, x)
        scale = None if self.scale is None else dense_of(self.scale)
        new = coded(to_groups(x, self.axis, self.group), scale, self.format)
        same = to_groups(x == self.dense(), self.axis, self.group)
        codes = jnp.where(same, self._codes(), new)
        return dataclasses.replace(self, codes=packed(codes, self.bits))

    def describe(self) -> str:
        channels, groups, group = self._layout()
        per_axis = f", axis {','.join(map(str, self.axis))}" if self.axis else ""
        per_group = f", group {group}" if groups > 1 else ""
        if is_compressed(self.scale):
            scales = f", scales {self.scale.describe()}"
        else:
            one = self.scale is not None and channels * groups == 1
            scales = ", one scale" if one else ""
        return f"{self.format}{per_axis}{per_group}{scales}"


def coded(groups: jax.Array, scale: jax.Array | None, format: str) -> jax.Array:
    """Codes of ``groups`` [channels, groups, group] over their scales."""
    wide = groups.astype(_check.wide(groups.dtype))
    if scale is None:
        return nearest(wide, format)
    return nearest(divided(wide, scale[..., None].astype(wide.dtype)), format)


def valued(
    codes: jax.Array, scale: jax.Array | None, format: str, dtype: Any
) -> jax.Array:
    """The values of codes in the arithmetic dtype, within the range of ``dtype``."""
    wide = _check.wide(dtype)
    if width(format) <= 8:
        values = jnp.asarray(levels(format), wide)[codes]
    else:
        narrow = jax.lax.bitcast_convert_type(codes, jnp.dtype(format))
        values = narrow.astype(wide)
    if scale is not None:
        values *= scale[..., None].astype(wide)
    most = float(jnp.finfo(dtype).max)  # a scale rounded up may step over it
    return jnp.clip(values, -most, most)


def placed(
    x: jax.Array, scale: Any, format: str, axis: tuple[int, ...], group: int
) -> FloatTensor:
    """``x`` on the levels of a format times these scales."""
    over = None if scale is None else dense_of(scale)
    # Two compilations: XLA would fuse the rounding into the packing, 10 times slower.
    codes = _codes_of(x, over, format, axis, group)
    bits = width(format)
    return FloatTensor(
        packed(codes, bits), scale, format, bits, x.dtype.name, x.shape, axis, group
    )


@partial(jax.jit, static_argnums=(2, 3, 4))
def _codes_of(
    x: jax.Array, scale: Any, format: str, axis: tuple[int, ...], group: int
) -> jax.Array:
    return coded(to_groups(x, axis, group), scale, format)


def scaled(
    x: jax.Array,
    format: str,
    axis: tuple[int, ...],
    group: int,
    reach: Range,
    scales: Callable[[jax.Array], Any] | None,
) -> FloatTensor:
    """``x`` on the levels of a format, with a scale of its own for each group."""
    scale = _scale_of(x, format, axis, group, reach)
    return placed(x, scales(scale) if scales else scale, format, axis, group)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _scale_of(
    x: jax.Array, format: str, axis: tuple[int, ...], group: int, reach: Range
) -> jax.Array:
    groups = to_groups(x, axis, group).astype(_check.wide(x.dtype))
    widest = jnp.max(jnp.abs(groups), axis=-1, initial=0)

    def scale_at(ratio: jax.Array) -> jax.Array:
        return scale_for(widest * ratio / top_of(format), 1, x.dtype)

    def rounded(ratio: jax.Array) -> jax.Array:
        scale = scale_at(ratio)
        return valued(coded(groups, scale, format), scale, format, x.dtype)

    return scale_at(reach(groups, rounded))


def widened(reach: Range, factor: float) -> Range:
    """A range whose ratios are of ``factor`` times the largest magnitude.

    For searches: where the last levels are far apart, the largest magnitude may better
    meet the level before the last.

    Args:
      reach: any range, e.g. ``least_error()``.
      factor: 1 or more; 1.4 to meet the level before the last of NF4, 1.5 of E2M1.

    Returns:
      A `Range`, but for its ratios of up to ``factor``.

    Raises:
      ValueError: ``factor`` is less than 1 or not finite.

    >>> x = jnp.array([[4.0, 3.0]])
    >>> reach = widened(largest, 1.5)  # 4 goes to the level 4 of 6, not to 6
    >>> quantize_float(x, jnp.float4_e2m1fn, axis=None, reach=reach).dense()
    Array([[4., 3.]], dtype=float32)
    """
    if not 1 <= factor < math.inf:
        raise ValueError(f"widened needs a finite factor of 1 or more, got {factor}.")
    return _widened(reach, float(factor))


@cache  # one function for each setting: what is compiled for it is compiled once
def _widened(reach: Range, factor: float) -> Range:
    def wider(groups: jax.Array, rounded: Rounded) -> jax.Array:
        return factor * reach(groups, lambda ratio: rounded(factor * ratio))

    return wider


def checked_format(caller: str, dtype: Any) -> str:
    """The name of a float dtype of at most 16 bits that has a zero."""
    dtype = jnp.dtype(dtype)
    is_float = jnp.issubdtype(dtype, jnp.floating)
    if not is_float or jnp.finfo(dtype).bits > 16 or dtype.name == POWERS:
        raise TypeError(
            f"{caller} needs a float dtype of at most 16 bits that has a zero, got "
            f"{dtype.name}. Pass float8_e4m3fn, float4_e2m1fn or bfloat16, say; for "
            "powers of 2 call `to_powers`."
        )
    return dtype.name


def to_float(x: jax.Array, dtype: Any) -> FloatTensor:
    """Rounds every value to a narrower float dtype, without a scale.

    Values beyond the range become the largest of the dtype. Also for scales:
    ``quantize(x, scales=partial(to_float, dtype=jnp.bfloat16))``.

    Args:
      x: float[*shape].
      dtype: a float dtype of at most 16 bits, e.g. ``jnp.bfloat16``.

    Returns:
      A `FloatTensor` without scales; ties go to the even code.

    Raises:
      TypeError: ``x`` is not floating point, or ``dtype`` is not such a dtype.

    >>> to_float(jnp.array([1.0, 1.06, 1000.0]), jnp.float8_e4m3fn).dense()
    Array([  1.,   1., 448.], dtype=float32)
    """
    x = _check.floating("to_float", x)
    return placed(x, None, checked_format("to_float", dtype), (), max(1, x.size))


def to_powers(x: jax.Array) -> FloatTensor:
    """Rounds positive values up to powers of 2, and holds their exponents.

    For scales, ``quantize(x, scales=to_powers)``: up, so that nothing is clipped. 8
    bits each, as E8M0 of Rouhani et al., "Microscaling Data Formats for Deep Learning",
    arXiv:2310.10537.

    Args:
      x: float[*shape], positive. What is not becomes the least power.

    Returns:
      A `FloatTensor` without scales. Its powers are the normal ones of ``x.dtype``:
      ``2**-126`` to ``2**127`` for float32 and bfloat16, ``2**-14`` to ``2**15`` for
      float16. Larger values become the last, although it is below them.

    Raises:
      TypeError: ``x`` is not floating point.

    >>> to_powers(jnp.array([1.0, 1.1, 0.3, 0.25])).dense()
    Array([1.  , 2.  , 0.5 , 0.25], dtype=float32)
    """
    x = _check.floating("to_powers", x)
    pattern = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    has_fraction = (pattern & (2**23 - 1)) != 0
    return powers(floor_log2(x) + has_fraction.astype(jnp.int32), x.dtype)


def floor_log2(x: jax.Array) -> jax.Array:
    """int32[*shape]: of positive normal values, exactly; others are -127 or below."""
    pattern = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return (pattern >> 23) - 127  # a sign stays in front of the exponent


def powers(exponent: jax.Array, dtype: Any) -> FloatTensor:
    """2 to integers, clipped to the normal powers of ``dtype``."""
    info = jnp.finfo(dtype)
    fits = jnp.clip(exponent, max(-126, int(info.minexp)), min(127, info.maxexp - 1))
    codes = packed((fits + 127).astype(jnp.uint8), 8)
    name = jnp.dtype(dtype).name
    size = max(1, exponent.size)
    return FloatTensor(codes, None, POWERS, 8, name, exponent.shape, (), size)


def quantize_float(
    x: jax.Array,
    dtype: Any = jnp.float8_e4m3fn,
    *,
    axis: Axis = -1,
    group: int | None = None,
    reach: Range = largest,
    scales: Callable[[jax.Array], Any] | None = None,
) -> FloatTensor:
    """Rounds ``x`` to a narrow float dtype whose largest value is that of the group.

    Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433: the scale is
    the largest magnitude over the largest of the dtype, 448 for float8_e4m3fn, 57344
    for float8_e5m2, 6 for float4_e2m1fn.

    Args:
      x: float[*shape].
      dtype: a float dtype of at most 16 bits.
      axis: the axis, or axes, that keep a scale per index; None shares one.
      group: entries that share a scale, in C order over all axes but ``axis``; None
        takes them all. The last group may be shorter.
      reach: how much of the largest magnitude the dtype spans; see `Range`.
      scales: float[channels, groups] -> the node that stands for it, e.g. `to_powers`.

    Returns:
      A `FloatTensor`; ties go to the even code, and values beyond the range saturate.

    Raises:
      ValueError: ``axis`` or ``group`` is out of range.
      TypeError: ``x`` is not floating point, or ``dtype`` is not such a dtype.

    >>> quantize_float(jnp.array([[448.0, 100.0, 0.0]]), axis=None).dense()
    Array([[448.,  96.,   0.]], dtype=float32)
    """
    format = checked_format("quantize_float", dtype)
    x, _, kept, group = checked_settings("quantize_float", x, 8, axis, group)
    return scaled(x, format, kept, group, reach, scales)
