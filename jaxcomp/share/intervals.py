"""The cheapest cut of a line of points into intervals, by dynamic programming.

In one dimension a cluster is an interval of the sorted points, so that the best k-means
is the best cut. Wang and Song, "Ckmeans.1d.dp: Optimal k-means Clustering in One
Dimension by Dynamic Programming", The R Journal 3/2, 2011, in the O(k n log n) form of
Grønlund et al., "Fast Exact k-Means, k-Medians and Bregman Divergence Clustering in
1D", arXiv:1701.07204. It asks of the cost that intervals that cross cost no more than
one inside the other, and that holds for a pinned zero too: points beyond an interval
add no more to its error around its mean, which lies between them and 0, than around 0.
"""

from collections.abc import Callable, Iterator

import numpy as np


Cost = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of intervals [start, stop)

_TABLE = 2**24  # entries of a table of winners, 64 MB: what needs more is cut in half
_WIDTH = 8  # candidates on either side of a bound
_SETTLED = 1e-9  # of the cost: less is no gain


def prefix_sums(terms: np.ndarray, anchor: int) -> np.ndarray:
    """float64[n + 1], 0 at ``anchor``: ``terms[a:b]`` sums to ``out[b] - out[a]``."""
    below = -np.cumsum(terms[:anchor][::-1])[::-1]
    return np.concatenate([below, [0.0], np.cumsum(terms[anchor:])])


def cost_of(moments: np.ndarray, zero: int | None = None) -> Cost:
    """The squared error of the points of an interval around their mean.

    Args:
      moments: float64[3 or 4, n + 1], prefix sums of mass, first and second moment, and
        with a ``zero`` the second moment around 0.
      zero: the point whose interval stands for 0 and not for its mean; None if none.

    Returns:
      A function of starts and stops, int[...], that broadcasts; inf for an interval
      without points.
    """
    mass, first, second, *around_zero = moments
    least = np.spacing(np.ptp(mass))  # what is lighter is lost in the prefix sums

    def cost(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        moment = first[stop] - first[start]
        weight = np.maximum(mass[stop] - mass[start], least)
        error = np.maximum(second[stop] - second[start] - moment * moment / weight, 0.0)
        if zero is None:
            return error
        pinned = (start <= zero) & (zero < stop)
        return np.where(pinned, around_zero[0][stop] - around_zero[0][start], error)

    return cost


def optimal_bounds(cost: Cost, points: int, clusters: int) -> np.ndarray:
    """int[clusters + 1]: the cheapest cut of ``points`` into non-empty intervals.

    In O(clusters * points * log(points)) time and O(points) memory: what has no room in
    a table is cut in two, where both halves together cost least (Hirschberg, "A Linear
    Space Algorithm for Computing Maximal Common Subsequences", CACM 18, 1975).
    """
    rows = points - clusters + 1
    if clusters > 1 and rows * clusters > _TABLE:
        half = clusters // 2

        def mirrored(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
            return cost(points - stop, points - start)

        def shifted(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
            return cost(start + middle, stop + middle)

        *_, (below, _) = _layers(cost, rows, half)
        *_, (above, _) = _layers(mirrored, rows, clusters - half)
        middle = half + int(np.argmin(below + above[::-1]))
        left = optimal_bounds(cost, middle, half)
        right = optimal_bounds(shifted, points - middle, clusters - half)
        return np.concatenate([left[:-1], middle + right])
    chosen = [winner.astype(np.int32) for _, winner in _layers(cost, rows, clusters)]
    bounds = np.full(clusters + 1, points)
    for q in reversed(range(clusters)):
        bounds[q] = chosen[q][bounds[q + 1] - q - 1] + q
    return bounds


def _layers(
    cost: Cost, rows: int, clusters: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each cluster, the least cost up to its end, and where it starts for that.

    Row r of layer q ends cluster q (from 0) at point r + q + 1, which leaves a point
    for each cluster before and after; the cluster starts at point s + q, 0 <= s <= r.
    """
    best = cost(np.zeros(rows, np.intp), np.arange(1, rows + 1))
    winner = np.full(2 * rows, rows)  # past the last row, nothing brackets
    winner[0] = 0
    floor = np.zeros(rows, np.intp)
    yield best, floor
    for q in range(1, clusters):
        # The best start grows with the end, so the winners of two rows bracket those
        # between, and with q for the same end, which is a row further up before.
        total = np.empty(rows)
        total[0] = best[0] + cost(np.array(q), np.array(q + 1))
        step = 1 << (rows - 1).bit_length()
        while step := step // 2:
            row = np.arange(step, rows, 2 * step)
            high = np.minimum(winner[row + step], row)
            low = np.minimum(np.maximum(winner[row - step], floor[row]), high)
            count = high - low + 1
            head = count.cumsum() - count  # methods: they take half as long to call
            s = np.arange(head[-1] + count[-1]) + (low - head).repeat(count)
            trial = best[s] + cost(s + q, (row + (q + 1)).repeat(count))
            least = total[row] = np.minimum.reduceat(trial, head)
            hits = (trial == least.repeat(count)).nonzero()[0]
            winner[row] = s[hits[hits.searchsorted(head)]]
        yield total, winner[:rows].copy()
        best = total
        floor = np.append(winner[1:rows], winner[rows - 1]) - 1


def refined(cost: Cost, bounds: np.ndarray) -> np.ndarray:
    """Moves all bounds at once to the cheapest of candidates around each of them.

    The candidates close in from half the way to the next bound to the next point, each
    time once nothing is gained any more. The cost never rises.
    """
    bounds, clusters = bounds.copy(), bounds.size - 1
    width = max(1, min(_WIDTH, 2**11 // clusters))  # all costs stand side by side
    offsets = np.arange(-width, width + 1)
    lanes = np.arange(offsets.size)
    reach, least = 0.5, np.inf
    while True:
        room = np.maximum(np.diff(bounds) * (reach / width), 1.0)
        step = np.where(offsets < 0, room[:-1, None], room[1:, None])
        moved = bounds[1:-1, None] + np.rint(offsets * step).astype(np.intp)
        ends = np.repeat(bounds[:, None], offsets.size, axis=1)
        ends[1:-1] = np.clip(moved, bounds[:-2, None] + 1, bounds[2:, None] - 1)
        starts, stops = ends[:-1, :, None], ends[1:, None, :]
        price = np.where(starts < stops, cost(starts, stops), np.inf)
        total, chosen = price[0, 0], []
        for q in range(1, clusters):
            trial = total[:, None] + price[q]
            chosen.append(trial.argmin(axis=0))
            total = trial[chosen[-1], lanes]
        if total[0] < least * (1 - _SETTLED):
            least, lane = total[0], 0
            for q in reversed(range(1, clusters)):
                lane = chosen[q - 1][lane]
                bounds[q] = ends[q, lane]
        elif room.max() <= 1:
            return bounds
        else:
            reach /= 2
