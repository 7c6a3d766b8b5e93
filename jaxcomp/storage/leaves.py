"""The leaves of a file: what each kind is made of.

An array, a random key or a plain value; or a node, of which the static values stand in
the structure and the arrays, its fields, in tensors.
"""

import dataclasses
import math
import operator
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp import bits as packing
from jaxcomp.entropy import encode_symbols, encode_varint
from jaxcomp.node import CompressedArray, TiedTensor, is_compressed
from jaxcomp.quant import QTensor
from jaxcomp.share import SharedTensor
from jaxcomp.storage.draft import VERSION
from jaxcomp.storage.fields import Fields, is_number, plan_fields
from jaxcomp.storage.planes import Lanes, encode_array, without_padding


# Every kind of node: its class, and those of its fields that hold packed codes.
KINDS: dict[str, tuple[type[CompressedArray], tuple[str, ...]]] = {
    "QTensor": (QTensor, ("codes", "zero")),
    "SharedTensor": (SharedTensor, ("codes",)),
    "TiedTensor": (TiedTensor, ()),
}


def field_spec(array: np.ndarray) -> list:
    """The shape of a coded array, behind its dtype unless that is uint8."""
    name = array.dtype.name
    return [*([] if name == "uint8" else [name]), *array.shape]


def field_name(path: str, key: str) -> str:
    return f"{path}/{key}" if key else path


def node_parts(node: Any) -> tuple[list, dict[str, Any]]:
    """The static values of a node, in order, and its arrays by field."""
    static, arrays = [], {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if field.metadata.get("static"):
            static.append(value)
        elif value is not None:
            arrays[field.name] = value
    return static, arrays


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


def symbols(node: Any, field: str) -> np.ndarray:
    """The codes that a field of a node holds packed, pad codes too: uint[codes]."""
    packed = getattr(node, field)
    count = packed.shape[-1] * 8 // node.bits
    return np.asarray(packing.unpack(packed, node.bits, count)).reshape(-1)


def code_counts(node: Any) -> dict[str, np.ndarray]:
    """How often each code is stored, by the fields that hold packed codes."""
    fields = KINDS[type(node).__name__][1]
    held = [name for name in fields if getattr(node, name) is not None]
    return {name: np.bincount(_stored_codes(node, name)) for name in held}


def encode_fields(leaf: Any, arrays: dict[str, np.ndarray], block: Callable) -> bytes:
    """Each array coded, behind its length as a varint."""
    codes = KINDS[type(leaf).__name__][1] if is_compressed(leaf) else ()
    parts = []
    for name, array in arrays.items():
        if name in codes:
            part = encode_symbols(_stored_codes(leaf, name), block)
        else:
            part = encode_array(array, block)
        parts += [encode_varint(len(part)), part]
    return b"".join(parts)


def _stored_codes(node: Any, name: str) -> np.ndarray:
    """The codes of a field as they are coded: padding that says nothing is left out."""
    codes, lanes = symbols(node, name), _lanes(vars(node))
    if lanes and name == "codes" and node.codes.ndim == 1:
        return without_padding(codes, node.bits, lanes)
    return codes


def _lanes(static: dict[str, Any]) -> Lanes | None:
    """How the codes of a `QTensor` of such static values lie; None for other nodes."""
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
            lanes = _lanes(static)

            def make(arrays: dict[str, Any]) -> Any:
                return cls(**dict.fromkeys(live) | static | arrays)

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
            numbers = value if isinstance(value, list) else [value]
            is_right = isinstance(value, list) == (field.type not in (int, bool))
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
