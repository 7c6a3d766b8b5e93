"""Nodes that store pruned weights: what is left of them, and where it was.

They prune nothing: what is not zero keeps every bit. A bitmask takes any pattern; a
code for each group takes n of every m, in fewer bits.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp import bits as packing
from jaxcomp.node import CompressedArray


LONGEST = 16  # entries of a group: it has at most 12870 patterns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BitmaskTensor(CompressedArray):
    """One bit for each weight, and the weights whose bit is set.

    Attributes:
      mask: uint8[packed], a bit for each weight in C order; see `bits.pack`.
      values: float[nonzeros], in C order; its dtype is the dtype of `dense`. Trainable.
      shape: shape of `dense` (static).
    """

    mask: jax.Array
    values: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def _ranks(self) -> jax.Array:
        """int32[size]: 0 where nothing is stored, else the place in the values, from 1.

        A running sum over bytes, then one over the bits of each: XLA is slow at a long
        one over all bits, and at one along a short axis.
        """
        counts = jax.lax.population_count(self.mask).astype(jnp.int32)
        running = jnp.cumsum(counts) - counts
        columns = []
        for i in range(8):
            bit = ((self.mask >> i) & 1).astype(jnp.int32)
            running += bit
            columns.append(running * bit)
        return jnp.stack(columns, axis=-1).reshape(-1)[: self.size]

    @jax.jit
    def dense(self) -> jax.Array:
        if self.mask.ndim > 1:  # a stack of nodes, as vmap makes
            return jax.vmap(BitmaskTensor.dense)(self)
        return jnp.pad(self.values, (1, 0))[self._ranks()].reshape(self.shape)

    def nbits(self) -> int:
        return self.mask.size * 8 + _bits_of(self.values)

    @jax.jit
    def encode(self, x: jax.Array) -> "BitmaskTensor":
        """The values of ``x`` where the mask is set: what was pruned stays pruned."""
        table = jnp.zeros(self.values.size + 1, self.dtype)
        table = table.at[self._ranks()].set(x.reshape(-1).astype(self.dtype))
        return dataclasses.replace(self, values=table[1:])

    def describe(self) -> str:
        return f"bitmask, {self.values.shape[-1]} of {self.size} stored"


def pack_nonzero(x: jax.Array) -> BitmaskTensor:
    """Stores the nonzeros of ``x`` and a bit for each entry, without loss.

    Args:
      x: float[*shape], concrete: the number of nonzeros is a shape, so not under jit.

    Returns:
      A `BitmaskTensor` whose ``dense`` equals ``x`` bit for bit (-0.0 becomes 0.0).

    Raises:
      ValueError: ``x`` is traced.
      TypeError: ``x`` is not floating point.

    >>> small = pack_nonzero(jnp.array([[0.0, 1.5, 0.0], [-2.0, 0.0, 0.0]]))
    >>> small.values, small.nbits()
    (Array([ 1.5, -2. ], dtype=float32), 72)
    """
    x = _check.floating("pack_nonzero", x)
    if not _check.is_concrete(x):
        raise ValueError(
            f"pack_nonzero needs the values of {_check.describe(x)}, which are not "
            "known under jit: their number of nonzeros is a shape. Call it outside jit."
        )
    flat = np.asarray(x).reshape(-1)
    kept = flat != 0
    mask = packing.pack(jnp.asarray(kept), bits=1)
    return BitmaskTensor(mask, jnp.asarray(flat[kept]), x.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NMTensor(CompressedArray):
    """``n`` values for every ``m`` entries, and a code for where in the group they are.

    The code is the rank of the places among the C(m, n) choices in lexicographic order:
    of 2:4 it is 0 for places 0 and 1, 5 for 2 and 3.

    Attributes:
      values: float[channels, groups, n], in the order of their places; its dtype is the
        dtype of `dense`. Trainable.
      codes: uint8[packed], codes of ``bits`` bits in [channels, groups] order; see
        `bits.pack`.
      bits: width of a code (static).
      shape: shape of `dense` (static).
      along: axes that are grouped, as one lane in C order, not negative (static). The
        other axes are the channels. The last group of a lane is padded with zeros.
      n: values of a group (static).
      m: entries of a group (static).
    """

    values: jax.Array
    codes: jax.Array
    bits: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    along: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def _codes(self) -> jax.Array:
        """uint[channels, groups]"""
        channels, groups, _ = self.values.shape
        flat = packing.unpack(self.codes, self.bits, channels * groups)
        return flat.reshape(channels, groups)

    @jax.jit
    def dense(self) -> jax.Array:
        if self.codes.ndim > 1:  # a stack of nodes, as vmap makes
            return jax.vmap(NMTensor.dense)(self)
        places = jnp.asarray(_places(self.n, self.m))[self._codes()]
        lanes = jnp.zeros((*self.values.shape[:2], self.m), self.dtype)
        # As fast as a copy, where a gather takes twice that.
        place = np.arange(self.m, dtype=np.uint8).reshape(1, 1, self.m)
        for i in range(self.n):
            here = places[..., i : i + 1] == place
            lanes = jnp.where(here, self.values[..., i : i + 1], lanes)
        return _from_groups(lanes, self.shape, self.along)

    def nbits(self) -> int:
        return self.codes.size * 8 + _bits_of(self.values)

    @jax.jit
    def encode(self, x: jax.Array) -> "NMTensor":
        """The values of ``x`` at the same places: what was pruned stays pruned."""
        places = jnp.asarray(_places(self.n, self.m))[self._codes()].astype(jnp.int32)
        groups = _to_groups(x.astype(self.dtype), self.along, self.m)
        new = jnp.take_along_axis(groups, places, axis=-1)
        # A value in the padding has no entry in x: it stays.
        start = self.m * np.arange(groups.shape[1], dtype=np.int32).reshape(1, -1, 1)
        inside = start + places < math.prod(self.shape[a] for a in self.along)
        return dataclasses.replace(self, values=jnp.where(inside, new, self.values))

    def describe(self) -> str:
        axes = ",".join(map(str, self.along))
        return f"{self.n}:{self.m}" + (f" along {axes}" if axes else "")


def pack_nm(
    x: jax.Array, n: int, m: int, *, along: int | tuple[int, ...] = -2
) -> NMTensor:
    """Stores an array with at most ``n`` nonzeros in every ``m``, without loss.

    The pattern is that of Mishra et al., "Accelerating Sparse Deep Neural Networks",
    arXiv:2104.08378, who spend two bits on every value. Here a group has one code among
    C(m, n): 3 bits for 2:4, and 2.58 in a coded file if all patterns are as frequent.

    Args:
      x: float[*shape].
      n: values that are stored for each group, ``0 < n <= m``.
      m: group length, 1 to 16. It need not divide the length of a lane: the last group
        may be shorter.
      along: the axis that is grouped, as in `nm_mask`, or axes that are one lane in C
        order: ``(0, 1, 2)`` is the contraction of a convolution (h, w, in, out).

    Returns:
      An `NMTensor` whose ``dense`` equals ``x`` bit for bit (-0.0 may become 0.0). A
      group with fewer nonzeros stores zeros at its first other places. Under jit, where
      values are not checked, a group with more keeps its first ``n``.

    Raises:
      ValueError: a group of a concrete ``x`` has more than ``n`` nonzeros, or ``n``,
        ``m`` or ``along`` is out of range.
      TypeError: ``x`` is not floating point.

    >>> small = pack_nm(jnp.array([[0.0, 5.0, 0.0, 7.0, 0.0, 3.0]]), 2, 4, along=-1)
    >>> small.values, small.nbits()  # one code of 3 bits for each of 2 groups
    (Array([[[5., 7.],
             [0., 3.]]], dtype=float32), 136)
    """
    x = _check.floating("pack_nm", x)
    _check.integer_within("pack_nm", "m", m, 1, LONGEST)
    _check.integer_within("pack_nm", "n", n, 1, m)
    axes = _grouped_axes(x, along)
    if _check.is_concrete(x):
        _check_groups(x, n, m, axes)
    return _packed_nm(x, n, m, axes)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _packed_nm(x: jax.Array, n: int, m: int, along: tuple[int, ...]) -> NMTensor:
    groups = _to_groups(x, along, m)
    filled = _is_nonzero(groups)
    # Nonzeros in order, then the others in order.
    first = jnp.cumsum(filled, axis=-1, dtype=jnp.int32)
    then = jnp.cumsum(~filled, axis=-1, dtype=jnp.int32) + first[..., -1:]
    chosen = jnp.where(filled, first, then) <= n
    power = (1 << np.arange(m, dtype=np.int32)).reshape(1, 1, m)
    patterns = jnp.sum(jnp.where(chosen, power, 0), axis=-1, dtype=jnp.int32)
    places = _places(n, m)
    ranks = np.zeros(2**m, np.int32)
    ranks[np.sum(1 << places.astype(np.int32), axis=1)] = np.arange(len(places))
    codes = jnp.asarray(ranks)[patterns]
    at = jnp.asarray(places)[codes].astype(jnp.int32)
    values = jnp.take_along_axis(groups, at, axis=-1)
    bits = max(1, (len(places) - 1).bit_length())
    return NMTensor(
        values, packing.pack(codes.reshape(-1), bits), bits, x.shape, along, n, m
    )


def _places(n: int, m: int) -> np.ndarray:
    """uint8[C(m, n), n]: the places that each code stands for."""
    return np.array(list(itertools.combinations(range(m), n)), np.uint8)


def _is_nonzero(x: jax.Array) -> jax.Array:
    """Of a subnormal number too, which the processor may take for 0."""
    raw = jax.lax.bitcast_convert_type(x, f"uint{jnp.finfo(x.dtype).bits}")
    return raw << 1 != 0  # without the sign


def _bits_of(x: jax.Array) -> int:
    return x.size * jnp.finfo(x.dtype).bits


def _grouped_axes(x: jax.Array, along: int | tuple[int, ...]) -> tuple[int, ...]:
    """The grouped axes, not negative, sorted."""
    given = along if isinstance(along, Sequence) else (along,)
    axes = sorted(operator.index(a) + (x.ndim if a < 0 else 0) for a in given)
    if any(not 0 <= a < x.ndim for a in axes) or len(set(axes)) != len(axes):
        raise ValueError(
            f"pack_nm needs axes of an array of {x.ndim} dimensions, each once, got "
            f"along={along} for {_check.describe(x)}. Pass another `along`, or leave "
            "this leaf out with `where`."
        )
    return tuple(axes)


def _parted(
    shape: tuple[int, ...], along: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The axes, channels first and then lanes; the shape of each part."""
    kept = tuple(a for a in range(len(shape)) if a not in along)
    return kept + along, tuple(shape[a] for a in kept), tuple(shape[a] for a in along)


