"""Files on their way to the disk: whole in their place, or not there at all."""

import contextlib
import json
import os
import secrets
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


VERSION = 2  # of the format

# The dtypes of safetensors in its own order, by which a file sorts its tensors. It also
# defines F6_E2M3 and F6_E3M2, but not in which order their bits lie.
DTYPES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
CODES = {name: code for code, name in DTYPES.items()}
_ORDER = {name: i for i, name in enumerate(DTYPES.values())}

_HELD = 1 << 26  # bytes of a draft in memory; more of them go to the disk
_CHUNK = 1 << 22  # bytes copied at a time


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside ``path`` that takes its place once it is whole and on the disk.

    Raises:
      OSError: the disk is full, the folder cannot be written to and the like. What was
        at ``path`` is as it was.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with _naming(path), open(draft, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with _naming(path):
            os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):  # a read-only disk refuses this too
            draft.unlink()
        raise


def safetensors_header(
    tensors: Mapping[str, tuple[str, list[int], int]], metadata: dict[str, str]
) -> tuple[bytes, list[str]]:
    """What a safetensors file begins with, and the names in the order of their bytes.

    Args:
      tensors: name -> (dtype, shape, bytes).
      metadata: texts by name.

    >>> header, names = safetensors_header({"w": ("int8", [2], 2)}, {})
    >>> names, header[8:]
    (['w'], b'{"w":{"dtype":"I8","shape":[2],"data_offsets":[0,2]}}   ')
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    names = sorted(tensors, key=lambda name: (-_ORDER[tensors[name][0]], name))
    end = 0
    for name in names:
        dtype, shape, size = tensors[name]
        start, end = end, end + size
        header[name] = {
            "dtype": CODES[dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    # JSON has escapes for lone surrogates, which UTF-8 lacks.
    data = text.encode(errors="backslashreplace")
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data, names


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the disk name the file, and not its draft or nothing."""
    try:
        yield
    except OSError as error:
        said = error.strerror or str(error)
        raise OSError(error.errno, said, str(path)) from error


class Draft:
    """The tensors of a file of ours, until all are there and the file is written.

    They wait in an unnamed file, so that they need not fit into the memory.

    Args:
      path: where the file will be.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, tuple[str, list[int], int]] = {}
        self._places: dict[str, int] = {}
        self._sums: dict[str, str] = {}
        self._file = tempfile.SpooledTemporaryFile(_HELD, dir=str(path.parent))  # noqa: SIM115

    def __enter__(self) -> "Draft":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def put(self, name: str, array: np.ndarray) -> None:
        """Adds a tensor, in C order and in the byte order of the machine."""
        data = array.reshape(-1).view(np.uint8).data
        self._places[name] = self._file.tell()
        self.tensors[name] = (array.dtype.name, list(array.shape), len(data))
        self._sums[name] = checksum(name, array)
        with _naming(self.path):
            self._file.write(data)

    def write(self, structure: str, notes: str) -> int:
        """Writes the file; returns its size in bytes."""
        tensors = [self._sums[name] for name in sorted(self._sums)]
        sums = "".join([crc(structure), crc(notes), *tensors])
        metadata = {"jaxcomp": f"{VERSION} {sums} {structure}"}
        if notes:
            metadata["jaxcomp_notes"] = notes
        header, names = safetensors_header(self.tensors, metadata)
        with replacing(self.path) as file:
            file.write(header)
            for name in names:
                self._file.seek(self._places[name])
                left = self.tensors[name][2]
                for size in [_CHUNK] * (left // _CHUNK) + [left % _CHUNK]:
                    file.write(self._file.read(size))
            return file.tell()


def crc(text: str) -> str:
    """CRC-32 as 8 hex digits. Lone surrogates, which UTF-8 lacks, are no error."""
    return f"{zlib.crc32(text.encode(errors='surrogatepass')):08x}"


def checksum(name: str, array: np.ndarray) -> str:
    """CRC-32 of what a tensor is called, what it is, and its bytes."""
    label = f"{name} {array.dtype.name} {list(array.shape)} "
    start = zlib.crc32(label.encode(errors="surrogatepass"))
    return f"{zlib.crc32(array.reshape(-1).view(np.uint8).data, start):08x}"
