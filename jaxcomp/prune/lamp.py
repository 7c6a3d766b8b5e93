"""One threshold for all leaves on scores that know how the rest of a leaf looks."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxcomp.prune.top import check_sparsity, top_masks, zeros_of


# A magnitude is known by its ratio to the largest of its leaf, and that by its exponent
# and the first 10 bits of its mantissa. Bin 0 is a ratio of 1, later bins are smaller.
DROPPED = 13  # bits of a float32 that the bin does not see
BINS = 32 << 10  # 32 octaves
ONE = 0x3F800000  # the bits of 1.0
INFINITY = 0x7F800000
EDGES = ((ONE >> DROPPED) - np.arange(BINS, dtype=np.int32)) << DROPPED
MIDDLES = EDGES + np.int32(1 << (DROPPED - 1))
RATIOS = np.minimum(MIDDLES.view(np.float32), np.float32(1))


def lamp_budget(
    scores: Mapping[str, jax.Array], sparsity: float | jax.Array
) -> dict[str, jax.Array]:
    """One threshold on squares relative to what is larger in the same leaf.

    Lee et al., "Layer-adaptive sparsity for the Magnitude-based Pruning",
    arXiv:2010.07611: the LAMP score of an entry is its square, over the sum of the
    squares of itself and of all larger entries of its leaf. The largest of a leaf
    scores 1, so no leaf goes whole before all others are down to one entry, except
    leaves of zeros. Of equal entries the lower index counts as the larger.

    Where the paper sorts, a histogram is taken here. A magnitude counts as the middle
    of its bin, which is right to 2**-11, so that a LAMP score is right to 0.2%: only
    entries whose score is that near the threshold may be decided otherwise. Magnitudes
    below 2**-32 of the largest of their leaf score 0. Counts, and the order inside a
    leaf, are exact.

    Args:
      scores: path -> float[*shape], not negative: magnitudes, or others that add up in
        squares. Negative ones go before all others.
      sparsity: fraction of all entries to remove, in [0, 1).

    Returns:
      path -> bool[*shape] with exactly ``round(sparsity * total)`` False together. On a
      tie the earlier leaf and the lower index are kept.

    Raises:
      ValueError: ``sparsity`` is out of range, or a mapping: see `leaf_budget`.

    >>> scores = {"a": jnp.array([1.0, 2.0, 3.0]), "b": jnp.array([0.3, 0.2, 0.1])}
    >>> lamp_budget(scores, 0.5)  # 1/14, 4/13 and 1 in both leaves
    {'a': Array([False,  True,  True], dtype=bool),
     'b': Array([ True, False, False], dtype=bool)}
    """
    check_sparsity("lamp_budget", sparsity)
    if not scores:
        return {}
    leaves = [jnp.asarray(score) for score in scores.values()]
    sizes = np.array([math.prod(leaf.shape) for leaf in leaves], np.int32)
    total = int(sizes.sum(dtype=np.int64))
    histograms, counted = zip(*map(_histogram, leaves), strict=True)
    kept = _kept_counts(
        jnp.stack(histograms),
        jnp.stack(counted),
        sizes,
        total - zeros_of(sparsity, total),
    )
    return dict(zip(scores, top_masks(leaves, sizes - kept), strict=True))


@jax.jit
def _histogram(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32[BINS], entries in each bin; int32[], entries that are not negative."""
    sizes = jnp.maximum(scores.astype(jnp.float32), 0)
    largest = jnp.max(sizes, initial=0)
    # The ratio, and not the square of the size, which may overflow.
    ratio = sizes / jnp.where(largest > 0, largest, 1)
    bits = jax.lax.bitcast_convert_type(ratio, jnp.int32)
    place = jnp.clip((ONE >> DROPPED) - (bits >> DROPPED), 0, BINS)
    # Where leaves are spread over devices, each adds up its own and then all do.
    whole = NamedSharding(jax.typeof(place).sharding.mesh, PartitionSpec())
    counts = jnp.zeros(BINS + 1, jnp.int32).at[place].add(1, out_sharding=whole)
    return counts[:BINS], jnp.sum(scores >= 0, dtype=jnp.int32)


@jax.jit
def _kept_counts(
    counts: jax.Array, counted: jax.Array, sizes: jax.Array, kept: Any
) -> jax.Array:
    """int32[leaves] that add up to ``kept``: how many LAMP keeps of each leaf."""
    squares = jnp.asarray(np.square(RATIOS))[None]
    number = counts.astype(jnp.float32)
    mass = number * squares
    above = jnp.cumsum(jnp.pad(mass[:, :-1], ((0, 0), (1, 0))), axis=1)
    # The j-th largest of a bin scores square / (above + j * square), which is at least
    # 1 / reach as long as j <= reach - above / square.
    before = above / squares

    def within(reach: jax.Array) -> jax.Array:
        """Entries of each leaf with a score of at least 1 / reach."""
        room = jax.lax.bitcast_convert_type(reach, jnp.float32) - before
        some = jnp.maximum(room, 0).astype(jnp.int32)
        found = jnp.where(room >= number, counts, some)
        return jnp.sum(found, axis=1, dtype=jnp.int32)

    def halve(_: Any, ends: Any) -> Any:
        (low, less), (high, more) = ends
        middle = low + (high - low) // 2
        found = within(middle)
        enough = jnp.sum(found) >= kept
        return jax.tree.map(
            lambda yes, no: jnp.where(enough, yes, no),
            ((low, less), (middle, found)),
            ((middle, found), (high, more)),
        )

    # Down to two neighbouring floats: one keeps less than is asked, one keeps enough.
    # Their counts are carried along; XLA may round otherwise when it finds them again.
    none, all_binned = jnp.zeros_like(counted), jnp.sum(counts, axis=1, dtype=jnp.int32)
    ends = (jnp.int32(ONE - 1), none), (jnp.int32(INFINITY), all_binned)
    (_, less), (_, more) = jax.lax.fori_loop(0, 31, halve, ends)

    def fill(found: jax.Array, most: jax.Array) -> jax.Array:
        """More of each leaf, up to ``most``, the earlier leaves first."""
        room = most - found
        earlier = jnp.cumsum(room) - room
        return found + jnp.clip(kept - jnp.sum(found) - earlier, 0, room)

    # Ties on the threshold, then scores of 0, then negative ones.
    return fill(fill(fill(less, more), counted), sizes)
