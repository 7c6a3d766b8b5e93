"""Masks of groups zero what NumPy zeroes, and say which groups were kept."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.prune import global_budget, leaf_budget
from jaxcomp.prune.group_patterns import (
    group_masks,
    in_groups,
    kept_groups,
)
from jaxcomp.prune.groups import Family, Member
from jaxcomp.tree import is_trained


SIZES = {"units": 4, "stream": 3}
FOUR, THREE = (np.arange(n, dtype=np.int32)[:, None] for n in (4, 3))
UNITS = Family(
    "units",
    (
        Member("up/kernel", 1, FOUR),
        *(Member(f"norm/{key}", 0, FOUR) for key in ("bias", "mean", "var")),
        Member("down", 0, np.array([[0, 4], [1, 5], [2, 6], [3, 7]], np.int32)),
    ),
    True,
    "",
)
STREAM = Family(
    "stream",
    (Member("up/kernel", 0, THREE), Member("down", 1, THREE)),
    False,
    "a mean spans it",
)
FAMILIES = (UNITS, STREAM)
PATTERN = in_groups(leaf_budget, FAMILIES)
jitted = jax.jit(PATTERN)
RANDOM = np.random.default_rng(0)
PARAMS = jax.tree.map(
    lambda shape: jnp.asarray(RANDOM.uniform(1, 2, shape), jnp.float32),
    {
        "down": (8, 3),
        "head": (3, 2),
        "norm": {"bias": (4,), "mean": (4,), "var": (4,)},
        "up": {"kernel": (3, 4)},
    },
    is_leaf=lambda x: isinstance(x, tuple),
)
KEEPS = st.fixed_dictionaries(
    {
        name: st.lists(st.booleans(), min_size=size, max_size=size).filter(any)
        for name, size in SIZES.items()
    }
)


def leaf_of(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree


def zeroed(params, keep):
    """The same by a loop over all that goes."""
    params = jax.tree.map(np.array, params)
    for family in FAMILIES:
        for g in np.flatnonzero(~np.asarray(keep[family.name])):
            for m in family.members:
                np.moveaxis(leaf_of(params, m.path), m.axis, 0)[m.indices[g]] = 0
    return params


def test_masks_zero_all_that_a_removed_group_owns():
    keep = {"units": np.array([True, False, True, True])}
    masks = group_masks(PARAMS, FAMILIES, keep)
    assert masks["norm"]["bias"].tolist() == keep["units"].tolist()
    assert masks["down"].all(axis=1).tolist() == [True, False, True, True] * 2
    assert masks["head"].shape == ()


def test_masks_that_cut_nothing_keep_everything():
    masks = group_masks(PARAMS, FAMILIES, {"units": np.ones(4, bool)})
    assert all(mask.shape == () and mask for mask in jax.tree.leaves(masks))
    assert all(kept.all() for kept in kept_groups(masks, FAMILIES).values())


@given(KEEPS)
def test_masks_are_those_of_a_loop_and_give_the_groups_back(keep):
    keep = {name: np.array(kept) for name, kept in keep.items()}
    masks = group_masks(PARAMS, FAMILIES, keep)
    cut = jc.apply_masks(PARAMS, masks)
    jax.tree.map(np.testing.assert_array_equal, cut, zeroed(PARAMS, keep))
    for tree in (masks, cut, jax.tree.map(lambda w: w.astype(jnp.bfloat16), cut)):
        found = kept_groups(tree, FAMILIES)
        for name, kept in keep.items():
            assert found[name].tolist() == kept.tolist()


def test_nodes_are_masked_in_place():
    small = jc.quantize_tree(PARAMS, bits=8)
    keep = {"stream": np.array([True, False, True])}
    cut = jc.apply_masks(small, group_masks(small, FAMILIES, keep))
    assert isinstance(cut["down"], jc.QTensor)
    assert kept_groups(cut, FAMILIES)["stream"].tolist() == [True, False, True]


def test_a_tree_that_was_cut_stays_cut_while_it_trains():
    keep = {"units": np.array([False, True, True, False])}
    params = jc.apply_masks(PARAMS, group_masks(PARAMS, [UNITS], keep))
    tx = optax.chain(optax.adam(0.1), jc.keep_zeros(where=is_trained))
    state = tx.init(params)
    for _ in range(2):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert kept_groups(params, [UNITS])["units"].tolist() == keep["units"].tolist()


def test_any_entry_that_is_not_zero_keeps_its_group():
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    params["norm"]["var"] = jnp.ones(4)  # says nothing
    params["norm"]["bias"] = jnp.array([0.0, -1.0, 0.0, jnp.nan])
    found = kept_groups(params, FAMILIES)
    assert found["units"].tolist() == [False, True, False, True]
    assert found["stream"].tolist() == [False, False, False]


# in_groups


def scores_of(params):
    paths, leaves, _ = jc.node.flatten(params)
    pairs = zip(paths, leaves, strict=True)
    return {path: jnp.abs(w) for path, w in pairs if is_trained(path, w)}


def test_the_score_of_a_group_is_the_mean_of_its_entries():
    scores, seen = scores_of(PARAMS), {}

    def budget(pooled, sparsity):
        seen.update(pooled)
        return {name: x > -1 for name, x in pooled.items()}

    in_groups(budget, FAMILIES)(scores, 0.5)
    for family in FAMILIES:
        for g, mean in enumerate(seen[family.name]):
            entries = [
                np.take(np.asarray(scores[m.path]), m.indices[g], axis=m.axis).ravel()
                for m in family.members
                if m.path in scores
            ]
            expected = np.mean(np.concatenate(entries))
            np.testing.assert_allclose(mean, expected, rtol=1e-6)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.75])
def test_counts_of_groups_are_exact_for_numbers_and_traced_ones(sparsity, strict):
    scores = scores_of(PARAMS)
    masks = PATTERN(scores, sparsity)
    assert {path: mask.shape for path, mask in masks.items()} == {
        path: score.shape for path, score in scores.items()
    }
    units = masks["norm/bias"]
    assert int(units.sum()) == 4 - round(4 * sparsity)
    np.testing.assert_array_equal(
        masks["up/kernel"], units[None] & masks["down"].any(axis=0)[:, None]
    )
    assert masks["head"].all()
    traced = jitted(scores, jnp.float32(sparsity))
    for path, mask in masks.items():
        np.testing.assert_array_equal(traced[path], mask)


def test_the_best_group_of_a_family_stays():
    scores = scores_of(PARAMS)
    scores["up/kernel"] = scores["up/kernel"].at[:, 2].set(9.0)
    masks = in_groups(global_budget, [UNITS])(scores, 0.99)
    assert masks["norm/bias"].tolist() == [False, False, True, False]


def test_gradual_pruning_ends_in_whole_groups():
    schedule = optax.linear_schedule(0.0, 0.5, 2)
    tx = optax.chain(
        optax.sgd(0.01),
        jc.prune_gradually(schedule, every=1, budget=PATTERN, where=is_trained),
    )

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(4):
        params, state = step(params, state)
    keep = kept_groups(params, FAMILIES)
    assert {name: int(kept.sum()) for name, kept in keep.items()} == {
        "units": 2,
        "stream": 1,  # 1.5 go, half to even
    }
    for name, kept in kept_groups(state[-1].masks, FAMILIES).items():
        np.testing.assert_array_equal(kept, keep[name])
    masks = group_masks(params, FAMILIES, keep)
    cut = {k: v for k, v in jc.apply_masks(params, masks).items() if k != "norm"}
    jax.tree.map(
        np.testing.assert_array_equal,
        cut,
        {k: v for k, v in params.items() if k in cut},
    )


def test_a_pattern_lowers_for_cpu_cuda_and_tpu():
    run = jax.jit(in_groups(global_budget, FAMILIES))
    platforms = ("cpu", "cuda", "tpu")
    assert jax.export.export(run, platforms=platforms)(scores_of(PARAMS), 0.5)


# Errors


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        ({"z": [True]}, "group_masks needs names of families in `keep`, got 'z'."),
        ({"stream": [True]}, "group_masks needs bool[3] for the 3 groups of 'stream'"),
        ({"stream": [False] * 3}, "group_masks needs at least one group of 'stream'"),
    ],
)
def test_a_keep_that_does_not_fit_is_an_error(keep, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        group_masks(PARAMS, FAMILIES, {name: np.array(x) for name, x in keep.items()})


def test_params_that_do_not_fit_are_an_error():
    without = {k: v for k, v in PARAMS.items() if k != "down"}
    text = "group_masks needs the leaf 'down' of family 'units', got head, norm/bias,"
    with pytest.raises(ValueError, match=re.escape(text)):
        group_masks(without, FAMILIES, {})
    small = PARAMS | {"down": jnp.ones((8, 2))}
    text = "index 2 of axis 1 of leaf 'down' for family 'stream', got shape [8, 2]."
    with pytest.raises(ValueError, match=re.escape(f"group_masks needs {text}")):
        group_masks(small, FAMILIES, {})
    with pytest.raises(ValueError, match=re.escape(f"kept_groups needs {text}")):
        kept_groups(small, FAMILIES)
    with pytest.raises(ValueError, match=re.escape(f"in_groups needs {text}")):
        in_groups(leaf_budget, FAMILIES)(scores_of(small), 0.5)


def test_a_family_of_which_nothing_is_seen_is_an_error():
    text = (
        "in_groups needs a selected leaf of family 'stream', got none of down, "
        "up/kernel. Select them with `where`, or leave the family out."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        in_groups(leaf_budget, FAMILIES)({"norm/bias": jnp.ones(4)}, 0.5)
