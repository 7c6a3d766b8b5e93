"""How accurate nets are, by the score that says which channels go.

    python benchmarks/structured.py train OUT SEED  # ten minutes on one core
    python benchmarks/structured.py train OUT SEED --rate 0.1 --epochs 15
    python benchmarks/structured.py table OUT
    python benchmarks/structured.py time OUT SEED --multiple 8  # after train
    python benchmarks/structured.py train OUT 11 --held-out --rate 0.02 --only L2

A small ResNet on the first 10,000 images of Fashion-MNIST. It is trained, loses
channels until a half or a quarter of its multiply-adds is left, and is fine-tuned: for
each score, on the same batches, with one threshold for all families on scores divided
by their mean in the family. The dense net is fine-tuned too. Every net is stored,
loaded back and evaluated; what is in OUT is not done again. The peer, Torch-Pruning,
sees the same dense net, ported to torch, and says which channels stay: they are cut and
fine-tuned here. It needs torch and torch-pruning. `--held-out` evaluates on the next
2,000 training images, on which the settings were chosen. `time` compares what `shrink`
made of the net with the same module built with these widths, and with the dense net.
"""

import bisect
import json
import statistics
import time as clock
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from small_resnet import ResNet, logits, torch_twin, training

import jaxcomp as jc
from jaxcomp import demo
from jaxcomp.program.coupling import Groups, coupled_groups
from jaxcomp.program.observe import observe
from jaxcomp.program.shrink import shrink
from jaxcomp.program.statistics import (
    entropy,
    feature_rank,
    second_moment,
    zero_fraction,
)
from jaxcomp.prune import group_scores as gs
from jaxcomp.prune.group_budgets import cost_budget
from jaxcomp.prune.group_inputs import by_inputs, group_obs
from jaxcomp.prune.groups import total


IMAGES, BATCH = 10_000, 100
EPOCHS, TUNING = 15, 5
RATE = 0.05  # of fine-tuning; training starts at 0.1
TARGETS = {"2x": 1 / 2, "4x": 1 / 4}
SEEN = 256  # images for scores that look at activations or gradients
SCORES = [
    *("random", "L1", "L2", "squares (DepGraph)", "distance (FPGM)", "norm scale"),
    *("Taylor, first order", "second order (OBD)", "entropy", "APoZ", "rank (HRank)"),
    *("OBS", "Torch-Pruning"),
]

app = typer.Typer(pretty_exceptions_enable=False)


