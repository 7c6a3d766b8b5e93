"""The nets on which cutting is tested are what they are said to be."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.node import flatten
from tests.program.zoo.model import model
from tests.program.zoo.models import MODELS


every_model = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)

# To compile is most of the time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def shapes_of(found):
    paths, leaves, _ = flatten(found.params)
    return {path: leaf.shape for path, leaf in zip(paths, leaves, strict=True)}


@functools.cache
def made(make):
    return make()


@functools.cache
def narrower(make):
    """The model with one unit less in each family."""
    widths = inspect.signature(make).parameters["widths"].default
    return make(tuple(width - 1 for width in widths))


def lowered(f, found):
    """The program that would be compiled, all its numbers included."""

    def run(params, *inputs):
        return f(params, *inputs)

    return jax.jit(run).lower(found.params, *found.inputs)


@every_model
def test_a_model_runs_and_its_native_form_is_the_same(make):
    found = made(make)
    assert found.name == make.__name__
    program = lowered(found.f, found)
    outputs = program.compile(FAST)(found.params, *found.inputs)
    chex.assert_tree_all_finite(outputs)
    assert all(np.std(x) > 1e-3 for x in jax.tree.leaves(outputs) if x.ndim)
    assert max(np.max(np.abs(x)) for x in jax.tree.leaves(outputs)) < 100
    if found.native is None:
        return
    native = lowered(found.native(shapes_of(found)), found)
    if native.as_text() != program.as_text():  # then at least the same numbers
        again = native.compile(FAST)(found.params, *found.inputs)
        chex.assert_trees_all_close(again, outputs, rtol=1e-6, atol=1e-6)


@every_model
def test_the_native_form_takes_other_widths(make):
    found, small = made(make), narrower(make)
    if found.native is not None:
        native = found.native(shapes_of(small))
        # A tree can remember the widths that its module was made with.
        treedef = jax.tree.structure(found.params)
        params = jax.tree.unflatten(treedef, jax.tree.leaves(small.params))
        outputs = jax.eval_shape(native, params, *small.inputs)
        assert outputs == jax.eval_shape(small.f, small.params, *small.inputs)


@every_model
def test_what_can_be_cut_is_what_the_widths_change(make):
    found, small = shapes_of(made(make)), shapes_of(narrower(make))
    assert len(found) == len(jax.tree.leaves(made(make).params))  # unique paths
    changed = {
        (path, axis)
        for path, shape in found.items()
        for axis, length in enumerate(shape)
        if length != small[path][axis]
    }
    assert changed
    assert set(made(make).prunable) <= changed
    assert not changed & set(made(make).frozen)


@every_model
def test_what_is_said_is_about_axes_that_there_are(make):
    found = made(make)
    shapes = shapes_of(found)
    for path, axis in {*found.prunable, *found.inexact, *found.frozen}:
        assert shapes[path][axis] > 1
    assert found.frozen
    assert set(found.inexact) <= set(found.prunable)
    assert not set(found.prunable) & set(found.frozen)


@every_model
def test_params_are_away_from_what_a_new_net_has(make):
    for path, leaf in zip(*flatten(made(make).params)[:2], strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        assert np.min(np.abs(leaf)) > 1e-3, path
        assert leaf.size == 1 or np.unique(leaf).size > leaf.size / 2, path
        if "/var" in path:
            assert 0.5 <= np.min(leaf) <= np.max(leaf) <= 2


def test_names_of_models_are_theirs_alone():
    assert len({make.__name__ for make in MODELS}) == len(MODELS)


def test_an_axis_of_a_parameter_that_is_not_there_is_an_error():
    shapes = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    with pytest.raises(ValueError, match="model has no parameter 'v' among .'w'.."):
        model("", lambda p: p, shapes, (), None, frozen={"input": {"v": (0,)}})
