from collections import Counter

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.entropy import order0_entropy
from jaxcomp.inspection import inspect_tree, sparkline
from jaxcomp.storage.container import open_file
from jaxcomp.storage.planes import encode_array


def only(leaf):
    return inspect_tree({"w": leaf}).leaves[0]


def test_one_leaf_by_hand():
    row = only(np.array([[0.0, -2.0, 4.0, 4.0]], np.float32))
    assert (row.what, row.shape, row.dtype) == ("float32", (1, 4), "float32")
    assert (row.size, row.zeros, row.distinct, row.entropy) == (4, 1, 3, 1.5)
    assert (row.low, row.high, row.odd, row.nbytes) == (-2.0, 4.0, 0, 16)
    # Bins of 0.5 from -2 to 4.
    assert row.histogram == (1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2)


@given(hnp.arrays(np.float32, (6, 5), elements=st.floats(-9, 9, width=16)))
def test_the_numbers_are_those_of_a_plain_count(x):
    row = only(x)
    counts = Counter(x.reshape(-1).tolist())  # -0.0 is 0.0
    assert row.zeros == counts[0.0]
    assert row.distinct == len([n for n in counts.values() if n])
    assert row.entropy == pytest.approx(order0_entropy(np.array([*counts.values()])))
    assert (row.low, row.high) == (x.min(), x.max())
    assert sum(row.histogram) == x.size
    assert 0 < row.coded <= row.nbytes == 120


def test_what_is_sampled_says_so_and_is_near_the_truth():
    x = np.random.default_rng(0).integers(0, 16, 3 << 20).astype(np.float32)
    x[-1] = -7
    row = only(x)
    assert row.is_sampled and row.distinct in (16, 17)
    assert row.entropy == pytest.approx(4, abs=0.01)
    assert row.zeros == np.sum(x == 0) and row.low == -7  # these are exact
    assert row.coded == pytest.approx(len(encode_array(x)), rel=0.01)


def test_far_values_are_counted_in_the_outermost_bins():
    x = np.concatenate([np.linspace(-1, 1, 10_000), [1e4]]).astype(np.float32)
    assert only(x).histogram[-1] == 1  # 4 standard deviations are 400
    assert only(x).high == 1e4


def test_nans_and_infinities_are_counted_and_left_out_of_the_range():
    row = only(np.array([np.nan, 1.0, np.inf, -np.inf, 3.0], np.float32))
    assert (row.odd, row.low, row.high) == (3, 1.0, 3.0)
    assert "3 NaN or inf" in str(inspect_tree({"w": np.array([np.nan] * 3)}))
    nothing = only(np.array([np.nan]))
    assert (nothing.low, nothing.high, nothing.histogram) == (None, None, ())


@pytest.mark.parametrize(
    "dtype",
    [bool, np.uint8, np.int64, np.float16, jnp.bfloat16, jnp.int4, np.complex64],
)
def test_every_dtype_is_counted(dtype):
    row = only(np.array([0, 1, 1, 0, 1], dtype))
    assert (row.zeros, row.distinct, row.low, row.high) == (2, 2, 0.0, 1.0)


def test_sub_byte_values_take_what_they_take():
    assert only(np.zeros(9, jnp.int4)).nbytes == 5


@pytest.mark.parametrize("x", [np.zeros((0, 3)), np.full(9, 2.5), np.array(1.5)])
def test_empty_constant_and_single_leaves_are_no_trouble(x):
    row = only(x)
    assert row.size == x.size and sum(row.histogram) == x.size
    assert str(inspect_tree({"w": x}))


def test_the_range_of_a_float64_is_no_trouble():
    big = np.finfo(np.float64).max
    row = only(np.array([-big, 0.0, big]))
    assert (row.low, row.high) == (-big, big) and sum(row.histogram) == 3


