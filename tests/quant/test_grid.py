import dataclasses
import math
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

import jaxcomp as jc
from jaxcomp import QTensor, quantize, quantize_affine, quantize_step, quantize_tree


SHAPE = (2, 3, 5)
TINY = float(np.finfo(np.float32).tiny)
NARROW = [ml_dtypes.bfloat16, np.float16]
GRIDS = [quantize, quantize_affine]
# (bits, axis, group): shared and kept axes, groups that are ragged or beyond the row.
CASES = [
    (8, -1, 100),
    (4, None, None),
    (3, (-1, 0), 2),
    (2, 0, 4),
    (5, (0, 1, 2), None),
]
WIDE = st.floats(-(2.0**99), 2.0**99, width=32)  # to 6e29, and subnormals
SMALL = st.sampled_from([0.0, -0.0, TINY, -TINY, 1e-44, -1e-40, 1e-37, -3e-38])
WIDE_ARRAYS = hnp.arrays(np.float32, SHAPE, elements=WIDE | SMALL)
SEEDS = st.integers(0, 2**32 - 1)


def bits_of(x):
    x = np.asarray(x)
    return x.view(f"uint{8 * x.itemsize}")


def normal(shape=SHAPE, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@cache
def groups_of(shape, axis, group):
    """Flat indices of the entries that share a scale, one array for each scale."""
    ndim = len(shape)
    axes = () if axis is None else (axis,) if isinstance(axis, int) else axis
    kept = sorted(a % ndim for a in axes)
    index = np.arange(math.prod(shape)).reshape(shape)
    found = []
    for place in np.ndindex(*(shape[a] for a in kept)):
        at = dict(zip(kept, place, strict=True))
        row = index[tuple(at.get(a, slice(None)) for a in range(ndim))].reshape(-1)
        step = group or row.size
        found += [row[i : i + step] for i in range(0, row.size, step)]
    return found


def spread(scale, shape, axis, group):
    """The scale of every entry, as float64[*shape]."""
    full = np.zeros(math.prod(shape))
    flat = np.asarray(scale, np.float64).reshape(-1)
    for one, where in zip(flat, groups_of(shape, axis, group), strict=True):
        full[where] = one
    return full.reshape(shape)


def is_near_tie(steps):
    """Where a quotient may round either way: XLA multiplies by the reciprocal."""
    return np.abs(np.abs(steps - np.floor(steps)) - 0.5) < 1e-4


def symmetric_reference(x, scales, bits, axis, group):
    """The steps, before they are rounded, and the scales, both in float64."""
    steps, exact = np.zeros(x.size), []
    top = 2 ** (bits - 1) - 1
    for scale, where in zip(scales, groups_of(x.shape, axis, group), strict=True):
        values = x.reshape(-1)[where].astype(np.float64)
        exact.append(max(np.abs(values).max() / top, 2 * TINY))
        steps[where] = np.clip(values / scale, -top, top)
    return steps.reshape(x.shape), np.array(exact)


def affine_reference(x, bits, axis, group):
    """In float64, from the definition."""
    dense, scales, zeros = np.zeros(x.size), [], []
    levels = 2**bits - 1
    for where in groups_of(x.shape, axis, group):
        values = x.reshape(-1)[where].astype(np.float64)
        low, high = min(values.min(), 0), max(values.max(), 0)
        scale = (high - low) / levels
        zero = np.rint(-low / scale)
        codes = np.clip(np.rint(values / scale) + zero, 0, levels)
        dense[where] = (codes - zero) * scale
        scales.append(scale)
        zeros.append(zero)
    return dense.reshape(x.shape), np.array(scales), np.array(zeros)


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def jitted(grid, x, bits, axis, group):
    q = grid(x, bits, axis=axis, group=group)
    return q, q.dense()


encode = jax.jit(QTensor.encode)


# symmetric


def test_quantize_divides_the_largest_magnitude_into_even_steps(strict):
    q = quantize(jnp.array([[0.0, 0.5, -1.5, 3.0, 1.49]]), bits=3, axis=None)
    np.testing.assert_array_equal(q.scale, [[1.0]])  # 3 / (2**2 - 1)
    # 0.5 and -1.5 go to the even step.
    np.testing.assert_array_equal(q.dense(), [[0.0, 0.0, -2.0, 3.0, 1.0]])
    assert q.zero is None


def test_codes_of_two_groups_lie_in_order_with_zeros_behind_the_ragged_one():
    q = quantize(jnp.array([3.0, -3.0, 1.0]), bits=3, axis=None, group=2)
    np.testing.assert_allclose(q.scale, [[1.0, 1 / 3]])
    # Steps 3, -3 | 3, padding 0; the code of 0 is 3.
    assert q.codes.tolist() == [0b10_000_110 | (0b110 << 6) & 0xFF, 0b0000_011_1]


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=25)
@given(x=WIDE_ARRAYS)
def test_quantize_equals_plain_numpy(case, x):
    q, dense = jitted(quantize, x, *case)
    steps, exact = symmetric_reference(x, np.ravel(q.scale), *case)
    np.testing.assert_allclose(np.ravel(q.scale), exact, rtol=2e-7)
    expected = np.rint(steps).astype(np.float32) * spread(q.scale, SHAPE, *case[1:])
    sure = ~is_near_tie(steps)
    np.testing.assert_array_equal(dense[sure], expected.astype(np.float32)[sure])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=25)
