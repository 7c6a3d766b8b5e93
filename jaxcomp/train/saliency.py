"""Pruning by what gradients say over many steps: they must be seen, so these wrap.

A link behind the optimizer sees its updates, not the gradients. These transformations
add up a score from the gradients of every step and prune by it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp import _check
from jaxcomp.prune.budgets import Budget, leaf_budget
from jaxcomp.train.gradual import all_kept, level_at, masks_of
from jaxcomp.train.latent import latent_of, surface, underneath
from jaxcomp.train.zeros import (
    add_strays,
    land_on_zero,
    params_needed,
    watched,
    when,
    zeroed,
)
from jaxcomp.tree import Where, is_matrix


class PruneByScoreState(NamedTuple):
    """State of `prune_by_saliency`, `prune_by_movement`, `prune_by_soft_movement`."""

    count: jax.Array  # type: ignore[assignment]  # int32[], updates seen
    scores: Any  # float32, like params; a scalar 0 for a leaf that is never pruned
    masks: Any  # bool, like params; a leaf that is never pruned has a scalar True
    latent: Any  # what removed weights were, like the scores; () in `prune_by_saliency`
    stray: jax.Array  # int32[], weights found non-zero where a mask is False
    inner_state: Any  # of the wrapped optimizer


def prune_by_saliency(
    inner: optax.GradientTransformation,
    sparsity: optax.Schedule,
    *,
    memory: float = 0.99,
    every: int = 100,
    budget: Budget = leaf_budget,
    where: Where = is_matrix,
) -> optax.GradientTransformationExtraArgs:
    """Prunes the weights with the least mean ``|weight * gradient|``.

    That is how much the loss would change without a weight, to first order: Mozer and
    Smolensky, "Skeletonization", NIPS 1988; Molchanov et al., "Pruning Convolutional
    Neural Networks for Resource Efficient Inference", arXiv:1611.06440. The mean runs
    over steps, since a single batch says little. What was removed stays away.

    Args:
      inner: the optimizer. It sees gradients that are zero where weights are removed.
      sparsity: step -> fraction of entries to zero, in [0, 1), that does not fall.
      memory: factor of the mean at each step, in [0, 1); 0 looks at one batch.
      every: steps between two choices of mask, besides the step at which the schedule
        stops rising.
      budget: how the fraction is shared out, and in which pattern.
      where: (path, leaf) -> bool; leaves to prune. Compressed leaves are skipped.

    Returns:
      A transformation whose ``update`` needs ``params``. Counts are exact.
      ``state.stray`` is as in `prune_gradually`.

    Raises:
      ValueError: ``every`` or ``memory`` is out of range, nothing is selected, or
        ``update`` is called without ``params``.

    >>> tx = prune_by_saliency(optax.sgd(0.1), lambda step: 0.5)
    >>> params = {"kernel": jnp.array([[3.0, 1.0]])}
    >>> updates, _ = tx.update({"kernel": jnp.array([[0.1, 2.0]])}, tx.init(params),
    ...     params)
    >>> optax.apply_updates(params, updates)
    {'kernel': Array([[0. , 0.8]], dtype=float32)}
    """
    caller = "prune_by_saliency"
    _check.integer_within(caller, "every", every, 1, 2**31 - 1)
    if not 0 <= memory < 1:
        raise ValueError(f"{caller} needs 0 <= memory < 1, got {memory}.")
    inner = optax.with_extra_args_support(inner)

    def learn(s: jax.Array, w: jax.Array, g: jax.Array) -> jax.Array:
        return memory * s + (1 - memory) * jnp.abs(_product(w, g))

    def init(params: Any) -> PruneByScoreState:
        return _start(inner, params, where)._replace(latent=())

    def update(
        updates: Any, state: PruneByScoreState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, PruneByScoreState]:
        params_needed(caller, params)
        level, due = level_at(sparsity, every, state.count)
        scores = _learned(learn, state.masks, state.scores, params, updates)

        def choose(held: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            old, stray = held
            rank = jax.tree.map(lambda m, s: jnp.where(m, s, -1), old, scores)
            stray = add_strays(stray, old, params)
            return masks_of(old, rank, level, _as_given, budget), stray

        masks, stray = when(due, choose, (state.masks, state.stray))
        moves, inner_state = inner.update(
            zeroed(masks, updates), state.inner_state, params, **extra_args
        )
        count = optax.safe_increment(state.count)
        return land_on_zero(masks, moves, params), PruneByScoreState(
            count, scores, masks, (), stray, inner_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


def prune_by_movement(
    inner: optax.GradientTransformation,
    sparsity: optax.Schedule,
    *,
    every: int = 1,
    budget: Budget = leaf_budget,
    where: Where = is_matrix,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the weights that move away from zero, not those that are far from it.

    Sanh, Wolf and Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning",
    arXiv:2005.07683, hard: the score of a weight is ``-sum(weight * gradient)`` over
    all steps, which is that of the paper up to the learning rate of its scores, and the
    best of them stay. A removed weight keeps its value below and its score goes on, so
    it may come back as it was.

    Args:
      inner: the optimizer. It sees gradients that are zero where weights are removed,
        and removed weights by what they were.
      sparsity: step -> fraction of entries to zero, in [0, 1).
      every: steps between two choices of mask, besides the step at which the schedule
        stops rising.
      budget: how the fraction is shared out, and in which pattern. The paper has both
        `leaf_budget` and `global_budget`.
      where: (path, leaf) -> bool; leaves to prune. Compressed leaves are skipped.

    Returns:
      A transformation whose ``update`` needs ``params``. Counts are exact.
      ``state.stray`` is as in `prune_gradually`.

    Raises:
      ValueError: ``every`` is less than 1, nothing is selected, or ``update`` is called
        without ``params``.

    >>> tx = prune_by_movement(optax.sgd(0.1), lambda step: 0.5)
    >>> params = {"kernel": jnp.array([[3.0, 1.0]])}
    >>> updates, _ = tx.update({"kernel": jnp.array([[2.0, -2.0]])}, tx.init(params),
    ...     params)
    >>> optax.apply_updates(params, updates)  # 3 moves to zero, 1 away from it
    {'kernel': Array([[0. , 1.2]], dtype=float32)}
    """
    caller = "prune_by_movement"
    _check.integer_within(caller, "every", every, 1, 2**31 - 1)

    def learn(s: jax.Array, w: jax.Array, g: jax.Array, step: jax.Array) -> jax.Array:
        return s - _product(w, g)

    def choose(masks: Any, scores: Any, step: jax.Array) -> Any:
        level, due = level_at(sparsity, every, step)
        return when(
            due, lambda old: masks_of(old, scores, level, _as_given, budget), masks
        )

    return _by_movement(caller, inner, where, learn, choose)


