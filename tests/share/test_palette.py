import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp import SharedTensor, bits, palettize, share_tree
from jaxcomp.share import histogram, palette
from jaxcomp.share.kmeans import assign, exact_centroids, zero_centroids


# Small integers repeat often, and zeros are common among them.
VALUES = st.integers(-4, 4).map(float) | st.floats(-1e6, 1e6, width=32)
SAMPLES = hnp.arrays(np.float32, (2, 5), elements=VALUES)
CLUSTERS = st.sampled_from([2, 3, 6])  # each size of a codebook compiles
SEEDS = st.integers(0, 2**32 - 1)
NARROW = [ml_dtypes.bfloat16, np.float16]


def bits_of(x):
    x = np.asarray(x)
    return x.view(f"uint{8 * x.itemsize}")


def normal(seed, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(2, 5)).astype(dtype)


def codes_of(node):
    return np.asarray(bits.unpack(node.codes, node.bits, node.size))


def best_error(values, clusters):
    """The least squared error over all ways to cut sorted values into intervals."""
    values = np.sort(values.astype(np.float64))
    clusters = min(clusters, values.size)
    return min(
        sum(np.sum((part - part.mean()) ** 2) for part in np.split(values, cuts))
        for cuts in map(
            list, itertools.combinations(range(1, values.size), clusters - 1)
        )
    )


encode = jax.jit(SharedTensor.encode)  # of a node with a zero of its own


# palettize


def test_the_nearest_values_merge_into_their_mean_and_zero_stays_apart(strict):
    node = palettize(jnp.array([[0.0, 1.0], [1.5, 6.0]]), clusters=3)
    np.testing.assert_array_equal(node.dense(), [[0.0, 1.25], [1.25, 6.0]])
    np.testing.assert_array_equal(node.codebook, [1.25, 6.0])
    np.testing.assert_array_equal(node.table(), [0.0, 1.25, 6.0])
    assert codes_of(node).tolist() == [0, 1, 1, 2]
    assert (node.zero, node.bits, node.shape) == (True, 2, (2, 2))


@given(SAMPLES, CLUSTERS)
def test_there_are_at_most_so_many_values_and_zeros_are_exactly_zero(x, clusters):
    node = palettize(jnp.asarray(x), clusters)
    dense = np.asarray(node.dense())
    assert dense.shape == x.shape and dense.dtype == x.dtype
    assert np.unique(dense).size <= clusters
    assert np.all(bits_of(dense)[x == 0] == 0)
    assert node.zero == bool(np.any(x == 0))
    assert np.all(np.diff(np.asarray(node.codebook)) > 0)


@given(SAMPLES)
def test_as_many_clusters_as_values_are_exact(x):
    dense = palettize(jnp.asarray(x), np.unique(x).size).dense()
    np.testing.assert_array_equal(bits_of(dense), bits_of(x + np.float32(0)))


@pytest.mark.parametrize("dtype", [np.float32, *NARROW])
def test_more_clusters_than_values_are_exact_in_every_dtype(dtype):
    x = normal(0, dtype)
    x[0, 1] = 0
    node = palettize(jnp.asarray(x), 256)
    assert node.dtype == node.dense().dtype == dtype
    np.testing.assert_array_equal(bits_of(node.dense()), bits_of(x))
    assert node.bits == 4  # 10 values, not 256


@given(
    hnp.arrays(np.float32, 10, elements=st.floats(-1e3, 1e3, width=32)),
    st.integers(1, 5),
)
def test_no_other_codebook_has_a_smaller_squared_error(x, clusters):
    x = np.where(x == 0, np.float32(1), x)
    dense = np.asarray(palettize(jnp.asarray(x), clusters).dense(), np.float64)
    error, best = np.sum((dense - x) ** 2), best_error(x, clusters)
    # A mean is rounded to float32 once: 6e-8 of up to 1e3, squared, in 10 entries.
    assert error <= best * (1 + 1e-6) + 1e-7


@given(SAMPLES, CLUSTERS)
def test_beside_zeros_the_other_values_have_the_best_of_what_is_left(x, clusters):
    x[0, 0] = 0
    dense = np.asarray(palettize(jnp.asarray(x), clusters).dense(), np.float64)
    live = x[x != 0]
    best = best_error(live, clusters - 1) if live.size else 0.0
    assert np.sum((dense - x) ** 2) <= best * (1 + 1e-6) + 0.1  # 1e6 * 6e-8, squared


