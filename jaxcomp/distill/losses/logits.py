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
      mask: bool[...], False for padding, whose loss is 0; or None.

    Returns:
      float32[...], nats per example times ``T**2``; not negative up to rounding, and 0
      where the distributions agree.

    Raises:
      ValueError: the shapes differ or the temperature is not positive.
      TypeError: the mask is not bool.

    >>> soft_target_loss(jnp.zeros(2), jnp.array([1e4, 0.0]), temperature=1.0)
    Array(0.6931472, dtype=float32)
    """
    check_temperature("soft_target_loss", temperature)
    wide = checked_logits("soft_target_loss", student, teacher, mask)
    ours, theirs = (_shifted(x) / temperature for x in wide)
    # KL(p || q) = log sum exp ours - log sum exp theirs + sum p * (theirs - ours). On a
    # CPU value and gradient take less time than those of two log-softmaxes.
    our_sum, their_sum = (jnp.sum(jnp.exp(x), axis=-1) for x in (ours, theirs))
    p = jnp.exp(theirs) / their_sum[..., None]
    # A class that the teacher rules out weighs nothing, though its logit is -inf.
    apart = jnp.sum(p * jnp.where(p > 0, theirs - ours, 0), axis=-1)
    return temperature**2 * (jnp.log(our_sum) - jnp.log(their_sum) + apart)


def logit_mse_loss(
    student: Any, teacher: Any, temperature: float = 1.0, *, mask: Any = None
) -> jax.Array:
    """The mean over classes of the squared difference of the logits.

    Ba and Caruana, "Do Deep Nets Really Need to be Deep?", arXiv:1312.6184; Kim, Oh,
    Kim, Cho and Yun, "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss
    in Knowledge Distillation", arXiv:2105.08919. Of logits whose mean over the classes
    is 0, half of it is what `soft_target_loss` tends to as T grows.

    The first paper has half the sum over classes, the second the sum.

    Args:
      student: float[..., classes] logits.
      teacher: float[..., classes] logits of the same shape.
      temperature: T, positive, for the signature of a soft loss. It changes nothing:
        the logits are divided by T and their squares multiplied by ``T**2``.
      mask: bool[...], False for padding, whose loss is 0; or None.

    Returns:
      float32[...], squared logits per example. A class that both rule out (-inf) is
      left out of the mean; one that either rules out costs infinitely.

    Raises:
      ValueError: the shapes differ or the temperature is not positive.
      TypeError: the mask is not bool.

    >>> logit_mse_loss(jnp.array([1.0, 0.0]), jnp.array([-1.0, 0.0]))
    Array(2., dtype=float32)
    """
    check_temperature("logit_mse_loss", temperature)
    ours, theirs = checked_logits("logit_mse_loss", student, teacher, mask)
    there = (ours > -jnp.inf) | (theirs > -jnp.inf)
    gaps = jnp.where(there, ours - theirs, 0)
    count = jnp.sum(there, axis=-1, dtype=jnp.float32)
    return jnp.sum(gaps**2, axis=-1) / jnp.maximum(count, 1)


def _shifted(x: jax.Array) -> jax.Array:
    """Logits less the largest of them, which no softmax can tell."""
    return x - jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))


def divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) over the last axis, in nats: float32[...]."""
    p = jnp.exp(log_p)
    # A class that p rules out weighs nothing, though its log is -inf. Zero goes in
    # before the product: 0 times an infinity has no gradient.
    return jnp.sum(p * jnp.where(p > 0, log_p - log_q, 0), axis=-1)


def softened(
    caller: str, student: Any, teacher: Any, temperature: Any, mask: Any
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the student and of the teacher at a temperature.

    Returns:
      two float32[..., classes]; uniform, both of them, where the mask is False, so that
      any divergence is 0 there.
    """
    check_temperature(caller, temperature)
    ours, theirs = checked_logits(caller, student, teacher, mask)
    return (
        jax.nn.log_softmax(ours / temperature),
        jax.nn.log_softmax(theirs / temperature),
    )


def checked_logits(
    caller: str, student: Any, teacher: Any, mask: Any
) -> tuple[jax.Array, jax.Array]:
    """Two float32[..., classes] logits, 0 where the mask is False."""
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"{caller} needs logits of one shape, got student "
            f"{_check.describe(student)} and teacher {_check.describe(teacher)}."
        )
    # 16-bit logits lose the small probabilities that the losses are about.
    wide = student.astype(jnp.float32), teacher.astype(jnp.float32)
    if mask is None:
        return wide
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(
            f"{caller} needs a mask of bools, False for padding, got "
            f"{_check.describe(mask)}. Compare it with 0."
        )
    if mask.shape != student.shape[:-1]:
        raise ValueError(
            f"{caller} needs a mask with one value per example, "
            f"bool{list(student.shape[:-1])}, for logits {_check.describe(student)}, "
            f"got {_check.describe(mask)}."
        )
    # Padding may hold a NaN, and 0 times NaN is no zero: zeros go in before the maths.
    ours, theirs = (jnp.where(mask[..., None], x, 0) for x in wide)
    return ours, theirs


def check_temperature(caller: str, temperature: Any) -> None:
    """Raises unless a temperature that is not traced is positive."""
    known = _check.known(temperature)
    if known is not None and not known > 0:
        raise ValueError(f"{caller} needs temperature > 0, got {temperature}.")
