"""Learning-rate decay as a link of the chain: it multiplies what the optimizer wants.

Optax has the schedules (`optax.cosine_decay_schedule`, `optax.exponential_decay`, ...)
and the plateau (`optax.contrib.reduce_on_plateau`). Here is what it lacks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp import _check
from jaxcomp.node import flatten
from jaxcomp.train.zeros import params_needed
from jaxcomp.tree import Where, is_matrix, select


class RestartDecayState(NamedTuple):
    """State of `restart_decay`."""

    since: jax.Array  # int32[], updates since zeros came or went
    zeros: jax.Array  # uint32[], a fingerprint of where the zeros are


def decay_learning_rate(rate: float, every: int) -> optax.GradientTransformation:
    """Multiplies the updates by ``rate`` once more every ``every`` steps.

    The staircase ``rate ** (step // every)``, as a link after any optimizer, whatever
    its learning rate is or follows. For epochs, ``every`` is epochs times steps per
    epoch.

    Args:
      rate: factor, in (0, 1].
      every: steps between two decays.

    Raises:
      ValueError: ``rate`` or ``every`` is out of range.

    >>> tx = optax.chain(optax.sgd(1.0), decay_learning_rate(rate=0.5, every=2))
    >>> state, lengths = tx.init(jnp.ones(1)), []
    >>> for _ in range(5):
    ...     update, state = tx.update(jnp.ones(1), state)
    ...     lengths.append(float(-update[0]))
    >>> lengths
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    _check.integer_within("decay_learning_rate", "every", every, 1, 2**31 - 1)
    if not 0 < rate <= 1:
        raise ValueError(f"decay_learning_rate needs 0 < rate <= 1, got {rate}.")
    return optax.scale_by_schedule(
        optax.exponential_decay(1.0, every, rate, staircase=True)
    )


def restart_decay(
    schedule: optax.Schedule, *, where: Where = is_matrix
) -> optax.GradientTransformation:
    """Multiplies the updates by ``schedule(steps since zeros came or went)``.

    A pruned net learns again at the rate it began with: Renda, Frankle and Carbin,
    "Comparing Rewinding and Fine-tuning in Neural Network Pruning", arXiv:2003.02389,
    learning-rate rewinding. To rewind to step k and not to 0, pass ``lambda step:
    schedule(step + k)``. It looks at the weights alone, so it works with every pruning
    link, and with pruning between two calls.

    Args:
      schedule: steps -> factor, e.g. ``optax.cosine_decay_schedule(1.0, 1000)``.
      where: (path, leaf) -> bool; leaves whose zeros are watched.

    Returns:
      A transformation whose ``update`` needs ``params``. It reads the watched leaves
      once a step. That a change of zeros passes unseen has a chance of ``2**-32``.

    >>> tx = optax.chain(optax.sgd(1.0), restart_decay(lambda step: 0.5**step))
    >>> full, pruned = jnp.array([[3.0, 1.0]]), jnp.array([[3.0, 0.0]])
    >>> state, lengths = tx.init(full), []
    >>> for params in (full, full, full, pruned, pruned):
    ...     update, state = tx.update(jnp.ones((1, 2)), state, params)
    ...     lengths.append(float(-update[0, 0]))
    >>> lengths
    [1.0, 0.5, 0.25, 1.0, 0.5]
    """

    def watched(params: Any) -> list[jax.Array]:
        chosen = jax.tree.leaves(select(params, where))
        leaves = flatten(params)[1]
        return [x for x, taken in zip(leaves, chosen, strict=True) if taken]

    def init(params: Any) -> RestartDecayState:
        return RestartDecayState(jnp.zeros([], jnp.int32), _zeros(watched(params)))

    def update(
        updates: Any, state: RestartDecayState, params: Any = None
    ) -> tuple[Any, RestartDecayState]:
        params_needed("restart_decay", params)
        zeros = _zeros(watched(params))
        since = jnp.where(zeros == state.zeros, state.since, 0)
        factor = schedule(since)
        updates = jax.tree.map(lambda u: u * jnp.asarray(factor, u.dtype), updates)
        return updates, RestartDecayState(optax.safe_increment(since), zeros)

    return optax.GradientTransformation(init, update)


def _zeros(leaves: list[jax.Array]) -> jax.Array:
    """uint32[]: the sum of a hash of the place of every zero."""
    total = jnp.zeros([], jnp.uint32)
    for i, leaf in enumerate(leaves):
        place = jax.lax.iota(jnp.uint32, leaf.size).reshape(leaf.shape)
        salt = jnp.uint32((i + 1) * 0x9E3779B9 % 2**32)
        hashed = _hash(_hash(place) ^ salt)
        total += jnp.sum(jnp.where(leaf == 0, hashed, jnp.uint32(0)), dtype=jnp.uint32)
    return total


def _hash(x: jax.Array) -> jax.Array:
    """A permutation of uint32 without structure, so that sums of it tell sets apart."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)  # Wellons' lowbias32
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