def test_a_node_is_described_and_its_codes_are_counted():
    w = jax.random.normal(jax.random.key(0), (64, 128))
    q = jc.quantize(w, bits=4)
    row = only(q)
    assert row.what == q.describe() and row.dtype == "float32"
    assert row.nbytes == -(-q.nbits() // 8) and row.coded < row.nbytes
    codes = Counter(
        np.rint(np.asarray(q.dense()) / np.asarray(q.scale).reshape(-1)).flat
    )
    assert row.entropy == pytest.approx(order0_entropy(np.array([*codes.values()])))
    assert row.zeros == int(jnp.sum(q.dense() == 0))


def test_the_numbers_agree_with_the_report():
    w = jax.random.normal(jax.random.key(0), (64, 128))
    tree = {"a": jc.palettize(w, clusters=8), "b": jc.quantize(w, bits=3), "c": w}
    for ours, theirs in zip(
        inspect_tree(tree).leaves, jc.report(tree).leaves, strict=True
    ):
        assert (ours.path, ours.shape, ours.dtype) == theirs[:1] + theirs[2:4]
        assert (ours.zeros, ours.distinct) == (theirs.zeros, theirs.values)
        assert ours.nbytes == theirs.nbytes


def test_a_tied_leaf_holds_nothing():
    tree = {"a": jnp.ones((2, 2)), "b": jc.TiedTensor("a", (2, 2), "float32")}
    row = inspect_tree(tree).leaves[1]
    assert "a" in row.what and (row.size, row.nbytes) == (0, 0)


def test_numbers_strings_and_keys_are_listed():
    tree = {"key": jax.random.key(0), "name": "net", "step": 3}
    rows = inspect_tree(tree).leaves
    assert [row.what for row in rows] == ["key<fry>", "str", "int"]
    assert "key<fry>" in str(inspect_tree(tree))


def test_the_hint_says_what_would_make_a_leaf_smaller():
    rng = np.random.default_rng(0)
    tree = {
        "bias": np.ones(9),
        "ids": np.arange(4096),
        "kernel": rng.standard_normal((64, 64), np.float32),
        "nan": np.full((64, 64), np.nan, np.float32),
        "noise": rng.integers(0, 256, 8192).astype(np.uint8),
        "zeros": np.zeros((64, 64), np.float32),
    }
    hints = {row.path: row.hint for row in inspect_tree(tree).leaves}
    assert hints["bias"] == "small"
    assert hints["kernel"] == "4 bits: 12%"
    assert hints["noise"] == "noise"
    for name in ("ids", "nan", "zeros"):
        assert hints[name].startswith("lossless: ")


def test_files_are_inspected_leaf_by_leaf(tmp_path):
    tree = jc.quantize_tree({"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)})
    jc.save(tmp_path / "w.jxc", tree)
    assert inspect_tree(open_file(tmp_path / "w.jxc")) == inspect_tree(tree)


def test_the_dict_is_plain_and_has_sums():
    found = inspect_tree({"[red]a": np.zeros(4, np.float32), "b": np.ones(2, np.int8)})
    total = found.to_dict()["total"]
    assert total["size"] == 6 and total["zeros"] == 4
    assert total["nbytes"] == total["dense_bytes"] == found.dense_bytes == 18
    assert found.to_dict()["leaves"][0]["path"] == "[red]a"
    assert "[red]a" in str(found)


def test_all_columns_of_a_large_model_fit_in_110():
    x = np.random.default_rng(0).standard_normal((30522, 48), np.float32)
    q = jc.quantize(jnp.asarray(x[:4096]), bits=4, axis=0, group=16)
    name = "encoder.layer.11.attention.output.LayerNorm.weight"
    lines = str(inspect_tree({name: x - 1.25, name * 2: q})).splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[1].split()[-2:] == ["bytes", "coded"]
    assert all(line.rstrip().endswith("%") for line in lines if "[" in line)


def test_the_sparkline_shows_every_count_that_is_not_zero():
    assert sparkline((0, 1, 8, 4)) == " ▁█▄"
    assert sparkline((0, 1, 1_000_000)) == " ▁█"
    assert sparkline((0, 0)) == "  " and sparkline(()) == ""
