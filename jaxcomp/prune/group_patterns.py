"""Groups as zeros in the leaves of a tree: masks of them, found and chosen."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.node import densify, flatten
from jaxcomp.prune.budgets import Budget
from jaxcomp.prune.groups import (
    Family,
    Keep,
    check_fits,
    gone_slices,
    member_leaves,
)
from jaxcomp.tree import is_trained, list_paths


def group_masks(params: Any, families: Sequence[Family], keep: Keep) -> Any:
    """Masks that zero all that the removed groups own.

    Args:
      params: any pytree of arrays and nodes.
      families: what is coupled, see `jaxcomp.program.coupled_groups`.
      keep: name of a family -> bool[groups], concrete; families that are left out stay
        whole.

    Returns:
      A tree of bools shaped like ``params`` for `apply_masks`: bool[*shape] where
      something goes, the scalar True elsewhere. The means and variances of batch norm
      are zeroed too.

    Raises:
      ValueError: ``keep`` has an unknown family, not one bool for each group, or
        nothing of a family; or ``params`` does not fit the families.

    >>> from jaxcomp.prune.groups import Family, Member
    >>> rows = Member("w", 0, np.array([[0], [1]]))
    >>> family = Family("units", (rows,), True, "")
    >>> group_masks({"w": jnp.ones((2, 3))}, [family], {"units": [True, False]})
    {'w': Array([[ True,  True,  True],
           [False, False, False]], dtype=bool)}
    """
    table = member_leaves("group_masks", params, families)
    found: dict[str, jax.Array] = {}
    for (path, axis), indices in gone_slices("group_masks", families, keep).items():
        shape = table[path].shape
        stays = np.ones(shape[axis], bool)
        stays[indices] = False
        found[path] = found.get(path, True) & _along(axis, jnp.asarray(stays), shape)
    paths, _, treedef = flatten(params)
    true = jnp.ones((), bool)
    return jax.tree.unflatten(treedef, [found.get(path, true) for path in paths])


def _along(axis: int, stays: jax.Array, shape: Sequence[int]) -> jax.Array:
    """bool[d] of an axis, as bool[*shape]."""
    lengths = [length if a == axis else 1 for a, length in enumerate(shape)]
    return jnp.broadcast_to(stays.reshape(lengths), shape)


def kept_groups(tree: Any, families: Sequence[Family]) -> dict[str, np.ndarray]:
    """Which groups have anything left: the ``keep`` of pruned params, or of masks.

    A group is kept if any entry that it owns is not zero. The mean and the var of batch
    norm do not count, nor does a leaf that has a scalar mask; a family of which nothing
    counts is whole.

    Args:
      tree: concrete params, or masks of them, e.g. of the state of `prune_gradually`.
      families: what is coupled, see `jaxcomp.program.coupled_groups`.

    Returns:
      Name of a family -> bool[groups].

    Raises:
      ValueError: ``tree`` does not fit the families.

    >>> from jaxcomp.prune.groups import Family, Member
    >>> rows = Member("w", 0, np.array([[0], [1]]))
    >>> params = {"w": jnp.array([[0.0, 0.0], [0.0, 3.0]])}
    >>> kept_groups(params, [Family("units", (rows,), True, "")])
    {'units': array([False,  True])}
    """
    paths, leaves, _ = flatten(densify(tree))
    table = {
        path: np.asarray(leaf) != 0
        for path, leaf in zip(paths, leaves, strict=True)
        if np.ndim(leaf) and is_trained(path, leaf)
    }
    found = {}
    for family in families:
        counted = [m for m in family.members if m.path in table]
        kept = np.full(family.size, not counted)
        for m in counted:
            alive = table[m.path]
            check_fits("kept_groups", family, m, alive)
            others = tuple(a for a in range(alive.ndim) if a != m.axis)
            kept |= alive.any(axis=others)[m.indices].any(axis=1)
        found[family.name] = kept
    return found


def _paths_of(family: Family) -> str:
    return list_paths(sorted({m.path for m in family.members}))


def in_groups(budget: Budget, families: Sequence[Family]) -> Budget:
    """A budget that keeps or removes whole groups, in all leaves that they lie in.

    Fang et al., "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900, for
    groups that lie in several leaves. The score of a group is the mean of its entries,
    so that a global budget may compare families. The best group of each family stays,
    whatever the budget says.

    Args:
      budget: what decides about groups: `leaf_budget`, to which a family is a leaf, or
        `global_budget`. It sees one score for each group, float32[groups], and its
        counts are exact in groups.
      families: what is coupled, see `jaxcomp.program.coupled_groups`.

    Returns:
      A `Budget`, also for a traced sparsity; its masks have the shapes of the leaves.
      Biases and norms are cut only if they are selected: pass ``where=is_trained``.

    Raises:
      ValueError: from the budget, if no leaf of a family is selected, or one does not
        fit.

    >>> from jaxcomp.prune.groups import Family, Member
    >>> rows = Member("w", 0, np.array([[0], [1]]))
    >>> pattern = in_groups(lambda s, _: {"units": s["units"] > 2},
    ...     [Family("units", (rows,), True, "")])
    >>> pattern({"w": jnp.array([[1.0, 2.0], [0.0, 5.0]])}, 0.5)
    {'w': Array([[False, False],
           [ True,  True]], dtype=bool)}
    """

    def grouped(scores: Mapping[str, jax.Array], sparsity: Any) -> dict[str, jax.Array]:
        pooled = {family.name: _mean(family, scores) for family in families}
        found = budget(pooled, sparsity)
        masks = {path: jnp.ones(x.shape, bool) for path, x in scores.items()}
        for family in families:
            mean = pooled[family.name]
            kept = found[family.name] | (jnp.arange(mean.size) == jnp.argmax(mean))
            for m in family.members:
                if m.path in masks:
                    shape = masks[m.path].shape
                    owner = np.full(shape[m.axis], family.size)  # nobody's, which stays
                    owner[m.indices] = np.arange(family.size)[:, None]
                    masks[m.path] &= _along(
                        m.axis, jnp.append(kept, True)[owner], shape
                    )
        return masks

    return grouped


def _mean(family: Family, scores: Mapping[str, jax.Array]) -> jax.Array:
    """float32[groups]: the mean of the scores of all that each group owns."""
    members = [m for m in family.members if m.path in scores]
    if not members:
        raise ValueError(
            f"in_groups needs a selected leaf of family {family.name!r}, got none of "
            f"{_paths_of(family)}. Select them with `where`, or leave the family out."
        )
    total, entries = jnp.zeros(family.size, jnp.float32), 0
    for m in members:
        x = jnp.asarray(scores[m.path])
        check_fits("in_groups", family, m, x)
        others = tuple(a for a in range(x.ndim) if a != m.axis)
        sums = jnp.sum(x, axis=others, dtype=jnp.float32)
        total += jnp.sum(sums[m.indices], axis=1)
        entries += m.indices.shape[1] * (x.size // x.shape[m.axis])
    return total / max(entries, 1)
