"""Soft targets of a few classes, for vocabularies too large to keep or to copy.

All loops here go over a few rows at a time, so that what they need in float32 is as
large as those rows, and never as large as the logits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp.distill.losses.logits import check_temperature


class SparseTargets(NamedTuple):
    """What a teacher gives to some classes, out of the softmax over all of them.

    Attributes:
      indices: int32[..., k], classes. Of one that comes twice, probabilities add up.
      probs: float32[..., k], fractions of 1; what they lack of 1 is that of the others.
    """

    indices: jax.Array | np.ndarray
    probs: jax.Array | np.ndarray


def top_k_targets(logits: Any, k: int, temperature: float = 1.0) -> SparseTargets:
    """The ``k`` most probable classes, with their probabilities among all classes.

    Args:
      logits: float[..., classes] of a teacher.
      k: classes kept, in [1, classes].
      temperature: divides the logits; positive.

    Returns:
      `SparseTargets` of ``k``, the most probable first; on a tie the lower index is.

    Raises:
      ValueError: ``k`` or ``temperature`` is out of range.
      TypeError: the logits are not floating, or ``k`` is no integer.

    >>> top_k_targets(jnp.log(jnp.array([0.125, 0.5, 0.375])), k=2)
    SparseTargets(indices=Array([1, 2], dtype=int32),
                  probs=Array([0.5  , 0.375], dtype=float32))
    """
    logits = _checked_logits("top_k_targets", logits, temperature)
    _check.integer_within("top_k_targets", "k", k, 1, logits.shape[-1])

    def rows_of(rows: jax.Array) -> SparseTargets:
        y = _softened(rows, temperature)  # 16 bits would be sorted slowly on a CPU
        best, indices = jax.lax.top_k(y, k)
        total = jax.nn.logsumexp(y, axis=-1, keepdims=True)
        return SparseTargets(indices, jnp.exp(best - total))

    flat = logits.reshape(-1, logits.shape[-1])
    return _shaped(_by_rows(rows_of, flat), logits.shape[:-1])


def sampled_targets(
    key: jax.Array, logits: Any, draws: int, temperature: float = 1.0
) -> SparseTargets:
    """Classes drawn from the teacher: probabilities that are right in the mean.

    Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in
    LLMs", arXiv:2503.16870, with the teacher's own distribution to draw from. The
    gradient of `sparse_target_loss` is that of the whole softmax in expectation; that
    of `top_k_targets` is not. The paper counts the draws of a class; here each draw is
    an entry of its own, and a class may come twice. Probabilities are rounded to
    multiples of ``2**-31``, so that the sums that are drawn from are exact.

    Args:
      key: of `jax.random`.
      logits: float[..., classes] of a teacher, fewer than ``2**31`` classes.
      draws: how many; at least 1.
      temperature: divides the logits; positive.

    Returns:
      `SparseTargets` of ``draws`` entries, each with a probability of ``1 / draws``.

    Raises:
      ValueError: ``draws`` or ``temperature`` is out of range.
      TypeError: the logits are not floating, or ``draws`` is no integer.

    >>> sampled_targets(jax.random.key(0), jnp.array([0.0, -jnp.inf]), draws=2)
    SparseTargets(indices=Array([0, 0], dtype=int32),
                  probs=Array([0.5, 0.5], dtype=float32))
    """
    logits = _checked_logits("sampled_targets", logits, temperature)
    _check.integer_within("sampled_targets", "draws", draws, 1, 2**31 - 1)

    def row_of(number: jax.Array, row: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(_softened(row, temperature))
        sums = jnp.cumsum(jnp.round(probs * 2.0**31).astype(jnp.uint32))
        ours = jax.random.fold_in(key, number)
        drawn = jax.random.randint(ours, (draws,), 0, sums[-1], jnp.uint32)
        # The first sum above what was drawn: never a class of probability 0.
        return jnp.searchsorted(sums, drawn, side="right").astype(jnp.int32)

    flat = logits.reshape(-1, logits.shape[-1])
    numbers = jnp.arange(flat.shape[0], dtype=jnp.uint32)
    indices = _by_rows(
        lambda rows, numbers: jax.vmap(row_of)(numbers, rows), flat, numbers
    )
    targets = SparseTargets(indices, jnp.full(indices.shape, 1 / draws, jnp.float32))
    return _shaped(targets, logits.shape[:-1])


def sparse_target_loss(
    student: Any,
    targets: SparseTargets,
    temperature: float = 1.0,
    *,
    mask: Any = None,
) -> jax.Array:
    """How far a student is from the classes that a teacher was kept for.

    The soft target loss (Hinton, Vinyals and Dean, arXiv:1503.02531) over the listed
    classes and one more that stands for all others::

        T**2 * (sum_k p_k log(p_k / q_k) + r log(r / (1 - sum_k q_k)))

    with r = 1 - sum_k p_k. By the log-sum inequality it is at most the loss over all
    classes. It is that loss
    where all classes are listed, and 0 where the student agrees. For `sampled_targets`
    (r = 0) it is the cross entropy that arXiv:2503.16870 trains on, less the entropy of
    what was drawn. A rest for which the student has no class left, since all are listed
    or ruled out, is left out: it is rounding.

    Besides the logits and their gradient, in their own dtype, only a few rows are held
    at a time, forward and backward; a CPU copies a 16-bit gradient once. The mass of
    the rest is summed up, not subtracted from 1, so that a student that is sure loses
    none of it.

    Args:
      student: float[..., classes] logits.
      targets: `SparseTargets` [..., k] of the teacher at this temperature.
      temperature: T, which divides the student's logits; positive.
      mask: bool[...], False for padding, which costs 0 and has no gradient. None takes
        all.

    Returns:
      float32[...], nats per example times ``T**2``; not negative up to rounding.

    Raises:
      ValueError: the shapes do not fit or the temperature is not positive.
      TypeError: the logits are not floating, or ``targets`` are not `SparseTargets`.

    >>> teacher = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
    >>> sparse_target_loss(jnp.zeros(4), top_k_targets(teacher, k=1))
    Array(0.14384103, dtype=float32)
    """
    if not isinstance(targets, SparseTargets):
        raise TypeError(
            f"sparse_target_loss needs SparseTargets, got {type(targets).__name__}. "
            "Make them by top_k_targets, or use soft_target_loss for whole logits."
        )
    student = _checked_logits("sparse_target_loss", student, temperature)
    indices, probs = map(jnp.asarray, targets)
    shape, classes = student.shape[:-1], student.shape[-1]
    if not indices.ndim or indices.shape != probs.shape or indices.shape[:-1] != shape:
        raise ValueError(
            "sparse_target_loss needs indices and probs [..., k] for the student's "
            f"logits [..., classes], got indices {_check.describe(indices)}, probs "
            f"{_check.describe(probs)} and student {_check.describe(student)}."
        )
    valid = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask)
    if valid.shape != shape:
        raise ValueError(
            "sparse_target_loss needs a mask of the shape of what it returns, "
            f"{list(shape)}, got {_check.describe(valid)}."
        )
    valid = valid.reshape(-1)
    here = valid[:, None]
    indices = jnp.where(here, indices.reshape(-1, indices.shape[-1]), 0)
    p = jnp.where(here, probs.reshape(indices.shape), 0).astype(jnp.float32)
    order = jnp.argsort(indices, axis=-1)
    indices = jnp.take_along_axis(indices, order, axis=-1)
    p = jnp.take_along_axis(p, order, axis=-1)
    scale = jnp.asarray(temperature, jnp.float32)
    # One for each row, of the data: under shard_map it varies by device as they do.
    scales = scale + (0 * indices[:, 0]).astype(jnp.float32)
    log_q, log_rest = _log_probs(student.reshape(-1, classes), indices, valid, scales)
    listed = _relative(p, _class_sums(indices, p), log_q)
    rest = jnp.maximum(1 - jnp.sum(p, axis=-1), 0)
    rest = jnp.where(log_rest > -jnp.inf, rest, 0)
    loss = scale**2 * (jnp.sum(listed, axis=-1) + _relative(rest, rest, log_rest))
    return jnp.where(valid, loss, 0).reshape(shape)


def _checked_logits(caller: str, logits: Any, temperature: Any) -> jax.Array:
    logits = _check.floating(caller, logits)
    check_temperature(caller, temperature)
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(
            f"{caller} needs logits [..., classes], got {_check.describe(logits)}."
        )
    return logits


def _softened(logits: jax.Array, temperature: Any) -> jax.Array:
    """Divided by the temperature, and moved so that the largest of a row is 0."""
    # 16-bit logits lose the small probabilities that the loss is about.
    y = logits.astype(jnp.float32) / temperature
    return y - jnp.max(y, axis=-1, keepdims=True)


def _shaped(targets: SparseTargets, shape: tuple[int, ...]) -> SparseTargets:
    return SparseTargets(*(x.reshape(*shape, x.shape[-1]) for x in targets))


def _by_rows(fn: Callable[..., Any], *arrays: jax.Array) -> Any:
    """``fn(*arrays)``, whose rows do not depend on each other, a few rows at a time.

    The first array is the logits. The last rows may be computed twice, which needs no
    padding and no copy of what is left over.
    """
    count, classes = arrays[0].shape
    rows = min(count, max(8, min(64, 2**20 // classes)))

    def part(start: Any) -> Any:
        # Else XLA would make the bits of all rows, once, before the loop.
        start, whole = jax.lax.optimization_barrier((start, arrays))
        some = [jax.lax.dynamic_slice_in_dim(_as_bits(x), start, rows) for x in whole]
        return fn(*(x.view(y.dtype) for x, y in zip(some, arrays, strict=True)))

    def body(i: jax.Array, found: Any) -> Any:
        start = jnp.minimum(i * rows, count - rows)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return jax.tree.map(put, found, jax.tree.map(_as_bits, part(start)))

    shapes = jax.eval_shape(part, 0)
    # False, but of the data: under shard_map a loop starts with what differs by device.
    never = jnp.any(jnp.stack([jnp.any(x[:0]) for x in arrays]))
    zeros = jax.tree.map(
        lambda x: jnp.full((count, *x.shape[1:]), never, x.dtype), shapes
    )
    trips = -(-count // max(rows, 1))
    found = jax.lax.fori_loop(0, trips, body, jax.tree.map(_as_bits, zeros))
    return jax.tree.map(lambda x, y: x.view(y.dtype), found, shapes)


def _as_bits(x: jax.Array) -> jax.Array:
    """16-bit floats as integers: to slice floats, XLA on a CPU casts all of them."""
    return x.view(jnp.uint16) if x.dtype in (jnp.bfloat16, jnp.float16) else x


def _without(rows: jax.Array, indices: jax.Array) -> jax.Array:
    """The rows, with the listed classes ruled out."""
    return jnp.put_along_axis(rows, indices, -jnp.inf, axis=-1, inplace=False)


@jax.custom_vjp
def _log_probs(
    student: jax.Array, indices: jax.Array, valid: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the listed classes, and of all others together.

    Args:
      student: float[n, classes] logits.
      indices: int32[n, k].
      valid: bool[n]; where False, the logits are taken for 0.
      temperature: float32[n].

    Returns:
      float32[n, k] and float32[n].
    """
    return _log_probs_forward(student, indices, valid, temperature)[0]


