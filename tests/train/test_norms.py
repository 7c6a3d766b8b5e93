"""A folded norm gives the same function; new statistics are the mean over batches."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.train.norms import (
    fold_norm,
    fold_norms,
    freeze_after,
    freeze_norms,
    reestimate_norms,
)


PLATFORMS = ("cpu", "cuda", "tpu")


class Net(nn.Module):
    """A convolution and a dense layer, each with a norm."""

    bias: bool = True
    epsilon: float = 1e-5
    affine: bool = True
    momentum: tuple[float, float] = (0.99, 0.9)
    frozen: bool = False  # the first norm never uses the batch

    @nn.compact
    def __call__(self, x, train=False):
        def norm(x, i):
            return nn.BatchNorm(
                use_running_average=not train or (self.frozen and i == 0),
                momentum=self.momentum[i],
                epsilon=self.epsilon,
                use_scale=self.affine,
                use_bias=self.affine,
            )(x)

        x = nn.relu(norm(nn.Conv(4, (2, 2), use_bias=self.bias)(x), 0))
        return norm(nn.Dense(3, use_bias=self.bias)(x.mean(axis=(1, 2))), 1)


PAIRS = [("Conv_0", "BatchNorm_0"), ("Dense_0", "BatchNorm_1")]
IMAGES = np.random.default_rng(0).normal(size=(5, 16, 3, 3, 2)).astype(np.float32)


def trained(model, seed=1):
    """Params and statistics with nothing at its initial value."""
    variables = model.init(jax.random.key(0), IMAGES[0])
    rng = np.random.default_rng(seed)
    params, stats = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.3, 2.0, x.shape), x.dtype),
        (variables["params"], variables["batch_stats"]),
    )
    return params, stats


def apply(model, params, stats, x):
    return model.apply({"params": params, "batch_stats": stats}, x)


def training(model, params):
    """The forward pass that `reestimate_norms` takes."""

    def run(stats, x):
        variables = {"params": params, "batch_stats": stats}
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[1][
            "batch_stats"
        ]

    return run


def vectors(*lists):
    return [jnp.array(values) for values in lists]


def test_two_outputs_by_hand():
    kernel = jnp.array([[[1.0, 0.0], [2.0, -4.0]]])
    scale, offset, mean, var = vectors([3.0, 1.0], [0.5, 0.0], [2.0, -1.0], [2.0, 0.0])
    folded, moved = fold_norm(kernel, scale, offset, mean, var, epsilon=0.25)
    np.testing.assert_array_equal(folded, [[[2.0, 0.0], [4.0, -8.0]]])
    np.testing.assert_array_equal(moved, [-3.5, 2.0])  # 0.5 - 2 * 3 / 1.5, 1 / 0.5


@given(
    hnp.arrays(np.float32, (3, 4), elements=st.floats(-2, 2, width=32)),
    hnp.arrays(np.float32, (4, 4), elements=st.floats(0, 4, width=32)),
    st.sampled_from([1e-5, 1e-3, 1.0]),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_the_fold_is_that_of_numpy_in_float64(kernel, rest, epsilon, dtype):
    kernel, rest = jnp.asarray(kernel, dtype), jnp.asarray(rest, dtype)
    found = fold_norm(kernel, *rest, epsilon=epsilon)
    assert [x.dtype for x in found] == [dtype, dtype]
    w = np.asarray(kernel, np.float64)
    scale, offset, mean, var = np.asarray(rest, np.float64)
    factor = scale / np.sqrt(var + np.float64(np.float32(epsilon)))
    eps = 8 * float(jnp.finfo(dtype).eps)
    largest = np.max(mean * factor + offset)
    np.testing.assert_allclose(
        np.asarray(found[0], np.float64), w * factor, rtol=eps, atol=1e-35
    )
    np.testing.assert_allclose(
        np.asarray(found[1], np.float64),
        offset - mean * factor,
        rtol=eps,
        atol=eps * largest + 1e-37,
    )
    assert np.all(np.asarray(found[0])[w == 0] == 0)


def test_a_scale_or_an_offset_that_is_absent_is_one_or_zero():
    kernel = jnp.ones((2, 3))
    mean, var = vectors([1.0, 2.0, 3.0], [3.0, 0.0, 8.0])
    found = fold_norm(kernel, None, None, mean, var, epsilon=1.0)
    same = fold_norm(kernel, jnp.ones(3), jnp.zeros(3), mean, var, epsilon=1.0)
    chex.assert_trees_all_equal(found, same)
    np.testing.assert_allclose(found[1], [-0.5, -2.0, -1.0], rtol=1e-6)


def test_a_bias_joins_the_mean(strict):
    kernel, bias = jnp.array([1.0, -1.0]), jnp.array([5.0, 7.0])
    scale, offset, mean, var = vectors([2.0, 3.0], [1.0, 0.0], [0.5, -1.0], [3.0, 8.0])
    w, b = fold_norm(kernel, scale, offset, mean - bias, var, epsilon=1.0)
    whole = (3 * kernel + bias - mean) * scale / jnp.sqrt(var + 1) + offset
    np.testing.assert_allclose(3 * w + b, whole, rtol=1e-6)


def test_one_weight_and_stacked_layers_fold():
    one = jnp.full((1,), 3.0)
    folded = fold_norm(one, one, one, one, one, epsilon=0.0)
    np.testing.assert_allclose(folded, [[3 * 3**0.5], [3 - 3 * 3**0.5]], rtol=1e-6)
    kernels = jnp.arange(12.0).reshape(2, 3, 2)
    stack = jnp.arange(1.0, 5.0).reshape(2, 2)
    both = jax.vmap(lambda k, v: fold_norm(k, v, v, v, v, epsilon=1e-5))(kernels, stack)
    for i in range(2):
        alone = fold_norm(kernels[i], *[stack[i]] * 4, epsilon=1e-5)
        chex.assert_trees_all_close([x[i] for x in both], list(alone), rtol=1e-6)


@pytest.mark.parametrize("epsilon", [1e-5, 0.02])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_linen_model_is_the_same_function(bias, affine, epsilon):
    model = Net(bias=bias, affine=affine, epsilon=epsilon)
    params, stats = trained(model)
    before = jax.tree.map(np.array, (params, stats))
    folded = fold_norms(params, stats, PAIRS, epsilon=epsilon)
    np.testing.assert_allclose(
        apply(model, *folded, IMAGES[0]),
        apply(model, params, stats, IMAGES[0]),
        rtol=1e-4,
        atol=1e-5,
    )
    chex.assert_trees_all_equal((params, stats), before)
    chex.assert_trees_all_equal_shapes_and_dtypes(folded, (params, stats))
    assert not np.allclose(folded[0]["Conv_0"]["kernel"], params["Conv_0"]["kernel"])


def test_a_layer_with_a_bias_leaves_a_norm_that_changes_no_bit():
    params, stats = fold_norms(*trained(Net()), PAIRS, epsilon=1e-5)
    norm = nn.BatchNorm(use_running_average=True)
    variables = {"params": params["BatchNorm_0"], "batch_stats": stats["BatchNorm_0"]}
    x = IMAGES[0, ..., :1] * np.ones(4, np.float32)
    np.testing.assert_array_equal(jax.jit(norm.apply)(variables, x), x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_variance_that_is_left_is_neutral_to_the_last_bit(dtype):
    for epsilon in np.concatenate([[0, 1e-5, 1e-3], np.geomspace(1e-8, 1, 200)]):
        left = jnp.ones((), dtype) - jnp.asarray(epsilon, dtype)
        assert left + jnp.asarray(epsilon, dtype) == 1


def test_without_a_bias_the_norm_keeps_one():
    params, stats = fold_norms(*trained(Net(bias=False)), PAIRS, epsilon=1e-5)
    assert np.all(np.asarray(params["BatchNorm_0"]["bias"]) != 0)
    assert np.all(np.asarray(params["BatchNorm_0"]["scale"]) == 1)
    assert np.all(np.asarray(stats["BatchNorm_0"]["mean"]) == 0)


def test_pruned_zeros_stay_zero_and_other_leaves_are_not_touched():
    params, stats = trained(Net())
    masks = jc.prune.masks(params, 0.5)
    params = jc.apply_masks(params, masks)
    folded, left = fold_norms(params, stats, PAIRS[:1], epsilon=1e-5)
    for layer in ("Conv_0", "Dense_0"):
        np.testing.assert_array_equal(
            folded[layer]["kernel"] == 0, ~masks[layer]["kernel"]
        )
    assert folded["Dense_0"]["kernel"] is params["Dense_0"]["kernel"]
    assert left["BatchNorm_1"]["var"] is stats["BatchNorm_1"]["var"]


class Block(nnx.Module):
    def __init__(self, bias, rngs):
        self.convs = nnx.List([nnx.Conv(2, 4, (2, 2), use_bias=bias, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, epsilon=1e-3, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.convs[0](x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_nnx_model_is_the_same_function(bias):
    model = Block(bias, nnx.Rngs(0))
    model(IMAGES[0])  # moves the statistics
    model.norm.scale[...] = jnp.array([0.5, 2.0, -1.0, 3.0])
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    pairs = [("convs/0", "norm")]
    folded = fold_norms(params, stats, pairs, epsilon=1e-3)
    small = nnx.merge(graph, *folded)
    model.eval()
    small.eval()
    np.testing.assert_allclose(small(IMAGES[1]), model(IMAGES[1]), rtol=1e-4, atol=1e-5)
    pure = [nnx.to_pure_dict(state) for state in (params, stats)]
    chex.assert_trees_all_equal(
        list(fold_norms(*pure, pairs, epsilon=1e-3)),
        [nnx.to_pure_dict(state) for state in folded],
    )


def test_new_statistics_of_a_linen_model_are_the_mean_over_batches():
    model = Net(momentum=(0.99, 0.5))
    params, stats = trained(model)
    found = reestimate_norms(training(model, params), stats, iter(IMAGES))
    plain = training(model.clone(momentum=(0.0, 0.0)), params)  # new is the batch's
    each = [plain(stats, x) for x in IMAGES]
    expected = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *each)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, stats)
    kernel, bias = (
        np.asarray(params["Conv_0"][k], np.float64) for k in ("kernel", "bias")
    )
    outputs = [numpy_conv(x, kernel) + bias for x in IMAGES]
    means = np.mean([y.mean(axis=(0, 1, 2)) for y in outputs], axis=0)
    variances = np.mean([y.var(axis=(0, 1, 2)) for y in outputs], axis=0)
    np.testing.assert_allclose(found["BatchNorm_0"]["mean"], means, rtol=1e-4)
    np.testing.assert_allclose(found["BatchNorm_0"]["var"], variances, rtol=1e-4)


def numpy_conv(x, kernel):
    """A convolution of 2 by 2 with zeros added below and to the right."""
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 1), (0, 1), (0, 0)])
    return sum(
        padded[:, i : i + 3, j : j + 3] @ kernel[i, j] for i in (0, 1) for j in (0, 1)
    )


def test_new_statistics_of_an_nnx_model_are_the_mean_over_batches():
    model = Block(True, nnx.Rngs(0))
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def run(stats, x):
        model = nnx.merge(graph, params, stats)
        model.train()
        model(x)
        return nnx.state(model, nnx.BatchStat)

    found = reestimate_norms(run, stats, IMAGES)
    outputs = [np.asarray(model.convs[0](x), np.float64) for x in IMAGES]
    for key, of in (("mean", np.mean), ("var", np.var)):
        expected = np.mean([of(y, axis=(0, 1, 2)) for y in outputs], axis=0)
        np.testing.assert_allclose(found["norm"][key][...], expected, rtol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.999])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_momentum_cancels_whatever_it_is(momentum, dtype):
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def run(stats, x):
        mean, var = x.mean(axis=0), x.var(axis=0)
        return {
            "count": stats["count"] + 1,
            "mean": momentum * stats["mean"] + (1 - momentum) * mean,
            "var": momentum * stats["var"] + (1 - momentum) * var,
        }

    batches = np.random.default_rng(0).normal(3, 100, (7, 8, 2)).astype(np.float32)
    stats = {"count": 5, "mean": jnp.zeros(2, dtype), "var": jnp.ones(2, dtype)}
    found = reestimate_norms(run, stats, batches)
    assert found["count"] == 5
    assert found["mean"].dtype == dtype
    rtol = 1e-2 if dtype == jnp.bfloat16 else 1e-6 / (1 - momentum)
    np.testing.assert_allclose(
        np.asarray(found["var"], np.float32), batches.var(axis=1).mean(axis=0), rtol
    )
    np.testing.assert_allclose(
        np.asarray(found["mean"], np.float32), batches.mean(axis=(0, 1)), rtol
    )


def test_a_frozen_layer_keeps_its_statistics_and_feeds_the_next_as_it_is():
    model = Net(frozen=True)
    params, stats = trained(model)
    found = reestimate_norms(training(model, params), stats, IMAGES)
    chex.assert_trees_all_equal(found["BatchNorm_0"], stats["BatchNorm_0"])
    plain = training(model.clone(momentum=(0.0, 0.0)), params)
    each = [plain(stats, x)["BatchNorm_1"] for x in IMAGES]
    expected = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *each)
    chex.assert_trees_all_close(found["BatchNorm_1"], expected, rtol=1e-4, atol=1e-6)


def test_statistics_are_kept_from_a_step_on_with_one_trace():
    chex.clear_trace_counter()
    keep = jax.jit(
        chex.assert_max_traces(
            lambda step, old, new: freeze_norms(step, 2, old, new), n=1
        )
    )
    stats, found = {"n": {"mean": jnp.zeros(2), "count": jnp.int32(0)}}, []
    for step in range(4):
        stats = keep(step, stats, jax.tree.map(lambda x: x + 1, stats))
        found.append((float(stats["n"]["mean"][0]), int(stats["n"]["count"])))
    assert found == [(1, 1), (2, 2), (2, 2), (2, 2)]


def test_a_frozen_leaf_stops_and_the_others_go_on_with_one_trace(strict):
    chex.clear_trace_counter()
    params = {"norm": {"scale": jnp.ones(2)}, "kernel": jnp.ones((2, 2))}
    link = freeze_after(3, where=jc.path_matches(".*/scale"))
    tx = optax.chain(optax.sgd(0.5, momentum=0.5), link)

    @chex.assert_max_traces(n=1)
    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, updates)

    grads = jax.tree.map(lambda p: jnp.ones((6, *p.shape)), params)
    carry, (rows, updates) = jax.jit(lambda c, g: jax.lax.scan(step, c, g))(
        (params, tx.init(params)), grads
    )
    assert carry[1][1].count == 6
    scales, kernels = np.asarray(rows["norm"]["scale"]), np.asarray(rows["kernel"])
    assert np.all(np.diff(scales[:3], axis=0) < 0)
    assert np.all(scales[2:] == scales[2])
    assert np.all(np.asarray(updates["norm"]["scale"])[3:] == 0)
    assert np.all(np.diff(kernels, axis=0) < 0)


def test_a_nan_in_a_gradient_does_not_pass_a_frozen_leaf():
    tx = freeze_after(0, where=lambda path, leaf: True)
    updates, _ = tx.update({"a": jnp.array([jnp.nan])}, tx.init({"a": jnp.ones(1)}))
    np.testing.assert_array_equal(updates["a"], [0.0])


def test_part_of_a_tree_freezes_by_itself_and_other_leaves_pass_through():
    params = {"a": {"scale": jnp.ones(2, jnp.bfloat16)}, "b": {"kernel": jnp.ones(3)}}
    link = freeze_after(0, where=jc.path_matches(".*scale"))
    tx = optax.partition({"a": link, "b": link}, {"a": "a", "b": "b"})
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["a"]["scale"].tolist() == [0, 0]
    assert updates["a"]["scale"].dtype == jnp.bfloat16
    assert updates["b"]["kernel"] is params["b"]["kernel"]


def test_they_lower_for_every_platform():
    def fold(kernel, v):
        return fold_norm(kernel, v, v, v, v, epsilon=1e-5)

    args = jnp.ones((2, 2, 3, 4), jnp.bfloat16), jnp.ones(4)
    exported = jax.export.export(jax.jit(fold), platforms=PLATFORMS)(*args)
    assert exported.platforms == PLATFORMS
    tx, params = freeze_after(2, where=jc.is_matrix), {"kernel": jnp.ones((2, 3))}
    update = jax.export.export(jax.jit(tx.update), platforms=PLATFORMS)
    assert update(params, tx.init(params)).platforms == PLATFORMS


TREES = (
    {"conv": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "norm": {}},
    {"norm": {"mean": jnp.ones(3), "var": jnp.ones(3)}},
)


@pytest.mark.parametrize("epsilon", [-1e-5, 1.5])
def test_an_epsilon_out_of_range_is_an_error(epsilon):
    one = jnp.ones(1)
    with pytest.raises(ValueError, match="fold_norm needs 0 <= epsilon <= 1, .* got"):
        fold_norm(one, one, one, one, one, epsilon=epsilon)
    with pytest.raises(ValueError, match="fold_norms needs 0 <= epsilon <= 1, .* got"):
        fold_norms(*TREES, [("conv", "norm")], epsilon=epsilon)


def test_an_epsilon_that_is_no_number_is_an_error():
    with pytest.raises(ValueError, match="fold_norms needs a number for epsilon"):
        fold_norms(*TREES, [("conv", "norm")], epsilon=float("nan"))


def test_sizes_that_differ_are_an_error():
    one = jnp.ones(3)
    with pytest.raises(
        ValueError,
        match=r"fold_norm needs one var for each output, .* got var float32\[2\] for "
        r"kernel float32\[4, 3\]",
    ):
        fold_norm(jnp.ones((4, 3)), one, one, one, jnp.ones(2), epsilon=1e-5)
    with pytest.raises(ValueError, match="needs one mean for each output"):
        fold_norm(jnp.ones(()), None, None, jnp.ones(()), jnp.ones(()), epsilon=1e-5)
    narrow = {"conv": {"kernel": jnp.ones((2, 4))}}
    with pytest.raises(ValueError, match="fold_norms of 'conv' and 'norm' needs one"):
        fold_norms(narrow, TREES[1], [("conv", "norm")], epsilon=1e-5)


def test_integers_are_an_error():
    one = jnp.ones(3)
    with pytest.raises(TypeError, match="fold_norm needs a floating array, got int32"):
        fold_norm(jnp.ones((2, 3), jnp.int32), one, one, one, one, epsilon=1e-5)


def test_an_unknown_path_is_an_error_that_lists_the_paths():
    with pytest.raises(
        ValueError,
        match="fold_norms needs a kernel at 'dense' in params, which has one at conv",
    ):
        fold_norms(*TREES, [("dense", "norm")], epsilon=1e-5)
    with pytest.raises(
        ValueError, match="needs a mean at 'bn' in stats, which has one at norm"
    ):
        fold_norms(*TREES, [("conv", "bn")], epsilon=1e-5)
    with pytest.raises(ValueError, match="in stats, which has one at no path"):
        fold_norms(TREES[0], {}, [("conv", "norm")], epsilon=1e-5)


def test_a_layer_or_a_norm_that_is_used_twice_is_an_error():
    for pairs in ([("a", "n"), ("b", "n")], [("a", "n"), ("a", "m")]):
        with pytest.raises(ValueError, match="needs every layer and every norm once"):
            fold_norms(*TREES, pairs, epsilon=1e-5)


def test_a_compressed_leaf_is_an_error():
    params = jc.quantize_tree(TREES[0], bits=4)
    with pytest.raises(ValueError, match="is compressed .* Fold first, then compress"):
        fold_norms(params, TREES[1], [("conv", "norm")], epsilon=1e-5)


def test_no_batches_is_an_error():
    with pytest.raises(ValueError, match="needs at least one batch, got none"):
        reestimate_norms(lambda stats, x: stats, {"mean": jnp.zeros(1)}, [])


def test_a_run_that_moves_nothing_is_an_error():
    for stats in ({"mean": jnp.zeros(1)}, {}):
        with pytest.raises(ValueError, match="needs a `run` that moves running"):
            reestimate_norms(lambda stats, x: stats, stats, [1.0])


def test_a_run_that_returns_another_structure_is_an_error():
    with pytest.raises(ValueError, match="stats shaped like those it gets, got"):
        reestimate_norms(lambda s, x: {"batch_stats": s}, {"mean": jnp.zeros(1)}, [1.0])


def test_a_step_to_begin_at_must_be_a_positive_integer():
    with pytest.raises(ValueError, match="freeze_norms needs 0 <= begin"):
        freeze_norms(0, -1, {}, {})
    with pytest.raises(ValueError, match="freeze_after needs 0 <= begin"):
        freeze_after(-1, where=jc.is_matrix)
    with pytest.raises(TypeError, match="freeze_after needs an integer begin"):
        freeze_after(0.5, where=jc.is_matrix)


def test_nothing_to_freeze_is_an_error_that_lists_the_leaves():
    with pytest.raises(ValueError, match="selected none of the 1 leaves, which are a"):
        freeze_after(1, where=jc.path_matches("b")).init({"a": jnp.ones(1)})
