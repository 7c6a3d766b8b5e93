"""Features of a student in the shape of its teacher's, by maps that are trained too."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.distill.outputs import Outputs
from jaxcomp.distill.projections import Projected, with_projections


KEY = jax.random.key(0)


def array(*shape, seed=0):
    values = np.random.default_rng(seed + len(shape)).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


def model(params, x):
    hidden = x @ params["a"]
    return Outputs(hidden @ params["b"], {"hidden": hidden})


def make_params(width):
    return {"a": array(4, width), "b": array(width, 3)}


X, SMALL, BIG = array(5, 4), make_params(2), make_params(8)


def of_shapes(**shapes):
    """A model without params that has features of these shapes."""
    features = {name: jnp.ones(shape) for name, shape in shapes.items()}
    return lambda params, x: Outputs(x, features)


def projected(ours, theirs):
    return with_projections(KEY, of_shapes(**ours), {}, of_shapes(**theirs), {}, X)


def test_a_projection_by_hand():
    f, params = with_projections(KEY, model, SMALL, model, BIG, X)
    weights = params["projections"]["hidden"]
    chex.assert_shape([weights["kernel"], weights["bias"]], [(2, 8), (8,)])
    np.testing.assert_array_equal(weights["bias"], 0)
    params["projections"]["hidden"] = {
        "kernel": jnp.ones((2, 8)),
        "bias": jnp.arange(8),
    }
    found, alone = f(params, X), model(SMALL, X)
    wanted = alone.features["hidden"].sum(-1)[:, None] + np.arange(8)[None]
    np.testing.assert_allclose(found.features["hidden"], wanted, rtol=1e-5)
    np.testing.assert_array_equal(found.logits, alone.logits)
    assert params["student"] is SMALL


@given(hnp.arrays(np.float32, (5, 4), elements=st.floats(-10, 10, width=32)))
def test_it_is_the_affine_map_of_numpy(x):
    f, params = with_projections(KEY, model, SMALL, model, BIG, X)
    params["projections"]["hidden"]["bias"] = array(8)
    weights = jax.tree.map(np.asarray, params["projections"]["hidden"])
    wanted = x @ np.asarray(SMALL["a"]) @ weights["kernel"] + weights["bias"]
    found = f(params, jnp.asarray(x)).features["hidden"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_kernels_are_lecun_normal():
    _, params = projected({"a": (5, 400)}, {"a": (5, 300)})
    kernel = params["projections"]["a"]["kernel"]
    np.testing.assert_allclose(kernel.var() * 400, 1, rtol=0.02)


def test_each_feature_has_a_kernel_of_its_own():
    names = ("a", "b")
    _, params = projected({k: (5, 2) for k in names}, {k: (5, 3) for k in names})
    first, second = (params["projections"][name]["kernel"] for name in names)
    assert np.all(first != second)


def test_features_of_equal_shapes_are_left_as_they_are():
    f, params = with_projections(KEY, model, SMALL, model, SMALL, X)
    assert params["projections"] == {}
    chex.assert_trees_all_equal(f(params, X), model(SMALL, X))


def test_maps_are_resized_and_sequences_may_have_any_length_where_it_agreed():
    def student(params, x):
        return Outputs(x, {"map": x})

    def teacher(params, x):
        return Outputs(x, {"map": jnp.ones((x.shape[0], 8, x.shape[2], 5))})

    f, params = with_projections(KEY, student, {}, teacher, {}, array(2, 4, 6, 3))
    weights = params["projections"]["map"]
    for images in (array(2, 4, 6, 3), array(3, 4, 7, 3)):
        shape = (len(images), 8, images.shape[2], 3)
        wanted = jax.image.resize(images, shape, "linear") @ weights["kernel"]
        found = f(params, images).features["map"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_nothing_is_computed_but_shapes():
    shapes = jax.eval_shape(lambda: (SMALL, BIG, X))
    _, params = with_projections(KEY, model, shapes[0], model, shapes[1], shapes[2])
    assert params["student"] is shapes[0]


def test_sixteen_bits_are_projected_in_32():
    def halved(params, x):
        return Outputs(x, {"hidden": x.astype(jnp.bfloat16)})

    f, params = with_projections(KEY, halved, {}, model, BIG, X)
    with jax.numpy_dtype_promotion("strict"):
        assert f(params, X).features["hidden"].dtype == jnp.float32


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train, momentum=0.5)(nn.Dense(self.width)(x))
        return Outputs(nn.Dense(3)(nn.relu(x)), {"hidden": x})


def with_noise(variables, x, key):
    x = x + 0.01 * jax.random.normal(key, x.shape)
    found, state = Net(2).apply(variables, x, True, mutable=["batch_stats"])
    return found._replace(state=state)


def test_a_step_trains_student_and_projections_and_moves_the_statistics():
    small = jax.jit(partial(Net(2).init, train=False))(KEY, X)
    big = jax.jit(partial(Net(8).init, train=False))(KEY, X)
    teacher = partial(Net(8).apply, train=False)
    student = partial(with_noise, key=KEY)  # a key for the shapes
    found = with_projections(KEY, student, small, teacher, big, X)
    assert isinstance(found, Projected)

    def hint(ours, theirs, batch):
        gap = ours.features["hidden"] - theirs.features["hidden"]
        return jnp.mean(gap**2, axis=-1)

    tx = optax.adam(0.1)
    step = jc.distill_step(found.f, teacher, tx, hard=0.0, terms={"hint": hint})
    params, opt_state, values = found.params, tx.init(found.params), []
    for key in jax.random.split(KEY, 10):
        params, opt_state, metrics = step(params, opt_state, big, (X,), key)
        values.append(float(metrics["hint"]))
    assert values[-1] < values[0] / 2
    for old, new in zip(
        jax.tree.leaves(found.params), jax.tree.leaves(params), strict=True
    ):
        assert np.any(old != new)
    logits = Net(2).apply(params["student"], X, train=False).logits
    assert logits.shape == (5, 3)


def test_a_compressed_student_stays_compressed():
    small = jc.quantize_tree(SMALL, bits=4)
    f, params = with_projections(KEY, model, small, model, BIG, X)
    tx = optax.sgd(0.1)
    step = jc.distill_step(f, model, tx, hard=0.0)
    final, _, _ = step(params, tx.init(jc.split(params)[0]), BIG, (X,))
    codes = final["student"]["a"].codes, small["a"].codes
    np.testing.assert_array_equal(*codes)


def test_a_feature_without_a_partner_is_an_error_that_lists_both():
    with pytest.raises(ValueError, match="names, got a, b and b, c. Rename"):
        projected({"a": (5, 2), "b": (5, 2)}, {"b": (5, 2), "c": (5, 2)})
    with pytest.raises(ValueError, match="got none and none"):
        projected({}, {})


@pytest.mark.parametrize(
    ("ours", "theirs"), [((5, 2), (4, 2)), ((5, 2), (5, 2, 2)), ((3, 5, 2), (6, 5, 4))]
)
def test_other_ranks_batches_and_numbers_of_layers_are_an_error(ours, theirs):
    match = r"got float32\[.*\] and float32\[.*\] for 'a'.*stacked.*select as many"
    with pytest.raises(ValueError, match=match):
        projected({"a": ours}, {"a": theirs})


def test_tied_leaves_are_an_error():
    tree = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    tied = jc.tie_layers({"x": {"w": tree["a"]}, "y": {"w": tree["b"]}}, [("x", "y")])
    with pytest.raises(ValueError, match="cannot nest tied leaves.*'y/w'.*densify"):
        with_projections(KEY, model, tied, model, BIG, X)
