import re

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp import TiedTensor, tie_layers
from jaxcomp.share.tie import average, best_member, member


MATRICES = hnp.arrays(
    np.float32,
    (2, 3),
    elements=st.integers(-2, 2).map(float)
    | st.floats(-1e6, 1e6, width=32, allow_subnormal=False),  # which XLA takes for 0
)
NARROW = [ml_dtypes.bfloat16, np.float16]


def layer(value, **others):
    return {"kernel": jnp.full((2, 3), value), "bias": jnp.full(3, -value), **others}


# what is tied


def test_the_first_layer_takes_the_mean_and_the_others_point_to_it(strict):
    tree = {"a": layer(1.0), "b": layer(2.0), "c": layer(6.0), "head": layer(9.0)}
    small = tie_layers(tree, [("a", "b", "c")])
    np.testing.assert_array_equal(small["a"]["kernel"], np.full((2, 3), 3.0))
    np.testing.assert_array_equal(small["a"]["bias"], np.full(3, -3.0))
    for name in "bc":
        tied = small[name]["kernel"]
        assert isinstance(tied, TiedTensor)
        assert (tied.source, tied.shape, tied.dtype) == ("a/kernel", (2, 3), np.float32)
        assert small[name]["bias"].source == "a/bias"
    assert small["head"]["kernel"] is tree["head"]["kernel"]


@given(MATRICES, MATRICES)
def test_densify_gives_every_layer_the_mean_in_float32(a, b):
    tree = {"a": {"w": jnp.asarray(a)}, "b": {"w": jnp.asarray(b)}}
    dense = jc.densify(tie_layers(tree, [("a", "b")]))
    assert dense["a"]["w"] is dense["b"]["w"]
    mean = (a.astype(np.float64) + b) / 2
    # One rounding of the sum, which may cancel.
    np.testing.assert_allclose(
        dense["a"]["w"], mean, atol=6e-8 * np.abs([a, b]).max(), rtol=1e-6
    )


def test_the_layer_named_first_holds_the_arrays_wherever_it_stands():
    tree = {"a": layer(1.0), "b": layer(3.0)}
    small = tie_layers(tree, [("b", "a")])
    assert small["a"]["kernel"].source == "b/kernel"
    np.testing.assert_array_equal(small["b"]["kernel"], np.full((2, 3), 2.0))


def test_several_groups_are_tied_at_once():
    tree = {
        name: layer(value)
        for name, value in zip("abcd", (1.0, 3.0, 5.0, 7.0), strict=True)
    }
    small = tie_layers(tree, [("a", "b"), ["c", "d"]])
    dense = jc.densify(small)
    assert [float(dense[name]["kernel"][0, 0]) for name in "abcd"] == [2, 2, 6, 6]
    assert len(jax.tree.leaves(small)) == 4


def test_no_groups_change_nothing():
    tree = {"a": layer(1.0)}
    assert tie_layers(tree, [])["a"]["kernel"] is tree["a"]["kernel"]


def test_a_layer_may_be_a_single_leaf_or_lie_deep():
    w = jnp.ones((2, 3))
    tree = {"enc": [{"x": {"w": w}}, {"x": {"w": 3 * w}}], "emb": w, "out": 3 * w}
    small = tie_layers(tree, [("enc/0/x", "enc/1/x"), ("emb", "out")])
    assert small["enc"][1]["x"]["w"].source == "enc/0/x/w"
    assert small["out"].source == "emb"
    np.testing.assert_array_equal(small["emb"], 2 * w)


def test_a_name_that_only_begins_alike_is_another_layer():
    tree = {"block_1": layer(1.0), "block_10": layer(5.0), "block_2": layer(3.0)}
    small = tie_layers(tree, [("block_1", "block_2")])
    assert small["block_10"]["kernel"] is tree["block_10"]["kernel"]


