"""One array of any dtype, bit for bit, in fewer bytes.

Weights that nobody quantized still hide order. Their exponents are few and skewed, so
the bits of a float are rotated until the exponent fills the top byte and each byte
position, a plane, gets an entropy coder of its own. Pruned weights are exact zeros; a
mask of them lets all planes skip those elements at once. Mantissas are noise and stay
raw, at no cost. Nothing is rounded: NaN payloads and signed zeros come back.
"""

import math

import numpy as np

from jaxcomp.entropy import decode_symbols, decode_varint, encode_symbols, encode_varint


_PLANES, _MASKED, _RAW = 0, 1, 2  # the first byte: what follows it


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


def decode_array(data: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array that `encode_array` coded.

    Args:
      data: one whole stream.
      dtype: the dtype of the array; of its byte orders the result has this one.
      shape: the shape of the array.

    Returns:
      ``dtype[*shape]`` in C order, writable.

    Raises:
      ValueError: ``data`` is damaged or holds another number of elements.

    >>> decode_array(encode_array(np.array([1.5, -0.0])), np.dtype(float), (2,))
    array([ 1.5, -0. ])
    """
    dtype = np.dtype(dtype)
    word, rotates = _word(dtype)
    size = math.prod(shape) * dtype.itemsize // word.itemsize
    try:
        words = _decode_words(data, size, word.itemsize)
    except ValueError as error:
        raise ValueError(
            f"decode_array needs a stream of encode_array for {dtype}{list(shape)}, "
            f"got {len(data)} bytes that are not: {error}"
        ) from error
    if rotates:
        words = words >> 1 | words << (8 * word.itemsize - 1)
    return words.astype(word).view(dtype).reshape(shape)


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


def _decode_words(data: bytes, size: int, itemsize: int) -> np.ndarray:
    if not data or data[0] > _RAW:
        raise ValueError(f"the first byte must be 0, 1 or 2, not {data[:1].hex()!r}")
    if data[0] == _RAW:
        if len(data) != 1 + size * itemsize:
            raise ValueError(f"raw, it takes {1 + size * itemsize} bytes")
        return np.frombuffer(data, f"<u{itemsize}", offset=1)
    streams, pos = [], 1
    for _ in range(itemsize - (data[0] == _PLANES)):
        length, pos = decode_varint(data, pos)
        streams.append(data[pos : pos + length])
        pos += length
    streams.append(data[pos:])
    if data[0] == _PLANES:
        return _decode_planes(streams, size)
    mask = decode_symbols(streams[0], size)
    if mask.size and mask.max() > 1:
        raise ValueError(f"the mask must hold 0 and 1, not {mask.max()}")
    kept = mask.astype(bool)
    words = np.zeros(size, f"<u{itemsize}")
    words[kept] = _decode_planes(streams[1:], int(np.count_nonzero(kept)))
    return words


def _decode_planes(streams: list[bytes], size: int) -> np.ndarray:
    planes = np.empty((size, len(streams)), np.uint8)
    for i, stream in enumerate(streams):
        plane = decode_symbols(stream, size)
        if plane.dtype != np.uint8:
            raise ValueError(f"plane {i} must hold bytes, not {plane.max()}")
        planes[:, i] = plane
    return planes.view(f"<u{len(streams)}").reshape(size)
