"""Arrays of any dtype, bit for bit, in fewer bytes.

Weights that nobody quantized still hide order. Their exponents are few and skewed, so
the bits of a float are rotated until the exponent fills the top byte and each byte
position, a plane, gets an entropy coder of its own. Pruned weights are exact zeros; a
mask of them lets all planes skip those elements at once. Mantissas are noise and stay
raw, at no cost. Nothing is rounded: NaN payloads and signed zeros come back.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jaxcomp import bits as packing
from jaxcomp.entropy import (
    BLOCK,
    decode_pieces,
    decode_ranks,
    decode_varint,
    encode_block,
    encode_varint,
)


_PLANES, _MASKED, _RAW = 0, 1, 2  # the first byte: what follows it
_STEP = 1 << 18  # elements at a time: what decoding takes besides the array is small


class Lanes(NamedTuple):
    """How codes lie in lanes of equal length, each with padding at its end."""

    channels: int
    length: int
    live: int  # codes of a lane before its padding

    def is_left_out(self, size: int, total: int) -> bool:
        """Whether so many of all codes are those without the padding."""
        fits = self.live < self.length <= _STEP and self.channels * self.length <= total
        return fits and size == self.channels * self.live != total


def without_padding(codes: np.ndarray, bits: int, lanes: Lanes) -> np.ndarray:
    """The codes of all lanes but their padding, if that is what is put back on reading.

    >>> without_padding(np.array([1, 3, 5, 3, 0], np.uint8), 3, Lanes(2, 2, 1))
    array([1, 5], dtype=uint8)
    """
    end, fill = lanes.channels * lanes.length, 2 ** (bits - 1) - 1
    if not lanes.is_left_out(lanes.channels * lanes.live, codes.size):
        return codes
    inside = codes[:end].reshape(lanes.channels, lanes.length)
    if np.any(inside[:, lanes.live :] != fill) or codes[end:].any():
        return codes
    return inside[:, : lanes.live].reshape(-1)


def encode_array(
    x: np.ndarray, block: Callable[[np.ndarray, bool], bytes] = encode_block
) -> bytes:
    """Codes the bits of an array without loss.

    Besides what it returns, twice, it takes less than 128 MiB.

    Args:
      x: any dtype but object, any shape and memory order.
      block: does what `entropy.encode_block` does, maybe elsewhere.

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
    words = np.ascontiguousarray(x).reshape(-1).view(word)
    size, width = words.size, word.itemsize

    def parts() -> Iterator[np.ndarray]:
        for start in range(0, size, BLOCK):
            part = words[start : start + BLOCK]
            if rotates:
                part = part << 1 | part >> (8 * width - 1)
            yield part.astype(word.newbyteorder("<"), copy=False)

    dropped = size - int(np.count_nonzero(words))
    coded = []
    # A mask says nothing new about single bytes, and below 1/256 it is not worth a try;
    # of many floats above 1/4 it pays: else all planes would have to tell of the zeros.
    if width == 1 or not rotates or 4 * dropped <= size or size < 1 << 16:
        coded.append(bytes([_PLANES]) + _join(_encode(parts(), size, width, block)))
    if width > 1 and 256 * dropped > size:
        masks = ((part != 0).view(np.uint8) for part in parts())
        kept = (part[part != 0] for part in parts())
        streams = _encode(masks, size, 1, block)
        streams += _encode(kept, size - dropped, width, block)
        coded.append(bytes([_MASKED]) + _join(streams))
    best = min(coded, key=len)
    if len(best) <= size * width:
        return best
    return b"".join([bytes([_RAW]), *(part.data for part in parts())])


