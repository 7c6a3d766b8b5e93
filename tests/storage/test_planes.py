"""Every bit of every dtype comes back, and the sizes are the promised ones."""

import math

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.entropy import decode_symbols, encode_symbols, encode_varint
from jaxcomp.storage import container, leaves, planes
from jaxcomp.storage.planes import decode_array, encode_array


FLOATS = [
    np.float16,
    np.float32,
    np.float64,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float4_e2m1fn,
]
OTHERS = [
    np.bool_,
    np.int8,
    np.uint16,
    np.int32,
    np.uint64,
    np.complex64,
    np.complex128,
    ml_dtypes.int4,
    np.dtype("U3"),
]
DTYPES = [np.dtype(d) for d in FLOATS + OTHERS]
NUMBERS = [d for d in DTYPES if d.kind != "U"]  # any bits are a number; not a character


def assert_round_trip(x):
    data = encode_array(x)
    back = decode_array(data, x.dtype, x.shape)
    assert back.dtype == x.dtype
    assert back.shape == x.shape
    assert back.tobytes() == x.tobytes()
    return data


def weights(size, seed=0):
    return np.random.default_rng(seed).normal(0, 0.02, size).astype(np.float32)


def reference_decode(data, itemsize, size, rotates):
    """The integers behind the elements, one Python integer at a time."""
    kind, pos = data[0], 1
    if kind == 2:
        words = [
            int.from_bytes(data[i : i + itemsize], "little")
            for i in range(1, len(data), itemsize)
        ]
    else:
        streams = []
        for _ in range(itemsize - 1 + kind):
            length = shift = 0
            while True:
                byte = data[pos]
                length, shift, pos = length | (byte & 127) << shift, shift + 7, pos + 1
                if byte < 128:
                    break
            streams.append(decode_symbols(data[pos : pos + length]).tolist())
            pos += length
        streams.append(decode_symbols(data[pos:]).tolist())
        mask = streams.pop(0) if kind == 1 else [1] * size
        rows = zip(*streams, strict=True)
        kept = iter([sum(b << 8 * i for i, b in enumerate(row)) for row in rows])
        words = [next(kept) if bit else 0 for bit in mask]
    if rotates:
        words = [w >> 1 | (w & 1) << (8 * itemsize - 1) for w in words]
    return words


# The bytes.


def test_four_ones_are_three_planes_of_zeros_and_one_of_exponents():
    # 1.0 is 0x3f800000; rotated left by one bit it is 0x7f000000.
    zeros = encode_symbols(np.zeros(4, np.uint8))
    exponents = encode_symbols(np.full(4, 0x7F, np.uint8))
    expected = b"\0" + 3 * (encode_varint(len(zeros)) + zeros) + exponents
    assert encode_array(np.ones(4, np.float32)) == expected


def test_the_sign_goes_to_the_lowest_bit():
    # -2.0 is 0xc000; rotated left by one bit it is 0x8001. One element stays raw.
    assert encode_array(np.array([-2.0], ml_dtypes.bfloat16)) == bytes([2, 0x01, 0x80])


def test_integers_and_single_bytes_are_not_rotated():
    assert encode_array(np.array([-2], np.int16)) == bytes([2, 0xFE, 0xFF])
    minus_one = np.array([-1.0], ml_dtypes.float8_e4m3fn)
    assert encode_array(minus_one) == b"\2" + minus_one.tobytes()


def test_a_complex_number_is_two_floats():
    x = weights((2000, 2))
    assert encode_array(x.view(np.complex64)) == encode_array(x)


def test_bytes_do_not_depend_on_byte_order_or_strides():
    x = weights((60, 50))
    data = encode_array(x)
    assert encode_array(x.astype(">f4")) == data
    assert encode_array(np.asfortranarray(x)) == data
    back = decode_array(data, np.dtype(">f4"), (60, 50))
    assert back.dtype == np.dtype(">f4")
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("zeros", [0.0, 0.5])
@pytest.mark.parametrize(
    ("dtype", "rotates"),
    [
        (np.float16, True),
        (np.float32, True),
        (np.float64, True),
        (ml_dtypes.bfloat16, True),
        (np.int32, False),
        (np.uint8, False),
    ],
)
def test_the_format_is_read_by_integers_alone(dtype, rotates, zeros):
    x = (100 * weights(1000)).astype(dtype)
    x[: int(1000 * zeros)] = 0
    size = x.dtype.itemsize
    words = reference_decode(encode_array(x), size, x.size, rotates)
    assert b"".join(w.to_bytes(size, "little") for w in words) == x.tobytes()


