"""The parts of a distillation loss: masks, labels, terms, penalty and state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.distill import Batch, Outputs
from jaxcomp.distill.loss import cross_entropy, mean_over


def model(params, x):
    return x @ params["kernel"]


def make_params(seed, width=3):
    kernel = np.random.default_rng(seed).normal(size=(4, width))
    return {"kernel": jnp.asarray(kernel, jnp.float32)}


STUDENT, TEACHER = make_params(0), make_params(1)
X = jnp.asarray(np.random.default_rng(2).normal(size=(6, 4)), jnp.float32)
LABELS = jnp.array([0, 1, 2, 0, 1, 2])
MASK = jnp.array([True, False, True, True, False, True])


jitted = jax.jit(jc.distill_loss(model, model, hard=0.3))
EACH = {
    "soft": np.asarray(jc.soft_target_loss(model(STUDENT, X), model(TEACHER, X))),
    "hard": np.asarray(cross_entropy(model(STUDENT, X), LABELS)),
}


def value_and_grad(loss, batch):
    return jax.value_and_grad(loss, has_aux=True)(STUDENT, TEACHER, batch)


def test_one_example_by_hand():
    # The student says 1/2, 1/2 and the teacher 3/4, 1/4; the label is the first class.
    loss = jc.distill_loss(model, model, temperature=1.0, hard=0.25)
    ours, theirs = (
        {"kernel": jnp.zeros((1, 2))},
        {"kernel": jnp.log(jnp.eye(1, 2) * 2 + 1)},
    )
    value, (metrics, state) = loss(ours, theirs, (jnp.ones((1, 1)), jnp.array([0])))
    soft = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    np.testing.assert_allclose(metrics["soft"], soft, rtol=1e-5)
    np.testing.assert_allclose(metrics["hard"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(value, 0.75 * soft + 0.25 * np.log(2), rtol=1e-5)
    assert state is None


@given(hnp.arrays(bool, 6))
def test_what_the_mask_leaves_out_might_as_well_not_be_there(mask):
    bad = jnp.where(mask[:, None], X, jnp.nan)
    value, found = jitted(STUDENT, TEACHER, (bad, LABELS, jnp.asarray(mask)))
    for name, losses in EACH.items():
        wanted = losses[mask].mean() if mask.any() else 0
        np.testing.assert_allclose(found.metrics[name], wanted, rtol=1e-4, atol=1e-6)
    wanted = 0.7 * found.metrics["soft"] + 0.3 * found.metrics["hard"]
    np.testing.assert_allclose(value, wanted, rtol=1e-5)


def test_the_gradient_is_that_of_the_examples_in_the_mask():
    loss = jc.distill_loss(model, model, hard=0.3)
    wild = jnp.where(MASK[:, None], X, 1e4)
    _, grad = value_and_grad(loss, (wild, jnp.where(MASK, LABELS, 99), MASK))
    _, wanted = value_and_grad(loss, (X[MASK], LABELS[MASK]))
    np.testing.assert_allclose(grad["kernel"], wanted["kernel"], rtol=1e-4, atol=1e-6)


def test_tokens_are_masked_one_by_one():
    x, labels = X.reshape(2, 3, 4), LABELS.reshape(2, 3)
    mask = MASK.reshape(2, 3)
    loss = jc.distill_loss(model, model, hard=0.3)
    (value, _), _ = value_and_grad(loss, (x, labels, mask))
    (flat, _), _ = value_and_grad(loss, (X, LABELS, MASK))
    np.testing.assert_allclose(value, flat, rtol=1e-6)


def test_an_example_without_a_label_has_its_soft_part_alone():
    loss = jc.distill_loss(model, model, hard=0.4)
    some = jnp.where(MASK, LABELS, -1)
    (value, measured), _ = value_and_grad(loss, (X, some))
    losses = optax.softmax_cross_entropy_with_integer_labels(model(STUDENT, X), LABELS)
    soft = jc.soft_target_loss(model(STUDENT, X), model(TEACHER, X)).mean()
    hard = jnp.where(MASK, losses, 0).mean()
    np.testing.assert_allclose(value, 0.6 * soft + 0.4 * hard, rtol=1e-5)
    np.testing.assert_allclose(measured.metrics["hard"], hard, rtol=1e-5)


def test_cross_entropy_in_bfloat16_is_computed_in_float32():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50)), jnp.bfloat16)
    losses = cross_entropy(logits, jnp.arange(4))
    wide = np.asarray(logits, np.float64)
    wanted = np.log(np.exp(wide).sum(-1)) - wide[np.arange(4), np.arange(4)]
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)


def test_a_mean_over_nobody_is_zero():
    assert mean_over(jnp.array([jnp.nan, 1.0]), jnp.zeros(2, bool)) == 0


def with_hidden(params, x):
    hidden = jnp.tanh(x @ params["kernel"])
    return Outputs(hidden, {"hidden": hidden})


def distance(ours, theirs, batch):
    difference = ours.features["hidden"] - theirs.features["hidden"]
    return jnp.sum(difference**2, axis=-1)


def test_terms_are_added_and_reported_under_their_names():
    terms = {"hint": lambda *args: 0.5 * distance(*args)}
    loss = jc.distill_loss(with_hidden, with_hidden, hard=0.0, terms=terms)
    (value, found), _ = value_and_grad(loss, (X,))
    hidden = [np.tanh(np.asarray(model(p, X))) for p in (STUDENT, TEACHER)]
    wanted = 0.5 * np.sum((hidden[0] - hidden[1]) ** 2, axis=-1).mean()
    assert set(found.metrics) == {"loss", "soft", "hint"}
    np.testing.assert_allclose(found.metrics["hint"], wanted, rtol=1e-5)
    np.testing.assert_allclose(value, found.metrics["soft"] + wanted, rtol=1e-5)


def test_a_term_of_one_value_per_example_is_masked_and_any_other_is_not():
    terms = {"each": distance, "all": lambda *args: jnp.arange(4.0)}
    loss = jc.distill_loss(with_hidden, with_hidden, hard=0.0, terms=terms, soft=None)
    (_, found), _ = value_and_grad(loss, Batch(X, mask=MASK))
    (_, wanted), _ = value_and_grad(loss, (X[MASK],))
    np.testing.assert_allclose(found.metrics["each"], wanted.metrics["each"], rtol=1e-5)
    assert found.metrics["all"] == 1.5
    assert "soft" not in found.metrics


def test_a_term_sees_the_batch():
    terms = {"labels": lambda ours, theirs, batch: batch.labels}
    loss = jc.distill_loss(model, model, terms=terms)
    assert value_and_grad(loss, (X, LABELS))[0][1].metrics["labels"] == 1


def test_the_penalty_is_the_textbook_one_on_dense_weights():
    # (1 - a) * T**2 * KL + a * CE + R(w)
    small = jc.quantize_tree(STUDENT, bits=4)
    decay = 0.1
    loss = jc.distill_loss(model, model, penalty=lambda w: decay * jc.l1_penalty(w))
    plain = jc.distill_loss(model, model)
    value, found = loss(small, TEACHER, (X, LABELS))
    bare, _ = plain(small, TEACHER, (X, LABELS))
    wanted = decay * np.abs(np.asarray(jc.densify(small)["kernel"])).sum()
    np.testing.assert_allclose(found.metrics["penalty"], wanted, rtol=1e-5)
    np.testing.assert_allclose(value, bare + wanted, rtol=1e-5)


def test_another_soft_loss_takes_the_place_of_the_first():
    def soft(ours, theirs, temperature, mask=None):
        return temperature * jnp.sum((ours - theirs) ** 2, axis=-1)

    loss = jc.distill_loss(model, model, temperature=3.0, hard=0.0, soft=soft)
    (value, _), _ = value_and_grad(loss, (X,))
    difference = np.asarray(model(STUDENT, X) - model(TEACHER, X))
    np.testing.assert_allclose(value, 3 * np.sum(difference**2, -1).mean(), rtol=1e-5)


def test_no_gradient_enters_the_teacher():
    loss = jc.distill_loss(model, model, hard=0.0)
    grad, _ = jax.grad(loss, argnums=1, has_aux=True)(STUDENT, TEACHER, (X,))
    np.testing.assert_array_equal(grad["kernel"], 0)


def normed(params, x):
    mean = x.mean(axis=0)
    new = 0.9 * params["stats"]["mean"] + 0.1 * mean
    logits = (x - mean[None]) @ params["kernel"]
    return Outputs(logits, state={"stats": {"mean": new}})


def test_a_state_takes_the_place_of_leaves_of_the_params():
    params = STUDENT | {"stats": {"mean": jnp.zeros(4)}}
    tx = optax.adamw(0.1, weight_decay=0.5)  # which would pull at the mean
    step = jc.distill_step(normed, model, tx, hard=0.0)
    final, _, _ = step(params, tx.init(params), TEACHER, (X + 1,))
    mean = np.asarray(X + 1).mean(axis=0)
    np.testing.assert_allclose(final["stats"]["mean"], 0.1 * mean, rtol=1e-5)
    assert jax.tree.structure(final) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("params", "has"),
    [
        (STUDENT, "no such leaf"),
        (STUDENT | {"stats": {"mean": jnp.zeros(5)}}, r"float32\[5\]"),
    ],
)
def test_a_state_that_does_not_fit_is_an_error_that_lists_paths(params, has):
    def wrong(params, x):
        return Outputs(model(params, x), state={"stats": {"mean": jnp.zeros(4)}})

    tx = optax.sgd(0.1)
    step = jc.distill_step(wrong, model, tx, hard=0.0)
    with pytest.raises(ValueError, match=f"'stats/mean'.*have {has}.*are kernel"):
        step(params, tx.init(params), TEACHER, (X,))


def test_a_scaled_loss_has_the_same_step_and_the_same_metrics():
    tx = optax.sgd(0.1)
    args = STUDENT, tx.init(STUDENT), TEACHER, (X, LABELS)
    plain = jc.distill_step(model, model, tx)(*args)
    scaled = jc.distill_step(model, model, tx, loss_scale=2.0**14)(*args)
    np.testing.assert_allclose(
        plain[0]["kernel"], scaled[0]["kernel"], rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(plain[2]["loss"], scaled[2]["loss"], rtol=1e-6)


def test_gradients_too_small_for_float16_need_the_scale():
    def narrow(params, x):
        return (x * params["kernel"].astype(jnp.float16)).astype(jnp.float32) * 1e-4

    params, x = {"kernel": jnp.zeros((1, 2))}, jnp.full((8, 2), 1e-2, jnp.float16)
    tx = optax.sgd(1.0)
    moved = [
        jc.distill_step(narrow, lambda p, x: p, tx, hard=0.0, loss_scale=scale)(
            params, tx.init(params), jnp.tile(jnp.array([[1.0, 0.0]]), (8, 1)), (x,)
        )[0]["kernel"][0, 0]
        for scale in (1.0, 2.0**12)
    ]
    exact = 2 * (0.622459 - 0.5) * 1e-4 * 1e-2  # T (p - q) times the two factors
    assert abs(moved[0] - exact) > 0.01 * exact
    np.testing.assert_allclose(moved[1], exact, rtol=2e-3)


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_not_positive_is_an_error(scale):
    with pytest.raises(ValueError, match="distill_step needs loss_scale > 0, got"):
        jc.distill_step(model, model, optax.sgd(0.1), loss_scale=scale)


def test_a_term_with_the_name_of_another_metric_is_an_error():
    with pytest.raises(ValueError, match="other names for its terms.*got 'soft'"):
        jc.distill_loss(model, model, terms={"soft": distance})


@pytest.mark.parametrize("batch", [(), (X, LABELS, MASK, X), X, {"inputs": X}])
def test_a_batch_of_another_form_is_an_error(batch):
    loss = jc.distill_loss(model, model, hard=0.0)
    with pytest.raises(TypeError, match="needs a batch .inputs, labels, mask."):
        loss(STUDENT, TEACHER, batch)


def test_a_mask_of_numbers_is_an_error():
    loss = jc.distill_loss(model, model)
    with pytest.raises(TypeError, match=r"mask of bools.*got float32\[6\]"):
        loss(STUDENT, TEACHER, (X, LABELS, jnp.ones(6)))


def test_the_loss_alone_serves_a_loop_of_ones_own():
    loss = jc.distill_loss(model, model)
    tx = optax.adam(0.1)
    step = jc.distill_step(model, model, tx)
    batch = X, LABELS
    wanted, _, metrics = step(STUDENT, tx.init(STUDENT), TEACHER, batch)
    grads, found = jax.grad(partial(loss, batch=batch), has_aux=True)(
        STUDENT, teacher_params=TEACHER
    )
    updates, _ = tx.update(grads, tx.init(STUDENT), STUDENT)
    final = optax.apply_updates(STUDENT, updates)
    np.testing.assert_allclose(final["kernel"], wanted["kernel"], rtol=1e-5)
    np.testing.assert_allclose(found.metrics["loss"], metrics["loss"], rtol=1e-6)
