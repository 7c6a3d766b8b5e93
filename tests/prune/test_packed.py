import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.prune import nm_mask
from jaxcomp.prune.packed import BitmaskTensor, NMTensor, pack_nm, pack_nonzero


SHAPE = (5, 6)
SIZE = 30
# Many are 0; the subnormal one is what a processor may take for 0.
LEVELS = st.sampled_from([0.0, 0.0, -0.0, 1.0, -2.5, 1e-41, -3e37, 65504.0])
VALUES = st.lists(LEVELS, min_size=SIZE, max_size=SIZE)
# As many nonzeros each time: another count is another shape, and compiles again.
SHUFFLED = st.permutations([0.0, -0.0, 1.0, -2.5, 1e-41, -3e37] * 5)
BFLOAT = ml_dtypes.bfloat16


jitted_pack = jax.jit(lambda x: pack_nm(x, 2, 4))


def raw(x):
    """The bits of an array, of which -0.0 is 0.0."""
    x = np.asarray(x)
    return (np.where(x == 0, 0, x).astype(x.dtype).tobytes(), x.dtype, x.shape)


def array(values, dtype=np.float32, shape=SHAPE):
    with np.errstate(over="ignore"):
        return jnp.asarray(np.asarray(values, np.float32).astype(dtype).reshape(shape))


def thinned(x, n, m, along):
    """NumPy: the first n nonzeros of each group of a lane of these axes in C order."""
    x = np.array(x)
    order = [a for a in range(x.ndim) if a not in along] + list(along)
    lanes = x.transpose(order).reshape(-1, int(np.prod([x.shape[a] for a in along])))
    for lane in lanes:
        for start in range(0, lane.size, m):
            group = lane[start : start + m]
            group[np.flatnonzero(group)[n:]] = 0
    shape = [x.shape[a] for a in order]
    return lanes.reshape(shape).transpose(np.argsort(order))


# pack_nonzero


def test_a_bitmask_holds_a_bit_of_each_weight_and_the_nonzeros_in_order():
    small = pack_nonzero(array([0, 7, 0, 0, 0, 0, 0, 0, -8.5, 9], shape=(2, 5)))
    assert small.mask.tolist() == [0b10, 0b11]
    assert small.values.tolist() == [7, -8.5, 9]
    assert (small.shape, small.dtype, small.nbits()) == ((2, 5), np.float32, 112)
    assert small.describe() == "bitmask, 3 of 10 stored"


@given(SHUFFLED, st.sampled_from([np.float32, np.float16, BFLOAT]))
def test_a_bitmask_gives_every_bit_back(values, dtype):
    x = array(values, dtype)
    small = pack_nonzero(x)
    assert raw(small.dense()) == raw(x)
    flat = np.asarray(x).reshape(-1)
    packed = np.packbits(flat != 0, bitorder="little")
    np.testing.assert_array_equal(small.mask, packed)
    np.testing.assert_array_equal(small.values, flat[flat != 0])


def test_a_long_bitmask_gives_every_bit_back():
    rng = np.random.default_rng(0)
    x = np.where(rng.random(100_003) < 0.1, rng.normal(size=100_003), 0)
    x = jnp.asarray(x, jnp.float32)
    assert raw(pack_nonzero(x).dense()) == raw(x)


@given(SHUFFLED, VALUES)
def test_a_bitmask_takes_new_values_where_it_has_room_and_prunes_the_rest(old, new):
    small, x = pack_nonzero(array(old)), array(new)
    again = jax.jit(BitmaskTensor.encode)(small, x)
    kept = np.where(np.asarray(small.dense()) != 0, x, 0)
    assert raw(again.dense()) == raw(kept)
    assert again.describe() == small.describe()


