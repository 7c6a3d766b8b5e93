import numpy as np
import pytest

from jaxcomp.share.kmeans import assign, exact_centroids, optimal_centroids


kmeans1d = pytest.importorskip("kmeans1d")


def squared_error(values, centroids):
    return np.sum((values - centroids[assign(values, centroids)]) ** 2)


@pytest.mark.parametrize("clusters", [2, 3, 16, 64, 256])
def test_the_error_is_that_of_kmeans1d(clusters):
    values = np.random.default_rng(clusters).standard_t(4, 2000)
    theirs = squared_error(values, np.array(kmeans1d.cluster(values, clusters)[1]))
    for ours in (exact_centroids, optimal_centroids):
        error = squared_error(values, ours(values, clusters))
        assert error == pytest.approx(theirs, rel=1e-9)


def test_the_bins_and_what_follows_them_cost_less_than_a_ten_thousandth():
    values = np.random.default_rng(0).standard_t(4, 10_000)
    theirs = squared_error(values, np.array(kmeans1d.cluster(values, 256)[1]))
    assert squared_error(values, optimal_centroids(values, 256)) <= theirs * 1.0001
