"""Files of named arrays: safetensors of any dtype, shards of it, and ``.npz``.

``safetensors.numpy`` reads neither bfloat16 nor float8 and wants all tensors at once.
So the library checks the header, and the arrays are views of the memory-mapped file;
what is written passes through memory one array at a time.
"""

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from jaxcomp import _check
from jaxcomp.coders import ahead, threads_for
from jaxcomp.storage.draft import CODES, DTYPES, replacing, safetensors_header
from jaxcomp.storage.fields import is_number


_HALF = "float4_e2m1fn"  # two elements a byte, the first in the low bits


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the tensors of a file.

    Returns:
      (metadata, name -> array). Arrays are read-only views of the mapped file, read
      when they are used; F4 alone is unpacked, one element a byte.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the header does not describe the file, or has a dtype that NumPy and
        ml_dtypes lack.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "w.safetensors")
    ...     size = write_safetensors(path, {"w": jnp.ones(2, jnp.bfloat16)})
    ...     read_safetensors(path)[1]["w"]
    array([1, 1], dtype=bfloat16)
    """
    size = path.stat().st_size
    try:
        # Lengths, offsets without gaps or overlaps, sizes of shapes, UTF-8: it checks
        # all of the header and reads nothing else.
        with safetensors.safe_open(path, framework="numpy"):
            pass
        data = np.memmap(path, np.uint8, mode="r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(
            f"read_checkpoint needs a whole safetensors file, but {path} ({size} "
            f"bytes) is cut off, damaged or something else: {error}."
        ) from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"read_checkpoint cannot tell what the bits of {name!r} of {path} "
                f"mean, which are {entry['dtype']}. It knows {', '.join(DTYPES)}."
            )
        first, last = entry["data_offsets"]
        raw = np.asarray(data[start + first : start + last])
        if DTYPES[entry["dtype"]] == _HALF:
            raw = np.stack([raw & 15, raw >> 4], axis=-1).reshape(-1)
        dtype = jnp.dtype(DTYPES[entry["dtype"]])
        tensors[name] = raw.view(dtype).reshape(entry["shape"])
    return metadata, tensors


def write_safetensors(path: Path, tensors: dict[str, Any]) -> int:
    """Writes one file, atomically, as ``safetensors.numpy`` would.

    Args:
      path: the file.
      tensors: name -> an array, or what has a shape and a dtype and becomes an array
        when its turn comes. A few at a time are in memory.

    Returns:
      The size of the file in bytes.

    Raises:
      TypeError: safetensors lacks a dtype.
      ValueError: a name is taken, or the bits of a tensor do not fill its last byte.
    """
    described = {
        name: (x.dtype.name, list(x.shape), _nbytes(name, x))
        for name, x in tensors.items()
    }
    header, names = safetensors_header(described, {})
    sizes = [described[name][2] for name in names]
    arrays = (tensors[name] for name in names)
    with replacing(path) as file:
        file.write(header)
        for data in ahead(_bytes_of, arrays, sizes, threads_for(sum(sizes))):
            file.write(data.data)
        return file.tell()


def read_sharded(path: Path) -> dict[str, np.ndarray]:
    """The tensors that an index lists, from the files beside it.

    Args:
      path: a ``*.safetensors.index.json`` as Hugging Face writes it.

    Raises:
      FileNotFoundError: there is no index, or a shard of it is missing.
      ValueError: the index makes no sense, names files elsewhere, or tensors that are
        not in their shard.
    """
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        shards = sorted(set(places.values()))
        for shard in shards:
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ValueError(f"{shard!r} is no safetensors file beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            "read_checkpoint needs an index whose weight_map gives the file beside it "
            f"that holds each tensor, but {path} makes no sense: {error!r}."
        ) from error
    found = {shard: read_safetensors(path.with_name(shard))[1] for shard in shards}
    for name, shard in places.items():
        if name not in found[shard]:
            raise ValueError(
                f"read_checkpoint needs {name!r} to be in {shard}, as {path} says, but "
                "it is not. Fetch the index and its files again."
            )
    return {name: found[shard][name] for name, shard in places.items()}


def write_sharded(path: Path, tensors: dict[str, Any], shard_bytes: int) -> int:
    """Writes files of at most ``shard_bytes`` of tensors, then the index of them.

    A checkpoint of many files cannot take the place of another in one step, so nothing
    is replaced. The index comes last: without it there is no checkpoint.

    Args:
      path: the index, ``*.safetensors.index.json``.
      tensors: as in `write_safetensors`. They fill the files in their order.
      shard_bytes: the most that the tensors of a file take; a larger one has a file of
        its own.

    Returns:
      The size of all files in bytes.

    Raises:
      FileExistsError: one of the files is there already.
    """
    sizes = {name: _nbytes(name, x) for name, x in tensors.items()}
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    stem = path.name.removesuffix(".safetensors.index.json")
    files = [
        path.with_name(f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors")
        for i in range(len(groups))
    ]
    for one in [path, *files]:
        check_absent(one)
    places = {n: f.name for f, names in zip(files, groups, strict=True) for n in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    text = json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
    try:
        written = [
            write_safetensors(shard, {name: tensors[name] for name in names})
            for shard, names in zip(files, groups, strict=True)
        ]
        with replacing(path) as file:
            file.write(text)
    except BaseException:
        for shard in files:
            shard.unlink(missing_ok=True)
        raise
    return sum(written) + len(text)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a ``.npz`` file; NumPy refuses those that are pickled.

    Raises:
      ValueError: an array is not of numbers.
    """
    # NumPy leaves a file that it opened itself open where that is damaged.
    with open(path, "rb") as file, np.load(file) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for name, array in arrays.items():
        if not is_number(array.dtype):
            raise ValueError(
                f"{name!r} is {_check.describe(array)}, not numbers; a bfloat16 or a "
                "float8 that NumPy has no word for needs .view to become one"
            )
    return arrays


