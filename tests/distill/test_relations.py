"""Losses on relations against plain loops, torchdistill's values and their edges."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcomp.distill.losses import relations
from jaxcomp.distill.losses.relations import (
    angle_loss,
    attention_relation_loss,
    distance_loss,
    similarity_loss,
)


N = 5
MASK = np.array([True, False, True, True, False])
VALUES = hnp.arrays(np.int8, (N, 4), elements=st.integers(-5, 5))


def measured(loss):
    """(student, teacher, mask=None) -> values and the gradients of both, jitted."""

    @jax.jit
    def run(student, teacher, mask):
        values, pull = jax.vjp(lambda *x: loss(*x, mask=mask), student, teacher)
        return values, *pull(jnp.ones_like(values))

    def call(student, teacher, mask=None):
        everybody = np.ones(len(student), bool)
        return run(student, teacher, everybody if mask is None else mask)

    return call


LOSSES = {
    "distance": distance_loss,
    "angle": angle_loss,
    "similarity": similarity_loss,
    "tokens": partial(attention_relation_loss, heads=2),  # float[tokens, width]
}
BATCH = {name: measured(loss) for name, loss in LOSSES.items()}
JITTED = {name: jax.jit(loss) for name, loss in LOSSES.items()}
TOKENS = jax.jit(attention_relation_loss, static_argnums=2)
every_loss = pytest.mark.parametrize("name", BATCH)


def pair(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def rotation(seed, width):
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
    return turn.astype(np.float32)


def huber(x):
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def distance_reference(student, teacher):
    n = len(student)
    found = []
    for x in (student, teacher):
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        found.append(d / d[d > 0].mean() if d.any() else d)
    ours, theirs = found
    return np.array(
        [sum(huber(ours[i, j] - theirs[i, j]) for j in range(n)) / n for i in range(n)]
    )


def angle_reference(student, teacher):
    n = len(student)
    found = np.zeros(n)
    for i, j, k in itertools.product(range(n), repeat=3):
        cosines = []
        for x in (student, teacher):
            a, b = x[j] - x[i], x[k] - x[i]
            lengths = np.linalg.norm(a) * np.linalg.norm(b)
            cosines.append(a @ b / lengths if lengths else 0.0)
        found[i] += huber(cosines[0] - cosines[1]) / n**2
    return found


def similarity_reference(student, teacher):
    n = len(student)
    rows = []
    for x in (student, teacher):
        g = np.array([[a @ b for b in x] for a in x])
        rows.append([row / max(np.linalg.norm(row), 1e-300) for row in g])
    return np.array([np.sum((rows[0][i] - rows[1][i]) ** 2) / n for i in range(n)])


def relation_reference(student, teacher, heads, mask):
    found = np.zeros(mask.shape)
    for b in range(len(mask)):
        (there,) = np.nonzero(mask[b])
        for head in range(heads if there.size else 0):
            logs = []
            for x in (student, teacher):
                size = x.shape[-1] // heads
                a = np.float64(x[b, there, head * size : (head + 1) * size])
                logs.append(scipy.special.log_softmax(a @ a.T / size**0.5, axis=-1))
            kl = np.sum(np.exp(logs[1]) * (logs[1] - logs[0]), axis=-1)
            found[b, there] += kl / heads
    return found


REFERENCES = {
    "distance": distance_reference,
    "angle": angle_reference,
    "similarity": similarity_reference,
    "tokens": lambda s, t: relation_reference(
        s[None], t[None], 2, np.ones((1, len(s)), bool)
    )[0],
}


def test_distances_by_hand():
    # Over their means: 1/2, 3/2, 1 and 3/4, 3/2, 3/4.
    student, teacher = jnp.array([0.0, 1.0, 3.0]), jnp.array([0.0, 1.0, 2.0])
    found = JITTED["distance"](student, teacher)
    np.testing.assert_allclose(found, np.array([1, 2, 1]) / 32 / 3, rtol=1e-5)


def test_angles_by_hand():
    # Half a square, cosines 0 and twice the root of 1/2, and an equilateral triangle.
    student = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    teacher = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
    at = np.array([0.5**2, (0.5**0.5 - 0.5) ** 2, (0.5**0.5 - 0.5) ** 2])
    found = JITTED["angle"](student, teacher)
    np.testing.assert_allclose(found, at / 9, rtol=1e-4)


def test_similarities_by_hand():
    # Rows (1, 0) and (0, 1) against (1, 1) over the root of 2.
    found = JITTED["similarity"](jnp.eye(2), jnp.ones((2, 1)))
    expected = ((1 - 0.5**0.5) ** 2 + 0.5) / 2
    np.testing.assert_allclose(found, [expected] * 2, rtol=1e-5)


def test_relations_of_tokens_by_hand():
    # One head says 3/4 and 1/4, the other, like the student, 1/2 and 1/2.
    x = (math.log(3) * 2**0.5) ** 0.5
    teacher = jnp.array([[x, 0.0, 0.0, 0.0], [0.0, x, 0.0, 0.0]])
    found = TOKENS(jnp.zeros((2, 2)), teacher, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    np.testing.assert_allclose(found, [expected / 2] * 2, rtol=1e-5)


@given(VALUES, VALUES)
def test_they_are_the_plain_loops(student, teacher):
    # Small integers: ties, zeros and examples that coincide are common.
    student, teacher = np.float32(student), np.float32(teacher)
    for name, loss in BATCH.items():
        found, *grads = loss(student, teacher)
        expected = REFERENCES[name](np.float64(student), np.float64(teacher))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5, err_msg=name)
        assert np.all(np.isfinite(grads)), name


def test_they_are_what_torchdistill_says():
    # torchdistill 1.1.5 in float64: RKDLoss with reduction="mean", and SPKDLoss with
    # its rows scaled in the 2-norm, as in the paper (its own are in the 1-norm).
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(6, 4)), rng.normal(size=(6, 7))
    student, teacher = np.float32(student), np.float32(teacher)
    for name, expected, slope in (
        ("distance", 0.022806404813722814, 0.0263124105568714),
        ("angle", 0.03968643663719635, 0.05401751492536001),
        ("similarity", 0.14969679243771408, None),
    ):
        found, grad, _ = BATCH[name](student, teacher)
        np.testing.assert_allclose(found.mean(), expected, rtol=1e-5)
        if slope is not None:
            np.testing.assert_allclose(np.linalg.norm(grad) / 6, slope, rtol=1e-5)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]))
def test_relations_of_tokens_are_the_plain_loops(seed, heads):
    student, teacher = pair(seed, (2, 5, 4), (2, 5, 8))
    mask = np.random.default_rng(seed).random((2, 5)) < 0.7
    found = TOKENS(student, 2 * teacher, heads, mask=mask)
    expected = relation_reference(student, 2 * teacher, heads, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@given(VALUES)
def test_equal_features_cost_nothing_and_pull_nowhere(x):
    x = np.float32(x)
    for name, loss in BATCH.items():
        found, *grads = loss(x, x)
        np.testing.assert_allclose(found, 0, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(grads, 0, atol=2e-5, err_msg=name)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 0.5, 3.0, 1e30]))
def test_turning_and_scaling_one_side_changes_no_relation_of_examples(seed, scale):
    student, teacher = pair(seed, (N, 4), (N, 4))
    turned = student @ rotation(seed, 4)
    for name, shift in (("distance", 2), ("angle", 2), ("similarity", 0)):
        plain = BATCH[name](student, teacher)[0]
        moved = (turned + np.float32(shift)) * np.float32(scale)
        found = BATCH[name](moved, teacher)[0]
        np.testing.assert_allclose(found, plain, rtol=1e-2, atol=1e-4, err_msg=name)


def test_a_rotation_inside_a_head_changes_no_relation_of_tokens():
    student, teacher = pair(1, (2, 5, 6), (2, 5, 4))
    turn = np.zeros((6, 6), np.float32)
    turn[:3, :3], turn[3:, 3:] = rotation(2, 3), rotation(3, 3)
    plain = TOKENS(student, teacher, 2)
    np.testing.assert_allclose(TOKENS(student @ turn, teacher, 2), plain, rtol=1e-4)
    across = TOKENS(student @ rotation(4, 6), teacher, 2)
    assert np.max(np.abs(across - plain)) > 1e-3


def test_relations_of_tokens_take_any_axes_before_them():
    student, teacher = pair(5, (2, 3, 5, 6), (2, 3, 5, 4))
    found = TOKENS(student, teacher, 2)
    assert found.shape == (2, 3, 5)
    alone = TOKENS(student[1, 2], teacher[1, 2], 2)
    np.testing.assert_allclose(found[1, 2], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["distance", "angle", "similarity"])
def test_whatever_is_behind_the_batch_is_one_vector(name):
    loss = JITTED[name]
    student, teacher = pair(6, (N, 2, 3), (N, 4, 2, 1))
    flat = loss(student.reshape(N, 6), teacher.reshape(N, 8))
    np.testing.assert_allclose(loss(student, teacher), flat, rtol=1e-6)


@every_loss
def test_the_gradient_is_that_of_finite_differences(name):
    student, teacher = pair(7, (N, 4), (N, 4))
    for mask in (None, MASK):
        _, *grads = BATCH[name](student, teacher, mask)
        for side in (0, 1):
            step = pair(8, (N, 4))[0] * 0.01

            def at(sign, side=side, step=step, mask=mask):
                moved = [student, teacher]
                moved[side] = moved[side] + sign * step
                return np.float64(BATCH[name](*moved, mask)[0]).sum()

            expected = (at(1) - at(-1)) / 2
            found = np.sum(np.float64(grads[side]) * step)
            np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-5)


@every_loss
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_padding_never_leaks(name, bad):
    student, teacher = pair(9, (N, 4), (N, 4))
    filled = [np.where(MASK[:, None], x, bad) for x in (student, teacher)]
    found, *grads = BATCH[name](*filled, MASK)
    expected, *slopes = BATCH[name](student[MASK], teacher[MASK])
    np.testing.assert_allclose(found[MASK], expected, rtol=1e-5)
    np.testing.assert_array_equal(found[~MASK], 0)
    for ours, theirs in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(ours[MASK], theirs, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(ours[~MASK], 0)


@every_loss
@pytest.mark.parametrize("there", [0, 1], ids=["nobody", "one"])
def test_one_alone_or_nobody_costs_nothing(name, there):
    student, teacher = pair(11, (N, 4), (N, 4))
    mask = np.arange(N) < there
    filled = [np.where(mask[:, None], x, np.nan) for x in (student, teacher)]
    found, *grads = BATCH[name](*filled, mask)
    np.testing.assert_allclose(found, 0, atol=1e-12)
    np.testing.assert_allclose(grads, 0, atol=1e-6)
    found = JITTED[name](student[:there], teacher[:there])  # without a mask
    assert found.shape == (there,)
    np.testing.assert_allclose(found, 0, atol=1e-12)


@every_loss
def test_a_batch_of_one_example_over_and_over_has_finite_gradients(name):
    (teacher,) = pair(12, (N, 4))
    same = np.full((N, 4), 0.3, np.float32)
    for pulled in (same, 0 * same):
        for found in BATCH[name](pulled, teacher):
            assert np.all(np.isfinite(found))
    np.testing.assert_allclose(BATCH[name](same, same * 2)[0], 0, atol=1e-12)


@every_loss
def test_narrow_features_are_computed_in_float32(name, strict):
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in pair(13, (N, 4), (N, 4)))
    found, *grads = BATCH[name](student, teacher)
    assert found.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]
    wide = BATCH[name](student.astype(jnp.float32), teacher.astype(jnp.float32))[0]
    np.testing.assert_allclose(found, wide, rtol=1e-6)


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_memory_does_not_grow_with_triplets_or_pairs_of_features(loss):
    n, width = 128, 512
    x = jax.ShapeDtypeStruct((n, width), jnp.float32)
    grad = jax.jit(jax.grad(lambda s, t: loss(s, t).sum()))
    used = grad.lower(x, x).compile().memory_analysis().temp_size_in_bytes
    assert used < 8 * 4 * (n * width + n * n)  # of 4 * n**3, 8 MiB, and n * n * width


def test_lowers_for_every_platform():
    student, teacher = jnp.zeros((4, 6)), jnp.zeros((4, 2))
    platforms = ("cpu", "cuda", "tpu")
    losses = LOSSES.values()
    grad = jax.jit(jax.grad(lambda s, t: sum(loss(s, t).sum() for loss in losses)))
    exported = jax.export.export(grad, platforms=platforms)(student, teacher)
    assert exported.platforms == platforms


@pytest.mark.parametrize("name", ["distance_loss", "angle_loss", "similarity_loss"])
@pytest.mark.parametrize("shapes", [((2, 3), (4, 3)), ((), (1,)), ((1,), ())])
def test_batches_of_two_sizes_are_an_error_that_shows_them(name, shapes):
    with pytest.raises(
        ValueError, match=rf"{name} needs float\[batch, \.\.\.\] of one"
    ):
        getattr(relations, name)(*map(jnp.ones, shapes))


@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 5, 4)), ((4,), (4,))])
def test_other_tokens_are_an_error_that_shows_them(shapes):
    with pytest.raises(ValueError, match=r"of the same tokens, got student float32\["):
        attention_relation_loss(*map(jnp.ones, shapes), 2)


def test_heads_that_do_not_divide_are_an_error():
    student, teacher = jnp.ones((2, 3, 6)), jnp.ones((2, 3, 4))
    with pytest.raises(
        ValueError,
        match=r"cannot split student float32\[2, 3, 6\].*into heads=3\. Pass",
    ):
        attention_relation_loss(student, teacher, 3)
    with pytest.raises(ValueError, match="needs 1 <= heads <= 4, got 0"):
        attention_relation_loss(student, teacher, 0)
    with pytest.raises(TypeError, match="needs an integer heads, got 2.0"):
        attention_relation_loss(student, teacher, 2.0)


def test_a_mask_that_does_not_fit_is_an_error():
    x = jnp.ones((2, 3, 4))
    with pytest.raises(TypeError, match="angle_loss needs a mask of bools"):
        angle_loss(x, x, mask=jnp.ones(2))
    with pytest.raises(ValueError, match=r"shape \[2\], got bool\[2, 3\]\."):
        similarity_loss(x, x, mask=jnp.ones((2, 3), bool))
    with pytest.raises(ValueError, match=r"shape \[2, 3\], got bool\[2\]\."):
        attention_relation_loss(x, x, 2, mask=jnp.ones(2, bool))
