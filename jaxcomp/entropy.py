"""Order-0 entropy coding of symbol streams: where pruning and few values become bytes.

A quantized or pruned leaf has few distinct symbols, some far more frequent than others.
An entropy coder stores them in close to their entropy; a packed array cannot. The coder
is the rANS stack of constriction; this file adds what a file format needs: integer
frequencies that any other decoder can rebuild exactly, a table of a byte or so per
symbol, and plain bit packing where coding would not pay.

A stream is the varint of the number of symbols, then blocks of at most 2**22 of them,
each with a table of its own: where the symbols change, a block ends.
"""

from collections.abc import Callable, Generator, Iterator

import constriction
import numpy as np

from jaxcomp.cuts import cuts
from jaxcomp.tables import damaged, decode_table, encode_table, pack, unpack


BLOCK = 1 << 22  # symbols at most
_SHORTEST = 15  # log2 of the symbols of a block, but for the last of a stream
_LONGEST = 22
_PIECE = 1 << 18  # symbols, a multiple of 8; bounds the memory that decoding takes
_CODED = 17  # block kinds 0 to 16 are packed, with that many bits a symbol
_KINDS = 18  # a block's first byte is its kind, and so many for each halving of 2**22
_MASS = 1 << 24  # the frequencies of a block add up to this; fixed by constriction


def order0_entropy(counts: np.ndarray) -> float:
    """The Shannon entropy of a histogram, in bits per symbol.

    Args:
      counts: int[symbols]; how often each symbol occurs, none negative.

    Returns:
      Bits per symbol; 0.0 when no symbol or only one occurs.

    Raises:
      ValueError: a count is negative.

    >>> order0_entropy(np.array([2, 1, 1, 0]))
    1.5
    """
    seen = np.asarray(counts, np.float64)
    if np.any(seen < 0):
        raise ValueError(
            f"order0_entropy needs counts >= 0, got {seen.min():g}. Pass a histogram, "
            "such as that of np.bincount."
        )
    seen = seen[seen > 0]
    if seen.size < 2:
        return 0.0
    return float(seen @ np.log2(seen.sum() / seen) / seen.sum())


def encode_symbols(
    symbols: np.ndarray, block: Callable[[np.ndarray, bool], bytes] | None = None
) -> bytes:
    """Codes a stream of small unsigned integers close to its order-0 entropy.

    The bytes depend on the symbols alone, not on the dtype, process or platform.

    Args:
      symbols: uint8[size] or uint16[size].
      block: does what `encode_block` does, maybe elsewhere; None for that itself.

    Returns:
      A self-describing stream for `decode_symbols`, never longer than the symbols
      packed with equally many bits each, but for at most 8 bytes and 4 more for each
      further 2**22 symbols.

    Raises:
      TypeError: the dtype is neither uint8 nor uint16.
      ValueError: ``symbols`` is not one-dimensional.

    >>> encode_symbols(np.array([6, 7, 7, 6], np.uint8)).hex(" ")
    '04 01 06 06'
    """
    symbols = np.asarray(symbols)
    if symbols.dtype.kind != "u" or symbols.dtype.itemsize > 2:
        raise TypeError(
            f"encode_symbols needs uint8 or uint16, got {symbols.dtype}"
            f"{list(symbols.shape)}. Cast the symbols, or split them into bytes."
        )
    if symbols.ndim != 1:
        raise ValueError(
            f"encode_symbols needs one axis, got shape {symbols.shape}. Flatten it."
        )
    code = block or encode_block
    blocks = [
        code(symbols[i : i + BLOCK], i + BLOCK >= symbols.size)
        for i in range(0, symbols.size, BLOCK)
    ]
    return b"".join([encode_varint(symbols.size), *blocks])


def decode_symbols(
    data: bytes | memoryview,
    size: int | None = None,
    ranks: Callable[[bytes, np.ndarray, int], Iterator[np.ndarray]] | None = None,
) -> np.ndarray:
    """The symbols that `encode_symbols` coded.

    Args:
      data: one whole stream.
      size: the number of symbols the stream must hold, if the caller knows it; another
        number is refused before anything is allocated.
      ranks: does what `decode_ranks` does, maybe elsewhere; None for that itself.

    Returns:
      uint8[size] if every symbol is below 256, else uint16[size].

    Raises:
      ValueError: ``data`` is not a whole stream, or not one of ``size`` symbols.

    >>> decode_symbols(bytes.fromhex("04 01 06 06"))
    array([6, 7, 7, 6], dtype=uint8)
    """
    return np.concatenate([np.zeros(0, np.uint8), *decode_pieces(data, size, ranks)])


