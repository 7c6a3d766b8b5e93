"""A statistic over batches is what NumPy says of all rows together."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcomp.program.statistics import (
    absmax,
    entropy,
    feature_rank,
    histogram,
    mean,
    mean_abs,
    norm,
    second_moment,
    zero_fraction,
)


ROWS = hnp.arrays(np.float32, (6, 3), elements=st.integers(-8, 8).map(lambda n: n / 4))
KEEP = hnp.arrays(bool, (6,))

COUNTS = histogram(-2, 2, bins=4)

# Of the rows that count, in float64.
REFERENCES = {
    "absmax": (absmax, lambda x: np.abs(x).max(0, initial=0)),
    "mean": (mean, lambda x: x.sum(0) / max(len(x), 1)),
    "mean_abs": (mean_abs, lambda x: np.abs(x).sum(0) / max(len(x), 1)),
    "norm": (norm, lambda x: np.sqrt((x**2).sum(0))),
    "zero_fraction": (zero_fraction, lambda x: (x == 0).sum(0) / max(len(x), 1)),
}


def over(statistic, *batches):
    """The value over batches, each (x, keep) or x."""
    of, merge, finish = map(jax.jit, statistic[:3])
    state = None
    for batch in batches:
        x, keep = batch if isinstance(batch, tuple) else (batch, None)
        weight = np.ones(x.shape[:-1], np.float32)
        if keep is not None:
            weight, x = keep.astype(np.float32), np.where(keep[..., None], x, 0)
        new = of(x, weight)
        state = new if state is None else merge(state, new)
    return finish(state)


def reference_entropy(samples, bins):
    """In nats, of one channel."""
    if samples.min() == samples.max():
        return 0.0
    counts, _ = np.histogram(samples, bins)
    p = counts[counts > 0] / len(samples)
    return -(p * np.log(p)).sum()


@given(ROWS, KEEP, ROWS, KEEP)
def test_a_statistic_is_that_of_all_rows_that_count(x, keep_x, y, keep_y):
    counted = np.concatenate([x[keep_x], y[keep_y]]).astype(np.float64)
    for statistic, reference in REFERENCES.values():
        found = over(statistic, (x, keep_x), (y, keep_y))
        np.testing.assert_allclose(found, reference(counted), rtol=1e-6, atol=1e-7)
    moment = over(second_moment, (x, keep_x), (y, keep_y))
    np.testing.assert_allclose(moment.total, counted.T @ counted, rtol=1e-6)
    assert moment.rows == len(counted)
    counts = over(COUNTS, (x, keep_x), (y, keep_y))
    for channel, found in enumerate(counts):
        expected, _ = np.histogram(counted[:, channel], 4, (-2, 2))
        np.testing.assert_array_equal(found, expected)


STATISTICS = {
    **{name: statistic for name, (statistic, _) in REFERENCES.items()},
    "second_moment": second_moment,
    "histogram": histogram(-1, 1, bins=4),
    "entropy": entropy(bins=4, samples=8),
    "feature_rank": feature_rank,
}


@pytest.mark.parametrize("name", STATISTICS)
def test_a_state_of_zeros_and_one_of_padding_are_those_of_no_rows(name):
    statistic = STATISTICS[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 2, 2, 4)), jnp.float32)
    state = statistic.of(x, jnp.ones((3, 2, 2)))
    padding = statistic.of(0 * x, jnp.zeros((3, 2, 2)))
    zeros = jax.tree.map(jnp.zeros_like, state)
    for nothing in (padding, zeros):
        for pair in ((nothing, state), (state, nothing)):
            merged = statistic.merge(*pair)
            jax.tree.map(np.testing.assert_array_equal, merged, state)
    for value in jax.tree.leaves(statistic.finish(padding)):
        np.testing.assert_array_equal(value, 0)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_is_the_same_under_jit_and_over_leading_axes(name):
    statistic = STATISTICS[name]
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 3, 2, 2, 4)), jnp.float32)
    weight = jnp.ones((3, 2, 2))

    def value(x):
        return statistic.finish(statistic.merge(*(statistic.of(y, weight) for y in x)))

    once = value(x)
    mapped = jax.jit(jax.vmap(value))(jnp.stack([x, -x]))
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(mapped), strict=True):
        np.testing.assert_allclose(a, b[0], rtol=1e-6)
        assert a.dtype == b.dtype == jnp.float32


def test_a_second_moment_with_a_large_mean_keeps_its_digits_over_many_batches():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(1000, 1, (16, 4)), jnp.float32)
    batches = 100_000
    state = second_moment.of(x, jnp.ones(16))

    @jax.jit
    def add(total, times):
        return jax.lax.fori_loop(
            0, times, lambda _, t: second_moment.merge(t, state), total
        )

    found = second_moment.finish(add(state, batches - 1))
    exact = np.asarray(state[0].total, np.float64) * batches
    np.testing.assert_allclose(found.total, exact, rtol=2**-23)
    assert found.rows == 16 * batches
    x64 = np.asarray(x, np.float64)
    np.testing.assert_allclose(found.total, x64.T @ x64 * batches, rtol=1e-6)


def test_sums_are_exact_where_float32_alone_would_stop():
    one, big = jnp.ones((1, 1)), jnp.full((1, 1), 2.0**24)
    assert over(mean, big, one, one, one, one)[0] * 5 == 2.0**24 + 4
    states = [zero_fraction.of(x, jnp.full(1, 1.0)) for x in (0 * one, one)]
    assert zero_fraction.finish(zero_fraction.merge(*states)) == 0.5


def test_bfloat16_and_integers_are_summed_in_float32():
    x = jnp.full((2048, 1), 1.0078125, jnp.bfloat16)  # 1 + 2**-7
    assert over(absmax, x).dtype == jnp.bfloat16
    assert over(mean, x).dtype == jnp.float32
    np.testing.assert_array_equal(over(mean, x), [1.0078125])
    np.testing.assert_array_equal(over(second_moment, x).total, 2048 * 1.0078125**2)
    codes = jnp.array([[-128], [100]], jnp.int8)
    assert over(absmax, codes) == 128
    assert over(second_moment, codes).total == 128**2 + 100**2


def test_a_dead_unit_has_a_zero_fraction_of_one():
    x = jax.nn.relu(jnp.array([[-1.0, 2.0], [-3.0, -4.0]]))
    np.testing.assert_array_equal(over(zero_fraction, x), [1.0, 0.5])


def test_what_is_outside_of_a_histogram_counts_at_its_ends():
    x = jnp.array([[-9.0], [0.0], [0.5], [1.0], [9.0]])
    assert over(histogram(0, 1, bins=2), x).tolist() == [[2, 3]]


def test_the_entropy_of_a_constant_is_0_and_of_a_uniform_channel_log_bins():
    x = jnp.stack([jnp.full(100, 7.0), jnp.arange(100.0)], axis=-1)
    found = over(entropy(bins=10), x[:50], x[50:])
    np.testing.assert_allclose(found, [0, math.log(10)], rtol=1e-6)


FOUR = entropy(bins=4)


@given(hnp.arrays(np.int8, (12, 2), elements=st.integers(-64, 63)), KEEP)
def test_entropy_is_that_of_a_histogram_from_least_to_greatest(x, keep):
    x = x.astype(np.float32) / 64
    keep = np.concatenate([keep, ~keep])
    found = over(FOUR, (x[:7], keep[:7]), (x[7:], keep[7:]))
    scaled = over(FOUR, (-4 * x + 8, keep))
    for channel in (0, 1):
        samples = x[keep, channel].astype(np.float64)
        span = samples.max() - samples.min()
        edge = (samples - samples.min()) * 4 % (span or 1) == 0
        if not edge[(samples != samples.min()) & (samples != samples.max())].any():
            expected = reference_entropy(samples, 4)
            np.testing.assert_allclose(found[channel], expected, atol=1e-6)
            np.testing.assert_allclose(scaled[channel], expected, atol=1e-6)


def test_entropy_averages_over_the_positions_that_count():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 4, 3, 2)).astype(np.float32)
    keep = rng.random((5, 4, 3)) < 0.7
    keep[2] = False
    found = over(entropy(bins=3), (x, keep))
    pooled = [x[i][keep[i]].astype(np.float64).mean(0) for i in (0, 1, 3, 4)]
    expected = [reference_entropy(samples, 3) for samples in np.stack(pooled, axis=1)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_entropy_looks_at_the_first_samples_only():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 2)), jnp.float32)
    sixteen = entropy(bins=5, samples=16)
    few = over(sixteen, x[:10], x[10:20], x[30:])
    np.testing.assert_allclose(few, over(entropy(bins=5), x[:16]), rtol=1e-6)
    one = over(sixteen, x)
    np.testing.assert_allclose(one, few, rtol=1e-6)


def test_feature_rank_is_the_mean_rank_of_the_maps_of_a_channel():
    rng = np.random.default_rng(0)
    ranks = np.array([[0, 1, 2], [1, 3, 4], [0, 4, 1]])  # image, channel
    left, right = rng.normal(size=(2, 3, 3, 5, 4)).astype(np.float32)
    right = right[..., :5, :]
    factors = (np.arange(4) < ranks[..., None]).astype(np.float32)
    maps = np.einsum("ichr,icr,icwr->ihwc", left, factors, right)
    found = over(feature_rank, jnp.asarray(maps[:2]), jnp.asarray(maps[2:]))
    np.testing.assert_allclose(found, ranks.mean(0), rtol=1e-6)
    keep = np.ones((3, 5, 5), bool)
    keep[1] = False
    found = over(feature_rank, (jnp.asarray(maps), keep))
    np.testing.assert_allclose(found, ranks[[0, 2]].mean(0), rtol=1e-6)


def test_feature_rank_needs_maps():
    text = r"needs maps float\[batch, height, width, channel\], got float32\[2, 3\]\."
    with pytest.raises(ValueError, match=text):
        over(feature_rank, jnp.ones((2, 3)))


def test_a_histogram_needs_a_range_and_bins():
    text = r"histogram needs low < high, got low=1.0, high=1.0\."
    with pytest.raises(ValueError, match=text):
        histogram(1.0, 1.0, bins=3)
    with pytest.raises(ValueError, match="histogram needs 1 <= bins <= 1048576, got 0"):
        histogram(0.0, 1.0, bins=0)


def test_entropy_needs_bins_and_samples():
    with pytest.raises(ValueError, match="entropy needs 1 <= bins <= 1048576, got 0"):
        entropy(bins=0)
    with pytest.raises(TypeError, match=r"entropy needs an integer samples, got 1\.5"):
        entropy(samples=1.5)
