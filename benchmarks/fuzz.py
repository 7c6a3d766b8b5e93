"""Files that nobody wrote, and saves that are killed: what `load` makes of them.

    python benchmarks/fuzz.py [cases] [seed]
    python benchmarks/fuzz.py kill [times] [seed]

The first changes real files and streams, half of the files with the checksums made
right again so that the deeper layers are reached. The only ways out are the right tree
and a `FileFault`, in time and within the memory allowed. 100,000 cases take about five
minutes on one core. The second kills a process in the midst of a save, over and over:
the file must be the old one or the new one, whole. 200 times take a minute.
"""

import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from jaxcomp.entropy import decode_symbols, encode_symbols
from jaxcomp.storage import container
from jaxcomp.storage.file import NATIVE, FileFault
from jaxcomp.storage.planes import decode_array, decode_codes, encode_array


LIMIT = 1 << 22  # bytes that a file may take in memory
WORK = 1 << 26  # bytes that reading it may take besides
SECONDS = 10  # for one case

DTYPES = [
    "bool",
    "uint8",
    "int4",
    "uint16",
    "bfloat16",
    "float32",
    "int64",
    "complex64",
]
JUNK = [None, True, -1, 0, 1, 7, 2**31, 2**63, 10**40, 0.5, float("nan"), "", "x", "é"]
JUNK += ["uint8", "O", "(9,)i4", "__pool__", [], [[]], {}, ["dict", 5], ["list", 0], 16]
JUNK += [["value", 1], ["array", {"": [2**40]}], ["array", {"": [64]}, 0]]


# Real files.


def make_files(folder: Path) -> list[tuple[Any, bytes]]:
    """Trees of every kind of leaf, and their files in either profile."""
    w = np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32)
    x = jnp.asarray(w)
    keys = jax.random.split(jax.random.key(0), 8)
    tree = {
        "dense": [w, {3: np.zeros(12, np.float32), 7: w.astype(jnp.bfloat16)}],
        "pruned": np.where(abs(w) < 1, 0, w),
        "grids": (jc.quantize(x, 4), jc.quantize_affine(x, 3, group=7)),
        "stack": jax.vmap(lambda w: jc.quantize(w, 3))(x.reshape(4, 10, 12)),
        "shared": jc.share_tree({"w": x, "z": np.where(abs(w) < 1, 0, w)}, clusters=11),
        "tied": jc.tie_layers({"a": x, "b": -x}, [("a", "b")]),
        "scalars": [None, True, 3, 0.1, "name", (), {}, np.int8(-3), float("nan")],
        "odd": [w.astype(jnp.float8_e4m3fn), w.astype(jnp.int4), w > 0, w + 1j],
        "keys": [keys, keys[0]],
        "ragged": jc.quantize(x, 4, axis=0, group=5),
        "ints": [np.arange(300), (100 * w).astype(np.int16), np.zeros((0, 3), np.int8)],
    }
    long = {"long": np.resize(w, 6000), "noise": np.frombuffer(w.tobytes(), np.uint8)}
    long["change"] = np.repeat(np.uint8([1, 2, 1]), 1 << 15)  # two blocks and a third
    long["change"][::2] = 0
    return [saved(folder, t, entry) for t in (tree, long) for entry in (60, -(10**6))]


def saved(folder: Path, tree: Any, entry: int) -> tuple[Any, bytes]:
    """A tree and its file; where an entry in the header is cheap, leaves are packed."""
    usual, container.ENTRY = container.ENTRY, entry
    try:
        jc.save(folder / "fuzz.jxc", tree)
    finally:
        container.ENTRY = usual
    return raw(tree), (folder / "fuzz.jxc").read_bytes()


