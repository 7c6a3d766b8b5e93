import re
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.prune.lamp import lamp_budget


SHAPES = {"a": (2, 5), "b": (), "c": (0, 2), "d": (10,)}
SIZE = 21
LEVELS = st.sampled_from([0.0, 0.5, 1.0, 3.0])
SCORES = st.lists(LEVELS, min_size=SIZE, max_size=SIZE)
PERCENT = st.integers(0, 99)


def scores_of(flat):
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in SHAPES.values()])[:-1]
    pieces = np.split(np.asarray(flat, np.float32), ends)
    rows = zip(SHAPES.items(), pieces, strict=True)
    return {p: jnp.asarray(piece.reshape(shape)) for (p, shape), piece in rows}


def numpy_lamp(score):
    """The paper's scores, by a sort; of equals the lower index is the larger."""
    size = np.ravel(np.asarray(score, np.float64))
    order = np.lexsort((np.arange(size.size), -size))  # the largest first
    squares = size[order] ** 2
    sums = np.cumsum(squares)
    found = np.empty_like(squares)
    found[order] = np.divide(squares, sums, out=np.zeros_like(sums), where=sums > 0)
    return found


def reference(scores, sparsity):
    """The kept entries of all leaves, their LAMP scores, and the least that is kept."""
    lamp = np.concatenate([numpy_lamp(score) for score in scores.values()])
    zeros = round(Fraction(str(sparsity)) * lamp.size)
    order = np.lexsort((-np.arange(lamp.size), lamp))
    kept = np.ones(lamp.size, bool)
    kept[order[:zeros]] = False
    return kept, lamp, lamp[order[zeros]]


def together(masks):
    return np.concatenate([np.ravel(mask) for mask in masks.values()])


def normal(shape, seed, power=1.0):
    draws = np.abs(np.random.default_rng(seed).normal(size=shape)) ** power
    return jnp.asarray(draws, jnp.float32)


LAYERS = {  # sorted, so that a tree of them is compiled no second time
    "heavy": 7.0 * normal((30, 30), 2, power=4.0),
    "small": 1e-3 * normal((5, 10), 1),
    "wide": normal((40, 90), 0),
}


# In "a" 1/30, 4/29, 9/25 and 1; in "d" 1 and, of equals the first is the larger, 1/9
# and 1/10. The others are zeros, which go first.
@pytest.mark.parametrize(
    ("kept", "a", "d"),
    [
        (7, [1, 1, 1, 1], [1, 1, 1]),
        (6, [0, 1, 1, 1], [1, 1, 1]),
        (5, [0, 1, 1, 1], [1, 1, 0]),
        (4, [0, 1, 1, 1], [1, 0, 0]),
        (3, [0, 0, 1, 1], [1, 0, 0]),
        (2, [0, 0, 0, 1], [1, 0, 0]),
        (1, [0, 0, 0, 1], [0, 0, 0]),
    ],
)
def test_squares_are_compared_with_what_is_larger_in_the_leaf(kept, a, d):
    scores = [*[0.0] * 6, 1.0, 2.0, 3.0, 4.0, *[0.0] * 8, 100 * 8**0.5, 100.0, 100.0]
    masks = lamp_budget(scores_of(scores), 1 - kept / 21)
    assert masks["a"].ravel().tolist() == [False] * 6 + [bool(x) for x in a]
    assert masks["d"].tolist() == [False] * 7 + [bool(x) for x in d]


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9, 0.99, 0.999])
def test_masks_are_those_of_a_sort_but_for_scores_within_the_precision(sparsity):
    masks = together(lamp_budget(LAYERS, sparsity))
    kept, lamp, threshold = reference(LAYERS, sparsity)
    assert masks.sum() == kept.sum()
    other = masks != kept
    assert other.sum() <= 10
    np.testing.assert_allclose(lamp[other], threshold, rtol=2e-3)


@given(SCORES, PERCENT)
def test_masks_of_a_few_levels_are_those_of_a_sort(flat, percent):
    scores = scores_of(flat)
    masks = lamp_budget(scores, percent / 100)
    assert {path: mask.shape for path, mask in masks.items()} == SHAPES
    kept, lamp, threshold = reference(scores, percent / 100)
    masks = together(masks)
    assert masks.sum() == kept.sum()
    np.testing.assert_allclose(lamp[masks != kept], threshold, rtol=2e-3)


@given(SCORES, PERCENT)
def test_inside_a_leaf_the_lowest_go_and_of_equals_the_last(flat, percent):
    scores = scores_of(flat)
    for path, mask in lamp_budget(scores, percent / 100).items():
        score, mask = np.ravel(scores[path]), np.ravel(mask)
        order = np.lexsort((-np.arange(score.size), score))
        np.testing.assert_array_equal(mask[order], np.sort(mask))


