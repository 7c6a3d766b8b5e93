"""A class that the student never saw wins as often as it should, and no other moves."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcomp.distill.bias import unseen_class_bias


# Fifteen examples and four classes, all sums exact in float32.
DISTINCT = hnp.arrays(
    np.float32,
    (15, 4),
    elements=st.integers(-(2**16), 2**16).map(lambda i: i / 64),
    unique=True,
)


def wins(logits, bias, label):
    return int(np.sum(np.argmax(np.asarray(logits) + np.asarray(bias), 1) == label))


def test_one_class_by_hand():
    logits = jnp.array([[2.0, 1.0, 0.0], [0.0, 4.0, 0.0], [5.0, 0.0, 1.0]])
    # Class 2 loses by 2, 4 and 4.
    bias = unseen_class_bias(logits, {2: 1 / 3})
    np.testing.assert_array_equal(bias, [0, 0, 3])
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(unseen_class_bias(logits, {2: 1.0}), [0, 0, 5])


def test_a_class_that_wins_too_often_is_held_back():
    logits = jnp.array([[9.0, 1.0], [4.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
    np.testing.assert_array_equal(unseen_class_bias(logits, {0: 0.25}), [-5.5, 0])
    assert wins(logits, unseen_class_bias(logits, {0: 0.0}), 0) == 0


def test_a_class_that_wins_as_often_as_it_should_keeps_its_logits():
    logits = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_array_equal(unseen_class_bias(logits, {0: 0.5}), [0, 0])


@given(DISTINCT, st.floats(0, 1))
def test_one_class_wins_in_the_nearest_number_that_ties_allow(logits, fraction):
    bias = unseen_class_bias(logits, {1: fraction})
    margins = np.delete(logits, 1, axis=1).max(axis=1) - logits[:, 1]
    count = round(fraction * 15)
    off = abs(wins(logits, bias, 1) - count)
    possible = [np.sum(margins <= m) for m in margins] + [0]
    assert off == min(abs(p - count) for p in possible)
    if len(set(margins.tolist())) == 15:
        assert off == 0


def test_halves_that_are_rounded_up_together_are_no_more_than_all():
    logits = np.arange(60.0, dtype=np.float32).reshape(15, 4) ** 2 % 37
    bias = unseen_class_bias(logits, {3: 0.5, 0: 0.5})  # 7.5 each
    assert [wins(logits, bias, label) for label in (3, 0)] == [7, 8]


@given(DISTINCT, st.floats(0, 0.5), st.floats(0, 0.5))
def test_the_seen_classes_do_not_gain_on_each_other(logits, one, two):
    bias = unseen_class_bias(logits, {3: one, 0: two})
    np.testing.assert_array_equal(bias[1:3], 0)
    moved = logits + np.asarray(bias)
    np.testing.assert_array_equal(moved[:, 1:3].argmax(1), logits[:, 1:3].argmax(1))


@pytest.mark.parametrize("unseen", [1, 3, 5])
def test_several_classes_all_win_as_often_as_they_should(unseen):
    rng = np.random.default_rng(unseen)
    logits = rng.normal(size=(1000, 6)).astype(np.float32)
    logits[:, :unseen] -= 5
    wanted = {label: 0.1 + 0.01 * label for label in range(unseen)}
    bias = unseen_class_bias(jnp.asarray(logits), wanted)
    found = [wins(logits, bias, label) for label in wanted]
    assert found == [100 + 10 * label for label in wanted]


def test_two_classes_that_are_much_alike_come_to_share():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 3)).astype(np.float32)
    logits[:, 1] = logits[:, 0] + 1e-2 * rng.normal(size=200)
    logits[:, :2] -= 20
    bias = unseen_class_bias(logits, {0: 0.2, 1: 0.3})
    assert [wins(logits, bias, label) for label in (0, 1)] == [40, 60]


def test_the_count_is_the_decimals_half_to_even():
    logits = jnp.stack([jnp.arange(90.0), jnp.zeros(90)], axis=1)
    assert wins(logits, unseen_class_bias(logits, {0: 0.35}), 0) == 32  # 31.5
    assert wins(logits, unseen_class_bias(logits, {0: 0.25}), 0) == 22  # 22.5


def test_ties_go_the_nearer_way_and_the_lower_of_two():
    logits = jnp.array([[1.0, 0.0]] * 4)
    assert wins(logits, unseen_class_bias(logits, {1: 0.75}), 1) == 4
    assert wins(logits, unseen_class_bias(logits, {1: 0.25}), 1) == 0
    assert wins(logits, unseen_class_bias(logits, {1: 0.5}), 1) == 0
    assert wins(logits, unseen_class_bias(logits, {0: 0.5}), 0) == 0
    level = jnp.zeros((4, 3))
    assert wins(level, unseen_class_bias(level, {0: 0.5, 1: 0.5}), 2) in (0, 4)


def test_one_example_and_narrow_logits_do():
    bias = unseen_class_bias(jnp.array([[3.0, 1.0]], jnp.bfloat16), {1: 1.0})
    np.testing.assert_array_equal(bias, [0, 3])


def test_fixes_a_class_that_was_never_seen():
    """Three blobs; the logits of the third are right but for their level."""
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3, 3000)
    logits = 4 * np.eye(3)[label] + rng.normal(size=(3000, 3))
    logits[:, 2] -= 4
    bias = unseen_class_bias(logits.astype(np.float32), {2: np.mean(label == 2)})
    right = {
        name: np.mean((logits + b).argmax(1)[label == 2] == 2)
        for name, b in (("before", np.zeros(3)), ("after", np.asarray(bias)))
    }
    assert right["before"] < 0.5
    assert right["after"] > 0.98


@pytest.mark.parametrize(
    ("logits", "frequency", "message"),
    [
        (jnp.zeros(3), {0: 0.1}, r"shape \[n, classes\].* got float32\[3\]"),
        (jnp.zeros((0, 3)), {0: 0.1}, r"at least one example, got float32\[0, 3\]"),
        (
            jnp.array([[0.0, jnp.nan]]),
            {0: 0.1},
            r"finite logits, but float32\[1, 2\] hold nan at index \(0, 1\)",
        ),
        (jnp.zeros((2, 3)), {}, r"at least one class .* got \[\] of 3 classes"),
        (jnp.zeros((2, 2)), {0: 0.1, 1: 0.1}, r"one left out of it, got \[0, 1\] of 2"),
        (jnp.zeros((2, 3)), {3: 0.1}, "0 <= class <= 2, got 3"),
        (jnp.zeros((2, 3)), {1: 1.5}, "fraction <= 1 .* got 1.5 for class 1"),
        (jnp.zeros((2, 3)), {1: float("nan")}, "got nan for class 1"),
        (jnp.zeros((9, 3)), {0: 0.6, 1: 0.6}, r"at most 1 in all.* 10 of 9 examples"),
    ],
)
def test_what_cannot_be_is_an_error(logits, frequency, message):
    with pytest.raises(ValueError, match=f"unseen_class_bias needs .*{message}"):
        unseen_class_bias(logits, frequency)


def test_integers_are_no_logits():
    with pytest.raises(TypeError, match=r"needs floating logits, got int32\[2, 2\]"):
        unseen_class_bias(jnp.zeros((2, 2), jnp.int32), {0: 0.5})


def test_a_class_is_an_integer():
    with pytest.raises(TypeError, match="needs an integer class, got 'cat'"):
        unseen_class_bias(jnp.zeros((2, 2)), {"cat": 0.5})