def raw(tree: Any) -> Any:
    """The structure, static fields included, and the bits of every leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    bits = []
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        bits.append((array.dtype, array.shape, array.tobytes()))
    return treedef, bits


# Their mutations.


def flip(rng: random.Random, data: bytearray) -> bytes:
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        data[rng.randrange(len(data))] ^= rng.choice([1 << rng.randrange(8), 255])
    return bytes(data)


def cut(rng: random.Random, data: bytearray) -> bytes:
    return bytes(data[: rng.randrange(len(data))])


def splice(rng: random.Random, data: bytearray) -> bytes:
    """A stretch of it put in another place: over what is there, or between."""
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    at = rng.randrange(len(data))
    over = rng.choice([0, end - start, rng.randrange(99)])
    return bytes(data[:at] + data[start:end] + data[at + over :])


def relength(rng: random.Random, data: bytearray) -> bytes:
    """Another length of the header."""
    old = int.from_bytes(data[:8], "little")
    near = old + rng.randrange(-9, 9)
    size = rng.choice([near, 2**60, 2**64 - 1, len(data) - 8, rng.randrange(len(data))])
    return size.to_bytes(8, "little") + bytes(data[8:])


def reseal(rng: random.Random, data: bytearray) -> bytes:
    """Another structure, other entries or other bytes, and checksums that are right."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    structure = header.pop("__metadata__")["jaxcomp"].split(" ", 2)[2]
    bodies = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        bodies[name] = bytes(data[end + first : end + last])
    for _ in range(rng.choice([1, 1, 2, 3])):
        match rng.randrange(5):
            case 0 | 1:
                structure = json.dumps(warp(rng, json.loads(structure)))
            case 2 | 3:
                name = rng.choice(list(bodies))
                if bodies[name]:
                    bodies[name] = flip(rng, bytearray(bodies[name]))
            case 4:
                header = warp(rng, header)
                if not isinstance(header, dict):
                    return bytes(data)
    return seal(structure, header, bodies)


def seal(structure: str, header: dict[str, Any], bodies: dict[str, bytes]) -> bytes:
    """A file of a structure, the header's entries and bytes, with right checksums."""
    rows = [structure.encode(errors="replace"), b""]  # no notes
    for name in sorted(header):
        entry = header[name] if isinstance(header[name], dict) else {}
        dtype = NATIVE.get(str(entry.get("dtype")), "?")
        label = f"{name} {dtype} {entry.get('shape')} ".encode(errors="replace")
        rows.append(label + bodies.get(name, b""))
    sums = "".join(f"{zlib.crc32(row):08x}" for row in rows)
    text = {"__metadata__": {"jaxcomp": f"2 {sums} {structure}"}}
    head = json.dumps(text | header).encode(errors="replace")
    body = b"".join(bodies.values())
    return len(head).to_bytes(8, "little") + head + body


def warp(rng: random.Random, x: Any) -> Any:
    """JSON with one of its parts changed, left out, doubled or put elsewhere."""
    places = [((), x), *parts_of(x)]
    keys, part = rng.choice(places)
    new: Any
    match rng.randrange(5):
        case 0 if type(part) is int:
            new = rng.choice(
                [part + 1, part - 1, part * 2, -part, part << 20, part / 1]
            )
        case 1:
            new = rng.choice(places)[1]
        case 2 if isinstance(part, list) and part:
            new = part + rng.sample(part, 1)
        case 3 if isinstance(part, list) and part:
            new = part[:-1]
        case _:
            new = rng.choice(JUNK)
    return put(x, keys, new)


