"""One compiled training step: both forwards, the loss, the gradient, the update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcomp.distill.losses.logits import check_temperature, soft_target_loss
from jaxcomp.node import densify
from jaxcomp.tree import join, split


Model = Callable[..., jax.Array]
Step = Callable[..., tuple[Any, Any, dict[str, jax.Array]]]


def distill_step(
    student: Model,
    teacher: Model,
    tx: optax.GradientTransformation,
    *,
    temperature: float = 2.0,
    hard: float = 0.1,
    donate: bool = False,
) -> Step:
    """Makes the jitted step that teaches ``student`` what ``teacher`` knows.

    Hinton, Vinyals and Dean, arXiv:1503.02531. The loss is the mean over examples of
    ``(1 - hard) * soft_target_loss + hard * cross_entropy``. Either tree may be
    compressed: models run on `densify` of it, and of the student's tree what is
    floating is trained (`split`): a shared codebook is fine-tuned, its codes stay.

    Args:
      student: (params, inputs) -> float[..., classes] logits; called with the keyword
        ``key`` as well where the step is given one.
      teacher: (teacher_params, inputs) -> float[..., classes] logits.
      tx: an optimizer, initialised by ``tx.init(jc.split(params)[0])``; for a tree of
        floating arrays that is ``tx.init(params)``.
      temperature: divides the logits in the soft loss; positive.
      hard: weight of the labels, a fraction in [0, 1]; 0 needs no labels.
      donate: whether the step may reuse the memory of ``params`` and ``opt_state``,
        which are then gone for the caller; the teacher must not share their arrays.

    Returns:
      ``step(params, opt_state, teacher_params, batch, key=None) -> (params, opt_state,
      metrics)``. ``batch`` is (inputs, labels): any pytree, int[...] or None.
      ``metrics`` are float32[]: "loss", and its parts "soft" and "hard", in nats per
      example. The teacher's weights are an argument: new ones do not recompile.

    Raises:
      ValueError: ``temperature`` or ``hard`` is out of range, or labels are missing.

    >>> model = lambda params, x: x @ params["kernel"]
    >>> tx = optax.sgd(1.0)
    >>> step = distill_step(model, model, tx, hard=0.0)
    >>> ours, theirs = {"kernel": jnp.zeros((1, 2))}, {"kernel": jnp.eye(1, 2)}
    >>> batch = (jnp.ones((4, 1)), None)
    >>> ours, opt_state, metrics = step(ours, tx.init(ours), theirs, batch)
    >>> ours["kernel"].round(2)
    Array([[ 0.24, -0.24]], dtype=float32)
    """
    check_temperature("distill_step", temperature)
    if not 0 <= hard <= 1:
        raise ValueError(f"distill_step needs 0 <= hard <= 1, got {hard}.")

    def step(
        params: Any, opt_state: Any, teacher_params: Any, batch: Any, key: Any = None
    ) -> tuple[Any, Any, dict[str, jax.Array]]:
        inputs, labels = batch
        if hard and labels is None:
            raise ValueError(
                f"distill_step needs labels for hard={hard}, got None. Pass "
                "batch=(inputs, labels), or hard=0."
            )
        trainable, rest = split(params)
        options = {} if key is None else {"key": key}
        theirs = teacher(densify(teacher_params), inputs)

        def loss(trainable: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            ours = student(densify(join(trainable, rest)), inputs, **options)
            soft = jnp.mean(soft_target_loss(ours, theirs, temperature))
            if labels is None:
                firm = jnp.zeros([])
            else:
                firm = jnp.mean(
                    optax.softmax_cross_entropy_with_integer_labels(
                        jnp.asarray(ours, jnp.float32), labels
                    )
                )
            total = (1 - hard) * soft + hard * firm
            return total, {"loss": total, "soft": soft, "hard": firm}

        grads, metrics = jax.grad(loss, has_aux=True)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        return join(trainable, rest), opt_state, metrics

    return jax.jit(step, donate_argnums=(0, 1) if donate else ())
