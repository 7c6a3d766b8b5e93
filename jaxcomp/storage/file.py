"""One safetensors file: a text and named arrays, checksummed, written atomically.

The entry ``jaxcomp`` of the header's metadata is the version of the format, the
checksums and the structure, parted by spaces; ``jaxcomp_notes`` says who made the file.

A file may come from anybody. All that its header says is checked before it is used, and
here rather than by safetensors, which would have to open the path again, after somebody
may have replaced the file.
"""

import dataclasses
import json
import math
import mmap
import os
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcomp.storage.draft import VERSION, Draft, checksum, crc


# The dtypes of safetensors that versions 1 and 2 have, and ours of the same bits.
NATIVE = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
}

_FREE = 1 << 26  # bytes that reading a header may take whatever the limit is
_GROWTH = 48  # bytes in memory for each byte of JSON, at worst
_PATHS = 1 << 24  # characters of all paths of a tree, whatever the limit is
_LARGEST = 1 << 48  # bytes of an array; keeps products of lengths in 64 bits


class FileFault(ValueError):
    """A file that is cut off, damaged, mislabelled, hostile or larger than allowed.

    The message names the file, the tensor or leaf, and what is wrong with it.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a file by name; each is checked when it is first asked for.

    Attributes:
      path: the file.
      views: the tensors, left on disk and not checked; for their dtypes and shapes.
      sums: the checksum that each must have.
      notes: JSON of what was noted about the file, or nothing.
      right: the names of those that were found to have it.
    """

    path: Path
    views: dict[str, np.ndarray]
    sums: dict[str, str]
    notes: str = ""
    right: set[str] = dataclasses.field(default_factory=set)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.views[name]
        if name not in self.right:
            if checksum(name, array) != self.sums[name]:
                raise damaged(self.path, f"the checksum of {name!r} is wrong")
            self.right.add(name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.views)

    def __len__(self) -> int:
        return len(self.views)


def damaged(path: Any, what: str) -> FileFault:
    what = what.rstrip(".")  # it may be another error's text
    return FileFault(f"load found {path} damaged: {what}. Fetch the file again.")


def default_limit(path: str | os.PathLike) -> int:
    """Bytes that a file may take in memory unless the caller says more or less.

    256 times its size, since a leaf with 0.3% of its weights left is that much smaller
    in the file, or 1 GiB if that is more.
    """
    return max(1 << 30, 256 * os.path.getsize(path))


def byte_size(dtype: np.dtype, shape: Any) -> int:
    """The bytes of an array whose shape comes from a file.

    Raises:
      ValueError: no array has such a shape.
    """
    if len(shape) > 64 or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{reprlib.repr(shape)} is not the shape of an array")
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize > _LARGEST:
        raise ValueError(f"an array of shape {reprlib.repr(shape)} fits no memory")
    return math.prod(shape) * dtype.itemsize


def parse_json(text: str) -> Any:
    """JSON in which no object may name a thing twice: readers would differ.

    Raises:
      ValueError: it is not JSON, or nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"a name occurs twice among {reprlib.repr(list(found))}")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_paths(structure: Any, limit: int) -> None:
    """Refuses a tree whose paths take far more memory than the text that names them.

    Raises:
      ValueError: they do.
    """
    most = max(_PATHS, limit // 64)
    stack, total = [(structure, 0)], 0
    while stack:
        x, length = stack.pop()
        total += length
        if total > most:
            raise ValueError(f"its paths have more than {most} characters")
        match x:
            case dict():
                stack += [(y, length + 1 + len(key)) for key, y in x.items()]
            case ["dict", *pairs]:
                stack += [(y, length + 1 + len(str(key))) for key, y in pairs]
            case ["list" | "tuple", *items]:
                stack += [(y, length + 8) for y in items]


def map_file(path: Path, limit: int) -> tuple[str, Tensors]:
    """The structure of a file, checked, and its tensors, left on disk.

    Args:
      path: the file.
      limit: bytes that its header may take in memory; 64 MiB are always allowed.

    Raises:
      FileNotFoundError: there is no such file.
      FileFault: the header is cut off, damaged, of another version or not of jaxcomp.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        # An array of its own outlives the file object, and the file's name.
        data = np.asarray(np.memmap(file, mode="r") if size else np.zeros(0, np.uint8))
    try:
        header, body = _parse_header(data, limit)
        ranges = _ranges(header, body.size)
    except ValueError as error:
        raise FileFault(
            f"load needs a whole safetensors file, but {path} ({size} bytes) is "
            f"cut off, damaged or something else: {error}."
        ) from error
    metadata = header.get("__metadata__")
    metadata = metadata if isinstance(metadata, dict) else {}
    text, notes = metadata.get("jaxcomp"), metadata.get("jaxcomp_notes", "")
    version, _, rest = text.partition(" ") if isinstance(text, str) else ("", "", "")
    if not version.isdecimal():
        raise FileFault(
            f"load needs a file of jaxcomp.save, but {path} is plain safetensors with "
            f"{len(ranges)} tensors. Read it with safetensors."
        )
    if version not in ("1", str(VERSION)):
        raise FileFault(
            f"load reads versions 1 to {VERSION} of the format, but {path} is of "
            f"version {version[:20]}. Update jaxcomp."
        )
    found, _, structure = rest.partition(" ")
    views = {
        name: _view(path, name, header[name], body[first:last])
        for name, (first, last) in ranges.items()
    }
    sums = [found[i : i + 8] for i in range(0, len(found), 8)]
    texts = {"the structure": structure, "the notes": notes}
    if version == "1":  # which had no notes
        del texts["the notes"]
    if len(sums) != len(texts) + len(views):
        raise damaged(path, f"it has {len(sums)} checksums for {len(views)} tensors")
    for (name, content), expected in zip(texts.items(), sums, strict=False):
        if not isinstance(content, str) or crc(content) != expected:
            raise damaged(path, f"the checksum of {name!r} is wrong")
    named = dict(zip(sorted(views), sums[len(texts) :], strict=True))
    return structure, Tensors(path, views, named, texts.get("the notes", ""))


