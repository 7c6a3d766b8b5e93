import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.prune import top_mask
from jaxcomp.prune.counting import counted_masks
from jaxcomp.prune.radix import radix_masks
from jaxcomp.prune.top import top_masks, zeros_of


SHAPES = [(2, 5), (), (0, 2), (10,)]
SIZE = 21  # entries of SHAPES together
# Few values, so that most of them tie; all are exact in bfloat16.
LEVELS = [-np.inf, -2.0, -1.0, -0.0, 0.0, 2.0**-40, 0.5, 1.0, 1.0078125, np.inf]
SCORES = st.lists(st.sampled_from(LEVELS), min_size=SIZE, max_size=SIZE)
COUNTS = st.integers(0, SIZE)
PERCENT = st.integers(0, 99)


def jitted(scores, zeros):
    """By histograms; few entries would be counted, see below."""
    scores = [jnp.asarray(score) for score in scores]
    if not any(score.size for score in scores):
        return jax.jit(top_masks)(scores, zeros)
    return radix_masks(scores, jnp.asarray(zeros, jnp.int32))


jitted_mask = jax.jit(top_mask)


def cut(flat):
    """The leaves of SHAPES, out of one list."""
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in SHAPES])[:-1]
    pieces = np.split(np.asarray(flat, np.float32), ends)
    return [jnp.asarray(p.reshape(s)) for p, s in zip(pieces, SHAPES, strict=True)]


def reference(flat, zeros):
    """The kept entries by a full sort: low first, and of equals the last first."""
    flat = np.asarray(flat, np.float64)
    order = np.lexsort((-np.arange(flat.size), flat))
    kept = np.ones(flat.size, bool)
    kept[order[:zeros]] = False
    return kept


def joined(masks):
    assert [mask.shape for mask in masks] == SHAPES
    assert all(mask.dtype == bool for mask in masks)
    return np.concatenate([np.ravel(mask) for mask in masks])


# zeros_of


@pytest.mark.parametrize(
    ("sparsity", "size", "zeros"),
    [
        (0.35, 90, 32),  # 31.5; in floats 31.499999999999996
        (0.25, 2, 0),  # 0.5 goes to the even 0
        (0.25, 6, 2),  # 1.5 goes to the even 2
        (0.9, 1, 1),
        (0.5, 1, 0),
        (0, 7, 0),
        (0.7, 0, 0),
        (np.float64(0.35), 90, 32),
    ],
)
def test_the_count_is_the_decimal_product_rounded_half_to_even(sparsity, size, zeros):
    assert zeros_of(sparsity, size) == zeros


@given(st.integers(0, 9999), st.integers(0, 2**31 - 1))
def test_the_count_of_a_decimal_is_that_of_its_fraction(digits, size):
    sparsity = float(f"0.{digits:04d}")
    assert zeros_of(sparsity, size) == round(Fraction(digits, 10**4) * size)


@given(st.integers(0, 2**24 - 1), st.integers(0, 2**31 - 1))
def test_the_count_of_a_jax_number_is_that_of_its_fraction(m, size):
    zeros = zeros_of(jnp.float32(m / 2**24), size)
    assert zeros.dtype == jnp.int32
    assert int(zeros) == round(Fraction(m, 2**24) * size)


@pytest.mark.parametrize("size", [90, 2**16, 2**16 + 1, 22_000_001, 2**31 - 1])
def test_the_count_of_a_traced_number_is_that_of_its_fraction(size):
    rng = np.random.default_rng(size)
    edges = [0, 1, 2**12, 2**23, 2**24 - 1, 2**23 - 1, 2**24 - 2**12]
    m = np.concatenate([edges, rng.integers(0, 2**24, 200)])
    counts = jax.jit(jax.vmap(lambda s: zeros_of(s, size)))(np.float32(m / 2**24))
    exact = [round(Fraction(int(n), 2**24) * size) for n in m]
    np.testing.assert_array_equal(counts, exact)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_the_count_of_a_narrow_jax_number_is_exact(strict, dtype):
    assert int(zeros_of(jnp.array(0.375, dtype), 12)) == 4  # 4.5


# top_masks


@given(SCORES, COUNTS)
def test_masks_are_those_of_a_full_sort(flat, zeros):
    masks = jitted(cut(flat), zeros)
    np.testing.assert_array_equal(joined(masks), reference(flat, zeros))


