"""The file: a tree of arrays and nodes in one safetensors file, as small as it is.

Each leaf is stored in the smaller of two profiles. *Packed*: its arrays are named
tensors of their own dtype, which any safetensors reader sees. *Coded*: its arrays are
entropy coded, one after the other, in one uint8 tensor under the leaf's path or, where
that would be short, in a tensor that such leaves share. The header's metadata holds the
structure, the checksums and notes of how the file was made; docs/format.md is the
specification. Nothing in a file is ever executed.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcomp import coders
from jaxcomp.entropy import decode_ranks
from jaxcomp.storage import file as files
from jaxcomp.storage.draft import Draft
from jaxcomp.storage.fields import POOL, Fields
from jaxcomp.storage.leaves import (
    adopt,
    encode_fields,
    field_name,
    field_spec,
    leaf_parts,
    plan_leaf,
)
from jaxcomp.storage.like import into
from jaxcomp.storage.structure import (
    decode_tree,
    encode_tree,
    find_spec,
    share_specs,
)


ENTRY = 60  # bytes that one more tensor takes in the header, besides its name
_SHORT = 4096  # bytes; what is longer is worth a name of its own


def save(
    path: str | os.PathLike,
    tree: Any,
    *,
    each: Callable[[str, Any], Any] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> int:
    """Writes a tree of arrays and nodes to one safetensors file, atomically.

    Leaves may be JAX or NumPy arrays of any dtype, random keys, nodes, numbers, strings
    and None. What was at ``path`` stays whole until the new file is. Of a large tree
    some leaves at a time are coded, on all cores; the tree may be larger than the
    memory, if it is a checkpoint on disk and ``each`` makes its leaves small.

    Args:
      path: the file; ``.jxc`` by custom.
      tree: any pytree: dicts, lists, tuples, NamedTuples, ``nnx.State``, Equinox
        modules of arrays.
      each: (path, leaf) -> what is stored in its place, asked when its turn comes, in
        any thread; None stores the leaves.
      notes: how the tree was made, e.g. a recipe; whatever JSON can hold. The versions
        of jaxcomp, JAX and NumPy are noted anyhow. `read_notes` gives them back.

    Returns:
      The size of the file in bytes.

    Raises:
      TypeError: a leaf or a key is of a type that has no place in a file, or the notes
        are not JSON.
      ValueError: two leaves have the same path.
      OSError: the disk is full, the folder cannot be written to and the like.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/w.jxc", {"kernel": jax.numpy.zeros((100, 100))}) < 500
    True
    """
    said = json.dumps(_versions() | dict(notes or {}), separators=(",", ":"))
    named: dict[str, Any] = {}

    def take(name: str, leaf: Any) -> None:
        _check_new(name, named)
        named[name] = leaf

    encode_tree(tree, take)
    sizes = [_nbytes(leaf) for leaf in named.values()]
    specs: dict[str, Any] = {}
    offsets: dict[str, int] = {}
    pool = bytearray()
    threads = coders.threads_for(sum(sizes))
    with coders.Coders(threads) as workers, Draft(Path(path)) as draft:

        def code(item: tuple[str, Any]) -> _Coded:
            name, leaf = item
            stored = leaf if each is None else each(name, leaf)
            coded = _code(name, stored, workers.encode_block)
            files.forget(leaf)
            return coded

        coded = coders.ahead(code, list(named.items()), sizes, threads)
        for name, found in zip(named, coded, strict=True):
            specs[name] = found.spec
            if found.pooled:
                offsets[name] = len(pool)
                pool += found.pooled
            for tensor, array in found.tensors.items():
                _put(draft, tensor, array)
        if pool:
            _put(draft, POOL, np.frombuffer(pool, np.uint8))
        shared, specs = share_specs(specs)
        for name, offset in offsets.items():
            spec = specs[name]
            specs[name] = [*(spec if isinstance(spec, list) else [spec]), offset]
        structure = encode_tree(tree, lambda name, _: specs[name])
        if shared:
            structure = ["specs", shared, structure]
        return draft.write(json.dumps(structure, separators=(",", ":")), said)


def load(
    path: str | os.PathLike, *, like: Any = None, max_bytes: int | None = None
) -> Any:
    """Reads what `save` wrote, bit for bit.

    The file may come from anybody: all that it says is checked, and nothing executed.

    Args:
      path: the file.
      like: a tree of the same paths, whose structure the result takes: NamedTuples,
        ``nnx.State``, Equinox modules. Its arrays may be shape structs; what in it is
        not an array stays. None gives dicts, lists and tuples.
      max_bytes: bytes that the arrays may take in memory, besides 64 MiB to work in;
        more is refused before anything is decoded. None allows 256 times the size of
        the file, but at least 1 GiB.

    Returns:
      The tree. Arrays are JAX arrays; those of a dtype that JAX would narrow (float64
      without ``jax_enable_x64``) are NumPy arrays.

    Raises:
      FileNotFoundError: there is no such file.
      FileFault: a `ValueError` that says where it is damaged, hostile or too large.
      ValueError: it does not fit ``like``.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save(folder + "/w.jxc", {"step": 3, "kernel": np.ones(2, "f4")})
    ...     load(folder + "/w.jxc")
    {'kernel': Array([1., 1.], dtype=float32), 'step': 3}
    """
    leaves = open_file(path, max_bytes=max_bytes)
    leaves.check_size("the arrays", sum(leaves.sizes.values()))
    leaves.check_pool()
    read = leaves.read_all()
    tree = decode_tree(leaves.structure, lambda name, _: read[name])
    return tree if like is None else into("load", like, tree, path)


def open_file(path: str | os.PathLike, *, max_bytes: int | None = None) -> "Leaves":
    """The leaves of a file by path, each read and decoded when it is asked for.

    Only the header is read at once. The file, which is mapped into memory, may be
    replaced or deleted meanwhile, but must not be written to in place.

    Args:
      path: a file of `save`.
      max_bytes: bytes that the arrays of one leaf may take in memory; see `load`.

    Returns:
      A mapping in the order of the tree. To ask twice is to decode twice.

    Raises:
      FileFault: as `load`; for a tensor or a leaf, once it is asked for.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     w = jax.numpy.ones(2)
    ...     size = save(folder + "/w.jxc", {"a": 2 * w, "b": [w, 7]})
    ...     leaves = open_file(folder + "/w.jxc")
    ...     list(leaves), leaves["b/0"]
    (['a', 'b/0', 'b/1'], Array([1., 1.], dtype=float32))
    """
    limit = files.default_limit(path) if max_bytes is None else max_bytes
    text, tensors = files.map_file(Path(path), limit)
    loose, plans = set(tensors), dict[str, tuple[Fields, Callable[[dict], Any]]]()

    def plan(name: str, spec: Any) -> None:
        try:
            if name in plans:
                raise ValueError("another has the same path")
            found = find_spec(spec, shared)
            plans[name] = fields, _ = plan_leaf(name, found, tensors.views)
            needed = set(fields.tensors.values())
            if not needed <= loose | {POOL}:
                raise ValueError(f"another has one of the tensors {sorted(needed)}")
            loose.difference_update(needed)
        except Exception as error:  # a spec comes from outside: it may hold anything
            raise ValueError(f"leaf {name!r}: {error}") from error

    try:
        match structure := files.parse_json(text):
            case ["specs", list(shared), inner]:
                structure = inner
            case _:
                shared = []
        files.check_paths(structure, limit)
        decode_tree(structure, plan)
        if loose:
            raise ValueError(f"no leaf has the tensor {min(loose)!r}")
    except Exception as error:
        dict(tensors)  # a damaged name does not fit either, but has a wrong checksum
        raise files.FileFault(
            f"load cannot read {path}, whose structure makes no sense: {error}."
        ) from error
    return Leaves(structure, tensors, plans, limit)


def read_notes(path: str | os.PathLike) -> dict[str, Any]:
    """What a file notes about how it was made: versions, and what `save` was given.

    Args:
      path: a file of `save`.

    Raises:
      FileNotFoundError: there is no such file.
      FileFault: it is damaged or not a file of `save`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save(folder + "/w.jxc", {}, notes={"recipe": {"bits": 4}})
    ...     read_notes(folder + "/w.jxc")["recipe"]
    {'bits': 4}
    """
    notes = files.map_file(Path(path), files.default_limit(path))[1].notes
    try:
        found = files.parse_json(notes or "{}")
        if not isinstance(found, dict):
            raise ValueError("they are no object")
    except ValueError as error:
        raise files.damaged(path, f"its notes make no sense: {error}") from error
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Leaves(Mapping[str, Any]):
    """The leaves of a file by path; each is read when it is asked for, every time.

    Attributes:
      structure: the tree as JSON.
      tensors: what the leaves are made of.
      plans: of each leaf its fields, and what makes it of them.
      limit: the bytes that the arrays of a leaf may take.
    """

    structure: Any
    tensors: files.Tensors
    plans: dict[str, tuple[Fields, Callable[[dict], Any]]]
    limit: int

    def __getitem__(self, name: str) -> Any:
        return self._read(name, decode_ranks)

    def __iter__(self) -> Iterator[str]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes that the arrays of each leaf take in memory."""
        return {name: fields.nbytes() for name, (fields, _) in self.plans.items()}

    def like(self, name: str) -> Any:
        """A leaf with shape structs for arrays; nothing is read."""
        fields, make = self.plans[name]
        return make(
            {k: jax.ShapeDtypeStruct(s, d) for k, (d, s) in fields.arrays.items()}
        )

    @contextlib.contextmanager
    def reader(self) -> Iterator[Callable[[str], Any]]:
        """What reads a leaf, with other processes to help where leaves are large."""
        with coders.Coders(coders.threads_for(sum(self.sizes.values()))) as workers:
            yield lambda name: self._read(name, workers.decode_ranks)

    def read_all(self) -> dict[str, Any]:
        """Every leaf, on all cores."""
        sizes = self.sizes
        threads = coders.threads_for(sum(sizes.values()))
        with self.reader() as read:
            found = coders.ahead(read, sizes, sizes.values(), threads)
            return dict(zip(sizes, found, strict=True))

    def check_size(self, what: str, size: int) -> None:
        """Raises a `FileFault` if that many bytes are more than allowed."""
        if size > self.limit:
            raise files.FileFault(
                f"load may take {self.limit} bytes, but {what} of {self.tensors.path} "
                f"would take {size}. If you trust the file, pass max_bytes={size}."
            )

    def check_pool(self) -> None:
        """Refuses to decode a part of the pool for more than one leaf, or for none."""
        plans = [fields for fields, _ in self.plans.values()]
        pooled = [f for f in plans if f.offset is not None and f.tensors[""] == POOL]
        pool = self.tensors[POOL] if pooled else np.zeros(0, np.uint8)
        reached = 0
        try:
            ranges = sorted(f.range_in(pool) for f in pooled)
            for start, end in [*ranges, (pool.size, 0)]:
                if start != reached:
                    raise ValueError(f"byte {reached} is next, not byte {start}")
                reached = end
        except ValueError as error:
            raise files.damaged(
                self.tensors.path, f"tensor {POOL!r}: {error}"
            ) from error

    def _read(self, name: str, ranks: Callable) -> Any:
        fields, make = self.plans[name]
        self.check_size(f"leaf {name!r}", fields.nbytes())
        try:
            arrays = fields.read(self.tensors, ranks)
            for tensor in set(fields.tensors.values()) - {POOL}:
                files.forget(self.tensors.views[tensor])
            return make({field: adopt(x) for field, x in arrays.items()})
        except (files.FileFault, MemoryError):
            raise
        except Exception as error:  # a hostile file may make anything of it
            raise files.damaged(self.tensors.path, f"leaf {name!r}: {error}") from error


