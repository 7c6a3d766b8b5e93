"""The two correlation losses: definitions, invariance, padding and edges."""

import math
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

import jaxcomp as jc
from jaxcomp.distill.losses import correlation


VALUES = hnp.arrays(np.float32, (4, 5), elements=st.floats(-5, 5, width=32))
TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0])

correlation_loss = jax.jit(correlation.correlation_loss)
class_correlation_loss = jax.jit(correlation.class_correlation_loss)
EACH = pytest.mark.parametrize("loss", [correlation_loss, class_correlation_loss])


@cache
def graded(loss):
    """(student, teacher, mask) -> (sum of the losses, gradient), at temperature 2."""

    def total(student, teacher, mask=None):
        return loss(student, teacher, 2.0, mask=mask).sum()

    return jax.jit(jax.value_and_grad(total))


@jax.jit
def both_losses(student, teacher, temperature):
    return (
        correlation_loss(student, teacher, temperature),
        class_correlation_loss(student, teacher, temperature),
    )


def reference(student, teacher, temperature):
    """Row by row, NaN where a row or a column has no variance to speak of."""
    q, p = (
        scipy.special.softmax(np.float64(x) / temperature, axis=-1)
        for x in (student, teacher)
    )

    def uncorrelated(x, y):
        if min(x.std() / x.max(), y.std() / y.max()) < 1e-3:
            return np.nan  # float32 has no digits left for it
        return 1 - np.corrcoef(x, y)[0, 1]

    rows = [uncorrelated(*pair) for pair in zip(q, p, strict=True)]
    columns = [uncorrelated(*pair) for pair in zip(q.T, p.T, strict=True)]
    return [temperature**2 * np.array(x) for x in (rows, columns)]


@given(VALUES, VALUES, TEMPERATURES)
def test_they_are_their_definitions_in_float64(student, teacher, temperature):
    found = both_losses(student, teacher, temperature)
    for ours, wanted in zip(
        found, reference(student, teacher, temperature), strict=True
    ):
        assert not np.any(np.isnan(ours))
        assert np.all(ours >= 0)
        assert np.all(ours <= 2 * temperature**2 * (1 + 1e-5))
        known = ~np.isnan(wanted)
        np.testing.assert_allclose(
            ours[known], wanted[known], rtol=1e-3, atol=1e-3 * temperature**2
        )


def test_a_correlation_by_hand():
    # Deviations (1, 0, -1) / 4 and (-1, 1, 0) / 4, whose correlation is -1/2.
    student, teacher = jnp.log(jnp.array([[7.0, 4.0, 1.0], [1.0, 7.0, 4.0]]) / 12)
    found = correlation_loss(student, teacher)
    np.testing.assert_allclose(found, 1.5, rtol=1e-5)


def test_classes_are_compared_over_examples():
    # The student gives the first class 1/4, 1/2 and 3/4, the teacher 1/2, 1/4 and 3/4.
    ours, theirs = np.array([0.25, 0.5, 0.75]), np.array([0.5, 0.25, 0.75])
    student, teacher = (np.log(np.stack([x, 1 - x], axis=-1)) for x in (ours, theirs))
    found = class_correlation_loss(student, teacher)
    np.testing.assert_allclose(found, [0.5, 0.5], rtol=1e-5)


def test_a_student_that_is_an_affine_function_of_its_teacher_costs_nothing():
    p = np.random.default_rng(0).dirichlet(np.ones(5), size=6)
    q = 0.3 * p + 0.7 / 5
    for loss in both_losses(np.log(q), np.log(p), 1.0):
        np.testing.assert_allclose(loss, 0, atol=1e-6)


@EACH
def test_equal_logits_cost_nothing_and_pull_nowhere(loss):
    logits = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    value, grad = graded(loss)(logits, logits)
    np.testing.assert_allclose(value, 0, atol=1e-12)
    np.testing.assert_allclose(grad, 0, atol=1e-6)


