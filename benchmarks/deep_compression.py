"""Deep Compression on Fashion-MNIST: accuracy against bytes, from dense to 100x.

    python benchmarks/deep_compression.py choose OUT  # on 5,000 held-out images
    python benchmarks/deep_compression.py score OUT   # the test images, read once
    python benchmarks/deep_compression.py convolve OUT  # LeNet-5, one seed

Files go to the folder OUT and are evaluated by a fresh process, which alone reads the
images that count. It takes half an hour a command on one core.
"""

import json
import subprocess
import sys
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
import typer

import jaxcomp as jc
from jaxcomp import demo
from jaxcomp.prune import global_budget


BATCH = 256
DENSE, PRUNE, TUNE = 20, 30, 5  # epochs
TEACHERS = 4  # the dense net that is compressed, and three more


class LeNet5(nn.Module):
    """LeNet-5 as Caffe has it, 20-50-500-10: 431,080 parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.he_normal()
        x = x.reshape(-1, 28, 28, 1)
        for width in (20, 50):
            x = nn.relu(nn.Conv(width, (5, 5), padding="VALID", kernel_init=init)(x))
            n, side, _, c = x.shape
            x = x.reshape(n, side // 2, 2, side // 2, 2, c).max((2, 4))  # 2 x 2 pooling
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(500, kernel_init=init)(x))
        return nn.Dense(10, kernel_init=init)(x)


NETS = {"LeNet-300-100": demo.LeNet(), "LeNet-5": LeNet5()}


class Lesson(NamedTuple):
    """What a net learns from, and how much the labels weigh beside the teachers."""

    x: jax.Array  # float32[images, 784]
    y: jax.Array  # int32[images]
    logits: jax.Array  # float32[images, 10], of the teachers
    temperature: float = 2.0
    hard: float = 0.1


class Point(NamedTuple):
    """A place on the curve."""

    sparsity: float  # of all kernels together
    share: str  # "rate 0.42": bits per weight, biases too; "clusters 8": each kernel
    teachers: int = TEACHERS
    temperature: float = 2.0
    hard: float = 0.1

    def pruning(self) -> str:
        return f"{self.sparsity}-{self.teachers}-{self.temperature}-{self.hard}"


CURVE = [  # by the table of `choose`: what is best at about that many bytes
    Point(0.90, "rate 1.1"),
    Point(0.93, "rate 0.64"),
    Point(0.95, "rate 0.45"),
    Point(0.965, "rate 0.34"),
    Point(0.965, "rate 0.28"),
]
CHOICES = [
    *[Point(s, "clusters 8") for s in (0.90, 0.93, 0.95, 0.965, 0.975)],
    *[Point(0.90, f"rate {r}") for r in (1.1, 0.7)],
    *[Point(0.93, f"rate {r}") for r in (0.66, 0.46)],
    *[Point(0.95, f"rate {r}") for r in (0.66, 0.46, 0.42)],
    *[Point(0.965, f"rate {r}") for r in (0.46, 0.36, 0.3)],
    *[Point(0.975, f"rate {r}") for r in (0.36, 0.28)],
    Point(0.95, "rate 0.46", teachers=1),
    Point(0.95, "rate 0.46", temperature=4.0),
    Point(0.95, "rate 0.46", temperature=1.0),
    Point(0.95, "rate 0.46", hard=0.3),
    Point(0.95, "rate 0.46", hard=1.0),  # no distillation
]
CONVOLUTIONAL = [Point(0.95, f"rate {r}", teachers=1) for r in (0.7, 0.46)]

app = typer.Typer(pretty_exceptions_enable=False)


def images(part: str) -> tuple[jax.Array, jax.Array]:
    """float32[n, 784] and int32[n]: "all" and "test", or "kept" and "held out"."""
    data = demo.load_fashion(demo.FASHION)
    if part == "test":
        return data.test_x, data.test_y
    order = np.random.default_rng(2026).permutation(len(data.x))
    rows = {"all": order, "kept": order[5000:], "held out": order[:5000]}[part]
    return data.x[rows], data.y[rows]


def fit(
    net: nn.Module, params: Any, lesson: Lesson, tx: Any, epochs: int, key: jax.Array
) -> Any:
    """Trains with a teacher that has spoken already: its logits are its parameters."""
    step = jc.distill_step(
        partial(logits, net),
        lambda spoken, x: spoken,
        tx,
        temperature=lesson.temperature,
        hard=lesson.hard,
    )

    @jax.jit
    def take(rows: jax.Array) -> tuple[Any, ...]:
        return lesson.logits[rows], (lesson.x[rows], lesson.y[rows])

    state = tx.init(jc.split(params)[0])
    for key_epoch in jax.random.split(key, epochs):
        order = np.asarray(jax.random.permutation(key_epoch, len(lesson.x)))
        for rows in order[: steps(lesson, 1) * BATCH].reshape(-1, BATCH):
            params, state, _ = step(params, state, *take(rows))
    return jax.block_until_ready(params)


def steps(lesson: Lesson, epochs: int) -> int:
    return len(lesson.x) // BATCH * epochs


def logits(net: nn.Module, params: Any, x: jax.Array) -> jax.Array:
    return net.apply({"params": params}, x)


@partial(jax.jit, static_argnums=0)
def predict(net: nn.Module, params: Any, x: jax.Array) -> jax.Array:
    return logits(net, jc.densify(params), x)


def in_parts(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """``fn`` of a few thousand images at a time."""
    return jnp.concatenate([fn(x[i : i + 2500]) for i in range(0, len(x), 2500)])


def dense_net(net: nn.Module, lesson: Lesson, key: jax.Array) -> Any:
    key_init, key_order = jax.random.split(key)
    params = net.init(key_init, lesson.x[:1])["params"]
    rate = optax.cosine_decay_schedule(1e-3, steps(lesson, DENSE))
    plain = lesson._replace(hard=1.0)
    return fit(net, params, plain, optax.adam(rate), DENSE, key_order)


def prune(
    net: nn.Module, dense: Any, lesson: Lesson, sparsity: float, key: jax.Array
) -> Any:
    count = steps(lesson, PRUNE)
    schedule = optax.polynomial_schedule(0.0, sparsity, 3, int(0.6 * count))
    tx = optax.chain(
        optax.adam(optax.cosine_decay_schedule(2e-3, count)),
        jc.prune_gradually(schedule, every=100, budget=global_budget),
    )
    return fit(net, dense, lesson, tx, PRUNE, key)


def share(params: Any, how: str) -> Any:
    kind, number = how.split()
    if kind == "clusters":
        return jc.share_tree(params, int(number))
    return jc.share_to_rate(params, float(number), where=lambda path, leaf: True)


def tune(net: nn.Module, small: Any, lesson: Lesson, key: jax.Array) -> Any:
    """Trains the codebooks; which weight uses which entry stays."""
    tx = optax.adam(optax.cosine_decay_schedule(3e-4, steps(lesson, TUNE)))
    return fit(net, small, lesson, tx, TUNE, key)


def compress(
    name: str, part: str, seed: int, points: list[Point], out: Path
) -> dict[str, float]:
    """Writes the dense net, the stages and the small nets of a seed.

    Returns:
      Seconds by stage, as the files are named: "dense", "pruned P", "shared P, S",
      "tuned P, S".
    """
    net, (x, y) = NETS[name], images(part)
    seconds: dict[str, float] = {}

    def stage(label: str, make: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        tree = make()
        seconds[label] = time.perf_counter() - start
        size = jc.save(out / f"{seed} {label}.jxc", tree)
        print(f"seed {seed} {label}: {size:,} B, {seconds[label]:.0f} s", flush=True)
        return tree

    silent = Lesson(x, y, jnp.zeros((len(x), 10)))
    count = max(point.teachers for point in points)
    keys = jax.random.split(jax.random.key(seed), count + 2)
    teachers = [
        stage("dense" if i == 0 else f"teacher {i}", partial(dense_net, net, silent, k))
        for i, k in enumerate(keys[2:])
    ]
    mean = jc.ensemble(partial(predict, net))
    done: dict[str, Any] = {}
    for point in points:
        spoken = in_parts(partial(mean, teachers[: point.teachers]), x)
        lesson = Lesson(x, y, spoken, point.temperature, point.hard)
        how = point.pruning()
        if how not in done:
            job = partial(prune, net, teachers[0], lesson, point.sparsity, keys[0])
            done[how] = stage(f"pruned {how}", job)
        what = f"{how}, {point.share}"
        small = stage(f"shared {what}", partial(share, done[how], point.share))
        stage(f"tuned {what}", partial(tune, net, small, lesson, keys[1]))
    return seconds


def scores(name: str, part: str, out: Path) -> dict[str, float]:
    """The accuracy of every file in a folder, by a fresh process, in percent."""
    command = [sys.executable, __file__, "evaluate", name, part, str(out)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


@app.command()
def evaluate(name: str, part: str, out: Path) -> None:
    """Prints the accuracy of every file as JSON."""
    x, y = images(part)
    found = {}
    for file in sorted(out.glob("*.jxc")):
        predicted = in_parts(partial(predict, NETS[name], jc.load(file)), x)
        found[file.stem] = 100 * float(jnp.mean(predicted.argmax(-1) == y))
    print(json.dumps(found))


def table(
    name: str, train: str, score: str, seeds: list[int], points: list[Point], out: Path
) -> list[tuple[str, float, float]]:
    """Runs everything and prints Markdown; returns (stage, bytes, accuracy) means."""
    out.mkdir(parents=True)
    seconds = [compress(name, train, seed, points, out) for seed in seeds]
    accuracy = scores(name, score, out)
    dense = jc.load(out / f"{seeds[0]} dense.jxc")
    raw = sum(leaf.nbytes for leaf in jax.tree.leaves(dense))
    print(f"\n{name}, {score} images, seeds {seeds}; dense {raw:,} bytes\n")
    print("| stage | bytes | smaller | accuracy | to dense | sd | seconds |")
    print("| :-- | --: | --: | --: | --: | --: | --: |")
    means = []
    for stage in seconds[0]:
        files = [out / f"{seed} {stage}.jxc" for seed in seeds]
        size = np.mean([raw if stage == "dense" else f.stat().st_size for f in files])
        got = np.array([accuracy[f.stem] for f in files])
        delta = got - [accuracy[f"{seed} dense"] for seed in seeds]
        spread = np.std(delta, ddof=1) if len(seeds) > 1 else np.nan
        took = np.mean([s[stage] for s in seconds])
        print(
            f"| {stage} | {size:,.0f} | {raw / size:.1f}x | {got.mean():.2f} "
            f"| {delta.mean():+.2f} | {spread:.2f} | {took:.0f} |"
        )
        means.append((stage, float(size), float(got.mean())))
    return means


@app.command()
def choose(out: Path) -> None:
    """Compares sparsities, rates and lessons on held-out training images."""
    table("LeNet-300-100", "kept", "held out", [11, 12, 13], CHOICES, out)


@app.command()
def score(out: Path) -> None:
    """Scores the chosen curve on the test images."""
    means = table("LeNet-300-100", "all", "test", [1, 2, 3], CURVE, out)
    draw(out / "curve.png", means)


@app.command()
def convolve(out: Path) -> None:
    """Scores LeNet-5, at settings carried over from LeNet-300-100."""
    table("LeNet-5", "all", "test", [1], CONVOLUTIONAL, out)


def draw(file: Path, means: list[tuple[str, float, float]]) -> None:
    """Accuracy against bytes, a line a stage, the tuned files by how small they are."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    raw = means[0][1]
    for kind, colour in (("pruned", "0.6"), ("shared", "C1"), ("tuned", "C3")):
        rows = [row for row in means if row[0].split()[0] in ("dense", kind)]
        sizes, scores = zip(*[(size / 1000, got) for _, size, got in rows], strict=True)
        axes.plot(sizes, scores, "o-", c=colour, label=kind)
        for size, got in zip(sizes, scores, strict=True) if kind == "tuned" else ():
            text = f"{raw / size / 1000:.0f}x" if size * 1000 < raw else "dense"
            axes.annotate(text, (size, got), (6, -12), textcoords="offset points")
    axes.set(xscale="log", xlabel="kilobytes on disk", ylabel="test accuracy, %")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda kb, _: f"{kb:g}"))
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    app()
