"""Losses on features against their definitions, torch's values and their edges."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from jaxcomp.distill.losses import features
from jaxcomp.distill.losses.features import (
    attention_transfer_loss,
    cosine_loss,
    hint_loss,
    rescaled,
    root,
    unit,
)


LOSSES = {
    "hint": jax.jit(hint_loss),
    "cosine": jax.jit(cosine_loss),
    "attention": jax.jit(attention_transfer_loss),
}
GRADS = {
    name: jax.jit(
        jax.grad(
            lambda s, t, mask=None, loss=loss: loss(s, t, mask=mask).sum(),
            argnums=(0, 1),
        )
    )
    for name, loss in LOSSES.items()
}
SHAPE = (4, 3, 2)
# XLA takes subnormal numbers for 0.
NUMBERS = st.floats(-10, 10, width=32, allow_subnormal=False)
VALUES = hnp.arrays(np.float32, SHAPE, elements=NUMBERS)
MASK = np.array([True, False, True, False])
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def pair(seed, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)


def cosine_reference(student, teacher):
    student, teacher = np.float64(student), np.float64(teacher)
    lengths = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return 1 - np.sum(student * teacher, axis=-1) / lengths


def attention_reference(student, teacher):
    found = []
    for ours, theirs in zip(np.float64(student), np.float64(teacher), strict=True):
        maps = [np.sum(x**2, axis=-1).ravel() for x in (ours, theirs)]
        ours, theirs = (q / max(np.linalg.norm(q), 1e-300) for q in maps)
        found.append(np.linalg.norm(ours - theirs))
    return np.array(found)


def test_a_hint_by_hand():
    student = jnp.array([[1.0, 2.0], [0.0, 4.0]])
    teacher = jnp.array([[1.0, 0.0], [3.0, 1.0]])
    np.testing.assert_array_equal(hint_loss(student, teacher), [1.0, 4.5])


def test_a_cosine_by_hand():
    student = jnp.array([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]])
    teacher = jnp.array([[4.0, 3.0], [-2.0, 0.0], [5.0, 5.0]])
    found = cosine_loss(student, teacher)
    np.testing.assert_allclose(found, [1 - 24 / 25, 2, 0], rtol=1e-6, atol=1e-7)


def test_an_attention_map_by_hand():
    # Maps (9 + 16, 0) and (0, 4), then (3, 4) / 5 and (1, 0).
    student = jnp.array([[[3.0, 4.0], [0.0, 0.0]], [[1.0, 2**0.5], [2.0, 0.0]]])
    teacher = jnp.array([[[0.0], [2.0]], [[7.0], [0.0]]])
    found = attention_transfer_loss(student, teacher)
    np.testing.assert_allclose(found, [2**0.5, (0.4**2 + 0.8**2) ** 0.5], rtol=1e-6)


@given(VALUES, VALUES)
def test_they_are_their_definitions(student, teacher):
    expected = np.mean((np.float64(student) - teacher) ** 2, axis=-1) / 2
    found = LOSSES["hint"](student, teacher)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-30)
    found = LOSSES["attention"](student, teacher)
    expected = attention_reference(student, teacher)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    known = student.any(axis=-1) & teacher.any(axis=-1)
    expected = cosine_reference(student[known], teacher[known])
    found = LOSSES["cosine"](student, teacher)
    np.testing.assert_allclose(found[known], expected, rtol=1e-4, atol=1e-6)
    assert np.all((found >= 0) & (found <= 2 + 1e-6))


def test_they_are_what_torch_says():
    # torchdistill 1.1.5's ATLoss with mode="paper"; half of torch's MSELoss, and its
    # CosineEmbeddingLoss, in float64 on the same numbers.
    rng = np.random.default_rng(0)
    rng.normal(size=66)
    student, teacher = rng.normal(size=(3, 2, 4, 5)), rng.normal(size=(3, 6, 4, 5))
    student, teacher = np.moveaxis(student, 1, -1), np.moveaxis(teacher, 1, -1)
    found = LOSSES["attention"](student, teacher).mean()
    np.testing.assert_allclose(found, 0.7879393110506095, rtol=1e-6)
    student, teacher = rng.normal(size=(2, 2, 3, 5))
    found = LOSSES["hint"](student, teacher).mean()
    np.testing.assert_allclose(found, 1.018616883087774, rtol=1e-6)
    found = LOSSES["cosine"](student, teacher).mean()
    np.testing.assert_allclose(found, 1.1870783446661675, rtol=1e-6)


def test_the_cosine_is_that_of_optax():
    # Tunix's feature pooling takes the mean of it.
    student, teacher = pair(0)
    expected = optax.cosine_distance(student, teacher)
    found = LOSSES["cosine"](student, teacher)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@given(VALUES)
def test_equal_features_cost_nothing_and_pull_nowhere(x):
    for name, loss in LOSSES.items():
        np.testing.assert_allclose(loss(x, x), 0, atol=1e-12, err_msg=name)
        for grad in GRADS[name](x, x):
            np.testing.assert_allclose(grad, 0, atol=1e-6, err_msg=name)


@given(VALUES, VALUES, st.sampled_from([1e-30, 0.25, 3.0, 1e30]))
def test_a_scale_changes_neither_cosine_nor_attention(student, teacher, scale):
    for name in ("cosine", "attention"):
        small = np.where(np.abs(student) < 1e-3, 0, student)  # none to underflow
        plain = LOSSES[name](small, teacher)
        scaled = LOSSES[name](small * np.float32(scale), teacher)
        np.testing.assert_allclose(scaled, plain, rtol=1e-4, atol=1e-5, err_msg=name)


def test_maps_that_agree_but_for_rounding_pull_nowhere():
    (student,) = pair(8)[:1]
    for teacher in (student, 3 * student, student / np.float32(0.7), -student):
        np.testing.assert_array_equal(LOSSES["attention"](student, teacher), 0)
        np.testing.assert_array_equal(GRADS["attention"](student, teacher), 0)


def test_attention_does_not_depend_on_the_order_of_channels():
    student, teacher = pair(1, (4, 3, 2, 5))
    loss = LOSSES["attention"]
    plain = loss(student, teacher)
    turned = loss(student[..., ::-1], teacher[..., [2, 0, 1, 4, 3]])
    np.testing.assert_allclose(turned, plain, rtol=1e-5)
    moved = loss(student[:, ::-1], teacher)
    assert np.all(np.abs(moved - plain) > 1e-3)


def test_a_rotation_of_both_changes_no_hint_and_no_cosine():
    student, teacher = pair(2, (5, 4))
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(4, 4)))[0]
    turn = turn.astype(np.float32)
    for loss in (LOSSES["hint"], LOSSES["cosine"]):
        np.testing.assert_allclose(
            loss(student @ turn, teacher @ turn), loss(student, teacher), rtol=1e-5
        )


@every_loss
def test_the_gradient_is_that_of_finite_differences(loss):
    student, teacher = pair(4)
    check_grads(
        lambda s, t: loss(s, t).sum(),
        (student, teacher),
        order=1,
        modes=("rev",),
        atol=1e-2,
        rtol=1e-2,
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_padding_never_leaks(name, bad):
    loss, grad = LOSSES[name], GRADS[name]
    student, teacher = pair(5)
    filled = [np.where(MASK[:, None, None], x, bad) for x in (student, teacher)]
    found, ours = loss(*filled, mask=MASK), grad(*filled, MASK)
    kept = student[MASK], teacher[MASK]
    mask = np.array([True, True])
    np.testing.assert_allclose(found[MASK], loss(*kept, mask=mask), rtol=1e-6)
    np.testing.assert_array_equal(found[~MASK], 0)
    for a, b in zip(ours, grad(*kept, mask), strict=True):
        np.testing.assert_allclose(a[MASK], b, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(a[~MASK], 0)


@pytest.mark.parametrize("name", ["hint", "cosine"])
def test_a_mask_of_any_first_axes_gives_the_means_behind_them(name):
    loss = LOSSES[name]
    student, teacher = pair(6)
    plain = loss(student, teacher)
    assert plain.shape == (4, 3)
    by_token = np.ones((4, 3), bool)
    by_token[1, 2] = False
    found = loss(student, teacher, mask=by_token)
    np.testing.assert_allclose(found, np.where(by_token, plain, 0), rtol=1e-6)
    found = loss(student, teacher, mask=MASK)
    expected = np.where(MASK, plain.mean(axis=1), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    whole = loss(student, teacher, mask=np.array(True))
    np.testing.assert_allclose(whole, plain.mean(), rtol=1e-6)


def test_zeros_cost_what_is_said_and_have_no_gradient():
    zeros, ones = np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.float32)
    for name, against_ones in (("cosine", 0.5), ("attention", 1)):
        for teacher, expected in ((zeros, 0), (ones, against_ones)):
            found = LOSSES[name](zeros, teacher)
            np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
            np.testing.assert_array_equal(GRADS[name](zeros, teacher)[0], 0)


@every_loss
def test_narrow_features_are_computed_in_float32(loss, strict):
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in pair(7))
    found = loss(student, teacher)
    assert found.dtype == jnp.float32
    wide = loss(student.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_allclose(found, wide, rtol=1e-6)
    assert jax.grad(lambda s: loss(s, teacher).sum())(student).dtype == jnp.bfloat16


@every_loss
def test_lowers_for_every_platform(loss):
    x = jnp.zeros(SHAPE)
    platforms = ("cpu", "cuda", "tpu")
    grad = jax.jit(jax.grad(lambda s, t: loss(s, t).sum()))
    assert jax.export.export(grad, platforms=platforms)(x, x).platforms == platforms


def test_helpers_hold_at_nothing_at_all():
    np.testing.assert_array_equal(rescaled(jnp.array([0.0, 0.0])), 0)
    huge = jax.jit(rescaled)(jnp.array([1e38, -2e38]))
    np.testing.assert_allclose(huge, np.array([1e38, -2e38]) / 2.0**126, rtol=1e-6)
    np.testing.assert_allclose(unit(jnp.array([3e-30, 4e-30])), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(root(jnp.array([0.0, 4.0])), [0, 2])
    assert unit(jnp.zeros((2, 0))).shape == (2, 0)
    chex.assert_trees_all_close(jax.grad(root)(0.0), 0.0)


@pytest.mark.parametrize("name", ["hint_loss", "cosine_loss"])
@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((), ()), ((2, 3), (3,))])
def test_features_of_two_shapes_are_an_error_that_shows_them(name, shapes):
    found = "got student float32" + r"\[" + ", ".join(map(str, shapes[0])) + r"\]"
    with pytest.raises(ValueError, match=f"{name} needs .* one shape, {found}"):
        getattr(features, name)(*map(jnp.ones, shapes))
    with pytest.raises(ValueError, match="`with_projections`"):
        getattr(features, name)(*map(jnp.ones, shapes))


@pytest.mark.parametrize(
    "shapes", [((2, 3, 4), (2, 5, 4)), ((2, 3), (2, 3)), ((2, 3, 4), (3, 4))]
)
def test_maps_of_two_spaces_are_an_error_that_says_what_helps(shapes):
    with pytest.raises(ValueError, match=r"float\[batch, \*space, channels\] of one"):
        attention_transfer_loss(*map(jnp.ones, shapes))
    with pytest.raises(ValueError, match="`with_projections` bring"):
        attention_transfer_loss(*map(jnp.ones, shapes))


def test_a_mask_that_does_not_fit_is_an_error():
    x = jnp.ones((2, 3, 4))
    with pytest.raises(TypeError, match=r"hint_loss needs a mask of bools.*int32\[2\]"):
        hint_loss(x, x, mask=jnp.ones(2, int))
    with pytest.raises(
        ValueError, match=r"shape \[\] or \[2\] or \[2, 3\], got bool\[3\]\."
    ):
        cosine_loss(x, x, mask=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"of shape \[2\], got bool\[2, 3\]\."):
        attention_transfer_loss(x, x, mask=jnp.ones((2, 3), bool))
