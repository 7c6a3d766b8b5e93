import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc


VALUES = st.sampled_from([0.0, 1.0, -1.0, 0.5]) | st.floats(-4, 4, width=32)
SAMPLES = hnp.arrays(np.float32, (4, 6), elements=VALUES)
STEPS = st.sampled_from([0.25, 0.7, 1.5])
GRIDS = {
    "symmetric": (jc.quantize, {"bits": 4}),
    "affine": (jc.quantize_affine, {"bits": 3, "axis": None}),
    "searched": (jc.quantize_searched, {"bits": 2, "group": 2}),
    "by step": (jc.quantize_step, {"step": 0.3, "bits": 6}),
}


# fake_quantize


@pytest.mark.parametrize("name", GRIDS)
def test_the_value_is_that_of_the_grid_and_the_gradient_that_of_x(name, strict):
    grid, settings = GRIDS[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32))

    @jax.jit
    def loss(x):
        y = jc.fake_quantize(x, grid, **settings)
        return jnp.sum(y**3), y

    grads, y = jax.grad(loss, has_aux=True)(x)
    np.testing.assert_array_equal(y, grid(x, **settings).dense())
    np.testing.assert_allclose(grads, 3 * y**2, rtol=1e-6)


@given(SAMPLES, st.sampled_from(list(GRIDS)))
def test_zeros_stay_zeros(x, name):
    grid, settings = GRIDS[name]
    y = jc.fake_quantize(jnp.asarray(x), grid, **settings)
    assert not np.asarray(y)[x == 0].any()


def test_what_is_trained_is_what_is_stored():
    key = jax.random.key(0)
    x = jax.random.normal(key, (64, 8))
    y = jnp.sin(x @ jax.random.normal(jax.random.key(1), (8, 4)))
    start = {"kernel": jax.random.normal(jax.random.key(2), (8, 4))}
    masks = jc.prune.masks(start, 0.5)
    params = jc.apply_masks(start, masks)
    tx = optax.chain(optax.adam(1e-2), jc.keep_zeros())

    def loss(params):
        kernel = jc.fake_quantize(params["kernel"], bits=3)
        return jnp.mean((x @ kernel - y) ** 2)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, first = tx.init(params), float(loss(params))
    for _ in range(100):
        params, state, _ = step(params, state)
    small = jc.quantize_tree(params, bits=3)
    stored = jnp.mean((x @ jc.densify(small)["kernel"] - y) ** 2)
    assert float(stored) == pytest.approx(float(loss(params)), rel=1e-6)
    assert float(stored) < 0.8 * first
    assert not np.asarray(jc.densify(small)["kernel"])[~masks["kernel"]].any()


# learned_step


def test_the_gradient_of_the_step_is_that_of_the_paper(strict):
    x, step = jnp.array([0.3, -0.9, 2.0, 0.0, 0.5]), jnp.float32(0.5)
    value, grads = jax.value_and_grad(
        lambda x, step: jnp.sum(jc.learned_step(x, step, -2, 1)), argnums=(0, 1)
    )(x, step)
    # Codes round(0.6) = 1, round(-1.8) = -2, 1 where 4 is clipped, 0 and 1.
    assert float(value) == -0.5 + 0.5 + 0.5
    np.testing.assert_array_equal(grads[0], [1, 1, 0, 1, 1])  # both ends included
    inside = (1 - 0.6) + (-2 + 1.8) + (0 - 0) + (1 - 1)
    assert float(grads[1]) == pytest.approx((inside + 1) / np.sqrt(5 * 1), rel=1e-5)


@given(SAMPLES, STEPS)
def test_it_is_the_rule_of_the_paper_in_numpy(x, step):
    ratio = x / np.float32(step)
    low, high = -3, 7
    want = np.rint(np.clip(ratio, low, high)) * np.float32(step)
    slope = np.where(ratio < low, low, np.rint(ratio) - ratio)
    slope = np.where(ratio > high, high, slope).sum() / np.sqrt(x.size * high)
    y = jc.learned_step(jnp.asarray(x), jnp.float32(step), low, high)
    np.testing.assert_array_equal(y, want)
    got = jax.grad(lambda s: jnp.sum(jc.learned_step(jnp.asarray(x), s, low, high)))(
        jnp.float32(step)
    )
    assert float(got) == pytest.approx(float(slope), abs=1e-4)


