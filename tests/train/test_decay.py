import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

import jaxcomp as jc


def lengths(tx, trees, factor=1.0):
    """How long the update of a gradient of ones is, with each tree as the weights."""
    state, found = tx.init(trees[0]), []
    for params in trees:
        ones = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(ones, state, params)
        found.append(float(jax.tree.leaves(updates)[0].ravel()[0]) * factor)
    return found


def kernel(*values):
    return {"bias": jnp.zeros(2), "kernel": jnp.array([values])}


def test_the_staircase_is_rate_to_the_number_of_whole_periods(strict):
    tx = jc.decay_learning_rate(rate=0.9, every=3)
    found = lengths(tx, [kernel(1.0)] * 10)
    np.testing.assert_allclose(found, [0.9 ** (k // 3) for k in range(10)], rtol=1e-6)


def test_it_decays_whatever_the_optimizer_and_its_own_schedule_do():
    params = kernel(1.0, 2.0)
    rate = optax.cosine_decay_schedule(1e-2, 20)
    plain = optax.adam(lambda step: rate(step) * 0.5 ** (step // 4))
    linked = optax.chain(optax.adam(rate), jc.decay_learning_rate(0.5, every=4))
    np.testing.assert_allclose(
        lengths(plain, [params] * 12), lengths(linked, [params] * 12), rtol=1e-5
    )


@pytest.mark.parametrize("rate", [0.0, -0.5, 1.5, float("nan")])
def test_a_rate_outside_its_range_is_an_error(rate):
    with pytest.raises(ValueError, match="decay_learning_rate needs 0 < rate <= 1"):
        jc.decay_learning_rate(rate, every=3)


@pytest.mark.parametrize("every", [0, -1])
def test_a_period_below_one_is_an_error(every):
    with pytest.raises(ValueError, match="decay_learning_rate needs 1 <= every"):
        jc.decay_learning_rate(0.5, every)


def test_the_decay_restarts_when_zeros_come_go_or_move():
    a, b, c = kernel(1.0, 2.0, 3.0), kernel(0.0, 2.0, 3.0), kernel(1.0, 2.0, 0.0)
    tx = jc.restart_decay(lambda step: 1.0 / (1 + step))
    found = lengths(tx, [a, a, b, b, b, c, c, a])
    np.testing.assert_allclose(found, [1, 1 / 2, 1, 1 / 2, 1 / 3, 1, 1 / 2, 1])


def test_other_leaves_and_other_values_do_not_restart_it():
    trees = [
        {"bias": jnp.ones(2) * k, "kernel": jnp.full((2, 2), k + 1.0)} for k in range(4)
    ]
    tx = jc.restart_decay(lambda step: 0.5**step)
    assert lengths(tx, trees) == [1, 0.5, 0.25, 0.125]


@given(hnp.arrays(np.bool_, (2, 3, 4)))
def test_two_sets_of_zeros_are_told_apart(zeros):
    before, after = (jnp.where(z, 0.0, 1.0) for z in zeros)
    tx = jc.restart_decay(lambda step: 0.5**step)
    state = tx.init({"kernel": before})
    ones = {"kernel": jnp.ones((3, 4))}
    _, state = tx.update(ones, state, {"kernel": before})
    updates, _ = tx.update(ones, state, {"kernel": after})
    same = bool((zeros[0] == zeros[1]).all())
    assert float(updates["kernel"][0, 0]) == (0.5 if same else 1.0)


def test_it_follows_a_pruning_link_of_the_same_chain():
    params = {"kernel": jnp.arange(1.0, 13.0).reshape(3, 4)}
    tx = optax.chain(
        jc.restart_decay(lambda step: 0.5**step),
        jc.prune_gradually(optax.linear_schedule(0.0, 0.5, 4), every=2),
    )

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state, state[0].since

    state, since = tx.init(params), []
    for _ in range(8):
        params, state, steps = step(params, state)
        since.append(int(steps))
    assert since == [1, 2, 3, 1, 2, 1, 2, 3]  # pruned in the updates 2 and 4, from 0


def test_narrow_updates_keep_their_dtype(strict):
    tx = jc.restart_decay(optax.linear_schedule(1.0, 0.0, 10))
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["kernel"].dtype == jnp.bfloat16


def test_the_weights_are_needed():
    tx = jc.restart_decay(lambda step: 1.0)
    with pytest.raises(ValueError, match="restart_decay needs the current weights"):
        tx.update(kernel(1.0), tx.init(kernel(1.0)))


# What every link promises; those that hold masks have a table in tests/contract/.
LINKS = {
    "decay_learning_rate": jc.decay_learning_rate(0.5, every=2),
    "restart_decay": jc.restart_decay(lambda step: 1 / (1 + step)),
}


def stepper(tx):
    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        zeroed = jax.tree.map(lambda p: jnp.where(jnp.abs(p) < 0.1, 0.0, p), params)
        return (zeroed, state), None

    return step


@pytest.mark.parametrize("name", LINKS)
def test_scan_vmap_and_a_saved_state_do_what_a_loop_does(name):
    chex.clear_trace_counter()
    tx = optax.chain(optax.adam(0.1), LINKS[name])
    step = jax.jit(chex.assert_max_traces(stepper(tx), n=1))
    keys = jax.random.split(jax.random.key(0), 3)
    starts = {"kernel": jax.random.normal(keys[0], (2, 3, 4)), "gain": jnp.ones(2)}
    grads = {"kernel": jax.random.normal(keys[1], (6, 3, 4)), "gain": jnp.ones(6)}

    def loop(carry, rows):
        for i in rows:
            carry, _ = step(carry, {key: grad[i] for key, grad in grads.items()})
        return carry

    def scan(start):
        return jax.lax.scan(stepper(tx), (start, tx.init(start)), grads)[0]

    params = jax.tree.map(lambda p: p[0], starts)
    carry = loop((params, tx.init(params)), range(6))
    chex.assert_trees_all_close(scan(params), carry, rtol=1e-5)
    both = jax.vmap(scan)(starts)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], both), carry, rtol=1e-5)

    half = loop((params, tx.init(params)), range(3))
    saved = flax.serialization.to_bytes(half)
    again = flax.serialization.from_bytes((params, tx.init(params)), saved)
    chex.assert_trees_all_equal(loop(again, range(3, 6)), carry)


def test_part_of_a_tree_restarts_by_itself():
    trees = [
        {"a": kernel(1.0), "b": kernel(2.0)},
        {"a": kernel(1.0), "b": kernel(2.0)},
        {"a": kernel(1.0), "b": kernel(0.0)},
    ]
    link = jc.restart_decay(lambda step: 0.5**step)
    labels = {k: dict.fromkeys(trees[0][k], k) for k in "ab"}
    tx = optax.partition({"a": link, "b": link}, labels)
    state, found = tx.init(trees[0]), []
    for params in trees:
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        found.append([float(updates[k]["kernel"][0, 0]) for k in "ab"])
    assert found == [[1, 1], [0.5, 0.5], [0.25, 1]]