@given(SCORES, COUNTS)
def test_masks_outside_jit_are_those_of_a_full_sort(flat, zeros):
    masks = top_masks(cut(flat), zeros)
    np.testing.assert_array_equal(joined(masks), reference(flat, zeros))


@given(flat=SCORES, zeros=COUNTS)
def test_scores_of_several_narrow_dtypes_are_sorted_together(flat, zeros):
    dtypes = [ml_dtypes.bfloat16, np.float16, np.float32, np.float16]
    leaves = [s.astype(t) for s, t in zip(cut(flat), dtypes, strict=True)]
    rounded = np.concatenate([np.ravel(s).astype(np.float64) for s in leaves])
    np.testing.assert_array_equal(
        joined(jitted(leaves, zeros)), reference(rounded, zeros)
    )


@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=SIZE, max_size=SIZE),
    COUNTS,
)
def test_any_scores_lose_exactly_the_asked_count_and_none_above_a_kept_one(flat, zeros):
    kept = joined(jitted(cut(flat), zeros))
    assert np.sum(~kept) == zeros
    tiny = np.finfo(np.float32).tiny  # the processor may take subnormals for zeros
    values = np.where(np.abs(flat) < tiny, 0, np.asarray(flat, np.float32))
    assert np.max(values[~kept], initial=-np.inf) <= np.min(
        values[kept], initial=np.inf
    )


@given(
    st.lists(
        st.floats(-(2.0**-124), 2.0**-124, width=32), min_size=SIZE, max_size=SIZE
    ),
    COUNTS,
)
def test_masks_of_subnormal_scores_do_not_depend_on_jit(flat, zeros):
    np.testing.assert_array_equal(
        joined(jitted(cut(flat), zeros)), joined(top_masks(cut(flat), zeros))
    )


@pytest.mark.parametrize("run", [top_masks, jitted], ids=["eager", "jit"])
def test_minus_zero_ties_with_zero(run):
    [mask] = run([jnp.array([0.0, -0.0] * 5)], 4)
    assert mask.tolist() == [True] * 6 + [False] * 4


def test_neighbouring_floats_are_told_apart():
    rng = np.random.default_rng(0)
    one = np.float32(1).view(np.uint32)
    flat = (one + rng.permutation(SIZE).astype(np.uint32)).view(np.float32)
    for sign in (1, -1):
        masks = jitted(cut(sign * flat), 11)
        np.testing.assert_array_equal(joined(masks), reference(sign * flat, 11))


@pytest.mark.parametrize("zeros", [0, 1, 1023, 1024, 1025, 2047, 2048, 2999, 3000])
def test_ties_that_fill_several_blocks_go_by_position(zeros):
    a, b = jitted([jnp.zeros(1500), jnp.zeros((3, 500))], zeros)
    kept = np.concatenate([a, b.reshape(-1)])
    np.testing.assert_array_equal(kept, np.arange(3000) < 3000 - zeros)


@pytest.mark.parametrize("zeros", [1, 700, 1024, 2000])
def test_ties_among_other_scores_go_by_position(zeros):
    flat = np.random.default_rng(1).integers(0, 3, 3000).astype(np.float32)
    a, b = jitted([jnp.asarray(flat[:1500]), flat[1500:].reshape(3, 500)], zeros)
    kept = np.concatenate([a, b.reshape(-1)])
    np.testing.assert_array_equal(kept, reference(flat, zeros))


@given(SCORES, st.tuples(*[st.integers(0, max(np.prod(s), 0)) for s in SHAPES]))
def test_a_count_for_each_leaf_gives_the_masks_of_the_leaves_alone(flat, zeros):
    leaves = cut(flat)
    masks = jitted(leaves, jnp.array(zeros, jnp.int32))
    for leaf, mask, count in zip(leaves, masks, zeros, strict=True):
        np.testing.assert_array_equal(np.ravel(mask), reference(np.ravel(leaf), count))


@pytest.mark.parametrize("zeros", [(0, 1500), (1023, 1), (1024, 700), (1500, 0)])
def test_ties_of_leaves_of_several_rows_go_by_position_in_each(zeros):
    a, b = jitted([jnp.zeros(1500), jnp.zeros((3, 500))], jnp.array(zeros, jnp.int32))
    np.testing.assert_array_equal(a, np.arange(1500) < 1500 - zeros[0])
    np.testing.assert_array_equal(b.reshape(-1), np.arange(1500) < 1500 - zeros[1])


