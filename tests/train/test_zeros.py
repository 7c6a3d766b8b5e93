"""Zeros that are there at the start are there at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc


FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)  # XLA flushes them


def after_one_update(tx, params, grads):
    updates, state = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates), state


def test_one_step_by_hand():
    params = {"kernel": jnp.array([[0.0, 1.0], [2.0, 0.0]]), "bias": jnp.zeros(2)}
    tx = optax.chain(optax.sgd(0.5), jc.keep_zeros())
    final, state = after_one_update(tx, params, jax.tree.map(jnp.ones_like, params))
    np.testing.assert_array_equal(final["kernel"], [[0.0, 0.5], [1.5, 0.0]])
    np.testing.assert_array_equal(final["bias"], [-0.5, -0.5])  # not a matrix
    np.testing.assert_array_equal(state[1].masks["kernel"], params["kernel"] != 0)
    assert state[1].masks["bias"].shape == ()


def test_a_link_that_is_not_the_last_is_counted():
    params = {"kernel": jnp.array([[0.0, 1.0], [2.0, 0.0]])}
    tx = optax.chain(jc.keep_zeros(), optax.scale(1.0))
    grads = {"kernel": jnp.ones((2, 2))}
    step = jax.jit(tx.update)

    def strays(steps, final):
        state, seen = tx.init(params), []
        for i in range(steps):
            _, state = step(grads, state, params if i == 0 else final)
            seen.append(int(state[0].stray))
        return seen

    moved = {"kernel": jnp.array([[0.5, 1.0], [2.0, -0.5]])}
    assert strays(102, moved) == [0] + 100 * [2] + [4]
    assert strays(102, params) == 102 * [0]


@given(
    hnp.arrays(np.float32, (3, 4), elements=st.just(0.0) | FLOATS),
    hnp.arrays(np.float32, (3, 4), elements=FLOATS),
)
def test_zeros_stay_and_the_others_take_the_update(w, update):
    params = {"kernel": jnp.asarray(w)}
    final, _ = after_one_update(jc.keep_zeros(), params, {"kernel": update})
    assert np.all(np.asarray(final["kernel"])[w == 0] == 0)
    np.testing.assert_allclose(
        final["kernel"], np.where(w == 0, 0, w + update), rtol=0, atol=2e-38
    )


def test_adam_moves_the_others_as_without_it_and_the_zeros_never():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(4, 6)).astype(np.float32)
    params = jc.prune_tree({"kernel": jnp.asarray(w)}, theta=0.5)
    held = np.asarray(params["kernel"]) == 0
    grads = jnp.asarray(rng.normal(size=(20, 4, 6)).astype(np.float32) + 1)

    def train(tx):
        def step(carry, grads):
            params, state = carry
            updates, state = tx.update({"kernel": grads}, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params["kernel"]

        return jax.jit(lambda g: jax.lax.scan(step, (params, tx.init(params)), g)[1])(
            grads
        )

    ours = np.asarray(train(optax.chain(optax.adam(0.1), jc.keep_zeros())))
    free = np.asarray(train(optax.adam(0.1)))
    assert 0 < held.sum() < held.size
    assert np.all(ours[:, held] == 0)
    np.testing.assert_allclose(ours[:, ~held], free[:, ~held], rtol=1e-5, atol=1e-6)


def test_a_weight_that_passes_zero_later_is_free():
    params = {"kernel": jnp.array([[1.0, 2.0]])}
    tx = optax.chain(optax.sgd(1.0), jc.keep_zeros())
    state = tx.init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    for expected in ([[0.0, 1.0]], [[-1.0, 0.0]]):
        updates, state = tx.update(ones, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params["kernel"], expected)


def test_negative_zeros_are_zeros():
    params = {"kernel": jnp.array([[-0.0, 1.0]])}
    final, _ = after_one_update(jc.keep_zeros(), params, params)
    np.testing.assert_array_equal(final["kernel"], [[0.0, 2.0]])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_or_none_may_be_zero(value):
    params = {"kernel": jnp.full((2, 3), value)}
    ones = {"kernel": jnp.ones((2, 3))}
    final, _ = after_one_update(jc.keep_zeros(), params, ones)
    np.testing.assert_array_equal(final["kernel"], np.full((2, 3), 2 * value))


def test_only_the_leaves_of_where_are_held():
    params = {"a": jnp.zeros(3), "b": jnp.zeros((2, 3))}
    ones = jax.tree.map(jnp.ones_like, params)
    tx = jc.keep_zeros(where=jc.path_matches("a"))
    final, _ = after_one_update(tx, params, ones)
    np.testing.assert_array_equal(final["a"], np.zeros(3))
    np.testing.assert_array_equal(final["b"], ones["b"])


def test_compressed_leaves_are_left_to_the_optimizer():
    w = jnp.array([[0.0, 1.0, 2.0]])
    tree = {"kernel": w, "small": jc.palettize(w, clusters=3)}
    trainable, rest = jc.split(tree)
    tx = optax.chain(optax.sgd(0.5), jc.keep_zeros())
    ones = jax.tree.map(jnp.ones_like, trainable)
    final, _ = after_one_update(tx, trainable, ones)
    tree = jc.densify(jc.join(final, rest))
    np.testing.assert_array_equal(tree["kernel"], [[0.0, 0.5, 1.5]])
    np.testing.assert_array_equal(tree["small"], [[0.0, 0.5, 1.5]])


def test_nothing_to_hold_is_an_error_that_lists_the_leaves():
    with pytest.raises(
        ValueError, match="selected none of the 1 leaves, which are bias"
    ):
        jc.keep_zeros().init({"bias": jnp.zeros(3)})


def test_update_without_params_says_what_to_call():
    params = {"kernel": jnp.ones((2, 3))}
    tx = jc.keep_zeros()
    with pytest.raises(ValueError, match="keep_zeros needs the current weights: call"):
        tx.update(params, tx.init(params))
