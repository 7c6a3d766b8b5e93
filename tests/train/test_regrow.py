"""Sparse from the first step on: who goes, who grows, and with what memory."""

import re
from functools import partial

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.train import RegrowState, left_alone, regrow_randomly, rigl


KEY = jax.random.key(0)
THIRD = optax.constant_schedule(0.3)


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

    @jax.jit  # with the start in it: one compilation
    def train(params, grads):
        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    return train(params, grads)


def one_update(tx, params, grads, **extra_args):
    def update(params, grads):
        return tx.update(grads, tx.init(params), params, **extra_args)[0]

    return jax.jit(update)(params, grads)


def numpy_exchange(mask, w, worth, some):
    """The rule of the paper, by sorting. Of equals the lower index is kept or grows."""
    mask, w, worth = mask.reshape(-1), np.abs(w).reshape(-1), worth.reshape(-1)
    active = np.flatnonzero(mask)
    kept = active[np.lexsort((active, -w[active]))][: active.size - some]
    others = np.setdiff1d(np.arange(mask.size), kept)
    grown = others[np.lexsort((others, -worth[others]))][:some]
    return np.isin(np.arange(mask.size), np.concatenate([kept, grown]))


def test_rigl_by_hand():
    params = {"kernel": jnp.array([[4.0, 0.5, 3.0, 1.0, 0.2, 0.1]])}
    tx = rigl(
        optax.sgd(0.5, momentum=0.5),
        0.5,
        fraction=lambda step: jnp.where(step < 3, 2 / 3, 0.0),
        score=lambda tree: {p: jnp.array([[9, 8, 7, 1, 1, 1.0]]) for p in tree},
        every=2,
    )
    first, last = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 0.0, -1.0, 0.0, 0.0, -8.0]
    grads = jnp.array([first, first, [0.0, 1.0, 9.0, 5.0, 5.5, -6.0], last, last])
    kernels, states = run(tx, params, {"kernel": grads[:, None]})
    np.testing.assert_allclose(
        kernels["kernel"][:, 0],
        [
            [3.5, 0, 2.5, 0, 0, 0],  # every removed weight is zero at once
            # The momenta are 1.5.
            [2.75, -0.75, 1.75, 0, 0, 0],
            # 2.75 stays. Of the others the gradients 9 and 6 grow; 1.75 was never away.
            # Its momentum is 1.5 / 2 + 9; where it is new, -6.
            [2.375, 0, -3.125, 0, 0, 3.0],
            # The momenta are 0.75 / 2 + 1, 9.75 / 2 - 1 and -6 / 2 - 8.
            [1.6875, 0, -5.0625, 0, 0, 8.5],
            # No masks are chosen any more: the fraction is zero.
            [0.84375, 0, -5.53125, 0, 0, 15.25],
        ],
        atol=1e-6,
    )
    trace = np.asarray(states.inner_state[0].trace["kernel"])[2, 0]
    np.testing.assert_array_equal(trace, [0.75, 0, 9.75, 0, 0, -6])
    assert states.stray.tolist() == [0] * 5
    assert states.count.tolist() == [1, 2, 3, 4, 5]
    masks = np.asarray(states.masks["kernel"])[:, 0]
    assert masks.sum(axis=1).tolist() == [3] * 5
    np.testing.assert_array_equal(masks[1], [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(masks[2:], [[1, 0, 1, 0, 0, 1]] * 3)


def test_regrow_randomly_by_hand():
    params = {"kernel": jnp.array([[4.0, 0.5, 3.0, 1.0]])}
    tx = regrow_randomly(
        KEY, optax.sgd(0.5), 0.25, fraction=THIRD, score=jc.magnitude, every=2
    )
    kernels, states = run(tx, params, {"kernel": jnp.ones((4, 1, 4))})
    # Of 3, 2 and 0 the last goes; it or the second, at even chances, grows.
    draw = jax.random.split(KEY)[1]
    worth = np.asarray(jc.random_scores(draw)({0: jnp.ones((1, 4))})[0])[0]
    at = 1 if worth[1] >= worth[3] else 3
    expected = np.array(
        [[3.5, 0, 2.5, 0.5], [3, 0, 2, 0], [2.5, 0, 1.5, 0], [2, 0, 1, 0]]
    )
    expected[2:, at] = [-0.5, -1]
    np.testing.assert_allclose(kernels["kernel"][:, 0], expected, atol=1e-6)
    data = np.asarray(states.key)
    np.testing.assert_array_equal(data[1], jax.random.key_data(KEY))
    np.testing.assert_array_equal(
        data[2:], [jax.random.key_data(jax.random.split(KEY)[0])] * 2
    )


def test_rigl_with_adam_equals_a_plain_loop():
    x, y = normal((32, 8)), normal((32, 6), seed=1)
    w, score = normal((8, 6), seed=2), normal((8, 6), seed=3)
    steps, every, stop, rate = 16, 3, 13, 0.05
    schedule = optax.cosine_decay_schedule(0.8, stop)
    tx = rigl(
        optax.adam(rate),
        0.75,
        fraction=schedule,
        score=lambda tree: {p: jnp.asarray(score) for p in tree},
        every=every,
    )

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: jnp.sum((x @ p["kernel"] - y) ** 2) / 64)(params)
        updates, state = tx.update(grads, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    start = {"kernel": jnp.asarray(np.where(score > np.median(score), w, 0))}
    kernels, states = jax.jit(
        lambda p: jax.lax.scan(step, (p, tx.init(p)), None, steps)[1]
    )(start)
    moments = states.inner_state[0]

    w = np.asarray(start["kernel"], np.float64)
    mask = numpy_exchange(np.zeros(48, bool), w, score, 12).reshape(8, 6)
    mu, nu, exchanged = np.zeros((8, 6)), np.zeros((8, 6)), 0
    for t in range(steps):
        grad = x.T @ (x @ w - y) / 32
        share = 0.4 * (1 + np.cos(np.pi * t / stop)) if t < stop else 0
        new = mask
        if t > 0 and t % every == 0 and share > 0:
            some = round(share * mask.sum())
            new = numpy_exchange(mask, w, np.abs(grad), some).reshape(8, 6)
        mu, nu = np.where(new ^ mask, 0, mu), np.where(new ^ mask, 0, nu)
        grad = np.where(new, grad, 0)
        mu, nu = 0.9 * mu + 0.1 * grad, 0.999 * nu + 0.001 * grad**2
        mu_hat, nu_hat = mu / (1 - 0.9 ** (t + 1)), nu / (1 - 0.999 ** (t + 1))
        w = np.where(new, w - rate * mu_hat / (np.sqrt(nu_hat) + 1e-8), 0)
        exchanged += np.sum(new & ~mask)
        mask = new
        np.testing.assert_array_equal(states.masks["kernel"][t], mask)
        np.testing.assert_allclose(kernels["kernel"][t], w, atol=2e-5)
        np.testing.assert_array_equal(np.asarray(kernels["kernel"][t])[~mask], 0)
        np.testing.assert_allclose(moments.mu["kernel"][t], mu, atol=1e-5)
        np.testing.assert_allclose(moments.nu["kernel"][t], nu, atol=1e-5)
    assert exchanged > 4


def test_the_schedule_is_that_of_the_paper_and_ends_at_zero():
    schedule = optax.cosine_decay_schedule(0.3, 750)
    for t in (0, 100, 375, 700):
        expected = 0.3 / 2 * (1 + np.cos(t * np.pi / 750))  # section 3, f_decay
        np.testing.assert_allclose(schedule(t), expected, rtol=1e-5)
    assert schedule(750) == schedule(800) == 0


VALUES = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0])  # they tie
ARRAYS = hnp.arrays(np.float32, (4, 6), elements=VALUES)


