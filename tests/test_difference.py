import math

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.difference import array_of, difference, leaves_of
from jaxcomp.storage.container import open_file


def only(a, b):
    """The row of two trees of one leaf."""
    return difference({"w": a}, {"w": b}).rows[0]


def test_one_leaf_by_hand():
    # off 9 + 1 = 10, norm 0 + 9 + 1 + 90 = 100: an error of sqrt(0.1), 10 dB.
    a = jnp.array([0.0, 3.0, 1.0, math.sqrt(90)])
    b = jnp.array([1.0, 0.0, 1.0, math.sqrt(90)])
    row = only(a, b)
    assert (row.what, row.size, row.changed) == ("changed", 4, 2)
    assert row.error == pytest.approx(math.sqrt(0.1))
    assert row.sqnr == pytest.approx(10)
    assert (row.largest, row.gained, row.lost) == (3.0, 1, 1)


def test_the_same_tree_is_exact():
    tree = {
        "kernel": jnp.ones((3, 2)),
        "step": 3,
        "name": "net",
        "key": jax.random.key(1),
    }
    found = difference(tree, tree)
    assert found.is_same and found.total.sqnr == math.inf and found.total.error == 0
    assert [row.what for row in found.rows] == ["same"] * 4
    assert "exact" in str(found)


@given(
    *[
        hnp.arrays(np.float32, (5, 7), elements=st.floats(-1e3, 1e3, width=32))
        for _ in range(2)
    ]
)
def test_the_numbers_are_those_of_plain_numpy(a, b):
    row = only(a, b)
    x, y = a.astype(np.float64), b.astype(np.float64)
    assert row.changed == np.sum(x != y)
    assert row.largest == np.max(np.abs(x - y))
    assert row.gained - row.lost == np.sum(y == 0) - np.sum(x == 0)
    norm = np.linalg.norm(x)
    if norm and row.changed:
        error = np.linalg.norm(x - y) / norm
        assert row.error == pytest.approx(error)
        assert row.sqnr == pytest.approx(-20 * math.log10(error))


def test_a_leaf_longer_than_a_piece_is_summed_over_all_pieces():
    a = np.ones(2**20 + 3, np.float32)
    b = a.copy()
    b[[0, -1]] = 0
    row = only(a, b)
    assert (row.size, row.changed, row.gained) == (2**20 + 3, 2, 2)
    assert row.error == pytest.approx(math.sqrt(2 / (2**20 + 3)))


def test_the_total_is_over_all_values_not_over_leaves():
    a = {"a": np.array([3.0]), "b": np.array([4.0, 0.0, 0.0])}
    b = {"a": np.array([3.0]), "b": np.array([4.0, 0.0, 1.0])}
    total = difference(a, b).total
    assert (total.size, total.changed, total.lost) == (4, 1, 1)
    assert total.error == pytest.approx(1 / 5)


def test_integers_do_not_drown_the_error_of_the_weights():
    a = {"ids": np.arange(512), "w": np.array([3.0, 4.0])}
    b = {"ids": np.arange(512), "w": np.array([3.0, 0.0])}
    assert difference(a, b).total.error == pytest.approx(0.8)
    assert difference(a, b).total.size == 514


@pytest.mark.parametrize(
    ("a", "b", "what"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), "float64[2, 3] -> float64[3, 2]"),
        (np.ones(2, np.int32), np.ones(2, np.int8), "int32[2] -> int8[2]"),
        (np.ones(2), 3, "float64[2] -> 3"),
        ("one", "two", "'one' -> 'two'"),
        (1, True, "1 -> True"),
    ],
)
def test_another_shape_dtype_or_kind_is_told(a, b, what):
    found = difference({"w": a}, {"w": b})
    assert found.rows[0].what == what and not found.is_same


def test_values_of_another_dtype_are_compared():
    row = only(jnp.array([1.0, 2.0], jnp.bfloat16), np.array([1.0, 4.0], np.float32))
    assert row.what == "bfloat16[2] -> float32[2]"
    assert (row.changed, row.largest) == (1, 2.0)


