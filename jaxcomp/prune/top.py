"""Exactly the asked number of the lowest scores, without sorting.

A sort of 22 million scores takes 14 seconds with XLA on a CPU; histograms over the bits
of the scores take a quarter of one and give the same answer. Ties go by position, so
that a count is exact whatever the values are.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check


NARROW = (11, 11, 10)  # widths of the digits of 32 bits
WIDE = (16, 16)  # one histogram less, each of 32 times the size
ROW = 1024


def zeros_of(sparsity: Any, size: int) -> Any:
    """How many of ``size`` entries a sparsity removes, rounded half to even.

    Args:
      sparsity: fraction in [0, 1): a number, taken as the decimal that it prints as, or
        a traced float32[], taken to 2**-24.
      size: entries, fewer than 2**31.

    Returns:
      int, or int32[] if ``sparsity`` is a JAX array: the exact product in integers.

    >>> zeros_of(0.35, 90)  # 31.5; the product of floats is 31.499999999999996
    32
    """
    if not isinstance(sparsity, jax.Array):
        return round(Fraction(str(sparsity)) * size)
    # m / 2**24 times size, in 32-bit integers: size = 2**16 * high + low.
    m = jnp.round(sparsity.astype(jnp.float32) * 2**24).astype(jnp.uint32)
    high, low = np.uint32(size >> 16), np.uint32(size & 0xFFFF)
    # m * low and m * high have up to 40 bits; split m into 12 and 12.
    m1, m0 = m >> 12, m & 0xFFF
    upper = m1 * high  # weight 2**28
    middle = m0 * high  # weight 2**16
    third = m1 * low  # weight 2**12
    lower = m0 * low  # weight 1
    # The product, as whole * 2**24 + rest, carrying 2**12 at a time.
    carry = (lower >> 12) + (third & 0xFFF) + ((middle & 0xFF) << 4)
    rest = (lower & 0xFFF) | ((carry & 0xFFF) << 12)
    whole = (upper << 4) + (middle >> 8) + (third >> 12) + (carry >> 12)
    half = np.uint32(2**23)
    up = (rest > half) | ((rest == half) & (whole & 1 == 1))
    return whole.astype(jnp.int32) + up.astype(jnp.int32)


def _ordered(scores: jax.Array) -> jax.Array:
    """uint32 keys in the order of the scores; -0.0 and 0.0 are one key."""
    raw = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    sign = np.uint32(1 << 31)
    raw = jnp.where(raw == sign, np.uint32(0), raw)
    return jnp.where(raw & sign != 0, ~raw, raw | sign)


def _reach(counts: jax.Array, begin: Any, target: jax.Array) -> tuple[Any, Any]:
    """Where sums from some places on reach a target, and the sums before that."""
    running = jnp.cumsum(counts)
    base = running[begin] - counts[begin]
    index = jnp.searchsorted(running, base + target)
    return index, running[index] - counts[index] - base


def _thresholds(keys: jax.Array, owner: Any, ranks: Any) -> tuple[Any, Any, Any]:
    """Each owner's ``rank``-th key, how many are less and how many are the same."""
    widths = WIDE if ranks.size * 2 ** WIDE[0] <= keys.size else NARROW
    shifts = [sum(widths[i + 1 :]) for i in range(len(widths))]
    bins = 2 ** widths[0]
    begin = np.arange(ranks.size) * bins

    def narrow(i: Any, found: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        prefix, less, _ = found
        shift, width = (jnp.asarray(x, jnp.uint32)[i] for x in (shifts, widths))
        high = keys >> shift
        # In two shifts, as one by all 32 bits is undefined.
        inside = high >> width == prefix[owner]
        digit = (high & ((np.uint32(1) << width) - 1)).astype(jnp.int32)
        place = jnp.where(inside, digit + owner * bins, ranks.size * bins)
        empty = jnp.zeros(ranks.size * bins, jnp.int32)
        histogram = empty.at[place].add(1, mode="drop")
        index, before = _reach(histogram, begin, ranks - less)
        digits = (index - begin).astype(jnp.uint32)
        return (prefix << width) | digits, less + before, histogram[index]

    # A loop, so that the digits share what is compiled for one.
    none = jnp.zeros(ranks.shape, jnp.int32)
    start = none.astype(jnp.uint32), none, none
    return jax.lax.fori_loop(0, len(widths), narrow, start)


@jax.jit
def top_masks(scores: Sequence[jax.Array], zeros: Any) -> list[jax.Array]:
    """Masks over several leaves that remove exactly ``zeros`` entries.

    The leaves are laid end to end in one matrix, each from a new row on, so that the
    search is compiled once and not for every leaf.

    Args:
      scores: float[*shape] each, compared in float32.
      zeros: int32[], entries to remove: the lowest scores of all leaves together; or
        int32[leaves], of each leaf by itself. On a tie the earlier entry, in the order
        of the leaves and in C order, is kept.

    Returns:
      bool[*shape] each; False is removed.
    """
    scores = [jnp.asarray(s) for s in scores]
    if not sum(s.size for s in scores):
        return [jnp.ones(s.shape, bool) for s in scores]
    zeros = jnp.asarray(zeros, jnp.int32)
    sizes = np.array([s.size for s in scores])
    heights = -(-sizes // ROW)
    first = np.cumsum(heights) - heights  # the row at which each leaf begins
    pieces = [
        jnp.pad(_ordered(s).reshape(-1), (0, height * ROW - s.size))
        for s, height in zip(scores, heights, strict=True)
    ]
    keys = jnp.concatenate(pieces).reshape(-1, ROW)

    owners = np.arange(sizes.size) * zeros.ndim  # all are 0 if they share one count
    owner = np.repeat(owners, heights)[:, None]
    zeros = zeros.reshape(-1)
    padding = np.bincount(owners, heights * ROW - sizes).astype(np.int32)
    ranks = padding + jnp.maximum(zeros, 1)  # the padding is the least of all keys
    thresholds, less, tied = _thresholds(keys, owner, ranks)
    kept = tied - (zeros + padding - less)  # of the entries that tie

    def search() -> jax.Array:
        ties = keys == thresholds[owner]
        row, before = _reach(jnp.sum(ties, axis=1, dtype=jnp.int32), begin, kept)
        inside = jnp.cumsum(ties[row].astype(jnp.int32), axis=1)
        column = jnp.sum(inside < (kept - before)[:, None], axis=1, dtype=jnp.int32)
        return row.astype(jnp.int32) * ROW + column

    # The place of the last tie that stays. Most scores differ, and then none does.
    some = (kept > 0) & (kept < tied)
    begin = first[: zeros.size]
    last = jax.lax.cond(jnp.any(some), search, lambda: jnp.zeros_like(kept))
    last = jnp.where(some, last, jnp.where(kept > 0, np.int32(2**31 - 1), -1))

    def keep(score: jax.Array, own: Any, begin: Any) -> jax.Array:
        key = _ordered(score).reshape(-1)
        early = begin + jnp.arange(key.size, dtype=jnp.int32) <= last[own]
        mask = (key > thresholds[own]) | ((key == thresholds[own]) & early)
        return mask.reshape(score.shape)

    return list(map(keep, scores, owners, first * ROW))


def top_mask(scores: jax.Array, sparsity: Any) -> jax.Array:
    """Keeps the best of ``scores`` so that exactly ``sparsity`` of them go.

    Args:
      scores: float[*shape]; higher is more worth keeping.
      sparsity: fraction to remove, in [0, 1); may be traced.

    Returns:
      bool[*shape] with exactly ``round(sparsity * size)`` False, half to even. On a tie
      the lower index is kept.

    Raises:
      ValueError: ``sparsity`` is out of range.

    >>> top_mask(jnp.array([1.0, 3.0, 1.0, 2.0]), 0.5)
    Array([False,  True, False,  True], dtype=bool)
    >>> top_mask(jnp.zeros(4), 0.25)
    Array([ True,  True,  True, False], dtype=bool)
    """
    check_sparsity("top_mask", sparsity)
    scores = jnp.asarray(scores)
    return top_masks([scores], zeros_of(sparsity, scores.size))[0]


def check_sparsity(caller: str, sparsity: Any) -> None:
    """Raises unless a sparsity is one number and, if it is not traced, in [0, 1)."""
    if isinstance(sparsity, Mapping):
        raise ValueError(
            f"{caller} needs one sparsity for all leaves, got one for each path. Use "
            "budget=leaf_budget, or leave leaves out with `where`."
        )
    known = _check.number(caller, "sparsity", sparsity)
    if known is not None and not 0 <= known < 1:
        raise ValueError(
            f"{caller} needs 0 <= sparsity < 1, the fraction of zeros, got {sparsity}."
        )
