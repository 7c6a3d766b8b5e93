"""How far a grid reaches, by what its scales are stored, and fixed intervals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.quant import (
    largest,
    least_error,
    percentile,
    quantize,
    quantize_affine,
    quantize_interval,
    quantize_stochastically,
)


RNG = np.random.default_rng(0)
NORMAL = jnp.asarray(RNG.standard_normal((64, 32)).astype(np.float32))
TAILED = NORMAL.at[0, 0].set(50.0)
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
ARRAYS = hnp.arrays(np.float32, (3, 20), elements=FLOATS)
NARROW = partial(quantize_affine, bits=8, axis=None, group=16)


def error(node, x, power=2.0):
    return float(jnp.sum(jnp.abs(node.dense() - x) ** power))


# percentile


@given(ARRAYS, st.sampled_from([1.0, 50.0, 90.0, 100.0]))
def test_a_percentile_is_that_of_nearest_rank_over_what_is_not_zero(x, q):
    x[:, ::4] = 0
    groups = jnp.asarray(x)[None]
    ratio = np.asarray(percentile(q)(groups, None))[0]
    for row, found in zip(np.abs(x), ratio, strict=True):
        live = np.sort(row[row > 0])
        if not live.size:
            assert found == 1
            continue
        rank = max(int(np.ceil(np.float32(live.size) * np.float32(q / 100))), 1)
        expected = live[rank - 1] / live[-1]
        np.testing.assert_allclose(found, max(expected, 2.0**-126), rtol=1e-6)


def test_a_percentile_clips_what_is_beyond_it():
    node = quantize(TAILED, 4, axis=None, reach=percentile(99.9))
    assert float(jnp.max(jnp.abs(node.dense()))) < 4
    kept = jnp.abs(TAILED) < 3
    wide = quantize(TAILED, 4, axis=None)
    close = jnp.abs(node.dense() - TAILED)[kept].max()
    assert close < jnp.abs(wide.dense() - TAILED)[kept].max() / 5


def test_at_100_percent_it_is_the_largest():
    ours = quantize(NORMAL, 4, reach=percentile(100))
    np.testing.assert_array_equal(ours.dense(), quantize(NORMAL, 4).dense())


@pytest.mark.parametrize("q", [0, -1, 101, float("nan")])
def test_a_percentile_out_of_range_is_an_error(q):
    with pytest.raises(ValueError, match="percentile needs 0 < q <= 100, in percent"):
        percentile(q)


# least_error


@pytest.mark.parametrize(("grid", "power"), [(quantize, 2.0), (quantize_affine, 2.4)])
def test_no_other_ratio_has_less_error(grid, power):
    x = NORMAL[:8]
    least = error(grid(x, 3, axis=None, reach=least_error(power)), x, power)

    def at(ratio):
        return lambda groups, _: jnp.full(groups.shape[:2], ratio, groups.dtype)

    tried = [
        error(grid(x, 3, axis=None, reach=at(ratio)), x, power)
        for ratio in (1.0, 0.9, 0.8, 0.7, 0.5)
    ]
    assert least <= min(tried) * 1.00001
    assert least < tried[0]


def test_searched_scales_are_at_least_as_good_as_the_ratios():
    for bits in (2, 3, 4):
        ours = error(jc.quantize_searched(NORMAL, bits, group=32), NORMAL)
        ratios = error(quantize(NORMAL, bits, group=32, reach=least_error()), NORMAL)
        assert ours <= ratios * 1.0001


@given(ARRAYS)
def test_errors_of_any_values_stay_finite_and_zeros_stay(x):
    x[:, ::4] = 0
    for grid in (quantize, quantize_affine):
        dense = np.asarray(grid(jnp.asarray(x), 4, axis=0, reach=least_error()).dense())
        assert np.isfinite(dense).all()
        assert not dense[:, ::4].any()


@pytest.mark.parametrize("power", [0, -2.0])
def test_a_power_that_is_not_positive_is_an_error(power):
    with pytest.raises(ValueError, match="least_error needs a power above 0"):
        least_error(power)


def test_ranges_of_one_number_are_one_function_so_that_nothing_is_compiled_twice():
    assert percentile(99.0) is percentile(99.0)
    assert least_error() is least_error()


# top


def test_at_half_a_step_more_the_grid_has_a_level_more_below():
    # Steps of 1; -7.5 goes to the even -8.
    node = quantize(jnp.array([7.1, -7.5, 0.0, 1.1]), 4, axis=None, top=7.5)
    np.testing.assert_array_equal(node.dense(), [7, -8, 0, 1])
    assert node.zero is not None and node.nbits() == 16 + 32 + 8


def test_at_a_step_more_the_greatest_is_clipped_and_the_least_is_not():
    node = quantize(jnp.array([[8.0, 1.0], [-8.0, 1.0]]), 4, axis=0, top=8)
    np.testing.assert_allclose(node.dense(), [[7.0, 1.0], [-8.0, 1.0]], rtol=1e-6)


@pytest.mark.parametrize("top", [6.9, 8.1, float("nan")])
def test_a_top_out_of_range_is_an_error(top):
    with pytest.raises(ValueError, match="needs (7 <= top <= 8 for 4|a number)"):
        quantize(NORMAL, 4, top=top)


# scales


def test_scales_may_be_nodes_and_codes_are_those_of_what_they_stand_for():
    plain = quantize(NORMAL, 4, axis=0, group=8)
    node = quantize(NORMAL, 4, axis=0, group=8, scales=NARROW)
    assert isinstance(node.scale, jc.QTensor)
    assert node.nbits() == plain.codes.size * 8 + node.scale.nbits()
    assert node.describe() == "4 bits symmetric, axis 0, group 8, scales " + (
        node.scale.describe()
    )
    scale = np.asarray(node.scale.dense())
    groups = np.asarray(NORMAL).reshape(64, 4, 8)
    codes = np.clip(np.rint(groups / scale[..., None]), -7, 7)
    np.testing.assert_allclose(
        node.dense(), (codes * scale[..., None]).reshape(64, 32), rtol=1e-5, atol=1e-6
    )
    assert error(node, NORMAL) < 1.05 * error(plain, NORMAL)


def test_double_quantization_takes_four_and_an_eighth_bits():
    big = jnp.asarray(RNG.standard_normal((256, 256)).astype(np.float32))
    node = quantize(big, 4, axis=None, group=64, scales=partial(NARROW, group=256))
    assert node.nbits() / node.size == pytest.approx(4 + (8 + 40 / 256) / 64)


@pytest.mark.parametrize("grid", [quantize, quantize_affine])
def test_a_scale_that_is_stored_as_zero_makes_its_group_zero(grid):
    x = NORMAL.at[3].multiply(1e-6)  # beside others far too small for 8 bits
    node = grid(x, 4, axis=0, scales=NARROW)
    assert not node.dense()[3].any()
    assert bool(jnp.isfinite(node.dense()).all())
    again = node.encode(x)
    np.testing.assert_array_equal(again.dense(), node.dense())
    jitted = jax.jit(partial(grid, bits=4, axis=0, scales=NARROW))(x)
    np.testing.assert_array_equal(jitted.dense(), node.dense())


# intervals


@given(ARRAYS)
def test_an_interval_clamps_what_is_beyond_and_rounds_the_rest(x):
    node = quantize_interval(jnp.asarray(x), -1.0, 2.0, 4)
    dense = np.asarray(node.dense())
    step = 0.2
    np.testing.assert_allclose(float(node.scale[0, 0]), step, rtol=1e-6)
    assert np.all(np.abs(dense - np.clip(x, -1, 2)) <= step / 2 + 1e-6)
    assert not dense[x == 0].any()


def test_an_interval_is_moved_so_that_zero_is_on_the_grid():
    dense = quantize_interval(jnp.linspace(-1, 1, 9), -0.9, 1.0, 2).dense()
    np.testing.assert_allclose(np.unique(dense) / (1.9 / 3), [-1, 0, 1, 2], atol=1e-5)


@pytest.mark.parametrize(("lo", "hi"), [(0.1, 1), (-1, -0.1), (0, 0), (-1, np.inf)])
def test_an_interval_without_zero_or_end_is_an_error(lo, hi):
    with pytest.raises(ValueError, match="needs finite lo <= 0 <= hi of the range of"):
        quantize_interval(NORMAL, lo, hi)


# stochastic rounding


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 3, "axis": 0},
        {"grid": quantize_affine, "bits": 3, "axis": 0, "group": 8},
        {"grid": jc.quantize_searched, "bits": 4, "axis": None},
    ],
)
def test_the_mean_of_many_draws_is_the_value_where_the_grid_spans_it(settings):
    x = NORMAL[:4]
    keys = jax.random.split(jax.random.key(1), 400)
    draw = partial(quantize_stochastically, x=x, **settings)
    drawn = jax.jit(jax.vmap(lambda key: draw(key).dense()))(keys)
    scale = float(jnp.max(draw(keys[0]).scale))
    # What is beyond the grid is clipped, to one side of it.
    inside = np.asarray((drawn.min(axis=0) <= x) & (x <= drawn.max(axis=0)))
    assert inside.mean() > 0.5
    off = np.abs(np.asarray(drawn.mean(axis=0) - x))
    assert off[inside].max() < 5 * scale / 2 / np.sqrt(400)
    assert np.all(np.abs(np.asarray(drawn) - np.asarray(x))[:, inside] <= scale * 1.001)


def test_what_is_on_the_grid_stays_under_any_key():
    node = quantize(NORMAL, 4)
    for seed in range(3):
        key = jax.random.key(seed)
        again = quantize_stochastically(key, node.dense(), bits=4)
        np.testing.assert_allclose(again.dense(), node.dense(), rtol=1e-6)
    zeros = quantize_stochastically(key, jnp.where(NORMAL > 0, NORMAL, 0), bits=2)
    assert not zeros.dense()[NORMAL <= 0].any()


def test_two_keys_draw_other_codes_and_one_key_the_same():
    draws = [
        quantize_stochastically(jax.random.key(seed), NORMAL, bits=2).codes
        for seed in (0, 0, 1)
    ]
    assert bool((draws[0] == draws[1]).all())
    assert bool((draws[0] != draws[2]).any())


def test_the_largest_is_the_default():
    ours = quantize(NORMAL, 4, reach=largest)
    assert bool((ours.codes == quantize(NORMAL, 4).codes).all())
