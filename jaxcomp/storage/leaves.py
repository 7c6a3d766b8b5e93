"""The leaves of a file: what each kind is made of.

An array, a random key or a plain value; or a node, of which the static values stand in
the structure and the arrays, its fields, in tensors.
"""

import dataclasses
import math
import operator
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp import bits as packing
from jaxcomp.entropy import encode_symbols, encode_varint
from jaxcomp.lowrank import BasisTensor, LowRankTensor
from jaxcomp.node import CompressedArray, TiedTensor, is_compressed
from jaxcomp.prune import BitmaskTensor, NMTensor
from jaxcomp.quant import FloatTensor, QTensor
from jaxcomp.share import (
    BorrowedTensor,
    RowSharedTensor,
    SharedTensor,
    VectorTensor,
)
from jaxcomp.storage.draft import VERSION
from jaxcomp.storage.fields import Fields, is_number, plan_fields
from jaxcomp.storage.planes import Lanes, encode_array, without_padding


# Every kind of node: its class, and those of its fields that hold packed codes, with
# the width of a code in bits or the name of the static field that has it.
KINDS: dict[str, tuple[type[CompressedArray], dict[str, int | str]]] = {
    "QTensor": (QTensor, {"codes": "bits", "zero": "bits"}),
    "FloatTensor": (FloatTensor, {"codes": "bits"}),
    "SharedTensor": (SharedTensor, {"codes": "bits"}),
    "BorrowedTensor": (BorrowedTensor, {"codes": "bits"}),
    "RowSharedTensor": (RowSharedTensor, {"codes": "bits"}),
    "VectorTensor": (VectorTensor, {"codes": "bits"}),
    "BitmaskTensor": (BitmaskTensor, {"mask": 1}),
    "NMTensor": (NMTensor, {"codes": "bits"}),
    "LowRankTensor": (LowRankTensor, {}),
    "BasisTensor": (BasisTensor, {}),
    "TiedTensor": (TiedTensor, {}),
}


class Kind(NamedTuple):
    """A node of which the static values are known, and the arrays are not."""

    fields: list[str]  # its arrays, those of nodes in it behind the name of the field
    bits: dict[str, int]  # width of the codes of those that hold packed codes
    lanes: Lanes | None  # how its own codes lie, if they may have padding
    make: Callable[[Mapping[str, Any]], Any]  # arrays by field -> the node


def field_spec(array: np.ndarray) -> list:
    """The shape of a coded array, behind its dtype unless that is uint8."""
    name = array.dtype.name
    return [*([] if name == "uint8" else [name]), *array.shape]


def field_name(path: str, key: str) -> str:
    return f"{path}/{key}" if key else path


def node_parts(node: Any) -> tuple[list, dict[str, Any]]:
    """The static values of a node, in order, and its arrays by field.

    Of a field that is a node itself, the kind and static values come last, in a dict,
    and the arrays have its name before theirs.
    """
    static, arrays, inner = [], dict[str, Any](), {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if field.metadata.get("static"):
            static.append(value)
        elif is_compressed(value):
            values, held = node_parts(value)
            inner[field.name] = [type(value).__name__, values]
            arrays |= {f"{field.name}/{name}": array for name, array in held.items()}
        elif value is not None:
            arrays[field.name] = value
    return [*static, inner] if inner else static, arrays


def node_kind(name: str, values: list) -> Kind:
    """The node that `node_parts` parted into these static values and some arrays.

    Raises:
      ValueError: there is no such kind, or a value is of another type.
    """
    if name not in KINDS:
        raise ValueError(f"{reprlib.repr(name)} is no kind of node")
    cls: Any = KINDS[name][0]
    inner: dict[str, Kind] = {}
    if values and isinstance(values[-1], dict):
        *values, specs = values
        inner = {field: node_kind(*spec) for field, spec in specs.items()}
    static = _static(cls, values)
    live = [f.name for f in dataclasses.fields(cls) if f.name not in static]
    if not set(inner) <= set(live):
        raise ValueError(f"it cannot have nodes in {reprlib.repr(list(inner))}")
    names, bits = [field for field in live if field not in inner], {}
    for field, width in KINDS[name][1].items():
        bits[field] = static[width] if isinstance(width, str) else width
    for field, kind in inner.items():
        names += [f"{field}/{name}" for name in kind.fields]
        bits |= {f"{field}/{name}": width for name, width in kind.bits.items()}

    def make(arrays: Mapping[str, Any]) -> Any:
        found: dict[str, Any] = {field: arrays.get(field) for field in live}
        for field, kind in inner.items():
            held = {name: arrays.get(f"{field}/{name}") for name in kind.fields}
            found[field] = kind.make(held)
        return cls(**static, **found)

    return Kind(names, bits, _lanes(static), make)


def leaf_parts(path: str, leaf: Any) -> tuple[list, dict[str, np.ndarray]]:
    """What the structure says of a leaf, and its arrays by field."""
    if is_compressed(leaf):
        kind = type(leaf).__name__
        if kind not in KINDS:
            raise TypeError(
                f"save does not know the node {kind} of leaf {path!r}. Densify it."
            )
        static, arrays = node_parts(leaf)
        return [kind, static], {name: plain(x) for name, x in arrays.items()}
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        kind = str(jax.random.key_impl(leaf))
        return ["key", kind], {"": plain(jax.random.key_data(leaf))}
    if isinstance(leaf, jax.core.Tracer):
        raise TypeError(f"save needs arrays, but leaf {path!r} is traced: leave jit.")
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        if not is_number(leaf.dtype):
            raise TypeError(
                f"save needs numbers, but leaf {path!r} is {_check.describe(leaf)}."
            )
        return ["array"], {"": plain(leaf)}
    if isinstance(leaf, bool | int | float | str):
        return ["value", leaf], {}
    raise TypeError(
        f"save needs arrays, numbers, strings and None, but leaf {path!r} is of type "
        f"{type(leaf).__name__}. Take it out, e.g. by equinox.filter(model, "
        "equinox.is_array), and give it back with load(path, like=model)."
    )


def plain(x: Any) -> np.ndarray:
    """In C order and the machine's byte order, which safetensors takes as they are."""
    array = np.asarray(x, order="C")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder())


