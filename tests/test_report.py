import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc


@pytest.fixture
def params():
    key = jax.random.key(0)
    return {
        "dense": {"kernel": jax.random.normal(key, (30, 20)), "bias": jnp.zeros(20)},
        "a": {"kernel": jnp.full((4, 4), 2.0)},
        "b": {"kernel": jnp.full((4, 4), 4.0)},
        "key": key,
        "steps": jnp.arange(4).reshape(2, 2),
        "name": "net",
    }


def rows_of(report):
    return {row.path: row for row in report.leaves}


def test_every_leaf_has_a_row_that_says_what_was_done_or_why_not(params):
    tied = jc.tie_layers(params, [("a", "b")])
    small = jc.quantize_tree(tied, bits=4, where=jc.path_matches("dense/kernel"))
    done = {path: row.done for path, row in rows_of(jc.report(small)).items()}
    assert done == {
        "a/kernel": "dense",
        "b/kernel": "tied to a/kernel",
        "dense/bias": "skipped: bias",
        "dense/kernel": "4 bits symmetric, axis 1",
        "key": "skipped: key<fry>",
        "name": "skipped: str",
        "steps": "skipped: not floating",
    }


def test_a_hand_computed_row():
    kernel = jnp.array([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 2.0, 2.0]])
    (row,) = jc.report({"kernel": kernel}).leaves
    assert (row.done, row.shape, row.dtype) == ("pruned", (2, 4), "float32")
    assert (row.size, row.zeros, row.values) == (8, 5, 3)
    assert (row.bits, row.nbytes, row.dense_bytes, row.ratio) == (32, 32, 32, 1.0)
    # 3 of 8 are not zero and take 32 bits each, besides the mask.
    mask = -(3 / 8) * np.log2(3 / 8) - (5 / 8) * np.log2(5 / 8)
    assert row.entropy == pytest.approx(mask + 3 / 8 * 32)


def test_few_values_cost_their_entropy_and_a_table():
    kernel = jnp.tile(jnp.array([1.0, 2.0]), 500).reshape(10, 100)
    (row,) = jc.report({"kernel": kernel}).leaves
    assert row.entropy == pytest.approx(1 + 2 * 32 / 1000)


def test_the_entropy_of_a_node_is_that_of_its_codes_plus_its_other_arrays():
    x = jnp.array([[0.0] * 6 + [1.0, 2.0]])
    (row,) = jc.report({"kernel": jc.palettize(x, 3)}).leaves
    codes = -(6 / 8) * np.log2(6 / 8) - 2 * (1 / 8) * np.log2(1 / 8)
    assert row.entropy == pytest.approx(codes + 2 * 32 / 8)
    assert row.nbytes == 2 + 8  # eight 2-bit codes and two floats
    assert row.values == 3


def test_the_entropy_predicts_the_size_of_the_file(tmp_path):
    weights = {"kernel": jax.random.normal(jax.random.key(1), (500, 200))}
    small = jc.share_tree(
        jc.apply_masks(weights, jc.prune.masks(weights, 0.9)), clusters=8
    )
    coded = jc.report(small).total.entropy * 100_000 / 8
    size = jc.save(tmp_path / "w.jxc", small)
    assert coded < size < 1.01 * coded + 400


def test_the_total_sums_the_leaves(params):
    report = jc.report(params)
    for name in ("size", "zeros", "nbytes", "dense_bytes"):
        assert getattr(report.total, name) == sum(
            getattr(row, name) for row in report.leaves
        )
    assert report.total.ratio == 1.0


def test_the_relative_error_is_that_of_numpy(params):
    small = jc.quantize_tree(params, bits=3)
    report = jc.report(small, params)
    off = np.concatenate(
        [
            np.ravel(jc.densify(small)[k]["kernel"] - params[k]["kernel"])
            for k in ("dense", "a", "b")
        ]
    )
    norm = np.concatenate([np.ravel(params[k]["kernel"]) for k in ("dense", "a", "b")])
    assert report.total.error == pytest.approx(
        np.linalg.norm(off) / np.linalg.norm(norm), rel=1e-5
    )
    assert rows_of(report)["dense/bias"].error == 0.0
    assert rows_of(report)["key"].error is None
    assert "error" in str(report) and "error" not in str(jc.report(small))


def test_an_error_against_a_zero_leaf_is_infinite():
    zeros, ones = {"kernel": jnp.zeros((2, 2))}, {"kernel": jnp.ones((2, 2))}
    assert jc.report(ones, zeros).total.error == np.inf


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int4, bool])
def test_true_widths_of_narrow_dtypes(dtype):
    (row,) = jc.report({"kernel": jnp.ones((4, 4), dtype)}).leaves
    bits = {jnp.bfloat16: 16, jnp.float16: 16, jnp.int4: 4, bool: 8}[dtype]
    assert (row.bits, row.nbytes, row.values) == (bits, 2 * bits, 1)


def test_it_prints_one_line_for_each_leaf_and_one_for_the_total(params):
    lines = str(jc.report(params)).splitlines()
    for path in ("dense/kernel", "dense/bias", "key", "total"):
        assert sum(line.split()[:1] == [path] for line in lines) == 1
    assert any("f32[30,20]" in line and "2,400" in line for line in lines)


def test_it_tells_of_weights_that_moved_from_zero_while_training(params):
    tree = {"kernel": jnp.array([[0.0, 1.0]])}
    state = jc.keep_zeros().init(tree)
    assert "moved" not in str(jc.report(tree, state=state))
    bad = {"deep": [state._replace(stray=jnp.int32(1234))]}
    report = jc.report(tree, state=bad)
    assert report.strays == report.to_dict()["strays"] == 1234
    assert "1,234 weights were found that moved from zero" in str(report)


def test_the_dict_is_plain_and_the_csv_reads_back(params):
    report = jc.report(jc.quantize_tree(params, bits=4))
    as_dict = report.to_dict()
    assert json.loads(json.dumps(as_dict))["total"]["nbytes"] == report.total.nbytes
    rows = list(csv.DictReader(report.to_csv().splitlines()))
    assert [row["path"] for row in rows] == [
        *(row.path for row in report.leaves),
        "total",
    ]
    assert float(rows[-1]["ratio"]) == report.total.ratio
    assert rows[0]["shape"] == "4x4"


def test_empty_leaves_and_empty_trees_have_a_report():
    report = jc.report({"kernel": jnp.zeros((0, 3))})
    assert (report.total.size, report.total.nbytes, report.total.bits) == (0, 0, 0)
    assert jc.report({}).leaves == ()


def test_a_reference_of_other_leaves_is_an_error(params):
    with pytest.raises(ValueError, match="same leaves, .* has 'name'"):
        jc.report(params, {k: v for k, v in params.items() if k != "name"})


def test_a_reference_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"'kernel' is float32\[2, 2\] and there"):
        jc.report({"kernel": jnp.ones((2, 2))}, {"kernel": jnp.ones((2, 3))})