def test_equinox_layers_are_tied_and_run_again_once_dense():
    keys = jax.random.split(jax.random.key(0), 2)
    stack = eqx.nn.Sequential([eqx.nn.Linear(3, 3, key=key) for key in keys])
    small = tie_layers(stack, [("layers/0", "layers/1")])
    dense = jc.densify(small)
    assert dense.layers[0].weight is dense.layers[1].weight
    x = jnp.array([1.0, -1.0, 0.5])
    np.testing.assert_array_equal(dense(x), dense.layers[0](dense.layers[0](x)))


def test_leaves_that_are_not_floating_stay_untied():
    def counted(n):
        return layer(float(n), count=jnp.array(n), on=np.array(True))

    tree = {"a": counted(1), "b": counted(2)}
    small = tie_layers(tree, [("a", "b")])
    for name in "ab":
        assert small[name]["count"] is tree[name]["count"]
        assert small[name]["on"] is tree[name]["on"]


def test_leaves_that_are_not_arrays_stay_as_they_are():
    tree = {
        "a": layer(1.0, rate=0.1, act="relu"),
        "b": layer(3.0, rate=0.2, act="tanh"),
    }
    small = tie_layers(tree, [("a", "b")])
    assert (small["a"]["rate"], small["b"]["rate"]) == (0.1, 0.2)
    assert (small["a"]["act"], small["b"]["act"]) == ("relu", "tanh")
    np.testing.assert_array_equal(small["a"]["kernel"], np.full((2, 3), 2.0))


def test_ties_are_made_under_jit_too():
    tree = {"a": layer(1.0), "b": layer(3.0)}
    small = jax.jit(lambda tree: tie_layers(tree, [("a", "b")]))(tree)
    np.testing.assert_array_equal(small["a"]["kernel"], np.full((2, 3), 2.0))
    assert isinstance(small["b"]["kernel"], TiedTensor)


# merge


@given(MATRICES, MATRICES, MATRICES)
def test_a_zero_stays_where_every_layer_has_one_and_only_there(a, b, c):
    mean = np.asarray(average([jnp.asarray(x) for x in (a, b, c)]))
    shared = (a == 0) & (b == 0) & (c == 0)
    assert np.all(mean[shared] == 0)
    total = a.astype(np.float64) + b + c
    far = np.abs(total) > 1e-5 * np.abs([a, b, c]).max()  # not a sum that cancels
    assert np.all(mean[far] != 0)


def test_a_weight_pruned_in_one_layer_only_does_not_stay_zero():
    a = layer(1.0, extra=jnp.array([0.0, 0.0, 2.0]))
    b = layer(1.0, extra=jnp.array([0.0, 4.0, 0.0]))
    small = tie_layers({"a": a, "b": b}, [("a", "b")])
    assert small["a"]["extra"].tolist() == [0.0, 2.0, 1.0]


def test_a_merge_that_takes_the_first_keeps_its_very_arrays():
    tree = {"a": layer(1.0), "b": layer(3.0)}
    small = tie_layers(tree, [("a", "b")], merge=lambda arrays: arrays[0])
    assert small["a"]["kernel"] is tree["a"]["kernel"]
    assert small["a"]["bias"] is tree["a"]["bias"]


def test_a_merge_sees_the_arrays_in_the_order_of_the_group():
    tree = {"a": layer(1.0), "b": layer(3.0), "c": layer(5.0)}
    seen = []

    def last(arrays):
        seen.append([float(x.reshape(-1)[0]) for x in arrays])
        return arrays[-1]

    small = tie_layers(tree, [("c", "a", "b")], merge=last)
    assert seen == [[-5, -1, -3], [5, 1, 3]]  # bias, kernel
    assert small["c"]["kernel"] is tree["b"]["kernel"]


