"""Lottery tickets: prune what was trained, go back to an early step, train again.

Both are wrappers of an optimizer, because its state goes back as well, and with it the
learning rate that it follows. They count in steps of the wrapped optimizer: every round
ends once ``every`` of them are done, and all rounds but the first begin at step ``to``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp import _check
from jaxcomp.node import flatten
from jaxcomp.prune.budgets import Budget, leaf_budget
from jaxcomp.prune.oneshot import chosen_masks
from jaxcomp.prune.scores import Score, magnitude
from jaxcomp.train.zeros import (
    add_strays,
    land_on_zero,
    params_needed,
    when,
    zeroed,
)
from jaxcomp.tree import Where, is_matrix, select


class RewindState(NamedTuple):
    """State of `rewind_weights` and `rewind_learning_rate`."""

    count: jax.Array  # type: ignore[assignment]  # int32[], updates seen
    round: jax.Array  # int32[], rounds that are over
    masks: Any  # bool, like params; a leaf that is never pruned has a scalar True
    stray: jax.Array  # int32[], non-zero weights found where a mask was False
    saved_params: Any  # of step `to` of the first round; () in `rewind_learning_rate`
    saved_state: Any  # of the wrapped optimizer, of that step
    inner_state: Any  # of the wrapped optimizer


# How a round turns: its updates, from (whether it is the first, saved_params, params).
_Turn = Callable[[jax.Array, Any, Any], Any]


def rewind_weights(
    inner: optax.GradientTransformation,
    sparsity: optax.Schedule,
    *,
    every: int,
    to: int = 0,
    score: Score = magnitude,
    budget: Budget = leaf_budget,
    where: Where = is_matrix,
) -> optax.GradientTransformationExtraArgs:
    """Finds lottery tickets: train, prune, put the rest back where it began, repeat.

    Frankle and Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural
    Networks", arXiv:1803.03635 (iterative pruning with resetting); with ``to > 0``
    Frankle, Dziugaite, Roy and Carbin, "Linear Mode Connectivity and the Lottery Ticket
    Hypothesis", arXiv:1912.05671. Theirs is ``sparsity=lambda r: 1 - 0.8**r``.

    A round ends after ``every`` steps of ``inner``. The next two updates do not train,
    and their gradients are not used. The first one chooses masks from the weights as
    they are then and lands every leaf on zero. The second lands the weights that are
    kept, and all leaves that are not pruned, on their values before step ``to`` of the
    first round. In two because ``0 + saved`` is exact, and ``p + (saved - p)`` is not.
    Training goes on with the state that ``inner`` had before step ``to``: to the last
    bit, the run is one that starts there with the masks. Between the two the gradient
    is that of a net of zeros and need not be finite: `optax.apply_if_finite` goes
    inside.

    Masks only shrink. A round at whose end ``sparsity`` asks for no more than before
    is the last: it trains on. Round ``r``, from 0, ends after ``every + r * (every - to
    + 2)`` updates. Nothing may change the updates after this link; a learning-rate
    schedule belongs inside. State outside of both, as running means of a net, is not
    rewound.

    Args:
      inner: the optimizer. It sees gradients that are zero where weights are removed.
      sparsity: rounds that are over, 1 or more -> fraction of entries to zero, in
        [0, 1). The first round is dense.
      every: steps of a whole round.
      to: the step that is gone back to, less than ``every``.
      score: tree of float[*shape] -> tree of scores, of the trained weights.
      budget: how the fraction is shared out: `leaf_budget`, `global_budget`.
      where: (path, leaf) -> bool; leaves to prune. Compressed leaves are skipped.

    Returns:
      A transformation whose ``update`` needs ``params``. Its state holds a copy of the
      weights and of the state of ``inner``. ``state.stray`` counts removed weights that
      were not zero at the end of a round. Somebody else wrote to them.

    Raises:
      TypeError: ``sparsity`` is not a function.
      ValueError: ``every`` is less than 1, ``to`` is not in [0, every), nothing is
        selected, or ``update`` is called without ``params``.

    >>> tx = rewind_weights(optax.sgd(1.0), lambda r: 1 - 0.5**r, every=1)
    >>> params = {"kernel": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    >>> grads, state = {"kernel": jnp.array([[3.0, 0.0, 0.0, 0.0]])}, tx.init(params)
    >>> for _ in range(4):
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params["kernel"])
    [[1. 3. 2. 1.]]
    [[0. 0. 0. 0.]]
    [[0. 3. 2. 0.]]
    [[0. 3. 2. 0.]]
    """

    def turn(first: jax.Array, saved: Any, params: Any) -> Any:
        return jax.tree.map(lambda s, p: jnp.where(first, -p, s - p), saved, params)

    return _rewind(
        "rewind_weights",
        inner,
        sparsity,
        every,
        to,
        keep=lambda params: params,
        turn=turn,
        turns=2,
        score=score,
        budget=budget,
        where=where,
    )


def rewind_learning_rate(
    inner: optax.GradientTransformation,
    sparsity: optax.Schedule,
    *,
    every: int,
    to: int = 0,
    score: Score = magnitude,
    budget: Budget = leaf_budget,
    where: Where = is_matrix,
) -> optax.GradientTransformationExtraArgs:
    """Train, prune, train again from step ``to`` of the optimizer, repeat.

    Renda, Frankle and Carbin, "Comparing Rewinding and Fine-tuning in Neural Network
    Pruning", arXiv:2003.02389: weights keep their trained values, and the learning-rate
    schedule is run again. As `rewind_weights`, but the weights do not go back, so that
    one update a round does not train: it chooses the masks and lands removed weights on
    zero. Round ``r``, from 0, ends after ``every + r * (every - to + 1)`` updates.

    All of the state of ``inner`` goes back, moments and schedules; a schedule outside
    of it does not. `restart_decay` rewinds a schedule alone, behind any pruning link.

    Args:
      inner: the optimizer. It sees gradients that are zero where weights are removed.
      sparsity: rounds that are over, 1 or more -> fraction of entries to zero.
      every: steps of a whole round.
      to: the step of ``inner`` that is gone back to, less than ``every``.
      score: tree of float[*shape] -> tree of scores, of the trained weights.
      budget: how the fraction is shared out: `leaf_budget`, `global_budget`.
      where: (path, leaf) -> bool; leaves to prune. Compressed leaves are skipped.

    Returns:
      A transformation whose ``update`` needs ``params``, as `rewind_weights`.

    Raises:
      TypeError: ``sparsity`` is not a function.
      ValueError: as `rewind_weights`.

    >>> tx = rewind_learning_rate(optax.sgd(1.0), lambda r: 1 - 0.5**r, every=1)
    >>> params = {"kernel": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    >>> grads, state = {"kernel": jnp.array([[3.0, 0.0, 0.0, 1.0]])}, tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params["kernel"])
    [[1. 3. 2. 0.]]
    [[0. 3. 2. 0.]]
    [[0. 3. 2. 0.]]
    """

    def turn(first: jax.Array, saved: Any, params: Any) -> Any:
        del first, saved
        return jax.tree.map(jnp.zeros_like, params)

    return _rewind(
        "rewind_learning_rate",
        inner,
        sparsity,
        every,
        to,
        keep=lambda params: (),
        turn=turn,
        turns=1,
        score=score,
        budget=budget,
        where=where,
    )


def _rewind(
    caller: str,
    inner: optax.GradientTransformation,
    sparsity: optax.Schedule,
    every: int,
    to: int,
    *,
    keep: Callable[[Any], Any],
    turn: _Turn,
    turns: int,
    score: Score,
    budget: Budget,
    where: Where,
) -> optax.GradientTransformationExtraArgs:
    _check.integer_within(caller, "every", every, 1, 2**31 - 1)
    _check.integer_within(caller, "to", to, 0, every - 1)
    if not callable(sparsity):
        raise TypeError(
            f"{caller} needs a function round -> sparsity, got {sparsity!r}. Pass e.g. "
            "lambda r: 1 - 0.8**r, or optax.constant_schedule(0.8) for one round."
        )
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> RewindState:
        masks = jax.tree.map(
            lambda c, p: jnp.ones(p.shape if c else (), bool),
            select(params, where),
            params,
        )
        return RewindState(
            jnp.zeros([], jnp.int32),
            jnp.zeros([], jnp.int32),
            masks,
            jnp.zeros([], jnp.int32),
            jax.tree.map(jnp.copy, keep(params)),  # a buffer cannot be donated twice
            jax.tree.map(jnp.copy, inner.init(params)),
            inner.init(params),
        )

    def update(
        updates: Any, state: RewindState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, RewindState]:
        params_needed(caller, params)

        def at(rounds: jax.Array) -> jax.Array:
            return jnp.asarray(sparsity(rounds), jnp.float32)

        step = state.count - state.round * (every - to + turns)
        level = at(state.round + 1)
        more = level > jnp.where(state.round > 0, at(state.round), 0)
        turning = (step >= every) & more
        first = turning & (step == every)
        last = turning & (step == every + turns - 1)
        saving = state.count == to
        going_back = (state.round > 0) & (step == to)

        # Not a branch, through which XLA would copy the state at every step. It goes
        # back before the step and not after, so that the moments stay in place.
        def pick(take: jax.Array, new: Any, old: Any) -> Any:
            return jax.tree.map(lambda x, y: jnp.where(take, x, _like(y, x)), new, old)

        saved_params = pick(saving, keep(params), state.saved_params)
        saved_state = pick(saving, state.inner_state, state.saved_state)
        begin = pick(going_back, saved_state, state.inner_state)

        def choose(held: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            masks, stray = held
            return (
                _narrowed(masks, params, level, score, budget),
                add_strays(stray, masks, params),
            )

        masks, stray = when(first, choose, (state.masks, state.stray))
        moves, inner_state = inner.update(
            zeroed(masks, updates), begin, params, **extra_args
        )
        turned = turn(first, saved_params, params)
        moves = jax.tree.map(lambda m, t: jnp.where(turning, t, m), moves, turned)
        return land_on_zero(masks, moves, params), RewindState(
            optax.safe_increment(state.count),
            state.round + last.astype(jnp.int32),
            masks,
            stray,
            saved_params,
            saved_state,
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _narrowed(
    masks: Any, params: Any, level: jax.Array, score: Score, budget: Budget
) -> Any:
    """Masks for a sparsity, of which none is True where it was False."""
    paths, old, treedef = flatten(masks)
    leaves = treedef.flatten_up_to(params)
    taken = {i: leaves[i] for i, mask in enumerate(old) if mask.ndim}

    def removed_first(scores: Any, sparsity: Any) -> dict[str, jax.Array]:
        pairs = zip(scores.items(), taken, strict=True)
        low = {name: jnp.where(old[i], s, -jnp.inf) for (name, s), i in pairs}
        return budget(low, sparsity)

    found = chosen_masks(paths, taken, level, score, removed_first)
    return jax.tree.unflatten(
        treedef, [m & found[i] if i in found else m for i, m in enumerate(old)]
    )


def _like(x: Any, other: Any) -> Any:
    """``x`` in the dtype of the other: an optimizer may have widened its state."""
    return x if x.dtype == other.dtype else x.astype(other.dtype)
