"""Pruning while training hits the target, exactly, and keeps what it zeroed."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc


def normal(shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape).astype(np.float32)


def run(tx, params, grads):
    """Trains over stacked gradients; gives params and state after every step."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    start = params, tx.init(params)
    return jax.jit(lambda start, grads: jax.lax.scan(step, start, grads)[1])(
        start, grads
    )


def count_zeros(kernels):
    """int[steps]"""
    return np.sum(np.asarray(kernels) == 0, axis=(1, 2))


def numpy_mask(landed, level):
    """The smallest go; on a tie the later one goes."""
    flat = np.abs(landed).reshape(-1)
    order = np.lexsort((-np.arange(flat.size), flat))
    mask = np.ones(flat.size, bool)
    mask[order[: round(Fraction(float(level)) * flat.size)]] = False
    return mask.reshape(landed.shape)


def test_three_steps_by_hand():
    levels = jnp.array([0.0, 0.25, 0.5, 0.5])
    tx = optax.chain(
        optax.sgd(0.1),
        jc.prune_gradually(lambda step: levels[jnp.minimum(step, 3)], every=1),
    )
    params = {"kernel": jnp.array([[3.0, 0.2, -0.5, 1.0]])}
    grads = {"kernel": jnp.tile(jnp.array([[1.0, -1.0, -1.0, 0.0]]), (4, 1, 1))}
    kernels = run(tx, params, grads)[0]["kernel"]
    np.testing.assert_allclose(
        kernels[:, 0],
        [
            [2.9, 0.3, -0.4, 1.0],  # nothing is due
            [2.8, 0.0, -0.3, 1.0],  # of 2.9, 0.3, -0.4, 1 the second goes
            [2.7, 0.0, 0.0, 1.0],  # of 2.8, 0, -0.3, 1 the third goes as well
            [2.6, 0.0, 0.0, 1.0],  # nothing changes any more
        ],
        atol=1e-6,
    )
    assert count_zeros(kernels).tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("power", [1, 3])
def test_the_schedule_is_that_of_the_paper(power):
    start, steps, first, last = 5, 40, 0.1, 0.8
    schedule = optax.polynomial_schedule(
        first, last, power=power, transition_steps=steps, transition_begin=start
    )
    for t in (0, 5, 6, 17, 44, 45, 90):
        done = min(max(t - start, 0), steps) / steps
        expected = last + (first - last) * (1 - done) ** power  # Zhu and Gupta, eq. 1
        np.testing.assert_allclose(schedule(t), expected, rtol=1e-6)


def test_the_masks_are_those_of_a_plain_loop():
    steps, every = 24, 3
    schedule = optax.polynomial_schedule(
        0.0, 0.75, power=3, transition_steps=16, transition_begin=2
    )
    w, grads = normal((4, 6)), normal((steps, 4, 6), seed=1)
    tx = optax.chain(optax.sgd(0.125), jc.prune_gradually(schedule, every=every))
    params, states = run(tx, {"kernel": jnp.asarray(w)}, {"kernel": grads})
    masks, last = np.ones(w.shape, bool), None
    for t in range(steps):
        level = np.float32(schedule(t))
        tops = t > 0 and schedule(t - 1) < level and schedule(t + 1) <= level
        landed = w - np.float32(0.125) * grads[t]
        if (t % every == 0 or tops) and level != last:
            masks, last = numpy_mask(w, level), level
        w = np.where(masks, landed, 0)
        np.testing.assert_array_equal(states[1].masks["kernel"][t], masks)
        np.testing.assert_allclose(params["kernel"][t], w, atol=1e-6)
        np.testing.assert_array_equal(params["kernel"][t] == 0, w == 0)
    assert np.sum(w == 0) == 18


LINEAR = optax.linear_schedule(0.0, 0.8, 10)


@pytest.mark.parametrize(
    ("schedule", "every", "end"),
    [
        (LINEAR, 1, 10),
        (LINEAR, 7, 10),
        (LINEAR, 100, 10),
        (optax.polynomial_schedule(0.0, 0.8, 3, 9, 4), 5, 13),
        (optax.piecewise_constant_schedule(0.2, {3: 2.0, 8: 2.0}), 5, 8),
    ],
    ids=["1", "7", "100", "cubic", "stairs"],
)
def test_the_target_is_hit_at_the_end_of_the_schedule_and_stays(schedule, every, end):
    tx = optax.chain(optax.adam(0.3), jc.prune_gradually(schedule, every=every))
    params = {"kernel": jnp.asarray(normal((5, 6)))}
    grads = {"kernel": normal((20, 5, 6), seed=1)}
    kernels, states = run(tx, params, grads)
    zeros = count_zeros(kernels["kernel"])
    assert np.all(zeros[end:] == 24)
    assert np.all(zeros[:end] < 24)
    masks = np.asarray(states[1].masks["kernel"])
    assert np.all(masks[end:] == masks[-1])
    np.testing.assert_array_equal(kernels["kernel"] == 0, ~masks)
    assert states[1].sparsity[-1] == np.float32(0.8)
    assert states[1].count.tolist() == list(range(1, 21))


