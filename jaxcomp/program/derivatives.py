"""Calls with a derivative of their own, as equations that can be walked."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp.program.releases import closed
from jaxcomp.program.walk import bind


FORWARD, BACKWARD = "custom_jvp_call", "custom_vjp_call"


def derivative(eqn: Any) -> tuple[Any, list[Any]]:
    """The rule that somebody gave instead of the derivative of a call.

    Returns:
      The equations, and their constants. Of a ``custom_jvp``: (operands, tangents) ->
      (results, tangents); of a ``custom_vjp``: (operands, cotangents of the results) ->
      cotangents of the operands. What is not `floating` has no tangents.
    """
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    outs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
    moved, found = floating(eqn.invars), floating(eqn.outvars)

    def run(values: Sequence[Any], some: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        full = list(values)
        for i, x in zip(moved, some, strict=True):
            full[i] = x
        results = bind(eqn, full)
        return [results[i] for i in found], results

    def forward(values: Any, tangents: Any) -> Any:
        some = [values[i] for i in moved]
        _, after, results = jax.jvp(
            lambda some: run(values, some), (some,), (tangents,), has_aux=True
        )
        return [*results, *after]

    def backward(values: Any, cotangents: Any) -> Any:
        some = [values[i] for i in moved]
        _, pull, _ = jax.vjp(lambda some: run(values, some), some, has_aux=True)
        return pull(cotangents)[0]

    if eqn.primitive.name == FORWARD:
        made = jax.make_jaxpr(forward)(avals, [avals[i] for i in moved])
    else:
        made = jax.make_jaxpr(backward)(avals, [outs[i] for i in found])
    return closed(made)


def floating(variables: Sequence[Any]) -> list[int]:
    """Which of them have derivatives."""
    return [
        i for i, v in enumerate(variables) if jnp.issubdtype(v.aval.dtype, jnp.inexact)
    ]
