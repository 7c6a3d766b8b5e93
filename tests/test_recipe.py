import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.recipe import apply_plan, plan_tree, read_recipe


def drawn(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(dtype)


@pytest.fixture
def params():
    return {
        "encoder": {
            "0": {
                "mlp": {"kernel": drawn(0, (32, 16)), "bias": drawn(1, 16)},
                "norm": {"scale": drawn(2, 16), "table": drawn(3, (4, 16))},
            }
        },
        "head": jnp.asarray(drawn(4, (16, 8))),
        "step": np.int32(3),
        "name": "net",
    }


def rows_of(plan):
    return {row.path: (row.what, row.why) for row in plan.leaves}


def assert_same(a, b):
    """Nodes, dtypes, structure and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_every_leaf_has_a_row_that_says_what_or_why_not(params):
    params["old"] = jc.quantize(drawn(5, (4, 4)))
    params["key"] = jax.random.key(0)
    params["count"] = np.zeros((2, 2), int)
    params["none"] = np.zeros((0, 2), np.float32)
    recipe = {
        **{"bits": 4, "group": 8, "keep": ["*/norm/t*"]},
        "set": {"*/mlp/*": {"clusters": 3}, "*/kernel": {"sparsity": 0.29, "bits": 1}},
    }
    plan = plan_tree(params, recipe)
    assert rows_of(plan) == {
        "count": ("", "not floating"),
        "encoder/0/mlp/bias": ("3 clusters", ""),
        "encoder/0/mlp/kernel": ("29% zeros, 1 bits", ""),
        "encoder/0/norm/scale": ("", "scale"),
        "encoder/0/norm/table": ("", "keep '*/norm/t*'"),
        "head": ("4 bits, group 8", ""),
        "key": ("", "key<fry>"),
        "name": ("", "str"),
        "none": ("", "empty"),
        "old": ("", "already 8 bits symmetric, axis 1"),
        "step": ("", "not floating"),
    }
    small = apply_plan(params, plan)
    kernel = small["encoder"]["0"]["mlp"]["kernel"]
    assert kernel.scale.shape == (16, 1)
    assert int(jnp.sum(kernel.dense() == 0)) == round(0.29 * 512)
    for path in ("old", "name", "step", "count", "none"):
        assert small[path] is params[path]


def test_a_small_plan_by_hand():
    kernel = np.repeat(np.float32([1, -1]), 64).reshape(2, 64)
    plan = plan_tree({"w": kernel, "b": np.zeros(2, np.float32)}, {"clusters": 2})
    # 128 codes of 1 bit, 2 symbols in the coder's table, and a codebook of two floats
    # as planes: 1 + 4 + 4 + 4 + 3 bytes and the values that differ, at most raw + 1.
    entry, codebook = 60 + len("w"), plan.leaves[1].nbytes - (60 + 1) - 16 - 2
    assert 0 < codebook <= 9
    assert plan.leaves[1][:7] == ("w", (2, 64), "float32", 128, "2 clusters", "", 512)
    assert plan.leaves[0][:7] == ("b", (2,), "float32", 2, "", "1-D", 8)
    assert plan.total.size == 130 and plan.total.dense_bytes == 520
    assert plan.total.nbytes == sum(row.nbytes for row in plan.leaves) > entry


# The words of a recipe, and the functions that they stand for.
PRUNE = {
    "": ({}, lambda x: x),
    "half": ({"sparsity": 0.5}, lambda x: masked(x, jc.top_mask(abs(x), 0.5))),
    "2:4": ({"pattern": "2:4"}, lambda x: masked(x, jc.prune.nm_mask(abs(x), 2, 4))),
}
STORE = {
    "": ({}, lambda x: x),
    "4 bits": ({"bits": 4}, lambda x: jc.quantize(x, 4)),
    "groups": ({"bits": 3, "group": 8}, lambda x: jc.quantize(x, 3, group=8)),
    "1 bit": ({"bits": 1}, lambda x: jc.quantize_binary(x, axis=-1)),
    "values": ({"clusters": 5}, lambda x: jc.palettize(x, 5)),
    "rate": ({"rate": 2.5}, lambda x: jc.palettize_to_rate(x, 2.5)),
}


def masked(x, mask):
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def direct(prune, store, x):
    return STORE[store][1](PRUNE[prune][1](jnp.asarray(x)))


CHOICES = st.tuples(st.sampled_from([*PRUNE]), st.sampled_from([*STORE])).filter(any)


@given(CHOICES, CHOICES, st.integers(0, 99))
def test_a_plan_applied_is_its_functions_applied(first, second, seed):
    words, special = ({**PRUNE[p][0], **STORE[s][0]} for p, s in (first, second))
    recipe = {**words, "set": {"b/*": special}, "keep": ["c"]}
    kernels = [drawn(seed + i, (16, 8)) for i in range(3)]
    params = {"a": kernels[0], "b": {"w": kernels[1]}, "c": kernels[2]}
    plan = plan_tree(params, recipe)
    small = apply_plan(params, plan)
    assert_same(small["a"], direct(*first, kernels[0]))
    assert_same(small["b"]["w"], direct(*second, kernels[1]))
    assert small["c"] is kernels[2]
    assert_same(small, apply_plan(params, plan_tree(params, recipe)))
    json.dumps([recipe, plan.to_dict()])


@pytest.mark.parametrize("store", STORE)
@pytest.mark.parametrize("prune", ["half", "2:4"])
def test_pruned_zeros_survive_what_comes_after(prune, store):
    x = drawn(0, (16, 8))
    words = {**PRUNE[prune][0], **STORE[store][0]}
    node = apply_plan({"w": x}, plan_tree({"w": x}, words))["w"]
    zeros = np.asarray(PRUNE[prune][1](jnp.asarray(x)) == 0)
    assert zeros.sum() == 64
    assert not np.asarray(jc.densify({"w": node})["w"])[zeros].any()


@pytest.mark.parametrize(
    ("shape", "axis", "along"),
    [((8, 6), -1, 0), ((6, 8), 0, 1), ((3, 3, 4, 2), 3, 2), ((2, 4, 3, 3), -4, 1)],
)
def test_a_pattern_runs_along_the_axis_next_to_the_kept_one(shape, axis, along):
    x = {"w": drawn(0, shape)}
    found = apply_plan(x, plan_tree(x, {"pattern": "1:2", "axis": axis}))["w"]
    groups = np.moveaxis(np.asarray(found), along, -1).reshape(-1, 2)
    assert np.all(np.count_nonzero(groups, axis=1) == 1)


def test_a_pattern_that_does_not_divide_its_axis_ends_in_a_shorter_group():
    x = {"w": drawn(0, (7, 3))}
    plan = plan_tree(x, {"pattern": "1:4"})
    found = apply_plan(x, plan)["w"]
    mask = jc.prune.nm_mask(abs(x["w"]), 1, 4, along=0)
    np.testing.assert_array_equal(found, jnp.where(mask, x["w"], 0))
    assert np.count_nonzero(found) == 2 * 3
    with pytest.raises(ValueError, match="'s', .* no such axis"):
        scalar = {"w": x["w"], "s": np.float32(2).reshape(())}
        plan_tree(scalar, {"set": {"s": {"pattern": "1:4"}}})


def test_a_vector_shares_one_scale_unless_an_axis_is_given():
    x = {"w": drawn(0, 32), "s": np.float32(2).reshape(())}
    plan = plan_tree(x, {"set": {"*": {"bits": 8}}})
    assert apply_plan(x, plan)["w"].scale.shape == (1, 1)
    plan = plan_tree(x, {"set": {"w": {"bits": 8, "axis": 0}}})
    assert apply_plan(x, plan)["w"].scale.shape == (32, 1)
    assert rows_of(plan)["s"] == ("", "0-D")


def test_the_last_pattern_that_matches_wins_and_stands_alone():
    x = {"ab": drawn(0, (4, 4)), "b": drawn(1, (4, 4))}
    sets = {"a*": {"clusters": 2}, "*b": {"bits": 4}}
    plan = plan_tree(x, {"bits": 8, "group": 2, "set": sets})
    assert rows_of(plan) == {"ab": ("4 bits", ""), "b": ("4 bits", "")}
    plan = plan_tree(x, {"bits": 8, "set": dict(reversed(sets.items()))})
    assert rows_of(plan) == {"ab": ("2 clusters", ""), "b": ("4 bits", "")}
    plan = plan_tree(x, {"set": {"ab": {"bits": 8}}})
    assert rows_of(plan) == {"ab": ("8 bits", ""), "b": ("", "not in 'set'")}


def test_lossless_leaves_every_array_as_it_is_nan_too():
    x = {"w": np.float32([[np.nan, 1]]), "i": np.arange(3), "text": "net"}
    plan = plan_tree(x, {"lossless": True})
    assert rows_of(plan) == {
        **{"i": ("lossless", ""), "text": ("", "str"), "w": ("lossless", "")}
    }
    assert apply_plan(x, plan)["w"] is x["w"]


def test_a_file_says_the_same_as_a_dict(tmp_path, params):
    path = tmp_path / "small.toml"
    path.write_text(
        'bits = 4\ngroup = 8\nkeep = ["*/norm/*"]\n'
        '[set."encoder/*/mlp/*"]\nsparsity = 0.5\nrate = 3\n[set.head]\nlossless = true'
    )
    recipe = {
        **{"bits": 4, "group": 8, "keep": ["*/norm/*"]},
        "set": {
            "encoder/*/mlp/*": {"sparsity": 0.5, "rate": 3},
            "head": {"lossless": True},
        },
    }
    assert read_recipe(path) == recipe == json.loads(json.dumps(recipe))
    small = [
        apply_plan(params, plan_tree(params, r)) for r in (read_recipe(path), recipe)
    ]
    assert_same(*({k: s[k] for k in ("encoder", "head")} for s in small))


def test_a_file_that_is_wrong_is_named(tmp_path):
    path = tmp_path / "small.toml"
    for text, said in (
        ("bits = ", "read_recipe needs TOML: Invalid value"),
        ("bits = 9", "read_recipe needs 'bits' to be an integer from 1 to 8, got 9"),
        ("", "read_recipe needs words such as"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"{said}.*\(in .*small.toml\)"):
            read_recipe(path)
    path.write_bytes(b"\xff = 1")
    with pytest.raises(ValueError, match="needs TOML: 'utf-8' codec"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (None, "needs words such as {'bits': 4, 'group': 64}, got None"),
        ({"keep": ["*"]}, "needs words such as .* got {'keep'"),
        ({"bitz": 4}, "knows no 'bitz', only sparsity, .*, lossless, keep and set"),
        ({"set": {"head": {"keep": 4}}}, "knows no 'keep' of 'head', only sparsity"),
        ({"bits": True}, "'bits' to be an integer from 1 to 8, got True"),
        ({"bits": 4.0}, "'bits' to be an integer from 1 to 8, got 4.0"),
        ({"bits": 4, "group": 0}, "'group' to be an integer of 1 or more, got 0"),
        ({"bits": 4, "axis": "0"}, "'axis' to be an integer such as -1 or 0, got '0'"),
        ({"clusters": 65537}, "'clusters' to be an integer from 1 to 65536, got 65537"),
        ({"rate": float("inf")}, "'rate' to be a number above 0, got inf"),
        ({"rate": float("nan")}, "'rate' to be a number above 0, got nan"),
        ({"sparsity": 1}, r"'sparsity' to be a number in \[0, 1\), got 1"),
        ({"pattern": "5:4"}, "'pattern' to be a text such as '2:4', got '5:4'"),
        ({"pattern": [2, 4]}, r"'pattern' to be a text such as '2:4', got \[2, 4\]"),
        ({"lossless": False}, "'lossless' to be true, or left out, got False"),
        ({"bits": 4, "keep": "head"}, "'keep' to be a list of texts, got 'head'"),
        ({"set": {"head": {}}}, "'set' to give a table of words for each pattern"),
        ({"set": ["head"]}, r"'set' to give a table .* got \['head'\]"),
        (
            {"bits": 4, "clusters": 4},
            r"cannot do \['bits', 'clusters'\] together: leave",
        ),
        ({"bits": 4, "rate": 4}, r"cannot do \['bits', 'rate'\] together"),
        ({"rate": 4, "clusters": 4}, r"cannot do \['clusters', 'rate'\] together"),
        ({"sparsity": 0.5, "pattern": "2:4"}, r"\['pattern', 'sparsity'\] together"),
        ({"lossless": True, "bits": 4}, r"\['bits', 'lossless'\] together"),
        ({"lossless": True, "group": 4}, r"\['group', 'lossless'\] together"),
        ({"clusters": 4, "group": 4}, "needs bits beside 'group', which it is for"),
        (
            {"set": {"head": {"axis": 0}}},
            "needs bits or pattern beside 'axis' of 'head'",
        ),
        (
            {"bits": 4, "keep": ["*/x"]},
            "'\\*/x' matches none of the 7 leaves, which are",
        ),
        ({"set": {"x": {"bits": 4}}}, "'x' matches none .* encoder/0/mlp/bias, "),
        (
            {"keep": ["h*"], "set": {"*d": {"bits": 4}}},
            "'head' .* of '\\*d': keep 'h\\*'",
        ),
        ({"set": {"step": {"bits": 4}}}, "leaf 'step' .* 'step': not floating. Narrow"),
        (
            {"set": {"name": {"lossless": True}}},
            "leaf 'name' .* of 'name': str. Narrow",
        ),
        ({"bits": 4, "axis": 2}, "'axis': 2} to leaf 'encoder/0/mlp/kernel', which is"),
        ({"bits": 4, "axis": -3}, r"float32\[32, 16\]: it has no such axis. Give anot"),
        ({"set": {}}, r"nothing to do: .* 7 leaves alone, .*kernel \(not in 'set'\)"),
        (
            {"sparsity": 0.5, "clusters": 1},
            "palettize needs clusters >= 2 .*mlp/kernel",
        ),
    ],
)
def test_a_recipe_that_cannot_be_done_is_one_clear_error(params, recipe, said):
    with pytest.raises(ValueError, match=f"plan_tree.*{said}|^{said}"):
        plan_tree(params, recipe)


def test_a_bad_value_is_named_by_path_and_index():
    x = {"w": drawn(0, (300, 300))}
    plan = plan_tree(x, {"bits": 4})
    x["w"][2, 1] = np.nan
    said = r"'w' float32\[300, 300\] holds nan at index \(2, 1\) .*out with 'keep'"
    with pytest.raises(ValueError, match=f"Plan.make needs finite values, .*{said}"):
        apply_plan(x, plan)
    x["w"][:] = np.inf
    with pytest.raises(
        ValueError, match=r"plan_tree needs finite.*inf at index \(0, 0"
    ):
        plan_tree(x, {"rate": 3})
    with pytest.raises(ValueError, match="needs a leaf of the plan, got 'v'.* are w"):
        plan.make("v", x["w"])


HEAVY = np.random.default_rng(9).standard_t(4, (512, 640)).astype(np.float32) / 50
COLUMNS = np.exp(np.random.default_rng(8).normal(0, 0.4, 640)).astype(np.float32)
LEAVES = {
    "normal": drawn(0, (512, 640)),
    "heavy": HEAVY,
    "embedding": drawn(1, (512, 640)) * COLUMNS,
    "narrow": drawn(2, (512, 640), jnp.bfloat16),
    "small": drawn(3, (64, 100)),
}


@pytest.mark.parametrize(
    "recipe",
    [
        {"bits": 4, "group": 64},
        {"bits": 4, "group": 100, "axis": 0},
        {"clusters": 16, "set": {"small": {"sparsity": 0.5, "rate": 2}}},
        {"sparsity": 0.5, "bits": 4},
        {"pattern": "2:4"},
        {"lossless": True},
    ],
    ids=str,
)
def test_the_predicted_bytes_are_those_of_the_file(tmp_path, recipe):
    plan = plan_tree(LEAVES, recipe)
    small = apply_plan(LEAVES, plan)
    size = jc.save(tmp_path / "all.jxc", small)
    assert abs(plan.total.nbytes / size - 1) < 0.03
    for row in plan.leaves:
        size = jc.save(tmp_path / "one.jxc", small[row.path])
        assert abs((row.nbytes + 100) / size - 1) < 0.1, row.path


@pytest.mark.parametrize(
    "recipe",
    [{"bits": 4, "group": 64}, {"clusters": 16}, {"rate": 3}, {"sparsity": 0.5}],
    ids=str,
)
def test_of_a_shape_alone_the_bytes_are_the_most_it_may_take(recipe):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), LEAVES)
    most, plan = plan_tree(shapes, recipe), plan_tree(LEAVES, recipe)
    assert rows_of(most) == rows_of(plan)
    for bound, row in zip(most.leaves, plan.leaves, strict=True):
        assert row.nbytes <= bound.nbytes <= bound.dense_bytes + 100
    (row,) = plan_tree({"w": shapes["normal"]}, {"bits": 4, "group": 64}).leaves
    assert row.nbytes == 512 * 640 * (4 + 32 / 64) / 8 + 61


def test_a_node_is_predicted_by_its_codes():
    node = jc.quantize(LEAVES["normal"], 4)
    codes = plan_tree({"a": node, "b": LEAVES["normal"]}, {"bits": 4}).leaves
    assert abs(codes[0].nbytes / codes[1].nbytes - 1) < 0.01


def test_memory_mapped_leaves_are_read_and_not_written(tmp_path):
    tree = {
        "w": drawn(0, (512, 640), jnp.bfloat16),
        "b": drawn(1, 4, jnp.bfloat16),
    }
    jc.write_checkpoint(tmp_path / "w.safetensors", tree)
    held = (tmp_path / "w.safetensors").read_bytes()
    mapped = jc.read_checkpoint(tmp_path / "w.safetensors")
    assert not mapped["w"].flags.writeable and mapped["w"].dtype == jnp.bfloat16
    plans = [plan_tree(x, {"sparsity": 0.5, "bits": 4}) for x in (mapped, tree)]
    assert plans[0].to_dict() == plans[1].to_dict()
    assert_same(apply_plan(mapped, plans[0]), apply_plan(tree, plans[1]))
    assert (tmp_path / "w.safetensors").read_bytes() == held


def test_leaves_of_one_shape_are_compiled_once(caplog):
    x = {name: drawn(i, (24, 40)) for i, name in enumerate("ab")}
    with jax.log_compiles():
        plan = plan_tree(x, {"sparsity": 0.5, "bits": 4, "group": 8})
        compiled = [r for r in caplog.records if "Compiling" in r.getMessage()]
        assert compiled  # for the first leaf, whose sample is all of it
        caplog.clear()
        apply_plan(x, plan)
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]


def test_a_table_shows_paths_with_brackets_and_why():
    x = {"[bold]w": drawn(0, (4, 4)), "b": drawn(1, 4)}
    lines = str(plan_tree(x, {"bits": 4})).splitlines()
    assert any(line.startswith(" [bold]w  4 bits ") for line in lines)
    assert any("left: 1-D" in line and "float32[4]" in line for line in lines)
    assert any(line.split()[:2] == ["total", "80"] for line in lines)
    assert "total" in str(plan_tree({}, {"bits": 4}))


def test_arrays_of_the_other_byte_order_are_the_same_numbers():
    w = drawn(0, (16, 8))
    plan = plan_tree({"w": w.astype(">f4")}, {"bits": 4})
    small = apply_plan({"w": w.astype(">f4")}, plan)
    np.testing.assert_array_equal(small["w"].dense(), jc.quantize(w, 4).dense())
