"""Distillation losses beside those of torchdistill and Tunix, on the same arrays.

    python -m benchmarks.distill_peers

Needs torch, `pip install --no-deps torchdistill==1.1.5 torchvision` and `pip install
--no-deps google-tunix==0.1.7`. Of Tunix only the strategies are imported: the package
itself asks for its trainers, and these for much more. Nor is torchvision used, so that
one whose compiled operators do not load will do. The arrays and our side are those of
tests/distill/test_peers.py, which holds the numbers printed here.
"""

import importlib.metadata
import importlib.util
import platform
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from torch.nn.functional import normalize
from torchdistill.losses import mid_level

import jaxcomp as jc
from tests.distill.test_peers import DIFFERS, OURS, Arrays, make_arrays


def strategies() -> Any:
    """The modules of Tunix's distillation strategies, without the rest of Tunix."""
    spec = importlib.util.find_spec("tunix")
    if spec is None or spec.origin is None:
        raise SystemExit("Tunix is missing: pip install --no-deps google-tunix==0.1.7")
    root = Path(spec.origin).parent
    for name, folder in (
        ("tunix", root),
        ("tunix.distillation", root / "distillation"),
    ):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    from tunix.distillation.strategies import feature_pooling, feature_projection, logit

    return logit, feature_pooling, feature_projection


class SquaredNorms(mid_level.SPKDLoss):
    """Theirs with rows scaled as in the paper."""

    def matmul_and_normalize(self, z: Any) -> Any:
        z = torch.flatten(z, 1)
        return normalize(z @ z.T, p=2, dim=1)


def of_torchdistill(x: Arrays) -> dict[str, Callable[[], Any]]:
    """Name -> a call of one of its losses."""

    def io(pair: Any) -> list[dict[str, dict[str, Any]]]:
        return [
            {"x": {"output": torch.from_numpy(np.ascontiguousarray(a))}} for a in pair
        ]

    logits, features = io(x.logits), io(x.features)
    maps = io([np.moveaxis(a, -1, 1) for a in x.maps])
    labels = torch.from_numpy(x.labels)
    paths = ("x", "output", "x", "output")
    side = {"path": "x", "io": "output"}
    pairs = {"pair": {"teacher": side, "student": side}}
    mse = mid_level.SimpleLossWrapper(
        torch.nn.MSELoss(),
        input={"is_from_teacher": False, "module_path": "x", "io": "output"},
        target={"is_from_teacher": True, "module_path": "x", "io": "output"},
    )
    kd = mid_level.KDLoss(*paths, temperature=4.0, alpha=0.1)
    dist = mid_level.DISTLoss(*paths, beta=2.0, gamma=2.0, tau=4.0)
    at = mid_level.ATLoss(pairs, mode="paper")
    distances = mid_level.RKDLoss("x", "x", 1.0, 0.0, "mean")
    angles = mid_level.RKDLoss("x", "x", 0.0, 1.0, "mean")
    return {
        "KDLoss, tau=4": lambda: kd(*logits),
        "KDLoss, tau=4, alpha=0.1": lambda: kd(*logits, labels),
        "DISTLoss, tau=4, beta=gamma=2": lambda: dist(*logits),
        "ATLoss, mode=paper": lambda: at(*maps),
        "RKDLoss, distances": lambda: distances(*maps),
        "RKDLoss, angles": lambda: angles(*maps),
        DIFFERS: lambda: mid_level.SPKDLoss("x", "x", "batchmean")(*maps),
        "SPKDLoss, rows of L2 norm 1": lambda: SquaredNorms("x", "x", "batchmean")(
            *maps
        ),
        "MSELoss, as FitNets": lambda: mse(*features, None),
    }


def of_tunix(x: Arrays) -> dict[str, Callable[[], Any]]:
    """Name -> a call of ``compute_loss`` of one of its strategies."""
    logit, pooling, projection = strategies()
    student, teacher = map(jax.numpy.asarray, x.logits)
    labels = jax.nn.one_hot(x.labels, 10)
    ours, theirs = map(jax.numpy.asarray, x.features)
    forward = (lambda model, x: x,) * 2 + (lambda x: x,)

    def soft(alpha: float, top: int = 0) -> Any:
        strategy = logit.LogitStrategy(*forward, 3.0, alpha, top)
        return strategy.compute_loss(student, teacher, labels)[0]

    def inner(strategy: Any) -> Any:
        return strategy.compute_loss(
            {"logits": student, "features": ours}, theirs, labels
        )

    options = {"feature_layer": object, "alpha": 1.0}
    pooled = pooling.FeaturePoolingStrategy(*forward, **options)
    projected = projection.FeatureProjectionStrategy(
        *forward, **options, dummy_input={}, rngs=None
    )
    return {
        "LogitStrategy, T=3, alpha=1": lambda: soft(1.0),
        "LogitStrategy, T=3, alpha=0.5": lambda: soft(0.5),
        "LogitStrategy, T=3, alpha=1, top 4": lambda: soft(1.0, 4),
        "FeaturePoolingStrategy": lambda: inner(pooled),
        "FeatureProjectionStrategy": lambda: inner(projected),
    }


def main() -> None:
    x = make_arrays()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "torch", "torchdistill", "google-tunix")
    )
    print(f"jaxcomp {jc.__version__}, Python {platform.python_version()}, {versions}\n")
    print("| peer | loss, settings | theirs | ours | relative difference |")
    print("| :-- | :-- | --: | --: | --: |")
    for peer, losses in (("torchdistill", of_torchdistill(x)), ("Tunix", of_tunix(x))):
        for name, call in losses.items():
            theirs, ours = float(call()), float(OURS[name](x))
            apart = abs(ours - theirs) / abs(theirs)
            print(f"| {peer} | {name} | {theirs:.8g} | {ours:.8g} | {apart:.1e} |")


if __name__ == "__main__":
    main()