def parts_of(x: Any, keys: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    items: Any = x.items() if isinstance(x, dict) else ()
    for key, part in enumerate(x) if isinstance(x, list) else items:
        yield (*keys, key), part
        yield from parts_of(part, (*keys, key))


def put(x: Any, keys: tuple, new: Any) -> Any:
    if not keys:
        return new
    changed = x.copy()
    changed[keys[0]] = put(x[keys[0]], keys[1:], new)
    return changed


MUTATIONS = [flip, cut, splice, relength, *[reseal] * 4]


# One case.


class Hang(BaseException):
    """A case that took too long; no `except Exception` may hide it."""


@contextlib.contextmanager
def watched(limit: int) -> Iterator[None]:
    """Raises if the block takes more than its time or memory."""

    def stop(*_: Any) -> None:
        raise Hang(f"over {SECONDS} s")

    usual = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
    taken = tracemalloc.get_traced_memory()[1] - before
    if taken > limit + WORK:
        raise MemoryError(f"{taken} bytes, allowed were {limit} and {WORK}")


def try_file(rng: random.Random, files: list[tuple[Any, bytes]], path: Path) -> str:
    tree, data = rng.choice(files)
    mutate = rng.choice(MUTATIONS)
    path.write_bytes(mutate(rng, bytearray(data)))
    try:
        with watched(LIMIT):
            found = jc.load(path, max_bytes=LIMIT)
    except FileFault as fault:
        if str(path) not in str(fault):
            raise AssertionError(f"which file? {fault}") from fault
        return f"{mutate.__name__}: refused"
    if mutate is reseal:  # a file like any other, made by somebody else
        return "reseal: another tree"
    if raw(found) != tree:
        raise AssertionError("another tree, unnoticed")
    return f"{mutate.__name__}: the right tree"


def try_stream(rng: random.Random, files: Any, path: Path) -> str:
    """Damaged streams and noise, straight into the decoders."""
    del files, path
    size = rng.choice([0, 8, 16, 304, 5000])  # so many codes end on a byte
    source = np.random.default_rng(rng.randrange(50))
    bits = rng.randrange(1, 17)
    symbols = source.geometric(rng.choice([0.02, 0.3, 0.9]), size).astype(np.uint16)
    codes = symbols & np.uint16(2**bits - 1)
    dtype = jnp.dtype(rng.choice(DTYPES))
    array = np.minimum(abs(source.normal(0, 3, size)), 7) * source.integers(0, 2, size)
    packed = (1, size * bits // 8)
    coders: list[tuple[bytes, Callable[[bytes], Any]]] = [
        (encode_symbols(symbols), lambda data: decode_symbols(data, size)),
        (encode_symbols(codes), lambda data: decode_codes(data, bits, packed)),
        (
            encode_array(array.astype(dtype)),
            lambda data: decode_array(data, dtype, (size,)),
        ),
    ]
    start, decode = rng.choice(coders)
    data = bytearray(start[: rng.choice([1, 3, 9, 10**6])])
    if rng.random() < 0.5:
        data += rng.randbytes(rng.randrange(60))
    if data and rng.random() < 0.8:
        data = bytearray(rng.choice([flip, cut, splice])(rng, data))
    try:
        with watched(32 * size):
            decode(bytes(data))
    except ValueError:
        return "stream: refused"
    return "stream: decoded"


def run(cases: int, seed: int, folder: Path) -> tuple[collections.Counter, list[str]]:
    """How the cases ended, and what went wrong in which."""
    files = make_files(folder)
    ends: collections.Counter = collections.Counter()
    wrong = []
    tracemalloc.start()
    try:
        for number in range(cases):
            rng = random.Random(f"{seed} {number}")
            attempt = try_stream if rng.random() < 0.25 else try_file
            try:
                ends[attempt(rng, files, folder / "fuzz.jxc")] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic of Rust is no Exception
                wrong.append(f"case {number} of seed {seed}: {error!r}")
    finally:
        tracemalloc.stop()
    return ends, wrong


# Saves that are killed.


def old_and_new() -> list[dict[str, Any]]:
    """Two trees of a megabyte, of which a save takes some time."""
    w = np.random.default_rng(1).normal(size=(10, 25_000)).astype(np.float32)
    return [{str(i): row * sign for i, row in enumerate(w)} for sign in (1, -1)]


def save_forever(path: str) -> None:
    """For each line of stdin: a process that saves one tree, the other, and so on.

    It forks, since importing JAX takes seconds; JAX itself does not run in it.
    """
    trees = old_and_new()
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            while True:
                for tree in trees:
                    jc.save(path, tree)
        print(child, flush=True)
        os.waitpid(child, 0)


def kill_saves(folder: Path, times: int, seed: int) -> tuple[int, list[str]]:
    """How many kills came between a draft and its file, and what went wrong."""
    path = folder / "killed.jxc"
    trees = old_and_new()
    jc.save(path, trees[0])
    whole = [raw(tree) for tree in trees]
    rng = random.Random(seed)
    wrong = []
    code = [sys.executable, "-W", "ignore", __file__, "saver", str(path)]
    with subprocess.Popen(code, stdin=-1, stdout=-1, text=True, bufsize=1) as saver:
        assert saver.stdin
        assert saver.stdout
        for number in range(times):
            saver.stdin.write("\n")
            child = int(saver.stdout.readline())
            time.sleep(rng.uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
            try:
                if raw(jc.load(path)) not in whole:
                    wrong.append(f"kill {number}: another tree")
            except Exception as error:
                wrong.append(f"kill {number}: {error!r}")
        saver.stdin.close()
    drafts = [file for file in folder.iterdir() if file.name.startswith(".killed")]
    return len(drafts), wrong


def main(words: list[str]) -> int:
    if words[:1] == ["saver"]:
        save_forever(words[1])
        return 0
    kills = words[:1] == ["kill"]
    given = [int(word) for word in words[kills:]]
    count = given[0] if given else (200 if kills else 100_000)
    seed = given[1] if given[1:] else 0
    start = time.perf_counter()
    memory = Path("/dev/shm")  # where writing a file takes no time
    place = memory if memory.exists() and not kills else None
    with tempfile.TemporaryDirectory(dir=place) as name:
        if kills:
            drafts, wrong = kill_saves(Path(name), count, seed)
            print(f"{count} kills, {drafts} of them with a draft half written")
        else:
            ends, wrong = run(count, seed, Path(name))
            for end, number in sorted(ends.items()):
                print(f"{number:7} {end}")
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s, {count / seconds:.0f} a second, {len(wrong)} wrong")
    print(*wrong[:50], sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
