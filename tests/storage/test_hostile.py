"""Files from anybody: the right tree or one error, in bounded memory and time."""

import importlib.util
import json
import math
import os
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp import bits as packing
from jaxcomp.entropy import encode_symbols, encode_varint
from jaxcomp.storage.container import load, open_file, save
from jaxcomp.storage.file import FileFault, byte_size, read_file, write_file
from jaxcomp.storage.planes import decode_array, decode_codes, encode_array


WORK = 1 << 26  # bytes that reading may take besides the arrays
BLOCK = 1 << 22  # symbols


def script():
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.jxc"


def zeros(count):
    """A stream of ``count`` zeros, in two bytes for each four million."""
    return encode_varint(count) + bytes(2 * math.ceil(count / BLOCK))


def field(data):
    return encode_varint(len(data)) + data


def pool(*parts):
    return {"__pool__": np.frombuffer(b"".join(map(field, parts)), np.uint8)}


def peak_of(function):
    """What a function returns, and the bytes that it took at its worst."""
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# The header. Nothing in it is believed.


def file_of(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(first, last, shape=(1,), dtype="U8"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "its header should have 0 bytes"),
        (b"\x09" + bytes(7) + b"{}", "its header should have 9 bytes"),
        ((2**60).to_bytes(8, "little") + b"{}", f"should have {2**60} bytes"),
        (b"\xff" * 8 + b"{}", f"should have {2**64 - 1} bytes"),
        (file_of(b"\xff\xfe"), "'utf-8' codec can't decode byte 0xff"),
        (file_of(b"{"), "Expecting property name"),
        (file_of(b"[]"), "its header is not a JSON object"),
        (file_of(b'{"a":' + 99_999 * b"["), "it is nested too deeply"),
        (file_of(b'{"a":' + 5000 * b"9" + b"}"), "integer string conversion"),
        (file_of(b'{"a":1,"a":2}'), r"a name occurs twice among \['a'\]"),
        (file_of({"a": 5}), "it says of tensor 'a' no more than 5"),
        (file_of({"a": {**entry(0, 1), "dtype": None}}, b"x"), "no more than {'data"),
        (file_of({"a": entry(-1, 1)}, b"x"), "it says of tensor 'a' no more than"),
        (file_of({"a": entry(1, 0)}, b"x"), "it says of tensor 'a' no more than"),
        (file_of({"a": entry(0.0, 1)}, b"x"), "it says of tensor 'a' no more than"),
        (file_of({"a": entry(0, math.nan)}, b"x"), "it says of tensor 'a' no more"),
        (file_of({"a": entry(0, 2**80)}, b"x"), "'a' should have the bytes 0 to 1208"),
        (file_of({"a": entry(0, 1), "b": entry(0, 1)}, b"x"), "but byte 1 is next"),
        (file_of({"a": entry(0, 1), "b": entry(2, 3)}, b"xyz"), "but byte 1 is next"),
        (file_of({"a": entry(1, 2)}, b"xy"), "but byte 0 is next"),
        (file_of({"a": entry(0, 1)}, b"xy"), "its tensors have 1 of 2 bytes"),
        (file_of({"\n\x1b[1m": 5}), r"says of tensor '\\n\\x1b\[1m' no more than 5"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_a_header_that_makes_no_sense_is_one_error_with_file_and_fault(
    path, data, fault
):
    path.write_bytes(data)
    for read in (load, open_file, read_file):
        with pytest.raises(FileFault, match=fault) as error:
            read(path)
        assert f"{path} ({len(data)} bytes) is cut off, damaged" in str(error.value)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"shape": [2, 2]}, r"'a' has 3 bytes, but uint8\[2, 2\] takes 4"),
        ({"dtype": "F32"}, r"'a' has 3 bytes, but float32\[3\] takes 12"),
        ({"shape": [-1, -3]}, r"of tensor 'a', \[-1, -3\] is not the shape"),
        ({"shape": [3.0]}, r"of tensor 'a', \[3.0\] is not the shape of an array"),
        ({"shape": [True, 3]}, "is not the shape of an array"),
        ({"shape": [1] * 99 + [3]}, "is not the shape of an array"),
        ({"shape": [2**40, 2**40]}, "fits no memory"),
        ({"shape": [2**60, 0]}, "fits no memory"),
        ({"dtype": "F8_E8M0"}, "needs dtypes of version 2 of the format, but 'a' of"),
    ],
    ids=str,
)
def test_a_tensor_whose_shape_does_not_fit_its_bytes_is_named(path, change, fault):
    fuzz = script()
    header = {"a": entry(0, 3, [3]) | change}
    path.write_bytes(fuzz.seal('{"a":0}', header, {"a": b"xyz"}))
    with pytest.raises(FileFault, match=fault) as error:
        load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("metadata", [None, 5, [], {}, {"jaxcomp": 5}, {"other": "1 "}])
