"""How much each weight is worth keeping: higher is better.

A score maps a tree of floating arrays to a tree of scores of the same shapes. An array
is a tree, so the same function scores one leaf, and a score that needs gradients closes
over a tree of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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
