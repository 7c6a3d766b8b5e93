"""Checkpoints larger than the memory: in and out again leaf by leaf, on all cores."""

import threading
from importlib.metadata import PackageNotFoundError

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxcomp as jc
from jaxcomp import coders
from jaxcomp.storage import container
from jaxcomp.storage import file as files


@pytest.fixture
def always_parallel(monkeypatch):
    monkeypatch.setattr(coders, "_WORTH", 0)
    monkeypatch.setattr(coders, "_SHORT", 1000)
    monkeypatch.setattr(coders, "threads_for", lambda size: 2)


def tree():
    w = np.random.default_rng(0).normal(size=(60, 50)).astype(np.float32)
    tied = {"x": w + 1}
    return {
        "a": [w, w.astype(jnp.bfloat16), np.where(abs(w) < 1, 0, w)],
        "b": jc.quantize(jnp.asarray(w), 4),
        "c": {"step": 3, "name": "x", "bias": np.arange(3.0, dtype=np.float32)},
        "tied": tied | {"y": jc.TiedTensor("tied/x", w.shape, "float32")},
    }


def test_many_threads_and_processes_write_the_same_bytes(tmp_path, always_parallel):
    jc.save(tmp_path / "many.jxc", tree())
    one = tmp_path / "one.jxc"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coders, "threads_for", lambda size: 0)
        jc.save(one, tree())
        alone = jc.load(one)
    assert (tmp_path / "many.jxc").read_bytes() == one.read_bytes()
    many = jc.load(one)
    for x, y in zip(jax.tree.leaves(many), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(x, y)


def test_each_is_asked_once_for_every_leaf_and_its_answer_is_stored(tmp_path):
    asked = []

    def each(path, leaf):
        asked.append(path)
        return jc.quantize(leaf, 4) if path == "w" else leaf

    w = jnp.asarray(tree()["a"][0])
    jc.save(tmp_path / "w.jxc", {"w": w, "n": 3, "z": None}, each=each)
    assert sorted(asked) == ["n", "w"]
    back = jc.load(tmp_path / "w.jxc")
    np.testing.assert_array_equal(back["w"].dense(), jc.quantize(w, 4).dense())
    assert back["n"] == 3


def test_an_error_of_each_leaves_the_old_file_and_no_draft(tmp_path, always_parallel):
    jc.save(tmp_path / "w.jxc", {"old": 1})

    def each(path, leaf):
        if path == "a/1":
            raise ValueError("bad leaf")
        return leaf

    before = threading.active_count()
    with pytest.raises(ValueError, match="bad leaf"):
        jc.save(tmp_path / "w.jxc", tree(), each=each)
    assert jc.load(tmp_path / "w.jxc") == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["w.jxc"]
    assert threading.active_count() == before


def test_a_draft_goes_to_the_disk_when_it_is_large(tmp_path, monkeypatch):
    jc.save(tmp_path / "usual.jxc", tree())
    monkeypatch.setattr("jaxcomp.storage.draft._HELD", 10)
    monkeypatch.setattr("jaxcomp.storage.draft._CHUNK", 7)
    jc.save(tmp_path / "small.jxc", tree())
    assert len(list(tmp_path.iterdir())) == 2
    usual, small = (tmp_path / f"{n}.jxc" for n in ("usual", "small"))
    assert usual.read_bytes() == small.read_bytes()


def test_notes_come_back_and_change_no_leaf(tmp_path):
    path = tmp_path / "w.jxc"
    size = jc.save(path, {"w": jnp.ones(3)})
    notes = {"recipe": {"bits": 4, "set": {"*/mlp": {"bits": 3}}}, "by": "\u00e9\n"}
    assert jc.save(path, {"w": jnp.ones(3)}, notes=notes) < size + 150
    found = jc.read_notes(path)
    assert {key: found[key] for key in notes} == notes
    assert found["jax"] == jax.__version__
    assert jc.load(path)["w"].tolist() == [1, 1, 1]


def test_notes_that_are_no_json_are_refused_and_the_old_file_stays(tmp_path):
    jc.save(tmp_path / "w.jxc", {"old": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        jc.save(tmp_path / "w.jxc", {}, notes={"f": len})
    assert jc.load(tmp_path / "w.jxc") == {"old": 1}


def test_a_changed_note_is_found(tmp_path):
    path = tmp_path / "w.jxc"
    jc.save(path, {"w": jnp.ones(3)}, notes={"by": "somebody"})
    data = path.read_bytes()
    for other in (data.replace(b"some", b"any "), data.replace(b"p_notes", b"p_other")):
        path.write_bytes(other)
        with pytest.raises(jc.FileFault, match="checksum of 'the notes' is wrong"):
            jc.load(path)


@pytest.mark.parametrize("notes", ["[]", "{", '{"a":1,"a":2}'])
def test_notes_that_make_no_sense_are_an_error(tmp_path, notes):
    files.write_file(tmp_path / "w.jxc", "{}", {}, notes)
    with pytest.raises(jc.FileFault, match="its notes make no sense"):
        jc.read_notes(tmp_path / "w.jxc")


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.msgpack", "w", "w.jxc"])
def test_restored_leaves_are_the_dense_ones(tmp_path, name, always_parallel):
    whole = {k: v for k, v in tree().items() if k != "c"}
    if name.endswith("npz"):
        whole["a"].pop(1)  # NumPy has no word for bfloat16
    jc.save(tmp_path / "in.jxc", whole)
    seen = []
    jc.restore_checkpoint(
        tmp_path / "in.jxc", tmp_path / name, seen=lambda *what: seen.append(what)
    )
    back = jax.tree.leaves(jc.read_checkpoint(tmp_path / name))
    dense = jax.tree.leaves(jc.densify(whole))
    assert len(seen) == len(dense)
    assert sum(size for _, size in seen) == sum(x.nbytes for x in dense)
    for x, y in zip(back, dense, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_restoring_what_a_format_cannot_hold_is_an_error_and_leaves_nothing(tmp_path):
    jc.save(tmp_path / "in.jxc", {"name": "x"})
    with pytest.raises(TypeError, match="leaf 'name' is of type str"):
        jc.restore_checkpoint(tmp_path / "in.jxc", tmp_path / "w.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jxc"]


def test_leaves_tell_their_shapes_unread(tmp_path):
    jc.save(tmp_path / "w.jxc", tree())
    leaves = jc.open_file(tmp_path / "w.jxc")
    like = leaves.like("b")
    assert isinstance(like, jc.QTensor)
    assert isinstance(like.codes, jax.ShapeDtypeStruct)
    assert jax.eval_shape(lambda node: node.dense(), like).shape == (60, 50)
    assert leaves.like("c/step") == 3


@pytest.mark.parametrize("size", [4096, 200])
def test_the_fixed_cost_is_600_bytes_a_file_and_64_a_tensor(tmp_path, size):
    """Above what safetensors itself takes for the same bytes, and besides the paths."""
    x = np.random.default_rng(0).integers(0, 256, size, np.uint8)  # nothing to gain
    recipe = {"recipe": {"bits": 4, "group": 64, "keep": ["*/norm/*"]}}
    costs = []
    for n in (1, 101):
        tree = {f"{i:04}": x for i in range(n)}
        whole = jc.save(tmp_path / "w.jxc", tree, notes=recipe)
        plain = len(safetensors.numpy.save(tree if size > 200 else {}))
        costs.append(whole - plain - (0 if size > 200 else n * x.nbytes))
    each = (costs[1] - costs[0]) / 100
    assert each - len("0000") <= 64
    assert costs[0] - each <= 600


def test_a_leaf_that_is_tied_to_nothing_or_to_itself_is_an_error(tmp_path):
    tied = jc.tie_layers({"a": jnp.ones(3), "b": jnp.ones(3)}, [("a", "b")])["b"]
    circle = jc.TiedTensor("b", tied.shape, tied.name)
    for tree, said in (({"b": tied}, "'a' is not"), ({"b": circle}, "'b' is a circle")):
        jc.save(tmp_path / "in.jxc", tree)
        with pytest.raises(jc.FileFault, match=f"leaf 'b' is tied, but {said}"):
            jc.restore_checkpoint(tmp_path / "in.jxc", tmp_path / "w.npz")


def test_a_mapped_leaf_that_was_forgotten_is_read_again(tmp_path):
    w = np.random.default_rng(0).normal(size=(300, 50)).astype(np.float32)
    jc.write_checkpoint(tmp_path / "w.safetensors", {"a": w, "b": w[:7], "c": w[:0]})
    tree = jc.read_checkpoint(tmp_path / "w.safetensors")
    for leaf in tree.values():
        files.forget(leaf)
    np.testing.assert_array_equal(tree["a"], w)
    np.testing.assert_array_equal(tree["b"], w[:7])
    files.forget(w)  # not mapped: nothing happens
    assert w.any()


def test_a_node_whose_fields_do_not_fit_each_other_is_an_error_of_its_leaf(tmp_path):
    node = jc.quantize(jnp.ones((4, 6)), 4)
    odd = jc.QTensor(node.codes, node.scale, None, 4, (7, 5), (1,), 4)
    jc.save(tmp_path / "in.jxc", {"a": jnp.ones(3), "b": odd})
    with pytest.raises(jc.FileFault, match=r"in.jxc damaged: leaf 'b': "):
        jc.restore_checkpoint(tmp_path / "in.jxc", tmp_path / "w.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jxc"]


@pytest.mark.parametrize("mode", ["c", "r+", "r"])
def test_what_was_written_into_a_mapped_array_survives_a_save(tmp_path, mode):
    values = np.arange(20_000, dtype=np.float32)
    values.tofile(tmp_path / "raw")
    mapped = np.memmap(tmp_path / "raw", np.float32, mode=mode)
    if mode != "r":
        mapped[:] = values = values + 1
    jc.save(
        tmp_path / "w.jxc", {"w": mapped, "part": mapped[5:9000], "every": mapped[::-3]}
    )
    np.testing.assert_array_equal(mapped, values)
    back = jc.load(tmp_path / "w.jxc")
    np.testing.assert_array_equal(back["w"], values)
    np.testing.assert_array_equal(back["every"], values[::-3])


def test_a_copy_of_jaxcomp_that_is_not_installed_saves_too(tmp_path, monkeypatch):
    def version(name):
        if name == "jaxcomp":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(container, "version", version)
    jc.save(tmp_path / "w.jxc", {"w": jnp.ones(3)})
    assert "jaxcomp" not in jc.read_notes(tmp_path / "w.jxc")
    assert jc.load(tmp_path / "w.jxc")["w"].tolist() == [1, 1, 1]
