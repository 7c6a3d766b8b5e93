"""Budgets over groups are those of a plain loop that removes one group at a time."""

import re
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.prune.group_budgets import (
    cost_budget,
    family_budget,
    global_group_budget,
)
from jaxcomp.prune.groups import Family, Member, Term, total


def family(name, size):
    return Family(name, (Member(name, 0, np.arange(size)[:, None]),), True, "")


SIZES = {"up": 10, "heads": 3, "stream": 7}
FAMILIES = [family(*pair) for pair in SIZES.items()]
# A bias, a kernel between two families, a table, and what is never cut.
TERMS = (
    Term(1, ((0, (("up", 1),)),)),
    Term(1, ((0, (("stream", 1),)), (0, (("up", 2),)))),
    Term(5, ((4, (("heads", 3),)), (0, (("stream", 1),)))),
    Term(100, ()),
)
LEVELS = st.sampled_from([-1.0, -0.0, 0.0, 2.0, np.inf])
SCORES = st.lists(LEVELS, min_size=20, max_size=20).map(
    lambda flat: {"up": flat[:10], "heads": flat[10:13], "stream": flat[13:]}
)
PERCENT = st.integers(0, 99)
MULTIPLES = st.sampled_from([1, 2, 4])


def up_to(multiple, at_least, kept, size):
    """The least multiple that is no less, or all there are."""
    for more in range(max(kept, at_least), size):
        if more % multiple == 0:
            return more
    return size


def best(scores, kept):
    """The best of each family, and of equals the first."""
    masks = {}
    for name, score in scores.items():
        order = sorted(range(len(score)), key=lambda g: (-score[g], g))
        masks[name] = [g in order[: kept[name]] for g in range(len(score))]
    return masks


def reference(scores, cost, target, multiple, at_least):
    """The first groups of a line that bring the cost down; None if all do not."""
    names, kept = list(scores), {n: len(s) for n, s in scores.items()}
    line = [(s, f, g) for f, n in enumerate(names) for g, s in enumerate(scores[n])]
    line.sort(key=lambda group: (group[0], -group[1], -group[2]))
    while True:
        rounded = {
            n: up_to(multiple, at_least, k, len(scores[n])) for n, k in kept.items()
        }
        if cost(rounded) <= target:
            return best(scores, rounded)
        open_to = [group for group in line if kept[names[group[1]]] > at_least]
        if not open_to:
            return None
        line.remove(open_to[0])
        kept[names[open_to[0][1]]] -= 1


def assert_masks(found, expected):
    assert {name: mask.tolist() for name, mask in found.items()} == expected
    assert all(mask.dtype == bool for mask in found.values())


# family_budget


def test_every_family_loses_its_own_lowest():
    scores = {"up": np.arange(10.0), "heads": np.ones(3), "stream": -np.arange(7.0)}
    found = family_budget(scores, FAMILIES, 0.5)  # 5, and 1.5 and 3.5 half to even
    assert list(found) == list(SIZES)
    assert found["up"].tolist() == [False] * 5 + [True] * 5
    assert found["heads"].tolist() == [True, False, False]
    assert found["stream"].tolist() == [True] * 3 + [False] * 4


@given(SCORES, PERCENT, MULTIPLES, st.integers(1, 4))
def test_counts_of_families_are_exact_and_rounded_up(scores, percent, multiple, least):
    found = family_budget(
        scores, FAMILIES, percent / 100, multiple=multiple, at_least=least
    )
    gone = {n: round(Fraction(percent, 100) * k) for n, k in SIZES.items()}
    kept = {n: up_to(multiple, least, k - gone[n], k) for n, k in SIZES.items()}
    assert_masks(found, best(scores, kept))


def test_a_family_without_a_score_or_a_sparsity_stays_whole():
    scores = {"up": np.arange(10.0), "heads": np.arange(3.0)}
    found = family_budget(scores, FAMILIES, {"up": 0.3})
    assert {n: int(mask.sum()) for n, mask in found.items()} == SIZES | {"up": 7}


def test_a_family_smaller_than_the_multiple_stays_whole():
    scores = {n: np.arange(float(k)) for n, k in SIZES.items()}
    found = family_budget(scores, FAMILIES, 0.9, multiple=8)
    assert {n: int(m.sum()) for n, m in found.items()} == SIZES | {"up": 8}


# global_group_budget


def test_the_lowest_go_wherever_they_are():
    scores = {"up": np.arange(10.0), "heads": np.full(3, 9.0), "stream": np.zeros(7)}
    found = global_group_budget(scores, FAMILIES, 0.5)
    # All but one of the stream, then four of up: the later of the zeros first.
    assert found["stream"].tolist() == [True] + [False] * 6
    assert found["up"].tolist() == [False] * 4 + [True] * 6
    assert found["heads"].all()


@given(SCORES, PERCENT, MULTIPLES, st.integers(1, 3))
def test_global_groups_are_those_of_the_line(scores, percent, multiple, least):
    target = 20 - round(Fraction(percent, 100) * 20)
    expected = reference(scores, lambda k: sum(k.values()), target, multiple, least)
    if expected is None:
        with pytest.raises(ValueError, match="cannot get down"):
            global_group_budget(
                *(scores, FAMILIES, percent / 100),
                **{"multiple": multiple, "at_least": least},
            )
        return
    found = global_group_budget(
        scores, FAMILIES, percent / 100, multiple=multiple, at_least=least
    )
    assert_masks(found, expected)
    kept = sum(mask.sum() for mask in found.values())
    assert kept == target if multiple == 1 else kept <= target


