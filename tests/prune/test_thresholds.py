import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.prune.scores import deviations
from jaxcomp.prune.thresholds import masks_above
from jaxcomp.prune.unit_scores import unit_density


def test_weights_of_at_least_the_threshold_stay():
    params = {"kernel": jnp.array([[0.1, -0.5, 2.0, 0.0]]), "bias": jnp.ones(2)}
    found = masks_above(params, 0.5)
    assert found["kernel"].tolist() == [[False, True, True, False]]
    assert found["bias"].shape == () and found["bias"].dtype == bool and found["bias"]


@given(
    hnp.arrays(np.float32, (8, 5), elements=st.floats(-9, 9, width=16)),
    st.floats(0.125, 3, width=32),
)
def test_a_number_of_deviations_is_the_rule_of_han(w, quality):
    mask = masks_above({"a": jnp.asarray(w)}, quality, score=deviations)["a"]
    bound = quality * np.std(w, dtype=np.float64)
    clear = np.abs(np.abs(w) - bound) > 1e-5 * bound  # but for rounding
    kept = (np.abs(w) >= bound) & (w != 0)
    np.testing.assert_array_equal(np.asarray(mask)[clear], kept[clear])


@pytest.mark.parametrize("bound", range(10))
def test_units_with_more_than_a_bound_of_zeros_go_whole(bound):
    units = (np.arange(10)[:, None] >= np.arange(11)[None]).astype(np.float32)
    params = {"kernel": jnp.asarray(units)}  # unit i has i zeros of 10
    mask = masks_above(params, 1 - bound / 10, score=unit_density())["kernel"]
    np.testing.assert_array_equal(mask, np.tile(np.arange(11) <= bound, (10, 1)))


def test_a_mapping_gives_each_path_its_own_threshold_and_leaves_the_others_whole():
    row = jnp.array([[0.0, 1.0, 2.0]])
    params = {"a": row, "b": row, "c": row}
    found = masks_above(params, {"a": 1.0, "c": 1.5})
    assert found["a"].tolist() == [[False, True, True]]
    assert found["b"].tolist() == [[True, True, True]]
    assert found["c"].tolist() == [[False, False, True]]
    jc.apply_masks(params, found)  # they are masks


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_threshold_may_be_traced_and_is_not_rounded_to_the_weights(dtype, strict):
    w = jnp.asarray(np.linspace(0.05, 0.15, 40).reshape(8, 5), dtype)
    expected = np.asarray(w, np.float32) >= np.float32(0.1)
    found = masks_above({"a": w}, 0.1)["a"]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(jax.jit(masks_above)({"a": w}, 0.1)["a"], expected)


def test_nodes_get_masks_and_empty_leaves_too():
    w = jnp.array([[0.25, -1.0], [0.5, 0.0]])
    params = {"a": jc.quantize(w), "b": jnp.zeros((0, 3))}
    found = masks_above(params, 0.4)
    assert found["a"].tolist() == [[False, True], [True, False]]
    assert found["b"].shape == (0, 3)


def test_a_threshold_for_an_unknown_path_is_an_error_that_lists_real_ones():
    text = (
        "masks_above has a threshold for 'z', which is not one of the 1 selected "
        "leaves: a."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        masks_above({"a": jnp.ones((1, 2))}, {"z": 0.5})


@pytest.mark.parametrize("threshold", [float("nan"), {"a": float("nan")}])
def test_a_threshold_must_be_a_number(threshold):
    with pytest.raises(ValueError, match="masks_above needs a number for threshold"):
        masks_above({"a": jnp.ones((1, 2))}, threshold)


def test_bad_leaves_and_no_leaves_are_errors():
    text = "masks_above needs finite values, but leaf 'a' float32[1, 2] holds inf at"
    with pytest.raises(ValueError, match=re.escape(text)):
        masks_above({"a": jnp.array([[1.0, jnp.inf]])}, 0.5)
    with pytest.raises(ValueError, match="`where` selected none of the 1 leaves"):
        masks_above({"a": jnp.ones(2)}, 0.5)
