"""Weights are shrunk by what was asked, and those that reach zero are exactly zero."""

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
from jaxcomp.train.shrinkage import (
    group_penalty,
    is_norm_scale,
    l1_penalty,
    shrink_coupled,
    shrink_groups,
    shrink_l1,
)


VALUES = hnp.arrays(
    np.float32,
    (3, 4),
    elements=st.one_of(st.just(0.0), st.floats(-4, 4, width=32, allow_subnormal=False)),
)
STRENGTHS = st.sampled_from([0.0, 1e-3, 0.25, 1.0, 9.0])
NEURON = [
    [("a/kernel", -1, [i]), ("a/bias", 0, [i]), ("b/kernel", 0, [i])] for i in range(4)
]


def normal(shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def net(seed=0):
    return {
        "a": {"kernel": normal((3, 4), seed), "bias": normal((4,), seed + 1)},
        "b": {"kernel": normal((4, 2), seed + 2), "bias": normal((2,), seed + 3)},
    }


LINKS = {
    "shrink_l1": shrink_l1(0.5),
    "shrink_groups": shrink_groups(0.5),
    "shrink_coupled": shrink_coupled(0.75, NEURON),
}
EACH = pytest.mark.parametrize("tx", LINKS.values(), ids=LINKS)


def shrunk(tx, params, updates=None):
    """Where one update leaves the weights; without updates, the weights shrunk."""
    if updates is None:
        updates = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def step(params, updates):
        return optax.apply_updates(
            params, tx.update(updates, tx.init(params), params)[0]
        )

    return step(params, updates)


def soft(w, reach):
    return np.sign(w) * np.maximum(np.abs(w) - reach, 0)


def units(w, reach, axis):
    """The group lasso's proximal map, one unit after another."""
    rows = np.moveaxis(np.asarray(w, np.float64), axis, 0).copy()
    for row in rows:
        norm = np.linalg.norm(row)
        row *= max(0.0, 1 - reach * np.sqrt(row.size) / norm) if norm else 0.0
    return np.moveaxis(rows, 0, axis)


def test_l1_by_hand_is_measured_from_where_the_update_lands():
    params = {"kernel": jnp.array([[1.0, 1.0, -1.0, 0.5]])}
    updates = {"kernel": jnp.array([[0.5, -0.75, -0.5, -0.75]])}
    np.testing.assert_array_equal(
        shrunk(shrink_l1(0.25), params, updates)["kernel"], [[1.25, 0.0, -1.25, 0.0]]
    )


@jax.jit
def l1_of(w, updates, strength):
    return shrunk(shrink_l1(strength), {"kernel": w}, {"kernel": updates})["kernel"]


@given(VALUES, VALUES, STRENGTHS)
def test_l1_is_the_soft_threshold_whatever_the_weights(w, u, strength):
    found = l1_of(w, u, jnp.float32(strength))
    expected = soft(w.astype(np.float64) + u, strength)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.all(np.asarray(found)[np.abs(w + u) <= np.float32(strength)] == 0)


def test_descent_with_it_finds_the_lasso_solution():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(12, 12)))[0].astype(np.float32)
    y, penalty, rate = rng.normal(size=(12, 1)).astype(np.float32), 0.6, 0.5
    tx = optax.chain(optax.sgd(rate), shrink_l1(rate * penalty))
    params = {"kernel": jnp.zeros((12, 1))}

    def step(carry, _):
        params, state = carry
        grads = {"kernel": basis.T @ (basis @ params["kernel"] - y)}
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    found = jax.lax.scan(step, (params, tx.init(params)), None, 60)[0][0]["kernel"]
    expected = soft(basis.T @ y, penalty)  # in closed form: the columns are orthonormal
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found) == 0, expected == 0)
    assert 0 < np.sum(expected == 0) < 12