@pytest.mark.parametrize("dtype", NARROW)
def test_a_mean_of_narrow_arrays_is_taken_in_float32(dtype):
    eps = float(ml_dtypes.finfo(dtype).eps)
    arrays = [np.array([1 + eps], dtype)] + [np.array([1], dtype)] * 2
    mean = average([jnp.asarray(x) for x in arrays])
    assert mean.dtype == dtype
    assert float(mean[0]) == 1.0  # 1 + eps/3; summed in the dtype, 3 + eps is 3
    arrays = [np.array([x], dtype) for x in (1, 1 + eps, 1 + eps)]
    assert float(average([jnp.asarray(x) for x in arrays])[0]) == 1 + eps


@pytest.mark.parametrize("dtype", NARROW)
def test_a_mean_of_narrow_arrays_needs_no_dtype_promotion(strict, dtype):
    array = jax.ShapeDtypeStruct((2, 3), dtype)
    assert jax.eval_shape(average, [array, array]).dtype == dtype


# weights

WEIGHTS = hnp.arrays(
    np.float32, (2, 3), elements=st.just(0.0) | st.floats(0, 1e6, width=32)
)


def test_each_element_is_the_mean_by_its_weights():
    tree = {
        "a": {"w": jnp.array([1.0, 2.0, 0.0])},
        "b": {"w": jnp.array([5.0, 4.0, 0.0])},
    }
    weights = {
        "a": {"w": jnp.array([3.0, 0.0, 1.0])},
        "b": {"w": jnp.array([1.0, 0.0, 2.0])},
    }
    small = tie_layers(tree, [("a", "b")], weights=weights)
    np.testing.assert_array_equal(small["a"]["w"], [2.0, 3.0, 0.0])
    assert small["b"]["w"].source == "a/w"


@given(st.tuples(MATRICES, MATRICES, MATRICES), st.tuples(WEIGHTS, WEIGHTS, WEIGHTS))
def test_the_weighted_mean_is_that_of_float64_and_between_the_extremes(x, w):
    mean = np.asarray(average(list(map(jnp.asarray, x)), list(map(jnp.asarray, w))))
    assert np.all((np.min(x, axis=0) <= mean) & (mean <= np.max(x, axis=0)))
    x, w = np.array(x, np.float64), np.array(w, np.float64)
    w[w < np.finfo(np.float32).tiny] = 0
    w[:, ~w.any(axis=0)] = 1
    close = 4e-7 * np.abs(x).max(axis=0) + 1e-37
    assert np.all(np.abs(mean - np.average(x, axis=0, weights=w)) <= close)


@given(MATRICES, WEIGHTS, WEIGHTS)
def test_equal_layers_keep_their_bits_whatever_the_weights(x, a, b):
    mean = average([jnp.asarray(x)] * 2, [jnp.asarray(a), jnp.asarray(b)])
    np.testing.assert_array_equal(mean, x)


def test_where_no_weight_counts_it_is_the_plain_mean():
    arrays = [jnp.array([1.0, 1.1, 1.2])] * 2 + [jnp.array([7.0, 0.3, -5.0])]
    for nothing in (0.0, 1e-41):
        none = [jnp.full(3, nothing)] * 3
        np.testing.assert_array_equal(average(arrays, none), average(arrays))


@pytest.mark.parametrize("least", [1.2e-38, 1.0, 1e37, 3.4e38])
def test_weights_of_any_size_count_by_their_ratio(least):
    weights = [jnp.full(2, least), jnp.full(2, least / 2).at[1].set(0)]
    mean = average([jnp.array([3.0, 3.0]), jnp.array([6.0, 6.0])], weights)
    # Half of the least normal number is none.
    np.testing.assert_allclose(mean, [3.0 if least < 1e-30 else 4.0, 3.0], rtol=1e-6)


