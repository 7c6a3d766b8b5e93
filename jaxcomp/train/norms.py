"""Batch normalisation in a network that shrinks: fold it, measure it anew, freeze it.

Layers are named by their paths in the tree, so that Flax Linen's collections and the
states of NNX work alike. A layer has a ``kernel`` and may have a ``bias``. Its norm has
``mean`` and ``var``, and may have ``scale`` and ``bias``.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp import _check
from jaxcomp.node import flatten, is_compressed
from jaxcomp.tree import Where, list_paths, select


# So large that what a batch adds is lost; a power of two, so that division is exact.
HUGE = 2.0**40


class FreezeAfterState(NamedTuple):
    """State of `freeze_after`."""

    count: jax.Array  # type: ignore[assignment]  # int32[], updates seen


def fold_norm(
    kernel: jax.Array,
    scale: jax.Array | None,
    offset: jax.Array | None,
    mean: jax.Array,
    var: jax.Array,
    *,
    epsilon: float,
) -> tuple[jax.Array, jax.Array]:
    """The kernel and the bias of a layer that does what layer and norm did.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 3.2: the kernel times
    ``scale / sqrt(var + epsilon)``, and ``offset`` less ``mean`` times that. If the
    layer has a bias, pass ``mean - bias``. Exact zeros of the kernel stay zero.

    Args:
      kernel: float[..., out], as Flax has it for dense layers and convolutions.
      scale: float[out]; None is 1.
      offset: float[out], what the norm adds, Flax's ``bias``; None is 0.
      mean: float[out], running mean.
      var: float[out], running variance.
      epsilon: the layer's own, in [0, 1]; 1e-5 in Flax, 1e-3 in Keras. With 0, a
        variance of 0 gives NaN, as it does in the layer.

    Returns:
      kernel: float[..., out], of the dtype of ``kernel``.
      offset: float[out], of the dtype of ``offset``, or else of ``mean``.

    Raises:
      ValueError: shapes do not fit together, or ``epsilon`` is out of range.
      TypeError: an array is not floating point.

    >>> kernel, scale, offset = jnp.ones((2, 1)), jnp.array([3.0]), jnp.array([0.5])
    >>> mean, var = jnp.array([2.0]), jnp.array([2.0])
    >>> fold_norm(kernel, scale, offset, mean, var, epsilon=0.25)
    (Array([[2.],
           [2.]], dtype=float32), Array([-3.5], dtype=float32))
    """
    _in_range("fold_norm", epsilon)
    vectors = {"scale": scale, "offset": offset, "mean": mean, "var": var}
    folded, moved = _fold("fold_norm", kernel, vectors, epsilon)
    given = mean if offset is None else offset
    return folded, moved.astype(jnp.asarray(given).dtype)


def fold_norms(
    params: Any,
    stats: Any,
    pairs: Iterable[tuple[str, str]],
    *,
    epsilon: float,
) -> tuple[Any, Any]:
    """Folds batch norms into the layers before them; the model's code stays.

    The model still applies its norms, so a folded norm is left neutral: scale 1, bias
    0, mean 0 and variance ``1 - epsilon``, which changes no bit. What it added goes to
    the bias of the layer; without one, to the bias of the norm; without that, to the
    mean of the norm. The result is for inference. In training mode a norm normalises by
    the batch, and would undo this.

    Jacob et al., arXiv:1712.05877, section 3.2, after training; see `fold_norm`. They
    fold in training as well.

    Args:
      params: kernels, biases and scales: Linen's ``params``, an ``nnx.Param`` state, or
        any tree with such paths.
      stats: running means and variances: Linen's ``batch_stats``, an ``nnx.BatchStat``
        state, or any tree with such paths.
      pairs: (path of a layer, path of the norm that follows it at once), e.g.
        ``[("block/Conv_0", "block/BatchNorm_0")]``.
      epsilon: that of the norms, in [0, 1]; for norms that differ, call once for each.

    Returns:
      (params, stats): trees of the same structures, shapes and dtypes. Leaves that no
      pair names are the same arrays.

    Raises:
      ValueError: a path is not in the tree or is named twice, sizes differ, a leaf is
        compressed, or ``epsilon`` is out of range.
      TypeError: a leaf is not floating point.

    >>> params = {"conv": {"kernel": jnp.ones((1, 2))}, "norm": {"bias": jnp.ones(2)}}
    >>> stats = {"norm": {"mean": jnp.ones(2), "var": jnp.array([0.75, 3.75])}}
    >>> fold_norms(params, stats, [("conv", "norm")], epsilon=0.25)
    ({'conv': {'kernel': Array([[1. , 0.5]], dtype=float32)},
      'norm': {'bias': Array([0. , 0.5], dtype=float32)}},
     {'norm': {'mean': Array([0., 0.], dtype=float32),
               'var': Array([0.75, 0.75], dtype=float32)}})
    """
    _in_range("fold_norms", epsilon)
    pairs = list(pairs)
    for named in ([layer for layer, _ in pairs], [norm for _, norm in pairs]):
        if len(set(named)) < len(named):
            raise ValueError(
                f"fold_norms needs every layer and every norm once, got {named}. One "
                "that is used twice cannot be folded."
            )
    weights, weights_def = _by_path(params)
    averages, averages_def = _by_path(stats)
    for layer, norm in pairs:
        _fold_pair(weights, averages, layer, norm, epsilon)
    return (
        jax.tree.unflatten(weights_def, list(weights.values())),
        jax.tree.unflatten(averages_def, list(averages.values())),
    )


def reestimate_norms(
    run: Callable[[Any, Any], Any], stats: Any, batches: Iterable[Any]
) -> Any:
    """Running statistics measured anew, for weights that pruning or rounding changed.

    Li, Wu, Su, Wang and Lin, "EagleEye: Fast Sub-net Evaluation for Efficient Neural
    Network Pruning", arXiv:2007.02491, adaptive batch normalisation. They let the
    moving average run on; here the result is the plain mean over the batches, whatever
    the layer's momentum is. A variance is the mean of the variances of the batches, as
    in training, and not the variance of all examples together.

    A layer's new average is ``m * old + (1 - m) * batch``. The momentum m is found by
    running the first batch from two different starts, to a relative error of about
    ``1e-7 / (1 - m)`` of the result. In training mode a layer normalises by the batch
    and not by ``old``, so one pass is enough for any depth.

    Args:
      run: (stats, batch) -> stats, one forward pass in training mode. It is jitted and
        traced once. For Linen, ``lambda stats, x: model.apply({"params": params,
        "batch_stats": stats}, x, train=True, mutable=["batch_stats"])[1]
        ["batch_stats"]``.
      stats: float[...] running averages. Integers, such as counters, pass through.
      batches: batches of one structure and shape; each weighs the same. They are read
        once, so that a generator will do.

    Returns:
      A tree shaped like ``stats``, of the same dtypes. Averages that ``run`` does not
      move, of frozen layers, keep their bits.

    Raises:
      ValueError: there are no batches, or ``run`` moves no average or returns a tree of
        another structure.

    >>> def run(stats, x):
    ...     return {"mean": 0.99 * stats["mean"] + 0.01 * x.mean(axis=0)}
    >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])]
    >>> new = reestimate_norms(run, {"mean": jnp.zeros(1)}, batches)
    >>> round(float(new["mean"][0]), 3)
    4.0
    """
    forward = jax.jit(run)
    leaves, treedef = jax.tree.flatten(stats)
    # In float32 if they are narrower: 16 bits are too coarse for 1 - m, and for a mean.
    old = {
        i: jnp.asarray(leaf, _check.wide(leaf.dtype))
        for i, leaf in enumerate(leaves)
        if _check.is_floating(leaf)
    }

    def moved(start: dict[int, jax.Array], batch: Any) -> dict[int, jax.Array]:
        full = [start.get(i, leaf) for i, leaf in enumerate(leaves)]
        new = forward(jax.tree.unflatten(treedef, full), batch)
        given: Any = jax.tree.structure(new)
        if given != treedef:
            raise ValueError(
                f"reestimate_norms needs a `run` that returns stats shaped like those "
                f"it gets, got {given} for {treedef}. Return the new collection alone."
            )
        rows = jax.tree.leaves(new)
        return {i: jnp.asarray(rows[i], x.dtype) for i, x in start.items()}

    batches = iter(batches)
    try:
        first = next(batches)
    except StopIteration:
        raise ValueError(
            "reestimate_norms needs at least one batch, got none. A generator is empty "
            "once it has been read."
        ) from None
    huge = jax.tree.map(lambda x: jnp.full_like(x, HUGE), old)
    frozen = jax.tree.map(lambda x: jnp.all(x == HUGE), moved(huge, first))
    if all(_check.known(still) for still in frozen.values()):
        raise ValueError(
            f"reestimate_norms needs a `run` that moves running averages, but all "
            f"{len(old)} floating leaves of stats stay as they were. Run the model in "
            "training mode (use_running_average=False)."
        )
    # A frozen layer normalises by its average: those after it need the real one.
    start = jax.tree.map(lambda f, x: jnp.where(f, x, jnp.zeros_like(x)), frozen, old)
    high = moved(jax.tree.map(jnp.where, frozen, old, huge), first)
    low = mean = moved(start, first)
    for count, batch in enumerate(batches, 2):
        new = moved(start, batch)
        mean = jax.tree.map(lambda a, x, n=count: a + (x - a) / n, mean, new)
    # Of a frozen average, high is low, so that it is divided by 1.
    found = jax.tree.map(lambda a, h, b: a / (1 - (h - b) / HUGE), mean, high, low)
    return jax.tree.unflatten(
        treedef,
        [
            found[i].astype(leaf.dtype) if i in found else leaf
            for i, leaf in enumerate(leaves)
        ],
    )


def freeze_norms(step: jax.typing.ArrayLike, begin: int, old: Any, new: Any) -> Any:
    """The running statistics that a training step keeps: ``new``, or late on ``old``.

    Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: A
    whitepaper", arXiv:1806.08342: late in quantization-aware training the statistics
    are frozen, so that they stop moving the grid. That the forward pass uses them, and
    not the batch's, is up to the model: pass ``use_running_average`` from then on.

    Args:
      step: int32[], steps done.
      begin: the first step that keeps ``old``, not negative.
      old: running statistics before the step.
      new: the same after its forward pass, of the same structure.

    Returns:
      ``new`` if ``step < begin``, else ``old``, bit for bit; one trace for both.

    Raises:
      ValueError: ``begin`` is negative.

    >>> old, new = {"mean": jnp.zeros(1)}, {"mean": jnp.ones(1)}
    >>> [freeze_norms(step, 10, old, new)["mean"].tolist() for step in (9, 10)]
    [[1.0], [0.0]]
    """
    _check.integer_within("freeze_norms", "begin", begin, 0, 2**31 - 1)
    moving = jnp.asarray(step) < begin
    return jax.tree.map(lambda a, b: jnp.where(moving, b, a), old, new)


def freeze_after(begin: int, *, where: Where) -> optax.GradientTransformation:
    """Stops the updates of the selected leaves from step ``begin`` on.

    For the scales and biases of norms late in training, or for any other leaves. Chain
    it last, so that neither moments nor weight decay move them. Only a link that lands
    weights on zero, such as `keep_zeros`, goes after it.

    Args:
      begin: the first step, counted from 0, whose updates are zero.
      where: (path, leaf) -> bool; leaves to freeze. ``leaf`` has the shape of the
        weight.

    Returns:
      A transformation. From ``begin`` on the selected updates are exactly zero.

    Raises:
      ValueError: ``begin`` is negative, or nothing is selected.

    >>> from jaxcomp.tree import path_matches
    >>> link = freeze_after(1, where=path_matches("scale"))
    >>> tx = optax.chain(optax.sgd(0.5), link)
    >>> params = {"kernel": jnp.ones((1, 1)), "scale": jnp.ones(1)}
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state)
    ...     params = optax.apply_updates(params, updates)
    >>> params
    {'kernel': Array([[-0.5]], dtype=float32), 'scale': Array([0.5], dtype=float32)}
    """
    _check.integer_within("freeze_after", "begin", begin, 0, 2**31 - 1)

    def init(params: Any) -> FreezeAfterState:
        select(params, where)  # an error now, not at the first step
        return FreezeAfterState(jnp.zeros([], jnp.int32))

    def update(
        updates: Any, state: FreezeAfterState, params: Any = None
    ) -> tuple[Any, FreezeAfterState]:
        del params
        moving = state.count < begin
        updates = jax.tree.map(
            lambda c, u: jnp.where(moving, u, jnp.zeros_like(u)) if c else u,
            select(updates, where),
            updates,
        )
        return updates, FreezeAfterState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _in_range(caller: str, epsilon: Any) -> None:
    known = _check.number(caller, "epsilon", epsilon)
    if known is not None and not 0 <= known <= 1:
        raise ValueError(
            f"{caller} needs 0 <= epsilon <= 1, the layer's own, got {epsilon}."
        )


def _fold(
    caller: str, kernel: Any, vectors: dict[str, Any], epsilon: Any
) -> tuple[jax.Array, jax.Array]:
    """The folded kernel, and in float32 or wider what is to be added after it."""
    kernel = _check.floating(caller, kernel)
    given = {k: _check.floating(caller, x) for k, x in vectors.items() if x is not None}
    for name, x in given.items():
        if x.shape != kernel.shape[-1:] or not kernel.ndim:
            raise ValueError(
                f"{caller} needs one {name} for each output, the last axis of the "
                f"kernel, got {name} {_check.describe(x)} for kernel "
                f"{_check.describe(kernel)}."
            )
    wide = jnp.result_type(*(_check.wide(x.dtype) for x in (kernel, *given.values())))
    given = {name: x.astype(wide) for name, x in given.items()}
    zero = jnp.zeros((), wide)
    factor = jax.lax.rsqrt(given["var"] + jnp.asarray(epsilon, wide))
    factor *= given.get("scale", jnp.ones((), wide))
    folded = kernel.astype(wide) * jnp.expand_dims(factor, range(kernel.ndim - 1))
    moved = given.get("bias", zero) - given["mean"]
    return folded.astype(kernel.dtype), moved * factor + given.get("offset", zero)


def _by_path(tree: Any) -> tuple[dict[str, Any], Any]:
    """Leaves by path, in order, without the /value at the end of an ``nnx.State``'s."""
    paths, leaves, treedef = flatten(tree)
    names = [path.removesuffix("/value") for path in paths]
    return dict(zip(names, leaves, strict=True)), treedef


