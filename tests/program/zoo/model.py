"""What a model of the zoo is, and how one is put together."""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.node import flatten
from jaxcomp.tree import last_key


Pair = tuple[str, int]  # path of a parameter, axis
Axes = Mapping[str, tuple[int, ...]]  # end of a path -> axes


class Model(NamedTuple):
    """A small net, and what is known about its axes."""

    name: str
    f: Callable[..., Any]  # (params, *inputs) -> any pytree; pure
    params: Any  # all that has channels, statistics too
    inputs: tuple[Any, ...]
    # {path: shape} -> f built at the widths that these shapes tell, all its constants
    # as they were. None where random bits or a table written into the program lie along
    # an axis that can be cut: no such net knows which of them were kept.
    native: Callable[[Mapping[str, tuple[int, ...]]], Callable[..., Any]] | None
    prunable: tuple[Pair, ...]  # at least these can be cut
    inexact: tuple[Pair, ...]  # of these, where shrunk cannot equal masked
    frozen: dict[Pair, str]  # cannot be cut -> a word of the reason


def model(
    name: str,
    f: Callable[..., Any],
    shapes: Any,
    inputs: tuple[Any, ...],
    native: Callable[..., Any] | None,
    *,
    frozen: Mapping[str, Axes],
    inexact: Axes | None = None,
    unsure: Axes | None = None,
) -> Model:
    """A model, its params filled in.

    Args:
      name: of the model.
      f: (params, *inputs) -> any pytree.
      shapes: a tree with the shapes and dtypes of the params.
      inputs: of ``f``.
      native: {path: shape} -> a function like ``f``, or None.
      frozen: word of the reason -> the axes; "" where there is more than one reason.
      inexact: axes where shrunk cannot equal masked.
      unsure: axes of which nothing is said. All that is left can be cut.
    """
    params = filled(shapes)
    words = {pair: word for word in frozen for pair in _pairs(params, frozen[word])}
    silent = {*words, *_pairs(params, unsure or {})}
    every = [
        (path, axis)
        for path, leaf in zip(*flatten(params)[:2], strict=True)
        for axis, length in enumerate(leaf.shape)
        if length > 1
    ]
    prunable = tuple(pair for pair in every if pair not in silent)
    inexact_pairs = tuple(_pairs(params, inexact or {}))
    return Model(name, f, params, inputs, native, prunable, inexact_pairs, words)


def linen(
    name: str,
    module: Callable[[tuple[int, ...]], nn.Module],
    widths: tuple[int, ...],
    reads: tuple[tuple[Any, ...], ...],
    inputs: tuple[Any, ...],
    **axes: Any,
) -> Model:
    """A model from a Linen module, its params all the collections of variables.

    Args:
      name: of the model.
      module: widths -> the module; a width counts what is cut at once.
      widths: of this model.
      reads: for each width the path of a parameter, the axis that tells the width, and
        how many indices each unit has there (1 if it is left out).
      inputs: of the module.
      **axes: for `model`.
    """
    shapes = jax.eval_shape(module(widths).init, jax.random.key(0), *inputs)

    def native(shapes: Mapping[str, tuple[int, ...]]) -> Callable[..., Any]:
        return module(read(reads, shapes)).apply

    return model(name, module(widths).apply, shapes, inputs, native, **axes)


def read(
    reads: tuple[tuple[Any, ...], ...], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """The widths that shapes tell, for `linen`."""
    return tuple(shapes[path][axis] // math.prod(per) for path, axis, *per in reads)


def float32(**lengths: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """A dict of shapes."""
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in lengths.items()
    }


def filled(shapes: Any) -> Any:
    """Random arrays of these shapes, none of them 0 or 1, as a new net has them."""
    paths, leaves, treedef = flatten(shapes)
    rows = zip(paths, leaves, strict=True)
    return jax.tree.unflatten(treedef, [_values(*row) for row in rows])


def array(*shape: int) -> jax.Array:
    """float32[*shape], normally distributed: an input."""
    rng = np.random.default_rng(len(shape))
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def tokens(top: int, *shape: int) -> jax.Array:
    """int32[*shape] below ``top``: an input."""
    return jnp.asarray(np.random.default_rng(0).integers(top, size=shape), jnp.int32)


def _values(path: str, leaf: Any) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.full(leaf.shape, 3, leaf.dtype)
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    if "/var" in path:
        values = rng.uniform(0.5, 2, leaf.shape)
    elif last_key(path).startswith("scale"):
        values = rng.uniform(0.5, 1.5, leaf.shape)
    else:
        reads = math.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 4
        sizes = rng.uniform(0.4, 1.6, leaf.shape) / math.sqrt(reads)
        values = sizes * rng.choice([-1, 1], leaf.shape)
    return jnp.asarray(values, leaf.dtype)


def _pairs(params: Any, axes: Axes) -> list[Pair]:
    """Every axis of every parameter whose path ends as said; an end must have one."""
    paths = flatten(params)[0]
    found = []
    for end, numbers in axes.items():
        matching = [p for p in paths if f"/{p}".endswith(f"/{end}")]
        if not matching:
            raise ValueError(f"model has no parameter {end!r} among {paths}.")
        found += [(path, axis) for path in matching for axis in numbers]
    return found