def read_file(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The structure and the tensors of a file, once all checksums are right.

    The tensors cannot be written to: they are the file, mapped into memory.

    Raises:
      FileNotFoundError: there is no such file.
      FileFault: it is cut off, damaged, of another version or not a jaxcomp file.
    """
    structure, tensors = map_file(path, default_limit(path))
    return structure, dict(tensors)


def forget(x: Any) -> None:
    """Gives back the memory of a view of a mapped file; used again, it is read again.

    The system would do so by itself when it needs the memory, but not before. What is
    mapped for writing is left alone: a private copy would lose what was written.
    """
    base = x
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap) or not hasattr(base, "madvise"):
        return
    if memoryview(base).readonly and x.flags.c_contiguous and x.size:
        start = x.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
        before = start % mmap.PAGESIZE
        base.madvise(mmap.MADV_DONTNEED, start - before, before + x.nbytes)


def write_file(
    path: Path, structure: str, tensors: dict[str, np.ndarray], notes: str = ""
) -> int:
    """Writes a file beside ``path`` and then, whole, puts it in its place.

    Returns:
      The size of the file in bytes.

    Raises:
      OSError: the disk is full, the folder cannot be written to and the like. What was
        at ``path`` is as it was.
    """
    with Draft(path) as draft:
        for name, array in tensors.items():
            draft.put(name, array)
        return draft.write(structure, notes)


def _parse_header(data: np.ndarray, limit: int) -> tuple[dict[str, Any], np.ndarray]:
    """The header of a safetensors file, and the bytes behind it."""
    size = int.from_bytes(data[:8].tobytes(), "little")
    if not 8 <= 8 + size <= data.size:
        raise ValueError(f"its header should have {size} bytes")
    if _GROWTH * size > max(_FREE, limit):
        raise ValueError(
            f"its header of {size} bytes may take {_GROWTH} times that in memory. If "
            f"you trust it, pass max_bytes={_GROWTH * size}"
        )
    header = parse_json(data[8 : 8 + size].tobytes().decode())
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header, data[8 + size :]


def _ranges(header: dict[str, Any], size: int) -> dict[str, tuple[int, int]]:
    """Where the bytes of each tensor are, once they cover all bytes in turn."""
    ranges = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(), "shape": list(), "data_offsets": [first, last]} if (
                type(first) is type(last) is int and 0 <= first <= last
            ):
                ranges[name] = first, last
            case _:
                raise ValueError(
                    f"it says of tensor {name!r} no more than {reprlib.repr(entry)}"
                )
    reached = 0
    for name, (first, last) in sorted(ranges.items(), key=lambda item: item[1]):
        if first != reached or last > size:
            raise ValueError(
                f"tensor {name!r} should have the bytes {first} to {last} of {size}, "
                f"but byte {reached} is next"
            )
        reached = last
    if reached != size:
        raise ValueError(f"its tensors have {reached} of {size} bytes")
    return ranges


def _view(path: Path, name: str, entry: dict[str, Any], data: np.ndarray) -> np.ndarray:
    """The bytes of a tensor as what its entry in the header says they are."""
    if entry["dtype"] not in NATIVE:
        raise FileFault(
            f"load needs dtypes of version {VERSION} of the format, but {name!r} "
            f"of {path} is {entry['dtype'][:20]}. The file is damaged or newer."
        )
    dtype = jnp.dtype(NATIVE[entry["dtype"]])
    try:
        expected = byte_size(dtype, entry["shape"])
    except ValueError as error:
        raise damaged(path, f"of tensor {name!r}, {error}") from error
    if expected != data.size:
        raise damaged(
            path,
            f"tensor {name!r} has {data.size} bytes, but {dtype.name}{entry['shape']} "
            f"takes {expected}",
        )
    return data.view(dtype).reshape(entry["shape"])
