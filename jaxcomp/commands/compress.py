"""``jaxcomp compress``: a checkpoint made small as a recipe says."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxcomp.commands.opened import nbytes, size_on_disk
from jaxcomp.commands.terminal import one_line_errors, progress, show, show_json
from jaxcomp.recipe import Plan, apply_plan, plan_tree, read_recipe
from jaxcomp.storage import read_checkpoint, save, write_checkpoint


_HOLD_NODES = (".jxc", ".msgpack", ".orbax", "")


def compress(
    file: Annotated[Path, typer.Argument(help="A checkpoint of any format.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The file to write: .jxc, .msgpack, .orbax."),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Bits of a code: 2 to 8, or 1 for binary.")
    ] = None,
    group: Annotated[
        int | None, typer.Option(help="Weights that share a scale, e.g. 64.")
    ] = None,
    axis: Annotated[
        int | None,
        typer.Option(help="Axis that keeps its own scales; PyTorch's wants 0."),
    ] = None,
    clusters: Annotated[
        int | None, typer.Option(help="Distinct values a leaf may have, e.g. 16.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Bits a weight may take in the file, e.g. 3.1.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of each leaf to make zero, e.g. 0.5.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Weights kept of each few, e.g. 2:4.")
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Code all leaves without loss.")
    ] = False,
    special: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATTERN=WORDS",
            help="Other words for some leaves: '*/mlp/*=bits:3,group:32'. Repeatable.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Leaves to leave alone: '*/norm/*'. Repeatable."
        ),
    ] = None,
    recipe_file: Annotated[
        Path | None,
        typer.Option("--recipe", help="A TOML file of these words instead of them."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, and write nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead.")
    ] = False,
) -> None:
    """Make a checkpoint small: quantize, share or prune its matrices, code the rest.

    A PATTERN is one of the shell for the whole path of a leaf; "*" stands for "/" too.
    What was at OUT stays whole until the new file is.
    """
    words = {
        "bits": bits,
        "group": group,
        "axis": axis,
        "clusters": clusters,
        "rate": rate,
        "sparsity": sparsity,
        "pattern": pattern,
        "lossless": lossless or None,
        "keep": keep or None,
        "set": dict(map(_special, special or [])) or None,
    }
    given: dict[str, Any] = {
        w: value for w, value in words.items() if value is not None
    }
    if bool(given) == (recipe_file is not None):
        raise typer.BadParameter(
            f"--recipe says all; leave out {', '.join(f'--{word}' for word in given)}."
            if given
            else "say what to do, e.g. --bits 4, --lossless or --recipe FILE."
        )
    if not dry_run and (out is None or out.suffix not in _HOLD_NODES):
        raise typer.BadParameter(
            "-o needs a name that ends in .jxc, .msgpack or .orbax"
            + ("." if out is None else f", got {out.name}.")
        )
    start = time.perf_counter()
    with one_line_errors():
        recipe = given if recipe_file is None else read_recipe(recipe_file)
        tree = read_checkpoint(file)
        plan = plan_tree(tree, recipe)
        found: dict[str, Any] = {"file": str(file), "recipe": recipe}
        found["plan"] = plan.to_dict()
        if dry_run or out is None:
            show_json(found) if as_json else show(plan)
            return
        before = size_on_disk(file)
        after = _written(out, tree, plan, recipe)
    seconds = time.perf_counter() - start
    found |= {
        "out": str(out),
        "bytes_before": before,
        "bytes_after": after,
        "ratio": before / after,
        "seconds": seconds,
    }
    if as_json:
        show_json(found)
        return
    typer.echo(
        f"{file} -> {out}: {before:,} -> {after:,} bytes, {before / after:.1f}x "
        f"smaller, in {seconds:.1f} s, {before / seconds / 1e6:.3g} MB/s."
    )


def _special(text: str) -> tuple[str, dict[str, Any]]:
    """The pattern and the words of ``PATTERN=word:value,word:value``."""
    pattern, _, words = text.rpartition("=")
    if not pattern or not words:
        raise typer.BadParameter(
            f"--set needs PATTERN=WORDS, e.g. '*/mlp/*=bits:3,group:32', got {text!r}."
        )
    pairs = [word.partition(":") for word in words.split(",")]
    return pattern, {word.strip(): _value(value.strip()) for word, _, value in pairs}


def _value(text: str) -> Any:
    """A value as TOML would have it; a word alone is true."""
    if text in ("", "true"):
        return True
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _written(out: Path, tree: Any, plan: Plan, recipe: dict[str, Any]) -> int:
    """Writes what the plan makes of a tree; leaf by leaf, if it is ``.jxc``."""
    if out.suffix != ".jxc":
        return write_checkpoint(out, apply_plan(tree, plan))
    with progress("compress", plan.total.dense_bytes) as tell:

        def make(path: str, leaf: Any) -> Any:
            stored = plan.make(path, leaf)
            tell(nbytes(leaf))
            return stored

        notes = {"recipe": recipe}
        return save(out, tree, each=make, notes=notes)
