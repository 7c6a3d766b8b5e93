"""What to do with every leaf of a checkpoint, said in words.

A recipe is a plain dict, the same from options, from a TOML file and from Python. Here
and nowhere else its words become functions. `plan_tree` says what they will do to each
leaf and what it will take in a file, before anything is touched.
"""

import io
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxcomp import _check
from jaxcomp.node import flatten, is_compressed
from jaxcomp.prune import nm_mask, top_mask
from jaxcomp.quant import quantize, quantize_binary
from jaxcomp.share import palettize, palettize_to_rate
from jaxcomp.storage.container import ENTRY
from jaxcomp.storage.fields import copied, is_number
from jaxcomp.storage.file import forget
from jaxcomp.storage.leaves import adopt, plain
from jaxcomp.storage.predict import SAMPLE, coded_bytes, sample
from jaxcomp.tree import NOT_MATRICES, is_matrix, last_key, list_paths, map_where


def _within(low: float, high: float, *types: type) -> Callable[[Any], bool]:
    return lambda x: type(x) in types and low <= x < high


def _n_of_m(pattern: Any) -> list[int]:
    """The numbers of a text such as "2:4"; none if it is another."""
    found = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", str(pattern))
    numbers = [int(number) for number in found.groups()] if found else []
    return numbers if numbers == sorted(numbers) else []


# What each word may be, how an error says so, and how a plan says what it does.
_WORDS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "sparsity": (_within(0, 1, int, float), "a number in [0, 1)", "{}% zeros"),
    "pattern": (_n_of_m, "a text such as '2:4'", "{} pattern"),
    "bits": (_within(1, 9, int), "an integer from 1 to 8", "{} bits"),
    "group": (_within(1, 2**31, int), "an integer of 1 or more", "group {}"),
    "axis": (_within(-64, 64, int), "an integer such as -1 or 0", "axis {}"),
    "clusters": (_within(1, 65537, int), "an integer from 1 to 65536", "{} clusters"),
    "rate": (_within(1e-9, 1e9, int, float), "a number above 0", "{} bits a weight"),
    "lossless": (_within(1, 2, bool), "true, or left out", "lossless"),
}
_APART = [  # at most one of each
    {"bits", "clusters", "rate", "lossless"},
    *({"sparsity", "pattern", "lossless"}, {"group", "lossless"}, {"axis", "lossless"}),
]
_NEEDED = {"group": ["bits"], "axis": ["bits", "pattern"]}


