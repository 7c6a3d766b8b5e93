"""Layer sharing: whole layers use one set of arrays, as ALBERT's blocks do."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp._extremes import divided
from jaxcomp.node import TiedTensor, densify, flatten, is_compressed
from jaxcomp.tree import check_finite, list_paths


Merge = Callable[..., jax.Array]  # of arrays of one shape, and of their weights if any


@jax.jit
def average(
    arrays: Sequence[jax.Array], weights: Sequence[jax.Array] | None = None
) -> jax.Array:
    """The mean of arrays of one shape; exactly 0 where all of them are.

    With weights, each element is ``sum(w * x) / sum(w)``, between the least and the
    largest ``x``: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging",
    arXiv:2111.09832, equation 3, where the weights are mean squared gradients.

    Args:
      arrays: float[*shape] of one shape and dtype.
      weights: as many arrays of that shape, at least 0; None for the plain mean. Where
        all of them are 0, or less than the least normal number, it is the plain mean.

    >>> average([jnp.array([0.0, 1.0]), jnp.array([0.0, 2.0])])
    Array([0. , 1.5], dtype=float32)
    >>> weights = [jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])]
    >>> average([jnp.array([0.0, 1.0]), jnp.array([0.0, 2.0])], weights)
    Array([0.  , 1.25], dtype=float32)
    """
    dtype = arrays[0].dtype
    x = jnp.stack(arrays).astype(_check.wide(dtype))
    high = jnp.max(jnp.abs(x), axis=0, keepdims=True)
    unit = jnp.where(high > 2.0**100, 2.0**-24, 1.0).astype(x.dtype)  # sums overflow
    mean = jnp.mean(x * unit, axis=0, keepdims=True) / unit
    if weights is not None:
        w = jnp.stack(weights).astype(x.dtype)
        most = jnp.max(w, axis=0, keepdims=True)
        counts = most >= float(jnp.finfo(x.dtype).tiny)
        shares = divided(w, jnp.where(counts, most, 1))
        total = jnp.sum(x * (shares / jnp.sum(shares, axis=0, keepdims=True)), axis=0)
        total = jnp.clip(total, jnp.min(x, axis=0), jnp.max(x, axis=0))
        mean = jnp.where(counts, total[None], mean)
    return mean[0].astype(dtype)


def member(i: int) -> Merge:
    """A merge that takes the arrays of the ``i``-th layer of a group, as they are.

    Raises:
      ValueError: a group has no layer ``i``; raised when it merges.

    >>> member(1)([jnp.array([1.0]), jnp.array([5.0])])
    Array([5.], dtype=float32)
    """

    def take(arrays: Sequence[jax.Array]) -> jax.Array:
        return arrays[_check.integer_within("member", "i", i, 0, len(arrays) - 1)]

    return take


def best_member(loss: Callable[[Any], Any], params: Any, group: Sequence[str]) -> int:
    """Finds the layer whose arrays serve the whole group best.

    Args:
      loss: params -> float[], of a tree of arrays; called once for each layer.
      params: any pytree.
      group: paths of layers, as one group of `tie_layers`.

    Returns:
      The place in ``group`` of the layer that gives the least loss when all of the
      group are tied to its arrays; the first of several. It is for `member`.

    Raises:
      ValueError: as `tie_layers`, or a loss is NaN, or not known under jit.

    >>> blocks = {"a": {"w": jnp.array(1.0)}, "b": {"w": jnp.array(3.0)}}
    >>> group = ("a", "b")
    >>> i = best_member(lambda p: (p["a"]["w"] * p["b"]["w"] - 8) ** 2, blocks, group)
    >>> tie_layers(blocks, [group], merge=member(i))["a"]["w"]
    Array(3., dtype=float32, weak_type=True)
    """
    _check_group(group)
    losses = []
    for i, layer in enumerate(group):
        tied = densify(tie_layers(params, [group], merge=member(i)))
        name = f"the loss with all of the group as {layer!r}"
        found = _check.number("best_member", name, loss(tied))
        if found is None:
            raise ValueError(
                "best_member needs the value of the loss, which is not known under "
                "jit. Call it outside jit; the loss itself may be jitted."
            )
        losses.append(found)
    return int(np.argmin(losses))


def tie_layers(
    params: Any,
    groups: Sequence[Sequence[str]],
    *,
    merge: Merge = average,
    weights: Any = None,
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
        where every layer has one; ``member(0)`` keeps the first layer.
      weights: how much each element counts, at least 0, in a tree shaped like
        ``params``: e.g. mean squared gradients. Leaves that are not tied are not looked
        at. With it, ``merge`` is called with the arrays and their weights, so it must
        be `average` or another function of both.

    Returns:
      A tree of the same keys. Leaves that are not floating point stay untied.

    Raises:
      ValueError: a group has fewer than two layers, a path has no leaves or is in two
        groups, the layers differ, a leaf is compressed already or not finite, or a
        weight is missing, of another shape, negative or not finite.

    >>> blocks = {"a": {"kernel": jnp.zeros(2)}, "b": {"kernel": jnp.ones(2)}}
    >>> tie_layers(blocks, [("a", "b")])["a"]["kernel"]
    Array([0.5, 0.5], dtype=float32)
    """
    paths, leaves, treedef = flatten(params)
    known = dict(zip(*flatten(weights)[:2], strict=True))
    index = {path: i for i, path in enumerate(paths)}
    used: set[str] = set()
    for group in groups:
        _check_group(group)
        members = [members_of("tie_layers", layer, paths) for layer in group]
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
            if weights is None:
                first = merge(arrays)
            else:
                first = merge(arrays, list(map(partial(_weight, known), tied, arrays)))
            leaves[index[source]] = first
            for path in tied[1:]:
                shape, name = tuple(first.shape), first.dtype.name
                leaves[index[path]] = TiedTensor(source, shape, name)
    return jax.tree.unflatten(treedef, leaves)


def _check_group(group: Sequence[str]) -> None:
    if isinstance(group, str) or len(group) < 2:
        raise ValueError(
            f"tie_layers needs groups of two layers or more, got {group!r}. Pass "
            'a list of tuples, e.g. [("block_0", "block_1")].'
        )


def _weight(known: dict[str, Any], path: str, x: jax.Array) -> jax.Array:
    """The weights of a leaf, once they fit it."""
    weight: Any = known.get(path)
    if not _check.is_array(weight) or is_compressed(weight) or weight.shape != x.shape:
        got = _check.describe(weight) if _check.is_array(weight) else repr(weight)
        raise ValueError(
            f"tie_layers needs weights shaped like params, but for leaf {path!r} "
            f"{_check.describe(x)} there is {got}. Pass a tree of arrays."
        )
    if _check.is_concrete(weight):
        values = np.asarray(jnp.asarray(weight))  # as JAX narrows it
        faults = np.argwhere(~((values >= 0) & (values < np.inf)))
        if faults.size:
            at = tuple(map(int, faults[0]))
            raise ValueError(
                "tie_layers needs finite weights of at least 0, but those of leaf "
                f"{path!r} {_check.describe(weight)} hold {values[at]} at index {at}. "
                "Pass importances, e.g. mean squared gradients."
            )
    return weight


def members_of(caller: str, layer: str, paths: list[str]) -> dict[str, str]:
    """The leaves of a layer: relative path -> path."""
    inside = {
        p[len(layer) :]: p for p in paths if p == layer or p.startswith(layer + "/")
    }
    if not inside:
        raise ValueError(
            f"{caller} found no leaf under {layer!r}. The {len(paths)} leaves are "
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
