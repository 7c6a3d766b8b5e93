"""Divergences of softened distributions other than the forward one of soft targets.

Below, p is the teacher's distribution, ``softmax(teacher / T)``, and q the student's.
Each divergence is multiplied by ``T**2``, as in `soft_target_loss`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp.distill.losses.logits import divergence, softened


def reverse_kl_loss(
    student: Any, teacher: Any, temperature: float = 1.0, *, mask: Any = None
) -> jax.Array:
    """``T**2 * KL(q || p)``: what the student says is to be likely for its teacher.

    Gu, Dong, Wei and Huang, "MiniLLM: Knowledge Distillation of Large Language Models",
    arXiv:2306.08543. It lets a student that cannot have all of its teacher's modes
    choose some; `soft_target_loss`, the other direction, makes it cover them all. The
    paper has the divergence of whole sequences, sampled from the student, and T = 1;
    here it is exact for each token.

    Args:
      student: float[..., classes] logits.
      teacher: float[..., classes] logits of the same shape.
      temperature: T, which divides the logits; positive.
      mask: bool[...], False for padding, whose loss is 0; or None.

    Returns:
      float32[...], nats per example times ``T**2``. Infinite where the teacher rules
      out (-inf) what the student does not; the gradient is then that of a class of
      probability 1e-38.

    Raises:
      ValueError: the shapes differ or the temperature is not positive.
      TypeError: the mask is not bool.

    >>> reverse_kl_loss(jnp.array([0.0, -jnp.inf]), jnp.zeros(2))
    Array(0.6931472, dtype=float32)
    """
    ours, theirs = softened("reverse_kl_loss", student, teacher, temperature, mask)
    gone = theirs == -jnp.inf
    # An infinite loss has no gradient. This one leads out of it.
    least = jnp.log(jnp.finfo(jnp.float32).tiny)
    loss = divergence(ours, jnp.where(gone, least, theirs))
    infinite = jnp.any(gone & (jnp.exp(ours) > 0), axis=-1)
    return temperature**2 * (loss + jnp.where(infinite, jnp.inf, 0))


def jensen_shannon_loss(
    student: Any,
    teacher: Any,
    temperature: float = 1.0,
    beta: float = 0.5,
    *,
    mask: Any = None,
) -> jax.Array:
    """The generalised Jensen-Shannon divergence of a student and its teacher.

    Agarwal et al., "On-Policy Distillation of Language Models: Learning from
    Self-Generated Mistakes" (GKD), arXiv:2306.13649: with ``m = beta * p +
    (1 - beta) * q``, ``T**2 * (beta * KL(p || m) + (1 - beta) * KL(q || m))``. Divided
    by ``beta`` it tends to the forward ``KL(p || q)`` as ``beta`` goes to 0; divided by
    ``1 - beta``, to the reverse ``KL(q || p)`` as ``beta`` goes to 1. At 0.5 it is
    symmetric and at most ``T**2 * log(2)``. The paper has no ``T**2``.

    Args:
      student: float[..., classes] logits.
      teacher: float[..., classes] logits of the same shape.
      temperature: T, which divides the logits; positive.
      beta: the teacher's share of the mixture, a fraction in (0, 1).
      mask: bool[...], False for padding, whose loss is 0; or None.

    Returns:
      float32[...], nats per example times ``T**2``; finite whatever either rules out.

    Raises:
      ValueError: the shapes differ, the temperature is not positive or ``beta`` is out
        of range.
      TypeError: the mask is not bool.

    >>> jensen_shannon_loss(jnp.array([1e4, 0.0]), jnp.array([0.0, 1e4]))
    Array(0.6931472, dtype=float32)
    """
    known = _check.known(beta)
    if known is not None and not 0 < known < 1:
        raise ValueError(
            f"jensen_shannon_loss needs 0 < beta < 1, got {beta}. For the limits take "
            "soft_target_loss (0) or reverse_kl_loss (1)."
        )
    ours, theirs = softened("jensen_shannon_loss", student, teacher, temperature, mask)
    loss = beta * _to_mixture(theirs, ours, 1 - beta)
    loss += (1 - beta) * _to_mixture(ours, theirs, beta)
    return temperature**2 * loss


def skewed_kl_loss(
    student: Any,
    teacher: Any,
    temperature: float = 1.0,
    skew: float = 0.1,
    *,
    mask: Any = None,
) -> jax.Array:
    """``T**2 * KL(p || skew * p + (1 - skew) * q)``, which bounds the gradient.

    Ko, Kim, Chen and Yun, "DistiLLM: Towards Streamlined Distillation for Large
    Language Models", arXiv:2402.03898. At 0 it is the forward KL of `soft_target_loss`.
    With student and teacher exchanged, ``skewed_kl_loss(teacher, student)``, it is the
    paper's skewed reverse KL, ``KL(q || skew * q + (1 - skew) * p)``; at 0 that is
    `reverse_kl_loss`. The paper has no ``T**2``.

    Args:
      student: float[..., classes] logits.
      teacher: float[..., classes] logits of the same shape.
      temperature: T, which divides the logits; positive.
      skew: the share of p in what p is compared with, a fraction in [0, 1).
      mask: bool[...], False for padding, whose loss is 0; or None.

    Returns:
      float32[...], nats per example times ``T**2``; at most ``-T**2 * log(skew)``.

    Raises:
      ValueError: the shapes differ, the temperature is not positive or ``skew`` is out
        of range.
      TypeError: the mask is not bool.

    >>> skewed_kl_loss(jnp.array([-jnp.inf, 0.0]), jnp.array([1e4, 0.0])).round(4)
    Array(2.3026, dtype=float32)
    """
    known = _check.known(skew)
    if known is not None and not 0 <= known < 1:
        raise ValueError(f"skewed_kl_loss needs 0 <= skew < 1, got {skew}.")
    ours, theirs = softened("skewed_kl_loss", student, teacher, temperature, mask)
    return temperature**2 * _to_mixture(theirs, ours, 1 - skew)


def _to_mixture(log_p: jax.Array, log_q: jax.Array, share: Any) -> jax.Array:
    """KL(p || (1 - share) * p + share * q) over the last axis, in nats."""
    p = jnp.exp(log_p)
    gaps = jnp.where(p > 0, log_q - log_p, 0)
    return jnp.sum(p * -_log_mixture(gaps, share), axis=-1)


def _log_mixture(gap: jax.Array, share: Any) -> jax.Array:
    """log(1 - share + share * exp(gap)), exactly 0 where the gap is."""
    near, gone = jnp.abs(gap) < 1, gap == -jnp.inf
    # One form is exact near 0, the other far from it. Each sees harmless gaps where it
    # is not taken, so that no gradient is NaN.
    small = jnp.log1p(share * jnp.expm1(jnp.where(near, gap, 0)))
    rest = jnp.log1p(-share)
    large = jnp.logaddexp(rest, jnp.log(share) + jnp.where(near | gone, 1, gap))
    return jnp.where(near, small, jnp.where(gone, rest, large))
