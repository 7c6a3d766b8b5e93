"""Masks for a whole tree, and what is done to a tree with a mask or a threshold."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp.node import (
    TiedTensor,
    dense_of,
    encoded,
    flatten,
    is_compressed,
    resolver,
)
from jaxcomp.prune.budgets import Budget, leaf_budget
from jaxcomp.prune.scores import Score, magnitude
from jaxcomp.tree import Where, check_finite, is_matrix, map_values, map_where, select


def masks(
    params: Any,
    sparsity: float | jax.Array | Mapping[str, float],
    *,
    score: Score = magnitude,
    budget: Budget = leaf_budget,
    where: Where = is_matrix,
) -> Any:
    """Masks that remove the lowest-scored weights of the selected leaves.

    Args:
      params: any pytree of arrays and nodes.
      sparsity: fraction of the selected entries to remove, in [0, 1); with
        `leaf_budget` also path -> fraction.
      score: tree of float[*shape] -> tree of scores, higher is better: `magnitude`,
        ``random_scores(key)``.
      budget: how the fraction is shared out: `leaf_budget`, `global_budget`.
      where: (path, leaf) -> bool.

    Returns:
      A tree of bools shaped like ``params``: bool[*shape] where selected, the scalar
      True elsewhere. Counts are exact, ties go by index.

    Raises:
      ValueError: nothing is selected, a selected leaf holds a NaN or an infinity, or
        ``sparsity`` is out of range.

    >>> masks({"kernel": jnp.array([[1.0, -3.0, 2.0, 0.5]]), "bias": jnp.ones(2)}, 0.5)
    {'bias': Array(True, dtype=bool),
     'kernel': Array([[False,  True,  True, False]], dtype=bool)}
    """
    return masks_by("masks", params, sparsity, score, budget, where)


def masks_by(
    caller: str, params: Any, level: Any, score: Score, budget: Budget, where: Where
) -> Any:
    """Masks that ``budget`` makes of ``level`` and the scores of what is selected."""
    chosen = jax.tree.leaves(select(params, where, compressed=True))
    paths, leaves, treedef = flatten(params)
    whole = resolver(caller, paths, leaves)
    taken = {i: dense_of(whole(i)) for i in range(len(leaves)) if chosen[i]}
    check_finite(caller, [(paths[i], leaf) for i, leaf in taken.items()])
    found = chosen_masks(paths, taken, level, score, budget)
    keep = jnp.ones((), bool)
    return jax.tree.unflatten(treedef, [found.get(i, keep) for i in range(len(leaves))])


def chosen_masks(
    paths: list[str],
    weights: Mapping[int, jax.Array],
    sparsity: Any,
    score: Score,
    budget: Budget,
) -> dict[int, jax.Array]:
    """bool[*shape] for some leaves of a tree, by their position in it."""
    names = dict(enumerate(unique_names(paths)))
    names = {i: names[i] for i in weights}
    scores = score({names[i]: weight for i, weight in weights.items()})
    # JAX gives a dict back sorted by key, where layer/10 comes before layer/2.
    found = budget({name: scores[name] for name in names.values()}, sparsity)
    return {i: found[name] for i, name in names.items()}


def unique_names(paths: list[str]) -> list[str]:
    """Paths that are one leaf's only: {"a/b": x} and {"a": {"b": x}} read alike."""
    seen = Counter(paths)
    return [p if seen[p] == 1 else f"{p} ({i})" for i, p in enumerate(paths)]


def apply_masks(params: Any, masks: Any) -> Any:
    """Zeroes every weight whose mask is False; the others keep their bits.

    Args:
      params: any pytree. Nodes stay nodes, encoded again in place; a `SharedTensor` to
        which 0 is new may have to join two of its values to make room for it.
      masks: bools shaped like ``params``, one for a node; a scalar True leaves a leaf
        as it is.

    Raises:
      ValueError: the trees, or a leaf and its mask, have different shapes.

    >>> apply_masks({"kernel": jnp.ones(2)}, {"kernel": jnp.array([True, False])})
    {'kernel': Array([1., 0.], dtype=float32)}
    """
    paths, leaves, treedef = flatten(params)
    chosen = checked_masks("apply_masks", masks, treedef)
    whole = resolver("apply_masks", paths, leaves)

    def apply(i: int, mask: Any) -> Any:
        path, leaf = paths[i], leaves[i]
        is_tied = isinstance(leaf, TiedTensor)
        given, takes = jnp.shape(mask), _check.is_array(leaf) and not is_tied
        if takes and given == leaf.shape:
            dense = dense_of(whole(i))
            kept = jnp.where(mask, dense, jnp.zeros((), dense.dtype))
            return encoded(leaf, whole(i), kept)
        if given:
            shape = list(leaf.shape) if takes else []
            raise ValueError(
                f"apply_masks needs a mask of shape {shape} for leaf {path!r}, got "
                f"{list(given)}." + (" It is tied: mask its source." if is_tied else "")
            )
        if _check.is_concrete(mask) and not bool(mask):
            raise ValueError(
                f"apply_masks needs a mask of the shape of leaf {path!r}, or a scalar "
                "True, got a scalar False."
            )
        return leaf

    return jax.tree.unflatten(treedef, [apply(*row) for row in enumerate(chosen)])


