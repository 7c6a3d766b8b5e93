"""Pictures of a compressed tree: what became of the weights, what it cost."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxcomp.node import densify
from jaxcomp.tree import is_matrix, select


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
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter
    except ImportError as error:
        raise ImportError(
            "save_picture needs matplotlib: pip install 'jaxcomp[plot]'."
        ) from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
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
