"""Scores that training gives: slopes, their means over batches, the way weights went.

Those that are trees of scores become a `Score` by `given`.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp.node import densify
from jaxcomp.prune.at_init import checked_loss, given, parted, products
from jaxcomp.prune.scores import Score
from jaxcomp.tree import join


def gradients(loss: Callable[[Any], jax.Array], params: Any) -> Any:
    """How steep the loss is in each weight, whatever the weight is: ``|dloss/dw|``.

    Args:
      loss: params -> float[]; it closes over a batch.
      params: any pytree, as for `saliency`.

    Returns:
      A tree of ``|dloss/dw|`` shaped like ``params``; dtypes as `saliency`.

    Raises:
      TypeError: ``loss`` does not return one floating number.

    >>> gradients(lambda p: jnp.sum(p["a"] ** 2), {"a": jnp.array([1.0, -3.0])})
    {'a': Array([2., 6.], dtype=float32)}
    """
    values, rest = parted(params)
    slopes = jax.grad(checked_loss("gradients", loss, rest))(values)
    ones = jax.tree.map(lambda value: jnp.ones((), value.dtype), values)
    return jax.tree.map(jnp.abs, products(ones, slopes, rest))


def mean_squares(
    score: Callable[[Callable[[Any], jax.Array], Any], Any],
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Iterable[Any],
) -> Any:
    """The mean over batches of the squares of a score.

    With `gradients` the diagonal of the empirical Fisher information, which is a mean
    over examples: take batches of one. With `saliency` the first-order score of
    Molchanov et al., "Importance Estimation for Neural Network Pruning",
    arXiv:1906.10771, of single weights.

    Args:
      score: (loss of the params, params) -> tree of scores: `saliency` or `gradients`.
      loss: (params, batch) -> float[].
      params: any pytree, as for `saliency`.
      batches: any pytrees of arrays; each is used once and let go. All weigh the same.
        One shape of batch is compiled once.

    Returns:
      A tree of squares shaped like ``params``: float[*shape], dtypes as `saliency`.

    Raises:
      ValueError: there is no batch.
      TypeError: ``loss`` does not return one floating number.

    >>> loss = lambda params, x: jnp.sum(params["a"] * x)
    >>> batches = [jnp.array([1.0, 2.0]), jnp.array([3.0, 0.0])]
    >>> mean_squares(gradients, loss, {"a": jnp.ones(2)}, batches)
    {'a': Array([5., 2.], dtype=float32)}
    """
    values, rest = parted(params)

    @jax.jit
    def squares(values: Any, batch: Any) -> Any:
        of_params = partial(_of_batch, loss, batch)
        return jax.tree.map(jnp.square, score(of_params, join(values, rest)))

    total, count = None, 0
    for count, batch in enumerate(batches, start=1):
        found = squares(values, batch)
        total = found if count == 1 else jax.tree.map(jnp.add, total, found)
    if not count:
        raise ValueError(
            "mean_squares needs one batch at least, got none. An iterator that was "
            "read before is empty: make it anew."
        )
    return jax.tree.map(lambda x: x / count, total)


def _of_batch(loss: Callable[[Any, Any], jax.Array], batch: Any, params: Any) -> Any:
    return loss(params, batch)


def moved_from(start: Any) -> Score:
    """A score of how far each weight has moved from where it started.

    Zhou et al., "Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask",
    arXiv:1905.01067, the criterion they call movement; Frankle and Carbin,
    arXiv:1803.03635, rewind what is kept to ``start``. What has moved least goes.

    Args:
      start: a tree of float[*shape] shaped like the params, nodes too: the weights at
        initialisation, or those that training is rewound to.

    Returns:
      A `Score`: tree of float[*shape] -> tree of ``|w - start|``, float32 for narrower
      weights. It raises a ValueError if it is asked for a path that ``start`` does not
      have, or has in another shape.

    >>> import jaxcomp as jc
    >>> start = {"kernel": jnp.array([[1.0, -2.0, 3.0]])}
    >>> params = {"kernel": jnp.array([[1.5, 2.0, 3.0]])}
    >>> jc.prune.masks(params, 2 / 3, score=moved_from(start))
    {'kernel': Array([[False,  True, False]], dtype=bool)}
    """

    def distance(w: jax.Array, origin: jax.Array) -> jax.Array:
        wide = _check.wide(w.dtype)
        return jnp.abs(w.astype(wide) - origin.astype(wide))

    def score(params: Any) -> Any:
        try:
            origins = given(densify(start))(params)
        except ValueError as error:
            raise ValueError(
                f"moved_from needs a start shaped like the params: {error}"
            ) from error
        return jax.tree.map(distance, params, origins)

    return score
