import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp import prune
from jaxcomp.node import TiedTensor


FLOATS = st.floats(-4, 4, width=32) | st.sampled_from([0.5, -0.5, 0.0, -0.0])
MATRICES = hnp.arrays(np.float32, (2, 5), elements=FLOATS)
NORMAL = hnp.arrays(
    np.float32, (2, 5), elements=st.floats(-4, 4, width=32, allow_subnormal=False)
)
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


def everything(path, leaf):
    return True


def bits(x):
    """The bit patterns of an array: -0.0 is not 0.0 here."""
    x = np.asarray(x)
    return x.view(f"uint{8 * x.itemsize}")


def tree_of(kernel):
    return {"layer": {"kernel": kernel, "bias": jnp.array([0.1, -0.2])}, "step": 3}


# prune_tree


def test_weights_strictly_below_theta_go_and_one_of_exactly_theta_stays(strict):
    w = jnp.array([[0.5, -0.5, 0.49], [-0.51, 0.0, 7.0]])
    pruned = jc.prune_tree(tree_of(w), 0.5)
    np.testing.assert_array_equal(
        pruned["layer"]["kernel"], [[0.5, -0.5, 0], [np.float32(-0.51), 0, 7]]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@given(w=MATRICES, theta=st.sampled_from([0.0, 0.25, 0.5, 1.0, 100.0]))
def test_the_pruned_are_zero_and_the_others_keep_their_bits(dtype, w, theta):
    w = w.astype(dtype)
    pruned = jc.prune_tree({"w": jnp.asarray(w)}, theta)["w"]
    assert pruned.dtype == w.dtype
    kept = np.abs(w.astype(np.float64)) >= theta
    np.testing.assert_array_equal(bits(pruned), np.where(kept, bits(w), 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_traced_theta_prunes_as_a_number_does(strict, dtype):
    tree = tree_of(jnp.asarray([[0.5, -0.25, 0.75], [0.0, -0.5, 7.0]], dtype))
    run = jax.jit(lambda tree, theta: jc.prune_tree(tree, theta)["layer"])
    for theta in (0.0, 0.5, 1.0):
        traced = run(tree, jnp.float32(theta))["kernel"]
        number = jc.prune_tree(tree, theta)["layer"]["kernel"]
        np.testing.assert_array_equal(bits(traced), bits(number))


@pytest.mark.parametrize(
    ("dtype", "theta"), [(ml_dtypes.bfloat16, 0.7), (np.float16, 0.1)]
)
def test_theta_is_not_rounded_to_a_narrow_dtype_first(dtype, theta):
    below = np.array([[theta]]).astype(dtype)
    assert below.astype(np.float64) < theta
    tree = {"w": jnp.asarray(below)}
    assert jc.prune_tree(tree, theta)["w"].tolist() == [[0.0]]
    assert jax.jit(jc.prune_tree)(tree, theta)["w"].tolist() == [[0.0]]


def test_leaves_outside_where_are_the_same_objects():
    tree = tree_of(jnp.ones((2, 3)))
    for pruned in (jc.prune_tree(tree, 2.0), jc.clip_tree(tree, -0.5, 0.5)):
        assert pruned["layer"]["bias"] is tree["layer"]["bias"]
        assert pruned["step"] == 3


def test_prune_tree_under_jit_gives_the_same_bits():
    tree = {"w": jnp.array([[0.5, -0.25, -0.0], [0.3, -0.5, 7.0]])}
    jitted = jax.jit(lambda t: jc.prune_tree(t, 0.3))(tree)
    np.testing.assert_array_equal(
        bits(jitted["w"]), bits(jc.prune_tree(tree, 0.3)["w"])
    )


def test_pruning_a_node_gives_a_node_of_the_same_settings():
    w = jnp.array([[1.0, -0.2, 0.4], [0.1, 0.9, -3.0]])
    tree = {"q": jc.quantize(w, bits=4), "s": jc.palettize(w.at[0, 1].set(0), 4)}
    pruned = jax.jit(jc.prune_tree)(tree, 0.45)
    for key, node in tree.items():
        assert type(pruned[key]) is type(node)
        dense = np.asarray(node.dense())
        np.testing.assert_array_equal(
            pruned[key].dense(), np.where(np.abs(dense) < 0.45, 0, dense)
        )
    assert pruned["q"].bits == 4
    np.testing.assert_array_equal(pruned["q"].scale, tree["q"].scale)
    assert np.unique(pruned["s"].dense()).size <= 4


def test_the_gradient_of_a_pruned_weight_is_zero_and_of_a_kept_one_passes():
    w = jnp.array([[1.0, -0.2, 0.4]])
    grad = jax.grad(lambda w: jc.prune_tree({"w": w}, 0.3)["w"].sum())(w)
    assert grad.tolist() == [[1.0, 0.0, 1.0]]


@pytest.mark.parametrize("theta", [-0.1, -1, np.float32(-2)])
def test_a_negative_theta_is_an_error(theta):
    with pytest.raises(ValueError, match=f"prune_tree needs theta >= 0, got {theta}"):
        jc.prune_tree({"w": jnp.ones((1, 2))}, theta)


def test_a_theta_that_is_no_number_is_an_error():
    text = r"prune_tree needs a number for theta, got nan\."
    with pytest.raises(ValueError, match=text):
        jc.prune_tree({"w": jnp.ones((1, 2))}, float("nan"))


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: jc.prune_tree(tree, 0.5),
        lambda tree: jc.clip_tree(tree, -0.5, 0.5),
        lambda tree: jc.apply_masks(tree, {"w": np.eye(2, 5, dtype=bool)}),
    ],
    ids=["prune_tree", "clip_tree", "apply_masks"],
)
def test_a_float64_of_numpy_is_taken_as_jax_takes_it(change):
    w = np.linspace(-1, 1, 10).reshape(2, 5)
    expected = change({"w": jnp.asarray(w)})["w"]
    np.testing.assert_array_equal(change({"w": w})["w"], expected)


# clip_tree


NORMAL = MATRICES.map(lambda w: np.where(np.abs(w) < 2e-38, 0 * w, w))  # XLA flushes


@given(NORMAL, st.sampled_from([(-0.5, 0.5), (0, 2), (-1.0, 0), (-np.inf, 0.25)]))
def test_clipped_weights_are_those_of_numpy_and_zeros_stay_zero(w, bounds):
    lo, hi = bounds
    clipped = jc.clip_tree({"w": jnp.asarray(w)}, lo, hi)["w"]
    np.testing.assert_array_equal(clipped, np.clip(w, np.float32(lo), np.float32(hi)))
    assert np.all(np.asarray(clipped)[w == 0] == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_inside_the_range_keep_their_bits_and_dtype(strict, dtype):
    w = np.array([[0.3, -0.7, -0.0], [1.0, -1.0, 9.0]]).astype(dtype)
    clipped = jc.clip_tree({"w": jnp.asarray(w)}, -1, 1)["w"]
    assert clipped.dtype == w.dtype
    np.testing.assert_array_equal(bits(clipped)[:, :2], bits(w)[:, :2])
    np.testing.assert_array_equal(np.asarray(clipped)[:, 2], [0, 1])


@pytest.mark.parametrize(("lo", "hi"), [(0.1, 1), (-1, -0.1), (1, -1)])
def test_a_range_without_zero_is_an_error(lo, hi):
    text = f"clip_tree needs lo <= 0 <= hi, got lo={lo}, hi={hi}."
    with pytest.raises(ValueError, match=re.escape(text)):
        jc.clip_tree({"w": jnp.ones((1, 2))}, lo, hi)


@pytest.mark.parametrize(("lo", "hi", "name"), [(np.nan, 1, "lo"), (-1, np.nan, "hi")])
def test_a_bound_that_is_no_number_is_an_error(lo, hi, name):
    with pytest.raises(ValueError, match=f"clip_tree needs a number for {name}, got"):
        jc.clip_tree({"w": jnp.ones((1, 2))}, lo, hi)


@pytest.mark.parametrize("others", [{}, {"dense": jnp.ones((1, 2))}])
def test_a_selected_leaf_that_is_compressed_cannot_be_clipped(others):
    tree = {"node": jc.quantize(jnp.ones((1, 2))), **others}
    with pytest.raises(ValueError, match="node"):
        jc.clip_tree(tree, -0.5, 0.5)


def test_the_error_of_a_bad_value_names_the_tree_function():
    tree = {"w": jnp.array([[1.0, jnp.nan]])}
    for name, call in {
        "prune_tree": lambda: jc.prune_tree(tree, 0.5),
        "clip_tree": lambda: jc.clip_tree(tree, -1, 1),
        "masks": lambda: prune.masks(tree, 0.5),
    }.items():
        text = rf"{name} needs finite values, but leaf 'w' float32\[1, 2\] holds nan at"
        with pytest.raises(ValueError, match=text):
            call()


# masks


@given(NORMAL, NORMAL, st.integers(0, 99))
def test_masks_remove_the_smallest_magnitudes_of_every_leaf(a, b, percent):
    tree = {"a": jnp.asarray(a), "b": jnp.asarray(b), "bias": jnp.ones(3)}
    masks = prune.masks(tree, percent / 100)
    zeros = round(Fraction(percent, 100) * 10)
    for key, w in (("a", a), ("b", b)):
        size = np.abs(w).reshape(-1)
        kept = np.ones(10, bool)
        kept[np.lexsort((-np.arange(10), size))[:zeros]] = False
        np.testing.assert_array_equal(masks[key], kept.reshape(2, 5))
    assert masks["bias"].shape == () and masks["bias"].dtype == bool
    assert bool(masks["bias"])


def test_masks_have_the_structure_of_params_with_a_scalar_true_for_what_stays():
    w = jnp.ones((2, 5))
    tree = {
        "dense": [w, (w,)],
        "node": jc.quantize(w),
        "tied": TiedTensor("dense/0", (2, 5), "float32"),
        "step": 3,
        "none": None,
    }
    masks = prune.masks(tree, 0.5)
    shapes = jax.tree.map(jnp.shape, masks)
    assert shapes == {
        "dense": [(2, 5), ((2, 5),)],
        "node": (2, 5),
        "tied": (),
        "step": (),
        "none": None,
    }
    assert all(mask.dtype == bool for mask in jax.tree.leaves(masks))


def test_leaves_whose_paths_read_alike_get_masks_of_their_own():
    tree = {"a/b": jnp.ones((2, 5)), "a": {"b": jnp.ones(10)}}  # both are a/b
    masks = prune.masks(tree, 0.5, where=everything)
    assert jax.tree.map(jnp.shape, masks) == jax.tree.map(jnp.shape, tree)


def test_a_global_budget_compares_the_leaves_with_each_other():
    w = jnp.arange(10.0).reshape(2, 5)
    tree = {"a": 20 + w, "b": -w, "bias": jnp.ones(2)}
    masks = prune.masks(tree, 0.5, budget=prune.global_budget)
    assert masks["a"].all()
    assert not masks["b"].any()


def test_a_global_budget_keeps_the_earlier_of_tied_leaves_in_the_order_of_the_tree():
    w = jnp.ones((2, 5))
    tree = {"a": {"x": w}, "a-b": {"x": w}}  # "a-b/x" sorts before "a/x"
    masks = prune.masks(tree, 0.5, budget=prune.global_budget)
    assert masks["a"]["x"].all()
    assert not masks["a-b"]["x"].any()


def test_a_sparsity_for_each_path_prunes_only_the_named():
    w = jnp.arange(10.0).reshape(2, 5)
    masks = prune.masks({"a": {"kernel": w}, "b": {"kernel": w}}, {"b/kernel": 0.7})
    assert masks["a"]["kernel"].all()
    assert int(jnp.sum(~masks["b"]["kernel"])) == 7


def test_a_path_that_is_not_selected_has_no_sparsity():
    tree = {"kernel": jnp.ones((2, 5)), "bias": jnp.ones(3)}
    text = "'bias', which is not one of the 1 selected leaves: kernel."
    with pytest.raises(ValueError, match=re.escape(text)):
        prune.masks(tree, {"bias": 0.5})


def test_any_score_of_the_weights_decides():
    w = jnp.array([[3.0, -4.0, 1.0, -2.0, 0.5], [9.0, 8.0, 7.0, 6.0, 5.0]])
    masks = prune.masks({"w": w}, 0.4, score=lambda tree: {"w": tree["w"]})
    assert np.argwhere(~masks["w"]).tolist() == [[0, 1], [0, 2], [0, 3], [0, 4]]


def test_random_masks_repeat_with_the_key_and_differ_between_leaves():
    tree = {"a": jnp.ones((2, 5)), "b": jnp.ones((2, 5))}

    def drawn(seed):
        score = prune.random_scores(jax.random.key(seed))
        return prune.masks(tree, 0.5, score=score)

    first, again, other = drawn(0), drawn(0), drawn(3)
    for key in tree:
        assert int(jnp.sum(first[key])) == 5
        np.testing.assert_array_equal(first[key], again[key])
        assert np.any(first[key] != other[key])
    assert np.any(first["a"] != first["b"])


def test_random_scores_are_uniform_below_one_and_blind_to_the_weights():
    score = prune.random_scores(jax.random.key(0))
    drawn = score(jnp.ones((64, 64)))
    assert drawn.dtype == jnp.float32
    assert 0 <= float(drawn.min()) < 0.01 and 0.99 < float(drawn.max()) < 1
    np.testing.assert_array_equal(drawn, score(jnp.zeros((64, 64))))


def test_magnitude_is_the_absolute_value_in_the_dtype_of_the_weights(strict):
    tree = {"a": jnp.array([-2.0, 1.0], jnp.bfloat16), "b": [jnp.array([-0.5])]}
    scores = prune.magnitude(tree)
    assert scores["a"].tolist() == [2.0, 1.0]
    assert scores["a"].dtype == jnp.bfloat16
    assert scores["b"][0].tolist() == [0.5]


def test_masks_under_jit_are_those_outside():
    rng = np.random.default_rng(0)
    tree = {"w": jnp.asarray(rng.integers(-3, 4, (2, 5)), jnp.float32)}
    jitted = jax.jit(lambda t: prune.masks(t, 0.7))(tree)
    np.testing.assert_array_equal(jitted["w"], prune.masks(tree, 0.7)["w"])


def test_masks_of_nothing_are_an_error():
    with pytest.raises(ValueError, match="`where` selected none of the 1 leaves"):
        prune.masks({"bias": jnp.ones(3)}, 0.5)


# apply_masks


@pytest.mark.parametrize("dtype", DTYPES)
@given(w=MATRICES, mask=hnp.arrays(bool, (2, 5)))
def test_the_masked_are_zero_and_the_others_keep_their_bits(dtype, w, mask):
    w = w.astype(dtype)
    applied = jc.apply_masks({"w": jnp.asarray(w)}, {"w": jnp.asarray(mask)})["w"]
    assert applied.dtype == w.dtype
    np.testing.assert_array_equal(bits(applied), np.where(mask, bits(w), 0))


def test_a_scalar_true_returns_the_leaf_as_it_is():
    tree = tree_of(jnp.ones((2, 5)))
    masks = prune.masks(tree, 0.5)
    applied = jc.apply_masks(tree, masks)
    assert applied["layer"]["bias"] is tree["layer"]["bias"]
    assert applied["step"] == 3
    assert int(jnp.sum(applied["layer"]["kernel"] == 0)) == 5


def test_a_masked_node_is_encoded_again_in_place():
    w = jnp.array([[1.0, -0.2, 0.4, 2.0, 3.0], [0.1, 0.9, -3.0, 1.5, -2.0]])
    tree = {
        "q": jc.quantize(w, bits=4),
        "s": jc.palettize(w.at[0, 0].set(0), clusters=4),
    }
    masks = prune.masks(tree, 0.5)
    applied = jax.jit(jc.apply_masks)(tree, masks)
    for key, node in tree.items():
        assert type(applied[key]) is type(node)
        np.testing.assert_array_equal(
            bits(applied[key].dense()),
            np.where(masks[key], bits(node.dense()), 0),
        )


def test_a_tied_leaf_follows_its_source():
    tree = jc.tie_layers({"a": jnp.ones((2, 5)), "b": jnp.ones((2, 5))}, [("a", "b")])
    applied = jc.apply_masks(tree, prune.masks(tree, 0.5))
    assert applied["b"] is tree["b"]
    dense = jc.densify(applied)
    assert int(jnp.sum(dense["b"] == 0)) == 5


def test_a_mask_for_a_tied_leaf_is_an_error_that_names_it():
    tree = jc.tie_layers({"a": jnp.ones((2, 5)), "b": jnp.ones((2, 5))}, [("a", "b")])
    mask = jnp.ones((2, 5), bool)
    with pytest.raises(ValueError, match="apply_masks needs .* 'b'"):
        jc.apply_masks(tree, {"a": mask, "b": mask})


@pytest.mark.parametrize(
    "run", [jc.apply_masks, jax.jit(jc.apply_masks)], ids=["eager", "jit"]
)
def test_a_leaf_of_no_dimensions_can_be_masked(run):
    tree = {"low": jnp.array(2.0), "high": jnp.array(3.0)}
    masks = prune.masks(
        tree, 0.5, score=prune.magnitude, budget=prune.global_budget, where=everything
    )
    assert (bool(masks["low"]), bool(masks["high"])) == (False, True)
    applied = run(tree, masks)
    assert (float(applied["low"]), float(applied["high"])) == (0.0, 3.0)


def test_applying_masks_under_jit_gives_the_same_bits(strict):
    w = jnp.array([[0.5, -0.25, -0.0], [0.3, -0.5, 7.0]])
    mask = jnp.array([[True, False, True], [True, True, False]])
    jitted = jax.jit(jc.apply_masks)({"w": w}, {"w": mask})["w"]
    np.testing.assert_array_equal(bits(jitted), np.where(mask, bits(w), 0))


def test_masks_of_another_structure_are_an_error():
    text = r"apply_masks needs masks shaped like params, got .*'z'.* for .*'w'.*\. Make"
    with pytest.raises(ValueError, match=text):
        jc.apply_masks({"w": jnp.ones(2)}, {"z": jnp.ones(2, bool)})
    with pytest.raises(ValueError, match=r"Make them with `prune\.masks\(params, "):
        jc.apply_masks({"w": jnp.ones(2)}, {"w": None})


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 3), (3, 2)])
def test_a_mask_of_another_shape_is_an_error(shape):
    text = f"apply_masks needs a mask of shape [2, 3] for leaf 'w', got {list(shape)}."
    with pytest.raises(ValueError, match=re.escape(text)):
        jc.apply_masks({"w": jnp.ones((2, 3))}, {"w": jnp.ones(shape, bool)})


def test_a_scalar_false_for_a_whole_leaf_is_an_error():
    text = (
        "apply_masks needs a mask of the shape of leaf 'w', or a scalar True, got a "
        "scalar False."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        jc.apply_masks({"w": jnp.ones((2, 3))}, {"w": jnp.array(False)})


def test_a_threshold_held_by_jax_is_checked_like_a_number():
    tree = {"w": jnp.ones((1, 2))}
    with pytest.raises(ValueError, match="prune_tree needs theta >= 0"):
        jc.prune_tree(tree, jnp.float32(-1))
    with pytest.raises(ValueError, match="needs a number for theta, got nan"):
        jc.prune_tree(tree, jnp.float32(jnp.nan))
