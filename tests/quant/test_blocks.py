import math
import re
from functools import cache, partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcomp.quant import quantize_affine
from jaxcomp.quant.blocks import (
    best_exponent,
    floor_exponent,
    quantize_mx,
    quantize_nf4,
    quantize_nvfp4,
)
from jaxcomp.quant.floats import widened
from jaxcomp.quant.formats import NF4
from jaxcomp.quant.ranges import least_error


MX = ["float4_e2m1fn", "float6_e2m3fn", "float8_e5m2"]
BLOCKS = [quantize_nf4, quantize_mx, quantize_nvfp4]
NARROW = [ml_dtypes.bfloat16, np.float16]
SHAPE = (3, 40)  # a whole group and a ragged one along the last axis
ORDINARY = st.floats(-500, 500, width=32)
ANY = st.floats(-(2.0**127), 2.0**127, width=32)

best = partial(quantize_mx, exponent=best_exponent)


def cast(x, format):
    """float64: what `ml_dtypes` rounds ``x`` to, once it is inside the range."""
    most = float(ml_dtypes.finfo(format).max)
    return np.clip(x, -most, most).astype(np.dtype(format)).astype(np.float64)


def blocks_of(x, group):
    """float64[rows, groups, group], the last filled with zeros."""
    short = -x.shape[1] % group
    return np.pad(np.float64(x), [(0, 0), (0, short)]).reshape(len(x), -1, group)


# figures


@cache
def sample(name, log2_size):
    """Quantiles in random order, of unit variance: MX sees the scale."""
    share = (np.arange(2**log2_size) + 0.5) / 2**log2_size
    tail = np.minimum(share, 1 - share)  # as precise in float32 as it is small
    if name == "gauss":
        x = np.asarray(jax.scipy.special.ndtri(tail.astype(np.float32)))
    else:
        x = np.log(2 * tail) / math.sqrt(2)
    x = np.where(share < 0.5, x, -x).astype(np.float32)
    return jnp.asarray(np.random.default_rng(1).permutation(x))


@jax.jit
def decibels(x, dense):
    """Signal to quantization noise."""
    return 10 * jnp.log10(jnp.sum(x * x) / jnp.sum((x - dense) ** 2))


@pytest.mark.parametrize(
    ("quantizer", "gauss", "laplace"),
    [
        (partial(quantize_nf4, group=32), 21.18, 20.61),
        (quantize_nf4, 20.73, 19.69),
        (partial(quantize_nf4, group=128), 20.39, 18.88),
        (partial(quantize_nf4, group=256), 20.12, 18.16),
        (partial(quantize_mx, axis=None), 18.79, 17.98),
        (partial(best, axis=None), 19.05, 18.24),
        (partial(quantize_nvfp4, axis=None), 20.44, 20.66),
    ],
    ids=["nf4 32", "nf4 64", "nf4 128", "nf4 256", "mxfp4", "mxfp4 best", "nvfp4"],
)
def test_the_error_of_every_format_is_the_published_one(quantizer, gauss, laplace):
    for name, expected in (("gauss", gauss), ("laplace", laplace)):
        x = sample(name, 19)
        np.testing.assert_allclose(
            decibels(x, quantizer(x).dense()), expected, atol=0.03
        )


@pytest.mark.parametrize(
    ("group", "gauss", "laplace"),
    [(32, 22.00, 21.24), (64, 21.39, 20.23), (128, 20.93, 19.41)],
)
def test_the_error_of_searched_nf4_is_the_published_one(group, gauss, laplace):
    reach = widened(least_error(), 1.05)
    for name, expected in (("gauss", gauss), ("laplace", laplace)):
        x = sample(name, 17)
        dense = quantize_nf4(x, group=group, reach=reach).dense()
        np.testing.assert_allclose(decibels(x, dense), expected, atol=0.03)


def test_the_squared_error_of_nf4_is_the_published_one():
    x = sample("gauss", 19)
    error = jnp.mean((x - quantize_nf4(x).dense()) ** 2) / jnp.mean(x * x)
    np.testing.assert_allclose(error, 0.00846, atol=0.00003)


