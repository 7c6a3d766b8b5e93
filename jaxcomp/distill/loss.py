"""What a student is to make small: soft targets, labels and any further terms."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp.distill.losses.logits import check_temperature, soft_target_loss
from jaxcomp.distill.outputs import Batch, Outputs, outputs_of
from jaxcomp.node import densify


Model = Callable[..., Any]
Term = Callable[[Outputs, Outputs, Batch], jax.Array]

OURS = ("loss", "soft", "hard", "penalty")  # names of metrics


class Measured(NamedTuple):
    """What comes with a loss.

    Attributes:
      metrics: name -> float32[]: "loss" and its parts, before they are weighed.
      state: `Outputs.state` of the student, or None.
    """

    metrics: dict[str, jax.Array]
    state: Any


def distill_loss(
    student: Model,
    teacher: Model,
    *,
    temperature: float = 2.0,
    hard: float = 0.1,
    soft: Callable[..., jax.Array] | None = soft_target_loss,
    terms: Mapping[str, Term] = MappingProxyType({}),
    penalty: Callable[[Any], jax.Array] | None = None,
) -> Callable[..., tuple[jax.Array, Measured]]:
    """Makes the loss of `distill_step`, for a loop of one's own.

    Hinton, Vinyals and Dean, arXiv:1503.02531. It is the mean over examples of
    ``(1 - hard) * soft + hard * cross_entropy``, plus the means of the terms, plus the
    penalty.

    Args:
      student: (params, inputs) -> logits or `Outputs`; called with the keyword ``key``
        as well where the loss is given one.
      teacher: (teacher_params, inputs) -> logits or `Outputs`. No gradient enters it.
      temperature: divides the logits in the soft loss; positive.
      hard: weight of the labels, a fraction in [0, 1]; 0 needs no labels.
      soft: (student's logits, teacher's, temperature, mask=...) -> float32[...], one
        value per example; None for no such part.
      terms: name -> (student's `Outputs`, teacher's, `Batch`) -> float[...]. Its mean
        is added, over the mask if it has the mask's shape.
      penalty: (the student's params, dense) -> float[], e.g. `l1_penalty`.

    Returns:
      ``loss(params, teacher_params, batch, key=None) -> (float32[], Measured)``, for
      ``jax.grad(..., has_aux=True)``. ``batch`` is (inputs, labels, mask), of which the
      last two may be left out. An example without a label, below 0, has a cross entropy
      of 0. What the mask leaves out has no part in anything.

    Raises:
      ValueError: ``temperature`` or ``hard`` is out of range, a term has the name of
        another metric, or labels are missing.
      TypeError: the batch is not a tuple of one to three.

    >>> model = lambda params, x: x @ params
    >>> loss = distill_loss(model, model, hard=0.0)
    >>> value, measured = loss(jnp.zeros((1, 2)), jnp.eye(1, 2), (jnp.ones((4, 1)),))
    >>> value.round(4), sorted(measured.metrics)
    (Array(0.1212, dtype=float32), ['loss', 'soft'])
    """
    check_temperature("distill_step", temperature)
    if not 0 <= hard <= 1:
        raise ValueError(f"distill_step needs 0 <= hard <= 1, got {hard}.")
    if taken := [name for name in OURS if name in terms]:
        raise ValueError(
            f"distill_step needs other names for its terms than {', '.join(OURS)}, "
            f"which its own metrics have; got {taken[0]!r}."
        )

    def loss(
        params: Any, teacher_params: Any, batch: Any, key: Any = None
    ) -> tuple[jax.Array, Measured]:
        batch = _batch(batch)
        if hard and batch.labels is None:
            raise ValueError(
                f"distill_step needs labels for hard={hard}, got None. Pass "
                "batch=(inputs, labels), or hard=0."
            )
        dense, options = densify(params), {} if key is None else {"key": key}
        ours = outputs_of(student(dense, batch.inputs, **options))
        theirs = outputs_of(teacher(densify(teacher_params), batch.inputs))
        theirs = jax.lax.stop_gradient(theirs)
        found, weights = {}, {}
        if soft is not None:
            values = soft(ours.logits, theirs.logits, temperature, mask=batch.mask)
            found["soft"], weights["soft"] = mean_over(values, batch.mask), 1 - hard
        if batch.labels is not None:
            values = cross_entropy(ours.logits, batch.labels, batch.mask)
            found["hard"], weights["hard"] = mean_over(values, batch.mask), hard
        for name, term in terms.items():
            found[name] = mean_over(term(ours, theirs, batch), batch.mask)
        if penalty is not None:
            found["penalty"] = jnp.asarray(penalty(dense), jnp.float32)
        total = sum((weights.get(k, 1) * x for k, x in found.items()), jnp.zeros([]))
        return total, Measured({"loss": total, **found}, ours.state)

    return loss


def cross_entropy(logits: Any, labels: Any, mask: Any = None) -> jax.Array:
    """float32[...]: of logits float[..., classes], 0 where a label is below 0."""
    labels, logits = jnp.asarray(labels), jnp.asarray(logits, jnp.float32)
    known, filled = labels >= 0, logits
    if mask is not None:  # padding may be anything, and 0 times NaN is no zero
        known, filled = known & mask, jnp.where(mask[..., None], logits, 0)
    # Picked from the logits as they are: of the others a copy would have to be made.
    at = jnp.where(known, labels, 0)[..., None]
    picked = jnp.take_along_axis(logits, at, axis=-1)[..., 0]
    return jnp.where(known, jax.nn.logsumexp(filled, axis=-1) - picked, 0)


def mean_over(values: jax.Array, mask: Any = None) -> jax.Array:
    """float32[]: the mean, over the mask if ``values`` has its shape."""
    values = jnp.asarray(values, jnp.float32)
    if mask is None or jnp.shape(mask) != values.shape:
        return jnp.mean(values)
    count = jnp.maximum(jnp.sum(mask), 1)  # nobody is left: 0
    return jnp.sum(jnp.where(mask, values, 0)) / count


def _batch(batch: Any) -> Batch:
    if not isinstance(batch, tuple | list) or not 1 <= len(batch) <= 3:
        got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch)
        raise TypeError(
            "distill_step needs a batch (inputs, labels, mask), of which the last two "
            f"may be left out, got {got}."
        )
    found = Batch(*batch)
    if found.mask is not None and jnp.asarray(found.mask).dtype != bool:
        raise TypeError(
            "distill_step needs a mask of bools, False for padding, got "
            f"{_check.describe(jnp.asarray(found.mask))}. Compare it with 0."
        )
    return found