def prune_by_soft_movement(
    inner: optax.GradientTransformation,
    threshold: float,
    *,
    rate: float,
    penalty: optax.Schedule,
    where: Where = is_matrix,
) -> optax.GradientTransformationExtraArgs:
    """Removes weights whose learned score falls below a threshold; a penalty pulls.

    Sanh, Wolf and Rush, arXiv:2005.07683, soft: a weight stays while ``sigmoid(score) >
    threshold``. Scores begin at 0 and follow gradient descent on the loss, through the
    mask, plus ``penalty * sum(sigmoid(score))``; how sparse it gets follows from the
    penalty. In the paper that is a mean over all scores, here it is a sum.

    Args:
      inner: the optimizer, as in `prune_by_movement`.
      threshold: in (0, 0.5), else all weights go at once. The paper has 0.1.
      rate: learning rate of the scores, positive.
      penalty: step -> weight of the penalty, not negative.
      where: (path, leaf) -> bool; leaves to prune. Compressed leaves are skipped.

    Returns:
      A transformation whose ``update`` needs ``params``; else as `prune_by_movement`.

    Raises:
      ValueError: ``threshold`` or ``rate`` is out of range, nothing is selected, or
        ``update`` is called without ``params``.

    >>> tx = prune_by_soft_movement(optax.sgd(0.1), 0.4, rate=1.0, penalty=lambda t: 2)
    >>> params = {"kernel": jnp.array([[3.0, 1.0]])}
    >>> updates, _ = tx.update({"kernel": jnp.array([[2.0, -2.0]])}, tx.init(params),
    ...     params)
    >>> optax.apply_updates(params, updates)  # the scores are -6.5 and 1.5
    {'kernel': Array([[0. , 1.2]], dtype=float32)}
    """
    caller = "prune_by_soft_movement"
    if not 0 < threshold < 0.5:
        raise ValueError(f"{caller} needs 0 < threshold < 0.5, got {threshold}.")
    if not rate > 0:
        raise ValueError(f"{caller} needs rate > 0, got {rate}.")

    def learn(s: jax.Array, w: jax.Array, g: jax.Array, step: jax.Array) -> jax.Array:
        share = jax.nn.sigmoid(s)
        return s - rate * (_product(w, g) + penalty(step) * share * (1 - share))

    def choose(masks: Any, scores: Any, step: jax.Array) -> Any:
        del step
        return jax.tree.map(
            lambda m, s: jax.nn.sigmoid(s) > threshold if m.ndim else m, masks, scores
        )

    return _by_movement(caller, inner, where, learn, choose)


def _by_movement(
    caller: str,
    inner: optax.GradientTransformation,
    where: Where,
    learn: Callable[..., jax.Array],
    choose: Callable[[Any, Any, jax.Array], Any],
) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> PruneByScoreState:
        return _start(inner, params, where)

    def update(
        updates: Any, state: PruneByScoreState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, PruneByScoreState]:
        params_needed(caller, params)
        step = state.count
        old, stray = watched(step, state.masks, state.stray, params)
        weights = underneath(old, params, state.latent)

        def learned(s: jax.Array, w: jax.Array, g: jax.Array) -> jax.Array:
            return learn(s, w, g, step)

        scores = _learned(learned, old, state.scores, weights, updates)
        masks = choose(old, scores, step)
        moves, inner_state = inner.update(
            zeroed(old, updates), state.inner_state, weights, **extra_args
        )
        # A removed weight does not drift with the moments it had.
        moves = zeroed(old, moves)
        moved = optax.apply_updates(weights, moves)
        return surface(old, masks, moves, moved, params), PruneByScoreState(
            optax.safe_increment(step),
            scores,
            masks,
            latent_of(masks, moved),
            stray,
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _start(
    inner: optax.GradientTransformationExtraArgs, params: Any, where: Where
) -> PruneByScoreState:
    masks = all_kept(params, where)
    return PruneByScoreState(
        jnp.zeros([], jnp.int32),
        jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), masks),
        masks,
        latent_of(masks, params),
        jnp.zeros([], jnp.int32),
        inner.init(params),
    )


def _learned(
    learn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    masks: Any,
    scores: Any,
    weights: Any,
    grads: Any,
) -> Any:
    return jax.tree.map(
        lambda m, s, w, g: learn(s, w, g) if m.ndim else s,
        masks,
        scores,
        weights,
        grads,
    )


def _product(w: jax.Array, g: jax.Array) -> jax.Array:
    """float32, since sums of many 16-bit products need it."""
    return w.astype(jnp.float32) * g.astype(jnp.float32)


def _as_given(scores: Any) -> Any:
    return scores
