"""Assertions for tests of compressed models, in the manner of chex.

Each raises AssertionError that says which leaf failed, what it should have and what it
has. Trees may hold nodes; they are densified first.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np

from jaxcomp import _check
from jaxcomp.node import densify, flatten
from jaxcomp.tree import Where, is_matrix, select, strays


def _selected(tree: Any, where: Where) -> list[tuple[str, np.ndarray]]:
    """Paths and values of the selected leaves, ties resolved."""
    dense = densify(tree)
    if _check.is_array(dense):
        return [("", np.asarray(dense))]
    chosen = jax.tree.leaves(select(dense, where))
    paths, leaves, _ = flatten(dense)
    return [
        (path, np.asarray(leaf))
        for path, leaf, taken in zip(paths, leaves, chosen, strict=True)
        if taken
    ]


def assert_sparsity(
    tree: Any, sparsity: float, *, where: Where = is_matrix, state: Any = None
) -> None:
    """Asserts that the selected leaves together have the asked fraction of zeros.

    Args:
      tree: an array, or any pytree of arrays and nodes.
      sparsity: fraction of exact zeros, in [0, 1]; the count must be ``sparsity`` times
        the number of weights, rounded either way for each leaf.
      where: (path, leaf) -> bool.
      state: of the optimizer, if its links must not have found strays, see `strays`.

    >>> assert_sparsity(np.array([0.0, 1.0, 0.0, 2.0]), 0.5)
    """
    leaves = _selected(tree, where)
    size = sum(leaf.size for _, leaf in leaves)
    zeros = sum(leaf.size - int(np.count_nonzero(leaf)) for _, leaf in leaves)
    if abs(zeros - sparsity * size) > len(leaves):
        rows = "; ".join(f"{path!r} {np.mean(leaf == 0):.4f}" for path, leaf in leaves)
        raise AssertionError(
            f"Expected sparsity {sparsity}, found {zeros / max(size, 1):.4f} ({zeros} "
            f"zeros of {size}): {rows}."
        )
    if found := strays(state):
        raise AssertionError(
            f"Expected zeros to stay zero, but {found} weights were found that moved. "
            "Chain the pruning link last."
        )


def assert_nm_sparse(
    tree: Any, n: int, m: int, *, along: int = 0, where: Where = is_matrix
) -> None:
    """Asserts that of every ``m`` consecutive weights at most ``n`` are not zero.

    Where ``m`` does not divide the axis, the last group is shorter.

    Args:
      tree: an array, or any pytree of arrays and nodes.
      n: the most non-zero weights of a group.
      m: group length.
      along: the axis that is grouped; 0 is the contraction of a kernel (in, out).
      where: (path, leaf) -> bool.

    >>> assert_nm_sparse(np.array([1.0, 0.0, 0.0, 2.0]), n=2, m=4)
    """
    for path, leaf in _selected(tree, where):
        lanes = np.moveaxis(leaf, along, -1)
        tail = [(0, 0)] * (leaf.ndim - 1) + [(0, -lanes.shape[-1] % m)]
        counts = np.count_nonzero(np.pad(lanes, tail).reshape(-1, m), axis=-1)
        if counts.max(initial=0) > n:
            raise AssertionError(
                f"Expected at most {n} of {m} non-zero, but {np.sum(counts > n)} of "
                f"{counts.size} groups of leaf {path!r} have more, up to "
                f"{counts.max()}."
            )


def assert_at_most_k_values(tree: Any, k: int, *, where: Where = is_matrix) -> None:
    """Asserts that no selected leaf has more than ``k`` distinct values.

    >>> assert_at_most_k_values(np.array([1.0, 0.0, 0.0, 1.0]), 2)
    """
    for path, leaf in _selected(tree, where):
        found = np.unique(leaf).size
        if found > k:
            raise AssertionError(
                f"Expected at most {k} distinct values, but leaf {path!r} has {found}."
            )


def assert_on_grid(
    tree: Any, step: Any, *, where: Where = is_matrix, rtol: float = 1e-5
) -> None:
    """Asserts that every selected weight is an integer multiple of ``step``.

    Args:
      tree: an array, or any pytree of arrays and nodes.
      step: spacing of the grid: a number, or an array that broadcasts to each leaf.
      where: (path, leaf) -> bool.
      rtol: how far a weight may be from the grid, relative to its magnitude.

    >>> assert_on_grid(np.array([0.5, -1.5, 0.0]), 0.5)
    """
    spacing = np.asarray(step, np.float64)
    for path, leaf in _selected(tree, where):
        values = leaf.astype(np.float64)
        off = np.abs(values - np.round(values / spacing) * spacing)
        bad = off > rtol * np.abs(values)
        if bad.any():
            index = tuple(map(int, np.argwhere(bad)[0]))
            raise AssertionError(
                f"Expected multiples of {step}, but leaf {path!r} has "
                f"{values[index]:g} at {index} ({bad.sum()} such of {bad.size})."
            )


def assert_same_function(
    f: Callable[..., Any],
    g: Callable[..., Any],
    *inputs: Any,
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> None:
    """Asserts that two functions give the same result, up to rounding.

    Args:
      f: (*inputs) -> any pytree of arrays.
      g: the same.
      *inputs: what both are called with.
      rtol: relative tolerance.
      atol: absolute tolerance.

    >>> assert_same_function(lambda x: x + x, lambda x: 2 * x, np.arange(3.0))
    """
    chex.assert_trees_all_close(f(*inputs), g(*inputs), rtol=rtol, atol=atol)