def test_groups_by_hand_along_either_axis():
    params = {"kernel": jnp.array([[3.0, 0.5], [4.0, 0.0], [0.0, 0.0], [0.0, 0.0]])}
    by_column = shrunk(shrink_groups(0.5), params)["kernel"]  # of norms 5 and 0.5, by 1
    np.testing.assert_allclose(
        by_column, [[2.4, 0.0], [3.2, 0.0], [0.0, 0.0], [0.0, 0.0]], rtol=1e-6
    )
    by_row = shrunk(shrink_groups(2.0, axis=0), params)["kernel"]
    reach = 2 * 2**0.5
    left = 1 - reach / 9.25**0.5, 1 - reach / 4
    np.testing.assert_allclose(
        by_row[:2], [[3 * left[0], 0.5 * left[0]], [4 * left[1], 0.0]], rtol=1e-5
    )


@partial(jax.jit, static_argnums=3)
def groups_of(w, updates, strength, axis):
    tx = shrink_groups(strength, axis=axis)
    return shrunk(tx, {"kernel": w}, {"kernel": updates})["kernel"]


@given(VALUES, VALUES, STRENGTHS, st.sampled_from([0, -1]))
def test_groups_are_those_of_a_plain_loop_whatever_the_weights(w, u, strength, axis):
    found = np.asarray(groups_of(w, u, jnp.float32(strength), axis))
    np.testing.assert_allclose(found, units(w + u, strength, axis), atol=2e-6)
    # A unit is zero as a whole or, but for zeros that it had, not at all.
    other = 1 + axis
    dead = np.all(found == 0, axis=other, keepdims=True)
    assert np.all((found != 0) | dead | (np.abs(w + u) < 1e-6))


