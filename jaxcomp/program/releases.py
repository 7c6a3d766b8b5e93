"""What differs between releases of JAX in how an equation is written down."""

from typing import Any


def closed(function: Any) -> tuple[Any, list[Any]]:
    """The equations of a function inside an equation, and its constants."""
    consts = list(getattr(function, "consts", ()))
    return getattr(function, "jaxpr", function), consts


def scan_split(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many it carries."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax 0.12
    return len(consts), len(carry)