def test_a_file_without_our_metadata_is_somebody_elses(path, metadata):
    path.write_bytes(file_of({"__metadata__": metadata}))
    with pytest.raises(FileFault, match="is plain safetensors with 0 tensors"):
        load(path)


@pytest.mark.parametrize("version", ["3", "1" * 5000, "\u0661"])
def test_another_version_is_said_in_few_words(path, version):
    path.write_bytes(file_of({"__metadata__": {"jaxcomp": f"{version} 00000000 {{}}"}}))
    with pytest.raises(FileFault, match="is of version .{1,20}. Update"):
        load(path)


def test_as_many_checksums_as_tensors_are_needed(path):
    save(path, {"w": jnp.ones(2)})
    data = path.read_bytes()
    assert data.count(b'"jaxcomp":"2 ') == 1
    path.write_bytes(data.replace(b'"jaxcomp":"2 ', b'"jaxcomp":"2  '))
    with pytest.raises(FileFault):
        load(path)
    path.write_bytes(
        file_of({"__metadata__": {"jaxcomp": "2 00000000abcdef0102030405 {}"}})
    )
    with pytest.raises(FileFault, match="it has 3 checksums for 0 tensors. Fetch"):
        load(path)


def test_a_header_that_would_fill_the_memory_is_refused(path):
    text = json.dumps({"__metadata__": {"x": ""}, "y": [[]] * 999_999}).encode()
    path.write_bytes(file_of(text))

    def read():
        with pytest.raises(FileFault, match=r"pass max_bytes=19\d{7}\.$"):
            load(path, max_bytes=2**20)

    assert peak_of(read)[1] < 2**20


# The structure. Its checksums are right: no accident makes such a file, somebody did.

ARRAY = np.arange(3, dtype=np.uint8)
CODED = field(encode_array(ARRAY))
BLOB = {"a": np.frombuffer(CODED, np.uint8)}
NODE = [4, [6], [], 6]  # bits, shape, axis, group
CODES = field(encode_symbols(ARRAY))


