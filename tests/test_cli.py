import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

import jaxcomp as jc
from jaxcomp.cli import app
from jaxcomp.commands import bench
from jaxcomp.node import flatten


runner = CliRunner()


@pytest.fixture
def model(tmp_path):
    """A checkpoint of three leaves, named as PyTorch and somebody odd name them."""
    rng = np.random.default_rng(0)
    tree = {
        "layer.0.weight": rng.standard_normal((32, 64), np.float32),
        "layer.0.bias": rng.standard_normal(32, np.float32),
        "[bold]head.weight": rng.standard_normal((8, 32)).astype(ml_dtypes.bfloat16),
    }
    file = tmp_path / "[red]model.safetensors"
    jc.write_checkpoint(file, tree)
    return file


def run(*args, code=0):
    result = runner.invoke(app, list(map(str, args)))
    assert result.exit_code == code, result.output
    return result


def run_json(*args, code=0):
    """The one JSON object that is all there is on stdout; NaN is not JSON."""
    return json.loads(
        run(*args, "--json", code=code).stdout, parse_constant=pytest.fail
    )


def equal(a, b):
    return all(
        p == q and np.asarray(x).dtype == np.asarray(y).dtype and np.all(x == y)
        for p, x, q, y in zip(*flatten(a)[:2], *flatten(b)[:2], strict=True)
    )


def fault(*args, code=1):
    """The one line on stderr."""
    result = run(*args, code=code)
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_checkpoint_goes_through_all_commands_and_back(model, tmp_path):
    small, back = tmp_path / "[red]small.jxc", tmp_path / "[red]back.safetensors"
    words = ["--bits", "4", "--group", "32", "--axis", "0", "--keep", "*head*"]
    plan = run("compress", model, *words, "--dry-run").stdout
    assert "4 bits, group 32, axis 0" in plan and "keep '*head*'" in plan
    assert "[bold]head.weight" in plan and not small.exists()

    said = run("compress", model, "-o", small, *words).stdout
    size = small.stat().st_size
    assert (
        f"{model} -> {small}" in said and f"{size:,} bytes" in said and "MB/s" in said
    )
    assert "is whole: 3 leaves" in run("verify", small).stdout
    seen = run("inspect", small).stdout
    assert "[bold]head.weight" in seen and "symmetric" in seen
    assert f"{small} (jaxcomp): {size:,} bytes on disk" in seen

    changed = run_json("diff", model, small, code=1)
    assert changed["total"]["changed"] > 2000 and 15 < changed["total"]["sqnr"] < 25
    told = {row["path"]: row["what"] for row in changed["rows"]}
    assert told["layer.0.bias"] == told["[bold]head.weight"] == "same"

    assert f"{small} -> {back}: 3 leaves" in run("restore", small, "-o", back).stdout
    assert run_json("diff", small, back)["same"]
    plain = jc.read_checkpoint(back)
    assert set(plain) == set(jc.read_checkpoint(model))
    assert equal(plain, jc.densify(jc.load(small)))


def test_lossless_comes_back_bit_for_bit_and_is_the_same(model, tmp_path):
    small, back = tmp_path / "w.jxc", tmp_path / "back.safetensors"
    run("compress", model, "-o", small, "--lossless")
    run("restore", small, "-o", back)
    assert back.read_bytes() == model.read_bytes()
    assert "exact" in run("diff", model, small).stdout


# compress


def test_a_dry_run_says_as_json_what_will_be_done_and_writes_nothing(model, tmp_path):
    before = sorted(os.listdir(tmp_path))
    found = run_json("compress", model, "--clusters", "4", "--dry-run")
    assert found["file"] == str(model) and found["recipe"] == {"clusters": 4}
    assert {"path", "what", "why", "shape", "nbytes"} <= found["plan"]["leaves"][
        0
    ].keys()
    assert found["plan"]["total"]["size"] == 32 * 64 + 32 + 8 * 32
    assert sorted(os.listdir(tmp_path)) == before