def test_the_count_of_nonzeros_is_not_known_under_jit():
    text = (
        "pack_nonzero needs the values of float32[5, 6], which are not known under jit"
        ": their number of nonzeros is a shape. Call it outside jit."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        jax.jit(pack_nonzero)(jnp.zeros(SHAPE))


@pytest.mark.parametrize("shape", [(), (0, 3), (1, 1)])
@pytest.mark.parametrize("value", [0.0, 2.0])
@pytest.mark.parametrize("pack", [pack_nonzero, lambda x: pack_nm(x, 1, 4, along=())])
def test_the_smallest_arrays_come_back(shape, value, pack):
    x = jnp.full(shape, value)
    small = pack(x)
    assert raw(small.dense()) == raw(x)
    assert raw(small.encode(x).dense()) == raw(x)


# pack_nm


def test_the_code_of_a_group_is_the_rank_of_its_places():
    places = list(itertools.combinations(range(4), 2))
    x = np.zeros((6, 4), np.float32)
    for row, (i, j) in enumerate(places):
        x[row, [i, j]] = row + 1, -row - 1
    small = pack_nm(jnp.asarray(x), 2, 4, along=-1)
    assert jc.bits.unpack(small.codes, 3, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert small.values.tolist() == [[[r, -r]] for r in range(1, 7)]
    assert (small.bits, small.along, small.n, small.m) == (3, (1,), 2, 4)
    assert small.nbits() == 6 * 2 * 32 + 24
    assert small.describe() == "2:4 along 1"


@pytest.mark.parametrize(
    ("n", "m", "along", "dtype"),
    [
        (2, 4, (0,), np.float32),
        (1, 4, (1,), BFLOAT),
        (4, 4, (0, 1), np.float16),
        (3, 8, (0, 1), np.float32),
    ],
)
@given(values=VALUES)
def test_groups_that_fit_give_every_bit_back(n, m, along, dtype, values):
    x = array(thinned(array(values, dtype), n, m, along), dtype)
    small = pack_nm(x, n, m, along=along)
    assert raw(small.dense()) == raw(x)
    assert small.bits == max(1, int(np.ceil(np.log2(math.comb(m, n)))))


@given(VALUES)
def test_under_jit_a_group_keeps_its_first_nonzeros(values):
    x = array(values)
    small = jitted_pack(x)
    first = jnp.asarray(thinned(x, 2, 4, (0,)))
    assert raw(small.dense()) == raw(first)
    for ours, theirs in zip(
        jax.tree.leaves(small), jax.tree.leaves(pack_nm(first, 2, 4)), strict=True
    ):
        assert raw(ours) == raw(theirs)


@given(VALUES, VALUES)
def test_new_values_go_where_a_code_says_and_the_rest_is_pruned(old, new):
    small = jitted_pack(array(old))
    again = jax.jit(NMTensor.encode)(small, array(new))
    ones = dataclasses.replace(small, values=jnp.ones_like(small.values))
    places = np.asarray(ones.dense()) == 1
    assert np.all(places[np.asarray(small.dense()) != 0])
    assert raw(again.dense()) == raw(np.where(places, array(new), 0))
    assert raw(again.codes) == raw(small.codes)
    assert again.describe() == small.describe()


def test_the_contraction_of_a_convolution_is_one_lane():
    kernel = np.zeros((3, 3, 1, 2), np.float32)
    kernel[0, 1, 0] = kernel[1, 0, 0] = kernel[2, 2, 0] = [1, 2]
    small = pack_nm(jnp.asarray(kernel), 1, 3, along=(0, 1, -2))
    assert small.values.tolist() == [[[1], [1], [1]], [[2], [2], [2]]]
    assert jc.bits.unpack(small.codes, 2, 6).tolist() == [1, 0, 2, 1, 0, 2]
    assert raw(small.dense()) == raw(kernel)


def test_codes_of_random_weights_have_the_published_entropy():
    # 0.646 bit per weight, after Mishra et al., arXiv:2104.08378, at the bound.
    x = jnp.asarray(np.random.default_rng(0).normal(size=(400, 100)), jnp.float32)
    small = pack_nm(jnp.where(nm_mask(jnp.abs(x), 2, 4), x, 0), 2, 4)
    codes = np.asarray(jc.bits.unpack(small.codes, 3, 10_000))
    share = np.bincount(codes) / 10_000
    assert share.size == 6
    np.testing.assert_allclose(-share @ np.log2(share) / 4, 0.646, atol=5e-4)


@pytest.mark.parametrize(
    "pack", [pack_nonzero, lambda x: pack_nm(x, 2, 4, along=1)], ids=["bits", "2:4"]
)
def test_the_gradient_is_that_of_the_weights_that_are_stored(pack):
    x = array([0, 1, 0, -2, 0, 0] * 5)
    slope = jnp.arange(30.0).reshape(SHAPE)
    small = pack(x)
    grad = jax.grad(lambda v: jnp.sum(dense_of(small, v) * slope))(small.values)
    by_entry = np.asarray(dense_of(small, grad))
    np.testing.assert_array_equal(by_entry[x != 0], slope[x != 0])


def dense_of(node, values):
    return dataclasses.replace(node, values=values).dense()


@pytest.mark.parametrize("pack", [pack_nonzero, lambda x: pack_nm(x, 2, 4)])
def test_integers_are_an_error(pack):
    with pytest.raises(TypeError, match=r"pack_n\w+ needs a floating array, got int32"):
        pack(jnp.zeros(SHAPE, jnp.int32))


def test_a_group_with_too_many_nonzeros_is_named():
    x = np.zeros((2, 5, 3), np.float32)
    x[:, 2, 1] = 1
    # The second group of four of a lane of ten begins at (0, 4) and ends at (1, 2).
    x[0, 4, 2] = x[1, 0, 2] = 1
    x[1, 2, 2] = 1e-41
    text = (
        "pack_nm needs at most n=2 nonzeros in every m=4 entries, but the group of "
        "float32[2, 5, 3] along (0, 1) that begins at index (0, 4, 2) has 3 (1 such of "
        "9). Prune with `nm_mask` first, or pass another `along`."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        pack_nm(jnp.asarray(x), 2, 4, along=(0, 1))


@pytest.mark.parametrize("along", [2, -3, (0, 0), (0, -2)])
def test_axes_that_the_array_does_not_have_are_an_error(along):
    text = (
        "pack_nm needs axes of an array of 2 dimensions, each once, got along="
        f"{along} for float32[5, 6]. Pass another `along`, or leave this leaf out with"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        pack_nm(jnp.zeros(SHAPE), 2, 4, along=along)


@pytest.mark.parametrize(
    ("n", "m", "text"),
    [
        (2, 17, "pack_nm needs 1 <= m <= 16, got 17."),
        (5, 4, "pack_nm needs 1 <= n <= 4, got 5."),
        (0, 4, "pack_nm needs 1 <= n <= 4, got 0."),
    ],
)
def test_counts_out_of_range_are_an_error(n, m, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        pack_nm(jnp.zeros(SHAPE), n, m)


def test_counts_that_are_no_integers_are_an_error():
    with pytest.raises(TypeError, match=r"pack_nm needs an integer m, got 4\.0\."):
        pack_nm(jnp.zeros(SHAPE), 2, 4.0)
