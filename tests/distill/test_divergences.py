"""Divergences: definitions, directions, limits, bounds, padding and edges."""

import math
from functools import cache, partial

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
from jaxcomp.distill.losses.divergences import (
    jensen_shannon_loss,
    reverse_kl_loss,
    skewed_kl_loss,
)


LOGITS = hnp.arrays(np.float32, (3, 5), elements=st.floats(-20, 20, width=32))
TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0])
FRACTIONS = st.sampled_from([0.01, 0.1, 0.5, 0.9])
LOSSES = {
    "reverse": jax.jit(reverse_kl_loss),
    "jensen_shannon": jax.jit(jensen_shannon_loss),
    "skewed": jax.jit(skewed_kl_loss),
    "skewed, 0": jax.jit(partial(skewed_kl_loss, skew=0.0)),
}
EACH = pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))


@cache
def graded(loss):
    """(student, teacher, mask) -> ((sum, losses), gradient), at temperature 2."""

    def total(student, teacher, mask=True):
        losses = loss(student, teacher, 2.0, mask=jnp.full(student.shape[:-1], mask))
        return losses.sum(), losses

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def kl(p, q):
    return np.sum(scipy.special.kl_div(p, q), axis=-1)


def predictions(student, teacher, temperature):
    """The student's and the teacher's, in float64."""
    return [
        scipy.special.softmax(np.float64(x) / temperature, axis=-1)
        for x in (student, teacher)
    ]


@jax.jit
def all_losses(student, teacher, temperature, fraction):
    return (
        jc.soft_target_loss(student, teacher, temperature),
        reverse_kl_loss(student, teacher, temperature),
        jensen_shannon_loss(student, teacher, temperature, fraction),
        skewed_kl_loss(student, teacher, temperature, fraction),
        skewed_kl_loss(teacher, student, temperature, fraction),
    )


@given(LOGITS, LOGITS, TEMPERATURES, FRACTIONS)
def test_they_are_their_definitions_in_float64(student, teacher, temperature, fraction):
    q, p = predictions(student, teacher, temperature)
    mixture = fraction * p + (1 - fraction) * q
    expected = (
        kl(p, q),
        kl(q, p),
        fraction * kl(p, mixture) + (1 - fraction) * kl(q, mixture),
        kl(p, mixture),
        kl(q, fraction * q + (1 - fraction) * p),
    )
    found = all_losses(student, teacher, temperature, fraction)
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.shape == (3,)
        np.testing.assert_allclose(ours / temperature**2, wanted, rtol=1e-4, atol=1e-5)


def test_two_classes_by_hand():
    # The teacher says 3/4, 1/4, the student 1/2, 1/2, and the mixture 5/8, 3/8.
    student, teacher = jnp.zeros(2), jnp.array([math.log(3), 0.0])
    forward = 0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3)
    backward = 0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)
    found = jensen_shannon_loss(student, teacher)
    np.testing.assert_allclose(found, (forward + backward) / 2, rtol=1e-5)
    found = skewed_kl_loss(student, teacher, skew=0.5)
    np.testing.assert_allclose(found, forward, rtol=1e-5)
    found = reverse_kl_loss(student, teacher)
    np.testing.assert_allclose(found, 0.5 * math.log(4 / 3), rtol=1e-5)


@EACH
def test_twice_the_logits_at_twice_the_temperature_cost_four_times_as_much(loss):
    student, teacher = np.random.default_rng(0).normal(size=(2, 3, 5))
    hot = loss(2 * student, 2 * teacher, 2.0)
    np.testing.assert_allclose(hot, 4 * loss(student, teacher, 1.0), rtol=1e-4)


