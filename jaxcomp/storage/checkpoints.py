"""Checkpoints of other programs, read and written; the name says the format.

Plain arrays are written as the format's own library would, so that others find what
they expect. Nodes, random keys and dtypes that a format lacks are parted into arrays
that it takes and one text beside them, `storage.structure`'s JSON, from which they come
back. Nothing in a checkpoint is ever executed.
"""

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp.node import flatten, is_compressed
from jaxcomp.storage.container import load, save
from jaxcomp.storage.draft import DTYPES, replacing
from jaxcomp.storage.fields import is_number
from jaxcomp.storage.like import into
from jaxcomp.storage.named_arrays import (
    check_absent,
    read_npz,
    read_safetensors,
    read_sharded,
    write_npz,
    write_safetensors,
    write_sharded,
)
from jaxcomp.storage.parts import is_key, join_parts, part_tree
from jaxcomp.tree import list_paths


_INDEX = ".safetensors.index.json"
_KNOWN = f".jxc, .safetensors, {_INDEX}, .npz, .msgpack, or none for an Orbax folder"
_TORCH = (".pt", ".pth", ".bin")

# Dtypes that TensorStore, under Orbax, is known to store; it has no uint2.
_ORBAX = {*DTYPES.values(), "int2", "int4", "complex128"}


def read_checkpoint(path: str | os.PathLike, *, like: Any = None) -> Any:
    """Reads a checkpoint of any of the usual formats, which its name says.

    ``.jxc``; ``.safetensors``, plain or of `save`; ``.safetensors.index.json`` and its
    shards; ``.npz``; ``.msgpack`` of Flax; ``.pt``, ``.pth`` and ``.bin`` of PyTorch,
    weights only; a folder of Orbax, or one that holds an index or a single
    ``.safetensors`` file.

    Args:
      path: the file or folder.
      like: a tree of the same leaves, whose structure the result takes: ``nnx.State``,
        NamedTuples, lists, Equinox modules. Its arrays may be shape structs. Leaves are
        matched by path; where those differ, "." counts as "/", and the "/value" at the
        end of an ``nnx.State``'s paths does not count.

    Returns:
      The tree. Names with "/" become nested dicts, unless one is the beginning of
      another; names with "." stay as they are; lists become dicts with the keys "0",
      "1", ... where the format has no lists. Arrays are NumPy arrays, views of the
      mapped file if that is safetensors; those of ``.jxc``, of nodes and, where
      ``like`` has no NumPy array, of ``like`` are JAX arrays.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ImportError: a file of PyTorch needs PyTorch.
      ValueError: the name or the folder says no format, the content is damaged or not
        of that format, or it does not fit ``like`` in paths, shapes or dtypes.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = write_checkpoint(folder + "/w.npz", {"dense": {"bias": np.ones(2)}})
    ...     read_checkpoint(folder + "/w.npz")
    {'dense': {'bias': array([1., 1.])}}
    """
    path = Path(path).absolute()
    tree = _reader(path)(path)
    return tree if like is None else into("read_checkpoint", like, tree, path)