@given(x=WIDE_ARRAYS)
def test_dense_is_within_half_a_step_and_keeps_zeros(grid, case, x):
    q, dense = jitted(grid, x, *case)
    scale = spread(q.scale, SHAPE, *case[1:])
    error = np.abs(np.asarray(dense, np.float64) - x)
    # 1e-4 of a step for the float32 roundings of up to 255 steps.
    assert np.all(error <= scale * 0.5001)
    assert np.all(bits_of(dense)[x == 0] == 0)


@pytest.mark.parametrize("case", CASES, ids=str)
@given(x=hnp.arrays(np.float32, SHAPE, elements=st.floats(-1e6, 1e6, width=32)))
def test_quantizing_again_changes_nothing(case, x):
    _, dense = jitted(quantize, x, *case)
    _, again = jitted(quantize, dense, *case)
    np.testing.assert_allclose(again, dense, rtol=1e-6)


# affine


def test_quantize_affine_spans_the_extremes_and_zero():
    q = quantize_affine(jnp.array([[-1.0, 0.0, 0.9, 2.0]]), bits=2, axis=None)
    np.testing.assert_array_equal(q.scale, [[1.0]])  # (2 - -1) / (2**2 - 1)
    assert q.zero.tolist() == [1]
    np.testing.assert_array_equal(q.dense(), [[-1.0, 0.0, 1.0, 2.0]])


