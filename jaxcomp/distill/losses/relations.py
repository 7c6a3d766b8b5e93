"""Losses between the relations among examples, or tokens, in student and teacher."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcomp import _check
from jaxcomp.distill.losses.features import masked, rescaled, root, unit


def distance_loss(student: Any, teacher: Any, *, mask: Any = None) -> jax.Array:
    """How differently student and teacher place the examples of a batch apart.

    Park et al., "Relational Knowledge Distillation", arXiv:1904.05068: the Huber loss
    between the distances of all pairs, in units of their mean over the pairs that do
    not coincide. The paper sums over pairs; here it is a mean, as in the authors' code
    and in torchdistill's.

    Args:
      student: float[batch, ...], flattened per example.
      teacher: float[batch, ...]; its width may be another.
      mask: bool[batch], False for padding, which is compared with nothing.

    Returns:
      float32[batch], for each example the mean over all, itself included, to which its
      distance is 0. Their mean is that over all ordered pairs. 0 where the mask is
      False. Memory is O(batch * width + batch**2).

    Raises:
      ValueError: the batches differ.
      TypeError: the mask is not bool.

    >>> student, teacher = jnp.array([0.0, 1.0, 3.0]), jnp.array([0.0, 1.0, 2.0])
    >>> (distance_loss(student, teacher) * 96).round(3)
    Array([1., 2., 1.], dtype=float32)
    """
    mask, ours, theirs = _examples("distance_loss", student, teacher, mask)
    pairs = mask[:, None] & mask[None, :]
    terms = optax.huber_loss(_distances(ours, pairs), _distances(theirs, pairs))
    return jnp.sum(terms, axis=1) / _count(mask)


def angle_loss(student: Any, teacher: Any, *, mask: Any = None) -> jax.Array:
    """How differently student and teacher see the angles between three examples.

    Park et al., "Relational Knowledge Distillation", arXiv:1904.05068: the Huber loss
    between the cosines of the angles at every example, between the directions to any
    two. The paper sums over triplets; here it is a mean, as in the authors' code and in
    torchdistill's. Where two examples coincide there is no direction, and the cosine
    is 0. The cosines come from the distances by the law of cosines.

    Args:
      student: float[batch, ...], flattened per example.
      teacher: float[batch, ...]; its width may be another.
      mask: bool[batch], False for padding, which is compared with nothing.

    Returns:
      float32[batch], for each example the mean over all batch**2 angles at it. Their
      mean is that over all batch**3. 0 where the mask is False. Memory is O(batch *
      width + batch**2), time O(batch**2 * width + batch**3).

    Raises:
      ValueError: the batches differ.
      TypeError: the mask is not bool.

    >>> corner = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> line = jnp.array([[0.0], [1.0], [2.0]])
    >>> angle_loss(corner, line)[0] * 9  # twice the Huber loss of a cosine of 0, not 1
    Array(1., dtype=float32)
    """
    mask, ours, theirs = _examples("angle_loss", student, teacher, mask)
    pairs = mask[:, None] & mask[None, :]
    sides = [(square, _inverses(square, pairs)) for square in (ours, theirs)]

    @jax.checkpoint  # else the backward pass keeps batch**3 numbers
    def at(rows: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        cosines = [
            (row[:, None] + row[None, :] - square) * inv[:, None] * inv[None, :] / 2
            for (row, inv), (square, _) in zip(rows, sides, strict=True)
        ]
        return jnp.sum(optax.huber_loss(*cosines))

    return jax.lax.map(at, sides) / jnp.square(_count(mask))


def similarity_loss(student: Any, teacher: Any, *, mask: Any = None) -> jax.Array:
    """How differently student and teacher find the examples of a batch alike.

    Tung and Mori, "Similarity-Preserving Knowledge Distillation", arXiv:1907.09682: the
    squared distance between the matrices of all inner products, their rows scaled to
    length 1, over batch**2.

    Args:
      student: float[batch, ...], flattened per example.
      teacher: float[batch, ...]; its width may be another.
      mask: bool[batch], False for padding, which is compared with nothing.

    Returns:
      float32[batch], the squared distance of an example's row over the batch. Their
      mean is the paper's loss. 0 where the mask is False.

    Raises:
      ValueError: the batches differ.
      TypeError: the mask is not bool.

    >>> x = jnp.eye(2)
    >>> similarity_loss(x, x[:, ::-1]), similarity_loss(x, jnp.ones((2, 3))).round(4)
    (Array([0., 0.], dtype=float32), Array([0.2929, 0.2929], dtype=float32))
    """
    mask, ours, theirs = _flat("similarity_loss", student, teacher, mask)
    apart = jnp.square(_similarities(ours) - _similarities(theirs))
    return jnp.sum(apart, axis=1) / _count(mask)


def attention_relation_loss(
    student: Any, teacher: Any, heads: int, *, mask: Any = None
) -> jax.Array:
    """How differently student and teacher relate each token to the others.

    Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation for
    Compressing Pretrained Transformers", arXiv:2012.15828: queries, keys or values A of
    one layer, all heads side by side, are split anew into relation heads, and
    ``KL(teacher || student)`` is taken between the rows of
    ``softmax(A @ A.T / sqrt(width / heads))``. The paper adds those of queries, keys
    and values.

    Args:
      student: float[..., tokens, width].
      teacher: float[..., tokens, width]; its width may be another.
      heads: relation heads; divides both widths. The paper takes 48 for a teacher of
        width 768 and 64 for one of 1024.
      mask: bool[..., tokens], False for padding, to which nothing is related.

    Returns:
      float32[..., tokens], nats per token, the mean over relation heads. The mean over
      the tokens of one sequence is the paper's loss; over a batch each token weighs the
      same. 0 where the mask is False.

    Raises:
      ValueError: the shapes do not fit together, or ``heads`` does not divide a width.
      TypeError: the mask is not bool, or ``heads`` no integer.

    >>> student = jnp.zeros((2, 4))  # each token is as close to the other as to itself
    >>> teacher = jnp.array([[2.0, 0.0], [0.0, 2.0]]) * math.log(3) ** 0.5 / 2**0.75
    >>> attention_relation_loss(student, teacher, heads=1).round(4)  # 3/4 and 1/4
    Array([0.1308, 0.1308], dtype=float32)
    """
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    if student.ndim < 2 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "attention_relation_loss needs float[..., tokens, width] of the same "
            f"tokens, got student {_check.describe(student)} and teacher "
            f"{_check.describe(teacher)}."
        )
    widest = min(student.shape[-1], teacher.shape[-1])
    heads = _check.integer_within("attention_relation_loss", "heads", heads, 1, widest)
    if student.shape[-1] % heads or teacher.shape[-1] % heads:
        raise ValueError(
            f"attention_relation_loss cannot split student {_check.describe(student)} "
            f"and teacher {_check.describe(teacher)} into heads={heads}. Pass a number "
            "that divides both widths."
        )
    mask, ours, theirs = masked(
        "attention_relation_loss", mask, [student.shape[:-1]], student, teacher
    )
    # The rows of padded tokens have no pair at all: two uniform softmaxes, which agree.
    pairs = (mask[..., :, None] & mask[..., None, :])[..., None, :, :]
    ours, theirs = _relations(ours, heads, pairs), _relations(theirs, heads, pairs)
    return jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1), axis=-2)


def _relations(x: jax.Array, heads: int, pairs: jax.Array) -> jax.Array:
    """float32[..., heads, tokens, tokens]: logs, over the last axis, of a softmax."""
    x = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
    scores = jnp.einsum("...thd,...shd->...hts", x, x, precision="highest")
    # Not -inf: the difference of two such is NaN.
    return jax.nn.log_softmax(jnp.where(pairs, scores / math.sqrt(x.shape[-1]), -1e30))


def _similarities(x: jax.Array) -> jax.Array:
    """float32[batch, batch]: inner products of float32[batch, d], rows of length 1."""
    x = rescaled(x)
    return unit(jnp.einsum("id,jd->ij", x, x, precision="highest"))


def _distances(squares: jax.Array, pairs: jax.Array) -> jax.Array:
    """float32[batch, batch]: over the mean of those that are not 0."""
    lengths = root(jnp.where(pairs, squares, 0.0))
    count = jnp.sum(lengths > 0, dtype=jnp.float32)
    mean = jnp.sum(lengths) / jnp.maximum(count, 1.0)
    return lengths / jnp.where(mean > 0, mean, 1.0)


def _inverses(squares: jax.Array, pairs: jax.Array) -> jax.Array:
    """float32[batch, batch]: one over the distances; 0 where there is none."""
    apart = pairs & (squares > 0)
    return jnp.where(apart, jax.lax.rsqrt(jnp.where(apart, squares, 1.0)), 0.0)


def _examples(
    caller: str, student: Any, teacher: Any, mask: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mask and all squared distances, float32[batch, batch], up to a factor."""
    mask, ours, theirs = _flat(caller, student, teacher, mask)

    # Differences, not inner products: examples that coincide are 0 apart, exactly. One
    # row at a time: XLA keeps batch**2 * width numbers for the gradient of all at once.
    def squares(x: jax.Array) -> jax.Array:
        x = rescaled(x)
        row = jax.checkpoint(lambda one: jnp.sum(jnp.square(x - one[None]), axis=1))
        return jax.lax.map(row, x)

    return mask, squares(ours), squares(theirs)


def _flat(
    caller: str, student: Any, teacher: Any, mask: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mask and float32[batch, width] twice, zeros where the mask is False."""
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    if not student.ndim or not teacher.ndim or len(student) != len(teacher):
        raise ValueError(
            f"{caller} needs float[batch, ...] of one batch, got student "
            f"{_check.describe(student)} and teacher {_check.describe(teacher)}."
        )
    mask, ours, theirs = masked(caller, mask, [student.shape[:1]], student, teacher)
    ours, theirs = (x.reshape(len(x), math.prod(x.shape[1:])) for x in (ours, theirs))
    return mask, ours, theirs


def _count(mask: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