@jax.jit
def one_choice(w, score, grad, sparsity, share):
    tx = rigl(
        optax.sgd(0.1),
        sparsity,
        fraction=lambda step: share,
        score=lambda tree: {p: score for p in tree},
        every=2,
    )
    params = {"kernel": w}
    state = tx.init(params)
    updates, after = tx.update({"kernel": grad}, state._replace(count=2), params)
    landed = optax.apply_updates(params, updates)["kernel"]
    return state.masks["kernel"], after.masks["kernel"], landed, after.stray


@given(ARRAYS, ARRAYS, ARRAYS, st.integers(0, 23), st.sampled_from([0.2, 0.5, 1.0]))
def test_counts_never_change_and_the_paper_s_rule_decides(w, score, grad, zeros, share):
    old, new, landed, stray = map(
        np.asarray, one_choice(w, score, grad, jnp.float32(zeros / 24), share)
    )
    assert np.sum(~old) == np.sum(~new) == zeros
    some = round(float(np.float32(share) * np.float32(24 - zeros)))
    np.testing.assert_array_equal(
        new.reshape(-1), numpy_exchange(old, w, np.abs(grad), some)
    )
    moved = w - np.float32(0.1) * grad
    np.testing.assert_allclose(landed, np.where(new, moved, 0), atol=1e-6)
    assert np.all(landed[~new] == 0)
    assert stray == np.sum(w[~old] != 0)


