"""How much each group is worth by what flows into the weights that read it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp.prune.group_scores import Counts, GroupScore, entries, scored
from jaxcomp.prune.groups import Member
from jaxcomp.tree import list_paths


def by_inputs(
    values: Mapping[str, jax.Array], axes: Mapping[str, Sequence[int]]
) -> GroupScore:
    """A score that is read off what flows into the weights.

    With one minus the fraction of zeros it is that of Hu et al., "Network Trimming",
    arXiv:1607.03250; with entropies that of Luo and Wu, "An Entropy-based Pruning
    Method", arXiv:1706.05791; with the ranks of feature maps that of Lin et al.,
    "HRank", arXiv:2002.10179.

    Args:
      values: path of a weight -> float[..., *lengths], a number for each index of its
        contracted axes, in order; more axes, e.g. of layers, come before them.
      axes: path -> which axes of the weight are contracted.

    Returns:
      A `GroupScore`: the mean over what a group owns of the inputs of a weight, and
      over the weights that read it.

    Raises:
      ValueError: the score raises as `group_l1`, if no weight with a value reads a
        family, or if a value has other lengths.

    >>> from jaxcomp.prune.groups import Family, Member
    >>> score = by_inputs({"w": jnp.array([0.5, 0.0])}, {"w": (0,)})
    >>> family = Family("units", (Member("w", 0, np.array([[0], [1]])),), True, "")
    >>> score({"w": jnp.ones((2, 3))}, [family])
    {'units': Array([0.5, 0. ], dtype=float32)}
    """

    def mean(m: Member, w: jax.Array) -> jax.Array:
        value, taken = jnp.asarray(values[m.path]), tuple(axes[m.path])
        lengths, before = tuple(w.shape[a] for a in taken), value.ndim - len(taken)
        if before < 0 or value.shape[before:] != lengths:
            raise ValueError(
                f"by_inputs needs values of the lengths {list(lengths)} of axes "
                f"{list(taken)} of leaf {m.path!r}, got {_check.describe(value)}."
            )
        m = m._replace(axis=before + taken.index(m.axis))
        return jnp.mean(entries(m, value.astype(jnp.float32)), axis=1)

    return lambda params, families: scored(
        *("by_inputs", params, families, *_reads(values, axes)),
        lambda slices: sum(mean(m, w) for m, w in slices) / len(slices),
    )


def group_obs(
    moments: Mapping[str, jax.Array],
    axes: Mapping[str, Sequence[int]],
    *,
    damp: float = 0.01,
) -> GroupScore:
    """How much the outputs change without a group, once the other weights make up.

    Frantar and Alistarh, "Optimal Brain Compression", arXiv:2208.11580, for the rows
    that read a group, as Kurtic et al., "ZipLM", arXiv:2302.04089: for the rows ``w``
    of a group and the inverse ``G`` of its damped second moment, ``w' inv(G_group) w``
    summed over the outputs. That is the least squared error that remains, summed over
    the rows of inputs.

    Args:
      moments: path of a weight -> float[n, n], the second moment ``X'X`` of its inputs
        over its contracted axes in C order.
      axes: path -> which axes of the weight are contracted.
      damp: of the mean of the diagonal, this much is added to it; above 0.

    Returns:
      A `GroupScore`, the sum over the weights that read a group.

    Raises:
      ValueError: ``damp`` is not above 0; the score raises as `by_inputs`.
    """
    known = _check.number("group_obs", "damp", damp)
    if known is not None and known <= 0:
        raise ValueError(f"group_obs needs damp > 0, got {damp}.")

    def cost(m: Member, w: jax.Array) -> jax.Array:
        moment, taken = jnp.asarray(moments[m.path]), tuple(axes[m.path])
        lengths = tuple(w.shape[a] for a in taken)
        n = int(np.prod(lengths))
        if moment.shape != (n, n):
            raise ValueError(
                f"group_obs needs a moment of shape {[n, n]} for axes {list(taken)} of "
                f"leaf {m.path!r}, got {_check.describe(moment)}."
            )
        rows = jnp.moveaxis(w, taken, range(len(taken))).reshape(n, -1)
        places = np.moveaxis(np.arange(n).reshape(lengths), taken.index(m.axis), 0)
        own = places[m.indices].reshape(len(m.indices), -1)
        return _removal_costs(rows, moment.astype(w.dtype), own, damp)

    return lambda params, families: scored(
        *("group_obs", params, families, *_reads(moments, axes)),
        lambda slices: sum(cost(m, w) for m, w in slices),
    )


@jax.jit
def _removal_costs(
    rows: jax.Array, moment: jax.Array, own: jax.Array, damp: jax.Array
) -> jax.Array:
    """float[groups]: what it costs to take the rows at int[groups, k] out."""
    scale = jnp.mean(jnp.diagonal(moment))  # 0 if nothing ever comes in
    moment = moment / jnp.where(scale > 0, scale, 1)
    inverse = jnp.linalg.inv(moment + damp * jnp.eye(len(rows), dtype=rows.dtype))

    def cost(own: jax.Array) -> jax.Array:
        root = jnp.linalg.cholesky(inverse[own[:, None], own[None]])
        left = jax.scipy.linalg.solve_triangular(root, rows[own], lower=True)
        return scale * jnp.sum(left**2)

    return jax.vmap(cost)(own)


def _reads(
    values: Mapping[str, Any], axes: Mapping[str, Sequence[int]]
) -> tuple[str, Counts]:
    return (
        f"a weight that reads it, of those observed ({list_paths(list(values))}),",
        lambda m, _: m.path in values and m.axis in axes.get(m.path, ()),
    )
