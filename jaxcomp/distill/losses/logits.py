"""Losses between the logits of a student and of a teacher."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check


def soft_target_loss(
    student: Any, teacher: Any, temperature: float = 2.0, *, mask: Any = None
) -> jax.Array:
    """How far a student's softened distribution is from its teacher's.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network",
    arXiv:1503.02531: ``T**2 * KL(softmax(teacher / T) || softmax(student / T))``. The
    factor keeps gradients of one size whatever the temperature.

    Args:
      student: float[..., classes] logits.
      teacher: float[..., classes] logits of the same shape.
      temperature: T, which divides the logits; positive.
      mask: bool[...], False for padding, which costs 0 whatever its logits are.

    Returns:
      float32[...], nats per example times ``T**2``; not negative up to rounding, and 0
      where the distributions agree.

    Raises:
      ValueError: the shapes differ or the temperature is not positive.

    >>> soft_target_loss(jnp.zeros(2), jnp.array([1e4, 0.0]), temperature=1.0)
    Array(0.6931472, dtype=float32)
    """
    if jnp.shape(student) != jnp.shape(teacher):
        raise ValueError(
            "soft_target_loss needs logits of one shape, got student "
            f"{_check.describe(student)} and teacher {_check.describe(teacher)}."
        )
    check_temperature("soft_target_loss", temperature)
    if mask is not None:
        student = jnp.where(mask[..., None], student, 0)
        teacher = jnp.where(mask[..., None], teacher, 0)
    # 16-bit logits lose the small probabilities that the loss is about.
    ours = jax.nn.log_softmax(jnp.asarray(student, jnp.float32) / temperature)
    theirs = jax.nn.log_softmax(jnp.asarray(teacher, jnp.float32) / temperature)
    # A class that the teacher rules out weighs nothing, though its log is -inf.
    p = jnp.exp(theirs)
    terms = jnp.where(p > 0, p * (theirs - ours), 0.0)
    return temperature**2 * jnp.sum(terms, axis=-1)


def check_temperature(caller: str, temperature: Any) -> None:
    """Raises unless a temperature that is not traced is positive."""
    known = _check.known(temperature)
    if known is not None and not known > 0:
        raise ValueError(f"{caller} needs temperature > 0, got {temperature}.")
