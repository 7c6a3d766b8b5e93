"""What is inside a model, found in its program: no hooks, no change of its code.

A model is traced twice over: first with what each value is computed from, to find where
a parameter meets the inputs; then with arrays, to take what is there. Of the program
only those calls are opened that have such a place inside.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp.distill.outputs import Outputs, outputs_of
from jaxcomp.program.releases import closed, scan_split
from jaxcomp.program.walk import bind, called, functions, trace, walk
from jaxcomp.prune.oneshot import unique_names
from jaxcomp.tree import list_paths


NONE: Mapping[str, str] = MappingProxyType({})

REMATS = ("remat2", "checkpoint")
# Not looked into: what they give is not what any one turn, branch or device gives.
SHUT = ("while", "cond", "shard_map")
# One result for each operand, which is that operand.
SAME = ("optimization_barrier", "device_put")


def with_features(
    f: Callable[..., Any],
    outputs: Mapping[str, str] = NONE,
    *,
    inputs: Mapping[str, str] = NONE,
) -> Callable[..., Outputs]:
    """``f`` with what is inside it among its results, for terms that compare that.

    Hints of Romero et al., "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550, and
    all that came after them need such values; elsewhere they are had by hooks. Here
    ``f`` is traced where it is called, and a value is taken where a parameter, cast,
    reshaped, normalised, fake-quantized or otherwise computed from parameters and
    constants alone, first meets what depends on the inputs: a product, a sum, a lookup.
    Nothing is computed that ``f`` does not compute.

    Args:
      f: (params, *args, **kwargs) -> logits, any pytree, or `Outputs`.
      outputs: name -> place, for what the meeting gives. A place is the path of a
        parameter, e.g. "Dense_0/kernel" (an NNX path with or without "/value"), or a
        name that ``f`` gives by `jax.ad_checkpoint.checkpoint_name`, which goes before
        a path; "name/0", "name/1", ... if it gives it several times. Of a kernel this
        is the product without the bias, of a bias the sum, of an embedding the vectors
        that are looked up. Of a norm ask for the bias: the scale may meet a mere
        deviation first.
      inputs: name -> place, for what a parameter meets: of a kernel what flows into it,
        e.g. what the activation function of the layer before gave.

    Returns:
      ``g(params, *args, **kwargs)`` -> `Outputs`, those of ``f`` with these features
      among its own. Params may be compressed. Arguments that are not arrays are passed
      as they are. Of a parameter that is used several times it is the first use. Of a
      dot the axes are those of a batch, those of the input, then those of the weight,
      however it is written. In a scan every turn has a value, along a new first axis:
      layers that are stacked give float[layers, ...]. `jax.checkpoint` stays around
      what it was around, with its policy; a call with a derivative of its own is kept,
      and counts as one equation.

    Raises:
      ValueError: a name is given twice; or, when called, a place is not there, is in a
        branch, a while loop or a `jax.shard_map`, or a parameter meets no input.

    >>> f = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
    >>> g = with_features(f, {"sum": "a"}, inputs={"after": "b"})
    >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    >>> {name: x.shape for name, x in g(params, jnp.ones((4, 2))).features.items()}
    {'sum': (4, 3), 'after': (4, 3)}
    """
    if twice := sorted(outputs.keys() & inputs.keys()):
        raise ValueError(
            "with_features needs a name for each feature, got "
            f"{twice[0]!r} in both outputs and inputs. Rename one."
        )

    def g(params: Any, *args: Any, **kwargs: Any) -> Outputs:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays = {i: x for i, x in enumerate(leaves) if _check.is_array(x)}

        def whole(params: Any, arrays: dict[int, Any]) -> Outputs:
            full = (dict(enumerate(leaves)) | arrays).values()
            args, kwargs = jax.tree.unflatten(treedef, full)
            return outputs_of(f(params, *args, **kwargs))

        traced = trace(whole, params, arrays)
        search = _Search()
        made: list[_Made] = [frozenset([i]) for i in range(len(traced.params))]
        made += [None] * len(traced.inputs)
        search.go(traced.jaxpr, traced.consts, made, ())
        takes: dict[_Place, list[_Take]] = {}
        for wanted, flows in ((outputs, False), (inputs, True)):
            for name, text in wanted.items():
                site = _find(name, text, search, traced.paths)
                takes.setdefault(site.place, []).append(_Take(name, site, flows))
        values = [*traced.params, *traced.inputs]
        found, features = _Run(takes).go(traced.jaxpr, traced.consts, values, ())
        # A number that is written into the program becomes an array, as under jit.
        given = jax.tree.unflatten(traced.out_tree, [jnp.asarray(x) for x in found])
        if twice := sorted(given.features.keys() & features.keys()):
            raise ValueError(
                "with_features needs names that the model's own features do not have, "
                f"got {twice[0]!r}. Rename it."
            )
        return given._replace(features={**given.features, **features})

    return g


# The parameters that a value is computed from, or None if it depends on the inputs.
_Made = frozenset[int] | None
_Place = tuple[int, ...]  # of an equation, in the nest of calls


class _Site(NamedTuple):
    """An equation in which a parameter meets what depends on the inputs."""

    place: _Place = ()
    weight: int = 0  # which operand comes from the parameter
    other: int = 0  # which depends on the inputs
    reason: str = ""  # why nothing can be taken there


class _Take(NamedTuple):
    """What is asked for at a site."""

    name: str
    site: _Site
    flows: bool  # whether the operand is, not the result


class _Search:
    """A walk that finds the first site of every parameter, and all names."""

    def __init__(self) -> None:
        self.uses: dict[int, _Site] = {}
        self.names: list[tuple[str, _Site]] = []

    def go(
        self, jaxpr: Any, consts: Any, made: Sequence[_Made], place: _Place
    ) -> list[_Made]:
        at = count()

        def visit(eqn: Any, made: list[_Made]) -> list[_Made]:
            return self.meet(eqn, made, (*place, next(at)))

        return walk(jaxpr, consts, made, visit, constant=lambda value: frozenset())

    def meet(self, eqn: Any, made: list[_Made], place: _Place) -> list[_Made]:
        name = eqn.primitive.name
        if inner := _opened(eqn):
            return self.go(*inner, made, place)
        if name == "scan":
            return self.scan(eqn, made, place)
        if name in SAME:
            return made
        if name == "name":
            self.names.append((eqn.params["name"], _Site(place)))
        for inside in _hidden(eqn):
            reason = f"it is inside a {name!r}, which is not looked into"
            self.names.append((inside, _Site(reason=reason)))
        live = [i for i, leaves in enumerate(made) if leaves is None]
        result = None if live else frozenset().union(*filter(None, made))
        if live:
            reason = ""
            if name in SHUT or len(eqn.outvars) != 1:
                shut = "is not looked into" if name in SHUT else "gives several results"
                reason = f"it enters a {name!r}, which {shut}"
            for i, leaves in enumerate(made):
                for leaf in leaves or ():
                    self.uses.setdefault(leaf, _Site(place, i, live[0], reason))
        return [result] * len(eqn.outvars)

    def scan(self, eqn: Any, made: list[_Made], place: _Place) -> list[_Made]:
        fixed, carried = scan_split(eqn.params)
        consts, carry = made[:fixed], made[fixed : fixed + carried]
        rows, body = made[fixed + carried :], closed(eqn.params["jaxpr"])
        while True:  # until a turn gives what it takes
            outs = _Search().go(*body, [*consts, *carry, *rows], ())
            pairs = list(zip(carry, outs[:carried], strict=True))
            after = [None if a is None or b is None else a | b for a, b in pairs]
            if after == carry:
                break
            for before, later in zip(carry, after, strict=True):
                for leaf in (before or ()) if later is None else ():
                    site = _Site(reason="a scan carries it and changes it")
                    self.uses.setdefault(leaf, site)
            carry = after
        return self.go(*body, [*consts, *carry, *rows], place)


class _Run:
    """A walk with arrays that takes what is asked for."""

    def __init__(self, takes: Mapping[_Place, list[_Take]]):
        self.takes = takes
        self.open = {place[:i] for place in takes for i in range(len(place))}

    def go(
        self, jaxpr: Any, consts: Any, values: Sequence[Any], place: _Place
    ) -> tuple[list[Any], dict[str, Any]]:
        """The results, and name -> feature."""
        at, found = count(), {}

        def visit(eqn: Any, values: list[Any]) -> Sequence[Any]:
            here = (*place, next(at))
            if here in self.open:
                outs, more = self.enter(eqn, values, here)
                found.update(more)
                return outs
            outs = bind(eqn, values)
            for name, site, flows in self.takes.get(here, ()):
                taken = values[site.other] if flows else _result(eqn, site, outs[0])
                found[name] = jnp.asarray(taken)
            return outs

        return walk(jaxpr, consts, values, visit), found

    def enter(
        self, eqn: Any, values: list[Any], place: _Place
    ) -> tuple[list[Any], dict[str, Any]]:
        if eqn.primitive.name == "scan":
            return self.scan(eqn, values, place)
        inner: Any = called(eqn)
        jaxpr, consts = inner

        def run(values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
            return self.go(jaxpr, consts, values, place)

        if eqn.primitive.name not in REMATS:
            return run(values)
        keep = {k: eqn.params[k] for k in ("prevent_cse", "policy")}
        return jax.checkpoint(run, **keep)(values)

    def scan(
        self, eqn: Any, values: list[Any], place: _Place
    ) -> tuple[list[Any], dict[str, Any]]:
        fixed, carried = scan_split(eqn.params)
        split, body = fixed + carried, closed(eqn.params["jaxpr"])

        def turn(carry: list[Any], rows: list[Any]) -> tuple[list[Any], Any]:
            outs, found = self.go(*body, [*values[:fixed], *carry, *rows], place)
            return outs[:carried], (outs[carried:], found)

        settings = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
        start, rows = values[fixed:split], values[split:]
        carry, (stacked, found) = jax.lax.scan(turn, start, rows, **settings)
        return [*carry, *stacked], found


def _opened(eqn: Any) -> tuple[Any, list[Any]] | None:
    """What a call calls, unless it has a derivative of its own, which is to be kept."""
    return None if eqn.primitive.name.startswith("custom_") else called(eqn)


def _hidden(eqn: Any) -> list[str]:
    """The names that are given inside an equation, at any depth."""
    inner = [e for jaxpr in functions(eqn) for e in jaxpr.eqns]
    here = [e.params["name"] for e in inner if e.primitive.name == "name"]
    return here + [name for e in inner for name in _hidden(e)]


def _result(eqn: Any, site: _Site, out: jax.Array) -> jax.Array:
    """What an equation gives; of a dot the axes of the weight come last."""
    if eqn.primitive.name != "dot_general" or site.weight == 1:
        return out
    contracted, batch = (len(sides[0]) for sides in eqn.params["dimension_numbers"])
    units = eqn.invars[0].aval.ndim - contracted - batch
    return jnp.moveaxis(out, range(batch, batch + units), range(-units, 0))


def _find(name: str, text: str, search: _Search, paths: list[str]) -> _Site:
    """The site of a place; a name goes before a path."""
    alone = _Site(reason="it meets nothing that depends on the inputs")
    places, names = {}, {}
    for i, path in enumerate(unique_names(paths)):
        places[path] = search.uses.get(i, alone)
        places.setdefault(path.removesuffix("/value"), places[path])
    times, seen = Counter(given for given, _ in search.names), Counter[str]()
    for given, site in search.names:
        names[given if times[given] == 1 else f"{given}/{seen[given]}"] = site
        seen[given] += 1
    if text not in places | names:
        raise ValueError(
            f"with_features needs a place of the program for {name!r}, got {text!r}, "
            f"which is neither a parameter ({list_paths(paths)}) nor a name that "
            f"`checkpoint_name` gives ({list_paths([*names]) or 'there is none'})."
        )
    site = (places | names)[text]
    if site.reason:
        raise ValueError(
            f"with_features cannot take {name!r} at {text!r}: {site.reason}. Name the "
            "value with `jax.ad_checkpoint.checkpoint_name` where it can be seen, or "
            "let the model return it in `Outputs.features`."
        )
    return site
