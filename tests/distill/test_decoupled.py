"""The decoupled loss: its two parts, their sum, padding, labels and edges."""

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
from jax.test_util import check_grads

import jaxcomp as jc
from jaxcomp.distill import Outputs
from jaxcomp.distill.losses import decoupled


LOGITS = hnp.arrays(np.float32, (3, 5), elements=st.floats(-20, 20, width=32))
LABELS = hnp.arrays(np.int32, 3, elements=st.integers(0, 4))
TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0])

decoupled_loss = jax.jit(decoupled.decoupled_loss)


def reference(student, teacher, labels, temperature, alpha, beta):
    """Example by example, with the label taken out of the list."""
    losses = []
    for s, t, label in zip(student, teacher, labels, strict=True):
        q, p = (scipy.special.softmax(np.float64(x) / temperature) for x in (s, t))
        b, c = ([x[label], np.delete(x, label).sum()] for x in (p, q))
        q_rest, p_rest = (
            scipy.special.softmax(np.delete(np.float64(x), label) / temperature)
            for x in (s, t)
        )
        of_label = scipy.special.kl_div(b, c).sum()
        of_rest = scipy.special.kl_div(p_rest, q_rest).sum()
        losses.append(temperature**2 * (alpha * of_label + beta * of_rest))
    return np.array(losses)


@jax.jit
def both_losses(student, teacher, labels, temperature):
    p = jax.nn.softmax(teacher / temperature)
    of_label = jnp.take_along_axis(p, labels[:, None], axis=-1)[:, 0]
    return (
        decoupled_loss(student, teacher, labels, temperature),
        decoupled_loss(student, teacher, labels, temperature, beta=1 - of_label),
        jc.soft_target_loss(student, teacher, temperature),
    )


@given(LOGITS, LOGITS, LABELS, TEMPERATURES)
def test_is_the_definition_in_float64(student, teacher, labels, temperature):
    found, *_ = both_losses(student, teacher, labels, temperature)
    wanted = reference(student, teacher, labels, temperature, 1.0, 8.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-4 * temperature**2)


@given(LOGITS, LOGITS, LABELS, TEMPERATURES)
def test_with_the_weight_of_the_others_it_is_the_soft_target_loss(
    student, teacher, labels, temperature
):
    _, found, wanted = both_losses(student, teacher, labels, temperature)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * temperature**2)


def test_three_classes_by_hand():
    # The teacher says 1/2 for the label, and 2/3 to 1/3 of the rest; the student 1/3
    # of each. By halves they differ in the label, by thirds in the rest.
    teacher = jnp.log(jnp.array([3.0, 2.0, 1.0]) / 6)
    of_label = 0.5 * math.log(3 / 2) + 0.5 * math.log(3 / 4)
    of_rest = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    found = decoupled_loss(jnp.zeros(3), teacher, 0, 1.0, alpha=0.5, beta=2.0)
    np.testing.assert_allclose(found, 0.5 * of_label + 2 * of_rest, rtol=1e-5)


def make_batch(seed=0, shape=(4, 5)):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(scale=2, size=(2, *shape)).astype(np.float32)
    return student, teacher, rng.integers(0, shape[-1], shape[:-1])


def test_weights_may_be_one_per_example():
    student, teacher, labels = make_batch()
    alpha, beta = np.float32([[0, 1, 2, 3], [4, 0, 1, 2]])
    found = decoupled_loss(student, teacher, labels, alpha=alpha, beta=beta)
    wanted = reference(student, teacher, labels, 4.0, 1.0, 0.0) * alpha
    wanted += reference(student, teacher, labels, 4.0, 0.0, 1.0) * beta
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_equal_logits_cost_nothing_and_pull_nowhere():
    _, teacher, labels = make_batch()
    value, grad = jax.value_and_grad(
        lambda s: decoupled_loss(s, teacher, labels).sum()
    )(teacher)
    assert value == 0
    np.testing.assert_allclose(grad, 0, atol=1e-5)


def test_gradients_are_those_of_finite_differences():
    student, teacher, labels = make_batch()
    check_grads(
        lambda s: decoupled_loss(s, teacher, labels, 2.0).sum(),
        (jnp.asarray(student),),
        order=1,
        modes=["rev"],
        eps=1e-2,
        rtol=1e-2,
    )


