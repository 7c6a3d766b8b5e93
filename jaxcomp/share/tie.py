"""Layer sharing: whole layers use one set of arrays, as ALBERT's blocks do."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp.node import TiedTensor, flatten, is_compressed
from jaxcomp.tree import check_finite, list_paths


Merge = Callable[[Sequence[jax.Array]], jax.Array]


def average(arrays: Sequence[jax.Array]) -> jax.Array:
    """The mean of arrays of one shape; exactly 0 where all of them are.

    >>> average([jnp.array([0.0, 1.0]), jnp.array([0.0, 2.0])])
    Array([0. , 1.5], dtype=float32)
    """
    wide = _check.wide(arrays[0].dtype)
    return jnp.mean(jnp.stack(arrays).astype(wide), axis=0).astype(arrays[0].dtype)


def tie_layers(
    params: Any, groups: Sequence[Sequence[str]], *, merge: Merge = average
) -> Any:
    """Makes the layers of each group share one set of arrays.

    Lan et al., "ALBERT", arXiv:1909.11942, section 3.1, for layers that were trained
    apart: the first layer of a group takes the merged arrays, the others become
    `TiedTensor`. Tie before compressing: what is later done to the first layer holds
    for all.

    Args:
      params: any pytree whose layers are subtrees, e.g. ``params["block_0"]``.
      groups: paths of the layers that share, e.g. ``[("block_0", "block_1")]``. The
        layers of a group have the same leaves, by relative path, shape and dtype.
      merge: arrays of one shape -> the array that they become. `average` keeps a zero
        where every layer has one; ``lambda arrays: arrays[0]`` keeps the first layer.

    Returns:
      A tree of the same keys. Leaves that are not floating point stay untied.

    Raises:
      ValueError: a group has fewer than two layers, a path has no leaves or is in two
        groups, the layers differ, or a leaf is compressed already or not finite.

    >>> blocks = {"a": {"kernel": jnp.zeros(2)}, "b": {"kernel": jnp.ones(2)}}
    >>> tie_layers(blocks, [("a", "b")])["a"]["kernel"]
    Array([0.5, 0.5], dtype=float32)
    """
    paths, leaves, treedef = flatten(params)
    index = {path: i for i, path in enumerate(paths)}
    used: set[str] = set()
    for group in groups:
        if isinstance(group, str) or len(group) < 2:
            raise ValueError(
                f"tie_layers needs groups of two layers or more, got {group!r}. Pass "
                'a list of tuples, e.g. [("block_0", "block_1")].'
            )
        members = [_members(layer, paths) for layer in group]
        for layer, member in zip(group, members, strict=True):
            taken = used.intersection(member.values())
            if taken:
                raise ValueError(
                    f"tie_layers needs each leaf in one layer of one group, but "
                    f"{min(taken)!r} is in two. Merge the groups."
                )
            used.update(member.values())
            _check_alike(group[0], members[0], layer, member, leaves, index)
        for relative, source in members[0].items():
            if not _check.is_floating(leaves[index[source]]):
                continue
            tied = [member[relative] for member in members]
            arrays = [jnp.asarray(leaves[index[path]]) for path in tied]
            check_finite("tie_layers", list(zip(tied, arrays, strict=True)))
            first = merge(arrays)
            leaves[index[source]] = first
            for path in tied[1:]:
                shape, name = tuple(first.shape), first.dtype.name
                leaves[index[path]] = TiedTensor(source, shape, name)
    return jax.tree.unflatten(treedef, leaves)


def _members(layer: str, paths: list[str]) -> dict[str, str]:
    """The leaves of a layer: relative path -> path."""
    inside = {
        p[len(layer) :]: p for p in paths if p == layer or p.startswith(layer + "/")
    }
    if not inside:
        raise ValueError(
            f"tie_layers found no leaf under {layer!r}. The {len(paths)} leaves are "
            f"{list_paths(paths)}."
        )
    return inside


def _check_alike(
    first: str,
    model: dict[str, str],
    layer: str,
    member: dict[str, str],
    leaves: list[Any],
    index: dict[str, int],
) -> None:
    """Raises unless a layer has the leaves of the first of its group, uncompressed."""
    if model.keys() != member.keys():
        odd = min(model.keys() ^ member.keys())
        raise ValueError(
            f"tie_layers needs layers with the same leaves, but only one of {first!r} "
            f"and {layer!r} has {odd.lstrip('/')!r}."
        )
    for relative, path in member.items():
        ours, theirs = leaves[index[model[relative]]], leaves[index[path]]
        if is_compressed(theirs):
            raise ValueError(
                f"tie_layers needs arrays, but {path!r} is already compressed "
                f"({theirs.describe()}). Tie first, then compress: the tied layers "
                "follow."
            )
        if not _check.is_array(ours) or not _check.is_array(theirs):
            continue
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise ValueError(
                f"tie_layers needs leaves of one shape and dtype, but {path!r} is "
                f"{_check.describe(theirs)} and {model[relative]!r} is "
                f"{_check.describe(ours)}."
            )
