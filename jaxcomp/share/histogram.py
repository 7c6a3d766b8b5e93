"""The values of a leaf as few points with mass, found in pieces and without a sort.

Read as an unsigned integer, a float keeps its order, and its leading bits are a bin of
constant relative width. A bin stands for its values by their mean and their number:
what is lost is only that no cluster can end inside it.
"""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np


PIECE = 2**18  # values at a time: enough to hide the cost of a piece, and 2 MB a copy
# Sign, exponent and 11 bits of the fraction: relative width 2**-11. At 256 clusters of
# Gaussians this costs 5e-5 of the squared error; with 2 bits more it were a sixteenth.
_LEADING = 20
_LOSS = 5e-4  # squared width of bins to that of clusters: costs a fifth of it
_MANY = 2**19  # values of 32 bits: fewer are sorted as fast


def pieces(size: int) -> Iterator[slice]:
    """Slices that cover ``size`` values, `PIECE` at a time."""
    return (slice(i, min(i + PIECE, size)) for i in range(0, size, PIECE))


def order(values: np.ndarray) -> np.ndarray:
    """Unsigned integers of the same width that compare as the floats do.

    Neighbouring floats are neighbouring integers; -0.0 is next below 0.0.

    >>> np.diff(order(np.array([-1e-45, -0.0, 0.0, 1e-45], np.float32))).tolist()
    [1, 1, 1]
    """
    width = values.dtype.itemsize
    bits = values.view(f"u{width}")
    sign = bits.dtype.type(1 << (8 * width - 1))
    negative = (values.view(f"i{width}") >> (8 * width - 1)).view(bits.dtype)
    return bits ^ (negative | sign)


def dropped_bits(values: np.ndarray) -> int | None:
    """Trailing bits of `order` that `histogram` ignores; None if it sorts instead.

    It sorts what has few values, and float64, of which 20 bits are too coarse. Of 16
    bits it ignores none.
    """
    width = 8 * values.dtype.itemsize
    if width == 64 or values.size < min(2**width, _MANY):
        return None
    return max(0, width - _LEADING)


def histogram(
    values: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Points in increasing order, and the mass of each, that stand for ``values``.

    The distinct values themselves for 16 bits, for float64 and below 2**19 values. Else
    the means of bins of relative width 2**-11; values of either sign and zeros are
    apart, but zeros share a bin with what is positive and below 6e-42.

    Args:
      values: float[n], finite.
      weights: float[n] or bool[n], at least 0 and not all 0; None counts every value
        once. What weighs 0 is left out.

    Returns:
      float64[points], float64[points]: the mean and the mass of each bin, the largest
      weight counting 1.

    >>> histogram(np.array([2.0, -1.0, 2.0]))
    (array([-1.,  2.]), array([1., 2.]))
    """
    dropped = dropped_bits(values)
    if dropped is None:
        return distinct(values, weights)
    bins = 2 ** (8 * values.dtype.itemsize - dropped)
    mass, total = np.zeros(bins), np.zeros(bins)  # no piece needs arrays of this size
    top = 1.0 if weights is None else float(weights.max())
    for piece in pieces(values.size):
        part = values[piece]
        # To add 0 turns -0.0 into 0.0, so that they are one point.
        key = (order(part + part.dtype.type(0)) >> dropped).astype(np.intp)
        own = 1.0 if weights is None else weights[piece].astype(np.float64) / top
        np.add.at(mass, key, own)
        np.add.at(total, key, own * part.astype(np.float64))
    used = mass > 0
    return total[used] / mass[used], mass[used]


def distinct(
    values: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As `histogram`, with a point for each distinct value, whatever that takes."""
    if values.dtype.itemsize < 4:  # NumPy sorts them slower, or not at all
        values = values.astype(np.float32)
    if weights is None:
        points, counts = np.unique(values, return_counts=True)
        return points.astype(np.float64), counts.astype(np.float64)
    used = weights > 0
    points, where = np.unique(values[used], return_inverse=True)
    mass = weights[used].astype(np.float64) / float(weights.max())
    return points.astype(np.float64), np.bincount(where, mass)


def is_fine(
    values: np.ndarray, points: np.ndarray, mass: np.ndarray, clusters: float
) -> bool:
    """Whether the `histogram` of ``values`` costs so many clusters less than 1e-4.

    The least error of a density f is a twelfth of the cube of the integral of
    f**(1/3), over the clusters squared (Panter and Dite, 1951): the squared width of a
    cluster, to which that of the bins is compared.
    """
    if not dropped_bits(values):
        return True
    square = mass * (points * 2.0 ** (9 - _LEADING)) ** 2  # times widths
    return clusters**2 * square.sum() <= _LOSS * np.cbrt(square).sum() ** 3


def rank_among(
    starts: np.ndarray, values: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """A function that counts how many of ``starts`` each value of a piece reaches.

    It is ``np.searchsorted(starts, order(part), "right")``, by one look into a table of
    bins where ``values`` are many: only in bins that a start divides does it search.

    Args:
      starts: uint[n], increasing, as `order` gives them.
      values: float[m], whose pieces the function will be given.

    Returns:
      float[p] -> integers[p], in ``[0, n]``.
    """
    dropped = dropped_bits(values)
    if dropped is None:
        return lambda part: np.searchsorted(starts, order(part), "right")
    bins = 2 ** (8 * values.dtype.itemsize - dropped)
    wide = starts.astype(np.int64)
    whole = (wide + 2**dropped - 1) >> dropped  # the first bin that is all past it
    table = np.cumsum(np.bincount(whole, minlength=bins)[:bins]).astype(np.int32)
    table[wide[wide % 2**dropped > 0] >> dropped] = -1

    def rank(part: np.ndarray) -> np.ndarray:
        place = order(part)
        found = table[place >> dropped]
        divided = np.flatnonzero(found < 0)
        found[divided] = np.searchsorted(starts, place[divided], "right")
        return found

    return rank


def checked_finite(caller: str, name: str, array: np.ndarray) -> np.ndarray:
    """``array``, of its own floating dtype or else float64, once all is finite."""
    array = np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(np.float64)
    flat = array.reshape(-1)
    if all(np.isfinite(flat[piece]).all() for piece in pieces(flat.size)):
        return array
    bad = np.flatnonzero(~np.isfinite(flat))
    raise ValueError(
        f"{caller} needs finite {name}, got {flat[bad[0]]} at flat index {bad[0]}; "
        f"{bad.size} of {flat.size} are not finite. Replace them first."
    )
