import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcomp import quantize
from jaxcomp.quant import quantize_searched


SHAPE = (4, 6)
# (bits, axis, group): whole, ragged and single-entry groups.
CASES = [(4, -1, None), (3, 0, 4), (2, None, 5), (8, None, None), (4, (0, 1), None)]
TINY = float(np.finfo(np.float32).tiny)
WIDE = st.floats(-(2.0**99), 2.0**99, width=32)  # to 6e29, and subnormals
SMALL = st.sampled_from([0.0, -0.0, TINY, -TINY, 1e-44, -1e-40, 1e-37, -3e-38])
ORDINARY = st.floats(-8, 8, width=32)
NARROW = [ml_dtypes.bfloat16, np.float16]


def normal(shape=SHAPE, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def grouped(x, q):
    """float64[scales, group]: what shares a scale, the ragged ones filled with 0."""
    lanes = np.moveaxis(np.asarray(x, np.float64), q.axis, range(len(q.axis)))
    channels, groups = q.scale.shape
    lanes = lanes.reshape(channels, -1)
    lanes = np.pad(lanes, [(0, 0), (0, groups * q.group - lanes.shape[1])])
    return lanes.reshape(channels * groups, q.group)


def errors(x, q):
    """float64[scales]: the squared error of every group."""
    return np.sum((grouped(x, q) - grouped(q.dense(), q)) ** 2, axis=1)


def least_errors(values, bits):
    """The least squared error of any scale, float64[groups], for values [groups, n].

    As the scale falls, one entry after the other goes up a code, entry ``x`` to code
    ``k + 1`` at the scale ``|x| / (k + 1/2)``. Between two such scales the codes ``c``
    stay, and the error at the best scale is ``sum(x*x) - sum(x*c)**2 / sum(c*c)``.
    """
    found = []
    for x in np.abs(values):
        code = np.arange(2 ** (bits - 1) - 1)
        order = np.argsort(-(x[:, None] / (code + 0.5)).reshape(-1))
        cross = np.cumsum(np.repeat(x, code.size)[order])
        power = np.cumsum(np.tile(2 * code + 1, x.size)[order])
        found.append(np.sum(x * x) - np.max(cross**2 / power))
    return np.array(found)


def sqnr(x, q):
    """Signal to quantization noise, in dB."""
    return 10 * np.log10(np.sum(np.float64(x) ** 2) / errors(x, q).sum())


def test_clipping_the_largest_value_can_bring_the_others_nearer(strict):
    x = jnp.array([1.0, 1.0, -1.0, 2.0])
    # Codes 0, 0, 0, 1 at scale 2 have the error 3; 1, 1, -1, 1 have the least error at
    # scale (1 + 1 + 1 + 2) / 4: 3 / 16 + 9 / 16.
    assert quantize(x, 2, axis=None).dense().tolist() == [0, 0, 0, 2]
    q = quantize_searched(x, 2, axis=None)
    assert q.scale.tolist() == [[1.25]]
    assert q.dense().tolist() == [1.25, 1.25, -1.25, 1.25]


def test_each_group_has_its_own_scale():
    x = jnp.array([1.0, 1.0, -1.0, 2.0, 10.0, -10.0, 10.0, 20.0, 3.0])
    q = quantize_searched(x, 2, axis=None, group=4)
    np.testing.assert_allclose(q.scale, [[1.25, 12.5, 3.0]], rtol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
@given(x=hnp.arrays(np.float32, SHAPE, elements=WIDE | SMALL | ORDINARY))
def test_no_group_is_worse_than_on_the_grid_of_its_largest_value(case, x):
    bits, axis, group = case
    q = quantize_searched(x, bits, axis=axis, group=group)
    absmax = quantize(x, bits, axis=axis, group=group)
    scale = np.asarray(absmax.scale, np.float64).reshape(-1)
    # Errors that float32 cannot tell apart: 1e-6 of themselves, or rounding of codes
    # that meet their values.
    near = (2e-6 * 2**bits * scale) ** 2 * q.group
    assert np.all(errors(x, q) <= errors(x, absmax) * (1 + 1e-5) + near)
    assert np.isfinite(q.scale).all()
    dense = np.asarray(q.dense())
    assert np.all(dense[x == 0].view(np.uint32) == 0)


@pytest.mark.parametrize(("bits", "group"), [(2, 3), (2, 6), (3, 6), (4, 6)])
def test_the_error_is_close_to_the_least_of_all_scales(bits, group):
    for seed in range(4):
        x = normal((32, 6), seed=seed) ** 3  # heavy tails
        q = quantize_searched(jnp.asarray(x), bits, axis=0, group=group)
        ours, least = errors(x, q), least_errors(grouped(x, q), bits)
        assert np.all(ours >= least * (1 - 1e-5) - 1e-9)
        assert ours.sum() <= 1.005 * least.sum()


@pytest.mark.parametrize("bits", [3, 6])
def test_the_error_of_long_groups_is_within_a_percent_of_the_least(bits):
    x = normal((64, 128))
    q = quantize_searched(jnp.asarray(x), bits, axis=0)
    assert errors(x, q).sum() <= 1.01 * least_errors(x, bits).sum()


@pytest.mark.parametrize(("group", "absmax"), [(64, 19.36), (128, 18.61)])
def test_gaussian_weights_gain_what_a_searched_scale_can_give(group, absmax):
    x = normal((4096, 128))
    plain = quantize(jnp.asarray(x), 4, axis=0, group=group)
    assert abs(sqnr(x, plain) - absmax) < 0.03
    searched = sqnr(x, quantize_searched(jnp.asarray(x), 4, axis=0, group=group))
    assert searched > absmax + (0.6 if group == 64 else 0.85)


def test_one_scale_for_all_gaussian_weights_is_that_of_the_theory():
    x = normal((512, 512))
    q = quantize_searched(jnp.asarray(x), 4, axis=None)
    # The best uniform quantizer of 15 levels: step 0.3534, 18.898 dB.
    np.testing.assert_allclose(q.scale, [[0.3534]], rtol=2e-2)
    np.testing.assert_allclose(sqnr(x, q), 18.898, atol=0.03)


def test_an_outlier_does_not_spoil_the_others():
    x = normal((1, 4096))
    x[0, 0] = 40.0
    q = quantize_searched(jnp.asarray(x), 4, axis=None)
    assert errors(x, q)[0] < 0.5 * errors(x, quantize(jnp.asarray(x), 4, axis=None))[0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_that_are_on_a_grid_stay_there(bits):
    top = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(0).integers(-top, top, SHAPE, endpoint=True)
    codes[0, 0] = top
    x = (codes * 0.1).astype(np.float32)
    q = quantize_searched(jnp.asarray(x), bits, axis=None)
    np.testing.assert_allclose(q.dense(), x, rtol=1e-6)


@given(hnp.arrays(np.float32, SHAPE, elements=ORDINARY))
def test_quantizing_again_changes_little_next_to_the_first_time(x):
    q = quantize_searched(x, 4)
    again = quantize_searched(q.dense(), 4)
    assert np.all(errors(q.dense(), again) <= 0.2 * errors(x, q) + 1e-12)


@pytest.mark.parametrize("dtype", [np.float32, *NARROW])
def test_the_largest_and_the_least_numbers_are_no_worse_than_unsearched(dtype):
    info = ml_dtypes.finfo(dtype)
    for size in (float(info.max), float(info.tiny), 64 * float(info.tiny)):
        x = (np.array([1, -1, 0.5, 0.4, 0, -0.9]) * size).astype(dtype)
        for bits in (2, 8):
            q = quantize_searched(jnp.asarray(x), bits, axis=None)
            assert np.isfinite(np.asarray(q.dense(), np.float64)).all()
            plain = errors(x, quantize(jnp.asarray(x), bits, axis=None))
            assert np.all(errors(x, q) <= plain * (1 + 1e-5))


@pytest.mark.parametrize("dtype", NARROW)
def test_a_narrow_dtype_is_no_worse_than_unsearched(strict, dtype):
    for seed in range(4):
        x = normal((8, 64), dtype, seed)
        q = quantize_searched(jnp.asarray(x), 4, axis=0)
        assert q.dtype == q.dense().dtype == dtype
        plain = errors(x, quantize(jnp.asarray(x), 4, axis=0))
        assert np.all(errors(x, q) <= plain * (1 + 1e-5))
        assert errors(x, q).sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("shape", [(), (1, 1), (0,), (0, 3)])
def test_one_entry_comes_back_and_none_is_none(shape):
    for value in (2.5, -2.5, 0.0):
        dense = quantize_searched(jnp.full(shape, value)).dense()
        np.testing.assert_allclose(dense, np.full(shape, value), rtol=1e-6)


def test_jit_and_vmap_give_the_same_grid():
    x = jnp.asarray(normal((3, 8, 16)))
    one = [quantize_searched(row, 3, group=4) for row in x]
    traced = jax.jit(lambda row: quantize_searched(row, 3, group=4))(x[0])
    stacked = jax.vmap(lambda row: quantize_searched(row, 3, group=4))(x)
    np.testing.assert_array_equal(traced.dense(), one[0].dense())
    dense = jnp.stack([q.dense() for q in one])
    np.testing.assert_allclose(stacked.dense(), dense, rtol=1e-6)


def test_the_search_lowers_for_cpu_cuda_and_tpu():
    platforms = ("cpu", "cuda", "tpu")
    run = jax.jit(lambda x: quantize_searched(x, 4, group=4).dense())
    assert jax.export.export(run, platforms=platforms)(jnp.zeros(SHAPE))


def test_bad_input_is_an_error():
    with pytest.raises(ValueError, match="quantize_searched needs 2 <= bits <= 8, got"):
        quantize_searched(jnp.ones((2, 3)), 9)
    with pytest.raises(ValueError, match="quantize_searched needs 1 <= group"):
        quantize_searched(jnp.ones((2, 3)), group=0)
    text = "quantize_searched needs axes of an array of 2 dimensions, each once, got "
    with pytest.raises(ValueError, match=re.escape(f"{text}axis=2.")):
        quantize_searched(jnp.ones((2, 3)), axis=2)
    text = "quantize_searched needs a floating array, got int32[2, 3]. Cast it"
    with pytest.raises(TypeError, match=re.escape(text)):
        quantize_searched(jnp.ones((2, 3), jnp.int32))
