"""What each leaf is worth: the loss when it alone is changed."""

import io
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxcomp.node import dense_of, densify, flatten, resolver
from jaxcomp.prune.oneshot import unique_names
from jaxcomp.tree import Where, check_finite, is_matrix, select


Operation = Callable[[jax.Array], Any]


class Change(NamedTuple):
    """One leaf, changed by one operation."""

    path: str
    operation: str
    loss: float  # the mean over the batches
    difference: float  # to the loss of the unchanged net


class Sensitivity(NamedTuple):
    """What `sensitivity` found; prints as a table."""

    loss: float  # of the unchanged net
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for name in ("leaf", "operation"):
            table.add_column(name, no_wrap=True)
        for name in ("loss", "difference"):
            table.add_column(name, justify="right", no_wrap=True)
        for path, name, loss, difference in self.changes:
            table.add_row(path, name, f"{loss:.5g}", f"{difference:+.3g}")
        table.add_section()
        table.add_row("unchanged", "", f"{self.loss:.5g}", "")
        text = io.StringIO()
        # A path is neither markup nor folded, however long it is.
        plain = {"markup": False, "emoji": False, "color_system": None}
        Console(file=text, width=10_000, **plain).print(table)  # type: ignore[arg-type]
        return "\n".join(map(str.rstrip, text.getvalue().splitlines())).rstrip()


def sensitivity(
    f: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    loss: Callable[..., jax.Array],
    operations: Mapping[str, Operation],
    *,
    where: Where = is_matrix,
) -> Sensitivity:
    """The mean loss over batches when one leaf alone is changed, for each operation.

    Han, Pool, Tran and Dally, "Learning both Weights and Connections for Efficient
    Neural Networks", arXiv:1506.02626, section 4.3: sparsities of layers are chosen by
    how much pruning one of them costs. Here it is any operation.

    A bar shows how far it is, on a terminal.

    Args:
      f: (params, *inputs) -> any pytree.
      params: any pytree of arrays and nodes.
      batches: tuples of inputs; they are held in memory.
      loss: (outputs, *batch) -> float[], the mean over a batch. All batches weigh the
        same.
      operations: name -> (float[*shape] -> an array or a node of that shape), e.g.
        ``{"4 bits": partial(jc.quantize, bits=4)}``.
      where: (path, leaf) -> bool; leaves to change, one after the other.

    Returns:
      A `Sensitivity`, its changes leaf by leaf; ``print`` shows a table. A changed leaf
      has the dtype that it had, so that one compiled function does for all.

    Raises:
      ValueError: nothing is selected, a selected leaf holds a NaN or an infinity, there
        is no batch or no operation, one changes a shape, or the loss is not one number.
      TypeError: a batch is no tuple.

    >>> f = lambda params, x: x @ params["kernel"]
    >>> params = {"kernel": jnp.array([[2.0], [1.0]])}
    >>> print(sensitivity(f, params, [(jnp.ones((1, 2)),)], lambda y, x: y.mean(),
    ...                   {"halved": lambda w: w / 2}))
    <BLANKLINE>
     leaf       operation  loss  difference
     ──────────────────────────────────────
     kernel     halved      1.5        -1.5
    <BLANKLINE>
     unchanged                3
    """
    batches = list(batches)
    if not batches or not operations:
        raise ValueError(
            "sensitivity needs a batch and an operation at least, got "
            f"{len(batches)} batches and {len(operations)} operations."
        )
    if not isinstance(batches[0], tuple | list):
        raise TypeError(
            "sensitivity needs batches that are tuples of inputs, got one of type "
            f"{type(batches[0]).__name__}. Write (x,) for a single input."
        )
    paths, leaves, treedef = flatten(params)
    paths = unique_names(paths)
    chosen = jax.tree.leaves(select(params, where, compressed=True))
    whole = resolver("sensitivity", paths, leaves)
    taken = {i: dense_of(whole(i)) for i in range(len(leaves)) if chosen[i]}
    check_finite("sensitivity", [(paths[i], leaf) for i, leaf in taken.items()])

    @jax.jit
    def loss_of(params: Any, batch: Any) -> jax.Array:
        value = loss(f(params, *batch), *batch)
        if jnp.shape(value):
            raise ValueError(
                "sensitivity needs a loss that is one number, got shape "
                f"{list(jnp.shape(value))}. Take its mean."
            )
        return value

    def mean_loss(leaves: list[Any]) -> float:
        dense = densify(jax.tree.unflatten(treedef, leaves))
        values = [loss_of(dense, batch) for batch in batches]
        return math.fsum(map(float, values)) / len(values)

    def changed(i: int, name: str) -> list[Any]:
        found = dense_of(operations[name](taken[i]))
        if found.shape != taken[i].shape:
            raise ValueError(
                f"sensitivity needs operations that keep the shape, but {name!r} makes "
                f"{list(found.shape)} of leaf {paths[i]!r} {list(taken[i].shape)}."
            )
        return [*leaves[:i], found.astype(taken[i].dtype), *leaves[i + 1 :]]

    console = Console(stderr=True)
    todo = [(i, name) for i in taken for name in operations]
    unchanged = mean_loss(leaves)
    changes = []
    for i, name in track(
        todo,
        "sensitivity",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        value = mean_loss(changed(i, name))
        changes.append(Change(paths[i], name, value, value - unchanged))
    return Sensitivity(unchanged, tuple(changes))
