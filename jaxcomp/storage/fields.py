"""The arrays of a leaf in a file: what it says of them, checked before any is read.

They are named tensors, or follow one another in one tensor, coded.
"""

import dataclasses
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcomp import bits as packing
from jaxcomp.entropy import decode_varint
from jaxcomp.storage.file import byte_size
from jaxcomp.storage.planes import Lanes, aligned, decode_array, decode_codes


POOL = "__pool__"  # the tensor that short coded leaves share


@dataclasses.dataclass(frozen=True)
class Fields:
    """The arrays of a leaf as a file describes them, checked, with nothing read.

    Attributes:
      arrays: the dtype and shape of each by name.
      tensors: the tensor that holds each; coded fields are all in one.
      bits: width of the codes of those that are coded and hold packed codes.
      lanes: where the codes may have padding.
      offset: where coded fields begin in their tensor; None if they are not coded.
    """

    arrays: dict[str, tuple[np.dtype, tuple[int, ...]]]
    tensors: dict[str, str]
    bits: dict[str, int] = dataclasses.field(default_factory=dict)
    offset: int | None = None
    lanes: Lanes | None = None

    def nbytes(self) -> int:
        return sum(byte_size(*array) for array in self.arrays.values())

    def range_in(self, blob: np.ndarray) -> tuple[int, int]:
        """Where coded fields begin and end in their tensor."""
        return self.offset or 0, self._split(memoryview(blob.data))[1]

    def _split(self, data: memoryview) -> tuple[dict[str, memoryview], int]:
        """The stream of each coded field, and where the last one ends."""
        parts, pos = {}, self.offset or 0
        for name in self.arrays:
            length, pos = decode_varint(data, pos)
            if length > len(data) - pos:
                raise ValueError(f"field {name!r} of {length} bytes is cut off")
            parts[name], pos = data[pos : pos + length], pos + length
        return parts, pos

    def read(
        self, tensors: Mapping[str, np.ndarray], ranks: Callable
    ) -> dict[str, np.ndarray]:
        """The arrays, which share no memory with the file."""
        if self.offset is None:
            return {n: copied(tensors[self.tensors[n]]) for n in self.arrays}
        blob = self.tensors[""]
        data = memoryview(tensors[blob].data)
        parts, end = self._split(data)
        if blob != POOL and end != len(data):
            raise ValueError(f"{len(data) - end} bytes are left over")

        def decode(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
            if name not in self.bits:
                return decode_array(parts[name], dtype, shape, ranks)
            lanes = self.lanes if name == "codes" else None
            return decode_codes(parts[name], self.bits[name], shape, ranks, lanes)

        return {name: decode(name, *array) for name, array in self.arrays.items()}


def plan_fields(
    path: str,
    names: dict[str, str],
    coded: list,
    bits: dict[str, int],
    views: Mapping[str, np.ndarray],
    lanes: Lanes | None = None,
) -> Fields:
    """The fields of a leaf, from what the structure says of them.

    Args:
      path: the path of the leaf.
      names: the fields that it may have, and the tensor of each where it is packed.
      coded: what the structure has behind the kind: nothing, or the dtypes and shapes
        of the coded fields, and an offset if they are in the pool.
      bits: width of the codes of fields that hold packed codes.
      views: the tensors of the file.
      lanes: where codes may have padding.

    Raises:
      ValueError: it makes no sense, or a tensor is missing.
    """
    if not coded:
        found = {field: views[n] for field, n in names.items() if n in views}
        arrays = {field: (view.dtype, view.shape) for field, view in found.items()}
        return Fields(arrays, {field: names[field] for field in found})
    match coded:
        case [dict(specs)]:
            blob, offset = path, 0
        case [dict(specs), int(offset)] if offset >= 0:
            blob = POOL
        case _:
            raise ValueError(f"{reprlib.repr(coded)} are no fields")
    if not set(specs) <= set(names):
        raise ValueError(f"it cannot have all of {reprlib.repr(list(specs))}")
    view = views.get(blob)
    if view is None or view.dtype != np.uint8 or view.ndim != 1:
        raise ValueError(f"{blob!r} is not a uint8 tensor of one dimension")
    arrays = {field: _declared(spec) for field, spec in specs.items()}
    held = {field: width for field, width in bits.items() if field in arrays}
    for field, width in held.items():
        dtype, shape = arrays[field]
        if dtype != np.uint8 or not shape or not 1 <= width <= packing.WIDEST:
            raise ValueError(f"{field!r} cannot be {specs[field]} of {width} bits")
    return Fields(arrays, {"": blob}, held, offset, lanes)


def is_number(dtype: Any) -> bool:
    """Whether JAX and every reader know the dtype; none knows long doubles."""
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    known = dtype == np.bool_ or jnp.issubdtype(dtype, jnp.number)
    return known and dtype.itemsize <= (16 if is_complex else 8)


def copied(array: np.ndarray) -> np.ndarray:
    """A copy that JAX can take over, of an array that may be mapped."""
    raw = aligned(array.nbytes)
    raw[:] = array.reshape(-1).view(np.uint8)
    return raw.view(array.dtype).reshape(array.shape)


def _declared(spec: Any) -> tuple[np.dtype, tuple[int, ...]]:
    """The dtype and shape of a coded array, from the list that names them."""
    match spec:
        case [str(name), *shape]:
            # Only a plain name: NumPy has a language of its own for dtypes.
            plain = re.fullmatch("[a-z0-9_]{1,40}", name)
            dtype = jnp.dtype(name if plain else "object")
            if dtype.name != name or not is_number(dtype):
                raise ValueError(f"{reprlib.repr(name)} is no dtype of an array")
        case [*shape]:
            dtype = np.dtype(np.uint8)
        case _:
            raise ValueError(f"{reprlib.repr(spec)} is no shape")
    byte_size(dtype, shape)
    return dtype, tuple(shape)
