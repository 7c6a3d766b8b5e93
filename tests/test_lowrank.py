import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.lowrank import BasisTensor, LowRankTensor, factorize, share_basis
from jaxcomp.node import TiedTensor, flatten, resolver


SEEDS = st.integers(0, 2**32 - 1)
# No zeros, which a factored array cannot keep.
MATRICES = hnp.arrays(
    np.float32,
    (4, 6),
    elements=st.floats(0.125, 1e3, width=32) | st.floats(-9, -0.5, width=32),
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def wide(x):
    return np.asarray(x).astype(np.float64)


def dropped(x, rank):
    """What the best product of this rank leaves of the squares."""
    return np.sum(np.linalg.svd(wide(x), compute_uv=False)[rank:] ** 2)


def group(seed=0, **others):
    """Two layers, of different width."""
    return {"a": {"w": normal(seed, 4, 6)}, "b": {"w": normal(seed + 1, 4, 3)}} | others


PAIR = [("a/w", "b/w")]


# one matrix


def test_the_larger_singular_value_is_kept():
    x = jnp.array([[3.0, 4.0], [-4.0, 3.0]]) @ jnp.diag(jnp.array([2.0, 0.5]))
    small = factorize(x, rank=1)
    assert (small.left.shape, small.right.shape) == ((2, 1), (1, 2))
    np.testing.assert_allclose(small.dense(), [[6, 0], [-8, 0]], atol=1e-5)
    # The singular value is 10, of which each factor takes the root.
    for factor in (small.left, small.right):
        np.testing.assert_allclose(np.linalg.norm(factor), 10**0.5, rtol=1e-6)


@given(MATRICES, st.sampled_from([1, 3]))
def test_the_squared_error_is_that_of_the_dropped_singular_values(x, rank):
    error = np.sum((wide(factorize(x, rank).dense()) - x) ** 2)
    scale = np.sum(wide(x) ** 2)
    assert abs(np.sqrt(error) - np.sqrt(dropped(x, rank))) <= 3e-6 * np.sqrt(scale)


def test_no_other_product_of_that_rank_is_closer():
    x = normal(0, 4, 6)
    least = np.sum((factorize(x, 2).dense() - x) ** 2)
    for seed in range(20):
        left = normal(seed, 4, 2)
        right = np.linalg.lstsq(left, x)[0]
        assert np.sum((left @ right - x) ** 2) > least


@pytest.mark.parametrize(("split", "rows"), [(-1, 6), (1, 2), (2, 6), (-2, 2)])
def test_the_axes_before_the_split_are_the_rows(split, rows):
    x = normal(1, 2, 3, 4)
    small = factorize(x, 1, split)
    assert (small.left.shape, small.right.shape) == ((rows, 1), (1, 24 // rows))
    assert small.shape == small.dense().shape == (2, 3, 4)
    error = np.sum((wide(small.dense()) - x) ** 2)
    np.testing.assert_allclose(error, dropped(x.reshape(rows, -1), 1), rtol=1e-5)


@given(MATRICES, st.integers(0, 3), st.integers(0, 5), st.sampled_from([1, 3]))
def test_rows_and_columns_of_zeros_stay_exactly_zero(x, row, column, rank):
    x[row], x[:, column] = 0, 0
    for matrix in (x, x.T):
        dense = np.asarray(factorize(matrix, rank).dense())
        np.testing.assert_array_equal(dense == 0, matrix == 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_arrays_are_factored_and_multiplied_in_float32(strict, dtype):
    x = jnp.asarray(normal(2, 4, 6), dtype)
    small = factorize(x, 4)
    assert small.left.dtype == small.right.dtype == small.dense().dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(wide(small.dense()), wide(x), atol=4 * eps)
    exact = wide(small.left) @ wide(small.right)
    np.testing.assert_allclose(wide(small.dense()), exact, rtol=eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("value", [0, 1e-41, 1e-30, -6.5e4, 1e37, 3.4028235e38])
def test_extreme_arrays_stay_finite_and_close(value, dtype):
    most = float(jnp.finfo(dtype).max)
    x = np.full((4, 6), min(value, most)).astype(dtype)
    eps, tiny = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).tiny)
    for small in (factorize(x, 2), share_basis({"w": x}, [("w",)], 2)["w"]):
        dense = wide(small.dense())
        assert np.all(np.abs(dense - wide(x)) <= 4 * eps * abs(wide(x)) + tiny)
        for again in (small, dataclasses.replace(small, shared=True)):
            close = wide(again.encode(jnp.asarray(x) * 0.5).dense())
            assert np.all(np.abs(close - wide(x) / 2) <= 6 * eps * abs(wide(x)) + tiny)


def test_one_value_is_a_product_too():
    small = factorize(jnp.array([[-2.5]]), 1)
    np.testing.assert_allclose(small.dense(), [[-2.5]], rtol=1e-6)


def test_factors_are_the_same_under_jit():
    x = jnp.asarray(normal(3, 4, 6))
    inside = jax.jit(lambda x: factorize(x, 2))(x)
    chex.assert_trees_all_equal(inside, factorize(x, 2))


def test_values_that_it_has_already_change_no_bit():
    small = factorize(normal(4, 4, 6), 2)
    assert small.encode(small.dense()) is small
    inside = jax.jit(LowRankTensor.encode)(small, small.dense())
    chex.assert_trees_all_equal(inside, small)


def test_new_values_are_factored_at_the_same_rank():
    small, x = factorize(normal(5, 2, 2, 6), 2), jnp.asarray(normal(6, 2, 2, 6))
    again = small.encode(x)
    chex.assert_trees_all_equal(again, factorize(x, 2))
    chex.assert_trees_all_close(jax.jit(LowRankTensor.encode)(small, x), again)


def test_bits_are_those_of_both_factors():
    small = factorize(normal(0, 4, 6), 3)
    assert small.nbits() == 3 * (4 + 6) * 32
    assert small.describe() == "rank 3 of 4"
    assert factorize(jnp.ones((4, 6), jnp.bfloat16), 1).nbits() == 10 * 16


# one basis for several


def test_matrices_with_one_column_space_share_a_basis_of_one():
    column = np.float32([[1], [2], [-3]])
    tree = {"a": column * np.float32([1, 2]), "b": column * np.float32([5, -4, 3])}
    small = share_basis(tree, [("a", "b")], 1)
    assert (small["a"].left.shape, small["b"].right.shape) == ((3, 1), (1, 3))
    np.testing.assert_allclose(
        small["b"].right / small["b"].right[0, 0] * 5, [[5, -4, 3]], rtol=1e-6
    )
    chex.assert_trees_all_close(jc.densify(small), tree, rtol=1e-5)


def test_the_first_of_a_group_holds_the_basis_and_all_count_their_bits():
    small = share_basis(group(head=np.ones(3)), PAIR, 2)
    first, second = small["a"]["w"], small["b"]["w"]
    assert (type(first), type(second)) == (LowRankTensor, BasisTensor)
    assert (second.source, second.shape, second.dtype) == ("a/w", (4, 3), np.float32)
    # rank * (in + out + out)
    assert (first.nbits(), second.nbits()) == (2 * (4 + 6) * 32, 2 * 3 * 32)
    assert first.describe() == "rank 2, a basis that others share"
    assert second.describe() == "rank 2, on the basis of a/w"
    assert small["head"].tolist() == [1, 1, 1]


@given(SEEDS, st.integers(1, 4))
def test_the_error_is_that_of_the_dropped_singular_values_of_all(seed, rank):
    tree = group(seed % 2**31)
    dense = jc.densify(share_basis(tree, PAIR, rank))
    joined = np.hstack([tree["a"]["w"], tree["b"]["w"]])
    error = np.sum((np.hstack([dense["a"]["w"], dense["b"]["w"]]) - wide(joined)) ** 2)
    np.testing.assert_allclose(error, dropped(joined, rank), rtol=1e-4, atol=1e-10)


@given(SEEDS, st.integers(1, 4))
def test_with_moments_it_is_the_error_of_the_products(seed, rank):
    tree, inputs = group(seed % 2**31), [normal(seed, 9, 4), 3 * normal(seed + 1, 9, 4)]
    moments = {p: wide(x).T @ x for p, x in zip(PAIR[0], inputs, strict=True)}
    dense = jc.densify(share_basis(tree, PAIR, rank, moments=moments))
    joined = wide(np.hstack([tree["a"]["w"], tree["b"]["w"]]))
    away = np.hstack([dense["a"]["w"], dense["b"]["w"]]) - joined
    total = sum(moments.values())
    total += 1e-6 * np.trace(total) / 4 * np.eye(4)
    error = np.trace(away.T @ total @ away)  # || S (W - W~) ||**2
    values, vectors = np.linalg.eigh(total)
    root = np.sqrt(values)[:, None] * vectors.T  # another S, of the same S'S
    scale = np.trace(joined.T @ total @ joined)
    np.testing.assert_allclose(
        error, dropped(root @ joined, rank), rtol=1e-4, atol=1e-10 * scale
    )


def test_inputs_that_never_vary_cost_nothing():
    tree = group()
    moment = np.diag(np.float32([1, 0, 4, 0]))
    moments = dict.fromkeys(PAIR[0], moment)
    dense = jc.densify(share_basis(tree, PAIR, 2, moments=moments))
    for name in "ab":
        ours, theirs = dense[name]["w"], tree[name]["w"]
        np.testing.assert_allclose(ours[::2], theirs[::2], atol=1e-3)


@pytest.mark.parametrize(("size", "like"), [(1e-30, 1), (1e30, 1), (0, None)])
def test_moments_of_any_size_count_by_their_ratio(size, like):
    tree, moment = group(), np.diag([1.0, 4.0, 9.0, 100.0])

    def dense(size):
        moments = None if size is None else dict.fromkeys(PAIR[0], size * moment)
        return jc.densify(share_basis(tree, PAIR, 2, moments=moments))

    chex.assert_trees_all_close(dense(size), dense(like), atol=1e-5)
    assert np.any(np.abs(dense(1)["a"]["w"] - dense(None)["a"]["w"]) > 0.1)


def test_a_group_of_one_is_factored_alone():
    x = normal(0, 4, 6)
    small = share_basis({"w": x}, [("w",)], 2)["w"]
    assert not small.shared
    np.testing.assert_allclose(small.dense(), factorize(x, 2).dense(), atol=1e-5)


def test_zeros_in_common_rows_and_in_columns_stay_exactly_zero():
    tree = group()
    tree["a"]["w"][1], tree["b"]["w"][1] = 0, 0
    tree["a"]["w"][:, 2], tree["b"]["w"][:, 0] = 0, 0
    inputs = wide(normal(3, 9, 4))
    moments = dict.fromkeys(PAIR[0], inputs.T @ inputs)
    for rank in (2, 4):
        dense = jc.densify(share_basis(tree, PAIR, rank, moments=moments))
        for name in "ab":
            ours, theirs = np.asarray(dense[name]["w"]), tree[name]["w"]
            np.testing.assert_array_equal(ours == 0, theirs == 0)
            if rank == 4:  # more than there are rows with values
                np.testing.assert_allclose(ours, theirs, atol=1e-5)
    joined = np.hstack([tree["a"]["w"], tree["b"]["w"]])
    dense = jc.densify(share_basis(tree, PAIR, 2))
    error = np.sum((np.hstack([dense["a"]["w"], dense["b"]["w"]]) - joined) ** 2)
    np.testing.assert_allclose(error, dropped(joined, 2), rtol=1e-4)


def test_matrices_of_zeros_are_products_of_zeros():
    tree = jax.tree.map(np.zeros_like, group())
    chex.assert_trees_all_equal(jc.densify(share_basis(tree, PAIR, 2)), tree)


def test_heads_are_columns_when_the_split_says_so():
    tree = {"q": normal(0, 4, 2, 3), "k": normal(1, 4, 2, 3)}
    small = share_basis(tree, [("q", "k")], 4, split=1)
    assert small["k"].right.shape == (4, 6)
    chex.assert_trees_all_close(jc.densify(small), tree, atol=1e-5)


def test_the_gradient_of_the_basis_is_the_sum_over_its_uses():
    small = share_basis(group(), PAIR, 2)

    def loss(small, a, b):
        dense = jc.densify(small)
        return a * jnp.sum(dense["a"]["w"] ** 2) + b * jnp.sum(dense["b"]["w"] ** 2)

    grads = [jax.grad(loss)(small, *w)["a"]["w"].left for w in [(1.0, 0.0), (0.0, 2.0)]]
    both = jax.grad(loss)(small, 1.0, 2.0)
    np.testing.assert_allclose(both["a"]["w"].left, sum(grads), rtol=1e-5)
    assert [x.shape for x in jax.tree.leaves(both)] == [(4, 2), (2, 6), (2, 3)]


def test_a_shared_tree_is_made_dense_under_jit_and_vmap():
    trees = [share_basis(group(seed), PAIR, 2) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    together = jax.jit(jax.vmap(jc.densify))(stacked)
    chex.assert_trees_all_close(jax.jit(jc.densify)(trees[0]), jc.densify(trees[0]))
    for i, tree in enumerate(trees):
        one = jax.tree.map(lambda x, i=i: x[i], together)
        chex.assert_trees_all_close(one, jc.densify(tree), rtol=1e-5, atol=1e-6)


def test_a_leaf_may_be_tied_to_one_on_the_basis():
    small = share_basis(group(), PAIR, 2)
    small["c"] = TiedTensor("b/w", (4, 3), "float32")
    dense = jc.densify(small)
    np.testing.assert_array_equal(dense["c"], dense["b"]["w"])


# new values on a basis


@given(SEEDS)
def test_new_values_of_one_leaf_keep_the_basis_and_so_the_others(seed):
    small = share_basis(group(), PAIR, 2)
    before = jc.densify(small)
    paths, leaves, _ = flatten(small)
    whole = list(map(resolver("test", paths, leaves), range(len(leaves))))
    for place, name in enumerate("ab"):
        x = normal(seed, *whole[place].shape)
        new = whole[place].encode(jnp.asarray(x))
        basis = small["a"]["w"].left
        np.testing.assert_array_equal(new.left, basis)
        best = basis @ np.linalg.lstsq(basis, x)[0]
        np.testing.assert_allclose(new.dense(), best, atol=2e-5 * np.abs(x).max())
        held = leaves[place].release(new) if place else new
        changed = small | {name: {"w": held}}
        assert jax.tree.structure(changed) == jax.tree.structure(small)
        after = jc.densify(changed)
        np.testing.assert_array_equal(after[name]["w"], new.dense())
        other = "ba"[place]
        np.testing.assert_array_equal(after[other]["w"], before[other]["w"])


def test_the_values_that_a_leaf_on_a_basis_has_change_no_bit():
    small = share_basis(group(), PAIR, 2)
    leaf = small["b"]["w"]
    whole = leaf.resolve(small["a"]["w"])
    again = leaf.release(whole.encode(whole.dense()))
    assert again.right is leaf.right
    inside = jax.jit(LowRankTensor.encode)(whole, whole.dense())
    chex.assert_trees_all_equal(inside, whole)


def test_zeros_of_new_values_stay_exactly_zero_on_a_basis():
    tree = group()
    tree["a"]["w"][1], tree["b"]["w"][1] = 0, 0
    node = share_basis(tree, PAIR, 2)["a"]["w"]
    x = normal(7, 4, 6)
    x[1], x[:, 3] = 0, 0
    for encode in (LowRankTensor.encode, jax.jit(LowRankTensor.encode)):
        np.testing.assert_array_equal(encode(node, x).dense() == 0, x == 0)


# errors


@pytest.mark.parametrize("index", [(0, 0), (2, 5)])
def test_zeros_among_other_values_are_an_error(index):
    x = normal(0, 4, 6)
    small = factorize(x, 2)
    x[3], x[:, 1], x[index] = 0, 0, 0
    text = (
        f"factorize cannot keep the exact zeros of float32[4, 6]: 1 of 24, the first "
        f"at {index}, are outside of all-zero rows and columns, and a product of "
        "factors has no zeros to keep, nor can it be pruned later. Quantize or share a "
        "pruned array instead."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        factorize(x, 2)
    with pytest.raises(ValueError, match=re.escape(text)):
        small.encode(jnp.asarray(x))
    assert np.isfinite(jax.jit(lambda x: factorize(x, 2).dense())(x)).all()


def test_zeros_that_a_basis_cannot_keep_are_an_error():
    tree = group()
    node = share_basis(tree, PAIR, 2)["a"]["w"]
    x = normal(1, 4, 6)
    x[2] = 0  # all of a row, but the basis has values there
    text = (
        "LowRankTensor.encode cannot keep the exact zeros of float32[4, 6]: 6 of 24, "
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        node.encode(jnp.asarray(x))
    tree["b"]["w"][2] = 0
    text = (
        "share_basis cannot keep the exact zeros of 'b/w' float32[4, 3]: 3 of 12, the "
    )
    with pytest.raises(ValueError, match=re.escape(text + "first at (2, 0), are")):
        share_basis(tree, PAIR, 2)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_out_of_range_is_an_error(rank):
    with pytest.raises(ValueError, match=f"factorize needs 1 <= rank <= 4, got {rank}"):
        factorize(normal(0, 4, 6), rank)
    with pytest.raises(
        ValueError, match=f"share_basis needs 1 <= rank <= 4, got {rank}"
    ):
        share_basis(group(), PAIR, rank)
    tall = {"a": normal(0, 9, 2), "b": normal(1, 9, 1)}
    with pytest.raises(ValueError, match="share_basis needs 1 <= rank <= 3, got 4"):
        share_basis(tall, [("a", "b")], 4)


@pytest.mark.parametrize("caller", ["factorize", "share_basis"])
@pytest.mark.parametrize(
    ("shape", "split"), [((), -1), ((6,), -1), ((4, 6), 2), ((4, 6), 0), ((0, 6), -1)]
)
def test_what_is_no_matrix_is_an_error(caller, shape, split):
    x = jnp.ones(shape)
    text = (
        f"{caller} needs an array with values, and axes on both sides of "
        f"split={split}, got float32{list(shape)}. Pass another `split`, or leave this "
        "leaf out with `where`."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        if caller == "factorize":
            factorize(x, 1, split)
        else:
            share_basis({"w": x}, [("w",)], 1, split=split)


def test_integers_are_an_error():
    with pytest.raises(TypeError, match="factorize needs a floating array, got int32"):
        factorize(jnp.ones((2, 3), jnp.int32), 1)
    text = "share_basis needs floating arrays, but 'b' is int32[2, 3]."
    tree = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3), jnp.int32)}
    with pytest.raises(TypeError, match=re.escape(text)):
        share_basis(tree, [("a", "b")], 1)
    with pytest.raises(TypeError, match="but 'b' is 1.5."):
        share_basis(tree | {"b": 1.5}, [("a", "b")], 1)


@pytest.mark.parametrize("bad", ["a/w", ()])
def test_what_is_no_group_is_an_error(bad):
    text = (
        f"share_basis needs groups of paths, got {bad!r}. Pass a list of tuples, e.g."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        share_basis(group(), [bad], 1)


@pytest.mark.parametrize(
    ("groups", "fault"),
    [
        ([("a/w", "z")], "'z' is no leaf"),
        ([("a", "b")], "'a' is no leaf"),
        ([("a/w",), ("b/w", "a/w")], "'a/w' is named twice"),
        ([("a/w", "a/w")], "'a/w' is named twice"),
    ],
)
def test_a_path_that_is_no_leaf_or_named_twice_is_an_error(groups, fault):
    text = (
        f"share_basis needs leaves, each in one group, but {fault}. The 2 leaves are "
        "a/w, b/w."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        share_basis(group(), groups, 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_other_rows_or_another_dtype_are_an_error(dtype):
    rows = 3 if dtype == np.float32 else 4
    other = np.ones((rows, 6), dtype)
    text = (
        f"share_basis needs leaves of as many rows and one dtype, but 'b/w' "
        f"{other.dtype}[{rows}, 6] has {rows} rows and 'a/w' float32[4, 6] has 4. "
        "Group others, or pass another `split`."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        share_basis(group() | {"b": {"w": other}}, PAIR, 1)


def test_a_compressed_leaf_is_an_error():
    small = share_basis(group(), PAIR, 1)
    text = (
        "share_basis needs arrays, but 'b/w' is already compressed (rank 1, on the "
        "basis of a/w). Densify first."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        share_basis(small, [("b/w",)], 1)


def test_values_that_are_not_finite_or_not_known_are_an_error():
    tree = group()
    tree["b"]["w"][1, 2] = np.nan
    text = "share_basis needs finite values, but leaf 'b/w' float32[4, 3] holds nan at"
    with pytest.raises(ValueError, match=re.escape(text)):
        share_basis(tree, PAIR, 1)
    text = (
        "share_basis needs the values of 'a/w' float32[4, 6], which are not known "
        "under jit. Call it outside jit."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        jax.jit(lambda tree: share_basis(tree, PAIR, 1))(group())
    text = "share_basis needs the values of the moment of 'a/w', which are not known"
    with pytest.raises(ValueError, match=re.escape(text)):
        jax.jit(lambda x: share_basis(group(), PAIR, 1, moments={"a/w": x, "b/w": x}))(
            jnp.eye(4)
        )


@pytest.mark.parametrize(
    ("moment", "got"),
    [(None, "NoneType"), (np.eye(3), "float64[3, 3]"), (("X'X", 9), "tuple")],
)
def test_a_moment_that_does_not_fit_is_an_error(moment, got):
    text = (
        f"share_basis needs a moment of shape [4, 4] for leaf 'b/w', got {got}. The "
        "moments are of a/w, b/w. Pass X'X, the `total` of a `Moment`."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        share_basis(group(), PAIR, 1, moments={"a/w": np.eye(4), "b/w": moment})


def test_moments_that_are_not_positive_or_not_finite_are_an_error():
    text = (
        "share_basis needs moments X'X that are positive semidefinite, got a sum with "
        "the least eigenvalue -3."
    )
    moments = {"a/w": np.eye(4), "b/w": np.diag([1.0, 1, 1, -4])}
    with pytest.raises(ValueError, match=re.escape(text)):
        share_basis(group(), PAIR, 1, moments=moments)
    moments["b/w"][0, 0] = np.nan
    text = "share_basis needs finite moments, but that of 'b/w' holds nan."
    with pytest.raises(ValueError, match=re.escape(text)):
        share_basis(group(), PAIR, 1, moments=moments)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_leaf_on_a_basis_that_is_gone_is_an_error(rank):
    small = share_basis(group(), PAIR, 2)
    x = normal(0, 4, 6)
    small["a"]["w"] = x if rank is None else factorize(x, rank)
    text = (
        "BasisTensor needs a LowRankTensor of rank 2 at 'a/w', got "
        f"{'an array' if rank is None else 'rank 3 of 4'}. Densify the whole tree "
        "before that leaf is replaced."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        jc.densify(small)


def test_coefficients_on_another_basis_are_an_error():
    leaf = share_basis(group(), PAIR, 2)["b"]["w"]
    for other in (factorize(normal(0, 4, 3), 2), jnp.ones((4, 3))):
        text = (
            "BasisTensor.release needs coefficients on the basis of 'a/w', which other "
            f"leaves use, got {type(other).__name__}. Take what `encode` of the "
            "resolved node gives, or densify the whole tree first."
        )
        with pytest.raises(ValueError, match=re.escape(text)):
            leaf.release(other)
