"""Masks by a threshold on scores, for when the sparsity is what comes of it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp.prune.oneshot import masks_by
from jaxcomp.prune.scores import Score, magnitude
from jaxcomp.tree import Where, is_matrix, list_paths


def masks_above(
    params: Any,
    threshold: float | jax.Array | Mapping[str, float],
    *,
    score: Score = magnitude,
    where: Where = is_matrix,
) -> Any:
    """Masks that keep the weights of the selected leaves with at least some score.

    With `deviations` it is the rule of Han et al., "Learning both Weights and
    Connections", arXiv:1506.02626: the threshold of a layer is a quality parameter
    times the standard deviation of its weights. With `unit_density` and ``1 - bound``,
    units with more than a fraction ``bound`` of zeros go.

    Args:
      params: any pytree of arrays and nodes.
      threshold: least score that is kept, in the unit of the scores, or path ->
        threshold. It may be traced. A path that the mapping leaves out is not pruned.
      score: tree of float[*shape] -> tree of scores, higher is better.
      where: (path, leaf) -> bool.

    Returns:
      Masks as those of `masks`: a tree of bools shaped like ``params``, bool[*shape]
      where selected, the scalar True elsewhere.

    Raises:
      ValueError: nothing is selected, a selected leaf holds a NaN or an infinity, a
        threshold is NaN, or a path is not one of the selected leaves.

    >>> from jaxcomp.prune.scores import deviations
    >>> params = {"kernel": jnp.array([[3.0, -1.0, 1.0, -3.0, 0.0]])}
    >>> masks_above(params, 1.5, score=deviations)
    {'kernel': Array([[ True, False, False,  True, False]], dtype=bool)}
    """
    return masks_by("masks_above", params, threshold, score, _above, where)


def _above(scores: Mapping[str, jax.Array], threshold: Any) -> dict[str, jax.Array]:
    """path -> bool[*shape]: a `Budget` of thresholds and not of sparsities."""
    if isinstance(threshold, Mapping):
        unknown = [path for path in threshold if path not in scores]
        if unknown:
            raise ValueError(
                f"masks_above has a threshold for {unknown[0]!r}, which is not one of "
                f"the {len(scores)} selected leaves: {list_paths(list(scores))}."
            )
        bounds = dict(threshold)
    else:
        bounds = dict.fromkeys(scores, threshold)
    for bound in bounds.values():
        _check.number("masks_above", "threshold", bound)

    def keep(path: str, score: jax.Array) -> jax.Array:
        wide = _check.wide(score.dtype)  # the threshold must not be rounded to 16 bits
        if path not in bounds:
            return jnp.ones(score.shape, bool)
        return score.astype(wide) >= jnp.asarray(bounds[path], wide)

    return {path: keep(path, score) for path, score in scores.items()}