@pytest.mark.parametrize(
    ("structure", "tensors", "fault"),
    [
        ({"a": 0}, {}, "leaf 'a': it has no array"),
        ({"a": ["array", {"": [3]}]}, {}, "leaf 'a': 'a' is not a uint8 tensor of one"),
        ({"a": ["array", {"": [3]}, 0]}, {}, "leaf 'a': '__pool__' is not a uint8"),
        ({"a": ["array", {"": [3]}]}, {"a": np.ones(3)}, "'a' is not a uint8 tensor"),
        ({"a": ["array", {}]}, BLOB, "leaf 'a': it has no array"),
        ({"a": ["array", {"b": [3]}]}, BLOB, r"it cannot have all of \['b'\]"),
        ({"a": ["array", {"": 3}]}, BLOB, "leaf 'a': 3 is no shape"),
        ({"a": ["array", {"": [-3]}]}, BLOB, r"\[-3\] is not the shape of an array"),
        ({"a": ["array", {"": [math.nan]}]}, BLOB, r"\[nan\] is not the shape of an"),
        ({"a": ["array", {"": [True]}]}, BLOB, r"\[True\] is not the shape of an"),
        ({"a": ["array", {"": [10**30]}]}, BLOB, "fits no memory"),
        ({"a": ["array", {"": [2**60, 0]}]}, BLOB, "fits no memory"),
        ({"a": ["array", {"": ["O", 3]}]}, BLOB, "'O' is no dtype of an array"),
        ({"a": ["array", {"": ["object", 3]}]}, BLOB, "'object' is no dtype of"),
        ({"a": ["array", {"": ["(9,)i4", 3]}]}, BLOB, r"'\(9,\)i4' is no dtype"),
        ({"a": ["array", {"": ["float128", 3]}]}, BLOB, "'float128' is no dtype|under"),
        ({"a": ["array", {"": ["zzz", 3]}]}, BLOB, "data type 'zzz' not understood"),
        ({"a": ["array", {"": [3]}, -1]}, BLOB, "are no fields"),
        ({"a": ["array", {"": [3]}, 0.5]}, BLOB, "are no fields"),
        ({"a": ["array", {"": [3]}, 0, 0]}, BLOB, "are no fields"),
        ({"a": ["array", {"": [3]}], "b": {"a": 0}}, BLOB, "leaf 'b/a': it has no"),
        ({"b": ["value", 1]}, BLOB, "no leaf has the tensor 'a'"),
        ({"a": {"b": 0}, "a/b": 0}, {"a/b": ARRAY}, "'a/b': another has the same path"),
        (
            {"a": ["SharedTensor", [False, 2, [3]]], "a/codes": 0},
            {"a/codes": ARRAY},
            r"'a/codes': another has one of the tensors \['a/codes'\]",
        ),
        ({"a": ["value", []]}, {}, r"leaf 'a': \['value', \[\]\] is none of version 2"),
        ({"a": ["value", None]}, {}, r"\['value', None\] is none of version 2"),
        ({"a": ["__reduce__", "os.system"]}, {}, "is none of version 2"),
        ({"a": ["QTensor", [4, [6], []], {}]}, BLOB, "is shorter than argument 1"),
        ({"a": ["QTensor", [4, [6], [], -6]]}, {}, "its group cannot be -6"),
        ({"a": ["QTensor", [4.0, [6], [], 6]]}, {}, "its bits cannot be 4.0"),
        ({"a": ["QTensor", [4, 6, [], 6]]}, {}, "its shape cannot be 6"),
        ({"a": ["QTensor", [4, [[6]], [], 6]]}, {}, r"its shape cannot be \[\[6\]\]"),
        ({"a": ["SharedTensor", [2**40, 2, [3]]]}, {}, "its zero cannot be 10995"),
        ({"a": ["TiedTensor", [5, [3], "x"]]}, {}, "its source cannot be 5"),
        ({"a": ["QTensor", [17, *NODE[1:]], {"codes": [3]}]}, BLOB, "of 17 bits"),
        ({"a": ["QTensor", [0, *NODE[1:]], {"codes": [3]}]}, BLOB, "of 0 bits"),
        ({"a": ["QTensor", NODE, {"codes": []}]}, BLOB, r"'codes' cannot be \[\] of 4"),
        ({"a": ["QTensor", NODE, {"codes": ["int8", 3]}]}, BLOB, "'codes' cannot be"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_a_structure_that_makes_no_sense_is_one_error_with_file_and_leaf(
    path, structure, tensors, fault
):
    write_file(path, json.dumps(structure), tensors)
    for read in (load, open_file):
        with pytest.raises(FileFault, match=fault) as error:
            read(path)
        assert f"read {path}, whose structure makes no sense" in str(error.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a":["value",1],"a":["value",2]}', "a name occurs twice among"),
        ('{"a":["dict",["b",["value",1]],["b",["value",2]]]}', "another has the same"),
        ('["list",' * 9999, "it is nested too deeply"),
        ('["list",' * 3000 + "0" + "]" * 3000, "recursion depth|nested too|have more"),
        ('["dict",[[],["value",1]]]', "unhashable type"),
        ('["dict",["a"]]', "not enough values to unpack"),
        ("", "Expecting value"),
        ('["value",' + "1" * 5000 + "]", "integer string conversion"),
    ],
    ids=lambda x: x[:20],
)
def test_a_structure_that_is_no_tree_is_one_error(path, text, fault):
    write_file(path, text, {})
    with pytest.raises(FileFault, match=fault):
        load(path)


def test_one_long_key_over_many_leaves_does_not_fill_the_memory(path):
    leaves = {f"{i}": ["value", 1] for i in range(1000)}
    write_file(path, json.dumps({"k" * 100_000: leaves}), {})

    def read():
        with pytest.raises(FileFault, match="its paths have more than 16777216 char"):
            load(path)

    assert peak_of(read)[1] < WORK


@pytest.mark.parametrize(
    ("structure", "tensors", "fault"),
    [
        (["array", {"": [4]}], CODED, r"leaf 'a': decode_array .* uint8\[4\], got 4"),
        (["array", {"": [3]}], CODED + b"\0", "leaf 'a': 1 bytes are left over"),
        (["array", {"": [3]}], CODED[:-1], "leaf 'a': field '' of 4 bytes is cut off"),
        (["array", {"": ["bool", 3]}], CODED, "leaf 'a': a bool is neither 0 nor 1"),
        (["key", "zzz", {"": ["uint32", 2]}], field(b"\2" + bytes(8)), "leaf 'a': .*"),
        (
            ["QTensor", NODE, {"codes": [3]}],
            CODES,
            "leaf 'a': decode_symbols needs a stream of 6 symbols",
        ),
        (
            ["SharedTensor", [False, 1, [3]], {"codes": [1]}],
            field(encode_symbols(np.array([0, 2] * 4, np.uint8))),
            "leaf 'a': the code 2 takes more than 1 bits",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_a_stream_that_does_not_fit_its_leaf_is_one_error(
    path, structure, tensors, fault
):
    tensors = {"a": np.frombuffer(tensors, np.uint8)}
    write_file(path, json.dumps({"a": structure}), tensors)
    with pytest.raises(FileFault, match=f"load found {path} damaged: {fault}"):
        load(path)
    leaves = open_file(path)
    with pytest.raises(FileFault, match=fault):
        leaves["a"]


@pytest.mark.parametrize(
    ("offsets", "fault"),
    [
        ([0], "tensor '__pool__': byte 5 is next, not byte 10"),
        ([5], "tensor '__pool__': byte 0 is next, not byte 5"),
        ([0, 0], "tensor '__pool__': byte 5 is next, not byte 0"),
        ([0, 5, 5], "tensor '__pool__': byte 10 is next, not byte 5"),
        ([0, 99], "tensor '__pool__': decode_varint needs"),
    ],
)
def test_every_byte_of_the_pool_belongs_to_one_leaf(path, offsets, fault):
    assert len(CODED) == 5
    structure = {str(i): ["array", {"": [3]}, at] for i, at in enumerate(offsets)}
    both = {"__pool__": np.frombuffer(2 * CODED, np.uint8)}
    write_file(path, json.dumps(structure), both)
    with pytest.raises(FileFault, match=fault):
        load(path)


def test_names_may_have_any_characters(path):
    odd = ["\0", "\n", "..", "/", "//", "\u202e", "\ud800", "\x1b[1m", "__pool__/", " "]
    tree = {name: np.full(3, i, np.float32) for i, name in enumerate(odd) if i != 6}
    save(path, tree)
    np.testing.assert_equal({k: np.asarray(x) for k, x in load(path).items()}, tree)
    write_file(path, json.dumps({"\ud800": ["value", 1]}), {})
    assert load(path) == {"\ud800": 1}


# Memory. What a file declares is known before anything is decoded.

BOMBS = {
    "planes": (["array", {"": ["float32", 2**40]}, 0], encode_varint(2**40) + b"\0\0"),
    "noise": (["array", {"": ["float32", 2**40]}, 0], b"\2"),
    "complex": (["array", {"": ["complex128", 2**20, 2**16]}, 0], b"\2"),
    "codes": (["QTensor", NODE, {"codes": [2**40]}, 0], zeros(2**20) + b"\0"),
    "rows": (["QTensor", NODE, {"codes": [2**39, 2]}, 0], zeros(2**20)),
    "key": (["key", "rbg", {"": ["uint32", 2**38, 4]}, 0], b"\2"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_declares_a_terabyte_is_refused_unread(path, name):
    spec, stream = BOMBS[name]
    write_file(path, json.dumps({"a": ["list", spec]}), pool(stream))
    assert path.stat().st_size < 400

    def read():
        with pytest.raises(FileFault, match=f"may take {2**30} bytes, but the arrays"):
            load(path)
        leaves = open_file(path)
        with pytest.raises(FileFault, match=r"but leaf 'a/0' of .* pass max_bytes=\d"):
            leaves["a/0"]

    assert peak_of(read)[1] < 2**20


def test_many_small_leaves_count_together(path):
    tree = {str(i): jnp.zeros(1000) for i in range(100)}
    save(path, tree)
    assert len(load(path, max_bytes=400_000)) == 100
    with pytest.raises(FileFault, match="may take 399999 bytes, .* max_bytes=400000."):
        load(path, max_bytes=399_999)
    assert open_file(path, max_bytes=4000)["7"].shape == (1000,)


def test_a_limit_counts_nodes_as_they_are_and_not_as_dense_arrays(path):
    small = jc.quantize(jnp.ones((64, 64)), bits=4)
    save(path, {"w": small})
    assert load(path, max_bytes=small.nbits() // 8)["w"].shape == (64, 64)
    with pytest.raises(FileFault, match="but the arrays of"):
        load(path, max_bytes=small.nbits() // 8 - 1)


def test_by_default_a_file_may_grow_to_a_gibibyte_or_256_times_its_size(path):
    spec = {"a": ["array", {"": [2**30]}, 0], "b": ["array", {"": [1]}, 4]}
    write_file(path, json.dumps(spec), pool(b"\2", b"\2"))
    with pytest.raises(FileFault, match=rf"{2**30} bytes, .* take {2**30 + 1}. If"):
        load(path)
    noise = np.zeros(2**22 + 2**16, np.uint8)
    write_file(path, json.dumps(spec | {"c": 0}), pool(b"\2", b"\2") | {"c": noise})
    assert 256 * path.stat().st_size > 2**30 + 1 + noise.size
    with pytest.raises(FileFault, match="tensor '__pool__': decode_varint"):
        load(path)  # not too large, only wrong


MANY = 4 * BLOCK + 12_345


@pytest.mark.parametrize(
    ("decode", "declared"),
    [
        (
            lambda: decode_array(
                b"\0" + 3 * field(zeros(MANY)) + zeros(MANY), np.dtype("f4"), (MANY,)
            ),
            4 * MANY,
        ),
        (
            lambda: decode_array(
                b"\1" + field(zeros(MANY)) + 7 * field(zeros(0)) + zeros(0),
                np.dtype("f8"),
                (MANY,),
            ),
            8 * MANY,
        ),
        (lambda: decode_codes(zeros(8 * MANY), 1, (MANY,)), MANY),
        (lambda: decode_codes(zeros(2 * MANY // 3), 15, (MANY // 3, 4)), 4 * MANY // 3),
    ],
    ids=["planes", "mask", "codes", "rows"],
)
def test_decoding_takes_64_mebibytes_besides_what_is_declared(decode, declared):
    array, peak = peak_of(decode)
    assert not array.any()
    assert array.nbytes == declared // 4 * 4 or array.nbytes == declared
    assert peak < declared + WORK


@pytest.mark.parametrize("width", [15, 16, 17])
def test_decoding_wide_symbols_takes_64_mebibytes_besides(path, width):
    rng = np.random.default_rng(0)
    top = 2 ** min(width, 16)
    symbols = (rng.random(BLOCK) ** (1 + 4 * (width == 17)) * top).astype(np.uint16)
    stream = encode_symbols(symbols)
    assert stream[4] == width
    codes, peak = peak_of(lambda: decode_codes(stream, 16, (2 * BLOCK,)))
    assert codes.tobytes() == symbols.tobytes()
    assert peak < codes.nbytes + WORK


def test_the_size_of_an_array_is_checked_before_it_is_computed():
    assert byte_size(np.dtype("f4"), [2, 3]) == 24
    assert byte_size(np.dtype("f4"), [2**40, 0]) == 0
    with pytest.raises(ValueError, match=r"\[2, -3\] is not the shape of an array"):
        byte_size(np.dtype("f4"), [2, -3])
    with pytest.raises(ValueError, match=r"\[9+\.\.\.9+, 9+.*\] fits no memory"):
        byte_size(np.dtype("f4"), [10**4000 - 1] * 64)


# Leaf by leaf.


def test_a_file_is_a_mapping_of_its_leaves_in_order(path):
    tree = {
        "b": [jnp.arange(3.0), jc.quantize(jnp.ones((40, 50)))],
        "a": {"k": 7, "none": None, "w": jnp.zeros((40, 50))},
    }
    save(path, tree)
    leaves = open_file(path)
    assert list(leaves) == ["a/k", "a/w", "b/0", "b/1"]
    assert len(leaves) == 4
    assert leaves["a/k"] == 7
    np.testing.assert_array_equal(leaves["b/0"], tree["b"][0])
    np.testing.assert_array_equal(leaves["b/1"].dense(), np.ones((40, 50)))
    assert "a/none" not in leaves
    with pytest.raises(KeyError, match="b/2"):
        leaves["b/2"]


def test_only_what_is_asked_for_is_read_and_checked(path):
    big = np.frombuffer(np.random.default_rng(0).bytes(2**23), np.uint8)
    save(path, {"bad": big, "good": jnp.arange(5.0), "other": big.copy()})
    data = bytearray(path.read_bytes())
    data[data.index(big.tobytes()) + 99] ^= 1
    path.write_bytes(data)

    def read():
        leaves = open_file(path)
        return leaves, leaves["good"]

    (leaves, good), peak = peak_of(read)
    np.testing.assert_array_equal(good, [0, 1, 2, 3, 4])
    assert peak < 2**20
    for _ in range(2):
        with pytest.raises(FileFault, match="the checksum of '(bad|other)' is wrong"):
            leaves["bad"], leaves["other"]
    with pytest.raises(FileFault, match="the checksum of '(bad|other)' is wrong"):
        load(path)


def test_an_open_file_outlives_its_name(path):
    save(path, {"w": jnp.arange(2000)})
    leaves = open_file(path)
    save(path, {"w": jnp.zeros(3)})
    os.unlink(path)
    np.testing.assert_array_equal(leaves["w"], np.arange(2000))


def test_arrays_do_not_hang_on_the_file(path):
    # Whoever writes to a file in place must not change arrays that were loaded.
    noise = np.random.default_rng(0).normal(size=2000)
    save(path, {"w": noise.astype(np.float32), "wide": noise})
    tree = load(path)
    path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(tree["w"], noise.astype(np.float32))
    np.testing.assert_array_equal(tree["wide"], noise)
    tree["wide"][0] = 1  # and may be written to


def test_the_tensors_of_a_file_are_checked_when_read_as_a_whole(path):
    write_file(path, "text", {"a": ARRAY, "b": np.ones((2, 3))})
    text, tensors = read_file(path)
    assert text == "text"
    np.testing.assert_equal(tensors, {"a": ARRAY, "b": np.ones((2, 3))})


@given(st.integers(1, 16), st.sampled_from([(1, 40), (3, 7)]), st.integers(0, 99))
def test_codes_are_packed_as_jax_packs_them(bits, shape, seed):
    rows, count = shape
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (rows, count)).astype(np.uint16)
    packed = np.asarray(packing.pack(jnp.asarray(codes), bits))
    per = packed.shape[1] * 8 // bits
    symbols = np.pad(codes, ((0, 0), (0, per - count))).reshape(-1)
    back = decode_codes(encode_symbols(symbols), bits, packed.shape)
    np.testing.assert_array_equal(back, packed)


# Everything else that may be wrong with a file.


def test_2000_changed_files_and_streams_give_the_right_tree_or_the_error(tmp_path):
    ends, wrong = script().run(2000, 0, tmp_path)
    assert not wrong
    assert sum(ends.values()) == 2000
    assert ends["reseal: another tree"] > 50  # the deepest layers were reached
    assert ends["stream: decoded"] > 10
