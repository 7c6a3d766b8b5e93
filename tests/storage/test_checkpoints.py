"""Others' checkpoints: each library reads what is written, and is read."""

import json
import os
import pickle
import sys
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.storage import checkpoints, draft, named_arrays
from jaxcomp.storage.checkpoints import read_checkpoint, write_checkpoint
from jaxcomp.storage.draft import DTYPES
from jaxcomp.storage.named_arrays import write_safetensors


ALL = ["w.jxc", "w.safetensors", "w.safetensors.index.json", "w.npz", "w.msgpack", "w"]
WHOLE = ["w.jxc", "w.msgpack", "w", "w.orbax"]  # these hold nodes and keys


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array | None


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


def raw(tree):
    """The structure, static fields included, and the bits of every leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf) for leaf in leaves]
    return treedef, [(a.dtype, a.shape, a.tobytes()) for a in arrays]


def header(entries, data=b"", length=None):
    """A safetensors file by hand."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="U8", shape=(2,), offsets=(0, 2)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# Every format, out and back.


@pytest.mark.parametrize("name", ALL)
def test_nested_dicts_come_back_from_every_format(tmp_path, name):
    tree = {"a": {"kernel": normal((3, 4)), "bias": np.arange(3)}, "b": np.float16([2])}
    size = write_checkpoint(tmp_path / name, tree)
    assert raw(read_checkpoint(tmp_path / name)) == raw(tree)
    whole = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert size == whole
    assert not [p for p in os.listdir(tmp_path) if p.startswith(".")]


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.msgpack", "w.jxc"])
@settings(max_examples=15)
@given(
    st.dictionaries(
        st.text("ab/.", max_size=4),
        st.sampled_from([np.float32, np.int64, np.uint8, np.bool_]).flatmap(
            lambda d: hnp.arrays(d, st.sampled_from([(), (0, 2), (3,), (2, 2)]))
        ),
        max_size=4,
    )
)
def test_any_names_and_values_come_back_by_path(tmp_path_factory, name, tree):
    path = tmp_path_factory.mktemp("any") / name
    write_checkpoint(path, tree)
    assert raw(read_checkpoint(path, like=tree)) == raw(tree)


@pytest.mark.parametrize("name", ALL)
def test_a_linen_model_comes_back_as_it_was(tmp_path, name):
    model = nn.Sequential([nn.Dense(4), nn.LayerNorm(), nn.Dense(2)])
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))
    write_checkpoint(tmp_path / name, params)
    assert raw(read_checkpoint(tmp_path / name)) == raw(params)


@pytest.mark.parametrize("name", ALL)
def test_an_nnx_state_comes_back_and_merges(tmp_path, name):
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(1))
    )
    graph, state = nnx.split(model)
    write_checkpoint(tmp_path / name, state)
    back = read_checkpoint(tmp_path / name, like=jax.eval_shape(lambda: state))
    assert raw(back) == raw(state)
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(nnx.merge(graph, back)(x), model(x))


@pytest.mark.parametrize("name", ALL)
def test_named_tuples_and_lists_come_back_with_like(tmp_path, name):
    state = optax.adam(1e-3).init([jnp.ones((2, 3)), jnp.zeros(2, jnp.float16)])
    tree = {"state": state, "pair": Pair(jnp.arange(2), None)}
    write_checkpoint(tmp_path / name, tree)
    back = read_checkpoint(tmp_path / name, like=tree)
    assert raw(back) == raw(tree)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(back))


@pytest.mark.parametrize("name", WHOLE)
def test_an_nnx_state_with_random_keys_comes_back(tmp_path, name):
    state = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(3)))
    write_checkpoint(tmp_path / name, state)
    back = read_checkpoint(tmp_path / name, like=state)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        assert (a == b).all()


