"""What differs between releases of JAX in how an equation is written down."""

import sysconfig
from pathlib import Path
from typing import Any


# Where the standard library, the packages that are installed and this one are.
_LIBRARIES = (
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    str(Path(__file__).parents[1]),
)


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


def source(eqn: Any) -> str:
    """The line of the user's program that an equation comes from, e.g. "net.py:12".

    "" if JAX did not write it down, or only lines of libraries.
    """
    traceback = eqn.source_info.traceback
    for frame in () if traceback is None else traceback.frames:
        if not frame.file_name.startswith(_LIBRARIES):
            return f"{Path(frame.file_name).name}:{frame.line_num}"
    return ""
