"""Exactly the asked number of the lowest scores, without sorting.

A sort of 22 million scores takes 14 seconds with XLA on a CPU; histograms over the bits
of the scores take a tenth of one and give the same answer. Where the scores lie on
several devices they are counted instead. Ties go by position, so that a count is exact
whatever the values are.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp.prune.counting import counted_masks
from jaxcomp.prune.radix import radix_masks


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


FEW = (4, 2**16)  # leaves and entries


def top_masks(scores: Sequence[jax.Array], zeros: Any) -> list[jax.Array]:
    """Masks over several leaves that remove exactly ``zeros`` entries.

    Leaves on several devices are counted where they are, without gathering them; so are
    traced ones if there are several devices, few entries, which compiles sooner, and
    all on an accelerator. Others are searched by histograms, which takes a tenth of the
    time on a CPU. The masks are the same bit for bit.

    Args:
      scores: float[*shape] each, compared in float32.
      zeros: int32[], entries to remove: the lowest scores of all leaves together; or
        int32[leaves], of each leaf by itself. On a tie the earlier entry, in the order
        of the leaves and in C order, is kept.

    Returns:
      bool[*shape] each; False is removed. On several devices a mask is spread like its
      leaf.
    """
    scores = [jnp.asarray(s) for s in scores]
    if not any(s.size for s in scores):
        return [jnp.ones(s.shape, bool) for s in scores]
    are_few = len(scores) <= FEW[0] and sum(s.size for s in scores) < FEW[1]
    is_counted = are_few or any(map(_is_spread, scores))
    way = counted_masks if is_counted else radix_masks
    return way(scores, jnp.asarray(zeros, jnp.int32))


def _is_spread(leaf: jax.Array) -> bool:
    """Whether a leaf lies, or may lie if it is traced, on several devices."""
    if any(jax.typeof(leaf).sharding.spec):  # axes of an explicit mesh
        return True
    if jax.default_backend() != "cpu":  # which chunks in turn would leave idle
        return True
    if isinstance(leaf, jax.core.Tracer):
        return jax.device_count() > 1
    return len(leaf.sharding.device_set) > 1


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
