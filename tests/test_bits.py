import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp.bits import nbytes, pack, unpack


WIDTHS = range(1, 17)
SEEDS = st.integers(0, 2**32 - 1)


def any_codes(seed, bits, shape):
    return np.random.default_rng(seed).integers(0, 2**bits, shape, np.uint16)


def reference_pack(codes, bits):
    """The same stream from NumPy's single bits."""
    places = (codes[..., None] >> np.arange(bits, dtype=np.uint16)) & 1
    stream = places.reshape(*codes.shape[:-1], -1).astype(np.uint8)
    return np.packbits(stream, axis=-1, bitorder="little")


def test_three_codes_of_four_bits_fill_one_byte_and_the_low_half_of_the_next(strict):
    packed = pack(jnp.array([0x1, 0x2, 0xF]), bits=4)
    assert packed.dtype == jnp.uint8
    assert packed.tolist() == [0x21, 0x0F]


def test_a_code_of_three_bits_runs_over_the_end_of_its_byte(strict):
    # 101 | 011 | 110 from bit 0 on: byte 0 is 10|011|101, byte 1 is 1.
    packed = pack(jnp.array([0b101, 0b011, 0b110]), bits=3)
    assert packed.tolist() == [0b10_011_101, 0b1]


@pytest.mark.parametrize("bits", WIDTHS)
@settings(max_examples=10)
@given(SEEDS)
def test_unpack_gives_the_codes_back(bits, seed):
    codes = any_codes(seed, bits, (13,))
    back = unpack(pack(jnp.asarray(codes), bits=bits), bits=bits, count=13)
    assert back.dtype == (jnp.uint8 if bits <= 8 else jnp.uint16)
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", WIDTHS)
@settings(max_examples=10)
@given(SEEDS)
def test_the_stream_is_that_of_numpy_packbits(bits, seed):
    codes = any_codes(seed, bits, (13,))
    packed = pack(jnp.asarray(codes), bits=bits)
    assert packed.size == nbytes(13, bits)
    np.testing.assert_array_equal(packed, reference_pack(codes, bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_widest_codes_spill_into_no_neighbour(bits):
    codes = jnp.array([2**bits - 1, 0] * 6 + [2**bits - 1], jnp.uint16)
    packed = pack(codes, bits=bits)
    np.testing.assert_array_equal(packed, reference_pack(np.asarray(codes), bits))
    np.testing.assert_array_equal(unpack(packed, bits=bits, count=13), codes)


@pytest.mark.parametrize("bits", [1, 7, 8, 9, 16])
def test_one_code_takes_its_own_bytes(strict, bits):
    packed = pack(jnp.array([2**bits - 1], jnp.uint16), bits=bits)
    assert packed.shape == (1 if bits <= 8 else 2,)
    assert unpack(packed, bits=bits, count=1).tolist() == [2**bits - 1]


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_leading_axes_are_packed_one_by_one(strict, bits):
    codes = any_codes(0, bits, (2, 3, 13))
    packed = pack(jnp.asarray(codes), bits=bits)
    np.testing.assert_array_equal(packed, reference_pack(codes, bits))
    np.testing.assert_array_equal(unpack(packed, bits=bits, count=13), codes)
    mapped = jax.vmap(jax.vmap(lambda c: pack(c, bits=bits)))(jnp.asarray(codes))
    np.testing.assert_array_equal(mapped, packed)


@pytest.mark.parametrize("bits", [1, 4, 5, 8, 16])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_no_codes_take_no_bytes(strict, lead, bits):
    packed = pack(jnp.zeros((*lead, 0), jnp.uint8), bits=bits)
    assert packed.shape == (*lead, 0)
    assert unpack(packed, bits=bits, count=0).shape == (*lead, 0)


@pytest.mark.parametrize(("bits", "width"), [(2, 2), (3, 2), (4, 3), (8, 5)])
def test_an_empty_leading_axis_stays_empty(strict, bits, width):
    packed = pack(jnp.zeros((0, 5), jnp.uint8), bits=bits)
    assert packed.shape == (0, width)
    assert unpack(packed, bits=bits, count=5).shape == (0, 5)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.uint16, jnp.uint32])
def test_any_integer_dtype_packs_alike(strict, dtype):
    codes = jnp.arange(13, dtype=dtype)
    np.testing.assert_array_equal(
        pack(codes, bits=5), reference_pack(np.arange(13, dtype=np.uint16), 5)
    )


@given(st.integers(0, 10**6), st.sampled_from(WIDTHS))
def test_nbytes_is_the_least_number_of_bytes_that_hold_the_bits(count, bits):
    assert 8 * (nbytes(count, bits) - 1) < count * bits <= 8 * nbytes(count, bits)


def test_packing_lowers_for_cpu_cuda_and_tpu():
    def there_and_back(codes):
        return unpack(pack(codes, bits=5), bits=5, count=13)

    export = jax.export.export(
        jax.jit(there_and_back), platforms=("cpu", "cuda", "tpu")
    )
    assert export(jnp.zeros(13, jnp.uint8)).platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_a_width_out_of_range_is_an_error(bits):
    text = rf"needs 1 <= bits <= 16, got {bits}\."
    with pytest.raises(ValueError, match="pack " + text):
        pack(jnp.zeros(3, jnp.uint8), bits=bits)
    with pytest.raises(ValueError, match="unpack " + text):
        unpack(jnp.zeros(3, jnp.uint8), bits=bits, count=3)


@pytest.mark.parametrize("bits", [4.0, True, "4"])
def test_a_width_that_is_not_an_integer_is_an_error(bits):
    with pytest.raises(TypeError, match=f"pack needs an integer bits, got {bits!r}"):
        pack(jnp.zeros(3, jnp.uint8), bits=bits)


def test_the_wrong_number_of_bytes_is_an_error():
    text = r"unpack needs 4 bytes for 10 codes of 3 bits, got uint8\[5\]\."
    with pytest.raises(ValueError, match=text):
        unpack(jnp.zeros(5, jnp.uint8), bits=3, count=10)
