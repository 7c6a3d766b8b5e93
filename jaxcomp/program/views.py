"""Which parameter an operand is: provenance through data movement.

A value is a *view* of a parameter if it came from it by data movement and casts alone.
The chain of movements is kept. Played again on the positions of the parameter it tells
where every element of the view is in the parameter, whatever the model did to it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxcomp.program.walk import bind


# Primitives that leave every element where it is, casts among them.
STAYS = (
    *("convert_element_type", "reduce_precision"),
    *("copy", "copy_p", "name", "stop_gradient"),
    *("sharding_constraint", "reshard", "device_put"),
)
# Primitives that move or drop elements.
MOVES = (
    *("reshape", "transpose", "squeeze", "expand_dims", "rev"),
    *("slice", "dynamic_slice", "split", "unstack"),
)


class View(NamedTuple):
    """A value that is a parameter, moved."""

    leaf: int  # which leaf of params
    chain: tuple[tuple[Any, int], ...] = ()  # equations, and which of their results
    layers: tuple[int, ...] = ()  # lengths of the scans that slice it, outermost first

    def sliced(self, length: int) -> "View":
        """The slice of it that one turn of a scan sees."""
        return View(self.leaf, (*self.chain, (None, length)), (*self.layers, length))


def is_move(eqn: Any) -> bool:
    """Whether an equation only moves the elements of its first operand.

    Where to must be written into the program: all other operands are numbers.
    """
    if not all(isinstance(v, Literal) for v in eqn.invars[1:]):
        return False
    if eqn.primitive.name == "broadcast_in_dim":
        return eqn.outvars[0].aval.size == eqn.invars[0].aval.size
    return eqn.primitive.name in (*STAYS, *MOVES)


def moved(eqn: Any, view: View) -> list[View]:
    """The views that a movement makes of one."""
    return [
        view._replace(chain=(*view.chain, (eqn, i))) for i in range(len(eqn.outvars))
    ]


def index_map(view: View, shape: tuple[int, ...]) -> np.ndarray:
    """Where every element of a view is in its parameter.

    Args:
      view: from `moved`.
      shape: of the parameter.

    Returns:
      int32, of the shape of the view: positions in C order. If scans slice the
      parameter, axes of their lengths come first, outermost first.
    """
    with jax.ensure_compile_time_eval():
        places = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.int32).reshape(shape)
        return np.asarray(_play(list(view.chain), places))


def _play(chain: list[tuple[Any, int]], places: jax.Array) -> jax.Array:
    for step, (eqn, result) in enumerate(chain):
        if eqn is None:  # a scan: every turn has its own slice
            rest = chain[step + 1 :]
            return jnp.stack([_play(rest, places[i]) for i in range(result)])
        if eqn.primitive.name not in STAYS:
            places = bind(eqn, [places, *(v.val for v in eqn.invars[1:])])[result]
    return places
