"""Zeros that training must not touch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp.tree import Where, is_matrix, select


class KeepZerosState(NamedTuple):
    """State of `keep_zeros`."""

    masks: Any  # bool, like params; a leaf that is not held has a scalar True


def params_needed(caller: str, params: Any) -> None:
    """Raises if a link was called without the weights."""
    if params is None:
        raise ValueError(
            f"{caller} needs the current weights: call tx.update(grads, state, params)."
        )


def land_on_zero(masks: Any, updates: Any, params: Any) -> Any:
    """Updates after which `optax.apply_updates` gives exactly 0 where a mask is False.

    ``-p`` is kept in the wider dtype: ``p + (-p)`` is then 0 for every pair of dtypes.
    """
    return jax.tree.map(
        lambda m, u, p: jnp.where(m, u, -p) if m.ndim else u, masks, updates, params
    )


def keep_zeros(*, where: Where = is_matrix) -> optax.GradientTransformation:
    """Holds every weight that is exactly zero at ``init`` at exactly zero.

    The link that keeps a pruned tree pruned while it trains on. Chain it last: it
    rewrites the update so that `optax.apply_updates` lands on zero.

    Args:
      where: (path, leaf) -> bool; leaves whose zeros are held.

    Returns:
      A transformation whose ``update`` needs ``params``.

    >>> params = {"kernel": jnp.array([[0.0, 1.0]])}
    >>> tx = optax.chain(optax.sgd(0.5), keep_zeros())
    >>> updates, _ = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'kernel': Array([[0. , 0.5]], dtype=float32)}
    """

    def init(params: Any) -> KeepZerosState:
        return KeepZerosState(
            jax.tree.map(
                lambda c, p: p != 0 if c else jnp.ones((), bool),
                select(params, where),
                params,
            )
        )

    def update(
        updates: Any, state: KeepZerosState, params: Any = None
    ) -> tuple[Any, KeepZerosState]:
        params_needed("keep_zeros", params)
        return land_on_zero(state.masks, updates, params), state

    return optax.GradientTransformation(init, update)
