"""Vector palettes: few distinct vectors, near the best, zeros apart."""

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
from jaxcomp.share import vectors
from jaxcomp.share.vectors import VectorTensor, palettize_vectors


KEY = jax.random.key(0)
LIVE = st.floats(0.5, 8, width=32) | st.floats(-8, -0.5, width=32)
ARRAYS = hnp.arrays(np.float32, (4, 6), elements=LIVE)


def bits_of(x):
    x = np.asarray(x)
    return x.view(f"uint{8 * x.itemsize}")


def codes_of(node, count):
    return np.asarray(bits.unpack(node.codes, node.bits, count)).tolist()


def vectors_of(x, width):
    """float[vectors, width] along axis -2, lane after lane, in plain NumPy."""
    return np.asarray(x).T.reshape(-1, width)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_an_example_by_hand(strict):
    # Down the columns: (0, 0), (1, 2), (1, 2.5) and (9, 9).
    x = jnp.array([[0.0, 1.0], [0.0, 2.5], [1.0, 9.0], [2.0, 9.0]])
    node = palettize_vectors(KEY, x, 3, 2)
    np.testing.assert_array_equal(node.codebook, [[1, 2.25], [9, 9]])
    np.testing.assert_array_equal(node.table()[0], [0, 0])
    np.testing.assert_array_equal(node.dense(), [[0, 1], [0, 2.25], [1, 9], [2.25, 9]])
    assert codes_of(node, 4) == [0, 1, 1, 2]
    assert (node.zero, node.bits, node.shape, node.along) == (True, 2, (4, 2), 0)
    assert node.nbits() == 8 + 4 * 32
    assert node.describe() == "3 shared vectors of 2"


@given(ARRAYS, hnp.arrays(bool, (2, 6)))
@settings(max_examples=15)
def test_few_vectors_nearest_and_zeros_exact(x, pruned):
    x[np.repeat(pruned, 2, axis=0)] = 0
    x[:2, 0] = 0  # a codebook of another length compiles
    node = palettize_vectors(KEY, jnp.asarray(x), 4, 2)
    dense = np.asarray(node.dense())
    old, new = vectors_of(x, 2), vectors_of(dense, 2)
    assert len(np.unique(new, axis=0)) <= 4
    assert np.all(bits_of(new[~old.any(axis=1)]) == 0)
    codebook = np.asarray(node.codebook, np.float64)
    live = old.any(axis=1)
    if live.any():
        away = np.sum((old[live][:, None] - codebook) ** 2, axis=-1).min(axis=1)
        ours = np.sum((old[live] - new[live].astype(float)) ** 2, axis=-1)
        np.testing.assert_allclose(ours, away, rtol=1e-4, atol=1e-4)
    again = node.encode(node.dense())
    np.testing.assert_array_equal(again.codes, node.codes)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_as_many_clusters_as_vectors_are_exact(dtype):
    x = normal((4, 6)).astype(dtype)
    x[:2, 3] = 0
    x[2, 5], x[3, 5] = x[2, 4], np.nextafter(x[3, 4], dtype(9))  # one bit apart
    node = palettize_vectors(KEY, jnp.asarray(x), 12, 2)
    assert node.dtype == node.dense().dtype == dtype
    np.testing.assert_array_equal(bits_of(node.dense()), bits_of(x))