def test_a_share_out_of_range_is_taken_as_none_or_all():
    w, grad = normal((4, 6)), normal((4, 6), seed=1)
    old, new, *_ = one_choice(w, np.abs(w), grad, jnp.float32(0.5), 7.0)
    np.testing.assert_array_equal(
        np.asarray(new).reshape(-1),
        numpy_exchange(np.asarray(old), w, np.abs(grad), 12),
    )
    old, new, *_ = one_choice(w, np.abs(w), grad, jnp.float32(0.5), -1.0)
    np.testing.assert_array_equal(old, new)


def test_growth_at_random_is_uniform_over_all_that_were_not_kept():
    params = {"kernel": jnp.arange(1.0, 11.0).reshape(2, 5)}
    tx = regrow_randomly(
        KEY, optax.sgd(0), 0.5, fraction=lambda step: 0.4, score=jc.magnitude, every=1
    )
    still = {"kernel": jnp.zeros((1500, 2, 5))}
    masks = np.asarray(run(tx, params, still)[1].masks["kernel"]).reshape(1500, 10)
    assert np.all(masks.sum(axis=1) == 5)
    assert np.all(masks[:, 7:])  # 8, 9 and 10 stay; two of the other seven grow
    np.testing.assert_allclose(masks[1:, :7].mean(axis=0), 2 / 7, atol=0.04)
    again = np.sum(masks[2:, :7] & masks[1:-1, :7], axis=1).mean()
    np.testing.assert_allclose(again, 2 * 2 / 7, atol=0.08)  # with no memory


def test_a_thousand_steps_trace_once_and_hold_every_count():
    params = {"kernel": jnp.asarray(normal((4, 6))), "bias": jnp.zeros(6)}
    tx = regrow_randomly(
        KEY,
        optax.adam(0.1),
        0.75,
        fraction=THIRD,
        score=jc.random_scores(KEY),
        every=10,
    )

    chex.clear_trace_counter()

    @partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(params, state):
        grads = jax.tree.map(lambda p: jnp.sin(9 * p) + 1, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        zeros = jnp.all(params["kernel"] == 0, where=~state.masks["kernel"])
        return params, state, zeros & (jnp.sum(state.masks["kernel"]) == 6)

    state = tx.init(params)
    seen, fine = set(), []
    for i in range(1000):
        params, state, ok = step(params, state)
        fine.append(ok)
        if i % 10 == 0:
            seen.add(np.asarray(state.masks["kernel"]).tobytes())
    assert np.all(fine)
    assert len(seen) > 50
    assert int(state.stray) == 0


def test_one_loop_of_one_turn_and_no_sort():
    params = {"kernel": jnp.ones((4, 6)), "out": jnp.ones((4, 6))}
    tx = rigl(optax.adam(0.1), 0.5, fraction=THIRD, score=jc.magnitude)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    assert (names.count("while"), names.count("cond")) == (1, 0)
    assert not re.search(r"\b(sort|top_k|callback)\b", str(jaxpr))


def labels(params):
    return {"a": {"kernel": "x"}, "bias": "x", "kernel": "y"}


X = {"a": {"kernel": True}, "bias": True, "kernel": False}
OPTIMIZERS = {  # and how many states of the shape of a weight a choice changes
    "links": (
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_amsgrad(),
            optax.scale_by_lion(),
            optax.scale_by_rms(initial_scale=0.5),
            optax.scale_by_rss(initial_accumulator_value=0.1),
            optax.scale_by_factored_rms(),  # not of matrices as small as these
            optax.ema(0.9),
            optax.add_decayed_weights(0.1),
            optax.trace(0.9),
            optax.scale_by_learning_rate(0.1),
        ),
        18,
    ),
    "parts": (
        optax.partition(
            {
                "x": optax.MultiSteps(
                    optax.inject_hyperparams(optax.adamw)(learning_rate=0.1), 4
                ).gradient_transformation(),
                "y": optax.masked(optax.adam(0.1), X),
            },
            labels,
        ),
        3,
    ),
    "schedule_free": (optax.contrib.schedule_free_adamw(0.1), 4),
}


