from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.share.kmeans import assign, optimal_centroids
from jaxcomp.share.lloyd import density, linear, lloyd, random


VALUES = st.integers(-4, 4).map(float) | st.floats(-1e6, 1e6)
SAMPLES = st.lists(VALUES, min_size=1, max_size=12).map(np.array)
STARTS = [linear, density, random(jax.random.key(0))]


def squared_error(values, centroids, weights=1.0):
    return np.sum(weights * (values - centroids[assign(values, centroids)]) ** 2)


def plain_lloyd(values, centroids):
    """The textbook loop over all values."""
    while True:
        codes = np.abs(values[:, None] - centroids).argmin(axis=1)
        moved = np.array(
            [
                values[codes == c].mean() if np.any(codes == c) else old
                for c, old in enumerate(centroids)
            ]
        )
        if np.array_equal(moved, centroids):
            return centroids[np.unique(codes)]
        centroids = moved


def test_a_linear_start_ends_where_the_optimum_is_not():
    values = np.array([0.0, 1.0, 10.0, 11.0, 12.0, 100.0])
    # From 0, 50, 100 the middle one has no values; the best cut is after 1 and 12.
    np.testing.assert_allclose(lloyd(values, 3), [34 / 5, 100])
    np.testing.assert_allclose(lloyd(values, 3, start=density), [0.5, 11, 100])


def test_starts_are_those_of_the_paper():
    points, mass = np.array([-2.0, 0.0, 1.0, 6.0]), np.array([1.0, 1.0, 1.0, 5.0])
    np.testing.assert_array_equal(linear(points, mass, 3), [-2, 2, 6])
    np.testing.assert_array_equal(linear(points, mass, 1), [-2])
    np.testing.assert_array_equal(density(points, mass, 4), [-2, 1, 6, 6])


def test_a_random_start_draws_by_mass_and_none_twice():
    points, mass = np.arange(4.0), np.array([1.0, 1.0, 1.0, 97.0])
    drawn = [random(jax.random.key(i))(points, mass, 2) for i in range(50)]
    assert all(np.unique(start).size == 2 for start in drawn)
    assert sum(3.0 in start for start in drawn) >= 48
    assert len({tuple(start) for start in drawn}) >= 3
    again = random(jax.random.key(7))(points, mass, 2)
    np.testing.assert_array_equal(again, drawn[7])


@pytest.mark.parametrize("start", STARTS)
@given(SAMPLES, st.integers(1, 5))
def test_the_error_is_between_that_of_the_optimum_and_of_the_start(
    start, values, clusters
):
    points, counts = np.unique(values, return_counts=True)
    found = squared_error(values, lloyd(values, clusters, start=start))
    rounding = 1e-14 * np.sum(np.square(values))
    best = squared_error(values, optimal_centroids(values, clusters))
    assert found >= best * (1 - 1e-9) - rounding
    if points.size > clusters:
        first = np.unique(start(points, counts * 1.0, clusters))
        assert found <= squared_error(values, first) * (1 + 1e-9) + rounding


@pytest.mark.parametrize("clusters", [1, 5, 30])
def test_centroids_are_those_of_the_textbook_loop(clusters):
    values = np.random.default_rng(0).standard_t(3, 500)
    start = np.linspace(values.min(), values.max(), clusters)
    np.testing.assert_allclose(
        lloyd(values, clusters), plain_lloyd(values, start), rtol=1e-9, atol=1e-12
    )


def test_weights_count_like_repeats():
    values, repeats = np.array([0.0, 1.0, 5.0, 9.0]), np.array([1, 4, 2, 1])
    np.testing.assert_allclose(
        lloyd(values, 2, repeats), lloyd(np.repeat(values, repeats), 2)
    )


@pytest.mark.parametrize("factor", [1e-41, 1.0, 1e37, 1e300])
def test_extreme_scales_neither_overflow_nor_vanish(factor):
    values = factor * np.array([-10.0, -9.0, 0.0, 9.0, 10.0])
    expected = factor * np.array([-9.5, 0.0, 9.5])
    for start in (linear, density):
        np.testing.assert_allclose(lloyd(values, 3, start=start), expected, rtol=1e-3)


def test_a_leaf_is_shared_from_a_start_of_choice():
    x = jnp.array([[0.0, 1.0, 10.0], [11.0, 12.0, 100.0]])
    from_linear = jc.palettize(x, 4, centroids=lloyd)
    from_density = jc.palettize(x, 4, centroids=partial(lloyd, start=density))
    np.testing.assert_array_equal(from_linear.codebook, [8.5, 100.0])
    np.testing.assert_array_equal(from_density.codebook, [1.0, 11.0, 100.0])
    assert from_linear.dense()[0, 0] == from_density.dense()[0, 0] == 0


def test_errors_say_what_is_wrong():
    values = np.array([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"^lloyd needs clusters >= 1, got clusters=0"):
        lloyd(values, 0)
    with pytest.raises(ValueError, match=r"^lloyd needs finite values, got nan at"):
        lloyd(np.array([np.nan]), 1)
    text = r"^lloyd needs a start that gives 2 centroids, got shape \(3,\)\. Return"
    with pytest.raises(ValueError, match=text):
        lloyd(values, 2, start=lambda points, mass, clusters: points)
    text = r"^lloyd needs finite centroids of start, got inf at flat index 0"
    with pytest.raises(ValueError, match=text):
        lloyd(values, 2, start=lambda points, mass, k: np.array([np.inf, 1.0]))
