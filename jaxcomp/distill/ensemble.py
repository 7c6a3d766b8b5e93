"""Several teachers as one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def ensemble(teacher: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes a teacher of several: the mean of their logits.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network",
    arXiv:1503.02531, section 1. The mean of logits is the geometric mean of what the
    nets predict, up to a factor, at every temperature.

    Args:
      teacher: (params, inputs) -> float[..., classes] logits.

    Returns:
      (list of trees, inputs) -> float[..., classes]; the trees may be compressed if
      ``teacher`` takes such. Pass the list as `distill_step`'s ``teacher_params``. If
      inputs are not augmented, call it once for all of them and keep the logits.

    Raises:
      ValueError: when called, if the list is empty.

    >>> mean = ensemble(lambda params, x: x * params)
    >>> mean([1.0, 3.0], jnp.ones(2))
    Array([2., 2.], dtype=float32)
    """

    def mean_logits(trees: Any, *inputs: Any) -> jax.Array:
        if not trees:
            raise ValueError("ensemble needs at least one tree of teacher params.")
        return jnp.mean(jnp.stack([teacher(t, *inputs) for t in trees]), axis=0)

    return mean_logits
