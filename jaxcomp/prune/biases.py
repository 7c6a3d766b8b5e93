"""Whole units go with their bias: what is left of a unit that has no weights."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp.node import TiedTensor, flatten
from jaxcomp.prune.oneshot import checked_masks
from jaxcomp.tree import last_key, list_paths


def mask_biases(params: Any, masks: Any, axis: int = -1) -> Any:
    """The masks, with those of the biases of masked kernels added.

    Li et al., "Pruning Filters for Efficient ConvNets", arXiv:1608.08710, remove a
    filter with its bias; here the masks decide, whatever score and budget they are of.
    A unit is gone when all of its weights are masked, and then its bias is masked too.

    A bias is a leaf whose last key is bias, beside a leaf of more axes whose mask is
    not a scalar. Its axes are those of the kernel that end with ``axis``, so that for
    the last axis a bias of shape (heads, d) fits a kernel of shape (in, heads, d).
    Beside several such kernels it stays while any of them has weights of the unit.

    Args:
      params: any pytree of arrays and nodes.
      masks: bools shaped like ``params``, as `masks` gives them.
      axis: the axis of the kernels that holds the units.

    Returns:
      ``masks`` with bool[*shape] for each of these biases; what they removed before
      stays removed. All other masks are the same objects.

    Raises:
      ValueError: the trees have different shapes, or there is no such bias.

    >>> import jaxcomp as jc
    >>> params = {"kernel": jnp.array([[1.0, 4.0], [2.0, 3.0]]), "bias": jnp.ones(2)}
    >>> budget = jc.prune.in_units(jc.prune.leaf_budget)
    >>> mask_biases(params, jc.prune.masks(params, 0.5, budget=budget))["bias"]
    Array([False,  True], dtype=bool)
    """
    paths, leaves, treedef = flatten(params)
    before = checked_masks("mask_biases", masks, treedef)
    kernels: dict[str, list[jax.Array]] = {}
    for path, mask in zip(paths, before, strict=True):
        if last_key(path) != "bias" and jnp.ndim(mask):
            kernels.setdefault(_parent(path), []).append(jnp.asarray(mask))
    found = {}
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        is_bias = last_key(path) == "bias" and _check.is_array(leaf)
        if is_bias and not isinstance(leaf, TiedTensor):
            beside = kernels.get(_parent(path), [])
            alive = [
                jnp.any(mask, axis=others)
                for mask in beside
                if (others := _others(mask, leaf.shape, axis))
            ]
            if alive:
                found[i] = before[i] & jnp.stack(alive).any(axis=0)
    if not found:
        raise ValueError(
            "mask_biases found no bias beside a masked kernel whose units, along axis "
            f"{axis}, it fits, among {list_paths(paths)}. Pass another axis, or leave "
            "out this call."
        )
    return jax.tree.unflatten(treedef, [found.get(i, m) for i, m in enumerate(before)])


def _parent(path: str) -> str:
    """The path of what holds a leaf: an ``nnx.State`` path ends in /value."""
    return path.removesuffix("/value").rpartition("/")[0]


def _others(mask: jax.Array, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The axes of a kernel that its bias does not have; none if it does not fit."""
    if not -mask.ndim <= axis < mask.ndim or not mask.size:
        return ()
    end = axis % mask.ndim + 1
    start = end - len(shape)
    if start < 0 or mask.shape[start:end] != shape or not shape:
        return ()
    return (*range(start), *range(end, mask.ndim))
