"""``jaxcomp diff``: what differs between two checkpoints."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from jaxcomp.commands.opened import open_leaves
from jaxcomp.commands.terminal import one_line_errors, progress, show, show_json
from jaxcomp.difference import difference


def diff(
    a: Annotated[Path, typer.Argument(help="A checkpoint of any format.")],
    b: Annotated[Path, typer.Argument(help="Another, compressed or not.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead.")
    ] = False,
) -> None:
    """Compare two checkpoints, leaf by leaf.

    error: the length of the difference over that of A. SQNR: the same in dB. zeros +
    and -: those that B has and A has not, and the reverse.

    Ends with 0 if they are the same, 1 if a leaf, a shape, a dtype or a value differs,
    2 if one cannot be read.
    """
    with one_line_errors(2):
        first, second = open_leaves(a), open_leaves(b)
        with progress("compare", first.nbytes + second.nbytes) as tell:
            found = difference(
                dataclasses.replace(first, tell=tell),
                dataclasses.replace(second, tell=tell),
            )
    if as_json:
        show_json({"a": str(a), "b": str(b)} | found.to_dict())
    else:
        show(found)
    raise typer.Exit(0 if found.is_same else 1)
