import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.share import histogram as bins
from jaxcomp.share import intervals, kmeans
from jaxcomp.share.kmeans import (
    assign,
    exact_centroids,
    optimal_centroids,
    zero_centroids,
)


# Small integers repeat often; the floats reach across 12 orders of magnitude.
VALUES = st.integers(-4, 4).map(float) | st.floats(-1e6, 1e6)
SAMPLES = st.lists(VALUES, min_size=1, max_size=12).map(np.array)
WEIGHTED = st.lists(
    st.tuples(VALUES, st.floats(0.01, 100.0)), min_size=1, max_size=12
).map(lambda pairs: np.array(pairs).T)
CLUSTERS = st.integers(1, 5)


def squared_error(values, centroids, weights=None):
    nearest = np.abs(values[:, None] - centroids).min(axis=1)
    return np.sum((1.0 if weights is None else weights) * nearest**2)


def brute_force(values, clusters, weights):
    """The least error over all ways to cut the sorted values into intervals."""
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    clusters = min(clusters, values.size)

    def within(start, stop):
        x, w = values[start:stop], weights[start:stop]
        return np.sum(w * (x - np.average(x, weights=w)) ** 2)

    return min(
        sum(within(a, b) for a, b in itertools.pairwise((0, *cuts, values.size)))
        for cuts in itertools.combinations(range(1, values.size), clusters - 1)
    )


def brute_force_with_zero(values, clusters, weights):
    """The least error of an interval around 0 and the best of what is left."""
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    below, above = np.sum(values < 0), np.sum(values <= 0)

    def best(part, k):
        if not part.any():
            return 0.0
        return brute_force(values[part], k, weights[part]) if k else np.inf

    rank = np.arange(values.size)
    return min(
        np.sum((weights * values**2)[a:b])
        + best(rank < a, left)
        + best(rank >= b, clusters - 1 - left)
        for a in range(below + 1)
        for b in range(above, values.size + 1)
        for left in range(clusters)
    )


def quadratic_dp(values, clusters):
    """The least error, by the O(k n^2) recurrence over all pairs of bounds."""
    x = np.sort(values) - np.mean(values)
    count, first, second = (
        np.concatenate([[0.0], np.cumsum(x**power)]) for power in range(3)
    )
    size = np.subtract.outer(count, count)  # [stop, start]
    moment = np.subtract.outer(first, first)
    cost = np.subtract.outer(second, second) - moment**2 / np.where(size > 0, size, 1)
    cost[size <= 0] = np.inf
    best = cost[:, 0]
    for _ in range(clusters - 1):
        best = np.min(best + cost, axis=1)
    return best[-1]


def heavy_tailed(size, seed=0):
    return np.random.default_rng(seed).standard_t(3, size)


def test_two_groups_get_their_two_means():
    values = np.array([11.0, 1.0, 9.0, 2.0, 3.0, 10.0])
    np.testing.assert_array_equal(optimal_centroids(values, 2), [2.0, 10.0])


def test_three_clusters_split_the_wider_group():
    # {0, 1} {6} {8, 9} costs 1/2 + 0 + 1/2, {0, 1, 6} or {6, 8, 9} cost more
    np.testing.assert_allclose(
        optimal_centroids(np.array([0.0, 1.0, 6.0, 8.0, 9.0]), 3), [0.5, 6.0, 8.5]
    )


def test_a_weight_pulls_the_bound_towards_its_value():
    values = np.array([0.0, 4.0, 6.0, 10.0])
    even = optimal_centroids(values, 2)
    heavy = optimal_centroids(values, 2, np.array([1.0, 1.0, 9.0, 1.0]))
    np.testing.assert_array_equal(even, [2.0, 8.0])
    # {0} {4, 6, 10} costs 19.6; {0, 4} {6, 10} costs 22.4; {0, 4, 6} {10} costs 34.2
    np.testing.assert_allclose(heavy, [0.0, 68 / 11])


def test_one_cluster_is_the_mean():
    values = heavy_tailed(100)
    np.testing.assert_allclose(optimal_centroids(values, 1), [values.mean()])


@pytest.mark.parametrize("solve", [optimal_centroids, exact_centroids])
@given(SAMPLES, CLUSTERS)
def test_no_cut_into_intervals_beats_the_centroids(solve, values, clusters):
    found = squared_error(values, solve(values, clusters))
    least = brute_force(values, clusters, np.ones(values.size))
    rounding = 1e-14 * np.sum(np.square(values))
    assert found <= least * (1 + 1e-9) + rounding