@pytest.mark.parametrize("padding", [np.nan, np.inf, -np.inf])
def test_padding_never_leaks(padding):
    student, teacher, labels = make_batch()
    mask = np.array([True, False, True, False])
    bad = [np.where(mask[:, None], x, np.float32(padding)) for x in (student, teacher)]
    beta = np.where(mask, np.float32(2), np.nan)

    def loss(student):
        found = decoupled_loss(student, bad[1], labels, beta=beta, mask=mask)
        return found.sum(), found

    (_, found), grad = jax.value_and_grad(loss, has_aux=True)(bad[0])
    wanted = jax.grad(lambda s: decoupled_loss(s, teacher, labels, beta=2.0).sum())
    whole = decoupled_loss(student, teacher, labels, beta=2.0)
    np.testing.assert_array_equal(found[~mask], 0)
    np.testing.assert_array_equal(grad[~mask], 0)
    np.testing.assert_allclose(found[mask], whole[mask], rtol=1e-5)
    np.testing.assert_allclose(grad[mask], wanted(student)[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("label", [-1, -100, 5])
def test_an_example_without_a_label_costs_nothing(label):
    student, teacher, labels = make_batch()
    labels[1] = label
    found = decoupled_loss(student, teacher, labels)
    grad = jax.grad(lambda s: decoupled_loss(s, teacher, labels).sum())(student)
    np.testing.assert_array_equal(found == 0, [False, True, False, False])
    np.testing.assert_array_equal(grad[1], 0)


def test_tokens_have_labels_one_by_one(strict):
    student, teacher, labels = make_batch(1, (2, 3, 5))
    found = decoupled_loss(student, teacher, jnp.asarray(labels))
    alone = [decoupled_loss(*x) for x in zip(student, teacher, labels, strict=True)]
    np.testing.assert_allclose(found, jnp.stack(alone), rtol=1e-5)


def test_narrow_logits_are_computed_in_float32(strict):
    student, teacher, labels = make_batch(2, (4, 50))
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in (student, teacher))
    found = decoupled_loss(student, teacher, jnp.asarray(labels))
    wanted = reference(student, teacher, labels, 4.0, 1.0, 8.0)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    grad = jax.grad(lambda s: decoupled_loss(s, teacher, labels).sum())(student)
    assert grad.dtype == jnp.bfloat16


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([1.0, 2.0, 0.5], [1.0, -np.inf, 0.5]),
        ([1.0, -np.inf, 0.5], [1.0, 2.0, 0.5]),
        ([1.0, -np.inf, 0.5], [0.5, -np.inf, 1.0]),
        ([1.0, 2.0, 0.5], [1.0, -np.inf, -np.inf]),
        ([1.0, -np.inf, -np.inf], [1.0, -np.inf, -np.inf]),
        ([3e4, -3e4, 0.0], [-3e4, 3e4, 0.0]),
    ],
)
def test_classes_that_are_ruled_out_and_logits_far_apart_give_no_nan(
    student, teacher, label
):
    value, grad = jax.value_and_grad(decoupled_loss)(
        jnp.array(student), jnp.array(teacher), label
    )
    assert value >= 0
    chex.assert_tree_all_finite(grad)


def test_without_another_class_there_is_nothing_to_learn():
    loss, grad = jax.value_and_grad(decoupled_loss)(jnp.ones(1), jnp.zeros(1), 0)
    assert (loss, grad[0]) == (0, 0)


def test_two_classes_have_no_rest_to_tell_apart():
    student, teacher = np.random.default_rng(3).normal(size=(2, 4, 2))
    labels = np.array([0, 1, 1, 0])
    found = decoupled_loss(student, teacher, labels, 2.0, beta=100.0)
    np.testing.assert_allclose(
        found, jc.soft_target_loss(student, teacher, 2.0), rtol=1e-4
    )


def test_a_step_takes_it_for_a_term():
    student, teacher, labels = make_batch()
    mask = np.array([True, True, False, True])

    def term(ours, theirs, batch):
        return decoupled_loss(ours.logits, theirs.logits, batch.labels, mask=batch.mask)

    loss = jc.distill_loss(
        lambda params, x: Outputs(student),
        lambda params, x: Outputs(teacher),
        hard=1.0,
        soft=None,
        terms={"decoupled": term},
    )
    _, measured = loss({}, {}, (student, jnp.asarray(labels), jnp.asarray(mask)))
    wanted = reference(student, teacher, labels, 4.0, 1.0, 8.0)[mask].mean()
    np.testing.assert_allclose(measured.metrics["decoupled"], wanted, rtol=1e-4)


def test_it_lowers_for_every_platform():
    logits, labels = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)
    platforms = ("cpu", "cuda", "tpu")
    grad = jax.jit(jax.grad(lambda *args: decoupled_loss(*args).sum()))
    exported = jax.export.export(grad, platforms=platforms)(logits, logits, labels)
    assert exported.platforms == platforms


LOGITS_4 = jnp.zeros((4, 3))
LABELS_4 = jnp.zeros(4, jnp.int32)


def test_labels_that_are_no_integers_are_an_error():
    with pytest.raises(TypeError, match=r"labels that are integers, got float32\[4\]"):
        decoupled.decoupled_loss(LOGITS_4, LOGITS_4, jnp.zeros(4))


def test_labels_of_another_shape_are_an_error_that_shows_both():
    with pytest.raises(
        ValueError,
        match=r"one label per example, int\[4\], for logits float32\[4, 3\], got "
        r"int32\[4, 3\]",
    ):
        decoupled.decoupled_loss(LOGITS_4, LOGITS_4, jnp.zeros((4, 3), jnp.int32))


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_weights_of_another_shape_are_an_error(name):
    with pytest.raises(
        ValueError, match=rf"for {name} a number or one per example, float\[4\], got"
    ):
        decoupled.decoupled_loss(
            LOGITS_4, LOGITS_4, LABELS_4, **{name: jnp.ones((4, 1))}
        )


def test_other_arguments_that_do_not_fit_are_errors_of_its_name():
    with pytest.raises(ValueError, match="decoupled_loss needs logits of one shape"):
        decoupled.decoupled_loss(LOGITS_4, LOGITS_4[:3], LABELS_4)
    with pytest.raises(ValueError, match="decoupled_loss needs temperature > 0, got 0"):
        decoupled.decoupled_loss(LOGITS_4, LOGITS_4, LABELS_4, 0)
    with pytest.raises(TypeError, match="decoupled_loss needs a mask of bools"):
        decoupled.decoupled_loss(LOGITS_4, LOGITS_4, LABELS_4, mask=LABELS_4)
