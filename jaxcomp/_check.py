"""Argument checks of the public functions: each raises one error that helps.

An error says which function, what it needs, what it got with its value, and what to
do. Only static facts are checked here; values are checked in `tree.map_where`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def describe(x: Any) -> str:
    """An array's dtype and shape as one word, e.g. ``float32[3, 4]``."""
    return f"{x.dtype}{list(x.shape)}"


def is_array(x: Any) -> bool:
    """Whether ``x`` has a shape and a dtype: arrays, tracers, shape structs."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def is_floating(x: Any) -> bool:
    return is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)


def wide(dtype: Any) -> Any:
    """The dtype to compute in: 16 bits are too coarse to round or to sum in."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def is_concrete(x: Any) -> bool:
    """Whether the values of ``x`` can be read now."""
    return isinstance(x, jax.Array | np.ndarray) and not isinstance(x, jax.core.Tracer)


def floating(caller: str, x: Any) -> jax.Array:
    """``x`` as a JAX array, once it is known to be floating point."""
    x = jnp.asarray(x)
    if not is_floating(x):
        raise TypeError(
            f"{caller} needs a floating array, got {describe(x)}. Cast it, or leave "
            "this leaf out with `where`."
        )
    return x


def integer_within(caller: str, name: str, value: Any, low: int, high: int) -> int:
    """``value`` as an int, once it is known to lie in ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{caller} needs an integer {name}, got {value!r}.")
    if not low <= value <= high:
        raise ValueError(f"{caller} needs {low} <= {name} <= {high}, got {value}.")
    return int(value)


def known(value: Any) -> float | None:
    """A scalar as a float; None if it is traced."""
    if isinstance(value, jax.core.Tracer):
        return None
    with jax.ensure_compile_time_eval():
        return float(value)


def number(caller: str, name: str, value: Any) -> float | None:
    """A scalar as a float; None if it is traced. A NaN is an error."""
    found = known(value)
    if found is not None and math.isnan(found):
        raise ValueError(f"{caller} needs a number for {name}, got {value}.")
    return found
