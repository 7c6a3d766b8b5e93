"""Where a stream of symbols changes, so that a new table pays."""

import numpy as np


_FRACTION = 16  # bits of a logarithm behind the point
_LOG2 = np.rint(np.log2(1 + (np.arange(4096) + 0.5) / 4096) * 2**_FRACTION).astype(int)


def cuts(counts: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Where blocks begin, how long they are, and their histograms.

    Blocks are joined two by two as long as one takes no more than both.

    Args:
      counts: int[parts, symbols], a histogram of each part; a power of two of them.
    """
    blocks = [[(i, 1, row)] for i, row in enumerate(counts)]
    costs, level = _cost(counts), counts
    while len(blocks) > 1:
        level = level[::2] + level[1::2]
        apart, whole = costs[::2] + costs[1::2], _cost(level)
        costs = np.minimum(apart, whole)
        length = len(counts) // len(level)
        blocks = [
            [(i * length, length, level[i])]
            if whole[i] <= apart[i]
            else blocks[2 * i] + blocks[2 * i + 1]
            for i in range(len(level))
        ]
    return blocks[0]


def _cost(counts: np.ndarray) -> np.ndarray:
    """About the bits that blocks of such histograms take, times 2**16: int64[blocks].

    In integers, so that all machines cut alike. The logarithm is off by 0.0002 bits.
    """
    kinds, size = np.count_nonzero(counts, axis=1), counts.sum(axis=1)
    coded = _times_log2(size) - _times_log2(counts).sum(axis=1)
    coded += kinds + 8 << _FRACTION + 3  # a table has about a byte for each symbol
    spread = (counts > 0).cumsum(axis=1)
    first = np.count_nonzero(spread == 0, axis=1)
    last = np.count_nonzero(spread < spread[:, -1:], axis=1)
    width = np.frexp(np.maximum(last - first, 0))[1]  # bits of the largest
    return np.where(kinds > 1, np.minimum(coded, size * width << _FRACTION), 0)


def _times_log2(x: np.ndarray) -> np.ndarray:
    """x log2(x), times 2**16, and 0 where x is; int64 like ``x``, each below 2**23."""
    mantissa, exponent = np.frexp(x.astype(np.float64))  # exact
    rest = np.maximum(mantissa * 8192 - 4096, 0).astype(np.int64)
    return x * ((exponent.astype(np.int64) - 1 << _FRACTION) + _LOG2[rest])