def test_double_quantization_takes_4_127_bits_and_hardly_a_thing_of_the_quality():
    x = sample("gauss", 19)
    double = partial(quantize_affine, bits=8, axis=None, group=256)
    q = quantize_nf4(x, scales=double)
    assert round(q.nbits() / x.size, 3) == 4.127
    assert decibels(x, q.dense()) > decibels(x, quantize_nf4(x).dense()) - 0.01
    assert q.describe() == "nf4, group 64, scales 8 bits affine, group 256"


@pytest.mark.parametrize(
    ("quantizer", "bits", "text"),
    [
        (quantize_nf4, 4.5, "nf4, group 64"),
        (quantize_mx, 4.25, "float4_e2m1fn, axis 1, group 32, scales float8_e8m0fnu"),
        (
            partial(quantize_mx, dtype=jnp.float8_e5m2),
            8.25,
            "float8_e5m2, axis 1, group 32, scales float8_e8m0fnu",
        ),
        (
            quantize_nvfp4,
            4.5 + 32 / 512,
            "float4_e2m1fn, axis 1, group 16, scales float8_e4m3fn, one scale",
        ),
    ],
)
def test_a_block_format_takes_the_bits_that_it_is_known_for(quantizer, bits, text):
    q = quantizer(jnp.ones((128, 4)))
    assert q.nbits() == bits * 512
    assert q.describe() == text


# NF4


def test_nf4_divides_by_the_largest_magnitude_of_each_group(strict):
    x = jnp.array([2.0, -2.0, 0.3, 0.0, -0.5, 0.1])
    q = quantize_nf4(x, group=4)
    assert q.scale.tolist() == [[2.0, 0.5]]
    # In units of the scale: 1, -1, 0.15, 0 | -1, 0.2. Ranks: 15, 0, 9, 7 | 0, 9.
    assert q.codes.tolist() == [0x0F, 0x79, 0x90, 0x77]
    np.testing.assert_allclose(
        q.dense(), [2, -2, 2 * NF4[9], 0, -0.5, 0.5 * NF4[9]], rtol=1e-6
    )


def test_the_levels_of_nf4_are_quantiles_of_a_normal_distribution():
    # Dettmers et al., appendix E: 8 positive and 7 negative of evenly spread shares,
    # from 0.5 to one that leaves half a step out, over the largest, and 0.
    share, quantile = 0.9677083, NormalDist().inv_cdf
    upper = [quantile(p) for p in np.linspace(share, 0.5, 9)]
    lower = [-quantile(p) for p in np.linspace(share, 0.5, 8)]
    expected = np.sort([*upper[:-1], 0.0, *lower[:-1]]) / upper[0]
    np.testing.assert_allclose(NF4, expected, atol=2e-6)


@settings(max_examples=25)
@given(hnp.arrays(np.float32, 100, elements=ORDINARY))
def test_nf4_equals_the_nearest_of_its_levels(x):
    x = np.where(np.abs(x) < 1e-30, 0, x)
    dense = np.asarray(quantize_nf4(x, axis=None, group=50).dense(), np.float64)
    scale = np.maximum(np.abs(x.reshape(2, 50)).max(-1, keepdims=True), 1e-37)
    steps = x.reshape(2, 50).astype(np.float64) / scale
    off = np.abs(steps[..., None] - np.float32(NF4))
    found = np.abs(dense.reshape(2, 50) / scale - steps)
    np.testing.assert_allclose(found, off.min(-1), atol=2e-6)
    assert np.all(dense[x == 0] == 0)


# MX


def test_the_shared_exponent_is_that_of_the_largest_magnitude(strict):
    # 7.9 and 2: scales 2**(2 - 2) and 2**(1 - 2); the levels end at 6.
    x = jnp.array([[7.9, -2.4, 0.2, 0.0, 2.0, -0.6, 0.2, 0.1]])
    q = quantize_mx(x, axis=None, group=4)
    assert q.scale.dense().tolist() == [[1.0, 0.5]]
    assert q.dense().tolist() == [[6.0, -2.0, 0.0, 0.0, 2.0, -0.5, 0.25, 0.0]]
    assert q.scale.codes.tolist() == [127, 126]