LONG = [(2, 140_000), (300_001,), (5,), (0, 3), (262_144,)]  # of several chunks


def long_leaves(flat):
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in LONG])
    pieces = np.split(flat[: ends[-1]], ends[:-1])
    leaves = [jnp.asarray(p.reshape(s)) for p, s in zip(pieces, LONG, strict=True)]
    return [*leaves[:4], leaves[4].astype(jnp.bfloat16)]


@pytest.mark.parametrize("levels", [3, 2**7])  # both are exact in bfloat16
def test_long_leaves_have_the_masks_of_a_full_sort(levels):
    rng = np.random.default_rng(levels)
    flat = rng.integers(-levels, levels, 842_150).astype(np.float32)
    leaves = long_leaves(flat)
    for zeros in (0, 1, 421_075, 842_149, 842_150):
        kept = np.concatenate([np.ravel(mask) for mask in jitted(leaves, zeros)])
        np.testing.assert_array_equal(kept, reference(flat, zeros))
    zeros = [0, 262_143, 3, 0, 250_000]
    masks = jitted(leaves, jnp.array(zeros, jnp.int32))
    for leaf, mask, count in zip(leaves, masks, zeros, strict=True):
        np.testing.assert_array_equal(np.ravel(mask), reference(np.ravel(leaf), count))


def test_a_long_leaf_is_searched_without_a_copy_of_it():
    leaf = jax.ShapeDtypeStruct((2**22 + 1,), jnp.float32)
    zeros = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(top_masks).lower([leaf], zeros).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**22


def test_the_search_is_compiled_once_for_all_leaves():
    def equations(leaves):
        scores = [jnp.zeros((2, 3))] * leaves
        jaxpr = jax.make_jaxpr(lambda s: radix_masks(s, jnp.int32(3)))(scores)
        return str(jaxpr).count(" = ")

    assert equations(11) < equations(1) + 10 * 35  # about 300 for a leaf of its own


def test_leaves_without_entries_have_masks_without_entries():
    for masks in (top_masks([jnp.zeros((0, 3))], 0), jitted([jnp.zeros((0, 3))], 0)):
        assert [mask.shape for mask in masks] == [(0, 3)]
    assert top_masks([], 0) == []


def test_masks_are_made_without_a_sort():
    ways = (radix_masks, counted_masks)
    leaves = cut(np.zeros(SIZE))
    jaxpr = "".join(str(jax.make_jaxpr(way)(leaves, jnp.int32(3))) for way in ways)
    primitives = set(re.findall(r"= ([a-z_0-9]+)[\[ ]", jaxpr))
    assert "cumsum" in primitives  # the names are read right
    assert not primitives & {"sort", "top_k", "approx_top_k", "argsort"}


# counted_masks, which `top_masks` takes on several devices: see test_sharded.py


@given(SCORES, COUNTS)
def test_masks_by_counts_are_those_of_a_full_sort(flat, zeros):
    masks = counted_masks(cut(flat), jnp.int32(zeros))
    np.testing.assert_array_equal(joined(masks), reference(flat, zeros))


@given(
    st.lists(st.floats(width=32), min_size=SIZE, max_size=SIZE),
    st.tuples(*[st.integers(0, np.prod(s, dtype=int)) for s in SHAPES]),
)
def test_masks_by_counts_are_those_by_histograms_bit_for_bit(flat, zeros):
    leaves = cut(flat)
    for asked in (jnp.int32(sum(zeros)), jnp.array(zeros, jnp.int32)):
        np.testing.assert_array_equal(
            joined(counted_masks(leaves, asked)), joined(radix_masks(leaves, asked))
        )


@pytest.mark.parametrize("zeros", [0, 1, 1023, 1500, 2048, 2999, 3000])
def test_ties_of_leaves_that_are_counted_go_by_position(zeros):
    a, b = counted_masks([jnp.zeros(1500), jnp.zeros((3, 500))], jnp.int32(zeros))
    kept = np.concatenate([a, b.reshape(-1)])
    np.testing.assert_array_equal(kept, np.arange(3000) < 3000 - zeros)


