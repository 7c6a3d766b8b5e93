"""The file: a tree of arrays and nodes in one safetensors file, as small as it is.

Each leaf is stored in the smaller of two profiles. *Packed*: its arrays are named
tensors of their own dtype, which any safetensors reader sees. *Coded*: its arrays are
entropy coded, one after the other, in one uint8 tensor under the leaf's path or, where
that would be short, in a tensor that such leaves share. The header's single metadata
entry, ``jaxcomp``, holds the structure and the checksums; docs/format.md is the
specification. Nothing in a file is ever executed.
"""

import dataclasses
import json
import operator
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp import bits as packing
from jaxcomp.entropy import encode_symbols, encode_varint
from jaxcomp.node import CompressedArray, TiedTensor, flatten, is_compressed
from jaxcomp.quant import QTensor
from jaxcomp.share import SharedTensor
from jaxcomp.storage import file as files
from jaxcomp.storage.planes import POOL, Fields, encode_array, is_number, plan_fields
from jaxcomp.storage.structure import decode_tree, encode_tree
from jaxcomp.tree import list_paths


# Every kind of node: its class, and those of its fields that hold packed codes.
KINDS: dict[str, tuple[type[CompressedArray], tuple[str, ...]]] = {
    "QTensor": (QTensor, ("codes", "zero")),
    "SharedTensor": (SharedTensor, ("codes",)),
    "TiedTensor": (TiedTensor, ()),
}

ENTRY = 60  # bytes that one more tensor takes in the header, besides its name
_SHORT = 4096  # bytes; what is longer is worth a name of its own


def save(path: str | os.PathLike, tree: Any) -> int:
    """Writes a tree of arrays and nodes to one safetensors file, atomically.

    Leaves may be JAX or NumPy arrays of any dtype, random keys, nodes, numbers, strings
    and None. What was at ``path`` stays whole until the new file is.

    Args:
      path: the file; ``.jxc`` by custom.
      tree: any pytree: dicts, lists, tuples, NamedTuples, ``nnx.State``, Equinox
        modules of arrays.

    Returns:
      The size of the file in bytes.

    Raises:
      TypeError: a leaf or a key is of a type that has no place in a file.
      ValueError: two leaves have the same path.
      OSError: the disk is full, the folder cannot be written to and the like.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/w.jxc", {"kernel": jnp.zeros((100, 100))}) < 400
    True
    """
    tensors: dict[str, np.ndarray] = {}
    paths: set[str] = set()
    pool = bytearray()

    def check_new(name: str, taken: Iterable[str]) -> None:
        if name in taken:
            raise ValueError(
                f"save needs a path of its own for every leaf, but two are {name!r}. "
                "Rename a key that has a '/'."
            )

    def put(name: str, array: np.ndarray) -> None:
        if name == "__metadata__":
            raise ValueError(
                "save needs another name for the leaf '__metadata__', which "
                "safetensors keeps to itself."
            )
        check_new(name, tensors)
        tensors[name] = array

    def leaf_spec(path: str, leaf: Any) -> Any:
        check_new(path, paths)
        paths.add(path)
        spec, arrays = _leaf_parts(path, leaf)
        packed = {_field(path, key): a for key, a in arrays.items()}
        size = sum(a.nbytes + len(name) + ENTRY for name, a in packed.items())
        exact = all(a.dtype.name in files.NATIVE.values() for a in arrays.values())
        if arrays and (not exact or size > 2 * ENTRY):
            blob = _encode_fields(leaf, arrays)
            coded = [*spec, {key: _field_spec(a) for key, a in arrays.items()}]
            extra = len(json.dumps(coded)) - len(json.dumps(spec))
            if len(blob) < _SHORT:
                if not exact or len(blob) + extra < size:
                    pool.extend(blob)
                    return [*coded, len(pool) - len(blob)]
            elif not exact or len(blob) + len(path) + ENTRY + extra < size:
                put(path, np.frombuffer(blob, np.uint8))
                return coded
        for name, array in packed.items():
            put(name, array)
        return 0 if spec == ["array"] else spec

    structure = json.dumps(encode_tree(tree, leaf_spec), separators=(",", ":"))
    if pool:
        put(POOL, np.frombuffer(bytes(pool), np.uint8))
    return files.write_file(Path(path), structure, tensors)