@given(WEIGHTED, CLUSTERS)
def test_no_cut_beats_the_weighted_centroids(pairs, clusters):
    values, weights = pairs
    found = squared_error(values, optimal_centroids(values, clusters, weights), weights)
    least = brute_force(values, clusters, weights)
    rounding = 1e-14 * np.sum(weights * np.square(values))
    assert found <= least * (1 + 1e-9) + rounding


@given(SAMPLES, CLUSTERS)
def test_every_centroid_is_the_mean_of_its_values(values, clusters):
    centroids = optimal_centroids(values, clusters)
    codes = assign(values, centroids)
    means = [values[codes == c].mean() for c in range(centroids.size)]
    np.testing.assert_allclose(centroids, means, atol=1e-12 * np.abs(values).max())


@given(SAMPLES)
def test_more_clusters_never_raise_the_error(values):
    errors = [squared_error(values, optimal_centroids(values, k)) for k in range(1, 7)]
    assert np.all(np.diff(errors) <= 1e-14 * np.sum(np.square(values)))


@given(SAMPLES)
def test_few_distinct_values_come_back_to_the_last_bit(values):
    distinct = np.unique(values)
    for clusters in (distinct.size, distinct.size + 3):
        centroids = optimal_centroids(values, clusters)
        np.testing.assert_array_equal(centroids, distinct)
        np.testing.assert_array_equal(centroids[assign(values, centroids)], values)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), CLUSTERS)
def test_an_integer_weight_counts_like_repeats(repeats, clusters):
    repeats = np.array([*repeats, 1])
    values = heavy_tailed(repeats.size)
    np.testing.assert_allclose(
        optimal_centroids(values, clusters, repeats),
        optimal_centroids(np.repeat(values, repeats), clusters),
    )


@pytest.mark.parametrize("clusters", [1, 2, 16, 63])
def test_error_equals_the_quadratic_dynamic_programme(clusters):
    values = np.r_[heavy_tailed(300), np.round(heavy_tailed(300, seed=1), 1)]
    found = squared_error(values, optimal_centroids(values, clusters))
    np.testing.assert_allclose(found, quadratic_dp(values, clusters), rtol=1e-9)


def test_as_many_clusters_as_values_but_one_merge_the_closest_pair():
    values = np.array([0.0, 1.0, 2.5, 3.0, 7.0])
    np.testing.assert_array_equal(optimal_centroids(values, 4), [0.0, 1.0, 2.75, 7.0])


