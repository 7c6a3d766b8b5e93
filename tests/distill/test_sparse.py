"""Sparse targets: a lower bound of the whole loss, in a fraction of its memory."""

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

from jaxcomp.distill.losses.logits import soft_target_loss
from jaxcomp.distill.losses.sparse import (
    SparseTargets,
    sampled_targets,
    sparse_target_loss,
    top_k_targets,
)


LOGITS = hnp.arrays(np.float32, (3, 6), elements=st.floats(-20, 20, width=32))
TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0])

loss_of = jax.jit(sparse_target_loss)
targets_of = jax.jit(top_k_targets, static_argnums=1)
draws_of = jax.jit(sampled_targets, static_argnums=2)


@jax.jit
def graded(student, targets, temperature=1.0):
    """The sum of the losses, and its gradient in the student's logits."""
    return jax.value_and_grad(
        lambda z: sparse_target_loss(z, targets, temperature).sum()
    )(student)


def normal(seed, shape, dtype=jnp.float32):
    return 2 * jax.random.normal(jax.random.key(seed), shape, dtype)


def reference(student, targets, temperature):
    """In float64, with a dense teacher of the listed classes and one rest."""
    q = scipy.special.softmax(np.float64(student) / temperature, axis=-1)
    p = np.zeros_like(q)
    indices, probs = map(np.asarray, targets)
    for row, (some, given_) in enumerate(zip(indices, probs, strict=True)):
        np.add.at(p[row], some, np.float64(given_))
    listed = np.zeros_like(q, bool)
    np.put_along_axis(listed, indices, True, axis=-1)
    rest_p = np.maximum(1 - p.sum(-1), 0)
    rest_q = np.where(listed, 0, q).sum(-1)
    rest = np.where(listed.all(-1), 0, scipy.special.rel_entr(rest_p, rest_q))
    kl = np.where(listed, scipy.special.rel_entr(p, q), 0).sum(-1)
    return temperature**2 * (kl + rest)


def test_one_class_and_the_rest_by_hand():
    targets = targets_of(jnp.log(jnp.array([0.125, 0.5, 0.25, 0.125])), 1)
    np.testing.assert_array_equal(targets.indices, [1])
    np.testing.assert_allclose(targets.probs, [0.5], rtol=1e-6)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    np.testing.assert_allclose(loss_of(jnp.zeros(4), targets), expected, rtol=1e-6)
    # At T = 2 logits of 2 log 3 and 0 are 3/4 and 1/4; the factor is 4.
    targets = SparseTargets(jnp.array([0]), jnp.array([0.75]))
    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    np.testing.assert_allclose(loss_of(jnp.zeros(2), targets, 2.0), expected, rtol=1e-6)


@given(LOGITS, LOGITS, TEMPERATURES)
def test_a_few_classes_bound_the_whole_loss_from_below_and_all_reach_it(
    student, teacher, temperature
):
    whole = soft_target_loss(student, teacher, temperature)
    room = {"rtol": 1e-4, "atol": 3e-5 * temperature**2}
    for k in (1, 3, 6):
        targets = targets_of(teacher, k, temperature)
        loss = loss_of(student, targets, temperature)
        assert np.all(loss <= whole * (1 + 1e-4) + room["atol"])
        assert np.all(loss >= -room["atol"])
        np.testing.assert_allclose(
            loss, reference(student, targets, temperature), **room
        )
    np.testing.assert_allclose(loss, whole, **room)


@given(LOGITS, TEMPERATURES)
def test_equal_logits_cost_nothing(logits, temperature):
    for k in (1, 3, 6):
        targets = targets_of(logits, k, temperature)
        loss = loss_of(logits, targets, temperature)
        np.testing.assert_allclose(loss, 0, atol=2e-6 * temperature**2)
        slope = graded(logits, targets, temperature)[1]
        np.testing.assert_allclose(slope, 0, atol=2e-6 * temperature)


