"""Which leaves, and how an array function is lifted over them.

A `Where` is a plain function of a leaf's path and the leaf. `map_where` is the one lift
from an array to a tree; it is also where values are checked, so that a bad one is found
before anything is touched.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomp import _check
from jaxcomp.node import (
    TiedTensor,
    dense_of,
    encoded,
    flatten,
    is_compressed,
    resolver,
)


Where = Callable[[str, Any], bool]

NOT_MATRICES = ("bias", "scale", "mean", "var")


def last_key(path: str) -> str:
    """The last key that names a parameter: an ``nnx.State`` path ends in /value."""
    keys = path.split("/")
    return keys[-2] if keys[-1] == "value" and len(keys) > 1 else keys[-1]


def is_matrix(path: str, leaf: Any) -> bool:
    """Selects floating leaves of two dimensions or more: kernels and embeddings.

    Leaves whose last key is bias, scale, mean or var are left out: an attention bias is
    (heads, d), a scanned norm scale is (layers, d).

    >>> is_matrix("dense/kernel", jnp.ones((2, 3)))
    True
    >>> is_matrix("attention/bias", jnp.ones((2, 3)))
    False
    """
    floating = _check.is_floating(leaf)
    return floating and leaf.ndim >= 2 and last_key(path) not in NOT_MATRICES


def shared_keys(paths: Sequence[str]) -> list[str]:
    """The keys with which all of these paths begin.

    >>> shared_keys(["block/query/kernel", "block/key/kernel"])
    ['block']
    """
    found = []
    for first, *rest in zip(*(path.split("/") for path in paths), strict=False):
        if any(other != first for other in rest):
            break
        found.append(first)
    return found


def is_trained(path: str, leaf: Any) -> bool:
    """Selects floating leaves, and masks of them, that are not a mean or a var.

    The ``where`` of whole groups: of `prune_gradually` and `keep_zeros` too, as biases
    and norms go with their group. What batch norm has seen is no weight.

    >>> is_trained("norm/bias", jnp.ones(3)), is_trained("norm/mean", jnp.ones(3))
    (True, False)
    """
    is_number = _check.is_floating(leaf) or leaf.dtype == bool
    return is_number and last_key(path) not in ("mean", "var")


def path_matches(pattern: str) -> Where:
    """A `Where` that selects leaves whose whole path matches a regular expression.

    >>> path_matches("encoder/.*/kernel")("encoder/0/kernel", None)
    True
    >>> path_matches("kernel")("encoder/0/kernel", None)
    False
    """
    regex = re.compile(pattern)
    return lambda path, leaf: regex.fullmatch(path) is not None


def list_paths(paths: list[str]) -> str:
    """The first few paths, for an error."""
    return ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")


def select(params: Any, where: Where = is_matrix, *, compressed: bool = False) -> Any:
    """A tree of Python bools, shaped like ``params``: is this leaf selected?

    Args:
      params: any pytree; a node counts as one leaf.
      where: (path, leaf) -> bool. It is asked about arrays only.
      compressed: whether nodes are offered to ``where``, by their dense shape and
        dtype. A `TiedTensor` never is: its source is.

    Raises:
      ValueError: ``params`` has leaves and ``where`` selects none of them. Part of a
        tree, as `optax.masked` and `optax.partition` hand out, may select nothing.

    >>> select({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
    {'bias': False, 'kernel': True}
    """
    paths, leaves, treedef = flatten(params)

    def is_chosen(path: str, leaf: Any) -> bool:
        if is_compressed(leaf):
            offered = compressed and not isinstance(leaf, TiedTensor)
        else:
            offered = _check.is_array(leaf)
        return offered and bool(where(path, leaf))

    chosen = [is_chosen(*pair) for pair in zip(paths, leaves, strict=True)]
    if paths and not any(chosen) and not _is_part(params):
        skipped = "" if compressed else "; leaves that are compressed are skipped"
        if compressed and any(isinstance(leaf, TiedTensor) for leaf in leaves):
            skipped = "; a tied leaf follows its source and is not selected"
        raise ValueError(
            f"`where` selected none of the {len(paths)} leaves, which are "
            f"{list_paths(paths)}. A regex must match the whole path{skipped}."
        )
    return jax.tree.unflatten(treedef, chosen)


def _is_part(tree: Any) -> bool:
    """Whether Optax took leaves out of this tree to give them to somebody else."""

    def is_gap(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    return any(map(is_gap, jax.tree.leaves(tree, is_leaf=is_gap)))


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    # A maximum would be faster, but that of XLA on a CPU may lose a NaN.
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def check_finite(caller: str, named: list[tuple[str, Any]]) -> None:
    """Raises on the first NaN or infinity of the concrete floating leaves.

    Raises:
      ValueError: names the leaf's path, the index and the value.
    """
    concrete = [
        (path, leaf)
        for path, leaf in named
        if _check.is_floating(leaf) and _check.is_concrete(leaf)
    ]
    with jax.ensure_compile_time_eval():
        finite = _all_finite([leaf for _, leaf in concrete])
        bad = [pair for pair, ok in zip(concrete, finite, strict=True) if not ok]
    if not bad:
        return
    path, leaf = bad[0]
    values = np.asarray(jnp.asarray(leaf))  # as JAX narrows it, so that a fault shows
    faults = np.argwhere(~np.isfinite(values.astype(np.float64)))
    index = tuple(map(int, faults[0]))
    raise ValueError(
        f"{caller} needs finite values, but leaf {path!r} {_check.describe(leaf)} "
        f"holds {values[index]} at index {index} ({len(faults)} such of "
        f"{values.size}). Mend the leaf, or leave it out with `where`."
    )


def _at(path: str, fn: Callable[[Any], Any], leaf: Any) -> Any:
    """``fn(leaf)``; an error about the argument says which leaf it was."""
    try:
        return fn(leaf)
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):  # JAX's own say enough
            raise
        raise type(error)(f"{error} (leaf {path!r})") from error


def map_where(
    fn: Callable[[jax.Array], Any],
    params: Any,
    where: Where = is_matrix,
    *,
    caller: str = "map_where",
) -> Any:
    """Applies ``fn`` to the selected leaves of ``params``; the rest pass through.

    Leaves that are already compressed are skipped, so that of several calls the first
    that takes a leaf wins.

    Args:
      fn: float[*shape] -> an array or a node.
      params: any pytree.
      where: (path, leaf) -> bool.
      caller: the name that errors carry.

    Raises:
      ValueError: nothing is selected, or a selected concrete leaf holds a NaN or an
        infinity. What ``fn`` raises comes with the path of the leaf.

    >>> map_where(jnp.abs, {"kernel": -jnp.ones((1, 2)), "bias": -jnp.ones(2)})
    {'bias': Array([-1., -1.], dtype=float32),
     'kernel': Array([[1., 1.]], dtype=float32)}
    """
    return _lift(caller, fn, params, where, compressed=False)


def map_values(
    fn: Callable[[jax.Array], jax.Array],
    params: Any,
    where: Where = is_matrix,
    *,
    caller: str = "map_values",
) -> Any:
    """Applies ``fn`` to the values of the selected leaves, compressed ones included.

    Like `map_where`, but a selected node takes its new values in place: a `QTensor`
    stays a `QTensor` on the same grid, a `SharedTensor` keeps its number of values.

    Args:
      fn: float[*shape] -> float[*shape].
      params: any pytree.
      where: (path, leaf) -> bool.
      caller: the name that errors carry.

    Raises:
      ValueError: as `map_where`.
    """
    return _lift(caller, fn, params, where, compressed=True)


def _lift(
    caller: str,
    fn: Callable[[jax.Array], Any],
    params: Any,
    where: Where,
    compressed: bool,
) -> Any:
    chosen = jax.tree.leaves(select(params, where, compressed=compressed))
    paths, leaves, treedef = flatten(params)
    whole = resolver(caller, paths, list(leaves))
    held = {i: whole(i) for i in range(len(leaves)) if chosen[i]}
    taken = {i: dense_of(leaf) for i, leaf in held.items()}
    check_finite(caller, [(paths[i], value) for i, value in taken.items()])

    def replaced(i: int, value: jax.Array) -> Any:
        return encoded(leaves[i], held[i], fn(value))

    for i, value in taken.items():
        leaves[i] = _at(paths[i], partial(replaced, i), value)
    return jax.tree.unflatten(treedef, leaves)


def strays(state: Any) -> int:
    """How many weights the links of a chain found non-zero where they had put zeros.

    Not 0 if a pruning link is not the last of its chain, or if somebody else writes to
    the weights. A weight counts each time that it is found.

    Args:
      state: of an optimizer, at any depth of which there are states with a ``stray``.

    >>> import jaxcomp as jc
    >>> params = {"kernel": jnp.array([[0.5, 1.0]])}
    >>> prune = jc.prune_gradually(optax.constant_schedule(0.5), every=1)
    >>> tx = optax.chain(prune, optax.sgd(0.1))  # the wrong way round
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update({"kernel": jnp.ones((1, 2))}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> strays(state)
    1
    """
    named = jax.tree.leaves_with_path(state)
    found = [
        x for keys, x in named if keys and getattr(keys[-1], "name", "") == "stray"
    ]
    return sum(int(np.sum(x)) for x in found)


def split(tree: Any) -> tuple[Any, Any]:
    """Parts a tree into what an optimizer may update and what it must not see.

    Returns:
      (trainable, rest), both shaped like ``tree`` with None where the other has the
      leaf. Trainable are all floating arrays: dense leaves, codebooks, scales. The rest
      are codes, integers, booleans and leaves that are not arrays.

    >>> split({"kernel": jnp.ones(2), "step": 3})
    ({'kernel': Array([1., 1.], dtype=float32), 'step': None},
     {'kernel': None, 'step': 3})
    """
    leaves, treedef = jax.tree.flatten(tree)
    trainable = [leaf if _check.is_floating(leaf) else None for leaf in leaves]
    rest = [None if _check.is_floating(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(treedef, trainable), jax.tree.unflatten(treedef, rest)


def join(trainable: Any, rest: Any) -> Any:
    """The tree that `split` parted.

    >>> join(*split({"kernel": 1.5, "step": 3}))
    {'kernel': 1.5, 'step': 3}
    """
    return jax.tree.map(
        lambda a, b: b if a is None else a,
        trainable,
        rest,
        is_leaf=lambda x: x is None,
    )
