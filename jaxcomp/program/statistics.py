"""Statistics of the inputs of a weight, and where a product has these inputs.

A `Statistic` is three pure functions. `jaxcomp.program.observe` applies them to what
flows into every weight; one of your own is as good. Sums over batches carry their
rounding errors along, so that later batches are not lost in the sum of the first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import entr

from jaxcomp import _check


class Statistic(NamedTuple):
    """How something is found out from a stream of batches.

    A state has the same shapes whatever the number of rows. One of zeros is that of no
    rows at all: merged with another it gives the other. Padding leaves no trace.

    Attributes:
      of: (x: float[..., channels], weight: float32[...]) -> a state. The weight is 1
        for what counts and 0 for padding, where ``x`` is 0.
      merge: (state, state) -> the state of both together.
      finish: state -> the value: arrays, the axis of the channels first.
      joint: whether it needs the channels together. Then ``x`` has, for a convolution,
        all that one output sees as its channels, and the value may have any shape.
    """

    of: Callable[[jax.Array, jax.Array], Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any]
    joint: bool = False


class Moment(NamedTuple):
    """The value of `second_moment`."""

    total: jax.Array  # float32[channels, channels], X'X
    rows: jax.Array  # float32[], the number of rows of X


class _Sum(NamedTuple):
    """A sum, and the rounding error that it has so far."""

    total: jax.Array
    error: jax.Array


def _sum(x: jax.Array) -> _Sum:
    return _Sum(x, jnp.zeros_like(x))


def _added(a: _Sum, b: _Sum) -> _Sum:
    total, lost = _two_sum(a.total, b.total)
    return _Sum(*_two_sum(total, lost + (a.error + b.error)))


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Knuth's: the rounded sum, and exactly what the rounding took."""
    total = a + b
    second = total - a
    return total, (a - (total - second)) + (b - second)


def _merged(a: Any, b: Any) -> Any:
    """States all of whose parts are sums."""
    return jax.tree.map(_added, a, b, is_leaf=lambda x: isinstance(x, _Sum))


def _closed(x: _Sum) -> jax.Array:
    return x.total + x.error


def _floating(x: jax.Array) -> jax.Array:
    return x if _check.is_floating(x) else x.astype(jnp.float32)


def _wide(x: jax.Array) -> jax.Array:
    """Sums need float32 at least."""
    return _floating(x).astype(_check.wide(_floating(x).dtype))


def _mean(state: Any) -> jax.Array:
    total, rows = map(_closed, state)
    return total / jnp.maximum(rows, 1).astype(total.dtype)  # of no rows it is 0


def _summed(
    each: Callable[[jax.Array], jax.Array], finish: Callable[[Any], jax.Array] = _mean
) -> Statistic:
    """The sum of ``each(x)`` over the rows, and their number."""

    def of(x: jax.Array, weight: jax.Array) -> Any:
        values = each(_wide(x))
        values *= weight[..., None].astype(values.dtype)
        return _sum(jnp.sum(values, range(x.ndim - 1))), _sum(jnp.sum(weight))

    return Statistic(of, _merged, finish)


# The largest magnitude of a channel, in the dtype of the input.
absmax = Statistic(
    of=lambda x, _: jnp.max(jnp.abs(_floating(x)), range(x.ndim - 1), initial=0),
    merge=jnp.maximum,
    finish=lambda state: state,
)

# The mean of a channel, and of its magnitude.
mean = _summed(lambda x: x)
mean_abs = _summed(jnp.abs)

# The Euclidean norm of a channel over all rows: ||X_j|| of Sun et al., "A Simple and
# Effective Pruning Approach for Large Language Models", arXiv:2306.11695 (Wanda).
norm = _summed(jnp.square, lambda state: jnp.sqrt(_closed(state[0])))

# The fraction of zeros in a channel: Hu et al., "Network Trimming: A Data-Driven Neuron
# Pruning Approach towards Efficient Deep Architectures", arXiv:1607.03250 (APoZ).
zero_fraction = _summed(lambda x: (x == 0).astype(x.dtype))


def _moment_of(x: jax.Array, weight: jax.Array) -> Any:
    rows = _floating(x).reshape(-1, x.shape[-1])
    # Products of 16-bit floats are exact in float32; of float32 nothing is cut off.
    exact: Any = {"precision": "highest", "preferred_element_type": _wide(x).dtype}
    return _sum(jnp.matmul(rows.T, rows, **exact)), _sum(jnp.sum(weight))


# X'X over all rows, a `Moment`: twice it over the rows is the Hessian of Frantar and
# Alistarh, "SparseGPT", arXiv:2301.00774, and of GPTQ, arXiv:2210.17323.
second_moment = Statistic(
    of=_moment_of,
    merge=_merged,
    finish=lambda state: Moment(*map(_closed, state)),
    joint=True,
)


