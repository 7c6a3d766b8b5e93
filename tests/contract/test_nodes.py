"""What every node promises. A new node is one more row of `ROWS`."""

import dataclasses
import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxcomp as jc
from jaxcomp.node import flatten, resolver
from jaxcomp.storage.leaves import leaf_parts


SHAPE = (4, 6)


def normal(seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=SHAPE).astype(np.float32))


def tie(x):
    layers = {"kernel": {"w": x}, "head": {"w": -x, "n": jnp.int32(1)}}
    layers["kernel"]["n"] = jnp.int32(1)
    return jc.tie_layers(layers, [("kernel", "head")], merge=lambda arrays: arrays[0])


two_of_four = functools.partial(jc.prune.nm_mask, n=2, m=4, along=1)
sparse = functools.partial(jc.pack_nm, n=2, m=4, along=1)
eight = functools.partial(jc.quantize_affine, bits=8, axis=None, group=3)

# How a tree with the node is made of an array, and the paths of its arrays.
ROWS = {
    "QTensor symmetric": (
        lambda x: {"kernel": jc.quantize(x, bits=4)},
        ["kernel/codes", "kernel/scale"],
    ),
    "QTensor affine": (
        lambda x: {"kernel": jc.quantize_affine(x, bits=4)},
        ["kernel/codes", "kernel/scale", "kernel/zero"],
    ),
    "QTensor 3 bits, ragged groups": (
        lambda x: {"kernel": jc.quantize(x, bits=3, axis=0, group=4)},
        ["kernel/codes", "kernel/scale"],
    ),
    "QTensor affine, half precision": (
        lambda x: {"kernel": jc.quantize_affine(x.astype(jnp.bfloat16), 8, group=3)},
        ["kernel/codes", "kernel/scale", "kernel/zero"],
    ),
    "SharedTensor": (
        lambda x: {"kernel": jc.palettize(x, clusters=5)},
        ["kernel/codes", "kernel/codebook"],
    ),
    "SharedTensor with a pinned zero": (
        lambda x: {"kernel": jc.palettize(jnp.where(x > 0.7, 0, x), clusters=5)},
        ["kernel/codes", "kernel/codebook"],
    ),
    "TiedTensor": (tie, ["head/n", "kernel/n", "kernel/w"]),
    "QTensor with coded scales": (
        lambda x: {"b": x, "kernel": jc.quantize(x, 4, axis=0, group=4, scales=eight)},
        ["b", "kernel/codes", "kernel/scale/codes", "kernel/scale/scale"]
        + ["kernel/scale/zero"],
    ),
    "FloatTensor": (
        lambda x: {"kernel": jc.quantize_nf4(x, axis=0, group=4)},
        ["kernel/codes", "kernel/scale"],
    ),
    "FloatTensor with float scales": (
        lambda x: {"b": x, "kernel": jc.quantize_nvfp4(x, axis=0, group=4)},
        ["b", "kernel/codes", "kernel/scale/codes", "kernel/scale/scale"],
    ),
    "FloatTensor with powers": (
        lambda x: {"b": x, "kernel": jc.quantize_mx(x, axis=0, group=4)},
        ["b", "kernel/codes", "kernel/scale/codes"],
    ),
    "BitmaskTensor": (
        lambda x: {"kernel": jc.pack_nonzero(jnp.where(jc.top_mask(x, 0.5), x, 0))},
        ["kernel/mask", "kernel/values"],
    ),
    "NMTensor": (
        lambda x: {
            "kernel": jc.pack_nm(jnp.where(two_of_four(x), x, 0), 2, 4, along=1)
        },
        ["kernel/values", "kernel/codes"],
    ),
    "VectorTensor": (
        lambda x: {"kernel": jc.palettize_vectors(jax.random.key(0), x, 4, 2)},
        ["kernel/codes", "kernel/codebook"],
    ),
    "RowSharedTensor with zeros": (
        lambda x: {"kernel": jc.palettize_rows(jnp.where(x > 1, 0, x), 3, rows=2)},
        ["kernel/codes", "kernel/codebooks"],
    ),
    "BorrowedTensor": (
        lambda x: jc.share_together({"a": x, "b": 0.5 - x}, 5),
        ["a/codes", "a/codebook", "b/codes"],
    ),
    "LowRankTensor": (
        lambda x: {"kernel": jc.factorize(x, 3)},
        ["kernel/left", "kernel/right"],
    ),
    "BasisTensor": (
        lambda x: jc.share_basis({"a": x, "b": 0.5 - x}, [("a", "b")], 3),
        ["a/left", "a/right", "b/right"],
    ),
}
# A product of factors: it keeps no zeros but whole rows and columns.
FACTORS = (jc.LowRankTensor, jc.BasisTensor)
# What keeps no zeros but many together.
NO_SINGLE_ZEROS = (*FACTORS, jc.VectorTensor)


