"""Where distillation pays and where it does not, on Fashion-MNIST.

    python benchmarks/distill.py dense OUT SEED  # ten minutes on one core
    python benchmarks/distill.py features OUT SEED  # half an hour
    python benchmarks/distill.py features OUT SEED --held-out  # how WEIGHTS were chosen
    python benchmarks/distill.py table OUT

`dense` teaches fully connected nets by the mean logits of three LeNet-300-100: a small
student with all labels; a LeNet-300-100 of which 1,000 images have labels; one that
never sees an image of one class (Hinton et al., arXiv:1503.02531, section 3); one that
is pruned to 12 times fewer weights. `features` teaches a convolutional student on
10,000 images by one teacher, by every loss on logits, features and relations, each
with the soft targets. Every net is stored, loaded back and evaluated on the 10,000 test
images. Nothing is chosen on those: the weights of the feature losses are from one other
seed, on the last 5,000 training images.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer

import jaxcomp as jc
from jaxcomp import demo


UNSEEN = (1, 5, 7)
TWELVE = 1 - 1 / 12
FEW = 1000
SOME = 10_000

app = typer.Typer(pretty_exceptions_enable=False)


class Small(nn.Module):
    """25,450 parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.he_normal()
        x = nn.relu(nn.Dense(32, kernel_init=init)(x))
        return nn.Dense(10, kernel_init=init)(x)


class Convolutional(nn.Module):
    """Three convolutions, each halving height and width, and a dense layer."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 28, 28, 1)
        for width in self.widths:
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


LENET, SMALL = demo.LeNet(), Small()
TEACHER, STUDENT = Convolutional((32, 64, 128)), Convolutional((8, 16, 32))


def model(net: nn.Module) -> Callable[..., Any]:
    return lambda params, x: net.apply({"params": params}, x)


def spoken(logits: Any, x: Any) -> Any:
    """A teacher that has spoken: its logits take the place of its params."""
    return logits


def adam(steps: int, rate: float = 1e-3) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def batches(key: jax.Array, rows: Any, size: int, epochs: int) -> list[jax.Array]:
    """int32[steps, size] of every epoch, in an order of its own."""
    each = len(rows) // size
    orders = [jax.random.permutation(k, rows) for k in jax.random.split(key, epochs)]
    return [order[: each * size].reshape(each, size) for order in orders]


def fit(step: Any, tx: Any, params: Any, logits: Any, data: Any, orders: Any) -> Any:
    """(params, state) after the steps of all epochs, each of them compiled as one."""

    @jax.jit
    def epoch(carry: Any, logits: Any, x: Any, y: Any, order: Any) -> Any:
        def body(carry: Any, rows: Any) -> tuple[Any, None]:
            params, state, _ = step(*carry, logits[rows], (x[rows], y[rows]))
            return (params, state), None

        return jax.lax.scan(body, carry, order)[0]

    carry = params, tx.init(params)
    for order in orders:
        carry = epoch(carry, logits, *data, order)
    return carry


def stored(params: Any, file: Path) -> Any:
    jc.save(file, params)
    return jc.load(file)


def accuracy(net: nn.Module, params: Any, data: Any) -> float:
    """In percent of the test images."""
    found = model(net)(params, data.test_x).argmax(axis=-1)
    return 100 * float(jnp.mean(found == data.test_y))


class Notes:
    """What was found for a seed, on the disk at once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found = json.loads(file.read_text()) if file.exists() else {}

    def __call__(self, name: str, value: float) -> None:
        self.found[name] = value
        print(f"{self.file.stem} {name}: {value:.2f}", flush=True)
        self.file.write_text(json.dumps(self.found, indent=1))


