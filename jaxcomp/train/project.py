"""Weights that land on a grid while they train: all at times, or more and more of them.

Links of a chain, for the end of it: each rewrites the update so that
`optax.apply_updates` lands on the value that it wants.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp import _check
from jaxcomp.node import dense_of, flatten
from jaxcomp.prune.top import top_masks, zeros_of
from jaxcomp.train.gradual import all_kept
from jaxcomp.train.zeros import params_needed, when
from jaxcomp.tree import Where, is_matrix, select


class ProjectState(NamedTuple):
    """State of `project`."""

    count: jax.Array  # type: ignore[assignment]  # int32[], updates seen


class HardenState(NamedTuple):
    """State of `harden`."""

    count: jax.Array  # type: ignore[assignment]  # int32[], updates seen
    share: jax.Array  # float32[], that was fixed last
    free: Any  # bool, like params; False is fixed; a leaf that trains has a scalar True


def project(
    fn: Callable[[jax.Array], Any], every: int, *, where: Where = is_matrix
) -> optax.GradientTransformation:
    """Replaces the weights by ``fn`` of them, every ``every`` steps.

    Jin, Yuan, Feng and Yan, "Training Skinny Deep Neural Networks with Iterative Hard
    Thresholding Methods", arXiv:1607.05423, with any projection in place of theirs, of
    a single step. Between two projections all weights are free; after ``n * every``
    steps they are on the grid. A projection takes the place of a step: the update of
    that step is dropped, though moments have seen its gradient. So ``fn`` sees the
    weights as they come in, and XLA need not write every update to memory for it.

    Args:
      fn: float[*shape] -> float[*shape] or a node, e.g. ``partial(jc.quantize,
        bits=4)``. It runs under jit.
      every: steps from one projection to the next, at least 2.
      where: (path, leaf) -> bool; leaves to project. Compressed leaves are skipped.

    Returns:
      A transformation whose ``update`` needs ``params``. Where ``fn`` gives 0, or from
      half to twice the weight, the weight lands on it exactly; elsewhere as near as a
      sum with the old weight can be, an ulp of the larger of both.

    Raises:
      ValueError: ``every`` is less than 2, nothing is selected, ``fn`` changes a shape,
        or ``update`` is called without ``params``.

    >>> params = {"kernel": jnp.array([[0.75, 0.125]])}
    >>> tx = project(lambda w: jnp.round(w), every=2)
    >>> state, move = tx.init(params), {"kernel": jnp.full((1, 2), 0.5)}
    >>> for _ in range(2):
    ...     updates, state = tx.update(move, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params["kernel"])
    [[1.25  0.625]]
    [[1. 1.]]
    """
    _check.integer_within("project", "every", every, 2, 2**31 - 1)

    def init(params: Any) -> ProjectState:
        select(params, where)
        return ProjectState(jnp.zeros([], jnp.int32))

    def update(
        updates: Any, state: ProjectState, params: Any = None
    ) -> tuple[Any, ProjectState]:
        params_needed("project", params)
        due = state.count % every == every - 1
        paths, weights = selected_leaves(params, where)

        def projected() -> dict[int, jax.Array]:
            return {
                i: _value_of("project", fn, paths[i], p) for i, p in weights.items()
            }

        targets = jax.lax.cond(due, projected, lambda: weights)
        moves = {
            i: _move(due, targets[i], weights[i], u)
            for i, u in paired(updates, params, weights)
        }
        state = ProjectState(optax.safe_increment(state.count))
        return exchanged(updates, params, moves), state

    return optax.GradientTransformation(init, update)


def harden(
    fn: Callable[[jax.Array], Any],
    share: optax.Schedule,
    *,
    every: int = 100,
    where: Where = is_matrix,
) -> optax.GradientTransformation:
    """Fixes more and more weights on a grid, the largest first; the others train on.

    Zhou, Yao, Guo, Xu and Chen, "Incremental Network Quantization", arXiv:1702.03044,
    with its partition by magnitude. There the grid is that of powers of two below the
    largest weight; here it is that of ``fn``. As there it must not move: weights that
    are fixed early lie on the grid of that time. Pass ``partial(jc.quantize_step,
    bits=4, step=...)``, not a grid whose scale follows the weights.

    Weights are fixed every ``every`` steps while the schedule rises, and on the step at
    which it stops, so that 1 is reached whatever ``every`` is. A weight that is being
    fixed lands on its value in place of taking its update, and never moves again.

    Args:
      fn: float[*shape] -> float[*shape] or a node. It runs under jit.
      share: step -> fraction of the weights of each leaf that are fixed, in [0, 1]. The
        paper goes through 0.5, 0.75, 0.875 and 1. Where it falls nothing is freed.
      every: steps between two choices.
      where: (path, leaf) -> bool; leaves to harden. Compressed leaves are skipped.

    Returns:
      A transformation whose ``update`` needs ``params``. Counts are exact; on a tie the
      earlier weight is fixed first. Weights land as exactly as with `project`.

    Raises:
      ValueError: ``every`` is less than 1, nothing is selected, ``fn`` changes a shape,
        or ``update`` is called without ``params``.

    >>> tx = harden(lambda w: jnp.round(w), lambda step: 0.5, every=10)
    >>> params = {"kernel": jnp.array([[0.7, -0.25, 0.25, -1.2]])}
    >>> move = {"kernel": jnp.full((1, 4), 0.5)}
    >>> updates, _ = tx.update(move, tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'kernel': Array([[ 1.  ,  0.25,  0.75, -1.  ]], dtype=float32)}
    """
    _check.integer_within("harden", "every", every, 1, 2**31 - 1)

    def init(params: Any) -> HardenState:
        zero = jnp.zeros([], jnp.float32)
        return HardenState(jnp.zeros([], jnp.int32), zero, all_kept(params, where))

    def update(
        updates: Any, state: HardenState, params: Any = None
    ) -> tuple[Any, HardenState]:
        params_needed("harden", params)

        def at(step: jax.Array) -> jax.Array:
            return jnp.clip(jnp.asarray(share(step), jnp.float32), 0, 1)

        level = at(state.count)
        stops = at(state.count + 1) <= level
        due = ((state.count % every == 0) | stops) & (level > state.share)
        paths, weights = selected_leaves(params, where)
        _, leaves, treedef = flatten(state.free)

        def harder(held: Any) -> Any:
            free, values = held
            worth = {
                i: jnp.where(free[i], jnp.abs(p), jnp.inf) for i, p in values.items()
            }
            counts = [p.size - zeros_of(level, p.size) for p in values.values()]
            fixed = top_masks(list(worth.values()), jnp.asarray(counts, jnp.int32))
            left = {i: free[i] & ~top for i, top in zip(values, fixed, strict=True)}
            landed = {
                i: jnp.where(
                    free[i] & ~left[i], _value_of("harden", fn, paths[i], p), p
                )
                for i, p in values.items()
            }
            return left, landed

        held = {i: leaves[i] for i in weights}, weights
        free, targets = when(due, harder, held)
        moves = {
            i: _move(~free[i], targets[i], weights[i], u)
            for i, u in paired(updates, params, weights)
        }
        state = HardenState(
            optax.safe_increment(state.count),
            jnp.where(due, level, state.share),
            jax.tree.unflatten(
                treedef, [free.get(i, leaf) for i, leaf in enumerate(leaves)]
            ),
        )
        return exchanged(updates, params, moves), state

    return optax.GradientTransformation(init, update)


def selected_leaves(
    params: Any, where: Where
) -> tuple[list[str], dict[int, jax.Array]]:
    """The paths of all leaves, and the selected weights by their position."""
    chosen = jax.tree.leaves(select(params, where))
    paths, leaves, _ = flatten(params)
    rows = enumerate(zip(leaves, chosen, strict=True))
    return paths, {i: dense_of(leaf) for i, (leaf, taken) in rows if taken}


def paired(
    updates: Any, params: Any, weights: dict[int, jax.Array]
) -> list[tuple[int, jax.Array]]:
    """Positions and updates of the selected weights."""
    leaves = flatten(params)[2].flatten_up_to(updates)
    return [(i, leaves[i]) for i in weights]


def _move(lands: jax.Array, target: jax.Array, p: jax.Array, u: jax.Array) -> jax.Array:
    """The update to a target where ``lands``, in the dtype that the sum has."""
    wide = max(p.dtype, u.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    return jnp.where(lands, target.astype(wide) - p.astype(wide), u.astype(wide))


def exchanged(updates: Any, params: Any, moves: dict[int, jax.Array]) -> Any:
    """``updates`` with those of the selected weights exchanged."""
    treedef = flatten(params)[2]
    leaves = enumerate(treedef.flatten_up_to(updates))
    return jax.tree.unflatten(treedef, [moves.get(i, u) for i, u in leaves])


def _value_of(
    caller: str, fn: Callable[[jax.Array], Any], path: str, p: jax.Array
) -> jax.Array:
    value = dense_of(fn(p))
    if value.shape != p.shape:
        raise ValueError(
            f"{caller} needs fn to give an array of the shape of the weights, got "
            f"{_check.describe(value)} for {_check.describe(p)} at {path!r}."
        )
    return value.astype(p.dtype)