def write_checkpoint(
    path: str | os.PathLike, tree: Any, *, shard_bytes: int = 5_000_000_000
) -> int:
    """Writes a checkpoint in the format that its name says, atomically.

    ``.jxc`` as `save`; ``.safetensors``; ``.safetensors.index.json``, whose shards go
    beside it; ``.npz``; ``.msgpack`` of Flax; without an ending, or with ``.orbax``, a
    folder of Orbax. Plain arrays are written as the format's own library does it.
    Compressed trees go into ``.jxc``, ``.msgpack`` and Orbax and come back from there
    with their nodes, lists and tuples. A file takes the place of an older one once it
    is whole; what has many files replaces nothing.

    Args:
      path: the file or folder.
      tree: any pytree of arrays; in ``.jxc``, ``.msgpack`` and Orbax also of nodes,
        random keys, numbers and strings.
      shard_bytes: the most that the tensors of one shard take, but for a larger one.

    Returns:
      The size of what was written in bytes.

    Raises:
      FileExistsError: a folder or a shard is there already.
      TypeError: the format has no place for a leaf.
      ValueError: the name says no format that is written, or two leaves have the same
        path.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_checkpoint(folder + "/w.safetensors", {"w": jnp.zeros((10, 10))})
    472
    """
    path = Path(path).absolute()
    if path.name.endswith(_INDEX):
        _check.integer_within(
            "write_checkpoint", "shard_bytes", shard_bytes, 1, 2**63 - 1
        )
        return write_sharded(path, _arrays(path, tree), shard_bytes)
    if path.suffix == ".safetensors":
        return write_safetensors(path, _arrays(path, tree))
    if path.suffix == ".npz":
        return write_npz(path, _arrays(path, tree))
    writers = {
        ".jxc": save,
        ".msgpack": _write_msgpack,
        ".orbax": _write_orbax,
        "": _write_orbax,
    }
    if path.suffix in writers:
        return writers[path.suffix](path, tree)
    pickled = path.suffix in _TORCH
    raise ValueError(
        f"write_checkpoint needs a name that ends in {_KNOWN}, got {path.name}."
        + (" PyTorch reads .safetensors; pickles are not written." if pickled else "")
    )


def _guarded(read: Callable[[Path], Any], path: Path) -> Any:
    """``read(path)``, whatever a library raises made one error."""
    try:
        return read(path)
    except (FileNotFoundError, PermissionError, ImportError):
        raise
    except Exception as error:  # what comes from outside may be anything
        raise ValueError(
            f"read_checkpoint cannot read {path}, which is damaged or not what its "
            f"name says: {error}."
        ) from error


def _reader(path: Path) -> Callable[[Path], Any]:
    """What reads a path."""
    if path.is_dir():
        return _folder_reader(path)
    if path.name.endswith(_INDEX):
        return lambda index: _nested(read_sharded(index))
    readers: dict[str, Callable[[Path], Any]] = {
        ".jxc": load,
        ".safetensors": _read_safetensors,
        ".npz": partial(_guarded, lambda path: _nested(read_npz(path))),
        ".msgpack": partial(_guarded, _read_msgpack),
        **dict.fromkeys(_TORCH, partial(_guarded, _read_torch)),
    }
    if path.suffix not in readers:
        path.stat()  # a name that is not there is that error first
        raise ValueError(
            f"read_checkpoint needs a folder, or a name that ends in {_INDEX} or one "
            f"of {', '.join(readers)}, got {path.name}."
        )
    return readers[path.suffix]


def _folder_reader(folder: Path) -> Callable[[Path], Any]:
    if (folder / "_METADATA").exists():
        return partial(_guarded, _read_orbax)
    if (folder / "default" / "_METADATA").exists():  # a step of a CheckpointManager
        return lambda step: _guarded(_read_orbax, step / "default")
    for ending in (_INDEX, ".safetensors"):
        found = sorted(folder.glob(f"*{ending}"))
        if len(found) == 1:
            return lambda _: _reader(found[0])(found[0])
        if found:
            break
    inside = sorted(entry.name for entry in folder.iterdir())
    raise ValueError(
        f"read_checkpoint needs a folder with one *{_INDEX}, one .safetensors file, or "
        f"the _METADATA of one tree of Orbax, but {folder} holds {list_paths(inside)}. "
        "Pass the file, or the folder of one step or item."
    )


def _read_safetensors(path: Path) -> Any:
    metadata, tensors = read_safetensors(path)
    return load(path) if "jaxcomp" in metadata else _nested(tensors)


def _read_msgpack(path: Path) -> Any:
    import flax.serialization  # which imports all of Flax

    tree = flax.serialization.msgpack_restore(path.read_bytes())
    if isinstance(tree, dict) and set(tree) == {"jaxcomp", "tree"}:
        return join_parts(tree["jaxcomp"], tree["tree"])
    return tree