@jax.jit
def choice(params, level):
    """The masks of a first step, which does not trace again for another level."""
    tx = jc.prune_gradually(lambda step: level)
    still = jax.tree.map(jnp.zeros_like, params)
    return tx.update(still, tx.init(params), params)[1].masks


@pytest.mark.parametrize("target", [0.0, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_the_masks_are_those_of_one_shot_pruning(target):
    params = {"kernel": jnp.asarray(normal((4, 6)))}
    np.testing.assert_array_equal(
        choice(params, jnp.float32(target))["kernel"],
        jc.prune.masks(params, target)["kernel"],
    )


def test_counts_are_exact_at_every_choice_when_all_weights_tie():
    params = {"kernel": jnp.ones((5, 6))}
    schedule = optax.linear_schedule(0.0, 0.9, 9)
    tx = jc.prune_gradually(schedule, every=2)
    still = {"kernel": jnp.zeros((12, 5, 6))}
    kernels = np.asarray(run(tx, params, still)[0]["kernel"])
    # Every 0.1 is 3 of 30; chosen at the steps 0, 2, 4, 6, 8 and at the end, 9.
    assert count_zeros(kernels).tolist() == [0, 0, 6, 6, 12, 12, 18, 18, 24, 27, 27, 27]
    for kernel in kernels.reshape(12, -1):
        assert np.all(np.diff(kernel) <= 0)  # the later of equals goes


@given(
    hnp.arrays(
        np.float32, (4, 6), elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])
    ),
    st.integers(0, 23),
)
def test_counts_are_exact_whatever_the_weights(w, zeros):
    params = {"kernel": jnp.asarray(w)}
    masks = choice(params, jnp.float32(zeros / 24))["kernel"]
    assert np.sum(~np.asarray(masks)) == zeros
    np.testing.assert_array_equal(masks, numpy_mask(w, np.float32(zeros / 24)))


def test_a_global_budget_hits_the_count_of_all_leaves_together():
    params = {
        "big": {"kernel": jnp.asarray(10 * normal((4, 6)))},
        "small": {"kernel": jnp.asarray(normal((4, 4), seed=2))},
    }
    schedule = optax.linear_schedule(0.0, 0.6, 6)
    tx = jc.prune_gradually(schedule, every=4, budget=jc.prune.global_budget)
    still = jax.tree.map(lambda p: jnp.zeros((9, *p.shape)), params)
    kernels = run(tx, params, still)[0]
    big, small = (count_zeros(kernels[name]["kernel"]) for name in ("big", "small"))
    # Chosen at the steps 0, 4 (0.4 of 40) and 6, the end (0.6 of 40).
    assert (big + small).tolist() == [0, 0, 0, 0, 16, 16, 24, 24, 24]
    assert np.all(small[4:] > big[4:])  # the small weights go first


def test_weights_are_judged_as_they_come_into_the_step():
    params = {"kernel": jnp.array([[5.0, 1.0]])}
    tx = jc.prune_gradually(optax.constant_schedule(0.5))
    updates, _ = tx.update(
        {"kernel": jnp.array([[-4.5, 0.0]])}, tx.init(params), params
    )
    np.testing.assert_array_equal(
        optax.apply_updates(params, updates)["kernel"], [[0.5, 0.0]]
    )


def test_what_has_gone_stays_away_while_the_schedule_rises():
    tx = optax.chain(optax.adam(0.3), jc.prune_gradually(LINEAR, every=1))
    grads = {"kernel": normal((20, 5, 6), seed=1)}
    _, states = run(tx, {"kernel": jnp.asarray(normal((5, 6)))}, grads)
    masks = np.asarray(states[1].masks["kernel"])
    assert np.all(masks[1:] <= masks[:-1])


def test_a_link_that_is_not_the_last_is_counted():
    params = {"kernel": jnp.asarray(normal((4, 6)))}
    grads = {"kernel": normal((8, 4, 6), seed=1)}
    link = jc.prune_gradually(optax.constant_schedule(0.5), every=3)
    _, states = run(optax.chain(link, optax.sgd(0.1)), params, grads)
    # Twelve weights that should be zero and are not, at the steps 3 and 6.
    assert states[0].stray.tolist() == [0, 0, 0, 12, 12, 12, 24, 24]
    _, states = run(optax.chain(optax.sgd(0.1), link), params, grads)
    assert not states[1].stray.any()