@pytest.mark.parametrize("weights", [None, [jnp.full(2, 0.3)] * 5])
def test_the_mean_of_the_largest_numbers_is_finite(weights):
    mean = average([jnp.array([3.4e38, -1e37])] * 5, weights)
    np.testing.assert_allclose(mean, [3.4e38, -1e37], rtol=1e-6)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_weighted_mean_of_narrow_arrays_is_taken_in_float32(dtype):
    arrays = [jnp.array([x], dtype) for x in (1, 3)]
    weights = [jnp.array([x], jnp.float32) for x in (2001, 1999)]
    mean = average(arrays, weights)
    assert (mean.dtype, float(mean[0])) == (dtype, float(np.array(1.9995, dtype)))


def test_counts_are_weights_too_and_other_leaves_are_not_looked_at():
    tree = {"a": layer(1.0, n=jnp.array(1)), "b": layer(5.0, n=jnp.array(2)), "c": 1.0}
    counts = {"kernel": np.full((2, 3), 3), "bias": np.full(3, True)}
    weights = {"a": counts, "b": counts | {"kernel": np.ones((2, 3), int)}}
    small = tie_layers(tree, [("a", "b")], weights=weights)
    np.testing.assert_allclose(small["a"]["kernel"], np.full((2, 3), 2.0), rtol=1e-6)
    np.testing.assert_array_equal(small["a"]["bias"], np.full(3, -3.0))


def test_ties_by_weight_are_the_same_under_jit():
    tree = {"a": layer(1.0), "b": layer(3.3)}
    weights = {"a": layer(-0.7), "b": layer(-1.9)}
    weights = jax.tree.map(jnp.abs, weights)

    def tie(tree, weights):
        return tie_layers(tree, [("a", "b")], weights=weights)["a"]["kernel"]

    np.testing.assert_array_equal(jax.jit(tie)(tree, weights), tie(tree, weights))


def test_a_merge_of_ones_own_sees_arrays_and_weights_in_one_order():
    tree = {"a": {"w": jnp.array([1.0, 8.0])}, "b": {"w": jnp.array([5.0, 4.0])}}
    weights = {"a": {"w": jnp.array([1.0, 9.0])}, "b": {"w": jnp.array([2.0, 3.0])}}

    def heaviest(arrays, weights):
        place = jnp.argmax(jnp.stack(weights), axis=0)
        return jnp.take_along_axis(jnp.stack(arrays), place[None], axis=0)[0]

    small = tie_layers(tree, [("b", "a")], merge=heaviest, weights=weights)
    assert small["b"]["w"].tolist() == [5.0, 8.0]


# members


def test_a_member_lends_its_very_arrays_to_the_group():
    tree = {"a": layer(1.0), "b": layer(3.0), "c": layer(5.0)}
    small = tie_layers(tree, [("c", "a", "b")], merge=member(1))
    assert small["c"]["kernel"] is tree["a"]["kernel"]


@given(st.lists(st.integers(-9, 9), min_size=3, max_size=3), st.integers(-9, 9))
def test_the_best_member_gives_the_least_loss_of_all(values, target):
    tree = {name: {"w": jnp.float32(x)} for name, x in zip("abc", values, strict=True)}

    def loss(params):
        return (
            params["a"]["w"] + params["b"]["w"] + params["c"]["w"] - 3 * target
        ) ** 2

    distance = [abs(x - target) for x in values]
    assert best_member(loss, tree, ("a", "b", "c")) == distance.index(min(distance))


def test_the_best_member_is_found_beside_what_is_compressed_already():
    tree = {
        name: layer(x) for name, x in zip("abcd", (1.0, 3.0, 5.0, 7.0), strict=True)
    }
    tree = tie_layers(tree, [("a", "b")])
    tree["head"] = jc.quantize(jnp.ones((2, 2)), bits=4)
    best = best_member(
        jax.jit(lambda p: jnp.sum(p["d"]["kernel"] @ p["b"]["kernel"].T @ p["head"])),
        tree,
        ("d", "c"),
    )
    assert best == 1


def test_a_member_that_a_group_does_not_have_is_an_error():
    tree = {"a": layer(1.0), "b": layer(3.0)}
    with pytest.raises(ValueError, match="member needs 0 <= i <= 1, got 2."):
        tie_layers(tree, [("a", "b")], merge=member(2))