@pytest.mark.parametrize("name", WHOLE)
def test_compressed_trees_come_back_with_their_nodes(tmp_path, name):
    x = jnp.asarray(normal((24, 33)))
    tree = {
        "affine": jc.quantize_affine(x, bits=3, axis=0, group=5),
        "half": jc.quantize(x.astype(jnp.bfloat16), bits=8, axis=None),
        "shared": [jc.palettize(x, 7), jc.TiedTensor("affine", (24, 33), "float32")],
        "empty": (np.zeros((0, 3), np.float32), {}, None, Pair(jnp.ones(2), None)),
        "scalars": {1: True, 2: 3, 3: 0.5, 4: "adam"},
        "sub-byte": {
            str(np.dtype(d)): np.arange(3).astype(d)
            for d in (ml_dtypes.uint2, ml_dtypes.int4, ml_dtypes.float4_e2m1fn)
        },
        "key": jax.random.key(1, impl="rbg"),
    }
    write_checkpoint(tmp_path / name, tree)
    back = read_checkpoint(tmp_path / name)
    assert (back.pop("key") == tree.pop("key")).all()
    assert repr(back.pop("scalars")) == repr(tree.pop("scalars"))
    tree["empty"] = (*tree["empty"][:3], {"first": jnp.ones(2), "second": None})
    assert raw(back) == raw(tree)
    np.testing.assert_array_equal(jc.densify(back)["affine"], tree["affine"].dense())


@pytest.mark.parametrize("name", WHOLE)
def test_a_tree_may_be_one_node_or_empty(tmp_path, name):
    for i, tree in enumerate([jc.quantize(jnp.ones((4, 4))), {}, jnp.ones(2)]):
        (tmp_path / str(i)).mkdir()
        write_checkpoint(tmp_path / str(i) / name, tree)
        assert raw(read_checkpoint(tmp_path / str(i) / name)) == raw(tree)


# safetensors.


def test_a_file_by_hand_is_read(tmp_path):
    path = tmp_path / "hand.safetensors"
    entries = {
        "__metadata__": {"format": "pt"},
        "b.weight": entry("BF16", (2,), (0, 4)),
        "n": entry("I16", (), (4, 6)),
    }
    path.write_bytes(header(entries, bytes.fromhex("803f 00c0 ff7f")))
    back = read_checkpoint(path)
    assert back["b.weight"].dtype == ml_dtypes.bfloat16
    assert back["b.weight"].tolist() == [1.0, -2.0]
    assert back["n"].shape == ()
    assert back["n"] == 32767


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if "float4" not in d])
def test_every_dtype_is_written_as_safetensors_itself_does(tmp_path, dtype):
    path = tmp_path / "w.safetensors"
    bits = np.random.default_rng(0).integers(0, 2, (6, 16), np.uint8)
    x = bits.view(jnp.dtype(dtype))
    tree = {"é/1": x, "b": x[:0], "a": np.float32([1]), "z": x.T, "n": np.int8(3)}
    tree = {name: np.ascontiguousarray(leaf) for name, leaf in tree.items()}
    write_safetensors(path, tree)
    assert path.read_bytes() == safetensors.numpy.save(tree)
    back = named_arrays.read_safetensors(path)[1]
    assert raw(back) == raw(tree)


