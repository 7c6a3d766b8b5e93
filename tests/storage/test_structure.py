"""Trees become JSON and come back, with every container and every key of its type."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.storage.structure import decode_tree, encode_tree


TREES = st.recursive(
    st.integers(0, 9) | st.none(),
    lambda inner: (
        st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.dictionaries(st.integers(-3, 3), inner, max_size=3)
        | st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=8,
)


def spec(path, value):
    return ["leaf", path, value]


def test_containers_have_the_json_that_the_format_says():
    tree = {"a": [1, (2,)], "b": {3: None, -1: 4}, "c": {}, "d": [], "e": ()}
    assert encode_tree(tree, spec) == {
        "a": ["list", ["leaf", "a/0", 1], ["tuple", ["leaf", "a/1/0", 2]]],
        "b": ["dict", [-1, ["leaf", "b/-1", 4]], [3, None]],
        "c": {},
        "d": ["list"],
        "e": ["tuple"],
    }


@given(TREES)
def test_every_tree_comes_back_through_json_with_its_types_and_paths(tree):
    text = json.dumps(encode_tree(tree, spec))

    def leaf(path, spec):
        assert spec[1] == path
        return spec[2]

    back = decode_tree(json.loads(text), leaf)
    assert repr(back) == repr(jax.tree.map(lambda x: x, tree))  # JAX sorts the keys


def test_paths_are_those_by_which_errors_and_where_name_a_leaf():
    tree = {"a": [1, {"b/c": 2}], "d": {7: (3,)}, "e": optax.EmptyState()}
    asked = []
    jc.select(
        jax.tree.map(jnp.asarray, tree), lambda path, leaf: not asked.append(path)
    )
    seen = []
    encode_tree(tree, lambda path, value: seen.append(path))
    assert seen == asked == ["a/0", "a/1/b/c", "d/7/0"]


def test_a_node_is_one_leaf():
    node = jc.quantize(jnp.ones((2, 3)))
    seen = []
    encode_tree({"kernel": node}, lambda path, leaf: seen.append((path, leaf)))
    assert seen == [("kernel", node)]


def test_another_container_is_kept_as_the_dict_of_its_fields():
    state = optax.ScaleByAdamState(count=1, mu={"w": 2}, nu=None)
    assert encode_tree(state, spec) == {
        "count": ["leaf", "count", 1],
        "mu": {"w": ["leaf", "mu/w", 2]},
        "nu": None,
    }
    assert encode_tree(optax.EmptyState(), spec) == {}


@pytest.mark.parametrize("key", [1.5, True, (1, 2), b"x"])
def test_a_key_that_json_cannot_hold_is_refused(key):
    with pytest.raises(TypeError, match="needs dict keys that are strings or integers"):
        encode_tree({"a": {key: 1}}, spec)
