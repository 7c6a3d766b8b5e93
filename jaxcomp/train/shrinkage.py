"""Weights pulled towards zero while training, so that zeros and empty units appear.

The links are proximal: they shrink what the optimizer leaves and land on exact zeros.
The penalties are terms of a loss: they make weights small but hardly ever zero.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomp import _check
from jaxcomp.node import flatten, is_compressed
from jaxcomp.train.zeros import params_needed
from jaxcomp.tree import Where, is_matrix, last_key, list_paths, select


class ShrinkState(NamedTuple):
    """State of `shrink_l1`, `shrink_groups` and `shrink_coupled`."""

    count: jax.Array  # type: ignore[assignment]  # int32[], updates seen


Slices = tuple[str, int, Sequence[int]]  # path of a leaf, axis, indices along it


def shrink_l1(
    strength: float | jax.Array | optax.Schedule, *, where: Where = is_matrix
) -> optax.GradientTransformation:
    """Moves every weight towards zero by ``strength``, and to exactly zero if near.

    The proximal step of an L1 penalty after the step of the optimizer, ``w <- sign(w) *
    max(|w| - strength, 0)``: Daubechies, Defrise and De Mol, "An iterative thresholding
    algorithm for linear inverse problems with a sparsity constraint",
    arXiv:math/0307152 (ISTA); Parikh and Boyd, "Proximal Algorithms", section 6.5. With
    ``where=is_norm_scale`` it is network slimming: Liu et al., "Learning Efficient
    Convolutional Networks through Network Slimming", arXiv:1708.06519, where a
    subgradient is used and a threshold has to make the zeros afterwards.

    Behind plain gradient descent ``strength`` is the learning rate times the weight of
    the penalty. Behind an adaptive optimizer the penalty is decoupled, as AdamW's is.
    Chain it last; only `keep_zeros` may follow.

    Args:
      strength: how far, in the unit of the weights; or step -> how far. Not negative.
      where: (path, leaf) -> bool; leaves to shrink. Compressed leaves are skipped.

    Returns:
      A transformation whose ``update`` needs ``params``.

    Raises:
      TypeError: a selected leaf is not floating point.
      ValueError: ``strength`` is negative, nothing is selected, or there are no params.

    >>> tx = optax.chain(optax.sgd(0.1), shrink_l1(0.25))
    >>> params = {"kernel": jnp.array([[1.0, -0.125, -2.0]])}
    >>> updates, _ = tx.update({"kernel": jnp.zeros((1, 3))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'kernel': Array([[ 0.75,  0.  , -1.75]], dtype=float32)}
    """

    def move(u: jax.Array, p: jax.Array, reach: jax.Array) -> jax.Array:
        w = _landing(u, p)
        reach = reach.astype(w.dtype)
        return _moved(u, p, jnp.abs(w) <= reach, jnp.clip(w, -reach, reach))

    choose = partial(_chosen, "shrink_l1", where=where)
    return _link("shrink_l1", strength, choose, _leafwise(choose, move))


def shrink_groups(
    strength: float | jax.Array | optax.Schedule,
    *,
    axis: int = -1,
    where: Where = is_matrix,
) -> optax.GradientTransformation:
    """Shortens every unit of a leaf, and makes it exactly zero if it is short enough.

    The proximal step of a group lasso after the step of the optimizer, ``unit <- unit *
    max(0, 1 - strength * sqrt(size) / norm(unit))``: Yuan and Lin, "Model selection and
    estimation in regression with grouped variables", J. R. Stat. Soc. B 68, 2006; for
    the filters and channels of a net Wen et al., "Learning Structured Sparsity in Deep
    Neural Networks", arXiv:1608.03665, who use a subgradient. Chain it last; only
    `keep_zeros` may follow.

    Args:
      strength: as in `shrink_l1`: by how much the root mean square of a unit falls.
      axis: the axis that has one unit per index; of a Flax kernel -1 are the outputs.
      where: (path, leaf) -> bool; leaves to shrink. Compressed leaves are skipped.

    Raises:
      TypeError, ValueError: as `shrink_l1`, or a selected leaf has no such axis.

    >>> tx = optax.chain(optax.sgd(0.1), shrink_groups(0.5))
    >>> params = {"kernel": jnp.array([[2.0, 0.25], [2.0, -0.25]])}
    >>> updates, _ = tx.update({"kernel": jnp.zeros((2, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'kernel': Array([[1.5, 0. ],
                      [1.5, 0. ]], dtype=float32)}
    """

    def move(u: jax.Array, p: jax.Array, reach: jax.Array) -> jax.Array:
        w = _landing(u, p)
        squares, size = _unit_squares(w, axis)
        cut = _across(_cut(squares, math.sqrt(size) * reach.astype(w.dtype)), w, axis)
        return _moved(u, p, cut >= 1, cut * w)

    choose = partial(_chosen, "shrink_groups", where=where, axis=axis)
    return _link("shrink_groups", strength, choose, _leafwise(choose, move))


def shrink_coupled(
    strength: float | jax.Array | optax.Schedule, groups: Sequence[Sequence[Slices]]
) -> optax.GradientTransformation:
    """Shortens units that are spread over several leaves, each to zero as a whole.

    A unit of a net is a column of one kernel, its bias, and a row of the next kernel.
    Slices of one group share one norm and one factor, that of `shrink_groups`, so they
    reach zero in the same step. Fang et al., "DepGraph: Towards Any Structural
    Pruning", arXiv:2301.12900, shrink such groups together, by a gradient that is
    stronger for the shorter ones.

    Where two slices cross, an entry counts in both norms, and both factors take effect;
    norms are those before. The proximal map of groups that overlap has no closed form;
    this is not it. Chain it last; only `keep_zeros` may follow.

    Args:
      strength: as in `shrink_groups`.
      groups: one group a unit; a group is (path, axis, indices) triples: the slices of
        the leaf at these indices of the axis. Each slice is in one group at most.

    Returns:
      A transformation whose ``update`` needs ``params``. What is compiled grows with
      the (path, axis) pairs, not with the groups.

    Raises:
      TypeError: indices are not integers.
      ValueError: as `shrink_l1`; there are no groups; a path, an axis or an index is
        not in ``params``; or a slice is in two groups.

    >>> groups = [[("a", 1, [i]), ("b", 0, [i])] for i in range(2)]
    >>> tx = shrink_coupled(0.5, groups)
    >>> params = {"a": jnp.array([[2.0, 0.25]]), "b": jnp.array([[2.0], [-0.25]])}
    >>> still = jax.tree.map(jnp.zeros_like, params)
    >>> updates, _ = tx.update(still, tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'a': Array([[1.5, 0. ]], dtype=float32),
     'b': Array([[1.5],
                 [0. ]], dtype=float32)}
    """
    if not any(map(len, groups)):
        raise ValueError(
            f"shrink_coupled needs groups of (path, axis, indices), got {groups!r}."
        )
    find = partial(_owners, groups)

    def shrink(updates: Any, params: Any, reach: jax.Array) -> Any:
        owners = find(params)
        _, leaves, treedef = flatten(params)
        moves = treedef.flatten_up_to(updates)
        landed = {i: _landing(moves[i], leaves[i]) for i, _ in owners}
        dtype = jnp.result_type(*landed.values())
        squares, sizes = [], np.zeros(len(groups) + 1)
        for (i, axis), owner in owners.items():
            sums, size = _unit_squares(landed[i], axis)
            squares.append(sums.astype(dtype))
            sizes += size * np.bincount(owner, minlength=sizes.size)
        together = jax.ops.segment_sum(
            jnp.concatenate(squares), np.concatenate([*owners.values()]), sizes.size
        )
        cuts = _cut(together, jnp.asarray(np.sqrt(sizes), dtype) * reach.astype(dtype))
        cuts = cuts.at[-1].set(0)  # of the slices that are in no group
        for i, w in landed.items():
            cut = jnp.zeros((), w.dtype)
            for axis in (axis for j, axis in owners if j == i):
                other = _across(cuts.astype(w.dtype)[owners[i, axis]], w, axis)
                cut = cut + (1 - cut) * other  # 1 if either is 1, to the last bit
            moves[i] = _moved(moves[i], leaves[i], cut >= 1, cut * w)
        return jax.tree.unflatten(treedef, moves)

    return _link("shrink_coupled", strength, find, shrink)


def is_norm_scale(path: str, leaf: Any) -> bool:
    """Selects the scales of normalisation: floating leaves whose last key is scale.

    >>> is_norm_scale("norm/scale", jnp.ones(3))
    True
    >>> is_norm_scale("dense/kernel", jnp.ones((2, 3)))
    False
    """
    return _check.is_floating(leaf) and last_key(path) == "scale"


def l1_penalty(params: Any, *, where: Where = is_matrix) -> jax.Array:
    """The sum of the magnitudes of the selected weights, a term of a loss.

    Han et al., "Learning both Weights and Connections", arXiv:1506.02626, section 3.1.
    Its gradient is the sign, 0 at a weight of 0. `shrink_l1` also reaches exact zeros;
    an L2 penalty is `optax.add_decayed_weights`.

    Args:
      params: any pytree; compressed leaves are skipped.
      where: (path, leaf) -> bool; floating leaves.

    Returns:
      float[], float32 at least.

    >>> l1_penalty({"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.ones(2)})
    Array(3., dtype=float32)
    """
    # The gradient of jnp.abs at 0 is 1, which would move what is pruned.
    return _total(
        lambda w: jnp.sum(w * jax.lax.stop_gradient(jnp.sign(w))),
        _chosen("l1_penalty", params, where),
        params,
    )


def group_penalty(
    params: Any, *, axis: int = -1, where: Where = is_matrix
) -> jax.Array:
    """The sum over units of ``sqrt(size) * norm(unit)``, a term of a loss.

    The group lasso: Wen et al., arXiv:1608.03665. `shrink_groups` is its proximal step.
    The gradient at a unit of zeros is 0.

    Args:
      params: any pytree; compressed leaves are skipped.
      axis: the axis that has one unit per index.
      where: (path, leaf) -> bool; floating leaves.

    Returns:
      float[], float32 at least.

    >>> group_penalty({"kernel": jnp.full((4, 2), 0.5)})
    Array(4., dtype=float32)
    """
    chosen = _chosen("group_penalty", params, where, axis)

    def norms(w: jax.Array) -> jax.Array:
        squares, size = _unit_squares(w, axis)
        empty = squares == 0
        # The inner `where`: the root of 0 has no finite gradient, and 0 * inf is NaN.
        norm = jnp.where(empty, 0, jnp.sqrt(jnp.where(empty, 1, squares)))
        return math.sqrt(size) * jnp.sum(norm)

    return _total(norms, chosen, params)


def _link(
    caller: str,
    strength: float | jax.Array | optax.Schedule,
    check: Callable[[Any], Any],
    shrink: Callable[[Any, Any, jax.Array], Any],
) -> optax.GradientTransformation:
    if not callable(strength):
        known = _check.number(caller, "strength", strength)
        if known is not None and known < 0:
            raise ValueError(f"{caller} needs strength >= 0, got {strength}.")

    def init(params: Any) -> ShrinkState:
        check(params)
        return ShrinkState(jnp.zeros([], jnp.int32))

    def update(
        updates: Any, state: ShrinkState, params: Any = None
    ) -> tuple[Any, ShrinkState]:
        params_needed(caller, params)
        reach = strength(state.count) if callable(strength) else strength
        updates = shrink(updates, params, jnp.asarray(reach, jnp.float32))
        return updates, ShrinkState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _leafwise(choose: Callable[[Any], Any], move: Callable[..., jax.Array]) -> Any:
    return lambda updates, params, reach: jax.tree.map(
        lambda c, u, p: move(u, p, reach) if c else u, choose(params), updates, params
    )


def _landing(u: jax.Array, p: jax.Array) -> jax.Array:
    """Where the update would leave the weight, not yet rounded to 16 bits."""
    dtype = _check.wide(jnp.promote_types(u.dtype, p.dtype))
    return p.astype(dtype) + u.astype(dtype)


def _moved(u: jax.Array, p: jax.Array, dead: jax.Array, taken: jax.Array) -> jax.Array:
    """The update less what is taken off the weight; ``-p`` where the weight dies."""
    dtype = jnp.promote_types(u.dtype, p.dtype)
    less = u.astype(taken.dtype) - taken  # not w - p, which would round u to ulps of w
    return jnp.where(dead, -p.astype(dtype), less.astype(dtype))


def _unit_squares(w: jax.Array, axis: int) -> tuple[jax.Array, int]:
    """The sum of squares of each slice along an axis: float[d]; entries of a slice."""
    axis %= w.ndim
    others = tuple(a for a in range(w.ndim) if a != axis)
    return jnp.sum(w * w, axis=others), math.prod(w.shape[a] for a in others)


def _cut(squares: jax.Array, reach: jax.Array) -> jax.Array:
    """The fraction that is cut off a norm, 1 if the norm is no more than ``reach``.

    The fraction and not the factor that is left: 1 - 1e-6 has lost its digits.
    """
    norm = jnp.sqrt(squares)
    dead = norm <= reach  # False for a NaN, which must show
    return jnp.where(dead, 1, reach / jnp.where(dead, 1, norm))


def _across(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    """float[d] laid along an axis of ``w``."""
    axis %= w.ndim
    return x.reshape([w.shape[axis] if a == axis else 1 for a in range(w.ndim)])


def _chosen(caller: str, params: Any, where: Where, axis: int | None = None) -> Any:
    """A tree of bools, once every leaf that is chosen is known to have the axis."""
    chosen = select(params, where)
    paths, leaves, treedef = flatten(params)
    taken = treedef.flatten_up_to(chosen)
    for path, leaf, is_taken in zip(paths, leaves, taken, strict=True):
        if is_taken:
            _check.floating(caller, leaf)
            if axis is not None:
                _check_axis(caller, axis, path, leaf)
    return chosen


def _check_axis(caller: str, axis: int, path: str, leaf: jax.Array) -> None:
    if not -leaf.ndim <= axis < leaf.ndim:
        raise ValueError(
            f"{caller} needs an axis of leaf {path!r} {_check.describe(leaf)}, got "
            f"axis={axis}. Pass another, or leave this leaf out."
        )


def _total(fn: Callable[[jax.Array], jax.Array], chosen: Any, params: Any) -> jax.Array:
    """The sum of ``fn`` over the chosen leaves, in float32 at least."""
    _, leaves, treedef = flatten(params)
    pairs = zip(treedef.flatten_up_to(chosen), leaves, strict=True)
    terms = [fn(leaf.astype(_check.wide(leaf.dtype))) for taken, leaf in pairs if taken]
    return sum(terms, start=jnp.zeros([], jnp.float32))


def _owners(
    groups: Sequence[Sequence[Slices]], params: Any
) -> dict[tuple[int, int], np.ndarray]:
    """Whose each slice of a (leaf, axis) is: int[d], ``len(groups)`` if nobody's."""
    paths, leaves, _ = flatten(params)
    place = {
        paths[i]: i
        for i, leaf in enumerate(leaves)
        if _check.is_floating(leaf) and not is_compressed(leaf)
    }
    owners: dict[tuple[int, int], np.ndarray] = {}

    def add(group: int, path: str, axis: int, indices: Sequence[int]) -> None:
        if path not in place:
            raise ValueError(
                f"shrink_coupled needs paths of floating arrays, got {path!r} in group "
                f"{group}. The {len(place)} of params are {list_paths(list(place))}."
            )
        leaf = leaves[place[path]]
        _check_axis("shrink_coupled", axis, path, leaf)
        length, at = leaf.shape[axis], np.asarray(indices)
        slices = f"axis {axis} of leaf {path!r} {_check.describe(leaf)}"
        if at.ndim != 1 or not np.issubdtype(at.dtype, np.integer):
            raise TypeError(
                f"shrink_coupled needs a sequence of integers for {slices}, got "
                f"{indices!r} in group {group}."
            )
        outside = at[(at < 0) | (at >= length)]
        if outside.size:
            raise ValueError(
                f"shrink_coupled needs indices in [0, {length}) for {slices}, got "
                f"{outside[0]} in group {group}."
            )
        nobody = np.full(length, len(groups))
        owner = owners.setdefault((place[path], axis % leaf.ndim), nobody)
        twice = at[(owner[at] != len(groups)) & (owner[at] != group)]
        if twice.size:
            raise ValueError(
                f"shrink_coupled needs each slice in one group, got index {twice[0]} "
                f"of {slices} in groups {owner[twice[0]]} and {group}. Join them."
            )
        owner[at] = group

    for group, triples in enumerate(groups):
        for triple in triples:
            add(group, *triple)
    return owners
