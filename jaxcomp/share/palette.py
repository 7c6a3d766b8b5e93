"""Weight sharing: each weight is an index into a small codebook of values.

The codebook is the optimal one in one dimension (`share.kmeans`), not one that depends
on where Lloyd's iteration started. Exact zeros are kept apart from it, so that training
the codebook cannot move them.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp import bits as packing
from jaxcomp.node import CompressedArray
from jaxcomp.share.histogram import PIECE, order, pieces, rank_among
from jaxcomp.share.kmeans import middles, optimal_centroids
from jaxcomp.tree import Where, is_matrix, map_where


Centroids = Callable[..., np.ndarray]  # (values, clusters, weights) -> float[k]


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
        halves = table[order].astype(_check.wide(table.dtype)) / 2  # sums may overflow
        middles = halves[1:] + halves[:-1]
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
    for piece in pieces(values.size):
        part = values[piece]
        if not np.isfinite(part).all():
            raise ValueError(
                f"{caller} needs finite values, got {part[~np.isfinite(part)][0]} in "
                f"{_check.describe(x)}. Mend the array, or leave this leaf out with "
                "`where`."
            )
    return values


def count_zeros(values: np.ndarray) -> int:
    parts = (values[piece] for piece in pieces(values.size))
    return sum(part.size - int(np.count_nonzero(part)) for part in parts)


def packed_codes(
    values: np.ndarray, code: Callable[[np.ndarray], np.ndarray], bits: int
) -> jax.Array:
    """``code(values)``, taken and packed in pieces; every whole one ends on a byte."""
    if values.size <= PIECE:
        return packing.pack(jnp.asarray(code(values)), bits)
    stream = np.empty(packing.nbytes(values.size, bits), np.uint8)
    for piece in pieces(values.size):
        codes = code(values[piece])
        codes = np.pad(codes, (0, PIECE - codes.size))  # one shape is one compilation
        start = piece.start * bits // 8
        room = stream[start : start + PIECE * bits // 8]
        room[:] = np.asarray(packing.pack(jnp.asarray(codes), bits))[: room.size]
    return jnp.asarray(stream)


def palettize(
    x: jax.Array, clusters: int = 16, *, centroids: Centroids = optimal_centroids
) -> SharedTensor:
    """Gives ``x`` at most ``clusters`` distinct values, with the least squared error.

    Han et al., "Deep Compression", arXiv:1510.00149, section 3, with the globally
    optimal codebook (Wang and Song, "Ckmeans.1d.dp", R Journal 2011) in place of
    k-means from a linear start, which is ``centroids=lloyd``.

    Args:
      x: float[*shape], concrete: the codebook is solved on the host, not under jit.
      clusters: the most distinct values of the result, 1 to 65536. If ``x`` has exact
        zeros, 0 is one of them.
      centroids: (values: float[n], clusters, weights) -> float[k], ``k <= clusters``,
        in any order. Values are those of ``x`` in C order; weights are None, or bool[n]
        that leaves out exact zeros. `optimal_centroids`, `exact_centroids`,
        `zero_centroids`, `lloyd`, a ``partial`` of it, or your own. A centroid that is
        exactly 0 becomes the zero of the table, which values near it join.

    Returns:
      A `SharedTensor`, each weight at the value nearest to it, the lower on a tie;
      exact zeros stay exactly zero. If ``x`` has no more than ``clusters`` values,
      ``dense`` equals ``x`` bit for bit (-0.0 becomes 0.0).

    Raises:
      ValueError: ``clusters`` is out of range, ``x`` is empty, traced or not finite,
        one cluster would have to hold both zeros and other values, or ``centroids``
        returns none, too many or what is not finite.
      TypeError: ``x`` is not floating point.

    >>> palettize(jnp.array([0.0, 1.0, 1.2, 5.0]), clusters=3).dense()
    Array([0. , 1.1, 1.1, 5. ], dtype=float32)
    """
    x = _check.floating("palettize", x)
    _check.integer_within("palettize", "clusters", clusters, 1, 2**packing.WIDEST)
    values = checked_values("palettize", x)
    zeros = count_zeros(values)
    if 0 < zeros < values.size and clusters < 2:
        raise ValueError(
            "palettize needs clusters >= 2 for an array with zeros, which keep one "
            f"value to themselves, got clusters={clusters}."
        )
    entries = np.zeros(0, values.dtype)
    if zeros < values.size:
        entries = _entries(values, clusters, zeros > 0, centroids)
    others = entries != 0
    zero = zeros > 0 or not bool(others.all())
    codebook = entries[others]
    code_of = np.zeros(max(entries.size, 1), np.uint16)
    code_of[: entries.size][others] = np.arange(codebook.size) + zero
    bits = max(1, (codebook.size + zero - 1).bit_length())
    rank = rank_among(_starts(entries), values)

    def code(part: np.ndarray) -> np.ndarray:
        return np.where(part == 0, 0, code_of[rank(part)])

    return SharedTensor(
        packed_codes(values, code, bits), jnp.asarray(codebook), zero, bits, x.shape
    )


def _entries(
    values: np.ndarray, clusters: int, zero: bool, centroids: Centroids
) -> np.ndarray:
    """The values of a codebook, sorted, and 0 among them if a centroid is 0."""
    live = values != 0 if zero else None

    def solved(room: int) -> np.ndarray:
        found = np.asarray(centroids(values, room, live))
        if (
            found.ndim != 1
            or not 0 < found.size <= room
            or not np.isfinite(found).all()
        ):
            raise ValueError(
                f"palettize needs `centroids` to return a vector of 1 to {room} finite "
                f"values, got shape {found.shape}: {found}."
            )
        return np.unique(found.astype(values.dtype))  # narrow floats may coincide

    if live is None:
        return solved(clusters)
    entries = solved(clusters - 1)
    if 0 in entries:  # it is the zero that there is anyway, so one more fits
        more = solved(clusters)
        entries = more if 0 in more else entries
    return entries


def _starts(entries: np.ndarray) -> np.ndarray:
    """uint[k - 1]: the `order` of the least value nearest to each entry but one."""
    last = middles(entries.astype(np.float64))
    near = last.astype(entries.dtype)
    ranks = order(near)
    return ranks + (near.astype(np.float64) <= last).astype(ranks.dtype)


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
