import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.prune import erk_budget, global_budget, leaf_budget
from jaxcomp.prune.budgets import _erk_counts


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
        "Use budget=leaf_budget"
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


# erk_budget

# MiniLM has leaves like the first three; the last two are a convolution and a vector.
NETWORK = ((2, 384), (30522, 384), (384, 1536), (3, 3, 64, 128), (10,))


def erk_reference(shapes, kept):
    """Evci et al., by turns: whole leaves drop out and the others share the rest."""
    sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
    shares = [Fraction(max(sum(shape), 1)) for shape in shapes]
    whole = set()
    while len(whole) < len(sizes):
        others = [i for i in range(len(sizes)) if i not in whole]
        left = kept - sum(sizes[i] for i in whole)
        epsilon = left / sum(shares[i] for i in others)
        full = {i for i in others if epsilon * shares[i] >= sizes[i]}
        if not full:
            break
        whole |= full
    counts = list(sizes)
    parts = {i: epsilon * shares[i] for i in range(len(sizes)) if i not in whole}
    for i, part in parts.items():
        counts[i] = part.numerator // part.denominator
    ranking = sorted(parts, key=lambda i: (counts[i] - parts[i], i))
    for i in ranking[: kept - sum(counts)]:
        counts[i] += 1
    return counts


def test_leaves_keep_in_proportion_to_the_sum_of_their_dimensions():
    scores = {"a": jnp.ones((10, 10)), "b": jnp.ones((20, 20))}
    masks = erk_budget(scores, 0.91)  # 20 : 40 of the 45 that stay
    assert [int(mask.sum()) for mask in masks.values()] == [15, 30]
    # The third leaf would keep 3/63 of 45, more than it has. It is whole, and the
    # others share the 43 that are left: 14 1/3 and 28 2/3.
    masks = erk_budget({**scores, "c": jnp.ones((1, 2))}, 457 / 502)
    assert [int(mask.sum()) for mask in masks.values()] == [14, 29, 2]


@given(st.integers(0, 2**24), st.sampled_from([1, 1000, 2**24]))
def test_counts_are_those_of_exact_fractions_and_add_up(part, parts):
    total = sum(int(np.prod(shape)) for shape in NETWORK)
    kept = min(part, parts) * total // parts
    counts = _erk_counts(NETWORK, kept)
    assert counts.tolist() == erk_reference(NETWORK, kept)
    assert sum(counts.tolist()) == kept


@pytest.mark.parametrize("kept", range(SIZE + 1))
def test_leaves_of_no_axes_and_of_no_entries_have_their_counts(kept):
    shapes = tuple(SHAPES.values())
    assert _erk_counts(shapes, kept).tolist() == erk_reference(shapes, kept)


def test_a_traced_sparsity_shares_out_as_a_number_does(strict):
    scores = scores_of(np.arange(SIZE) % 5)
    run = jax.jit(erk_budget)
    for sparsity in (0.0, 0.25, 0.5, 0.75, 0.9375):
        traced, number = (
            run(scores, jnp.float32(sparsity)),
            erk_budget(scores, sparsity),
        )
        for path in SHAPES:
            np.testing.assert_array_equal(traced[path], number[path])
        zeros = sum(int(np.sum(~np.asarray(mask))) for mask in number.values())
        assert zeros == round(Fraction(sparsity) * SIZE)


def test_each_leaf_of_an_erk_budget_loses_its_lowest_scores():
    masks = erk_budget({"a": jnp.arange(100.0).reshape(10, 10)}, 0.75)
    np.testing.assert_array_equal(masks["a"].reshape(-1), np.arange(100) >= 75)
    assert erk_budget({}, 0.5) == {}


def test_erk_budget_refuses_a_sparsity_for_each_path():
    text = (
        "erk_budget needs one sparsity for all leaves, got one for each path. "
        "Use budget=leaf_budget"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        erk_budget(scores_of(np.zeros(SIZE)), {"a": 0.5})
    with pytest.raises(ValueError, match="erk_budget needs 0 <= sparsity < 1"):
        erk_budget(scores_of(np.zeros(SIZE)), 1.0)