@pytest.mark.parametrize(
    ("x", "zero"), [([5.0, 6.0, 15.0], 0), ([-5.0, -6.0, -15.0], 15), ([0.0], 0)]
)
def test_the_zero_point_of_one_sided_values_is_an_end_of_the_range(x, zero):
    q = quantize_affine(jnp.array(x), bits=4, axis=None)
    assert q.zero.tolist() == [zero]
    np.testing.assert_allclose(q.dense(), x, rtol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantize_affine_equals_plain_numpy(case):
    for seed in range(3):
        x = normal(seed=seed) + np.float32(seed)
        q, dense = jitted(quantize_affine, x, *case)
        expected, scales, zeros = affine_reference(x, *case)
        np.testing.assert_allclose(np.ravel(q.scale), scales, rtol=1e-6)
        np.testing.assert_array_equal(np.ravel(q._zero()), zeros)
        np.testing.assert_allclose(dense, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("x", [[-1e-37, 0.0, 1e-38], [-2e-38, 3e-38, -1e-36], [1e-37]])
def test_a_grid_near_the_least_numbers_is_within_half_a_step(grid, x):
    x = np.array(x, np.float32)
    q = grid(jnp.asarray(x), 8, axis=None)
    error = np.abs(np.asarray(q.dense(), np.float64) - x)
    assert np.all(error <= 0.5001 * float(q.scale[0, 0]))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [np.float32, *NARROW])
def test_the_largest_numbers_of_a_dtype_are_within_half_a_step(grid, dtype):
    most = np.array(ml_dtypes.finfo(dtype).max, dtype)
    for x in ([most, -most], [most, 0 * most], [-most, most / 2]):
        for bits in (3, 8):
            q = grid(jnp.asarray(np.array(x, dtype)), bits, axis=None)
            dense = np.asarray(q.dense(), np.float64)
            error = np.abs(dense - np.array(x, np.float64))
            eps = 255 * float(ml_dtypes.finfo(dtype).eps)
            scale = float(q.scale[0, 0])
            assert np.all(error <= scale * (0.5001 + eps)), (x, bits, dense)


# steps


def test_quantize_step_rounds_to_multiples_of_the_step_with_the_fewest_bits(strict):
    q = quantize_step(jnp.array([0.26, -0.6, 1.0, 0.25, 0.75]), step=0.5)
    # 0.25 and 0.75 lie between two multiples and go to the even one.
    np.testing.assert_array_equal(q.dense(), [0.5, -0.5, 1.0, 0.0, 1.0])
    assert q.bits == 3  # steps -3 to 3
    assert (q.scale.tolist(), q.zero, q.axis) == ([[0.5]], None, ())


@given(
    hnp.arrays(np.float32, SHAPE, elements=st.floats(-10, 10, width=32)),
    st.sampled_from([1 / 3, 7.0]),
)
def test_quantize_step_equals_plain_numpy_in_the_fewest_bits(x, step):
    q = quantize_step(jnp.asarray(x), step)
    level = np.float32(step)
    exact = x.astype(np.float64) / level
    steps = np.rint(np.asarray(q.dense(), np.float64) / level)
    np.testing.assert_array_equal(q.dense(), steps.astype(np.float32) * level)
    sure = ~is_near_tie(exact)
    np.testing.assert_array_equal(steps[sure], np.rint(exact)[sure])
    most = np.abs(steps).max()
    assert most <= 2 ** (q.bits - 1) - 1
    assert q.bits == 2 or most > 2 ** (q.bits - 2) - 1


@pytest.mark.parametrize(("most", "bits"), [(0, 2), (1, 2), (2, 3), (3, 3), (4, 4)])
def test_the_fewest_bits_hold_the_steps_of_both_signs(most, bits):
    for sign in (1, -1):
        q = quantize_step(jnp.array([0.0, sign * float(most)]), 1.0)
        assert q.bits == bits
        assert q.dense().tolist() == [0, sign * most]


def test_steps_fit_sixteen_bits_to_the_last():
    x = jnp.array([32767.0, -32767.0, 1.0])
    q = quantize_step(x, 1.0)
    assert q.bits == 16
    np.testing.assert_array_equal(q.dense(), x)


def test_more_bits_than_needed_change_nothing_but_the_width():
    x = jnp.array([0.26, -0.6, 1.0])
    q = quantize_step(x, 0.5, bits=12)
    assert q.bits == 12
    np.testing.assert_array_equal(q.dense(), quantize_step(x, 0.5).dense())


def test_under_jit_steps_that_do_not_fit_saturate():
    dense = jax.jit(lambda x: quantize_step(x, 0.5, bits=3).dense())
    assert dense(jnp.array([9.0, -9.0, 0.6])).tolist() == [1.5, -1.5, 0.5]


def test_a_value_whose_narrow_quotient_would_round_up_still_fits():
    x = jnp.array([95.5], jnp.bfloat16)  # 127.33 steps; 127.5 in bfloat16
    assert quantize_step(x, 0.75).bits == 8
    np.testing.assert_array_equal(
        quantize_step(x, 0.75, bits=8).dense(), jnp.array([95.25], jnp.bfloat16)
    )


# shapes at the edge


@pytest.mark.parametrize("grid", [*GRIDS, partial(quantize_step, step=0.5)])
@pytest.mark.parametrize("shape", [(), (1, 1, 1)])
def test_one_entry_comes_back(grid, shape):
    for value in (2.5, -2.5, 0.0):
        q = grid(jnp.full(shape, value))
        assert q.shape == shape
        np.testing.assert_allclose(q.dense(), np.full(shape, value), rtol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3)])
@pytest.mark.parametrize(
    "grid",
    [
        quantize,
        partial(quantize, axis=None),
        partial(quantize_affine, axis=0, group=2),
        partial(quantize_step, step=0.5, bits=4),
    ],
    ids=["last", "none", "affine first", "step"],
)
def test_no_entries_come_back(grid, shape):
    def there_and_back(x):
        q = grid(x)
        return q.encode(q.dense()).dense()

    assert jax.eval_shape(there_and_back, jnp.zeros(shape)).shape == shape