def test_counting_keeps_no_array_of_the_size_of_a_leaf_from_pass_to_pass():
    leaf = jax.ShapeDtypeStruct((2**11, 2**9), jnp.float32)
    compiled = counted_masks.lower([leaf], jax.ShapeDtypeStruct((), "int32")).compile()
    # XLA sums an array of numbers on a CPU, and not as it finds them.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * 2**22


# top_mask


def test_the_lowest_scores_go_and_of_equals_the_later_one(strict):
    scores = jnp.array([1.0, 3.0, 1.0, 2.0, -5.0, 1.0, 0.0, 9.0, 1.0, 4.0])
    mask = jitted_mask(scores, jnp.float32(0.5))
    assert np.flatnonzero(~mask).tolist() == [2, 4, 5, 6, 8]


@given(st.lists(st.sampled_from(LEVELS), min_size=10, max_size=10), PERCENT)
def test_top_mask_removes_the_count_of_its_sparsity(flat, percent):
    mask = top_mask(jnp.asarray(flat), percent / 100)
    zeros = round(Fraction(percent, 100) * 10)
    np.testing.assert_array_equal(mask, reference(flat, zeros))


def test_a_traced_sparsity_gives_the_same_mask_as_a_number(strict):
    scores = np.array([4, -1, 3, 3, 0, 3, 9, 3, 2, 3], np.float32)
    for sparsity in (0.0, 0.125, 0.25, 0.5, 0.75, 0.9375):
        zeros = round(Fraction(sparsity) * 10)
        mask = jitted_mask(scores, jnp.float32(sparsity))
        np.testing.assert_array_equal(mask, reference(scores, zeros))


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, True), (0.4, True), (0.6, False)])
@pytest.mark.parametrize("shape", [(), (1, 1)])
def test_one_entry_stays_or_goes_whole(shape, sparsity, kept):
    mask = jitted_mask(jnp.full(shape, 2.0), jnp.float32(sparsity))
    assert mask.shape == shape
    assert bool(mask.reshape(())) is kept


def test_no_entries_have_a_mask_without_entries():
    assert top_mask(jnp.zeros((2, 0)), 0.5).shape == (2, 0)


def test_infinite_scores_are_the_last_to_go_and_minus_infinite_the_first():
    scores = jnp.array([np.inf, 0, -np.inf, np.inf, 3e38, -3e38, 1, 2, -1, -2])
    mask = top_mask(scores, 0.7)
    assert np.flatnonzero(mask).tolist() == [0, 3, 4]
    mask = top_mask(scores, 0.1)
    assert np.flatnonzero(~mask).tolist() == [2]


def test_masks_batch_like_one_by_one():
    scores = np.random.default_rng(2).integers(0, 4, (3, 10)).astype(np.float32)
    mapped = jax.jit(jax.vmap(lambda s: top_mask(s, 0.5)))(scores)
    for row, mask in zip(scores, mapped, strict=True):
        np.testing.assert_array_equal(mask, reference(row, 5))


def test_top_mask_lowers_for_cpu_cuda_and_tpu():
    platforms = ("cpu", "cuda", "tpu")
    export = jax.export.export(jax.jit(top_mask), platforms=platforms)
    assert export(jnp.zeros((3, 5)), jnp.float32(0.5)).platforms == platforms


@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, 90, np.float32(2), np.inf])
def test_a_sparsity_out_of_range_is_an_error(sparsity):
    text = f"top_mask needs 0 <= sparsity < 1, the fraction of zeros, got {sparsity}."
    with pytest.raises(ValueError, match=re.escape(text)):
        top_mask(jnp.zeros(3), sparsity)


@pytest.mark.parametrize("sparsity", [np.nan, np.float32(np.nan)])
def test_a_sparsity_that_is_no_number_is_an_error(sparsity):
    with pytest.raises(ValueError, match="top_mask needs a number for sparsity, got"):
        top_mask(jnp.zeros(3), sparsity)


@pytest.mark.parametrize("sparsity", [1.5, -0.5, 1.0])
def test_a_sparsity_held_by_jax_is_checked_like_a_number(sparsity):
    with pytest.raises(ValueError, match="top_mask needs 0 <= sparsity < 1"):
        top_mask(jnp.ones(4), jnp.float32(sparsity))


def test_a_narrow_numpy_sparsity_is_the_decimal_that_it_prints_as():
    assert zeros_of(np.float32(0.35), 90) == 32