# Every bit comes back.


@given(
    st.sampled_from(NUMBERS),
    st.sampled_from([(), (0,), (3,), (2, 3), (4, 0, 2)]),
    st.data(),
)
def test_any_bits_of_any_dtype_round_trip(dtype, shape, data):
    size = math.prod(shape) * dtype.itemsize
    bits = data.draw(st.binary(min_size=size, max_size=size))
    assert_round_trip(np.frombuffer(bits, dtype).reshape(shape))


@given(
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    st.integers(0, 9),
)
def test_arrays_with_any_share_of_zeros_round_trip(dtype, zeros, seed):
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 100, (30, 10, dtype.itemsize), np.uint8)
    raw[rng.random((30, 10)) < zeros] = 0
    x = np.frombuffer(raw.tobytes(), dtype).reshape(30, 10)
    assert_round_trip(x)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nan_payloads_signed_zeros_and_denormals_survive(dtype):
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    top = np.iinfo(unsigned).max
    infinity = np.array(np.inf, dtype).view(unsigned).item()
    bits = [0, 1, top // 2 + 1, infinity, infinity + 1, top, top // 2, top // 2 + 2]
    assert_round_trip(np.tile(np.array(bits, unsigned), 200).view(dtype))


@pytest.mark.parametrize("zeros", [0.0, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_round_trips_through_coded_planes(dtype, zeros):
    x = np.round(50 * weights((50, 60)), 1)
    x[np.random.default_rng(1).random(x.shape) < zeros] = 0
    is_integer = dtype.kind in "iu" or dtype.name == "int4"
    data = assert_round_trip((x.astype(np.int8) if is_integer else x).astype(dtype))
    assert data[0] < 2


def test_the_result_can_be_written_to():
    for x in (weights(3), weights(3000), np.zeros(3000, np.float32)):
        decode_array(encode_array(x), x.dtype, x.shape)[0] = 1


# The sizes.


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_noise_takes_one_byte_more_than_raw(dtype, size):
    x = np.frombuffer(np.random.default_rng(2).bytes(size * dtype.itemsize), dtype)
    assert len(encode_array(x)) <= x.nbytes + 1


def test_bfloat16_weights_take_two_thirds():
    x = weights((1000, 500)).astype(ml_dtypes.bfloat16)
    assert 0.65 * x.nbytes < len(assert_round_trip(x)) < 0.67 * x.nbytes


def test_float32_weights_take_five_sixths():
    x = weights((1000, 500))
    assert len(assert_round_trip(x)) < 0.835 * x.nbytes


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(np.float16, 5), (np.float32, 8), (np.float64, 11), (ml_dtypes.bfloat16, 8)],
)
def test_floats_take_the_entropy_of_their_exponents_and_their_other_bits(
    dtype, exponent
):
    x = weights(200_000).astype(dtype)
    width = 8 * x.itemsize
    exponents = x.view(f"u{x.itemsize}") << 1 >> (width - exponent)
    shares = np.unique(exponents, return_counts=True)[1] / x.size
    other = width - exponent
    bits = -shares @ np.log2(shares) + other
    assert 8 * len(encode_array(x)) <= 1.001 * bits * x.size + 8 * 600


def test_random_bits_expand_by_a_thousandth_and_64_bytes_at_most():
    bits = np.random.default_rng(6).integers(0, 2**32, 300_000, np.uint32)
    x = bits.view(np.float32)
    assert len(encode_array(x)) <= 1.001 * x.nbytes + 64


def test_zeros_cost_their_mask_entropy_and_the_rest_no_more_than_alone():
    x = weights(200_000)
    zero = np.random.default_rng(3).random(x.size) < 0.9
    x[zero] = 0
    share = zero.mean()
    mask_bits = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    rest = len(encode_array(x[~zero]))
    data = assert_round_trip(x)
    assert data[0] == 1
    assert len(data) <= mask_bits * x.size / 8 + rest + 16


def test_the_mask_is_left_out_where_it_does_not_pay():
    # Few values, each plane a function of the last: the planes know the zeros already.
    x = np.random.default_rng(4).integers(0, 2, 10_000).astype(np.int32)
    data = assert_round_trip(x)
    assert data[0] == 0
    assert len(data) < 10_000 / 8 + 32


def test_an_array_of_zeros_takes_a_few_bytes():
    assert len(assert_round_trip(np.zeros((1000, 1000), np.float32))) <= 20


def test_a_bool_array_takes_its_entropy():
    x = np.random.default_rng(5).random(100_000) < 0.05
    assert len(assert_round_trip(x)) < 0.29 * x.size / 8


# Damage.


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the first byte must be 0, 1 or 2, not ''"),
        (b"\x03", "the first byte must be 0, 1 or 2, not '03'"),
        (b"\x02" + bytes(8), "raw, it takes 13 bytes"),
        (b"\x00", "needs a varint of at most 9 bytes"),
        (b"\x00\x03\x03\x00\x00\x00\x00\x00", "needs a varint of at most 9 bytes"),
        (
            b"\x00" + 3 * b"\x03\x03\x00\x00" + b"\x04\x00\x00",
            "3 symbols, got one of 4",
        ),
        (b"\x00" + 3 * b"\x03\x03\x00\x00" + b"\x03\x00\xac\x02", "bytes, not 300"),
        (
            b"\x01\x03\x03\x00\x02" + 3 * b"\x01\x00" + b"\x00",
            "must hold 0 and 1, not 2",
        ),
        (encode_array(weights(3000)), "3 symbols, got one of 3000"),
    ],
)
def test_data_that_does_not_fit_says_why(data, message):
    with pytest.raises(ValueError, match=message) as error:
        decode_array(data, np.dtype(np.float32), (3,))
    assert f"encode_array for float32[3], got {len(data)} bytes" in str(error.value)


