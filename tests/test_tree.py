import re
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.node import CompressedArray, TiedTensor, flatten
from jaxcomp.tree import check_finite, last_key


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(4)(x))
        return nn.MultiHeadDotProductAttention(num_heads=2)(x, x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)


class Pair(NamedTuple):
    kernel: Any
    bias: Any


@pytest.fixture(scope="module")
def linen():
    """Shapes of a Linen module's parameters."""
    model = LinenBlock()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 3, 4)))
    return shapes["params"]


@pytest.fixture(scope="module")
def nnx_block():
    return NnxBlock(nnx.Rngs(0))


@pytest.fixture(scope="module")
def mlp():
    return eqx.nn.MLP(2, 3, 4, depth=1, key=jax.random.key(0))


def everything(path, leaf):
    return True


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def chosen_paths(tree, *args, **settings):
    paths, marks, _ = flatten(jc.select(tree, *args, **settings))
    assert all(type(mark) is bool for mark in marks)
    return [path for path, mark in zip(paths, marks, strict=True) if mark]


def same_objects(ours, theirs):
    leaves = zip(flatten(ours)[1], flatten(theirs)[1], strict=True)
    return [a is b for a, b in leaves]


# select, on every kind of tree


def test_linen_kernels_are_matrices_and_attention_biases_are_not(linen):
    attention = "MultiHeadDotProductAttention_0"
    assert linen[attention]["query"]["bias"].shape == (2, 2)  # (heads, d)
    assert chosen_paths(linen) == [
        "Dense_0/kernel",
        *(f"{attention}/{name}/kernel" for name in ("key", "out", "query", "value")),
    ]


def test_a_stacked_norm_scale_is_no_matrix():
    layers = {"norm": {"scale": jnp.ones((6, 4))}, "kernel": jnp.ones((6, 4, 4))}
    assert chosen_paths(layers) == ["kernel"]


def test_nnx_kernels_are_matrices_and_biases_and_statistics_are_not(nnx_block):
    state = nnx.state(nnx_block)
    assert chosen_paths(state, lambda path, leaf: leaf.ndim == 2) == [
        "attention/key/bias/value",
        "attention/query/bias/value",
        "attention/value/bias/value",
        "dense/kernel/value",
    ]
    assert chosen_paths(state) == [
        *(f"attention/{k}/kernel/value" for k in ("key", "out", "query", "value")),
        "dense/kernel/value",
    ]


def test_equinox_weights_are_matrices_and_functions_are_not_asked_about(mlp):
    asked = []

    def where(path, leaf):
        asked.append(path)
        return jc.is_matrix(path, leaf)

    assert chosen_paths(mlp, where) == ["layers/0/weight", "layers/1/weight"]
    assert asked == [f"layers/{i}/{k}" for i in (0, 1) for k in ("weight", "bias")]


def test_an_equinox_convolution_bias_of_three_dimensions_is_no_matrix():
    conv = eqx.filter_eval_shape(eqx.nn.Conv2d, 1, 3, 3, key=jax.random.key(0))
    assert conv.bias.ndim == 3
    assert chosen_paths(conv) == ["weight"]


def test_lists_tuples_and_named_tuples_have_paths():
    w = jnp.ones((2, 3))
    tree = [w, (w, {"w": w}), Pair(kernel=w, bias=w), {7: w}]
    assert chosen_paths(tree) == ["0", "1/0", "1/1/w", "2/kernel", "3/7"]


def test_a_bare_array_is_a_tree_of_one_leaf():
    assert jc.select(jnp.ones((2, 3))) is True
    np.testing.assert_array_equal(
        jc.map_where(jnp.negative, jnp.ones((2, 3))), -np.ones((2, 3))
    )


@pytest.mark.parametrize(
    "leaf",
    [3, 2.5, "relu", True, jnp.arange(6).reshape(2, 3), jnp.ones((2, 3), bool), None]
    + [jnp.ones(3), jnp.ones(()), jax.random.key(0)],
)
def test_only_floating_arrays_of_two_dimensions_are_matrices(leaf):
    tree = {"kernel": jnp.ones((2, 3)), "other": leaf}
    assert chosen_paths(tree) == ["kernel"]
    if leaf is not None:
        assert jc.select(tree)["other"] is False


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_numpy_leaves_and_narrow_floats_are_matrices(dtype):
    assert chosen_paths({"kernel": np.ones((2, 3), dtype)}) == ["kernel"]


