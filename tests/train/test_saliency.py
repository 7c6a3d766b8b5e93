"""Scores that add up what gradients say about each weight, and who goes by them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.train.saliency import (
    prune_by_movement,
    prune_by_saliency,
    prune_by_soft_movement,
)


HALF = optax.constant_schedule(0.5)
DENSE = optax.constant_schedule(0.0)
RATE = 0.125  # a power of two: products are exact, however XLA fuses them into sums

MAKERS = {
    "prune_by_saliency": lambda inner: prune_by_saliency(inner, HALF, every=3),
    "prune_by_movement": lambda inner: prune_by_movement(inner, HALF),
    "prune_by_soft_movement": lambda inner: prune_by_soft_movement(
        inner, 0.4, rate=0.5, penalty=optax.constant_schedule(0.5)
    ),
}
EACH = pytest.mark.parametrize("name", MAKERS)


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


def recorder():
    """An optimizer whose state is the gradient and the weights that it saw last."""
    return optax.GradientTransformation(
        lambda params: (params, params), lambda u, state, params: (u, (u, params))
    )


def lowest_go(scores, zeros):
    """On a tie the later one goes."""
    flat = scores.reshape(-1)
    order = np.lexsort((-np.arange(flat.size), flat))
    mask = np.ones(flat.size, bool)
    mask[order[:zeros]] = False
    return mask.reshape(scores.shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_saliency_of_two_steps_by_hand():
    tx = prune_by_saliency(optax.sgd(1.0), HALF, memory=0.5, every=1)
    params = {"kernel": jnp.array([[3.0, 1.0, -2.0, 4.0]])}
    grads = {"kernel": jnp.array([[[0.5, 2.0, 1.0, 0.0]], [[9.0, 0.5, 0.5, 9.0]]])}
    kernels, states = run(tx, params, grads)
    np.testing.assert_array_equal(
        states.scores["kernel"][:, 0],
        [[0.75, 1.0, 1.0, 0.0], [0.375, 0.75, 1.25, 0.0]],
    )
    np.testing.assert_array_equal(
        kernels["kernel"][:, 0], [[0.0, -1.0, -3.0, 0.0], [0.0, -1.5, -3.5, 0.0]]
    )


def test_the_saliency_is_a_plain_loop_of_a_moving_mean():
    steps, every, memory = 12, 2, np.float32(0.75)
    w, targets = normal((4, 6)), normal((steps, 4, 6), seed=1)
    schedule = optax.linear_schedule(0.0, 0.75, 9)
    tx = prune_by_saliency(optax.sgd(RATE), schedule, memory=0.75, every=every)
    params, states = run(tx, {"kernel": jnp.asarray(w)}, targets, pull)
    mask, scores = np.ones(w.shape, bool), np.zeros(w.shape, np.float32)
    for t in range(steps):
        g = w - targets[t]
        scores = memory * scores + (1 - memory) * np.abs(w * g)
        if t % every == 0 or t == 9:  # where the schedule ends
            count = round(24 * float(schedule(t)))
            mask = lowest_go(np.where(mask, scores, -1), count)
        w = np.where(mask, w - np.float32(RATE) * g, 0)
        close(states.scores["kernel"][t], scores)
        np.testing.assert_array_equal(states.masks["kernel"][t], mask)
        np.testing.assert_array_equal(params["kernel"][t] != 0, mask)
        close(params["kernel"][t], w)
    assert np.sum(~mask) == 18


@jax.jit
def first_mask(w, g, level):
    tx = prune_by_saliency(optax.identity(), lambda step: level, memory=0.0)
    params = {"kernel": w}
    return tx.update({"kernel": g}, tx.init(params), params)[1].masks["kernel"]


VALUES = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0])
ARRAYS = hnp.arrays(np.float32, (4, 6), elements=VALUES)


@given(ARRAYS, ARRAYS, st.integers(0, 23))
def test_without_memory_it_is_weight_times_gradient_of_one_batch(w, g, zeros):
    found = first_mask(jnp.asarray(w), jnp.asarray(g), jnp.float32(zeros / 24))
    np.testing.assert_array_equal(found, lowest_go(np.abs(w * g), zeros))


def test_what_saliency_removed_stays_away_whatever_its_score_was():
    tx = prune_by_saliency(optax.sgd(RATE), HALF, every=1, memory=0.75)
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    update = jax.jit(tx.update)
    state = tx.init(params)
    ones, still = (jax.tree.map(f, params) for f in (jnp.ones_like, jnp.zeros_like))
    updates, state = update(ones, state, params)
    params = optax.apply_updates(params, updates)
    # The two that went have a score from before; a tie of all comes next.
    for score in (99.0, 0.0):
        state = state._replace(scores={"kernel": jnp.array([[score, score, 0.0, 0.0]])})
        updates, state = update(still, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params["kernel"], [[0.0, 0.0, 2.875, 3.875]])


def test_the_optimizer_sees_no_gradient_of_what_saliency_removed():
    tx = prune_by_saliency(recorder(), HALF)
    params = {"kernel": jnp.array([[3.0, 1.0]]), "bias": jnp.ones(2)}
    grads = jax.tree.map(lambda p: jnp.full_like(p, 5.0), params)
    _, state = tx.update(grads, tx.init(params), params)
    seen, weights = state.inner_state
    np.testing.assert_array_equal(seen["kernel"], [[5.0, 0.0]])
    np.testing.assert_array_equal(seen["bias"], [5.0, 5.0])
    np.testing.assert_array_equal(weights["kernel"], params["kernel"])
    assert state.latent == ()


def test_the_movement_of_two_steps_by_hand():
    tx = prune_by_movement(optax.sgd(1.0), HALF)
    params = {"kernel": jnp.array([[3.0, 1.0, -2.0, 4.0]])}
    grads = {
        "kernel": jnp.array([[[1.0, -1.0, 1.0, 0.5]], [[-2.0, 1.5, 0.0, 0.0]]]),
    }
    kernels, states = run(tx, params, grads)
    np.testing.assert_array_equal(
        states.scores["kernel"][:, 0],
        [[-3.0, 1.0, 2.0, -2.0], [1.0, -2.0, 2.0, -2.0]],
    )
    # The first comes back at 2, as it was, and not at 4 where its gradient points.
    np.testing.assert_array_equal(
        kernels["kernel"][:, 0], [[0.0, 2.0, -3.0, 0.0], [2.0, 0.0, -3.0, 0.0]]
    )
    np.testing.assert_array_equal(
        states.latent["kernel"][:, 0], [[2.0, 2.0, -3.0, 3.5], [2.0, 0.5, -3.0, 3.5]]
    )


def test_the_score_after_some_steps_is_the_closed_form_of_the_paper():
    steps = 7
    w, g = normal((4, 6)), normal((4, 6), seed=1)
    tx = prune_by_movement(optax.sgd(RATE), DENSE)
    grads = {"kernel": np.broadcast_to(g, (steps, 4, 6))}
    _, states = run(tx, {"kernel": jnp.asarray(w)}, grads)
    # The sum of -g * w(t) over t, where w(t) = w - rate * t * g.
    expected = -g * w * steps + RATE * g**2 * steps * (steps - 1) / 2
    np.testing.assert_allclose(states.scores["kernel"][-1], expected, rtol=1e-4)


def test_movement_pruning_is_a_plain_loop_that_keeps_the_best_scores():
    steps, zeros = 12, 12
    w, targets = normal((4, 6)), normal((steps, 4, 6), seed=1)
    tx = prune_by_movement(optax.sgd(RATE), HALF)
    params, states = run(tx, {"kernel": jnp.asarray(w)}, targets, pull)
    mask, scores, back = np.ones(w.shape, bool), np.zeros(w.shape, np.float32), 0
    for t in range(steps):
        g = np.where(mask, w, 0) - targets[t]  # as the model sees the weights
        scores = scores - w * g
        w = np.where(mask, w - np.float32(RATE) * g, w)
        before, mask = mask, lowest_go(scores, zeros)
        back += np.sum(mask & ~before)
        close(states.scores["kernel"][t], scores)
        np.testing.assert_array_equal(states.masks["kernel"][t], mask)
        np.testing.assert_array_equal(params["kernel"][t] != 0, mask)
        close(params["kernel"][t], np.where(mask, w, 0))
    assert back > 0


def test_masks_of_movement_stay_between_choices_and_hit_the_end_of_the_schedule():
    schedule = optax.linear_schedule(0.0, 0.75, 5)
    tx = prune_by_movement(optax.adam(0.1), schedule, every=4)
    grads = {"kernel": normal((12, 4, 6), seed=1)}
    kernels, states = run(tx, {"kernel": jnp.asarray(normal((4, 6)))}, grads)
    zeros = np.sum(kernels["kernel"] == 0, axis=(1, 2))
    assert zeros.tolist() == [0] * 4 + [14] + [18] * 7  # 0.6 of 24, then 0.75
    masks = np.asarray(states.masks["kernel"])
    changed = np.flatnonzero(np.any(masks[1:] != masks[:-1], axis=(1, 2))) + 1
    assert changed.tolist() == [4, 5, 8]


@pytest.mark.parametrize("name", ["prune_by_movement", "prune_by_soft_movement"])
def test_a_removed_weight_is_not_moved_by_moments_and_comes_back_as_it_was(name):
    tx = MAKERS[name](optax.adam(0.1))
    grads = {"kernel": 3 * normal((12, 4, 6), seed=1)}
    params, states = run(tx, {"kernel": jnp.asarray(normal((4, 6)))}, grads)
    kernels, latent, masks = (
        np.asarray(tree["kernel"]) for tree in (params, states.latent, states.masks)
    )
    away = back = 0
    for t in range(1, 12):
        stays, returns = ~masks[t] & ~masks[t - 1], masks[t] & ~masks[t - 1]
        np.testing.assert_array_equal(latent[t][stays], latent[t - 1][stays])
        np.testing.assert_array_equal(kernels[t][returns], latent[t - 1][returns])
        assert np.all(kernels[t][~masks[t]] == 0)
        away, back = away + stays.sum(), back + returns.sum()
    assert away > 5
    assert back > 5


def test_the_optimizer_sees_removed_weights_as_they_were_and_no_gradient_of_them():
    tx = prune_by_movement(recorder(), HALF)
    params = {"kernel": jnp.array([[3.0, 1.0]]), "bias": jnp.ones(2)}
    grads = {"kernel": jnp.array([[1.0, -1.0]]), "bias": jnp.ones(2)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    seen, weights = state.inner_state
    np.testing.assert_array_equal(seen["kernel"], [[0.0, -1.0]])
    np.testing.assert_array_equal(weights["kernel"], [[4.0, 0.0]])
    np.testing.assert_array_equal(seen["bias"], [1.0, 1.0])


def test_soft_movement_is_a_plain_loop_of_the_formula():
    steps, threshold, rate = 12, 0.4, 0.5
    w, targets = normal((4, 6)), normal((steps, 4, 6), seed=1)
    penalty = optax.linear_schedule(0.0, 1.0, 8)
    tx = prune_by_soft_movement(optax.sgd(RATE), threshold, rate=rate, penalty=penalty)
    params, states = run(tx, {"kernel": jnp.asarray(w)}, targets, pull)
    mask, scores, back = np.ones(w.shape, bool), np.zeros(w.shape, np.float32), 0
    for t in range(steps):
        g = np.where(mask, w, 0) - targets[t]
        share = sigmoid(scores)
        scores = scores - rate * (w * g + min(t / 8, 1) * share * (1 - share))
        w = np.where(mask, w - np.float32(RATE) * g, w)
        before, mask = mask, sigmoid(scores) > threshold
        back += np.sum(mask & ~before)
        close(states.scores["kernel"][t], scores)
        np.testing.assert_array_equal(states.masks["kernel"][t], mask)
        np.testing.assert_array_equal(params["kernel"][t] != 0, mask)
        close(params["kernel"][t], np.where(mask, w, 0))
    assert back > 0


def test_the_zeros_of_soft_movement_grow_with_the_penalty():
    params = {"kernel": jnp.asarray(normal((4, 6)))}
    grads = {"kernel": 0.3 * normal((8, 4, 6), seed=1)}

    @jax.jit
    def zeros(penalty):
        tx = prune_by_soft_movement(
            optax.sgd(RATE), 0.3, rate=0.5, penalty=lambda step: penalty
        )
        return jnp.sum(run(tx, params, grads)[0]["kernel"][-1] == 0)

    found = [int(zeros(jnp.float32(p))) for p in (0.0, 0.5, 1.0, 2.0)]
    assert all(a < b for a, b in zip(found[:-1], found[1:], strict=True))


@EACH
def test_scores_of_bfloat16_weights_are_float32(name):
    tx = MAKERS[name](optax.sgd(RATE))
    narrow = {"kernel": jnp.asarray(normal((4, 6)), jnp.bfloat16)}
    grads = {"kernel": jnp.asarray(normal((3, 4, 6), seed=1), jnp.bfloat16)}
    params, states = run(tx, narrow, grads)
    assert params["kernel"].dtype == jnp.bfloat16
    assert states.scores["kernel"].dtype == jnp.float32
    masks = np.asarray(states.masks["kernel"])
    np.testing.assert_array_equal(params["kernel"] != 0, masks)
    assert not masks[-1].all()


def test_the_product_of_two_bfloat16_is_not_rounded():
    params = {"kernel": jnp.full((2, 3), 1.0078125, jnp.bfloat16)}
    tx = prune_by_movement(optax.identity(), HALF)
    # Not under jit, where XLA keeps the digits of a product by itself.
    _, state = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(state.scores["kernel"], -(1.0078125**2))


@EACH
def test_leaves_that_are_not_pruned_have_no_score_and_train_as_without_it(name):
    inner = optax.adam(0.1)
    params = {"kernel": jnp.asarray(normal((4, 6))), "bias": jnp.ones(6)}
    grads = {"kernel": normal((5, 4, 6), seed=1), "bias": normal((5, 6), seed=2)}
    pruned, states = run(MAKERS[name](inner), params, grads)
    free, _ = run(inner, params, grads)
    close(pruned["bias"], free["bias"])
    np.testing.assert_array_equal(states.scores["bias"], np.zeros(5))
    np.testing.assert_array_equal(states.masks["bias"], np.ones(5, bool))
    assert not states.stray.any()


@EACH
def test_a_link_that_is_not_the_last_is_counted(name):
    link = MAKERS[name](optax.identity())
    params = {"kernel": jnp.asarray(normal((4, 6)))}
    grads = {"kernel": normal((5, 4, 6), seed=1)}
    _, states = run(optax.chain(link, optax.scale(-0.1)), params, grads)
    gone = int(np.sum(~states[0].masks["kernel"][0]))
    assert gone > 0
    # Looked for when masks are chosen, or at the second update.
    first = 3 if name == "prune_by_saliency" else 1
    expected = [0] * first + [gone] * (5 - first)
    assert states[0].stray.tolist() == expected


@pytest.mark.parametrize("maker", [prune_by_saliency, prune_by_movement])
def test_every_must_be_a_positive_integer(maker):
    name = maker.__name__
    with pytest.raises(ValueError, match=f"{name} needs 1 <= every <= .* got 0"):
        maker(optax.sgd(0.1), HALF, every=0)
    with pytest.raises(TypeError, match=f"{name} needs an integer every, got 2.5"):
        maker(optax.sgd(0.1), HALF, every=2.5)


@pytest.mark.parametrize("memory", [-0.1, 1.0, float("nan")])
def test_a_memory_out_of_range_is_an_error(memory):
    with pytest.raises(
        ValueError, match=f"prune_by_saliency needs 0 <= memory < 1, got {memory}"
    ):
        prune_by_saliency(optax.sgd(0.1), HALF, memory=memory)


@pytest.mark.parametrize("threshold", [0.0, 0.5, float("nan")])
def test_a_threshold_that_keeps_or_removes_all_is_an_error(threshold):
    with pytest.raises(
        ValueError,
        match=f"prune_by_soft_movement needs 0 < threshold < 0.5, got {threshold}",
    ):
        prune_by_soft_movement(optax.sgd(0.1), threshold, rate=1.0, penalty=HALF)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_is_not_positive_is_an_error(rate):
    with pytest.raises(
        ValueError, match=f"prune_by_soft_movement needs rate > 0, got {rate}"
    ):
        prune_by_soft_movement(optax.sgd(0.1), 0.1, rate=rate, penalty=HALF)


@EACH
def test_nothing_to_prune_is_an_error_that_lists_the_leaves(name):
    tx = MAKERS[name](optax.sgd(0.1))
    with pytest.raises(
        ValueError, match="selected none of the 1 leaves, which are bias"
    ):
        tx.init({"bias": jnp.ones((2, 3))})


@EACH
def test_update_without_params_says_what_to_call(name):
    params = {"kernel": jnp.ones((2, 3))}
    tx = MAKERS[name](optax.sgd(0.1))
    with pytest.raises(
        ValueError, match=f"{name} needs the current weights: call tx.update"
    ):
        tx.update(params, tx.init(params))


def test_the_best_scores_of_a_global_budget_stay_wherever_they_are():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    tx = prune_by_movement(optax.identity(), HALF, budget=jc.prune.global_budget)
    grads = {"a": jnp.full((2, 2), -1.0), "b": jnp.full((2, 2), 1.0)}
    masks = tx.update(grads, tx.init(params), params)[1].masks
    assert jax.tree.map(lambda m: int(m.sum()), masks) == {"a": 4, "b": 0}
