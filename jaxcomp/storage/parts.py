"""A tree as plain arrays and one text, for formats that know neither nodes nor keys.

The text is JSON with the containers, the kind of each leaf and its static values. The
arrays lie where the leaves were, those of a node in a dict by field.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp.node import flatten, is_compressed
from jaxcomp.storage.fields import is_number
from jaxcomp.storage.leaves import KINDS, node_kind, node_parts
from jaxcomp.storage.structure import decode_tree, encode_tree


_VERSION = "1"  # of the text


def part_tree(tree: Any, takes: Callable[[Any], Any]) -> tuple[str, Any]:
    """Parts a tree into a text that says what each leaf is, and the arrays of all.

    Args:
      tree: any tree that `save` takes.
      takes: array -> whether the format stores it as it is. Another is stored as its
        bytes, uint8[bytes], or not at all if it is empty.

    Returns:
      (text, parts). The parts are dicts, lists and tuples of arrays and numbers.

    Raises:
      TypeError: a leaf or a key is of a type that has no place in a file.
      ValueError: two leaves have the same path.

    >>> part_tree({"w": np.ones(2), "step": 3}, lambda x: True)[0]
    '1 {"step":["value",3],"w":["array",[],{"":0}]}'
    """
    stored: dict[str, Any] = {}

    def leaf(path: str, x: Any) -> list:
        if path in stored:
            raise ValueError(
                "write_checkpoint needs a path of its own for every leaf, but two are "
                f"{path!r}. Rename a key that has a '/'."
            )
        if isinstance(x, bool | int | float | str) and not _check.is_array(x):
            stored[path] = None if isinstance(x, str) else x  # Orbax takes no strings
            return ["value", x]
        kind, static, arrays = _described(path, x)
        parts = {field: _part(a, takes) for field, a in arrays.items()}
        stored[path] = _nested(parts) if is_compressed(x) else parts[""]
        specs = {f: 0 if takes(a) else _spec(a) for f, a in arrays.items()}
        return [kind, static, specs]

    structure = encode_tree(tree, leaf)
    text = json.dumps(structure, separators=(",", ":"))
    return f"{_VERSION} {text}", decode_tree(structure, lambda path, _: stored[path])


def join_parts(text: str, parts: Any) -> Any:
    """The tree that `part_tree` parted.

    Args:
      text: what it said of the leaves.
      parts: its arrays; what was a list or a tuple may have become a dict.

    Raises:
      ValueError: the text is of another version, or does not describe the parts.

    >>> join_parts(*part_tree([jax.random.key(1), ("adam",)], lambda x: True))[1]
    ('adam',)
    """
    version, _, structure = text.partition(" ")
    if version != _VERSION:
        raise ValueError(f"it is of version {version} and needs another jaxcomp")
    stored = dict(zip(*flatten(parts)[:2], strict=True))

    def leaf(path: str, spec: Any) -> Any:
        match spec:
            case ["value", value]:
                return value
            case [str(kind), list(static), dict(specs)]:
                found = {
                    field: _whole("/".join(filter(None, [path, field])), a, stored)
                    for field, a in specs.items()
                }
                return _made(kind, static, found)
        raise ValueError(f"{spec!r} describes no leaf of version {_VERSION}")

    return decode_tree(json.loads(structure), leaf)


def is_key(x: Any) -> bool:
    return _check.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def to_jax(x: Any) -> Any:
    """A NumPy array as a JAX array, unless JAX would narrow it; else ``x``."""
    if not isinstance(x, np.ndarray | np.generic):
        return x
    return jnp.asarray(x) if jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype else x


def _described(path: str, x: Any) -> tuple[str, list, dict[str, Any]]:
    """The kind of a leaf, its static values, and its arrays by field."""
    if is_compressed(x) and type(x).__name__ in KINDS:
        return type(x).__name__, *node_parts(x)
    if is_key(x):
        return "key", [str(jax.random.key_impl(x))], {"": jax.random.key_data(x)}
    held = _check.is_concrete(x) or isinstance(x, np.generic)
    if held and is_number(x.dtype):
        return "array", [], {"": x}
    raise TypeError(
        "write_checkpoint needs arrays of numbers, nodes of jaxcomp, numbers and "
        f"strings, but leaf {path!r} is of type {type(x).__name__}. Take it out, or "
        "densify it."
    )


def _made(kind: str, static: list, arrays: dict[str, Any]) -> Any:
    """The leaf that `_described` described."""
    if kind == "array":
        return arrays[""]
    if kind == "key":
        return jax.random.wrap_key_data(jnp.asarray(arrays[""]), impl=static[0])
    return node_kind(kind, static).make({k: to_jax(a) for k, a in arrays.items()})


def _spec(x: Any) -> list:
    return [x.dtype.name, *x.shape]


def _nested(parts: dict[str, Any]) -> dict[str, Any]:
    """A dict for each node in a node: no format likes a "/" in a key."""
    found: dict[str, Any] = {}
    for field, part in parts.items():
        *outer, last = field.split("/")
        place = found
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = part
    return found


def _part(x: Any, takes: Callable[[Any], Any]) -> Any:
    if takes(x):
        return x
    return np.frombuffer(np.asarray(x).tobytes(), np.uint8) if x.size else None


def _whole(path: str, spec: Any, stored: dict[str, Any]) -> Any:
    """The array that `_part` stored under a path."""
    if spec == 0:
        return stored[path]
    dtype, shape = jnp.dtype(spec[0]), tuple(spec[1:])
    data = b"" if 0 in shape else np.asarray(stored[path]).tobytes()
    return np.frombuffer(data, dtype).reshape(shape)