# cost_budget


def test_a_cost_by_hand():
    terms = (Term(1, ((0, (("a", 1),)), (0, (("b", 1),)))),)  # a kernel [a, b]
    families = [family("a", 3), family("b", 4)]
    scores = {"a": np.array([1.0, 9.0, 5.0]), "b": np.array([2.0, 8.0, 3.0, 7.0])}
    for target, kept in ((12, (3, 4)), (11, (2, 4)), (6, (2, 3)), (5, (2, 2))):
        found = cost_budget(scores, families, terms, target)
        assert (found["a"].sum(), found["b"].sum()) == kept
    assert found["a"].tolist() == [False, True, True]
    assert found["b"].tolist() == [False, True, False, True]


@given(SCORES, PERCENT, MULTIPLES, st.integers(1, 3))
def test_a_cost_is_met_by_the_least_of_the_line(scores, percent, multiple, least):
    whole = total(TERMS, SIZES)
    target = percent / 100 * whole
    expected = reference(scores, lambda k: total(TERMS, k), target, multiple, least)
    if expected is None:
        with pytest.raises(ValueError, match="cannot get down"):
            cost_budget(
                *(scores, FAMILIES, TERMS, target),
                **{"multiple": multiple, "at_least": least},
            )
        return
    found = cost_budget(
        scores, FAMILIES, TERMS, target, multiple=multiple, at_least=least
    )
    assert_masks(found, expected)
    assert total(TERMS, {n: int(m.sum()) for n, m in found.items()}) <= target


def test_a_family_without_a_score_is_counted_whole():
    found = cost_budget({"up": np.arange(10.0)}, FAMILIES, TERMS, 700)
    # 100 and 455 for the others; each of up is 1 + 14.
    assert {n: int(mask.sum()) for n, mask in found.items()} == SIZES | {"up": 9}


def test_a_cost_that_cannot_be_met_says_what_can():
    text = (
        "cost_budget cannot get down to 50 of 705: with at_least=1 and multiple=4 no "
        "less than 396 can stay. Ask for that, lower these two, or score more families."
    )
    scores = {n: np.arange(float(k)) for n, k in SIZES.items()}
    with pytest.raises(ValueError, match=re.escape(text)):
        cost_budget(scores, FAMILIES, TERMS, 50, multiple=4)
    found = cost_budget(scores, FAMILIES, TERMS, 396, multiple=4)
    assert [int(mask.sum()) for mask in found.values()] == [4, 3, 4]


def test_a_hundred_and_fifty_thousand_groups_take_no_time():
    sizes = {f"layer {i}": 1500 for i in range(100)}
    families = [family(*pair) for pair in sizes.items()]
    random = np.random.default_rng(0)
    scores = {n: random.normal(size=k) for n, k in sizes.items()}
    terms = [Term(1, ((9, ()), (0, ((n, 1),)))) for n in sizes]
    start = time.process_time()
    found = cost_budget(scores, families, terms, 0.3 * total(terms, sizes))
    assert time.process_time() - start < 2
    kept = np.concatenate(list(found.values()))
    assert kept.sum() == 45_000
    together = np.concatenate(list(scores.values()))
    assert together[kept].min() > together[~kept].max()


# Errors


def test_what_is_given_for_no_family_is_an_error():
    known = "which is not one of the 3 families: up, heads, stream."
    scores = {"up": np.ones(10)}
    with pytest.raises(ValueError, match=re.escape(f"has scores for 'z', {known}")):
        global_group_budget({"z": np.ones(3)}, FAMILIES, 0.5)
    terms = [Term(1, ((0, (("z", 1),)),))]
    with pytest.raises(ValueError, match=re.escape(f"has a cost for 'z', {known}")):
        cost_budget(scores, FAMILIES, terms, 1)
    text = (
        "family_budget has a sparsity for 'heads', which is not one of the 1 families "
        "that have scores: up."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        family_budget(scores, FAMILIES, {"heads": 0.5})


@pytest.mark.parametrize(
    ("score", "got"),
    [(np.ones(4), "[4], 0"), (np.array([1, np.nan, 2]), "[3], 1"), (1.0, "[], 0")],
)
def test_scores_must_be_a_number_for_each_group(score, got):
    text = (
        "global_group_budget needs a number for each of the 3 groups of family "
        f"'heads', got scores of shape {got} of them NaN."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        global_group_budget({"heads": score}, FAMILIES, 0.5)


@pytest.mark.parametrize("sparsity", [1.0, -0.5, {"up": 1.0}])
def test_family_budget_needs_sparsities_in_range(sparsity):
    with pytest.raises(ValueError, match="family_budget needs 0 <= sparsity < 1"):
        family_budget({"up": np.ones(10)}, FAMILIES, sparsity)


def test_numbers_that_are_none_are_errors():
    scores = {"up": np.ones(10)}
    with pytest.raises(ValueError, match="global_group_budget needs 0 <= sparsity < 1"):
        global_group_budget(scores, FAMILIES, 1.0)
    with pytest.raises(ValueError, match="cost_budget needs a number for target"):
        cost_budget(scores, FAMILIES, TERMS, float("nan"))
    for name in ("multiple", "at_least"):
        with pytest.raises(ValueError, match=f"cost_budget needs 1 <= {name} <= "):
            cost_budget(scores, FAMILIES, TERMS, 500, **{name: 0})


def test_no_families_have_nothing_to_keep():
    assert family_budget({}, [], 0.5) == {}
    assert global_group_budget({}, [], 0.5) == {}
    assert cost_budget({}, [], [], 0) == {}
