"""``jaxcomp verify``: whether a checkpoint is whole."""

import dataclasses
import zlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from jaxcomp.commands.opened import open_leaves, size_on_disk
from jaxcomp.commands.terminal import one_line_errors, progress, show_json


def verify(
    file: Annotated[Path, typer.Argument(help="A checkpoint of any format.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead.")
    ] = False,
) -> None:
    """Read all of a checkpoint: of a .jxc every checksum, and decode every leaf.

    Ends with 0 if it is whole, 1 if it is not.
    """
    with one_line_errors():
        try:
            found = _verified(file)
        except Exception as error:
            if as_json:
                show_json({"file": str(file), "ok": False, "fault": str(error)})
            raise
    if as_json:
        show_json(found)
        return
    checked = "every checksum is right" if found["checksums"] else "it has no checksums"
    typer.echo(
        f"{file} ({found['format']}) is whole: {found['leaves']:,} leaves, "
        f"{found['bytes']:,} bytes on disk, {checked}."
    )


def _verified(file: Path) -> dict[str, Any]:
    leaves = open_leaves(file)
    with progress("verify", leaves.nbytes) as tell:
        for leaf in dataclasses.replace(leaves, tell=tell).values():
            if isinstance(leaf, np.ndarray):  # it may be mapped, and not read so far
                zlib.crc32(leaf.reshape(-1).view(np.uint8).data)
    return {
        "file": str(file),
        "ok": True,
        "format": leaves.format,
        "leaves": len(leaves),
        "bytes": size_on_disk(file),
        "checksums": leaves.format == "jaxcomp",
    }
