"""Pruning over dense weights that live on: what was removed trains, and may come back.

The weights that the model sees are exactly zero where they are removed. The state keeps
the value that a removed weight would have, its *latent* weight (Helwegen et al.,
arXiv:1906.02107, for the word). Nothing is masked in the model or in the loss.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp import _check
from jaxcomp.prune.budgets import Budget, leaf_budget
from jaxcomp.prune.scores import Score, magnitude
from jaxcomp.train.gradual import all_kept, level_at, masks_of
from jaxcomp.train.zeros import add_strays, params_needed, when
from jaxcomp.tree import Where, is_matrix


class PruneLatentState(NamedTuple):
    """State of `prune_straight_through`."""

    count: jax.Array  # type: ignore[assignment]  # int32[], updates seen
    masks: Any  # bool, like params; a leaf that is never pruned has a scalar True
    latent: Any  # what removed weights would be; a scalar 0 for other leaves
    stray: jax.Array  # int32[], weights found non-zero where a mask is False
    inner_state: Any  # of the wrapped optimizer


def prune_straight_through(
    inner: optax.GradientTransformation,
    sparsity: optax.Schedule,
    *,
    every: int = 1,
    decay: float = 0.0,
    score: Score = magnitude,
    budget: Budget = leaf_budget,
    where: Where = is_matrix,
) -> optax.GradientTransformationExtraArgs:
    """Prunes what the model sees, and trains what is below as if nothing was pruned.

    The straight-through estimator (Bengio, Léonard and Courville, arXiv:1308.3432):
    gradients are taken at the pruned weights and move all latent weights, so that masks
    may change at every step. With ``budget=nm_budget(2, 4)`` and ``decay=2e-4`` it is
    SR-STE: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks
    From Scratch", arXiv:2102.04010, whose extra decay of the removed weights keeps
    masks from flickering. To freeze the masks in the end, go on with `keep_zeros`.

    Args:
      inner: the optimizer. It sees the latent weights, and the gradient of all weights.
      sparsity: step -> fraction of entries to zero, in [0, 1).
      every: steps between two choices of mask, besides the step at which the schedule
        stops rising. At each of the others the masks stay.
      decay: times a removed weight, added to its gradient; not negative.
      score: tree of float[*shape] -> tree of scores, of the latent weights as the
        update leaves them; higher is better.
      budget: how the fraction is shared out, and in which pattern.
      where: (path, leaf) -> bool; leaves to prune. Compressed leaves are skipped.

    Returns:
      A transformation whose ``update`` needs ``params``. Counts are exact.
      ``state.stray`` is as in `prune_gradually`.

    Raises:
      ValueError: ``every`` is less than 1, ``decay`` is negative, nothing is selected,
        or ``update`` is called without ``params``.

    >>> tx = prune_straight_through(optax.sgd(1.0), lambda step: 0.5)
    >>> params = {"kernel": jnp.array([[3.0, 1.0]])}
    >>> state = tx.init(params)
    >>> grads = {"kernel": jnp.array([[1.0, -0.5]])}
    >>> for _ in range(3):  # what was removed moves on below, until it is the larger
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params["kernel"])
    [[2. 0.]]
    [[0. 2.]]
    [[0.  2.5]]
    """
    caller = "prune_straight_through"
    _check.integer_within(caller, "every", every, 1, 2**31 - 1)
    if not decay >= 0:
        raise ValueError(f"{caller} needs decay >= 0, got {decay}.")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> PruneLatentState:
        masks = all_kept(params, where)
        return PruneLatentState(
            jnp.zeros([], jnp.int32),
            masks,
            latent_of(masks, params),
            jnp.zeros([], jnp.int32),
            inner.init(params),
        )

    def update(
        updates: Any, state: PruneLatentState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, PruneLatentState]:
        params_needed(caller, params)
        level, due = level_at(sparsity, every, state.count)
        old = state.masks
        weights = underneath(old, params, state.latent)
        if decay:
            updates = jax.tree.map(
                lambda m, u, w: (
                    u + jnp.where(m, 0, w * decay).astype(u.dtype) if m.ndim else u
                ),
                old,
                updates,
                weights,
            )
        moves, inner_state = inner.update(
            updates, state.inner_state, weights, **extra_args
        )
        moved = optax.apply_updates(weights, moves)

        def choose(held: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            stray = add_strays(held[1], old, params)
            return masks_of(held[0], moved, level, score, budget), stray

        masks, stray = when(due, choose, (old, state.stray))
        return surface(old, masks, moves, moved, params), PruneLatentState(
            optax.safe_increment(state.count),
            masks,
            latent_of(masks, moved),
            stray,
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def latent_of(masks: Any, tree: Any) -> Any:
    """``tree`` where leaves are pruned, a scalar 0 elsewhere."""
    return jax.tree.map(
        lambda m, x: jnp.copy(x) if m.ndim else jnp.zeros((), jnp.float32), masks, tree
    )


def underneath(masks: Any, params: Any, latent: Any) -> Any:
    """The weights, removed ones by what they would be."""
    return jax.tree.map(
        lambda m, p, w: jnp.where(m, p, w) if m.ndim else p, masks, params, latent
    )


def surface(old: Any, new: Any, moves: Any, moved: Any, params: Any) -> Any:
    """Updates that land on 0 or, where a weight comes back from 0, on its latent value.

    Both are exact: ``p - p`` and ``0 + w`` do not round.
    """
    return jax.tree.map(
        lambda o, n, u, w, p: jnp.where(n, jnp.where(o, u, w - p), -p) if o.ndim else u,
        old,
        new,
        moves,
        moved,
        params,
    )
