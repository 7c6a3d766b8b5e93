"""The lowest entries of leaves that are spread over devices, by counts alone.

Every pass compares each leaf with a threshold where it lies and adds up what is not
above: of what is on the devices, only sums travel. No leaf is moved or reshaped.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.prune.radix import ordered


@jax.jit
def counted_masks(scores: Sequence[jax.Array], zeros: jax.Array) -> list[jax.Array]:
    """`top.top_masks` by a search, bit by bit, for the last entry that goes.

    Of equal entries that nearer to the end of the leaves is the lower, so that no two
    are alike. 32 passes find the score, and where a tie is cut one more for each bit of
    the number of entries finds the place. XLA is slow to add up on a CPU: on one of
    them this takes four to ten times as long as `radix_masks`.

    Args:
      scores: float[*shape] each, not all without entries, compared in float32.
      zeros: int32[], entries to remove of all leaves together; or int32[leaves].

    Returns:
      bool[*shape] each; False is removed.
    """
    sizes = np.array([score.size for score in scores], int)
    ahead = np.cumsum(sizes[::-1])[::-1]  # entries from the first of a leaf on
    key_bits, place_bits = 32, int(ahead[0]).bit_length()
    bits = key_bits + place_bits
    # What a bit takes from the key and from the distance to the end: one is 0.
    steps = np.zeros((2, bits), np.uint32)
    steps[0, :key_bits] = 2 ** np.arange(key_bits)[::-1]
    steps[1, key_bits:] = 2 ** np.arange(place_bits)[::-1]

    def removed(last: Any) -> list[jax.Array]:
        """Of each leaf the entries up to the last, (key, distance), that goes."""
        # Else XLA would find keys and distances before the loop and keep them all.
        given = scores, jnp.asarray(ahead, jnp.uint32), last
        leaves, ends, last = jax.lax.optimization_barrier(given)
        found = []
        for i, score in enumerate(leaves):
            key, distance = (x[i] if zeros.ndim else x for x in last)
            keys, distances = ordered(score), _distances(score.shape, ends[i])
            found.append((keys < key) | ((keys == key) & (distances <= distance)))
        return found

    def halve(state: Any) -> Any:
        i, last, count = state
        key_step, place_step = jnp.asarray(steps)[:, i]
        lower = last[0] - key_step, last[1] - place_step
        each = jnp.stack([jnp.sum(gone, dtype=jnp.int32) for gone in removed(lower)])
        fewer = each if zeros.ndim else jnp.sum(each)
        return i + 1, *jax.tree.map(
            lambda yes, no: jnp.where(fewer >= zeros, yes, no),
            (lower, fewer),
            (last, count),
        )

    def unfinished(state: Any) -> jax.Array:
        i, _, count = state
        return (i < bits) & jnp.any(count != zeros)

    # From the highest of all: the bits whose turn has not come yet are set.
    highest = [jnp.full(zeros.shape, x, jnp.uint32) for x in steps.sum(1, np.uint32)]
    all_gone = jnp.asarray(sizes if zeros.ndim else ahead[0], jnp.int32)
    start = jnp.int32(0), tuple(highest), all_gone
    _, last, _ = jax.lax.while_loop(unfinished, halve, start)
    return [~gone for gone in removed(last)]


def _distances(shape: tuple[int, ...], ahead: jax.Array) -> jax.Array:
    """uint32[*shape]: how far an entry is from the end, at least 1, in C order."""
    found = jnp.full(shape, ahead)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]))
        found -= jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return found
