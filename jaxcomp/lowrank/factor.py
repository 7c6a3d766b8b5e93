"""One matrix as the product of two thin ones, by singular value decomposition.

A product has no zeros to spare: what is factored keeps its all-zero rows and columns,
and an array with other exact zeros, a pruned one, is an error.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp.node import CompressedArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LowRankTensor(CompressedArray):
    """A product of two factors: ``dense = (left @ right).reshape(shape)``.

    The leading axes of the shape, as many as make up ``rows``, are the rows of the
    matrix. Sums are in float32 where the dtype is narrower.

    Attributes:
      left: float[rows, rank]; its dtype is the dtype of `dense`.
      right: float[rank, columns].
      shared: whether other leaves use ``left`` too, as their `BasisTensor` say. Then
        `encode` keeps it and takes the ``right`` of least squared error (static).
      shape: shape of `dense` (static).
    """

    left: jax.Array
    right: jax.Array
    shared: bool = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        return self.left.dtype

    @jax.jit
    def dense(self) -> jax.Array:
        if self.left.ndim > 2:  # a stack of nodes, as vmap makes
            return jax.vmap(LowRankTensor.dense)(self)
        product = jnp.matmul(
            self.left,
            self.right,
            precision=jax.lax.Precision.HIGHEST,  # the default of a GPU has 10 bits
            preferred_element_type=_check.wide(self.dtype),
        )
        most = float(jnp.finfo(self.dtype).max)  # rounding may step over it
        values = jnp.clip(product, -most, most).astype(self.dtype)
        return values.reshape(self.shape)

    def nbits(self) -> int:
        return nbits_of(self.left) + nbits_of(self.right)

    def encode(self, x: jax.Array) -> "LowRankTensor":
        same = jnp.all(x == self.dense())
        if _check.is_concrete(same) and same:
            return self
        matrix = x.reshape(self.left.shape[0], self.right.shape[1])
        if self.shared:
            found = self._on_this_basis(matrix)
        else:
            found = factorize(matrix, self.left.shape[1])
        left = jnp.where(same, self.left, found.left.astype(self.dtype))
        right = jnp.where(same, self.right, found.right.astype(self.dtype))
        return dataclasses.replace(self, left=left, right=right)

    def _on_this_basis(self, matrix: jax.Array) -> "LowRankTensor":
        if _check.is_concrete(matrix) and _check.is_concrete(self.left):
            live = (np.asarray(self.left) != 0).any(axis=1)
            check_zeros(
                "LowRankTensor.encode",
                _check.describe(matrix),
                np.asarray(matrix),
                live,
            )
        left = self.left.astype(_check.wide(self.dtype))
        scaled, unit = _near_one(matrix)
        right = jnp.linalg.lstsq(left, scaled)[0] * unit * unit
        return dataclasses.replace(self, right=right)

    def describe(self) -> str:
        rows, rank = self.left.shape[-2:]
        if self.shared:
            return f"rank {rank}, a basis that others share"
        return f"rank {rank} of {min(rows, self.right.shape[-1])}"


def nbits_of(x: jax.Array) -> int:
    return x.size * jnp.finfo(x.dtype).bits


def factorize(x: jax.Array, rank: int, split: int = -1) -> LowRankTensor:
    """The product of two factors of this rank that is closest to ``x``.

    Eckart and Young, "The approximation of one matrix by another of lower rank",
    Psychometrika 1, 1936: a truncated singular value decomposition. Its squared error
    is the sum of the squared singular values that are dropped. Those that are kept go
    to both factors alike, so that both fit a narrow dtype. It is smaller than ``x`` if
    ``rank < rows * columns / (rows + columns)``.

    Args:
      x: float[*shape], of two axes or more.
      rank: the inner length of the product, 1 to ``min(rows, columns)``.
      split: the axes before this one are the rows of the matrix, the others its
        columns. For Flax, -1 suits kernels of dense layers and convolutions, and
        attention outputs; 1 suits attention inputs (d, heads, d_head).

    Returns:
      A `LowRankTensor`; all-zero rows and columns stay exactly zero.

    Raises:
      ValueError: ``rank`` or ``split`` is out of range, ``x`` has fewer than two axes
        or no values, or has exact zeros outside of all-zero rows and columns, which a
        product cannot keep. Under jit zeros are not looked for.
      TypeError: ``x`` is not floating point.

    >>> x = jnp.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    >>> small = factorize(x, rank=1)
    >>> small.left.shape, small.right.shape, bool(jnp.allclose(small.dense(), x))
    ((2, 1), (1, 3), True)
    """
    x = _check.floating("factorize", x)
    rows = rows_of("factorize", x, split)
    most = min(rows, x.size // rows)
    _check.integer_within("factorize", "rank", rank, 1, most)
    if _check.is_concrete(x):
        values = np.asarray(x)  # not where a subnormal number equals 0
        live = (values.reshape(rows, -1) != 0).any(axis=1)
        check_zeros("factorize", _check.describe(x), values, live)
    left, right = _truncated(x.reshape(rows, -1), rank)
    return LowRankTensor(left, right, False, x.shape)


@partial(jax.jit, static_argnames="rank")
def _truncated(x: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    scaled, unit = _near_one(x)
    u, s, v = jnp.linalg.svd(scaled, full_matrices=False)
    root = jnp.sqrt(s[:rank]) * unit
    live = x != 0
    left = jnp.where(live.any(axis=1, keepdims=True), u[:, :rank] * root[None], 0)
    right = jnp.where(live.any(axis=0, keepdims=True), root[:, None] * v[:rank], 0)
    return left.astype(x.dtype), right.astype(x.dtype)


def _near_one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x / unit**2`` by a power of 2, wide, so that its squares can be summed."""
    wide = x.astype(_check.wide(x.dtype))
    exponent = jnp.frexp(jnp.max(jnp.abs(wide)))[1] // 2
    one = jnp.ones((), wide.dtype)
    inverse = jnp.ldexp(one, -exponent)  # twice, as its square may be subnormal
    return wide * inverse * inverse, jnp.ldexp(one, exponent)


def rows_of(caller: str, x: Any, split: int) -> int:
    """The rows of the matrix that ``x`` is, once it is one."""
    at = split + x.ndim if split < 0 else split
    if not 0 < at < x.ndim or not x.size:
        raise ValueError(
            f"{caller} needs an array with values, and axes on both sides of "
            f"split={split}, got {_check.describe(x)}. Pass another `split`, or leave "
            "this leaf out with `where`."
        )
    return math.prod(x.shape[:at])


def check_zeros(caller: str, what: str, x: np.ndarray, live: np.ndarray) -> None:
    """Raises on exact zeros in the rows ``live: bool[rows]``, but for zero columns."""
    zero = x.reshape(len(live), -1) == 0
    scattered = zero & live[:, None] & ~zero.all(axis=0)
    if scattered.any():
        index = tuple(map(int, np.argwhere(scattered.reshape(x.shape))[0]))
        raise ValueError(
            f"{caller} cannot keep the exact zeros of {what}: "
            f"{int(scattered.sum())} of {x.size}, the first at {index}, are outside of "
            "all-zero rows and columns, and a product of factors has no zeros to keep, "
            "nor can it be pruned later. Quantize or share a pruned array instead."
        )
