"""Quantization-aware training: rounded going forward, as if not rounded going back.

Pure functions on one array, for use inside a loss. Rounding has no gradient of use, so
these pass it straight through (Bengio, Léonard and Courville, arXiv:1308.3432). Bounds
are inclusive: a weight that sits on the end of its grid still trains.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp.quant import QTensor, quantize


def fake_quantize(
    x: jax.Array, grid: Callable[..., QTensor] = quantize, **settings: Any
) -> jax.Array:
    """The values of ``x`` on a grid, with the gradient of ``x``.

    Jacob et al., arXiv:1712.05877, section 3. What is trained is what is stored: ``grid
    (x, **settings)`` of the trained weights has exactly the values that the loss saw.
    Exact zeros stay exactly zero, so a pruned tree stays pruned.

    Args:
      x: float[*shape]; weights, or activations with ``axis=None``.
      grid: `quantize`, `quantize_affine`, `quantize_searched`, `quantize_step`, or any
        function to a node.
      **settings: what ``grid`` takes: ``bits``, ``axis``, ``group``, ``step``.

    Returns:
      float[*shape]; the gradient is that of the identity.

    >>> fake_quantize(jnp.array([0.2, -1.0, 0.6]), bits=2, axis=None)
    Array([ 0., -1.,  1.], dtype=float32)
    >>> jax.grad(lambda x: jnp.sum(fake_quantize(x, bits=2, axis=None) ** 2))(
    ...     jnp.array([0.2, -1.0, 0.6])
    ... )
    Array([ 0., -2.,  2.], dtype=float32)
    """
    x = _check.floating("fake_quantize", x)
    fixed = jax.lax.stop_gradient(x)
    return _value(grid(fixed, **settings).dense(), x)


def learned_step(x: jax.Array, step: jax.Array, low: int, high: int) -> jax.Array:
    """Rounds to multiples of a step size that is itself trained.

    Esser et al., "Learned Step Size Quantization", arXiv:1902.08153: ``round(clip(x /
    step, low, high)) * step``, and their gradient of the step, scaled by ``1 /
    sqrt(x.size * high)`` so that it learns as fast as the weights do. Begin at
    ``step = 2 * mean(|x|) / sqrt(high)``.

    Args:
      x: float[*shape], weights or activations.
      step: float[] or a shape that broadcasts against ``x``; positive.
      low: least code, e.g. -7 for weights of 4 bits, 0 for what a relu gives.
      high: greatest code, e.g. 7, or 15 without a sign.

    Returns:
      float[*shape]. The gradient of ``x`` is 1 from ``low * step`` to ``high * step``,
      both included, and 0 outside. With ``low = -high``, `quantize_step` of the trained
      weights has the same values.

    Raises:
      ValueError: not ``low <= 0 < high``.

    >>> learned_step(jnp.array([0.3, -0.9, 2.0]), jnp.array(0.5), -1, 1)
    Array([ 0.5, -0.5,  0.5], dtype=float32)
    """
    x = _check.floating("learned_step", x)
    if not low <= 0 < high:
        raise ValueError(
            f"learned_step needs low <= 0 < high, got low={low} and high={high}."
        )
    share = (max(x.size, 1) * high) ** -0.5  # their g = 1 / sqrt(N * Q)
    step = _value(step, step * share)
    ratio = x / step
    ratio = jnp.where(
        (low <= ratio) & (ratio <= high),
        ratio,
        jax.lax.stop_gradient(jnp.clip(ratio, low, high)),
    )
    return _value(jnp.round(ratio), ratio) * step


def learned_clip(x: jax.Array, clip: jax.Array, bits: int = 4) -> jax.Array:
    """Clips activations to ``[0, clip]``, with a bound that is trained, and rounds.

    Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural
    Networks", arXiv:1805.06085. In place of a relu. They add an L2 penalty on ``clip``
    to the loss, and begin with a large one.

    Args:
      x: float[*shape], what would go into a relu.
      clip: float[], positive.
      bits: width of a code without a sign, 1 to 8 bits.

    Returns:
      float[*shape], on ``2**bits`` levels. The gradient of ``x`` is 1 in ``[0, clip]``
      and 0 outside; that of ``clip`` counts the values above it.

    Raises:
      ValueError: ``bits`` is out of range.

    >>> learned_clip(jnp.array([-1.0, 0.4, 3.0]), jnp.array(1.5), bits=2)
    Array([0. , 0.5, 1.5], dtype=float32)
    """
    x = _check.floating("learned_clip", x)
    levels = 2 ** _check.integer_within("learned_clip", "bits", bits, 1, 8) - 1
    kept = jnp.where(x < 0, jnp.zeros((), x.dtype), jnp.where(x > clip, clip, x))
    step = jax.lax.stop_gradient(clip) / levels
    return _value(jnp.round(kept / step) * step, kept)


def learned_threshold(x: jax.Array, score: jax.Array) -> jax.Array:
    """Weights less a threshold that is itself trained, zero below it.

    Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity"
    (STR), arXiv:2002.03231: ``sign(x) * relu(|x| - sigmoid(score))``. Weight decay on
    ``score`` and ``x`` makes it sparse; begin with a score far below 0, e.g. -10.

    Args:
      x: float[*shape], weights.
      score: float[] or a shape that broadcasts against ``x``.

    Returns:
      float[*shape]. What is stored in the end is this, not ``x``. Where it is 0, the
      gradient of both is 0.

    >>> learned_threshold(jnp.array([1.0, -0.25, -2.0]), jnp.array(0.0))
    Array([ 0.5, -0. , -1.5], dtype=float32)
    """
    x = _check.floating("learned_threshold", x)
    left = jax.nn.relu(jnp.abs(x) - jax.nn.sigmoid(score))
    return jax.lax.stop_gradient(jnp.sign(x)) * left.astype(x.dtype)


def _value(value: jax.Array, gradient: jax.Array) -> jax.Array:
    """The value of one array with the gradient of another, to the last bit."""
    # Not gradient + (value - gradient): that sum rounds.
    return jax.lax.stop_gradient(value) + (
        gradient - jax.lax.stop_gradient(gradient)
    ).astype(jnp.result_type(value))
