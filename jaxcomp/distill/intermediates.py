"""Features out of what Flax modules collect while they run."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.tree_util import GetAttrKey

from jaxcomp.node import path_of
from jaxcomp.tree import list_paths


def pick(intermediates: Any, names: Mapping[str, str]) -> dict[str, jax.Array]:
    """The named arrays of a collection of intermediates, for `Outputs.features`.

    Args:
      intermediates: what Linen gives for ``capture_intermediates=True,
        mutable=["intermediates"]`` under "intermediates", values that are sown
        included; or the `nnx.State` of `nnx.Intermediate` variables that `nnx.pop`
        gives; or any other tree of arrays.
      names: name of the feature -> path, e.g. ``{"early": "Conv_0/__call__"}``. A path
        may end where one array is left: what was sown once needs no index, what was
        sown several times does, "mix/1". The "value" in an NNX path may be left out.

    Returns:
      name -> array.

    Raises:
      ValueError: at a path there is no array, or several.

    >>> import jax.numpy as jnp
    >>> found = {"Conv_0": {"__call__": (jnp.ones(2),)}, "mix": (0.0, jnp.zeros(3))}
    >>> pick(found, {"early": "Conv_0/__call__", "late": "mix/1"})
    {'early': Array([1., 1.], dtype=float32),
     'late': Array([0., 0., 0.], dtype=float32)}
    """
    named = jax.tree.leaves_with_path(intermediates)
    full = [path_of(keys) for keys, _ in named]
    # The key of an NNX variable, that is; a module may be called "value" too.
    bare = [[key for key in keys if key != GetAttrKey("value")] for keys, _ in named]
    paths = [path_of(keys) for keys in bare]
    found = {}
    for name, path in names.items():
        at = [
            i
            for i, both in enumerate(zip(paths, full, strict=True))
            if any(f"{one}/".startswith(f"{path}/") for one in both)
        ]
        if len(at) != 1:
            several = f", {list_paths([paths[i] for i in at])}" if at else ""
            raise ValueError(
                f"pick needs a path to one array for {name!r}, got {path!r}, where "
                f"there are {len(at)}{several}. The paths are "
                f"{list_paths(paths) or 'none, as nothing was collected'}."
            )
        found[name] = named[at[0]][1]
    return found