def checked_masks(caller: str, masks: Any, treedef: Any) -> list[Any]:
    """The leaves of masks that are one for each leaf of the params, nodes as one."""
    found: Any = jax.tree.structure(masks)
    ones = jax.tree.unflatten(treedef, [True] * treedef.num_leaves)
    if found != jax.tree.structure(ones):
        raise ValueError(
            f"{caller} needs masks shaped like params, got {found} for {treedef}. "
            "Make them with `prune.masks(params, ...)`."
        )
    return jax.tree.leaves(masks)


def prune_tree(params: Any, theta: float, *, where: Where = is_matrix) -> Any:
    """Zeroes the weights of the selected leaves with ``|w| < theta``.

    Args:
      params: any pytree. Nodes stay nodes, encoded again in place.
      theta: threshold in the unit of the weights, not negative; a weight of exactly
        ``theta`` stays.
      where: (path, leaf) -> bool.

    Returns:
      A tree of the same keys, shapes and dtypes. Other weights keep their bits.

    Raises:
      ValueError: ``theta`` is negative or NaN, nothing is selected, or a selected leaf
        holds a NaN or an infinity.

    >>> prune_tree({"kernel": jnp.array([[0.1, -0.5]])}, theta=0.5)
    {'kernel': Array([[ 0. , -0.5]], dtype=float32)}
    """
    known = _check.number("prune_tree", "theta", theta)
    if known is not None and known < 0:
        raise ValueError(f"prune_tree needs theta >= 0, got {theta}.")

    def prune(w: jax.Array) -> jax.Array:
        wide = _check.wide(w.dtype)  # theta must not be rounded to 16 bits
        small = jnp.abs(w).astype(wide) < jnp.asarray(theta, wide)
        return jnp.where(small, jnp.zeros((), w.dtype), w)

    return map_values(prune, params, where, caller="prune_tree")


def clip_tree(params: Any, lo: float, hi: float, *, where: Where = is_matrix) -> Any:
    """Clips the weights of the selected leaves into ``[lo, hi]``.

    Args:
      params: any pytree.
      lo: least value, in the unit of the weights, at most 0: pruned zeros stay zeros.
      hi: greatest value, at least 0.
      where: (path, leaf) -> bool.

    Raises:
      ValueError: not ``lo <= 0 <= hi``, nothing is selected, a selected leaf holds a
        NaN or an infinity, or is compressed: a grid need not have ``lo`` and ``hi``.

    >>> clip_tree({"kernel": jnp.array([[0.1, -0.5]])}, -0.2, 0.2)
    {'kernel': Array([[ 0.1, -0.2]], dtype=float32)}
    """
    for name, bound in (("lo", lo), ("hi", hi)):
        _check.number("clip_tree", name, bound)
    if not lo <= 0 <= hi:
        raise ValueError(f"clip_tree needs lo <= 0 <= hi, got lo={lo}, hi={hi}.")
    chosen = jax.tree.leaves(select(params, where, compressed=True))
    for path, leaf, taken in zip(*flatten(params)[:2], chosen, strict=True):
        if taken and is_compressed(leaf):
            raise ValueError(
                f"clip_tree needs arrays, but leaf {path!r} is compressed "
                f"({leaf.describe()}). Clip first, or leave it out with `where`."
            )
    return map_where(
        lambda w: jnp.clip(w, jnp.asarray(lo, w.dtype), jnp.asarray(hi, w.dtype)),
        params,
        where,
        caller="clip_tree",
    )