def test_leaves_of_only_one_tree_are_listed():
    found = difference({"a": jnp.ones(2), "b": jnp.ones(1)}, {"b": jnp.ones(1), "c": 1})
    told = {row.path: row.what for row in found.rows}
    assert told == {"a": "only in the first", "b": "same", "c": "only in the second"}
    assert not found.is_same


def test_paths_match_as_pytorch_and_nnx_write_them():
    ours = {"layer": {"0": {"weight": {"value": np.ones(2)}, "bias": np.ones(1)}}}
    theirs = {"layer.0.weight": np.ones(2), "layer.0.bias": np.ones(1)}
    assert difference(ours, theirs).is_same and difference(theirs, ours).is_same


def test_paths_that_would_match_twice_are_not_matched():
    found = difference(
        {"a/b": np.ones(1)}, {"a.b": np.ones(1), "a.b/value": np.ones(1)}
    )
    assert [row.what[:4] for row in found.rows] == ["only"] * 3


def test_a_nan_equals_a_nan_and_nothing_else():
    nan = np.array([np.nan, np.inf, 1.0])
    assert only(nan, nan.copy()).what == "same"
    row = only(nan, np.array([0.0, np.inf, 1.0]))
    assert (row.changed, row.error, row.largest) == (1, math.inf, math.inf)


def test_large_integers_that_float64_cannot_tell_apart_differ():
    row = only(np.array([2**60]), np.array([2**60 + 1]))
    assert (row.what, row.changed) == ("changed", 1)


@pytest.mark.parametrize(
    "dtype", [bool, np.uint8, np.float16, jnp.bfloat16, jnp.int4, np.complex64]
)
def test_every_dtype_is_compared(dtype):
    a = np.array([0, 1, 1], dtype)
    row = only(a, np.array([0, 1, 0], dtype))
    assert (row.changed, row.largest, row.gained) == (1, 1.0, 1)
    assert only(a, a.copy()).what == "same"
    assert only(a[:0], a[:0]).what == "same"


def test_nodes_count_as_what_they_stand_for_and_files_are_read_leaf_by_leaf(tmp_path):
    params = {
        "kernel": jax.random.normal(jax.random.key(0), (64, 32)),
        "b": jnp.ones(3),
    }
    small = jc.quantize_tree(params, bits=4)
    jc.save(tmp_path / "w.jxc", small)
    found = difference(params, open_file(tmp_path / "w.jxc"))
    w, error = params["kernel"], params["kernel"] - small["kernel"].dense()
    expected = float(jnp.linalg.norm(error) / jnp.linalg.norm(w))
    assert found.rows[1].error == pytest.approx(expected, rel=1e-5)
    assert found.rows[0].what == "same"


def test_a_tied_leaf_is_the_leaf_that_it_is_tied_to():
    tree = {"a": jnp.ones((2, 2)), "b": jc.TiedTensor("a", (2, 2), "float32")}
    assert difference(tree, {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}).is_same


@pytest.mark.parametrize(("source", "fault"), [("c", "missing"), ("b", "a circle")])
def test_a_leaf_that_is_tied_to_nothing_is_an_error(source, fault):
    leaves = leaves_of({"b": jc.TiedTensor(source, (1,), "float32")})
    with pytest.raises(ValueError, match=f"{source!r} is {fault}. Pass the whole tree"):
        array_of(leaves, "b")


def test_the_dict_is_plain_and_the_table_takes_paths_as_they_are():
    found = difference({"[bold]w": jnp.zeros(1)}, {"[bold]w": jnp.ones(1)})
    numbers = found.to_dict()
    assert numbers["same"] is False and numbers["total"]["changed"] == 1
    assert numbers["rows"][0]["path"] == "[bold]w" and numbers["rows"][0]["lost"] == 1
    assert "[bold]w" in str(found) and "inf" in str(found)
