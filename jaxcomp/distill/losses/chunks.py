"""Losses of logits that never exist all at once."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check


def in_chunks(
    head: Callable[[jax.Array], Any],
    loss: Callable[..., Any],
    hidden: Any,
    *others: Any,
    chunk: int = 64,
) -> Any:
    """``loss(head(hidden), *others)``, a few tokens at a time, forward and backward.

    The logits of a chunk are computed again in the backward pass (Chen et al.,
    "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174), so that
    float[tokens, vocabulary] is never held. Values and gradients are those of the call
    on all tokens, up to the rounding of sums; what ``head`` closes over, such as its
    kernel, takes its gradient as well.

    Args:
      head: float[n, d] -> logits float[n, classes] for any ``n``, a token by itself.
      loss: (logits, *others) -> float[n, ...], or a tree of such: values per token,
        such as those of `soft_target_loss` or `sparse_target_loss`.
      hidden: float[..., d], the states that the head turns into logits.
      *others: trees of arrays [..., *rest], with the leading axes of ``hidden``:
        targets, labels, a mask, the hidden states of the teacher.
      chunk: tokens at a time; at least 1. Each chunk reads the kernel anew.

    Returns:
      What ``loss`` returns, its first axis turned back into those of the tokens.

    Raises:
      ValueError: ``chunk`` is below 1, or the leading axes differ.
      TypeError: ``chunk`` is no integer.

    >>> from jaxcomp.distill.losses.logits import soft_target_loss
    >>> ours, theirs = jnp.eye(2, 5), jnp.ones((2, 5))
    >>> def loss(logits, hidden):
    ...     return soft_target_loss(logits, hidden @ theirs)
    >>> hidden = jnp.ones((3, 2))
    >>> in_chunks(lambda h: h @ ours, loss, hidden, hidden, chunk=2).shape
    (3,)
    """
    _check.integer_within("in_chunks", "chunk", chunk, 1, 2**31 - 1)
    hidden = jnp.asarray(hidden)
    shape = hidden.shape[:-1]
    given = jax.tree.map(jnp.asarray, (hidden, *others))
    for leaf in jax.tree.leaves(given):
        if not hidden.ndim or leaf.shape[: len(shape)] != shape:
            raise ValueError(
                "in_chunks needs hidden [..., d] and others with its leading axes, got "
                f"{_check.describe(leaf)} beside hidden {_check.describe(hidden)}."
            )
    count = math.prod(shape)
    flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[len(shape) :]), given)

    def losses(rows: tuple) -> Any:
        return loss(head(rows[0]), *rows[1:])

    full = count // chunk
    parts = []
    if full:
        stacked = jax.tree.map(
            lambda x: x[: full * chunk].reshape(full, chunk, *x.shape[1:]), flat
        )
        # A scan keeps the two passes apart by itself: prevent_cse would only slow it.
        found = jax.lax.map(jax.checkpoint(losses, prevent_cse=False), stacked)
        parts.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found))
    if count % chunk or not count:
        left = jax.tree.map(lambda x: x[full * chunk :], flat)
        parts.append(jax.checkpoint(losses)(left))
    return jax.tree.map(
        lambda *xs: jnp.concatenate(xs).reshape(*shape, *xs[0].shape[1:]), *parts
    )