def _log_probs_forward(
    student: jax.Array, indices: jax.Array, valid: jax.Array, temperature: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    def rows_of(
        rows: jax.Array, indices: jax.Array, valid: jax.Array, temperature: jax.Array
    ) -> Any:
        y = _softened(jnp.where(valid[:, None], rows, 0), temperature[:, None])
        total = jax.nn.logsumexp(y, axis=-1)
        rest = jax.nn.logsumexp(_without(y, indices), axis=-1)
        listed = jnp.take_along_axis(y, indices, axis=-1)
        return listed - total[:, None], rest, total

    listed, rest, total = _by_rows(rows_of, student, indices, valid, temperature)
    known = student, indices, valid, temperature, total, rest
    return (listed, rest - total), known


def _log_probs_backward(
    known: tuple[jax.Array, ...], slopes: tuple[jax.Array, jax.Array]
) -> tuple[Any, ...]:
    def rows_of(
        rows: jax.Array,
        indices: jax.Array,
        valid: jax.Array,
        temperature: jax.Array,
        total: jax.Array,
        rest: jax.Array,
        of_listed: jax.Array,
        of_rest: jax.Array,
    ) -> Any:
        y = _softened(jnp.where(valid[:, None], rows, 0), temperature[:, None])
        rest = jnp.where(rest > -jnp.inf, rest, 0)[:, None]
        slope = of_rest[:, None] * jnp.exp(_without(y, indices) - rest)
        whole = jnp.sum(of_listed, axis=-1) + of_rest
        slope -= whole[:, None] * jnp.exp(y - total[:, None])
        slope = slope.at[jnp.arange(len(y))[:, None], indices].add(of_listed)
        of_scale = -jnp.sum(jnp.where(slope == 0, 0, slope * y), axis=-1) / temperature
        return (slope / temperature[:, None]).astype(rows.dtype), of_scale

    gradient, of_scale = _by_rows(rows_of, *known, *slopes)
    return gradient, None, None, of_scale


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def _class_sums(indices: jax.Array, p: jax.Array) -> jax.Array:
    """For each entry of sorted indices[n, k], the sum of ``p`` over its class."""
    starts = jnp.diff(indices, axis=-1, prepend=indices[:, :1]) != 0
    run = jnp.cumsum(starts, axis=-1)
    row = jnp.arange(len(p))[:, None]
    return jnp.zeros_like(p).at[row, run].add(p)[row, run]


def _relative(weight: jax.Array, p: jax.Array, log_q: jax.Array) -> jax.Array:
    """``weight * (log p - log_q)``, and 0 where there is no weight."""
    here = weight > 0
    gap = jnp.log(jnp.where(here, p, 1)) - jnp.where(here, log_q, 0)
    return jnp.where(here, weight * gap, 0)
