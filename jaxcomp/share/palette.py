"""Weight sharing: each weight is an index into a small codebook of values.

The codebook is the optimal one in one dimension (`share.kmeans`), not one that depends
on where Lloyd's iteration started. Exact zeros are kept apart from it, so that training
the codebook cannot move them.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp import bits as packing
from jaxcomp.node import CompressedArray
from jaxcomp.share.kmeans import assign, optimal_centroids
from jaxcomp.tree import Where, is_matrix, map_where


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SharedTensor(CompressedArray):
    """Codes into a codebook of shared values: ``dense = table[code]``.

    The table is the codebook, with an exact 0 before it if ``zero``.

    Attributes:
      codes: uint8[packed], codes of ``bits`` bits in C order; see `bits.pack`.
      codebook: float[entries]; its dtype is the dtype of `dense`. Trainable: the
        gradient of an entry is the sum over the weights that use it.
      zero: whether code 0 means exactly 0 and is not in the codebook (static).
      bits: width of a code (static).
      shape: shape of `dense` (static).
    """

    codes: jax.Array
    codebook: jax.Array
    zero: bool = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        return self.codebook.dtype

    def table(self) -> jax.Array:
        """float[values]: what each code stands for."""
        return jnp.pad(self.codebook, (int(self.zero), 0))

    @jax.jit
    def dense(self) -> jax.Array:
        if self.codebook.ndim > 1:  # a stack of nodes, as vmap makes
            return jax.vmap(SharedTensor.dense)(self)
        codes = packing.unpack(self.codes, self.bits, self.size)
        return self.table()[codes].reshape(self.shape)

    def nbits(self) -> int:
        width = jnp.finfo(self.codebook.dtype).bits
        return self.codes.size * 8 + self.codebook.size * width

    def encode(self, x: jax.Array) -> "SharedTensor":
        if not self.zero and self._lacks_zero(x):
            return palettize(x, clusters=self.codebook.size)
        return dataclasses.replace(self, codes=self._nearest(x))

    def _lacks_zero(self, x: jax.Array) -> bool:
        """Whether ``x`` has zeros, which an entry that trains cannot hold; or may."""
        return not _check.is_concrete(x) or bool(jnp.any(x == 0))

    @jax.jit
    def _nearest(self, x: jax.Array) -> jax.Array:
        """Packed codes of the nearest values; zeros and equal entries keep theirs."""
        flat, table = x.reshape(-1), self.table()
        order = jnp.argsort(table)
        ranked = table[order].astype(_check.wide(table.dtype))  # a 16-bit sum overflows
        middles = (ranked[1:] + ranked[:-1]) / 2
        nearest = order[jnp.searchsorted(middles, flat.astype(middles.dtype))]
        old = packing.unpack(self.codes, self.bits, self.size)
        codes = jnp.where(flat == table[old], old, nearest.astype(old.dtype))
        if self.zero:
            codes = jnp.where(flat == 0, 0, codes)
        return packing.pack(codes, self.bits)

    def describe(self) -> str:
        return f"{self.codebook.size + self.zero} shared values"


def checked_values(caller: str, x: jax.Array) -> np.ndarray:
    """The values of ``x`` in C order, once there are some, all finite, on the host."""
    if not _check.is_concrete(x):
        raise ValueError(
            f"{caller} needs the values of {_check.describe(x)}, which are not known "
            "under jit: it solves the codebook on the host. Call it outside jit."
        )
    if not x.size:
        raise ValueError(
            f"{caller} needs at least one value, got {_check.describe(x)}. Leave this "
            "leaf out with `where`."
        )
    values = np.asarray(x).reshape(-1)
    if not np.isfinite(values.astype(np.float64)).all():
        fault = values[~np.isfinite(values.astype(np.float64))][0]
        raise ValueError(
            f"{caller} needs finite values, got {fault} in {_check.describe(x)}. Mend "
            "the array, or leave this leaf out with `where`."
        )
    return values


def palettize(x: jax.Array, clusters: int = 16) -> SharedTensor:
    """Gives ``x`` at most ``clusters`` distinct values, with the least squared error.

    Han et al., "Deep Compression", arXiv:1510.00149, section 3, with the globally
    optimal codebook (Wang and Song, "Ckmeans.1d.dp", R Journal 2011) in place of
    k-means from a linear start.

    Args:
      x: float[*shape], concrete: the codebook is solved on the host, not under jit.
      clusters: the most distinct values of the result, 1 to 65536. If ``x`` has exact
        zeros, 0 is one of them.

    Returns:
      A `SharedTensor`; exact zeros stay exactly zero. If ``x`` has no more than
      ``clusters`` values, ``dense`` equals ``x`` bit for bit (-0.0 becomes 0.0).

    Raises:
      ValueError: ``clusters`` is out of range, ``x`` is empty, traced or not finite, or
        one cluster would have to hold both zeros and other values.
      TypeError: ``x`` is not floating point.

    >>> palettize(jnp.array([0.0, 1.0, 1.2, 5.0]), clusters=3).dense()
    Array([0. , 1.1, 1.1, 5. ], dtype=float32)
    """
    x = _check.floating("palettize", x)
    _check.integer_within("palettize", "clusters", clusters, 1, 2**packing.WIDEST)
    values = checked_values("palettize", x)
    live = values != 0
    zero = not live.all()
    room = clusters - zero
    if live.any() and not room:
        raise ValueError(
            "palettize needs clusters >= 2 for an array with zeros, which keep one "
            f"value to themselves, got clusters={clusters}."
        )
    codebook = np.zeros(0, values.dtype)
    codes = np.zeros(values.size, np.int64)
    if live.any():
        exact = optimal_centroids(values[live], room)
        codebook = np.unique(exact.astype(values.dtype))  # narrow floats may coincide
        codes[live] = assign(values[live], codebook) + zero
    bits = max(1, (codebook.size + zero - 1).bit_length())
    packed = packing.pack(jnp.asarray(codes.astype(np.uint16)), bits)
    return SharedTensor(packed, jnp.asarray(codebook), bool(zero), bits, x.shape)


def share_tree(params: Any, clusters: int = 16, *, where: Where = is_matrix) -> Any:
    """Turns the selected leaves of ``params`` into `SharedTensor`, a codebook for each.

    Args:
      params: any pytree. Leaves that are compressed already are left as they are.
      clusters: the most distinct values of a leaf, 0 included where there are zeros.
      where: (path, leaf) -> bool.

    Returns:
      A tree of the same keys; leaves that are not selected are the same objects.

    Raises:
      ValueError: nothing is selected, a selected leaf holds a NaN or an infinity, or
        ``clusters`` is out of range. The error names the leaf.
      TypeError: a selected leaf is not floating point.

    >>> small = share_tree({"kernel": jnp.array([[0.1, 0.2], [0.8, 0.9]])}, clusters=2)
    >>> small["kernel"].codebook
    Array([0.15, 0.85], dtype=float32)
    """
    return map_where(
        partial(palettize, clusters=clusters), params, where, caller="share_tree"
    )