def decode_pieces(
    data: bytes | memoryview,
    size: int | None = None,
    ranks: Callable[[bytes, np.ndarray, int], Iterator[np.ndarray]] | None = None,
) -> Iterator[np.ndarray]:
    """The symbols that `encode_symbols` coded, a piece at a time.

    Besides the pieces it takes less than 64 MiB, whatever ``data`` says.

    Args:
      data: one whole stream; bytes or a memoryview of them.
      size: the number of symbols the stream must hold, if the caller knows it.
      ranks: does what `decode_ranks` does, maybe elsewhere; None for that itself.

    Returns:
      uint8 or uint16 arrays of one dimension, none empty. The symbols so far are of
      little use until the last has come: it is after it that damage shows.

    Raises:
      ValueError: at once, ``data`` is no stream of ``size`` symbols; where a piece is
        asked for, it is not a whole one.

    >>> [piece.tolist() for piece in decode_pieces(bytes.fromhex("04 01 06 06"))]
    [[6, 7, 7, 6]]
    """
    left, pos = decode_varint(data, 0)
    if size is not None and left != size:
        raise ValueError(
            f"decode_symbols needs a stream of {size} symbols, got one of {left}. Pass "
            "the size that was encoded, or the stream that belongs to this size."
        )
    return _decode_blocks(data, pos, left, ranks or decode_ranks)


def encode_varint(value: int) -> bytes:
    """A non-negative integer in seven bits a byte, low bits first (LEB128).

    >>> encode_varint(300).hex(" ")
    'ac 02'
    """
    if value < 0:
        raise ValueError(f"encode_varint needs a value >= 0, got {value}.")
    groups = [value >> shift & 127 for shift in range(0, value.bit_length() or 1, 7)]
    return bytes([128 + group for group in groups[:-1]] + groups[-1:])


