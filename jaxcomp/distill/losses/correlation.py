"""Losses that are content where a student ranks as its teacher does."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.distill.losses.logits import check_temperature, checked_logits


ROUNDING = 5e-7  # deviations of this size, to the largest probability, are noise


def correlation_loss(
    student: Any, teacher: Any, temperature: float = 1.0, *, mask: Any = None
) -> jax.Array:
    """One minus the correlation over classes of what student and teacher predict.

    Huang, You, Wang, Qian and Xu, "Knowledge Distillation from A Stronger Teacher"
    (DIST), arXiv:2205.10536, the inter-class relation: ``T**2 * (1 - r)``, where r is
    Pearson's correlation of ``softmax(student / T)`` and ``softmax(teacher / T)``. The
    paper's loss is a weighted sum of its mean and that of `class_correlation_loss`.
    ``T**2`` is in the authors' code and in torchdistill's, not in the paper.

    Args:
      student: float[..., classes] logits.
      teacher: float[..., classes] logits of the same shape.
      temperature: T, which divides the logits; positive.
      mask: bool[...], False for padding, whose loss is 0; or None.

    Returns:
      float32[...], from 0 to ``2 * T**2``. A class that both rule out (-inf) has no
      part in it. Where one of the two is uniform, which correlates with nothing, the
      loss is ``T**2``, where both are it is 0; then there is no gradient.

    Raises:
      ValueError: the shapes differ or the temperature is not positive.
      TypeError: the mask is not bool.

    >>> student, teacher = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    >>> correlation_loss(student, teacher).round(2)
    Array(1.87, dtype=float32)
    """
    check_temperature("correlation_loss", temperature)
    ours, theirs = checked_logits("correlation_loss", student, teacher, mask)
    there = (ours > -jnp.inf) | (theirs > -jnp.inf)
    q, p = (jax.nn.softmax(x / temperature) for x in (ours, theirs))
    return temperature**2 * _uncorrelated(q, p, there)


def class_correlation_loss(
    student: Any, teacher: Any, temperature: float = 1.0, *, mask: Any = None
) -> jax.Array:
    """One minus the correlation over examples of what the two predict for a class.

    Huang et al., arXiv:2205.10536, the intra-class relation: ``T**2 * (1 - r)``, as in
    `correlation_loss`, but for each class over all examples of the batch.

    Args:
      student: float[..., classes] logits.
      teacher: float[..., classes] logits of the same shape.
      temperature: T, which divides the logits; positive.
      mask: bool[...], False for padding, which has no part in it; or None.

    Returns:
      float32[classes], from 0 to ``2 * T**2``, for a mean over classes and not over
      examples: as a term of a step, end with ``.mean()``. Of a class to which one of
      the two gives all examples the same probability it is ``T**2``, if both do 0; so
      it is with a single example.

    Raises:
      ValueError: the shapes differ or the temperature is not positive.
      TypeError: the mask is not bool.

    >>> logits = jnp.array([[1.0, 0.0], [0.0, 1.0], [jnp.nan, 0.0]])
    >>> mask = jnp.array([True, True, False])
    >>> class_correlation_loss(logits, -logits, mask=mask).round(3)
    Array([2., 2.], dtype=float32)
    """
    check_temperature("class_correlation_loss", temperature)
    ours, theirs = checked_logits("class_correlation_loss", student, teacher, mask)
    kept = jnp.ones(ours.shape[:-1], bool) if mask is None else jnp.asarray(mask)
    q, p = (
        jax.nn.softmax(x / temperature).reshape(-1, x.shape[-1]).T
        for x in (ours, theirs)
    )
    return temperature**2 * _uncorrelated(q, p, kept.reshape(1, -1))


def _uncorrelated(x: jax.Array, y: jax.Array, kept: jax.Array) -> jax.Array:
    """One minus the correlation over the last axis, of what is kept of it."""
    (a, flat_a), (b, flat_b) = _direction(x, kept), _direction(y, kept)
    # For unit vectors this is 1 - a.b, but exactly 0 where they are one.
    return jnp.sum((a - b) ** 2, axis=-1) / 2 + jnp.where(flat_a == flat_b, 0, 0.5)


def _direction(x: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The deviations from the mean, of length 1, and whether there are none."""
    # No shift and no scale changes a direction: these make small numbers large ones.
    top = jax.lax.stop_gradient(jnp.max(jnp.where(kept, x, 0), axis=-1, keepdims=True))
    x = jnp.where(kept, x - top, 0) / jnp.where(top > 0, top, 1)
    count = jnp.sum(kept, axis=-1, keepdims=True, dtype=jnp.float32)
    mean = jnp.sum(x, axis=-1, keepdims=True) / jnp.maximum(count, 1)
    x = jnp.where(kept, x - mean, 0)
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    flat = square <= count * ROUNDING**2
    unit = jnp.where(flat, 0, x / jnp.sqrt(jnp.where(flat, 1, square)))
    return unit, flat[..., 0]