def test_where_sees_arrays_only_and_each_once():
    asked = []
    tree = {"a": 3, "b": jnp.ones(2), "c": None, "d": "relu", "e": np.ones(())}
    jc.select(tree, lambda path, leaf: not asked.append((path, leaf.shape)))
    assert asked == [("b", (2,)), ("e", ())]


def test_nodes_are_offered_by_their_dense_shape_only_when_asked_for():
    w = jnp.ones((2, 3))
    tree = {
        "dense": w,
        "node": jc.quantize(w),
        "tied": TiedTensor("dense", (2, 3), "float32"),
    }
    assert chosen_paths(tree) == ["dense"]
    assert chosen_paths(tree, compressed=True) == ["dense", "node"]
    assert chosen_paths(tree, everything, compressed=True) == ["dense", "node"]


def test_select_gives_one_bool_for_a_node():
    tree = {"dense": jnp.ones((2, 3)), "node": jc.quantize(jnp.ones((2, 3)))}
    assert jc.select(tree) == {"dense": True, "node": False}


def test_select_asks_under_jit_as_it_does_outside():
    tree = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    seen = []
    jax.eval_shape(lambda t: seen.append(jc.select(t)) or t, tree)
    assert seen == [{"kernel": True, "bias": False}]


# path_matches, last_key


def test_a_regex_must_match_the_whole_path():
    where = jc.path_matches("encoder/.*/kernel")
    assert where("encoder/0/kernel", None)
    assert not where("my/encoder/0/kernel", None)
    assert not where("encoder/0/kernel_2", None)


def test_a_regex_selects_leaves_that_are_no_matrices():
    tree = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "step": 3}
    assert chosen_paths(tree, jc.path_matches("bias|step")) == ["bias"]


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("dense/bias", "bias"),
        ("dense/bias/value", "bias"),
        ("value", "value"),
        ("attention/value/kernel", "kernel"),
        ("", ""),
    ],
)
def test_the_last_key_is_the_one_before_a_last_value(path, key):
    assert last_key(path) == key


# what selects nothing


def test_a_where_that_selects_nothing_lists_real_paths(linen):
    text = (
        "`where` selected none of the 12 leaves, which are Dense_0/bias, "
        "Dense_0/kernel, LayerNorm_0/bias, LayerNorm_0/scale, "
        "MultiHeadDotProductAttention_0/key/bias, .... A regex must match the whole "
        "path; leaves that are compressed are skipped."
    )
    for lift in (jc.select, lambda tree, where: jc.map_where(jnp.abs, tree, where)):
        with pytest.raises(ValueError, match=re.escape(text)):
            lift(linen, jc.path_matches("kernel"))


def test_the_error_of_a_where_that_is_offered_nodes_does_not_say_they_are_skipped():
    tree = {"kernel": jc.quantize(jnp.ones((2, 3)))}
    with pytest.raises(ValueError, match=r"are kernel\. .*; leaves that are compre"):
        jc.map_where(jnp.abs, tree)
    text = r"which are kernel\. A regex must match the whole path\.$"
    with pytest.raises(ValueError, match=text):
        jc.map_values(jnp.abs, tree, jc.path_matches("nothing"))


def test_the_error_of_a_where_that_asks_for_a_tied_leaf_points_to_its_source():
    w = jnp.ones((2, 3))
    tree = jc.tie_layers({"a": w, "b": w}, [("a", "b")])
    text = r"path; a tied leaf follows its source and is not selected\.$"
    with pytest.raises(ValueError, match=text):
        jc.map_values(jnp.abs, tree, jc.path_matches("b"))


@pytest.mark.parametrize("tree", [{}, [], None, {"a": None}, {"a": {}}])
def test_a_tree_without_leaves_selects_nothing_and_is_no_error(tree):
    assert jc.select(tree) == tree
    assert jc.map_where(jnp.abs, tree) == tree


