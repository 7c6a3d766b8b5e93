"""Soft targets and logits themselves: definitions, limits, padding and edges."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.distill.losses.logits import logit_mse_loss


LOGITS = hnp.arrays(np.float32, (3, 5), elements=st.floats(-30, 30, width=32))
TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0])

soft_target_loss = jax.jit(jc.soft_target_loss, static_argnums=2)


def reference(student, teacher, temperature):
    ours = scipy.special.log_softmax(np.float64(student) / temperature, axis=-1)
    theirs = scipy.special.log_softmax(np.float64(teacher) / temperature, axis=-1)
    return temperature**2 * np.sum(
        scipy.special.kl_div(np.exp(theirs), np.exp(ours)), axis=-1
    )


def test_two_classes_by_hand():
    # At T = 2 the teacher says 3/4, 1/4 and the student 1/2, 1/2.
    teacher = jnp.array([2 * math.log(3), 0.0])
    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    np.testing.assert_allclose(
        jc.soft_target_loss(jnp.zeros(2), teacher, temperature=2.0), expected, rtol=1e-6
    )


@given(LOGITS, LOGITS, TEMPERATURES)
def test_is_the_definition_in_float64(student, teacher, temperature):
    loss = soft_target_loss(student, teacher, temperature)
    expected = reference(student, teacher, temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=2e-5 * temperature**2)
    assert np.all(loss >= -2e-5 * temperature**2)


@given(LOGITS, TEMPERATURES)
def test_equal_logits_cost_nothing(logits, temperature):
    np.testing.assert_array_equal(soft_target_loss(logits, logits, temperature), 0)


@given(LOGITS, LOGITS, st.floats(-100, 100, width=32))
def test_a_constant_on_all_logits_changes_nothing(student, teacher, shift):
    plain = soft_target_loss(student, teacher, 2.0)
    for pair in ((student + shift, teacher), (student, teacher + shift)):
        moved = soft_target_loss(*pair, 2.0)
        np.testing.assert_allclose(moved, plain, rtol=1e-3, atol=1e-3)


def test_the_gradient_is_that_of_softened_distributions():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5)).astype(np.float32)
    softmax = scipy.special.softmax
    for temperature in (0.5, 1.0, 4.0):
        grad = jax.grad(jc.soft_target_loss)(student, teacher, temperature)
        expected = temperature * (
            softmax(student / temperature) - softmax(teacher / temperature)
        )
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)


def test_at_high_temperature_the_gradient_matches_centred_logits():
    # Hinton et al., eq. 4, where the logits have zero mean.
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 8)).astype(np.float32)
    difference = (student - student.mean()) - (teacher - teacher.mean())
    grad = jax.grad(jc.soft_target_loss)(student, teacher, 1000.0)
    np.testing.assert_allclose(grad, difference / 8, atol=1e-3)


@pytest.mark.parametrize("seed", [1, 2])
def test_at_high_temperature_it_is_half_the_squared_error_of_centred_logits(seed):
    student, teacher = np.random.default_rng(seed).normal(size=(2, 8))
    ours, theirs = (np.float32(x - x.mean()) for x in (student, teacher))
    found = jax.value_and_grad(jc.soft_target_loss)(ours + 3, theirs, 200.0)
    value, grad = jax.value_and_grad(logit_mse_loss)(ours, theirs)
    np.testing.assert_allclose(found[0], value / 2, rtol=2e-2)
    np.testing.assert_allclose(found[1], grad / 2, rtol=2e-2, atol=2e-3)


def measured(loss):
    def total(student, teacher, mask):
        losses = loss(student, teacher, 2.0, mask=mask)
        return losses.sum(), losses

    return jax.jit(jax.value_and_grad(total, has_aux=True))


MEASURED = {loss: measured(loss) for loss in (jc.soft_target_loss, logit_mse_loss)}


@given(
    LOGITS,
    LOGITS,
    hnp.arrays(bool, 3),
    st.sampled_from([np.nan, np.inf, -np.inf]),
    st.sampled_from([jc.soft_target_loss, logit_mse_loss]),
)
def test_padding_never_leaks(student, teacher, mask, padding, loss):
    bad = [np.where(mask[:, None], x, np.float32(padding)) for x in (student, teacher)]
    (_, found), grad = MEASURED[loss](*bad, mask)
    (_, alone), wanted = MEASURED[loss](student, teacher, np.ones(3, bool))
    np.testing.assert_array_equal(found[~mask], 0)
    np.testing.assert_array_equal(grad[~mask], 0)
    np.testing.assert_allclose(found[mask], alone[mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad[mask], wanted[mask], rtol=1e-5, atol=1e-5)


def test_tokens_are_masked_one_by_one():
    rng = np.random.default_rng(4)
    student, teacher = rng.normal(size=(2, 2, 3, 5)).astype(np.float32)
    mask = np.array([[True, False, True], [False, True, True]])
    loss = jc.soft_target_loss(student, teacher, mask=mask)
    whole = jc.soft_target_loss(student, teacher)
    np.testing.assert_array_equal(loss, np.where(mask, whole, 0))


def test_the_squared_error_of_logits_by_hand():
    student, teacher = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[0.0, 4.0]] * 2)
    np.testing.assert_array_equal(logit_mse_loss(student, teacher), [2.5, 8.0])
    np.testing.assert_array_equal(logit_mse_loss(student, teacher, 7.0), [2.5, 8.0])
    np.testing.assert_array_equal(logit_mse_loss(teacher, teacher), 0)


def test_the_squared_error_leaves_out_classes_that_both_rule_out():
    student = jnp.array([1.0, -jnp.inf, 0.5])
    teacher = jnp.array([0.0, -jnp.inf, 0.5])
    loss, grad = jax.value_and_grad(logit_mse_loss)(student, teacher)
    assert loss == 0.5
    np.testing.assert_array_equal(grad, [1, 0, 0])
    assert logit_mse_loss(student, jnp.zeros(3)) == jnp.inf


def test_the_squared_error_of_narrow_logits_is_computed_in_float32(strict):
    rng = np.random.default_rng(5)
    student, teacher = jnp.asarray(rng.normal(size=(2, 4, 50)), jnp.bfloat16)
    loss = jax.jit(logit_mse_loss)(student, teacher)
    wanted = np.mean((np.float64(student) - np.float64(teacher)) ** 2, axis=-1)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    grad = jax.eval_shape(jax.grad(logit_mse_loss), student[0], teacher[0])
    assert grad.dtype == jnp.bfloat16


def test_classes_are_the_last_axis_and_examples_do_not_mix():
    rng = np.random.default_rng(2)
    student, teacher = rng.normal(size=(2, 2, 3, 5)).astype(np.float32)
    loss = jc.soft_target_loss(student, teacher)
    assert loss.shape == (2, 3)
    alone = jax.vmap(jax.vmap(jc.soft_target_loss))(student, teacher)
    np.testing.assert_allclose(loss, alone, rtol=1e-6)
    assert jc.soft_target_loss(student[0, 0], teacher[0, 0]).shape == ()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_narrow_logits_are_computed_in_float32(name):
    rng = np.random.default_rng(3)
    student, teacher = jnp.asarray(rng.normal(size=(2, 4, 50)), name)
    loss = soft_target_loss(student, teacher, 2.0)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(
        loss, reference(student.astype(float), teacher.astype(float), 2.0), rtol=1e-4
    )
    grad = jax.eval_shape(jax.grad(jc.soft_target_loss), student[0], teacher[0])
    assert grad.dtype == jnp.dtype(name)


def test_a_class_that_the_teacher_rules_out_weighs_nothing():
    student = jnp.array([1.0, 2.0, 0.5])
    teacher = jnp.array([0.3, -jnp.inf, 1.0])
    expected = reference(student, [0.3, -1e9, 1.0], 2.0)
    loss, grad = jax.value_and_grad(jc.soft_target_loss)(student, teacher)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    chex.assert_tree_all_finite(grad)
    assert grad[1] > 0  # the student is to rule it out as well


def test_classes_that_both_rule_out_are_as_if_they_were_not_there():
    student = jnp.array([1.0, -jnp.inf, 0.5])
    teacher = jnp.array([0.3, -jnp.inf, 1.0])
    loss, grad = jax.value_and_grad(jc.soft_target_loss)(student, teacher)
    there = jnp.array([0, 2])
    np.testing.assert_allclose(
        loss, jc.soft_target_loss(student[there], teacher[there]), rtol=1e-6
    )
    chex.assert_tree_all_finite(grad)
    assert grad[1] == 0


def test_a_student_that_rules_out_what_the_teacher_does_not_costs_infinitely():
    assert jc.soft_target_loss(jnp.array([0.0, -jnp.inf]), jnp.zeros(2)) == jnp.inf


def test_logits_far_apart_stay_finite():
    loss, grad = jax.value_and_grad(jc.soft_target_loss)(
        jnp.array([3e4, -3e4]), jnp.array([-3e4, 3e4]), 1.0
    )
    np.testing.assert_allclose(loss, 6e4, rtol=1e-6)
    np.testing.assert_allclose(grad, [1.0, -1.0])


def test_the_temperature_may_be_traced(strict):
    student, teacher = jnp.array([[1.0, 0.0], [0.5, -1.0]])
    loss = jax.jit(jc.soft_target_loss)(student, teacher, jnp.float32(3.0))
    np.testing.assert_allclose(loss, reference(student, teacher, 3.0), rtol=1e-5)


def test_lowers_for_every_platform():
    logits = jnp.zeros((2, 3))
    platforms = ("cpu", "cuda", "tpu")
    grad = jax.jit(jax.grad(lambda s, t: jc.soft_target_loss(s, t).sum()))
    exported = jax.export.export(grad, platforms=platforms)(logits, logits)
    assert exported.platforms == platforms


def test_logits_of_two_shapes_are_an_error_that_shows_them():
    for loss in (jc.soft_target_loss, logit_mse_loss):
        with pytest.raises(
            ValueError,
            match=r"one shape, got student float32\[2\] and teacher float32\[3\]",
        ):
            loss(jnp.zeros(2), jnp.zeros(3))


def test_a_mask_of_numbers_is_an_error():
    logits = jnp.zeros((4, 2))
    with pytest.raises(
        TypeError, match=r"soft_target_loss needs a mask of bools.*got float32\[4\]"
    ):
        jc.soft_target_loss(logits, logits, mask=jnp.ones(4))


def test_a_mask_of_another_shape_is_an_error_that_shows_both():
    logits = jnp.zeros((4, 2))
    with pytest.raises(
        ValueError,
        match=r"logit_mse_loss needs a mask with one value per example, bool\[4\], "
        r"for logits float32\[4, 2\], got bool\[4, 2\]",
    ):
        logit_mse_loss(logits, logits, mask=jnp.ones((4, 2), bool))


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, np.float32(0)])
def test_a_temperature_that_is_not_positive_is_an_error(temperature):
    with pytest.raises(ValueError, match="soft_target_loss needs temperature > 0, got"):
        jc.soft_target_loss(jnp.zeros(2), jnp.zeros(2), temperature)
    with pytest.raises(ValueError, match="logit_mse_loss needs temperature > 0, got"):
        logit_mse_loss(jnp.zeros(2), jnp.zeros(2), temperature)