@app.command()
def dense(out: Path, seed: int) -> None:
    """Trains the fully connected nets of a seed; accuracies go to OUT."""
    out.mkdir(parents=True, exist_ok=True)
    note, file = Notes(out / f"{seed}.json"), out / f"{seed}.jxc"
    data = demo.load_fashion(demo.FASHION)
    x, y = data.x, data.y
    key_nets, key_batches, key_few = jax.random.split(jax.random.key(seed), 3)
    every = jnp.arange(len(x))

    def trained(
        net: nn.Module,
        rows: Any,
        epochs: int,
        key: jax.Array,
        make: Any = adam,
        size: int = 256,
        given: Any = None,
        **options: Any,
    ) -> Any:
        """Params from the disk, of a net trained on some rows, and the state."""
        orders = batches(key_batches, rows, size, epochs)
        tx = make(sum(map(len, orders)))
        params = net.init(key, x[:1])["params"]
        plain = {"hard": 1.0, "soft": None} if given is None else {}
        logits = jnp.zeros((len(x), 0)) if given is None else given
        step = jc.distill_step(model(net), spoken, tx, **plain, **options)
        params, state = fit(step, tx, params, logits, (x, y), orders)
        return stored(params, file), state

    keys = jax.random.split(key_nets, 3)
    teachers = [trained(LENET, every, 20, key)[0] for key in keys]
    for i, params in enumerate(teachers):
        note(f"LeNet {i}", accuracy(LENET, params, data))
    speak = jax.jit(jc.ensemble(model(LENET)))
    said = jnp.concatenate([speak(teachers, part) for part in jnp.split(x, 10)])
    right = speak(teachers, data.test_x).argmax(axis=-1) == data.test_y
    note("teacher", 100 * float(jnp.mean(right)))

    params, _ = trained(SMALL, every, 10, keys[0])
    note("small, labels", accuracy(SMALL, params, data))
    for temperature in (1.0, 2.0, 4.0):
        for hard in (0.5, 0.0):
            options = {"temperature": temperature, "hard": hard, "given": said}
            params, _ = trained(SMALL, every, 10, keys[0], **options)
            name = f"small, T = {temperature:.0f}, hard = {hard}"
            note(name, accuracy(SMALL, params, data))

    few = jax.random.permutation(key_few, len(x))[:FEW]
    for epochs in (40, 160):  # 1,000 images: 7 steps of 128 an epoch
        params, _ = trained(LENET, few, epochs, keys[0], size=128)
        note(f"few, alone, {epochs} epochs", accuracy(LENET, params, data))
    params, _ = trained(LENET, every, 8, keys[0], given=said, hard=0.0)
    note("few, taught, no labels", accuracy(LENET, params, data))
    labelled, y = y, jnp.full_like(y, -1).at[few].set(y[few])
    params, _ = trained(LENET, every, 8, keys[0], given=said, hard=0.1)
    note("few, taught, 1,000 labels", accuracy(LENET, params, data))
    y = labelled

    theirs = speak(teachers, data.test_x).argmax(axis=-1)
    for unseen in UNSEEN:
        is_it = data.test_y == unseen
        seen = jnp.flatnonzero(y != unseen)
        options = {"temperature": 4.0, "hard": 0.0, "given": said}
        params, _ = trained(LENET, seen, 8, keys[0], **options)
        parts = [model(LENET)(params, part) for part in jnp.split(x, 10)]
        bias = jc.distill.unseen_class_bias(jnp.concatenate(parts), {unseen: 0.1})
        name = f"unseen {unseen}"
        note(f"{name}, teacher", 100 * float(jnp.mean(theirs[is_it] == unseen)))
        for when, added in (("before", 0.0), ("after", bias)):
            found = (model(LENET)(params, data.test_x) + added).argmax(axis=-1)
            note(f"{name}, {when}", 100 * float(jnp.mean(found[is_it] == unseen)))
            whole = 100 * float(jnp.mean(found == data.test_y))
            note(f"{name}, {when}, all classes", whole)

    for epochs in (8, 30):

        def pruning(steps: int, epochs: int = epochs) -> optax.GradientTransformation:
            ramp = optax.polynomial_schedule(
                0.0, TWELVE, 3, steps * 6 // 10, steps // 10
            )
            budget = jc.prune.global_budget
            link = jc.prune_gradually(ramp, every=25, budget=budget)
            return optax.chain(adam(steps, 1.2e-3), link)

        for name, options in (
            ("labels", {}),
            ("taught", {"given": said, "temperature": 2.0, "hard": 0.1}),
        ):
            params, state = trained(
                LENET, every, epochs, keys[0], pruning, 128, **options
            )
            jc.testing.assert_sparsity(params, TWELVE, state=state)
            note(f"12x, {name}, {epochs} epochs", accuracy(LENET, params, data))


# Features of student and teacher: what the last convolution gives, and what flows into
# it and into the dense layer.
GIVEN, TAKEN = (
    {"last": "Conv_2/bias"},
    {"early": "Conv_2/kernel", "flat": "Dense_0/kernel"},
)


