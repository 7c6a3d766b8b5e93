"""Soft targets parted into the label's share and the rest."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp.distill.losses.logits import (
    check_temperature,
    checked_logits,
    divergence,
)


def decoupled_loss(
    student: Any,
    teacher: Any,
    labels: Any,
    temperature: float = 4.0,
    *,
    alpha: Any = 1.0,
    beta: Any = 8.0,
    mask: Any = None,
) -> jax.Array:
    """Weighs what a teacher says of the label and of the other classes apart.

    Zhao, Cui, Song, Qiu and Liang, "Decoupled Knowledge Distillation" (DKD),
    arXiv:2203.08679: ``T**2 * (alpha * KL(b || b') + beta * KL(r || r'))``, where b is
    the label against all other classes, r the distribution over the others, without a
    stroke the teacher's. With ``alpha=1`` and ``beta`` one minus the softened
    probability that the teacher gives the label it is `soft_target_loss`; there a sure
    teacher silences the second part. The authors' code takes the label out of r by
    1000 off its logit, and lets the loss grow over the first epochs; here the label has
    no part in r, and a schedule is the caller's.

    Args:
      student: float[..., classes] logits.
      teacher: float[..., classes] logits of the same shape.
      labels: int[...]; one that is no class, such as -1, is no label: the loss is 0.
      temperature: T, which divides the logits; positive.
      alpha: weight of the label's part, a number or float[...].
      beta: weight of the other classes' part, likewise; the paper's are 1 to 10.
      mask: bool[...], False for padding, whose loss is 0; or None.

    Returns:
      float32[...], nats per example times ``T**2``.

    Raises:
      ValueError: the shapes of logits, labels, mask or weights do not fit together, or
        the temperature is not positive.
      TypeError: the labels are not integers or the mask not bool.

    >>> teacher = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.5, 0.4, 0.1]]))
    >>> decoupled_loss(jnp.zeros((2, 3)), teacher, jnp.array([0, -1]), 1.0).round(4)
    Array([0.0589, 0.    ], dtype=float32)
    """
    check_temperature("decoupled_loss", temperature)
    ours, theirs = checked_logits("decoupled_loss", student, teacher, mask)
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            "decoupled_loss needs labels that are integers, got "
            f"{_check.describe(labels)}."
        )
    shape = ours.shape[:-1]
    if labels.shape != shape:
        raise ValueError(
            f"decoupled_loss needs one label per example, int{list(shape)}, for logits "
            f"{_check.describe(ours)}, got {_check.describe(labels)}."
        )
    for name, weight in (("alpha", alpha), ("beta", beta)):
        if jnp.shape(weight) not in ((), shape):
            raise ValueError(
                f"decoupled_loss needs for {name} a number or one per example, "
                f"float{list(shape)}, got {_check.describe(jnp.asarray(weight))}."
            )
    chosen = jax.nn.one_hot(labels, ours.shape[-1], dtype=bool)
    counted = jnp.any(chosen, axis=-1)
    if mask is not None:
        counted &= jnp.asarray(mask)
    # Weights made of the teacher's padding may be NaN as well.
    alpha, beta = (jnp.where(counted, weight, 0) for weight in (alpha, beta))
    (our_label, our_rest), (their_label, their_rest) = (
        _parts(jnp.where(counted[..., None], x, 0) / temperature, chosen)
        for x in (ours, theirs)
    )
    of_label = alpha * divergence(their_label, our_label)
    of_rest = beta * divergence(their_rest, our_rest)
    return temperature**2 * (of_label + of_rest)


def _parts(logits: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities: float32[..., 2] of the label and not, [..., classes] of the
    others. Where there is no other class, all of the others have probability 0."""
    rest = jnp.where(chosen, -jnp.inf, logits)
    some = jnp.any(rest > -jnp.inf, axis=-1, keepdims=True)
    total = jax.nn.logsumexp(jnp.where(some, rest, 0), axis=-1, keepdims=True)
    label = jnp.sum(jnp.where(chosen, logits, 0), axis=-1, keepdims=True)
    both = jnp.concatenate([label, jnp.where(some, total, -jnp.inf)], axis=-1)
    return jax.nn.log_softmax(both), rest - total