def test_an_even_leaf_is_thinned_out_and_not_removed():
    # 1 and 16/41 in "a", 1 in "b", and 1/j for the j-th of "d".
    scores = scores_of([5.0, 4.0, *[0.0] * 8, 2.0, *[3.0] * 10])
    masks = lamp_budget(scores, 14 / 21)
    assert masks["a"].ravel().tolist() == [True] * 2 + [False] * 8
    assert bool(masks["b"])
    assert masks["d"].tolist() == [True] * 4 + [False] * 6


def test_the_largest_of_every_leaf_stays_while_any_leaf_has_two():
    masks = lamp_budget(LAYERS, 1 - 3 / 4550)
    assert [int(mask.sum()) for mask in masks.values()] == [1, 1, 1]
    for path, mask in masks.items():
        assert bool(mask.ravel()[LAYERS[path].argmax()])
    # With fewer places than leaves, all of which score 1, the earlier leaves have them.
    masks = lamp_budget(LAYERS, 1 - 2 / 4550)
    assert [int(mask.sum()) for mask in masks.values()] == [1, 1, 0]


def test_the_scale_of_a_leaf_does_not_matter_even_where_squares_overflow():
    scales = {"wide": 2.0**100, "small": 2.0**-100, "heavy": 1.0}
    scaled = {path: score * scales[path] for path, score in LAYERS.items()}
    assert bool(jnp.isinf(jnp.square(scaled["wide"]).max()))
    assert not bool(jnp.square(scaled["small"]).max())
    chex.assert_trees_all_equal(lamp_budget(scaled, 0.8), lamp_budget(LAYERS, 0.8))


def test_zeros_go_first_and_negative_scores_before_them():
    scores = scores_of([-np.inf, -1.0, *[0.0] * 17, 1.0, 2.0])
    order = [20, 19, *range(2, 19), 1, 0]
    for n in (1, 2, 3, 10, 15, 19, 20):
        mask = together(lamp_budget(scores, 1 - n / 21))
        assert np.flatnonzero(mask).tolist() == sorted(order[:n])


def test_more_sparsity_only_takes_away():
    masks = [together(lamp_budget(LAYERS, s / 20)) for s in range(20)]
    for more, less in zip(masks[1:], masks, strict=False):
        assert np.all(less | ~more)


def test_narrow_scores_decide_as_the_same_scores_in_float32(strict):
    scores = {"small": LAYERS["small"].astype(jnp.bfloat16)}
    expected = reference(scores, 0.7)[0]
    np.testing.assert_array_equal(together(lamp_budget(scores, 0.7)), expected)


def test_it_is_a_budget_of_masks():
    params = {path: {"bias": jnp.ones(2), "kernel": w} for path, w in LAYERS.items()}
    masks = jc.prune.masks(params, 0.9, budget=lamp_budget)
    assert masks["wide"]["bias"].shape == ()
    kernels = {path: layer["kernel"] for path, layer in masks.items()}
    chex.assert_trees_all_equal(kernels, lamp_budget(LAYERS, 0.9))


def test_jit_vmap_and_scan_do_what_a_call_does_with_one_trace():
    scores = {"a": jnp.arange(6.0), "b": jnp.arange(6.0) ** 2}
    levels = jnp.array([0.0, 0.25, 0.5, 0.75])
    rows = [lamp_budget(scores, x / 4) for x in range(4)]
    stacked = jax.tree.map(lambda *masks: jnp.stack(masks), *rows)
    budget = chex.assert_max_traces(lambda level: lamp_budget(scores, level), n=1)
    mapped = jax.jit(jax.vmap(budget))(levels)
    chex.assert_trees_all_equal(mapped, stacked)
    chex.clear_trace_counter()
    scanned = jax.jit(lambda levels: jax.lax.map(budget, levels))(levels)
    chex.assert_trees_all_equal(scanned, stacked)


def test_it_lowers_for_every_platform():
    platforms = ("cpu", "cuda", "tpu")
    call = jax.jit(lambda scores: lamp_budget(scores, 0.5))
    exported = jax.export.export(call, platforms=platforms)(scores_of(np.arange(SIZE)))
    assert exported.platforms == platforms


def test_no_leaves_have_no_masks():
    assert lamp_budget({}, 0.5) == {}


def test_lamp_budget_refuses_a_sparsity_for_each_path():
    text = (
        "lamp_budget needs one sparsity for all leaves, got one for each path. "
        "Use budget=leaf_budget"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        lamp_budget(LAYERS, {"wide": 0.5})


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 50])
def test_lamp_budget_needs_a_sparsity_in_range(sparsity):
    text = (
        f"lamp_budget needs 0 <= sparsity < 1, the fraction of zeros, got {sparsity}."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        lamp_budget(LAYERS, sparsity)