def test_a_loss_that_is_no_number_is_an_error():
    tree = {"a": layer(1.0), "b": layer(3.0)}
    text = "needs a number for the loss with all of the group as 'b', got nan"
    with pytest.raises(ValueError, match=text):
        best_member(lambda p: jnp.log(2 - p["a"]["kernel"][0, 0]), tree, ("a", "b"))


def test_a_loss_that_is_not_known_under_jit_is_an_error():
    tree = {"a": layer(1.0), "b": layer(3.0)}
    text = (
        "best_member needs the value of the loss, which is not known under jit. Call "
        "it outside jit; the loss itself may be jitted."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        jax.jit(lambda p: best_member(lambda p: p["a"]["bias"][0], p, ("a", "b")))(tree)


def test_the_best_of_fewer_than_two_layers_is_an_error():
    with pytest.raises(ValueError, match=re.escape("of two layers or more, got ()")):
        best_member(lambda p: 0.0, {"a": layer(1.0)}, ())


# what follows


@settings(max_examples=10)
@given(st.lists(st.integers(-100, 100), min_size=3, max_size=3))
def test_the_gradient_is_the_sum_over_the_layers_that_share(weights):
    tree = {"a": layer(1.0), "b": layer(3.0), "c": layer(5.0)}
    small = tie_layers(tree, [("a", "b", "c")])

    def loss(small):
        dense = jc.densify(small)
        return sum(
            w * dense[name]["kernel"].sum()
            for w, name in zip(weights, "abc", strict=True)
        )

    grads = jax.grad(loss)(small)
    np.testing.assert_array_equal(grads["a"]["kernel"], np.full((2, 3), sum(weights)))
    assert len(jax.tree.leaves(grads)) == 2  # a kernel and a bias, once


def test_what_is_done_to_the_first_layer_holds_for_all():
    tree = {"a": layer(1.0), "b": layer(3.0)}
    tree["a"]["kernel"] = jnp.array([[1.0, 2.0, 3.0], [-4.0, -5.0, -6.0]])
    tied = tie_layers(tree, [("a", "b")], merge=lambda arrays: arrays[0])
    for then in (
        lambda tree: jc.prune_tree(tree, 3.5),
        lambda tree: jc.quantize_tree(tree, bits=4),
        lambda tree: jc.share_tree(tree, clusters=2),
    ):
        small = then(tied)
        assert small["b"]["kernel"] is tied["b"]["kernel"]
        dense = jc.densify(small)
        np.testing.assert_array_equal(dense["a"]["kernel"], dense["b"]["kernel"])
        assert not np.array_equal(dense["a"]["kernel"], tree["a"]["kernel"])


# errors


@pytest.mark.parametrize("group", [(), ("a",), "ab", ["b"]])
def test_a_group_of_fewer_than_two_layers_is_an_error(group):
    tree = {"a": layer(1.0), "b": layer(3.0)}
    text = (
        f"tie_layers needs groups of two layers or more, got {group!r}. Pass a list of "
        'tuples, e.g. [("block_0", "block_1")].'
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        tie_layers(tree, [group])


def test_a_flat_list_of_layers_is_an_error_of_its_first():
    with pytest.raises(ValueError, match="groups of two layers or more, got 'a'"):
        tie_layers({"a": layer(1.0), "b": layer(3.0)}, ["a", "b"])


def test_a_path_without_leaves_is_an_error_that_lists_real_ones():
    tree = {"a": layer(1.0), "b": layer(3.0)}
    text = (
        "tie_layers found no leaf under 'z'. The 4 leaves are a/bias, a/kernel, "
        "b/bias, b/kernel."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        tie_layers(tree, [("a", "z")])


@pytest.mark.parametrize(
    ("groups", "path"),
    [
        ([("a", "b"), ("c", "b")], "b/bias"),
        ([("a", "b"), ("a", "c")], "a/bias"),
        ([("a", "a")], "a/bias"),
        ([("a", "b"), ("b/kernel", "c/kernel")], "b/kernel"),
    ],
)
def test_a_leaf_in_two_layers_is_an_error(groups, path):
    tree = {name: layer(1.0) for name in "abc"}
    text = (
        f"tie_layers needs each leaf in one layer of one group, but '{path}' is in "
        "two. Merge the groups."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        tie_layers(tree, groups)


@pytest.mark.parametrize("extra_in", ["a", "b"])
def test_layers_with_different_leaves_are_an_error(extra_in):
    tree = {"a": layer(1.0), "b": layer(3.0)}
    tree[extra_in]["scale"] = jnp.ones(3)
    text = (
        "tie_layers needs layers with the same leaves, but only one of 'a' and 'b' has "
        "'scale'."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        tie_layers(tree, [("a", "b")])


@pytest.mark.parametrize(
    ("other", "got"),
    [
        (np.ones((3, 2), np.float32), "float32[3, 2]"),
        (np.ones((2, 3), np.float16), "float16[2, 3]"),
    ],
)
def test_leaves_of_different_shape_or_dtype_are_an_error(other, got):
    tree = {"a": layer(1.0), "b": {**layer(3.0), "kernel": jnp.asarray(other)}}
    text = (
        f"tie_layers needs leaves of one shape and dtype, but 'b/kernel' is {got} and "
        "'a/kernel' is float32[2, 3]."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        tie_layers(tree, [("a", "b")])


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_compressed_leaf_is_an_error(name):
    tree = {"a": layer(1.0), "b": layer(3.0)}
    tree[name]["kernel"] = jc.quantize(tree[name]["kernel"], bits=4, axis=None)
    text = (
        f"tie_layers needs arrays, but '{name}/kernel' is already compressed (4 bits "
        "symmetric, one scale). Tie first, then compress: the tied layers follow."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        tie_layers(tree, [("a", "b")])


def test_a_tied_leaf_cannot_be_tied_again():
    tree = {"a": layer(1.0), "b": layer(3.0), "c": layer(5.0)}
    once = tie_layers(tree, [("a", "b")])
    text = "'b/bias' is already compressed (tied to a/bias)"
    with pytest.raises(ValueError, match=re.escape(text)):
        tie_layers(once, [("b", "c")])


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_value_that_is_not_finite_is_an_error(name):
    tree = {"a": layer(1.0), "b": layer(3.0)}
    tree[name]["kernel"] = tree[name]["kernel"].at[1, 0].set(jnp.nan)
    text = (
        f"tie_layers needs finite values, but leaf '{name}/kernel' float32[2, 3] holds "
        "nan at index (1, 0) (1 such of 6)"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        tie_layers(tree, [("a", "b")])


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        ({}, "None"),
        ({"kernel": None}, "None"),
        ({"kernel": 1.0}, "1.0"),
        ({"kernel": np.ones(3, np.float32)}, "float32[3]"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(wrong, got):
    tree = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((2, 3))}}
    text = (
        "tie_layers needs weights shaped like params, but for leaf 'b/kernel' "
        f"float32[2, 3] there is {got}. Pass a tree of arrays."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        tie_layers(tree, [("a", "b")], weights={"a": tree["a"], "b": wrong})


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_weights_that_are_negative_or_not_finite_are_an_error(value):
    tree = {"a": layer(-1.0), "b": layer(-1.0)}
    weights = jax.tree.map(jnp.abs, tree)
    weights["b"]["kernel"] = weights["b"]["kernel"].at[1, 2].set(value)
    text = (
        "tie_layers needs finite weights of at least 0, but those of leaf 'b/kernel' "
        f"float32[2, 3] hold {value} at index (1, 2). Pass importances, e.g. mean "
        "squared gradients."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        tie_layers(tree, [("a", "b")], weights=weights)
