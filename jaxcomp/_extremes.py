"""Arithmetic at any magnitude, which neither overflows nor is flushed to 0."""

import jax
import jax.numpy as jnp


def unit_near(size: jax.Array) -> jax.Array:
    """A power of 2 that brings values of this size away from both ends of float32."""
    return jnp.where(size > 1, 2.0**-24, 2.0**24).astype(size.dtype)


def divided(x: jax.Array, size: jax.Array) -> jax.Array:
    """``x / size`` for ``size`` of any magnitude, and 0 where it is 0."""
    # XLA multiplies by the reciprocal; that of a large size would be flushed to 0.
    unit = unit_near(size)
    divisor = size * unit
    is_zero = divisor == 0  # what is coded may come to 0; a subnormal is flushed to it
    return jnp.where(is_zero, 0, (x * unit) / jnp.where(is_zero, 1, divisor))
