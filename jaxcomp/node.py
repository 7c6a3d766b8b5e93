"""Nodes: what stands in a params tree where an array was.

A node is a frozen pytree class. It holds the small form of one array, gives the array
back (`dense`), says honestly how many bits it takes (`nbits`), and takes new values
without changing its kind (`encode`), which is how one technique survives the next.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


class CompressedArray(abc.ABC):
    """One array in a smaller form. Every subclass is final and holds no code to run.

    Attributes:
      shape: the shape of the array that it stands for (static).
    """

    shape: tuple[int, ...]

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """The dtype of `dense`."""

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """The array it stands for: float[*shape]."""

    @abc.abstractmethod
    def nbits(self) -> int:
        """Bits it takes to store: codes, scales, zero points, codebooks, padding."""

    @abc.abstractmethod
    def encode(self, x: jax.Array) -> "CompressedArray":
        """A node of the same kind and settings that holds ``x``, zeros kept exact.

        What ``x`` leaves as `dense` has it keeps its code, unless the node needs room
        for a zero that it did not have.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """What was done to the array, in a few words, for a report."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size


class DependentArray(CompressedArray):
    """A node that needs another leaf of its tree, and names it by its path.

    Only what sees the whole tree, `densify` or `map_values`, can resolve it.

    Attributes:
      source: path of the leaf that it needs (static).
    """

    source: str

    @abc.abstractmethod
    def resolve(self, source: Any) -> Any:
        """The array or node it stands for, of the leaf that ``source`` names."""

    @abc.abstractmethod
    def release(self, resolved: Any) -> "DependentArray":
        """The inverse of `resolve`, for a node with new values and the same source."""

    def dense(self) -> jax.Array:
        raise ValueError(
            f"{type(self).__name__}.dense needs the tree that holds {self.source!r}, "
            "to which this leaf is tied. Call `densify` on the whole tree."
        )

    def encode(self, x: jax.Array) -> CompressedArray:
        raise ValueError(
            f"{type(self).__name__}.encode needs the tree that holds {self.source!r}. "
            "Call `map_values` on the whole tree."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TiedTensor(DependentArray):
    """The same array as another leaf of the tree, held there and not here.

    It has no arrays, so an optimizer sees one set of weights, the gradient of that set
    is the sum over its uses, and tied leaves cannot drift apart.

    Attributes:
      source: path of the leaf that holds the array (static).
      shape: shape of the array (static).
      name: dtype name of the array (static).
    """

    source: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.name)

    def resolve(self, source: Any) -> Any:
        return source

    def release(self, resolved: Any) -> "TiedTensor":
        return self  # the source takes the new values

    def encode(self, x: jax.Array) -> CompressedArray:
        return self

    def nbits(self) -> int:
        return 0

    def describe(self) -> str:
        return f"tied to {self.source}"


def is_compressed(x: Any) -> bool:
    """Whether ``x`` is a node, for the ``is_leaf`` of `jax.tree.map`."""
    return isinstance(x, CompressedArray)


def path_of(keys: Any) -> str:
    """The path of a leaf from its JAX key path, e.g. ``encoder/0/kernel``."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Paths, leaves (a node is one leaf) and the structure of a tree."""
    named, treedef = jax.tree.flatten_with_path(tree, is_leaf=is_compressed)
    return [path_of(keys) for keys, _ in named], [leaf for _, leaf in named], treedef


def dense_of(leaf: Any) -> jax.Array:
    """The JAX array that an array or a node stands for."""
    return leaf.dense() if is_compressed(leaf) else jnp.asarray(leaf)


def densify(tree: Any) -> Any:
    """Every node of ``tree`` turned back into its array; other leaves pass through.

    Works under jit and is differentiable in the float arrays of the nodes. Any model
    runs on the result.

    Raises:
      ValueError: a leaf is tied to a path that ``tree`` does not have, or to itself
        around a circle.

    >>> import jaxcomp as jc
    >>> small = jc.quantize_tree({"kernel": jnp.ones((2, 3))}, bits=4)
    >>> densify(small)["kernel"].tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    paths, leaves, treedef = flatten(tree)
    whole = list(map(resolver("densify", paths, leaves), range(len(leaves))))
    dense: dict[int, Any] = {}  # tied leaves are one object, made dense once
    for leaf in whole:
        if id(leaf) not in dense:
            dense[id(leaf)] = leaf.dense() if is_compressed(leaf) else leaf
    return jax.tree.unflatten(treedef, [dense[id(leaf)] for leaf in whole])


def resolver(caller: str, paths: list[str], leaves: list[Any]) -> Callable[[int], Any]:
    """What gives the leaf at a position, or the one that stands for it.

    That is an array or a node that needs no other leaf; for a tied one the very object
    that it is tied to.

    Raises:
      ValueError: when asked for a leaf that needs a path that the tree does not have,
        or itself around a circle.
    """
    index = {path: i for i, path in enumerate(paths)}

    def whole(i: int, seen: tuple[int, ...] = ()) -> Any:
        leaf, seen = leaves[i], (*seen, i)
        if not isinstance(leaf, DependentArray):
            return leaf
        source = index.get(leaf.source)
        if source is None or source in seen:
            raise ValueError(
                f"{caller} needs the leaf that {paths[seen[0]]!r} is tied to, but "
                f"{leaf.source!r} is {'not' if source is None else 'a circle'}"
                " in this tree. Pass the whole tree, with all that share."
            )
        return leaf.resolve(whole(source, seen))

    return whole


def encoded(leaf: Any, whole: Any, x: jax.Array) -> Any:
    """What takes the place of a leaf with new values; of a node, one of its kind.

    Args:
      leaf: an array or a node.
      whole: what a `resolver` gives for it.
      x: float[*shape].
    """
    if not is_compressed(leaf):
        return x
    new = whole.encode(x)
    return leaf.release(new) if isinstance(leaf, DependentArray) else new
