"""Basis sharing: the matrices of several layers as products with one left factor."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp.lowrank.factor import LowRankTensor, check_zeros, nbits_of, rows_of
from jaxcomp.node import DependentArray, flatten, is_compressed
from jaxcomp.tree import check_finite, list_paths


# Of the mean of the diagonal of X'X, added to it: inputs that were never seen have some
# weight, and a layer that saw fewer rows than it has inputs has a Cholesky factor.
_DAMPING = 1e-6
_NOTHING = 1e-14  # of the largest: a singular value of float64 that is rounding alone


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BasisTensor(DependentArray):
    """A product whose left factor, the basis, is that of another leaf of the tree.

    Attributes:
      right: float[rank, columns]; its dtype is the dtype of the array.
      source: path of the leaf whose `LowRankTensor` holds the basis (static).
      shape: shape of the array (static).
    """

    right: jax.Array
    source: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        return self.right.dtype

    def resolve(self, source: Any) -> LowRankTensor:
        rank = self.right.shape[-2]
        if not isinstance(source, LowRankTensor) or source.left.shape[-1] != rank:
            got = source.describe() if is_compressed(source) else "an array"
            raise ValueError(
                f"BasisTensor needs a LowRankTensor of rank {rank} at {self.source!r}, "
                f"got {got}. Densify the whole tree before that leaf is replaced."
            )
        return LowRankTensor(source.left, self.right, True, self.shape)

    def release(self, resolved: Any) -> "BasisTensor":
        # A shared node keeps its left factor in `encode`, so it is still the basis.
        if not isinstance(resolved, LowRankTensor) or not resolved.shared:
            raise ValueError(
                f"BasisTensor.release needs coefficients on the basis of "
                f"{self.source!r}, which other leaves use, got "
                f"{type(resolved).__name__}. Take what `encode` of the resolved node "
                "gives, or densify the whole tree first."
            )
        return dataclasses.replace(self, right=resolved.right)

    def nbits(self) -> int:
        return nbits_of(self.right)

    def describe(self) -> str:
        return f"rank {self.right.shape[-2]}, on the basis of {self.source}"


def share_basis(
    params: Any,
    groups: Sequence[Sequence[str]],
    rank: int,
    *,
    moments: Mapping[str, jax.Array] | None = None,
    split: int = -1,
) -> Any:
    """Factors the matrices of each group on one basis that all of them share.

    Wang et al., "Basis Sharing: Cross-Layer Parameter Sharing for Large Language Model
    Compression", ICLR 2025, arXiv:2410.03765. The matrices of a group lie side by side
    in one truncated singular value decomposition, so that ``n`` matrices [in, out] take
    ``rank * (in + n * out)`` numbers in place of ``n * rank * (in + out)``. With
    ``moments`` the error is that of the products with the inputs: for S'S = X'X, that
    of S W, of which the squared error is the sum of the squared singular values that
    are dropped. A group of one is SVD-LLM (Wang et al., arXiv:2403.07378).

    Departs from the paper: the singular values go to both factors alike, as in
    `factorize`; X'X is damped by 1e-6 of the mean of its diagonal; all-zero rows and
    columns are left out first.

    Args:
      params: any pytree. It runs on the host in float64, not under jit.
      groups: paths of leaves, each with as many rows as the others of its group, e.g.
        ``runs(layers_of(params, "block_*/mlp/kernel"), 2)``.
      rank: the number of basis vectors, 1 to the least of the rows and all the columns
        of a group together.
      moments: path -> float[rows, rows], X'X of the inputs of that leaf, as
        `program.observe` finds it; it has every leaf of ``groups``. Those of a group
        are added. None counts every input alike.
      split: the axes of a leaf before this one are the rows of its matrix.

    Returns:
      A tree of the same keys: the first leaf of a group is a `LowRankTensor`, the
      others are `BasisTensor` on its basis. All-zero columns stay exactly zero, and so
      do rows that are all zero in the whole group.

    Raises:
      ValueError: a group is empty, or a leaf is missing, in two groups, compressed,
        traced, not finite, of other rows or another dtype than the first, or has exact
        zeros elsewhere; ``rank`` or ``split`` is out of range; or a moment is missing,
        of another shape, not finite or not positive semidefinite.
      TypeError: a leaf is not floating point.

    >>> w = jnp.array([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])
    >>> small = share_basis({"a": w, "b": 2 * w}, [("a", "b")], rank=1)
    >>> small["b"].right.shape, small["b"].source
    ((1, 2), 'a')
    """
    paths, leaves, treedef = flatten(params)
    index = {path: i for i, path in enumerate(paths)}
    used: set[str] = set()
    for group in groups:
        if isinstance(group, str) or not group:
            raise ValueError(
                f"share_basis needs groups of paths, got {group!r}. Pass a list of "
                'tuples, e.g. [("block_0/kernel", "block_1/kernel")].'
            )
        for path in group:
            if path not in index or path in used:
                fault = "is named twice" if path in used else "is no leaf"
                raise ValueError(
                    "share_basis needs leaves, each in one group, but "
                    f"{path!r} {fault}. The {len(paths)} leaves are "
                    f"{list_paths(paths)}."
                )
            used.add(path)
    for group in groups:
        held = {path: leaves[index[path]] for path in group}
        for path, node in _on_one_basis(held, rank, moments, split).items():
            leaves[index[path]] = node
    return jax.tree.unflatten(treedef, leaves)


def _on_one_basis(
    held: dict[str, Any],
    rank: int,
    moments: Mapping[str, jax.Array] | None,
    split: int,
) -> dict[str, Any]:
    """path -> node, for the leaves of a group."""
    matrices = _matrices(held, split)
    first = next(iter(held))
    joined = np.concatenate(list(matrices.values()), axis=1)
    _check.integer_within("share_basis", "rank", rank, 1, min(joined.shape))
    live = (joined != 0).any(axis=1)
    for path, matrix in matrices.items():
        what = f"{path!r} {_check.describe(held[path])}"
        check_zeros("share_basis", what, matrix.reshape(held[path].shape), live)
    total = None
    if moments is not None:
        total = np.add.reduce([_moment(moments, p, len(live)) for p in held])
    left, right = _whitened(joined, rank, total)
    ends = np.cumsum([matrix.shape[1] for matrix in matrices.values()])[:-1]
    dtype = held[first].dtype
    rights = [jnp.asarray(r.astype(dtype)) for r in np.split(right, ends, axis=1)]
    basis = jnp.asarray(left.astype(dtype))
    nodes: dict[str, Any] = {
        path: BasisTensor(r, first, held[path].shape)
        for path, r in zip(held, rights, strict=True)
    }
    shared = len(held) > 1
    nodes[first] = LowRankTensor(basis, rights[0], shared, held[first].shape)
    return nodes


def _whitened(
    x: np.ndarray, rank: int, moment: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Factors float64[rows, rank] and [rank, columns] with the least error of S x."""
    rows, columns = (x != 0).any(axis=1), (x != 0).any(axis=0)
    left, right = np.zeros((len(x), rank)), np.zeros((rank, x.shape[1]))
    if not rows.any():
        return left, right
    live = x[np.ix_(rows, columns)]
    root = np.eye(len(live)) if moment is None else _root(moment[np.ix_(rows, rows)])
    target = root @ live
    # The triangle has the singular values and left vectors of the whole, which is long.
    triangle = np.asarray(np.linalg.qr(target.T, mode="r"))
    u, s, _ = np.linalg.svd(triangle.T, full_matrices=False)
    kept = min(rank, int(np.sum(s > _NOTHING * s[0])))
    u, scale = u[:, :kept], np.sqrt(s[:kept])
    left[rows, :kept] = np.linalg.solve(root, u * scale)
    right[:kept, columns] = (u / scale).T @ target
    return left, right


