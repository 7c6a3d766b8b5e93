"""Ranges of activations: averaged, cut at a percentile, and quantized in."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.train.ranges import fake_quantize_range, moving_range, percentile_range


VALUES = st.sampled_from([0.0, 1.0, -1.0, 0.5]) | st.floats(
    -4, 4, width=32, allow_subnormal=False
)
SAMPLES = hnp.arrays(np.float32, (4, 6), elements=VALUES)


def normal(shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def extremes(x):
    return jnp.stack([jnp.min(x, initial=0), jnp.max(x, initial=0)])


# moving_range


def test_the_average_starts_at_the_first_range_and_moves_by_one_minus_decay(strict):
    first, second = jnp.array([[1.0, -2.0]]), jnp.array([[3.0, 1.0]])
    start = moving_range(jnp.zeros(2), first)
    np.testing.assert_array_equal(start, [-2, 1])
    moved = moving_range(start, second, decay=0.75)
    np.testing.assert_allclose(moved, [-1.5, 1.5])  # 0 is inside the second range


@given(SAMPLES)
def test_it_is_the_moving_average_of_numpy(x):
    limits, want = jnp.zeros(2), np.zeros(2)
    for row in x:
        limits = moving_range(limits, jnp.asarray(row), decay=0.9)
        now = np.array([min(row.min(), 0), max(row.max(), 0)])
        want = 0.9 * want + 0.1 * now if want.any() else now
    np.testing.assert_allclose(limits, want, rtol=1e-5, atol=1e-6)


def test_batches_of_zeros_at_the_start_do_not_count():
    limits = moving_range(jnp.zeros(2), jnp.zeros(3))
    np.testing.assert_array_equal(moving_range(limits, jnp.ones(3)), [0, 1])


def test_a_narrow_array_moves_a_range_in_float32(strict):
    start = jnp.array([0.0, 1.0])
    moved = moving_range(start, jnp.full(3, 2.0, jnp.bfloat16), decay=0.999)
    assert moved.dtype == jnp.float32
    np.testing.assert_allclose(moved, [0, 1.001], rtol=1e-6)


# percentile_range


def test_the_percentile_by_hand(strict):
    x = jnp.array([[5.0, -1.0], [2.0, 100.0], [0.0, -3.0]])
    np.testing.assert_array_equal(percentile_range(x, 80), [-3, 5])
    np.testing.assert_array_equal(percentile_range(x, 50), [-2, 2])
    np.testing.assert_array_equal(percentile_range(x, 100), [-3, 100])


@given(SAMPLES, st.sampled_from([0.1, 10, 50, 62.5, 99, 99.9, 100]))
@settings(max_examples=40)
def test_it_is_the_percentile_of_numpy(x, percentile):
    low, high = percentile_range(jnp.asarray(x), percentile)
    reach = np.percentile(np.abs(x), percentile, method="inverted_cdf")
    assert float(low) == max(-reach, min(x.min(), 0))
    assert float(high) == min(reach, max(x.max(), 0))


def test_a_share_of_many_values_is_counted_exactly():
    x = jnp.arange(1.0, 10_001.0)
    assert float(percentile_range(x, 99.9)[1]) == 9990
    assert float(percentile_range(x)[1]) == 9990


def test_narrow_and_empty_and_single_values_have_a_percentile(strict):
    x = jnp.array([1.0, -2.0, 3.0, 300.0], jnp.bfloat16)
    np.testing.assert_array_equal(percentile_range(x, 75), np.float32([-2, 3]))
    np.testing.assert_array_equal(percentile_range(jnp.zeros((0, 3))), [0, 0])
    np.testing.assert_array_equal(percentile_range(jnp.float32(-3.0)), [-3, 0])


# fake_quantize_range


def test_values_and_gradients_by_hand(strict):
    x = jnp.array([-1.0, -0.5, 0.0, 0.7, 2.5, 2.6])
    limits = jnp.array([-0.5, 2.5])  # a step of 1, and its zero point is round(0.5)
    y, back = jax.vjp(lambda x: fake_quantize_range(x, limits, bits=2), x)
    np.testing.assert_array_equal(y, [0, 0, 0, 1, 2, 2])  # clipped, then rounded
    np.testing.assert_array_equal(back(jnp.ones(6))[0], [0, 1, 1, 1, 1, 0])


@partial(jax.jit, static_argnums=1)
def in_its_range(x, bits):
    return fake_quantize_range(x, extremes(x), bits=bits)


@given(SAMPLES, st.sampled_from([2, 4, 8]))
@settings(max_examples=40)
def test_in_its_own_range_it_is_quantize_affine(x, bits):
    x = jnp.asarray(x)
    y = fake_quantize_range(x, extremes(x), bits=bits)
    want = jc.quantize_affine(x, bits=bits, axis=None).dense()
    np.testing.assert_array_equal(in_its_range(x, bits), want)
    np.testing.assert_array_equal(y, want)
    assert not np.asarray(y)[np.asarray(x) == 0].any()


def test_in_its_own_range_it_is_quantize_affine_in_bfloat16_too():
    x = normal((4, 6)).astype(jnp.bfloat16)
    y = fake_quantize_range(x, extremes(x).astype(jnp.float32), bits=4)
    want = jc.quantize_affine(x, bits=4, axis=None).dense()
    assert y.dtype == want.dtype
    np.testing.assert_array_equal(y.astype(float), want.astype(float))


@given(SAMPLES, hnp.arrays(np.float32, (2,), elements=st.floats(-2, 2, width=32)))
def test_every_range_has_at_most_all_its_codes_and_a_zero(x, limits):
    low, high = min(limits.min(), 0), max(limits.max(), 0)
    y = np.asarray(fake_quantize_range(jnp.asarray(x), jnp.sort(limits), bits=3))
    step = (high - low) / 7
    assert np.all(y >= low - step * 0.501 - 1e-6)
    assert np.all(y <= high + step * 0.501 + 1e-6)
    assert len(np.unique(y)) <= 8
    assert not y[x == 0].any()


def test_a_training_step_averages_and_quantizes_in_one_trace():
    kernel, xs = normal((6, 4)), normal((5, 8, 6), seed=1)

    @chex.assert_max_traces(n=1)
    def step(carry, x):
        kernel, limits = carry

        def loss(kernel):
            hidden = jax.nn.relu(x @ kernel)
            seen = moving_range(limits, hidden)
            return jnp.mean(fake_quantize_range(hidden, seen, bits=4) ** 2), seen

        grads, seen = jax.grad(loss, has_aux=True)(kernel)
        return (kernel - 0.1 * grads, seen), seen

    seen = jax.jit(lambda start, xs: jax.lax.scan(step, start, xs)[1])(
        (kernel, jnp.zeros(2)), xs
    )
    assert np.all(np.asarray(seen[:, 0]) == 0)  # a relu
    assert np.all(np.asarray(seen[:, 1]) > 0)


def test_an_empty_range_holds_nothing_but_zero():
    x = jnp.array([-1.0, 0.0, 1.0])
    np.testing.assert_array_equal(fake_quantize_range(x, jnp.zeros(2)), [0, 0, 0])


FUNCTIONS = {
    "moving_range": moving_range,
    "percentile_range": lambda limits, x: percentile_range(x),
    "fake_quantize_range": lambda limits, x: fake_quantize_range(x, limits),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jit_vmap_and_the_other_platforms(name, strict):
    limits, x = jnp.tile(jnp.array([-1.0, 2.0]), (3, 1)), normal((3, 4, 6))
    fn = FUNCTIONS[name]
    each = jnp.stack([fn(*pair) for pair in zip(limits, x, strict=True)])
    jitted = jax.jit(jax.vmap(fn))
    np.testing.assert_allclose(jitted(limits, x), each, rtol=1e-6)
    jax.export.export(jitted, platforms=("cpu", "cuda", "tpu"))(limits, x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_integers_are_an_error(name):
    with pytest.raises(TypeError, match=f"{name} needs a floating array, got int32"):
        FUNCTIONS[name](jnp.zeros(2), jnp.ones(3, jnp.int32))


@pytest.mark.parametrize("name", ["moving_range", "fake_quantize_range"])
def test_limits_are_two_numbers(name):
    with pytest.raises(ValueError, match=rf"{name} needs limits of .* float32\[3\]"):
        FUNCTIONS[name](jnp.zeros(3), jnp.ones(3))
    with pytest.raises(TypeError, match=f"{name} needs a floating array, got int32"):
        FUNCTIONS[name](jnp.zeros(2, jnp.int32), jnp.ones(3))


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_a_decay_outside_its_range_is_an_error(decay):
    with pytest.raises(ValueError, match="moving_range needs 0 <= decay <= 1, got"):
        moving_range(jnp.zeros(2), jnp.ones(3), decay)


@pytest.mark.parametrize("percentile", [0, -1, 100.5, float("nan")])
def test_a_percentile_outside_its_range_is_an_error(percentile):
    with pytest.raises(ValueError, match="percentile_range needs 0 < percentile <= 10"):
        percentile_range(jnp.ones(3), percentile)


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_outside_their_range_are_an_error(bits):
    with pytest.raises(ValueError, match="fake_quantize_range needs 2 <= bits <= 8"):
        fake_quantize_range(jnp.ones(3), jnp.ones(2), bits)