@pytest.mark.parametrize("along", [0, 1, -1])
def test_vectors_run_along_any_axis_and_the_last_may_stick_out(along):
    x = jnp.asarray(normal((2, 5, 3)))
    node = palettize_vectors(KEY, x, 64, 4, along=along)
    np.testing.assert_array_equal(node.dense(), x)
    lanes = 30 // x.shape[along]
    count = lanes * -(-x.shape[along] // 4)
    assert node.codes.size == bits.nbytes(count, node.bits)


@pytest.mark.parametrize("correlated", [False, True])
def test_at_the_same_bits_vectors_have_less_error_than_the_best_scalars(correlated):
    x = normal((64, 64))
    if correlated:
        x[1::2] = 0.9 * x[::2] + 0.436 * x[1::2]
    pairs = palettize_vectors(KEY, jnp.asarray(x), 16, 2)  # 2 bits a weight
    single = jc.palettize(x, 4)
    assert pairs.bits == 2 * single.bits

    def error(node):
        return float(np.mean((np.asarray(node.dense()) - x) ** 2))

    assert error(pairs) < (0.6 if correlated else 0.95) * error(single)


def test_k_means_ends_where_neither_lloyd_nor_a_better_seed_would_gain():
    x = normal((64, 64))
    dense = palettize_vectors(KEY, jnp.asarray(x), 16, 2).dense()
    points = vectors_of(x, 2).astype(np.float64)
    best = np.inf
    for seed in range(4):  # plain Lloyd from random points
        centres = points[np.random.default_rng(seed).permutation(len(points))[:16]]
        for _ in range(30):
            away = np.sum((points[:, None] - centres) ** 2, axis=-1)
            mine = away.argmin(axis=1)
            centres = np.stack([points[mine == j].mean(axis=0) for j in range(16)])
        best = min(best, away.min(axis=1).sum())
    assert np.sum((np.asarray(dense) - x) ** 2) < 1.05 * best


def test_a_cluster_without_vectors_begins_anew():
    points = np.concatenate([np.zeros((6, 2)), np.ones((6, 2)), -np.ones((6, 2))])
    points = jnp.asarray(points + 0.25, jnp.float32)
    for seed in range(3):
        found = vectors._lloyd(jax.random.key(seed), points, points < 9, 3)
        np.testing.assert_allclose(
            np.unique(found, axis=0), [[-0.75, -0.75], [0.25, 0.25], [1.25, 1.25]]
        )


def test_blocks_and_a_sample_change_little(monkeypatch):
    x = jnp.asarray(normal((64, 64)))
    whole = palettize_vectors(KEY, x, 16, 2)
    monkeypatch.setattr(vectors, "_SAMPLE", 1030)
    monkeypatch.setattr(vectors, "_TABLE", 1600)  # ragged blocks of 100
    part = palettize_vectors(KEY, x, 16, 2)
    errors = [float(jnp.sum((node.dense() - x) ** 2)) for node in (whole, part)]
    assert errors[0] != errors[1] < 1.15 * errors[0]
    again = palettize_vectors(KEY, x, 16, 2)
    np.testing.assert_array_equal(again.codebook, part.codebook)
    other = palettize_vectors(jax.random.key(1), x, 16, 2)
    assert not np.array_equal(other.codebook, part.codebook)


def test_what_sticks_out_has_no_part_in_a_cluster():
    x = jnp.array([[2.0, 2.0], [3.0, 3.0], [2.5, 4.0]])
    node = palettize_vectors(KEY, x, 2, 2)
    # Of (2, 3), (2.5, -), (2, 3) and (4, -); with 0 for -, 4 would go to (2, 3).
    np.testing.assert_allclose(node.dense()[:, 1], [6.5 / 3, 3, 4], rtol=1e-6)
    np.testing.assert_array_equal(node.encode(node.dense()).codes, node.codes)


@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e37])
def test_values_of_any_size_are_shared_as_those_of_size_1(scale):
    x = normal((4, 6))
    x[:2, 0] = 0
    plain = palettize_vectors(KEY, jnp.asarray(x), 4, 2)
    scaled = palettize_vectors(KEY, jnp.asarray((x * scale).astype(np.float32)), 4, 2)
    np.testing.assert_array_equal(scaled.codes, plain.codes)
    dense = np.asarray(scaled.dense(), np.float64) / scale
    np.testing.assert_allclose(dense, plain.dense(), rtol=1e-5, atol=1e-3)
    if scale > 1e-37:  # what is smaller XLA takes for 0
        moved = scaled.encode(jnp.asarray((-x * scale).astype(np.float32)))
        assert codes_of(moved, 12) == codes_of(plain.encode(-x), 12)


@pytest.mark.parametrize("shape", [(), (1, 1), (3, 2)])
def test_constants_and_single_entries_are_kept(shape):
    for value in (2.5, 0.0):
        node = palettize_vectors(KEY, jnp.full(shape, value), 1, 2)
        np.testing.assert_array_equal(node.dense(), np.full(shape, value))


# encode


def test_pruned_vectors_are_zero_and_the_others_keep_their_bits():
    x = normal((4, 6))
    x[:2, 0] = 0
    node = palettize_vectors(KEY, jnp.asarray(x), 4, 2)
    mask = np.repeat(normal((2, 6), 1) > 0, 2, axis=0)
    want = np.where(mask, node.dense(), 0)
    for encode in (VectorTensor.encode, jax.jit(VectorTensor.encode)):
        pruned = encode(node, jnp.asarray(want))
        np.testing.assert_array_equal(bits_of(pruned.dense()), bits_of(want))
        np.testing.assert_array_equal(pruned.codebook, node.codebook)


