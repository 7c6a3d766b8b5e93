import re
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
from flax import nnx

import jaxcomp as jc
from jaxcomp.program.coupling import coupled_groups
from jaxcomp.program.shrink import cut, shrink


UNITS = np.array([True, False, True, False])


def mlp(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"][None]) @ params["down"]


def made(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"up": (3, 4), "bias": (4,), "down": (4, 2)}
    return {k: jnp.asarray(rng.normal(size=v), jnp.float32) for k, v in shapes.items()}


X = jnp.asarray(np.random.default_rng(9).normal(size=(5, 3)), jnp.float32)
KEEP = {"units of up": UNITS}


def test_slices_are_gone_by_hand():
    params = made()
    g, smaller, widths = shrink(mlp, params, KEEP, X)
    assert widths == {"up": (3, 2), "bias": (2,), "down": (2, 2)}
    np.testing.assert_array_equal(smaller["up"], params["up"][:, ::2])
    np.testing.assert_array_equal(smaller["bias"], params["bias"][::2])
    np.testing.assert_array_equal(smaller["down"], params["down"][::2])
    wanted = mlp({**params, "down": params["down"] * UNITS[:, None]}, X)
    np.testing.assert_allclose(g(smaller, X), wanted, rtol=1e-6)


def test_what_is_kept_whole_is_the_same_function():
    params = made()
    g, smaller, widths = shrink(mlp, params, {}, X)
    chex.assert_trees_all_equal(smaller, params)
    assert widths == {}
    np.testing.assert_array_equal(g(smaller, X), mlp(params, X))


def test_it_can_be_jitted_mapped_differentiated_and_given_other_batches():
    g, smaller, _ = shrink(mlp, made(), KEEP, X)
    wanted = g(smaller, X)
    np.testing.assert_allclose(jax.jit(g)(smaller, X), wanted, rtol=1e-6)
    np.testing.assert_allclose(g(smaller, X[:2]), wanted[:2], rtol=1e-6)
    mapped = jax.vmap(g, (None, 0))(smaller, X[:, None])
    np.testing.assert_allclose(mapped[:, 0], wanted, rtol=1e-5)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), smaller)
    several = jax.vmap(g, (0, None))(stacked, X)
    np.testing.assert_allclose(several[0], wanted, rtol=1e-5)
    slope = jax.grad(lambda p: g(p, X).sum())(smaller)
    chex.assert_trees_all_equal_shapes(slope, smaller)
    jax.test_util.check_grads(lambda p: g(p, X).sum(), (smaller,), 1, ["rev"], 0.02)


def test_it_traces_once():
    g, smaller, _ = shrink(mlp, made(), KEEP, X)
    step = jax.jit(chex.assert_max_traces(g, n=1))
    for _ in range(3):
        step(smaller, X)


def test_it_lowers_for_other_platforms():
    g, smaller, _ = shrink(mlp, made(), KEEP, X)
    shapes = jax.eval_shape(lambda: (smaller, X))
    jax.export.export(jax.jit(g), platforms=("cpu", "cuda", "tpu"))(*shapes)


def test_the_gradient_of_relu_at_zero_stays_zero():
    def f(params, x):
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    params = {"up": jnp.zeros((3, 4)), "down": jnp.ones((4, 2))}
    g, smaller, _ = shrink(f, params, KEEP, X)
    slope = jax.grad(lambda p: g(p, X).sum())(smaller)
    np.testing.assert_array_equal(slope["up"], 0)


def test_a_straight_through_gradient_survives():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(
        lambda x: (jnp.round(x), jnp.abs(x) < 1), lambda kept, g: (g * kept,)
    )

    def f(params, x):
        return rounded(x @ params["up"]) @ params["down"]

    params = made()
    g, smaller, _ = shrink(f, params, KEEP, X)
    found = jax.grad(lambda p: jnp.sin(g(p, X)).sum())(smaller)
    zeros = {
        **params,
        "up": params["up"] * UNITS[None],
        "down": params["down"] * UNITS[:, None],
    }
    wanted = jax.grad(lambda p: jnp.sin(f(p, X)).sum())(zeros)
    np.testing.assert_allclose(found["up"], wanted["up"][:, ::2], rtol=1e-5)
    assert np.any(found["up"] != 0)


def test_a_derivative_with_integer_operands_survives():
    @jax.custom_jvp
    def scaled(x, n):
        return x * n

    @scaled.defjvp
    def _(primals, tangents):
        x, n = primals
        return x * n, 10.0 * tangents[0]

    def f(params, x, n):
        return scaled(x @ params["up"], n) @ params["down"]

    params = {k: v for k, v in made().items() if k != "bias"}
    g, smaller, _ = shrink(f, params, KEEP, X, 3)
    np.testing.assert_allclose(
        jax.grad(lambda x: g(smaller, x, 3).sum())(X),
        10 * np.ones((5, 2)) @ smaller["down"].T @ smaller["up"].T,
        rtol=1e-5,
    )


