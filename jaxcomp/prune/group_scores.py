"""How much each group of a family is worth: higher is better.

A group score maps parameters and families to a number for each group, name of a family
-> float32[groups]. Where two members of one family cross, as in a square kernel on one
stream, the entry counts in both. Groups are gathered, so all scores can be jitted.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.node import flatten
from jaxcomp.prune.groups import Family, Member, member_leaves
from jaxcomp.tree import Where, is_trained, last_key, list_paths


GroupScore = Callable[[Any, Sequence[Family]], dict[str, jax.Array]]
Slices = list[tuple[Member, jax.Array]]  # members, each with its leaf
Counts = Callable[[Member, jax.Array], bool]  # whether a member does


def group_l1(
    params: Any, families: Sequence[Family], *, where: Where = is_trained
) -> dict[str, jax.Array]:
    """The sum of the magnitudes of all that a group owns.

    Li et al., "Pruning Filters for Efficient ConvNets", arXiv:1608.08710, who sum over
    the filter alone.

    Args:
      params: any pytree of arrays and nodes.
      families: what is coupled, see `jaxcomp.program.coupled_groups`.
      where: (path, leaf) -> bool; leaves whose slices count.

    Raises:
      ValueError: ``params`` lacks a leaf of a family, or has it in a smaller shape, or
        no leaf of a family counts. All scores raise these.

    >>> rows = Member("w", 0, np.array([[0], [1]]))
    >>> params = {"w": jnp.array([[1.0, -2.0], [4.0, 0.0]])}
    >>> group_l1(params, [Family("units", (rows,), True, "")])
    {'units': Array([3., 4.], dtype=float32)}
    """
    return scored(
        *("group_l1", params, families, *_selects(where)),
        lambda slices: sum(_sums(m, jnp.abs(w)) for m, w in slices),
    )


def group_l2(
    params: Any, families: Sequence[Family], *, where: Where = is_trained
) -> dict[str, jax.Array]:
    """The Euclidean norm of all that a group owns; arguments as `group_l1`."""
    return scored(
        *("group_l2", params, families, *_selects(where)),
        lambda slices: jnp.sqrt(sum(_sums(m, w * w) for m, w in slices)),
    )


def group_squares(
    params: Any, families: Sequence[Family], *, where: Where = is_trained
) -> dict[str, jax.Array]:
    """The sum of squares of a group's slices, the mean of its members.

    Fang et al., "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900, as in the
    authors' code, which compares families by ``normalized(group_squares)``. There
    biases do not count: leave them out with ``where``. Arguments as `group_l1`.
    """
    return scored(
        *("group_squares", params, families, *_selects(where)),
        lambda slices: sum(_sums(m, w * w) for m, w in slices) / len(slices),
    )


def group_scale(params: Any, families: Sequence[Family]) -> dict[str, jax.Array]:
    """The magnitude of the scale that a norm gives to a group; the mean of several.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming",
    arXiv:1708.06519. Leaves whose last key is scale count; every family needs one.
    """
    return scored(
        *("group_scale", params, families, "a leaf whose last key is scale"),
        lambda m, _: last_key(m.path) == "scale",
        lambda slices: (
            sum(jnp.mean(entries(m, jnp.abs(w)), axis=1) for m, w in slices)
            / len(slices)
        ),
    )


def group_distance(
    params: Any, families: Sequence[Family], *, where: Where = is_trained
) -> dict[str, jax.Array]:
    """The sum of a group's Euclidean distances to the others of its family.

    He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural
    Networks Acceleration", arXiv:1811.00250: a filter that is near all others can be
    replaced by them. Here it is all that the group owns. It takes ``groups**2 *
    entries`` steps. Arguments as `group_l1`.
    """

    def distances(slices: Slices) -> jax.Array:
        x = jnp.concatenate([entries(m, w) for m, w in slices], axis=1)
        # Differences, not a product of matrices, so that equal groups tie.
        return jax.lax.map(
            lambda row: jnp.sum(jnp.sqrt(jnp.sum((x - row[None]) ** 2, axis=1))), x
        )

    return scored("group_distance", params, families, *_selects(where), distances)


def random_groups(key: jax.Array) -> GroupScore:
    """A score that is drawn at random, uniform in [0, 1): the baseline.

    Args:
      key: a JAX random key; each family gets a key of its own.
    """

    def score(params: Any, families: Sequence[Family]) -> dict[str, jax.Array]:
        pairs = zip(jax.random.split(key, len(families)), families, strict=True)
        return {f.name: jax.random.uniform(k, (f.size,), jnp.float32) for k, f in pairs}

    return score


def normalized(
    score: GroupScore, by: Callable[[jax.Array], jax.Array] = jnp.mean
) -> GroupScore:
    """A score that is divided by the mean of its family, so that families compare.

    Fang et al., arXiv:2301.12900; in the paper by the mean of the largest of a family,
    in the authors' code by that of all.

    Args:
      score: a `GroupScore` without negative numbers.
      by: float[groups] -> float[], e.g. ``jnp.max``. Where it is 0 nothing is divided.

    >>> score = normalized(lambda params, families: {"units": jnp.array([1.0, 3.0])})
    >>> score(None, ())
    {'units': Array([0.5, 1.5], dtype=float32)}
    """

    def divided(x: jax.Array) -> jax.Array:
        unit = by(x)
        return x / jnp.where(unit == 0, jnp.ones_like(unit), unit)

    return lambda params, families: {
        name: divided(x) for name, x in score(params, families).items()
    }


def group_taylor(grads: Any, *, where: Where = is_trained) -> GroupScore:
    """How much the loss changes without a group, to first order and squared.

    Molchanov et al., "Importance Estimation for Neural Network Pruning",
    arXiv:1906.10771: ``sum(gradient * weight)**2``, the mean over batches. The paper
    sums over a filter or over the gate of a norm, here over all that a group owns.

    Args:
      grads: float[batches, *shape], shaped like the parameters: the gradient of each
        batch, e.g. ``jax.vmap(jax.grad(loss), (None, 0))(params, batches)``. Leaves
        that do not count may be missing.
      where: as in `group_l1`.

    Raises:
      ValueError: the score raises as `group_l1`, or if a gradient does not fit.
    """

    def taylor(table: Mapping[str, Any], slices: Slices) -> jax.Array:
        def change(rows: list[jax.Array]) -> Any:
            pairs = zip(slices, rows, strict=True)
            return sum(_sums(m, w * g.astype(w.dtype)) for (m, w), g in pairs)

        rows = [_like("group_taylor", table, m, w, 1) for m, w in slices]
        return jnp.mean(jax.lax.map(change, rows) ** 2, axis=0)

    return lambda params, families: scored(
        *("group_taylor", params, families, *_selects(where)),
        partial(taylor, dict(zip(*flatten(grads)[:2], strict=True))),
    )


def group_obd(curvature: Any, *, where: Where = is_trained) -> GroupScore:
    """How much the loss grows without a group: half of ``h * weight**2``, summed.

    LeCun, Denker and Solla, "Optimal Brain Damage", NIPS 1989, for groups: the first
    order is 0 where training has ended, and of the Hessian the diagonal counts.

    Args:
      curvature: float[*shape], shaped like the parameters: the diagonal of the Hessian,
        or an estimate, such as the mean of the squared gradients of single examples.
        Leaves that do not count may be missing.
      where: as in `group_l1`.

    Raises:
      ValueError: the score raises as `group_l1`, or if a curvature does not fit.
    """

    def growth(table: Mapping[str, Any], slices: Slices) -> Any:
        pairs = [(m, w, _like("group_obd", table, m, w, 0)) for m, w in slices]
        return sum(_sums(m, h.astype(w.dtype) * w * w) / 2 for m, w, h in pairs)

    return lambda params, families: scored(
        *("group_obd", params, families, *_selects(where)),
        partial(growth, dict(zip(*flatten(curvature)[:2], strict=True))),
    )


def scored(
    caller: str,
    params: Any,
    families: Sequence[Family],
    need: str,
    counts: Counts,
    score: Callable[[Slices], Any],
) -> dict[str, jax.Array]:
    """``score`` of the members of each family that count, in float32 at least."""
    table = member_leaves(caller, params, families)
    found = {}
    for family in families:
        slices = [(m, jnp.asarray(table[m.path])) for m in family.members]
        slices = [(m, w) for m, w in slices if counts(m, w)]
        if not slices:
            members = [f"{m.path} axis {m.axis}" for m in family.members]
            raise ValueError(
                f"{caller} needs {need} in family {family.name!r}, got "
                f"{list_paths(members)}. Leave the family out, or take another score."
            )
        wide = [
            (m, w.astype(jnp.promote_types(w.dtype, jnp.float32))) for m, w in slices
        ]
        found[family.name] = score(wide)
    return found


def _selects(where: Where) -> tuple[str, Counts]:
    return "a leaf that `where` selects", lambda m, w: where(m.path, w)


def _sums(member: Member, x: jax.Array) -> jax.Array:
    """float[groups]: the sum of what each group owns of an array."""
    others = tuple(a for a in range(x.ndim) if a != member.axis)
    return jnp.sum(jnp.sum(x, axis=others)[member.indices], axis=1)


def entries(member: Member, x: jax.Array) -> jax.Array:
    """float[groups, entries]: what each group owns of an array."""
    taken = jnp.moveaxis(x, member.axis, 0)[member.indices]
    return taken.reshape(len(member.indices), -1)


def _like(
    caller: str, table: Mapping[str, Any], member: Member, w: jax.Array, before: int
) -> jax.Array:
    """The leaf of another tree, with so many axes before those of the weight."""
    shape = np.shape(table.get(member.path, ()))
    if shape[before:] != w.shape or len(shape) != before + w.ndim:
        needed = f"[{'batches, ' * before}{str(list(w.shape))[1:]}"
        raise ValueError(
            f"{caller} needs a leaf {member.path!r} of shape {needed} in the tree that "
            f"it was made with, got {list(shape)}. Make that tree from the params."
        )
    return jnp.asarray(table[member.path])
