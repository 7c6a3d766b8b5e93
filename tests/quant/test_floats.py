import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcomp.quant import quantize_affine
from jaxcomp.quant.floats import (
    FloatTensor,
    quantize_float,
    to_float,
    to_powers,
    widened,
)
from jaxcomp.quant.ranges import largest, least_error


FORMATS = [
    *("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e3m4"),
    *("float8_e4m3", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
    *("bfloat16", "float16"),
]
USUAL = ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]
NARROW = [ml_dtypes.bfloat16, np.float16]
SHAPE = (3, 10)
ORDINARY = st.floats(-500, 500, width=32)
ANY = st.floats(-(2.0**127), 2.0**127, width=32)
DOUBLE = partial(quantize_affine, bits=8, axis=None, group=256)

to_float_now = jax.jit(
    lambda x, dtype: to_float(x, dtype).dense(), static_argnames="dtype"
)
powers_now = jax.jit(lambda x: to_powers(x).dense())


def normal(shape=SHAPE, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def cast(x, format):
    """float64: what `ml_dtypes` rounds ``x`` to, once it is inside the range."""
    most = float(ml_dtypes.finfo(format).max)
    dtype = np.dtype(format)
    return np.clip(x, -most, most).astype(dtype).astype(np.float64)


@cache
def levels(format):
    """float64: all finite values of a format, in order."""
    bits = ml_dtypes.finfo(format).bits
    codes = np.arange(2**bits, dtype=np.uint8 if bits <= 8 else np.uint16)
    with np.errstate(invalid="ignore"):
        values = codes.view(np.dtype(format)).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


def near_middle(x, scale, format):
    """Where a quotient may round either way: XLA multiplies by the reciprocal."""
    steps = np.abs(np.asarray(x, np.float64) / scale)
    middles = (levels(format)[1:] + levels(format)[:-1]) / 2
    place = np.clip(np.searchsorted(middles, steps), 1, middles.size - 1)
    off = np.minimum(np.abs(steps - middles[place]), np.abs(steps - middles[place - 1]))
    return off <= 1e-6 * steps


# rounding


def test_a_tie_goes_to_the_even_code_and_what_is_beyond_saturates(strict):
    # Between 1 and 2 the levels are 1/8 apart; the last are 416 and 448.
    x = jnp.array([1.0625, 1.1875, 1.07, -0.0, 432.0, 449.0, -1e30])
    dense = to_float(x, jnp.float8_e4m3fn).dense()
    assert dense.tolist() == [1.0, 1.25, 1.125, 0, 448, 448, -448]
    # The levels are 0, 0.5, 1, 1.5, 2, 3, 4, 6.
    x = jnp.array([0.25, -0.75, 1.25, 1.75, 2.5, 3.5, -5.0, 9.0])
    q = to_float(x, jnp.float4_e2m1fn)
    assert q.dense().tolist() == [0, -1, 1, 2, 2, 4, -4, 6]
    assert q.codes.tolist() == [0xA0, 0x42, 0x64, 0x7E]  # sign, exponent, fraction


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_rounds_as_its_cast_does(strict, format):
    middles = ((levels(format)[1:] + levels(format)[:-1]) / 2).astype(np.float32)
    up = np.nextafter(middles, np.float32(np.inf))
    down = np.nextafter(middles, np.float32(-np.inf))
    wide = normal(1000) * np.exp2(np.random.default_rng(1).uniform(-20, 20, 1000))
    x = np.concatenate([middles, up, down, levels(format), wide]).astype(np.float32)
    x = np.where(np.abs(x) < 2**-125, 0, x)  # XLA flushes subnormal float32
    np.testing.assert_array_equal(to_float_now(x, format), cast(x, format))


@pytest.mark.parametrize("dtype", NARROW)
def test_a_narrow_dtype_is_rounded_from_its_own_values(strict, dtype):
    x = normal(dtype=dtype) * np.array(100, dtype)
    q = to_float(jnp.asarray(x), jnp.float8_e5m2)
    assert q.dtype == q.dense().dtype == dtype
    np.testing.assert_array_equal(q.dense(), cast(x.astype(np.float32), "float8_e5m2"))


def test_the_largest_of_a_narrow_dtype_is_not_exceeded():
    x = jnp.array([6e4, -65504], jnp.float16)
    q = quantize_float(x, axis=None)
    assert 448 * float(q.scale[0, 0]) > 65504  # it was rounded up
    assert q.dense()[1] == -65504


# scales


def test_the_largest_magnitude_of_a_group_is_the_largest_level(strict):
    x = jnp.array([[3.0, -0.3, 0.0, 12.0, 5.0]])
    q = quantize_float(x, jnp.float4_e2m1fn, axis=None, group=3)
    assert q.scale.tolist() == [[0.5, 2.0]]
    # In units of the scale: 6, -0.6, 0 | 6, 2.5.
    assert q.dense().tolist() == [[3.0, -0.25, 0.0, 12.0, 4.0]]


@pytest.mark.parametrize("format", USUAL)
@settings(max_examples=25)
@given(x=hnp.arrays(np.float32, SHAPE, elements=ORDINARY | ANY))
def test_quantize_float_equals_plain_numpy(format, x):
    x = np.where(np.abs(x) < 2.0**-80, 0, x)
    q = quantize_float(x, format, axis=0, group=4)
    dense = np.asarray(q.dense())
    lanes = np.pad(x, [(0, 0), (0, 2)]).reshape(3, 3, 4)
    exact = np.abs(lanes).max(-1) / float(ml_dtypes.finfo(format).max)
    scale = np.asarray(q.scale, np.float64)
    np.testing.assert_allclose(scale, np.maximum(exact, 2.0**-125), rtol=2e-7)
    scale = scale.repeat(4, axis=1)[:, :10]
    expected = cast(x / scale, format) * scale
    sure = ~near_middle(x, scale, format)
    np.testing.assert_allclose(dense[sure], expected[sure], rtol=2e-7)
    assert np.all(dense[x == 0] == 0)


def test_codes_follow_the_scales_that_are_really_stored():
    x = jnp.array([[5.0, 1.0, -3.3]])
    up = quantize_float(x, jnp.float4_e2m1fn, axis=None, scales=to_powers)
    assert up.scale.dense().tolist() == [[1.0]]  # 5/6, rounded up
    assert up.dense().tolist() == [[4.0, 1.0, -3.0]]
    narrow = quantize_float(x, axis=0, scales=partial(to_float, dtype=jnp.bfloat16))
    scale = np.float32(5 / 448).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(narrow.scale.dense(), [[scale]])
    np.testing.assert_allclose(narrow.dense() / scale, cast(x / scale, USUAL[0]))


def test_a_group_whose_scale_is_rounded_to_zero_becomes_zeros():
    x = jnp.array([1.0, -1.0, 1e-4, 1e-5])
    q = quantize_float(x, axis=None, group=2, scales=DOUBLE)
    assert q.scale.dense()[0, 1] == 0
    for dense in (q.dense(), q.encode(x).dense()):
        np.testing.assert_allclose(dense, [1, -1, 0, 0], rtol=1e-6)


@given(hnp.arrays(np.float32, SHAPE, elements=ORDINARY))
def test_a_searched_range_has_no_larger_error_in_any_group(x):
    def errors(reach):
        q = quantize_float(x, "float4_e2m1fn", axis=0, reach=reach)
        return np.sum((np.asarray(q.dense(), np.float64) - x) ** 2, axis=1)

    near = 1e-10 * np.max(x.astype(np.float64) ** 2, axis=1)  # float32 of the error
    assert np.all(errors(least_error()) <= errors(largest) * (1 + 1e-5) + near)


def test_a_widened_range_lets_the_largest_magnitude_meet_a_level_inside():
    x = jnp.array([4.0, 3.0, -2.0])  # no scale at which 4 becomes 6 has all of them
    reach = widened(largest, 1.5)
    assert reach is widened(largest, 1.5)  # what is compiled for it is found again
    q = quantize_float(x, jnp.float4_e2m1fn, axis=None, reach=reach)
    np.testing.assert_array_equal(q.dense(), x)


# powers


@settings(max_examples=25)
@given(hnp.arrays(np.float32, 8, elements=st.floats(2.0**-126, 2.0**127, width=32)))
def test_a_power_is_the_least_that_is_not_smaller(x):
    power = np.asarray(powers_now(x), np.float64)
    assert np.all(np.frexp(power)[0] == 0.5)
    assert np.all((x <= power) & (power < 2 * x.astype(np.float64)))
    np.testing.assert_array_equal(powers_now(power.astype(np.float32)), power)


def test_powers_end_where_the_normal_numbers_of_the_dtype_do(strict):
    x = [0.0, -3.0, 1e-45, 3e38, 2.0**127]
    assert powers_now(jnp.array(x)).tolist() == [2.0**-126] * 3 + [2.0**127] * 2
    half = jnp.array([0, 1e-7, 1.5, 6e4], jnp.float16)
    assert to_powers(half).dense().tolist() == [2.0**-14, 2.0**-14, 2, 2.0**15]


# the node


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (partial(quantize_float, dtype=jnp.float4_e2m1fn, group=4), np.float32),
        (partial(quantize_float, scales=DOUBLE), ml_dtypes.bfloat16),
        (partial(to_float, dtype=jnp.bfloat16), np.float32),
    ],
)
def test_pruned_entries_are_zero_and_the_survivors_keep_their_bits(make, dtype):
    q = make(jnp.asarray(normal(dtype=dtype)))
    mask = np.random.default_rng(1).random(SHAPE) < 0.5
    dense = np.asarray(q.dense())
    pruned = q.encode(jnp.asarray(np.where(mask, dense, np.zeros((), dtype))))
    np.testing.assert_array_equal(pruned.dense(), np.where(mask, dense, 0))
    assert pruned.describe() == q.describe()
    again = pruned.encode(q.dense())
    np.testing.assert_array_equal(again.dense(), dense)


