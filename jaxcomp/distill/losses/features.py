"""Losses between features of a student and of a teacher, example by example."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check


ROUNDING = 1e-6  # lengths of differences of unit vectors in float32 that mean nothing


def hint_loss(student: Any, teacher: Any, *, mask: Any = None) -> jax.Array:
    """Half the mean squared difference of two arrays of features.

    Romero et al., "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550. The paper sums
    the squares over the features; here it is their mean, as in the mean squared error
    of most later code, so that its weight need not follow the width.

    Args:
      student: float[..., features].
      teacher: float[..., features] of the same shape; `with_projections` gives the
        student's features the teacher's width.
      mask: bool of the first axes, as many as one likes, False for padding.

    Returns:
      float32 of the mask's shape, float32[...] without one: the means over what lies
      behind an entry. 0 where the mask is False.

    Raises:
      ValueError: the shapes do not fit together.
      TypeError: the mask is not bool.

    >>> hint_loss(jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[1.0, 0.0], [1, 1]]))
    Array([1. , 0.5], dtype=float32)
    """
    mask, ours, theirs = _alike("hint_loss", student, teacher, mask)
    return _mean_to(mask, jnp.square(ours - theirs)) / 2


def cosine_loss(student: Any, teacher: Any, *, mask: Any = None) -> jax.Array:
    """One minus the cosine of the angle between features: their last axis.

    Sanh et al., "DistilBERT, a distilled version of BERT", arXiv:1910.01108, between
    hidden states. It is computed as half the squared distance of the unit vectors, the
    same number, which is exact where both nearly agree. A vector of zeros has no
    direction: it costs 1/2 against any other, nothing against zeros, and gets no
    gradient.

    Args:
      student: float[..., features].
      teacher: float[..., features] of the same shape; `with_projections` gives the
        student's features the teacher's width.
      mask: bool of the first axes, as many as one likes, False for padding.

    Returns:
      float32 of the mask's shape, float32[...] without one: the means over what lies
      behind an entry; from 0 to 2. 0 where the mask is False.

    Raises:
      ValueError: the shapes do not fit together.
      TypeError: the mask is not bool.

    >>> cosine_loss(jnp.array([3.0, 0.0]), jnp.array([0.0, 2.0]))
    Array(1., dtype=float32)
    """
    mask, ours, theirs = _alike("cosine_loss", student, teacher, mask)
    apart = jnp.sum(jnp.square(unit(ours) - unit(theirs)), axis=-1)
    return _mean_to(mask, apart) / 2


def attention_transfer_loss(
    student: Any, teacher: Any, *, mask: Any = None
) -> jax.Array:
    """How far a student looks elsewhere than its teacher does.

    Zagoruyko and Komodakis, "Paying More Attention to Attention", arXiv:1612.03928,
    equation 2 with p = 2: the distance between the attention maps, each the sum over
    channels of the squared activations, scaled to length 1. Their published code takes
    the mean of the squared differences instead. The weight, beta / 2 there, is the
    caller's.

    Args:
      student: float[batch, *space, channels].
      teacher: float[batch, *space, channels]; its channels may be more or fewer.
      mask: bool[batch], False for padding.

    Returns:
      float32[batch], from 0 to the square root of 2; 0 where the mask is False. A map
      of zeros costs 1 against any other, nothing against zeros. Maps nearer than 1e-6
      agree but for rounding: that is 0, with no gradient.

    Raises:
      ValueError: the shapes do not fit together.
      TypeError: the mask is not bool.

    >>> x = jnp.array([[[1.0, 1.0], [0.0, 0.0]]])
    >>> attention_transfer_loss(x, x[..., :1]), attention_transfer_loss(x, x[:, ::-1])
    (Array([0.], dtype=float32), Array([1.4142135], dtype=float32))
    """
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    if student.ndim < 3 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "attention_transfer_loss needs float[batch, *space, channels] of one batch "
            f"and one space, got student {_check.describe(student)} and teacher "
            f"{_check.describe(teacher)}. Resize one of them, or let "
            "`with_projections` bring the student's features to the teacher's shape."
        )
    mask, ours, theirs = masked(
        "attention_transfer_loss", mask, [student.shape[:1]], student, teacher
    )
    apart = jnp.sum(jnp.square(_attention(ours) - _attention(theirs)), axis=-1)
    # A length has slope 1 however small it is: what rounding left is no direction.
    return root(jnp.where(apart > ROUNDING**2, apart, 0.0))


def _attention(x: jax.Array) -> jax.Array:
    """float32[batch, positions]: where the activations are large, of length 1."""
    x = rescaled(x, axis=tuple(range(1, x.ndim)))
    return unit(jnp.sum(jnp.square(x), axis=-1).reshape(x.shape[0], -1))


def _alike(caller: str, student: Any, teacher: Any, mask: Any) -> tuple[jax.Array, ...]:
    """What `masked` gives for two arrays of one shape."""
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    if not student.ndim or student.shape != teacher.shape:
        raise ValueError(
            f"{caller} needs float[..., features] of one shape, got student "
            f"{_check.describe(student)} and teacher {_check.describe(teacher)}. Let "
            "`with_projections` bring the student's features to the teacher's shape."
        )
    leading = [student.shape[:n] for n in range(student.ndim)]
    return masked(caller, mask, leading, student, teacher)


def _mean_to(mask: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.mean(values, axis=tuple(range(mask.ndim, values.ndim)))


def masked(
    caller: str, mask: Any, shapes: Sequence[tuple[int, ...]], *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """The mask, and the arrays in float32 with zeros where it is False.

    Args:
      caller: the name that errors carry.
      mask: bool of one of the shapes; None is True everywhere, of the last of them.
      shapes: those that the mask may have.
      arrays: float[*mask.shape, ...].

    Raises:
      ValueError: the mask has another shape.
      TypeError: the mask is not bool.
    """
    mask = jnp.ones(shapes[-1], bool) if mask is None else jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(
            f"{caller} needs a mask of bools, False for padding, got "
            f"{_check.describe(mask)}. Compare it with 0."
        )
    if mask.shape not in shapes:
        raise ValueError(
            f"{caller} needs a mask of shape "
            f"{' or '.join(str(list(shape)) for shape in shapes)}, got "
            f"{_check.describe(mask)}."
        )
    # Zeros go in before the maths: 0 times NaN is NaN in the backward pass.
    return mask, *(
        jnp.where(
            mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)),
            x.astype(jnp.float32),
            0.0,
        )
        for x in arrays
    )


def rescaled(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """``x`` over its largest magnitude, so that squares neither overflow nor vanish.

    For what does not depend on the scale: a constant factor leaves its gradient right.
    """
    top = jnp.max(
        jnp.abs(jax.lax.stop_gradient(x)), axis=axis, keepdims=True, initial=0.0
    )
    # At most 2**126, as XLA may multiply by the reciprocal, and of more that is 0.
    return x / jnp.where(top > 0, jnp.minimum(top, 2.0**126), 1.0)


def unit(x: jax.Array) -> jax.Array:
    """float[..., d] scaled to length 1; zeros stay zeros, without a gradient."""
    x = rescaled(x, axis=-1)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)  # 0, or at least 1
    return jnp.where(squares > 0, x / jnp.sqrt(jnp.maximum(squares, 1.0)), 0.0)


def root(squares: jax.Array) -> jax.Array:
    """The square root of what is not negative, with gradient 0 at 0."""
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)