def test_a_part_of_a_tree_that_optax_cut_may_select_nothing():
    part = {"kernel": optax.MaskedNode(), "bias": jnp.ones(3)}
    assert jc.select(part) == {"kernel": optax.MaskedNode(), "bias": False}
    mapped = jc.map_where(jnp.abs, part)
    assert mapped["bias"] is part["bias"]


def test_optax_masked_hands_out_parts_that_select_nothing():
    def init(params):
        return jc.select(params)

    def update(updates, state, params=None):
        return jc.map_where(jnp.zeros_like, updates), state

    tx = optax.masked(
        optax.GradientTransformation(init, update), {"kernel": False, "bias": True}
    )
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    updates, _ = tx.update(params, tx.init(params), params)
    assert all(same_objects(updates, params))


# map_where


def test_map_where_changes_the_selected_leaves_and_returns_the_others_as_they_are():
    tree = {
        "kernel": -jnp.ones((2, 3)),
        "bias": -jnp.ones(3),
        "node": jc.quantize(jnp.ones((2, 3))),
        "step": 3,
        "name": "relu",
        "none": None,
    }
    mapped = jc.map_where(jnp.abs, tree)
    np.testing.assert_array_equal(mapped["kernel"], np.ones((2, 3)))
    del tree["kernel"], mapped["kernel"]
    assert all(same_objects(mapped, tree))
    assert mapped["none"] is None


def test_map_where_keeps_the_kind_of_every_container(nnx_block, mlp):
    pair = Pair(jnp.ones((2, 3)), jnp.ones(3))
    for tree in (nnx.state(nnx_block), mlp, pair, [pair, (pair,)]):
        mapped = jc.map_where(jnp.negative, tree)
        assert jax.tree.structure(mapped) == jax.tree.structure(tree)


def test_a_quantized_nnx_state_merges_back_into_its_module(nnx_block):
    graph, state = nnx.split(nnx_block)
    small = jc.quantize_tree(state, bits=8)
    assert isinstance(small["dense"]["kernel"].get_value(), CompressedArray)
    x = jnp.ones((2, 3))
    module = nnx.merge(graph, jc.densify(small))
    np.testing.assert_allclose(module.dense(x), nnx_block.dense(x), atol=0.05)


def test_a_quantized_equinox_module_runs_again_once_dense(mlp):
    x = jnp.array([0.5, -1.0])
    dense = jc.densify(jc.quantize_tree(mlp, bits=8))
    assert isinstance(dense, eqx.nn.MLP)
    np.testing.assert_allclose(dense(x), mlp(x), atol=0.05)


def test_the_first_call_that_takes_a_leaf_wins():
    tree = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))}
    once = jc.quantize_tree(tree, bits=4, where=jc.path_matches("a"))
    twice = jc.quantize_tree(once, bits=2)
    assert twice["a"] is once["a"]
    assert twice["b"].bits == 2


def test_map_where_under_jit_gives_the_same_values():
    tree = {"kernel": -jnp.ones((2, 3)), "bias": -jnp.ones(3)}
    mapped = jax.jit(lambda t: jc.map_where(jnp.abs, t))(tree)
    np.testing.assert_array_equal(mapped["kernel"], np.ones((2, 3)))
    np.testing.assert_array_equal(mapped["bias"], -np.ones(3))


def test_map_where_runs_on_shapes_alone(linen):
    mapped = jax.eval_shape(jc.quantize_tree, linen)
    assert isinstance(mapped["Dense_0"]["kernel"], CompressedArray)
    assert mapped["Dense_0"]["kernel"].shape == (4, 4)
    assert mapped["Dense_0"]["bias"].shape == (4,)


@pytest.mark.parametrize("kind", [TypeError, ValueError])
def test_an_error_of_fn_says_which_leaf_it_was(kind):
    def fail(x):
        raise kind("too narrow")

    tree = {"a": {"bias": jnp.ones(2)}, "b": [jnp.ones((2, 3))]}
    for lift in (jc.map_where, jc.map_values):
        with pytest.raises(kind, match=r"^too narrow \(leaf 'b/0'\)$") as caught:
            lift(fail, tree)
        assert type(caught.value.__cause__) is kind