def _root(moment: np.ndarray) -> np.ndarray:
    """S with S'S = X'X, damped, and of a size near 1."""
    size = np.trace(moment) / len(moment)
    damped = moment / size if size > 0 else moment
    try:
        factor = np.linalg.cholesky(damped + _DAMPING * np.eye(len(moment)))
    except np.linalg.LinAlgError as error:
        raise ValueError(
            "share_basis needs moments X'X that are positive semidefinite, got a sum "
            f"with the least eigenvalue {np.linalg.eigvalsh(moment)[0]:.3g}. Pass sums "
            "of products of inputs, as `program.observe` finds them."
        ) from error
    return factor.T


def _matrices(held: dict[str, Any], split: int) -> dict[str, np.ndarray]:
    """float64[rows, columns] by path, once they fit each other."""
    found: dict[str, np.ndarray] = {}
    for path, leaf in held.items():
        if is_compressed(leaf):
            raise ValueError(
                f"share_basis needs arrays, but {path!r} is already compressed "
                f"({leaf.describe()}). Densify first."
            )
        if not _check.is_floating(leaf):
            raise TypeError(
                f"share_basis needs floating arrays, but {path!r} is "
                f"{_check.describe(leaf) if _check.is_array(leaf) else repr(leaf)}."
            )
        rows = rows_of("share_basis", leaf, split)
        if not _check.is_concrete(leaf):
            raise ValueError(
                f"share_basis needs the values of {path!r} {_check.describe(leaf)}, "
                "which are not known under jit. Call it outside jit."
            )
        first = next(iter(held))
        alike = (len(found.get(first, range(rows))), held[first].dtype)
        if (rows, leaf.dtype) != alike:
            raise ValueError(
                f"share_basis needs leaves of as many rows and one dtype, but {path!r} "
                f"{_check.describe(leaf)} has {rows} rows and {first!r} "
                f"{_check.describe(held[first])} has {alike[0]}. Group others, or pass "
                "another `split`."
            )
        check_finite("share_basis", [(path, leaf)])
        found[path] = np.asarray(leaf).astype(np.float64).reshape(rows, -1)
    return found


def _moment(moments: Mapping[str, jax.Array], path: str, rows: int) -> np.ndarray:
    moment: Any = moments.get(path)
    if not _check.is_array(moment) or moment.shape != (rows, rows):
        is_array = _check.is_array(moment)
        got = _check.describe(moment) if is_array else type(moment).__name__
        raise ValueError(
            f"share_basis needs a moment of shape {[rows, rows]} for leaf {path!r}, "
            f"got {got}. The moments are of {list_paths(list(moments)) or 'no leaf'}. "
            "Pass X'X, the `total` of a `Moment`."
        )
    if not _check.is_concrete(moment):
        raise ValueError(
            f"share_basis needs the values of the moment of {path!r}, which are not "
            "known under jit. Call it outside jit."
        )
    values = np.asarray(moment).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(
            f"share_basis needs finite moments, but that of {path!r} holds "
            f"{values[~np.isfinite(values)][0]}. Mend what went into the model."
        )
    return values
