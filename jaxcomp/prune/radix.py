"""The lowest entries of leaves that lie on one device, by histograms.

A histogram over some bits of the scores says in which bin the wanted one is; the next
one looks into that bin. The leaves are read in chunks that stay in the cache of a CPU.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


NARROW = (21, 10, 0)  # the lowest bit of each digit of 32 bits
WIDE = (16, 0)  # one histogram less, each of 32 times the size
BLOCK = 256  # bins; divides 2**11
ROW = 1024
HEIGHT = 256  # rows of a chunk, at most


def ordered(scores: jax.Array) -> jax.Array:
    """uint32 keys in the order of the scores; -0.0 and 0.0 are one key."""
    raw = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    sign = np.uint32(1 << 31)
    raw = jnp.where(raw == sign, np.uint32(0), raw)
    return jnp.where(raw & sign != 0, ~raw, raw | sign)


class _Chunks(NamedTuple):
    """Several leaves in chunks of as many rows each, a row being `ROW` entries."""

    read: Callable[[Any], jax.Array]  # chunk -> float32[rows, ROW]
    owner: jax.Array  # int32[chunks, rows], whose count a row is for
    begin: jax.Array  # uint32[chunks, rows], its place in the leaves end to end
    end: jax.Array  # uint32[chunks, rows], the place where its leaf ends


def _chunks(scores: list[jax.Array], owners: np.ndarray, first: np.ndarray) -> _Chunks:
    """Reads whole chunks of a leaf where they are; what is left is laid end to end.

    What is made of a chunk stays in the cache of a CPU: a histogram of 10 M entries at
    once takes five times as long, and a copy of them twice as long as the histogram.
    """
    sizes = np.array([score.size for score in scores])
    rows = min(HEIGHT, int(np.sum(-(-sizes // ROW))))
    size = rows * ROW
    cuts = sizes // size * size  # where the whole chunks of a leaf end
    flat = [score.reshape(-1) for score in scores]
    sources = [leaf for leaf, cut in zip(flat, cuts, strict=True) if cut]
    chunks = [cut // size for cut in cuts if cut]

    # Where a row begins in its leaf: those of whole chunks, then what is left.
    offsets = [np.arange(0, cut, ROW) for cut in cuts]
    offsets += [np.arange(*ends, ROW) for ends in zip(cuts, sizes, strict=True)]
    index = np.repeat(np.tile(np.arange(sizes.size), 2), list(map(len, offsets)))
    begin = first[index] + np.concatenate(offsets)
    spare = -index.size % rows  # rows of nothing: they end before they begin

    if left := index.size - sum(chunks) * rows:
        rests = [
            jnp.pad(leaf[cut:].astype(jnp.float32), (0, -leaf.size % ROW))
            for leaf, cut in zip(flat, cuts, strict=True)
        ]
        sources.append(jnp.concatenate([*rests, jnp.zeros(spare * ROW, jnp.float32)]))
        chunks.append((left + spare) // rows)
    source = jnp.asarray(np.repeat(np.arange(len(chunks)), chunks), jnp.int32)
    starts = np.concatenate([np.arange(n) * size for n in chunks])
    start = jnp.asarray(starts, jnp.int32)

    def reader(leaf: jax.Array) -> Callable[[Any], jax.Array]:
        def read(start: Any) -> jax.Array:
            piece = jax.lax.dynamic_slice(leaf, (start,), (size,))
            return piece.astype(jnp.float32).reshape(rows, ROW)

        return read

    readers = list(map(reader, sources))

    def read(chunk: Any) -> jax.Array:
        return jax.lax.switch(source[chunk], readers, start[chunk])

    def table(values: np.ndarray, dtype: Any) -> jax.Array:
        return jnp.asarray(np.pad(values, (0, spare)).reshape(-1, rows), dtype)

    return _Chunks(
        read,
        table(owners[index], jnp.int32),
        table(begin, jnp.uint32),
        table((first + sizes)[index], jnp.uint32),
    )


def _reach(counts: jax.Array, target: jax.Array) -> tuple[Any, Any]:
    """Where running sums reach a target, and the sum before that."""
    running = jnp.cumsum(counts)
    index = jnp.sum(running < target, dtype=jnp.int32)
    return index, running[index] - counts[index]


def _reach_in_blocks(counts: jax.Array, target: jax.Array) -> tuple[Any, Any, Any]:
    """`_reach`, and the count there. XLA's cumsum of all would be 20 times slower."""
    blocks = counts.reshape(-1, BLOCK)
    sums = jnp.sum(blocks, axis=1, dtype=jnp.int32)
    block, before = _reach(sums, target)
    index, within = _reach(blocks[block], target - before)
    return block * BLOCK + index, before + within, blocks[block, index]


