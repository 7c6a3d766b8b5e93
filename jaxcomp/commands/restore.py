"""``jaxcomp restore``: a compressed checkpoint as plain arrays again."""

import time
from pathlib import Path
from typing import Annotated

import typer

from jaxcomp.commands.opened import INDEX, is_own, open_leaves, size_on_disk
from jaxcomp.commands.terminal import one_line_errors, progress, show_json
from jaxcomp.node import densify
from jaxcomp.storage import read_checkpoint, restore_checkpoint, write_checkpoint


def restore(
    file: Annotated[Path, typer.Argument(help="A checkpoint, compressed or not.")],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            help=f".safetensors, {INDEX}, .npz, .msgpack, .orbax or .jxc.",
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead.")
    ] = False,
) -> None:
    """Write a compressed checkpoint as plain arrays, for any other tool.

    The name of the new file says its format. Leaves keep their names; those that were
    compressed have the dtype that they had before.
    """
    start = time.perf_counter()
    with one_line_errors():
        leaves = open_leaves(file)
        if is_own(file):
            with progress("restore", leaves.nbytes) as tell:
                after = restore_checkpoint(
                    file, out, seen=lambda path, _: tell(leaves.sizes[path])
                )
        else:
            after = write_checkpoint(out, densify(read_checkpoint(file)))
    seconds = time.perf_counter() - start
    before = size_on_disk(file)
    found = {
        "file": str(file),
        "out": str(out),
        "leaves": len(leaves),
        "bytes_before": before,
        "bytes_after": after,
        "seconds": seconds,
    }
    if as_json:
        show_json(found)
        return
    typer.echo(
        f"{file} -> {out}: {len(leaves):,} leaves, {before:,} -> "
        f"{after:,} bytes in {seconds:.1f} s, {after / seconds / 1e6:.3g} MB/s."
    )