@pytest.mark.parametrize(
    "solve, levels, error, positive",
    [
        (exact_centroids, 2, 0.36338023, [0.7979]),
        (optimal_centroids, 4, 0.11748185, [0.4528, 1.5104]),
        (exact_centroids, 8, 0.034547761, [0.2451, 0.7560, 1.3439, 2.1519]),
        (
            exact_centroids,
            *(16, 0.009501008),
            [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326],
        ),
        (exact_centroids, 32, 0.0025046684, None),
        (optimal_centroids, 64, 6.4423967e-4, None),
        (optimal_centroids, 256, 4.1185083e-5, None),
    ],
)
def test_a_gaussian_gets_the_quantizer_of_max(solve, levels, error, positive):
    # Max, "Quantizing for Minimum Distortion", 1960
    step = 0.0005 if positive else min(0.001, 0.15 / levels)
    edges = np.arange(-7.2, 7.2, step)
    edges -= edges.mean()
    mass = np.diff([0.5 * math.erf(edge / math.sqrt(2)) for edge in edges])
    points = (edges[1:] + edges[:-1]) / 2
    found = solve(points, levels, mass)
    total = squared_error(points, found, mass) + step**2 / 12  # within a point
    assert total == pytest.approx(error, rel=1e-3)
    if positive:
        np.testing.assert_allclose(found[levels // 2 :], positive, atol=1e-3)


def test_a_table_that_is_too_large_is_cut_in_half(monkeypatch):
    values = heavy_tailed(600)
    whole = [exact_centroids(values, k) for k in (2, 7, 100)]
    monkeypatch.setattr(intervals, "_TABLE", 1)
    for centroids in whole:
        np.testing.assert_array_equal(
            exact_centroids(values, centroids.size), centroids
        )


@given(WEIGHTED, CLUSTERS)
def test_no_cut_around_a_fixed_zero_beats_the_centroids(pairs, clusters):
    values, weights = pairs
    centroids = zero_centroids(values, clusters, weights)
    assert np.sum(centroids == 0) == 1 and np.all(np.diff(centroids) > 0)
    assert centroids.size == min(clusters, np.unique(np.append(values, 0)).size)
    found = squared_error(values, centroids, weights)
    least = brute_force_with_zero(values, clusters, weights)
    rounding = 1e-14 * np.sum(weights * np.square(values))
    assert found <= least * (1 + 1e-9) + rounding


def test_small_values_join_the_fixed_zero():
    values = np.array([-9.0, -1.0, 0.5, 1.0, 8.0, 10.0])
    np.testing.assert_array_equal(zero_centroids(values, 3), [-9, 0, 9])
    # {0.5, 1, 8, 10} around its mean costs 66.7 and {-9, -1} around 0 82; all else more
    np.testing.assert_array_equal(zero_centroids(values[1:], 2), [0, 9])


@pytest.mark.parametrize("clusters", [2, 16, 100])
def test_bins_find_the_fixed_zero_of_all_values(monkeypatch, clusters):
    values = heavy_tailed(1500) + 0.3
    exact = squared_error(values, zero_centroids(values, clusters))
    monkeypatch.setattr(kmeans, "_SPARE_BINS", 12 * clusters)
    found = squared_error(values, zero_centroids(values, clusters))
    assert exact * (1 - 1e-9) <= found <= exact * 1.003


@pytest.mark.parametrize("clusters", [4, 16, 64])
@pytest.mark.parametrize("outliers", [[], [3e3, -1e4, 1e5]])
def test_eight_bins_per_cluster_cost_under_one_percent_above_the_optimum(
    monkeypatch, clusters, outliers
):
    monkeypatch.setattr(kmeans, "_SPARE_BINS", 8 * clusters)
    values = np.r_[heavy_tailed(1000), outliers]
    found = squared_error(values, optimal_centroids(values, clusters))
    exact = quadratic_dp(values, clusters)
    assert exact * (1 - 1e-6) <= found <= exact * 1.01


def test_bins_keep_the_means_exact(monkeypatch):
    monkeypatch.setattr(kmeans, "_SPARE_BINS", 32)
    values = heavy_tailed(2000)
    weights = np.random.default_rng(1).uniform(0.1, 10, values.size)
    centroids = optimal_centroids(values, 8, weights)
    codes = assign(values, centroids)
    means = np.bincount(codes, weights * values) / np.bincount(codes, weights)
    np.testing.assert_allclose(centroids, means, rtol=1e-12)


@pytest.mark.parametrize("clusters", [16, 64])
def test_a_histogram_of_many_values_costs_less_than_a_ten_thousandth(
    monkeypatch, clusters
):
    values = heavy_tailed(60_000).astype(np.float32)
    whole = optimal_centroids(values, clusters)
    monkeypatch.setattr(bins, "_MANY", 1)
    calls = []
    monkeypatch.setattr(kmeans, "distinct", lambda *sample: calls.append(sample))
    binned = optimal_centroids(values, clusters)
    assert not calls and bins.histogram(values)[0].size < values.size / 2
    exact = values.astype(np.float64)
    assert squared_error(exact, binned) <= squared_error(exact, whole) * 1.0001


@pytest.mark.parametrize("offset, clusters", [(1.0, 2), (0.0, 300)])
def test_a_histogram_too_coarse_for_the_clusters_gives_way_to_all_values(
    monkeypatch, offset, clusters
):
    values = (offset + 1e-4 * heavy_tailed(1000)).astype(np.float32)
    whole = optimal_centroids(values, clusters)
    monkeypatch.setattr(bins, "_MANY", 1)
    np.testing.assert_array_equal(optimal_centroids(values, clusters), whole)


def test_a_full_table_leaves_a_bin_for_every_cluster(monkeypatch):
    monkeypatch.setattr(kmeans, "_TABLE_ENTRIES", 1)  # no spare bins at all
    values = np.r_[heavy_tailed(500), 1e9]
    centroids = optimal_centroids(values, 100)
    assert centroids.shape == (100,)
    assert np.all(np.diff(centroids) > 0)
    assert centroids[-1] == 1e9


@pytest.mark.parametrize("factor", [1e-320, 1e-200, 1e200, 1e307])
def test_extreme_scales_neither_overflow_nor_vanish(factor):
    values = factor * np.array([-10.0, -9.0, 0.0, 9.0, 10.0])
    np.testing.assert_allclose(
        optimal_centroids(values, 3), factor * np.array([-9.5, 0.0, 9.5]), rtol=1e-3
    )


def test_an_outlier_does_not_blur_the_other_clusters():
    bulk = heavy_tailed(300)
    centroids = optimal_centroids(np.r_[bulk, 1e30], 9)
    np.testing.assert_allclose(centroids[:-1], optimal_centroids(bulk, 8))


def test_weights_of_vastly_different_size_leave_every_cluster_finite():
    values = heavy_tailed(200)
    weights = 10.0 ** np.linspace(-40, 0, 200)
    centroids = optimal_centroids(values, 20, weights)
    assert centroids.shape == (20,)
    assert np.all(np.isfinite(centroids)) and np.all(np.diff(centroids) > 0)


def test_values_of_weight_zero_are_ignored():
    values = np.array([0.0, 1.0, 50.0])
    centroids = optimal_centroids(values, 2, np.array([1.0, 2.0, 0.0]))
    np.testing.assert_array_equal(centroids, [0.0, 1.0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_centroids_are_float64_whatever_the_values_are(dtype):
    values = np.array([0.25, 0.5, 4.0], dtype)
    centroids = optimal_centroids(values, 2)
    assert centroids.dtype == np.float64
    np.testing.assert_array_equal(centroids, [0.375, 4.0])


@given(SAMPLES, SAMPLES.map(np.sort))
def test_assign_picks_the_first_of_the_nearest(values, centroids):
    codes = assign(values, centroids)
    assert codes.dtype == np.intp
    distance = np.abs(values[:, None] - centroids)
    rows = np.arange(values.size)
    reach = np.abs(values).max() + np.abs(centroids).max()
    assert np.all(distance[rows, codes] <= distance.min(axis=1) + 1e-15 * reach)
    np.testing.assert_array_equal(codes, np.searchsorted(centroids, centroids[codes]))


def test_a_tie_goes_to_the_lower_index():
    codes = assign(np.array([[1.0, 1.5], [5.0, 9.0]]), np.array([0.0, 2.0, 8.0]))
    np.testing.assert_array_equal(codes, [[0, 1], [1, 2]])


def test_neighbouring_floats_are_told_apart():
    pair = np.array([1.0, np.nextafter(1.0, 2.0), np.nextafter(1.0, 2.0) + 2**-52])
    np.testing.assert_array_equal(assign(pair, pair), [0, 1, 2])


@pytest.mark.parametrize(
    "arguments, text",
    [
        (([1.0], 0), r"clusters >= 1, got clusters=0\. Pass the number"),
        (([], 2), r"at least one value, got shape \(0,\)\. Pass `values.ravel\(\)`"),
        (([[1.0, 2.0]], 2), r"vector of at least one value, got shape \(1, 2\)"),
        (([1.0, np.nan, np.inf], 2), r"finite values, got nan at flat index 1; 2 of 3"),
        (([1.0, 2.0], 1, [1.0]), r"weights of shape \(1,\).* of shape \(2,\)\. Pass"),
        (([1.0, 2.0], 1, [1.0, -2.0]), r"weight >= 0 per value.* least -2\.0 for"),
        (([1.0, 2.0], 1, [0.0, 0.0]), r"a positive sum, got .* sum 0\.0 and"),
        (([1.0, 2.0], 1, [1.0, np.inf]), r"finite weights, got inf at flat index 1"),
    ],
)
def test_each_solver_says_what_is_wrong(arguments, text):
    values, clusters, *weights = arguments
    for solve in (optimal_centroids, exact_centroids, zero_centroids):
        with pytest.raises(ValueError, match=rf"^{solve.__name__} needs .*" + text):
            solve(np.array(values), clusters, *map(np.array, weights))


@pytest.mark.parametrize(
    "values, centroids, text",
    [
        ([np.nan], [1.0], r"finite values, got nan at flat index 0; 1 of 1"),
        ([1.0], [-np.inf, 1.0], r"finite centroids, got -inf at flat index 0"),
        ([1.0], [], r"a sorted vector of at least one centroid, got shape \(0,\)"),
        ([1.0], [2.0, 1.0], r"\(2,\): \[2\. 1\.\]\. Pass `np.sort\(centroids\)`"),
    ],
)
def test_assign_says_what_is_wrong(values, centroids, text):
    with pytest.raises(ValueError, match=r"^assign needs .*" + text):
        assign(np.array(values), np.array(centroids))