def test_a_bias_and_a_4d_kernel_have_units_too():
    params = {"kernel": normal((2, 2, 3, 4)), "bias": jnp.array([1.0, -0.125])}
    found = shrunk(shrink_groups(0.25, where=lambda path, leaf: True), params)
    np.testing.assert_allclose(
        found["kernel"], units(params["kernel"], 0.25, -1), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(found["bias"], [0.75, 0.0])


def test_a_coupled_unit_dies_in_all_its_leaves_at_once():
    params = net()
    params["a"]["kernel"] = params["a"]["kernel"].at[:, 1].set(0.2)
    params["a"]["bias"] = params["a"]["bias"].at[1].set(-0.2)
    params["b"]["kernel"] = params["b"]["kernel"].at[1].set(0.1)
    found = shrunk(shrink_coupled(0.3, NEURON), params)
    kernel, bias, after = found["a"]["kernel"], found["a"]["bias"], found["b"]["kernel"]
    for i in range(4):
        old = [params["a"]["kernel"][:, i], params["a"]["bias"][i : i + 1]]
        unit = np.concatenate([*old, params["b"]["kernel"][i]]).astype(np.float64)
        left = max(0.0, 1 - 0.3 * np.sqrt(6) / np.linalg.norm(unit))
        now = np.concatenate([kernel[:, i], bias[i : i + 1], after[i]])
        np.testing.assert_allclose(now, unit * left, rtol=1e-5, atol=1e-7)
        assert np.all(now == 0) == (i == 1)
    assert found["b"]["bias"] is not params["a"]["bias"]
    np.testing.assert_array_equal(found["b"]["bias"], params["b"]["bias"])


@given(VALUES, STRENGTHS)
def test_coupled_groups_of_one_slice_are_plain_groups(w, strength):
    np.testing.assert_array_equal(
        coupled_of(w, jnp.float32(strength)),
        groups_of(w, np.zeros_like(w), jnp.float32(strength), -1),
    )


@jax.jit
def coupled_of(w, strength):
    tx = shrink_coupled(strength, [[("kernel", 1, [i])] for i in range(4)])
    return shrunk(tx, {"kernel": w})["kernel"]


def test_factors_of_crossing_slices_multiply_and_norms_are_those_before():
    w = normal((3, 4)) + 3
    groups = [
        [("kernel", 0, [0, 2])],
        [("kernel", 1, [1]), ("bias", 0, [1])],
        [("kernel", -1, [3])],
    ]
    params = {"kernel": w.at[:, 3].set(0.01), "bias": jnp.ones(4)}
    w = np.asarray(params["kernel"])
    found = shrunk(shrink_coupled(0.5, groups), params)

    def left(*parts):
        unit = np.concatenate([np.ravel(p) for p in parts])
        return max(0.0, 1 - 0.5 * np.sqrt(unit.size) / np.linalg.norm(unit))

    rows = np.array([left(w[[0, 2]]), 1.0, left(w[[0, 2]])])
    columns = np.array([1.0, left(w[:, 1], [1.0]), 1.0, 0.0])
    np.testing.assert_allclose(
        found["kernel"], w * rows[:, None] * columns[None], rtol=1e-5
    )
    np.testing.assert_array_equal(found["kernel"][:, 3], 0)
    np.testing.assert_allclose(found["bias"], [1, columns[1], 1, 1], rtol=1e-6)


def test_thousands_of_groups_compile_as_small_as_two():
    params = {"a": jnp.ones((2, 4000)), "b": jnp.ones((4000, 2))}

    def text(groups):
        tx = shrink_coupled(0.5, groups)
        lowered = jax.jit(tx.update).lower(params, tx.init(params), params)
        return lowered.as_text()

    many = [[("a", 1, [i]), ("b", 0, [i])] for i in range(4000)]
    two = [[("a", 1, [i]), ("b", 0, [i])] for i in range(2)]
    assert text(many).count("\n") == text(two).count("\n")


def test_the_strength_may_follow_a_schedule():
    table = jnp.array([0.0, 0.5, 0.25])
    tx = shrink_l1(lambda step: table[step])
    params, still = {"kernel": jnp.full((1, 2), 2.0)}, {"kernel": jnp.zeros((1, 2))}
    state, found = tx.init(params), []
    for _ in range(3):
        updates, state = tx.update(still, state, params)
        params = optax.apply_updates(params, updates)
        found.append(float(params["kernel"][0, 0]))
    assert found == [2.0, 1.5, 1.25]
    assert int(state.count) == 3


def test_slimming_takes_the_scales_of_norms_only():
    params = {"norm": {"scale": jnp.array([1.0, 0.1]), "bias": jnp.ones(2)}} | net()
    found = shrunk(shrink_l1(0.25, where=is_norm_scale), params)
    np.testing.assert_array_equal(found["norm"]["scale"], [0.75, 0.0])
    found["norm"]["scale"] = params["norm"]["scale"]
    chex.assert_trees_all_equal(found, params)
    assert is_norm_scale("norm/scale/value", jnp.ones((2, 3)))  # scanned, of nnx
    assert not is_norm_scale("norm/scale", jnp.ones(3, int))


@EACH
@pytest.mark.parametrize(
    ("weights", "updates"), [("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_lands_on_exact_zero_whatever_the_dtypes(tx, weights, updates):
    params = jax.tree.map(lambda p: p.astype(weights), net())
    moves = jax.tree.map(lambda p: (0.1 * p).astype(updates), net(9))
    found = shrunk(tx, params, moves)
    chex.assert_trees_all_equal_dtypes(found, params)
    plain = shrunk(tx, *jax.tree.map(lambda x: x.astype(jnp.float32), (params, moves)))
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), found), plain, atol=0.02
    )
    kernel = np.asarray(plain["a"]["kernel"]) == 0
    assert 0 < kernel.sum() < kernel.size
    np.testing.assert_array_equal(np.asarray(found["a"]["kernel"]) == 0, kernel)


@EACH
def test_16_bits_all_along_keep_their_dtype_under_strict_promotion(tx, strict):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), net())
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
    chex.assert_trees_all_equal_dtypes(updates, params)


