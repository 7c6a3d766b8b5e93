"""Weights land on a grid at times, more and more, or always, rounded at random."""

from functools import partial

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.train import (
    harden,
    project,
    round_stochastically,
    round_to_step_stochastically,
)


STEP = 0.25
GRID = partial(jc.quantize_step, bits=6, step=STEP)
KEY = jax.random.key(7)
VALUES = st.sampled_from([0.0, 1.0, -1.0, 0.5]) | st.floats(
    -4, 4, width=32, allow_subnormal=False
)
WEIGHTS = hnp.arrays(np.float32, (4, 6), elements=VALUES)


def normal(shape, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape).astype(np.float32)).astype(dtype)


def run(tx, params, updates):
    """Takes stacked updates; gives params and state after every step."""

    def step(carry, updates):
        params, state = carry
        updates, state = tx.update(updates, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    start = params, tx.init(params)
    return jax.jit(lambda start, rows: jax.lax.scan(step, start, rows)[1])(
        start, updates
    )


def f32(x):
    return np.asarray(x).astype(np.float32)


def on_grid(x):
    return np.asarray(GRID(jnp.asarray(x)).dense()) == x


# project


def test_every_third_step_is_a_projection_and_the_others_are_free():
    params = {"kernel": normal((4, 6)), "bias": jnp.ones(6)}
    moves = {"kernel": normal((7, 4, 6), seed=1), "bias": jnp.ones((7, 6))}
    after = run(project(GRID, every=3), params, moves)[0]
    want = np.asarray(params["kernel"])
    for k in range(7):
        free = want + moves["kernel"][k]
        want = np.asarray(GRID(want).dense() if k in (2, 5) else free)
        np.testing.assert_array_equal(after["kernel"][k], want)
    np.testing.assert_array_equal(after["bias"][-1], 8 * np.ones(6))


@jax.jit
def projected(p, u):
    """What a projection step of a grid of 4 bits leaves of ``p``."""
    tx = project(lambda w: jc.quantize(w, bits=4), every=2)
    state = tx.init({"kernel": p})._replace(count=jnp.int32(1))
    updates, _ = tx.update({"kernel": u}, state, {"kernel": p})
    return optax.apply_updates({"kernel": p}, updates)["kernel"]


@given(WEIGHTS, WEIGHTS)
@settings(max_examples=40)
def test_weights_land_on_a_rounding_grid_bit_for_bit(p, u):
    p, u = jnp.asarray(p), jnp.asarray(u)
    np.testing.assert_array_equal(projected(p, u), jc.quantize(p, bits=4).dense())


@pytest.mark.parametrize("update", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("weight", [jnp.float32, jnp.bfloat16])
def test_they_do_in_every_dtype(weight, update):
    p, u = normal((4, 6), dtype=weight), normal((4, 6), seed=1, dtype=update)
    got, want = projected(p, u), jc.quantize(p, bits=4).dense()
    assert got.dtype == weight
    np.testing.assert_array_equal(f32(got), f32(want))


def test_other_targets_are_met_within_an_ulp_of_the_larger():
    p, target = normal((64, 64)), normal((64, 64), seed=1)
    tx = project(lambda w: target, every=2)
    state = tx.init({"kernel": p})._replace(count=jnp.int32(1))
    updates, _ = tx.update({"kernel": p}, state, {"kernel": p})
    got = np.asarray(optax.apply_updates({"kernel": p}, updates)["kernel"])
    ulp = np.spacing(np.maximum(np.abs(p), np.abs(target)))
    assert np.all(np.abs(got - target) <= ulp)
    assert np.mean(got == target) > 0.5
    again = got + (np.asarray(target) - got)
    np.testing.assert_array_equal(again, target)  # a second landing is exact


def test_zeros_of_the_target_are_exact():
    params = {"kernel": normal((4, 6))}
    tx = project(lambda w: w * jc.top_mask(jnp.abs(w), 0.5), every=2)
    kernels = run(tx, params, {"kernel": normal((6, 4, 6), seed=1)})[0]["kernel"]
    zeros = np.sum(np.asarray(kernels) == 0, axis=(1, 2))
    assert zeros.tolist() == [0, 12, 0, 12, 0, 12]


# harden


def levels(*values):
    table = jnp.array(values)
    return lambda step: table[jnp.minimum(step, table.size - 1)]


def test_the_largest_are_fixed_first_by_hand():
    params = {"kernel": jnp.array([[1.1, -0.3, 0.6, -2.2]])}
    tx = harden(GRID, levels(0.0, 0.5, 1.0), every=1)
    moves = {"kernel": jnp.full((4, 1, 4), 0.125)}
    kernels, states = run(tx, params, moves)
    np.testing.assert_allclose(
        kernels["kernel"][:, 0],
        [
            [1.225, -0.175, 0.725, -2.075],  # nothing is fixed
            [1.25, -0.05, 0.85, -2.0],  # the first and the last land on a quarter
            [1.25, 0.0, 0.75, -2.0],  # 0.85 and -0.05 land
            [1.25, 0.0, 0.75, -2.0],
        ],
        atol=1e-6,
    )
    assert on_grid(kernels["kernel"][-1]).all()
    assert not np.asarray(states.free["kernel"][-1]).any()


def test_counts_follow_the_schedule_and_what_is_fixed_stays():
    params = {"a": normal((4, 6)), "b": {"kernel": normal((5, 3), seed=2)}}
    moves = {"a": normal((8, 4, 6), 3), "b": {"kernel": normal((8, 5, 3), 4)}}
    moves = jax.tree.map(lambda u: 0.1 * u, moves)
    schedule = optax.linear_schedule(0.0, 1.0, 4)
    after, states = run(harden(GRID, schedule, every=1), params, moves)
    for name, size, leaf in (
        ("a", 24, after["a"]),
        ("b", 15, after["b"]["kernel"]),
    ):
        leaf = np.asarray(leaf)
        free = np.asarray(jax.tree.leaves(states.free[name])[0])
        assert np.all(on_grid(leaf[-1]))
        counts = np.sum(~free, axis=(1, 2))
        assert counts.tolist() == [round(float(schedule(k)) * size) for k in range(8)]
        for before, now, fixed in zip(leaf[:-1], leaf[1:], ~free[:-1], strict=True):
            np.testing.assert_array_equal(before[fixed], now[fixed])  # for good
            assert np.all(before[~fixed] != now[~fixed])


@given(WEIGHTS, st.integers(0, 24))
def test_the_count_is_exact_and_the_choice_is_numpys(p, count):
    fixed, landed = chosen(jnp.asarray(p), jnp.float32(count / 24))
    order = np.argsort(-np.abs(p).reshape(-1), kind="stable")
    want = np.zeros(24, bool)
    want[order[:count]] = True
    np.testing.assert_array_equal(fixed, want.reshape(4, 6))
    np.testing.assert_array_equal(
        landed, np.where(fixed, GRID(jnp.asarray(p)).dense(), p)
    )


@jax.jit
def chosen(p, share):
    tx, params = harden(GRID, lambda step: share, every=1), {"kernel": p}
    still = {"kernel": jnp.zeros_like(p)}
    updates, state = tx.update(still, tx.init(params), params)
    return ~state.free["kernel"], optax.apply_updates(params, updates)["kernel"]


def test_a_share_that_falls_frees_nothing():
    params = {"kernel": normal((4, 6))}
    moves = {"kernel": 0.1 * normal((4, 4, 6), seed=1)}
    states = run(harden(GRID, levels(0.5, 0.25, 0.25, 0.75), every=1), params, moves)[1]
    fixed = np.sum(~np.asarray(states.free["kernel"]), axis=(1, 2))
    assert fixed.tolist() == [12, 12, 12, 18]


def test_all_is_on_the_grid_at_the_end_whatever_every_is_and_zeros_are_held():
    kernel = jnp.where(jnp.abs(normal((4, 6))) < 0.7, 0, normal((4, 6)))
    tx = optax.chain(
        optax.adam(0.1),
        jc.keep_zeros(),
        harden(GRID, optax.linear_schedule(0.0, 1.0, 5), every=3),
    )
    moves = {"kernel": normal((8, 4, 6), seed=1)}
    last = np.asarray(run(tx, {"kernel": kernel}, moves)[0]["kernel"][-1])
    assert not last[np.asarray(kernel) == 0].any()
    assert on_grid(last).all()


# round_stochastically


BF16 = hnp.arrays(
    np.float32, (4, 6), elements=VALUES | st.sampled_from([1e-8, 300.0, -1e6, 1e30])
)


@jax.jit
def rounded(p, u, key):
    tx = round_stochastically(jax.random.wrap_key_data(key))
    updates, _ = tx.update({"p": u}, tx.init({"p": p}), {"p": p})
    return updates["p"], optax.apply_updates({"p": p}, updates)["p"]


@given(BF16, BF16, st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_the_weight_lands_on_a_neighbour_of_the_sum(p, u, seed):
    p = jnp.asarray(p).astype(jnp.bfloat16)
    key = jax.random.key_data(jax.random.key(seed))
    _, landed = rounded(p, jnp.asarray(u), key)
    assert landed.dtype == jnp.bfloat16
    total = f32(p) + u
    bits = total.view(np.uint32)
    down = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    up = ((bits & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32)
    got = f32(landed)
    assert np.all((got == down) | ((got == up) & (bits & 0xFFFF != 0)))


def test_the_mean_of_the_weights_is_the_sum_in_float32():
    p = jnp.full((200, 200), 1.0, jnp.bfloat16)
    for u in (1e-3, -1e-3, 0.3, 1.2345):
        _, landed = rounded(p, jnp.full(p.shape, u), jax.random.key_data(KEY))
        got = f32(landed)
        spread = np.ptp(got) / 2 / np.sqrt(got.size)  # of the mean, at most
        assert abs(got.mean(dtype=np.float64) - (1 + u)) < 4 * spread + 1e-7


def test_small_updates_stall_if_rounded_to_nearest_and_drift_if_not():
    params = {"kernel": jnp.ones((40, 40), jnp.bfloat16)}
    moves = {"kernel": jnp.full((100, 40, 40), -1e-3)}
    nearest = run(optax.identity(), params, moves)[0]["kernel"][-1]
    np.testing.assert_array_equal(f32(nearest), 1)
    drift = run(round_stochastically(KEY), params, moves)[0]["kernel"]
    means = f32(drift).mean(axis=(1, 2), dtype=np.float64)
    np.testing.assert_allclose(means, 1 - 1e-3 * np.arange(1, 101), atol=2e-3)
    assert drift.dtype == jnp.bfloat16


def test_training_in_bfloat16_ends_where_float32_ends():
    x, target = normal((64, 16)), normal((16, 4), seed=1)

    def trained(tx, kernel):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(
                lambda params: jnp.mean(
                    (x @ (params["kernel"].astype(jnp.float32) - target)) ** 2
                )
            )(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = {"kernel": kernel}
        scan = jax.jit(lambda c: jax.lax.scan(step, c, length=2000)[0])
        return f32(scan((start, tx.init(start)))[0]["kernel"])

    sgd = optax.sgd(2e-3)
    start = target.astype(jnp.bfloat16) + jnp.bfloat16(1)
    stalled = np.abs(trained(sgd, start) - target).mean()
    random = np.abs(
        trained(optax.chain(sgd, round_stochastically(KEY)), start) - target
    )
    wide = np.abs(trained(sgd, start.astype(jnp.float32)) - target).mean()
    assert stalled > 3 * wide
    assert random.mean() < wide + 0.03


def test_a_zero_with_no_update_a_nan_and_an_infinity_stay_what_they_are():
    p = jnp.zeros((1, 4), jnp.bfloat16)
    u = jnp.array([[0.0, jnp.nan, jnp.inf, -jnp.inf]])
    for seed in range(5):
        key = jax.random.key_data(jax.random.key(seed))
        np.testing.assert_array_equal(f32(rounded(p, u, key)[1]), u)


def test_other_dtypes_are_left_out_and_asked_for_are_an_error():
    params = {"kernel": jnp.ones((2, 3), jnp.bfloat16), "bias": jnp.ones(3)}
    tx = round_stochastically(KEY)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["bias"] is params["bias"]
    tx = round_stochastically(KEY, where=jc.path_matches("bias"))
    with pytest.raises(
        TypeError, match=r"needs leaves of bfloat16, got float32\[3\] at 'bias'"
    ):
        tx.update(params, tx.init(params), params)


# round_to_step_stochastically


@jax.jit
def stepped(p, u, step, key):
    tx = round_to_step_stochastically(jax.random.wrap_key_data(key), step)
    params = {"kernel": p}
    updates, _ = tx.update({"kernel": u}, tx.init(params), params)
    return optax.apply_updates(params, updates)["kernel"]


@given(WEIGHTS, WEIGHTS, st.sampled_from([0.25, 0.1, 0.7]), st.integers(0, 99))
@settings(max_examples=40)
def test_the_weight_lands_on_a_level_next_to_the_sum(p, u, step, seed):
    key = jax.random.key_data(jax.random.key(seed))
    step = np.float32(step)
    p = np.rint(p / step) * step
    got = np.asarray(stepped(jnp.asarray(p), jnp.asarray(u), step, key))
    level = got / step
    np.testing.assert_allclose(level, np.rint(level), atol=1e-4)
    assert np.all(np.abs(got - (p.astype(np.float64) + u)) < step * (1 + 1e-5))
    still = np.asarray(stepped(jnp.asarray(p), jnp.zeros((4, 6)), step, key))
    np.testing.assert_array_equal(still, p)  # on a level, and not by chance


def test_the_mean_drifts_as_the_updates_say():
    params = {"kernel": jnp.zeros((40, 40), jnp.bfloat16)}
    moves = {"kernel": jnp.full((100, 40, 40), 0.01)}
    tx = round_to_step_stochastically(KEY, step=0.1)
    kernels = run(tx, params, moves)[0]["kernel"]
    means = f32(kernels).mean(axis=(1, 2), dtype=np.float64)
    np.testing.assert_allclose(means, 0.01 * np.arange(1, 101), atol=0.04)
    stored = jc.quantize_step(kernels[-1], step=0.1)
    np.testing.assert_array_equal(f32(stored.dense()), f32(kernels[-1]))


def test_weights_beside_the_levels_come_to_them():
    p = normal((40, 40))
    key = jax.random.key_data(KEY)
    got = np.asarray(stepped(p, jnp.zeros((40, 40)), 0.5, key))
    assert np.all(got % 0.5 == 0)
    assert np.abs(got - p).max() < 0.5
    assert abs(np.mean(got - p)) < 4 * 0.25 / 40


@pytest.mark.parametrize("step", [0.0, -1.0, float("inf")])
def test_a_step_that_is_not_positive_is_an_error(step):
    with pytest.raises(
        ValueError, match="round_to_step_stochastically needs a positive finite step"
    ):
        round_to_step_stochastically(KEY, step)


# What every link promises.


LINKS = {
    "project": project(GRID, every=2),
    "harden": harden(GRID, optax.linear_schedule(0.0, 1.0, 4), every=2),
    "round_stochastically": round_stochastically(KEY),
    "round_to_step_stochastically": round_to_step_stochastically(KEY, STEP),
}


def make(name, shape=(), seed=0):
    """Stacked params, of the dtype that the link is for."""
    dtype = jnp.bfloat16 if name == "round_stochastically" else jnp.float32
    kernel = normal((*shape, 4, 6), seed, dtype)
    return {"kernel": kernel, "bias": normal((*shape, 6), seed + 1)}


def stepper(tx):
    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return step


@pytest.mark.parametrize("name", LINKS)
def test_scan_vmap_and_a_saved_state_do_what_a_loop_does(name):
    chex.clear_trace_counter()
    tx = optax.chain(optax.sgd(0.1), LINKS[name])
    step = jax.jit(chex.assert_max_traces(stepper(tx), n=1))
    starts, grads = make(name, (2,)), make("grads", (6,), seed=5)

    def loop(carry, rows):
        for i in rows:
            carry, _ = step(carry, jax.tree.map(lambda grad, i=i: grad[i], grads))
        return carry

    def scan(start):
        return jax.lax.scan(stepper(tx), (start, tx.init(start)), grads)[0]

    params = jax.tree.map(lambda p: p[0], starts)
    end = loop((params, tx.init(params)), range(6))
    both = jax.jit(jax.vmap(scan))(starts)
    first = jax.tree.map(lambda x: x[0], both)
    chex.assert_trees_all_close(first, end, rtol=1e-5, atol=1e-6)
    half = loop((params, tx.init(params)), range(3))
    saved = flax.serialization.to_bytes(half)
    again = flax.serialization.from_bytes((params, tx.init(params)), saved)
    chex.assert_trees_all_equal(loop(again, range(3, 6)), end)
    jax.export.export(jax.jit(stepper(tx)), platforms=("cpu", "cuda", "tpu"))(
        half, jax.tree.map(lambda grad: grad[0], grads)
    )


@pytest.mark.parametrize("name", LINKS)
def test_a_part_of_a_tree_is_done_by_itself_and_may_select_nothing(name):
    params = {"a": make(name), "b": {"bias": jnp.ones(3)}}
    labels = {"a": dict.fromkeys(params["a"], "a"), "b": {"bias": "b"}}
    tx = optax.partition({"a": LINKS[name], "b": LINKS[name]}, labels)

    moves = jax.tree.map(lambda p: jnp.full(p.shape, 0.3), params)
    updates, _ = jax.jit(lambda p: tx.update(moves, tx.init(p), p))(params)
    np.testing.assert_array_equal(updates["b"]["bias"], moves["b"]["bias"])
    np.testing.assert_array_equal(updates["a"]["bias"], moves["a"]["bias"])
    rewritten = np.any(updates["a"]["kernel"] != moves["a"]["kernel"])
    assert rewritten == name.startswith("round")  # the others are not due yet


@pytest.mark.parametrize("name", LINKS)
def test_the_weights_are_needed_and_something_must_be_selected(name):
    params = make(name)
    tx = LINKS[name]
    with pytest.raises(ValueError, match=f"{name} needs the current weights"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="selected none of the 1 leaves, which are x"):
        tx.init({"x": jnp.ones(3)})


@pytest.mark.parametrize("link", [project, partial(harden, share=lambda step: 1.0)])
def test_a_function_that_changes_the_shape_is_an_error(link):
    params = {"kernel": jnp.ones((2, 3))}
    tx = link(lambda w: w[0], every=2)
    with pytest.raises(
        ValueError, match=r"needs fn to give .* float32\[3\] for float32\[2, 3\] at 'ke"
    ):
        tx.update(params, tx.init(params), params)


def test_every_has_a_least_value():
    with pytest.raises(ValueError, match="project needs 2 <= every <= .* got 1"):
        project(GRID, every=1)
    with pytest.raises(ValueError, match="harden needs 1 <= every <= .* got 0"):
        harden(GRID, lambda step: 1.0, every=0)
