"""One codebook for several leaves: few values in all, one copy, gradients that add."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp import SharedTensor
from jaxcomp.share.kmeans import assign, optimal_centroids
from jaxcomp.share.together import BorrowedTensor, share_together


VALUES = st.integers(-4, 4).map(float) | st.floats(-1e3, 1e3, width=32)
A = hnp.arrays(np.float32, (2, 3), elements=VALUES)
B = hnp.arrays(np.float32, (3, 2), elements=VALUES)


def tree(a, b):
    return {"a": jnp.asarray(a), "b": {"kernel": jnp.asarray(b)}, "bias": jnp.ones(2)}


def normal(seed=0):
    rng = np.random.default_rng(seed)
    return tree(*(rng.normal(size=s).astype(np.float32) for s in ((4, 6), (6, 3))))


def all_values(small):
    dense = jc.densify(small)
    return np.concatenate([np.ravel(dense["a"]), np.ravel(dense["b"]["kernel"])])


def test_an_example_by_hand(strict):
    small = share_together(tree([[1.0, 2.0]], [[0.0, 1.5], [8.0, 2.0]]), 3)
    assert type(small["a"]) is SharedTensor and small["a"].zero
    np.testing.assert_array_equal(small["a"].codebook, [1.625, 8.0])
    tied = small["b"]["kernel"]
    assert type(tied) is BorrowedTensor
    assert (tied.source, tied.zero, tied.bits, tied.shape, tied.name) == (
        *("a", True, 2, (2, 2), "float32"),
    )
    dense = jc.densify(small)
    np.testing.assert_array_equal(dense["a"], [[1.625, 1.625]])
    np.testing.assert_array_equal(dense["b"]["kernel"], [[0.0, 1.625], [8.0, 1.625]])
    assert (small["a"].nbits(), tied.nbits()) == (8 + 2 * 32, 8)
    assert tied.describe() == "shared values of a"
    assert len(jax.tree.leaves(small)) == 4  # two codes, one codebook, the bias


@given(A, B, st.sampled_from([2, 4]))
@settings(max_examples=25)
def test_values_are_few_in_all_zeros_stay_and_the_error_is_the_least(a, b, clusters):
    x = np.concatenate([a.ravel(), b.ravel()])
    y = all_values(share_together(tree(a, b), clusters))
    assert len(np.unique(y)) <= clusters
    assert not y[x == 0].any()
    live = x[x != 0].astype(np.float64)
    if live.size:
        best = optimal_centroids(live, clusters - 1)
        error = np.sum((live - best[assign(live, best)]) ** 2)
        np.testing.assert_allclose(
            np.sum((x.astype(np.float64) - y) ** 2), error, rtol=1e-5, atol=1e-3
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_with_room_for_all_values_leaves_are_kept_bit_for_bit(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), normal())
    small = share_together(params)
    assert jax.tree.all(
        jax.tree.map(lambda x, y: x.dtype == y.dtype, jc.densify(small), params)
    )
    jax.tree.map(np.testing.assert_array_equal, jc.densify(small), params)
    jitted = jax.jit(jc.densify)(small)
    jax.tree.map(np.testing.assert_array_equal, jitted, params)


def test_gradients_of_the_codebook_add_over_the_leaves_and_values_stay_few():
    small = share_together(normal(), 5)
    trainable, rest = jc.split(small)

    def loss(trainable, weight):
        dense = jc.densify(jc.join(trainable, rest))
        return weight * jnp.sum(dense["a"] ** 2) + jnp.sum(dense["b"]["kernel"] ** 2)

    both, alone = jax.grad(loss)(trainable, 1.0), jax.grad(loss)(trainable, 0.0)
    used = np.asarray(small["a"].dense())[None] == small["a"].codebook[:, None, None]
    first = 2 * np.asarray(small["a"].codebook) * used.sum(axis=(1, 2))
    np.testing.assert_allclose(
        both["a"].codebook, alone["a"].codebook + first, rtol=1e-5
    )
    moved = jax.tree.map(lambda x, g: x - 0.1 * g, trainable, both)
    assert len(np.unique(all_values(jc.join(moved, rest)))) <= 5


def test_a_node_with_new_values_is_released_and_the_codebook_stays():
    small = share_together(normal(), 6)
    leaf = small["b"]["kernel"]
    node = leaf.resolve(small["a"])
    np.testing.assert_array_equal(node.dense(), jc.densify(small)["b"]["kernel"])
    pruned = jnp.where(jnp.abs(node.dense()) < 0.5, 0, node.dense())
    back = leaf.release(node.encode(pruned))
    assert type(back) is BorrowedTensor
    np.testing.assert_array_equal(back.resolve(small["a"]).dense(), pruned)
    again = leaf.release(node)
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    np.testing.assert_array_equal(again.codes, leaf.codes)


def test_one_leaf_zeros_and_scalars_are_no_special_case():
    one = share_together(normal(), 4, where=jc.path_matches("a"))
    assert type(one["a"]) is SharedTensor and one["b"]["kernel"].shape == (6, 3)
    zeros = share_together(tree(np.zeros((2, 3)), np.zeros((3, 2))), 1)
    assert not all_values(zeros).any() and zeros["a"].codebook.shape == (0,)
    params = {"s": jnp.float32(2.5), "t": jnp.full((1, 1), 1e37), "u": jnp.float32(0)}
    small = share_together(params, where=lambda path, leaf: True)
    jax.tree.map(np.testing.assert_array_equal, jc.densify(small), params)


def test_a_codebook_that_was_lost_or_changed_is_an_error():
    small = share_together(normal(), 5)
    leaf, held = small["b"]["kernel"], small["a"]
    text = (
        "BorrowedTensor.resolve needs leaf 'a' to be a SharedTensor with dtype=float32,"
        " zero=True, bits=3, as `share_together` made it, got "
    )
    others = {
        "ArrayImpl": held.dense(),
        "a SharedTensor with dtype=float32, zero=False, bits=3": dataclasses.replace(
            held, zero=False
        ),
        "a SharedTensor with dtype=float16, zero=True, bits=3": dataclasses.replace(
            held, codebook=held.codebook.astype(jnp.float16)
        ),
        "a SharedTensor with dtype=float32, zero=True, bits=4": dataclasses.replace(
            held, bits=4
        ),
    }
    for found, other in others.items():
        with pytest.raises(ValueError, match=re.escape(f"{text}{found}. Change the")):
            leaf.resolve(other)
    with pytest.raises(ValueError, match="release needs the new value to be a Shared"):
        leaf.release(held.dense())
    with pytest.raises(ValueError, match="BorrowedTensor.dense needs the tree that"):
        leaf.dense()


@pytest.mark.parametrize(
    ("change", "clusters", "error", "text"),
    [
        ({}, 0, ValueError, "share_together needs 1 <= clusters <= 65536, got 0."),
        ({}, 2.0, TypeError, "share_together needs an integer clusters, got 2.0."),
        ({}, 1, ValueError, "needs clusters >= 2 for leaves that are not all zero, as"),
        (
            {"c": jnp.ones((1, 2), jnp.float16)},
            *(
                4,
                ValueError,
                "needs leaves of one dtype, but 'a' is float32[4, 6] and ",
            ),
        ),
        ({"c": jnp.ones((0, 2))}, 4, ValueError, "(leaf 'c') needs at least one value"),
        (
            {"c": jnp.full((1, 2), jnp.nan)},
            *(
                4,
                ValueError,
                "share_together needs finite values, but leaf 'c' float32",
            ),
        ),
    ],
)
def test_bad_arguments_are_errors(change, clusters, error, text):
    with pytest.raises(error, match=re.escape(text)):
        share_together(normal() | change, clusters)


def test_integers_tracers_and_an_empty_selection_are_errors():
    params = {"step": jnp.ones((2, 2), int), "kernel": jnp.ones((2, 2))}
    with pytest.raises(TypeError, match=r"\(leaf 'step'\) needs a floating array, got"):
        share_together(params, where=lambda path, leaf: True)
    with pytest.raises(ValueError, match=r"\(leaf 'a'\) needs the values of float32"):
        jax.eval_shape(share_together, normal())
    with pytest.raises(ValueError, match="`where` selected none of the 2 leaves"):
        share_together(params, where=jc.path_matches("none"))


def test_masks_thresholds_and_scans_see_through_a_borrowed_codebook():
    x = jnp.arange(1.0, 13.0).reshape(3, 4)
    small = jc.share_together({"a": x, "b": -x / 2}, 30)
    dense = jc.densify(small)
    for masks in (
        lambda t: jc.prune.masks(t, 0.5),
        lambda t: jc.prune.masks_above(t, 3),
    ):
        for ours, plain in zip(
            *map(jax.tree.leaves, map(masks, (small, dense))), strict=True
        ):
            np.testing.assert_array_equal(ours, plain)
        pruned = jc.apply_masks(small, masks(small))
        assert type(pruned["b"]) is type(small["b"])
        np.testing.assert_array_equal(
            jc.densify(pruned)["b"], jnp.where(masks(dense)["b"], dense["b"], 0)
        )

    def loss(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    one = jc.prune.scan(lambda p: loss(jc.densify(p)), dense, [0.5])
    assert (
        jc.prune.scan(
            lambda p: loss({"a": dense["a"], "b": p["b"]}), small, [0.5]
        ).losses["b"]
        == one.losses["b"]
    )
