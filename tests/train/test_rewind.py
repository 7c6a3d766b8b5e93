"""Rounds of training, each on fewer weights, from the same early step on."""

from functools import partial

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
from jaxcomp.train.rewind import rewind_learning_rate, rewind_weights


BOTH = pytest.mark.parametrize("rewind", [rewind_weights, rewind_learning_rate])


def halves(rounds):
    return 1 - jnp.exp2(-jnp.asarray(rounds, jnp.float32))


def by_place(scores, sparsity):
    """A budget that takes the first entries, for it compiles in no time."""

    def mask(s):
        zeros = jnp.round(sparsity * s.size).astype(jnp.int32)
        return (jnp.arange(s.size) >= zeros).reshape(s.shape)

    return {name: mask(s) for name, s in scores.items()}


def normal(shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def layer(seed=0):
    return {"kernel": normal((4, 8), seed), "bias": normal((8,), seed + 1)}


def trainer(tx):
    """A function of params and stacked gradients: params and state after each one."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    return jax.jit(
        lambda params, grads: jax.lax.scan(step, (params, tx.init(params)), grads)[1]
    )


def run(tx, params, grads):
    return trainer(tx)(params, grads)


def stacked(params, steps, seed=7):
    return jax.tree.map(lambda p: normal((steps, *p.shape), seed + p.ndim), params)


def test_weights_are_rewound_by_hand():
    rate = optax.piecewise_constant_schedule(1.0, {1: 0.5})
    tx = rewind_weights(optax.sgd(rate), halves, every=2, to=1)
    params = {"kernel": jnp.array([[8.0, -6.0, 4.0, 1.0]]), "bias": jnp.array([1.0])}
    ones = jax.tree.map(lambda p: jnp.ones((9, *p.shape)), params)
    found, states = run(tx, params, ones)
    np.testing.assert_array_equal(
        found["kernel"][:, 0],
        [
            [7.0, -7.0, 3.0, 0.0],  # step 0, at the rate 1: what is gone back to
            [6.5, -7.5, 2.5, -0.5],  # step 1, at the rate 0.5: the round is over
            [0.0, 0.0, 0.0, 0.0],
            [7.0, -7.0, 0.0, 0.0],
            [6.5, -7.5, 0.0, 0.0],  # step 1 again, with half of the weights
            [0.0, 0.0, 0.0, 0.0],
            [0.0, -7.0, 0.0, 0.0],
            [0.0, -7.5, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0],
        ],
    )
    np.testing.assert_array_equal(
        found["bias"][:, 0], [0.0, -0.5, 0.0, 0.0, -0.5, 0.0, 0.0, -0.5, 0.0]
    )
    assert states.round.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert states.count.tolist() == list(range(1, 10))


def test_the_learning_rate_is_rewound_by_hand():
    rate = optax.piecewise_constant_schedule(1.0, {1: 0.5})
    tx = rewind_learning_rate(optax.sgd(rate), halves, every=2)
    params = {"kernel": jnp.array([[8.0, -6.0, 4.0, 1.0]])}
    ones = jax.tree.map(lambda p: jnp.ones((7, *p.shape)), params)
    found, states = run(tx, params, ones)
    np.testing.assert_array_equal(
        found["kernel"][:, 0],
        [
            [7.0, -7.0, 3.0, 0.0],
            [6.5, -7.5, 2.5, -0.5],
            [6.5, -7.5, 0.0, 0.0],  # the masks; nothing else moves
            [5.5, -8.5, 0.0, 0.0],  # at the rate 1 again
            [5.0, -9.0, 0.0, 0.0],
            [0.0, -9.0, 0.0, 0.0],
            [0.0, -10.0, 0.0, 0.0],
        ],
    )
    assert states.round.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert states.saved_params == ()


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["kernel"] + params["bias"][None]) - 0.3) ** 2)


@pytest.mark.parametrize("to", [0, 3])
def test_after_rewinding_it_is_the_run_of_the_masked_early_weights(to):
    # Powers of two, so that no product rounds, however XLA fuses it into a sum.
    rate = optax.piecewise_constant_schedule(0.5, {2: 0.5, 5: 0.25})
    inner = optax.sgd(rate, momentum=0.5)
    every, x = 8, normal((16, 4), 3)
    tx = rewind_weights(inner, halves, every=every, to=to)
    gradient = jax.jit(jax.grad(loss))

    def stepper(tx):
        update = jax.jit(tx.update)

        def step(params, state):
            updates, state = update(gradient(params, x), state, params)
            return optax.apply_updates(params, updates), state

        return step

    params, step = layer(), stepper(tx)
    state = tx.init(params)
    history = [(params, state.inner_state)]
    for _ in range(every + 2):
        params, state = step(params, state)
        history.append((params, state.inner_state))
    early, early_state = history[to]
    assert int(jnp.sum(~state.masks["kernel"])) == 16
    chex.assert_trees_all_equal(params, jc.apply_masks(early, state.masks))

    ticket, reference = params, stepper(optax.chain(inner, jc.keep_zeros()))
    held = jc.keep_zeros().init(ticket)
    reference_state = (early_state, held)
    for _ in range(every - to):
        params, state = step(params, state)
        ticket, reference_state = reference(ticket, reference_state)
        chex.assert_trees_all_equal(params, ticket)
    assert jnp.any(params["kernel"] != early["kernel"])


def numpy_rounds(w, b, grads, every, to, levels, back):
    """The algorithm of the papers, with momentum, on one kernel and one bias."""
    rate, decay = np.float32(0.5), np.float32(0.5)
    mask, grads = np.ones(w.shape, bool), iter(grads)
    moments = np.zeros_like(w), np.zeros_like(b)
    for step in range(every):
        if step == to:
            early = w, b, *moments
        w, b, moments = numpy_step(w, b, moments, mask, next(grads), rate, decay)
    for level in levels:
        size = np.where(mask, np.abs(w), -1).reshape(-1)
        order = np.lexsort((-np.arange(size.size), size))
        mask = mask & ~np.isin(
            np.arange(size.size), order[: round(level * size.size)]
        ).reshape(w.shape)
        for _ in range(2 if back else 1):
            next(grads)
        if back:
            w, b = early[:2]
        w, moments = np.where(mask, w, 0), early[2:]
        for _ in range(to, every):
            w, b, moments = numpy_step(w, b, moments, mask, next(grads), rate, decay)
    return w, b


def numpy_step(w, b, moments, mask, grads, rate, decay):
    m = decay * moments[0] + np.where(mask, grads[0], 0)
    n = decay * moments[1] + grads[1]
    return np.where(mask, w - rate * m, 0), b - rate * n, (m, n)


@pytest.mark.parametrize(
    ("rewind", "turns"), [(rewind_weights, 2), (rewind_learning_rate, 1)]
)
def test_three_rounds_are_those_of_a_plain_loop(rewind, turns):
    every, to, levels = 5, 2, [0.25, 0.5, 0.75]
    table = jnp.array([0.0, *levels])
    tx = rewind(
        optax.sgd(0.5, momentum=0.5),
        lambda rounds: table[jnp.minimum(rounds, 3)],
        every=every,
        to=to,
    )
    params = layer()
    grads = stacked(params, every + 3 * (every - to + turns))
    found, states = run(tx, params, grads)
    w, b = numpy_rounds(
        np.asarray(params["kernel"]),
        np.asarray(params["bias"]),
        list(zip(np.asarray(grads["kernel"]), np.asarray(grads["bias"]), strict=True)),
        every,
        to,
        levels,
        back=turns == 2,
    )
    np.testing.assert_allclose(found["kernel"][-1], w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["bias"][-1], b, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["kernel"][-1] == 0, w == 0)
    assert states.round[-1] == 3
    assert states.stray[-1] == 0


@BOTH
def test_a_schedule_that_stops_rising_ends_the_rounds_and_training_goes_on(rewind):
    tx = rewind(
        optax.sgd(0.125), optax.constant_schedule(0.5), every=3, budget=by_place
    )
    params = layer()
    grads = jax.tree.map(lambda p: jnp.ones((20, *p.shape)), params)
    found, states = run(tx, params, grads)
    assert states.round[-1] == 1
    kept = np.asarray(states.masks["kernel"])
    assert np.sum(~kept[-1]) == 16
    assert np.all(kept[5:] == kept[-1])
    np.testing.assert_allclose(
        found["bias"][6:] - found["bias"][5:-1], -0.125, rtol=1e-5
    )


@jax.jit
def masks_of_two_rounds(w, first, second):
    """The masks after one step in each of two rounds of weights that stand still."""
    table = jnp.stack([jnp.float32(0), first, second])
    tx = rewind_learning_rate(
        optax.sgd(1.0), lambda rounds: table[jnp.minimum(rounds, 2)], every=1
    )
    params = {"kernel": w}
    still = jax.tree.map(lambda p: jnp.zeros((4, *p.shape)), params)
    found, states = run(tx, params, still)
    return found["kernel"], states.masks["kernel"]


@given(
    hnp.arrays(
        np.float32, (4, 8), elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])
    ),
    st.integers(1, 15),
    st.integers(16, 31),
)
def test_masks_only_shrink_and_counts_are_exact_whatever_the_weights(w, few, many):
    kernels, masks = masks_of_two_rounds(
        jnp.asarray(w), jnp.float32(few / 32), jnp.float32(many / 32)
    )
    assert [int(n) for n in jnp.sum(~masks, axis=(1, 2))] == [0, few, few, many]
    assert not np.any(masks[3] & ~masks[1])
    np.testing.assert_array_equal(kernels[3], np.where(masks[3], w, 0))


@BOTH
def test_what_is_removed_stays_removed_under_a_score_that_ignores_the_weights(rewind):
    keys = jax.random.split(jax.random.key(0), 2)

    def score(tree):  # another draw for other weights
        total = jnp.sum(jnp.stack([jnp.sum(w) for w in tree.values()]))
        return jax.tree.map(
            jnp.where,
            jax.tree.map(lambda w: jnp.full(w.shape, total > 0), tree),
            jc.random_scores(keys[0])(tree),
            jc.random_scores(keys[1])(tree),
        )

    tx = rewind(optax.sgd(1.0), halves, every=1, score=score)
    params = layer()
    _, states = run(tx, params, stacked(params, 8))
    masks = np.asarray(states.masks["kernel"])
    assert np.all(masks[1:] <= masks[:-1])
    assert np.sum(~masks[-1]) >= 28


def test_a_budget_over_all_leaves_hits_its_count():
    params = {"a": {"kernel": 9 * normal((4, 8))}, "b": {"kernel": normal((4, 4), 1)}}
    tx = rewind_weights(optax.sgd(0.1), halves, every=2, budget=jc.prune.global_budget)
    masks = run(tx, params, stacked(params, 8))[1].masks
    total = [np.sum(~np.asarray(m), axis=(1, 2)) for m in jax.tree.leaves(masks)]
    assert (total[0] + total[1]).tolist() == [0, 0, 24, 24, 24, 24, 36, 36]
    assert total[0][-1] < total[1][-1] * 2  # the small weights go first


@BOTH
def test_weights_that_somebody_else_wrote_are_counted_and_removed_again(rewind):
    tx = rewind(optax.sgd(0.0), halves, every=1)
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
    still, state = {"kernel": jnp.zeros((2, 4))}, tx.init(params)
    update = jax.jit(tx.update)
    while int(state.round) < 2:
        touched = jax.tree.map(lambda p: jnp.where(p == 0, 0.5, p), params)
        updates, state = update(still, state, touched)
        params = optax.apply_updates(touched, updates)
    assert int(state.stray) == 4
    np.testing.assert_array_equal(params["kernel"], [[0, 0, 0, 0], [0, 0, 7, 8]])


@BOTH
def test_gradients_reach_the_optimizer_as_zeros_where_weights_are_removed(rewind):
    tx = rewind(optax.trace(0.9), halves, every=2, budget=by_place)
    params = layer()
    grads = jax.tree.map(lambda p: jnp.ones((6, *p.shape)), params)
    _, states = run(tx, params, grads)
    removed = ~np.asarray(states.masks["kernel"][4])  # in the second round
    trace = np.asarray(states.inner_state.trace["kernel"])
    assert np.sum(removed) == 16
    assert np.all(trace[4][removed] == 0)
    assert np.all(trace[4][~removed] != 0)
    assert np.all(trace[1] != 0)


@BOTH
def test_gradients_that_are_not_finite_in_between_do_no_harm(rewind):
    tx = rewind(optax.adam(0.1), halves, every=2, to=1, budget=by_place)
    params = layer()
    grads, turns = stacked(params, 7), 2 if rewind is rewind_weights else 1
    bad = jax.tree.map(lambda g: g.at[2 : 2 + turns].set(jnp.nan), grads)
    train = trainer(tx)
    found = train(params, bad)[0]
    chex.assert_trees_all_equal(found, train(params, grads)[0])
    chex.assert_tree_all_finite(found)


@BOTH
def test_it_lands_exactly_in_16_bits(rewind, strict):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), layer())
    tx = rewind(optax.sgd(0.5), halves, every=2, to=1, budget=by_place)
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), stacked(params, 4))
    found, states = run(tx, params, grads)
    chex.assert_trees_all_equal_dtypes(found, params)
    back = jax.tree.map(lambda x: x[0 if rewind is rewind_weights else 1], found)
    masks = jax.tree.map(lambda m: m[3], states.masks)
    landed = jax.tree.map(lambda x: x[3 if rewind is rewind_weights else 2], found)
    chex.assert_trees_all_equal(landed, jc.apply_masks(back, masks))
    assert int(jnp.sum(landed["kernel"] == 0)) == 16


def test_an_optimizer_that_widens_its_state_goes_back_all_the_same():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), layer())
    grads = jax.tree.map(lambda p: p.astype(jnp.float32), layer(5))
    tx = rewind_weights(
        optax.sgd(0.1, momentum=0.9), halves, every=2, to=1, budget=by_place
    )
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(5):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert jnp.array_equal(state.saved_state[0].trace["bias"], grads["bias"]) or (
            state.count == 1
        )
    chex.assert_trees_all_close(
        state.inner_state[0].trace["bias"], 1.9 * grads["bias"], rtol=1e-6
    )


def test_vmap_over_seeds_equals_each_alone():
    train = trainer(
        rewind_weights(optax.adam(0.1), halves, every=2, to=1, budget=by_place)
    )
    seeds = [(layer(s), stacked(layer(s), 8, s + 20)) for s in (0, 5)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    together = jax.vmap(train)(*both)[0]
    alone = [train(*seed)[0] for seed in seeds]
    chex.assert_trees_all_close(
        together,
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone),
        rtol=1e-5,
        atol=1e-6,
    )


@BOTH
def test_donated_buffers_one_trace_and_every_platform(rewind):
    tx = rewind(optax.adam(0.1), halves, every=2, to=1, budget=by_place)
    params = layer()
    state = tx.init(params)
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(tx.update), platforms=platforms)
    assert exported(params, state, params).platforms == platforms
    chex.clear_trace_counter()

    @partial(jax.jit, donate_argnums=(0, 1))
    @partial(chex.assert_max_traces, n=1)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(5):
        params, state = step(params, state, layer(seed))
    assert int(state.round) >= 1


@BOTH
def test_it_holds_for_a_part_of_a_tree_and_hands_extra_arguments_on(rewind):
    scale = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda u, s, p=None, *, value: (jax.tree.map(lambda x: -value * x, u), s),
    )
    params = {"a": layer(), "b": layer(3)}
    tx = optax.chain(
        optax.identity(),
        optax.masked(
            rewind(scale, halves, every=2, budget=by_place), {"a": True, "b": False}
        ),
    )
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(params, state, params, value=0.5)
        params = optax.apply_updates(params, updates)
    assert int(jnp.sum(params["a"]["kernel"] == 0)) == 16
    assert int(jnp.sum(params["b"]["kernel"] == 0)) == 0


def test_compressed_leaves_come_along():
    tree = {"kernel": normal((4, 8)), "small": jc.quantize(normal((4, 8)), bits=4)}
    trainable, rest = jc.split(tree)
    tx = rewind_weights(optax.sgd(0.1), halves, every=1, budget=by_place)
    state, update, found = tx.init(trainable), jax.jit(tx.update), trainable
    for _ in range(3):
        updates, state = update(trainable, state, found)
        found = optax.apply_updates(found, updates)
    assert int(jnp.sum(jc.join(found, rest)["kernel"] == 0)) == 16


@BOTH
def test_every_and_to_must_be_steps_of_a_round(rewind):
    name = rewind.__name__
    with pytest.raises(ValueError, match=f"{name} needs 1 <= every <= .* got 0"):
        rewind(optax.sgd(0.1), halves, every=0)
    with pytest.raises(ValueError, match=f"{name} needs 0 <= to <= 4, got 5"):
        rewind(optax.sgd(0.1), halves, every=5, to=5)
    with pytest.raises(TypeError, match=f"{name} needs an integer every"):
        rewind(optax.sgd(0.1), halves, every=2.5)


@BOTH
def test_the_sparsity_must_be_a_function_of_the_round(rewind):
    with pytest.raises(
        TypeError, match=f"{rewind.__name__} needs a function round -> sparsity, got 0"
    ):
        rewind(optax.sgd(0.1), 0.5, every=5)


@BOTH
def test_update_needs_params_and_init_something_to_prune(rewind):
    tx, params = rewind(optax.sgd(0.1), halves, every=5), layer()
    with pytest.raises(
        ValueError, match=f"{rewind.__name__} needs the current weights: call"
    ):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="selected none of the 1 leaves, which are b"):
        tx.init({"b": jnp.ones(3)})
