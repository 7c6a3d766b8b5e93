"""Patterns keep exact counts of groups, blocks and units, as NumPy does by a sort."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp import prune
from jaxcomp.prune import (
    global_budget,
    in_blocks,
    in_units,
    leaf_budget,
    nm_budget,
    nm_mask,
)


LEVELS = st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 0.5, 1.0, np.inf])
KERNELS = hnp.arrays(np.float32, (8, 3), elements=LEVELS)
CONVOLUTION = np.random.default_rng(0).normal(size=(2, 3, 8, 5)).astype(np.float32)

jitted = jax.jit(nm_mask, static_argnums=(1, 2), static_argnames="along")


def nm_reference(scores, n, m, along):
    """The kept of each group by a stable sort: the highest, and the first of equals."""
    axes = sorted(axis % scores.ndim for axis in np.atleast_1d(along))
    last = range(scores.ndim - len(axes), scores.ndim)
    lanes = np.moveaxis(np.asarray(scores), axes, last)
    flat = lanes.reshape(-1, int(np.prod([scores.shape[axis] for axis in axes])))
    kept = np.zeros(flat.shape, bool)
    for row, start in np.ndindex(len(flat), -(-flat.shape[1] // m)):
        group = slice(start * m, (start + 1) * m)
        best = np.argsort(-flat[row, group], kind="stable")[:n]
        kept[row, group][best] = True
    return np.moveaxis(kept.reshape(lanes.shape), last, axes)


# nm_mask


def test_two_of_four_by_hand(strict):
    column = jnp.array([3.0, 1.0, -2.0, 2.0, 5.0, 5.0, 5.0, 5.0])[:, None]
    kept = [True, False, False, True, True, True, False, False]
    assert jitted(column, 2, 4)[:, 0].tolist() == kept
    assert nm_mask(column.T, 2, 4, along=1)[0].tolist() == kept


@given(KERNELS, st.sampled_from([(1, 2), (2, 4), (3, 8), (4, 4), (1, 1)]))
def test_masks_are_those_of_a_stable_sort(scores, pattern):
    expected = nm_reference(scores, *pattern, -2)
    np.testing.assert_array_equal(jitted(scores, *pattern), expected)
    assert np.all(expected.reshape(-1, pattern[1], 3).sum(1) == pattern[0])


@pytest.mark.parametrize(
    ("m", "along"), [(4, -2), (2, 0), (5, -1), (3, -2), (16, 3), (4, (2, 0, 1))]
)
def test_any_axes_are_grouped_and_the_last_group_may_be_shorter(m, along):
    mask = nm_mask(jnp.asarray(CONVOLUTION), 2, m, along=along)
    np.testing.assert_array_equal(mask, nm_reference(CONVOLUTION, 2, m, along))


def test_axes_that_lie_apart_run_together_in_c_order():
    mask = jitted(jnp.asarray(CONVOLUTION), 1, 5, along=(-1, 0))  # 10 of (2, 5)
    np.testing.assert_array_equal(mask, nm_reference(CONVOLUTION, 1, 5, (0, 3)))
    wide = jnp.asarray(CONVOLUTION).transpose(1, 2, 0, 3).reshape(3, 8, 10)
    together = nm_mask(wide, 1, 5, along=-1).reshape(3, 8, 2, 5).transpose(2, 0, 1, 3)
    np.testing.assert_array_equal(mask, together)


def test_a_shorter_last_group_is_padded_with_what_is_never_kept():
    column = jnp.array([9.0, 9.0, 9.0, 9.0, -jnp.inf, -jnp.inf, -jnp.inf])[:, None]
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        mask = nm_mask(column.astype(dtype), 2, 4)[:, 0]
        assert mask.tolist() == [True, True, False, False, True, True, False]
    assert nm_mask(column[:5], 2, 4)[:, 0].tolist() == [True, True, False, False, True]


def test_no_entries_have_no_groups():
    assert nm_mask(jnp.zeros((0, 3)), 2, 4).shape == (0, 3)
    assert nm_mask(jnp.zeros((4, 0)), 2, 4).shape == (4, 0)


def test_nm_mask_lowers_for_cpu_cuda_and_tpu():
    platforms = ("cpu", "cuda", "tpu")
    run = jax.jit(partial(nm_mask, n=2, m=4))
    assert jax.export.export(run, platforms=platforms)(jnp.zeros((8, 3)))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (1, 0)])
def test_n_and_m_must_fit_together(n, m):
    for make in (partial(nm_mask, jnp.zeros((8, 3))), nm_budget):
        with pytest.raises(ValueError, match="needs 1 <= [nm] <= "):
            make(n, m)


@pytest.mark.parametrize("along", [(), (0, -2)])
def test_axes_must_be_named_once(along):
    text = (
        f"nm_mask needs one axis or more, each once, got along={along} for "
        "float32[6, 3]."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        nm_mask(jnp.zeros((6, 3)), 2, 4, along=along)


# nm_budget


@pytest.mark.parametrize(
    ("sparsity", "kept"),
    [(0.0, 4), (0.125, 4), (0.2, 3), (0.25, 3), (0.375, 2), (0.5, 2), (0.75, 1)],
)
def test_a_lower_sparsity_keeps_more_of_each_group(sparsity, kept):
    budget = nm_budget(1, 4)
    number = budget({"a": jnp.asarray(CONVOLUTION)}, sparsity)["a"]
    np.testing.assert_array_equal(number, nm_reference(CONVOLUTION, kept, 4, -2))
    traced = jax.jit(budget)({"a": CONVOLUTION}, jnp.float32(sparsity))["a"]
    np.testing.assert_array_equal(traced, number)


def test_a_shorter_last_group_keeps_as_many_as_the_others_or_all():
    budget = nm_budget(1, 4, along=(0, 1))
    scores = {"a": jnp.arange(7.0).reshape(7, 1, 1)}
    for sparsity, kept in [
        (0.0, [4, 3]),
        (0.25, [3, 3]),
        (0.5, [2, 2]),
        (0.75, [1, 1]),
    ]:
        mask = budget(scores, sparsity)["a"].reshape(-1)
        assert [int(mask[:4].sum()), int(mask[4:].sum())] == kept


def test_a_sparsity_that_was_rounded_up_is_not_too_high():
    for sparsity in (1 - 1 / 3, np.float32(2 / 3), jnp.float32(1 - 1 / 3)):
        mask = nm_budget(1, 3)({"a": jnp.ones((6, 2))}, sparsity)["a"]
        assert mask[:, 0].tolist() == [True, False, False] * 2


def test_a_gradual_schedule_goes_from_dense_to_the_pattern():
    w = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
    params, still = {"kernel": jnp.asarray(w)}, {"kernel": jnp.zeros((8, 6))}
    tx = jc.prune_gradually(
        optax.linear_schedule(0.0, 0.5, 4), every=1, budget=nm_budget(2, 4)
    )
    state, zeros = tx.init(params), []
    step = jax.jit(tx.update)
    for _ in range(6):
        updates, state = step(still, state, params)
        params = optax.apply_updates(params, updates)
        zeros.append(int(jnp.sum(params["kernel"] == 0)))
    assert zeros == [0, 0, 12, 24, 24, 24]  # 0, 1/2, 1, 3/2 and 2 of 4, half to even
    np.testing.assert_array_equal(
        params["kernel"], np.where(nm_reference(np.abs(w), 2, 4, -2), w, 0)
    )


def test_nm_budget_makes_masks_of_a_tree():
    tree = {"kernel": jnp.asarray(CONVOLUTION), "bias": jnp.ones(5)}
    masks = prune.masks(tree, 0.5, budget=nm_budget(2, 4))
    pruned = jc.apply_masks(tree, masks)
    jc.testing.assert_nm_sparse(pruned["kernel"], 2, 4, along=-2)
    assert masks["bias"].shape == ()


def test_a_sparsity_above_the_pattern_is_an_error():
    text = (
        "nm_budget needs a sparsity of at most 1 - n/m = 0.5 for 2:4, got 0.6. Pass "
        "that, or a smaller n."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        nm_budget(2, 4)({"a": jnp.ones((4, 1))}, 0.6)
    with pytest.raises(ValueError, match="nm_budget needs 0 <= sparsity < 1"):
        nm_budget(2, 4)({"a": jnp.ones((4, 1))}, -0.5)
    with pytest.raises(ValueError, match="nm_budget needs one sparsity for all leaves"):
        nm_budget(2, 4)({"a": jnp.ones((4, 1))}, {"a": 0.5})


# in_blocks


def block_means(scores, rows, columns):
    means = np.zeros((-(-scores.shape[0] // rows), -(-scores.shape[1] // columns)))
    for i, j in np.ndindex(*means.shape):
        means[i, j] = scores[
            rows * i : rows * (i + 1), columns * j : columns * (j + 1)
        ].mean()
    return means


@given(
    hnp.arrays(np.float32, (5, 7), elements=st.integers(-3, 3)),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
)
def test_the_blocks_of_the_lowest_means_go_whole(scores, sparsity):
    mask = in_blocks(leaf_budget, (2, 4))({"a": jnp.asarray(scores)}, sparsity)["a"]
    low = block_means(scores, 2, 4).astype(np.float32).reshape(-1)
    kept = np.ones(6, bool)
    kept[np.lexsort((-np.arange(6), low))[: round(sparsity * 6)]] = False
    expected = np.kron(kept.reshape(3, 2), np.ones((2, 4), bool))[:5, :7]
    np.testing.assert_array_equal(mask, expected)


def test_blocks_of_all_leaves_compete_and_lie_in_the_last_axes():
    scores = {"a": jnp.asarray(CONVOLUTION), "b": jnp.ones((8, 4), jnp.bfloat16)}
    budget = in_blocks(global_budget, (4, 4))
    masks = budget(scores, 0.75)
    blocks = np.asarray(masks["a"])[:, :, ::4, ::4]
    np.testing.assert_array_equal(
        np.repeat(np.repeat(blocks, 4, 2), 4, 3)[..., :5], masks["a"]
    )
    # 24 blocks of a and 2 of b, which are the best: 26 - round(19.5) stay.
    assert masks["b"].all()
    assert blocks.sum() + 2 == 6
    traced = jax.jit(budget)(scores, 0.75)
    for path, mask in masks.items():
        np.testing.assert_array_equal(traced[path], mask)


def test_a_leaf_of_fewer_axes_than_a_block_is_an_error_that_names_it():
    text = (
        "in_blocks needs arrays of 2 axes or more for blocks of shape [4, 4], got "
        "float32[3]. Leave this leaf out with `where`. (leaf 'norm')"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        in_blocks(leaf_budget, (4, 4))({"norm": jnp.ones(3)}, 0.5)


def test_a_block_needs_positive_lengths():
    with pytest.raises(ValueError, match="in_blocks needs 1 <= length <= .* got 0"):
        in_blocks(leaf_budget, (4, 0))
    with pytest.raises(ValueError, match="in_blocks needs the lengths of a block"):
        in_blocks(leaf_budget, ())


# in_units


@pytest.mark.parametrize("axis", [-1, 0, 2])
def test_units_of_the_lowest_means_go_whole(axis):
    budget = in_units(leaf_budget, axis)
    mask = budget({"a": jnp.asarray(CONVOLUTION)}, 0.5)["a"]
    others = tuple(a for a in range(4) if a != axis % 4)
    means = CONVOLUTION.mean(axis=others)
    kept = np.ones(means.size, bool)
    kept[np.argsort(means)[: round(0.5 * means.size)]] = False
    lengths = [1] * 4
    lengths[axis] = -1
    assert mask.shape == CONVOLUTION.shape
    np.testing.assert_array_equal(
        mask, np.broadcast_to(kept.reshape(lengths), CONVOLUTION.shape)
    )
    traced = jax.jit(budget)({"a": CONVOLUTION}, 0.5)["a"]
    np.testing.assert_array_equal(traced, mask)


def test_of_tied_units_the_first_stay():
    masks = in_units(global_budget)({"a": jnp.ones((2, 5)), "b": jnp.ones((3, 5))}, 0.7)
    assert masks["a"][1].tolist() == [True] * 3 + [False] * 2
    assert not masks["b"].any()


def test_a_leaf_without_the_axis_is_an_error_that_names_it():
    text = (
        "in_units needs an array that has axis -1, got float32[]. Pass another axis, "
        "or leave this leaf out with `where`. (leaf 'scale')"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        in_units(leaf_budget)({"scale": jnp.ones(())}, 0.5)
    with pytest.raises(ValueError, match=r"nm_mask needs .* axis -2.*\(leaf 'norm'\)"):
        nm_budget(2, 4)({"norm": jnp.ones(4)}, 0.5)


def test_axes_may_be_given_for_each_leaf_as_observing_finds_them():
    key_a, key_b = jax.random.split(jax.random.key(0))
    params = {
        "heads": jax.random.normal(
            key_a, (2, 6, 8)
        ),  # (heads, d, model), back to model
        "in": jax.random.normal(key_b, (8, 12)),
    }

    def f(params, x):
        split = (x @ params["in"]).reshape(5, 2, 6)
        return jnp.einsum("bhd,hdm->bm", split, params["heads"])

    seen = jc.observe(f, params, [(jnp.ones((5, 8)),)], {"norm": jc.program.norm})
    along = {path: row.axes for path, row in seen.items()}
    assert along == {"heads": (0, 1), "in": (0,)}
    every = jc.path_matches(".*")
    budget = jc.prune.nm_budget(2, 4, along=along)
    masks = jc.prune.masks(params, 0.5, budget=budget, where=every)
    for path, count in (("heads", 3), ("in", 2)):
        lanes = masks[path].reshape(count, 4, -1)
        np.testing.assert_array_equal(lanes.sum(axis=1), 2)
    with pytest.raises(ValueError, match="`along` has none of 'in'"):
        jc.prune.nm_budget(2, 4, along={"heads": 0})(params, 0.5)
