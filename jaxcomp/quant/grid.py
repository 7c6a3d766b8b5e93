"""The node of uniform integer grids, and how a weight is put on one.

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
from jaxcomp._extremes import divided
from jaxcomp.node import CompressedArray, dense_of, is_compressed


Axis = int | tuple[int, ...] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor(CompressedArray):
    """Integer codes on a uniform grid: ``dense = (code - zero) * scale``.

    Zero is on the grid. Arithmetic is in float32 where the dtype is narrower.

    Attributes:
      codes: uint8[packed], codes of ``bits`` bits in [channels, groups, group] order,
        the ragged tail of each channel padded; see `bits.pack`.
      scale: float[channels, groups], or a node that stands for it; its dtype is the
        dtype of `dense`.
      zero: uint8[packed], the code of zero for each scale, ``bits`` bits each; None if
        it is ``2**(bits-1) - 1`` everywhere (symmetric).
      bits: width of a code, 1 to 16 bits (static).
      shape: shape of `dense` (static).
      axis: axes that keep their own scales, not negative, in order (static).
      group: entries that share a scale (static).
    """

    codes: jax.Array
    scale: Any
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
        layout = (*self.scale.shape, self.group)
        flat = packing.unpack(self.codes, self.bits, math.prod(layout))
        return flat.reshape(layout)

    def _zero(self) -> Any:
        """The code of zero: an int, or int32[channels, groups, 1]."""
        if self.zero is None:
            return symmetric_zero(self.bits)
        flat = packing.unpack(self.zero, self.bits, self.scale.size)
        return flat.reshape(*self.scale.shape, 1).astype(jnp.int32)

    @jax.jit
    def dense(self) -> jax.Array:
        if self.codes.ndim > 1:  # a stack of nodes, as vmap makes
            return jax.vmap(QTensor.dense)(self)
        values = valued(self._codes(), dense_of(self.scale), self._zero())
        return from_groups(values, self.shape, self.axis)

    def nbits(self) -> int:
        zero = 0 if self.zero is None else self.zero.size * 8
        return self.codes.size * 8 + bits_of(self.scale) + zero

    @jax.jit
    def encode(self, x: jax.Array) -> "QTensor":
        groups = to_groups(x, self.axis, self.group)
        new = rounded(groups, dense_of(self.scale), self._zero(), self.bits)
        same = to_groups(x == self.dense(), self.axis, self.group)
        old = self._codes()
        codes = jnp.where(same, old, new.astype(old.dtype))
        return dataclasses.replace(self, codes=packed(codes, self.bits))

    def describe(self) -> str:
        kind = "symmetric" if self.zero is None else "affine"
        channels, groups = self.scale.shape[-2:]
        one = "" if channels * groups > 1 else ", one scale"
        if is_compressed(self.scale):
            one += f", scales {self.scale.describe()}"
        per_axis = f", axis {','.join(map(str, self.axis))}" if self.axis else ""
        per_group = f", group {self.group}" if groups > 1 else ""
        return f"{self.bits} bits {kind}{per_axis}{per_group}{one}"


def bits_of(scale: Any) -> int:
    """Bits that scales take, as an array or as a node."""
    if is_compressed(scale):
        return scale.nbits()
    return scale.size * jnp.finfo(scale.dtype).bits


def valued(codes: jax.Array, scale: jax.Array, zero: Any) -> jax.Array:
    """The values of codes [channels, groups, group], in the dtype of the scale."""
    wide = _check.wide(scale.dtype)
    steps = (codes.astype(jnp.int32) - zero).astype(wide)
    values = steps * scale[..., None].astype(wide)
    most = float(jnp.finfo(scale.dtype).max)  # a scale rounded up may step over it
    return jnp.clip(values, -most, most).astype(scale.dtype)


def in_steps(x: jax.Array, scale: jax.Array) -> jax.Array:
    """``x / scale``, rounded half to even, in the arithmetic dtype; 0 at scale 0."""
    wide = _check.wide(x.dtype)
    return jnp.round(divided(x.astype(wide), scale.astype(wide)))


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


def from_groups(
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
    dtype = jnp.uint8 if bits <= 8 else jnp.uint16
    return jnp.clip(steps + jnp.asarray(zero, steps.dtype), 0, top).astype(dtype)


def checked_settings(
    caller: str, x: jax.Array, bits: int, axis: Axis, group: int | None, least: int = 2
) -> tuple[jax.Array, int, tuple[int, ...], int]:
    """The array, the bits, the kept axes and the true length of a group."""
    x = _check.floating(caller, x)
    _check.integer_within(caller, "bits", bits, least, 8)
    kept = _kept(caller, axis, x.ndim)
    row = math.prod(n for a, n in enumerate(x.shape) if a not in kept)
    if group is not None:
        _check.integer_within(caller, "group", group, 1, 2**31 - 1)
    return x, bits, kept, max(1, row if group is None else min(group, row))


def scale_for(reach: jax.Array, levels: float, dtype: Any) -> jax.Array:
    """Spacing of a grid that spans ``reach``; never 0, so that zeros divide."""
    # Twice the least normal number: a subnormal spacing is flushed to 0 by XLA.
    return jnp.maximum(reach / levels, 2 * float(jnp.finfo(dtype).tiny)).astype(dtype)


def placed(
    x: jax.Array, scale: Any, zero: Any, bits: int, axis: tuple[int, ...], group: int
) -> QTensor:
    """``x`` on the grid of these scales, and of these zeros unless they are None."""
    # Rounding and packing apart: XLA would round once for each byte that is packed.
    codes = _codes_on(x, dense_of(scale), zero, bits, axis, group)
    held = None if zero is None else packed(zero, bits)
    return QTensor(packed(codes, bits), scale, held, bits, x.shape, axis, group)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _codes_on(
    x: jax.Array,
    scale: jax.Array,
    zero: Any,
    bits: int,
    axis: tuple[int, ...],
    group: int,
) -> jax.Array:
    middle = symmetric_zero(bits) if zero is None else zero
    return rounded(to_groups(x, axis, group), scale, middle, bits)


def stored(scale: jax.Array, scales: Callable[[jax.Array], Any] | None) -> Any:
    """What stands for the scales: themselves, or what ``scales`` makes of them."""
    return scale if scales is None else scales(scale)
