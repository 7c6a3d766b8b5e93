import re

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.cluster import hierarchy

import jaxcomp as jc
from jaxcomp.share import tie_layers
from jaxcomp.share.layers import every, layers_of, runs, similar_layers


def stack(*values, **others):
    """Layers b0, b1, ... of one number each."""
    return {f"b{i}": {"w": np.float32([x])} | others for i, x in enumerate(values)}


NAMES = [f"b{i}" for i in range(12)]


# by name


def test_layers_come_in_natural_order():
    tree = {f"block_{i}": {"w": np.ones(1)} for i in (10, 2, 0, 1)} | {"head": 1.0}
    assert layers_of(tree, "block_*") == ["block_0", "block_1", "block_2", "block_10"]


def test_every_number_of_a_path_counts():
    tree = {f"s{i}": {f"b{j}": 1.0 for j in (10, 9)} for i in (2, 11)}
    assert layers_of(tree, "s*/b*") == ["s2/b9", "s2/b10", "s11/b9", "s11/b10"]


def test_a_star_stands_within_one_key():
    tree = {"encoder": {"block_1": {"mlp": {"w": 1.0}}, "norm": 1.0}}
    assert layers_of(tree, "*") == ["encoder"]
    assert layers_of(tree, "encoder/*") == ["encoder/block_1", "encoder/norm"]
    assert layers_of(tree, "encoder/block_?/*/w") == ["encoder/block_1/mlp/w"]


def test_case_counts_and_a_layer_may_be_in_a_list():
    tree = {"Block": [{"w": 1.0}, {"w": 2.0}], "block": [{"w": 3.0}]}
    assert layers_of(tree, "Block/*") == ["Block/0", "Block/1"]
    assert layers_of(tree, "[Bb]lock/0") == ["Block/0", "block/0"]


def test_layers_of_haiku_are_found_by_the_keys_in_their_names():
    net = hk.transform(lambda x: hk.nets.MLP([2, 2, 2])(x))
    params = net.init(jax.random.key(0), jnp.ones((1, 2)))
    found = layers_of(params, "mlp/~/linear_*")
    assert found == ["mlp/~/linear_0", "mlp/~/linear_1", "mlp/~/linear_2"]
    small = tie_layers(params, every(found, 1))
    assert small[found[2]]["w"].source == "mlp/~/linear_0/w"


