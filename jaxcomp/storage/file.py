"""One safetensors file: a text and named arrays, checksummed, written atomically.

The header's single metadata entry, ``jaxcomp``, is the version of the format, the
checksums and the text, parted by spaces. One entry only: safetensors keeps metadata in
no fixed order, and equal trees shall give equal bytes.
"""

import json
import os
import secrets
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save as write_safetensors


VERSION = 1

# The dtypes of safetensors, and ours of the same bits.
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


def _checksums(text: str, tensors: dict[str, np.ndarray]) -> str:
    """CRC-32 of the structure, then of each tensor by name, 8 hex digits each."""
    rows = [text.encode()]
    for name, array in sorted(tensors.items()):
        label = f"{name} {array.dtype.name} {list(array.shape)} "
        rows.append(label.encode() + array.tobytes())
    return "".join(f"{zlib.crc32(row):08x}" for row in rows)


def read_file(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The structure and the tensors of a file, once all checksums are right.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is cut off, damaged, of another version or not a jaxcomp file.
    """
    data = path.read_bytes()
    try:
        views = dict(safetensors.deserialize(data))
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(
            f"load needs a whole safetensors file, but {path} ({len(data)} bytes) is "
            f"cut off, damaged or something else: {error}."
        ) from error
    text = header.pop("__metadata__", {}).get("jaxcomp", "")
    version, _, rest = text.partition(" ")
    if not version.isdecimal():
        raise ValueError(
            f"load needs a file of jaxcomp.save, but {path} is plain safetensors with "
            f"{len(views)} tensors. Read it with safetensors."
        )
    if int(version) != VERSION:
        raise ValueError(
            f"load reads version {VERSION} of the format, but {path} is of version "
            f"{version}. Update jaxcomp."
        )
    crc, _, structure = rest.partition(" ")
    tensors = {}
    for name in header:
        view = views[name]
        if view["dtype"] not in NATIVE:
            raise ValueError(
                f"load needs dtypes of version {VERSION} of the format, but {name!r} "
                f"of {path} is {view['dtype']}. The file is damaged or newer."
            )
        array = np.frombuffer(view["data"], jnp.dtype(NATIVE[view["dtype"]]))
        tensors[name] = array.reshape(view["shape"])
    found = _checksums(structure, tensors)
    for i, name in enumerate(["the structure", *sorted(tensors)]):
        if crc[8 * i : 8 * i + 8] != found[8 * i : 8 * i + 8]:
            raise ValueError(
                f"load found {path} damaged: the checksum of {name!r} is wrong. Fetch "
                "the file again."
            )
    return structure, tensors


def write_file(path: Path, structure: str, tensors: dict[str, np.ndarray]) -> int:
    """Writes a file beside ``path`` and then, whole, puts it in its place.

    Returns:
      The size of the file in bytes.
    """
    text = f"{VERSION} {_checksums(structure, tensors)} {structure}"
    data = write_safetensors(tensors, {"jaxcomp": text})
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return len(data)