def decode_array(
    data: bytes | memoryview,
    dtype: np.dtype,
    shape: tuple[int, ...],
    ranks: Callable[[bytes, np.ndarray, int], Iterator[np.ndarray]] = decode_ranks,
) -> np.ndarray:
    """The array that `encode_array` coded.

    Besides the array it takes less than 64 MiB, whatever ``data`` says.

    Args:
      data: one whole stream.
      dtype: the dtype of the array; of its byte orders the result has this one.
      shape: the shape of the array.
      ranks: does what `entropy.decode_ranks` does, maybe elsewhere.

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
        known = [] if data[0] == _RAW else known
        coded = [
            decode_pieces(stream, count, ranks)
            for stream, count in zip(streams, known, strict=False)
        ]
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
    data: bytes | memoryview,
    bits: int,
    shape: tuple[int, ...],
    ranks: Callable[[bytes, np.ndarray, int], Iterator[np.ndarray]] = decode_ranks,
    lanes: Lanes | None = None,
) -> np.ndarray:
    """The packed codes whose symbols `encode_symbols` coded; see `jaxcomp.bits`.

    Besides the array it takes less than 64 MiB, whatever ``data`` says.

    Args:
      data: one whole stream of the symbols of all rows, pad codes too, or what
        `without_padding` left of them.
      bits: width of a code, 1 to 16 bits.
      shape: the shape of the packed codes: (..., bytes).
      ranks: does what `entropy.decode_ranks` does, maybe elsewhere.
      lanes: where the codes may have padding.

    Returns:
      uint8[*shape], aligned as `aligned` says.

    Raises:
      ValueError: ``data`` is damaged, holds another number of symbols, or one that
        takes more bits.

    >>> from jaxcomp.entropy import encode_symbols
    >>> decode_codes(encode_symbols(np.array([1, 2, 3, 0], np.uint8)), 6, (3,))
    array([129,  48,   0], dtype=uint8)
    """
    rows, count = math.prod(shape[:-1]), shape[-1] * 8 // bits
    packed = aligned(math.prod(shape)).reshape(rows, shape[-1])
    packed[:] = 0
    tall, wide = max(1, _STEP // max(1, count)), min(_STEP, count)
    total = rows * count
    if lanes and rows == 1 and lanes.is_left_out(decode_varint(data, 0)[0], total):
        pieces = _padded(decode_pieces(data, None, ranks), lanes, bits, total)
    else:
        pieces = decode_pieces(data, total, ranks)
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


def aligned(size: int) -> np.ndarray:
    """uint8[size], not set, at an address that JAX can take over without a copy."""
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


def _word(dtype: np.dtype) -> tuple[np.dtype, bool]:
    """The unsigned integer that holds an element's bits, and whether to rotate it."""
    # A complex element is two words; one of an odd size, such as a string, is bytes.
    size = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    if size not in (2, 4, 8):
        return np.dtype(np.uint8), False
    is_float = dtype.kind in "fc" or dtype.name == "bfloat16"
    return np.dtype(f"u{size}").newbyteorder(dtype.byteorder), is_float


def _encode(
    parts: Iterable[np.ndarray], size: int, width: int, block: Callable
) -> list[bytearray]:
    """The symbol stream of each plane of words that come in parts."""
    streams = [bytearray(encode_varint(size)) for _ in range(width)]
    left = size
    for words in _regrouped(parts):
        left -= words.size
        lanes = words.view(np.uint8).reshape(words.size, width)
        for stream, lane in zip(streams, lanes.T, strict=True):
            stream += block(np.ascontiguousarray(lane), not left)
    return streams


def _regrouped(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """What the parts hold, as many words as a block has at a time."""
    held: list[np.ndarray] = []
    room = BLOCK
    for part in parts:
        while part.size:
            held.append(part[:room])
            part, room = part[room:], room - held[-1].size
            if not room:
                yield np.concatenate(held) if len(held) > 1 else held[0]
                held, room = [], BLOCK
    if held:
        yield np.concatenate(held)


def _join(streams: list[bytearray]) -> bytes:
    """All streams but the last carry their length; the last ends with the data."""
    counted = [part for s in streams[:-1] for part in (encode_varint(len(s)), s)]
    return b"".join([*counted, streams[-1]])


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


def _padded(
    pieces: Iterator[np.ndarray], lanes: Lanes, bits: int, total: int
) -> Iterator[np.ndarray]:
    """Codes with the padding that `without_padding` left out."""
    take, fill = _taker(pieces), np.uint16(2 ** (bits - 1) - 1)
    step = max(1, _STEP // lanes.length)
    for start in range(0, lanes.channels, step):
        rows = min(step, lanes.channels - start)
        codes = np.full((rows, lanes.length), fill)
        codes[:, : lanes.live] = take(rows * lanes.live).reshape(rows, lanes.live)
        yield codes.reshape(-1)
    next(pieces, None)
    yield np.zeros(total - lanes.channels * lanes.length, np.uint16)


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
