"""Rounding at random, which is right on average."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp._extremes import divided
from jaxcomp.node import dense_of
from jaxcomp.quant.grid import QTensor, packed, to_groups
from jaxcomp.quant.uniform import quantize


def quantize_stochastically(
    key: jax.Array,
    x: jax.Array,
    grid: Callable[..., QTensor] = quantize,
    **settings: Any,
) -> QTensor:
    """Rounds ``x`` up or down at random, so that the mean of the result is ``x``.

    Gupta, Agrawal, Gopalakrishnan and Narayanan, "Deep Learning with Limited Numerical
    Precision", arXiv:1502.02551, section 3: up with the probability of the part of a
    step that is left over.

    Args:
      key: a JAX random key.
      x: float[*shape].
      grid: what makes the grid: `quantize`, `quantize_affine`, `quantize_searched` or
        any function from float[*shape] to a `QTensor`.
      **settings: what ``grid`` takes.

    Returns:
      The `QTensor` of ``grid`` with other codes. Its expectation is ``x`` where the
      grid spans it; what is on the grid, and zeros, stay as they are.

    Raises:
      ValueError, TypeError: as ``grid``.

    >>> x = jnp.full(1000, 0.25).at[0].set(1.0)
    >>> q = quantize_stochastically(jax.random.key(0), x, bits=2, axis=None)
    >>> sorted(set(q.dense().tolist())), round(float(q.dense()[1:].mean()), 2)
    ([0.0, 1.0], 0.24)
    """
    x = _check.floating("quantize_stochastically", x)
    return _drawn(key, x, grid(x, **settings))


@jax.jit
def _drawn(key: jax.Array, x: jax.Array, node: QTensor) -> QTensor:
    groups = to_groups(x, node.axis, node.group).astype(_check.wide(x.dtype))
    scale = dense_of(node.scale).astype(groups.dtype)[..., None]
    steps = divided(groups, scale)
    below = jnp.floor(steps)
    # Of 24 bits: below is exact, and a part of a step below 2**-24 is never taken.
    up = jax.random.uniform(key, steps.shape, jnp.float32) < steps - below
    zero = node._zero()
    top = 2**node.bits - 1 if isinstance(zero, jax.Array) else 2 * zero
    codes = below + up.astype(below.dtype) + jnp.asarray(zero, below.dtype)
    drawn = jnp.clip(codes, 0, top).astype(jnp.uint16)
    old = node._codes()
    same = to_groups(x == node.dense(), node.axis, node.group)
    return QTensor(
        packed(jnp.where(same, old, drawn.astype(old.dtype)), node.bits),
        node.scale,
        node.zero,
        node.bits,
        node.shape,
        node.axis,
        node.group,
    )