@EACH
def test_gradients_are_those_of_finite_differences(loss):
    rng = np.random.default_rng(2)
    student, teacher = jnp.asarray(rng.normal(size=(2, 4, 5)), jnp.float32)
    check_grads(
        lambda s: loss(s, teacher, 2.0).sum(),
        (student,),
        order=1,
        modes=["rev"],
        eps=1e-2,
        rtol=1e-2,
    )


@EACH
def test_twice_the_logits_at_twice_the_temperature_cost_four_times_as_much(loss):
    student, teacher = np.random.default_rng(3).normal(size=(2, 4, 5))
    hot = loss(2 * student, 2 * teacher, 2.0)
    np.testing.assert_allclose(hot, 4 * loss(student, teacher, 1.0), rtol=1e-4)


@EACH
@pytest.mark.parametrize("padding", [np.nan, np.inf, -np.inf])
def test_padding_never_leaks(loss, padding):
    rng = np.random.default_rng(4)
    student, teacher = rng.normal(size=(2, 6, 5)).astype(np.float32)
    mask = np.array([False, True, True, False, True, True])
    bad = [np.where(mask[:, None], x, np.float32(padding)) for x in (student, teacher)]
    found = loss(*bad, 2.0, mask=mask)
    _, grad = graded(loss)(*bad, mask)
    alone = loss(student[mask], teacher[mask], 2.0)
    _, wanted = graded(loss)(student[mask], teacher[mask])
    if loss is correlation_loss:
        np.testing.assert_array_equal(found[~mask], 0)
        found = found[mask]
    np.testing.assert_array_equal(grad[~mask], 0)
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    np.testing.assert_allclose(grad[mask], wanted, rtol=1e-4, atol=1e-6)


@EACH
@pytest.mark.parametrize("size", [0, 1])
def test_a_mask_that_leaves_one_or_none_costs_nothing_across_examples(loss, size):
    student, teacher = np.random.default_rng(5).normal(size=(2, 6, 5))
    value, grad = graded(loss)(student, teacher, np.arange(6) < size)
    chex.assert_tree_all_finite((value, grad))
    assert (value == 0) == (loss is class_correlation_loss or size == 0)


@pytest.mark.parametrize("constant", [0.0, 3.7, -1e4])
def test_a_uniform_prediction_correlates_with_nothing(constant):
    flat, some = np.full(7, constant, np.float32), np.arange(7, dtype=np.float32)
    for pair, wanted in (((flat, some), 4), ((some, flat), 4), ((flat, flat), 0)):
        loss, grad = graded(correlation_loss)(*pair)
        np.testing.assert_allclose(loss, wanted, rtol=1e-6)
        np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_a_class_of_which_all_examples_say_the_same_correlates_with_nothing():
    logits = np.tile(np.float32([0.3, 1.0, -2.0]), (4, 1))
    some = np.random.default_rng(6).normal(size=(4, 3)).astype(np.float32)
    for pair, wanted in (((logits, some), 4), ((some, logits), 4), ((logits,) * 2, 0)):
        value, grad = graded(class_correlation_loss)(*pair)
        np.testing.assert_allclose(value / 3, wanted, rtol=1e-6)
        chex.assert_tree_all_finite(grad)


def test_small_probabilities_correlate_as_large_ones_do():
    # A sure teacher gives the other classes next to nothing, and an order among them.
    student, teacher = np.random.default_rng(7).normal(size=(2, 6))
    p, q = np.exp(teacher), np.exp(student)
    wanted = 1 - np.corrcoef(p, q)[0, 1]
    ours, theirs = (
        np.stack([x - 25, np.zeros(6)], axis=-1) for x in (student, teacher)
    )
    found = class_correlation_loss(ours, theirs)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_classes_that_both_rule_out_are_as_if_they_were_not_there():
    student = np.float32([1.0, -np.inf, 0.5, 2.0])
    teacher = np.float32([0.3, -np.inf, 1.0, 1.5])
    loss, grad = graded(correlation_loss)(student, teacher)
    there = np.array([0, 2, 3])
    alone, wanted = graded(correlation_loss)(student[there], teacher[there])
    np.testing.assert_allclose(loss, alone, rtol=1e-5)
    np.testing.assert_allclose(grad[there], wanted, rtol=1e-4, atol=1e-6)
    assert grad[1] == 0


