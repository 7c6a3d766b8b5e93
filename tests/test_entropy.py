"""The coder against its bounds, against damage, and against a decoder of its own.

`reference_decode` below is written from the format alone, in Python integers: no NumPy,
no constriction. That it reads every stream is the proof that the format can be
specified, and read in any language, without them.
"""

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp import entropy
from jaxcomp.cuts import _times_log2
from jaxcomp.entropy import (
    decode_symbols,
    decode_varint,
    encode_symbols,
    encode_varint,
    order0_entropy,
)


MASS = 2**24


def reference_decode(data, block=2**22):
    """The symbols, and for each block its kind with the bytes of its table."""
    left, pos = reference_varint(data, 0)
    symbols, blocks = [], []
    while left:
        count = min(left, block)
        left -= count
        kind = data[pos]
        if kind <= 16:
            base, pos = reference_varint(data, pos + 1)
            end = pos + -(-count * kind // 8)
            bits = int.from_bytes(data[pos:end], "little")
            mask = (1 << kind) - 1
            symbols += [base + (bits >> i * kind & mask) for i in range(count)]
            blocks.append((kind, 0))
            pos = end
            continue
        assert kind == 17
        alphabet, roots, end = reference_table(data, pos + 1)
        blocks.append((kind, end - pos - 1))
        length, pos = reference_varint(data, end) if left else (len(data) - end, end)
        payload = data[pos : pos + length]
        symbols += [alphabet[i] for i in reference_rans(payload, roots, count)]
        pos += length
    assert pos == len(data)
    return symbols, blocks


def reference_varint(data, pos):
    value = shift = 0
    while True:
        value |= (data[pos] & 127) << shift
        shift, pos = shift + 7, pos + 1
        if data[pos - 1] < 128:
            return value, pos


def reference_table(data, pos):
    at = 8 * pos

    def bit():
        nonlocal at
        at += 1
        return data[(at - 1) // 8] >> (at - 1) % 8 & 1

    def gamma():
        zeros = 0
        while not bit():
            zeros += 1
        return (1 << zeros) + sum(bit() << i for i in range(zeros))

    runs = gamma()
    edge = gamma() - 1
    alphabet = []
    for run in range(runs):
        edge += gamma() if run else 0  # the gap before this run
        length = gamma()
        alphabet += range(edge, edge + length)
        edge += length
    width = gamma()
    at = -(-at // 8) * 8
    roots = [sum(bit() << i for i in range(width)) for _ in alphabet]
    return alphabet, roots, -(-at // 8)


def reference_rans(payload, roots, count):
    """rANS with a state of 64 bits, words of 32 bits and frequencies of 24 bits."""
    total = sum(root**2 for root in roots)
    edges = [0]
    for i, _ in enumerate(roots):
        below = sum(root**2 for root in roots[: i + 1])
        edges.append(i + 1 + below * (MASS - len(roots)) // total)
    assert edges[-1] == MASS
    assert all(low < high for low, high in zip(edges, edges[1:], strict=False))
    payload += bytes(-len(payload) % 4)
    words = [
        int.from_bytes(payload[i : i + 4], "little") for i in range(0, len(payload), 4)
    ]
    state = 0
    ranks = []
    while state < 2**32 and words:
        state = state << 32 | words.pop()
    for _ in range(count):
        low = state % MASS
        rank = next(i for i in range(len(roots)) if low < edges[i + 1])
        ranks.append(rank)
        state = (edges[rank + 1] - edges[rank]) * (state // MASS) + low - edges[rank]
        if state < 2**32 and words:
            state = state << 32 | words.pop()
    assert state == 0
    assert not words
    return ranks


def draw(seed, size, alphabet, weights):
    """A stream with about these frequencies; size of them, in random order."""
    weights = np.asarray(weights, float) / np.sum(weights)
    dtype = np.uint8 if max(alphabet) < 256 else np.uint16
    rng = np.random.default_rng(seed)
    return rng.choice(np.asarray(alphabet, dtype), size, p=weights)


def shuffled(counts, seed=0):
    """A stream with exactly these counts, in random order."""
    stream = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)
    return np.random.default_rng(seed).permutation(stream)


@st.composite
def streams(draw_from):
    """Streams of every kind: packed and coded, dense and sparse, flat and skewed."""
    top = draw_from(st.sampled_from([1, 7, 255, 256, 65535]))
    alphabet = draw_from(st.lists(st.integers(0, top), min_size=1, max_size=20))
    skew = draw_from(st.sampled_from([0.0, 1.0, 4.0]))
    size = draw_from(st.sampled_from([0, 1, 2, 9, 100, 1000]))
    weights = np.arange(1, len(alphabet) + 1) ** -skew
    return draw(draw_from(st.integers(0, 99)), size, alphabet, weights)


# Entropy.


def test_entropy_of_a_half_and_two_quarters_is_one_and_a_half_bits():
    assert order0_entropy(np.array([2, 1, 1])) == 1.5
    assert order0_entropy(np.array([0, 7, 7, 0])) == 1.0


@pytest.mark.parametrize("counts", [[], [0], [5], [0, 5, 0]])
def test_entropy_of_no_symbol_or_of_one_is_exactly_zero(counts):
    assert order0_entropy(np.array(counts)) == 0.0


@given(st.lists(st.integers(0, 10**6), max_size=30))
def test_entropy_is_minus_p_log_p(counts):
    shares = [c / sum(counts) for c in counts if c]
    expected = -sum(p * np.log2(p) for p in shares)
    assert order0_entropy(np.array(counts)) == pytest.approx(expected, abs=1e-9)


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="order0_entropy needs counts >= 0, got -2"):
        order0_entropy(np.array([3, -2]))


# The bytes.


def test_few_symbols_are_packed_above_the_lowest_of_them():
    # 4 symbols; 1 bit each; above 6; bits 0, 1, 1, 0 from the lowest on: 0b0110.
    data = encode_symbols(np.array([6, 7, 7, 6], np.uint8))
    assert data == bytes([4, 1, 6, 0b0110])


def test_skewed_symbols_are_coded_as_computed_by_hand():
    stream = np.array([7] + 59 * [0] + 3 * [7] + [0], np.uint8)
    data = encode_symbols(stream)
    # 64 symbols, kind 17. Gamma codes, lowest bit first: 2 runs (01 0), from 0 (1),
    # length 1 (1), gap 6 (001 01), length 1 (1), roots of 4 bits (001 00).
    assert data[:2] == bytes([64, 17])
    bits = "010" + "1" + "1" + "00101" + "1" + "00100"
    assert data[2:4] == int(bits[::-1], 2).to_bytes(2, "little")
    # Roots round(2 sqrt(60)) = 15 and round(2 sqrt(4)) = 4.
    assert data[4] == 15 | 4 << 4
    # Frequencies: 225 and 16 in 241 of 2**24 - 2, and 1 for each.
    first = 225 * (MASS - 2) // 241 + 1
    state = 0
    for symbol in stream[::-1].tolist():
        low, size = (first, MASS - first) if symbol else (0, first)
        state = (state // size << 24) + state % size + low  # stays below 2**64 here
    assert data[5:] == state.to_bytes(8, "little").rstrip(b"\0")


def test_no_symbols_take_one_byte_and_come_back():
    assert encode_symbols(np.zeros(0, np.uint16)) == b"\0"
    assert decode_symbols(b"\0").shape == (0,)


@pytest.mark.parametrize("symbol", [0, 255, 65535])
def test_one_symbol_has_no_payload(symbol):
    stream = np.full(100_000, symbol, np.uint16)
    data = encode_symbols(stream)
    assert data == encode_varint(100_000) + b"\0" + encode_varint(symbol)
    np.testing.assert_array_equal(decode_symbols(data), stream)


def test_bytes_are_the_same_on_every_machine():
    # A golden checksum: a change of it is a change of the file format.
    i = np.arange(5000)
    stream = (i * i % 1009 % 61 % 23).astype(np.uint8)
    data = encode_symbols(stream)
    assert data[2] == 17
    assert (len(data), zlib.crc32(data)) == (2831, 3578834102)


def test_bytes_do_not_depend_on_dtype_byte_order_or_strides():
    stream = draw(0, 5000, [0, 1, 2, 9], [8, 4, 2, 1])
    data = encode_symbols(stream)
    assert encode_symbols(stream.astype(np.uint16)) == data
    assert encode_symbols(stream.astype(">u2")) == data
    assert encode_symbols(np.repeat(stream, 2)[::2]) == data


@given(streams())
def test_decoding_is_the_exact_inverse(stream):
    back = decode_symbols(encode_symbols(stream), stream.size)
    np.testing.assert_array_equal(back, stream)
    assert back.dtype == (np.uint16 if np.any(stream > 255) else np.uint8)


@given(streams())
def test_the_format_is_read_by_integers_alone(stream):
    symbols, _ = reference_decode(encode_symbols(stream))
    assert symbols == stream.tolist()


@pytest.mark.parametrize(
    ("size", "alphabet", "weights"),
    [
        (4000, range(2), [1, 9999]),
        (4000, range(8), [1, 4, 9, 40, 40, 9, 4, 1]),
        (4000, [0, 7, 200], [90, 7, 3]),
        (4000, range(256), np.exp(-np.arange(256) / 9)),
        (4000, range(100, 60000, 991), 1 / np.arange(1, 62)),
    ],
)
def test_the_reference_decoder_reads_the_words_of_constriction(size, alphabet, weights):
    stream = draw(1, size, list(alphabet), weights)
    symbols, blocks = reference_decode(encode_symbols(stream))
    assert symbols == stream.tolist()
    assert blocks[0][0] == 17


@pytest.mark.parametrize("size", [2000, 2500, 3000])
def test_long_streams_are_independent_blocks(monkeypatch, size):
    monkeypatch.setattr(entropy, "BLOCK", 1000)
    stream = draw(2, size, [0, 1, 5], [90, 9, 1])
    stream[1000:2000] = np.arange(1000) % 4  # this block is packed, the others coded
    data = encode_symbols(stream)
    np.testing.assert_array_equal(decode_symbols(data, size), stream)
    symbols, blocks = reference_decode(data, block=1000)
    assert symbols == stream.tolist()
    assert [kind for kind, _ in blocks] == [17, 2, 17][: len(blocks)]


def test_more_than_one_block_of_two_to_the_22_symbols_round_trips():
    stream = np.zeros(2**22 + 1000, np.uint16)
    stream[-600:] = 300
    stream[:1000] = 7
    data = encode_symbols(stream)
    np.testing.assert_array_equal(decode_symbols(data, stream.size), stream)
    assert len(data) < 2100


# The sizes.

BAR = {
    "two symbols": shuffled([96_000, 4_000]),
    "eight symbols": draw(3, 100_000, range(8), [1, 4, 9, 40, 40, 9, 4, 1]),
    "a geometric alphabet": draw(4, 100_000, range(256), 0.8 ** np.arange(256)),
    "256 symbols at 0.36 bit": draw(5, 100_000, range(256), [10_000, *255 * [1]]),
    "sparse symbols": draw(6, 100_000, range(0, 256, 5), 1 / np.arange(1, 53)),
    "a million": draw(7, 1_000_000, range(200), np.exp(-np.arange(200) / 30)),
    "codes of a normal": draw(
        13, 100_000, range(15), np.exp(-(np.arange(-7, 8) ** 2) / 8)
    ),
    "two peaks": draw(
        14, 100_000, range(64), np.exp(-((abs(np.arange(-32, 32)) - 20.0) ** 2) / 30)
    ),
    "a heavy tail": draw(15, 100_000, range(256), np.arange(1.0, 257.0) ** -1.2),
    "100 as frequent as each other": draw(16, 100_000, range(100), np.ones(100)),
    "0.2 bit": shuffled([97_000, 2_800, 150, 50]),
    # Counts whose root errs most when rounded, some up and some down.
    "the worst counts": shuffled([98_000, *51 * [3, 5, 8, 11, 18]]),
}


@pytest.mark.parametrize("name", BAR)
def test_coded_size_is_within_a_thousandth_of_the_entropy(name):
    stream = BAR[name]
    entropy_bits = order0_entropy(np.bincount(stream)) * stream.size
    assert entropy_bits >= 0.2 * stream.size
    data = encode_symbols(stream)
    _, table = table_of(data)
    assert 8 * len(data) <= 1.001 * entropy_bits + 8 * table + 64
    np.testing.assert_array_equal(decode_symbols(data), stream)


def table_of(data):
    """Symbols in the table of a stream with one coded block, and its bytes."""
    _, pos = reference_varint(data, 0)
    assert data[pos] == 17
    alphabet, _, end = reference_table(data, pos + 1)
    return len(alphabet), end - pos - 1


@pytest.mark.parametrize(
    "alphabet",
    [range(8), range(100, 116), range(256), range(0, 256, 3), [0, 7, 200]],
)
@pytest.mark.parametrize("size", [20_000, 1_000_000])
def test_table_takes_at_most_two_bytes_a_symbol(alphabet, size):
    weights = 1 / np.arange(1, len(alphabet) + 1)
    data = encode_symbols(draw(8, size, list(alphabet), weights))
    symbols, table = table_of(data)
    assert symbols == len(alphabet)
    # Four more: the number of runs, the first symbol, the width of the roots, gaps.
    assert table <= 2 * symbols + 4


def test_eight_symbols_twenty_thousand_times_cost_18_bytes_over_the_entropy():
    stream = draw(9, 20_000, range(8), [1, 4, 9, 40, 40, 9, 4, 1])
    entropy_bits = order0_entropy(np.bincount(stream)) * stream.size
    assert 8 * len(encode_symbols(stream)) <= entropy_bits + 8 * 18


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [1, 3, 100, 100_000])
def test_noise_takes_at_most_8_bytes_more_than_raw(dtype, size):
    top = np.iinfo(dtype).max
    noise = np.random.default_rng(10).integers(0, top, size, dtype, endpoint=True)
    assert len(encode_symbols(noise)) <= noise.nbytes + 8


@given(streams())
def test_no_stream_takes_64_bytes_more_than_its_symbols(stream):
    assert len(encode_symbols(stream)) <= stream.nbytes + 64


def test_equally_frequent_symbols_are_packed():
    data = encode_symbols(shuffled(16 * [1000]))
    assert len(data) == 16_000 // 2 + 4


def test_one_rare_symbol_costs_its_entropy_and_16_bytes():
    stream = shuffled([999_900, 100])
    data = encode_symbols(stream)
    assert 8 * len(data) <= order0_entropy(np.array([999_900, 100])) * 1e6 + 128
    np.testing.assert_array_equal(decode_symbols(data), stream)


# Damage.

CODED = encode_symbols(draw(11, 1000, [0, 1, 5], [90, 9, 1]))


def gammas(*values):
    bits = "".join("0" * (v.bit_length() - 1) + "1" + f"{v:b}"[:0:-1] for v in values)
    return int(bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "needs a varint of at most 9 bytes at byte 0, got 0 bytes"),
        (b"\xff" * 20, "needs a varint of at most 9 bytes at byte 0, got 20 bytes"),
        (b"\x05", "a block is missing, and 5 symbols with it"),
        (b"\x05\x90", "byte 1 names the unknown block kind 144"),
        (b"\x05\x02", "needs a varint of at most 9 bytes at byte 2"),
        (b"\x05\x02\x00\x11", "1 bytes of packed symbols are missing"),
        (b"\x01\x01\xff\xff\x03\x01", "symbols reach 65536, over 65535"),
        (b"\x05\x00\x07\x00\x00", "2 bytes follow the last block"),
        (b"\x05\x11", "the table ends early or holds a number over 131071"),
        (b"\x05\x11" + bytes(9), "the table ends early or holds a number over"),
        (b"\x05\x11" + gammas(1, 1, 1, 1), "a table of 1 runs from 0 reaches 1"),
        (b"\x05\x11" + gammas(1, 65536, 9, 1), "1 runs from 65535 reaches 65544"),
        (b"\x05\x11" + gammas(9, 1, 65535, 7), "a table of 9 runs from 0 reaches 6554"),
        (b"\x05\x11" + gammas(1, 1, 2, 4), "2 roots of 4 bits are not there"),
        (b"\x05\x11" + gammas(1, 1, 2, 17), "2 roots of 17 bits are not there"),
        (b"\x05\x11" + gammas(1, 1, 2, 4) + b"\x03", "lists a symbol with the root 0"),
        (b"\x05\x11" + gammas(1, 1, 2, 4) + b"\xff", "does not fit a block of 5 symb"),
        (CODED + b"\0", "a payload of .* bytes is cut off or ends in a zero"),
        (CODED + b"\1", "does not decode to 1000 symbols"),
        (CODED[:-1], "does not decode to 1000 symbols"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[:4].hex(),
)
def test_damaged_streams_say_what_is_wrong(data, message):
    with pytest.raises(ValueError, match=message):
        decode_symbols(data)


def test_a_cut_inside_a_block_is_noticed(monkeypatch):
    monkeypatch.setattr(entropy, "BLOCK", 1000)
    data = encode_symbols(draw(12, 2000, [0, 1, 5], [90, 9, 1]))
    with pytest.raises(ValueError, match="a payload of .* bytes is cut off"):
        decode_symbols(data[:60])


def test_another_size_than_the_caller_expects_is_refused():
    with pytest.raises(ValueError, match="a stream of 999 symbols, got one of 1000"):
        decode_symbols(CODED, 999)


def test_every_cut_of_a_stream_is_an_error():
    for end in range(len(CODED)):
        with pytest.raises(ValueError, match="needs a "):
            decode_symbols(CODED[:end])


@given(st.binary(max_size=60), st.integers(0, 3))
def test_garbage_is_an_array_or_a_value_error(garbage, kept):
    try:
        symbols = decode_symbols(CODED[:kept] + garbage)
    except ValueError:
        return
    assert symbols.dtype in (np.uint8, np.uint16)


@given(st.integers(0, len(CODED) - 1), st.integers(1, 255))
def test_a_wrong_byte_is_an_array_or_a_value_error(where, by):
    damaged = bytearray(CODED)
    damaged[where] ^= by
    try:
        symbols = decode_symbols(bytes(damaged), 1000)
    except ValueError:
        return
    assert symbols.size == 1000


@pytest.mark.parametrize("kind", [b"\x00\x00", b"\x08\x00", CODED[2:]])
def test_a_huge_length_allocates_no_more_than_one_block(kind):
    data = encode_varint(2**60) + kind
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="needs a"):
            decode_symbols(data)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


# Arguments.


@pytest.mark.parametrize("dtype", [np.int8, np.uint32, np.float32, bool])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="encode_symbols needs uint8 or uint16, got"):
        encode_symbols(np.zeros(3, dtype))


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_other_ranks_are_refused(shape):
    with pytest.raises(ValueError, match="encode_symbols needs one axis, got shape"):
        encode_symbols(np.zeros(shape, np.uint8))


# Varints.


@given(st.integers(0, 2**63 - 1), st.binary(max_size=3))
def test_varints_round_trip_and_take_seven_bits_a_byte(value, before):
    data = encode_varint(value)
    assert len(data) == max(1, -(-value.bit_length() // 7))
    end = len(before) + len(data)
    assert decode_varint(before + data + b"\xff", len(before)) == (value, end)


def test_varints_of_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="encode_varint needs a value >= 0, got -1"):
        encode_varint(-1)


# Where a stream changes.


def changing(*parts):
    rng = np.random.default_rng(0)
    return np.concatenate([rng.geometric(p, n).clip(max=200) for p, n in parts])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_block_ends_where_the_symbols_change(dtype):
    symbols = changing((0.9, 1 << 16), (0.02, 1 << 16), (0.5, 50_001)).astype(dtype)
    stream = encode_symbols(symbols)
    np.testing.assert_array_equal(decode_symbols(stream), symbols)
    parts = np.split(symbols, [1 << 16, 1 << 17])
    apart = sum(order0_entropy(np.bincount(p)) * p.size / 8 for p in parts)
    assert len(stream) < 1.001 * apart + 400  # for three tables
    assert order0_entropy(np.bincount(symbols)) * symbols.size / 8 > 1.2 * apart


def test_symbols_that_do_not_change_are_one_block():
    symbols = changing((0.3, 1 << 18)).astype(np.uint8)
    assert encode_symbols(symbols)[3] == 17  # behind three bytes of the size


@given(
    st.lists(
        st.tuples(st.sampled_from([0.02, 0.5, 1.0]), st.integers(1, 70_000)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([np.uint8, np.uint16]),
)
def test_whatever_changes_comes_back_and_never_costs_more_than_one_block(parts, dtype):
    symbols = changing(*parts).astype(dtype)
    stream = encode_symbols(symbols)
    np.testing.assert_array_equal(decode_symbols(stream), symbols)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entropy, "_SHORTEST", 22)
        patch.setattr(entropy, "cuts", None)
        whole = len(encode_symbols(symbols.astype(np.uint8)))
    # One block may end in a run that takes nothing, in less than the entropy of it all.
    whole = max(whole, order0_entropy(np.bincount(symbols)) * symbols.size / 8)
    assert len(stream) <= 1.002 * whole + 16


def test_the_logarithm_of_counts_is_off_by_a_four_thousandth_of_a_bit():
    counts = np.unique(np.geomspace(1, 1 << 22, 3000).astype(np.int64))
    found = _times_log2(counts) / 2**16
    assert np.max(np.abs(found / counts - np.log2(counts))) < 1 / 4000
    assert _times_log2(np.array([0, 1, 2, 1 << 22])).tolist()[0] == 0


@pytest.mark.parametrize("first", [18 * 8, 255])
def test_a_block_shorter_than_any_is_refused(first):
    data = encode_varint(5) + bytes([first, 6, 6])
    with pytest.raises(ValueError, match=f"unknown block kind {first}"):
        decode_symbols(data)
