"""Weight sharing while training: the loss sees few values, the weights stay free.

Pure functions on one array, for use inside a loss. ``palettize(x, k).codebook`` is a
codebook to begin with; it trains like any other array, or follows the weights.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxcomp import _check


_BLOCK = 2**20  # distances held at once
_COLDEST = 1e-12  # of the largest magnitude


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


def soft_share(
    x: jax.Array, centroids: jax.Array, temperature: float, *, steps: int = 5
) -> tuple[jax.Array, jax.Array]:
    """Each weight as a mixture of shared values, the near ones most, by soft k-means.

    Cho et al., "DKM: Differentiable K-Means Clustering Layer for Neural Network
    Compression", ICLR 2022, arXiv:2108.12659, section 3.2. A weight attends to the
    centroids by ``softmax(-|x - c| / temperature)``; each centroid becomes the mean of
    the weights by their attention to it, ``steps`` times; the result is the mixture of
    the centroids by the attention to them. It is differentiable throughout: a weight
    also moves the centroids.

    Departs from the paper: the number of steps is fixed, where there it ends once the
    centroids rest, after 5 at most; and the mixture has the attention to the last
    centroids, not to those before them. coremltools squares the distance.

    Time is ``(steps + 1) * n * k``, for the gradient about four times that. Nothing of
    that size is held: weights go by in blocks, which the gradient computes again.

    Args:
      x: float[*shape]; exact zeros stay exactly 0, and have no part in the centroids.
      centroids: float[k], in any order. Those that the last training step returned, to
        begin with ``palettize(x, k).codebook``. What they were is soon forgotten, so
        that with steps they carry little gradient: they are a state, not parameters.
      temperature: in the unit of ``x``; positive. The colder, the closer to the nearest
        centroid alone, which is `fake_share` of the new ones. Below 1e-12 of the
        largest magnitude it is no colder.
      steps: how often the centroids move, at least 0; 0 leaves them to an optimizer.

    Returns:
      (shared, centroids). Shared weights are float[*shape] in the dtype of ``x``, and 0
      where ``x`` has zeros; the new centroids are float[k] in the dtype of the old
      ones, in their order. A centroid that no weight attends to stays.

    Raises:
      TypeError: ``x`` or ``centroids`` is not floating point, or ``steps`` no integer.
      ValueError: ``centroids`` has no entries or is not one row of them, or a number is
        out of range.

    >>> x = jnp.array([0.0, 0.5, 1.5, 4.0])
    >>> shared, centroids = soft_share(x, jnp.array([2.0, 3.0]), 0.01)
    >>> shared, centroids
    (Array([0., 1., 1., 4.], dtype=float32), Array([1., 4.], dtype=float32))
    """
    caller = "soft_share"
    dtype = _check.floating(caller, centroids).dtype
    x, start = _checked(caller, x, centroids)
    _check.integer_within(caller, "steps", steps, 0, 2**31 - 1)
    cold = _check.number(caller, "temperature", temperature)
    if cold is not None and not 0 < cold < float("inf"):
        raise ValueError(
            f"{caller} needs a positive finite temperature, got {temperature}. Take "
            "e.g. a tenth of the distance between two centroids."
        )
    # Sums of what is near 1 do not overflow; a power of 2 changes no bit.
    reach = [jnp.max(jnp.abs(a), initial=0).astype(start.dtype) for a in (x, start)]
    power = jnp.frexp(jax.lax.stop_gradient(jnp.maximum(*reach)))[1]
    unit = jnp.ldexp(jnp.ones((), start.dtype), jnp.clip(power, -100, 100))
    heat = jnp.maximum(jnp.asarray(temperature, start.dtype) / unit, _COLDEST)
    flat = x.reshape(-1).astype(start.dtype) / unit
    rows = max(1, min(_BLOCK // start.size, flat.size))
    blocks = jnp.pad(flat, (0, -flat.size % rows)).reshape(-1, rows)  # pads are zeros

    def step(middle: jax.Array, _: None) -> tuple[jax.Array, None]:
        return _moved(blocks, middle, heat), None

    middle, _ = jax.lax.scan(step, start / unit, None, length=steps)
    mixed = jax.lax.map(jax.checkpoint(partial(_mixture, middle, heat)), blocks)
    shared = (mixed.reshape(-1)[: flat.size] * unit).reshape(x.shape).astype(x.dtype)
    return jnp.where(x == 0, 0, shared).astype(x.dtype), (middle * unit).astype(dtype)


def _attention(x: jax.Array, middle: jax.Array, heat: jax.Array) -> jax.Array:
    """float[n, k]: how much each weight attends to each centroid, 1 in all."""
    away = jnp.abs(x[:, None] - middle[None])
    least = jax.lax.stop_gradient(jnp.min(away, axis=1, keepdims=True))
    return jax.nn.softmax((least - away) / heat, axis=1)


def _mixture(middle: jax.Array, heat: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(_attention(x, middle, heat) * middle[None], axis=1)


def _moved(blocks: jax.Array, middle: jax.Array, heat: jax.Array) -> jax.Array:
    """The means of the weights that are not 0, by their attention."""

    @jax.checkpoint
    def add(total: tuple, x: jax.Array) -> tuple[tuple, None]:
        attention = jnp.where(x[:, None] == 0, 0, _attention(x, middle, heat))
        # By what they are off, so that weights that are all alike stay it to the bit.
        off = jnp.sum(attention * (x[:, None] - middle[None]), axis=0)
        return (total[0] + off, total[1] + jnp.sum(attention, axis=0)), None

    zeros = jnp.zeros_like(middle)
    (off, mass), _ = jax.lax.scan(add, (zeros, zeros), blocks)
    seen = mass > float(jnp.finfo(mass.dtype).tiny)
    return middle + jnp.where(seen, off / jnp.where(seen, mass, 1), 0)


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
