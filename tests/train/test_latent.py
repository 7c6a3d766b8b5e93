"""Pruned is what the model sees; below it all weights train, and may come back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.train.latent import prune_straight_through


HALF = optax.constant_schedule(0.5)
RATE = 0.125  # a power of two: products are exact, however XLA fuses them into sums


def normal(shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape).astype(np.float32)


def run(tx, params, rows, gradient=lambda params, row: row):
    """Trains over stacked rows; gives params and state after every step."""

    def step(carry, row):
        params, state = carry
        updates, state = tx.update(gradient(params, row), state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    @jax.jit
    def train(params, rows):
        return jax.lax.scan(step, (params, tx.init(params)), rows)[1]

    return train(params, rows)


def pull(params, row):
    """The gradient of ``sum((kernel - row) ** 2) / 2``."""
    return {"kernel": params["kernel"] - row}


def smallest_go(w, zeros):
    """On a tie the later one goes."""
    flat = np.abs(w).reshape(-1)
    order = np.lexsort((-np.arange(flat.size), flat))
    mask = np.ones(flat.size, bool)
    mask[order[:zeros]] = False
    return mask.reshape(w.shape)


def two_of_four(w):
    groups = np.abs(w).reshape(-1, 4, w.shape[1])
    rank = np.argsort(np.argsort(-groups, axis=1), axis=1)
    return (rank < 2).reshape(w.shape)


def test_three_steps_by_hand():
    tx = prune_straight_through(optax.sgd(1.0), HALF)
    params = {"kernel": jnp.array([[3.0, 1.0, -2.0, 0.5]])}
    grads = {"kernel": jnp.tile(jnp.array([[1.0, 0.0, 0.5, -1.0]]), (3, 1, 1))}
    kernels, states = run(tx, params, grads)
    np.testing.assert_array_equal(
        kernels["kernel"][:, 0],
        [
            [2.0, 0.0, -2.5, 0.0],  # of 2, 1, -2.5, 1.5
            [0.0, 0.0, -3.0, 2.5],  # of 1, 1, -3, 2.5: the last comes back
            [0.0, 0.0, -3.5, 3.5],
        ],
    )
    np.testing.assert_array_equal(
        states.latent["kernel"][:, 0],
        [[2.0, 1.0, -2.5, 1.5], [1.0, 1.0, -3.0, 2.5], [0.0, 1.0, -3.5, 3.5]],
    )
    assert states.count.tolist() == [1, 2, 3]


def test_it_is_a_plain_loop_of_the_straight_through_estimator():
    steps, zeros = 12, 12
    w, targets = normal((4, 6)), normal((steps, 4, 6), seed=1)
    tx = prune_straight_through(optax.sgd(RATE), HALF)
    params, states = run(tx, {"kernel": jnp.asarray(w)}, targets, pull)
    mask, back = np.ones(w.shape, bool), 0
    for t in range(steps):
        w = w - np.float32(RATE) * (np.where(mask, w, 0) - targets[t])
        before, mask = mask, smallest_go(w, zeros)
        back += np.sum(mask & ~before)
        np.testing.assert_array_equal(states.masks["kernel"][t], mask)
        np.testing.assert_array_equal(params["kernel"][t] != 0, mask)
        np.testing.assert_allclose(
            params["kernel"][t], np.where(mask, w, 0), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(states.latent["kernel"][t], w, rtol=1e-5, atol=1e-6)
    assert back > 0


def test_two_of_four_with_decay_is_sr_ste():
    steps, decay = 12, 0.5
    w, targets = normal((8, 6)), 2 * normal((steps, 8, 6), seed=1)
    tx = prune_straight_through(
        optax.sgd(RATE), HALF, decay=decay, budget=jc.prune.nm_budget(2, 4)
    )
    params, states = run(tx, {"kernel": jnp.asarray(w)}, targets, pull)
    mask, back = np.ones(w.shape, bool), 0
    for t in range(steps):
        g = np.where(mask, w, 0) - targets[t]
        w = w - np.float32(RATE) * (g + np.float32(decay) * (1 - mask) * w)
        before, mask = mask, two_of_four(w)
        back += np.sum(mask & ~before)
        jc.testing.assert_nm_sparse(params["kernel"][t], 2, 4)
        np.testing.assert_array_equal(params["kernel"][t] != 0, mask)
        np.testing.assert_allclose(
            params["kernel"][t], np.where(mask, w, 0), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(states.latent["kernel"][t], w, rtol=1e-5, atol=1e-6)
    assert back > 0


def test_the_decay_goes_through_the_optimizer():
    tx = prune_straight_through(optax.sign_sgd(RATE), HALF, decay=0.01)
    params = {"kernel": jnp.array([[3.0, -1.0]])}
    kernels, states = run(tx, params, {"kernel": jnp.zeros((3, 1, 2))})
    np.testing.assert_array_equal(kernels["kernel"][:, 0], [[3.0, 0.0]] * 3)
    # By the whole rate, not by its hundredth, and from the step after the removal on.
    np.testing.assert_array_equal(
        states.latent["kernel"][:, 0, 1], [-1.0, -0.875, -0.75]
    )


@pytest.mark.parametrize("every", [1, 3])
def test_counts_are_exact_at_every_step_and_masks_stay_between_choices(every):
    tx = prune_straight_through(optax.adam(0.3), HALF, every=every)
    grads = {"kernel": normal((12, 4, 6), seed=1)}
    params, states = run(tx, {"kernel": jnp.asarray(normal((4, 6)))}, grads)
    kernels, masks = params["kernel"], np.asarray(states.masks["kernel"])
    np.testing.assert_array_equal(np.sum(kernels == 0, axis=(1, 2)), 12)
    np.testing.assert_array_equal(kernels != 0, masks)
    changed = np.flatnonzero(np.any(masks[1:] != masks[:-1], axis=(1, 2))) + 1
    assert np.all(changed % every == 0)
    assert changed.size > 1
    assert not states.stray.any()


def test_the_end_of_the_schedule_is_hit_whatever_every_is():
    tx = prune_straight_through(
        optax.sgd(RATE), optax.linear_schedule(0.0, 0.75, 5), every=4
    )
    grads = {"kernel": normal((8, 4, 6), seed=1)}
    kernels, _ = run(tx, {"kernel": jnp.asarray(normal((4, 6)))}, grads)
    zeros = np.sum(kernels["kernel"] == 0, axis=(1, 2))
    assert zeros.tolist() == [0, 0, 0, 0, 14, 18, 18, 18]  # 0.6 of 24, then 0.75


def test_a_weight_comes_back_at_its_latent_value_bit_for_bit():
    w, grads = normal((4, 6)), normal((12, 4, 6), seed=1)
    tx = prune_straight_through(optax.sgd(RATE), HALF)
    params, states = run(tx, {"kernel": jnp.asarray(w)}, {"kernel": grads})
    masks, back = np.asarray(states.masks["kernel"]), 0
    for t in range(12):
        w = w - np.float32(RATE) * grads[t]  # as if nothing was ever pruned
        np.testing.assert_array_equal(params["kernel"][t], np.where(masks[t], w, 0))
        np.testing.assert_array_equal(states.latent["kernel"][t], w)
        back += np.sum(masks[t] & ~masks[t - 1]) if t else 0
    assert back > 5


def coarse(seed, shape):
    """Multiples of 1/8 up to 2, whose sums bfloat16 holds."""
    rng = np.random.default_rng(seed)
    return rng.integers(-8, 9, shape).astype(np.float32) / 8


@pytest.mark.parametrize("updates", ["bfloat16", "float32"])
def test_bfloat16_weights_stay_so_and_lose_nothing(updates):
    tx = prune_straight_through(optax.sgd(1.0), HALF)
    w, grads = coarse(0, (4, 6)), coarse(1, (6, 4, 6))
    params, states = run(
        tx,
        {"kernel": jnp.asarray(w, jnp.bfloat16)},
        {"kernel": jnp.asarray(grads, updates)},
    )
    assert params["kernel"].dtype == states.latent["kernel"].dtype == jnp.bfloat16
    for t in range(6):
        w = w - grads[t]
        mask = smallest_go(w, 12)
        np.testing.assert_array_equal(states.masks["kernel"][t], mask)
        np.testing.assert_array_equal(
            params["kernel"][t].astype("float32"), np.where(mask, w, 0)
        )


def test_a_link_that_is_not_the_last_is_counted():
    params = {"kernel": jnp.asarray(normal((4, 6)))}
    grads = {"kernel": normal((8, 4, 6), seed=1)}
    link = prune_straight_through(optax.identity(), HALF, every=3)
    _, states = run(optax.chain(link, optax.scale(-0.1)), params, grads)
    # Twelve weights that should be zero and are not, at the steps 3 and 6.
    assert states[0].stray.tolist() == [0, 0, 0, 12, 12, 12, 24, 24]


def test_leaves_that_are_not_pruned_train_as_without_it():
    params = {"kernel": jnp.asarray(normal((4, 6))), "bias": jnp.ones(6)}
    grads = {"kernel": normal((5, 4, 6), seed=1), "bias": normal((5, 6), seed=2)}
    inner = optax.adam(0.1)
    pruned, states = run(prune_straight_through(inner, HALF, decay=0.1), params, grads)
    free, _ = run(inner, params, grads)
    np.testing.assert_allclose(pruned["bias"], free["bias"], rtol=1e-6)
    for tree in (states.masks, states.latent):
        assert tree["bias"].shape == (5,)  # a scalar at each step


def test_the_optimizer_sees_latent_weights_and_what_update_is_given():
    def init(params):
        return params, jnp.float32(0)

    def update(updates, state, params=None, *, value):
        return updates, (params, value)

    inner = optax.GradientTransformationExtraArgs(init, update)
    tx = prune_straight_through(inner, HALF)
    params = {"kernel": jnp.array([[3.0, 1.0]])}
    still, state = {"kernel": jnp.zeros((1, 2))}, tx.init(params)
    for value in (5.0, 6.0):
        updates, state = tx.update(still, state, params, value=jnp.float32(value))
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["kernel"], [[3.0, 0.0]])
    seen, value = state.inner_state
    np.testing.assert_array_equal(seen["kernel"], [[3.0, 1.0]])
    assert value == 6.0


@jax.jit
def two_steps(w, level):
    tx = prune_straight_through(optax.sgd(1.0), lambda step: level, decay=0.5)
    params = {"kernel": w}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update({"kernel": jnp.ones_like(w)}, state, params)
        params = optax.apply_updates(params, updates)
    return params["kernel"], state.masks["kernel"], state.latent["kernel"]


@given(
    hnp.arrays(
        np.float32, (4, 6), elements=st.sampled_from([-4.0, 0.0, 1.0, 2.0, 3.5])
    ),
    st.integers(0, 23),
)
def test_the_model_sees_the_latent_weights_less_an_exact_count(w, zeros):
    kernel, mask, latent = two_steps(jnp.asarray(w), jnp.float32(zeros / 24))
    np.testing.assert_array_equal(mask, smallest_go(np.asarray(latent), zeros))
    np.testing.assert_array_equal(kernel, np.where(mask, latent, 0))
    first = smallest_go(w - 1, zeros)
    np.testing.assert_array_equal(
        latent, np.where(first, w - 2, w - 1 - (1 + 0.5 * (w - 1)))
    )


def test_every_must_be_a_positive_integer():
    sgd = optax.sgd(0.1)
    with pytest.raises(
        ValueError, match="prune_straight_through needs 1 <= every <= .* got 0"
    ):
        prune_straight_through(sgd, HALF, every=0)
    with pytest.raises(
        TypeError, match=r"prune_straight_through needs an integer every, got 2\.5"
    ):
        prune_straight_through(sgd, HALF, every=2.5)


@pytest.mark.parametrize("decay", [-0.5, float("nan")])
def test_a_negative_decay_is_an_error(decay):
    with pytest.raises(
        ValueError, match=f"prune_straight_through needs decay >= 0, got {decay}"
    ):
        prune_straight_through(optax.sgd(0.1), HALF, decay=decay)


def test_nothing_to_prune_is_an_error_that_lists_the_leaves():
    with pytest.raises(
        ValueError, match="selected none of the 1 leaves, which are bias"
    ):
        prune_straight_through(optax.sgd(0.1), HALF).init({"bias": jnp.ones((2, 3))})


def test_update_without_params_says_what_to_call():
    params = {"kernel": jnp.ones((2, 3))}
    tx = prune_straight_through(optax.sgd(0.1), HALF)
    with pytest.raises(
        ValueError, match="prune_straight_through needs the current weights: call tx"
    ):
        tx.update(params, tx.init(params))