def test_no_entries_come_back_from_steps_of_the_fewest_bits():
    q = quantize_step(jnp.zeros((2, 0)), 0.5)
    assert q.bits == 2
    assert q.dense().shape == (2, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("grid", GRIDS)
def test_an_array_of_zeros_comes_back_as_zeros_on_a_finite_grid(grid, dtype):
    q, dense = jitted(grid, jnp.zeros(SHAPE, dtype), *CASES[2])
    scale = np.asarray(q.scale)
    assert np.all(scale > 0) and np.isfinite(scale).all()
    np.testing.assert_array_equal(bits_of(dense), np.zeros(SHAPE))
    assert dense.dtype == dtype


def test_a_group_beyond_the_row_is_the_row():
    x = jnp.asarray(normal())
    whole, beyond = quantize(x, 4), quantize(x, 4, group=10**6)
    assert whole.group == beyond.group == 6
    np.testing.assert_array_equal(whole.codes, beyond.codes)


def test_kept_axes_are_stored_positive_and_in_order():
    x = jnp.asarray(normal())
    q = quantize(x, 4, axis=(-1, 0))
    assert q.axis == (0, 2)
    assert q.scale.shape == (10, 1)
    np.testing.assert_array_equal(q.codes, quantize(x, 4, axis=(0, 2)).codes)


# narrow floats


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("grid", GRIDS)
@given(seed=SEEDS)
def test_a_narrow_dtype_is_within_half_a_step_and_its_own_rounding(grid, dtype, seed):
    x = normal(dtype=dtype, seed=seed) * np.array(3, dtype)
    q, dense = jitted(grid, jnp.asarray(x), 8, -1, None)
    assert dense.dtype == q.dtype == q.scale.dtype == dtype
    scale = spread(q.scale, SHAPE, -1, None)
    # The scale and the product are rounded once each, by eps/2 of up to 255 steps.
    tolerance = scale * (0.5 + 255 * float(ml_dtypes.finfo(dtype).eps))
    error = np.abs(np.asarray(dense, np.float64) - x.astype(np.float64))
    assert np.all(error <= tolerance)


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_steps_are_multiples_rounded_once(dtype):
    x = normal(dtype=dtype)
    dense = quantize_step(jnp.asarray(x), 0.25).dense()
    assert dense.dtype == dtype  # 2**-2, so that only the product is rounded
    steps = np.rint(x.astype(np.float64) / 0.25)
    np.testing.assert_array_equal(dense, (steps * 0.25).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, *NARROW])
@pytest.mark.parametrize("grid", [*GRIDS, partial(quantize_step, step=0.25, bits=8)])
def test_a_grid_needs_no_dtype_promotion(strict, grid, dtype):
    def there_and_back(x):
        q = grid(x)
        return q.encode(x + q.dense()).dense()

    back = jax.eval_shape(there_and_back, jax.ShapeDtypeStruct(SHAPE, dtype))
    assert (back.shape, back.dtype) == (SHAPE, dtype)


@pytest.mark.parametrize("grid", [*GRIDS, partial(quantize_step, step=0.25)])
def test_a_float64_of_numpy_is_taken_as_jax_takes_it(grid):
    x = normal()
    q = grid(x.astype(np.float64))
    assert q.dtype == jnp.float32
    np.testing.assert_array_equal(q.dense(), grid(jnp.asarray(x)).dense())


# encode


@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        (partial(quantize, bits=4, axis=(0, 2), group=2), np.float32),
        (partial(quantize_affine, bits=8), np.float32),
        (partial(quantize_affine, bits=8), ml_dtypes.bfloat16),
        (partial(quantize_step, step=0.1), np.float16),
    ],
)
def test_pruned_entries_are_zero_and_the_survivors_keep_their_bits(grid, dtype):
    q = grid(jnp.asarray(normal(dtype=dtype)))
    mask = np.random.default_rng(1).random(SHAPE) < 0.5
    dense = np.asarray(q.dense())
    pruned = encode(q, np.where(mask, dense, np.zeros((), dtype)))
    np.testing.assert_array_equal(
        bits_of(pruned.dense()), np.where(mask, bits_of(dense), 0)
    )
    assert pruned.describe() == q.describe()
    np.testing.assert_array_equal(bits_of(pruned.scale), bits_of(q.scale))