@pytest.mark.parametrize(
    ("pattern", "there"),
    [
        ("layer_*", "there are 2 paths: a, b."),
        ("a/v", "there are 2 paths: a/w, b/w."),
        ("*/*/*", "there are 0 paths: none."),
    ],
)
def test_a_pattern_without_match_is_an_error_that_lists_paths(pattern, there):
    text = (
        f"layers_of found nothing that {pattern!r} matches. The 2 leaves are a/w, "
        f"b/w; with as many keys as the pattern {there}"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        layers_of({"a": {"w": 1.0}, "b": {"w": 1.0}}, pattern)


# by repetition


def test_patterns_of_repetition_by_hand():
    six = NAMES[:6]
    assert every(six, 1) == [("b0", "b1", "b2", "b3", "b4", "b5")]
    assert every(six, 2) == [("b0", "b2", "b4"), ("b1", "b3", "b5")]
    assert every(six, 3) == [("b0", "b3"), ("b1", "b4"), ("b2", "b5")]
    assert runs(six, 2) == [("b0", "b1"), ("b2", "b3"), ("b4", "b5")]
    assert runs(six, 6) == every(six, 1)


@given(st.integers(2, 12), st.data())
def test_repetition_puts_each_layer_where_the_papers_put_it(n, data):
    step = data.draw(st.integers(1, n))
    places = range(n)
    for groups, rule in (
        (every(NAMES[:n], step), lambda i: i % step),
        (runs(NAMES[:n], step), lambda i: i // step),
    ):
        assert all(len(group) > 1 for group in groups)
        mates = {a: group for group in groups for a in group}
        for i in places:
            together = tuple(NAMES[j] for j in places if rule(j) == rule(i))
            assert mates.get(NAMES[i], (NAMES[i],)) == together


@pytest.mark.parametrize(
    ("fn", "name"), [(every, "period"), (runs, "length"), (similar_layers, "groups")]
)
def test_a_number_out_of_range_is_an_error(fn, name):
    args = (stack(1, 2),) if fn is similar_layers else ()
    for wrong in (0, 3):
        text = f"{fn.__name__} needs 1 <= {name} <= 2, got {wrong}."
        with pytest.raises(ValueError, match=re.escape(text)):
            fn(*args, ["b0", "b1"], wrong)
    with pytest.raises(TypeError, match=f"needs an integer {name}, got 1.0"):
        fn(*args, ["b0", "b1"], 1.0)


@pytest.mark.parametrize("layers", [[], ["b0"], "b0"])
def test_fewer_than_two_layers_are_an_error(layers):
    text = f"needs two layers or more, got {layers!r}. Pass a list of paths, e.g. "
    for call in (every, runs, lambda *args: similar_layers(stack(1, 2), *args)):
        with pytest.raises(ValueError, match=re.escape(text)):
            call(layers, 1)


# by likeness


def test_the_pairs_with_least_added_error_are_joined_first():
    # Joining 0 and 1 adds 1/2, 10 and 12 adds 2; then {0, 1} and 4: (2/3) 3.5**2 = 8.2.
    tree = stack(0, 10, 4, 1, 12)
    names = NAMES[:5]
    assert similar_layers(tree, names, 5) == []
    assert similar_layers(tree, names, 4) == [("b0", "b3")]
    assert similar_layers(tree, names, 3) == [("b0", "b3"), ("b1", "b4")]
    assert similar_layers(tree, names, 2) == [("b0", "b2", "b3"), ("b1", "b4")]
    assert similar_layers(tree, names, 1) == [tuple(names)]


def test_of_equal_pairs_the_one_named_first_is_joined():
    tree = stack(0, 1, 2, 3)
    assert similar_layers(tree, NAMES[:4], 3) == [("b0", "b1")]
    assert similar_layers(tree, NAMES[:4], 2) == [("b0", "b1"), ("b2", "b3")]
    backwards = NAMES[3::-1]
    assert similar_layers(tree, backwards, 3) == [("b3", "b2")]


def squared_error(rows):
    return np.sum((rows - rows.mean(axis=0)) ** 2)


def stepwise(rows, count):
    """Ward's method as its definition says, with all pairs tried by their means."""
    found = [[i] for i in range(len(rows))]
    while len(found) > count:
        added = {
            (i, j): squared_error(rows[found[i] + found[j]])
            - squared_error(rows[found[i]])
            - squared_error(rows[found[j]])
            for i in range(len(found))
            for j in range(i + 1, len(found))
        }
        i, j = min(added, key=added.get)
        found[i] += found.pop(j)
    return sorted(tuple(f"b{i}" for i in sorted(g)) for g in found if len(g) > 1)


@example(147, 3)  # where the error inside of both groups decides
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_groups_are_those_of_brute_force_and_of_scipy(seed, count):
    rows = np.random.default_rng(seed).normal(size=(12, 2)).astype(np.float32)
    tree = {f"b{i}": {"w": x[:1], "b": x[1]} for i, x in enumerate(rows)}
    found = similar_layers(tree, NAMES, count)
    rows = rows.astype(np.float64)
    assert sorted(found) == stepwise(rows, count)
    labels = hierarchy.fcluster(hierarchy.ward(rows), count, "maxclust")
    together = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    assert sorted(found) == sorted(
        tuple(f"b{i}" for i in g) for g in together if len(g) > 1
    )


@given(hnp.arrays(np.float32, (3, 2), elements=st.floats(-1e6, 1e6, width=32)))
def test_the_first_join_is_the_best_of_all(rows):
    tree = {f"b{i}": x for i, x in enumerate(rows)}
    (pair,) = similar_layers(tree, NAMES[:3], 2)
    rows = rows.astype(np.float64)
    errors = {p: squared_error(rows[list(p)]) for p in [(0, 1), (0, 2), (1, 2)]}
    least = min(errors.values())
    assert errors[tuple(int(name[1:]) for name in pair)] <= least * (1 + 1e-9)


def test_layers_far_longer_than_a_chunk_are_compared_whole():
    x = np.zeros(70_000, np.float32)
    tree = {"b0": x, "b1": x.copy(), "b2": x.copy()}
    tree["b1"][0], tree["b2"][-1] = 2, 1
    assert similar_layers(tree, NAMES[:3], 2) == [("b0", "b2")]


def test_layers_with_different_leaves_are_never_joined():
    tree = stack(1, 1.5, 100, 200) | {
        "wide": {"w": np.float32([1, 1])},
        "half": {"w": np.float16([1])},
        "more": {"w": np.float32([1]), "n": 1},
    }
    names = [*NAMES[:4], "wide", "half", "more"]
    assert similar_layers(tree, names, 6) == [("b0", "b1")]
    assert similar_layers(tree, names, 4) == [tuple(NAMES[:4])]
    text = (
        "similar_layers needs groups >= 4, as these layers have different leaves and "
        "cannot share: b0, wide, half, more; got groups=3."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        similar_layers(tree, names, 3)


def test_kinds_of_layers_are_compared_by_their_share_of_the_energy():
    # Joining the small ones loses 1/10 of their energy, the large ones 1/1000.
    tree = {"b0": np.float32([1]), "b1": np.float32([2])}
    tree |= {"b2": np.float32([[100]]), "b3": np.float32([[104]])}
    assert similar_layers(tree, NAMES[:4], 3) == [("b2", "b3")]


def test_only_floating_leaves_are_compared():
    tree = stack(1, 5, 2)
    for i, layer in enumerate(tree.values()):
        layer |= {"n": np.array([100, 0, 7])[i], "act": ["relu", "relu", "tanh"][i]}
    assert similar_layers(tree, NAMES[:3], 2) == [("b0", "b2")]


@pytest.mark.parametrize("scale", [0, 1e-39, 1e37])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_extreme_layers_are_found_too(scale, dtype):
    values = np.array([1, 3, 1.5, 3], np.float64) * scale
    tree = {f"b{i}": {"w": np.array([x], dtype)} for i, x in enumerate(values)}
    found = similar_layers(tree, NAMES[:4], 3)
    assert found == [("b1", "b3") if scale else ("b0", "b1")]


def test_what_is_found_can_be_tied():
    tree = stack(0, 10, 1, 12)
    small = tie_layers(tree, similar_layers(tree, layers_of(tree, "b*"), 2))
    dense = jc.densify(small)
    assert [float(dense[name]["w"][0]) for name in NAMES[:4]] == [0.5, 11, 0.5, 11]


# errors of the search


def test_a_leaf_in_two_layers_is_an_error():
    text = (
        "similar_layers needs each leaf in one layer, but 'b0/w' is in two. Name each "
        "layer once."
    )
    for layers in (["b0", "b0"], ["b0", "b0/w"]):
        with pytest.raises(ValueError, match=re.escape(text)):
            similar_layers(stack(1, 2), layers, 1)


def test_a_path_without_leaves_is_an_error():
    text = "similar_layers found no leaf under 'z'. The 2 leaves are b0/w, b1/w."
    with pytest.raises(ValueError, match=re.escape(text)):
        similar_layers(stack(1, 2), ["b0", "z"], 1)


def test_a_compressed_leaf_is_an_error():
    tree = tie_layers(stack(1, 2, 3), [("b0", "b1")])
    text = (
        "similar_layers needs arrays, but 'b1/w' is already compressed (tied to b0/w). "
        "Densify first."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        similar_layers(tree, NAMES[:3], 2)


def test_a_value_that_is_not_finite_is_an_error():
    text = "similar_layers needs finite values, but leaf 'b1/w' float32[1] holds nan"
    with pytest.raises(ValueError, match=re.escape(text)):
        similar_layers(stack(1, np.nan), NAMES[:2], 1)


def test_the_search_under_jit_is_an_error():
    text = (
        "similar_layers needs the values of 'b0/w' float32[1], which are not known "
        "under jit. Call it outside jit."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        jax.jit(lambda tree: similar_layers(tree, NAMES[:2], 1))(stack(1, 2))