def test_masked_weights_never_move_and_the_others_move_as_without_masks():
    params = {"kernel": jnp.asarray(normal((4, 6))), "bias": jnp.ones(6)}
    grads = {"kernel": normal((15, 4, 6), seed=1) + 2, "bias": jnp.ones((15, 6))}
    tx = optax.chain(
        optax.adam(0.1), jc.prune_gradually(optax.constant_schedule(0.5), every=99)
    )
    pruned, states = run(tx, params, grads)
    free, _ = run(optax.adam(0.1), params, grads)
    kept = np.asarray(states[1].masks["kernel"])
    assert np.all(kept == kept[0])
    np.testing.assert_allclose(
        pruned["kernel"], np.where(kept, free["kernel"], 0), rtol=1e-5, atol=1e-6
    )
    assert np.all(np.asarray(pruned["kernel"])[~kept] == 0)
    np.testing.assert_allclose(pruned["bias"], free["bias"], rtol=1e-6)


def test_masks_are_not_chosen_anew_once_the_schedule_has_stopped():
    params = {"kernel": jnp.asarray(normal((4, 6)))}
    tx = jc.prune_gradually(optax.constant_schedule(0.5), every=1)
    # From the second step on, the updates would make every masked weight the largest.
    size = np.abs(normal((4, 6)))
    push = np.where(size < np.median(size), np.float32(9), np.float32(0))
    pushes = np.stack([0 * push, push, push])
    kernels, states = run(tx, params, {"kernel": pushes})
    masks = np.asarray(states.masks["kernel"])
    np.testing.assert_array_equal(masks[0], push == 0)
    assert np.all(masks == masks[0])
    np.testing.assert_array_equal(kernels["kernel"] != 0, masks)


def test_a_schedule_that_falls_gives_weights_back():
    levels = jnp.array([0.5, 0.25])
    tx = jc.prune_gradually(lambda step: levels[jnp.minimum(step, 1)], every=1)
    params = {"kernel": jnp.asarray(normal((4, 6)))}
    kernels = run(tx, params, {"kernel": jnp.ones((3, 4, 6))})[0]["kernel"]
    assert count_zeros(kernels).tolist() == [12, 6, 6]


def test_only_the_leaves_of_where_are_pruned_and_the_rest_is_not_touched():
    params = {"a": jnp.asarray(normal((4, 6))), "b": jnp.asarray(normal((4, 6)))}
    tx = jc.prune_gradually(optax.constant_schedule(0.5), where=jc.path_matches("a"))
    state = tx.init(params)
    assert state.masks["b"].shape == ()
    updates, state = tx.update(params, state, params)
    assert updates["b"] is params["b"]
    assert int(jnp.sum(~state.masks["a"])) == 12


def test_compressed_leaves_are_skipped():
    w = jnp.asarray(normal((4, 6)))
    tree = {"kernel": w, "small": jc.quantize(w, bits=4)}
    trainable, rest = jc.split(tree)
    tx = optax.chain(optax.adam(0.1), jc.prune_gradually(optax.constant_schedule(0.5)))
    updates, _ = tx.update(trainable, tx.init(trainable), trainable)
    tree = jc.join(optax.apply_updates(trainable, updates), rest)
    assert int(jnp.sum(tree["kernel"] == 0)) == 12
    assert int(jnp.sum(tree["small"].scale == 0)) == 0


def test_the_score_decides_what_goes():
    params = {"kernel": jnp.asarray(normal((4, 6)))}
    score = jc.random_scores(jax.random.key(0))
    tx = jc.prune_gradually(optax.constant_schedule(0.5), score=score)
    still = jax.tree.map(jnp.zeros_like, params)
    masks = tx.update(still, tx.init(params), params)[1].masks
    np.testing.assert_array_equal(
        masks["kernel"], numpy_mask(score(params)["kernel"], 0.5)
    )


def test_every_must_be_a_positive_integer():
    with pytest.raises(
        ValueError, match="prune_gradually needs 1 <= every <= .* got 0"
    ):
        jc.prune_gradually(LINEAR, every=0)
    with pytest.raises(TypeError, match="prune_gradually needs an integer every"):
        jc.prune_gradually(LINEAR, every=2.5)


def test_nothing_to_prune_is_an_error_that_lists_the_leaves():
    with pytest.raises(
        ValueError, match="selected none of the 1 leaves, which are bias"
    ):
        jc.prune_gradually(LINEAR).init({"bias": jnp.ones((2, 3))})


def test_update_without_params_says_what_to_call():
    params = {"kernel": jnp.ones((2, 3))}
    tx = jc.prune_gradually(LINEAR)
    with pytest.raises(ValueError, match="prune_gradually needs the current weights"):
        tx.update(params, tx.init(params))