def on(loss: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A term between features of one name."""
    return lambda ours, theirs, batch: loss(ours.features[name], theirs.features[name])


def both(loss: Callable[..., Any]) -> list[Callable[..., Any]]:
    return [on(loss, "early"), on(loss, "last")]


def among(ours: Any, theirs: Any, batch: Any) -> jax.Array:
    return jc.distill.class_correlation_loss(ours.logits, theirs.logits, 4.0).mean()


def decoupled(ours: Any, theirs: Any, batch: Any) -> jax.Array:
    return jc.distill.decoupled_loss(ours.logits, theirs.logits, batch.labels, 4.0)


# name -> terms, to be weighed together
TERMS: Mapping[str, list[Callable[..., Any]]] = {
    "hints, projected (FitNets)": both(jc.distill.hint_loss),
    "attention transfer": both(jc.distill.attention_transfer_loss),
    "similarity preserving": both(jc.distill.similarity_loss),
    "RKD, distances": [on(jc.distill.distance_loss, "flat")],
    "RKD, angles": [on(jc.distill.angle_loss, "flat")],
}
TRIED = (0.1, 1.0, 10.0)
WEIGHTS = dict(zip(TERMS, (10.0, 1.0, 10.0, 10.0, 10.0), strict=True))


@app.command()
def features(out: Path, seed: int, held_out: bool = False) -> None:
    """Trains the convolutional nets of a seed; accuracies go to OUT."""
    out.mkdir(parents=True, exist_ok=True)
    note, file = Notes(out / f"{seed}.json"), out / f"{seed}.jxc"
    data = demo.load_fashion(demo.FASHION)
    if held_out:
        test = {"test_x": data.x[-5000:], "test_y": data.y[-5000:]}
        data = data._replace(x=data.x[:-5000], y=data.y[:-5000], **test)
    x, y = data.x, data.y
    key_teacher, key_student, key_batches, key_add = jax.random.split(
        jax.random.key(seed), 4
    )

    def run(net: Any, step: Any, tx: Any, params: Any, theirs: Any, orders: Any) -> Any:
        state = tx.init(params)
        for order in orders:  # no scan: convolutions in one are slow on a CPU
            for rows in order:
                batch = x[rows], y[rows]
                params, state, _ = step(params, state, theirs, batch)
        return params

    def supervised(net: Any, params: Any, rows: Any, epochs: int) -> Any:
        orders = batches(key_batches, rows, 128, epochs)
        tx = adam(sum(map(len, orders)), 2e-3)
        step = jc.distill_step(model(net), spoken, tx, hard=1.0, soft=None)
        return stored(run(net, step, tx, params, jnp.zeros(()), orders), file)

    start = TEACHER.init(key_teacher, x[:1])["params"]
    taught = supervised(TEACHER, start, jnp.arange(len(x)), 5)
    note("convolutional teacher", accuracy(TEACHER, taught, data))
    start = STUDENT.init(key_student, x[:1])["params"]
    some = jnp.arange(SOME)
    note("labels alone", accuracy(STUDENT, supervised(STUDENT, start, some, 20), data))

    student, teacher = (
        jc.with_features(model(net), GIVEN, inputs=TAKEN) for net in (STUDENT, TEACHER)
    )

    def distilled(name: str, terms: Any, **options: Any) -> None:
        f, params = student, start
        if "projected" in name:
            args = student, start, teacher, taught, x[:1]
            f, params = jc.distill.with_projections(key_add, *args)
        if not terms:
            f = model(STUDENT)
        orders = batches(key_batches, some, 128, 20)
        tx = adam(sum(map(len, orders)), 2e-3)
        settings = {"temperature": 4.0, "hard": 0.1} | options
        theirs = teacher if terms else model(TEACHER)
        step = jc.distill_step(f, theirs, tx, terms=terms, **settings)
        params = run(STUDENT, step, tx, params, taught, orders)
        params = params["student"] if "projected" in name else params
        note(name, accuracy(STUDENT, stored(params, file), data))

    distilled("soft targets", {})
    for name, parts in TERMS.items():
        for weight in TRIED if held_out else (WEIGHTS[name],):

            def term(*args: Any, parts: Any = parts, weight: float = weight) -> Any:
                return weight * sum(jnp.mean(part(*args)) for part in parts)

            label = f"{name} {weight}" if held_out else name
            distilled(label, {"term": term})
    if held_out:
        return
    plain = {"soft": None, "hard": 1.0}
    distilled("logit MSE", {}, soft=_mse, temperature=1.0)
    distilled("reverse KL", {}, soft=jc.distill.reverse_kl_loss)
    distilled("Jensen-Shannon", {}, soft=jc.distill.jensen_shannon_loss)
    distilled("decoupled (DKD)", {"dkd": decoupled}, **plain)
    distilled("correlation (DIST)", {"dist": among}, soft=jc.distill.correlation_loss)


def _mse(ours: Any, theirs: Any, temperature: Any, mask: Any = None) -> jax.Array:
    return jc.distill.logit_mse_loss(ours, theirs, mask=mask)


def derived(run: Mapping[str, float]) -> dict[str, float]:
    """What the bars are about, in percent: gaps closed and recalls reached."""
    found = {}
    alone = run.get("few, alone, 160 epochs")
    for name in ("few, taught, no labels", "few, taught, 1,000 labels"):
        if alone and name in run:
            part = (run[name] - alone) / (run["teacher"] - alone)
            found[f"{name}: of the gap"] = 100 * part
    for unseen in UNSEEN:
        if f"unseen {unseen}, after" in run:
            part = run[f"unseen {unseen}, after"] / run[f"unseen {unseen}, teacher"]
            found[f"unseen {unseen}: of the teacher's recall"] = 100 * part
    return found


@app.command()
def table(out: Path) -> None:
    """Prints the mean over the seeds in OUT and the standard deviation."""
    runs = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    for run in runs:
        run |= derived(run)
    names: Iterable[str] = dict.fromkeys(name for run in runs for name in run)
    print("| | seeds | mean | standard deviation |\n| :-- | --: | --: | --: |")
    for name in names:
        values = np.array([run[name] for run in runs if name in run])
        spread = values.std(ddof=1) if len(values) > 1 else float("nan")
        print(f"| {name} | {len(values)} | {values.mean():.2f} | {spread:.2f} |")


if __name__ == "__main__":
    app()