def test_entries_that_equal_dense_keep_codes_that_the_dtype_cannot_tell_apart():
    x = jnp.asarray(normal(dtype=ml_dtypes.bfloat16) + 2)
    q = quantize_step(x, 2**-12)  # thousands of steps, rounded to 8 significant bits
    q = dataclasses.replace(q, codes=q.codes ^ 1)  # the next step or the one before
    np.testing.assert_array_equal(q.encode(q.dense()).codes, q.codes)


@pytest.mark.parametrize("case", CASES[1:3], ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_new_values_go_to_the_nearest_level_of_the_same_grid(grid, case):
    bits, axis, group = case
    q, dense = jitted(grid, normal(), *case)
    scale = spread(q.scale, SHAPE, axis, group)
    symmetric = q.zero is None
    half = 2 ** (bits - 1) - 1
    zero = half if symmetric else spread(q._zero(), SHAPE, axis, group)
    low, high = -zero * scale, ((2 * half if symmetric else 2**bits - 1) - zero) * scale
    x = normal(seed=1) * 2
    encoded = np.asarray(encode(q, x).dense(), np.float64)
    assert np.all(np.abs(encoded - np.clip(x, low, high)) <= scale * 0.5001)


# size


@pytest.mark.parametrize("dtype", [np.float32, *NARROW])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_nbits_are_those_of_the_arrays_that_a_node_holds(grid, case, dtype):
    bits, axis, group = case
    run = partial(grid, bits=bits, axis=axis, group=group)
    q = jax.eval_shape(run, jax.ShapeDtypeStruct(SHAPE, dtype))
    arrays = jax.tree.leaves(q)
    assert len(arrays) == 2 + (grid is quantize_affine)
    assert q.nbits() == sum(8 * a.size * a.dtype.itemsize for a in arrays)


def test_nbits_count_codes_scales_zero_points_and_padding():
    def nbits(grid, dtype, **case):
        x = jax.ShapeDtypeStruct((6, 2), dtype)
        return jax.eval_shape(partial(grid, **case), x).nbits()

    # Two channels of 6 entries in groups of 4: 16 codes with the padding, 4 scales.
    assert nbits(quantize, np.float32, bits=3, group=4) == 16 * 3 + 4 * 32
    # 4 zero points of 3 bits take 2 bytes.
    affine = nbits(quantize_affine, np.float32, bits=3, group=4)
    assert affine == 16 * 3 + 4 * 32 + 16
    assert nbits(quantize, ml_dtypes.bfloat16, bits=8, axis=None) == 12 * 8 + 16


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        (partial(quantize, bits=4, axis=None), "4 bits symmetric, one scale"),
        (partial(quantize, bits=8), "8 bits symmetric, axis 2"),
        (
            partial(quantize_affine, bits=3, axis=(0, 2), group=2),
            "3 bits affine, axis 0,2, group 2",
        ),
        (partial(quantize_step, step=0.5, bits=5), "5 bits symmetric, one scale"),
    ],
)
def test_a_node_says_how_it_was_made(grid, text):
    assert jax.eval_shape(grid, jnp.zeros(SHAPE)).describe() == text


# under jit


@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        (partial(quantize, bits=8), np.float32),
        (partial(quantize, bits=3, axis=(0, 2), group=2), ml_dtypes.bfloat16),
        (partial(quantize_affine, bits=8), ml_dtypes.bfloat16),
        (partial(quantize_affine, bits=3, axis=None, group=4), np.float32),
        # Odd numbers are ties.
        (partial(quantize_step, step=2 / 3, bits=16), np.float32),
    ],
    ids=["8", "3 group", "affine 8", "affine 3 group", "step"],
)
def test_jit_gives_the_same_bits(grid, dtype):
    run = jax.jit(grid)
    for seed in range(4):  # whole numbers are the hardest to divide alike
        x = normal(seed=seed) * (1 if seed % 2 else 100)
        x = jnp.asarray((x if seed % 2 else np.rint(x)).astype(dtype))
        eager, traced = grid(x), run(x)
        assert jax.tree.structure(eager) == jax.tree.structure(traced)
        pairs = zip(jax.tree.leaves(eager), jax.tree.leaves(traced), strict=True)
        for ours, theirs in pairs:
            np.testing.assert_array_equal(bits_of(ours), bits_of(theirs))
        dense = jax.jit(QTensor.dense)(eager)
        np.testing.assert_array_equal(bits_of(dense), bits_of(eager.dense()))


