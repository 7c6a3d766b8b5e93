"""Scores agree with NumPy, and are numbers whatever the finite weights are."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.prune import global_budget, masks, saliency
from jaxcomp.prune.averages import gradients, mean_squares, moved_from
from jaxcomp.prune.scores import deviations
from jaxcomp.prune.unit_scores import random_units, unit_density, unit_entropy


KERNEL = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
SCORES = {
    "deviations": deviations,
    "random_units": random_units(jax.random.key(0)),
    "unit_entropy": unit_entropy(bins=4),
    "unit_density": unit_density(),
    "moved_from": lambda w: moved_from(-w)(w),
}


def integers(shape):
    return hnp.arrays(np.int32, shape, elements=st.integers(-12, 12))


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_any_finite_weights_are_numbers_shaped_like_them(name, strict):
    signs = np.sign(KERNEL)
    values = [0 * signs, 1e-41 * signs, 3e38 * signs, 2.5 + 0 * signs, 3e38 + 0 * signs]
    shapes = [np.ones((1, 1)), np.ones((0, 3))]
    for w in [jnp.asarray(x, jnp.float32) for x in [*values, *shapes]]:
        found = SCORES[name](w)
        assert found.shape == w.shape
        assert found.dtype == jnp.float32
        assert not jnp.isnan(found).any()


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_the_same_under_jit_and_those_of_float32_for_narrower_weights(name):
    for w in (jnp.asarray(KERNEL, jnp.bfloat16), jnp.asarray(KERNEL, jnp.float16)):
        exact = w.astype(jnp.float32)
        chex.assert_trees_all_equal(SCORES[name](w), SCORES[name](exact))
    np.testing.assert_array_equal(jax.jit(SCORES[name])(exact), SCORES[name](exact))


def test_scores_lower_for_cpu_cuda_and_tpu():
    run = jax.jit(lambda w: [score(w) for score in SCORES.values()])
    platforms = ("cpu", "cuda", "tpu")
    assert jax.export.export(run, platforms=platforms)(jnp.asarray(KERNEL))


# deviations


@drawn(hnp.arrays(np.float32, (6, 3), elements=st.floats(-8, 8, width=16)))
def test_weights_are_counted_in_standard_deviations(w):
    found = deviations(jnp.asarray(w))
    if np.ptp(w):
        np.testing.assert_allclose(found, np.abs(w) / w.std(dtype=float), rtol=1e-5)
    else:
        np.testing.assert_array_equal(found, np.where(w, np.inf, 0))


def test_deviations_do_not_depend_on_the_scale_even_at_the_ends_of_float32():
    for power in (-120, -3, 1, 124):  # the largest is 2.3 times a power of 2
        np.testing.assert_array_equal(
            deviations(jnp.asarray(KERNEL * np.float32(2.0) ** power)),
            deviations(jnp.asarray(KERNEL)),
        )


def test_one_number_of_deviations_for_all_leaves_meets_a_total_exactly():
    params = {"a": jnp.asarray(KERNEL), "b": 1e20 * jnp.asarray(KERNEL[:5] ** 3)}
    found = masks(params, 0.4, score=deviations, budget=global_budget)
    kept, gone = [], []
    for name, w in params.items():
        w = np.asarray(w)
        score = np.abs(w) / w.std(dtype=np.float64)
        kept += list(score[found[name]])
        gone += list(score[~found[name]])
    assert len(gone) == round(0.4 * 33)
    assert max(gone) < min(kept)


# random_units


def test_all_weights_of_a_unit_get_one_draw_of_its_own():
    tree = {"a": jnp.asarray(KERNEL), "b": jnp.ones((6, 3))}
    for axis in (0, 1):
        found = random_units(jax.random.key(1), axis)(tree)
        lanes = np.concatenate([np.moveaxis(x, axis, 0) for x in found.values()])
        np.testing.assert_array_equal(lanes, np.broadcast_to(lanes[:, :1], lanes.shape))
        assert len(set(lanes[:, 0])) == len(lanes)
        assert lanes.min() >= 0 and lanes.max() < 1
    again = random_units(jax.random.key(1), 1)({"a": jnp.zeros((6, 3)), "b": tree["b"]})
    chex.assert_trees_all_equal(found, again)  # apart from the weights


# unit_entropy


def entropy_reference(w, bins):
    """By exact integers; one score for each column."""
    found = []
    for column in w.T.astype(int):
        least, span = column.min(), max(np.ptp(column), 1)
        place = np.minimum((column - least) * bins // span, bins - 1)
        part = np.unique(place, return_counts=True)[1] / len(column)
        found.append(-np.sum(part * np.log(part)))
    return np.array(found)


@drawn(integers((6, 3)), st.sampled_from([4, 49]))
def test_entropy_is_that_of_the_histogram_of_each_unit(w, bins):
    found = unit_entropy(bins)(jnp.asarray(w, jnp.float32))
    expected = np.broadcast_to(entropy_reference(w, bins), (6, 3))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.all(np.asarray(found)[:, np.ptp(w, axis=0) == 0] == 0)


def test_entropy_agrees_with_numpy_histograms_along_any_axis():
    w = np.random.default_rng(1).normal(size=(5, 4, 30)).astype(np.float32)
    found = unit_entropy(axis=1)(jnp.asarray(w))
    for i in range(4):
        part = np.histogram(w[:, i], 32)[0] / 150
        part = part[part > 0]
        expected = -np.sum(part * np.log(part))
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-6)


@drawn(integers((6, 3)), st.integers(1, 9), st.integers(-99, 99), st.integers(-90, 90))
def test_entropy_stays_when_a_unit_is_scaled_and_moved(w, scale, shift, power):
    score = unit_entropy(bins=4)
    expected = score(jnp.asarray(w, jnp.float32))
    moved = (scale * w + shift) * np.float32(2.0) ** power
    np.testing.assert_array_equal(score(jnp.asarray(moved, jnp.float32)), expected)


def test_the_entropy_of_two_halves_is_log_two_and_of_a_dead_unit_nothing():
    w = jnp.array([[0.0, 1e37, 7.0], [0.0, -1e37, 7.0]])
    np.testing.assert_allclose(unit_entropy()(w)[0], [0, np.log(2), 0], rtol=1e-6)


@pytest.mark.parametrize("bins", [1, 1025])
def test_a_histogram_needs_bins(bins):
    text = f"unit_entropy needs 2 <= bins <= 1024, got {bins}."
    with pytest.raises(ValueError, match=re.escape(text)):
        unit_entropy(bins)


# unit_density


@drawn(hnp.arrays(np.float32, (6, 3), elements=st.sampled_from([0, 1])))
def test_density_is_the_fraction_that_numpy_counts(w):
    w *= -1  # of -0.0
    expected = np.float32(np.count_nonzero(w, axis=0)) / np.float32(6)
    found = unit_density()(jnp.asarray(w))
    np.testing.assert_array_equal(found, np.broadcast_to(expected, (6, 3)))


def test_unit_scores_name_the_leaf_that_lacks_the_axis_or_is_not_finite():
    for name in ("random_units", "unit_entropy", "unit_density"):
        text = f"{name} needs an array that has axis -1, got float32[]. Pass another"
        with pytest.raises(ValueError, match=re.escape(text) + r".*\(leaf 'scale'\)"):
            SCORES[name]({"scale": jnp.ones(())})
        text = f"{name} needs finite values, but leaf 'a' float32[2] holds nan at index"
        with pytest.raises(ValueError, match=re.escape(text)):
            SCORES[name]({"a": jnp.array([1.0, jnp.nan])})


# gradients and mean_squares

X = np.random.default_rng(2).normal(size=(6, 4)).astype(np.float32)
Y = np.random.default_rng(3).normal(size=(6, 3)).astype(np.float32)
W = np.random.default_rng(4).normal(size=(4, 3)).astype(np.float32) * (X[:4, :3] > 0)


def squared(params, batch):
    x, y = batch
    return jnp.sum((x @ jc.densify(params)["kernel"] - y) ** 2)


def slope(x, y):
    return 2 * x.T @ (x @ W - y)


def test_gradients_see_weights_that_are_zero():
    found = gradients(lambda p: squared(p, (X, Y)), {"kernel": jnp.asarray(W), "n": 3})
    np.testing.assert_allclose(found["kernel"], np.abs(slope(X, Y)), rtol=1e-5)
    assert (W == 0).any() and found["kernel"].all()
    assert found["n"] == 0


def test_gradients_need_a_loss_that_is_one_number():
    text = "gradients needs loss(params) to return one floating number, float[], got"
    with pytest.raises(TypeError, match=re.escape(text)):
        gradients(lambda p: p, jnp.ones(3))


@pytest.mark.parametrize(("score", "factor"), [(gradients, 1), (saliency, W)])
def test_squares_are_averaged_over_batches_that_are_streamed(score, factor):
    traces = []

    def loss(params, batch):
        traces.append(batch[0].shape)
        return squared(params, batch)

    cuts = [(0, 2), (2, 4), (4, 5), (5, 6)]
    batches = ((X[a:b], Y[a:b]) for a, b in cuts)
    found = mean_squares(score, loss, {"kernel": jnp.asarray(W)}, batches)["kernel"]
    expected = [np.square(factor * slope(X[a:b], Y[a:b])) for a, b in cuts]
    np.testing.assert_allclose(found, np.mean(expected, axis=0), rtol=1e-4)
    assert traces == [(2, 4), (1, 4)]


def test_squares_take_nodes_as_arrays_and_leave_functions_alone():
    node = jc.quantize(jnp.asarray(W))
    params = {"kernel": node, "activation": jax.nn.relu}
    found = mean_squares(gradients, squared, params, [(X, Y)])
    dense = mean_squares(gradients, squared, {"kernel": node.dense()}, [(X, Y)])
    np.testing.assert_array_equal(found["kernel"], dense["kernel"])
    assert found["activation"] == 0


def test_mean_squares_needs_a_batch():
    text = "mean_squares needs one batch at least, got none. An iterator that was read"
    with pytest.raises(ValueError, match=re.escape(text)):
        mean_squares(gradients, squared, {"kernel": jnp.asarray(W)}, iter(()))


# moved_from


def test_weights_are_compared_with_those_of_their_path():
    start = {"a": {"kernel": jnp.array([[1.0, -2.0, 3.0, 4.0]]), "bias": jnp.ones(1)}}
    params = {"a": {"kernel": jnp.array([[1.5, 2.0, 3.0, 3.0]]), "bias": jnp.zeros(1)}}
    assert moved_from(start)(params)["a"]["kernel"].tolist() == [[0.5, 4, 0, 1]]
    names = {"a/kernel": params["a"]["kernel"]}  # as `masks` asks a score
    assert moved_from(start)(names)["a/kernel"].tolist() == [[0.5, 4, 0, 1]]


def test_a_start_may_be_compressed():
    start = {"kernel": jc.quantize(jnp.asarray(W))}
    found = moved_from(start)({"kernel": jnp.asarray(W)})["kernel"]
    np.testing.assert_array_equal(found, np.abs(W - start["kernel"].dense()))


def test_a_start_of_other_leaves_or_shapes_is_an_error():
    text = "moved_from needs a start shaped like the params: given needs a score for "
    with pytest.raises(ValueError, match=re.escape(text) + "leaf 'b', got scores for"):
        moved_from({"a": jnp.ones(3)})({"b": jnp.ones(3)})
    text = "of shape [3] for leaf 'a', got float32[2]"
    with pytest.raises(ValueError, match=re.escape(text)):
        moved_from({"a": jnp.ones(2)})({"a": jnp.ones(3)})