def write_npz(path: Path, arrays: dict[str, Any]) -> int:
    """Writes a ``.npz`` file, atomically and the same for the same arrays.

    Returns:
      The size of the file in bytes.

    Raises:
      TypeError: NumPy has no word for a dtype in a file.
    """
    for name, x in arrays.items():
        if x.dtype.isbuiltin != 1:
            raise TypeError(
                f"write_checkpoint cannot put leaf {name!r}, which is "
                f"{_check.describe(x)}, into {path.name}: NumPy has no word for that "
                "dtype in a file. Write .safetensors or .jxc."
            )
    # numpy.savez takes some names for its own arguments, and stores the time.
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, x in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(x))
    return path.stat().st_size


def check_absent(path: Path) -> None:
    """Raises where a checkpoint of many files would have to replace something."""
    if path.exists():
        raise FileExistsError(
            f"write_checkpoint cannot replace many files in one step, and {path} is "
            "there already. Remove the old checkpoint, or choose another name."
        )


def _nbytes(name: str, x: Any) -> int:
    if name == "__metadata__":
        raise ValueError(
            "write_checkpoint needs another name for the leaf '__metadata__', which "
            "safetensors keeps to itself."
        )
    if x.dtype.name not in CODES:
        raise TypeError(
            f"write_checkpoint needs dtypes that safetensors has, but leaf {name!r} is "
            f"{_check.describe(x)}. Cast it, or write it to .jxc, to .msgpack or to an "
            "Orbax folder."
        )
    size = math.prod(x.shape)
    if x.dtype.name != _HALF:
        return size * x.dtype.itemsize
    if size % 2:
        raise ValueError(
            f"write_checkpoint needs whole bytes, but leaf {name!r} is "
            f"{_check.describe(x)}: {size} elements of half a byte. Cast it, or write "
            "it to .jxc."
        )
    return size // 2


def _bytes_of(x: Any) -> np.ndarray:
    """uint8: the elements little-endian, in C order."""
    array = np.asarray(x, order="C")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    flat = array.reshape(-1).view(np.uint8)
    return flat[::2] | flat[1::2] << 4 if array.dtype.name == _HALF else flat
