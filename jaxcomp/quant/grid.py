"""Uniform integer grids: per tensor, per axis and per group, symmetric and affine.

One layout serves every granularity: the kept axes go first and become channels, what is
left runs in C order and is cut into groups, and every (channel, group) has one scale.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp import bits as packing
from jaxcomp.node import CompressedArray
from jaxcomp.tree import Where, is_matrix, map_where


Axis = int | tuple[int, ...] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor(CompressedArray):
    """Integer codes on a uniform grid: ``dense = (code - zero) * scale``.

    Zero is on the grid. Arithmetic is in float32 where the dtype is narrower.

    Attributes:
      codes: uint8[packed], codes of ``bits`` bits in [channels, groups, group] order,
        the ragged tail of each channel padded; see `bits.pack`.
      scale: float[channels, groups]; its dtype is the dtype of `dense`.
      zero: uint8[packed], the code of zero for each scale, ``bits`` bits each; None if
        it is ``2**(bits-1) - 1`` everywhere (symmetric).
      bits: width of a code, 2 to 16 bits (static).
      shape: shape of `dense` (static).
      axis: axes that keep their own scales, not negative, in order (static).
      group: entries that share a scale (static).
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    bits: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axis: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})

    # No __post_init__: JAX rebuilds nodes around tracers, None and shapes.

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    def _codes(self) -> jax.Array:
        """uint[channels, groups, group]"""
        channels, groups = self.scale.shape
        count = channels * groups * self.group
        flat = packing.unpack(self.codes, self.bits, count)
        return flat.reshape(channels, groups, self.group)

    def _zero(self) -> Any:
        """The code of zero: an int, or int32[channels, groups, 1]."""
        if self.zero is None:
            return symmetric_zero(self.bits)
        flat = packing.unpack(self.zero, self.bits, self.scale.size)
        return flat.reshape(*self.scale.shape, 1).astype(jnp.int32)

    @jax.jit
    def dense(self) -> jax.Array:
        if self.scale.ndim > 2:  # a stack of nodes, as vmap makes
            return jax.vmap(QTensor.dense)(self)
        wide = _check.wide(self.dtype)
        steps = self._codes().astype(jnp.int32) - self._zero()
        values = steps.astype(wide) * self.scale[..., None].astype(wide)
        most = float(jnp.finfo(self.dtype).max)  # a scale rounded up may step over it
        values = jnp.clip(values, -most, most).astype(self.dtype)
        return _from_groups(values, self.shape, self.axis)

    def nbits(self) -> int:
        zero = 0 if self.zero is None else self.zero.size * 8
        return self.codes.size * 8 + self.scale.size * _bits_of(self.scale) + zero

    @jax.jit
    def encode(self, x: jax.Array) -> "QTensor":
        new = rounded(
            to_groups(x, self.axis, self.group), self.scale, self._zero(), self.bits
        )
        same = to_groups(x == self.dense(), self.axis, self.group)
        old = self._codes()
        codes = jnp.where(same, old, new.astype(old.dtype))
        return dataclasses.replace(self, codes=packed(codes, self.bits))

    def describe(self) -> str:
        kind = "symmetric" if self.zero is None else "affine"
        channels, groups = self.scale.shape[-2:]
        one = "" if channels * groups > 1 else ", one scale"
        per_axis = f", axis {','.join(map(str, self.axis))}" if self.axis else ""
        per_group = f", group {self.group}" if groups > 1 else ""
        return f"{self.bits} bits {kind}{per_axis}{per_group}{one}"


def _bits_of(x: jax.Array) -> int:
    return jnp.finfo(x.dtype).bits


def in_steps(x: jax.Array, scale: jax.Array) -> jax.Array:
    """``x / scale``, rounded half to even, in the arithmetic dtype."""
    wide = _check.wide(x.dtype)
    x, scale = x.astype(wide), scale.astype(wide)
    # XLA multiplies by the reciprocal; that of a large scale would be flushed to 0.
    unit = unit_near(scale)
    return jnp.round((x * unit) / (scale * unit))


def unit_near(size: jax.Array) -> jax.Array:
    """A power of 2 that brings values of this size away from both ends of float32."""
    return jnp.where(size > 1, 2.0**-24, 2.0**24).astype(size.dtype)