def load(
    path: str | os.PathLike, *, like: Any = None, max_bytes: int | None = None
) -> Any:
    """Reads what `save` wrote, bit for bit.

    The file may come from anybody: all that it says is checked, and nothing executed.

    Args:
      path: the file.
      like: a tree of the same paths, whose structure the result takes: NamedTuples,
        ``nnx.State``, Equinox modules. Its arrays may be shape structs; what in it is
        not an array stays. None gives dicts, lists and tuples.
      max_bytes: bytes that the arrays may take in memory, besides 64 MiB to work in;
        more is refused before anything is decoded. None allows 256 times the size of
        the file, but at least 1 GiB.

    Returns:
      The tree. Arrays are JAX arrays; those of a dtype that JAX would narrow (float64
      without ``jax_enable_x64``) are NumPy arrays.

    Raises:
      FileNotFoundError: there is no such file.
      FileFault: a `ValueError` that says where it is damaged, hostile or too large.
      ValueError: it does not fit ``like``.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save(folder + "/w.jxc", {"step": 3, "kernel": jnp.ones(2)})
    ...     load(folder + "/w.jxc")
    {'kernel': Array([1., 1.], dtype=float32), 'step': 3}
    """
    structure, leaves, tensors, fields = _open(path, max_bytes)
    leaves.check_size("the arrays", sum(leaves.sizes.values()))
    _check_pool(leaves.path, fields, tensors)
    tree = decode_tree(structure, lambda name, spec: leaves[name])
    return tree if like is None else _into(like, tree, path)


def open_file(
    path: str | os.PathLike, *, max_bytes: int | None = None
) -> Mapping[str, Any]:
    """The leaves of a file by path, each read and decoded when it is asked for.

    Only the header is read at once. The file, which is mapped into memory, may be
    replaced or deleted meanwhile, but must not be written to in place.

    Args:
      path: a file of `save`.
      max_bytes: bytes that the arrays of one leaf may take in memory; see `load`.

    Returns:
      A mapping in the order of the tree. To ask twice is to decode twice.

    Raises:
      FileFault: as `load`; for a tensor or a leaf, once it is asked for.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save(folder + "/w.jxc", {"a": jnp.zeros(9), "b": [jnp.ones(2), 7]})
    ...     leaves = open_file(folder + "/w.jxc")
    ...     list(leaves), leaves["b/0"]
    (['a', 'b/0', 'b/1'], Array([1., 1.], dtype=float32))
    """
    return _open(path, max_bytes)[1]


def _field_spec(array: np.ndarray) -> list:
    """The shape of a coded array, behind its dtype unless that is uint8."""
    name = array.dtype.name
    return [*([] if name == "uint8" else [name]), *array.shape]


def _field(path: str, key: str) -> str:
    return f"{path}/{key}" if key else path


def _leaf_parts(path: str, leaf: Any) -> tuple[list, dict[str, np.ndarray]]:
    """What the structure says of a leaf, and its arrays by field."""
    if is_compressed(leaf):
        kind = type(leaf).__name__
        if kind not in KINDS:
            raise TypeError(
                f"save does not know the node {kind} of leaf {path!r}. Densify it."
            )
        static, arrays = [], {}
        for field in dataclasses.fields(leaf):
            value = getattr(leaf, field.name)
            if field.metadata.get("static"):
                static.append(value)
            elif value is not None:
                arrays[field.name] = _plain(value)
        return [kind, static], arrays
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        kind = str(jax.random.key_impl(leaf))
        return ["key", kind], {"": _plain(jax.random.key_data(leaf))}
    if isinstance(leaf, jax.core.Tracer):
        raise TypeError(f"save needs arrays, but leaf {path!r} is traced: leave jit.")
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        if not is_number(leaf.dtype):
            raise TypeError(
                f"save needs numbers, but leaf {path!r} is {_check.describe(leaf)}."
            )
        return ["array"], {"": _plain(leaf)}
    if isinstance(leaf, bool | int | float | str):
        return ["value", leaf], {}
    raise TypeError(
        f"save needs arrays, numbers, strings and None, but leaf {path!r} is of type "
        f"{type(leaf).__name__}. Take it out, e.g. by equinox.filter(model, "
        "equinox.is_array), and give it back with load(path, like=model)."
    )