@pytest.fixture(params=ROWS)
def name(request):
    return request.param


@functools.cache
def built(name, seed):
    return ROWS[name][0](normal(seed))


@pytest.fixture
def tree(name):
    return built(name, 0)


@pytest.fixture
def trees(name):
    return [built(name, seed) for seed in range(3)]


@pytest.fixture
def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def nodes(tree):
    leaves = jax.tree.leaves(tree, is_leaf=jc.is_compressed)
    return [leaf for leaf in leaves if jc.is_compressed(leaf)]


def whole_nodes(tree):
    """The nodes, with one that needs no other leaf for each that does."""
    paths, leaves, _ = flatten(tree)
    whole = resolver("contract", paths, leaves)
    found = [whole(i) for i, leaf in enumerate(leaves) if jc.is_compressed(leaf)]
    return [node for node in found if jc.is_compressed(node)]


def every_leaf(path, leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def raw(tree):
    """The structure, static fields included, and the bits of every leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf) for leaf in leaves]
    return treedef, [(a.dtype, a.shape, a.tobytes()) for a in arrays]


def assert_same(found, expected, tree):
    """To the bit; products of factors to the order in which a device sums them."""
    if any(isinstance(node, FACTORS) for node in nodes(tree)):
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert raw(found) == raw(expected)


def squares(trainable, rest):
    dense = jax.tree.leaves(jc.densify(jc.join(trainable, rest)))
    floats = [x for x in dense if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in floats)


def true_bits(x):
    kind = jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo
    return x.size * kind(x.dtype).bits


def test_passes_through_jit_as_argument_and_result(tree):
    assert raw(jax.jit(lambda tree: tree)(tree)) == raw(tree)


def test_densify_is_the_same_under_jit(tree):
    assert_same(jax.jit(jc.densify)(tree), jc.densify(tree), tree)


def test_vmap_over_a_stack_equals_each_alone(trees, stacked):
    together = jax.vmap(jc.densify)(stacked)
    for i, tree in enumerate(trees):
        one = jax.tree.map(operator.itemgetter(i), together)
        assert_same(one, jc.densify(tree), tree)


def test_scan_over_a_stack_equals_each_alone(trees, stacked):
    _, together = jax.lax.scan(lambda _, tree: (_, jc.densify(tree)), None, stacked)
    for i, tree in enumerate(trees):
        one = jax.tree.map(operator.itemgetter(i), together)
        assert_same(one, jc.densify(tree), tree)


def test_the_gradient_in_its_float_arrays_is_right(tree):
    trainable, rest = jc.split(tree)
    loss, grads = jax.value_and_grad(squares)(trainable, rest)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, trainable)
    chex.assert_tree_all_finite(grads)
    assert jax.tree.leaves(grads)
    for leaf in jax.tree.leaves(grads):
        assert jnp.any(leaf != 0)
    # Dense arrays are linear in them, so by Euler <grad, leaves> is twice the loss;
    # products are of the second order.
    fixed = squares(jax.tree.map(jnp.zeros_like, trainable), rest)  # without floats
    order = 4 if any(isinstance(node, FACTORS) for node in nodes(tree)) else 2
    inner = jax.tree.map(
        lambda g, x: jnp.vdot(g.astype(jnp.float32), x.astype(jnp.float32)),
        grads,
        trainable,
    )
    is_wide = all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trainable))
    np.testing.assert_allclose(
        sum(jax.tree.leaves(inner)),
        order * (loss - fixed),
        rtol=1e-5 if is_wide else 2e-2,
    )


def test_eval_shape_gives_shapes_and_dtypes(tree):
    shapes = jax.eval_shape(jc.densify, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, jc.densify(tree))
    abstract = jax.eval_shape(lambda tree: tree, tree)
    assert jax.tree.structure(abstract) == jax.tree.structure(tree)
    for held, real in zip(nodes(abstract), nodes(tree), strict=True):
        assert (held.shape, held.dtype, held.ndim) == (SHAPE, real.dtype, len(SHAPE))
        assert held.nbits() == real.nbits()
        assert held.describe() == real.describe()


def test_shape_and_dtype_are_those_of_the_dense_array(tree):
    dense = jax.tree.leaves(jc.densify(tree))
    for node in nodes(tree):
        assert (node.shape, node.size) == (SHAPE, 24)
        assert node.dtype in [leaf.dtype for leaf in dense]


def test_tree_map_identity_gives_it_back(tree):
    mapped = jax.tree.map(lambda leaf: leaf, tree)
    assert raw(mapped) == raw(tree)
    assert [type(node) for node in nodes(mapped)] == [type(n) for n in nodes(tree)]


def test_split_and_join_give_it_back(tree):
    trainable, rest = jc.split(tree)
    assert all(
        jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(trainable)
    )
    assert raw(jc.join(trainable, rest)) == raw(tree)


def assert_saves(tmp_path, tree):
    jc.save(tmp_path / "w.jxc", tree)
    back = jc.load(tmp_path / "w.jxc")
    assert raw(back) == raw(tree)
    for ours, theirs in zip(nodes(back), nodes(tree), strict=True):
        for field in dataclasses.fields(theirs):
            if field.metadata.get("static"):
                value = getattr(ours, field.name)
                assert value == getattr(theirs, field.name)
                assert type(value) is type(getattr(theirs, field.name))
    assert raw(jc.load(tmp_path / "w.jxc", like=tree)) == raw(tree)


def test_save_and_load_are_bit_identical(tmp_path, tree, stacked):
    assert_saves(tmp_path, tree)
    assert_saves(tmp_path, stacked)


def test_nbits_counts_the_bits_of_the_arrays_it_holds(tree, stacked):
    for node in nodes(tree) + nodes(stacked):
        assert node.nbits() == sum(true_bits(x) for x in jax.tree.leaves(node))


def test_nbits_is_what_the_packed_file_spends_on_its_tensors(tree, stacked):
    for node in nodes(tree) + nodes(stacked):
        _, arrays = leaf_parts("kernel", node)
        assert node.nbits() == 8 * sum(x.nbytes for x in arrays.values())


def test_nbits_is_at_least_the_entropy_of_its_values(tree):
    for node in whole_nodes(tree):
        if not isinstance(node, FACTORS):  # whose values are as many as there are
            counts = np.unique(np.asarray(node.dense()), return_counts=True)[1]
            assert node.nbits() >= counts @ np.log2(counts.sum() / counts)


def test_lowers_for_every_platform(tree):
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(jc.densify), platforms=platforms)(tree)
    assert exported.platforms == platforms
    assert_same(exported.call(tree), jc.densify(tree), tree)


def test_new_values_do_not_trace_again(trees):
    chex.clear_trace_counter()  # it counts by name
    densify = jax.jit(chex.assert_max_traces(jc.densify, n=1))
    for tree in trees:
        densify(tree)


def test_is_frozen(tree):
    for node in nodes(tree):
        for field in dataclasses.fields(node):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(node, field.name, None)


def test_describes_itself(tree):
    for node in nodes(tree):
        assert isinstance(node.describe(), str)
        assert node.describe().strip()


def test_encoding_its_own_values_changes_no_bit(tree):
    assert raw(jc.map_values(lambda x: x, tree, every_leaf)) == raw(tree)
    for node in whole_nodes(tree):
        assert raw(node.encode(node.dense())) == raw(node)


@pytest.mark.parametrize("train", [lambda x: 0.5 - x, lambda x: 0 * x + 0.5])
def test_encoding_its_own_values_after_training_keeps_every_code(tree, train):
    # Training may bring a codebook out of order, and two entries to one value.
    trainable, rest = jc.split(tree)
    trained = jc.join(jax.tree.map(train, trainable), rest)

    for node in whole_nodes(trained):
        dense = node.dense()
        again = node.encode(dense)
        assert raw(again.dense()) == raw(dense)
        assert raw(again) == raw(node)


def test_encoding_keeps_kind_settings_and_zeros(tree):
    values = jnp.where(normal(1) > 0, 0, normal(2)).astype(jnp.float32)
    for node in whole_nodes(tree):
        new = values.astype(node.dtype)
        if isinstance(node, NO_SINGLE_ZEROS):
            with pytest.raises(ValueError, match="zero"):
                node.encode(new)
            new = normal(2)
        again = node.encode(new)
        assert type(again) is type(node)
        assert (again.shape, again.dtype) == (node.shape, node.dtype)
        assert again.describe() == node.describe()
        assert not jnp.any(again.dense()[new == 0])


def test_keys_of_its_arrays_are_named(name, tree):
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    found = [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in named]
    assert found == ROWS[name][1]


def test_optax_maps_over_the_state_of_its_float_arrays(tree):
    trainable, _ = jc.split(tree)
    tx = optax.adam(1e-3)
    state = tx.init(trainable)
    marked = optax.tree.map_params(tx, lambda x: x + 1, state)
    ones = jax.tree.map(jnp.ones_like, trainable)
    chex.assert_trees_all_equal(marked[0].mu, ones)
    chex.assert_trees_all_equal(marked[0].nu, ones)
    assert marked[0].count == 0


def test_optax_updates_its_float_arrays_alone(tree):
    trainable, rest = jc.split(tree)
    tx = optax.adam(1e-4)
    grads = jax.grad(squares)(trainable, rest)
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    stepped = jc.join(optax.apply_updates(trainable, updates), rest)
    assert jax.tree.structure(stepped) == jax.tree.structure(tree)
    assert raw(jc.split(stepped)[1]) == raw(rest)
    assert squares(*jc.split(stepped)) < squares(trainable, rest)


def spread_over_a_mesh():
    """Prints each row that eight devices make, and make dense, as one does."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("rows", "columns"))

    def spread(x, axes):
        names = [
            axis if length % mesh.shape[axis] == 0 else None
            for axis, length in zip(axes, x.shape, strict=False)
        ]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*names)))

    for name, (make, _) in ROWS.items():
        one, x = make(normal(0)), spread(normal(0), ("rows", "columns"))
        assert len(x.sharding.device_set) == 8
        if any(isinstance(node, FACTORS) for node in nodes(one)):
            chex.assert_trees_all_close(make(x), one, rtol=1e-4, atol=1e-5)
        else:
            assert raw(make(x)) == raw(one), name
        apart = jax.tree.map(lambda leaf: spread(leaf, ("rows",)), one)
        assert_same(jax.jit(jc.densify)(apart), jc.densify(one), one)
        print(name)


def test_eight_devices_make_the_same_node_and_the_same_array(on_eight_devices):
    assert on_eight_devices(__file__) == list(ROWS)


if __name__ == "__main__":
    spread_over_a_mesh()
