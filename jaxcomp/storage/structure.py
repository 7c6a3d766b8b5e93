"""The shape of a tree as JSON: dicts, lists and tuples, int and str keys kept apart.

A dict with string keys is a JSON object; other containers are arrays that begin with
"list", "tuple" or "dict", the last with pairs of key and value. What else there is
describes a leaf, its spec; those that several leaves have may stand in a list beside.
A container of another class (an ``nnx.State``, a NamedTuple, an Equinox module) is kept
as the dict of its fields.
"""

import json
import reprlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from jaxcomp.node import is_compressed, path_of


def encode_tree(tree: Any, leaf: Callable[[str, Any], Any]) -> Any:
    """JSON for a tree; ``leaf(path, value)`` gives the JSON of each leaf.

    Raises:
      TypeError: a dict key is neither a string nor an integer.

    >>> encode_tree({"a": (1.5, None)}, lambda path, value: [path, value])
    {'a': ['tuple', ['a/0', 1.5], None]}
    """

    def encode(path: str, x: Any) -> Any:
        if x is None:
            return None
        children = [] if is_compressed(x) else _children(x)
        if children is None or is_compressed(x):
            return leaf(path, x)
        named = [(key, encode(_join(path, name), c)) for key, name, c in children]
        if type(x) in (list, tuple):
            return [type(x).__name__, *(value for _, value in named)]
        for key, _ in named:
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise TypeError(
                    f"save needs dict keys that are strings or integers, got {key!r} "
                    f"in {path or 'the tree'!r}."
                )
        if all(isinstance(key, str) for key, _ in named):
            return dict(named)
        return ["dict", *([key, value] for key, value in named)]

    return encode("", tree)


def decode_tree(structure: Any, leaf: Callable[[str, Any], Any]) -> Any:
    """The inverse of `encode_tree`; ``leaf(path, spec)`` gives the value of each leaf.

    >>> decode_tree({"a": ["tuple", 7, None]}, lambda path, spec: (path, spec))
    {'a': (('a/0', 7), None)}
    """

    def decode(path: str, x: Any) -> Any:
        if x is None:
            return None
        if isinstance(x, dict):
            return {key: decode(_join(path, key), value) for key, value in x.items()}
        match x:
            case ["dict", *pairs]:
                return {key: decode(_join(path, str(key)), v) for key, v in pairs}
            case ["list" | "tuple" as kind, *items]:
                values = [decode(_join(path, str(i)), v) for i, v in enumerate(items)]
                return tuple(values) if kind == "tuple" else values
        return leaf(path, x)

    return decode("", structure)


def share_specs(specs: dict[str, list]) -> tuple[list, dict[str, Any]]:
    """Names specs that several leaves have by their place in a list, from 1 on.

    >>> share_specs({"a": ["array", 7], "b": ["array", 7], "c": ["value", 3]})
    ([['array', 7]], {'a': 1, 'b': 1, 'c': ['value', 3]})
    """
    texts = {path: json.dumps(spec) for path, spec in specs.items()}
    often = Counter(texts.values())
    places: dict[str, int] = {}
    for text in texts.values():
        if often[text] > 1 and len(text) > 4:
            places.setdefault(text, len(places) + 1)
    named = {path: places.get(texts[path], spec) for path, spec in specs.items()}
    return [json.loads(text) for text in places], named


def find_spec(spec: Any, shared: list) -> Any:
    """The spec of a leaf that may have the place of it instead, or of its beginning.

    Raises:
      ValueError: there is no such place.

    >>> find_spec([1, 40], [["array", {"": [7]}]])
    ['array', {'': [7]}, 40]
    """
    match spec:
        case int(place), *offset:
            found = find_spec(place, shared)
            if not isinstance(found, list):
                raise ValueError(f"{reprlib.repr(spec)} names no spec")
            return [*found, *offset]
        case int(place) if place and not isinstance(place, bool):
            if not 1 <= place <= len(shared):
                raise ValueError(f"{place} is no place among {len(shared)} specs")
            return shared[place - 1]
    return spec


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _children(x: Any) -> list[tuple[Any, str, Any]] | None:
    """(key, name in a path, child) one level down; None if ``x`` is a leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
    if any(not keys for keys, _ in flat):
        return None
    return [(_key(keys[0]), path_of(keys), child) for keys, child in flat]


def _key(entry: Any) -> Any:
    """The key as the container holds it, from JAX's entry for it."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)
