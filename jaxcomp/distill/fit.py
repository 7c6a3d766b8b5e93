"""A loop around a distillation step, for those who have none."""

import contextlib
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jaxcomp import _check
from jaxcomp.distill.step import Step
from jaxcomp.node import flatten


class Fitted(NamedTuple):
    """What `fit_distill` returns.

    Attributes:
      params: those of the best epoch.
      opt_state: that of the last epoch.
      history: one dict an epoch: the mean of each metric over its steps, and "score".
      best_epoch: the first with the highest score; the last epoch without scores.
    """

    params: Any
    opt_state: Any
    history: list[dict[str, float]]
    best_epoch: int


class _Run(NamedTuple):
    """Where a run is after whole epochs: all that a checkpoint holds."""

    params: Any
    opt_state: Any
    best: Any  # params
    history: list[dict[str, float]]
    steps: int


def fit_distill(
    key: jax.Array | None,
    step: Step,
    params: Any,
    opt_state: Any,
    teacher_params: Any,
    batches: Callable[[int], Iterable[Any]],
    *,
    epochs: int,
    evaluate: Callable[[Any], Any] | None = None,
    patience: int | None = None,
    folder: str | Path | None = None,
) -> Fitted:
    """Runs a distillation step over the batches of several epochs.

    It shows a progress bar if stderr is a terminal, and waits for the device once an
    epoch. With a ``folder``, a call that was cut off goes on after its last whole epoch
    when it is made again with the same arguments, and ends as if it had not been cut
    off, bit for bit, on the same devices and versions.

    Args:
      key: the step gets ``fold_in(key, number of the step)``. None for a student that
        takes no key.
      step: what `distill_step` returns, or another of its signature.
      params: the student's, as the step takes them; compressed leaves may be among
        them.
      opt_state: ``tx.init(jc.split(params)[0])``.
      teacher_params: the teacher's. Where the teacher's logits are kept, they can be
        part of a batch's inputs: ``((x, spoken), labels)`` with a teacher
        ``lambda _, inputs: inputs[1]`` and a student that takes ``inputs[0]``.
      batches: epoch -> the batches of that epoch, counted from 0. A function, so that
        an epoch has the same batches when a run is taken up again.
      epochs: how many in all, those before a run was cut off included.
      evaluate: params -> a number, higher is better, after each epoch. A NaN is never
        the best.
      patience: epochs without a better score before the run ends; None never ends it.
      folder: where a checkpoint of the last whole epoch is kept, written by Orbax. It
        holds arrays; what is static comes from ``params``, as do the devices.

    Returns:
      `Fitted`. With ``evaluate``, its params are those of the best epoch.

    Raises:
      ValueError: ``epochs`` or ``patience`` is below 1, there is a ``patience`` and no
        ``evaluate``, an epoch has no batches, or the folder holds another run.
      TypeError: ``batches`` is not a function.

    >>> import jaxcomp as jc
    >>> import optax
    >>> model = lambda params, x: x @ params["kernel"]
    >>> ours, theirs = {"kernel": jnp.zeros((1, 2))}, {"kernel": jnp.eye(1, 2)}
    >>> tx = optax.sgd(0.1)
    >>> step = jc.distill_step(model, model, tx, hard=0.0)
    >>> batches = lambda epoch: [(jnp.ones((4, 1)), None)] * 5
    >>> done = fit_distill(None, step, ours, tx.init(ours), theirs, batches, epochs=3)
    >>> [round(entry["loss"], 3) for entry in done.history]
    [0.1, 0.06, 0.037]
    """
    _check_arguments(batches, epochs, evaluate, patience)
    run = _Run(params, opt_state, params, [], 0)
    with _opened(folder) as manager, _progress() as bar:
        if manager is not None and manager.latest_step() is not None:
            run = _restored(manager, run)
        task = bar.add_task("", total=None)
        while not _is_over(run.history, epochs, patience):
            epoch = len(run.history)
            given = batches(epoch)
            ahead = operator.length_hint(given) or (epoch and run.steps // epoch)
            total = run.steps + ahead * (epochs - epoch) if ahead else None
            bar.update(task, total=total, completed=run.steps)
            bar.update(task, description=_line(run.history, epochs))
            run = _after_epoch(
                key, step, run, teacher_params, given, lambda: bar.advance(task)
            )
            if evaluate is not None:
                run.history[-1]["score"] = float(evaluate(run.params))
            if _best_epoch(run.history) == epoch:
                # A copy, as the step may have been told to reuse their memory.
                run = run._replace(best=jax.tree.map(jnp.copy, run.params))
            if manager is not None:
                _save(manager, run)
    return Fitted(run.best, run.opt_state, run.history, _best_epoch(run.history))


def _check_arguments(batches: Any, epochs: Any, evaluate: Any, patience: Any) -> None:
    if not callable(batches):
        raise TypeError(
            "fit_distill needs batches to be a function of the epoch, got "
            f"{type(batches).__name__}. For the same ones in every epoch pass "
            "batches=lambda epoch: those."
        )
    for name, value in (("epochs", epochs), ("patience", patience)):
        if value is not None and not value >= 1:
            raise ValueError(f"fit_distill needs {name} >= 1, got {value}.")
    if patience is not None and evaluate is None:
        raise ValueError(
            f"fit_distill needs a score for patience={patience}, got evaluate=None. "
            "Pass evaluate=params -> a number."
        )


def _after_epoch(
    key: Any,
    step: Step,
    run: _Run,
    teacher_params: Any,
    batches: Iterable[Any],
    tick: Callable[[], None],
) -> _Run:
    params, opt_state, steps = run.params, run.opt_state, run.steps
    # Sums stay on the device, so that no step is waited for. Batches may differ in what
    # they have to report: some have no labels.
    sums: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    for batch in batches:
        keys = () if key is None else (jax.random.fold_in(key, steps),)
        params, opt_state, metrics = step(
            params, opt_state, teacher_params, batch, *keys
        )
        sums |= {name: sums.get(name, 0) + value for name, value in metrics.items()}
        counts.update(metrics.keys())
        steps += 1
        tick()
    if steps == run.steps:
        raise ValueError(
            f"fit_distill needs at least one batch, got none in epoch "
            f"{len(run.history)}. A generator is used up after one epoch: make a new "
            "one in each call of `batches`."
        )
    sums = jax.device_get(sums)
    means = {name: float(sums[name]) / counts[name] for name in sums}
    return _Run(params, opt_state, run.best, [*run.history, means], steps)


def _best_epoch(history: list[dict[str, float]]) -> int:
    scores = [entry.get("score", math.nan) for entry in history]
    known = [score for score in scores if not math.isnan(score)]
    return scores.index(max(known)) if known else len(history) - 1


def _is_over(
    history: list[dict[str, float]], epochs: int, patience: int | None
) -> bool:
    waited = len(history) - 1 - _best_epoch(history)
    return len(history) >= epochs or (patience is not None and waited >= patience)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.completed}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _line(history: list[dict[str, float]], epochs: int) -> str:
    """The epoch under way, and how the last one ended."""
    last = history[-1] if history else {}
    shown = [f"{name} {last[name]:.4g}" for name in ("loss", "score") if name in last]
    return "  ".join([f"epoch {len(history) + 1}/{epochs}", *shown])