def histogram(low: float, high: float, bins: int) -> Statistic:
    """How often a channel is in each of ``bins`` equal parts of a range.

    Args:
      low, high: the range, in the unit of the inputs; ``low < high``. What is outside
        counts in the first or the last bin. `absmax` tells what is not known.
      bins: number of bins, 1 or more.

    Returns:
      A `Statistic` with the value float32[channels, bins], counts.

    Raises:
      ValueError: the range is empty, or ``bins`` is less than 1.

    >>> two = histogram(0.0, 2.0, bins=2)
    >>> two.finish(two.of(jnp.array([[0.5], [1.5], [2.0]]), jnp.ones(3))).tolist()
    [[1.0, 2.0]]
    """
    bins = _check.integer_within("histogram", "bins", bins, 1, 2**20)
    if not low < high:
        raise ValueError(f"histogram needs low < high, got low={low}, high={high}.")

    def of(x: jax.Array, weight: jax.Array) -> _Sum:
        columns, weights = _wide(x).reshape(-1, x.shape[-1]).T, weight.ravel()
        return _sum(jax.vmap(lambda x: _counts(x, weights, low, high, bins))(columns))

    return Statistic(of, _added, _closed)


def _counts(x: jax.Array, weight: jax.Array, low: Any, high: Any, bins: int) -> Any:
    """The histogram of a vector: float32[bins]."""
    place = jnp.floor((x - low) * (bins / (high - low)))
    place = jnp.clip(place, 0, bins - 1).astype(jnp.int32)
    return jnp.zeros(bins, weight.dtype).at[place].add(weight)


def entropy(bins: int = 100, samples: int = 1024) -> Statistic:
    """How much the mean activation of a channel differs from sample to sample.

    Luo and Wu, "An Entropy-based Pruning Method for CNN Compression", arXiv:1706.05791:
    a channel is averaged over its positions, and the averages are counted in bins from
    their least to their greatest. That range needs them all at once, so they are kept.

    Args:
      bins: number of bins, 1 or more; the paper names none.
      samples: how many samples to keep: the first ones, along the first axis of inputs.

    Returns:
      A `Statistic` with the value float32[channels], in nats: 0 for a channel that is
      constant, ``log(bins)`` for one that is uniform, whatever its offset and scale.

    Raises:
      ValueError: ``bins`` or ``samples`` is less than 1.

    >>> four = entropy(bins=4)
    >>> x = jnp.stack([jnp.arange(8.0), jnp.ones(8)], axis=-1)
    >>> four.finish(four.of(x, jnp.ones(8))) / jnp.log(4.0)
    Array([1., 0.], dtype=float32)
    """
    bins = _check.integer_within("entropy", "bins", bins, 1, 2**20)
    samples = _check.integer_within("entropy", "samples", samples, 1, 2**30)

    def of(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, inner = _wide(x), range(1, weight.ndim)
        count = jnp.sum(weight, inner)
        means = jnp.sum(x, inner) / jnp.maximum(count, 1)[:, None].astype(x.dtype)
        counts = count > 0
        row = jnp.where(counts, jnp.cumsum(counts) - 1, samples)  # the last is dropped
        kept = (
            jnp.zeros((samples, x.shape[-1]), x.dtype).at[row].set(means, mode="drop")
        )
        return kept, jnp.minimum(jnp.sum(counts), samples).astype(jnp.int32)

    def merge(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
        (x, first), (y, second), row = a, b, jnp.arange(samples)
        later = y[jnp.clip(row - first, 0, samples - 1)]
        both = jnp.where((row < first)[:, None], x, later)
        return both, jnp.minimum(first + second, samples)

    def finish(state: Any) -> jax.Array:
        used = jnp.arange(samples) < state[1]

        def of_channel(x: jax.Array) -> jax.Array:
            low = jnp.min(x, initial=jnp.inf, where=used)
            high = jnp.max(x, initial=-jnp.inf, where=used)
            span = jnp.where(high > low, high - low, 1)  # else all are in the first bin
            found = _counts(x - low, used.astype(x.dtype), 0, span, bins)
            return jnp.sum(entr(found / jnp.maximum(jnp.sum(found), 1)))

        return jax.vmap(of_channel)(state[0].T)

    return Statistic(of, merge, finish)


def _rank_of(x: jax.Array, weight: jax.Array) -> Any:
    if x.ndim != 4:
        raise ValueError(
            "feature_rank needs maps float[batch, height, width, channel], got "
            f"{_check.describe(x)}. Leave weights that see no maps out with `where`."
        )
    ranks = jnp.linalg.matrix_rank(jnp.moveaxis(_wide(x), -1, 1))
    maps = jnp.max(weight, (1, 2), initial=0)
    return _sum(jnp.sum(ranks, 0).astype(_wide(x).dtype)), _sum(jnp.sum(maps))


# The mean rank of a channel's map, float[batch, height, width, channel] -> [channel]:
# Lin et al., "HRank: Filter Pruning using High-Rank Feature Map", arXiv:2002.10179.
feature_rank = Statistic(of=_rank_of, merge=_merged, finish=_mean)
