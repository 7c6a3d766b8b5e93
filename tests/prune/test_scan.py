import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.prune import masks, random_scores
from jaxcomp.prune.scan import Scan, scan, scan_budget


LEVELS = (0.25, 0.5, 0.9)
SHAPES = {"z": (2, 5), "a": (7, 3), "empty": (0, 2), "d": (10,)}  # not in order
SCORES = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}


def counts(found, sparsity, scores=SCORES):
    chosen = scan_budget(found)(scores, sparsity)
    assert {path: mask.shape for path, mask in chosen.items()} == {
        path: score.shape for path, score in scores.items()
    }
    return [int((~mask).sum()) for mask in chosen.values()]


def curves(*rises):
    """A scan of the leaves whose loss rises so far above 1."""
    losses = (tuple(1.0 + rise for rise in of_leaf) for of_leaf in rises)
    return Scan(LEVELS, 1.0, dict(zip(SHAPES, losses, strict=True)))


# scan


def test_the_loss_is_found_with_one_leaf_at_a_time_pruned():
    params = {
        "b": jnp.array([[1.0, -2.0, 3.0, 4.0]]),
        "a": jnp.array([[5.0, 6.0]]),
        "bias": jnp.array([7.0]),
    }
    traces = []

    def loss(p):
        traces.append(1)
        return 140 - sum(jnp.sum(x**2) for x in p.values())

    found = scan(loss, params, [0.25, 0.5])
    assert found == Scan((0.25, 0.5), 0.0, {"a": (0.0, 25.0), "b": (1.0, 5.0)})
    assert len(traces) == 1


def test_a_scan_asks_the_score_and_where():
    params = {"a": jnp.arange(1.0, 5.0)[None], "b": jnp.ones((1, 2))}
    score = random_scores(jax.random.key(0))
    mask = masks({"a": params["a"]}, 0.5, score=score)
    expected = float(jnp.sum(jc.apply_masks({"a": params["a"]}, mask)["a"])) + 2
    found = scan(
        lambda p: jnp.sum(p["a"]) + jnp.sum(p["b"]),
        *(params, [0.5]),
        score=score,
        where=jc.path_matches("a"),
    )
    assert found == Scan((0.5,), 12.0, {"a": (expected,)})


def test_nodes_ties_and_functions_may_be_in_the_tree():
    w = jnp.array([[1.0, -2.0, 3.0, 4.0]])
    params = {
        "a": jc.quantize(w, bits=8),
        "b": jc.TiedTensor("a", (1, 4), "float32"),
        "activation": jax.nn.relu,
        "n": 2,
    }

    def loss(p):
        dense = jc.densify(p)
        return jnp.sum(p["activation"](dense["a"]) + dense["b"]) * p["n"]

    dense = {**params, "a": params["a"].dense()}
    found, expected = scan(loss, params, [0.5]), scan(loss, dense, [0.5])
    assert found == expected
    assert found.losses.keys() == {"a"}
    assert found.losses["a"][0] == pytest.approx(28, rel=1e-2)  # 3 and 4, twice, twice


@pytest.mark.parametrize("levels", [[], [0.0, 0.5], [0.5, 0.5], [0.5, 0.25]])
def test_levels_must_rise(levels):
    text = "scan needs levels above 0, each higher than the one before, got "
    with pytest.raises(ValueError, match=re.escape(f"{text}{levels}. The loss")):
        scan(jnp.sum, jnp.ones((2, 2)), levels)
    with pytest.raises(ValueError, match="scan needs 0 <= sparsity < 1, the fraction"):
        scan(jnp.sum, jnp.ones((2, 2)), [0.5, 1.0])


def test_a_loss_that_is_not_finite_is_an_error_that_says_where():
    def loss(p):
        return 1 / jnp.sum(p["a"] != 0) + jnp.sum(p["b"])

    params = {"a": jnp.ones((1, 2)), "b": jnp.ones((1, 2))}
    text = "scan needs a finite loss, got inf with leaf 'a' at a sparsity of 0.9. Leave"
    with pytest.raises(ValueError, match=re.escape(text)):
        scan(loss, params, [0.5, 0.9])
    with pytest.raises(ValueError, match="got nan for the params as they are"):
        scan(lambda p: jnp.sum(p["a"]) * jnp.nan, params, [0.5])


def test_a_loss_must_be_a_number_and_params_finite_and_known():
    with pytest.raises(TypeError, match=r"scan needs loss\(params\) to return one"):
        scan(lambda p: p, jnp.ones((2, 2)), [0.5])
    with pytest.raises(ValueError, match="scan needs finite values, but leaf 'a'"):
        scan(jnp.sum, {"a": jnp.full((1, 2), jnp.nan)}, [0.5])
    text = "scan needs concrete params and reads the losses, got traced ones. Call it"
    with pytest.raises(TypeError, match=re.escape(text)):
        jax.jit(lambda p: scan(jnp.sum, p, [0.5]).base)(jnp.ones((2, 2)))


