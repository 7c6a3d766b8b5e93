"""Weight sharing while training: the loss sees few values, the weights stay free.

Pure functions on one array, for use inside a loss. ``palettize(x, k).codebook`` is a
codebook to begin with; it trains like any other array.
"""

import jax
import jax.numpy as jnp

from jaxcomp import _check


def fake_share(x: jax.Array, codebook: jax.Array) -> jax.Array:
    """The nearest shared value of every weight, with the gradient of both.

    Han et al., "Deep Compression", arXiv:1510.00149, section 3.2: the gradient of a
    shared value is the sum over the weights that have it. There the weights themselves
    are gone after clustering; here they train on, straight through, and may change to
    another value. To hold the clusters as in the paper, train a `SharedTensor`.

    Args:
      x: float[*shape]; exact zeros stay exactly 0, and have no part in the codebook.
      codebook: float[k], in any order. On a tie the lower value is nearest. A weight
        that is not 0 becomes 0 only if the codebook has a 0.

    Returns:
      float[*shape], in the dtype of ``x``; at most ``k`` values, and 0 where ``x`` has
      zeros. `palettize` with room for them stores it bit for bit.

    Raises:
      TypeError: ``x`` or ``codebook`` is not floating point.
      ValueError: ``codebook`` has no entries or is not one row of them.

    >>> x, codebook = jnp.array([0.0, 0.2, 0.9, 1.2]), jnp.array([0.25, 1.0])
    >>> fake_share(x, codebook)
    Array([0.  , 0.25, 1.  , 1.  ], dtype=float32)
    >>> jax.grad(lambda codebook: jnp.sum(fake_share(x, codebook)))(codebook)
    Array([1., 2.], dtype=float32)
    """
    x, codebook = _checked("fake_share", x, codebook)
    value = jnp.where(x == 0, 0, _nearest(x, codebook)).astype(x.dtype)
    return value + (x - jax.lax.stop_gradient(x))  # the difference is exactly 0


def codebook_pull(x: jax.Array, codebook: jax.Array) -> jax.Array:
    """The mean squared distance of the weights to their nearest shared value.

    A penalty that pulls weights to the codebook and the codebook to the weights; with
    it the loss loses less at the end, when the weights are replaced. It is the
    quantization error that k-means lowers, as in Han et al., arXiv:1510.00149, section
    3.1, divided by the number of weights.

    Args:
      x: float[*shape]; exact zeros are left out.
      codebook: float[k], in any order.

    Returns:
      float[], at least float32; 0 if ``x`` has nothing but zeros.

    Raises:
      TypeError: ``x`` or ``codebook`` is not floating point.
      ValueError: ``codebook`` has no entries or is not one row of them.

    >>> codebook_pull(jnp.array([0.0, 0.5, 1.5, 4.0]), jnp.array([1.0, 4.0]))
    Array(0.16666667, dtype=float32)
    """
    x, codebook = _checked("codebook_pull", x, codebook)
    live = x != 0
    away = jnp.where(live, x.astype(codebook.dtype) - _nearest(x, codebook), 0)
    count = jnp.maximum(jnp.sum(live, dtype=jnp.int32), 1)
    return jnp.sum(away**2) / count.astype(away.dtype)


def _checked(
    caller: str, x: jax.Array, codebook: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Both as arrays, the codebook in the dtype to compute in."""
    x, codebook = _check.floating(caller, x), _check.floating(caller, codebook)
    if codebook.ndim != 1 or not codebook.size:
        raise ValueError(
            f"{caller} needs a codebook of one dimension and at least one value, got "
            f"{_check.describe(codebook)}. Begin with palettize(x, clusters).codebook."
        )
    # Gradients of many weights add up in it.
    return x, codebook.astype(_check.wide(x.dtype))


def _nearest(x: jax.Array, codebook: jax.Array) -> jax.Array:
    """float[*shape]: differentiable in the codebook, by its entries."""
    order = jnp.argsort(jax.lax.stop_gradient(codebook))
    ranked = jax.lax.stop_gradient(codebook)[order] / 2  # whole, sums may overflow
    fixed = jax.lax.stop_gradient(x).astype(codebook.dtype)
    # A search, as comparing with all would take an array of shape [*shape, k].
    rank = jnp.searchsorted(ranked[1:] + ranked[:-1], fixed, method="scan_unrolled")
    return codebook[order[rank]]
