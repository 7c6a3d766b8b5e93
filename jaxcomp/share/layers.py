"""Which layers share: by name, by a pattern of repetition, or because they are alike.

What these functions give is plain data, the ``groups`` of `tie_layers`. A layer that
would be alone in its group is left out: it keeps its own arrays.
"""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from jaxcomp import _check
from jaxcomp.node import flatten, is_compressed
from jaxcomp.share.tie import members_of
from jaxcomp.tree import check_finite, list_paths


Groups = list[tuple[str, ...]]

_CHUNK = 2**16  # columns compared at a time, which stay in the cache


def layers_of(params: Any, pattern: str) -> list[str]:
    """The paths of the subtrees and leaves that a pattern matches, in natural order.

    Args:
      params: any pytree.
      pattern: a shell pattern for each key, e.g. ``"encoder/block_*"``: ``*`` stands
        for any characters but ``/``, ``?`` for one, ``[ab]`` for one of these.

    Returns:
      Paths with as many keys as the pattern, ``block_2`` before ``block_10``.

    Raises:
      ValueError: it matches nothing. The error lists real paths.

    >>> layers_of({"block_10": {"w": 1.0}, "block_2": {"w": 1.0}}, "block_*")
    ['block_2', 'block_10']
    """
    keys = pattern.split("/")
    paths = flatten(params)[0]
    deep = [p.split("/")[: len(keys)] for p in paths if p.count("/") >= len(keys) - 1]
    there = list(dict.fromkeys("/".join(path) for path in deep))
    found = [path for path in there if _matches(path.split("/"), keys)]
    if not found:
        raise ValueError(
            f"layers_of found nothing that {pattern!r} matches. The {len(paths)} "
            f"leaves are {list_paths(paths)}; with as many keys as the pattern there "
            f"are {len(there)} paths: {list_paths(there) or 'none'}."
        )
    return sorted(found, key=_natural)


def _matches(keys: list[str], patterns: list[str]) -> bool:
    return all(fnmatchcase(*pair) for pair in zip(keys, patterns, strict=True))


def _natural(path: str) -> list[Any]:
    """Text and numbers in turn, so that numbers are compared as such."""
    parts = re.split("([0-9]+)", path)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def every(layers: Sequence[str], period: int) -> Groups:
    """Groups of the layers that are ``period`` apart: ``period`` layers, repeated.

    "Cycle" of Takase and Kiyono, "Lessons on Parameter Sharing across Layers in
    Transformers", arXiv:2104.06022. With a period of 1 all are one group, as in ALBERT.

    Args:
      layers: paths, in the order in which the network uses them.
      period: how many layers keep arrays of their own, 1 to the number of layers.

    Raises:
      ValueError: there are fewer than two layers, or the period is out of range.

    >>> every(["a", "b", "c", "d", "e"], 2)
    [('a', 'c', 'e'), ('b', 'd')]
    """
    _check_layers("every", layers)
    _check.integer_within("every", "period", period, 1, len(layers))
    return _together(tuple(layers[i::period]) for i in range(period))


def runs(layers: Sequence[str], length: int) -> Groups:
    """Groups of neighbours, ``length`` layers each; the last may have fewer.

    Immediate block-wise sharing of Liu et al., "MobileLLM", arXiv:2402.14905, with a
    length of 2; "Sequence" of Takase and Kiyono, arXiv:2104.06022.

    Args:
      layers: paths, in the order in which the network uses them.
      length: how many neighbours share, 1 to the number of layers.

    Raises:
      ValueError: there are fewer than two layers, or the length is out of range.

    >>> runs(["a", "b", "c", "d", "e"], 2)
    [('a', 'b'), ('c', 'd')]
    """
    _check_layers("runs", layers)
    _check.integer_within("runs", "length", length, 1, len(layers))
    starts = range(0, len(layers), length)
    return _together(tuple(layers[i : i + length]) for i in starts)


