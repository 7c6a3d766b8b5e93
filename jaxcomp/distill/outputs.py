"""What a model gives to a distillation loss, and what a batch holds."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax


class Outputs(NamedTuple):
    """What a student or a teacher may return in place of its logits alone.

    Attributes:
      logits: float[..., classes], or what the soft loss takes, e.g. `SparseTargets`.
      features: name -> array, for the terms that compare what is inside; None for
        none.
      state: a tree of what is not trained but found, such as batch statistics. Its
        leaves take the place of those of the student's params with the same paths.
    """

    logits: Any
    features: Mapping[str, Any] | None = None
    state: Any = None


class Batch(NamedTuple):
    """What a step is given; a plain tuple will do.

    Attributes:
      inputs: whatever the models take: any pytree.
      labels: int[...], or None. Below 0 there is no label.
      mask: bool[...], False for padding, or None.
    """

    inputs: Any
    labels: jax.Array | None = None
    mask: jax.Array | None = None


def outputs_of(given: Any) -> Outputs:
    """What a model returned, logits alone or all of it, with a dict of features."""
    found = given if isinstance(given, Outputs) else Outputs(given)
    return found._replace(features=dict(found.features or {}))