def _plain(x: Any) -> np.ndarray:
    """In C order and the machine's byte order, which safetensors takes as they are."""
    array = np.asarray(x, order="C")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder())


def symbols(node: Any, field: str) -> np.ndarray:
    """The codes that a field of a node holds packed, pad codes too: uint[codes]."""
    packed = getattr(node, field)
    count = packed.shape[-1] * 8 // node.bits
    return np.asarray(packing.unpack(packed, node.bits, count)).reshape(-1)


def _encode_fields(leaf: Any, arrays: dict[str, np.ndarray]) -> bytes:
    """Each array coded, behind its length as a varint."""
    codes = KINDS[type(leaf).__name__][1] if is_compressed(leaf) else ()
    parts = []
    for name, array in arrays.items():
        if name in codes:
            part = encode_symbols(symbols(leaf, name))
        else:
            part = encode_array(array)
        parts += [encode_varint(len(part)), part]
    return b"".join(parts)


def _open(
    path: str | os.PathLike, max_bytes: int | None
) -> tuple[Any, files.Leaves, files.Tensors, list[Fields]]:
    """The structure of a file as JSON, its leaves, and what they are made of."""
    limit = files.default_limit(path) if max_bytes is None else max_bytes
    text, tensors = files.map_file(Path(path), limit)
    loose, plans = set(tensors), dict[str, tuple[Fields, Callable[[dict], Any]]]()

    def plan(name: str, spec: Any) -> None:
        try:
            if name in plans:
                raise ValueError("another has the same path")
            plans[name] = fields, _ = _plan(name, spec, tensors.views)
            needed = set(fields.tensors.values())
            if not needed <= loose | {POOL}:
                raise ValueError(f"another has one of the tensors {sorted(needed)}")
            loose.difference_update(needed)
        except Exception as error:  # a spec comes from outside: it may hold anything
            raise ValueError(f"leaf {name!r}: {error}") from error

    def read(name: str) -> Any:
        fields, make = plans[name]
        return make({k: _to_jax(x) for k, x in fields.read(tensors).items()})

    try:
        structure = files.parse_json(text)
        files.check_paths(structure, limit)
        decode_tree(structure, plan)
        if loose:
            raise ValueError(f"no leaf has the tensor {min(loose)!r}")
    except Exception as error:
        dict(tensors)  # a damaged name does not fit either, but has a wrong checksum
        raise files.FileFault(
            f"load cannot read {path}, whose structure makes no sense: {error}."
        ) from error
    sizes = {name: fields.nbytes() for name, (fields, _) in plans.items()}
    leaves = files.Leaves(tensors.path, sizes, read, limit)
    return structure, leaves, tensors, [fields for fields, _ in plans.values()]


def _check_pool(path: Path, fields: list[Fields], tensors: files.Tensors) -> None:
    """Refuses to decode a part of the pool for more than one leaf, or for none."""
    pooled = [f for f in fields if f.offset is not None and f.tensors[""] == POOL]
    pool = tensors[POOL] if pooled else np.zeros(0, np.uint8)
    reached = 0
    try:
        for start, end in [*sorted(f.range_in(pool) for f in pooled), (pool.size, 0)]:
            if start != reached:
                raise ValueError(f"byte {reached} is next, not byte {start}")
            reached = end
    except ValueError as error:
        raise files.damaged(path, f"tensor {POOL!r}: {error}") from error