@pytest.mark.parametrize("shape", [(70, 5), (9, 131_073)])
def test_rows_that_are_left_over_are_as_the_others(shape):
    student, teacher = normal(0, shape), normal(1, shape)
    targets = targets_of(teacher, 3)
    best = np.argsort(-teacher, axis=-1)[:, :3]
    np.testing.assert_array_equal(targets.indices, best)
    probs = scipy.special.softmax(np.float64(teacher), axis=-1)
    np.testing.assert_allclose(
        targets.probs, np.take_along_axis(probs, best, -1), rtol=2e-5
    )
    loss, slope = graded(student, targets)
    np.testing.assert_allclose(loss, reference(student, targets, 1).sum(), rtol=1e-4)
    q = scipy.special.softmax(np.float64(student), axis=-1)
    listed = np.zeros(shape, bool)
    np.put_along_axis(listed, best, True, axis=-1)
    dense = np.zeros(shape)
    np.put_along_axis(dense, best, np.float64(targets.probs), axis=-1)
    rest_p, rest_q = 1 - dense.sum(-1), np.where(listed, 0, q).sum(-1)
    expected = q - np.where(listed, dense, q * (rest_p / rest_q)[:, None])
    np.testing.assert_allclose(slope, expected, atol=2e-6)


def test_every_argument_takes_its_gradient():
    def by_hand(z, probs, temperature):
        log_q = jax.nn.log_softmax(z / temperature)
        rest, left = 1 - probs.sum(-1), jnp.log(jnp.exp(log_q[:, 2:]).sum(-1))
        listed = jnp.sum(probs * (jnp.log(probs) - log_q[:, :2]), axis=-1)
        return temperature**2 * (listed + rest * (jnp.log(rest) - left))

    def ours(z, probs, temperature):
        indices = jnp.tile(jnp.array([[0, 1]]), (3, 1))
        return loss_of(z, SparseTargets(indices, probs), temperature)

    weights = jnp.array([1.0, -2.0, 0.5])
    args = normal(0, (3, 5)), jnp.full((3, 2), 0.3), 1.5
    grads = [
        jax.jit(jax.grad(lambda *a: jnp.sum(weights * f(*a)), argnums=(0, 1, 2)))(*args)  # noqa: B023
        for f in (ours, by_hand)
    ]
    chex.assert_trees_all_close(*grads, rtol=2e-5, atol=1e-6)


def test_a_student_that_is_sure_keeps_the_small_mass_of_the_rest():
    student = jnp.array([60.0, 0.0, 0.0])
    targets = SparseTargets(jnp.array([0]), jnp.array([0.5]))
    loss, slope = graded(student, targets)
    expected = math.log(0.5) - 0.5 * (math.log(2) - 60)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(slope, [0.5, -0.25, -0.25], rtol=1e-5)


def test_probabilities_of_a_class_that_comes_twice_add_up():
    student = normal(0, (2, 5))
    twice = SparseTargets(
        jnp.array([[3, 1, 3], [0, 0, 0]]),
        jnp.array([[0.25, 0.25, 0.5], [0.2, 0.3, 0.1]]),
    )
    once = SparseTargets(
        jnp.array([[3, 1], [0, 4]]), jnp.array([[0.75, 0.25], [0.6, 0.0]])
    )
    found = graded(student, twice)
    np.testing.assert_allclose(found[0], reference(student, twice, 1).sum(), rtol=1e-5)
    np.testing.assert_allclose(
        loss_of(student, twice)[0], loss_of(student, once)[0], rtol=1e-5
    )
    slope = graded(student, once)[1]
    np.testing.assert_allclose(found[1][0], slope[0], atol=1e-6)


def test_draws_are_right_in_the_mean():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125, 0.0]] * 4))
    targets = draws_of(jax.random.key(0), logits, 2000, temperature=2.0)
    assert targets.indices.shape == targets.probs.shape == (4, 2000)
    wanted = scipy.special.softmax(np.float64(logits) / 2, axis=-1)
    counts = np.stack([np.bincount(row, minlength=5) for row in targets.indices])
    error = np.sqrt(wanted * (1 - wanted) / 2000)
    assert np.all(np.abs(counts / 2000 - wanted) <= 4.5 * error)  # 0 for the last
    assert len({row.tobytes() for row in np.asarray(targets.indices)}) == 4
    student = normal(0, (4, 5)).at[:, -1].set(0.0)
    slope = graded(student, targets, 2.0)[1]
    whole = jax.grad(lambda z: soft_target_loss(z, logits, 2.0).sum())(student)
    np.testing.assert_allclose(slope, whole, atol=2 * 4.5 * error.max())