@EACH
def test_a_nan_shows(tx):
    params = net()
    params["a"]["kernel"] = params["a"]["kernel"].at[0, 0].set(jnp.nan)
    assert jnp.isnan(shrunk(tx, params)["a"]["kernel"][0, 0])


@EACH
def test_zeros_stay_zero_and_an_empty_net_is_no_error(tx):
    zeros = jax.tree.map(jnp.zeros_like, net())
    chex.assert_trees_all_equal(shrunk(tx, zeros), zeros)
    held = optax.chain(optax.sgd(0.1), tx, jc.keep_zeros())
    holed = net()
    holed["a"]["kernel"] = holed["a"]["kernel"].at[1].set(0)
    assert jnp.all(shrunk(held, holed, net(5))["a"]["kernel"][1] == 0)


@EACH
def test_scan_vmap_and_a_loop_agree_with_one_trace(tx):
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), net(), net(20))
    chain = optax.chain(optax.sgd(0.1), tx)

    def step(carry, _):
        params, state = carry
        updates, state = chain.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    def scanned(params):
        return jax.lax.scan(step, (params, chain.init(params)), None, 3)[0][0]

    together = jax.jit(jax.vmap(scanned))(params)
    chex.clear_trace_counter()
    once = jax.jit(chex.assert_max_traces(step, n=1))
    first = jax.tree.map(lambda x: x[0], params)
    carry = first, chain.init(first)
    for _ in range(3):
        carry, _ = once(carry, None)
    chex.assert_trees_all_close(
        carry[0], jax.tree.map(lambda x: x[0], together), rtol=1e-5, atol=1e-6
    )


@EACH
def test_lowers_for_every_platform(tx):
    params, platforms = net(), ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(tx.update), platforms=platforms)
    assert exported(params, tx.init(params), params).platforms == platforms


def test_a_part_of_a_tree_is_shrunk_alone():
    params = net()
    mask = {"a": True, "b": False}
    for tx in (shrink_l1(0.5), shrink_groups(0.5)):
        found = shrunk(optax.masked(tx, mask), params)
        chex.assert_trees_all_equal(found["a"], shrunk(tx, params)["a"])
        chex.assert_trees_all_equal(found["b"], params["b"])


def test_compressed_leaves_are_skipped():
    tree = {"kernel": normal((3, 4)), "small": jc.quantize(normal((3, 4)), bits=4)}
    trainable, _ = jc.split(tree)
    for tx in (shrink_l1(9.0), shrink_groups(9.0)):
        found = shrunk(tx, trainable)
        assert jnp.all(found["kernel"] == 0)
        assert jnp.all(found["small"].scale == trainable["small"].scale)
    assert l1_penalty(tree) == jnp.sum(jnp.abs(tree["kernel"]))


def test_penalties_by_hand():
    params = {
        "a": {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]]), "bias": jnp.ones(2)},
        "b": {"kernel": jnp.array([[-2.0, 1.0]])},
    }
    assert l1_penalty(params) == 10
    np.testing.assert_allclose(group_penalty(params), 5 * 2**0.5 + 3, rtol=1e-6)
    np.testing.assert_allclose(
        group_penalty(params, axis=0), 7 * 2**0.5 + 10**0.5, rtol=1e-6
    )


def test_gradients_of_the_penalties_are_finite_at_zero():
    params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]])}
    np.testing.assert_array_equal(
        jax.grad(l1_penalty)(params)["kernel"], [[1, 0], [1, 0]]
    )
    np.testing.assert_allclose(
        jax.jit(jax.grad(group_penalty))(params)["kernel"],
        np.sqrt(2) * np.array([[0.6, 0], [0.8, 0]]),
        rtol=1e-6,
    )


