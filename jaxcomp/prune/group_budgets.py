"""Which groups stay: scores of them in, bools out, on the host and exactly.

On a tie the earlier family and the lower index are kept. A family without a score stays
whole. Every budget takes two more numbers, of groups: at least ``at_least`` of a family
stay, and so many that ``multiple`` divides them, as hardware likes it, rounded up; a
family that has not as many stays whole.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcomp import _check
from jaxcomp.prune.groups import Family, Term, total
from jaxcomp.prune.top import check_sparsity, zeros_of
from jaxcomp.tree import list_paths


def family_budget(
    scores: Mapping[str, Any],
    families: Sequence[Family],
    sparsity: float | Mapping[str, float],
    *,
    multiple: int = 1,
    at_least: int = 1,
) -> dict[str, np.ndarray]:
    """The same sparsity in every family, or one that is given for each.

    Args:
      scores: name of a family -> float[groups], concrete, compared in float32; higher
        is more worth keeping.
      families: what is coupled, see `jaxcomp.program.coupled_groups`.
      sparsity: fraction of the groups to remove in [0, 1), or name -> fraction; a
        family that the mapping leaves out stays whole. Rounded half to even.
      multiple: what the number of groups that stay is a multiple of, rounded up.
      at_least: how many groups of each family stay.

    Returns:
      Name of a family -> bool[groups], of all families.

    Raises:
      ValueError: a sparsity is out of range, a name is not that of a family, or scores
        are not one number for each group.

    >>> from jaxcomp.prune.groups import Member
    >>> rows = Member("w", 0, np.arange(4)[:, None])
    >>> families = [Family("units", (rows,), True, "")]
    >>> family_budget({"units": np.array([3.0, 1.0, 4.0, 1.0])}, families, 0.25)
    {'units': array([ True,  True,  True, False])}
    """
    line = _line_up("family_budget", scores, families, multiple, at_least)
    if isinstance(sparsity, Mapping):
        known = "families that have scores"
        _check_names("family_budget", "a sparsity", sparsity, known, line.ranks)
        levels = dict(sparsity)
    else:
        levels = dict.fromkeys(line.ranks, sparsity)
    for level in levels.values():
        check_sparsity("family_budget", level)
    gone = {n: int(zeros_of(x, line.sizes[n])) for n, x in levels.items()}
    return line.best({n: size - gone.get(n, 0) for n, size in line.sizes.items()})


def global_group_budget(
    scores: Mapping[str, Any],
    families: Sequence[Family],
    sparsity: float,
    *,
    multiple: int = 1,
    at_least: int = 1,
) -> dict[str, np.ndarray]:
    """One threshold for all families: the lowest scores go, wherever they are.

    Liu et al., "Network Slimming", arXiv:1708.06519, have one for the whole net. Scores
    of different families must compare: see `normalized`.

    Args:
      scores, families, multiple, at_least: as in `family_budget`.
      sparsity: fraction of all groups that have a score to remove, in [0, 1). Exactly
        that many go if ``multiple`` is 1, else the least number in the order of the
        scores which is no less.

    Returns:
      Name of a family -> bool[groups], of all families.

    Raises:
      ValueError: as `family_budget`, or so many groups cannot go.

    >>> from jaxcomp.prune.groups import Member
    >>> def family(name):
    ...     return Family(name, (Member(name, 0, np.arange(3)[:, None]),), True, "")
    >>> scores = {"a": np.array([1.0, 2.0, 3.0]), "b": np.array([9.0, 2.0, 8.0])}
    >>> global_group_budget(scores, [family("a"), family("b")], 0.5)
    {'a': array([False, False,  True]), 'b': array([ True, False,  True])}
    """
    line = _line_up("global_group_budget", scores, families, multiple, at_least)
    check_sparsity("global_group_budget", sparsity)
    whole = sum(line.sizes[name] for name in scores)
    return line.lowest(
        lambda kept: sum(kept[name] for name in scores),
        whole - int(zeros_of(sparsity, whole)),
    )


def cost_budget(
    scores: Mapping[str, Any],
    families: Sequence[Family],
    terms: Iterable[Term],
    target: float,
    *,
    multiple: int = 1,
    at_least: int = 1,
) -> dict[str, np.ndarray]:
    """The lowest scores go, wherever they are, until the rest costs no more than asked.

    Args:
      scores, families, multiple, at_least: as in `global_group_budget`.
      terms: what is counted, parameters or multiply-adds; of all ``families``.
      target: the most that may be left, in the unit of ``terms``: ``0.5 * total(terms,
        {f.name: f.size for f in families})`` is half.

    Returns:
      Name of a family -> bool[groups], of all families: the least removal in the order
      of the scores that meets the target.

    Raises:
      ValueError: as `family_budget`, ``target`` is no number, a term is of another
        family, or the target cannot be met.

    >>> from jaxcomp.prune.groups import Member
    >>> family = Family("units", (Member("w", 1, np.arange(4)[:, None]),), True, "")
    >>> kernel = Term(1, ((10, ()), (0, (("units", 1),))))  # [10, units]
    >>> scores = {"units": np.array([3.0, 1.0, 4.0, 2.0])}
    >>> cost_budget(scores, [family], [kernel], target=25)
    {'units': array([ True, False,  True, False])}
    """
    line = _line_up("cost_budget", scores, families, multiple, at_least)
    _check.number("cost_budget", "target", target)
    terms = tuple(terms)
    parts = (part for term in terms for _, parts in term.lengths for part in parts)
    _check_names("cost_budget", "a cost", dict(parts), "families", line.sizes)
    return line.lowest(lambda kept: total(terms, kept), target)


class _Line(NamedTuple):
    """All groups that have a score, the lowest first."""

    caller: str
    multiple: int
    at_least: int
    sizes: dict[str, int]  # of all families
    ranks: dict[str, np.ndarray]  # of the groups that have a score; 0 is the best
    owners: np.ndarray  # int[groups]: the place of a family in `ranks`

    def rounded(self, kept: Mapping[str, int]) -> dict[str, int]:
        """How many groups stay, where so many of each family are wanted."""
        some = {n: max(k, self.at_least) for n, k in kept.items()}
        up = {n: -(-k // self.multiple) * self.multiple for n, k in some.items()}
        return {n: min(k, self.sizes[n]) for n, k in up.items()}

    def best(self, kept: Mapping[str, int]) -> dict[str, np.ndarray]:
        kept = self.rounded(kept)
        whole = {n: np.ones(size, bool) for n, size in self.sizes.items()}
        return whole | {n: rank < kept[n] for n, rank in self.ranks.items()}

    def lowest(
        self, cost: Callable[[Mapping[str, int]], float], target: float
    ) -> dict[str, np.ndarray]:
        """The first groups of the line go, as few as bring the cost to the target."""

        def after(gone: int) -> dict[str, int]:
            counts = np.bincount(self.owners[:gone], minlength=len(self.ranks))
            each = dict(zip(self.ranks, counts.tolist(), strict=True))
            return self.rounded({n: k - each.get(n, 0) for n, k in self.sizes.items()})

        least = cost(after(len(self.owners)))
        if least > target:
            whole = cost(self.sizes)
            raise ValueError(
                f"{self.caller} cannot get down to {target:,.15g} of {whole:,.15g}: "
                f"with at_least={self.at_least} and multiple={self.multiple} no less "
                f"than {least:,.15g} can stay. Ask for that, lower these two, or score "
                "more families."
            )
        low, high = 0, len(self.owners)
        while low < high:  # the cost never rises as more groups go
            middle = (low + high) // 2
            if cost(after(middle)) <= target:
                high = middle
            else:
                low = middle + 1
        return self.best(after(high))


def _line_up(
    caller: str,
    scores: Mapping[str, Any],
    families: Sequence[Family],
    multiple: int,
    at_least: int,
) -> _Line:
    _check.integer_within(caller, "multiple", multiple, 1, 2**31 - 1)
    _check.integer_within(caller, "at_least", at_least, 1, 2**31 - 1)
    sizes = {family.name: family.size for family in families}
    _check_names(caller, "scores", scores, "families", sizes)
    ranks, values = {}, []
    for name in (name for name in sizes if name in scores):
        value = np.asarray(scores[name], np.float32)
        if value.shape != (sizes[name],) or np.isnan(value).any():
            raise ValueError(
                f"{caller} needs a number for each of the {sizes[name]} groups of "
                f"family {name!r}, got scores of shape {list(value.shape)}, "
                f"{np.isnan(value).sum()} of them NaN."
            )
        rank = np.empty(value.size, int)
        rank[np.argsort(-value, kind="stable")] = np.arange(value.size)
        ranks[name] = rank
        values.append(value)
    together = np.concatenate([*values, np.empty(0, np.float32)])
    owners = np.repeat(np.arange(len(ranks)), [rank.size for rank in ranks.values()])
    rank = np.concatenate([*ranks.values(), np.empty(0, int)])
    order = np.argsort(-together, kind="stable")[::-1]  # the last of equals goes first
    order = order[rank[order] >= at_least]
    return _Line(caller, multiple, at_least, sizes, ranks, owners[order])


def _check_names(
    caller: str, what: str, given: Iterable[str], which: str, known: Mapping[str, Any]
) -> None:
    """Raises if something is given for what is not known."""
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"{caller} has {what} for {unknown[0]!r}, which is not one of the "
            f"{len(known)} {which}: {list_paths(list(known))}."
        )
