"""Lloyd's iterations from a start that can be chosen: k-means as the papers did it.

For comparison and reproduction: they end in a local optimum, which
`kmeans.optimal_centroids` never exceeds by more than what it states. Each step is a
binary search for every centroid among the points of a histogram, not a pass over all
values, so that they run to a fixed point in no time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.share.histogram import checked_finite
from jaxcomp.share.kmeans import Line, middles, points_of


Start = Callable[[np.ndarray, np.ndarray, int], np.ndarray]  # points, mass, clusters


def linear(points: np.ndarray, mass: np.ndarray, clusters: int) -> np.ndarray:
    """Centroids equally spaced from the least to the largest point.

    Han et al., "Deep Compression", arXiv:1510.00149, section 3.2: large weights, which
    are few and matter most, get centroids too.

    Args:
      points: float64[n], increasing.
      mass: float64[n].
      clusters: how many.

    >>> linear(np.array([0.0, 1.0, 8.0]), np.ones(3), 3)
    array([0., 4., 8.])
    """
    low, high = points[0], points[-1]
    step = np.arange(clusters) / max(clusters - 1, 1)
    return low * (1 - step) + high * step  # high - low may overflow


def density(points: np.ndarray, mass: np.ndarray, clusters: int) -> np.ndarray:
    """Centroids at equal steps of the cumulative distribution of the points.

    Han et al., arXiv:1510.00149, section 3.2. The steps are ``(i + 1/2) / clusters``.

    >>> density(np.array([0.0, 1.0, 8.0]), np.ones(3), 3)
    array([0., 1., 8.])
    """
    reached = np.cumsum(mass)
    steps = (np.arange(clusters) + 0.5) / clusters
    return points[np.searchsorted(reached, steps * reached[-1])]


def random(key: jax.Array) -> Start:
    """A start at points drawn by their mass, none twice: Forgy's.

    Args:
      key: a JAX key, for one leaf.

    >>> start = random(jax.random.key(0))
    >>> start(np.array([0.0, 1.0, 8.0]), np.ones(3), 3)
    array([0., 1., 8.])
    """
    seed = np.asarray(jax.random.bits(key, (4,), jnp.uint32))

    def start(points: np.ndarray, mass: np.ndarray, clusters: int) -> np.ndarray:
        # The largest of such sums are a draw without repeats (Efraimidis and Spirakis,
        # "Weighted Random Sampling with a Reservoir", IPL 97, 2006, in logarithms).
        score = np.log(mass) + np.random.default_rng(seed).gumbel(size=points.size)
        return np.sort(points[np.argpartition(score, -clusters)[-clusters:]])

    return start


def lloyd(
    values: np.ndarray,
    clusters: int,
    weights: np.ndarray | None = None,
    *,
    start: Start = linear,
) -> np.ndarray:
    """Moves centroids to the means of their nearest values until nothing changes.

    Lloyd, "Least Squares Quantization in PCM", IEEE Transactions on Information Theory
    28(2), 1982. The error never rises, so it is at most that of the start. A centroid
    that no value is nearest to stays where it is; if it ends so, it is left out.

    Args:
      values: float[n], finite.
      clusters: the most centroids, at least 1.
      weights: float[n], at least 0 with a positive sum, or bool[n]; None counts every
        value once.
      start: (points: float64[p], mass: float64[p], clusters) -> float[clusters],
        finite: `linear`, `density`, `random`, or your own. Points are distinct values,
        or bins of them, as in `optimal_centroids`.

    Returns:
      float64[k], strictly increasing, ``k <= clusters``. With no more distinct values
      than clusters, these are the values themselves.

    Raises:
      ValueError: as `optimal_centroids`, or ``start`` did not give that many numbers.

    >>> lloyd(np.array([0.0, 1.0, 2.0, 10.0]), 2)
    array([ 1., 10.])
    """
    points, mass = points_of("lloyd", values, clusters, weights)
    if points.size <= clusters:
        return points
    first = checked_finite("lloyd", "centroids of start", start(points, mass, clusters))
    if first.shape != (clusters,):
        raise ValueError(
            f"lloyd needs a start that gives {clusters} centroids, got shape "
            f"{first.shape}. Return a vector of as many as `clusters`."
        )
    line = Line.of(points, mass)
    cost = line.cost()
    centroids = np.sort(np.ldexp(first.astype(np.float64), line.shift))
    best, least = np.array([0, points.size]), np.inf
    while True:
        inner = np.searchsorted(line.points, middles(centroids), "right")
        bounds = np.concatenate([[0], inner, [points.size]])
        error = cost(bounds[:-1], bounds[1:]).sum()
        if not error < least:
            return line.means(best)
        filled = np.diff(bounds) > 0
        best, least = np.unique(bounds), error
        centroids[filled] = np.ldexp(line.means(best), line.shift)
