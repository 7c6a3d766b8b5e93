"""Arrays of any dtype, bit for bit, in fewer bytes.

Weights that nobody quantized still hide order. Their exponents are few and skewed, so
the bits of a float are rotated until the exponent fills the top byte and each byte
position, a plane, gets an entropy coder of its own. Pruned weights are exact zeros; a
mask of them lets all planes skip those elements at once. Mantissas are noise and stay
raw, at no cost. Nothing is rounded: NaN payloads and signed zeros come back.

The arrays of a leaf, its fields, follow one another. What a file says of them is
checked when they are planned, before any is read.
"""

import dataclasses
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcomp import bits as packing
from jaxcomp.entropy import decode_pieces, decode_varint, encode_symbols, encode_varint
from jaxcomp.storage.file import byte_size


POOL = "__pool__"  # the tensor that short coded leaves share
_PLANES, _MASKED, _RAW = 0, 1, 2  # the first byte: what follows it
_STEP = 1 << 18  # elements at a time: what decoding takes besides the array is small


def encode_array(x: np.ndarray) -> bytes:
    """Codes the bits of an array without loss.

    Args:
      x: any dtype but object, any shape and memory order.

    Returns:
      A stream for `decode_array`, which must be told the dtype and the shape; at most
      one byte longer than ``x``. The bytes depend on the values, not on the byte order
      of ``x`` or of the machine.

    Raises:
      TypeError: ``x`` holds Python objects.

    >>> encode_array(np.ones(4, np.float32)).hex(" ")
    '00 03 04 00 00 03 04 00 00 03 04 00 00 04 00 7f'
    """
    x = np.asarray(x)
    if x.dtype.hasobject:
        raise TypeError(
            f"encode_array needs plain numbers, got {x.dtype}{list(x.shape)}. Cast the "
            "array to a numeric dtype."
        )
    word, rotates = _word(x.dtype)
    words = np.frombuffer(x.tobytes(), word)
    if rotates:
        words = words << 1 | words >> (8 * word.itemsize - 1)
    words = words.astype(word.newbyteorder("<"))
    forms = [bytes([_RAW]) + words.tobytes()]
    forms.append(bytes([_PLANES]) + _join(_encode_planes(words)))
    kept = words != 0
    dropped = words.size - np.count_nonzero(kept)
    # A mask says nothing new about single bytes, and below 1/256 it is not worth a try.
    if word.itemsize > 1 and 256 * dropped > words.size:
        mask = encode_symbols(kept.view(np.uint8))
        forms.append(bytes([_MASKED]) + _join([mask, *_encode_planes(words[kept])]))
    return min(forms, key=len)


