import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.node import TiedTensor, densify, flatten, is_compressed


def tied(source, shape=(2,)):
    return TiedTensor(source, shape, "float32")


def test_an_array_and_what_is_not_an_array_pass_through_as_the_same_objects():
    tree = {"kernel": jnp.ones((2, 3)), "name": "dense", "step": 3, "none": None}
    dense = densify(tree)
    assert jax.tree.structure(dense) == jax.tree.structure(tree)
    assert all(dense[key] is tree[key] for key in tree)


def test_a_node_becomes_its_array(strict):
    x = jnp.array([[1.0, -0.5], [0.25, 0.0]])
    node = jc.quantize(x, bits=4)
    dense = densify([node, x])
    np.testing.assert_array_equal(dense[0], node.dense())
    assert dense[0].dtype == x.dtype
    assert dense[1] is x


def test_a_tied_leaf_becomes_the_array_of_its_source(strict):
    tree = {"a": {"kernel": jnp.array([1.0, 2.0])}, "b": {"kernel": tied("a/kernel")}}
    dense = densify(tree)
    assert dense["b"]["kernel"] is dense["a"]["kernel"] is tree["a"]["kernel"]


def test_the_source_may_stand_behind_the_leaf_that_is_tied_to_it():
    tree = [tied("1"), jnp.array([1.0, 2.0])]
    assert densify(tree)[0] is tree[1]


def test_a_leaf_tied_to_a_node_becomes_the_array_of_the_node(strict):
    tree = {"a": jc.quantize(jnp.array([1.0, -2.0]), bits=4), "b": tied("a")}
    dense = densify(tree)
    assert dense["b"] is dense["a"]
    np.testing.assert_array_equal(dense["b"], tree["a"].dense())


def test_a_chain_of_ties_is_followed_to_its_end(strict):
    tree = {"a": jnp.array([1.0, 2.0]), "b": tied("a"), "c": tied("b"), "d": tied("c")}
    dense = densify(tree)
    assert all(dense[key] is tree["a"] for key in "bcd")


def test_leaves_whose_paths_read_alike_keep_their_own_arrays():
    tree = {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(3)}}  # both paths are a/b
    dense = densify(tree)
    np.testing.assert_array_equal(dense["a/b"], np.ones(2))
    np.testing.assert_array_equal(dense["a"]["b"], np.zeros(3))


def test_densify_under_jit_gives_the_same_bits(strict):
    x = jnp.array([[1.0, -0.3, 0.7], [0.1, 0.2, -5.0]])
    tree = {"a": jc.quantize(x, bits=4), "b": TiedTensor("a", (2, 3), "float32")}
    eager, jitted = densify(tree), jax.jit(densify)(tree)
    for key in tree:
        np.testing.assert_array_equal(jitted[key], eager[key])


def test_densify_traces_once_for_trees_with_the_same_ties():
    traces = []

    @jax.jit
    def run(tree):
        traces.append(0)
        return densify(tree)

    for value in (1.0, 2.0):
        dense = run({"a": jnp.full(2, value), "b": tied("a")})
        np.testing.assert_array_equal(dense["b"], np.full(2, value))
    assert len(traces) == 1


@given(st.lists(st.integers(-1000, 1000), min_size=3, max_size=3))
def test_the_gradient_of_tied_leaves_is_the_sum_over_their_uses(weights):
    by = dict(zip("abc", map(float, weights), strict=True))
    tree = {"a": jnp.array([1.0, 2.0]), "b": tied("a"), "c": tied("b")}

    def loss(tree):
        return sum(by[key] * leaf.sum() for key, leaf in densify(tree).items())

    grads = jax.grad(loss)(tree)
    np.testing.assert_array_equal(grads["a"], np.full(2, sum(by.values()), np.float32))
    assert isinstance(grads["b"], TiedTensor)  # and holds no array
    assert len(jax.tree.leaves(grads)) == 1


def test_a_tied_leaf_holds_no_arrays_and_takes_no_bits():
    node = tied("block_0/kernel", (2, 3))
    assert jax.tree.leaves(node) == []
    assert node.nbits() == 0
    assert (node.shape, node.ndim, node.size) == ((2, 3), 2, 6)
    assert node.dtype == jnp.float32
    assert node.describe() == "tied to block_0/kernel"
    assert node.encode(jnp.ones((2, 3))) is node


@pytest.mark.parametrize(
    ("shape", "ndim", "size"), [((), 0, 1), ((4,), 1, 4), ((2, 0, 3), 3, 0)]
)
def test_ndim_and_size_follow_the_dense_shape(shape, ndim, size):
    node = jc.quantize(jnp.zeros(shape), axis=None)
    assert (node.shape, node.ndim, node.size) == (shape, ndim, size)


def test_a_node_counts_as_one_leaf_with_one_path():
    tree = {"a": [jc.quantize(jnp.ones((2, 2))), jnp.ones(2)], "b": tied("a/1")}
    paths, leaves, treedef = flatten(tree)
    assert paths == ["a/0", "a/1", "b"]
    assert [is_compressed(leaf) for leaf in leaves] == [True, False, True]
    assert jax.tree.unflatten(treedef, leaves)["a"][0] is tree["a"][0]


def test_a_tied_leaf_alone_cannot_be_dense():
    text = (
        r"TiedTensor\.dense needs the tree that holds 'a/kernel', to which this leaf is"
        r" tied\. Call `densify` on the whole tree\."
    )
    with pytest.raises(ValueError, match=text):
        tied("a/kernel").dense()


def test_a_missing_source_is_an_error_that_names_both_leaves():
    text = (
        r"densify needs the leaf that 'b' is tied to, but 'a' is not in this tree\. "
        r"Pass the whole tree, with all that share\."
    )
    with pytest.raises(ValueError, match=text):
        densify({"b": tied("a")})


@pytest.mark.parametrize(
    ("sources", "text"),
    [
        ({"a": "a"}, r"'a' is tied to, but 'a' is a circle in this tree"),
        ({"a": "b", "b": "a"}, r"'a' is tied to, but 'a' is a circle in this tree"),
        ({"a": "b", "b": "c", "c": "b"}, r"'a' is tied to, but 'b' is a circle"),
    ],
)
def test_ties_in_a_circle_are_an_error(sources, text):
    with pytest.raises(ValueError, match=text):
        densify({key: tied(source) for key, source in sources.items()})
