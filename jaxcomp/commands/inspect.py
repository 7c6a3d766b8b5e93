"""``jaxcomp inspect``: what a checkpoint holds."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from jaxcomp.commands.opened import open_leaves, size_on_disk
from jaxcomp.commands.terminal import one_line_errors, progress, show, show_json
from jaxcomp.inspection import inspect_tree
from jaxcomp.storage import read_notes


def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint of any format.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead.")
    ] = False,
) -> None:
    """Show what a checkpoint holds, leaf by leaf.

    what: what was done to a leaf, or what would make it smaller. bits: the entropy of a
    value, or of a code. histogram: from the least to the greatest value, at most 4
    standard deviations from the mean. coded: what lossless coding leaves of the bytes.
    Of leaves of more than 2**20 values a sample is looked at, except for the zeros and
    the range; "+" marks it.
    """
    with one_line_errors():
        leaves = open_leaves(file)
        with progress("inspect", leaves.nbytes) as tell:
            found = inspect_tree(dataclasses.replace(leaves, tell=tell))
        size = size_on_disk(file)
        notes = read_notes(file) if leaves.format == "jaxcomp" else {}
    if as_json:
        about = {"file": str(file), "format": leaves.format, "bytes": size}
        show_json(about | {"notes": notes} | found.to_dict())
        return
    show(found)
    ratio = found.dense_bytes / max(size, 1)
    typer.echo(
        f"{file} ({leaves.format}): {size:,} bytes on disk, {ratio:.1f}x smaller than "
        f"its {found.dense_bytes:,} bytes of arrays."
    )
    for name, note in notes.items():
        typer.echo(f"{name}: {note}")