def test_new_values_go_to_the_nearest_level_of_the_same_scales():
    q = quantize_float(jnp.array([6.0, 1.0]), jnp.float4_e2m1fn, axis=None)
    assert q.encode(jnp.array([5.1, 90.0])).dense().tolist() == [6, 6]


def test_jit_and_vmap_give_the_same_node():
    def make(row):
        return quantize_float(row, "float4_e2m1fn", group=4, scales=to_powers)

    x = jnp.asarray(normal((2, 3, 10)))
    dense = jnp.stack([make(row).dense() for row in x])
    stacked = jax.vmap(make)(x)
    np.testing.assert_array_equal(jax.jit(make)(x[0]).dense(), dense[0])
    np.testing.assert_array_equal(stacked.dense(), dense)
    np.testing.assert_array_equal(stacked.encode(dense).codes, stacked.codes)


@pytest.mark.parametrize("format", [*USUAL[1:], "bfloat16"])
def test_rounding_lowers_for_cpu_cuda_and_tpu(format):
    def there_and_back(x):
        q = quantize_float(x, format, scales=to_powers)
        return q.encode(x + q.dense()).dense()

    run = jax.export.export(jax.jit(there_and_back), platforms=("cpu", "cuda", "tpu"))
    assert run(jnp.zeros(SHAPE)).out_avals[0].shape == SHAPE