@given(st.binary(max_size=60), st.integers(0, 9))
def test_garbage_is_an_array_or_a_value_error(garbage, kept):
    start = encode_array(np.repeat(weights(20), 50))[:kept]
    try:
        x = decode_array(start + garbage, np.dtype(np.float32), (1000,))
    except ValueError:
        return
    assert x.shape == (1000,)


def test_python_objects_are_refused():
    with pytest.raises(TypeError, match=r"encode_array needs plain numbers, got obj"):
        encode_array(np.array([None, 1]))


# Padding, which says nothing.


def test_padding_is_left_out_and_put_back():
    w = np.random.default_rng(0).normal(size=(300, 33)).astype(np.float32)
    node = jc.quantize(w, 4, axis=0, group=32)
    codes = leaves.symbols(node.codes, 4)
    lanes = planes.Lanes(300, 64, 33)
    live = planes.without_padding(codes, 4, lanes)
    np.testing.assert_array_equal(live.reshape(300, 33), codes.reshape(300, 64)[:, :33])
    packed = np.asarray(node.codes)
    for stream in (encode_symbols(live), encode_symbols(codes)):
        back = planes.decode_codes(stream, 4, packed.shape, lanes=lanes)
        np.testing.assert_array_equal(back, packed)


@pytest.mark.parametrize("place", [40, -1])
def test_padding_that_is_something_else_stays(place):
    codes = np.full(3 * 64, 7, np.uint8)
    codes[place] = 3
    lanes = planes.Lanes(3, 64, 33)
    assert planes.without_padding(codes, 4, lanes) is codes
    assert planes.without_padding(codes[:100], 4, lanes).size == 100  # no such lanes


@given(
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(2, 12),
    st.booleans(),
)
def test_nodes_of_any_lanes_come_back(
    tmp_path_factory, rows, live, group, bits, uneven
):
    w = np.random.default_rng(live).normal(size=(rows, live)).astype(np.float32)
    if uneven:  # affine: every group has a zero of its own
        node = jc.quantize_affine(w, min(bits, 8), axis=0, group=group)
    elif bits > 8:
        node = jc.quantize_step(w, 1e-3)
    else:
        node = jc.quantize(w, bits, axis=0, group=group)
    path = tmp_path_factory.mktemp("lanes") / "w.jxc"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(container, "ENTRY", 10**6)  # always coded
        jc.save(path, {"w": node})
    back = jc.load(path)["w"]
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(node), strict=True):
        np.testing.assert_array_equal(x, y)
