"""The entry of a rank, found by counting: one compare and one sum for each bit.

Every pass looks at all leaves where and as they are, so that what is spread over
devices stays there: only counts travel. It compiles to little, too.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def places_of(shape: tuple[int, ...], first: int) -> jax.Array:
    """uint32[*shape]: positions in C order, from ``first`` on."""
    place = jnp.full(shape, first, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]))
        place += stride * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return place


def ranked_by_counting(
    keys: Sequence[jax.Array], first: np.ndarray, ranks: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each owner's ``rank``-th lowest entry; of equal keys the last is the lowest.

    Args:
      keys: uint32[*shape] of each leaf.
      first: the place of the first entry of each leaf.
      ranks: int32[owners], one for all leaves together, or one for each.

    Returns:
      (key, place): uint32[owners]. The lowest are those of a lower key, and those of
      this key from this place on.
    """

    owners = np.arange(len(keys)) * (ranks.size > 1)
    pairs = zip(keys, first, strict=True)
    # Of equal keys the last is the lowest: places are looked at upside down.
    places = [~places_of(leaf.shape, int(start)) for leaf, start in pairs]

    def counts(by_key: Any, key: jax.Array, low: jax.Array) -> jax.Array:
        """int32[owners]: entries below ``low`` by key, or by place among one key."""
        found = []
        for leaf, place, own in zip(keys, places, owners, strict=True):
            looked = jnp.where(by_key, leaf, place) < low[own]
            taken = looked & (by_key | (leaf == key[own]))
            found.append(jnp.sum(taken, dtype=jnp.int32))
        each = jnp.stack(found)
        return each if ranks.size > 1 else jnp.sum(each, dtype=jnp.int32)[None]

    def bit(i: Any, state: Any) -> Any:
        key, low, less, below = state
        by_key = i < 32
        # At the turn from keys to places what was found is the key.
        turns = i == 32
        key, less = jnp.where(turns, low, key), jnp.where(turns, below, less)
        low, below = jnp.where(turns, 0, low), jnp.where(turns, 0, below)
        trial = low | (jnp.uint32(1 << 31) >> (i % 32).astype(jnp.uint32))
        found = counts(by_key, key, trial)
        holds = found < ranks - less  # so the entry of the rank is not below
        low, below = jnp.where(holds, trial, low), jnp.where(holds, found, below)
        return key, low, less, below

    zero = jnp.zeros(ranks.shape, jnp.uint32)
    none = jnp.zeros(ranks.shape, jnp.int32)
    key, low, _, _ = jax.lax.fori_loop(0, 64, bit, (zero, zero, none, none))
    return key, ~low
