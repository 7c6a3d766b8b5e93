"""Training that is sparse from the first step on: weights are dropped and others grow.

The number of weights of a leaf never changes. Every few steps some of the smallest are
dropped and as many grow elsewhere. These transformations wrap the optimizer, because a
weight that grows must not inherit moments from a time when it was not there.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp import _check
from jaxcomp.node import dense_of, flatten, path_of
from jaxcomp.prune.budgets import Budget, leaf_budget
from jaxcomp.prune.oneshot import chosen_masks
from jaxcomp.prune.scores import Score, random_scores
from jaxcomp.prune.top import top_masks
from jaxcomp.train.zeros import add_strays, land_on_zero, params_needed, when, zeroed
from jaxcomp.tree import Where, is_matrix, select


class RegrowState(NamedTuple):
    """State of `rigl` and `regrow_randomly`."""

    count: jax.Array  # type: ignore[assignment]  # int32[], updates seen
    masks: Any  # bool, like params; a leaf that is never pruned has a scalar True
    stray: jax.Array  # int32[], non-zero weights found where a mask is False
    key: Any  # uint32[...], the next random key of `regrow_randomly`; () in `rigl`
    inner_state: Any  # of the wrapped optimizer


# The key of the state and gradients in, the next key and what is worth growing out.
_Grow = Callable[[Any, list[jax.Array]], tuple[Any, list[jax.Array]]]


def rigl(
    inner: optax.GradientTransformation,
    sparsity: float | jax.Array | Mapping[str, float],
    *,
    fraction: optax.Schedule,
    score: Score,
    every: int = 100,
    budget: Budget = leaf_budget,
    where: Where = is_matrix,
) -> optax.GradientTransformationExtraArgs:
    """Trains sparse weights; the smallest make room where the gradient is largest.

    Evci et al., "Rigging the Lottery: Making All Tickets Winners", arXiv:1911.11134,
    with ``fraction=optax.cosine_decay_schedule(0.3, stop)``, where ``stop`` is three
    quarters of the steps, and ``score=random_scores(key)``. There a choice of masks
    takes the place of a step of the optimizer; here the step is taken after it, with
    the new masks. As there, a weight that was just dropped may grow again; then it
    never left and keeps its value and its moments.

    The gradient must be that of all weights, taken where the removed ones are zero. So
    it is: the update is rewritten so that `optax.apply_updates` lands on exactly zero.
    The first gradient is too if it is taken at ``apply_masks(params, state.masks)``.

    Weights that grow start at 0. Wherever a weight is dropped or grows, the state of
    ``inner`` is first reset to what ``inner.init`` gives; `left_alone` lists the parts
    of it for which that cannot be done. Nothing may change the updates after this link.

    Args:
      inner: the optimizer. It sees gradients that are zero where weights are removed.
      sparsity: fraction of zeros in [0, 1); with `leaf_budget` also path -> fraction.
      fraction: step -> fraction of the weights of a leaf to exchange, in [0, 1],
        rounded to a count half to even. Where it is 0, no masks are chosen.
      score: tree of float[*shape] -> tree of scores, for the masks of the start.
      every: steps between two choices of masks; the first is at step ``every``.
      budget: how the sparsity is shared out at the start: `leaf_budget`,
        `global_budget`. The count of each leaf stays as it is then.
      where: (path, leaf) -> bool; leaves to prune. Compressed leaves are skipped.

    Returns:
      A transformation whose ``update`` needs ``params``. Every ``every`` steps
      ``state.stray`` counts weights that are not zero where they should be: this link
      is not the last, or somebody else wrote to them.

    Raises:
      TypeError: ``fraction`` is not a function.
      ValueError: ``every`` is less than 1, nothing is selected, a sparsity is out of
        range, or ``update`` is called without ``params``.

    >>> from jaxcomp import random_scores
    >>> score = random_scores(jax.random.key(0))
    >>> fraction = optax.cosine_decay_schedule(0.3, 750)
    >>> tx = rigl(optax.adam(1e-3), 0.75, fraction=fraction, score=score)
    >>> int(tx.init({"kernel": jnp.ones((4, 8))}).masks["kernel"].sum())
    8
    """

    def by_gradient(key: Any, grads: list[jax.Array]) -> tuple[Any, list[jax.Array]]:
        return key, list(map(jnp.abs, grads))

    start = partial(_start, sparsity=sparsity, score=score, budget=budget, where=where)
    return _regrow("rigl", inner, start, (), by_gradient, fraction, every)


def regrow_randomly(
    key: jax.Array,
    inner: optax.GradientTransformation,
    sparsity: float | jax.Array | Mapping[str, float],
    *,
    fraction: optax.Schedule,
    score: Score,
    every: int = 100,
    budget: Budget = leaf_budget,
    where: Where = is_matrix,
) -> optax.GradientTransformationExtraArgs:
    """Trains sparse weights; the smallest make room for others, drawn at random.

    Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse
    Connectivity inspired by Network Science" (SET), arXiv:1707.04780, with
    ``fraction=optax.constant_schedule(0.3)`` and ``every`` one epoch. The smallest
    magnitudes go; the paper takes the fraction of the positive and of the negative
    weights apart. Weights that grow start at 0, not at a random value. All else is as
    in `rigl`, which grows weights where the gradient is largest.

    Args:
      key: a JAX random key. The state carries it, split at every choice of masks.
      inner: the optimizer. It sees gradients that are zero where weights are removed.
      sparsity: fraction of zeros in [0, 1); with `leaf_budget` also path -> fraction.
      fraction: step -> fraction of the weights of a leaf to exchange, as in `rigl`.
      score: tree of float[*shape] -> tree of scores, for the masks of the start.
      every: steps between two choices of masks; the first is at step ``every``.
      budget: how the sparsity is shared out at the start.
      where: (path, leaf) -> bool; leaves to prune. Compressed leaves are skipped.

    Returns:
      A transformation whose ``update`` needs ``params``, as `rigl`.

    Raises:
      TypeError: ``fraction`` is not a function.
      ValueError: as `rigl`.

    >>> from jaxcomp import random_scores
    >>> key, key_masks = jax.random.split(jax.random.key(0))
    >>> score, fraction = random_scores(key_masks), optax.constant_schedule(0.3)
    >>> tx = regrow_randomly(key, optax.sgd(0.1), 0.75, fraction=fraction, score=score)
    >>> int(tx.init({"kernel": jnp.ones((4, 8))}).masks["kernel"].sum())
    8
    """
    impl = jax.random.key_impl(key)

    def at_random(key: Any, grads: list[jax.Array]) -> tuple[Any, list[jax.Array]]:
        key, now = jax.random.split(jax.random.wrap_key_data(key, impl=impl))
        return jax.random.key_data(key), random_scores(now)(grads)

    start = partial(_start, sparsity=sparsity, score=score, budget=budget, where=where)
    plain = jax.random.key_data(key)  # a file has no type for keys
    return _regrow("regrow_randomly", inner, start, plain, at_random, fraction, every)


def left_alone(state: RegrowState) -> list[str]:
    """Paths in ``state.inner_state`` of what a choice of masks does not reset.

    A leaf is reset if it belongs to a pruned weight, which its path tells, and has the
    shape of it. Step counters and factored moments are not; nor are the moments of
    leaves that are not pruned, which are not listed.

    Args:
      state: of `rigl` or `regrow_randomly`.

    >>> from jaxcomp import magnitude
    >>> fraction = optax.constant_schedule(0.3)
    >>> tx = rigl(optax.adam(0.1), 0.5, fraction=fraction, score=magnitude)
    >>> left_alone(tx.init({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}))
    ['0/count']
    """
    masks = jax.tree.leaves(state.masks)
    named = jax.tree.leaves_with_path(state.inner_state)
    owners = _owners(state.masks, state.inner_state)
    return [
        path_of(keys)
        for (keys, leaf), i in zip(named, owners, strict=True)
        if i is None or (masks[i].ndim and masks[i].shape != jnp.shape(leaf))
    ]


def _start(
    params: Any,
    *,
    sparsity: float | jax.Array | Mapping[str, float],
    score: Score,
    budget: Budget,
    where: Where,
) -> Any:
    """The masks that training starts with."""
    chosen = jax.tree.leaves(select(params, where))
    paths, leaves, treedef = flatten(params)
    pairs = enumerate(zip(leaves, chosen, strict=True))
    taken = {i: dense_of(leaf) for i, (leaf, c) in pairs if c and leaf.ndim}
    found = chosen_masks(paths, taken, sparsity, score, budget)
    # Each its own array: a buffer cannot be donated twice.
    masks = [found.get(i, jnp.ones((), bool)) for i in range(len(leaves))]
    return jax.tree.unflatten(treedef, masks)


def _regrow(
    caller: str,
    inner: optax.GradientTransformation,
    start: Callable[[Any], Any],
    key: Any,
    grow: _Grow,
    fraction: optax.Schedule,
    every: int,
) -> optax.GradientTransformationExtraArgs:
    _check.integer_within(caller, "every", every, 1, 2**31 - 1)
    if not callable(fraction):
        raise TypeError(
            f"{caller} needs a function step -> fraction, got fraction={fraction!r}. "
            "Pass an Optax schedule, e.g. optax.cosine_decay_schedule(0.3, stop)."
        )
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> RegrowState:
        masks = start(params)
        return RegrowState(
            jnp.zeros([], jnp.int32),
            masks,
            jnp.zeros([], jnp.int32),
            jax.tree.map(jnp.copy, key),  # the caller may donate the state
            inner.init(zeroed(masks, params)),
        )

    def update(
        updates: Any, state: RegrowState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, RegrowState]:
        params_needed(caller, params)
        share = jnp.asarray(fraction(state.count), jnp.float32)

        def choose(held: tuple[Any, ...]) -> tuple[Any, ...]:
            # With a fraction of 0 this comes to the masks that there were. A cond that
            # went around it would copy the state of the optimizer.
            old, stray, key, inner_state = held
            _, masks, treedef = flatten(old)
            at = [i for i, mask in enumerate(masks) if mask.ndim]
            weights, grads = map(treedef.flatten_up_to, (params, updates))
            key, worth = grow(key, [grads[i] for i in at])
            kept = [masks[i] for i in at]
            rows = _exchanged(kept, [weights[i] for i in at], worth, share)
            for i, mask in zip(at, rows, strict=True):
                masks[i] = mask
            new = jax.tree.unflatten(treedef, masks)
            changed = jax.tree.map(jnp.logical_xor, old, new)
            fresh = inner.init(zeroed(new, params))
            stray = add_strays(stray, old, params)
            return new, stray, key, _reset(changed, inner_state, fresh)

        # At step 0 the weights may be dense still, and their gradient with them.
        masks, stray, key, inner_state = when(
            (state.count % every == 0) & (state.count > 0),
            choose,
            (state.masks, state.stray, state.key, state.inner_state),
        )
        grads = zeroed(masks, updates)
        moves, inner_state = inner.update(grads, inner_state, params, **extra_args)
        return land_on_zero(masks, moves, params), RegrowState(
            optax.safe_increment(state.count), masks, stray, key, inner_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _exchanged(
    masks: list[jax.Array],
    weights: list[jax.Array],
    worth: list[jax.Array],
    share: jax.Array,
) -> list[jax.Array]:
    """Masks of as many True, of which ``share`` are the most worth growing."""
    if not masks:
        return []
    size = jnp.array([mask.size for mask in masks], jnp.int32)
    active = jnp.stack([jnp.sum(mask, dtype=jnp.int32) for mask in masks])
    some = jnp.round(share * active.astype(jnp.float32)).astype(jnp.int32)
    some = jnp.clip(some, 0, active)
    # Neither magnitudes nor worths are negative, so -1 is out of the race.
    pairs = zip(masks, weights, strict=True)
    left = [jnp.where(mask, jnp.abs(weight), -1) for mask, weight in pairs]
    kept = top_masks(left, size - active + some)
    rivals = zip(kept, worth, strict=True)
    grown = top_masks([jnp.where(k, -1, w) for k, w in rivals], size - some)
    return list(map(jnp.logical_or, kept, grown))


def _owners(masks: Any, inner_state: Any) -> list[int | None]:
    """Whose each leaf of a state is: the parameter's with whose path its own ends.

    Optimizers keep trees like params, so this finds them at any depth, whatever the
    class of the state. The longest such path wins: ``b/kernel`` ends with ``kernel``.
    """
    named = enumerate(jax.tree.leaves_with_path(masks))
    index = {keys: i for i, (keys, _) in named}

    def owner(keys: tuple[Any, ...]) -> int | None:
        ends = (keys[n:] for n in range(len(keys) + 1))
        return next((index[end] for end in ends if end in index), None)

    return [owner(keys) for keys, _ in jax.tree.leaves_with_path(inner_state)]


def _reset(changed: Any, inner_state: Any, fresh: Any) -> Any:
    """``inner_state`` with what ``fresh`` has wherever a mask changed."""
    masks = jax.tree.leaves(changed)
    leaves, treedef = jax.tree.flatten(inner_state)
    rows = zip(
        _owners(changed, inner_state), leaves, jax.tree.leaves(fresh), strict=True
    )

    def reset(i: int | None, leaf: jax.Array, new: jax.Array) -> jax.Array:
        if i is None or not masks[i].ndim or masks[i].shape != jnp.shape(leaf):
            return leaf
        # An optimizer may have widened its state since the start.
        return jnp.where(masks[i], new.astype(leaf.dtype), leaf)

    return jax.tree.unflatten(treedef, [reset(*row) for row in rows])