@EACH
def test_logits_ruled_out_or_far_apart_give_no_nan(loss):
    student = jnp.array([[1.0, -jnp.inf, 0.5], [3e4, -3e4, 0.0], [0.0, 1.0, 2.0]])
    teacher = jnp.array([[1.0, 2.0, 0.5], [-3e4, 3e4, 0.0], [-jnp.inf, 0.0, 1.0]])
    for pair in ((student, teacher), (teacher, student)):
        value, grad = graded(loss)(*pair)
        assert jnp.isfinite(value)
        chex.assert_tree_all_finite(grad)


@EACH
def test_narrow_logits_are_computed_in_float32(loss, strict):
    rng = np.random.default_rng(8)
    student, teacher = jnp.asarray(rng.normal(size=(2, 4, 50)), jnp.bfloat16)
    value = loss(student, teacher, 2.0)
    assert value.dtype == jnp.float32
    wide = loss(student.astype(jnp.float32), teacher.astype(jnp.float32), 2.0)
    np.testing.assert_array_equal(value, wide)
    grad = jax.eval_shape(jax.grad(lambda s: loss(s, teacher).sum()), student)
    assert grad.dtype == jnp.bfloat16


def test_tokens_are_examples():
    student, teacher = np.random.default_rng(9).normal(size=(2, 2, 3, 5))
    assert correlation_loss(student, teacher).shape == (2, 3)
    mask = np.array([[True, False, True], [False, True, True]])
    found = class_correlation_loss(student, teacher, mask=mask)
    wanted = class_correlation_loss(student[mask], teacher[mask])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_step_takes_the_first_for_its_soft_loss_and_the_second_for_a_term():
    x = jnp.asarray(np.random.default_rng(10).normal(size=(4, 3)), jnp.float32)
    mask = jnp.array([True, True, False, True])

    def term(ours, theirs, batch):
        logits = ours.logits, theirs.logits
        return class_correlation_loss(*logits, 2.0, mask=batch.mask).mean()

    loss = jc.distill_loss(
        lambda params, x: x,
        lambda params, x: x**2,
        hard=0.0,
        soft=correlation_loss,
        terms={"classes": term},
    )
    value, measured = loss({}, {}, (x, None, mask))
    losses = both_losses(x[mask], x[mask] ** 2, 2.0)
    np.testing.assert_allclose(value, losses[0].mean() + losses[1].mean(), rtol=1e-4)
    np.testing.assert_allclose(measured.metrics["classes"], losses[1].mean(), rtol=1e-4)


def test_the_temperature_may_be_traced(strict):
    student, teacher = jnp.array([[1.0, 0.0, 2.0], [0.5, -1.0, 1.0]])
    loss = correlation_loss(student, teacher, jnp.float32(3.0))
    wanted = correlation.correlation_loss(student, teacher, 3.0)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_they_lower_for_every_platform():
    logits = jnp.zeros((2, 3))
    platforms = ("cpu", "cuda", "tpu")
    grad = jax.jit(jax.grad(lambda s, t: sum(x.sum() for x in both_losses(s, t, 2.0))))
    exported = jax.export.export(grad, platforms=platforms)(logits, logits)
    assert exported.platforms == platforms


@pytest.mark.parametrize(
    "loss", [correlation.correlation_loss, correlation.class_correlation_loss]
)
@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_errors_carry_the_name_of_the_loss(loss, temperature):
    x, name = jnp.zeros((4, 2)), loss.__name__
    with pytest.raises(ValueError, match=f"^{name} needs temperature > 0, got"):
        loss(x, x, temperature)
    with pytest.raises(ValueError, match=f"^{name} needs logits of one shape, got"):
        loss(x, x[:3])
    with pytest.raises(TypeError, match=f"^{name} needs a mask of bools"):
        loss(x, x, mask=jnp.ones(4))
    with pytest.raises(ValueError, match=f"^{name} needs a mask with one value"):
        loss(x, x, mask=jnp.ones(3, bool))
