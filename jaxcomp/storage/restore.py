"""A compressed file back into what other programs read, leaf by leaf."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcomp import _check
from jaxcomp.node import DependentArray, TiedTensor, is_compressed
from jaxcomp.storage.checkpoints import write_checkpoint
from jaxcomp.storage.container import Leaves, open_file, save
from jaxcomp.storage.file import FileFault, damaged
from jaxcomp.storage.structure import decode_tree


_STREAMED = (".safetensors", ".json", ".npz")


def restore_checkpoint(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    max_bytes: int | None = None,
    seen: Callable[[str, int], Any] = lambda path, size: None,
) -> int:
    """Writes the leaves of a file, dense, as a checkpoint of any format.

    Into ``.safetensors``, its shards, ``.npz`` and ``.jxc`` it writes leaf by leaf,
    decoded on all cores; into others the tree must fit into the memory.

    Args:
      path: a file of `save`.
      out: the file or folder to write; its name says the format, see
        `write_checkpoint`.
      max_bytes: bytes that the arrays of one leaf may take in memory; see `load`.
      seen: is told the path of each leaf and its dense bytes once it is decoded.

    Returns:
      The size of what was written in bytes.

    Raises:
      FileFault: the file is damaged, hostile or too large. Nothing was written.
      TypeError: the format has no place for a leaf.

    >>> import tempfile
    >>> import jaxcomp as jc
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save(folder + "/w.jxc", {"w": jc.quantize(jax.numpy.ones((2, 2)))})
    ...     size = restore_checkpoint(folder + "/w.jxc", folder + "/w.npz")
    ...     np.load(folder + "/w.npz")["w"].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    leaves = open_file(path, max_bytes=max_bytes)
    leaves.check_pool()
    out = Path(out)
    with leaves.reader() as read:

        def lazy(name: str, _: Any) -> Any:
            with _faults_of(leaves, name):
                value = leaves.like(name)
                return _Dense(leaves, name, read, seen) if _is_array(value) else value

        tree = decode_tree(leaves.structure, lazy)
        if out.suffix == ".jxc":
            return save(out, tree, each=lambda _, leaf: _whole(leaf))
        if out.suffix not in _STREAMED:
            tree = jax.tree.map(_whole, tree)
        return write_checkpoint(out, tree)


class _Dense:
    """An array of a file that is read when its turn comes."""

    def __init__(self, leaves: Leaves, name: str, read: Callable, seen: Callable):
        name = _source(leaves, name)
        like = leaves.like(name)
        if is_compressed(like) and not isinstance(like, DependentArray):
            like = jax.eval_shape(lambda node: node.dense(), like)
        self.shape, self.dtype = like.shape, like.dtype
        self._leaves, self._name, self._read, self._seen = leaves, name, read, seen

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with _faults_of(self._leaves, self._name):
            leaf = self._resolved(self._name)
            array = np.asarray(leaf.dense() if is_compressed(leaf) else leaf)
        self._seen(self._name, self.nbytes)
        return array

    def _resolved(self, name: str) -> Any:
        leaf = self._read(name)
        if isinstance(leaf, DependentArray):
            return leaf.resolve(self._resolved(leaf.source))
        return leaf


@contextlib.contextmanager
def _faults_of(leaves: Leaves, name: str) -> Iterator[None]:
    """What goes wrong with a leaf, whose fields may not fit each other, is a fault."""
    try:
        yield
    except (FileFault, MemoryError):
        raise
    except Exception as error:
        raise damaged(leaves.tensors.path, f"leaf {name!r}: {error}") from error


def _source(leaves: Leaves, name: str) -> str:
    """The leaf itself, or the one it is tied to; all that it needs is there."""
    seen = [name]
    while isinstance(like := leaves.like(seen[-1]), DependentArray):
        if like.source not in leaves or like.source in seen:
            lacks = "a circle" if like.source in seen else "not in the file"
            what = f"leaf {name!r} is tied, but {like.source!r} is {lacks}"
            raise damaged(leaves.tensors.path, what)
        seen.append(like.source)
    return next(n for n in seen if not isinstance(leaves.like(n), TiedTensor))


def _is_array(leaf: Any) -> bool:
    return _check.is_array(leaf) or is_compressed(leaf)


def _whole(leaf: Any) -> Any:
    return np.asarray(leaf) if isinstance(leaf, _Dense) else leaf