@given(SAMPLES, STEPS)
def test_a_symmetric_one_has_the_values_of_quantize_step(x, step):
    step = max(step, float(np.abs(x).max()) / 7)
    ours = jc.learned_step(jnp.asarray(x), jnp.float32(step), -7, 7)
    stored = jc.quantize_step(jnp.asarray(x), float(np.float32(step)), bits=4)
    np.testing.assert_array_equal(ours, stored.dense())


def test_a_weight_on_the_end_of_its_grid_still_trains():
    x = jnp.array([-1.0, 1.0])
    grads = jax.grad(lambda x: jnp.sum(jc.learned_step(x, jnp.float32(1 / 7), -7, 7)))(
        x
    )
    np.testing.assert_array_equal(grads, [1, 1])


def test_a_step_for_each_channel_broadcasts(strict):
    x, step = jnp.ones((3, 4)), jnp.full((1, 4), 0.5)
    assert jc.learned_step(x, step, -1, 1).shape == (3, 4)
    grads = jax.grad(lambda s: jnp.sum(jc.learned_step(x, s, -1, 1)))(step)
    assert grads.shape == (1, 4)


@pytest.mark.parametrize(("low", "high"), [(1, 2), (-1, 0), (0, -1)])
def test_bounds_that_do_not_hold_zero_are_an_error(low, high):
    with pytest.raises(ValueError, match="learned_step needs low <= 0 < high"):
        jc.learned_step(jnp.ones(2), jnp.float32(1), low, high)


# learned_clip


@given(SAMPLES, st.sampled_from([0.5, 1.0, 2.5]))
def test_it_is_a_clipped_relu_on_levels(x, clip):
    y = np.asarray(jc.learned_clip(jnp.asarray(x), jnp.float32(clip), bits=2))
    want = np.rint(np.clip(x, 0, clip) / np.float32(clip / 3)) * np.float32(clip / 3)
    np.testing.assert_allclose(y, want, atol=1e-6)
    assert np.unique(y).size <= 4


def test_the_bound_learns_from_what_it_clips():
    x = jnp.array([-1.0, 0.0, 0.4, 2.0, 3.0])
    grads = jax.grad(lambda x, c: jnp.sum(jc.learned_clip(x, c, 4)), argnums=(0, 1))(
        x, jnp.float32(2.0)
    )
    np.testing.assert_array_equal(grads[0], [0, 1, 1, 1, 0])
    assert float(grads[1]) == 1


@pytest.mark.parametrize("bits", [0, 9])
def test_a_width_out_of_range_is_an_error(bits):
    with pytest.raises(ValueError, match="learned_clip needs 1 <= bits <= 8"):
        jc.learned_clip(jnp.ones(2), jnp.float32(1), bits)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jc.fake_quantize(x),
        lambda x: jc.learned_step(x, jnp.float32(1), -1, 1),
        lambda x: jc.learned_clip(x, jnp.float32(1)),
    ],
)
def test_integers_are_an_error(fn):
    with pytest.raises(TypeError, match="needs a floating array"):
        fn(jnp.arange(4))


def test_a_learned_threshold_is_that_of_the_paper_with_its_gradients():
    x, score = jnp.array([1.0, -0.25, -2.0, 0.0]), jnp.array(0.0)
    np.testing.assert_array_equal(jc.learned_threshold(x, score), [0.5, 0, -1.5, 0])
    weights = jnp.array([1.0, 10.0, 3.0, 10.0])

    def loss(x, score):
        return jnp.sum(weights * jc.learned_threshold(x, score))

    by_x, by_score = jax.grad(loss, (0, 1))(x, score)
    np.testing.assert_array_equal(by_x, [1.0, 0.0, 3.0, 0.0])
    # -sigmoid'(0) * sum of weights * sign(x) over what is left
    np.testing.assert_allclose(by_score, -0.25 * (1.0 - 3.0))