def _plan(
    path: str, spec: Any, views: Mapping[str, np.ndarray]
) -> tuple[Fields, Callable[[dict[str, Any]], Any]]:
    """The fields of the leaf that a spec describes, and what makes the leaf of them."""
    bits, live = dict[str, int](), [""]
    make: Callable[[dict[str, Any]], Any] = operator.itemgetter("")
    match ["array"] if spec == 0 else spec:
        case ["value", bool() | int() | float() | str() as value]:
            return Fields({}, {}), lambda arrays: value
        case ["array", *coded]:
            pass
        case ["key", str(impl), *coded]:

            def make(arrays: dict[str, Any]) -> Any:
                return jax.random.wrap_key_data(arrays[""], impl=impl)

        case [str(kind), list(values), *coded] if kind in KINDS:
            cls: Any = KINDS[kind][0]
            static = _static(cls, values)
            live = [f.name for f in dataclasses.fields(cls) if f.name not in static]
            bits = {name: static["bits"] for name in KINDS[kind][1]}

            def make(arrays: dict[str, Any]) -> Any:
                return cls(**dict.fromkeys(live) | static | arrays)

        case _:
            raise ValueError(f"{reprlib.repr(spec)} is none of version {files.VERSION}")
    names = {name: _field(path, name) for name in live}
    fields = plan_fields(path, names, coded, bits, views)
    if live == [""] and not fields.arrays:
        raise ValueError("it has no array")
    return fields, make


def _static(cls: Any, values: list) -> dict[str, Any]:
    """The static values of a node by name, each of its type."""
    fields = [f for f in dataclasses.fields(cls) if f.metadata.get("static")]
    static = {}
    for field, value in zip(fields, values, strict=True):
        if field.type is str:
            is_right = isinstance(value, str)
        else:  # int, bool or tuple[int, ...]
            numbers = value if isinstance(value, list) else [value]
            is_right = isinstance(value, list) == (field.type not in (int, bool))
            is_right &= all(isinstance(n, int) and n >= 0 for n in numbers)
        if not is_right or (field.type is bool and value > 1):
            raise ValueError(f"its {field.name} cannot be {reprlib.repr(value)}")
        static[field.name] = tuple(value) if isinstance(value, list) else value
    return static


def _to_jax(array: np.ndarray) -> Any:
    """A JAX array, unless JAX would narrow it; nobody else may hold ``array``."""
    if array.dtype == np.bool_ and np.any(array.view(np.uint8) > 1):
        raise ValueError("a bool is neither 0 nor 1")
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    is_long = array.nbytes >= 1 << 16  # what is short is copied faster
    return jax.device_put(array, may_alias=True) if is_long else jnp.asarray(array)


def _into(like: Any, tree: Any, path: Any) -> Any:
    """The leaves of ``tree`` in the structure of ``like``."""
    paths, models, treedef = flatten(like)
    loaded = dict(zip(*flatten(tree)[:2], strict=True))
    wanted = [p for p, m in zip(paths, models, strict=True) if _is_stored(m)]
    odd = sorted(set(wanted) ^ set(loaded))
    if odd:
        where = "the file" if odd[0] in loaded else "`like`"
        raise ValueError(
            f"load needs `like` and {path} to have the same leaves, but only {where} "
            f"has {odd[0]!r} ({len(odd)} such). The file's are "
            f"{list_paths(list(loaded))}."
        )
    leaves = []
    for name, model in zip(paths, models, strict=True):
        leaf = loaded.get(name, model)
        if np.shape(leaf) != np.shape(model):
            raise ValueError(
                f"load needs `like` to have the shapes of {path}, but leaf {name!r} is "
                f"{list(np.shape(leaf))} in the file and {list(np.shape(model))} in "
                "`like`."
            )
        leaves.append(leaf)
    return jax.tree.unflatten(treedef, leaves)


def _is_stored(leaf: Any) -> bool:
    """Whether `save` would have stored such a leaf."""
    return _check.is_array(leaf) or isinstance(leaf, bool | int | float | str)
