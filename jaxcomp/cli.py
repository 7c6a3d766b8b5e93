"""The command line: thin, the same functions on files; each command is in a file."""

import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jaxcomp import demo as demonstration
from jaxcomp.commands.bench import bench
from jaxcomp.commands.compress import compress
from jaxcomp.commands.diff import diff
from jaxcomp.commands.inspect import inspect
from jaxcomp.commands.restore import restore
from jaxcomp.commands.terminal import one_line_errors
from jaxcomp.commands.verify import verify


app = typer.Typer(
    help="Small JAX models.", no_args_is_help=True, pretty_exceptions_enable=False
)
_console = Console()


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
    with one_line_errors():
        found = demonstration.load_digits() if digits else demonstration.load_data(data)
    stages = demonstration.run(found, drawn, out)
    _console.print(demonstration.as_table(found, drawn, stages))
    typer.echo(f"Wrote {out} and {out.with_suffix('.png')}.")
    typer.echo(f"See what is in it: jaxcomp inspect {out}")


for _command in (inspect, compress, restore, diff, verify, bench):
    app.command()(_command)
