import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.prune import in_units, leaf_budget, masks
from jaxcomp.prune.biases import mask_biases


SHAPES = {"kernel": (2, 3, 4), "bias": (3, 4)}
PARAMS = {"attention": {k: jnp.ones(s) for k, s in SHAPES.items()}}


def layer(mask, bias=None):
    bias = jnp.ones(()) > 0 if bias is None else jnp.asarray(bias)
    return {"kernel": jnp.asarray(mask), "bias": bias}


def test_whole_units_go_with_their_bias():
    w = jnp.array([[1.0, 4.0, 2.0], [2.0, 5.0, 9.0]])
    params = {"a": {"kernel": w, "bias": jnp.arange(3.0), "scale": jnp.ones(3)}}
    before = masks(params, 1 / 3, budget=in_units(leaf_budget))
    found = mask_biases(params, before)
    assert found["a"]["bias"].tolist() == [False, True, True]
    assert found["a"]["kernel"] is before["a"]["kernel"]
    assert found["a"]["scale"] is before["a"]["scale"]
    pruned = jc.apply_masks(params, found)
    assert pruned["a"]["bias"].tolist() == [0, 1, 2]
    assert pruned["a"]["kernel"][:, 0].tolist() == [0, 0]


@given(hnp.arrays(bool, SHAPES["kernel"]), hnp.arrays(bool, SHAPES["bias"]))
def test_a_bias_of_several_axes_stays_where_any_weight_does(kernel, bias):
    found = mask_biases(PARAMS, {"attention": layer(kernel, bias)})
    expected = kernel.any(axis=0) & bias  # what was removed stays removed
    np.testing.assert_array_equal(found["attention"]["bias"], expected)


@pytest.mark.parametrize(("axis", "others"), [(-1, (0, 1)), (0, (1, 2)), (1, (0, 2))])
def test_a_bias_lies_along_the_axis_of_the_units(axis, others):
    mask = np.random.default_rng(0).random((4, 5, 6)) < 0.04
    size = mask.shape[axis]
    params = {"kernel": jnp.ones(mask.shape), "bias": jnp.ones(size)}
    found = mask_biases(params, layer(mask), axis)
    np.testing.assert_array_equal(found["bias"], mask.any(axis=others))
    assert 0 < int(found["bias"].sum()) < size


def test_a_unit_of_several_kernels_goes_when_all_of_them_have_let_it_go():
    first, second = [[True, False, False]], [[False, False, True], [False, False, True]]
    params = {"bias": jnp.ones(3), "in": jnp.ones((1, 3)), "state": jnp.ones((2, 3))}
    given = {
        "bias": jnp.array(True),
        "in": jnp.array(first),
        "state": jnp.array(second),
    }
    assert mask_biases(params, given)["bias"].tolist() == [True, False, True]


def test_other_biases_are_left_alone():
    keep = jnp.array(True)
    params = {
        "a": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))},
        "b": {"bias": jnp.ones(2)},  # beside nothing
        "c": {"bias": jnp.ones(3), "kernel": jnp.ones((3, 2))},  # of another length
        "d": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))},  # not masked
        "e": {"bias": jnp.ones(2), "kernel": jnp.ones((0, 2))},  # has no weights at all
        "f": {"bias": jnp.ones(()), "kernel": jnp.ones((3, 2))},
    }
    given = jax.tree.map(lambda _: keep, params)
    for name in "acef":
        given[name]["kernel"] = jnp.zeros(params[name]["kernel"].shape, bool)
    found = mask_biases(params, given)
    assert found["a"]["bias"].tolist() == [False, False]
    assert all(found[name]["bias"] is keep for name in "bcdef")


def test_nodes_flax_states_and_jit_are_no_matter():
    w = jc.quantize(jnp.array([[1.0, 0.0], [2.0, 0.0]]))
    params = {"kernel": {"value": w}, "bias": {"value": jnp.ones(2)}}
    given = {
        "kernel": {"value": w.dense() != 0},
        "bias": {"value": jnp.array(True)},
    }
    found = jax.jit(mask_biases)(params, given)["bias"]["value"]
    assert found.tolist() == [True, False]


def test_a_tied_bias_follows_its_source():
    params = {
        "a": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))},
        "b": {
            "bias": jc.TiedTensor("a/bias", (2,), "float32"),
            "kernel": jnp.ones((3, 2)),
        },
    }
    mask = jnp.array([[True, False]] * 3)
    found = mask_biases(params, {"a": layer(mask), "b": layer(mask)})
    assert found["a"]["bias"].tolist() == [True, False]
    assert found["b"]["bias"].shape == ()


def test_masks_must_be_shaped_like_the_params():
    with pytest.raises(ValueError, match="mask_biases needs masks shaped like params"):
        mask_biases(PARAMS, {"attention": {"kernel": jnp.ones((2, 3, 4), bool)}})


@pytest.mark.parametrize("axis", [0, 7])
def test_no_bias_to_mask_is_an_error(axis):
    text = (
        "mask_biases found no bias beside a masked kernel whose units, along axis "
        f"{axis}, it fits, among attention/bias, attention/kernel. Pass another axis"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        mask_biases(PARAMS, {"attention": layer(jnp.ones((2, 3, 4), bool))}, axis)
