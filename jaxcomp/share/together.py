"""One codebook for several leaves: one copy of it in memory and in the file."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp import bits as packing
from jaxcomp.node import DependentArray, flatten
from jaxcomp.share.kmeans import assign, optimal_centroids
from jaxcomp.share.palette import SharedTensor, checked_values
from jaxcomp.tree import Where, check_finite, is_matrix, select


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BorrowedTensor(DependentArray):
    """Codes of its own into the codebook of another leaf, a `SharedTensor`.

    An optimizer sees one codebook, whose gradient is the sum over all leaves.

    Attributes:
      codes: uint8[packed], codes of ``bits`` bits in C order; see `bits.pack`.
      source: path of the leaf that holds the codebook (static).
      zero: whether code 0 means exactly 0 and is not in the codebook (static).
      bits: width of a code (static).
      shape: shape of the array (static).
      name: dtype name of the array (static).
    """

    codes: jax.Array
    source: str = dataclasses.field(metadata={"static": True})
    zero: bool = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.name)

    def resolve(self, source: Any) -> SharedTensor:
        """The `SharedTensor` of these codes and the codebook of ``source``.

        Raises:
          ValueError: ``source`` is no `SharedTensor`, or one of other settings.
        """
        self._check_alike("resolve", f"leaf {self.source!r}", source)
        return dataclasses.replace(source, codes=self.codes, shape=self.shape)

    def release(self, resolved: Any) -> "BorrowedTensor":
        """The codes of ``resolved``, which must hold the codebook of the source.

        Raises:
          ValueError: ``resolved`` is no `SharedTensor`, or one of other settings.
        """
        self._check_alike("release", "the new value", resolved)
        return dataclasses.replace(self, codes=resolved.codes, shape=resolved.shape)

    def _check_alike(self, method: str, what: str, other: Any) -> None:
        ours = f"a SharedTensor with {self._settings(self.name, self.zero, self.bits)}"
        if isinstance(other, SharedTensor):
            theirs = self._settings(other.dtype.name, other.zero, other.bits)
            found = f"a SharedTensor with {theirs}"
        else:
            found = type(other).__name__
        if found != ours:
            raise ValueError(
                f"BorrowedTensor.{method} needs {what} to be {ours}, as "
                f"`share_together` made it, got {found}. Change the leaves that share "
                "a codebook together, or densify them first."
            )

    @staticmethod
    def _settings(name: str, zero: bool, bits: int) -> str:
        return f"dtype={name}, zero={zero}, bits={bits}"

    def nbits(self) -> int:
        return self.codes.size * 8

    def describe(self) -> str:
        return f"shared values of {self.source}"


def share_together(
    params: Any, clusters: int = 256, *, where: Where = is_matrix
) -> Any:
    """Gives all of the selected leaves together at most ``clusters`` distinct values.

    As `palettize` on the values of all leaves at once. The first selected leaf becomes
    the `SharedTensor` that holds the codebook, the others become `BorrowedTensor`. The
    codebook has the least squared error there is, summed over all leaves, so that
    leaves of small weights get few values for themselves.

    Departs from `palettize`: 0 is always one of the values, so that later pruning
    never changes the codebook.

    Args:
      params: any pytree. Leaves that are compressed already are left as they are.
      clusters: the most distinct values of all leaves, 0 included, 1 to 65536.
      where: (path, leaf) -> bool. The leaves must be of one dtype.

    Returns:
      A tree of the same keys; leaves that are not selected are the same objects. Exact
      zeros stay exactly zero. If there are no more than ``clusters - 1`` values that
      are not 0, `densify` gives them back bit for bit (-0.0 becomes 0.0).

    Raises:
      ValueError: ``clusters`` is out of range or 1 where values are not 0, nothing is
        selected, leaves are of several dtypes, or one is empty, traced or not finite.
      TypeError: a selected leaf is not floating point.

    >>> tree = {"a": jnp.array([[1.0, 3.0]]), "b": jnp.array([[0.0, 3.2], [1.0, 3.1]])}
    >>> small = share_together(tree, clusters=3)
    >>> small["a"].codebook, small["b"].source
    (Array([1. , 3.1], dtype=float32), 'a')
    """
    caller = "share_together"
    _check.integer_within(caller, "clusters", clusters, 1, 2**packing.WIDEST)
    chosen = jax.tree.leaves(select(params, where))
    paths, leaves, treedef = flatten(params)
    taken = {i: leaf for i, leaf in enumerate(leaves) if chosen[i]}
    if not taken:
        return params
    check_finite(caller, [(paths[i], leaf) for i, leaf in taken.items()])
    arrays = {i: _check.floating(_named(caller, paths[i]), taken[i]) for i in taken}
    values = {
        i: checked_values(_named(caller, paths[i]), x) + 0 for i, x in arrays.items()
    }
    first, *others = arrays
    for i in others:
        if arrays[i].dtype != arrays[first].dtype:
            raise ValueError(
                f"{caller} needs leaves of one dtype, but {paths[first]!r} is "
                f"{_check.describe(arrays[first])} and {paths[i]!r} is "
                f"{_check.describe(arrays[i])}. Cast them, or call it once for each "
                "dtype with `where`."
            )
    codebook = _codebook(caller, np.concatenate(list(values.values())), clusters)
    bits = max(1, codebook.size.bit_length())
    name, shared = arrays[first].dtype.name, jnp.asarray(codebook)
    for i, x in values.items():
        codes = np.zeros(x.size, np.uint16)
        if codebook.size:
            codes[x != 0] = assign(x[x != 0], codebook) + 1
        packed, shape = packing.pack(jnp.asarray(codes), bits), arrays[i].shape
        leaves[i] = (
            SharedTensor(packed, shared, True, bits, shape)
            if i == first
            else BorrowedTensor(packed, paths[first], True, bits, shape, name)
        )
    return jax.tree.unflatten(treedef, leaves)


def _named(caller: str, path: str) -> str:
    return f"{caller} (leaf {path!r})"


def _codebook(caller: str, values: np.ndarray, clusters: int) -> np.ndarray:
    """The best values beside 0, in the dtype of the weights."""
    live = values[values != 0]
    if not live.size:
        return live
    if clusters == 1:
        raise ValueError(
            f"{caller} needs clusters >= 2 for leaves that are not all zero, as 0 is "
            "one of the values, got clusters=1."
        )
    best = optimal_centroids(live, clusters - 1)
    return np.unique(best.astype(values.dtype))  # narrow floats may coincide