def _ranked(chunks: _Chunks, ranks: jax.Array) -> tuple[Any, Any]:
    """Each owner's ``rank``-th lowest entry: its key, and its place.

    Of those with the same key the last is the lowest. If all of them are among the
    ``rank`` lowest the place is 0, and need not be searched for.
    """
    owners = ranks.size
    shifts = WIDE if owners * 2**16 <= chunks.owner.size * ROW else NARROW
    bins = 2 ** (32 - shifts[0])
    spans = [2**32 - 1, *(2**shift - 1 for shift in shifts[:-1])]
    digits = [jnp.asarray(np.array(x, np.uint32)) for x in (shifts, spans)]
    none = jnp.zeros(owners, jnp.int32)

    def search(state: tuple[Any, ...]) -> tuple[Any, ...]:
        turn, key, _, less, tied = state
        by_key = turn == 0  # and then by place

        def narrow(i: Any, found: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            low, less, _ = found
            shift, span = (x[i] for x in digits)

            def add(chunk: Any, histogram: jax.Array) -> jax.Array:
                # With the three in one table XLA's loop is four times slower.
                own, begin, end = (table[chunk][:, None] for table in chunks[1:])
                keys = ordered(chunks.read(chunk))
                places = begin + jnp.arange(ROW, dtype=jnp.uint32)[None]
                over = jnp.where(by_key, keys, ~places) - low[own]
                inside = (over <= span) & (by_key | (keys == key[own]))
                digit = (over >> shift).astype(jnp.int32) + own * bins
                at = jnp.where(inside & (places < end), digit, owners * bins)
                return histogram.at[at].add(1, mode="drop")

            empty = jnp.zeros(owners * bins, jnp.int32)
            histogram = jax.lax.fori_loop(0, chunks.owner.shape[0], add, empty)
            counts = histogram.reshape(owners, bins)
            digit, before, tied = jax.vmap(_reach_in_blocks)(counts, ranks - less)
            return low + (digit.astype(jnp.uint32) << shift), less + before, tied

        # Loops, so that the digits share what is compiled for one.
        start = none.astype(jnp.uint32), less, tied
        low, less, tied = jax.lax.fori_loop(0, len(shifts), narrow, start)
        key, place = jnp.where(by_key, low, key), jnp.where(by_key, 0, ~low)
        return turn + 1, key, place, less, tied

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        turn, _, _, less, tied = state
        return (turn == 0) | ((turn == 1) & jnp.any(ranks - less < tied))

    zero = none.astype(jnp.uint32)
    start = jnp.zeros([], jnp.int32), zero, zero, none, none
    _, key, place, _, _ = jax.lax.while_loop(unfinished, search, start)
    return key, place


@jax.jit
def radix_masks(scores: Sequence[jax.Array], zeros: jax.Array) -> list[jax.Array]:
    """`top.top_masks` in one loop over chunks of the leaves, laid end to end.

    The loop is compiled once and not for every leaf. Leaves that are spread over
    devices would be gathered: see `counting.counted_masks`.

    Args:
      scores: float[*shape] each, with entries, compared in float32.
      zeros: int32[], entries to remove of all leaves together; or int32[leaves].

    Returns:
      bool[*shape] each; False is removed.
    """
    sizes = np.array([s.size for s in scores], int)
    first = np.cumsum(sizes) - sizes
    owners = np.arange(sizes.size) * zeros.ndim  # all are 0 if they share one count
    chunks = _chunks(list(scores), owners, first)
    threshold, gone = _ranked(chunks, zeros.reshape(-1))

    def keep(score: jax.Array, own: Any, begin: Any) -> jax.Array:
        key = ordered(score).reshape(-1)
        place = np.uint32(begin) + jnp.arange(key.size, dtype=jnp.uint32)
        early = (key == threshold[own]) & (place < gone[own])
        return ((key > threshold[own]) | early).reshape(score.shape)

    return list(map(keep, scores, owners, first))
