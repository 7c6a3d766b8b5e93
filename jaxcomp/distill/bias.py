"""Biases for classes that a student never saw."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check


TURNS = 100  # at most; five classes of 60,000 examples took 7


def unseen_class_bias(logits: Any, frequency: Mapping[int, float]) -> jax.Array:
    """Biases that make classes win as often as they should, to be added to the logits.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network",
    arXiv:1503.02531, section 3: a student that never saw a class learns it from the
    teacher's soft targets, but finds it too rarely, which a bias mends. The paper takes
    the bias that does best on the labelled test set; this one needs no labels, but only
    how often the class occurs.

    Args:
      logits: float[n, classes], the student's, of examples like those to come; they
        need no labels.
      frequency: class -> the fraction of examples in which it is to be predicted, in
        [0, 1]. At least one class, as a rule all those seen, is left out.

    Returns:
      float32[classes]: 0 for the classes left out, so that none of them gains on
      another. Add it, in float32, to the logits or to the bias of the last layer. Each
      class of ``frequency`` is then the argmax of exactly ``round(fraction * n)``
      examples, half to even; should that be more than all of them, what was rounded up
      most has one less. A bias is 0 where that is so already, else halfway between the
      two examples that it parts. Examples in which a class is equally far from winning
      cannot be parted, nor can those that float32 sums of logit and bias do not tell
      apart: the class then wins in the nearest number that can be had, the lower of
      two. Several such classes, which disturb each other, come as near in all as they
      did in 100 turns.

    Raises:
      ValueError: ``logits`` are not a finite matrix, ``frequency`` names no class or
        all, or fractions are out of range or more than 1 in all.
      TypeError: ``logits`` are not floating.

    >>> logits = jnp.array([[2.0, 1.0], [3.0, 0.0], [4.0, 2.0], [1.0, 3.0]])
    >>> unseen_class_bias(logits, {1: 0.5})  # loses by 1, 3 and 2, wins by 2
    Array([0. , 1.5], dtype=float32)
    """
    wide = _checked(logits)
    counts = _counts(frequency, *wide.shape)
    groups = [[label] for label in counts]
    if len(counts) > 1:
        # Alone, two classes that are much alike overtake each other in small steps.
        groups.append(list(counts))
    bias = np.zeros(wide.shape[1])
    found, least = bias, math.inf
    before: Any = None
    # A turn lowers sum(max(logits + bias)) - sum(counts * bias), a convex function with
    # the slope (wins - counts): without ties, turns do not go in circles.
    for _ in range(TURNS):
        wins = np.argmax(np.float32(wide) + np.float32(bias), axis=1)
        off = sum(abs(np.sum(wins == label) - count) for label, count in counts.items())
        if off <= least:
            found, least = bias.copy(), off
        if not off or np.array_equal(wins, before):
            break
        before = wins
        for group in groups:
            count = sum(counts[label] for label in group)
            margins = _margins(wide + bias, group)
            if np.count_nonzero(margins < 0) != count:
                bias[group] += _split(margins, count)
    return jnp.asarray(found, jnp.float32)


def _margins(logits: np.ndarray, group: list[int]) -> np.ndarray:
    """float64[n]: what the logits of a group must gain so that one of them wins."""
    others = np.delete(logits, group, axis=1).max(axis=1)
    return others - logits[:, group].max(axis=1)


def _split(margins: np.ndarray, count: int) -> float:
    """A value above ``count`` of the margins, or as near to that as ties allow."""
    margins = np.sort(margins)
    ends = np.concatenate([[margins[0] - 2], margins, [margins[-1] + 2]])
    places = np.flatnonzero(ends[:-1] < ends[1:])  # so many margins may lie below
    place = places[np.argmin(np.abs(places - count))]
    return (ends[place] + ends[place + 1]) / 2


def _checked(logits: Any) -> np.ndarray:
    """The logits in float64, in which their differences are exact enough to sort."""
    logits = jnp.asarray(logits)
    if not _check.is_floating(logits):
        raise TypeError(
            f"unseen_class_bias needs floating logits, got {_check.describe(logits)}."
        )
    if logits.ndim != 2 or not logits.size:
        raise ValueError(
            "unseen_class_bias needs logits of shape [n, classes] and at least one "
            f"example, got {_check.describe(logits)}. Reshape them to two axes."
        )
    wide = np.asarray(logits, np.float64)
    faults = np.argwhere(~np.isfinite(wide))
    if len(faults):
        index = tuple(map(int, faults[0]))
        raise ValueError(
            f"unseen_class_bias needs finite logits, but {_check.describe(logits)} "
            f"hold {wide[index]} at index {index} ({len(faults)} such of {wide.size}). "
            "Leave these examples out."
        )
    return wide


def _counts(frequency: Mapping[int, float], n: int, classes: int) -> dict[int, int]:
    """In how many of ``n`` examples each class is to win."""
    if not 0 < len(frequency) < classes:
        raise ValueError(
            "unseen_class_bias needs at least one class in `frequency` and one left "
            f"out of it, got {list(frequency)} of {classes} classes."
        )
    exact: dict[int, Fraction] = {}
    for label, fraction in frequency.items():
        _check.integer_within("unseen_class_bias", "class", label, 0, classes - 1)
        if not 0 <= fraction <= 1:
            raise ValueError(
                "unseen_class_bias needs 0 <= fraction <= 1 for each class, got "
                f"{fraction} for class {label}."
            )
        # As the decimal that it prints as: 0.35 of 90 is 31.5, and not less.
        exact[int(label)] = Fraction(str(float(fraction))) * n
    counts = {label: round(count) for label, count in exact.items()}
    over = sum(counts.values()) - n
    if over > 0 and float(sum(exact.values())) > n * (1 + 1e-9):
        raise ValueError(
            f"unseen_class_bias needs fractions of at most 1 in all, got {frequency}: "
            f"{sum(counts.values())} of {n} examples."
        )
    rounded_up = sorted(exact, key=lambda label: exact[label] - counts[label])
    for label in rounded_up[: max(over, 0)]:
        counts[label] -= 1
    return counts