def test_a_loss_of_draws_is_their_cross_entropy_less_their_entropy():
    student, teacher = normal(0, (3, 6)), normal(1, (3, 6))
    targets = draws_of(jax.random.key(2), teacher, 10)
    log_q = scipy.special.log_softmax(np.float64(student), axis=-1)
    cross = -np.take_along_axis(log_q, np.asarray(targets.indices), -1).mean(-1)
    counts = np.stack([np.bincount(row, minlength=6) for row in targets.indices])
    entropy = scipy.special.entr(counts / 10).sum(-1)
    np.testing.assert_allclose(loss_of(student, targets), cross - entropy, rtol=1e-5)


def test_padding_costs_nothing_and_has_no_gradient_whatever_it_holds():
    mask = jnp.array([[True, False], [False, True]])
    clean, targets = normal(0, (2, 2, 5)), targets_of(normal(1, (2, 2, 5)), 2)
    bad = jnp.where(mask[..., None], clean, jnp.array([jnp.nan] * 4 + [jnp.inf]))
    spoiled = SparseTargets(
        jnp.where(mask[..., None], targets.indices, 10**6),
        jnp.where(mask[..., None], targets.probs, jnp.nan),
    )

    def total(z, probs):
        filled = SparseTargets(spoiled.indices, probs)
        return loss_of(z, filled, 2.0, mask=mask).sum()

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    loss, slopes = both(bad, spoiled.probs)
    whole = loss_of(clean, targets, 2.0)
    np.testing.assert_allclose(loss, whole[0, 0] + whole[1, 1], rtol=1e-6)
    wanted = graded(clean, targets, 2.0)[1]
    np.testing.assert_allclose(slopes[0], jnp.where(mask[..., None], wanted, 0))
    np.testing.assert_array_equal(slopes[1][~mask], 0)
    each = loss_of(bad, spoiled, 2.0, mask=mask)
    np.testing.assert_array_equal(each[~mask], 0)


def test_classes_that_the_student_rules_out():
    targets = SparseTargets(jnp.array([0, 1]), jnp.array([0.75, 0.25]))
    ruled = jnp.array([1.0, 0.0, -jnp.inf])
    loss, slope = graded(ruled, targets)
    np.testing.assert_allclose(
        loss, loss_of(ruled[:2], targets), rtol=1e-6
    )  # a rest with no class in it
    chex.assert_tree_all_finite(slope)
    assert slope[2] == 0
    assert loss_of(jnp.array([0.0, -jnp.inf, 0.0]), targets) == jnp.inf
    unsaid = SparseTargets(jnp.array([0, 1]), jnp.array([0.75, 0.0]))
    loss, slope = graded(jnp.array([1.0, -jnp.inf, 0.0]), unsaid)
    assert jnp.isfinite(loss)
    chex.assert_tree_all_finite(slope)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_narrow_logits_are_computed_with_in_float32(name, strict):
    student, teacher = normal(0, (3, 6), name), normal(1, (3, 6), name)
    wide = [x.astype(jnp.float32) for x in (student, teacher)]
    targets = targets_of(teacher, 2, 2.0)
    chex.assert_trees_all_close(targets, targets_of(wide[1], 2, 2.0))
    chex.assert_type(list(targets), [jnp.int32, jnp.float32])

    loss, slope = graded(student, targets, 2.0)
    assert (loss.dtype, slope.dtype) == (jnp.float32, jnp.dtype(name))
    total, exact = graded(wide[0], targets, 2.0)
    np.testing.assert_allclose(loss, total, rtol=1e-6)
    np.testing.assert_array_equal(slope, exact.astype(name))
    drawn = draws_of(jax.random.key(0), teacher, 3)
    chex.assert_trees_all_close(drawn, draws_of(jax.random.key(0), wide[1], 3))