def _fold_pair(
    weights: dict[str, Any],
    averages: dict[str, Any],
    layer: str,
    norm: str,
    epsilon: Any,
) -> None:
    """Replaces the leaves of one layer and one norm in the two dicts."""
    kernel = _leaf(weights, layer, "kernel", "params")
    given: dict[str, Any] = {
        "bias": weights.get(f"{layer}/bias"),
        "scale": weights.get(f"{norm}/scale"),
        "offset": weights.get(f"{norm}/bias"),
        "mean": _leaf(averages, norm, "mean", "stats"),
        "var": _leaf(averages, norm, "var", "stats"),
    }
    for x in (kernel, *given.values()):
        if is_compressed(x):
            raise ValueError(
                f"fold_norms needs arrays, but a leaf of {layer!r} or {norm!r} is "
                f"compressed ({x.describe()}). Fold first, then compress."
            )
    caller = f"fold_norms of {layer!r} and {norm!r}"
    weights[f"{layer}/kernel"], moved = _fold(caller, kernel, given, epsilon)
    # In the dtype of var: there 1 - epsilon + epsilon rounds to 1.
    one = jnp.ones_like(given["var"])
    averages[f"{norm}/var"] = one - jnp.asarray(epsilon, one.dtype)
    averages[f"{norm}/mean"] = jnp.zeros_like(given["mean"])
    if given["scale"] is not None:
        weights[f"{norm}/scale"] = jnp.ones_like(given["scale"])
    if given["offset"] is not None:
        weights[f"{norm}/bias"] = jnp.zeros_like(given["offset"])
    if given["bias"] is not None:
        weights[f"{layer}/bias"] = moved.astype(given["bias"].dtype)
    elif given["offset"] is not None:
        weights[f"{norm}/bias"] = moved.astype(given["offset"].dtype)
    else:
        averages[f"{norm}/mean"] = -moved.astype(given["mean"].dtype)


def _leaf(leaves: dict[str, Any], path: str, key: str, tree: str) -> Any:
    if f"{path}/{key}" in leaves:
        return leaves[f"{path}/{key}"]
    there = [name.rpartition("/")[0] for name in leaves if name.endswith(f"/{key}")]
    raise ValueError(
        f"fold_norms needs a {key} at {path!r} in {tree}, which has one at "
        f"{list_paths(there) or 'no path'}. Pass the whole path of the layer."
    )
