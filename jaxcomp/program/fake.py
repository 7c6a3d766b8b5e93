"""Fake quantization of a whole function: every product of a weight and an activation.

The program is walked with two arrays for each parameter, as it is and as it is rounded.
Both take the same way through reshapes, transposes, slices and scans. Where the second
meets an activation in a dot or a convolution, it is taken; everywhere else the first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.node import densify, flatten
from jaxcomp.program.releases import closed, scan_split
from jaxcomp.program.views import is_move
from jaxcomp.program.walk import PRODUCTS, bind, called, multiplies, trace, walk
from jaxcomp.tree import Where, is_matrix, select


Round = Callable[[jax.Array], jax.Array]

DERIVATIVES = ("custom_jvp_call", "custom_vjp_call")


class _Weight(NamedTuple):
    """A parameter on its way to a product."""

    plain: Any
    rounded: Any


def fake_quantized(
    f: Callable[..., Any],
    *,
    weights: Round | None = None,
    activations: Round | None = None,
    where: Where = is_matrix,
) -> Callable[..., Any]:
    """``f`` with its weights, or what meets them, rounded as in deployment.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 3, without a change of
    the model: ``f`` is traced, and in every dot and convolution one operand of which is
    a selected parameter, however moved or cast, ``weights`` rounds the parameter and
    ``activations`` the other operand. A parameter is rounded once, in its own layout,
    so that its grid is the one that is stored; an embedding that is tied to the output
    layer is looked up as it is.

    Args:
      f: (params, *inputs) -> any pytree.
      weights: float[*shape] -> float[*shape], e.g. ``partial(jc.fake_quantize,
        bits=4)``, straight-through; None leaves them.
      activations: the same for the other operand, e.g. ``partial(jc.fake_quantize,
        axis=None)``; None leaves them.
      where: (path, leaf) -> bool; parameters whose products are rounded.

    Returns:
      A function like ``f``, traced anew where it is called: it can be jitted,
      differentiated and vmapped. Calls with derivatives of their own are kept, unless a
      weight enters one that multiplies; then it is walked, and its derivative is that
      of its parts.

    Raises:
      ValueError: nothing is selected, or a weight enters what cannot be walked and
        multiplies, such as a `jax.shard_map` or a kernel.

    >>> import jax.numpy as jnp
    >>> import jaxcomp as jc
    >>> f = lambda params, x: x @ params["kernel"]
    >>> g = fake_quantized(f, weights=lambda w: jc.fake_quantize(w, bits=2))
    >>> params = {"kernel": jnp.array([[1.0, 0.2], [0.4, 0.3]])}
    >>> g(params, jnp.eye(2))
    Array([[1. , 0.3],
           [0. , 0.3]], dtype=float32)
    """

    def visit(eqn: Any, values: list[Any]) -> list[Any]:
        if not any(isinstance(v, _Weight) for v in values):
            return bind(eqn, values)
        name = eqn.primitive.name
        inner = called(eqn)
        if inner is not None:
            if name in ("remat2", "checkpoint"):
                return _checkpointed(eqn, inner, values)
            found = walk(*inner, values, visit)
            if name in DERIVATIVES and not multiplies(eqn):
                return _kept(eqn, values, found)
            return found
        if name in LOOPS:
            return LOOPS[name](eqn, values)
        if name in PRODUCTS and isinstance(values[0], _Weight) != isinstance(
            values[1], _Weight
        ):
            operands = [*map(_operand, values[:2]), *map(_plain, values[2:])]
            return bind(eqn, operands)
        if name not in PRODUCTS and multiplies(eqn):
            raise ValueError(
                f"fake_quantized needs to see where weights are multiplied, but one "
                f"enters a {name!r}, which it does not look into. Call fake_quantized "
                "inside of it, or leave the weight out with `where`."
            )
        plain = bind(eqn, list(map(_plain, values)))
        if is_move(eqn):
            rounded = bind(eqn, list(map(_rounded, values)))
            return [_Weight(*pair) for pair in zip(plain, rounded, strict=True)]
        return plain

    def _operand(value: Any) -> Any:
        if isinstance(value, _Weight) or activations is None:
            return _rounded(value)
        return activations(value)

    def _kept(eqn: Any, values: list[Any], found: list[Any]) -> list[Any]:
        """A call with a derivative of its own, bound as it is on both arrays."""
        plain = bind(eqn, list(map(_plain, values)))
        rounded = bind(eqn, list(map(_rounded, values)))
        pairs = zip(found, plain, rounded, strict=True)
        return [_Weight(p, r) if isinstance(v, _Weight) else p for v, p, r in pairs]

    def _inside(function: Any, values: list[Any]) -> list[Any]:
        """The results of a function inside an equation, as plain arrays."""
        jaxpr, consts = closed(function)
        return list(map(_plain, walk(jaxpr, consts, values, visit)))

    def _checkpointed(eqn: Any, inner: Any, values: list[Any]) -> list[Any]:
        def run(values: list[Any]) -> list[Any]:
            return list(map(_plain, walk(jaxpr, consts, values, visit)))

        jaxpr, consts = inner
        keep = {k: eqn.params[k] for k in ("prevent_cse", "policy")}
        return jax.checkpoint(run, **keep)(values)

    def _scan(eqn: Any, values: list[Any]) -> list[Any]:
        params = eqn.params
        fixed, carried = scan_split(params)
        split = fixed + carried
        consts, carry, rows = values[:fixed], values[fixed:split], values[split:]

        def turn(carry: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
            out = _inside(params["jaxpr"], [*consts, *carry, *rows])
            return out[:carried], out[carried:]

        settings = {k: params[k] for k in ("length", "reverse", "unroll")}
        # What is carried changes from turn to turn, and is no parameter any more.
        carry, stacked = jax.lax.scan(turn, list(map(_plain, carry)), rows, **settings)
        return [*carry, *stacked]

    def _while(eqn: Any, values: list[Any]) -> list[Any]:
        params = eqn.params
        first = params["cond_nconsts"]
        split = first + params["body_nconsts"]
        asked, fixed, carry = values[:first], values[first:split], values[split:]
        return jax.lax.while_loop(
            lambda carry: _inside(params["cond_jaxpr"], [*asked, *carry])[0],
            lambda carry: _inside(params["body_jaxpr"], [*fixed, *carry]),
            list(map(_plain, carry)),
        )

    def _cond(eqn: Any, values: list[Any]) -> list[Any]:
        index, *operands = values
        branches = [
            lambda *operands, branch=branch: _inside(branch, list(operands))
            for branch in eqn.params["branches"]
        ]
        return jax.lax.switch(_plain(index), branches, *operands)

    LOOPS = {"scan": _scan, "while": _while, "cond": _cond}

    def g(params: Any, *inputs: Any) -> Any:
        params = densify(params)
        traced = trace(f, params, *inputs)
        chosen = jax.tree.leaves(select(params, where))
        leaves = flatten(params)[1]
        values = [
            _Weight(x, x if weights is None else weights(x)) if taken else x
            for x, taken in zip(leaves, chosen, strict=True)
        ]
        values += traced.inputs
        found = walk(traced.jaxpr, traced.consts, values, visit)
        # A number that is written into the program becomes an array, as under jit.
        results = [jnp.asarray(_plain(v)) for v in found]
        return jax.tree.unflatten(traced.out_tree, results)

    return g


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, _Weight) else value


def _rounded(value: Any) -> Any:
    return value.rounded if isinstance(value, _Weight) else value