def symbols(packed: Any, bits: int) -> np.ndarray:
    """The codes that an array holds packed, pad codes too: uint[codes]."""
    count = packed.shape[-1] * 8 // bits
    return np.asarray(packing.unpack(packed, bits, count)).reshape(-1)


def code_counts(node: Any) -> dict[str, np.ndarray]:
    """How often each code is stored, by the fields that hold packed codes."""
    static, arrays = node_parts(node)
    kind = node_kind(type(node).__name__, static)
    held = [name for name in arrays if name in kind.bits]
    return {name: np.bincount(_stored_codes(kind, arrays, name)) for name in held}


def encode_fields(leaf: Any, arrays: dict[str, np.ndarray], block: Callable) -> bytes:
    """Each array coded, behind its length as a varint."""
    kind = Kind([], {}, None, dict)
    if is_compressed(leaf):
        kind = node_kind(type(leaf).__name__, node_parts(leaf)[0])
    parts = []
    for name, array in arrays.items():
        if name in kind.bits:
            part = encode_symbols(_stored_codes(kind, arrays, name), block)
        else:
            part = encode_array(array, block)
        parts += [encode_varint(len(part)), part]
    return b"".join(parts)


def _stored_codes(kind: Kind, arrays: Mapping[str, Any], name: str) -> np.ndarray:
    """The codes of a field as they are coded: padding that says nothing is left out."""
    packed, bits = arrays[name], kind.bits[name]
    codes = symbols(packed, bits)
    if kind.lanes and name == "codes" and packed.ndim == 1:
        return without_padding(codes, bits, kind.lanes)
    return codes


def _lanes(static: dict[str, Any]) -> Lanes | None:
    """How codes in groups lie, as of a `QTensor`; None for nodes without groups."""
    if "group" not in static:
        return None
    shape, axis, group = static["shape"], static["axis"], static["group"]
    count = math.prod(shape[a] for a in axis)
    live = math.prod(shape) // max(count, 1)
    return Lanes(count, -(-live // max(group, 1)) * group, live)


def plan_leaf(
    path: str, spec: Any, views: Mapping[str, np.ndarray]
) -> tuple[Fields, Callable[[dict[str, Any]], Any]]:
    """The fields of the leaf that a spec describes, and what makes the leaf of them."""
    bits, live, lanes = dict[str, int](), [""], None
    make: Callable[[Mapping[str, Any]], Any] = operator.itemgetter("")
    match ["array"] if spec == 0 else spec:
        case ["value", bool() | int() | float() | str() as value]:
            return Fields({}, {}), lambda arrays: value
        case ["array", *coded]:
            pass
        case ["key", str(impl), *coded]:

            def make(arrays: Mapping[str, Any]) -> Any:
                return jax.random.wrap_key_data(arrays[""], impl=impl)

        case [str(kind), list(values), *coded] if kind in KINDS:
            live, bits, lanes, make = node_kind(kind, values)
        case _:
            raise ValueError(f"{reprlib.repr(spec)} is none of version {VERSION}")
    names = {name: field_name(path, name) for name in live}
    fields = plan_fields(path, names, coded, bits, views, lanes)
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
            is_row = isinstance(value, list | tuple)
            numbers = value if is_row else [value]
            is_right = is_row == (field.type not in (int, bool))
            is_right &= all(isinstance(n, int) and n >= 0 for n in numbers)
        if not is_right or (field.type is bool and value > 1):
            raise ValueError(f"its {field.name} cannot be {reprlib.repr(value)}")
        static[field.name] = tuple(value) if isinstance(value, list) else value
    return static


def adopt(array: np.ndarray) -> Any:
    """A JAX array, unless JAX would narrow it; nobody else may hold ``array``."""
    if array.dtype == np.bool_ and np.any(array.view(np.uint8) > 1):
        raise ValueError("a bool is neither 0 nor 1")
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    is_long = array.nbytes >= 1 << 16  # what is short is copied faster
    return jax.device_put(array, may_alias=True) if is_long else jnp.asarray(array)