def symmetric_zero(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def packed(codes: jax.Array, bits: int) -> jax.Array:
    return packing.pack(codes.reshape(-1), bits)


def _kept(caller: str, axis: Axis, ndim: int) -> tuple[int, ...]:
    """The kept axes, not negative, sorted."""
    if axis is None or ndim == 0:
        return ()
    axes = axis if isinstance(axis, Sequence) else (axis,)
    kept = sorted(operator.index(a) + (ndim if a < 0 else 0) for a in axes)
    if any(not 0 <= a < ndim for a in kept) or len(set(kept)) != len(kept):
        raise ValueError(
            f"{caller} needs axes of an array of {ndim} dimensions, each once, got "
            f"axis={axis}."
        )
    return tuple(kept)


def to_groups(x: jax.Array, axis: tuple[int, ...], group: int) -> jax.Array:
    """[*shape] -> [channels, groups, group], the ragged tail padded with zeros."""
    lanes = jnp.moveaxis(x, axis, range(len(axis)))
    channels = math.prod(x.shape[a] for a in axis)
    lanes = lanes.reshape(channels, x.size // channels if channels else 0)
    lanes = jnp.pad(lanes, [(0, 0), (0, -lanes.shape[1] % group)])
    return lanes.reshape(channels, lanes.shape[1] // group, group)


def _from_groups(
    y: jax.Array, shape: tuple[int, ...], axis: tuple[int, ...]
) -> jax.Array:
    """The inverse of `to_groups`."""
    kept = tuple(shape[a] for a in axis)
    rest = tuple(length for a, length in enumerate(shape) if a not in axis)
    lanes = y.reshape(y.shape[0], y.shape[1] * y.shape[2])[:, : math.prod(rest)]
    return jnp.moveaxis(lanes.reshape(kept + rest), range(len(axis)), axis)


def rounded(x: jax.Array, scale: jax.Array, zero: Any, bits: int) -> jax.Array:
    """Codes of ``x`` [channels, groups, group] on a grid, ties to the even code."""
    steps = in_steps(x, scale[..., None])
    top = 2**bits - 1 if isinstance(zero, jax.Array) else 2 * zero
    return jnp.clip(steps + jnp.asarray(zero, steps.dtype), 0, top).astype(jnp.uint16)


def checked_settings(
    caller: str, x: jax.Array, bits: int, axis: Axis, group: int | None
) -> tuple[jax.Array, int, tuple[int, ...], int]:
    """The array, the bits, the kept axes and the true length of a group."""
    x = _check.floating(caller, x)
    _check.integer_within(caller, "bits", bits, 2, 8)
    kept = _kept(caller, axis, x.ndim)
    row = math.prod(n for a, n in enumerate(x.shape) if a not in kept)
    if group is not None:
        _check.integer_within(caller, "group", group, 1, 2**31 - 1)
    return x, bits, kept, max(1, row if group is None else min(group, row))


def scale_for(reach: jax.Array, levels: int, dtype: Any) -> jax.Array:
    """Spacing of a grid that spans ``reach``; never 0, so that zeros divide."""
    # Twice the least normal number: a subnormal spacing is flushed to 0 by XLA.
    return jnp.maximum(reach / levels, 2 * float(jnp.finfo(dtype).tiny)).astype(dtype)


def quantize(
    x: jax.Array, bits: int = 8, *, axis: Axis = -1, group: int | None = None
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

    Returns:
      A `QTensor` with ``|dense - x| <= scale / 2``, up to rounding in ``x.dtype``.

    Raises:
      ValueError: ``bits``, ``axis`` or ``group`` is out of range.
      TypeError: ``x`` is not floating point.

    >>> quantize(jnp.array([[0.0, 0.5, -1.0]]), bits=3, axis=None).dense() * 3
    Array([[ 0.,  2., -3.]], dtype=float32)
    """
    return _symmetric(*checked_settings("quantize", x, bits, axis, group))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _symmetric(x: jax.Array, bits: int, axis: tuple[int, ...], group: int) -> QTensor:
    groups = to_groups(x, axis, group)
    middle = symmetric_zero(bits)
    reach = jnp.max(jnp.abs(groups.astype(_check.wide(x.dtype))), axis=-1, initial=0)
    scale = scale_for(reach, middle, x.dtype)
    codes = packed(rounded(groups, scale, middle, bits), bits)
    return QTensor(codes, scale, None, bits, x.shape, axis, group)


def quantize_affine(
    x: jax.Array, bits: int = 8, *, axis: Axis = -1, group: int | None = None
) -> QTensor:
    """Rounds ``x`` to the nearest of ``2**bits`` levels between its extremes and 0.

    Jacob et al., arXiv:1712.05877, section 2.1: the zero point is an integer inside the
    range, so that 0 is on the grid and zeros stay exactly zero.

    Args:
      x: float[*shape].
      bits: width of a code, 2 to 8 bits.
      axis: the axis, or axes, that keep a scale per index; None shares one.
      group: entries that share a scale, in C order over all axes but ``axis``.

    Returns:
      A `QTensor` with ``|dense - x| <= scale / 2``, up to rounding in ``x.dtype``.

    Raises:
      ValueError: ``bits``, ``axis`` or ``group`` is out of range.
      TypeError: ``x`` is not floating point.

    >>> quantize_affine(jnp.array([[0.0, 1.0, 3.0]]), bits=2, axis=None).dense()
    Array([[0., 1., 3.]], dtype=float32)
    """
    return _affine(*checked_settings("quantize_affine", x, bits, axis, group))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _affine(x: jax.Array, bits: int, axis: tuple[int, ...], group: int) -> QTensor:
    groups = to_groups(x, axis, group)
    levels = 2**bits - 1
    wide = groups.astype(_check.wide(x.dtype))
    low, high = jnp.min(wide, axis=-1, initial=0), jnp.max(wide, axis=-1, initial=0)
    unit = unit_near(jnp.maximum(high, -low))  # high - low may overflow
    scale = scale_for((high * unit - low * unit) / levels / unit, 1, x.dtype)
    zero = jnp.clip(in_steps(-low, scale), 0, levels).astype(jnp.int32)[..., None]
    codes = packed(rounded(groups, scale, zero, bits), bits)
    return QTensor(codes, scale, packed(zero, bits), bits, x.shape, axis, group)


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
        most = float(jnp.max(jnp.abs(in_steps(groups, scale[..., None])), initial=0))
        if not math.isfinite(most):
            raise ValueError(
                f"quantize_step needs finite values of |x / step|, got {most} at "
                f"step={step}. Mend the values or take a larger step."
            )
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
