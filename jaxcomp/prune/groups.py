"""Slices of parameters that live or die together, as plain data.

A unit of a net is a column of one kernel, its bias, a row of the next kernel, and what
else is shaped by it. Such slices are one *group*; groups that are alike are a *family*.
`jaxcomp.program.coupled_groups` finds them; scores, budgets and transformations take
them from here, and know nothing of programs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcomp.node import densify, flatten
from jaxcomp.tree import list_paths


# Name of a family -> bool[groups]: which of its groups stay.
Keep = Mapping[str, Any]


class Member(NamedTuple):
    """What the groups of a family own of one axis of one parameter."""

    path: str
    axis: int
    indices: np.ndarray  # int32[groups, each]: row g is what group g owns


class Family(NamedTuple):
    """Groups that are alike: each owns as many slices of the same axes."""

    name: str
    members: tuple[Member, ...]
    exact: bool  # removing a group is the same as setting it to zero
    reason: str  # why it is not, with the line of the source; "" if it is

    @property
    def size(self) -> int:
        """How many groups there are."""
        return len(self.members[0].indices)

    @property
    def groups(self) -> list[list[tuple[str, int, list[int]]]]:
        """One list of (path, axis, indices) for each group."""
        return [
            [(m.path, m.axis, m.indices[g].tolist()) for m in self.members]
            for g in range(self.size)
        ]


class Term(NamedTuple):
    """A cost that falls as groups go: ``factor`` times the product of some lengths.

    A length is that of an axis: a number that is fixed, and for some families how many
    indices each of their groups has of it.
    """

    factor: int
    lengths: tuple[tuple[int, tuple[tuple[str, float], ...]], ...]

    def at(self, kept: Mapping[str, int]) -> float:
        """What it costs when so many groups of each family are kept.

        >>> kernel = Term(1, ((784, ()), (0, (("units of up", 1),))))
        >>> kernel.at({"units of up": 100})
        78400
        """
        cost: float = self.factor
        for fixed, parts in self.lengths:
            cost *= fixed + sum(each * kept[family] for family, each in parts)
        return cost


def total(terms: Iterable[Term], kept: Mapping[str, int]) -> float:
    """What all of them cost together."""
    return sum(term.at(kept) for term in terms)


def gone_slices(
    caller: str, families: Iterable[Family], keep: Keep
) -> dict[tuple[str, int], np.ndarray]:
    """The indices that go, of every axis that loses some.

    Args:
      caller: who asks, for the error.
      families: groups.
      keep: name of a family -> bool[groups]; one that is left out stays whole.

    Returns:
      (path, axis) -> int[], in order.

    Raises:
      ValueError: a name is not that of a family, a mask has the wrong length, or keeps
        nothing.
    """
    known = {family.name: family for family in families}
    for name, mask in keep.items():
        if name not in known:
            raise ValueError(
                f"{caller} needs names of families in `keep`, got {name!r}. The "
                f"{len(known)} families are {list_paths(list(known))}."
            )
        shape, size = np.shape(mask), known[name].size
        if shape != (size,) or np.asarray(mask).dtype != bool:
            raise ValueError(
                f"{caller} needs bool[{size}] for the {size} groups of {name!r}, got "
                f"{np.asarray(mask).dtype}{list(shape)}."
            )
        if not np.any(mask):
            raise ValueError(
                f"{caller} needs at least one group of {name!r} to be kept, got none."
            )
    gone: dict[tuple[str, int], list[np.ndarray]] = {}
    for name, mask in keep.items():
        for path, axis, indices in known[name].members:
            parts = indices[~np.asarray(mask)].reshape(-1)
            gone.setdefault((path, axis), []).append(parts)
    found = {at: np.sort(np.concatenate(parts)) for at, parts in gone.items()}
    return {at: indices for at, indices in found.items() if indices.size}


def member_leaves(
    caller: str, params: Any, families: Sequence[Family]
) -> dict[str, jax.Array]:
    """Path -> array, once every member is known to fit the leaf that it is a part of.

    Raises:
      ValueError: a leaf is missing, or has no such axis or index.
    """
    paths, leaves, _ = flatten(densify(params))
    table = dict(zip(paths, leaves, strict=True))
    for family in families:
        for member in family.members:
            if member.path not in table:
                raise ValueError(
                    f"{caller} needs the leaf {member.path!r} of family "
                    f"{family.name!r}, got {list_paths(paths) or 'no leaf'}. Pass the "
                    "params that the families were found for."
                )
            check_fits(caller, family, member, table[member.path])
    return table


def check_fits(caller: str, family: Family, member: Member, leaf: Any) -> None:
    """Raises unless a leaf has all that the family owns of it."""
    last = int(np.max(member.indices, initial=0))
    shape = np.shape(leaf)
    if not 0 <= member.axis < len(shape) or last >= shape[member.axis]:
        raise ValueError(
            f"{caller} needs index {last} of axis {member.axis} of leaf "
            f"{member.path!r} for family {family.name!r}, got shape {list(shape)}. "
            "Pass the params that the families were found for."
        )