def whole(state):
    """Leaves with the shape of the weights, by path."""
    named = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in named if x.ndim == 2}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_is_new_wherever_a_mask_changed_and_as_it_was_elsewhere(name):
    inner, states_changed = OPTIMIZERS[name]
    params = {  # of one shape, so that paths must tell them apart
        "a": {"kernel": jnp.asarray(normal((4, 6)))},
        "bias": jnp.ones(6),
        "kernel": jnp.asarray(normal((4, 6), seed=1)),
    }
    grads = jax.tree.map(lambda p: normal((6, *p.shape), 2) + 3, params)
    tx = rigl(inner, 0.5, fraction=lambda step: 0.5, score=jc.magnitude, every=5)
    params, states = run(tx, params, grads)
    (p, before), (final, after) = (
        jax.tree.map(lambda x, t=t: x[t], (params, states)) for t in (4, 5)
    )
    fresh = whole(inner.init(jc.apply_masks(p, after.masks)))
    touched = []

    def reset(keys, leaf):
        path = jax.tree_util.keystr(keys)
        if path not in fresh:
            return leaf
        old, now = (s.masks["a"] if "'a'" in path else s.masks for s in (before, after))
        changed = np.asarray(old["kernel"] ^ now["kernel"])
        assert changed.sum() >= 2
        touched.append(not np.allclose(leaf[changed], fresh[path][changed]))
        return jnp.where(changed, fresh[path], leaf)

    state = jax.tree.map_with_path(reset, before.inner_state)
    assert sum(touched) == states_changed
    sparse = jc.apply_masks(jax.tree.map(lambda g: g[5], grads), after.masks)
    _, stepped = jax.jit(inner.update)(sparse, state, p)
    stepped, new = map(whole, (stepped, after.inner_state))
    assert stepped.keys() == new.keys() == fresh.keys()
    for path in new:
        np.testing.assert_allclose(new[path], stepped[path], rtol=1e-4, atol=1e-6)
    assert after.stray == 0


def test_left_alone_lists_what_has_not_the_shape_of_a_pruned_weight():
    params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}

    def of(inner, params=params):
        score = jc.magnitude
        return left_alone(rigl(inner, 0.5, fraction=THIRD, score=score).init(params))

    assert of(optax.sgd(0.1, momentum=0.9)) == []
    assert of(optax.adam(0.1)) == ["0/count"]
    factored = of(optax.adafactor(0.1, min_dim_size_to_factor=4))
    assert factored == ["0/count", "0/v_row/kernel", "0/v_col/kernel", "0/v/kernel"]
    assert "0/diff_params_memory/kernel" in of(optax.lbfgs(0.1, memory_size=3))
    assert of(optax.adam(0.1), jnp.ones((4, 6))) == ["0/count"]  # a tree of one leaf
    pair = jnp.ones((4, 6)), jnp.ones(6)
    assert of(optax.chain(optax.trace(0.9), optax.adam(0.1)), pair) == ["1/0/count"]