def test_the_state_of_an_optimizer_goes_through_the_same_cut():
    params, tx = made(), optax.chain(optax.adam(0.1), jc.keep_zeros())
    groups = coupled_groups(mlp, params, X)
    state = tx.init(params)
    _, state = tx.update(made(1), state, params)
    g, smaller, _ = shrink(mlp, params, KEEP, X)
    less = cut(state, params, groups, KEEP)
    chex.assert_trees_all_equal_shapes(less, tx.init(smaller))
    np.testing.assert_array_equal(less[0][0].mu["up"], state[0][0].mu["up"][:, ::2])

    def step(f, params, state):
        grads = jax.grad(lambda p: jnp.sin(f(p, X)).sum())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates)

    masks = jc.prune.group_masks(params, groups.families, KEEP)
    zeros = jc.apply_masks(params, masks)
    held = jax.tree.map(lambda x: x, tx.init(zeros))
    _, held = tx.update(made(1), held, zeros)
    wanted = cut(step(mlp, zeros, held), params, groups, KEEP)
    chex.assert_trees_all_close(step(g, smaller, less), wanted, rtol=1e-4)


def test_a_state_that_is_factored_is_an_error():
    params = made()
    groups = coupled_groups(mlp, params, X)
    state = {"rows": {"up": jnp.zeros(3)}}
    with pytest.raises(ValueError, match=r"shaped like the parameters, got 'rows/up'"):
        cut(state, params, groups, KEEP)


class Net(nn.Module):
    widths: tuple[int, int] = (6, 8)

    @nn.compact
    def __call__(self, x, train):
        for width in self.widths:
            x = nn.Dense(width)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(2)(x)


def test_statistics_and_dropout_keys_of_linen_go_through():
    def f(variables, x, key):
        return Net().apply(
            variables, x, True, mutable=["batch_stats"], rngs={"dropout": key}
        )

    key = jax.random.key(1)
    variables = Net().init(jax.random.key(0), X, False)
    groups = coupled_groups(f, variables, X, key)
    keep = {x.name: np.arange(x.size) % 2 == 0 for x in groups.families}
    g, smaller, widths = shrink(f, variables, keep, X, key)
    logits, changed = g(smaller, X, key)
    assert logits.shape == (5, 2)
    smaller = {**smaller, **changed}
    assert smaller["batch_stats"]["BatchNorm_1"]["mean"].shape == (4,)
    features = [widths[f"params/Dense_{i}/kernel"][1] for i in range(2)]
    small = Net(tuple(features))
    evaluate = partial(Net().apply, train=False)
    h, _, _ = shrink(evaluate, variables, keep, X)
    np.testing.assert_allclose(
        h(smaller, X), small.apply(smaller, X, False), rtol=1e-5, atol=1e-6
    )


def test_a_module_of_nnx_is_rebuilt_from_the_smaller_state():
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(3, 4, rngs=rngs)
            self.down = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    graph, state = nnx.split(Mlp(nnx.Rngs(0)))
    f = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    (family,) = coupled_groups(f, state, X).families
    g, smaller, _ = shrink(f, state, {family.name: UNITS}, X)
    rebuilt = nnx.merge(graph, smaller)
    assert rebuilt.up.kernel.shape == (3, 2)
    np.testing.assert_allclose(rebuilt(X), g(smaller, X), rtol=1e-6)


def test_nodes_are_densified():
    params = jc.quantize_tree(made(), bits=8)
    g, smaller, _ = shrink(mlp, params, KEEP, X)
    dense = jc.densify(params)
    np.testing.assert_array_equal(smaller["up"], dense["up"][:, ::2])
    again = jc.quantize_tree(smaller, bits=8)
    assert np.abs(g(again, X) - g(smaller, X)).max() < 0.1


def test_what_is_drawn_or_counted_along_a_cut_axis_is_that_of_the_kept():
    def f(params, x, key):
        y = x @ params["up"]
        y = y * jax.random.normal(key, y.shape) + jnp.arange(4.0) * y
        return (y * jnp.array([1.0, 10.0, 100.0, 1000.0])) @ params["down"]

    params, key = made(), jax.random.key(3)
    with jax.numpy_rank_promotion("allow"):
        (family,) = coupled_groups(f, params, X, key).families
        keep = {family.name: UNITS}
        g, smaller, _ = shrink(f, params, keep, X, key)
        zeros = {**params, "down": params["down"] * UNITS[:, None]}
        wanted = f(zeros, X, key)
        np.testing.assert_allclose(g(smaller, X, key), wanted, rtol=1e-5)


def test_shuffled_slices_reversals_and_padding_follow():
    def f(params, x):
        y = x @ params["up"]
        y = jnp.concatenate([y[:, 2:], y[:, :2]], axis=1)[:, ::-1]
        y = jnp.pad(y, ((0, 0), (2, 1)))[:, 1:]
        return y @ params["down"]

    rng = np.random.default_rng(0)
    params = {
        "up": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        "down": jnp.asarray(rng.normal(size=(6, 2)), jnp.float32),
    }
    groups = coupled_groups(f, params, X)
    keep = {x.name: np.arange(x.size) != 1 for x in groups.families if x.size > 1}
    g, smaller, widths = shrink(f, params, keep, X)
    assert widths["up"] == (3, 3)
    zeros = jc.apply_masks(params, jc.prune.group_masks(params, groups.families, keep))
    np.testing.assert_allclose(g(smaller, X), f(zeros, X), rtol=1e-5)