def _opened(folder: str | Path | None) -> Any:
    if folder is None:
        return contextlib.nullcontext()
    # It takes half a second to import, which only they wait for who use it.
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        max_to_keep=1,  # the one before it goes when it is whole
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(Path(folder).absolute(), options=options)


def _save(manager: Any, run: _Run) -> None:
    import orbax.checkpoint as ocp

    about = {
        "leaves": _outline(run),
        # A weak type decides how dtypes promote, and arrays in files have none.
        "weak": [getattr(x, "weak_type", False) for x in jax.tree.leaves(_trees(run))],
        "history": run.history,
        "steps": run.steps,
    }
    args = ocp.args.Composite(
        arrays=ocp.args.StandardSave(_stored(run)), about=ocp.args.JsonSave(about)
    )
    manager.save(len(run.history), args=args)


def _restored(manager: Any, run: _Run) -> _Run:
    """The run in a checkpoint; ``run`` is how it began.

    Raises:
      ValueError: it is a run of another student or optimizer, or no run.
    """
    import orbax.checkpoint as ocp

    last = manager.latest_step()
    if not (manager.directory / str(last) / "about").exists():
        raise ValueError(
            f"fit_distill needs a folder of its own, but {manager.directory} holds a "
            f"checkpoint {last} of something else. Pass another folder."
        )

    def read(**items: Any) -> Any:
        return manager.restore(last, args=ocp.args.Composite(**items))

    about = read(about=ocp.args.JsonRestore()).about
    for here, there in zip_longest(_outline(run), about["leaves"], fillvalue="nothing"):
        if here != there:
            raise ValueError(
                "fit_distill needs the params and the opt_state of the run that it is "
                f"to take up in {manager.directory}, but has {here} where that has "
                f"{there}. Pass those that the run began with, or another folder."
            )
    arrays = read(arrays=ocp.args.StandardRestore(_stored(run))).arrays
    leaves, treedef = jax.tree.flatten(_trees(run))
    for i, weak in enumerate(about["weak"]):
        if str(i) in arrays:
            leaves[i] = _like(leaves[i], arrays[str(i)], weak)
    params, opt_state, best = jax.tree.unflatten(treedef, leaves)
    return _Run(params, opt_state, best, about["history"], about["steps"])


def _trees(run: _Run) -> tuple[Any, Any, Any]:
    return run.params, run.opt_state, run.best


def _outline(run: _Run) -> list[str]:
    """Each leaf by its path, dtype and shape; a node with all that is static in it."""
    lines = []
    for name, tree in (("params", run.params), ("opt_state", run.opt_state)):
        paths, leaves, _ = flatten(tree)
        for path, leaf in zip(paths, leaves, strict=True):
            kinds = jax.tree.map(lambda x: _check.describe(jnp.asarray(x)), leaf)
            lines.append(f"{name}/{path}: {kinds}")
    return lines


def _stored(run: _Run) -> dict[str, np.ndarray]:
    """The leaves in dtypes that NumPy has: Orbax takes no uint2 and no empty array."""
    leaves = jax.tree.leaves(_trees(run))
    return {str(i): _plain(leaf) for i, leaf in enumerate(leaves) if jnp.size(leaf)}


def _plain(leaf: Any) -> np.ndarray:
    numbers = jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)
    array = np.asarray(numbers)
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.itemsize}")


def _like(leaf: Any, stored: np.ndarray, weak: bool) -> jax.Array:
    """An array as ``leaf`` is: of its dtype, where it is."""
    if _is_key(leaf):
        impl = jax.random.key_impl(leaf)
        array = jax.random.wrap_key_data(jnp.array(stored), impl=impl)
    else:
        array = jnp.array(stored.view(jnp.result_type(leaf)))
    if weak:
        array = jnp.full(array.shape, stored.dtype.type(0).item()).at[...].set(array)
    is_placed = getattr(leaf, "committed", False)
    return jax.device_put(array, leaf.sharding) if is_placed else array


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
