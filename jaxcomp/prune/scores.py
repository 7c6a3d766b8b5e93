"""How much each weight is worth keeping: higher is better.

A score maps a tree of floating arrays to a tree of scores of the same shapes. An array
is a tree, so the same function scores one leaf, and a score that needs gradients closes
over a tree of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp._extremes import unit_near


Score = Callable[[Any], Any]


def magnitude(params: Any) -> Any:
    """The absolute value of every weight.

    Han et al., "Learning both Weights and Connections", arXiv:1506.02626.

    >>> magnitude(jnp.array([-2.0, 1.0]))
    Array([2., 1.], dtype=float32)
    """
    return jax.tree.map(jnp.abs, params)


def random_scores(key: jax.Array) -> Score:
    """A score that draws every weight's worth at random, apart from its value.

    The baseline that every other score has to beat.

    Args:
      key: a JAX random key; each leaf gets a key of its own.

    Returns:
      A `Score`: tree of float[*shape] -> tree of float32[*shape], uniform in [0, 1).

    >>> random_scores(jax.random.key(0))(jnp.zeros((2, 3))).shape
    (2, 3)
    """

    def score(params: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(
            treedef,
            [
                jax.random.uniform(k, leaf.shape)
                for k, leaf in zip(keys, leaves, strict=True)
            ],
        )

    return score


def deviations(params: Any) -> Any:
    """The absolute value of every weight, in standard deviations of its leaf.

    Han et al., "Learning both Weights and Connections", arXiv:1506.02626: a layer keeps
    what is larger than a quality parameter times the standard deviation of its weights.
    That is `masks_above` with this score; under `global_budget` one parameter for all
    leaves is found that meets a sparsity exactly.

    Args:
      params: tree of float[*shape]. The deviation is that of all entries of a leaf
        about their mean, zeros too.

    Returns:
      tree of float32[*shape], of float64 for float64. In a leaf whose entries are all
      equal the deviation is 0: they score infinity, or 0 if they are 0.

    >>> deviations(jnp.array([1.0, -1.0, 3.0, -3.0, 0.0]))
    Array([0.5, 0.5, 1.5, 1.5, 0. ], dtype=float32)
    """
    return jax.tree.map(_deviations, params)


@jax.jit
def _deviations(w: jax.Array) -> jax.Array:
    x = w.astype(_check.wide(w.dtype))
    x *= unit_near(jnp.max(jnp.abs(x), initial=0))
    # From the first entry, so that equal ones differ by nothing; and as fractions of
    # the largest difference, whose square may overflow.
    apart = x - x.reshape(-1)[:1].sum()
    reach = jnp.max(jnp.abs(apart), initial=0)
    part = apart / jnp.where(reach > 0, reach, 1)
    count = max(w.size, 1)
    mean = jnp.sum(part) / count
    variance = jnp.sum((part - mean) ** 2) / count
    deviation = reach * jnp.sqrt(variance)
    size = jnp.abs(x)
    equal = jnp.where(size > 0, jnp.inf, 0)
    return jnp.where(reach > 0, size / jnp.where(reach > 0, deviation, 1), equal)
