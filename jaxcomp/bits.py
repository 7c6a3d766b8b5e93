"""Codes of 1 to 16 bits, packed without gaps into bytes.

XLA stores a sub-byte dtype in whole bytes on some backends and is slow to convert it on
others, so codes live in uint8. The layout is a little-endian bit stream: code ``i``
takes the bits ``i * bits`` to ``(i + 1) * bits - 1``, bit 0 being the lowest of byte 0.
"""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp

from jaxcomp import _check


WIDEST = 16


def _period(bits: int) -> tuple[int, int]:
    """The shortest run of codes that ends on a byte: (codes, bytes)."""
    span = math.lcm(bits, 8)
    return span // bits, span // 8


def _dtype(bits: int) -> type:
    return jnp.uint8 if bits <= 8 else jnp.uint16


def nbytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take.

    >>> nbytes(10, 3)
    4
    """
    return -(-count * bits // 8)


def _shift(x: jax.Array, by: int) -> jax.Array:
    return x << by if by >= 0 else x >> -by


def _pad(x: jax.Array, multiple: int) -> jax.Array:
    """Zeros behind the last axis, up to a multiple; then (..., periods, multiple)."""
    short = -x.shape[-1] % multiple
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // multiple, multiple)


def _joined(columns: list[jax.Array]) -> jax.Array:
    """Columns (..., periods), one beside the other, as one axis."""
    *lead, periods = columns[0].shape
    return jnp.stack(columns, axis=-1).reshape(*lead, periods * len(columns))


@partial(jax.jit, static_argnames="bits")
def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs codes along the last axis.

    Args:
      codes: integers[..., n], each in ``[0, 2**bits)``.
      bits: width of a code, 1 to 16 bits.

    Returns:
      uint8[..., ceil(n * bits / 8)]; unused bits of the last byte are 0.

    >>> pack(jnp.array([1, 2, 3]), bits=4).tolist()
    [33, 3]
    """
    _check.integer_within("pack", "bits", bits, 1, WIDEST)
    count = codes.shape[-1]
    per, width = _period(bits)
    runs = _pad(codes.astype(_dtype(bits)), per)
    if width == 1:  # whole codes in a byte: this is twice as fast
        return functools.reduce(
            jnp.bitwise_or, [runs[..., i] << i * bits for i in range(per)]
        )
    columns = []
    for byte in range(width):
        value = jnp.zeros(runs.shape[:-1], runs.dtype)
        for i in range(per):
            offset = i * bits - 8 * byte  # where code i starts, seen from this byte
            if -bits < offset < 8:
                value |= _shift(runs[..., i], offset)
        columns.append((value & 0xFF).astype(jnp.uint8))
    stream = _joined(columns)
    return stream[..., : nbytes(count, bits)]


@partial(jax.jit, static_argnames=("bits", "count"))
def unpack(packed: jax.Array, bits: int, count: int) -> jax.Array:
    """The inverse of `pack`.

    Args:
      packed: uint8[..., ceil(count * bits / 8)].
      bits: width of a code, 1 to 16 bits.
      count: codes along the last axis.

    Returns:
      uint8[..., count], or uint16 where a code is wider than 8 bits.

    >>> unpack(jnp.array([33, 3], jnp.uint8), bits=4, count=3).tolist()
    [1, 2, 3]
    """
    _check.integer_within("unpack", "bits", bits, 1, WIDEST)
    if packed.shape[-1] != nbytes(count, bits):
        raise ValueError(
            f"unpack needs {nbytes(count, bits)} bytes for {count} codes of {bits} "
            f"bits, got {_check.describe(packed)}."
        )
    per, width = _period(bits)
    if bits in (1, 2, 4):  # each code by one shift: thrice as fast
        shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
        shifts = jnp.expand_dims(shifts, tuple(range(packed.ndim)))
        codes = packed[..., None] >> shifts & (2**bits - 1)
        return codes.reshape(*packed.shape[:-1], packed.shape[-1] * per)[..., :count]
    dtype = _dtype(bits)
    runs = _pad(packed, width).astype(dtype)
    columns = []
    for i in range(per):
        value = jnp.zeros(runs.shape[:-1], dtype)
        for byte in range(width):
            offset = i * bits - 8 * byte
            if -bits < offset < 8:
                value |= _shift(runs[..., byte], -offset)
        columns.append(value & (2**bits - 1))
    codes = _joined(columns)
    return codes[..., :count]