def test_compress_says_as_json_what_was_done(model, tmp_path):
    out = tmp_path / "w.jxc"
    found = run_json("compress", model, "-o", out, "--bits", "3", "--sparsity", "0.5")
    assert found["recipe"] == {"bits": 3, "sparsity": 0.5}
    assert found["bytes_before"] == model.stat().st_size
    assert found["bytes_after"] == out.stat().st_size
    assert found["ratio"] == found["bytes_before"] / found["bytes_after"]
    assert found["seconds"] > 0
    assert np.mean(jc.load(out)["layer.0.weight"].dense() == 0) >= 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "*head*=bits:3,group:16"], {"bits": 3, "group": 16}),
        (["--set", "*head*=pattern:2:4"], {"pattern": "2:4"}),
        (["--set", "*head*=rate:2.5"], {"rate": 2.5}),
        (["--set", "*head*=lossless"], {"lossless": True}),
        (["--set", "*head*=lossless:true"], {"lossless": True}),
    ],
)
def test_set_says_other_words_for_some_leaves(model, options, words):
    found = run_json("compress", model, "--bits", "4", *options, "--dry-run")
    assert found["recipe"] == {"bits": 4, "set": {"*head*": words}}


def test_a_recipe_file_does_what_its_words_do_as_options(model, tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        'bits = 4\nkeep = ["*head*"]\n[set."layer*weight"]\nclusters = 8\n'
    )
    words = ["--bits", 4, "--keep", "*head*", "--set", "layer*weight=clusters:8"]
    run("compress", model, "-o", tmp_path / "a.jxc", "--recipe", recipe)
    run("compress", model, "-o", tmp_path / "b.jxc", *words)
    assert (tmp_path / "a.jxc").read_bytes() == (tmp_path / "b.jxc").read_bytes()


def test_flax_msgpack_holds_nodes_too(model, tmp_path):
    run("compress", model, "-o", tmp_path / "w.msgpack", "--bits", "4")
    assert isinstance(
        jc.read_checkpoint(tmp_path / "w.msgpack")["layer.0.weight"], jc.QTensor
    )
    run("restore", tmp_path / "w.msgpack", "-o", tmp_path / "w.npz", code=1)  # bfloat16
    run("restore", tmp_path / "w.msgpack", "-o", tmp_path / "w.safetensors")
    assert run_json("diff", tmp_path / "w.msgpack", tmp_path / "w.safetensors")["same"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "say what to do"),
        (["--bits", "4", "--recipe", "r.toml"], "leave out --bits"),
        (["--bits", "4", "--set", "*head*"], "--set needs PATTERN=WORDS"),
        (["--bits", "4", "--set", "=bits:3"], "--set needs PATTERN=WORDS"),
        (["--bits", "4"], "-o needs a name that ends in"),
        (["--bits", "4", "-o", "w.safetensors"], "got w.safetensors"),
        (["--bits", "four"], "--bits"),
        (["--none"], "No such option"),
    ],
)
def test_wrong_options_are_wrong_usage(model, options, said):
    result = run("compress", model, *options, code=2)
    assert said in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bits", "9"], "an integer from 1 to 8, got 9"),
        (["--bits", "4", "--keep", "none/*"], "'none/*' matches none of the 3 leaves"),
        (["--bits", "4", "--set", "*head*=size:3"], "'size'"),
        (["--bits", "4", "--clusters", "4"], "'bits'"),
        (["--recipe", "none.toml"], "No such file"),
    ],
)
def test_what_no_recipe_can_be_is_one_line_and_nothing_is_written(
    model, tmp_path, options, said
):
    before = sorted(os.listdir(tmp_path))
    assert said in fault("compress", model, "-o", tmp_path / "w.jxc", *options)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_nan_is_one_line_that_names_its_leaf_and_nothing_is_written(tmp_path):
    file = tmp_path / "w.npz"
    jc.write_checkpoint(file, {"kernel": np.full((4, 4), np.nan, np.float32)})
    said = fault("compress", file, "-o", tmp_path / "w.jxc", "--bits", "4")
    assert "'kernel'" in said and "nan" in said
    assert os.listdir(tmp_path) == ["w.npz"]