def test_a_scale_gets_the_gradient_of_its_group():
    q = quantize_float(jnp.array([[6.0, 1.0], [3.0, 3.0]]), "float4_e2m1fn", axis=0)

    def total(scale):
        return jnp.sum(FloatTensor(q.codes, scale, *static).dense())

    static = (q.format, q.bits, q.name, q.shape, q.axis, q.group)
    assert jax.grad(total)(q.scale).tolist() == [[7.0], [12.0]]


@pytest.mark.parametrize(
    ("make", "bits", "text"),
    [
        (partial(to_float, dtype=jnp.bfloat16), 480, "bfloat16"),
        (to_powers, 240, "float8_e8m0fnu"),
        (partial(quantize_float, axis=None), 240 + 32, "float8_e4m3fn, one scale"),
        (
            partial(quantize_float, dtype="float6_e3m2fn", axis=0, group=4),
            36 * 6 + 9 * 32,  # three groups of 4 for 10 entries, 3 times
            "float6_e3m2fn, axis 0, group 4",
        ),
        (
            partial(quantize_float, dtype="float4_e2m1fn", scales=to_powers),
            30 * 4 + 10 * 8,
            "float4_e2m1fn, axis 1, scales float8_e8m0fnu",
        ),
    ],
)
def test_a_node_tells_its_bits_and_what_it_is(make, bits, text):
    q = make(jnp.asarray(normal()))
    assert q.nbits() == bits
    assert q.describe() == text