class _Coded(NamedTuple):
    """A leaf as it is stored: in tensors, or in the pool."""

    spec: Any
    tensors: dict[str, np.ndarray]
    pooled: bytes = b""


def _code(path: str, leaf: Any, block: Callable) -> _Coded:
    """A leaf in the smaller of the profiles."""
    spec, arrays = leaf_parts(path, leaf)
    packed = {field_name(path, key): a for key, a in arrays.items()}
    size = sum(a.nbytes + len(name) + ENTRY for name, a in packed.items())
    exact = all(a.dtype.name in files.NATIVE.values() for a in arrays.values())
    if arrays and (not exact or size > 2 * ENTRY):
        blob = encode_fields(leaf, arrays, block)
        coded = [*spec, {key: field_spec(a) for key, a in arrays.items()}]
        extra = len(json.dumps(coded)) - len(json.dumps(spec))
        if len(blob) < _SHORT:
            if not exact or len(blob) + extra < size:
                return _Coded(coded, {}, blob)
        elif not exact or len(blob) + len(path) + ENTRY + extra < size:
            return _Coded(coded, {path: np.frombuffer(blob, np.uint8)})
    return _Coded(0 if spec == ["array"] else spec, packed)


def _put(draft: Draft, name: str, array: np.ndarray) -> None:
    if name == "__metadata__":
        raise ValueError(
            "save needs another name for the leaf '__metadata__', which safetensors "
            "keeps to itself."
        )
    _check_new(name, draft.tensors)
    draft.put(name, array)


def _check_new(name: str, taken: Mapping[str, Any]) -> None:
    if name in taken:
        raise ValueError(
            f"save needs a path of its own for every leaf, but two are {name!r}. "
            "Rename a key that has a '/'."
        )


def _versions() -> dict[str, str]:
    """Of those packages that are installed; a copy of jaxcomp may just lie there."""
    found = {}
    for name in ("jaxcomp", "jax", "numpy", "constriction"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _nbytes(leaf: Any) -> int:
    """About the bytes that a leaf takes."""
    arrays = [x for x in jax.tree.leaves(leaf) if hasattr(x, "dtype")]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