@pytest.mark.parametrize(
    ("format", "last"),  # the exponents of 6, 7.5, 57344 and 448
    [*zip(MX, [2, 2, 15], strict=True), ("float8_e4m3fn", 8)],
)
def test_the_exponent_is_exact_next_to_every_power_of_two(format, last):
    powers = np.exp2(np.arange(-126.0, 128.0)).astype(np.float32)
    down = np.nextafter(powers, np.float32(0))
    up = np.nextafter(powers, np.float32(np.inf))
    x = np.concatenate([powers, -up, down, [0, 1e-45, -1e-40, 3.4e38]])
    x = x.astype(np.float32)
    with np.errstate(divide="ignore"):
        exact = np.frexp(np.abs(x).astype(np.float64))[1] - 1 - last
    expected = np.where(x == 0, -126, np.maximum(exact, -126))
    found = jax.jit(floor_exponent, static_argnums=1)(x[:, None, None], format)
    np.testing.assert_array_equal(found[:, 0], expected)


@pytest.mark.parametrize("format", MX)
@settings(max_examples=25)
@given(x=hnp.arrays(np.float32, SHAPE, elements=ORDINARY | ANY))
def test_quantize_mx_equals_plain_numpy(format, x):
    x = np.where(np.abs(x) < 2.0**-80, 0, x)
    blocks = blocks_of(x, 32)
    last = math.frexp(float(ml_dtypes.finfo(format).max))[1] - 1
    exponent = np.frexp(np.abs(blocks).max(-1, keepdims=True))[1] - 1 - last
    scale = np.exp2(np.maximum(exponent, -126.0))
    expected = (cast(blocks / scale, format) * scale).reshape(3, -1)[:, :40]
    dense = quantize_mx(x, format, axis=0).dense()
    np.testing.assert_array_equal(dense, expected.astype(np.float32))


@settings(max_examples=25)
@given(hnp.arrays(np.float32, SHAPE, elements=ORDINARY | ANY))
def test_the_best_exponent_is_the_better_of_two(x):
    x = np.where(np.abs(x) < 2.0**-80, 0, x)
    blocks = blocks_of(x, 32)
    most = np.abs(blocks).max(-1)
    low = np.where(most > 0, np.frexp(most)[1] - 1 - 2, -126)

    def errors(exponent):
        steps = blocks / np.exp2(exponent)[..., None]
        off = (steps - cast(steps, "float4_e2m1fn")) * np.exp2(exponent - low)[
            ..., None
        ]
        return np.sum(off * off, axis=-1)

    found = np.log2(np.asarray(best(x, axis=0).scale.dense(), np.float64))
    least = np.minimum(errors(low + 0.0), errors(low + 1.0))
    np.testing.assert_allclose(errors(found), least, rtol=1e-5, atol=1e-9)
    moved = found - low
    assert np.all((moved == 0) | (moved == 1))


def test_any_rule_may_choose_the_exponents():
    x = jnp.array([[7.9, 1.0, 0.6, 0.0]])

    def next_exponent(groups, dtype):
        return floor_exponent(groups, dtype) + 1

    q = quantize_mx(x, axis=None, exponent=next_exponent)
    assert q.dense().tolist() == [[8.0, 1.0, 1.0, 0.0]]


# NVFP4


def test_nvfp4_has_a_narrow_scale_for_a_group_and_a_wide_one_for_all(strict):
    # Group scales in units of 1: 448, 1.0625 to its even neighbour 1, and 0.
    x = jnp.array([[2688.0, 900.0, 6.375, 4.9, 0.0, 0.0]])
    q = quantize_nvfp4(x, axis=None, group=2)
    assert q.scale.scale.tolist() == [[1.0]]
    assert q.scale.dense().tolist() == [[448.0, 1.0, 0.0]]
    assert q.dense().tolist() == [[2688.0, 896.0, 6.0, 4.0, 0.0, 0.0]]