def _to_groups(x: jax.Array, along: tuple[int, ...], m: int) -> jax.Array:
    """[*shape] -> [channels, groups, m], the tail of each lane padded with zeros."""
    order, channels, lane = _parted(x.shape, along)
    lanes = x.transpose(order).reshape(math.prod(channels), math.prod(lane))
    lanes = jnp.pad(lanes, [(0, 0), (0, -lanes.shape[1] % m)])
    return lanes.reshape(lanes.shape[0], lanes.shape[1] // m, m)


def _from_groups(
    groups: jax.Array, shape: tuple[int, ...], along: tuple[int, ...]
) -> jax.Array:
    """The inverse of `_to_groups`."""
    order, channels, lane = _parted(shape, along)
    lanes = groups.reshape(groups.shape[0], groups.shape[1] * groups.shape[2])
    lanes = lanes[:, : math.prod(lane)].reshape(channels + lane)
    return lanes.transpose(np.argsort(order))


def _check_groups(x: jax.Array, n: int, m: int, along: tuple[int, ...]) -> None:
    """Raises if a group has more than ``n`` nonzeros."""
    with jax.ensure_compile_time_eval():
        counts = np.asarray(_nonzeros(x, along, m))
    full = np.argwhere(counts > n)
    if not full.size:
        return
    channel, group = full[0]
    order, channels, lane = _parted(x.shape, along)
    start = *np.unravel_index(channel, channels), *np.unravel_index(group * m, lane)
    index = tuple(int(start[order.index(a)]) for a in range(x.ndim))
    raise ValueError(
        f"pack_nm needs at most n={n} nonzeros in every m={m} entries, but the group "
        f"of {_check.describe(x)} along {along} that begins at index {index} has "
        f"{counts[channel, group]} ({len(full)} such of {counts.size}). Prune with "
        "`nm_mask` first, or pass another `along`."
    )


@partial(jax.jit, static_argnums=(1, 2))
def _nonzeros(x: jax.Array, along: tuple[int, ...], m: int) -> jax.Array:
    """int32[channels, groups]"""
    return jnp.sum(_is_nonzero(_to_groups(x, along, m)), axis=-1, dtype=jnp.int32)
