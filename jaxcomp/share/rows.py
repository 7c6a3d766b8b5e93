"""Palettes by rows: each group of units along an axis has a codebook of its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp import bits as packing
from jaxcomp.node import CompressedArray
from jaxcomp.share.kmeans import assign, optimal_centroids
from jaxcomp.share.palette import checked_values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RowSharedTensor(CompressedArray):
    """Codes into one codebook for each group of units: ``dense = table[group, code]``.

    The table is the codebooks, with an exact 0 before each if ``zero``.

    Attributes:
      codes: uint8[packed], codes of ``bits`` bits in C order; see `bits.pack`.
      codebooks: float[groups, entries]; the dtype is that of `dense`. A group with
        fewer values repeats its last. Trainable.
      zero: whether code 0 means exactly 0 and is in no codebook (static).
      bits: width of a code (static).
      shape: shape of `dense` (static).
      axis: the axis whose units are in groups, not negative (static).
      rows: units that share a codebook; the last group may be smaller (static).
    """

    codes: jax.Array
    codebooks: jax.Array
    zero: bool = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        return self.codebooks.dtype

    def table(self) -> jax.Array:
        """float[groups, values]: what each code stands for in each group."""
        return jnp.pad(self.codebooks, ((0, 0), (int(self.zero), 0)))

    def _old_codes(self) -> jax.Array:
        codes = packing.unpack(self.codes, self.bits, self.size)
        return codes.reshape(self.shape)

    @jax.jit
    def dense(self) -> jax.Array:
        if self.codes.ndim > 1:  # a stack of nodes, as vmap makes
            return jax.vmap(RowSharedTensor.dense)(self)
        codes = _grouped(self._old_codes(), self.axis, self.rows)
        values = jnp.take_along_axis(self.table(), codes.astype(jnp.int32), axis=1)
        return _ungrouped(values, self.shape, self.axis)

    def nbits(self) -> int:
        width = jnp.finfo(self.codebooks.dtype).bits
        return self.codes.size * 8 + self.codebooks.size * width

    def encode(self, x: jax.Array) -> "RowSharedTensor":
        if not self.zero and (not _check.is_concrete(x) or bool(jnp.any(x == 0))):
            entries = self.codebooks.shape[-1]
            return palettize_rows(x, entries, axis=self.axis, rows=self.rows)
        return dataclasses.replace(self, codes=self._nearest(x))

    @jax.jit
    def _nearest(self, x: jax.Array) -> jax.Array:
        """Packed codes of the nearest values; zeros and equal entries keep theirs."""
        table, values = self.table(), _grouped(x, self.axis, self.rows)
        order = jnp.argsort(table, axis=1)
        ranked = jnp.take_along_axis(table, order, axis=1)
        half = ranked.astype(_check.wide(table.dtype)) / 2  # whole, sums may overflow
        middles = half[:, 1:] + half[:, :-1]
        rank = jax.vmap(jnp.searchsorted)(middles, values.astype(middles.dtype))
        nearest = jnp.take_along_axis(order, rank, axis=1)
        new = _ungrouped(nearest, self.shape, self.axis)
        old = self._old_codes()
        codes = jnp.where(x == self.dense(), old, new.astype(old.dtype))
        if self.zero:
            codes = jnp.where(x == 0, 0, codes)
        return packing.pack(codes.reshape(-1), self.bits)

    def describe(self) -> str:
        groups, entries = self.codebooks.shape[-2:]
        return f"{entries + self.zero} shared values in each of {groups} groups"


def palettize_rows(
    x: jax.Array, clusters: int = 16, *, axis: int = -1, rows: int = 1
) -> RowSharedTensor:
    """Gives each group of units at most ``clusters`` values, with the least error.

    As `palettize`, with a codebook for every ``rows`` consecutive units along ``axis``,
    as coremltools' ``per_grouped_channel`` palettes have it. The groups are solved one
    after the other on the host.

    Args:
      x: float[*shape], concrete: the codebooks are solved on the host, not under jit.
      clusters: the most distinct values of a group, 1 to 65536. If ``x`` has exact
        zeros anywhere, 0 is one of them in every group.
      axis: the axis whose units are in groups. For a Flax kernel (in, out), -1 are the
        output units.
      rows: units that share a codebook; the last group may be smaller.

    Returns:
      A `RowSharedTensor`; exact zeros stay exactly zero. A group with no more than
      ``clusters`` values, 0 counted if ``x`` has a zero anywhere, is kept bit for bit
      (-0.0 becomes 0.0).

    Raises:
      ValueError: a number is out of range, ``x`` is empty, traced or not finite, or one
        cluster would have to hold both zeros and other values.
      TypeError: ``x`` is not floating point.

    >>> node = palettize_rows(jnp.array([[1.0, 20.0], [3.0, 40.0]]), clusters=1)
    >>> node.dense()
    Array([[ 2., 30.],
           [ 2., 30.]], dtype=float32)
    """
    caller = "palettize_rows"
    x = _check.floating(caller, x)
    _check.integer_within(caller, "clusters", clusters, 1, 2**packing.WIDEST)
    _check.integer_within(caller, "rows", rows, 1, 2**31 - 1)
    if x.ndim and not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"{caller} needs an axis of {_check.describe(x)}, got axis={axis}. Pass "
            "another, or leave this leaf out with `where`."
        )
    values = checked_values(caller, x).reshape(x.shape)
    axis = axis % x.ndim if x.ndim else 0
    rows = min(rows, x.shape[axis] if x.ndim else 1)
    zero = not values.all()
    if zero and clusters == 1 and values.any():
        raise ValueError(
            f"{caller} needs clusters >= 2 for an array with zeros, which keep one "
            f"value to themselves, got clusters={clusters}."
        )
    lanes = np.moveaxis(values, axis, 0) if x.ndim else values.reshape(1)
    groups = np.split(lanes, range(rows, len(lanes), rows))
    codebooks, codes = [], []
    for part in groups:
        codebook, code = _palette(part, clusters - zero)
        codebooks.append(codebook)
        codes.append(np.where(part == 0, 0, code + zero))
    entries = max(codebook.size for codebook in codebooks)
    filled = [_filled(codebook, entries) for codebook in codebooks]
    whole = np.concatenate(codes)
    whole = np.moveaxis(whole, 0, axis) if x.ndim else whole
    bits = max(1, (entries + zero - 1).bit_length())
    packed = packing.pack(jnp.asarray(whole.reshape(-1).astype(np.uint16)), bits)
    shared = jnp.asarray(np.stack(filled))
    return RowSharedTensor(packed, shared, bool(zero), bits, x.shape, axis, rows)


def _palette(part: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """The best values of a group, and the index of the nearest for each entry."""
    live = part[part != 0]
    codes = np.zeros(part.shape, np.int64)
    if live.size:
        exact = optimal_centroids(live, room)
        codebook = np.unique(exact.astype(part.dtype))  # narrow floats may coincide
        codes[part != 0] = assign(live, codebook)
        return codebook, codes
    return live, codes


def _filled(codebook: np.ndarray, entries: int) -> np.ndarray:
    """With its last value repeated; a group of nothing but zeros gets zeros."""
    last = codebook[-1:] if codebook.size else np.zeros(1, codebook.dtype)
    return np.concatenate([codebook, np.repeat(last, entries - codebook.size)])


def _grouped(x: jax.Array, axis: int, rows: int) -> jax.Array:
    """[*shape] -> [groups, entries of a group], the last group padded with zeros."""
    lanes = jnp.moveaxis(x, axis, 0) if x.ndim else x[None]
    lanes = lanes.reshape(lanes.shape[0], x.size // lanes.shape[0])
    lanes = jnp.pad(lanes, [(0, -lanes.shape[0] % rows), (0, 0)])
    return lanes.reshape(lanes.shape[0] // rows, rows * lanes.shape[1])


def _ungrouped(y: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """The inverse of `_grouped`."""
    if not shape:
        return y.reshape(shape)
    rest = shape[:axis] + shape[axis + 1 :]
    flat = y.reshape(-1)[: int(np.prod(shape))]
    return jnp.moveaxis(flat.reshape(shape[axis], *rest), 0, axis)