def decode_varint(data: bytes | memoryview, pos: int) -> tuple[int, int]:
    """The integer that `encode_varint` put at ``data[pos]``, and where it ends.

    Raises:
      ValueError: ``data`` ends inside it, or it takes more than nine bytes (63 bits).

    >>> decode_varint(bytes.fromhex("ac 02"), 0)
    (300, 2)
    """
    value = 0
    for i, byte in enumerate(data[pos : pos + 9]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, pos + i + 1
    raise ValueError(
        f"decode_varint needs a varint of at most 9 bytes at byte {pos}, got "
        f"{len(data)} bytes that hold none there. The data is cut off or damaged."
    )


def encode_block(symbols: np.ndarray, is_last: bool) -> bytes:
    """Blocks of a stream for 2**22 symbols, or for those that are left at its end."""
    if symbols.dtype != np.uint8 and symbols.max() < 256:
        symbols = symbols.astype(np.uint8)
    # Histograms of more than bytes are larger, so there are fewer of them.
    shortest = _SHORTEST if symbols.dtype == np.uint8 else 18
    if symbols.size <= 1 << shortest:
        return _encode_part(symbols, _histogram(symbols), 0, is_last)
    leaf = 1 << shortest
    parts = -(-symbols.size // leaf)
    width = int(symbols.max()) + 1
    counts = np.zeros((1 << (parts - 1).bit_length(), width), np.int64)
    for i in range(parts):
        counts[i] = np.bincount(symbols[i * leaf : (i + 1) * leaf], minlength=width)
    coded = []
    for start, length, own in cuts(counts):
        part = symbols[start * leaf : (start + length) * leaf]
        halvings = _LONGEST - shortest - (length.bit_length() - 1)
        ends = (start + length) * leaf >= symbols.size
        if is_last and ends:
            halvings = 0  # it has what is left
        coded.append(_encode_part(part, own, halvings, is_last and ends))
        if ends:
            break
    return b"".join(coded)


def _encode_part(
    symbols: np.ndarray, counts: np.ndarray, halvings: int, is_last: bool
) -> bytes:
    """One block, for the histogram of its symbols."""
    alphabet = np.flatnonzero(counts)
    counts = counts[alphabet]
    base = int(alphabet[0])
    width = (int(alphabet[-1]) - base).bit_length()
    packed = bytes([_KINDS * halvings + width]) + encode_varint(base)
    if alphabet.size == 1:
        return packed
    # Twice the square root, rounded, is as fine as the counts deserve: the error costs
    # about 1/24 nat per symbol of the alphabet, 1/8 at most, whatever the counts are.
    # Square root and rounding are exact in IEEE arithmetic, so the bytes are portable.
    roots = np.rint(2 * np.sqrt(counts)).astype(np.uint16)
    table = encode_table(alphabet, roots)
    # The collision entropy bounds the entropy from below. In integers: no logarithm
    # whose last bit depends on the platform. Saves coding bytes that are pure noise.
    excess = int(counts @ counts << width) - symbols.size**2
    if 3 * excess > 2 * 8 * len(table) * symbols.size:
        ranks = np.zeros(alphabet[-1] + 1, np.int32)
        ranks[alphabet] = np.arange(alphabet.size)
        is_dense = alphabet[-1] == alphabet.size - 1  # then they are ranks already
        found = symbols.astype(np.int32) if is_dense else ranks[symbols]
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(found, _model(roots))
        payload = coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
        length = b"" if is_last else encode_varint(len(payload))
        coded = bytes([_KINDS * halvings + _CODED]) + table + length + payload
        if len(coded) < len(packed) + (symbols.size * width + 7) // 8:
            return coded
    return packed + pack(symbols - symbols.dtype.type(base), width)


def decode_ranks(payload: bytes, roots: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """The symbols of a coded block, a piece at a time, as places in its alphabet.

    Args:
      payload: what the coder wrote, without the zeros at its end.
      roots: uint16[alphabet]; what its table says of each symbol.
      count: the symbols of the block.

    Raises:
      ValueError: after the last piece, it does not decode to so many.
    """
    words = np.frombuffer(payload + bytes(-len(payload) % 4), "<u4")
    coder = constriction.stream.stack.AnsCoder(words.astype(np.uint32, copy=False))
    model = _model(roots)
    for start in range(0, count, _PIECE):
        yield coder.decode(model, min(_PIECE, count - start))
    if not coder.is_empty():  # decoding undoes encoding down to the empty stack
        raise damaged(
            f"a payload of {len(payload)} bytes does not decode to {count} symbols"
        )


def _histogram(symbols: np.ndarray) -> np.ndarray:
    """What `numpy.bincount` gives, which takes as long for two bytes as for one."""
    if symbols.dtype != np.uint8 or symbols.size < 1 << 18:
        return np.bincount(symbols)
    even = symbols[: symbols.size & ~1].view(np.uint16)
    pairs = np.bincount(even, minlength=1 << 16).reshape(256, 256)
    counts = pairs.sum(axis=0) + pairs.sum(axis=1)
    counts += np.bincount(symbols[even.size * 2 :], minlength=256)
    return counts


def _decode_blocks(
    data: bytes | memoryview, pos: int, left: int, ranks: Callable
) -> Iterator[np.ndarray]:
    while left:
        if pos >= len(data):
            raise damaged(f"a block is missing, and {left} symbols with it")
        halvings, kind = divmod(data[pos], _KINDS)
        if halvings > _LONGEST - _SHORTEST:
            raise damaged(f"byte {pos} names the unknown block kind {data[pos]}")
        count = min(left, BLOCK >> halvings)
        is_last = count == left
        pos = yield from _decode_block(data, pos, kind, count, is_last, ranks)
        left -= count
    if pos != len(data):
        raise damaged(f"{len(data) - pos} bytes follow the last block")


def _decode_block(
    data: bytes | memoryview,
    pos: int,
    kind: int,
    count: int,
    is_last: bool,
    ranks: Callable,
) -> Generator[np.ndarray, None, int]:
    """Yields the symbols of a block, and returns where it ends."""
    if kind < _CODED:
        base, pos = decode_varint(data, pos + 1)
        end = pos + (count * kind + 7) // 8
        if end > len(data):
            raise damaged(f"{end - len(data)} bytes of packed symbols are missing")
        for start in range(0, count, _PIECE):
            piece = min(_PIECE, count - start)
            stop = pos + (piece * kind + 7) // 8
            symbols = unpack(data[pos:stop], piece, kind)
            top = base + int(symbols.max())
            if top > 65535:
                raise damaged(f"symbols reach {top}, over 65535")
            dtype = np.dtype(np.uint8 if top < 256 else np.uint16)
            yield symbols.astype(dtype, copy=False) + dtype.type(base)
            pos = stop
        return end
    alphabet, roots, pos = decode_table(data, pos + 1, count)
    if np.sum(roots.astype(np.int64) ** 2) > 8 * count:  # no counts have such roots
        raise damaged(f"the table does not fit a block of {count} symbols")
    length, pos = (len(data) - pos, pos) if is_last else decode_varint(data, pos)
    width = int(alphabet[-1] - alphabet[0]).bit_length()
    if 8 * length > count * width + 7:
        raise damaged(f"a payload of {length} bytes is longer than packed symbols")
    payload = bytes(data[pos : pos + length])
    if len(payload) < max(length, 1) or payload.endswith(b"\0"):
        raise damaged(f"a payload of {length} bytes is cut off or ends in a zero")
    for found in ranks(payload, roots, count):
        yield alphabet[found]
    return pos + length


def _model(roots: np.ndarray) -> constriction.stream.model.Categorical:
    # constriction turns floats p into frequencies f = diff(floor(cumsum(p) * s)) + 1
    # with s = (2**24 - n) / sum(p). These p are integers with s = 1, hence f = p + 1
    # without any rounding: the frequencies follow from the roots by integers alone.
    free = _MASS - roots.size
    edges = np.cumsum(roots.astype(np.int64) ** 2)
    p = np.diff(edges * free // edges[-1], prepend=0)
    return constriction.stream.model.Categorical(p.astype(np.float64), perfect=False)