def test_a_masked_net_is_cut_to_what_is_left_of_it():
    params = made()
    groups = coupled_groups(mlp, params, X)
    zeros = jc.apply_masks(params, jc.prune.group_masks(params, groups.families, KEEP))
    keep = jc.prune.kept_groups(zeros, groups.families)
    np.testing.assert_array_equal(keep["units of up"], UNITS)
    g, smaller, _ = shrink(mlp, zeros, keep, X)
    np.testing.assert_allclose(g(smaller, X), mlp(zeros, X), rtol=1e-6)


def fails(error, text, call, *args):
    with pytest.raises(error, match=re.escape(text)):
        call(*args)


def test_bad_keeps_say_what_is_wrong():
    params = made()
    run = partial(shrink, mlp, params)
    fails(
        ValueError, "needs names of families in `keep`, got 'up'", run, {"up": UNITS}, X
    )
    fails(
        ValueError,
        "shrink needs bool[4] for the 4 groups of 'units of up', got bool[3]",
        *(run, {"units of up": UNITS[:3]}, X),
    )
    fails(ValueError, "got int64[4]", run, {"units of up": np.arange(4)}, X)
    fails(
        ValueError,
        "needs at least one group of 'units of up' to be kept",
        *(run, {"units of up": np.zeros(4, bool)}, X),
    )


def test_parameters_of_other_shapes_are_an_error():
    params = made()
    g, smaller, _ = shrink(mlp, params, KEEP, X)
    fails(ValueError, "needs the smaller parameters", g, params, X)
    fails(ValueError, "at 'more', got shape ()", g, {**smaller, "more": 1.0}, X)


def halves(mix):
    def f(params, x):
        first, second = jnp.split(x @ params["up"], 2, axis=1)
        return jnp.concatenate([second, mix(first)], axis=1) @ params["down"]

    return f


def test_a_part_of_which_nothing_is_left_is_empty():
    f = halves(jax.nn.gelu)
    params = {k: v for k, v in made().items() if k != "bias"}
    groups = coupled_groups(f, params, X)
    keep = {"units of up": np.array([False, False, True, True])}
    g, smaller, _ = shrink(f, params, keep, X)
    zeros = jc.apply_masks(params, jc.prune.group_masks(params, groups.families, keep))
    np.testing.assert_allclose(g(smaller, X), f(zeros, X), rtol=1e-5)


def test_a_mean_of_nothing_is_an_error():
    f = halves(lambda x: x - x.mean(axis=1, keepdims=True))
    params = {k: v for k, v in made().items() if k != "bias"}
    keep = {"units of up": np.array([False, False, True, True])}
    fails(ValueError, "what a mean is taken over", shrink, f, params, keep, X)


def test_inputs_for_which_more_is_coupled_are_an_error():
    def f(params, x):
        y = x @ params["up"]
        if x.shape[0] == 1:
            y = y[:, ::-1] + y
        return y @ params["down"]

    params = {k: v for k, v in made().items() if k != "bias"}
    g, smaller, _ = shrink(f, params, KEEP, X)
    fails(ValueError, "for inputs of these shapes other slices", g, smaller, X[:1])


def test_inputs_for_which_a_group_is_frozen_are_an_error():
    def f(params, x):
        y = x @ params["up"]
        return jax.nn.softmax(y) @ params["down"] if len(x) == 1 else y @ params["down"]

    params = {k: v for k, v in made().items() if k != "bias"}
    g, smaller, _ = shrink(f, params, KEEP, X)
    fails(ValueError, "reduce_max at test_shrink.py", g, smaller, X[:1])


def test_the_group_lasso_empties_groups_that_can_then_be_cut():
    params = made()
    groups = coupled_groups(mlp, params, X)
    pairs = [group for family in groups.families for group in family.groups]
    tx = optax.chain(optax.sgd(0.0), jc.shrink_coupled(0.25, pairs))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    trained, state = params, tx.init(params)
    for _ in range(3):
        trained, state = step(trained, state)
    keep = jc.prune.kept_groups(trained, groups.families)
    assert 0 < keep["units of up"].sum() < 4
    g, smaller, _ = shrink(mlp, trained, keep, X)
    np.testing.assert_allclose(g(smaller, X), mlp(trained, X), rtol=1e-5)


def test_a_leaf_is_cut_as_the_parameter_with_the_longest_path():
    def f(params, x):
        return mlp(params, x) + (x @ params["more"]["up"])[:, :2]

    params = {**made(), "more": {"up": jnp.ones((3, 4))}}
    groups = coupled_groups(f, params, X)
    less = cut({"mu": params}, params, groups, KEEP)
    assert less["mu"]["up"].shape == (3, 2)
    assert less["mu"]["more"]["up"].shape == (3, 4)


def test_a_parameter_that_is_missing_is_an_error():
    g, smaller, _ = shrink(mlp, made(), KEEP, X)
    del smaller["bias"]
    fails(ValueError, "got none at 'bias'", g, smaller, X)
