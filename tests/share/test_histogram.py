import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcomp.share import histogram as module
from jaxcomp.share.histogram import (
    checked_finite,
    distinct,
    histogram,
    order,
    pieces,
    rank_among,
)


DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
VALUES = st.integers(-4, 4).map(float) | st.floats(width=32, allow_nan=False)
SAMPLES = hnp.arrays(np.float32, 20, elements=VALUES)


@pytest.fixture
def binned(monkeypatch):
    """Few values are enough for bins, and a piece is shorter than they are."""
    monkeypatch.setattr(module, "_MANY", 1)
    monkeypatch.setattr(module, "PIECE", 7)


def test_pieces_cover_all_once(binned):
    assert list(pieces(16)) == [slice(0, 7), slice(7, 14), slice(14, 16)]
    assert list(pieces(0)) == []


def test_order_of_a_few_floats():
    values = np.array([-np.inf, -1.0, -0.0, 0.0, 1.0], np.float32)
    expected = [0x007FFFFF, 0x407FFFFF, 0x7FFFFFFF, 0x80000000, 0xBF800000]
    assert order(values).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@given(SAMPLES)
def test_order_compares_as_the_floats_do(dtype, values):
    with np.errstate(over="ignore"):
        values = values.astype(dtype)
    ranks = order(values)
    assert ranks.dtype.itemsize == values.dtype.itemsize
    less = values[:, None] < values
    assert np.all(ranks[:, None][less.nonzero()[0], 0] < ranks[less.nonzero()[1]])
    np.testing.assert_array_equal(np.sort(values), values[np.argsort(ranks)])


def test_neighbouring_floats_are_neighbouring_integers():
    values = np.array([-1.0, 0.0, 1e-45, 1.0, 3e38], np.float32)
    above = np.nextafter(values, np.float32(np.inf))
    assert np.all(order(above) - order(values) == 1)


def test_a_bin_is_the_mean_and_the_mass_of_its_values(binned):
    near = 1 + np.array([0, 100, 200, 4096]) * 2.0**-23  # a bin has 4096 floats
    values = np.array([*near, -3.0, 5.0, 5.0], np.float32)
    points, mass = histogram(values)
    np.testing.assert_array_equal(points, [-3, near[:3].mean(), near[3], 5])
    np.testing.assert_array_equal(mass, [1, 3, 1, 2])


@given(SAMPLES.map(lambda x: x[np.isfinite(x)]).filter(np.size))
def test_bins_are_narrow_and_lose_no_mass(values):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MANY", 1)
        points, mass = histogram(values)
    assert mass.sum() == values.size and np.all(np.diff(points) > 0)
    exact = values.astype(np.float64)
    np.testing.assert_allclose(points @ mass, exact.sum(), atol=1e-9 * abs(exact).sum())
    gap = np.abs(exact[:, None] - points).min(axis=1)
    assert np.all(gap <= 2.0**-11 * np.abs(exact) + 6e-42)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_of_16_bits_every_value_is_a_point_of_its_own(dtype, monkeypatch):
    values = np.random.default_rng(0).normal(size=2**16).astype(dtype)
    weights = np.random.default_rng(1).uniform(size=2**16)
    calls = []
    monkeypatch.setattr(module, "distinct", lambda *args: calls.append(args))
    found = histogram(values), histogram(values, weights)
    assert not calls
    np.testing.assert_array_equal(found[0], distinct(values))
    np.testing.assert_allclose(found[1], distinct(values, weights), rtol=1e-12)


def test_few_values_and_float64_are_kept_apart():
    few = np.array([1, 1 + 2.0**-23, -1, 1], np.float32)
    many = 1 + np.arange(2**19) * 2.0**-40
    np.testing.assert_array_equal(histogram(few)[0], [-1, 1, 1 + 2.0**-23])
    assert histogram(many)[0].size == many.size


def test_weights_count_values_and_leave_out_those_of_none(binned):
    values = np.array([2.0, 3.0, 2.0, 7.0], np.float32)
    for kind in (histogram, distinct):
        points, mass = kind(values, np.array([1.0, 4.0, 3.0, 0.0]))
        np.testing.assert_array_equal([points, mass], [[2, 3], [1, 1]])
        points, mass = kind(values, np.array([True, False, True, True]))
        np.testing.assert_array_equal([points, mass], [[2, 7], [2, 1]])


@pytest.mark.parametrize("dtype", DTYPES)
@given(SAMPLES, SAMPLES, st.integers(0, 20))
def test_the_table_counts_as_a_search_does(dtype, values, starts, count):
    with np.errstate(over="ignore"):
        values, starts = values.astype(dtype), starts.astype(dtype)[:count]
    starts = np.unique(order(starts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MANY", 1)
        rank = rank_among(starts, np.resize(values, 2**16))
    expected = (starts <= order(values)[:, None]).sum(axis=1)
    np.testing.assert_array_equal(rank(values), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fault_behind_the_first_piece_is_found(binned, dtype):
    values = np.zeros((2, 10), dtype)
    assert checked_finite("f", "values", values) is values
    values[1, 2:4] = np.inf, np.nan
    text = "^f needs finite values, got inf at flat index 12; 2 of 20 are not finite"
    with pytest.raises(ValueError, match=text):
        checked_finite("f", "values", values)


def test_integers_become_float64():
    assert checked_finite("f", "values", np.arange(3)).dtype == np.float64