def test_an_interrupt_leaves_no_draft_and_the_old_file(model, tmp_path, monkeypatch):
    small, back = tmp_path / "w.jxc", tmp_path / "back.safetensors"
    run("compress", model, "-o", small, "--bits", "4")
    before, names = small.read_bytes(), sorted(os.listdir(tmp_path))

    def interrupt(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    for args in (
        ["compress", model, "-o", small, "--bits", 3],
        ["restore", small, "-o", back],
    ):
        assert runner.invoke(app, list(map(str, args))).exit_code != 0
        assert small.read_bytes() == before and sorted(os.listdir(tmp_path)) == names


# restore


@pytest.mark.parametrize(
    "name", ["w.npz", "w.msgpack", "w.jxc", "w.safetensors.index.json", "w.orbax"]
)
def test_arrays_are_restored_into_any_format(tmp_path, name):
    tree = {"a": {"kernel": jnp.arange(64.0).reshape(8, 8)}, "b": jnp.arange(3)}
    jc.save(tmp_path / "small.jxc", jc.quantize_tree(tree, bits=4))
    found = run_json("restore", tmp_path / "small.jxc", "-o", tmp_path / name)
    assert found["leaves"] == 2 and found["bytes_after"] > 0 and found["seconds"] > 0
    back = jc.read_checkpoint(tmp_path / name)
    assert equal(back, jc.densify(jc.load(tmp_path / "small.jxc")))


def test_tied_leaves_are_restored_as_the_arrays_that_they_are(tmp_path):
    tree = {"a": jnp.ones((2, 2)), "b": jc.TiedTensor("a", (2, 2), "float32")}
    jc.save(tmp_path / "w.jxc", tree)
    run("restore", tmp_path / "w.jxc", "-o", tmp_path / "w.npz")
    np.testing.assert_array_equal(jc.read_checkpoint(tmp_path / "w.npz")["b"], 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [("w.pt", "needs a name that ends in"), ("w.npz", "is of type int")],
)
def test_what_a_format_cannot_hold_is_one_line(tmp_path, name, said):
    jc.save(tmp_path / "w.jxc", {"kernel": jnp.ones(3), "step": 3})
    assert said in fault("restore", tmp_path / "w.jxc", "-o", tmp_path / name)
    assert os.listdir(tmp_path) == ["w.jxc"]


# inspect


def test_inspect_gives_numbers_as_json(model):
    found = run_json("inspect", model)
    assert found["file"] == str(model) and found["format"] == "safetensors"
    assert found["bytes"] == model.stat().st_size and found["notes"] == {}
    leaf = next(x for x in found["leaves"] if x["path"] == "layer.0.weight")
    assert leaf["shape"] == [32, 64] and leaf["dtype"] == "float32"
    assert leaf["size"] == 2048 and leaf["hint"] == "4 bits: 12%"
    assert found["total"]["nbytes"] == 4 * 2048 + 4 * 32 + 2 * 256


def test_inspect_says_what_the_file_says_of_itself(model, tmp_path):
    run("compress", model, "-o", tmp_path / "w.jxc", "--sparsity", "0.5")
    notes = run_json("inspect", tmp_path / "w.jxc")["notes"]
    assert notes["recipe"] == {"sparsity": 0.5}
    assert notes["jaxcomp"] == "0.1.0"
    assert "recipe: {'sparsity': 0.5}" in run("inspect", tmp_path / "w.jxc").stdout


def test_inspect_opens_every_format(tmp_path):
    tree = {"kernel": np.ones((64, 64), np.float32)}
    for name in ("w.npz", "w.msgpack", "w.jxc", "w.safetensors.index.json", "w.orbax"):
        jc.write_checkpoint(tmp_path / name, tree)
        found = run_json("inspect", tmp_path / name)
        assert found["total"]["size"] == 4096 and found["bytes"] > 100
    assert found["format"] == "folder"


def test_a_leaf_with_a_nan_is_told(tmp_path):
    jc.write_checkpoint(tmp_path / "w.npz", {"kernel": np.array([np.nan, 1.0])})
    assert "1 NaN or inf" in run("inspect", tmp_path / "w.npz").stdout
    assert run_json("inspect", tmp_path / "w.npz")["total"]["odd"] == 1


def test_the_report_takes_paths_as_they_are():
    assert "[bold]w" in str(jc.report({"[bold]w": jnp.ones(3)}))


# diff and verify


def test_diff_ends_as_that_of_unix_does(model, tmp_path):
    assert "exact" in run("diff", model, model, code=0).stdout
    other = tmp_path / "w.npz"
    jc.write_checkpoint(other, {"layer.0.bias": np.zeros(32, np.float32)})
    assert "only in the first" in run("diff", model, other, code=1).stdout
    assert "none.npz" in fault("diff", model, tmp_path / "none.npz", code=2)


def test_diff_says_null_where_there_is_no_finite_number(model):
    found = run_json("diff", model, model)
    assert found["same"] is True and found["total"]["sqnr"] is None
    assert found["a"] == found["b"] == str(model)


@pytest.mark.parametrize("name", ["w.jxc", "w.safetensors", "w.npz", "w.msgpack"])
def test_verify_finds_a_file_that_is_cut_off(tmp_path, name):
    file = tmp_path / name
    jc.write_checkpoint(file, {"kernel": np.arange(5000.0)})
    found = run_json("verify", file)
    assert found["ok"] and found["leaves"] == 1 and found["bytes"] > 40_000 / 9
    assert found["checksums"] is (name == "w.jxc")
    file.write_bytes(file.read_bytes()[:-1])
    assert str(file) in fault("verify", file)
    found = run_json("verify", file, code=1)
    assert found["ok"] is False and str(file) in found["fault"]


def test_verify_finds_a_flipped_bit_of_our_own_files(tmp_path):
    file = tmp_path / "w.jxc"
    jc.save(file, {"kernel": jnp.arange(5000.0), "bias": jnp.ones(3)})
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert "the checksum of" in fault("verify", file)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_file_that_is_not_there_or_of_no_known_format_is_one_line(tmp_path, command):
    assert "No such file" in fault(command, tmp_path / "[red]none.jxc")
    (tmp_path / "w.txt").write_text("weights")
    assert "needs a folder, or a name that ends in" in fault(
        command, tmp_path / "w.txt"
    )


# bench


def test_bench_measures_every_stream_and_both_products():
    found = bench.measure(4096, 2)
    assert [row.symbols for row in found.streams] == [4096] * 3
    for row in found.to_dict()["streams"]:
        assert row["encode_msymbols"] > 0 and row["decode_mb"] > 0
        assert 0 < row["coded"] < row["nbytes"]
    dot = found.to_dict()["dot"]
    assert dot["ratio"] == pytest.approx(dot["int8_s"] / dot["float32_s"])
    assert "bfloat16, lossless" in str(found) and "1024x1024" in str(found)


def test_the_command_shows_what_was_measured(monkeypatch):
    monkeypatch.setattr(
        bench, "measure", lambda size, repeats, f=bench.measure: f(999, 1)
    )
    assert run_json("bench")["streams"][1]["symbols"] == 999
    assert "M/s" in run("bench").stdout


def test_every_command_says_what_it_does():
    shown = run("--help").stdout
    for name in ("demo", "inspect", "compress", "restore", "diff", "verify", "bench"):
        assert name in shown
        assert "--json" in run(name, "--help").stdout or name == "demo"