def test_four_bit_floats_lie_two_in_a_byte_the_first_low(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(header({"w": entry("F4", (2, 2), (0, 2))}, b"\x21\xf7"))
    back = read_checkpoint(path)["w"]
    assert back.astype(np.float32).tolist() == [[0.5, 1.0], [6.0, -6.0]]
    write_checkpoint(tmp_path / "again.safetensors", {"w": back})
    assert (tmp_path / "again.safetensors").read_bytes()[-2:] == b"\x21\xf7"
    with pytest.raises(ValueError, match=r"leaf 'w' is float4_e2m1fn\[1\]: 1 elements"):
        write_checkpoint(path, {"w": back[0, :1]})


def test_bits_of_unknown_order_are_an_error_that_says_so(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(header({"w": entry("F6_E2M3", (4,), (0, 3))}, b"abc"))
    with pytest.raises(ValueError, match="'w' of .* mean, which are F6_E2M3. It knows"):
        read_checkpoint(path)


def test_arrays_are_views_of_the_mapped_file_and_outlive_its_replacement(tmp_path):
    path = tmp_path / "w.safetensors"
    # 3 bytes first: the floats behind them are not aligned.
    entries = {"a": entry("U8", (3,), (0, 3)), "b": entry("F32", (2,), (3, 11))}
    path.write_bytes(header(entries, b"abc" + np.float32([1, 2]).tobytes()))
    back = read_checkpoint(path)
    assert isinstance(back["b"].base.base, np.memmap)
    assert not back["b"].flags.writeable
    write_checkpoint(path, {"new": np.zeros(1000)})
    assert jnp.asarray(back["b"]).tolist() == [1.0, 2.0]
    assert list(read_checkpoint(path)) == ["new"]


def test_our_own_safetensors_are_read_as_such(tmp_path):
    tree = {"w": jc.quantize(jnp.asarray(normal((8, 8)))), "l": [jnp.ones(2)]}
    jc.save(tmp_path / "w.safetensors", tree)
    assert raw(read_checkpoint(tmp_path / "w.safetensors")) == raw(tree)


def test_names_nest_at_slashes_where_they_can(tmp_path):
    path = tmp_path / "w.safetensors"
    for names, keys in [
        (["a/b", "a/c.d", "e.f"], {"a": {"b": 0, "c.d": 0}, "e.f": 0}),
        (["a", "a/b"], {"a": 0, "a/b": 0}),
        (["b/c/d", "b/c"], {"b/c": 0, "b/c/d": 0}),
    ]:
        write_safetensors(path, {name: np.int8(0) for name in names})
        assert jax.tree.map(int, read_checkpoint(path)) == keys


def test_lazy_leaves_are_in_memory_one_at_a_time(tmp_path):
    alive = []

    class Lazy:
        shape, dtype = (4,), np.dtype("float32")

        def __array__(self, dtype=None, copy=None):
            assert not any(ref() is not None for ref in alive)
            x = np.arange(4, dtype=np.float32).view(Tracked)
            alive.append(weakref.ref(x))
            return x

    class Tracked(np.ndarray):
        pass

    tree = {str(i): Lazy() for i in range(3)}
    write_checkpoint(tmp_path / "w.safetensors", tree)
    back = read_checkpoint(tmp_path / "w.safetensors")
    assert [x.tolist() for x in back.values()] == [[0, 1, 2, 3]] * 3


HOSTILE = {
    "no header": b"",
    "short": b"\x01\x00",
    "length over the end": header({}, length=100),
    "length of 2**60": header({}, length=2**60),
    "length of 0": header({}, length=0),
    "no JSON": header(b"{]"),
    "no UTF-8": header(b'{"\xff": 1}'),
    "no object": header([1]),
    "metadata that is no text": header({"__metadata__": {"a": 1}}),
    "deep": header(b'{"a":' * 9999 + b"1" + b"}" * 9999),
    "no fields": header({"a": {}}),
    "unknown dtype": header({"a": entry("F3")}, b"ab"),
    "negative shape": header({"a": entry(shape=[-2])}, b"ab"),
    "fraction": header({"a": entry(shape=[2.0])}, b"ab"),
    "overflow": header({"a": entry(shape=[2**40, 2**40])}, b"ab"),
    "over the end": header({"a": entry(shape=[9], offsets=[0, 9])}, b"ab"),
    "other size": header({"a": entry("F32")}, b"ab"),
    "backwards": header({"a": entry(offsets=[2, 0])}, b"ab"),
    "gap": header({"a": entry(shape=[1], offsets=[1, 2])}, b"ab"),
    "overlap": header({"a": entry(), "b": entry()}, b"ab"),
    "bytes behind": header({"a": entry()}, b"abc"),
    "half a byte": header({"a": entry("F4", [3], [0, 2])}, b"ab"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_one_error(tmp_path, data):
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"needs a whole safetensors file, but .*/w\.s"
    ):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.msgpack"])
@given(st.floats(0, 1), st.integers(1, 255), st.booleans())
def test_damage_gives_a_tree_or_one_error(tmp_path_factory, name, where, flip, cut):
    path = tmp_path_factory.mktemp("damaged") / name
    write_checkpoint(path, {"a": {"b": normal((2, 3))}, "c": np.arange(4)})
    data = bytearray(path.read_bytes())
    at = min(int(where * len(data)), len(data) - 1)
    data[at] ^= flip
    path.write_bytes(data[:at] if cut else data)
    try:
        tree = read_checkpoint(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(tree, dict) or name == "w.msgpack"


# Shards.


def test_shards_and_index_are_those_of_hugging_face(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    tree = {f"l.{i}": np.full(n, i, np.uint8) for i, n in enumerate([6, 6, 2, 9, 2, 2])}
    size = write_checkpoint(index, tree, shard_bytes=8)
    files = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert sorted(os.listdir(tmp_path)) == [*files, index.name]
    # The example of huggingface_hub's documentation: in order, none moved to fit.
    places = dict(zip(tree, [files[i] for i in (0, 1, 1, 2, 3, 3)], strict=True))
    assert json.loads(index.read_text()) == {
        "metadata": {"total_size": 27},
        "weight_map": places,
    }
    for name, file in places.items():
        with safetensors.safe_open(tmp_path / file, framework="numpy") as shard:
            np.testing.assert_array_equal(shard.get_tensor(name), tree[name])
    assert raw(read_checkpoint(index)) == raw(read_checkpoint(tmp_path)) == raw(tree)
    assert size == sum(f.stat().st_size for f in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "makes no sense: TypeError"),
        ("{", "makes no sense: JSONDecodeError"),
        ("{}", "makes no sense: KeyError"),
        ('{"weight_map": 3}', "makes no sense: AttributeError"),
        ('{"weight_map": {"a": 3}}', "makes no sense: TypeError"),
        ('{"weight_map": {"a": "../w.safetensors"}}', "no safetensors file beside it"),
        ('{"weight_map": {"a": "/w.safetensors"}}', "no safetensors file beside it"),
        ('{"weight_map": {"a": ".."}}', "no safetensors file beside it"),
        ('{"weight_map": {"b": "w.safetensors"}}', "needs 'b' to be in w.safetensors"),
    ],
)
def test_an_index_that_makes_no_sense_is_an_error(tmp_path, text, words):
    (tmp_path / "m").mkdir()
    index = tmp_path / "m/w.safetensors.index.json"
    write_safetensors(tmp_path / "m/w.safetensors", {"a": np.zeros(2)})
    write_safetensors(tmp_path / "w.safetensors", {"a": np.zeros(2)})
    index.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_checkpoint(index)


def test_a_missing_shard_is_a_file_not_found(tmp_path):
    index = tmp_path / "w.safetensors.index.json"
    write_checkpoint(index, {"a": np.ones(2), "b": np.ones(2)}, shard_bytes=16)
    (tmp_path / "w-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="w-00002"):
        read_checkpoint(index)


@pytest.mark.parametrize("shard_bytes", [0, -1])
def test_shards_hold_something(tmp_path, shard_bytes):
    with pytest.raises(ValueError, match="needs 1 <= shard_bytes"):
        write_checkpoint(
            tmp_path / "w.safetensors.index.json", {}, shard_bytes=shard_bytes
        )


# npz and msgpack.


def test_numpy_reads_our_npz_and_we_read_its(tmp_path):
    tree = {"a": {"w": normal((2, 3))}, "file": np.arange(3), "n": np.array(True)}
    write_checkpoint(tmp_path / "ours.npz", tree)
    with np.load(tmp_path / "ours.npz") as file:
        assert sorted(file.files) == ["a/w", "file", "n"]
        np.testing.assert_array_equal(file["a/w"], tree["a"]["w"])
    np.savez_compressed(tmp_path / "its.npz", **{"a/w": tree["a"]["w"]})
    assert raw(read_checkpoint(tmp_path / "its.npz")) == raw({"a": tree["a"]})
    write_checkpoint(tmp_path / "again.npz", tree)
    ours, again = tmp_path / "ours.npz", tmp_path / "again.npz"
    assert ours.read_bytes() == again.read_bytes()


def test_npz_has_no_word_for_bfloat16(tmp_path):
    path = tmp_path / "w.npz"
    with pytest.raises(
        TypeError, match=r"leaf 'w', which is bfloat16\[2\].*\.safetens"
    ):
        write_checkpoint(path, {"w": jnp.ones(2, jnp.bfloat16)})
    assert not path.exists()
    np.savez(path, w=np.ones(2, ml_dtypes.bfloat16))
    with pytest.raises(ValueError, match=r"'w' is \|V2\[2\], not numbers"):
        read_checkpoint(path)


class Bomb:
    def __reduce__(self):
        return os._exit, (1,)


def test_a_pickle_in_an_npz_is_not_opened(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, w=np.array([Bomb()], object))
    with pytest.raises(
        ValueError, match="cannot read .*w.npz, which is damaged or not"
    ):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        ValueError, match="cannot read .*w.npz, which is damaged or not"
    ):
        read_checkpoint(path)


def test_flax_reads_our_msgpack_and_we_read_its(tmp_path):
    state = optax.adam(1e-3).init({"w": jnp.ones((2, 3), jnp.bfloat16)})
    tree = {"l": [jnp.ones(2)], "state": state, "step": 3}
    write_checkpoint(tmp_path / "ours.msgpack", tree)
    data = (tmp_path / "ours.msgpack").read_bytes()
    assert data == flax.serialization.to_bytes(tree)
    assert raw(flax.serialization.from_bytes(tree, data)) == raw(tree)
    assert raw(read_checkpoint(tmp_path / "ours.msgpack", like=tree)) == raw(tree)


# Orbax.


def test_orbax_reads_our_folders(tmp_path):
    tree = {"a": {"w": jnp.ones((2, 3), jnp.bfloat16)}, "l": [jnp.arange(3)], "n": 3}
    write_checkpoint(tmp_path / "w", tree)
    with ocp.StandardCheckpointer() as checkpointer:
        back = checkpointer.restore(tmp_path / "w", tree)
    assert raw(back) == raw(tree)


def test_we_read_folders_of_orbax(tmp_path):
    tree = {"a": jnp.ones((2, 3)), "b": [np.arange(3), 2.5], "c": None, "d": {}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", tree)
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(tmp_path / "files", tree)
    with ocp.CheckpointManager(tmp_path / "steps") as manager:
        manager.save(7, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
    for folder in ("plain", "files", "steps/7"):
        back = read_checkpoint(tmp_path / folder)
        assert raw(back) == raw(tree)
        assert type(back["a"]) is np.ndarray
    with pytest.raises(ValueError, match=r"of one tree of Orbax, but .*steps holds 7"):
        read_checkpoint(tmp_path / "steps")


def test_we_read_an_nnx_state_that_orbax_saved(tmp_path):
    state = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "pure", nnx.to_pure_dict(state))
        checkpointer.save(tmp_path / "state", state)
    for name in ("pure", "state"):
        assert raw(read_checkpoint(tmp_path / name, like=state)) == raw(state)


def test_a_folder_is_never_replaced(tmp_path):
    write_checkpoint(tmp_path / "w", {"old": jnp.ones(1)})
    with pytest.raises(FileExistsError, match="w is there already. Remove the old"):
        write_checkpoint(tmp_path / "w", {"new": jnp.ones(1)})
    assert list(read_checkpoint(tmp_path / "w")) == ["old"]
    index = tmp_path / "s/w.safetensors.index.json"
    index.parent.mkdir()
    write_checkpoint(index, {"old": jnp.ones(1)})
    for gone in (index, index.with_name("nothing")):
        gone.unlink(missing_ok=True)
        with pytest.raises(FileExistsError, match="safetensors is there already"):
            write_checkpoint(index, {"new": jnp.ones(1)})


@pytest.mark.parametrize("name", ["/etc", "..", "../v"])
def test_an_orbax_folder_cannot_point_elsewhere(tmp_path, name):
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(tmp_path / "w", {"safe": np.ones(2)})
    about = tmp_path / "w/_METADATA"
    text = about.read_text().replace('"key": "safe"', f'"key": "{name}"')
    about.write_text(text)
    with pytest.raises(ValueError, match="its leaf '.*' lies outside of the folder"):
        read_checkpoint(tmp_path / "w")


def test_paths_that_orbax_cannot_tell_apart_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two are 'a.b'. Rename a key that has a '/'"):
        write_checkpoint(tmp_path / "w", {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(2)})
    assert not os.listdir(tmp_path)


# PyTorch.


def test_without_pytorch_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "w.pt")
    (tmp_path / "w.pt").touch()
    with pytest.raises(
        ImportError, match=r"needs PyTorch to read w\.pt\. Install torch"
    ):
        read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin"])
def test_weights_of_pytorch_are_read(tmp_path, name, legacy):
    torch = pytest.importorskip("torch")
    x = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    tree = {
        "state_dict": {"a.weight": x.T, "b": x.bfloat16(), "c": x.to(torch.int64)},
        # PyTorch cannot read its own float8 from files of before version 1.6.
        "f8": x.to(torch.float32 if legacy else torch.float8_e4m3fn),
        "scalars": [torch.tensor(True), torch.tensor(1 + 2j), torch.zeros(0, 3)],
        "epoch": 3,
    }
    torch.save(tree, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    back = read_checkpoint(tmp_path / name)
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert raw(back) == raw(
        {
            "state_dict": {
                "a.weight": w.T,
                "b": w.astype(ml_dtypes.bfloat16),
                "c": w.astype(np.int64),
            },
            "f8": w.astype(np.float32 if legacy else ml_dtypes.float8_e4m3fn),
            "scalars": [
                np.array(True),
                np.array(1 + 2j, np.complex64),
                np.zeros((0, 3), np.float32),
            ],
            "epoch": 3,
        }
    )
    assert isinstance(back["epoch"], int)


def test_a_state_dict_goes_into_a_tree_by_its_dotted_names(tmp_path):
    tree = {"layers": [{"weight": jnp.zeros((2, 3))}, {"weight": jnp.zeros(2)}]}
    flat = {"layers.0.weight": normal((2, 3)), "layers.1.weight": normal(2)}
    write_safetensors(tmp_path / "w.safetensors", flat)
    back = read_checkpoint(tmp_path / "w.safetensors", like=tree)
    np.testing.assert_array_equal(back["layers"][0]["weight"], flat["layers.0.weight"])
    assert isinstance(back["layers"][1]["weight"], jax.Array)


def test_pickles_of_pytorch_run_nothing(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": Bomb()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="cannot read .*w.pt, which is damaged or not"):
        read_checkpoint(tmp_path / "w.pt")


# `like`, names and what does not fit.


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"a": 0.0, "b": 0, "c": 0}, "only `like` has 'c'"),
        ({"a": jnp.zeros(2)}, "only the file has 'b'"),
        (
            {"a": jnp.zeros(2), "d": 0},
            r"only the file has 'b' \(2 such\). The file's are a",
        ),
        (
            {"a": jnp.zeros(3), "b": 0},
            r"leaf 'a' is float32\[2\] in the file and float32\[3\] in `like`. Change",
        ),
        (
            {"a": jnp.zeros(2, jnp.int32), "b": 0},
            r"leaf 'a' is float32\[2\] in the file and int32\[2\] in `like`",
        ),
        ({"a": 0.0, "b": 0}, r"'a' is of shape \[2\] in the file and of shape \[\] in"),
    ],
    ids=["more", "fewer", "others", "shape", "dtype", "number"],
)
def test_a_like_that_does_not_fit_is_an_error_that_names_the_leaf(
    tmp_path, like, words
):
    write_checkpoint(tmp_path / "w.npz", {"a": np.float32([1, 2]), "b": np.array(3)})
    with pytest.raises(ValueError, match=words):
        read_checkpoint(tmp_path / "w.npz", like=like)


def test_like_checks_the_dtype_of_a_node_and_keeps_functions(tmp_path):
    model = eqx.nn.MLP(2, 2, width_size=4, depth=1, key=jax.random.key(0))
    small = jc.quantize_tree(eqx.filter(model, eqx.is_array), bits=8)
    write_checkpoint(tmp_path / "w.msgpack", small)
    back = read_checkpoint(tmp_path / "w.msgpack", like=model)
    assert back.activation is model.activation
    assert isinstance(back.layers[0].weight, jc.QTensor)
    half = jax.tree.map(
        lambda x: x.astype(jnp.float16) if eqx.is_array(x) else x, model
    )
    with pytest.raises(ValueError, match="is float32.* in the file and float16"):
        read_checkpoint(tmp_path / "w.msgpack", like=half)


def test_names_that_meet_when_dots_are_slashes_are_an_error(tmp_path):
    path, one = tmp_path / "w.safetensors", np.ones(1)
    write_safetensors(path, {"a.b": one, "a/b": one})
    with pytest.raises(ValueError, match="then have the same path. They are a.b, a/b"):
        read_checkpoint(path, like={"a": [one]})
    write_safetensors(path, {"a/b": one})
    with pytest.raises(ValueError, match="then have the same path. They are a.b, a/b"):
        read_checkpoint(path, like={"a": {"b": one}, "a.b": one})


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.safetensors.index.json"])
@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (
            jc.quantize(jnp.ones((2, 2))),
            "leaf 'a/0' is of type QTensor. For a node call",
        ),
        (jax.random.key(0), "can put only arrays of numbers into w"),
        (3, "leaf 'a/0' is of type int"),
        (np.array(["x"]), "leaf 'a/0' is of type ndarray"),
    ],
    ids=["node", "key", "int", "text"],
)
def test_formats_of_plain_arrays_refuse_the_rest(tmp_path, name, leaf, words):
    with pytest.raises(TypeError, match=words):
        write_checkpoint(tmp_path / name, {"a": [leaf]})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["w.msgpack", "w"])
