"""Pictures: what became of the weights, what it cost, what is coupled, what is left."""

import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxcomp.node import densify, flatten
from jaxcomp.program.coupling import Groups
from jaxcomp.prune.groups import Keep, Term, gone_slices, member_leaves, total
from jaxcomp.tree import is_matrix, select


if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAYS = "0.85"  # grey
# Of matplotlib's tab20, without its greys: nine strong colours, then the pale ones.
COLOURS = (0, 2, 4, 6, 8, 10, 12, 16, 18, 1, 3, 5, 7, 9, 11, 13, 17, 19)


def save_picture(
    path: str | os.PathLike,
    before: Any,
    after: Any,
    points: Sequence[tuple[str, int, float]],
) -> None:
    """Draws the weights before and after, and the quality against the size.

    Args:
      path: image file; its ending says the format.
      before: params tree before compression.
      after: params tree after compression; its nodes are densified.
      points: (name, bytes, accuracy as a fraction), in the order they were reached.

    Raises:
      ImportError: matplotlib is not installed.
    """
    figure = _figure("save_picture", 11, 4.2)
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    weights, quality = figure.subplots(1, 2)

    old, new = _weights(before), _weights(after)
    live = new[new != 0]
    reach = float(np.abs(live).max(initial=1e-6)) * 1.2
    bins = np.linspace(-reach, reach, 201).tolist()
    label = f"after: {live.size:,} not zero ({live.size / max(new.size, 1):.1%})"
    weights.hist(old, bins=bins, color="0.75", label=f"before: {old.size:,} weights")
    weights.hist(live, bins=bins, color="C3", label=label)
    weights.set(yscale="log", xlabel="weight", ylabel="how many")
    weights.set_ylim(top=20 * weights.get_ylim()[1])  # room for the legend
    weights.set_title("Weights before and after", loc="left")
    weights.legend(loc="upper center", frameon=False)

    sizes = [size / 1000 for _, size, _ in points]
    scores = [score for _, _, score in points]
    quality.plot(sizes, scores, color="0.75", zorder=1)
    for (name, _, score), size in zip(points, sizes, strict=True):
        label = f"{name}: {score:.2%}, {size:,.1f} kB"
        quality.scatter([size], [score], zorder=2, label=label)
    quality.set(xscale="log", xlabel="kilobytes on disk", ylabel="test accuracy")
    quality.margins(x=0.1, y=0.25)
    for axis in (quality.xaxis, quality.yaxis):
        axis.set_minor_formatter(NullFormatter())
    quality.xaxis.set_major_formatter(FuncFormatter(lambda kb, _: f"{kb:g}"))
    quality.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=2))
    quality.legend(loc="lower right", frameon=False)
    quality.set_title("Accuracy against size", loc="left")
    for axes in (weights, quality):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _figure(caller: str, width: float, height: float) -> "Figure":
    """An empty figure, in inches, of which no window knows."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{caller} needs matplotlib: pip install 'jaxcomp[plot]'."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _weights(params: Any) -> np.ndarray:
    """All weights of the matrices of a tree, in one row."""
    dense = densify(params)
    chosen = jax.tree.leaves(select(dense, is_matrix))
    leaves = [
        np.asarray(leaf, np.float32).reshape(-1)
        for leaf, taken in zip(jax.tree.leaves(dense), chosen, strict=True)
        if taken
    ]
    return np.concatenate(leaves)


def plot_groups(groups: Groups, params: Any) -> "Figure":
    """Draws every parameter in a row, its axes as boxes, each family in its colour.

    A box is as wide as the logarithm of the length of the axis, which is written in it.
    What is grey stays, and why is said on the right. After 18 families the colours come
    again.

    Args:
      groups: of `jaxcomp.program.coupled_groups`.
      params: the params that they were found for, or their shapes.

    Returns:
      A figure; ``figure.savefig(path)`` writes it.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: ``params`` does not fit the groups.

    >>> import jax.numpy as jnp
    >>> import jaxcomp as jc
    >>> f = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    >>> groups = jc.coupled_groups(f, params, jnp.ones((5, 3)))
    >>> len(plot_groups(groups, params).legends)
    1
    """
    shapes = jax.eval_shape(densify, params)
    member_leaves("plot_groups", shapes, groups.families)
    paths, leaves, _ = flatten(shapes)
    owned: dict[tuple[str, int], list[tuple[int, np.ndarray]]] = {}
    for number, family in enumerate(groups.families):
        for path, axis, indices in family.members:
            owned.setdefault((path, axis), []).append((number, indices))
    reasons = [_reasons(groups, path) for path in paths]
    families = [
        f"{family.name}: {family.size:,} groups{'' if family.exact else ', not exact'}"
        for family in groups.families
    ]

    beside, below = _inches(paths) + _inches(reasons), 2 * _inches(families) + 1.5
    height = 0.2 * len(paths) + 0.17 * (len(families) // 2 + 1) + 0.6
    figure = _figure("plot_groups", max(5.5 + beside, below), height)
    from matplotlib.patches import Patch
    from matplotlib.patheffects import withStroke

    axes = figure.subplots()
    for row, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        start = 0.0
        for axis, length in enumerate(leaf.shape):
            wide = math.log2(length + 1)
            axes.broken_barh([(start, wide)], (row - 0.42, 0.84), color=STAYS)
            for number, indices in owned.get((path, axis), ()):
                spans = [
                    (start + wide * first / length, wide * (last - first) / length)
                    for first, last in _runs(indices, length)
                ]
                axes.broken_barh(spans, (row - 0.42, 0.84), color=_colour(number))
            axes.text(
                start + wide / 2,
                row,
                f"{length:,}",
                fontsize=7,
                ha="center",
                va="center_baseline",
                path_effects=[withStroke(linewidth=1.5, foreground="white")],
            )
            start += wide + 0.25
    axes.set_xlim(left=0)
    axes.set_ylim(len(paths) - 0.4, -0.6)
    axes.set_yticks(range(len(paths)), paths)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(paths)), reasons)
    axes.set_xticks([])
    for side in (axes, right):
        side.tick_params(axis="y", length=0, labelsize=8)
        side.spines[:].set_visible(False)
    right.tick_params(axis="y", labelcolor="0.45", labelsize=7)
    handles = [Patch(color=_colour(i), label=name) for i, name in enumerate(families)]
    handles.append(Patch(color=STAYS, label="stays"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    return figure


def plot_widths(groups: Groups, keep: Keep) -> "Figure":
    """Draws for every family how many of its groups stay.

    Args:
      groups: of `jaxcomp.program.coupled_groups`.
      keep: name of a family -> bool[groups]; one that is left out stays whole.

    Returns:
      A figure; ``figure.savefig(path)`` writes it. Each bar is a family, however large,
      in the colour that it has in `plot_groups`; the numbers are behind it, those of
      the parameters and the multiply-adds above.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: ``keep`` does not fit the families.

    >>> import jax.numpy as jnp
    >>> import jaxcomp as jc
    >>> f = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    >>> groups = jc.coupled_groups(f, params, jnp.ones((5, 3)))
    >>> figure = plot_widths(groups, {"units of up": np.arange(4) < 3})
    >>> figure.axes[0].texts[0].get_text()
    '3 of 4'
    """
    gone_slices("plot_widths", groups.families, keep)
    sizes = {family.name: family.size for family in groups.families}
    kept = sizes | {name: int(np.sum(mask)) for name, mask in keep.items()}
    figure = _figure("plot_widths", 6 + _inches(sizes), 0.28 * len(sizes) + 0.8)
    axes = figure.subplots()
    for row, (name, size) in enumerate(sizes.items()):
        axes.barh(row, 1, color=_colour(row), alpha=0.25)
        axes.barh(row, kept[name] / size, color=_colour(row))
        axes.text(
            1.01, row, f"{kept[name]:,} of {size:,}", va="center_baseline", fontsize=8
        )
    axes.set_xlim(0, 1.15)
    axes.set_ylim(len(sizes) - 0.4, -0.6)
    axes.set_yticks(range(len(sizes)), sizes)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    lines = [
        _cost("parameters", groups.parameters, sizes, kept),
        _cost("multiply-adds", groups.multiply_adds, sizes, kept),
    ]
    axes.set_title("\n".join(lines), loc="left", fontsize=9)
    return figure


def _inches(texts: Iterable[str]) -> float:
    """How wide the longest is, in letters of 8 points."""
    return 0.065 * max(map(len, texts), default=0)


def _colour(family: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"](COLOURS[family % len(COLOURS)])


def _runs(indices: np.ndarray, length: int) -> np.ndarray:
    """int[runs, 2]: where indices that follow each other begin and end."""
    mine = np.zeros(length + 2, np.int8)
    mine[indices.reshape(-1) + 1] = 1
    return np.flatnonzero(np.diff(mine)).reshape(-1, 2)


def _reasons(groups: Groups, path: str) -> str:
    """Why axes of a parameter stay, in a line."""
    axes: dict[str, list[str]] = {}
    for frozen in groups.frozen:
        if frozen.path == path:
            axes.setdefault(frozen.reason, []).append(str(frozen.axis))
    said = [
        f"{'axis' if len(some) == 1 else 'axes'} {', '.join(some)}: {reason}"
        for reason, some in axes.items()
    ]
    return textwrap.shorten("; ".join(said), 70, placeholder=" ...")


def _cost(
    name: str,
    terms: Sequence[Term],
    before: Mapping[str, int],
    after: Mapping[str, int],
) -> str:
    was, left = total(terms, before), total(terms, after)
    return f"{name}: {left:,.0f} of {was:,.0f} ({left / max(was, 1):.1%})"
