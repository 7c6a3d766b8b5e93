"""One walk over a traced program, on values of any kind.

A traced function is a list of equations. `walk` goes through them once and asks a
function, the *visit*, what each makes of its operands. What a value is, is up to the
visit: an array, a label, a view of a parameter. All that jaxcomp knows about a model it
knows in this way, so that nothing is registered per layer and no model code changes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

from jaxcomp.node import densify, flatten
from jaxcomp.program.releases import closed


# An equation and the values of its operands to the values of its results.
Visit = Callable[[Any, list[Any]], Sequence[Any]]

# The parameter of an equation that holds the function it calls, once, as it is.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}

# What multiplies its first two operands and adds up: where weights meet activations.
PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")


class Program(NamedTuple):
    """A function, traced."""

    jaxpr: Any  # its equations; the leaves of params come first among its inputs
    consts: list[Any]  # arrays that it closes over
    paths: list[str]  # of the leaves of params, in order
    params: list[Any]  # the leaves: arrays, or their shapes
    inputs: list[Any]  # the leaves of the other arguments
    out_tree: Any  # the structure of what it returns


def trace(f: Callable[..., Any], params: Any, *inputs: Any) -> Program:
    """The equations of ``f(params, *inputs)``; nothing is computed.

    Args:
      f: (params, *inputs) -> any pytree of arrays.
      params: any pytree of arrays, shapes (`jax.ShapeDtypeStruct`) and nodes, which are
        densified first.
      *inputs: pytrees of arrays or shapes.

    >>> import jax.numpy as jnp
    >>> traced = trace(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones(3))
    >>> traced.paths, [eqn.primitive.name for eqn in traced.jaxpr.eqns]
    (['w'], ['dot_general'])
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
        params = jax.eval_shape(densify, params)
    params = densify(params)
    paths, leaves, _ = flatten(params)
    traced, out = jax.make_jaxpr(f, return_shape=True)(params, *inputs)
    jaxpr, consts = closed(traced)
    others = jax.tree.leaves(inputs)
    return Program(jaxpr, consts, paths, leaves, others, jax.tree.structure(out))


def walk(
    jaxpr: Any,
    consts: Sequence[Any],
    inputs: Sequence[Any],
    visit: Visit,
    constant: Callable[[Any], Any] = lambda value: value,
) -> list[Any]:
    """The values of the results, from those of the inputs.

    Args:
      jaxpr: equations, as those of a `Program`.
      consts: the arrays that belong to them.
      inputs: one value for each input.
      visit: (equation, values of its operands) -> values of its results. For what an
        equation calls there is `called`.
      constant: what an array or a number that is written into the program becomes.

    Returns:
      One value for each result. A value is let go after its last use.
    """
    values = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
    values |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(v: Any) -> Any:
        return constant(v.val) if isinstance(v, Literal) else values[v]

    for eqn, done in zip(jaxpr.eqns, spent(jaxpr), strict=True):
        found = visit(eqn, [read(v) for v in eqn.invars])
        values.update(zip(eqn.outvars, found, strict=True))
        for v in done:
            values.pop(v)
    return [read(v) for v in jaxpr.outvars]


def spent(jaxpr: Any) -> list[set[Any]]:
    """For every equation the variables that nothing asks for after it."""
    asked = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    found = []
    for eqn in reversed(jaxpr.eqns):
        known = (v for v in (*eqn.invars, *eqn.outvars) if not isinstance(v, Literal))
        done = set(known) - asked
        asked |= done
        found.append(done)
    return found[::-1]


def called(eqn: Any) -> tuple[Any, list[Any]] | None:
    """The function that an equation calls once with its operands, if it is a call."""
    key = CALLS.get(eqn.primitive.name)
    return None if key is None else closed(eqn.params[key])


def functions(eqn: Any) -> list[Any]:
    """The equations of every function inside an equation, known to jaxcomp or not."""
    params = [v if isinstance(v, tuple) else (v,) for v in eqn.params.values()]
    found = [closed(x)[0] for group in params for x in group]
    return [jaxpr for jaxpr in found if hasattr(jaxpr, "eqns")]


def multiplies(eqn: Any) -> bool:
    """Whether an equation is a product, or has one inside, at any depth."""
    inner = [e for jaxpr in functions(eqn) for e in jaxpr.eqns]
    return eqn.primitive.name in PRODUCTS or any(map(multiplies, inner))


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """What an equation makes of arrays."""
    settings = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:  # of the trace, e.g. how random bits are drawn
        found = eqn.primitive.bind(*values, **settings)
    return list(found) if eqn.primitive.multiple_results else [found]