def test_errors_of_other_kinds_pass_unchanged():
    class Odd(ValueError):
        pass

    error = Odd("too narrow")

    def fail(x):
        raise error

    with pytest.raises(Odd) as caught:
        jc.map_where(fail, {"a": jnp.ones((2, 3))})
    assert caught.value is error


# map_values


def test_map_values_encodes_nodes_in_place():
    w = jnp.array([[1.0, -2.0], [0.5, 4.0]])
    tree = {"node": jc.quantize(w, bits=4, axis=None), "dense": w}
    halved = jc.map_values(lambda x: x / 2, tree)
    assert isinstance(halved["node"], jc.QTensor)
    np.testing.assert_array_equal(halved["node"].scale, tree["node"].scale)
    np.testing.assert_allclose(
        halved["node"].dense(), w / 2, atol=float(tree["node"].scale[0, 0]) * 0.76
    )
    np.testing.assert_array_equal(halved["dense"], w / 2)


def test_map_values_leaves_the_others_as_the_same_objects():
    w = jnp.ones((2, 2))
    tree = {"a": jc.quantize(w), "b": TiedTensor("a", (2, 2), "float32"), "c": w}
    mapped = jc.map_values(jnp.negative, tree, jc.path_matches("a"))
    assert same_objects(mapped, tree) == [False, True, True]


def test_an_error_while_a_node_encodes_says_which_leaf_it_was():
    tree = {"a": jc.palettize(jnp.array([[1.0, 2.0]]), clusters=2)}
    with pytest.raises(ValueError, match=r"\(leaf 'a'\)"):
        jax.eval_shape(lambda t: jc.map_values(jnp.abs, t), tree)


