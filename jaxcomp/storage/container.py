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
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp import bits as packing
from jaxcomp.entropy import decode_symbols, decode_varint, encode_symbols, encode_varint
from jaxcomp.node import CompressedArray, TiedTensor, flatten, is_compressed
from jaxcomp.quant import QTensor
from jaxcomp.share import SharedTensor
from jaxcomp.storage.file import NATIVE, VERSION, read_file, write_file
from jaxcomp.storage.planes import decode_array, encode_array
from jaxcomp.storage.structure import decode_tree, encode_tree
from jaxcomp.tree import list_paths


# Every kind of node: its class, and those of its fields that hold packed codes.
KINDS: dict[str, tuple[type[CompressedArray], tuple[str, ...]]] = {
    "QTensor": (QTensor, ("codes", "zero")),
    "SharedTensor": (SharedTensor, ("codes",)),
    "TiedTensor": (TiedTensor, ()),
}

ENTRY = 60  # bytes that one more tensor takes in the header, besides its name
POOL = "__pool__"  # the tensor that short coded leaves share
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

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/w.jxc", {"kernel": jnp.zeros((100, 100))}) < 400
    True
    """
    tensors: dict[str, np.ndarray] = {}
    pool = bytearray()

    def put(name: str, array: np.ndarray) -> None:
        if name == "__metadata__":
            raise ValueError(
                "save needs another name for the leaf '__metadata__', which "
                "safetensors keeps to itself."
            )
        if name in tensors:
            raise ValueError(
                f"save needs a path of its own for every leaf, but two are {name!r}. "
                "Rename a key that has a '/'."
            )
        tensors[name] = array

    def leaf_spec(path: str, leaf: Any) -> Any:
        spec, arrays = _leaf_parts(path, leaf)
        packed = {_field(path, key): a for key, a in arrays.items()}
        size = sum(a.nbytes + len(name) + ENTRY for name, a in packed.items())
        exact = all(a.dtype.name in NATIVE.values() for a in arrays.values())
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
    return write_file(Path(path), structure, tensors)


def load(path: str | os.PathLike, *, like: Any = None) -> Any:
    """Reads what `save` wrote, bit for bit.

    Args:
      path: the file.
      like: a tree of the same paths, whose structure the result takes: NamedTuples,
        ``nnx.State``, Equinox modules. Its arrays may be shape structs; what in it is
        not an array stays. None gives dicts, lists and tuples.

    Returns:
      The tree. Arrays are JAX arrays; those of a dtype that JAX would narrow (float64
      without ``jax_enable_x64``) are NumPy arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is truncated, damaged, of a newer version, not a jaxcomp file, or
        does not fit ``like``. The error names the first tensor or leaf at fault.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save(folder + "/w.jxc", {"step": 3, "kernel": jnp.ones(2)})
    ...     load(folder + "/w.jxc")
    {'kernel': Array([1., 1.], dtype=float32), 'step': 3}
    """
    structure, tensors = read_file(Path(path))

    def leaf(name: str, spec: Any) -> Any:
        try:
            return _leaf(name, spec, tensors)
        except Exception as error:  # a spec comes from outside: it may hold anything
            raise ValueError(f"leaf {name!r}: {error}") from error

    try:
        tree = decode_tree(json.loads(structure), leaf)
    except Exception as error:
        raise ValueError(
            f"load cannot read {path}, whose structure makes no sense: {error}."
        ) from error
    return tree if like is None else _into(like, tree, path)


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
        if not _is_number(leaf.dtype):
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


def _is_number(dtype: Any) -> bool:
    """Whether JAX and every reader know the dtype; none knows long doubles."""
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    known = dtype == np.bool_ or jnp.issubdtype(dtype, jnp.number)
    return known and dtype.itemsize <= (16 if is_complex else 8)


def _plain(x: Any) -> np.ndarray:
    """In C order and the machine's byte order, which safetensors takes as they are."""
    array = np.asarray(x, order="C")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder())