def decode_array(
    data: bytes | memoryview, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    """The array that `encode_array` coded.

    Besides the array it takes less than 64 MiB, whatever ``data`` says.

    Args:
      data: one whole stream.
      dtype: the dtype of the array; of its byte orders the result has this one.
      shape: the shape of the array.

    Returns:
      ``dtype[*shape]`` in C order, writable, aligned as `aligned` says.

    Raises:
      ValueError: ``data`` is damaged or holds another number of elements.

    >>> decode_array(encode_array(np.array([1.5, -0.0])), np.dtype(float), (2,))
    array([ 1.5, -0. ])
    """
    dtype = np.dtype(dtype)
    word, rotates = _word(dtype)
    size = math.prod(shape) * dtype.itemsize // word.itemsize
    try:
        streams = _split(data, size, word.itemsize)
        # Only the number of symbols in the mask says how many its planes must have.
        known = [size, *[size if data[0] == _PLANES else None] * 8]
        coded = [] if data[0] == _RAW else list(map(decode_pieces, streams, known))
        raw = aligned(size * word.itemsize)
        if data[0] == _RAW:
            raw[:] = np.frombuffer(streams[0], np.uint8)
        elif data[0] == _PLANES:
            _decode_planes(coded, raw.reshape(size, word.itemsize))
        else:
            _decode_masked(*coded, words=raw.view(f"<u{word.itemsize}"))
    except ValueError as error:
        raise ValueError(
            f"decode_array needs a stream of encode_array for {dtype}{list(shape)}, "
            f"got {len(data)} bytes that are not: {error}"
        ) from error
    if rotates:
        words = raw.view(word.newbyteorder("<"))
        for start in range(0, size, _STEP):
            part = words[start : start + _STEP]
            part[:] = part >> 1 | part << (8 * word.itemsize - 1)
    if word != word.newbyteorder("<"):
        raw.view(word).byteswap(inplace=True)
    return raw.view(dtype).reshape(shape)


def decode_codes(
    data: bytes | memoryview, bits: int, shape: tuple[int, ...]
) -> np.ndarray:
    """The packed codes whose symbols `encode_symbols` coded; see `jaxcomp.bits`.

    Besides the array it takes less than 64 MiB, whatever ``data`` says.

    Args:
      data: one whole stream of the symbols of all rows, pad codes too.
      bits: width of a code, 1 to 16 bits.
      shape: the shape of the packed codes: (..., bytes).

    Returns:
      uint8[*shape], aligned as `aligned` says.

    Raises:
      ValueError: ``data`` is damaged, holds another number of symbols, or one that
        takes more bits.

    >>> decode_codes(encode_symbols(np.array([1, 2, 3, 0], np.uint8)), 6, (3,))
    array([129,  48,   0], dtype=uint8)
    """
    rows, count = math.prod(shape[:-1]), shape[-1] * 8 // bits
    packed = aligned(math.prod(shape)).reshape(rows, shape[-1])
    packed[:] = 0
    tall, wide = max(1, _STEP // max(1, count)), min(_STEP, count)
    pieces = decode_pieces(data, rows * count)
    take = _taker(pieces)
    for row in range(0, rows if count else 0, tall):
        for start in range(0, count, wide):
            part = packed[row : row + tall, start * bits // 8 :]
            codes = take(len(part) * min(wide, count - start)).reshape(len(part), -1)
            if int(codes.max()) >> bits:
                raise ValueError(f"the code {codes.max()} takes more than {bits} bits")
            part[:, : packing.nbytes(codes.shape[1], bits)] = _pack(codes, bits)
    next(pieces, None)  # none is left, but the end of the stream is yet to be checked
    return packed.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Fields:
    """The arrays of a leaf as a file describes them, checked, with nothing read.

    Attributes:
      arrays: the dtype and shape of each by name.
      tensors: the tensor that holds each; coded fields are all in one.
      bits: width of the codes of those that are coded and hold packed codes.
      offset: where coded fields begin in their tensor; None if they are not coded.
    """

    arrays: dict[str, tuple[np.dtype, tuple[int, ...]]]
    tensors: dict[str, str]
    bits: dict[str, int] = dataclasses.field(default_factory=dict)
    offset: int | None = None

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

    def read(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays, which share no memory with the file."""
        if self.offset is None:
            return {n: _copy(tensors[self.tensors[n]]) for n in self.arrays}
        blob = self.tensors[""]
        data = memoryview(tensors[blob].data)
        parts, end = self._split(data)
        if blob != POOL and end != len(data):
            raise ValueError(f"{len(data) - end} bytes are left over")
        return {
            name: decode_codes(parts[name], self.bits[name], shape)
            if name in self.bits
            else decode_array(parts[name], dtype, shape)
            for name, (dtype, shape) in self.arrays.items()
        }


def plan_fields(
    path: str,
    names: dict[str, str],
    coded: list,
    bits: dict[str, int],
    views: Mapping[str, np.ndarray],
) -> Fields:
    """The fields of a leaf, from what the structure says of them.

    Args:
      path: the path of the leaf.
      names: the fields that it may have, and the tensor of each where it is packed.
      coded: what the structure has behind the kind: nothing, or the dtypes and shapes
        of the coded fields, and an offset if they are in the pool.
      bits: width of the codes of fields that hold packed codes.
      views: the tensors of the file.

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
    return Fields(arrays, {"": blob}, held, offset)


def is_number(dtype: Any) -> bool:
    """Whether JAX and every reader know the dtype; none knows long doubles."""
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    known = dtype == np.bool_ or jnp.issubdtype(dtype, jnp.number)
    return known and dtype.itemsize <= (16 if is_complex else 8)


def aligned(size: int) -> np.ndarray:
    """uint8[size], not set, at an address that JAX can take over without a copy."""
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


def _copy(array: np.ndarray) -> np.ndarray:
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


def _word(dtype: np.dtype) -> tuple[np.dtype, bool]:
    """The unsigned integer that holds an element's bits, and whether to rotate it."""
    # A complex element is two words; one of an odd size, such as a string, is bytes.
    size = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    if size not in (2, 4, 8):
        return np.dtype(np.uint8), False
    is_float = dtype.kind in "fc" or dtype.name == "bfloat16"
    return np.dtype(f"u{size}").newbyteorder(dtype.byteorder), is_float


def _encode_planes(words: np.ndarray) -> list[bytes]:
    planes = words.view(np.uint8).reshape(words.size, words.itemsize)
    return [encode_symbols(plane) for plane in planes.T]


def _join(streams: list[bytes]) -> bytes:
    """All streams but the last carry their length; the last ends with the data."""
    return b"".join([encode_varint(len(s)) + s for s in streams[:-1]] + [streams[-1]])


def _split(data: bytes | memoryview, size: int, width: int) -> list[memoryview]:
    """What follows the first byte: the words, or the mask, if any, and the planes."""
    if not data or data[0] > _RAW:
        raise ValueError(
            f"the first byte must be 0, 1 or 2, not {bytes(data[:1]).hex()!r}"
        )
    rest = memoryview(data)[1:]
    if data[0] == _RAW:
        if len(rest) != size * width:
            raise ValueError(f"raw, it takes {1 + size * width} bytes")
        return [rest]
    streams, pos = [], 0
    for _ in range(width - (data[0] == _PLANES)):
        length, pos = decode_varint(rest, pos)
        streams.append(rest[pos : pos + length])
        pos += length
    streams.append(rest[pos:])
    return streams


def _decode_planes(planes: list[Iterator[np.ndarray]], lanes: np.ndarray) -> None:
    for j, plane in enumerate(planes):
        start = 0
        for piece in plane:
            lanes[start : start + piece.size, j] = _as_bytes(piece, j)
            start += piece.size


def _decode_masked(
    mask: Iterator[np.ndarray], *planes: Iterator[np.ndarray], words: np.ndarray
) -> None:
    takes = [_taker(plane) for plane in planes]
    words[:] = start = 0
    for piece in mask:
        if piece.max() > 1:
            raise ValueError(f"the mask must hold 0 and 1, not {piece.max()}")
        kept = np.flatnonzero(piece) + start
        found = np.empty((kept.size, len(planes)), np.uint8)
        for j, take in enumerate(takes):
            found[:, j] = _as_bytes(take(kept.size), j)
        words[kept] = found.view(words.dtype)[:, 0]
        start += piece.size
    if any(next(plane, None) is not None for plane in planes):
        raise ValueError("a plane holds more symbols than the mask keeps")


def _as_bytes(symbols: np.ndarray, plane: int) -> np.ndarray:
    if symbols.dtype != np.uint8:
        raise ValueError(f"plane {plane} must hold bytes, not {symbols.max()}")
    return symbols


def _taker(pieces: Iterator[np.ndarray]) -> Callable[[int], np.ndarray]:
    """A function that gives the next symbols, as many as it is asked for."""
    held = np.zeros(0, np.uint8)

    def take(count: int) -> np.ndarray:
        nonlocal held
        parts = [held[:count]]
        held = held[count:]
        while count > (found := sum(map(len, parts))):
            piece = next(pieces, None)
            if piece is None:
                raise ValueError(f"{count - found} symbols are missing")
            parts.append(piece[: count - found])
            held = piece[count - found :]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    return take


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """What `bits.pack` does, in NumPy, which compiles nothing for each length."""
    rows, count = codes.shape
    span = math.lcm(bits, 8)
    per = span // bits
    if count % per:
        codes = np.pad(codes, ((0, 0), (0, -count % per)))
    runs = codes.reshape(rows, -1, per)
    packed = np.zeros((rows, runs.shape[1], span // 8), np.uint8)
    for i in range(per):
        for byte in range(i * bits // 8, ((i + 1) * bits + 7) // 8):
            offset = i * bits - 8 * byte  # where code i starts, seen from this byte
            column = runs[..., i]
            shifted = column << offset if offset >= 0 else column >> -offset
            packed[..., byte] |= shifted.astype(np.uint8, copy=False)
    return packed.reshape(rows, -1)[:, : packing.nbytes(count, bits)]
