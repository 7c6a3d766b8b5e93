"""Zeros that training must not touch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp.tree import Where, is_matrix, select


CHECK_EVERY = 100  # steps between two looks for strays


class KeepZerosState(NamedTuple):
    """State of `keep_zeros`."""

    count: jax.Array  # type: ignore[assignment]  # int32[], updates seen
    masks: Any  # bool, like params; a leaf that is not held has a scalar True
    stray: jax.Array  # int32[], weights found non-zero where a mask is False


def params_needed(caller: str, params: Any) -> None:
    """Raises if a link was called without the weights."""
    if params is None:
        raise ValueError(
            f"{caller} needs the current weights: call tx.update(grads, state, params)."
        )


def when(due: jax.Array, fn: Callable[[Any], Any], carry: Any) -> Any:
    """``fn(carry)`` if ``due``, else ``carry``, which then stays where it is.

    A loop of at most one turn, since XLA copies what a `jax.lax.cond` hands through.
    What ``fn`` captures must come into the step, not be made in it: XLA would write it
    to memory on every step.
    """

    def turn(loop: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return jnp.zeros_like(due), fn(loop[1])

    return jax.lax.while_loop(lambda loop: loop[0], turn, (due, carry))[1]


def zeroed(masks: Any, tree: Any) -> Any:
    """``tree`` with zeros where a mask is False."""
    return jax.tree.map(
        lambda m, x: jnp.where(m, x, jnp.zeros((), x.dtype)) if m.ndim else x,
        masks,
        tree,
    )


def land_on_zero(masks: Any, updates: Any, params: Any) -> Any:
    """Updates after which `optax.apply_updates` gives exactly 0 where a mask is False.

    ``-p`` is kept in the wider dtype: ``p + (-p)`` is then 0 for every pair of dtypes.
    """
    return jax.tree.map(
        lambda m, u, p: jnp.where(m, u, -p) if m.ndim else u, masks, updates, params
    )


def add_strays(stray: jax.Array, masks: Any, params: Any) -> jax.Array:
    """``stray`` and the weights that are not zero where a mask is False."""
    counts = jax.tree.map(
        lambda m, p: jnp.sum(~m & (p != 0), dtype=jnp.int32) if m.ndim else 0,
        masks,
        params,
    )
    found = sum(jax.tree.leaves(counts), start=jnp.zeros([], jnp.int32))
    return stray + jnp.minimum(found, jnp.iinfo(jnp.int32).max - stray)


def watched(
    count: jax.Array, masks: Any, stray: jax.Array, params: Any
) -> tuple[Any, jax.Array]:
    """The masks, and the strays with those of now, if it is time to look for them."""

    def look(held: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        stray = add_strays(held[1], held[0], params)
        # Always true, which XLA does not know: masks that left the loop as they came
        # would tell it nothing of an order, and it would copy the weights on each step.
        return jax.tree.map(lambda m: m & (stray >= 0), held[0]), stray

    return when(count % CHECK_EVERY == 1, look, (masks, stray))


def keep_zeros(*, where: Where = is_matrix) -> optax.GradientTransformation:
    """Holds every weight that is exactly zero at ``init`` at exactly zero.

    The link that keeps a pruned tree pruned while it trains on. Chain it last: it
    rewrites the update so that `optax.apply_updates` lands on zero.

    Args:
      where: (path, leaf) -> bool; leaves whose zeros are held.

    Returns:
      A transformation whose ``update`` needs ``params``. ``state.stray`` counts weights
      that were not zero where they should be, at the second update and every 100 steps
      from there: this link is not the last, or somebody else wrote to them.

    >>> params = {"kernel": jnp.array([[0.0, 1.0]])}
    >>> tx = optax.chain(optax.sgd(0.5), keep_zeros())
    >>> updates, _ = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'kernel': Array([[0. , 0.5]], dtype=float32)}
    """

    def init(params: Any) -> KeepZerosState:
        masks = jax.tree.map(
            lambda c, p: p != 0 if c else jnp.ones((), bool),
            select(params, where),
            params,
        )
        return KeepZerosState(jnp.zeros([], jnp.int32), masks, jnp.zeros([], jnp.int32))

    def update(
        updates: Any, state: KeepZerosState, params: Any = None
    ) -> tuple[Any, KeepZerosState]:
        params_needed("keep_zeros", params)
        masks, stray = watched(state.count, state.masks, state.stray, params)
        count = optax.safe_increment(state.count)
        landed = land_on_zero(masks, updates, params)
        return landed, KeepZerosState(count, masks, stray)

    return optax.GradientTransformation(init, update)