# scan_budget


def test_all_leaves_are_pruned_to_one_rise_of_the_loss():
    # Sizes 10, 21, 0 and 10. At a rise of 2 the first is at its 0.5, the second half
    # way from 0.25 to 0.5, the last at an eighth: 5, 7.875 and 1.25 of 14.
    found = curves((1, 2, 8), (1, 3, 4), (1, 1, 1), (4, 8, 9))
    assert counts(found, 14 / 41) == [5, 8, 0, 1]
    assert counts(found, 0) == [0, 0, 0, 0]


def test_curves_are_made_to_never_fall_and_flat_ones_give_equal_parts():
    # Up to 0.5 the first costs nothing, and up to 0.9 the last gains.
    found = curves((0.5, -1, 1), (1, 2, 3), (0, 0, 0), (-2, -3, -4))
    assert counts(found, 3 / 41) == [0, 0, 0, 3]
    assert counts(found, 9 / 41) == [0, 0, 0, 9]
    # The first rises to 0.5 with the second, then 5 - 2.5 more at once.
    assert counts(found, 14 / 41) == [2, 3, 0, 9]
    assert counts(found, 16 / 41) == [4, 3, 0, 9]


RISES = st.tuples(*[st.integers(1, 50)] * 3).map(np.cumsum)


@given(st.tuples(*[RISES] * 4), st.integers(0, 36))
def test_counts_are_those_of_a_bisection_in_floats(rises, zeros):
    sizes = np.array([10, 21, 0, 10])

    def wanted(bound):
        levels = (0.0, *LEVELS)
        return sizes * [np.interp(bound, [0.0, *rise], levels) for rise in rises]

    low, high = 0.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if wanted(middle).sum() < zeros else (low, middle)
    found = counts(curves(*rises), zeros / 41)
    assert sum(found) == zeros
    assert np.all(np.abs(found - wanted(high)) < 1 + 1e-6)


@given(
    st.tuples(*[st.tuples(*[st.integers(-2, 2)] * 3)] * 4),
    st.sampled_from([0.1, 0.35, 0.5, 0.77, 0.9]),
)
def test_the_total_is_exact_and_no_leaf_goes_beyond_the_levels(rises, sparsity):
    found = np.array(counts(curves(*rises), sparsity))
    assert found.sum() == round(sparsity * 41)
    assert np.all(found <= np.ceil(0.9 * np.array([10, 21, 0, 10])))


def test_a_scan_makes_masks_of_a_tree():
    params = {"a": jnp.arange(1.0, 5.0)[None], "b": jnp.arange(1.0, 5.0)[None]}
    found = scan(lambda p: 99 - jnp.sum(p["a"] ** 2) * 9 - p["b"].sum(), params, [0.5])
    chosen = masks(params, 0.25, budget=scan_budget(found))
    assert chosen["a"].all()
    assert chosen["b"].tolist() == [[False, False, True, True]]
    assert scan_budget(found)({}, 0.5) == {}


def test_masks_are_the_same_under_jit():
    budget = scan_budget(curves(*[(1, 2, 3)] * 4))
    traced = jax.jit(lambda scores: budget(scores, 0.5))(SCORES)
    for path, mask in budget(SCORES, 0.5).items():
        np.testing.assert_array_equal(traced[path], mask)


def test_a_sparsity_above_the_levels_is_an_error():
    text = (
        "scan_budget needs a sparsity of at most 0.9, the highest level of the scan, "
        "got 0.97. Scan higher levels."
    )
    found = curves(*[(1, 2, 3)] * 4)
    with pytest.raises(ValueError, match=re.escape(text)):
        counts(found, 0.97)
    assert counts(found, jnp.float32(0.9)) == [9, 19, 0, 9]


def test_a_sparsity_must_be_one_known_number_in_range():
    budget = scan_budget(curves(*[(1, 2, 3)] * 4))
    with pytest.raises(
        TypeError, match="scan_budget needs a known sparsity, got a tra"
    ):
        jax.jit(budget)(SCORES, 0.5)
    with pytest.raises(ValueError, match="scan_budget needs 0 <= sparsity < 1"):
        budget(SCORES, 1.0)
    with pytest.raises(ValueError, match="scan_budget needs one sparsity for all"):
        budget(SCORES, {"a": 0.5})


def test_a_leaf_that_was_not_scanned_is_an_error():
    text = (
        "scan_budget needs a scan of leaf 'new', got one of z, a, empty, d. Scan with "
        "the same `where`."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        scan_budget(curves(*[(1, 2, 3)] * 4))({"new": jnp.ones(2)}, 0.5)
