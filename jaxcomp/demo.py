"""The main job on real data: train, prune, share, fine-tune, code, load, evaluate.

LeNet-300-100 on Fashion-MNIST, or on the handwritten digits that scikit-learn ships. It
uses nothing but the public functions, so it is also the longest example.
"""

import gzip
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxcomp import plot
from jaxcomp.distill import distill_step
from jaxcomp.node import densify
from jaxcomp.prune import global_budget
from jaxcomp.share import share_tree
from jaxcomp.storage import load, save
from jaxcomp.train import prune_gradually
from jaxcomp.tree import split


FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package
CLUSTERS = 8  # 3 bits: exact zero and seven values for each kernel


class Data(NamedTuple):
    """A data set in memory, standardised, and how long to train on it."""

    name: str
    folder: Path | None  # where it was read; None for the digits
    x: jax.Array  # float32[train, pixels]
    y: jax.Array  # int32[train]
    test_x: jax.Array  # float32[test, pixels]
    test_y: jax.Array  # int32[test]
    batch: int
    epochs: tuple[int, int, int]  # dense, pruning, codebooks
    sparsity: float  # of all kernels together, by one threshold


class Stage(NamedTuple):
    """One row of the table."""

    name: str
    accuracy: float  # fraction of the test set
    nbytes: int
    seconds: float


class LeNet(nn.Module):
    """LeNet-300-100, He-normal: 266,610 parameters for 784 pixels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.he_normal()
        for width in (300, 100):
            x = nn.relu(nn.Dense(width, kernel_init=init)(x))
        return nn.Dense(10, kernel_init=init)(x)


def logits(params: Any, x: jax.Array) -> jax.Array:
    """float32[batch, 10] of float32[batch, pixels]."""
    return LeNet().apply({"params": params}, x)  # type: ignore[return-value]


learn = partial(distill_step, logits, logits, temperature=3.0, hard=0.3)


@jax.jit
def accuracy(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """float32[], the fraction of examples that a tree gets right, nodes or not."""
    return jnp.mean(logits(densify(params), x).argmax(axis=-1) == y)


def load_data(folder: Path | None = None) -> Data:
    """Fashion-MNIST from ``folder`` or Debian's package, else scikit-learn's digits."""
    if folder is None and not FASHION.is_dir():
        return load_digits()
    return load_fashion(folder or FASHION)


def load_fashion(folder: Path) -> Data:
    """Fashion-MNIST from a folder with its four files, gzipped or not.

    Raises:
      FileNotFoundError: ``folder`` lacks one of them.
    """
    x, y, test_x, test_y = (
        _read_idx(folder, f"{part}-{kind}-ubyte")
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    )
    return _data("Fashion-MNIST", folder, x, y, test_x, test_y, 256, (20, 25, 5), 0.92)


def load_digits() -> Data:
    """The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships.

    Raises:
      ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "The demo needs scikit-learn for its digits, or --data with Fashion-MNIST: "
            "pip install 'jaxcomp[demo]'."
        ) from error
    x, y = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))  # the same split for all seeds
    (test_x, x), (test_y, y) = np.split(x[order], [360]), np.split(y[order], [360])
    return _data("digits", None, x, y, test_x, test_y, 32, (60, 100, 20), 0.95)


def _data(
    name: str,
    folder: Path | None,
    x: np.ndarray,
    y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *plan: Any,
) -> Data:
    mean, std = x.mean(), x.std()

    def standard(images: np.ndarray) -> jax.Array:
        flat = images.reshape(len(images), -1)
        return jnp.asarray(((flat - mean) / std).astype(np.float32))

    labels, test_labels = (jnp.asarray(np.asarray(v, np.int32)) for v in (y, test_y))
    images, test_images = standard(x), standard(test_x)
    return Data(name, folder, images, labels, test_images, test_labels, *plan)


def _read_idx(root: Path, name: str) -> np.ndarray:
    """The array in an IDX file, gzipped or not."""
    path = root / f"{name}.gz"
    if path.exists():
        raw = gzip.decompress(path.read_bytes())
    elif (root / name).exists():
        raw = (root / name).read_bytes()
    else:
        raise FileNotFoundError(
            f"The demo needs {name}.gz in {root}. On Debian: apt-get install "
            "dataset-fashion-mnist; or leave out --data."
        )
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def train(
    make_step: Callable[[int], Any],
    params: Any,
    teacher: Any,
    data: Data,
    epochs: int,
    key: jax.Array,
    tick: Callable[[], None],
) -> Any:
    """Runs a distillation step over shuffled batches; an epoch is one compiled scan.

    Args:
      make_step: number of steps -> (step, optimizer).
      params: the student's tree.
      teacher: the teacher's tree.
      data: what to train on.
      epochs: passes over it.
      key: shuffles.
      tick: called after each epoch.
    """
    batches = len(data.x) // data.batch
    step, tx = make_step(batches * epochs)

    @jax.jit
    def epoch(params: Any, state: Any, x: Any, y: Any, key: Any) -> tuple[Any, Any]:
        order = jax.random.permutation(key, len(x))[: batches * data.batch]

        def body(carry: Any, rows: jax.Array) -> tuple[Any, None]:
            batch = (x[rows], y[rows])
            return step(*carry, teacher, batch)[:2], None

        rows = order.reshape(batches, data.batch)
        return jax.lax.scan(body, (params, state), rows)[0]

    state = tx.init(split(params)[0])
    for key_epoch in jax.random.split(key, epochs):
        params, state = epoch(params, state, data.x, data.y, key_epoch)
        jax.block_until_ready(params)
        tick()
    return params


