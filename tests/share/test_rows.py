"""Palettes by rows: each group has the best codebook for itself, zeros apart."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp import bits
from jaxcomp.share.rows import RowSharedTensor, palettize_rows


VALUES = st.integers(-4, 4).map(float) | st.floats(-1e3, 1e3, width=32)
ARRAYS = hnp.arrays(np.float32, (4, 5), elements=VALUES)


def bits_of(x):
    x = np.asarray(x)
    return x.view(f"uint{8 * x.itemsize}")


def normal(shape=(4, 5), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_an_example_by_hand(strict):
    x = jnp.array([[1.0, 0.0, 5.0], [3.0, 8.0, 6.0]])
    node = palettize_rows(x, 3, rows=2)
    # Of 1, 3 and 8 two values; 5 and 6 are kept, and a row is filled with its last.
    np.testing.assert_array_equal(node.codebooks, [[2, 8], [5, 6]])
    np.testing.assert_array_equal(node.table(), [[0, 2, 8], [0, 5, 6]])
    np.testing.assert_array_equal(node.dense(), [[2, 0, 5], [2, 8, 6]])
    assert bits.unpack(node.codes, 2, 6).tolist() == [1, 0, 1, 1, 2, 2]
    assert (node.zero, node.bits, node.axis, node.rows) == (True, 2, 1, 2)
    assert node.nbits() == 2 * 8 + 4 * 32
    assert node.describe() == "3 shared values in each of 2 groups"
    single = palettize_rows(x[:, ::2], 4)
    np.testing.assert_array_equal(single.codebooks, [[1, 3], [5, 6]])


@given(ARRAYS, st.sampled_from([(-1, 2), (0, 3)]))
@settings(max_examples=25)
def test_each_group_is_as_good_as_a_palette_of_its_own(x, grouping):
    axis, rows = grouping
    x[0, 0] = 0
    node = palettize_rows(jnp.asarray(x), 3, axis=axis, rows=rows)
    dense = np.asarray(node.dense())
    assert np.all(bits_of(dense)[x == 0] == 0)
    assert np.all(np.diff(np.asarray(node.codebooks)) >= 0)
    parts = [np.split(a, range(rows, a.shape[axis], rows), axis) for a in (x, dense)]
    for old, new in zip(*parts, strict=True):
        assert len(np.unique(new[new != 0])) <= 2
        if old.any():
            alone = old[old != 0]
            best = jc.palettize(alone, 2).dense()
            np.testing.assert_array_equal(new[old != 0], best)
    again = node.encode(node.dense())
    np.testing.assert_array_equal(again.codes, node.codes)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_as_many_clusters_as_values_are_exact(dtype):
    x = normal((2, 4, 3)).astype(dtype)
    x[0, 0, 0] = 0
    for axis, rows in ((1, 3), (0, 1), (-1, 9)):
        node = palettize_rows(jnp.asarray(x), 32, axis=axis, rows=rows)
        assert node.dtype == node.dense().dtype == dtype
        np.testing.assert_array_equal(bits_of(node.dense()), bits_of(x))


def test_codebooks_of_their_own_have_less_error_than_one():
    x = normal((64, 8)) * np.arange(1, 9, dtype=np.float32)
    errors = [
        float(np.mean((np.asarray(node.dense()) - x) ** 2))
        for node in (jc.palettize(x, 8), palettize_rows(x, 8))
    ]
    assert errors[1] < 0.7 * errors[0]


# encode


def test_pruned_weights_are_zero_and_the_others_keep_their_bits():
    x = normal()
    x[0, 0] = 0
    node = palettize_rows(jnp.asarray(x), 3, rows=2)
    want = np.where(normal(seed=1) > 0, node.dense(), 0)
    for encode in (RowSharedTensor.encode, jax.jit(RowSharedTensor.encode)):
        pruned = encode(node, jnp.asarray(want))
        np.testing.assert_array_equal(bits_of(pruned.dense()), bits_of(want))
        np.testing.assert_array_equal(pruned.codebooks, node.codebooks)


def test_new_values_go_to_the_nearest_of_their_group_in_any_order_of_a_codebook():
    node = palettize_rows(jnp.array([[1.0, 3.0], [2.0, 5.0], [0.0, 0.0]]), 3)
    node = dataclasses.replace(
        node, codebooks=jnp.array([[2.0, -1.0], [5.0, 2.0**127]])
    )
    moved = node.encode(jnp.array([[9.0, 9.0], [-3.0, 1.8e38], [0.1, 0.0]]))
    np.testing.assert_array_equal(moved.dense(), [[2, 5], [-1, 2.0**127], [0, 0]])


def test_a_node_without_a_zero_is_made_again_to_hold_one():
    x = normal()
    node = palettize_rows(jnp.asarray(x), 3, axis=0, rows=2)
    assert not node.zero
    pruned = node.encode(jnp.where(x > 1, 0, node.dense()))
    assert pruned.zero and (pruned.axis, pruned.rows) == (0, 2)
    np.testing.assert_array_equal(pruned.dense() == 0, x > 1)
    assert pruned.describe() == node.describe()


def test_values_that_training_made_alike_keep_their_codes():
    x = normal()
    x[0, 0] = 0
    node = palettize_rows(jnp.asarray(x), 4)
    for codebooks in (jnp.full_like(node.codebooks, 0.5), 0.5 - node.codebooks):
        trained = dataclasses.replace(node, codebooks=codebooks)
        again = trained.encode(trained.dense())
        np.testing.assert_array_equal(again.codes, node.codes)


# edges


@pytest.mark.parametrize("shape", [(), (1, 1), (3,)])
def test_constants_and_single_entries_are_kept(shape):
    for value in (2.5, 1e37, 1e-41, 0.0):
        x = np.full(shape, value, np.float32)
        node = palettize_rows(jnp.asarray(x), 1, rows=7)
        np.testing.assert_array_equal(bits_of(node.dense()), bits_of(x))


def test_a_group_of_zeros_beside_others_stays_zero():
    x = jnp.array([[1.0, 0.0], [2.0, 0.0]])
    node = palettize_rows(x, 3)
    np.testing.assert_array_equal(node.codebooks, [[1, 2], [0, 0]])
    np.testing.assert_array_equal(node.dense(), x)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"clusters": 0}, ValueError, "needs 1 <= clusters <= 65536, got 0."),
        ({"clusters": True}, TypeError, "needs an integer clusters, got True."),
        ({"rows": 0}, ValueError, "needs 1 <= rows <= 2147483647, got 0."),
        ({"axis": -3}, ValueError, "needs an axis of float32[4, 2], got axis=-3. Pass"),
        ({"x": jnp.ones((4, 2), int)}, TypeError, "needs a floating array, got int32"),
        ({"x": jnp.ones((0, 2))}, ValueError, "needs at least one value, got float32"),
        ({"x": jnp.full((4, 2), jnp.inf)}, ValueError, "needs finite values, got inf"),
        (
            {"x": jnp.array([[0.0, 1.0]]), "clusters": 1},
            ValueError,
            "needs clusters >= 2 for an array with zeros, which keep one value to "
            "themselves, got clusters=1.",
        ),
    ],
)
def test_bad_arguments_are_errors(changes, error, text):
    args = {"x": jnp.ones((4, 2)), "clusters": 2} | changes
    with pytest.raises(error, match=re.escape(f"palettize_rows {text}")):
        palettize_rows(**args)


def test_a_traced_array_is_an_error():
    with pytest.raises(ValueError, match="palettize_rows needs the values of float32"):
        jax.eval_shape(palettize_rows, jnp.ones((4, 2)))
    node = palettize_rows(jnp.asarray(normal()), 3)
    with pytest.raises(ValueError, match="palettize_rows needs the values of float32"):
        jax.eval_shape(RowSharedTensor.encode, node, node.dense())
