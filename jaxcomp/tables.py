"""Alphabets, how often each symbol occurs, and plain symbols, packed into bytes.

Bits fill a byte from the lowest, as in `jaxcomp.bits`; this file is NumPy, so that it
compiles nothing for the many lengths that streams have.
"""

import numpy as np


_TABLE = 1 << 17  # bytes; the runs and roots of 65,536 symbols need fewer


def damaged(what: str) -> ValueError:
    return ValueError(
        f"decode_symbols needs a whole stream of encode_symbols, got one where {what}. "
        "The data is cut off, damaged or something else: fetch it again."
    )


def encode_table(alphabet: np.ndarray, roots: np.ndarray) -> bytes:
    breaks = np.flatnonzero(np.diff(alphabet) > 1) + 1
    starts = alphabet[np.concatenate([[0], breaks])]
    stops = alphabet[np.concatenate([breaks - 1, [-1]])] + 1
    steps = np.diff(np.stack([starts, stops], axis=1).ravel())  # run, gap, run, ...
    width = int(roots.max()).bit_length()
    numbers = [starts.size, int(starts[0]) + 1, *steps.tolist(), width]
    # Elias gamma: as many zeros as bits follow the leading one, lowest bit first.
    bits = "".join("0" * (v.bit_length() - 1) + "1" + f"{v:b}"[:0:-1] for v in numbers)
    return int(bits[::-1], 2).to_bytes((len(bits) + 7) // 8, "little") + pack(
        roots, width
    )


def decode_table(
    data: bytes | memoryview, pos: int, count: int
) -> tuple[np.ndarray, np.ndarray, int]:
    window = np.frombuffer(data[pos : pos + _TABLE], np.uint8)
    bits = (np.unpackbits(window, bitorder="little") + ord("0")).tobytes()
    runs, at = _decode_gamma(bits, 0)
    first, at = _decode_gamma(bits, at)
    edges = [first - 1]
    most = 2 * min(runs, count)  # every run has a symbol that occurs
    while len(edges) < most and edges[-1] < 65536:
        step, at = _decode_gamma(bits, at)
        edges.append(edges[-1] + step)
    if len(edges) < 2 * runs or not edges[0] + 2 <= edges[-1] <= 65536:
        raise damaged(f"a table of {runs} runs from {edges[0]} reaches {edges[-1]}")
    width, at = _decode_gamma(bits, at)
    alphabet = np.concatenate(
        [np.arange(*run) for run in zip(edges[::2], edges[1::2], strict=True)]
    ).astype(np.uint8 if edges[-1] <= 256 else np.uint16)
    pos += (at + 7) // 8
    end = pos + (alphabet.size * width + 7) // 8
    if width > 16 or end > len(data):
        raise damaged(f"{alphabet.size} roots of {width} bits are not there")
    roots = unpack(data[pos:end], alphabet.size, width)
    if not roots.all():
        raise damaged("the table lists a symbol with the root 0")
    return alphabet, roots, end


def _decode_gamma(bits: bytes, at: int) -> tuple[int, int]:
    one = bits.find(b"1", at, at + 17)  # no number in a table has more than 17 bits
    end = 2 * one - at + 1
    if one < 0 or end > len(bits):
        raise damaged("the table ends early or holds a number over 131071")
    return int(b"1" + bits[one + 1 : end][::-1], 2), end


def pack(values: np.ndarray, width: int) -> bytes:
    if width in (8, 16):
        return values.astype(f"<u{width // 8}").tobytes()
    bits = np.empty((values.size, width), np.uint8)
    for i in range(width):
        bits[:, i] = values >> i & 1
    return np.packbits(bits, bitorder="little").tobytes()


def unpack(data: bytes | memoryview, count: int, width: int) -> np.ndarray:
    if width in (8, 16):
        return np.frombuffer(data, f"<u{width // 8}")
    window = np.frombuffer(data, np.uint8)
    bits = np.unpackbits(window, count=count * width, bitorder="little")
    dtype = np.dtype(np.uint8 if width <= 8 else np.uint16)
    values = np.zeros(count, dtype)
    for i, column in enumerate(bits.reshape(count, width).T):
        values |= column.astype(dtype) << i
    return values