def test_penalties_are_summed_in_float32_and_show_a_nan():
    params = {"kernel": jnp.full((64, 64), 0.1, jnp.bfloat16)}
    tenth = float(jnp.bfloat16(0.1))
    for penalty in (l1_penalty, group_penalty):
        total = penalty(params)
        assert total.dtype == jnp.float32
        np.testing.assert_allclose(total, 4096 * tenth, rtol=1e-5)
        assert jnp.isnan(penalty({"kernel": jnp.full((2, 2), jnp.nan)}))


@EACH
def test_update_needs_params(tx):
    with pytest.raises(ValueError, match="shrink_[a-z0-9]+ needs the current weights"):
        tx.update(net(), tx.init(net()))


@pytest.mark.parametrize(
    "make", [shrink_l1, shrink_groups, partial(shrink_coupled, groups=NEURON)]
)
def test_a_strength_below_zero_is_an_error(make):
    with pytest.raises(ValueError, match="shrink_.* needs strength >= 0, got -0.5"):
        make(-0.5)
    with pytest.raises(ValueError, match="shrink_.* needs a number for strength"):
        make(float("nan"))


@pytest.mark.parametrize(
    "call", [shrink_l1(0.1).init, shrink_groups(0.1).init, l1_penalty, group_penalty]
)
def test_nothing_to_shrink_is_an_error_that_lists_the_leaves(call):
    with pytest.raises(ValueError, match="selected none of the 1 leaves, which are b"):
        call({"b": jnp.ones(3)})


def test_integers_are_an_error():
    params = {"k": jnp.ones((2, 2), int)}
    for call in (
        shrink_l1(0.1, where=jc.path_matches("k")).init,
        partial(group_penalty, where=jc.path_matches("k")),
    ):
        with pytest.raises(TypeError, match="needs a floating array, got int32"):
            call(params)


def test_an_axis_that_a_leaf_has_not_is_an_error():
    message = r"needs an axis of leaf 'kernel' float32\[2, 3\], got axis=2"
    params = {"kernel": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=f"shrink_groups {message}"):
        shrink_groups(0.1, axis=2).init(params)
    with pytest.raises(ValueError, match=f"group_penalty {message}"):
        group_penalty(params, axis=2)
    with pytest.raises(ValueError, match=f"shrink_coupled {message}"):
        shrink_coupled(0.1, [[("kernel", 2, [0])]]).init(params)


@pytest.mark.parametrize(
    ("groups", "kind", "message"),
    [
        (
            [[("c", 0, [0])]],
            ValueError,
            r"paths of floating arrays, got 'c' in group 0\. The 4 of params are a/",
        ),
        (
            [[("a/bias", 0, [0])], [("a/bias", 0, [1, 4])]],
            ValueError,
            r"indices in \[0, 4\) for axis 0 of leaf 'a/bias' float32\[4\], got 4 in",
        ),
        (
            [[("a/bias", 0, [-1])]],
            ValueError,
            r"indices in \[0, 4\) .* got -1 in group 0",
        ),
        (
            [[("a/kernel", 1, [0, 2])], [("a/kernel", -1, [1, 2])]],
            ValueError,
            r"each slice in one group, got index 2 of axis -1 .* in groups 0 and 1",
        ),
        (
            [[("a/bias", 0, [0.5])]],
            TypeError,
            r"a sequence of integers for axis 0 .* got \[0.5\] in group 0",
        ),
        ([[("a/bias", 0, 1)]], TypeError, r"a sequence of integers .* got 1 in group"),
    ],
)
def test_groups_that_do_not_fit_the_weights_are_an_error(groups, kind, message):
    with pytest.raises(kind, match=f"shrink_coupled needs {message}"):
        shrink_coupled(0.1, groups).init(net())


@pytest.mark.parametrize("groups", [[], [[]]])
def test_no_groups_are_an_error(groups):
    with pytest.raises(ValueError, match="needs groups of .path, axis, indices., got"):
        shrink_coupled(0.1, groups)