def _is_codes(kind: str, field: str) -> bool:
    return kind in KINDS and field in KINDS[kind][1]


def symbols(node: Any, field: str) -> np.ndarray:
    """The codes that a field of a node holds packed, pad codes too: uint[codes]."""
    packed = getattr(node, field)
    count = packed.shape[-1] * 8 // node.bits
    return np.asarray(packing.unpack(packed, node.bits, count)).reshape(-1)


def _encode_fields(leaf: Any, arrays: dict[str, np.ndarray]) -> bytes:
    """Each array coded, behind its length as a varint."""
    parts = []
    for name, array in arrays.items():
        if _is_codes(type(leaf).__name__, name):
            part = encode_symbols(symbols(leaf, name))
        else:
            part = encode_array(array)
        parts += [encode_varint(len(part)), part]
    return b"".join(parts)


def _decode_fields(
    kind: str, static: dict[str, Any], fields: dict[str, list], data: Any
) -> tuple[dict[str, np.ndarray], int]:
    """The arrays coded in a buffer of bytes, and where they end."""
    arrays, start = {}, 0
    for name, spec in fields.items():
        length, start = decode_varint(data, start)
        part, start = bytes(data[start : start + length]), start + length
        named = isinstance(spec[0], str) if spec else False
        dtype, shape = spec[0] if named else "uint8", tuple(spec[named:])
        if _is_codes(kind, name):
            count = shape[-1] * 8 // static["bits"]
            codes = decode_symbols(part, math.prod(shape[:-1]) * count)
            rows = jnp.asarray(codes.reshape(*shape[:-1], count))
            arrays[name] = np.asarray(packing.pack(rows, static["bits"]))
        else:
            arrays[name] = decode_array(part, jnp.dtype(dtype), shape)
    return arrays, start


def _leaf(path: str, spec: Any, tensors: dict[str, np.ndarray]) -> Any:
    """The leaf that a spec describes; its arrays are taken out of ``tensors``."""
    match spec:
        case ["value", value]:
            return value
        case 0:
            return _to_jax(tensors.pop(path))
        case ["array", *coded]:
            return _to_jax(_arrays(path, "array", {}, coded, ("",), tensors)[""])
        case ["key", kind, *coded]:
            data = _arrays(path, "key", {}, coded, ("",), tensors)[""]
            return jax.random.wrap_key_data(jnp.asarray(data), impl=kind)
        case [kind, values, *coded] if kind in KINDS:
            cls: Any = KINDS[kind][0]
            fields = dataclasses.fields(cls)
            fixed = [f.name for f in fields if f.metadata.get("static")]
            values = [tuple(v) if isinstance(v, list) else v for v in values]
            static = dict(zip(fixed, values, strict=True))
            live = [f.name for f in fields if f.name not in fixed]
            found = _arrays(path, kind, static, coded, tuple(live), tensors)
            arrays = {name: None for name in live} | {
                name: _to_jax(array) for name, array in found.items()
            }
            return cls(**static, **arrays)
    raise ValueError(f"{spec!r} describes no leaf of version {VERSION}")


def _arrays(
    path: str,
    kind: str,
    static: dict[str, Any],
    coded: list,
    names: tuple[str, ...],
    tensors: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The arrays of a leaf by field, from either profile."""
    if len(coded) == 2:
        pool = tensors[POOL].data[coded[1] :]
        return _decode_fields(kind, static, coded[0], pool)[0]
    if coded:
        data = tensors.pop(path).tobytes()
        arrays, end = _decode_fields(kind, static, coded[0], data)
        if end != len(data):
            raise ValueError(f"{len(data) - end} bytes are left over")
        return arrays
    stored = {name: _field(path, name) for name in names}
    return {name: tensors.pop(key) for name, key in stored.items() if key in tensors}


def _to_jax(array: np.ndarray) -> Any:
    """A JAX array, unless JAX would narrow it."""
    keeps = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return jnp.asarray(array) if keeps else array


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