# values that are not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_value_that_is_not_finite_is_named_by_path_index_and_value(dtype, value):
    w = np.zeros((2, 3), dtype)
    w[0, 2] = w[1, 1] = value
    tree = {"a": jnp.ones((2, 3)), "b": [jnp.asarray(w)], "c": jnp.full((2, 3), np.nan)}
    text = (
        f"map_where needs finite values, but leaf 'b/0' {np.dtype(dtype).name}[2, 3] "
        f"holds {value} at index (0, 2) (2 such of 6). Mend the leaf, or leave it out "
        "with `where`."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        jc.map_where(jnp.abs, tree)


def test_a_numpy_leaf_is_checked_too():
    with pytest.raises(ValueError, match=r"leaf 'a' float32\[1, 2\] holds nan at"):
        jc.map_where(jnp.abs, {"a": np.array([[1, np.nan]], np.float32)})


def test_a_bad_value_of_a_leaf_of_no_dimensions_has_an_empty_index():
    with pytest.raises(ValueError, match=r"holds inf at index \(\) \(1 such of 1\)"):
        jc.map_where(jnp.abs, {"a": jnp.array(jnp.inf)}, everything)


def test_a_float64_that_overflows_float32_is_named_too():
    tree = {"a": np.array([[1.0, 1e300]])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's own, on the overflowing cast
        with pytest.raises(ValueError, match=r"map_where needs finite .* leaf 'a'"):
            jc.map_where(jnp.abs, tree)


def test_the_error_carries_the_name_of_the_caller():
    tree = {"a": jnp.full((2, 3), jnp.nan)}
    with pytest.raises(ValueError, match="^map_values needs finite values"):
        jc.map_values(jnp.abs, tree)
    with pytest.raises(ValueError, match="^shrink needs finite values"):
        jc.map_where(jnp.abs, tree, caller="shrink")


def test_values_are_checked_before_fn_sees_anything():
    seen = []
    tree = {"a": jnp.ones((2, 3)), "b": jnp.full((2, 3), jnp.nan)}
    with pytest.raises(ValueError, match="leaf 'b'"):
        jc.map_where(seen.append, tree)
    assert seen == []


def test_the_values_of_a_node_are_checked():
    node = jc.quantize(jnp.ones((2, 2)), bits=4)
    bad = jax.tree.map(lambda x: x * jnp.nan if is_float(x) else x, node)
    with pytest.raises(ValueError, match=r"leaf 'a' float32\[2, 2\] holds nan"):
        jc.map_values(jnp.abs, {"a": bad})


def test_leaves_that_are_not_selected_are_not_checked():
    tree = {"kernel": jnp.ones((2, 3)), "bias": jnp.array([jnp.nan])}
    assert jc.map_where(jnp.abs, tree)["bias"] is tree["bias"]


def test_tracers_are_not_checked_and_concrete_leaves_beside_them_are():
    bad = jnp.full((2, 3), jnp.nan)

    @jax.jit
    def run(x):
        return jc.map_where(jnp.abs, {"a": x})["a"]

    assert np.isnan(run(bad)).all()
    with pytest.raises(ValueError, match=r"leaf 'b' float32\[2, 3\] holds nan"):
        jax.jit(lambda x: jc.map_where(jnp.abs, {"a": x, "b": bad}))(bad)


@given(st.lists(st.booleans(), min_size=6, max_size=6).filter(any))
def test_the_first_bad_index_in_c_order_is_the_one_named(bad):
    w = np.where(np.reshape(bad, (2, 3)), np.nan, np.float32(1))
    index = tuple(map(int, np.unravel_index(bad.index(True), (2, 3))))
    text = f"at index {index} ({sum(bad)} such of 6)"
    with pytest.raises(ValueError, match=re.escape(text)):
        check_finite("test", [("a", jnp.asarray(w, jnp.float32))])


# split and join


def tree_of_all_kinds():
    w = jnp.array([[1.0, -2.0], [0.5, 4.0]])
    return {
        "dense": w,
        "list": [jc.quantize(w, bits=4), (jc.palettize(w, clusters=2),)],
        "affine": jc.quantize_affine(w, bits=4),
        "tied": TiedTensor("dense", (2, 2), "float32"),
        "pair": Pair(kernel=w, bias=None),
        "count": jnp.array(3),
        "step": 3,
        "name": "relu",
        "none": None,
    }


def test_trainable_are_the_floating_arrays_and_no_other():
    tree = tree_of_all_kinds()
    trainable, rest = jc.split(tree)
    assert all(
        jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(trainable)
    )
    codes = [x for x in jax.tree.leaves(rest) if isinstance(x, jax.Array)]
    assert not any(is_float(x) for x in codes)
    assert trainable["list"][0].scale is tree["list"][0].scale
    assert trainable["list"][0].codes is None
    assert trainable["list"][1][0].codebook is tree["list"][1][0].codebook
    assert (trainable["count"], trainable["step"], trainable["name"]) == (None,) * 3
    assert (rest["step"], rest["name"]) == (3, "relu")


def test_join_gives_back_the_very_leaves_that_split_took():
    tree = tree_of_all_kinds()
    joined = jc.join(*jc.split(tree))
    assert jax.tree.structure(joined) == jax.tree.structure(tree)
    pairs = zip(jax.tree.leaves(joined), jax.tree.leaves(tree), strict=True)
    assert all(a is b for a, b in pairs)


def test_modules_and_states_are_joined_again(nnx_block, mlp):
    for tree in (nnx.state(nnx_block), mlp, jc.quantize_tree(mlp)):
        joined = jc.join(*jc.split(tree))
        assert jax.tree.structure(joined) == jax.tree.structure(tree)
        pairs = zip(jax.tree.leaves(joined), jax.tree.leaves(tree), strict=True)
        assert all(a is b for a, b in pairs)


def test_a_gradient_with_respect_to_the_trainable_part_reaches_scales_and_codebooks():
    trainable, rest = jc.split(tree_of_all_kinds())

    def loss(trainable):
        tree = jc.densify(jc.join(trainable, rest))
        return jnp.sum(tree["list"][0]) + jnp.sum(tree["list"][1][0] ** 2)

    grads = jax.jit(jax.grad(loss))(trainable)
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)
    assert np.any(grads["list"][0].scale != 0)
    assert np.any(grads["list"][1][0].codebook != 0)
    np.testing.assert_array_equal(grads["affine"].scale, np.zeros((2, 1)))


@pytest.mark.parametrize("tree", [{}, None, [None], {"a": 3}, 1.5])
def test_trees_without_arrays_are_split_and_joined(tree):
    trainable, rest = jc.split(tree)
    assert jax.tree.leaves(trainable) == []
    assert jc.join(trainable, rest) == tree