def test_new_values_go_to_the_nearest_vectors():
    node = palettize_vectors(KEY, jnp.array([[0.0, 1, 5], [0, 2, -5]]), 3, 2)
    moved = node.encode(jnp.array([[0.9, 4.0, 0.1], [2.5, -4.5, 0.1]]))
    np.testing.assert_array_equal(moved.dense(), [[1, 5, 0], [2, -5, 0]])


def test_a_node_without_a_zero_gives_it_the_place_of_its_smallest_vector():
    node = palettize_vectors(KEY, jnp.array([[1.0, 9, 0.5], [2, 9, -0.5]]), 3, 2)
    assert not node.zero
    pruned = node.encode(jnp.array([[1.0, 0, 0.6], [2, 0, -0.5]]))
    np.testing.assert_array_equal(pruned.dense(), [[1, 0, 0], [2, 0, 0]])
    assert pruned.zero and pruned.bits == node.bits
    assert pruned.describe() == node.describe()
    np.testing.assert_array_equal(np.sort(pruned.codebook[:, 0]), [1, 9])
    single = palettize_vectors(KEY, jnp.ones((2, 3)), 1, 2)
    assert not np.asarray(single.encode(jnp.zeros((2, 3))).dense()).any()
    text = r"encode needs a code for vectors of zeros in float32\[2, 3\], but its only"
    with pytest.raises(ValueError, match=text):
        single.encode(jnp.ones((2, 3)).at[:, 1].set(0))


def test_vectors_that_training_made_alike_keep_their_codes():
    x = normal((4, 6))
    x[:2, 0] = 0
    node = palettize_vectors(KEY, jnp.asarray(x), 4, 2)
    for codebook in (jnp.full((3, 2), 0.5), 0.5 - node.codebook):
        trained = dataclasses.replace(node, codebook=codebook)
        again = trained.encode(trained.dense())
        np.testing.assert_array_equal(again.codes, node.codes)


# errors


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"clusters": 0}, ValueError, "needs 1 <= clusters <= 65536, got 0."),
        ({"clusters": 2.0}, TypeError, "needs an integer clusters, got 2.0."),
        ({"width": 1}, ValueError, "needs 2 <= width <= 64, got 1."),
        ({"along": 2}, ValueError, "needs an axis of float32[4, 2], got along=2. Pass"),
        ({"x": jnp.ones(3)}, ValueError, "needs an axis of float32[3], got along=-2."),
        ({"x": jnp.ones((4, 2), int)}, TypeError, "needs a floating array, got int32"),
        ({"x": jnp.ones((0, 2))}, ValueError, "needs at least one value, got float32"),
        ({"x": jnp.full((4, 2), jnp.nan)}, ValueError, "needs finite values, got nan"),
        (
            {"x": jnp.array([[0.0, 1], [0, 1]]), "clusters": 1},
            ValueError,
            "needs clusters >= 2 for an array with vectors of zeros, which keep one to "
            "themselves, got clusters=1.",
        ),
        (
            {"x": jnp.array([[0.0, 1], [0, 1], [0, 0], [1, 1], [0, 0]])},
            ValueError,
            "keeps zeros only where all of a vector is zero, but 2 of float32[5, 2] "
            "stand in vectors of 2 along axis 0 with other values. Prune in blocks",
        ),
    ],
)
def test_bad_arguments_are_errors(changes, error, text):
    args = {"x": jnp.ones((4, 2)), "clusters": 2, "width": 2} | changes
    with pytest.raises(error, match=re.escape(f"palettize_vectors {text}")):
        palettize_vectors(KEY, **args)


def test_a_traced_array_is_an_error():
    with pytest.raises(ValueError, match="palettize_vectors needs the values of float"):
        jax.eval_shape(lambda x: palettize_vectors(KEY, x, 2, 2), jnp.ones((4, 2)))


def test_zeros_that_a_node_cannot_hold_are_errors_of_encode():
    node = palettize_vectors(KEY, jnp.array([[1.0, 2], [3, 4]]), 2, 2)
    text = r"VectorTensor.encode keeps zeros only where .* but 1 of float32\[2, 2\]"
    with pytest.raises(ValueError, match=text):
        node.encode(jnp.array([[1.0, 0], [3, 4]]))
    text = r"VectorTensor.encode needs to know whether there are zeros in float32\[2, 2"
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(VectorTensor.encode, node, node.dense())