def similar_layers(params: Any, layers: Sequence[str], groups: int) -> Groups:
    """Finds the layers that are most alike, to be tied with little loss.

    Ward, "Hierarchical Grouping to Optimize an Objective Function", JASA 58, 1963: as
    long as there are too many groups, the two are joined that add the least squared
    error, if each layer becomes the mean of its group. The error of a layer is that of
    all its floating leaves together, as a share of the mean of the sums of squares of
    the layers like it. Time is linear in the number of weights, and quadratic in that
    of layers.

    Args:
      params: any pytree of concrete arrays: the search runs on the host.
      layers: paths, in any order. Those whose leaves differ by relative path, shape or
        dtype are never joined.
      groups: how many different layers remain, counting those alone in their group.

    Returns:
      The groups of two layers or more. Groups, and layers in a group, are in the order
      of ``layers``; of two equal pairs, the one named first is joined first.

    Raises:
      ValueError: there are fewer than two layers, a path has no leaves or is named
        twice, ``groups`` is out of range or less than there are kinds of layers, or a
        leaf is compressed, traced or not finite.

    >>> blocks = {name: {"w": np.full(3, x)} for name, x in zip("abc", [1.0, 9.0, 2.0])}
    >>> similar_layers(blocks, ["a", "b", "c"], groups=2)
    [('a', 'c')]
    """
    _check_layers("similar_layers", layers)
    _check.integer_within("similar_layers", "groups", groups, 1, len(layers))
    kinds: dict[tuple, list[int]] = {}
    values = _values(params, layers)
    for i, layer in enumerate(values):
        sides = [(key, *np.shape(x), _dtype(x)) for key, x in layer.items()]
        kinds.setdefault(tuple(sides), []).append(i)
    if len(kinds) > groups:
        one_each = list_paths([layers[rows[0]] for rows in kinds.values()])
        raise ValueError(
            f"similar_layers needs groups >= {len(kinds)}, as these layers have "
            f"different leaves and cannot share: {one_each}; got groups={groups}."
        )
    apart = np.full((len(layers), len(layers)), np.inf)
    for rows in kinds.values():
        apart[np.ix_(rows, rows)] = _relative_distances([values[i] for i in rows])
    found = _ward(apart, groups)
    return _together(tuple(layers[i] for i in group) for group in found)


def _check_layers(caller: str, layers: Sequence[str]) -> None:
    if isinstance(layers, str) or len(layers) < 2:
        raise ValueError(
            f"{caller} needs two layers or more, got {layers!r}. Pass a list of paths, "
            'e.g. layers_of(params, "block_*").'
        )


def _together(groups: Any) -> Groups:
    return [group for group in groups if len(group) > 1]


def _dtype(x: Any) -> str:
    return str(x.dtype) if _check.is_array(x) else ""


def _values(params: Any, layers: Sequence[str]) -> list[dict[str, Any]]:
    """The leaves of each layer by relative path."""
    paths, leaves, _ = flatten(params)
    index = {path: i for i, path in enumerate(paths)}
    used: set[str] = set()
    found = []
    for layer in layers:
        members = members_of("similar_layers", layer, paths)
        twice = used.intersection(members.values())
        if twice:
            raise ValueError(
                f"similar_layers needs each leaf in one layer, but {min(twice)!r} is "
                "in two. Name each layer once."
            )
        used.update(members.values())
        held = {key: leaves[index[path]] for key, path in members.items()}
        values: dict[str, Any] = {  # a NumPy scalar is an array like others
            key: np.asarray(x) if isinstance(x, np.generic) else x
            for key, x in held.items()
        }
        for key, x in values.items():
            if is_compressed(x):
                raise ValueError(
                    f"similar_layers needs arrays, but {members[key]!r} is already "
                    f"compressed ({x.describe()}). Densify first."
                )
            if _check.is_floating(x) and not _check.is_concrete(x):
                raise ValueError(
                    f"similar_layers needs the values of {members[key]!r} "
                    f"{_check.describe(x)}, which are not known under jit. Call it "
                    "outside jit."
                )
        named = [(members[key], x) for key, x in values.items()]
        check_finite("similar_layers", named)
        found.append(values)
    return found


def _relative_distances(layers: list[dict[str, Any]]) -> np.ndarray:
    """float64[n, n]: squared distances, by the mean of the sums of squares."""
    count = len(layers)
    apart, energy = np.zeros((count, count)), 0.0
    for key, model in layers[0].items():
        if not _check.is_floating(model):
            continue
        flat = [np.asarray(layer[key]).reshape(-1) for layer in layers]
        for start in range(0, flat[0].size, _CHUNK):
            rows = [x[start : start + _CHUNK].astype(np.float64) for x in flat]
            energy += sum(float(x @ x) for x in rows) / count
            for i in range(count):
                for j in range(i + 1, count):
                    away = rows[i] - rows[j]
                    apart[i, j] += away @ away
    return (apart + apart.T) / (energy or 1.0)


def _ward(apart: np.ndarray, groups: int) -> list[list[int]]:
    """Joins what adds the least error, by the squared distances float64[n, n]."""
    found = [[i] for i in range(len(apart))]
    sizes, inside = np.ones(len(apart)), np.zeros(len(apart))
    between = apart.copy()  # sums of squared distances, of all pairs of two groups
    while len(found) > groups:
        # The squared error of a group is the sum over its pairs, by its size.
        error = (inside[:, None] + inside + between) / (sizes[:, None] + sizes)
        added = error - (inside / sizes)[:, None] - inside / sizes
        added[np.tril_indices(len(found))] = np.inf
        i, j = map(int, np.unravel_index(np.argmin(added), added.shape))
        found[i] = sorted(found[i] + found.pop(j))
        inside[i] += inside[j] + between[i, j]
        sizes[i] += sizes[j]
        between[i] += between[j]
        between[:, i] = between[i]
        inside, sizes = np.delete(inside, j), np.delete(sizes, j)
        between = np.delete(np.delete(between, j, axis=0), j, axis=1)
    return found