class PlannedLeaf(NamedTuple):
    """What a recipe does to a leaf (``what``), or why it is left alone (``why``)."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    size: int  # weights
    what: str
    why: str
    dense_bytes: int  # bytes of the plain array
    nbytes: int  # bytes that it will take in the file, predicted
    make: Callable[[Any], Any]  # array -> what to store


class Plan(NamedTuple):
    """What `plan_tree` found; prints as a table."""

    leaves: tuple[PlannedLeaf, ...]
    total: PlannedLeaf

    def make(self, path: str, leaf: Any) -> Any:
        """What to store of a leaf; a NaN or an infinity in it is an error, by path."""
        for planned in self.leaves:
            if planned.path == path:
                return _made("Plan.make", path, planned.make, leaf)
        raise ValueError(
            f"Plan.make needs a leaf of the plan, got {path!r}. The leaves are "
            f"{list_paths([planned.path for planned in self.leaves])}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers: {"leaves": [...], "total": {...}}."""
        names = PlannedLeaf._fields[:-1]  # `make` is not plain
        rows = [
            dict(zip(names, row, strict=False)) for row in (*self.leaves, self.total)
        ]
        return {"leaves": rows[:-1], "total": rows[-1]}

    def __rich__(self) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for name in ("leaf", "what", "array"):
            table.add_column(name, overflow="fold")
        for name in ("bytes", "predicted", "ratio"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in (*self.leaves, self.total):
            if row is self.total:
                table.add_section()
            table.add_row(
                escape(row.path),
                escape(row.what or (row.why and f"left: {row.why}")),
                row.dtype and f"{row.dtype}[{','.join(map(str, row.shape))}]",
                *(f"{row.dense_bytes:,}", f"{row.nbytes:,}"),
                f"{row.dense_bytes / row.nbytes:.1f}x" if row.nbytes else "",
                style="bold" if row is self.total else "dim" if row.why else None,
            )
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=110).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def read_recipe(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a recipe from a TOML file, and checks its words.

    Raises:
      ValueError: it is not TOML, or `plan_tree` would not take it. It names the file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with open(folder + "/small.toml", "w") as file:
    ...         size = file.write("set.'head/*' = {clusters = 16}")
    ...     read_recipe(folder + "/small.toml")
    {'set': {'head/*': {'clusters': 16}}}
    """
    with open(path, "rb") as file:
        try:
            fault = _fault(recipe := tomllib.load(file))
        except ValueError as error:  # of the syntax or of the encoding
            fault = f"needs TOML: {error}"
    if fault:
        raise ValueError(f"read_recipe {fault} (in {path}).")
    return recipe


def plan_tree(params: Any, recipe: Mapping[str, Any]) -> Plan:
    """Says what a recipe does to every leaf and what it will take, and does nothing.

    Words stand for all leaves that `is_matrix` selects, unless ``keep``, a list of
    patterns, leaves them alone, or ``set`` has other words for a pattern: those then
    stand instead, for floating leaves of any kind, and the last that matches wins.
    Patterns are those of the shell, for the whole path; "*" stands for "/" too.

    - ``bits``: 2 to 8 as `quantize`, 1 as `quantize_binary`. ``group``: entries that
      share a scale. ``axis``: the axis that keeps a scale per index, the last unless it
      is given (of a vector none); the (out, in) of PyTorch wants 0.
    - ``clusters``: the most distinct values, as `palettize`.
    - ``rate``: bits per weight in the file, as `palettize_to_rate`.
    - ``sparsity``: the fraction of each leaf, smallest weights first, to make zero.
    - ``pattern``: "2:4" keeps the largest 2 of every 4 weights along the contraction:
      the axis behind ``axis``, or before it if that is the last; where 4 does not
      divide it, the last weights are a group too. As ``sparsity``, it may go with
      ``bits``, ``clusters`` or ``rate``; its zeros stay.
    - ``lossless``: true leaves all arrays as they are, for the file to code.

    Args:
      params: any pytree that `save` takes. NumPy arrays may be memory-mapped; shape
        structs will do; nodes are left alone.
      recipe: words, e.g. ``{"bits": 4, "group": 64, "keep": ["*/norm/*"], "set":
        {"encoder/*/mlp/*": {"bits": 3, "group": 32}}}``.

    Returns:
      A `Plan`. Bytes are predicted from 65,536 weights of each leaf, or a few channels
      if those are more; of shape structs, they are those without entropy coding.

    Raises:
      ValueError: a word or its company is wrong, a pattern matches no leaf or a wrong
        one, nothing is to be done, or the weights looked at hold a NaN or infinity.

    >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.ones(8)}
    >>> plan = plan_tree(params, {"bits": 4, "group": 32})
    >>> [(row.path, row.what, row.why) for row in plan.leaves]
    [('bias', '', 'bias'), ('kernel', '4 bits, group 32', '')]
    """
    if fault := _fault(recipe):
        raise ValueError(f"plan_tree {fault}.")
    paths, leaves, _ = flatten(params)
    common = {word: value for word, value in recipe.items() if word in _WORDS}
    cases: list[Any] = [(pattern, {}) for pattern in recipe.get("keep", [])]
    cases += recipe.get("set", {}).items()
    for pattern, _ in cases:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ValueError(
                f"plan_tree needs patterns that match, but {pattern!r} matches none of "
                f"the {len(paths)} leaves, which are {list_paths(paths)}. A pattern "
                "must match the whole path."
            )
    rows = []
    for path, leaf in zip(paths, leaves, strict=True):
        hits = [case for case in cases if fnmatchcase(path, case[0])]
        pattern, words = hits[-1] if hits else ("", common)
        is_kept = hits and not hits[0][1]
        why = f"keep {hits[0][0]!r}" if is_kept else _why(path, leaf, words, bool(hits))
        if why and hits and words:
            fault = f"do to leaf {path!r} what 'set' says of {pattern!r}: {why}"
            raise ValueError(f"plan_tree cannot {fault}. Narrow the pattern.")
        rows.append(_planned(path, leaf, {} if why else words, why))
    if rows and all(row.why for row in rows):
        reasons = list_paths([f"{row.path} ({row.why})" for row in rows])
        raise ValueError(
            f"plan_tree found nothing to do: it would leave all {len(rows)} leaves "
            f"alone, which are {reasons}. Name some in 'set'."
        )
    size, nbytes = sum(row.size for row in rows), sum(row.nbytes for row in rows)
    dense = sum(row.dense_bytes for row in rows)
    total = PlannedLeaf("total", (), "", size, "", "", dense, nbytes, _same)
    return Plan(tuple(rows), total)


def apply_plan(params: Any, plan: Plan) -> Any:
    """Does to every leaf what `Plan.make` does; those left alone are the same objects.

    >>> params = {"kernel": jnp.array([[0.1, -0.2, 0.5, 1.0]])}
    >>> apply_plan(params, plan_tree(params, {"sparsity": 0.5}))["kernel"]
    Array([[0. , 0. , 0.5, 1. ]], dtype=float32)
    """
    paths, leaves, treedef = flatten(params)
    return jax.tree.unflatten(treedef, map(plan.make, paths, leaves))


def _fault(recipe: Any) -> str:
    """What is wrong with a recipe; empty if nothing is."""
    if not isinstance(recipe, Mapping) or not recipe.keys() - {"keep"}:
        return f"needs words such as {{'bits': 4, 'group': 64}}, got {recipe!r}"
    common = dict(recipe)
    keep, special = common.pop("keep", []), common.pop("set", {})
    if not isinstance(keep, list) or not all(isinstance(p, str) for p in keep):
        return f"needs 'keep' to be a list of texts, got {keep!r}"
    tables = special.values() if isinstance(special, Mapping) else [None]
    if not all(isinstance(words, Mapping) and words for words in tables):
        return f"needs 'set' to give a table of words for each pattern, got {special!r}"
    faults = [_words_fault(f" of {p!r}", words) for p, words in special.items()]
    return next(filter(None, [_words_fault("", common), *faults]), "")


def _words_fault(place: str, words: Mapping[str, Any]) -> str:
    for word, value in words.items():
        if word not in _WORDS:
            return f"knows no {word!r}{place}, only {', '.join(_WORDS)}, keep and set"
        if not _WORDS[word][0](value):
            return f"needs {word!r}{place} to be {_WORDS[word][1]}, got {value!r}"
    for few in _APART:
        if len(both := sorted(words.keys() & few)) > 1:
            return f"cannot do {both} together{place}: leave out all but one"
    for word, others in _NEEDED.items():
        if word in words and not words.keys() & others:
            return (
                f"needs {' or '.join(others)} beside {word!r}{place}, which it is for"
            )
    return ""


def _why(path: str, leaf: Any, words: Mapping[str, Any], is_asked: bool) -> str:
    """Why a leaf is left alone; empty if it is not."""
    if is_compressed(leaf):
        return f"already {leaf.describe()}"
    if not _check.is_array(leaf) or not is_number(leaf.dtype):
        return str(leaf.dtype) if _check.is_array(leaf) else type(leaf).__name__
    if "lossless" in words:
        return ""
    if not _check.is_floating(leaf) or 0 in leaf.shape:
        return "empty" if 0 in leaf.shape else "not floating"
    if is_asked or is_matrix(path, leaf):
        return "" if words else "not in 'set'"
    return last_key(path) if last_key(path) in NOT_MATRICES else f"{leaf.ndim}-D"


def _same(leaf: Any) -> Any:
    return leaf


@partial(jax.jit, static_argnames="sparsity")
def _pruned(x: jax.Array, sparsity: float) -> jax.Array:
    return jnp.where(top_mask(jnp.abs(x), sparsity), x, jnp.zeros((), x.dtype))


@partial(jax.jit, static_argnames=("pattern", "along"))
def _patterned(x: jax.Array, pattern: str, along: int) -> jax.Array:
    mask = nm_mask(jnp.abs(x), *_n_of_m(pattern), along=along)
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def _made(caller: str, path: str, make: Callable[[Any], Any], leaf: Any) -> Any:
    """``make(leaf)``, once its values are finite; an error names the leaf."""
    if make is _same:
        return leaf
    array = leaf
    if isinstance(leaf, np.ndarray):
        array = adopt(copied(plain(leaf)))  # JAX would copy it twice
        forget(leaf)
    try:
        return map_where(make, {path: array}, lambda *_: True, caller=caller)[path]
    except ValueError as error:  # what `where` leaves out elsewhere, a recipe keeps
        raise ValueError(str(error).replace("`where`", "'keep'")) from error


def _maker(words: Mapping[str, Any], axis: int | None, along: int) -> Any:
    """The function of an array that the words of a leaf stand for."""
    steps: list[Callable[[Any], Any]] = []
    if "sparsity" in words:
        steps.append(partial(_pruned, sparsity=words["sparsity"]))
    if "pattern" in words:
        steps.append(partial(_patterned, pattern=words["pattern"], along=along))
    if "bits" in words:
        wide: Any = partial(quantize, bits=words["bits"])
        grid = quantize_binary if words["bits"] == 1 else wide
        steps.append(partial(grid, axis=axis, group=words.get("group")))
    if "clusters" in words:
        steps.append(partial(palettize, clusters=words["clusters"]))
    if "rate" in words:
        steps.append(partial(palettize_to_rate, rate=words["rate"]))
    return (lambda x: reduce(lambda y, step: step(y), steps, x)) if steps else _same


def _planned(path: str, leaf: Any, words: Mapping[str, Any], why: str) -> PlannedLeaf:
    if not _check.is_array(leaf) or not is_number(leaf.dtype):
        return PlannedLeaf(path, (), "", 0, "", why, 0, 0, _same)
    shape, size, width = tuple(leaf.shape), math.prod(leaf.shape), leaf.dtype.itemsize
    axis, along = words.get("axis", -1 if len(shape) > 1 else None), -1
    fits = axis is None or -len(shape) <= axis < len(shape)
    if fits and axis is not None:
        axis %= len(shape)
        along = axis + 1 if axis + 1 < len(shape) else axis - 1
    if not fits or ("pattern" in words and not shape):
        raise ValueError(
            f"plan_tree cannot do {dict(words)} to leaf {path!r}, which is "
            f"{_check.describe(leaf)}: it has no such axis. Give another 'axis', or "
            "keep the leaf."
        )
    make = _maker(words, axis, along)
    if is_compressed(leaf):
        nbytes = coded_bytes(leaf, 1)
    elif _check.is_concrete(leaf):
        nbytes = _predicted(path, np.asarray(leaf), words, axis, along)
        forget(leaf)  # of a mapped checkpoint, a sample touches most pages
    elif "bits" in words:
        nbytes = jax.eval_shape(make, leaf).nbits() / 8
    else:
        most = words.get("clusters", 1)  # a codebook has no more, and a code is as wide
        bits = (most - 1).bit_length() if most > 1 else 8 * width
        nbytes = size * min(bits, words.get("rate", bits)) / 8 + most * width
    values = {**words, "sparsity": f"{100 * words.get('sparsity', 0):.6g}"}
    what = ", ".join(_WORDS[w][2].format(values[w]) for w in _WORDS if w in words)
    nbytes = math.ceil(nbytes) + ENTRY + len(path)
    dtype, dense = str(leaf.dtype), size * width
    return PlannedLeaf(path, shape, dtype, size, what, why, dense, nbytes, make)


def _predicted(
    path: str, x: np.ndarray, words: Mapping[str, Any], axis: int | None, along: int
) -> float:
    """Bytes that a leaf will take in the file, from a part of it."""
    steps = {word: words[word] for word in words if word != "rate"}
    part, make = x, _maker(steps, axis, along)
    is_flat = "bits" not in words and "pattern" not in words
    if x.size > SAMPLE and (is_flat or axis is not None):
        part, make = sample(x, None if is_flat else axis), _maker(steps, 0, -1)
    if words.keys() - {"lossless"} and not np.isfinite(part).all():
        _made("plan_tree", path, lambda whole: whole, x)  # says where in the leaf
    coded = coded_bytes(
        _made("plan_tree", path, make, part), x.size / max(part.size, 1)
    )
    return min(coded, words.get("rate", math.inf) * x.size / 8)
