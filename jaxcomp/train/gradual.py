"""Pruning while training, to a sparsity that grows with the step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp import _check
from jaxcomp.node import flatten
from jaxcomp.prune.budgets import Budget, leaf_budget
from jaxcomp.prune.oneshot import chosen_masks
from jaxcomp.prune.scores import Score, magnitude
from jaxcomp.train.zeros import add_strays, land_on_zero, params_needed, when
from jaxcomp.tree import Where, is_matrix, select


class PruneGraduallyState(NamedTuple):
    """State of `prune_gradually`."""

    count: jax.Array  # type: ignore[assignment]  # int32[], updates seen
    sparsity: jax.Array  # float32[], that the masks were chosen for; -1 at first
    masks: Any  # bool, like params; a leaf that is never pruned has a scalar True
    stray: jax.Array  # int32[], weights found non-zero where a mask is False


def prune_gradually(
    sparsity: optax.Schedule,
    *,
    every: int = 100,
    score: Score = magnitude,
    budget: Budget = leaf_budget,
    where: Where = is_matrix,
) -> optax.GradientTransformation:
    """Zeroes the lowest-scored weights, ``sparsity(step)`` of them.

    Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878. Their cubic schedule
    is ``optax.polynomial_schedule(0.0, final, power=3, transition_steps=steps,
    transition_begin=start)``. Chain this link last: it rewrites the update so that
    `optax.apply_updates` lands on exactly zero, whatever the optimizer's moments say.

    Masks are chosen anew every ``every`` steps while the schedule moves, and on the
    step at which it stops rising, so that the target is hit whatever ``every`` is; then
    they stay. In the paper the target is hit only if ``every`` divides the window. The
    score is of the weights as they come into the step; what has gone is zero, and with
    `magnitude` it stays away while the schedule rises.

    Args:
      sparsity: step -> fraction of entries to zero, in [0, 1).
      every: steps between two choices of mask.
      score: tree of float[*shape] -> tree of scores; higher is better.
      budget: how the fraction is shared out, and in which pattern: `leaf_budget`,
        `global_budget`, `erk_budget`, `lamp_budget`, ``nm_budget(2, 4)``.
      where: (path, leaf) -> bool; leaves to prune. Compressed leaves are skipped.

    Returns:
      A transformation whose ``update`` needs ``params``. Counts are exact. Every
      ``every`` steps ``state.stray`` counts weights that are not zero where they should
      be: this link is not the last, or somebody else wrote to them.

    Raises:
      ValueError: ``every`` is less than 1, nothing is selected, or ``update`` is called
        without ``params``.

    >>> tx = optax.chain(optax.sgd(0.1), prune_gradually(lambda step: 0.5, every=10))
    >>> params = {"kernel": jnp.array([[3.0, 0.2, -0.5, 1.0]])}
    >>> updates, _ = tx.update({"kernel": jnp.zeros((1, 4))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'kernel': Array([[3., 0., 0., 1.]], dtype=float32)}
    """
    _check.integer_within("prune_gradually", "every", every, 1, 2**31 - 1)

    def init(params: Any) -> PruneGraduallyState:
        none, never = jnp.zeros([], jnp.int32), jnp.full([], -1.0, jnp.float32)
        return PruneGraduallyState(none, never, all_kept(params, where), jnp.copy(none))

    def update(
        updates: Any, state: PruneGraduallyState, params: Any = None
    ) -> tuple[Any, PruneGraduallyState]:
        params_needed("prune_gradually", params)
        level, due = level_at(sparsity, every, state.count)

        def choose(held: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            masks, stray = held
            stray = add_strays(stray, masks, params)
            masks = jax.lax.cond(
                level != state.sparsity,
                lambda: masks_of(masks, params, level, score, budget),
                lambda: masks,
            )
            return masks, stray

        masks, stray = when(due, choose, (state.masks, state.stray))
        return land_on_zero(masks, updates, params), PruneGraduallyState(
            optax.safe_increment(state.count),
            jnp.where(due, level, state.sparsity),
            masks,
            stray,
        )

    return optax.GradientTransformation(init, update)


def all_kept(params: Any, where: Where) -> Any:
    """Masks that are all True, for links that have chosen none so far."""
    return jax.tree.map(
        lambda c, p: jnp.ones(p.shape if c else (), bool),
        select(params, where),
        params,
    )


def level_at(
    sparsity: optax.Schedule, every: int, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sparsity of a step, float32[], and whether masks are chosen in it."""

    def at(step: jax.Array) -> jax.Array:
        return jnp.asarray(sparsity(step), jnp.float32)

    level = at(count)
    tops = (level > at(jnp.maximum(count - 1, 0))) & (at(count + 1) <= level)
    return level, (count % every == 0) | tops


def masks_of(
    masks: Any, tree: Any, level: jax.Array, score: Score, budget: Budget
) -> Any:
    """New masks in place of ``masks``, by the score of ``tree``."""
    paths, old, treedef = flatten(masks)
    pairs = enumerate(treedef.flatten_up_to(tree))
    values = {i: x for i, x in pairs if old[i].ndim}
    found = chosen_masks(paths, values, level, score, budget)
    return jax.tree.unflatten(treedef, [found.get(i, m) for i, m in enumerate(old)])