def _read_orbax(folder: Path) -> Any:
    # It takes half a second to import, which only they wait for who use it.
    import orbax.checkpoint as ocp

    described = json.loads((folder / "_METADATA").read_bytes())["tree_metadata"]
    for leaf in described.values():
        name = ".".join(str(entry["key"]) for entry in leaf["key_metadata"])
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
        # Without a database, Orbax takes the name of a leaf for a path.
        if not inside and not (folder / "manifest.ocdbt").exists():
            raise ValueError(f"its leaf {name!r} lies outside of the folder")

    def as_stored(about: Any) -> Any:
        # On whatever devices it was saved, it comes back to the host.
        is_scalar = isinstance(about, ocp.metadata.ScalarMetadata)
        return ocp.RestoreArgs(restore_type=None if is_scalar else np.ndarray)

    with ocp.PyTreeCheckpointer() as checkpointer:
        about = checkpointer.metadata(folder)
        args = jax.tree.map(as_stored, about.item_metadata.tree)
        tree = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(args))
    text = (about.custom_metadata or {}).get("jaxcomp")
    return tree if text is None else join_parts(text, tree)


def _read_torch(path: Path) -> Any:
    path.stat()
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"read_checkpoint needs PyTorch to read {path.name}. Install torch, of "
            "which the CPU build will do, or save the weights as .safetensors there."
        ) from error
    mapped = zipfile.is_zipfile(path)  # files of before PyTorch 1.6 are not
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        if isinstance(x, list | tuple):
            return [plain(value) for value in x]
        if not isinstance(x, torch.Tensor):
            return x
        # Bytes know every dtype; NumPy, through PyTorch, neither bfloat16 nor float8.
        dtype = jnp.dtype(str(x.dtype).removeprefix("torch."))
        raw = x.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return raw.view(dtype).reshape(tuple(x.shape))

    return plain(loaded)


def _write_msgpack(path: Path, tree: Any) -> int:
    import flax.serialization

    text, parts = part_tree(tree, lambda x: True)
    state = flax.serialization.to_state_dict(parts)
    if any(is_compressed(x) or is_key(x) for x in flatten(tree)[1]):
        state = {"jaxcomp": text, "tree": state}
    with replacing(path) as file:
        return file.write(flax.serialization.msgpack_serialize(state))


def _write_orbax(path: Path, tree: Any) -> int:
    import orbax.checkpoint as ocp

    check_absent(path)
    text, parts = part_tree(tree, lambda x: x.size and x.dtype.name in _ORBAX)
    if not isinstance(parts, dict | list | tuple):
        parts = {"": parts}  # which has the same path; Orbax refuses single arrays
    names: dict[str, Any] = {}
    for name in flatten(parts)[0]:
        _add(names, name.replace("/", "."), None)  # as Orbax joins them
    room = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(
                Path(room, "tree"),
                parts if names else {"empty": 0},  # it refuses trees without leaves
                custom_metadata={"jaxcomp": text},
            )
        os.rename(Path(room, "tree"), path)
    finally:
        shutil.rmtree(room)
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _arrays(path: Path, tree: Any) -> dict[str, Any]:
    """The arrays of a tree by path, for a format that holds nothing else."""
    arrays: dict[str, Any] = {}
    for name, x in zip(*flatten(tree)[:2], strict=True):
        if not _check.is_array(x) or is_compressed(x) or not is_number(x.dtype):
            raise TypeError(
                f"write_checkpoint can put only arrays of numbers into {path.name}, "
                f"but leaf {name!r} is of type {type(x).__name__}. For a node call "
                "jaxcomp.densify first, or write .jxc, .msgpack or an Orbax folder, "
                "which hold all kinds of leaves."
            )
        _add(arrays, name, x)
    return arrays


def _add(leaves: dict[str, Any], path: str, x: Any) -> None:
    if path in leaves:
        raise ValueError(
            "write_checkpoint needs a path of its own for every leaf, but two are "
            f"{path!r}. Rename a key that has a '/' or, for Orbax, a '.'."
        )
    leaves[path] = x


def _nested(arrays: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts of what has paths for names; as it is, where they cannot be."""
    tree: dict[str, Any] = {}
    for name, x in arrays.items():
        *above, last = name.split("/")
        inner = tree
        for key in above:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                return arrays
        if last in inner:
            return arrays
        inner[last] = x
    return tree
