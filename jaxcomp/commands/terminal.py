"""How the commands speak: tables, JSON, progress, and errors of one line."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextlib.contextmanager
def one_line_errors(status: int = 1) -> Iterator[None]:
    """What is wrong with a file or an input is said in one red line, on stderr."""
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError) as error:
        Console(stderr=True).print(
            " ".join(str(error).split()),
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(status) from error


def show(found: Any) -> None:
    """Prints a table: as wide as the terminal, or 110 columns for who reads a pipe."""
    console = Console()
    if console.is_terminal:
        console.print(found)
    else:
        typer.echo(str(found))


def show_json(found: Any) -> None:
    """Prints one JSON object; an infinity or a NaN, which JSON lacks, is null."""
    typer.echo(json.dumps(_finite(found), allow_nan=False))


def _finite(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], Any]]:
    """A bar of bytes and of the time left, on stderr if that is a terminal.

    Returns:
      A function to be told the bytes that are done.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda size: None
        return
    with Progress(
        TextColumn(escape(what)),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda size: bar.advance(task, size)