def test_encode_under_jit_gives_the_same_codes():
    q = quantize_affine(jnp.asarray(normal()), 8)
    for seed in range(4):
        x = jnp.asarray(normal(seed=seed) * 2)
        np.testing.assert_array_equal(encode(q, x).codes, q.encode(x).codes)


def test_the_gradient_of_a_scale_is_the_sum_of_its_steps():
    q = quantize(jnp.array([[3.0, 1.0], [-2.0, 1.0]]), bits=3)  # a scale per column

    def loss(q):
        return q.dense().sum()

    grad = jax.grad(loss, allow_int=True)(q)
    np.testing.assert_allclose(grad.scale, [[3 - 2], [3 + 3]], rtol=1e-6)


def test_grids_lower_for_cpu_cuda_and_tpu():
    platforms = ("cpu", "cuda", "tpu")

    def there_and_back(x):
        q = quantize_affine(x, bits=3, group=4)
        return q.encode(x).dense()

    export = jax.export.export(jax.jit(there_and_back), platforms=platforms)
    assert export(jnp.zeros(SHAPE)).platforms == platforms


# quantize_tree


def test_quantize_tree_turns_the_selected_leaves_into_nodes_of_the_settings():
    w = jnp.asarray(normal())
    tree = {"w": w, "bias": jnp.ones(3), "step": 3}
    small = quantize_tree(tree, bits=4, axis=0, group=8)
    node = small["w"]
    assert (node.bits, node.axis, node.group) == (4, (0,), 8)
    np.testing.assert_array_equal(node.dense(), quantize(w, 4, axis=0, group=8).dense())
    assert small["bias"] is tree["bias"]
    assert small["step"] == 3


def test_quantize_tree_takes_any_grid():
    tree = {"w": jnp.asarray(normal())}
    assert quantize_tree(tree, quantize_affine, bits=4)["w"].zero is not None
    assert quantize_tree(tree, quantize_step, step=0.5)["w"].scale.tolist() == [[0.5]]
    assert quantize_tree(tree, lambda x: jc.palettize(x, 2))["w"].bits == 1


def test_quantize_tree_names_the_leaf_of_a_bad_value():
    tree = {"a": jnp.ones((2, 3)), "b": [jnp.full((2, 3), -jnp.inf)]}
    text = (
        r"quantize_tree needs finite values, but leaf 'b/0' float32\[2, 3\] holds -inf"
    )
    with pytest.raises(ValueError, match=text):
        quantize_tree(tree)


def test_quantize_tree_names_the_leaf_of_a_bad_setting():
    tree = {"a": {"w": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match=r"quantize needs 2 <= bits .* \(leaf 'a/w'\)"):
        quantize_tree(tree, bits=9)
    with pytest.raises(TypeError, match=r"got int32\[2\]\. .* \(leaf 'n'\)"):
        quantize_tree({"n": jnp.arange(2)}, where=lambda path, leaf: True)


# errors


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [-1, 0, 9, 16])
def test_bits_out_of_range_are_an_error(grid, bits):
    text = rf"{grid.__name__} needs [12] <= bits <= 8, got {bits}\."
    with pytest.raises(ValueError, match=text):
        grid(jnp.ones((2, 3)), bits)


def test_one_bit_is_two_levels_of_the_affine_grid_and_an_error_of_the_symmetric():
    x = jnp.array([0.0, 0.4, 3.0, 1.6])
    np.testing.assert_array_equal(
        quantize_affine(x, 1, axis=None).dense(), [0.0, 0.0, 3.0, 3.0]
    )
    with pytest.raises(ValueError, match="got 1, which leaves no level but 0. Call qu"):
        quantize(x, 1)


