"""Patterns that hardware likes, as budgets: n of every m, whole blocks, whole units.

A `Budget` is a function, so a pattern is one too: `nm_budget` makes one, `in_blocks`
and `in_units` take one and give one. `masks` and `prune_gradually` need no argument
more.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp.prune.budgets import Budget
from jaxcomp.prune.top import check_sparsity, zeros_of


Along = int | tuple[int, ...]


def nm_mask(scores: jax.Array, n: int, m: int, *, along: Along = -2) -> jax.Array:
    """Keeps the ``n`` best of every ``m`` consecutive entries along one axis, or more.

    Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378. Where
    ``m`` does not divide the length, the last group is shorter and keeps its ``n`` best
    too, or all if it has no more: what hardware sees once it has padded with zeros.

    Args:
      scores: float[..., d, ...]; higher is more worth keeping.
      n: entries kept per group, ``0 < n <= m``.
      m: group length. Hardware wants ``n=2, m=4``.
      along: the axis to group. Of a Flax kernel, (in, out) or (h, w, in, out), -2 is
        the contraction. Several axes run together as one, in C order, whatever the
        order in which they are named: (-4, -3, -2) are the patches of a convolution,
        (0, 1) what an einsum with a kernel (heads, d, model) contracts.

    Returns:
      bool, shape of ``scores``; exactly ``min(n, length)`` of each group are True. On a
      tie the lower index is kept.

    Raises:
      ValueError: not ``0 < n <= m``, or ``scores`` does not have the axes.

    >>> nm_mask(jnp.array([[3.0, 1.0, 2.0, 2.0, 0.0]]), 2, 4, along=-1)
    Array([[ True, False,  True, False,  True]], dtype=bool)
    """
    _check_nm("nm_mask", n, m)
    return _group_mask(jnp.asarray(scores), n, m, along)


def _check_nm(caller: str, n: int, m: int) -> None:
    _check.integer_within(caller, "m", m, 1, 2**31 - 1)
    _check.integer_within(caller, "n", n, 1, m)


@partial(jax.jit, static_argnames=("m", "along"))
def _group_mask(scores: jax.Array, kept: Any, m: int, along: Along) -> jax.Array:
    """`nm_mask` for a count that may be traced."""
    axes = _axes_of("nm_mask", scores, along)
    axis, end = axes[0], axes[0] + len(axes)
    moved = jnp.moveaxis(scores, axes, range(axis, end))  # beside each other
    before, after = moved.shape[:axis], moved.shape[end:]
    length = math.prod(moved.shape[axis:end])
    lanes = moved.reshape(*before, length, *after)
    # What is padded is the worst, and behind all entries: it takes no place of theirs.
    edges = [(0, 0)] * lanes.ndim
    edges[axis] = (0, -length % m)
    lanes = jnp.pad(lanes, edges, constant_values=-jnp.inf)
    groups = lanes.reshape(*before, lanes.shape[axis] // m, m, *after)
    rivals = jnp.expand_dims(groups, axis + 1)  # [..., 1, rival, ...]
    own = jnp.expand_dims(groups, axis + 2)  # [..., own, 1, ...]
    tail = (1,) * len(after)
    earlier = np.tri(m, k=-1, dtype=bool).reshape((1,) * (axis + 1) + (m, m) + tail)
    beats = (rivals > own) | ((rivals == own) & earlier)
    rank = jnp.sum(beats, axis=axis + 2, dtype=jnp.int32)  # 0 is the best
    mask = (rank < kept).reshape(lanes.shape)
    mask = jax.lax.slice_in_dim(mask, 0, length, axis=axis).reshape(moved.shape)
    return jnp.moveaxis(mask, range(axis, end), axes)


def axis_of(caller: str, x: jax.Array, axis: int) -> int:
    """An axis, not negative, once it is known that ``x`` has it."""
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"{caller} needs an array that has axis {axis}, got {_check.describe(x)}. "
            "Pass another axis, or leave this leaf out with `where`."
        )
    return axis % x.ndim


def _axes_of(caller: str, x: jax.Array, along: Along) -> list[int]:
    """The axes, not negative, sorted."""
    named = along if isinstance(along, tuple) else (along,)
    axes = sorted(axis_of(caller, x, axis) for axis in named)
    if not axes or len(set(axes)) != len(axes):
        raise ValueError(
            f"{caller} needs one axis or more, each once, got along={along} for "
            f"{_check.describe(x)}."
        )
    return axes


def nm_budget(n: int, m: int, *, along: Along | Mapping[str, Along] = -2) -> Budget:
    """A budget that keeps ``n`` of every ``m`` consecutive entries of every leaf.

    Mishra et al., arXiv:2104.08378. A lower sparsity than ``1 - n / m`` keeps more of
    each group, ``m - round(sparsity * m)``, half to even, so that a schedule that rises
    to ``1 - n / m`` goes from ``m`` down to ``n`` entries per group; a traced one that
    rises further stays at ``n``.

    Args:
      n: entries kept per group in the end, ``0 < n <= m``.
      m: group length.
      along: the axis to group, or several, as in `nm_mask`; or path -> axes, such as
        the ``axes`` that `observe` finds for every weight of a function.

    Returns:
      A `Budget`. Every group of every leaf keeps the same count, but for a shorter last
      one, which keeps all if it has no more.

    Raises:
      ValueError: not ``0 < n <= m``. The budget raises if ``sparsity`` is not in
        ``[0, 1 - n / m]`` or a mapping, or if a leaf does not have the axes, or
        ``along`` not the leaf.

    >>> nm_budget(1, 2)({"a": jnp.array([[1.0], [2.0], [4.0], [3.0]])}, 0.5)["a"].T
    Array([[False,  True,  True, False]], dtype=bool)
    """
    _check_nm("nm_budget", n, m)

    def budget(scores: Mapping[str, jax.Array], sparsity: Any) -> dict[str, jax.Array]:
        check_sparsity("nm_budget", sparsity)
        known = _check.known(sparsity)
        # 1 - n / m may have been rounded up, in float32 too.
        if known is not None and known > 1 - n / m + 1e-6:
            raise ValueError(
                f"nm_budget needs a sparsity of at most 1 - n/m = {1 - n / m:g} for "
                f"{n}:{m}, got {sparsity}. Pass that, or a smaller n."
            )
        kept = jnp.maximum(n, m - zeros_of(sparsity, m))
        if not isinstance(along, Mapping):
            return _each(scores, lambda score: _group_mask(score, kept, m, along))
        missing = [path for path in scores if path not in along]
        if missing:
            raise ValueError(
                f"nm_budget needs the axes of every leaf, but `along` has none of "
                f"{missing[0]!r}. Add them, or leave the leaf out with `where`."
            )
        found: dict[str, jax.Array] = {}
        for path, score in scores.items():
            mask = partial(_group_mask, kept=kept, m=m, along=along[path])
            found |= _each({path: score}, mask)
        return found

    return budget


def in_blocks(budget: Budget, shape: Sequence[int]) -> Budget:
    """A budget that keeps or removes whole blocks of the last axes.

    Gray, Radford and Kingma, "GPU Kernels for Block-Sparse Weights", 2017, for the
    pattern. The score of a block is the mean of its entries.

    Args:
      budget: what decides about blocks: `leaf_budget`, `global_budget`, `erk_budget`.
        It sees one score for each block, and its counts are exact in blocks.
      shape: lengths of a block along the last axes, e.g. ``(4, 4)``. Where a block
        sticks out over the edge, its score is the mean of the entries that it has.

    Returns:
      A `Budget`.

    Raises:
      ValueError: a length is less than 1, or there is none. The budget raises if a leaf
        has fewer axes than a block.

    >>> score = {"a": jnp.array([[1.0, 2.0, 4.0], [1.0, 2.0, 0.0]])}
    >>> in_blocks(lambda s, _: {"a": s["a"] > 1.5}, (2, 2))(score, 0.5)["a"]
    Array([[False, False,  True],
           [False, False,  True]], dtype=bool)
    """
    for length in shape:
        _check.integer_within("in_blocks", "length", length, 1, 2**31 - 1)
    if not shape:
        raise ValueError("in_blocks needs the lengths of a block, got none.")

    def pool(score: jax.Array) -> jax.Array:
        if score.ndim < len(shape):
            raise ValueError(
                f"in_blocks needs arrays of {len(shape)} axes or more for blocks of "
                f"shape {list(shape)}, got {_check.describe(score)}. Leave this leaf "
                "out with `where`."
            )
        ones = (1,) * (score.ndim - len(shape))
        sizes = (*ones, *shape)
        edges = [(0, -d % s) for d, s in zip(score.shape, sizes, strict=True)]
        # A sum of many 16-bit scores needs float32, in which they are compared anyway.
        total = _block_sums(jnp.pad(score.astype(jnp.float32), edges), sizes)
        one = np.ones((*ones, *score.shape[len(ones) :]), np.float32)
        return total / _block_sums(np.pad(one, edges), sizes)

    def expand(mask: jax.Array, like: jax.Array) -> jax.Array:
        for axis, length in zip(range(-len(shape), 0), shape, strict=True):
            mask = jnp.repeat(mask, length, axis=axis)
        return mask[tuple(map(slice, like.shape))]

    return _pooled(budget, pool, expand)


def _block_sums(x: Any, sizes: Sequence[int]) -> Any:
    """The sum of each block of an array whose axes the lengths divide."""
    cut = [n for d, s in zip(x.shape, sizes, strict=True) for n in (d // s, s)]
    return x.reshape(cut).sum(axis=tuple(range(1, 2 * x.ndim, 2)))


def in_units(budget: Budget, axis: int = -1) -> Budget:
    """A budget that keeps or removes whole units: the slices along one axis.

    Li et al., "Pruning Filters for Efficient ConvNets", arXiv:1608.08710, with
    `magnitude`; the score of a unit is the mean, not the sum, so that a global budget
    may compare leaves.

    Args:
      budget: what decides about units: `leaf_budget`, `global_budget`. It sees one
        score for each unit, float[d], and its counts are exact in units.
      axis: the axis that holds the units. The last one of a Flax kernel is its output.

    Returns:
      A `Budget`; its masks have the shapes of the leaves.

    Raises:
      ValueError: from the budget, if a leaf does not have the axis.

    >>> score = {"a": jnp.array([[1.0, 2.0, 4.0], [1.0, 2.0, 0.0]])}
    >>> in_units(lambda s, _: {"a": s["a"] > 1.5})(score, 0.5)["a"]
    Array([[False,  True,  True],
           [False,  True,  True]], dtype=bool)
    """

    def pool(score: jax.Array) -> jax.Array:
        kept = axis_of("in_units", score, axis)
        others = tuple(a for a in range(score.ndim) if a != kept)
        return jnp.mean(score, axis=others, dtype=jnp.float32)

    def expand(mask: jax.Array, like: jax.Array) -> jax.Array:
        lengths = [1] * like.ndim
        lengths[axis] = like.shape[axis]
        return jnp.broadcast_to(mask.reshape(lengths), like.shape)

    return _pooled(budget, pool, expand)


def _pooled(
    budget: Budget,
    pool: Callable[[jax.Array], jax.Array],
    expand: Callable[[jax.Array, jax.Array], jax.Array],
) -> Budget:
    """A budget that decides about pooled scores by another one."""

    def pooled(scores: Mapping[str, jax.Array], sparsity: Any) -> dict[str, jax.Array]:
        found = budget(_each(scores, pool), sparsity)
        return {path: expand(found[path], score) for path, score in scores.items()}

    return pooled


def _each(
    scores: Mapping[str, jax.Array], fn: Callable[[jax.Array], jax.Array]
) -> dict[str, jax.Array]:
    """``fn`` of every leaf; an error says which leaf it was."""
    done = {}
    for path, score in scores.items():
        try:
            done[path] = fn(jnp.asarray(score))
        except ValueError as error:
            raise ValueError(f"{error} (leaf {path!r})") from error
    return done