def test_one_cluster_is_the_mean(strict):
    node = palettize(jnp.array([[1.0, 2.0], [3.0, 6.0]]), clusters=1)
    np.testing.assert_array_equal(node.dense(), np.full((2, 2), 3.0))
    assert node.bits == 1


@pytest.mark.parametrize("clusters", [1, 4])
def test_nothing_but_zeros_needs_no_codebook(clusters):
    node = palettize(jnp.array([[0.0, -0.0], [0.0, 0.0]]), clusters)
    assert node.codebook.shape == (0,)
    np.testing.assert_array_equal(bits_of(node.dense()), np.zeros((2, 2)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_entry_is_its_own_value(shape):
    for value in (2.5, 0.0):
        node = palettize(jnp.full(shape, value), clusters=1)
        assert node.shape == shape
        np.testing.assert_array_equal(node.dense(), np.full(shape, value))


@pytest.mark.parametrize("dtype", NARROW)
def test_values_that_coincide_in_a_narrow_dtype_share_one_entry(dtype):
    eps = float(ml_dtypes.finfo(dtype).eps)
    x = np.array([1, 1 + eps, 1 + 2 * eps, 1 + 3 * eps], dtype)
    node = palettize(jnp.asarray(x), clusters=3)
    codebook = np.asarray(node.codebook, np.float64)
    assert np.all(np.diff(codebook) > 0)
    assert np.all(np.abs(np.asarray(node.dense(), np.float64) - x) <= eps)


def test_as_many_clusters_as_16_bits_number_are_told_apart():
    x = jnp.arange(1.0, 1001.0)
    node = palettize(x, clusters=2**16)
    assert node.bits == 10
    np.testing.assert_array_equal(node.dense(), x)


def test_numpy_arrays_and_lists_are_palettized_alike():
    x = [[1.0, 2.0], [0.0, 5.0]]
    dense = palettize(jnp.array(x), 4).dense()
    for other in (x, np.array(x), np.array(x, np.float32)):
        np.testing.assert_array_equal(palettize(other, 4).dense(), dense)


def nearest_entry(node, x):
    """`dense` by the plain search: zeros apart, the others at their nearest entry."""
    entries = np.asarray(node.codebook)
    return np.where(x == 0, 0, entries[assign(x, entries)])


@pytest.fixture
def in_pieces(monkeypatch):
    """Few values go through bins, and are assigned and packed in pieces."""
    monkeypatch.setattr(histogram, "_MANY", 1)
    for module in (histogram, palette):
        monkeypatch.setattr(module, "PIECE", 64)


@pytest.mark.parametrize(
    "dtype, clusters", [(NARROW[0], 7), (NARROW[1], 7), (np.float32, 300)]
)
def test_every_weight_of_many_gets_its_nearest_value(in_pieces, dtype, clusters):
    x = np.random.default_rng(0).standard_t(3, (7, 101)).astype(dtype)
    x[:2, ::3] = 0
    x[2, 0] = -0.0
    node = palettize(jnp.asarray(x), clusters)
    assert node.zero and node.codebook.size <= clusters - 1
    np.testing.assert_array_equal(
        bits_of(node.dense()), bits_of(nearest_entry(node, x))
    )
    whole = bits.pack(codes_of(node), node.bits)
    np.testing.assert_array_equal(node.codes, whole)


@given(SAMPLES, CLUSTERS, st.integers(0, 2))
def test_a_tie_goes_to_the_lower_value(x, clusters, shift):
    chosen = np.unique(x.reshape(-1)[shift::3])[:clusters]
    node = palettize(x, chosen.size + 1, centroids=lambda values, room, live: chosen)
    table = np.sort(np.append(chosen, 0.0)) if 0 in chosen else chosen
    expected = table[assign(x, table)].astype(np.float32)
    np.testing.assert_array_equal(node.dense(), np.where(x == 0, 0, expected))


def test_a_function_of_values_clusters_and_weights_makes_the_codebook():
    x = jnp.array([[0.0, 1.0, 2.0], [5.0, 0.0, 7.0]])
    seen = []

    def centroids(values, clusters, weights):
        seen.append((values.tolist(), clusters, weights.tolist()))
        return np.array([6.0, 1.5])  # in any order

    node = palettize(x, 4, centroids=centroids)
    live = [False, True, True, True, False, True]
    assert seen == [([0.0, 1.0, 2.0, 5.0, 0.0, 7.0], 3, live)]
    np.testing.assert_array_equal(node.dense(), [[0, 1.5, 1.5], [6, 0, 6]])
    palettize(x[:, 2:], 2, centroids=lambda *given: seen.append(given) or np.ones(1))
    assert seen[1][1:] == (2, None)


def test_small_weights_join_a_fixed_zero_that_counts_once():
    x = jnp.array([-9.0, -0.1, 0.2, 5.0, 6.0, 9.0])
    for zeros in (0, 3):  # with zeros of its own or none
        node = palettize(jnp.pad(x, (0, zeros)), 4, centroids=zero_centroids)
        assert node.zero and node.codebook.tolist() == [-9.0, 5.5, 9.0]
        assert node.dense().tolist() == [-9, 0, 0, 5.5, 5.5, 9] + [0] * zeros


def test_a_fixed_zero_costs_some_error_and_prunes():
    x = np.random.default_rng(0).normal(size=300).astype(np.float32)
    apart, joined = (
        np.asarray(palettize(x, 5, **kind).dense())
        for kind in ({"centroids": exact_centroids}, {"centroids": zero_centroids})
    )
    assert np.sum((apart - x) ** 2) <= np.sum((joined - x) ** 2)
    assert not np.any(apart == 0) and 50 < np.sum(joined == 0) < 150


@pytest.mark.parametrize(
    "found, text",
    [
        (np.zeros(0), r"shape \(0,\): \[\]"),
        (np.ones((1, 2)), r"shape \(1, 2\)"),
        (np.arange(3.0), r"shape \(3,\): \[0\. 1\. 2\.\]"),
        (np.array([1.0, np.nan]), r"shape \(2,\): \[ 1\. nan\]"),
    ],
)
def test_centroids_that_cannot_be_a_codebook_are_an_error(found, text):
    text = r"palettize needs `centroids` to return .* 1 to 2 finite values, got " + text
    with pytest.raises(ValueError, match=text):
        palettize(jnp.ones(3), 2, centroids=lambda *given: found)


# the node


def test_dense_under_jit_gives_the_same_bits(strict):
    x = normal(0)
    node = palettize(jnp.asarray(x), 4)
    jitted = jax.jit(SharedTensor.dense)(node)
    np.testing.assert_array_equal(bits_of(jitted), bits_of(node.dense()))


@pytest.mark.parametrize("dtype", [np.float32, *NARROW])
@pytest.mark.parametrize("clusters", [2, 3, 9])
def test_nbits_are_those_of_the_arrays_that_a_node_holds(clusters, dtype):
    x = normal(0, dtype)
    node = palettize(jnp.asarray(x), clusters)
    arrays = jax.tree.leaves(node)
    assert len(arrays) == 2
    assert node.nbits() == sum(8 * a.size * a.dtype.itemsize for a in arrays)


def test_nbits_count_codes_codebook_and_padding():
    x = jnp.arange(1.0, 11.0)
    # 10 codes of 2 bits take 3 bytes; 3 entries of 32 bits, and no entry for zero.
    assert palettize(x, 3).nbits() == 3 * 8 + 3 * 32
    assert palettize(x.at[0].set(0), 3).nbits() == 3 * 8 + 2 * 32


def test_a_node_says_how_many_values_it_shares():
    assert palettize(jnp.array([1.0, 2.0, 3.0]), 2).describe() == "2 shared values"
    assert palettize(jnp.array([0.0, 2.0, 3.0]), 3).describe() == "3 shared values"


@given(hnp.arrays(np.float32, (2, 5), elements=st.integers(-8, 8).map(float)))
def test_the_gradient_of_an_entry_is_the_sum_over_the_weights_that_use_it(weights):
    x = np.array([[0.0, 1.0, 1.25, 7.0, 0.0], [-3.0, 7.5, 1.0, -3.5, 2.0]], np.float32)
    node = palettize(jnp.asarray(x), clusters=4)
    trainable, rest = jc.split(node)
    grad = jax.grad(lambda t: jnp.sum(jc.join(t, rest).dense() * weights))(trainable)
    sums = np.zeros(4, np.float32)
    np.add.at(sums, codes_of(node), weights.reshape(-1))
    np.testing.assert_array_equal(grad.codebook, sums[1:])  # zero's is in no entry


def test_training_the_codebook_leaves_zeros_at_zero():
    node = palettize(jnp.array([[0.0, 1.0], [0.0, 3.0]]), clusters=3)
    trainable, rest = jc.split(node)
    moved = jax.tree.map(lambda c: c - 10.0, trainable)
    dense = jc.join(moved, rest).dense()
    np.testing.assert_array_equal(dense, [[0.0, -9.0], [0.0, -7.0]])


# encode


@given(SEEDS, hnp.arrays(bool, (2, 5)))
def test_pruned_entries_are_zero_and_the_survivors_keep_their_bits(seed, mask):
    x = normal(seed)
    x[0, 0] = 0
    node = palettize(jnp.asarray(x), 4)
    dense = np.asarray(node.dense())
    pruned = encode(node, np.where(mask, dense, np.float32(0)))
    np.testing.assert_array_equal(
        bits_of(pruned.dense()), np.where(mask, bits_of(dense), 0)
    )
    np.testing.assert_array_equal(bits_of(pruned.codebook), bits_of(node.codebook))


@given(SEEDS, hnp.arrays(bool, (2, 5)))
def test_without_a_zero_of_its_own_a_pruned_palette_gives_it_one_of_its_values(
    seed, mask
):
    node = palettize(jnp.asarray(normal(seed)), 4)
    pruned = node.encode(jnp.where(mask, node.dense(), 0))
    dense = np.asarray(pruned.dense())
    assert np.all(bits_of(dense)[~mask] == 0)
    assert np.unique(dense).size <= 4


def test_pruning_whole_values_keeps_the_bits_of_the_others():
    node = palettize(jnp.asarray(normal(0)), 6)
    dense = np.asarray(node.dense())
    theta = np.median(np.abs(np.asarray(node.codebook)))
    pruned = np.where(np.abs(dense) < theta, np.float32(0), dense)
    assert 0 < np.sum(pruned == 0) < 10
    np.testing.assert_array_equal(
        bits_of(node.encode(jnp.asarray(pruned)).dense()), bits_of(pruned)
    )


@pytest.mark.parametrize("zero", [0.0, 0.5])
def test_encoding_what_a_node_holds_changes_nothing(zero):
    x = normal(0)
    x[0, 0] = zero
    node = palettize(jnp.asarray(x), 4)
    again = node.encode(node.dense())
    np.testing.assert_array_equal(bits_of(again.dense()), bits_of(node.dense()))
    assert again.describe() == node.describe()


def test_entries_that_equal_dense_keep_codes_that_training_made_alike():
    node = palettize(jnp.array([[0.0, 1.0, 2.0, 3.0, 0.0]]), clusters=4)
    node = dataclasses.replace(node, codebook=jnp.array([5.0, 5.0, 5.0]))
    np.testing.assert_array_equal(encode(node, node.dense()).codes, node.codes)


@given(hnp.arrays(np.float32, (2, 5), elements=st.floats(-8, 8, width=32)))
def test_new_values_go_to_the_nearest_of_the_old_ones(x):
    old = jnp.array([[0.0, 1.0, -3.0, 5.0, 2.0], [0.0, 1.0, 1.0, -3.0, 5.0]])
    table = np.array([-3.0, 0.0, 1.0, 2.0, 5.0])
    node = palettize(old, 8)
    dense = np.asarray(encode(node, x).dense())
    assert set(np.unique(dense)) <= set(table)
    nearest = np.abs(table - x[..., None].astype(np.float64)).min(axis=-1)
    np.testing.assert_allclose(np.abs(dense - x), nearest, atol=1e-6)
    assert np.all(dense[x == 0] == 0)


def test_nearest_is_right_for_the_largest_values_of_a_dtype():
    node = palettize(jnp.array([0.0, 40000.0, 60000.0], jnp.float16), 3)
    moved = encode(node, np.array([0.0, 40032.0, 59968.0], np.float16))
    assert moved.dense().tolist() == [0.0, 40000.0, 60000.0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nearest_is_right_where_two_values_together_overflow(dtype):
    node = palettize(jnp.array([0.0, 2e38, 3e38], dtype), 3)
    moved = encode(node, jnp.array([0.0, 2.9e38, 3.1e38], dtype))
    np.testing.assert_array_equal(moved.dense(), jnp.array([0.0, 3e38, 3e38], dtype))


@pytest.mark.parametrize("dtype", [np.float32, *NARROW])
def test_a_palette_needs_no_dtype_promotion(strict, dtype):
    x = jnp.asarray(np.array([[0.0, 1.0], [2.0, 3.0]], dtype))
    node = palettize(x, 3)
    back = jax.eval_shape(lambda node: node.encode(x).dense(), node)
    assert (back.shape, back.dtype) == (x.shape, dtype)


def test_a_palette_with_a_zero_is_encoded_under_jit_as_outside():
    x = normal(0)
    x[0, 0] = 0
    node = palettize(jnp.asarray(x), 4)
    new = jnp.asarray(x * 2)
    np.testing.assert_array_equal(encode(node, new).codes, node.encode(new).codes)


# share_tree


def test_share_tree_turns_the_selected_leaves_into_nodes_with_their_own_codebooks():
    tree = {
        "a": jnp.array([[1.0, 2.0]]),
        "b": jnp.array([[7.0, 7.5], [0.0, 7.0]]),
        "bias": jnp.ones(3),
        "quantized": jc.quantize(jnp.ones((1, 2))),
        "step": 3,
    }
    small = share_tree(tree, clusters=2)
    np.testing.assert_array_equal(small["a"].codebook, [1.0, 2.0])
    np.testing.assert_array_equal(small["b"].dense()[1], [0.0, np.float32(21.5 / 3)])
    assert all(small[key] is tree[key] for key in ("bias", "quantized", "step"))


def test_share_tree_takes_a_where():
    tree = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([1.0, 2.0])}
    small = share_tree(tree, clusters=2, where=jc.path_matches("b"))
    assert isinstance(small["b"], SharedTensor)
    assert small["a"] is tree["a"]


# errors


@pytest.mark.parametrize("clusters", [0, -1, 65537])
def test_clusters_out_of_range_are_an_error(clusters):
    text = rf"palettize needs 1 <= clusters <= 65536, got {clusters}\."
    with pytest.raises(ValueError, match=text):
        palettize(jnp.ones(3), clusters)
    with pytest.raises(ValueError, match=text + r" \(leaf 'a'\)"):
        share_tree({"a": jnp.ones((1, 2))}, clusters)


@pytest.mark.parametrize("clusters", [4.0, True, None])
def test_clusters_that_are_no_integer_are_an_error(clusters):
    text = f"palettize needs an integer clusters, got {clusters!r}"
    with pytest.raises(TypeError, match=text):
        palettize(jnp.ones(3), clusters)


@pytest.mark.parametrize("x", [[0.0, 1.0], [-0.0, 1.0]])
def test_one_cluster_cannot_hold_zeros_and_other_values(x):
    text = (
        "palettize needs clusters >= 2 for an array with zeros, which keep one value "
        "to themselves, got clusters=1."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        palettize(jnp.array(x), clusters=1)


def test_a_traced_array_is_an_error():
    text = (
        "palettize needs the values of float32[2, 3], which are not known under jit: "
        "it solves the codebook on the host. Call it outside jit."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        jax.jit(lambda x: palettize(x).dense())(jnp.ones((2, 3)))


def test_an_empty_array_is_an_error():
    text = (
        "palettize needs at least one value, got float32[0, 3]. Leave this leaf out "
        "with `where`."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        palettize(jnp.zeros((0, 3)))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64])
def test_an_array_that_is_not_floating_is_an_error(dtype):
    text = f"palettize needs a floating array, got {jnp.dtype(dtype)}[2]. Cast it, or"
    with pytest.raises(TypeError, match=re.escape(text)):
        palettize(jnp.ones(2, dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_an_error_of_palettize(value):
    with pytest.raises(ValueError, match=f"palettize needs finite .*{value}"):
        palettize(jnp.array([1.0, value]))


def test_share_tree_names_the_leaf_the_index_and_the_value_of_a_nan():
    tree = {"a": jnp.ones((1, 2)), "b": [jnp.array([[1.0, jnp.nan]])]}
    text = "share_tree needs finite values, but leaf 'b/0' float32[1, 2] holds nan at"
    with pytest.raises(ValueError, match=re.escape(text + " index (0, 1) (1 such of")):
        share_tree(tree)


def test_zeros_are_pinned_even_if_an_entry_that_trains_happens_to_be_zero():
    node = palettize(jnp.array([-1.0, 2.0, 5.0]), 2)
    node = dataclasses.replace(node, codebook=jnp.array([0.0, 5.0]))
    assert not node.zero
    pruned = node.encode(jnp.array([0.0, 0.0, 5.0]))
    assert pruned.zero and pruned.codebook.tolist() == [5.0]
