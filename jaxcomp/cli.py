"""The command line: thin, the same functions on files."""

import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jaxcomp import demo as demonstration
from jaxcomp.report import report
from jaxcomp.storage import load


app = typer.Typer(
    help="Small JAX models.", no_args_is_help=True, pretty_exceptions_enable=False
)
_console = Console()


def _fail(error: Exception) -> typer.Exit:
    """Says what is wrong in one line, and ends with status 1."""
    Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
    return typer.Exit(1)


@app.command()
def demo(
    data: Annotated[
        Path | None, typer.Option(help="Folder with the files of Fashion-MNIST.")
    ] = None,
    digits: Annotated[
        bool, typer.Option("--digits", help="Use scikit-learn's digits instead.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Random seed; drawn at random if left out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path(
        "jaxcomp-demo.jxc"
    ),
) -> None:
    """Train a network, make it about 40 times smaller on disk, evaluate the file."""
    drawn = secrets.randbelow(2**31) if seed is None else seed
    try:
        found = demonstration.load_digits() if digits else demonstration.load_data(data)
    except (OSError, ImportError) as error:
        raise _fail(error) from error
    stages = demonstration.run(found, drawn, out)
    _console.print(demonstration.as_table(found, drawn, stages))
    _console.print(f"Wrote {out} and {out.with_suffix('.png')}.", highlight=False)
    _console.print(f"See what is in it: jaxcomp inspect {out}", highlight=False)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A file that jaxcomp.save wrote.")],
) -> None:
    """Show what a file holds, leaf by leaf."""
    try:
        found = report(load(file))
        size = file.stat().st_size
    except (OSError, ValueError) as error:
        raise _fail(error) from error
    _console.print(found)
    ratio = found.total.dense_bytes / size
    _console.print(
        f"{file}: {size:,} bytes on disk, {ratio:.1f}x smaller than its "
        f"{found.total.dense_bytes:,} bytes of arrays.",
        highlight=False,
    )
