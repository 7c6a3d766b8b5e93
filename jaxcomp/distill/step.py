"""One compiled training step: both forwards, the loss, the gradient, the update."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcomp import _check
from jaxcomp.distill.loss import Model, Term, distill_loss
from jaxcomp.distill.losses.logits import soft_target_loss
from jaxcomp.node import flatten
from jaxcomp.tree import join, list_paths, split


Step = Callable[..., tuple[Any, Any, dict[str, jax.Array]]]


def distill_step(
    student: Model,
    teacher: Model,
    tx: optax.GradientTransformation,
    *,
    temperature: float = 2.0,
    hard: float = 0.1,
    soft: Callable[..., jax.Array] | None = soft_target_loss,
    terms: Mapping[str, Term] = MappingProxyType({}),
    penalty: Callable[[Any], jax.Array] | None = None,
    loss_scale: float = 1.0,
    donate: bool = False,
) -> Step:
    """Makes the jitted step that teaches ``student`` what ``teacher`` knows.

    Hinton, Vinyals and Dean, arXiv:1503.02531. The loss is that of `distill_loss`: the
    mean over examples of ``(1 - hard) * soft + hard * cross_entropy``, the terms and
    the penalty. Either tree may be compressed: models run on `densify` of it, and of
    the student's tree what is floating is trained (`split`): a shared codebook is
    fine-tuned, its codes stay.

    Args:
      student: (params, inputs) -> float[..., classes] logits, or `Outputs`; called with
        the keyword ``key`` as well where the step is given one.
      teacher: (teacher_params, inputs) -> float[..., classes] logits, or `Outputs`.
      tx: an optimizer, initialised by ``tx.init(jc.split(params)[0])``; for a tree of
        floating arrays that is ``tx.init(params)``.
      temperature: divides the logits in the soft loss; positive.
      hard: weight of the labels, a fraction in [0, 1]; 0 needs no labels.
      soft: (student's logits, teacher's, temperature, mask=...) -> float32[...], one
        value per example; None for no such part.
      terms: name -> (student's `Outputs`, teacher's, `Batch`) -> float[...]. Its mean
        is added, over the mask if it has the mask's shape.
      penalty: (the student's params, dense) -> float[], e.g. `l1_penalty`.
      loss_scale: what the loss is multiplied and its gradient divided by, so that small
        gradients of float16 do not vanish on their way.
      donate: whether the step may reuse the memory of ``params`` and ``opt_state``,
        which are then gone for the caller; the teacher must not share their arrays.

    Returns:
      ``step(params, opt_state, teacher_params, batch, key=None) -> (params, opt_state,
      metrics)``. ``batch`` is (inputs, labels, mask): any pytree; int[...] or None,
      below 0 for no label; bool[...] or None, False for padding. The last two may be
      left out. ``metrics`` are float32[]: "loss" and its parts before they are weighed,
      "soft", "hard", "penalty" and those of the terms, in nats per example. The
      teacher's weights are an argument: new ones do not recompile. The leaves of
      `Outputs.state` take the place of those of ``params``.

    Raises:
      ValueError: ``temperature``, ``hard`` or ``loss_scale`` is out of range, labels
        are missing, or the state does not fit the params.
      TypeError: the batch is not a tuple of one to three, or its mask not bool.

    >>> model = lambda params, x: x @ params["kernel"]
    >>> tx = optax.sgd(1.0)
    >>> step = distill_step(model, model, tx, hard=0.0)
    >>> ours, theirs = {"kernel": jnp.zeros((1, 2))}, {"kernel": jnp.eye(1, 2)}
    >>> batch = (jnp.ones((4, 1)), None)
    >>> ours, opt_state, metrics = step(ours, tx.init(ours), theirs, batch)
    >>> ours["kernel"].round(2)
    Array([[ 0.24, -0.24]], dtype=float32)
    """
    if not 0 < loss_scale < float("inf"):
        raise ValueError(f"distill_step needs loss_scale > 0, got {loss_scale}.")
    loss = distill_loss(
        student,
        teacher,
        temperature=temperature,
        hard=hard,
        soft=soft,
        terms=terms,
        penalty=penalty,
    )

    def step(
        params: Any, opt_state: Any, teacher_params: Any, batch: Any, key: Any = None
    ) -> tuple[Any, Any, dict[str, jax.Array]]:
        trainable, rest = split(params)

        def scaled(trainable: Any) -> tuple[jax.Array, Any]:
            value, more = loss(join(trainable, rest), teacher_params, batch, key)
            return value * loss_scale, more

        grads, (metrics, state) = jax.grad(scaled, has_aux=True)(trainable)
        if loss_scale != 1:
            grads = jax.tree.map(lambda g: g / loss_scale, grads)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        return with_state(join(trainable, rest), state), opt_state, metrics

    return jax.jit(step, donate_argnums=(0, 1) if donate else ())


def with_state(params: Any, state: Any) -> Any:
    """``params`` with the leaves of ``state`` in place of those of the same paths.

    Raises:
      ValueError: a path or a shape is not that of a leaf of ``params``.
    """
    paths, leaves, treedef = flatten(params)
    index = {path: i for i, path in enumerate(paths)}
    names, values, _ = flatten(state)
    for path, value in zip(names, values, strict=True):
        i = index.get(path)
        if i is None or jnp.shape(leaves[i]) != jnp.shape(value):
            has = "no such leaf" if i is None else _check.describe(leaves[i])
            raise ValueError(
                "distill_step needs a state whose leaves are leaves of the student's "
                f"params, but of {path!r}, {_check.describe(value)}, the params have "
                f"{has}. Their leaves are {list_paths(paths)}."
            )
        leaves[i] = jnp.asarray(value, leaves[i].dtype)
    return jax.tree.unflatten(treedef, leaves)
