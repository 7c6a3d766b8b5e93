"""What was read, in the structure that the caller knows."""

from typing import Any

import jax
import numpy as np

from jaxcomp import _check
from jaxcomp.node import flatten
from jaxcomp.storage.parts import to_jax
from jaxcomp.tree import list_paths


def into(caller: str, like: Any, tree: Any, path: Any) -> Any:
    """The leaves of ``tree``, which came from ``path``, in the structure of ``like``.

    Leaves are matched by path. Where those differ, "." counts as "/", and the "/value"
    at the end of an ``nnx.State``'s paths does not count.

    Raises:
      ValueError: they differ in paths, shapes or dtypes.
    """
    paths, models, treedef = flatten(like)
    found = dict(zip(*flatten(tree)[:2], strict=True))
    wanted = [p for p, model in zip(paths, models, strict=True) if _is_stored(model)]
    names = dict(zip(paths, paths, strict=True))
    if set(wanted) != set(found):
        names = _plain_names(caller, paths)
        plain = _plain_names(caller, list(found))
        found = {name: found[p] for p, name in plain.items()}
        odd = sorted({names[p] for p in wanted} ^ set(found))
        if odd:
            where = "the file" if odd[0] in found else "`like`"
            raise ValueError(
                f"{caller} needs `like` and {path} to have the same leaves, but only "
                f"{where} has {odd[0]!r} ({len(odd)} such). The file's are "
                f"{list_paths(list(found))}."
            )
    leaves = []
    for name, model in zip(paths, models, strict=True):
        leaf = found.get(names[name], model)
        if _kind(leaf, model) != _kind(model, model):
            raise ValueError(
                f"{caller} needs `like` to have the shapes and dtypes of {path}, but "
                f"leaf {name!r} is {_kind(leaf, model)} in the file and "
                f"{_kind(model, model)} in `like`. Change `like`, or read without it "
                "and convert the leaf."
            )
        keeps = isinstance(model, np.ndarray) or not _check.is_array(model)
        leaves.append(leaf if keeps else to_jax(leaf))
    return jax.tree.unflatten(treedef, leaves)


def _kind(leaf: Any, model: Any) -> str:
    """What a leaf has to have in common with the model of it."""
    if _check.is_array(model):
        return _check.describe(leaf) if _check.is_array(leaf) else type(leaf).__name__
    return f"of shape {list(np.shape(leaf))}"


def _is_stored(leaf: Any) -> bool:
    """Whether a leaf is one of a checkpoint, and not a function, say."""
    return _check.is_array(leaf) or isinstance(leaf, bool | int | float | str)


def _plain_names(caller: str, paths: list[str]) -> dict[str, str]:
    """Each path as far as PyTorch, Flax and an ``nnx.State`` agree on it."""
    names = {p: p.replace(".", "/").removesuffix("/value") for p in paths}
    if len(set(names.values())) < len(paths):
        raise ValueError(
            f"{caller} cannot match the paths of `like` and the file, which differ, "
            'with "." for "/" and without "/value": two leaves then have the '
            f"same path. They are {list_paths(sorted(paths))}. Rename a key."
        )
    return names