# at the edge


def edges(dtype):
    most = float(ml_dtypes.finfo(dtype).max)
    rows = [[0.0] * 5, [-0.3] * 5, [1e-41] * 5, [1e37, -1e37, 1.0, 0, 1e-30]]
    return np.clip([*rows, [most, -most, 0, 1, 2]], -most, most).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, *NARROW])
def test_no_finite_value_becomes_nan_or_wakes_a_zero(dtype):
    x = edges(dtype)
    format = "float8_e4m3fn" if dtype == np.float32 else "float4_e2m1fn"
    q = quantize_float(jnp.asarray(x), format, axis=0, group=3)
    for dense in (q.dense(), q.encode(jnp.asarray(-x)).dense()):
        assert np.isfinite(dense).all()
        assert np.all(np.asarray(dense)[x == 0] == 0)


@pytest.mark.parametrize("shape", [(), (1, 1), (3, 0)])
@pytest.mark.parametrize("make", [quantize_float, to_powers])
def test_one_entry_comes_back_and_none_is_none(make, shape):
    back = jax.jit(lambda x: make(x).encode(x).dense())(jnp.full(shape, 2.0))
    np.testing.assert_allclose(back, np.full(shape, 2.0), rtol=1e-6)


# errors


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8, jnp.float8_e8m0fnu])
@pytest.mark.parametrize("make", [to_float, quantize_float])
def test_a_dtype_that_holds_no_narrow_values_is_an_error(make, dtype):
    text = (
        f"{make.__name__} needs a float dtype of at most 16 bits that has a zero, got "
        f"{jnp.dtype(dtype).name}. Pass float8_e4m3fn, float4_e2m1fn or bfloat16, say; "
        "for powers of 2 call `to_powers`."
    )
    with pytest.raises(TypeError, match=re.escape(text)):
        make(jnp.ones(3), dtype)


@pytest.mark.parametrize(
    "make", [to_powers, quantize_float, partial(to_float, dtype=jnp.bfloat16)]
)
def test_an_array_that_is_not_floating_is_an_error(make):
    name = getattr(make, "func", make).__name__
    text = f"{name} needs a floating array, got int32[3]. Cast it, or leave this leaf"
    with pytest.raises(TypeError, match=re.escape(text)):
        make(jnp.arange(3))


def test_an_axis_or_a_group_out_of_range_is_an_error():
    text = "quantize_float needs axes of an array of 1 dimensions, each once, got axis"
    with pytest.raises(ValueError, match=text):
        quantize_float(jnp.ones(3), axis=1)
    with pytest.raises(ValueError, match="quantize_float needs 1 <= group <= "):
        quantize_float(jnp.ones(3), group=0)


@pytest.mark.parametrize("factor", [0.5, np.nan, np.inf])
def test_a_factor_that_does_not_widen_is_an_error(factor):
    text = f"widened needs a finite factor of 1 or more, got {factor}."
    with pytest.raises(ValueError, match=re.escape(text)):
        widened(largest, factor)
