import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.prune import global_budget, leaf_budget


SHAPES = {"a": (2, 5), "b": (), "c": (0, 2), "d": (10,)}
SIZE = 21
LEVELS = st.sampled_from([-1.0, 0.0, 0.5, 1.0])
SCORES = st.lists(LEVELS, min_size=SIZE, max_size=SIZE)
PERCENT = st.integers(0, 99)


def scores_of(flat):
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in SHAPES.values()])[:-1]
    pieces = np.split(np.asarray(flat, np.float32), ends)
    rows = zip(SHAPES.items(), pieces, strict=True)
    return {path: jnp.asarray(piece.reshape(shape)) for (path, shape), piece in rows}


def reference(flat, percent):
    """The kept entries by a full sort: low first, and of equals the last first."""
    flat = np.ravel(flat)
    zeros = round(Fraction(percent, 100) * flat.size)
    kept = np.ones(flat.size, bool)
    kept[np.lexsort((-np.arange(flat.size), flat))[:zeros]] = False
    return kept


# leaf_budget


def test_every_leaf_loses_its_own_lowest_scores():
    masks = leaf_budget({"a": jnp.arange(10.0), "b": 100 - jnp.arange(10.0)}, 0.5)
    assert masks["a"].tolist() == [False] * 5 + [True] * 5
    assert masks["b"].tolist() == [True] * 5 + [False] * 5


@given(SCORES, PERCENT)
def test_every_leaf_has_exactly_its_own_count(flat, percent):
    scores = scores_of(flat)
    masks = leaf_budget(scores, percent / 100)
    assert masks.keys() == scores.keys()
    for path, mask in masks.items():
        assert mask.shape == SHAPES[path]
        np.testing.assert_array_equal(np.ravel(mask), reference(scores[path], percent))


def test_a_mapping_gives_each_path_its_own_sparsity_and_leaves_the_others_whole():
    scores = {"a": jnp.arange(10.0), "b": jnp.arange(10.0), "c": jnp.arange(10.0)}
    masks = leaf_budget(scores, {"a": 0.7, "c": 0.2})
    assert masks["a"].tolist() == [False] * 7 + [True] * 3
    assert masks["b"].tolist() == [True] * 10
    assert masks["c"].tolist() == [False] * 2 + [True] * 8


def test_leaf_budget_takes_a_traced_sparsity():
    scores = {"a": jnp.arange(10.0)}
    traced = jax.jit(leaf_budget)(scores, 0.5)
    for path, mask in leaf_budget(scores, 0.5).items():
        np.testing.assert_array_equal(traced[path], mask)


def test_a_sparsity_for_an_unknown_path_is_an_error_that_lists_real_ones():
    text = (
        "leaf_budget has a sparsity for 'z', which is not one of the 4 selected "
        "leaves: a, b, c, d."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        leaf_budget(scores_of(np.zeros(SIZE)), {"a": 0.5, "z": 0.5})


@pytest.mark.parametrize("sparsity", [1.0, {"a": 1.0}, {"d": -0.5}])
def test_leaf_budget_needs_sparsities_in_range(sparsity):
    with pytest.raises(ValueError, match="needs 0 <= sparsity < 1, the fraction"):
        leaf_budget(scores_of(np.zeros(SIZE)), sparsity)


# global_budget


def test_the_lowest_scores_go_wherever_they_are():
    scores = {"a": jnp.arange(10.0), "b": jnp.arange(5.0, 15.0)}
    masks = global_budget(scores, 0.5)  # 10 of 20
    np.testing.assert_array_equal(masks["a"], np.arange(10) >= 7)
    np.testing.assert_array_equal(masks["b"], np.arange(5, 15) >= 8)  # 7 lost the tie


@given(SCORES, PERCENT)
def test_the_leaves_together_lose_exactly_the_count_of_the_sparsity(flat, percent):
    masks = global_budget(scores_of(flat), percent / 100)
    assert {path: mask.shape for path, mask in masks.items()} == SHAPES
    together = np.concatenate([np.ravel(mask) for mask in masks.values()])
    np.testing.assert_array_equal(together, reference(flat, percent))


def test_on_a_tie_the_earlier_leaf_and_the_lower_index_are_kept():
    scores = {"z": jnp.zeros(10), "a": jnp.zeros(10)}  # in this order
    masks = global_budget(scores, 0.75)
    assert masks["z"].tolist() == [True] * 5 + [False] * 5
    assert masks["a"].tolist() == [False] * 10


def test_global_budget_takes_a_traced_sparsity():
    scores = scores_of(np.arange(SIZE))
    traced = jax.jit(global_budget)(scores, 0.5)
    for path, mask in global_budget(scores, 0.5).items():
        np.testing.assert_array_equal(traced[path], mask)


def test_no_leaves_have_no_masks():
    assert global_budget({}, 0.5) == {}
    assert leaf_budget({}, 0.5) == {}


def test_global_budget_refuses_a_sparsity_for_each_path():
    text = (
        "global_budget needs one sparsity for all leaves, got one for each path. "
        "Use budget=leaf_budget."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        global_budget(scores_of(np.zeros(SIZE)), {"a": 0.5})


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 50])
def test_global_budget_needs_a_sparsity_in_range(sparsity):
    text = (
        f"global_budget needs 0 <= sparsity < 1, the fraction of zeros, got {sparsity}."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        global_budget(scores_of(np.zeros(SIZE)), sparsity)


def test_global_budget_refuses_a_sparsity_that_is_no_number():
    text = r"global_budget needs a number for sparsity, got nan\."
    with pytest.raises(ValueError, match=text):
        global_budget(scores_of(np.zeros(SIZE)), float("nan"))