@pytest.mark.parametrize("leaf", [b"x", jnp.tanh, np.array(["x"]), np.array([None])])
def test_a_leaf_of_another_type_is_refused_everywhere(tmp_path, name, leaf):
    with pytest.raises(
        TypeError, match="needs arrays of numbers, nodes .* leaf 'a' is"
    ):
        write_checkpoint(tmp_path / name, {"a": leaf})
    assert not os.listdir(tmp_path)


def test_a_dtype_that_safetensors_lacks_is_refused(tmp_path):
    with pytest.raises(
        TypeError, match=r"that safetensors has, but leaf 'w' is int4\[2"
    ):
        write_checkpoint(tmp_path / "w.safetensors", {"w": jnp.ones(2, jnp.int4)})
    with pytest.raises(ValueError, match="another name for the leaf '__metadata__'"):
        write_checkpoint(tmp_path / "w.safetensors", {"__metadata__": jnp.ones(2)})


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.msgpack", "w"])
def test_two_leaves_of_one_path_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="two are 'a/b'"):
        write_checkpoint(tmp_path / name, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})


def test_a_name_that_says_no_format_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"a name that ends in \.jxc, .*, got w\.h5"):
        write_checkpoint(tmp_path / "w.h5", {})
    with pytest.raises(
        ValueError, match=r"got w\.pt\. PyTorch reads \.safetensors; pic"
    ):
        write_checkpoint(tmp_path / "w.pt", {})
    (tmp_path / "w.h5").touch()
    with pytest.raises(ValueError, match=r"or one of \.jxc, .*, \.bin, got w\.h5"):
        read_checkpoint(tmp_path / "w.h5")
    with pytest.raises(ValueError, match=r"but .* holds w\.h5\. Pass the file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [*ALL, "w.h5"])
def test_what_is_not_there_is_a_file_not_found(tmp_path, name):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("text", ["0 {}", "1 {", '1 {"w":["QTensor",[],{}]}', "1 [7]"])
def test_a_text_that_makes_no_sense_is_an_error(tmp_path, text):
    state = {"jaxcomp": text, "tree": {"w": np.ones(2)}}
    path = tmp_path / "w.msgpack"
    path.write_bytes(flax.serialization.msgpack_serialize(state))
    with pytest.raises(ValueError, match="cannot read .*w.msgpack, which is damaged"):
        read_checkpoint(path)


# Atomic.


@pytest.mark.parametrize("name", [n for n in ALL if n != "w.jxc"])
def test_a_write_that_fails_leaves_what_was_there_and_no_draft(
    tmp_path, monkeypatch, name
):
    (tmp_path / "other").touch()
    files = name in ("w.safetensors", "w.npz", "w.msgpack")
    if files:
        write_checkpoint(tmp_path / name, {"old": np.ones(1)})
    before = sorted(os.listdir(tmp_path))

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        fake = SimpleNamespace(**(vars(os) | {"replace": fail, "rename": fail}))
        patch.setattr(draft, "os", fake)
        patch.setattr(checkpoints, "os", fake)
        write_checkpoint(tmp_path / name, {"new": np.ones(1000)})
    assert sorted(os.listdir(tmp_path)) == before
    if files:
        assert list(read_checkpoint(tmp_path / name)) == ["old"]


def test_paths_may_be_strings_and_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ALL:
        write_checkpoint(name, {"a": np.ones(2)})
        assert raw(read_checkpoint(Path(name))) == raw({"a": np.ones(2)})
    assert zipfile.is_zipfile("w.npz")