def mean_loss(z: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()


def stepper(f: Callable[..., Any], tx: optax.GradientTransformation) -> Any:
    """A step with `training`, or with what `shrink` made of it."""

    @jax.jit
    def step(variables: Any, state: Any, x: Any, y: Any, rows: Any, key: Any) -> Any:
        flipped = jax.random.bernoulli(key, shape=(len(rows), 1, 1, 1))
        images = jnp.where(flipped, x[rows][:, :, ::-1], x[rows])

        def loss(params: Any) -> tuple[jax.Array, Any]:
            z, new = f({**variables, "params": params}, images)
            return mean_loss(z, y[rows]), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(grads, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, **new}, state

    return step


def sgd(rate: float, epochs: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(rate, epochs * (IMAGES // BATCH))
    momentum = optax.sgd(schedule, momentum=0.9, nesterov=True)
    return optax.chain(optax.add_decayed_weights(5e-4), momentum)


def fit(
    f: Callable[..., Any], variables: Any, data: Any, rate: float, epochs: int, key: Any
) -> Any:
    """Trains; the batches depend on nothing but the key."""
    tx = sgd(rate, epochs)
    step, state = stepper(f, tx), tx.init(variables["params"])
    for key_epoch in jax.random.split(key, epochs):
        key_order, key_flip = jax.random.split(key_epoch)
        order = jax.random.permutation(key_order, IMAGES).reshape(-1, BATCH)
        keys = jax.random.split(key_flip, len(order))
        for rows, key_step in zip(order, keys, strict=True):
            # Not a scan: a convolution in one is many times slower on a CPU.
            variables, state = step(variables, state, *data[:2], rows, key_step)
    return variables


def load_images(held_out: bool) -> tuple[jax.Array, ...]:
    """Images and labels to train on, images and labels to test on."""
    data = demo.load_fashion(demo.FASHION)
    test = data.test_x, data.test_y
    if held_out:
        test = data.x[IMAGES : IMAGES + 2000], data.y[IMAGES : IMAGES + 2000]
    x, test_x = (x.reshape(-1, 28, 28, 1) for x in (data.x[:IMAGES], test[0]))
    return x, data.y[:IMAGES], test_x, test[1]


def all_scores(variables: Any, x: Any, y: Any, key: Any) -> dict[str, gs.GroupScore]:
    """Name -> score of groups."""
    x, y = x[:SEEN], y[:SEEN]
    asked = {"zeros": zero_fraction, "entropy": entropy(), "rank": feature_rank}
    chunks = [(chunk,) for chunk in x.reshape(-1, 64, *x.shape[1:])]
    rows = observe(logits, variables, chunks, asked | {"moment": second_moment})
    axes = {path: row.axes for path, row in rows.items()}
    window = {path: sorted(row.axes + row.window) for path, row in rows.items()}

    def seen(read: Callable[[Any], jax.Array]) -> dict[str, jax.Array]:
        return {path: read(row.inputs) for path, row in rows.items()}

    @jax.jit
    def grad(params: Any, x: Any, y: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return mean_loss(logits({**variables, "params": params}, x), y)

        return jax.grad(loss)(params)

    def grads(size: int) -> Any:
        starts = range(0, SEEN, size)
        parts = [
            grad(variables["params"], x[i : i + size], y[i : i + size]) for i in starts
        ]
        return {"params": jax.tree.map(lambda *g: jnp.stack(g), *parts)}

    curvature = jax.tree.map(lambda g: jnp.mean(g**2, axis=0), grads(1))
    return {
        "random": gs.random_groups(key),
        "L1": gs.group_l1,
        "L2": gs.group_l2,
        "squares (DepGraph)": gs.group_squares,
        "distance (FPGM)": gs.group_distance,
        "norm scale": gs.group_scale,
        "Taylor, first order": gs.group_taylor(grads(64)),
        "second order (OBD)": gs.group_obd(curvature),
        "entropy": by_inputs(seen(lambda found: found["entropy"]), axes),
        "APoZ": by_inputs(seen(lambda found: 1 - found["zeros"]), axes),
        "rank (HRank)": by_inputs(seen(lambda found: found["rank"]), axes),
        "OBS": group_obs(seen(lambda found: found["moment"].total), window),
    }


def chosen_by_peer(
    variables: Any, x: jax.Array, groups: Groups, target: float
) -> dict[str, np.ndarray]:
    """What Torch-Pruning keeps at the least ratio that meets the target."""
    import torch
    import torch_pruning as tp

    torch.set_num_threads(1)
    images = torch.tensor(np.array(x[:64])).permute(0, 3, 1, 2)
    with torch.no_grad():
        outputs = torch_twin(variables)(images).numpy()
    np.testing.assert_allclose(outputs, logits(variables, x[:64]), rtol=0, atol=1e-4)
    families = {
        m.path: f.name for f in groups.families for m in f.members if m.axis == 3
    }
    sizes = {f.name: f.size for f in groups.families}
    channels = sum(sizes.values())

    def keep(gone: int) -> dict[str, np.ndarray]:
        net = torch_twin(variables)
        pruner = tp.pruner.BasePruner(
            net,
            images[:1],
            importance=tp.importance.GroupMagnitudeImportance(),
            global_pruning=True,
            pruning_ratio=gone / channels,
            ignored_layers=[net.get_submodule("Conv_1")],
        )
        names = {module: name for name, module in net.named_modules()}
        kept = {name: np.ones(size, bool) for name, size in sizes.items()}
        for group in pruner.step(interactive=True):
            dependency, indices = group[0]
            path = f"params/{names[dependency.target.module]}/kernel"
            kept[families[path]][indices] = False
        return kept

    def spared(gone: int) -> float:
        return -total(groups.multiply_adds, {n: k.sum() for n, k in keep(gone).items()})

    return keep(bisect.bisect_left(range(channels), -target, key=spared))


@app.command()
def train(
    out: Path,
    seed: int,
    held_out: bool = False,
    rate: float = RATE,
    epochs: int = TUNING,
    only: list[str] = SCORES,
) -> None:
    """Trains, cuts and fine-tunes the nets of a seed; what is found goes to OUT."""
    out.mkdir(parents=True, exist_ok=True)
    file, net_file = out / f"{seed}.json", out / f"{seed}.jxc"
    found = json.loads(file.read_text()) if file.exists() else {}
    data = load_images(held_out)
    keys = jax.random.split(jax.random.key(seed), 4)
    tune = partial(fit, data=data, rate=rate, epochs=epochs, key=keys[2])

    def accuracy(f: Callable[..., Any], variables: Any) -> float:
        """In percent of the test images, of the net as it comes back from a file."""
        jc.save(out / f"{seed}-small.jxc", variables)
        variables = jc.load(out / f"{seed}-small.jxc")
        chunks = data[2].reshape(-1, 1000, *data[2].shape[1:])
        found = jnp.concatenate([f(variables, x).argmax(axis=-1) for x in chunks])
        return round(100 * float(jnp.mean(found == data[3])), 2)

    def note(name: str, value: Any) -> None:
        found[name] = value
        print(f"seed {seed} {name}: {value}", flush=True)
        file.write_text(json.dumps(found, indent=1))

    if not net_file.exists():
        start = ResNet().init(keys[0], data[0][:1])
        jc.save(net_file, fit(training, start, data, 0.1, EPOCHS, keys[1]))
    dense = jc.load(net_file)
    if "dense, fine-tuned" not in found:
        note("dense", accuracy(jax.jit(logits), dense))
        note("dense, fine-tuned", accuracy(jax.jit(logits), tune(training, dense)))

    groups = coupled_groups(logits, dense, data[0][:1])
    families, terms = groups.families, groups.multiply_adds
    whole = total(terms, {f.name: f.size for f in families})
    scores = all_scores(dense, *data[:2], keys[3])
    for level, part in TARGETS.items():
        for name in only:
            if f"{name} {level}" in found:
                continue
            if name in scores:
                values = gs.normalized(scores[name])(dense, families)
                keep = cost_budget(values, families, terms, part * whole)
            else:
                keep = chosen_by_peer(dense, data[0], groups, part * whole)
            which = "".join(str(int(stays)) for mask in keep.values() for stays in mask)
            done = (v for v in found.values() if isinstance(v, dict))
            value = next((v for v in done if v["which"] == which), None)
            if value is None:
                small = jax.jit(shrink(logits, dense, keep, data[0][:1]).function)
                f, variables, _ = shrink(training, dense, keep, data[0][:1])
                kept = {family: int(mask.sum()) for family, mask in keep.items()}
                value = {
                    "before": accuracy(small, variables),
                    "accuracy": accuracy(small, tune(f, variables)),
                    "multiply-adds": total(terms, kept) / whole,
                    "parameters": total(groups.parameters, kept),
                    "kept": list(kept.values()),
                    "which": which,
                }
            note(f"{name} {level}", value)


def row(name: str, values: Any) -> str:
    return f"| {name} | " + " | ".join(values) + " |"


@app.command()
def table(out: Path) -> None:
    """Prints the means over the seeds in OUT and the standard deviations."""
    runs = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    dense, tuned = (
        np.array([run[name] for run in runs]) for name in ("dense", "dense, fine-tuned")
    )

    def cell(values: Any) -> str:
        return f"{np.mean(values):.2f} ({np.std(values, ddof=1):.2f})"

    print(f"{len(runs)} seeds; dense {cell(dense)}, fine-tuned {cell(tuned)}\n")
    for level in TARGETS:
        heads = ["before", "after", "to dense", "to dense, fine-tuned"]
        print(row(level, [*heads, "multiply-adds", "parameters"]))
        print(row(":--", ["--:"] * 6))
        for name in SCORES:
            found = [run[key] for run in runs if (key := f"{name} {level}") in run]
            if len(found) < len(runs):
                continue
            after, before, adds, params = (
                np.array([one[key] for one in found])
                for key in ("accuracy", "before", "multiply-adds", "parameters")
            )
            lost = (f"{np.mean(after - base):+.2f}" for base in (dense, tuned))
            values = [f"{np.mean(before):.1f}", cell(after), *lost]
            values += [f"{np.mean(adds):.1%}", f"{np.mean(params):,.0f}"]
            print(row(name, values))
        print()


@app.command(name="time")
def compare(out: Path, seed: int, multiple: int = 1, rounds: int = 60) -> None:
    """Prints milliseconds of a net from `shrink`, built small, and dense, in turns."""
    x, y, *_ = load_images(False)
    dense, rows = jc.load(out / f"{seed}.jxc"), jnp.arange(256)
    key = jax.random.key(seed)
    groups = coupled_groups(logits, dense, x[:1])
    families, terms = groups.families, groups.multiply_adds
    half = total(terms, {f.name: f.size for f in families}) / 2
    values = gs.normalized(gs.group_squares)(dense, families)
    keep = cost_budget(values, families, terms, half, multiple=multiple)
    cut = [shrink(f, dense, keep, x[:1]) for f in (logits, training)]
    small = cut[0].params
    kernels = [small["params"][f"Block_{i}"] for i in range(3)]
    shapes = [[b[f"Conv_{i}"]["kernel"].shape[3] for b in kernels] for i in range(2)]
    native = ResNet(*shapes)
    built, again = (
        [partial(f, net=native) for f in (logits, training)] for _ in range(2)
    )
    ways = {
        "from shrink": (*(c.function for c in cut), small),
        "built small": (*built, small),
        "built small, again": (*again, small),
        "dense": (logits, training, dense),
    }
    print(f"streams {native.width}, inner {native.inner}\n")
    heads = ["trace, s", "compile, s", "ms", "to built small", "speed-up"]
    print(row("", heads))
    print(row(":--", ["--:"] * 5))
    for what in ("forward", "training step"):
        runs, before, outputs = {}, {}, {}
        for way, (f, g, variables) in ways.items():
            if what == "forward":
                fn, args = jax.jit(f), (variables, x[:256])
            else:
                tx = sgd(0.01, 1)
                state = tx.init(variables["params"])
                fn, args = stepper(g, tx), (variables, state, x, y, rows, key)
            start = clock.perf_counter()
            lowered = fn.lower(*args)
            middle = clock.perf_counter()
            fn = lowered.compile()
            before[way] = middle - start, clock.perf_counter() - middle
            outputs[way], runs[way] = fn(*args), partial(fn, *args)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4),
            outputs["from shrink"],
            outputs["built small"],
        )
        seconds: dict[str, list[float]] = {way: [] for way in runs}
        for i in range(rounds):
            for way in list(runs)[:: (-1) ** i]:
                start = clock.perf_counter()
                jax.block_until_ready(runs[way]())
                seconds[way].append(clock.perf_counter() - start)
        each = {way: statistics.median(times) for way, times in seconds.items()}
        for way, time in each.items():
            ratios = time / each["built small"], each["dense"] / time
            values = [*(f"{t:.1f}" for t in before[way]), f"{1000 * time:.1f}"]
            print(row(f"{what}, {way}", [*values, *(f"{r:.2f}" for r in ratios)]))


if __name__ == "__main__":
    app()