def test_the_optimizer_never_sees_gradients_of_removed_weights():
    params = {"kernel": jnp.array([[3.0, 0.1]])}
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    tx = rigl(clipped, 0.5, fraction=THIRD, score=jc.magnitude)
    grads = {"kernel": jnp.array([[1.0, 100.0]])}
    updates = one_update(tx, params, grads)
    np.testing.assert_allclose(updates["kernel"], [[-1.0, -0.1]])


def test_weights_that_somebody_else_writes_are_counted_and_put_back():
    params = {"a": normal((4, 6)), "b": normal((4, 6)), "bias": normal(6)}
    score = jc.random_scores(KEY)
    tx = rigl(optax.sgd(0.1), 0.5, fraction=lambda step: 0.0, score=score, every=1)
    grads = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(params), params)
    assert state.stray == 0  # at the first step they may well be dense
    updates, state = update(grads, state, params)
    assert state.stray == 12 + 12
    landed = optax.apply_updates(params, updates)
    zeros = [int(np.sum(landed[name] == 0)) for name in ("a", "b", "bias")]
    assert zeros == [12, 12, 0]
    _, state = update(grads, state, landed)
    assert state.stray == 24
    full = state._replace(stray=jnp.int32(2**31 - 3))
    assert update(grads, full, params)[1].stray == 2**31 - 1


def test_an_optimizer_may_widen_its_state():
    params = {"kernel": jnp.asarray(normal((4, 6)), jnp.bfloat16)}
    tx = rigl(optax.adam(0.1), 0.5, fraction=THIRD, score=jc.magnitude, every=2)
    step = jax.jit(tx.update)
    state = tx.init(params)
    assert state.inner_state[0].mu["kernel"].dtype == "bfloat16"
    for i in range(4):
        grads = {"kernel": normal((4, 6), seed=i)}
        moves, state = step(grads, state, params)
        params = optax.apply_updates(params, moves)
        mask = np.asarray(state.masks["kernel"])
        assert mask.sum() == 12
        assert np.all(np.asarray(params["kernel"])[~mask] == 0)
    assert params["kernel"].dtype == "bfloat16"
    assert state.inner_state[0].mu["kernel"].dtype == "float32"


def test_what_the_optimizer_wants_besides_is_passed_on():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda u: u * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = rigl(inner, 0.5, fraction=THIRD, score=jc.magnitude)
    params = {"kernel": jnp.array([[3.0, 1.0]])}
    moves = one_update(tx, params, params, value=2.0)
    np.testing.assert_array_equal(moves["kernel"], [[6.0, -1.0]])


def test_only_matrices_are_pruned_and_compressed_leaves_are_skipped():
    w = jnp.asarray(normal((4, 6)))
    tree = {"b": jnp.ones(6), "g": jnp.float32(2), "k": w, "q": jc.quantize(w, bits=4)}
    trainable, rest = jc.split(tree)
    tx = rigl(optax.adam(0.1), 0.5, fraction=THIRD, score=jc.magnitude, every=2)
    grads = jax.tree.map(lambda p: jnp.ones((3, *p.shape)), trainable)
    final, states = run(tx, trainable, grads)
    assert {k: m.shape for k, m in states.masks.items() if k != "k"} == {
        "b": (3,),
        "g": (3,),
        "q": (3,),
    }
    last = jc.join(jax.tree.map(lambda x: x[-1], final), rest)
    assert int(jnp.sum(last["k"] == 0)) >= 12
    for leaf in (last["b"], last["g"], last["q"].scale):
        assert np.all(np.asarray(leaf) != 0)


def test_a_selected_scalar_is_not_pruned():
    params = {"kernel": jnp.ones((4, 6)), "gain": jnp.float32(2)}
    score, where = jc.magnitude, jc.path_matches(".*")
    tx = rigl(optax.sgd(0.1), 0.9, fraction=THIRD, score=score, where=where)
    assert bool(tx.init(params).masks["gain"])