@given(LOGITS, LOGITS)
def test_reverse_is_forward_with_the_two_exchanged(student, teacher):
    forward, reverse = all_losses(student, teacher, 2.0, 0.5)[:2]
    swapped, back = all_losses(teacher, student, 2.0, 0.5)[:2]
    # Two ways to one number, exact to what float32 leaves of logits of this size.
    np.testing.assert_allclose(reverse, swapped, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(forward, back, rtol=1e-4, atol=1e-4)


@given(LOGITS, LOGITS)
def test_jensen_shannon_is_symmetric_and_at_most_log_2(student, teacher):
    loss = all_losses(student, teacher, 1.0, 0.5)[2]
    swapped = all_losses(teacher, student, 1.0, 0.5)[2]
    np.testing.assert_allclose(loss, swapped, rtol=1e-5, atol=1e-6)
    assert np.all(loss <= math.log(2) * (1 + 1e-6))
    assert np.all(loss >= -1e-6)


@given(LOGITS, LOGITS, FRACTIONS)
def test_a_skew_bounds_the_loss(student, teacher, skew):
    loss = all_losses(student, teacher, 1.0, skew)[3]
    assert np.all(loss <= -math.log(skew) + 1e-5)


def test_jensen_shannon_tends_to_forward_and_reverse_at_its_ends():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 3, 5)).astype(np.float32)
    forward, reverse = all_losses(student, teacher, 2.0, 0.5)[:2]
    near_0 = jensen_shannon_loss(student, teacher, 2.0, 1e-3) / 1e-3
    near_1 = jensen_shannon_loss(student, teacher, 2.0, 1 - 1e-3) / 1e-3
    np.testing.assert_allclose(near_0, forward, rtol=1e-2)
    np.testing.assert_allclose(near_1, reverse, rtol=1e-2)
    assert np.all(np.abs(near_0 - reverse) > 0.02 * reverse)  # they are not the same


@given(LOGITS, LOGITS)
def test_without_a_skew_it_is_the_forward_divergence(student, teacher):
    forward = all_losses(student, teacher, 2.0, 0.5)[0]
    found = unskewed(student, teacher)
    np.testing.assert_allclose(found, forward, rtol=1e-4, atol=1e-4)


unskewed = jax.jit(lambda s, t: skewed_kl_loss(s, t, 2.0, 0.0))


@EACH
def test_equal_logits_cost_nothing_and_pull_nowhere(loss):
    logits = np.random.default_rng(2).normal(scale=10, size=(3, 5)).astype(np.float32)
    (_, losses), grad = graded(loss)(logits, logits, np.ones(3, bool))
    np.testing.assert_array_equal(losses, 0)
    np.testing.assert_allclose(grad, 0, atol=1e-5)


@EACH
def test_gradients_are_those_of_finite_differences(loss):
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, 3, 5)).astype(np.float32)
    step = 1e-2
    _, grad = graded(loss)(student, teacher, np.ones(3, bool))
    for i, j in np.ndindex(2, 5):
        shift = np.zeros_like(student)
        shift[i, j] = step
        up, down = (
            graded(loss)(x, teacher, np.ones(3, bool))[0][1][i]
            for x in (student + shift, student - shift)
        )
        np.testing.assert_allclose(
            grad[i, j], (up - down) / (2 * step), rtol=1e-2, atol=2e-4
        )


@EACH
@pytest.mark.parametrize("padding", [np.nan, np.inf, -np.inf])
def test_padding_never_leaks(loss, padding):
    rng = np.random.default_rng(4)
    student, teacher = rng.normal(size=(2, 3, 5)).astype(np.float32)
    mask = np.array([True, False, True])
    bad = [np.where(mask[:, None], x, np.float32(padding)) for x in (student, teacher)]
    (_, found), grad = graded(loss)(*bad, mask)
    (_, alone), wanted = graded(loss)(student, teacher, np.ones(3, bool))
    np.testing.assert_array_equal(found, np.where(mask, alone, 0))
    np.testing.assert_array_equal(grad, np.where(mask[:, None], wanted, 0))


@EACH
def test_narrow_logits_are_computed_in_float32(loss, strict):
    rng = np.random.default_rng(5)
    student, teacher = jnp.asarray(rng.normal(size=(2, 4, 50)), jnp.bfloat16)
    value = loss(student, teacher, 2.0)
    assert value.dtype == jnp.float32
    wide = loss(student.astype(jnp.float32), teacher.astype(jnp.float32), 2.0)
    np.testing.assert_array_equal(value, wide)
    grad = jax.eval_shape(jax.grad(lambda s: loss(s, teacher, 2.0).sum()), student)
    assert grad.dtype == jnp.bfloat16


RULED_OUT = np.float32([1.0, -np.inf, 0.5])
SOME = np.float32([0.3, 0.4, 1.0])


@EACH
def test_classes_that_both_rule_out_are_as_if_they_were_not_there(loss):
    teacher = np.float32([0.3, -np.inf, 1.0])
    there = np.array([0, 2])
    (value, _), grad = graded(loss)(RULED_OUT, teacher)
    (alone, _), wanted = graded(loss)(RULED_OUT[there], teacher[there])
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    np.testing.assert_allclose(grad[there], wanted, rtol=1e-5, atol=1e-7)
    assert grad[1] == 0