@pytest.mark.parametrize(("name", "bound"), [("float32", 8), ("bfloat16", 4)])
def test_no_second_copy_of_the_logits_exists(name, bound):
    shape = jax.ShapeDtypeStruct((512, 16384), name)
    few = jax.eval_shape(lambda z: top_k_targets(z, 8), shape)

    def loss(z, targets):
        return jnp.mean(sparse_target_loss(z, targets))

    def temporaries(fn, *args):
        return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes

    whole = 4 * shape.size
    # On a CPU a 16-bit gradient is copied, which is half of float32 logits.
    room = shape.size * 2 if name == "bfloat16" else 0
    ours = temporaries(jax.value_and_grad(loss), shape, few)
    assert ours - room < whole / 2
    dense = temporaries(
        jax.value_and_grad(lambda z, t: soft_target_loss(z, t).mean()), shape, shape
    )
    assert bound * ours < dense * 2
    assert temporaries(lambda z: top_k_targets(z, 8), shape) < whole / 2


def test_one_example_no_example_and_vmap():
    student, targets = normal(0, (3, 6)), targets_of(normal(1, (3, 6)), 3)
    each = loss_of(student, targets)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(sparse_target_loss))(student, targets), each
    )
    one = jax.tree.map(lambda x: x[1], targets)
    np.testing.assert_allclose(loss_of(student[1], one), each[1])
    none = jax.tree.map(lambda x: x[:0], targets)
    assert loss_of(student[:0], none).shape == (0,)
    assert targets_of(student[:0], 2).probs.shape == (0, 2)


def test_the_lower_of_two_equal_classes_comes_first():
    np.testing.assert_array_equal(targets_of(jnp.zeros(4), 2).indices, [0, 1])


def test_gradients_under_shard_map_are_those_without():
    student, targets = normal(0, (3, 6)), targets_of(normal(1, (3, 6)), 3)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("data",), axis_types=auto)
    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(
        lambda z, t: graded(z, t)[1], mesh=mesh, in_specs=spec, out_specs=spec
    )
    np.testing.assert_array_equal(
        jax.jit(mapped)(student, targets), graded(student, targets)[1]
    )


def test_lowers_for_every_platform():
    platforms = ("cpu", "cuda", "tpu")

    def loss(key, student, teacher):
        few = top_k_targets(teacher, 2), sampled_targets(key, teacher, 2)
        return sum(sparse_target_loss(student, x).sum() for x in few)

    args = jax.random.key(0), jnp.zeros((9, 3), jnp.bfloat16), jnp.zeros((9, 3))
    grad = jax.jit(jax.grad(loss, argnums=1))
    assert jax.export.export(grad, platforms=platforms)(*args).platforms == platforms


TWO = SparseTargets(jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1)))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: top_k_targets(jnp.zeros(3), 4),
            ValueError,
            "top_k_targets needs 1 <= k <= 3, got 4",
        ),
        (
            lambda: top_k_targets(jnp.zeros(3), 1.5),
            TypeError,
            "top_k_targets needs an integer k, got 1.5",
        ),
        (
            lambda: top_k_targets(jnp.zeros(3, int), 1),
            TypeError,
            r"top_k_targets needs a floating array, got int32\[3\]",
        ),
        (
            lambda: top_k_targets(jnp.zeros((2, 0)), 1),
            ValueError,
            r"top_k_targets needs logits \[..., classes\], got float32\[2, 0\]",
        ),
        (
            lambda: top_k_targets(jnp.zeros(3), 1, 0.0),
            ValueError,
            "top_k_targets needs temperature > 0, got 0.0",
        ),
        (
            lambda: sampled_targets(jax.random.key(0), jnp.zeros(3), 0),
            ValueError,
            "sampled_targets needs 1 <= draws <= .*, got 0",
        ),
        (
            lambda: sparse_target_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3))),
            TypeError,
            "sparse_target_loss needs SparseTargets, got .*Array",
        ),
        (
            lambda: sparse_target_loss(jnp.zeros((3, 3)), TWO),
            ValueError,
            r"got indices int32\[2, 1\], probs float32\[2, 1\] and student float32\[3,",
        ),
        (
            lambda: sparse_target_loss(jnp.zeros((2, 3)), TWO, mask=jnp.ones(3, bool)),
            ValueError,
            r"needs a mask of the shape of what it returns, \[2\], got bool\[3\]",
        ),
        (
            lambda: sparse_target_loss(jnp.zeros((2, 3)), TWO, math.nan),
            ValueError,
            "sparse_target_loss needs temperature > 0, got nan",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_that_shows_it(call, kind, text):
    with pytest.raises(kind, match=text):
        call()