def test_budgets_share_out_the_start_and_every_leaf_keeps_its_count():
    params = {
        "big": {"kernel": jnp.asarray(10 * normal((4, 6)))},
        "small": {"kernel": jnp.asarray(normal((4, 6), seed=2))},
    }
    make = partial(rigl, optax.sgd(0.1), fraction=THIRD, score=jc.magnitude, every=2)
    tx = make(0.5, budget=jc.prune.global_budget)
    chex.assert_trees_all_equal(
        tx.init(params).masks,
        jc.prune.masks(params, 0.5, budget=jc.prune.global_budget),
    )
    grads = jax.tree.map(lambda p: normal((7, *p.shape), seed=4), params)
    masks = run(tx, params, grads)[1].masks
    counts = [np.sum(m["kernel"], axis=(1, 2)) for m in masks.values()]
    assert counts[0][0] > counts[1][0]
    assert all(np.ptp(count) == 0 for count in counts)
    start = make({"big/kernel": 0.75}).init(params).masks
    assert [int(m["kernel"].sum()) for m in start.values()] == [6, 24]


def test_a_stored_state_is_made_of_plain_arrays_and_resumes_bit_for_bit(tmp_path):
    start = {"kernel": jnp.asarray(normal((4, 6)))}
    grads = normal((8, 4, 6), seed=1)
    tx = regrow_randomly(
        KEY, optax.adam(0.1), 0.5, fraction=THIRD, score=jc.magnitude, every=2
    )
    step = jax.jit(tx.update)

    def resume(params, state, first, last):
        for i in range(first, last):
            updates, state = step({"kernel": grads[i]}, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = resume(start, tx.init(start), 0, 4)
    final = resume(params, state, 4, 8)
    like = tx.init(start)
    data = flax.serialization.to_bytes(state)
    jc.save(tmp_path / "state.jxc", state)
    for back in (
        flax.serialization.from_bytes(like, data),
        jc.load(tmp_path / "state.jxc", like=like),
    ):
        assert isinstance(back, RegrowState)
        chex.assert_trees_all_equal(back, state)
        chex.assert_trees_all_equal(resume(params, back, 4, 8), final)


def test_a_raw_key_does_as_well():
    start = {"kernel": jnp.asarray(normal((4, 6)))}
    make = partial(regrow_randomly, fraction=THIRD, score=jc.magnitude)
    states = [
        make(key, optax.sgd(0.1), 0.5).init(start)
        for key in (KEY, jax.random.PRNGKey(0))
    ]
    chex.assert_trees_all_equal(*states)


def test_masks_that_stay_are_keep_zeros_after_random_masks():
    params = {"kernel": jnp.asarray(normal((4, 6)))}
    grads = {"kernel": normal((5, 4, 6), seed=1)}
    score = jc.random_scores(KEY)
    sparse = jc.apply_masks(params, jc.prune.masks(params, 0.5, score=score))
    still, _ = run(optax.chain(optax.adam(0.1), jc.keep_zeros()), sparse, grads)
    never = rigl(optax.adam(0.1), 0.5, fraction=lambda step: 0.0, score=score, every=2)
    ours, states = run(never, sparse, grads)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x == 0, (ours, still))))
    chex.assert_trees_all_close(ours, still, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_is_said():
    make = partial(rigl, optax.sgd(0.1), 0.5, score=jc.magnitude)
    with pytest.raises(ValueError, match="rigl needs 1 <= every <= .* got 0"):
        make(fraction=THIRD, every=0)
    with pytest.raises(
        TypeError, match="rigl needs a function step -> fraction, got fraction=0.3"
    ):
        make(fraction=0.3)
    with pytest.raises(
        ValueError, match="selected none of the 1 leaves, which are bias"
    ):
        make(fraction=THIRD).init({"bias": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match="0 <= sparsity < 1, .* got 1.5"):
        rigl(optax.sgd(0.1), 1.5, fraction=THIRD, score=jc.magnitude).init(
            {"kernel": jnp.ones((2, 3))}
        )
    params = {"kernel": jnp.ones((2, 3))}
    tx = regrow_randomly(KEY, optax.sgd(0.1), 0.5, fraction=THIRD, score=jc.magnitude)
    with pytest.raises(ValueError, match="regrow_randomly needs the current weights"):
        tx.update(params, tx.init(params))