@EACH
def test_what_the_teacher_rules_out_the_student_is_to_rule_out(loss):
    _, grad = graded(loss)(np.float32([1.0, 2.0, 0.5]), RULED_OUT)
    chex.assert_tree_all_finite(grad)
    assert grad[1] > 0
    assert grad[0] < 0


@EACH
def test_what_the_student_rules_out_gives_no_nan(loss):
    (value, _), grad = graded(loss)(RULED_OUT, SOME)
    assert value > 0
    chex.assert_tree_all_finite(grad)


@pytest.mark.parametrize(
    ("name", "infinite"),
    [
        ("reverse", "teacher"),
        ("jensen_shannon", None),
        ("skewed", None),
        ("skewed, 0", "student"),
    ],
)
def test_only_what_has_no_mixture_costs_infinitely(name, infinite):
    loss = graded(LOSSES[name])
    assert np.isinf(loss(SOME, RULED_OUT)[0][0]) == (infinite == "teacher")
    assert np.isinf(loss(RULED_OUT, SOME)[0][0]) == (infinite == "student")


@EACH
def test_logits_far_apart_and_a_single_class_stay_finite(loss):
    student = np.float32([3e4, -3e4, 0.0])
    (value, _), grad = graded(loss)(student, student[::-1])
    assert 0 < value <= 2.4e5
    chex.assert_tree_all_finite(grad)
    assert loss(np.ones(1), np.zeros(1)) == 0


def test_fractions_and_temperatures_may_be_traced(strict):
    student, teacher = jnp.array([[1.0, 0.0], [0.5, -1.0]])
    for loss in (jensen_shannon_loss, skewed_kl_loss):
        traced = jax.jit(loss)(student, teacher, jnp.float32(3.0), jnp.float32(0.3))
        np.testing.assert_allclose(traced, loss(student, teacher, 3.0, 0.3), rtol=1e-4)


@EACH
def test_a_step_takes_each_for_its_soft_loss(loss):
    total = jc.distill_loss(
        lambda params, x: x, lambda params, x: 2 * x, hard=0.0, soft=loss
    )
    x = jnp.asarray(np.random.default_rng(6).normal(size=(4, 3)), jnp.float32)
    mask = jnp.array([True, True, False, True])
    value, _ = total({}, {}, (x, None, mask))
    wanted = loss(x[mask], 2 * x[mask], 2.0).mean()
    np.testing.assert_allclose(value, wanted, rtol=1e-5)


def test_they_lower_for_every_platform():
    logits = jnp.zeros((2, 3))
    platforms = ("cpu", "cuda", "tpu")
    grad = jax.jit(
        jax.grad(lambda s, t: sum(f(s, t, 1.0).sum() for f in LOSSES.values()))
    )
    exported = jax.export.export(grad, platforms=platforms)(logits, logits)
    assert exported.platforms == platforms


@pytest.mark.parametrize("beta", [0, 1.0, -0.1, math.nan])
def test_a_share_of_the_mixture_out_of_range_is_an_error(beta):
    with pytest.raises(ValueError, match="needs 0 < beta < 1, got .*limits take"):
        jensen_shannon_loss(jnp.zeros(2), jnp.zeros(2), 1.0, beta)


@pytest.mark.parametrize("skew", [1, -0.1, math.nan])
def test_a_skew_out_of_range_is_an_error(skew):
    with pytest.raises(ValueError, match="skewed_kl_loss needs 0 <= skew < 1, got"):
        skewed_kl_loss(jnp.zeros(2), jnp.zeros(2), 1.0, skew)


@pytest.mark.parametrize("loss", [reverse_kl_loss, jensen_shannon_loss, skewed_kl_loss])
def test_errors_carry_the_name_of_the_loss(loss):
    x, name = jnp.zeros((4, 2)), loss.__name__
    with pytest.raises(ValueError, match=rf"{name} needs logits of one shape, got"):
        loss(x, x[:3])
    with pytest.raises(ValueError, match=f"{name} needs temperature > 0, got 0"):
        loss(x, x, 0)
    with pytest.raises(TypeError, match=f"{name} needs a mask of bools"):
        loss(x, x, mask=jnp.ones(4))
    with pytest.raises(ValueError, match=f"{name} needs a mask with one value"):
        loss(x, x, mask=jnp.ones(3, bool))
