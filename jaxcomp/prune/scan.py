"""A budget from a sensitivity scan: leaves whose loss rises less give more."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp.node import dense_of, flatten, is_compressed, resolver
from jaxcomp.prune.at_init import checked_loss, parted
from jaxcomp.prune.budgets import Budget
from jaxcomp.prune.oneshot import unique_names
from jaxcomp.prune.scores import Score, magnitude
from jaxcomp.prune.top import check_sparsity, top_mask, top_masks, zeros_of
from jaxcomp.tree import Where, check_finite, is_matrix, join, list_paths, select


class Scan(NamedTuple):
    """What `scan` found."""

    levels: tuple[float, ...]  # sparsities, rising
    base: float  # the loss of the whole params
    losses: dict[str, tuple[float, ...]]  # path -> the loss at each level


def scan(
    loss: Callable[[Any], jax.Array],
    params: Any,
    levels: Sequence[float],
    *,
    score: Score = magnitude,
    where: Where = is_matrix,
) -> Scan:
    """The loss with one leaf at a time pruned to each of some sparsities.

    Han, Pool, Tran and Dally, "Learning both Weights and Connections for Efficient
    Neural Networks", arXiv:1506.02626, section 4.3. `jaxcomp.sensitivity` does it for
    any operation and over batches; this one is for `scan_budget`.

    Args:
      loss: params -> float[]; it closes over a batch. It is compiled once, and sees
        nodes as arrays; tied leaves need a ``loss`` that calls `densify`.
      params: any pytree of arrays and nodes, concrete.
      levels: sparsities in (0, 1), each higher than the one before.
      score: tree of float[*shape] -> tree of scores, higher is better. Asked once.
      where: (path, leaf) -> bool; leaves to prune, one after the other.

    Returns:
      A `Scan`.

    Raises:
      ValueError: the levels do not rise or are out of range, nothing is selected, a
        selected leaf holds a NaN or an infinity, or a loss is one.
      TypeError: ``loss`` does not return one floating number, or ``params`` are traced.

    >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0, 4.0]])}
    >>> loss = lambda p: 30 - jnp.sum(p["a"] ** 2) - jnp.sum(p["b"] ** 2)
    >>> scan(loss, params, [0.5])
    Scan(levels=(0.5,), base=0.0, losses={'a': (1.0,), 'b': (9.0,)})
    """
    for level in levels:
        check_sparsity("scan", level)
    known = tuple(map(float, levels))
    if not known or any(a >= b for a, b in zip((0.0, *known), known, strict=False)):
        raise ValueError(
            "scan needs levels above 0, each higher than the one before, got "
            f"{list(levels)}. The loss at 0 is found in any case."
        )
    chosen = jax.tree.leaves(select(params, where, compressed=True))
    paths, leaves, treedef = flatten(join(*parted(params)))
    names = unique_names(paths)
    whole = resolver("scan", paths, flatten(params)[1])
    taken = {i: dense_of(whole(i)) for i in range(len(leaves)) if chosen[i]}
    leaves = [taken.get(i, leaf) for i, leaf in enumerate(leaves)]
    check_finite("scan", [(paths[i], leaf) for i, leaf in taken.items()])

    is_value = [_check.is_array(leaf) and not is_compressed(leaf) for leaf in leaves]
    rest = [None if v else leaf for v, leaf in zip(is_value, leaves, strict=True)]
    run = jax.jit(
        checked_loss(
            "scan", lambda whole: loss(jax.tree.unflatten(treedef, whole)), rest
        )
    )

    def loss_of(leaves: list[Any], what: str) -> float:
        pairs = zip(is_value, leaves, strict=True)
        found = run([leaf if v else None for v, leaf in pairs])
        if isinstance(found, jax.core.Tracer):
            raise TypeError(
                "scan needs concrete params and reads the losses, got traced ones. "
                "Call it outside jit."
            )
        if not math.isfinite(found):
            raise ValueError(
                f"scan needs a finite loss, got {found} {what}. Leave out the level, "
                "or the leaf with `where`."
            )
        return float(found)

    base = loss_of(leaves, "for the params as they are")
    scores = score({names[i]: leaf for i, leaf in taken.items()})

    def at(i: int, level: float) -> float:
        mask = top_mask(scores[names[i]], level)
        pruned = jnp.where(mask, taken[i], jnp.zeros((), taken[i].dtype))
        changed = [*leaves[:i], pruned, *leaves[i + 1 :]]
        return loss_of(changed, f"with leaf {names[i]!r} at a sparsity of {level:g}")

    losses = {names[i]: tuple(at(i, level) for level in known) for i in taken}
    return Scan(known, base, losses)


def scan_budget(scan: Scan) -> Budget:
    """A budget that lets the loss of every leaf rise by the same bound.

    Han et al., arXiv:1506.02626, section 4.3, choose the sparsities of layers by hand
    from such a scan. Here one bound is found that meets the sparsity asked for. The
    curve of a leaf is the rise of the loss over that of the whole params: 0 at a
    sparsity of 0, linear between the levels, and made to never fall. A leaf is pruned
    to where its curve reaches the bound, at most to the highest level. Where curves are
    flat at the bound, their leaves go the same part of the flat way.

    Args:
      scan: what `scan` found, for the leaves that are to be pruned. Others in it are
        passed over.

    Returns:
      A `Budget`, for a sparsity that is not traced. Counts are whole by the largest
      remainder, the earlier leaf first on a tie, and add up to exactly
      ``round(sparsity * total)``. It raises a ValueError if the sparsity is out of
      range, a mapping, or above what the highest level removes, or for a leaf that was
      not scanned, and a TypeError if the sparsity is traced.

    >>> found = Scan((0.5,), 1.0, {"a": (2.0,), "b": (4.0,)})
    >>> scores = {"a": jnp.arange(8.0), "b": jnp.arange(8.0)}
    >>> masks = scan_budget(found)(scores, 0.25)  # of 16, 3 to 1
    >>> [int((~mask).sum()) for mask in masks.values()]
    [3, 1]
    """
    levels = [Fraction(0), *(Fraction(str(level)) for level in scan.levels)]
    base = Fraction(scan.base)
    curves = {
        path: list(
            accumulate((Fraction(x) - base for x in losses), max, initial=Fraction(0))
        )
        for path, losses in scan.losses.items()
    }

    def budget(scores: Mapping[str, jax.Array], sparsity: Any) -> dict[str, jax.Array]:
        check_sparsity("scan_budget", sparsity)
        if isinstance(sparsity, jax.core.Tracer):
            raise TypeError(
                "scan_budget needs a known sparsity, got a traced one. Pass a Python "
                "number, as `masks` takes it; a schedule needs another budget."
            )
        unknown = [path for path in scores if path not in curves]
        if unknown:
            raise ValueError(
                f"scan_budget needs a scan of leaf {unknown[0]!r}, got one of "
                f"{list_paths(list(curves)) or 'no leaf'}. Scan with the same `where`."
            )
        if not scores:
            return {}
        sizes = [math.prod(score.shape) for score in scores.values()]
        zeros = int(zeros_of(sparsity, sum(sizes)))
        most = sum(math.ceil(levels[-1] * size) for size in sizes)
        if zeros > most:
            raise ValueError(
                f"scan_budget needs a sparsity of at most {scan.levels[-1]:g}, the "
                f"highest level of the scan, got {sparsity}. Scan higher levels."
            )
        counts = _counts(levels, [curves[path] for path in scores], sizes, zeros)
        found = top_masks(list(scores.values()), np.array(counts, np.int32))
        return dict(zip(scores, found, strict=True))

    return budget


def _counts(
    levels: list[Fraction], curves: list[list[Fraction]], sizes: list[int], zeros: int
) -> list[int]:
    """How many entries each leaf loses, ``zeros`` of them together."""
    # As the bound rises, sparsities move from corner to corner on straight lines: up to
    # a rise that some leaf has, and then along what is flat there.
    rises = sorted({rise for curve in curves for rise in curve})

    def corner(i: int) -> list[Fraction]:
        """Entries that leaves lose before and, if ``i`` is odd, behind what is flat."""
        reach = [_reach(levels, curve, rises[i // 2], i % 2 == 1) for curve in curves]
        return [size * level for size, level in zip(sizes, reach, strict=True)]

    last = 2 * len(rises) - 1
    index = bisect_left(
        range(last), Fraction(zeros), key=lambda i: sum(corner(i), Fraction(0))
    )
    low, high = corner(max(index - 1, 0)), corner(index)
    way = sum(high) - sum(low)
    # Past the end, by less than one entry a leaf, it is left to the remainders.
    part = min((zeros - sum(low)) / way, Fraction(1)) if way else 0
    exact = [a + part * (b - a) for a, b in zip(low, high, strict=True)]
    counts = [math.floor(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in order[: zeros - sum(counts)]:
        counts[i] += 1
    return counts


def _reach(
    levels: list[Fraction], curve: list[Fraction], bound: Fraction, beyond: bool
) -> Fraction:
    """The least sparsity whose rise is the bound, or the greatest that is not above."""
    i = (bisect_right if beyond else bisect_left)(curve, bound)
    if i in (0, len(curve)):
        return levels[max(i - 1, 0)]
    low, high = curve[i - 1], curve[i]
    part = (bound - low) / (high - low)
    return levels[i - 1] + part * (levels[i] - levels[i - 1])
