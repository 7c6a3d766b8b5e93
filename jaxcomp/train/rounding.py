"""Updates rounded at random, so that coarse weights move when an update is small.

Links of a chain, for the end of it: each rewrites the update so that
`optax.apply_updates` lands on a value that the weights can have.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp import _check
from jaxcomp.train.project import exchanged, paired, selected_leaves
from jaxcomp.train.zeros import params_needed
from jaxcomp.tree import Where, is_matrix, select


class RoundState(NamedTuple):
    """State of `round_stochastically` and `round_to_step_stochastically`."""

    key: jax.Array  # uint32[...], the next random key


def _is_bfloat16(path: str, leaf: Any) -> bool:
    del path
    return leaf.dtype == jnp.bfloat16


def round_stochastically(
    key: jax.Array, *, where: Where = _is_bfloat16
) -> optax.GradientTransformation:
    """Rounds new weights to bfloat16 at random, so that none of a small update is lost.

    Gupta, Agrawal, Gopalakrishnan and Narayanan, "Deep Learning with Limited Numerical
    Precision", arXiv:1502.02551, for bfloat16 weights as in Zamirai, Zhang, Aberger and
    De Sa, "Revisiting BFloat16 Training", arXiv:2010.06192. A weight of bfloat16 has 8
    bits, so an update of less than 1/512 of it is lost on every step if rounded to
    nearest. Here the sum of weight and update, in float32, goes up or down to one of
    its two neighbours, with a mean of the sum itself.

    Args:
      key: a JAX random key.
      where: (path, leaf) -> bool; leaves to round, all of bfloat16. By default every
        leaf of that dtype, also biases.

    Returns:
      A transformation whose ``update`` needs ``params`` and gives float32, which
      `optax.apply_updates` takes. Where the sum is a bfloat16 it is met exactly: zeros
      whose update is 0 stay.

    Raises:
      ValueError: nothing is selected, or ``update`` is called without ``params``.
      TypeError: a selected leaf is not of bfloat16.

    >>> params = {"kernel": jnp.ones(1000, jnp.bfloat16)}
    >>> tx = optax.chain(optax.sgd(1e-3), round_stochastically(jax.random.key(0)))
    >>> grads = {"kernel": jnp.ones(1000)}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> rounded = optax.apply_updates(params, updates)["kernel"].astype(jnp.float32)
    >>> jnp.unique(rounded), round(float(rounded.mean()), 4)
    (Array([0.99609375, 1.        ], dtype=float32), 0.999)
    """

    def landed(key: jax.Array, path: str, p: jax.Array, u: jax.Array) -> jax.Array:
        if p.dtype != jnp.bfloat16:
            raise TypeError(
                f"round_stochastically needs leaves of bfloat16, got "
                f"{_check.describe(p)} at {path!r}. Cast it, or leave it out with "
                "`where`."
            )
        total = p.astype(jnp.float32) + u.astype(jnp.float32)
        # A bfloat16 is the upper half of a float32; the lower one is carried at random.
        bits = jax.lax.bitcast_convert_type(total, jnp.uint32)
        bits += jax.random.bits(key, p.shape, jnp.uint16).astype(jnp.uint32)
        upper = (bits >> 16).astype(jnp.uint16)
        near = jax.lax.bitcast_convert_type(upper, jnp.bfloat16).astype(jnp.float32)
        return jnp.where(jnp.isfinite(total), near, total)  # a NaN must not be carried

    return _rounding("round_stochastically", key, landed, where)


def round_to_step_stochastically(
    key: jax.Array, step: float | jax.Array, *, where: Where = is_matrix
) -> optax.GradientTransformation:
    """Keeps the weights on multiples of ``step``, rounding updates to it at random.

    Gupta et al., arXiv:1502.02551: training with fixed-point weights. An update of a
    tenth of a step moves a tenth of the weights by a whole one. Weights that are not on
    a multiple come to one with the first update. `quantize_step` with the same ``step``
    stores them.

    Args:
      key: a JAX random key.
      step: distance between two levels, in the unit of the weights; positive.
      where: (path, leaf) -> bool; leaves to round. Compressed leaves are skipped.

    Returns:
      A transformation whose ``update`` needs ``params``. The mean of a new weight is
      that of the sum to a ``2**-23`` of a step. Weights are not bounded, for instance
      by the codes of 8 bits. A weight that changes its sign or more than halves may
      land an ulp beside its level, and is on it with the next step.

    Raises:
      ValueError: ``step`` is not positive, nothing is selected, or ``update`` is called
        without ``params``.

    >>> params = {"kernel": jnp.zeros((40, 50))}
    >>> tx = round_to_step_stochastically(jax.random.key(0), step=0.5)
    >>> updates = {"kernel": jnp.full((40, 50), 0.05)}
    >>> updates, _ = tx.update(updates, tx.init(params), params)
    >>> jnp.unique(updates["kernel"]), round(float(updates["kernel"].mean()), 2)
    (Array([0. , 0.5], dtype=float32), 0.05)
    """
    known = _check.number("round_to_step_stochastically", "step", step)
    if known is not None and not 0 < known < math.inf:
        raise ValueError(
            f"round_to_step_stochastically needs a positive finite step, got {step}."
        )

    def landed(key: jax.Array, path: str, p: jax.Array, u: jax.Array) -> jax.Array:
        del path
        wide = _check.wide(p.dtype)
        size = jnp.asarray(step, p.dtype).astype(wide)  # as `quantize_step` has it
        level = jnp.round(p.astype(wide) / size)
        # The distance to a level as the weight's dtype has it: 0 once it is there.
        beside = p.astype(wide) - (level * size).astype(p.dtype).astype(wide)
        moved = (beside + u.astype(wide)) / size
        chance = jax.random.uniform(key, p.shape, wide)
        moved = jnp.sign(moved) * jnp.floor(jnp.abs(moved) + chance)
        return ((level + moved) * size).astype(p.dtype).astype(wide)

    return _rounding("round_to_step_stochastically", key, landed, where)


# A key, a path, weights and their updates to new weights, in the dtype to compute in.
_Landed = Callable[[jax.Array, str, jax.Array, jax.Array], jax.Array]


def _rounding(
    caller: str, key: jax.Array, landed: _Landed, where: Where
) -> optax.GradientTransformation:
    impl = jax.random.key_impl(key)
    plain = jax.random.key_data(key)  # a file has no type for keys

    def init(params: Any) -> RoundState:
        select(params, where)
        return RoundState(jnp.copy(plain))  # the caller may donate the state

    def update(
        updates: Any, state: RoundState, params: Any = None
    ) -> tuple[Any, RoundState]:
        params_needed(caller, params)
        paths, weights = selected_leaves(params, where)
        key, now = jax.random.split(jax.random.wrap_key_data(state.key, impl=impl))
        moves = {}
        for i, u in paired(updates, params, weights):
            p = weights[i]
            new = landed(jax.random.fold_in(now, i), paths[i], p, u)
            moves[i] = new - p.astype(new.dtype)
        return exchanged(updates, params, moves), RoundState(jax.random.key_data(key))

    return optax.GradientTransformation(init, update)