@settings(max_examples=25)
@given(hnp.arrays(np.float32, SHAPE, elements=ORDINARY))
def test_nvfp4_equals_plain_numpy(x):
    x = np.where(np.abs(x) < 1e-20, 0, x)
    q = quantize_nvfp4(x, axis=0)
    blocks = blocks_of(x, 16)
    whole = max(np.abs(x).max() / 2688, 2.0**-125)
    exact = np.abs(blocks).max(-1) / 6 / whole
    stored = np.asarray(q.scale.dense(), np.float64) / whole
    half_step = np.maximum(exact / 16, 2.0**-10)
    assert np.all(np.abs(stored - exact) <= half_step * (1 + 1e-5))
    scale = np.where(stored > 0, stored * whole, 1)[..., None]
    steps = np.where(stored[..., None] > 0, blocks / scale, 0)
    # A tie may go either way: XLA multiplies by the reciprocal.
    either = [cast(steps * (1 + off), "float4_e2m1fn") for off in (-1e-6, 1e-6)]
    dense = blocks_of(np.asarray(q.dense()), 16) / scale
    off = np.minimum(np.abs(dense - either[0]), np.abs(dense - either[1]))
    assert np.all(off <= 1e-5)


# at the edge


def edges(dtype):
    most = float(ml_dtypes.finfo(dtype).max)
    rows = [[0.0] * 5, [-0.3] * 5, [1e-41] * 5, [1e37, -1e37, 1.0, 0, 1e-30]]
    return np.clip([*rows, [most, -most, 0, 1, 2]], -most, most).astype(dtype)


@pytest.mark.parametrize(
    ("quantizer", "dtype"),
    [
        *((quantizer, np.float32) for quantizer in (*BLOCKS, best)),
        (quantize_nf4, np.float16),
        (quantize_nvfp4, ml_dtypes.bfloat16),
        (best, np.float16),
    ],
)
def test_no_finite_value_becomes_nan_or_wakes_a_zero(quantizer, dtype):
    @jax.jit
    def there_and_back(x):
        q = quantizer(x, axis=0, group=3)
        return q.dense(), q.encode(-x).dense()

    x = edges(dtype)
    for dense in there_and_back(x):
        assert dense.dtype == dtype
        assert np.isfinite(dense).all()
        assert np.all(np.asarray(dense)[x == 0] == 0)


@pytest.mark.parametrize("quantizer", BLOCKS)
@pytest.mark.parametrize("shape", [(), (0, 3)])
def test_one_entry_comes_back_and_none_is_none(quantizer, shape):
    back = jax.jit(lambda x: quantizer(x).dense())(jnp.full(shape, 3.0))
    np.testing.assert_allclose(back, np.full(shape, 3.0), rtol=1e-6)


@pytest.mark.parametrize("quantizer", [quantize_nf4, best, quantize_nvfp4])
def test_jit_and_vmap_give_the_same_node(quantizer):
    x = jax.random.normal(jax.random.key(0), (2, 3, 40))
    stacked = jax.jit(jax.vmap(lambda row: quantizer(row).dense()))(x)
    np.testing.assert_array_equal(stacked[0], quantizer(x[0]).dense())


@pytest.mark.parametrize("quantizer", [quantize_nf4, best, quantize_nvfp4])
def test_a_block_format_lowers_for_cpu_cuda_and_tpu(quantizer):
    run = jax.jit(lambda x: quantizer(x).encode(x).dense())
    platforms = ("cpu", "cuda", "tpu")
    assert jax.export.export(run, platforms=platforms)(jnp.zeros((2, 40)))


# errors


@pytest.mark.parametrize("quantizer", BLOCKS)
def test_bad_input_is_an_error(quantizer):
    name = quantizer.__name__
    text = f"{name} needs axes of an array of 2 dimensions, each once, got axis=2."
    with pytest.raises(ValueError, match=re.escape(text)):
        quantizer(jnp.ones((2, 3)), axis=2)
    with pytest.raises(ValueError, match=f"{name} needs 1 <= group <= .* got 0"):
        quantizer(jnp.ones((2, 3)), group=0)
    text = f"{name} needs a floating array, got int32[2, 3]. Cast it, or leave"
    with pytest.raises(TypeError, match=re.escape(text)):
        quantizer(jnp.ones((2, 3), jnp.int32))


def test_an_element_dtype_without_a_zero_is_an_error():
    text = "quantize_mx needs a float dtype of at most 16 bits that has a zero, got "
    with pytest.raises(TypeError, match=f"{text}float8_e8m0fnu"):
        quantize_mx(jnp.ones((2, 3)), jnp.float8_e8m0fnu)