@pytest.mark.parametrize("bits", [4.0, True, None, "4"])
def test_bits_that_are_no_integer_are_an_error(bits):
    with pytest.raises(
        TypeError, match=f"quantize needs an integer bits, got {bits!r}"
    ):
        quantize(jnp.ones((2, 3)), bits)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("group", [0, -4])
def test_a_group_of_nothing_is_an_error(grid, group):
    text = rf"{grid.__name__} needs 1 <= group <= \d+, got {group}\."
    with pytest.raises(ValueError, match=text):
        grid(jnp.ones((2, 3)), group=group)


def test_a_group_that_is_no_integer_is_an_error():
    with pytest.raises(TypeError, match=r"quantize needs an integer group, got 2\.5"):
        quantize(jnp.ones((2, 3)), group=2.5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("axis", [2, -3, (0, 5), (0, 0), (1, -1)])
def test_axes_that_the_array_does_not_have_once_are_an_error(grid, axis):
    text = (
        f"{grid.__name__} needs axes of an array of 2 dimensions, each once, got "
        f"axis={axis}."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        grid(jnp.ones((2, 3)), axis=axis)


@pytest.mark.parametrize("grid", [*GRIDS, partial(quantize_step, step=0.5)])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64])
def test_an_array_that_is_not_floating_is_an_error(grid, dtype):
    name = getattr(grid, "func", grid).__name__
    text = (
        f"{name} needs a floating array, got {jnp.dtype(dtype)}[2, 3]. Cast it, or "
        "leave this leaf out with `where`."
    )
    with pytest.raises(TypeError, match=re.escape(text)):
        grid(jnp.ones((2, 3), dtype))


@pytest.mark.parametrize("step", [0, 0.0, -0.5, np.nan, np.inf])
def test_a_step_that_is_not_positive_and_finite_is_an_error(step):
    text = f"quantize_step needs a positive finite step, got {step}."
    with pytest.raises(ValueError, match=re.escape(text)):
        quantize_step(jnp.ones(3), step)


@pytest.mark.parametrize(
    ("dtype", "step"), [(np.float32, 1e-50), (np.float32, 1e39), (np.float16, 1e6)]
)
def test_a_step_that_the_dtype_cannot_hold_is_an_error(dtype, step):
    with pytest.raises(ValueError, match="quantize_step needs .* step"):
        quantize_step(jnp.ones(3, dtype), step)


@pytest.mark.parametrize("bits", [1, 17])
def test_bits_of_a_step_out_of_range_are_an_error(bits):
    text = rf"quantize_step needs 2 <= bits <= 16, got {bits}\."
    with pytest.raises(ValueError, match=text):
        quantize_step(jnp.ones(3), 0.5, bits=bits)


@pytest.mark.parametrize(
    ("bits", "needs", "most"),
    [(None, 17, "3.277e+04"), (3, 5, "8"), (16, 17, "3.277e+04")],
)
def test_steps_that_do_not_fit_are_an_error(bits, needs, most):
    x = jnp.array([1.0, -float(most) if bits == 3 else -32768.0])
    text = (
        f"quantize_step needs {needs} bits for values up to {most} at step=1.0, got at "
        f"most {bits or 16}. Take a larger step."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        quantize_step(x, 1.0, bits=bits)


@pytest.mark.parametrize(
    "x",
    [
        *(np.float32([np.inf]), np.float32([np.nan]), np.float16([60000])),
        np.where(np.arange(999) == 7, np.nan, np.float32(0.01)),  # a maximum loses it
    ],
)
def test_values_that_no_width_holds_are_an_error(x):
    with pytest.raises(ValueError, match="quantize_step needs"):
        quantize_step(jnp.asarray(x), 0.01)


def test_a_step_without_bits_under_jit_is_an_error():
    text = (
        "quantize_step needs `bits` under jit, where it cannot see the values of "
        "float32[3]. Pass bits, or call it outside jit."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        jax.jit(lambda x: quantize_step(x, 0.5).dense())(jnp.ones(3))


def test_axes_may_be_integers_of_numpy():
    x = jnp.arange(6.0).reshape(2, 3)
    one, two = quantize(x, axis=0), quantize(x, axis=np.int64(0))
    np.testing.assert_array_equal(one.codes, two.codes)
    assert two.axis == (0,)