def dense_step(steps: int) -> tuple[Any, optax.GradientTransformation]:
    """Plain training on the labels: the teacher weighs nothing."""
    tx = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    return learn(tx, hard=1.0), tx


def pruning_step(final: float, steps: int) -> tuple[Any, optax.GradientTransformation]:
    """Pruning while learning from the dense net; the last 40% win back what it cost."""
    sparsity = optax.polynomial_schedule(0.0, final, 3, int(0.6 * steps))
    tx = optax.chain(
        optax.adam(optax.cosine_decay_schedule(2e-3, steps)),
        prune_gradually(sparsity, every=100, budget=global_budget),
    )
    return learn(tx), tx


def codebook_step(steps: int) -> tuple[Any, optax.GradientTransformation]:
    """Fine-tuning of what is floating in a shared tree: codebooks and biases."""
    tx = optax.adam(optax.cosine_decay_schedule(3e-4, steps))
    return learn(tx), tx


def run(data: Data, seed: int, out: Path) -> list[Stage]:
    """Does the whole job and writes the file ``out`` and a picture beside it.

    Returns:
      The stages: dense, pruned, shared, fine-tuned, and the file, evaluated in a fresh
      process.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    params = LeNet().init(keys[0], data.x[:1])["params"]
    stages: list[Stage] = []

    def measure(name: str, tree: Any, start: float, nbytes: int | None = None) -> Any:
        score = float(accuracy(tree, data.test_x, data.test_y))
        seconds = time.perf_counter() - start
        stages.append(Stage(name, score, nbytes or _size_on_disk(tree), seconds))
        return tree

    with Progress(
        TextColumn("{task.description:>12}"),
        BarColumn(),
        TextColumn("epoch {task.completed}/{task.total}"),
        TimeElapsedColumn(),
    ) as progress:
        names = ("train", "prune", "fine-tune")
        bars = [
            progress.add_task(name, total=total, start=False)
            for name, total in zip(names, data.epochs, strict=True)
        ]

        def fit(i: int, make_step: Any, tree: Any, teacher: Any) -> Any:
            progress.start_task(bars[i])
            return train(
                make_step,
                tree,
                teacher,
                data,
                data.epochs[i],
                keys[i + 1],
                lambda: progress.advance(bars[i]),
            )

        start = time.perf_counter()
        dense = fit(0, dense_step, params, params)
        raw = sum(leaf.nbytes for leaf in jax.tree.leaves(dense))
        measure("dense, float32", dense, start, raw)
        start = time.perf_counter()
        prune = partial(pruning_step, data.sparsity)
        pruned = measure("pruned", fit(1, prune, dense, dense), start)
        start = time.perf_counter()
        shared = measure("shared, 3 bits", share_tree(pruned, CLUSTERS), start)
        start = time.perf_counter()
        small = measure("fine-tuned", fit(2, codebook_step, shared, dense), start)
    start = time.perf_counter()
    size = save(out, small)
    score = _evaluate_elsewhere(out, data)
    stages.append(Stage("file, reloaded", score, size, time.perf_counter() - start))
    drawn = [stage for stage in stages if stage.name != "fine-tuned"]  # as the file
    points = [(stage.name.split(",")[0], *stage[2:0:-1]) for stage in drawn]
    plot.save_picture(out.with_suffix(".png"), dense, small, points)
    return stages


def _evaluate_elsewhere(file: Path, data: Data) -> float:
    """The accuracy of a file, loaded and evaluated by a fresh process."""
    command = [sys.executable, "-m", "jaxcomp.demo", str(file), str(data.folder or "")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"A fresh process could not evaluate {file}:\n{done.stderr}")
    return float(done.stdout)


def as_table(data: Data, seed: int, stages: list[Stage]) -> Table:
    """The stages as a rich table."""
    title = f"LeNet-300-100 on {data.name}, seed {seed}"
    table = Table(title=title)
    table.add_column("stage")
    for name in ("accuracy", "to dense", "bytes", "smaller", "seconds"):
        table.add_column(name, justify="right")
    first = stages[0]
    for stage in stages:
        table.add_row(
            stage.name,
            f"{stage.accuracy:.2%}",
            f"{100 * (stage.accuracy - first.accuracy):+.2f}",
            f"{stage.nbytes:,}",
            f"{first.nbytes / stage.nbytes:.1f}x",
            f"{stage.seconds:.1f}",
        )
    return table


def _size_on_disk(tree: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return save(Path(folder) / "stage.jxc", tree)


if __name__ == "__main__":  # the fresh process: FILE FOLDER, no folder for the digits
    found = load_fashion(Path(sys.argv[2])) if sys.argv[2] else load_digits()
    print(float(accuracy(load(sys.argv[1]), found.test_x, found.test_y)))
