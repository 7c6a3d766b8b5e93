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
from jaxcomp.train.zeros import land_on_zero, params_needed
from jaxcomp.tree import Where, is_matrix, select


class PruneGraduallyState(NamedTuple):
    """State of `prune_gradually`."""

    count: jax.Array  # type: ignore[assignment]  # int32[], updates seen
    sparsity: jax.Array  # float32[], that the masks were chosen for; -1 at first
    masks: Any  # bool, like params; a leaf that is never pruned has a scalar True


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
    they stay. In the paper the target is hit only if ``every`` divides the window.

    Args:
      sparsity: step -> fraction of entries to zero, in [0, 1).
      every: steps between two choices of mask.
      score: tree of float[*shape] -> tree of scores, of the weights as the update
        leaves them; higher is better.
      budget: how the fraction is shared out: `leaf_budget`, `global_budget`.
      where: (path, leaf) -> bool; leaves to prune. Compressed leaves are skipped.

    Returns:
      A transformation whose ``update`` needs ``params``. Counts are exact.

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
        masks = jax.tree.map(
            lambda c, p: jnp.ones(p.shape if c else (), bool),
            select(params, where),
            params,
        )
        never = jnp.full([], -1.0, jnp.float32)
        return PruneGraduallyState(jnp.zeros([], jnp.int32), never, masks)

    def update(
        updates: Any, state: PruneGraduallyState, params: Any = None
    ) -> tuple[Any, PruneGraduallyState]:
        params_needed("prune_gradually", params)

        def at(step: jax.Array) -> jax.Array:
            return jnp.asarray(sparsity(step), jnp.float32)

        level = at(state.count)
        tops = level > at(jnp.maximum(state.count - 1, 0))
        tops &= at(state.count + 1) <= level
        due = (state.count % every == 0) | tops
        moved = due & (level != state.sparsity)

        def choose() -> Any:
            paths, masks, treedef = flatten(state.masks)
            pairs = zip(
                treedef.flatten_up_to(params),
                treedef.flatten_up_to(updates),
                strict=True,
            )
            landed = {
                i: (p + u).astype(p.dtype)
                for i, (p, u) in enumerate(pairs)
                if masks[i].ndim
            }
            found = chosen_masks(paths, landed, level, score, budget)
            return jax.tree.unflatten(
                treedef, [found.get(i, mask) for i, mask in enumerate(masks)]
            )

        masks = jax.lax.cond(moved, choose, lambda: state.masks)
        state = PruneGraduallyState(
            optax.safe_increment(state.count),
            jnp.where(moved, level, state.sparsity),
            masks,
        )
        return land_on_zero(masks, updates, params), state

    return optax.GradientTransformation(init, update)
