"""How accurate sparse nets are by the way they became sparse, on Fashion-MNIST.

    python benchmarks/sparse_training.py train OUT SEED  # half an hour on one core
    python benchmarks/sparse_training.py train OUT SEED --longer  # five minutes
    python benchmarks/sparse_training.py convolve OUT SEED  # ten minutes
    python benchmarks/sparse_training.py twelve OUT SEED  # three minutes
    python benchmarks/sparse_training.py twelve OUT SEED --held-out
    python benchmarks/sparse_training.py table OUT

LeNet-300-100, eight epochs each, the same batches for all ways of a seed. Nothing was
tuned: the settings are those of the papers, the learning rate is that of the lottery
tickets (1.2e-3) with a cosine. Every net is stored, loaded back and evaluated, and its
sparsity is asserted. A lottery ticket trains for eight epochs in each of its rounds.
`--longer` trains some of them for 30 epochs. `twelve` prunes to 12 times fewer weights
with the settings in `CHOSEN`; `--held-out` tries all in `SETTINGS` on the last 5,000
training images, which it then does not train on. `convolve` trains a small
convolutional net on 10,000 of the images, for 20 epochs.
"""

import json
from collections.abc import Callable
from functools import partial
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
from jaxcomp.prune import erk_budget, global_budget, lamp_budget, leaf_budget


BATCH, EPOCHS = 128, 8
TARGETS = (0.8, 0.9, 0.95, 0.98)
TWELVE = 1 - 1 / 12  # Han et al., arXiv:1506.02626
ROUNDS = [1 - 0.8**r for r in range(1, 10)]  # the ninth keeps 13.4%
NET = demo.LeNet()
# Steps between two choices of masks; where the ramp begins and ends, of all steps.
SETTINGS = [
    *((100, 0.1, 0.7), (100, 0.1, 0.5), (100, 0.1, 0.35), (100, 0.0, 0.5)),
    *((100, 0.0, 0.3), (25, 0.1, 0.5), (25, 0.1, 0.7)),
]
CHOSEN = {8: (25, 0.1, 0.7), 30: (100, 0.0, 0.3)}
LONGER = dict.fromkeys(["static", "SET", "RigL"], TARGETS[2:])
ROUNDS = [*ROUNDS[:6], 0.8, 0.835, ROUNDS[8], 0.9, 0.925, 0.95, 0.965, 0.98]

# (target, key) -> a transformation; (params, target, key) -> the weights at the start
Way = tuple[Callable[[Any, Any], Any], Callable[..., Any]]

app = typer.Typer(pretty_exceptions_enable=False)


def decayed_adam(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(1.2e-3, steps))


def dense_start(params: Any, target: Any, key: Any) -> Any:
    return params


def sparse_start(params: Any, target: Any, key: Any) -> Any:
    score = jc.random_scores(key)
    masks = jc.prune.masks(params, target, score=score, budget=erk_budget)
    return jc.apply_masks(params, masks)


def ways(steps: int) -> dict[str, Way]:
    adam = decayed_adam(steps)

    def ramp(target: Any) -> optax.Schedule:
        return optax.polynomial_schedule(0.0, target, 3, steps * 6 // 10, steps // 10)

    def gradual(target: Any, key: Any, budget: Any = leaf_budget, **more: Any) -> Any:
        link = jc.prune_gradually(ramp(target), budget=budget, **more)
        return optax.chain(adam, link)

    def sparse(regrow: Callable[..., Any], target: Any, key: Any) -> Any:
        fraction = optax.cosine_decay_schedule(0.3, steps * 3 // 4)
        score = jc.random_scores(key)
        return regrow(adam, target, fraction=fraction, score=score, budget=erk_budget)

    def regrown(target: Any, key: Any) -> Any:
        return sparse(
            partial(jc.regrow_randomly, jax.random.fold_in(key, 1)), target, key
        )

    def random(target: Any, key: Any) -> Any:
        return gradual(target, key, score=jc.random_scores(key))

    return {
        "static": (lambda t, k: optax.chain(adam, jc.keep_zeros()), sparse_start),
        "SET": (regrown, sparse_start),
        "RigL": (partial(sparse, jc.rigl), sparse_start),
        "gradual, random": (random, dense_start),
        "gradual, per leaf": (gradual, dense_start),
        "gradual, ERK": (partial(gradual, budget=erk_budget), dense_start),
        "gradual, LAMP": (partial(gradual, budget=lamp_budget), dense_start),
        "gradual, global": (partial(gradual, budget=global_budget), dense_start),
        "saliency": (
            lambda t, k: jc.prune_by_saliency(adam, ramp(t), budget=global_budget),
            dense_start,
        ),
        "movement": (
            lambda t, k: jc.prune_by_movement(adam, ramp(t), every=10),
            dense_start,
        ),
        "magnitude-STE": (
            lambda t, k: jc.prune_straight_through(adam, ramp(t), every=10),
            dense_start,
        ),
    }


class Convolutional(nn.Module):
    """105,866 parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 28, 28, 1)
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def trainer(make: Callable[[Any, Any], Any], net: nn.Module = NET) -> tuple[Any, Any]:
    """(init, epoch), compiled once for all targets, seeds and epochs of a way."""

    @jax.jit
    def init(params: Any, target: Any, key: Any) -> Any:
        return make(target, key).init(params)

    def stepper(x: Any, y: Any, target: Any, key: Any) -> Callable[..., Any]:
        tx = make(target, key)

        def step(carry: Any, rows: Any) -> tuple[Any, None]:
            def loss(params: Any) -> jax.Array:
                z = net.apply({"params": params}, x[rows])
                losses = optax.softmax_cross_entropy_with_integer_labels(z, y[rows])
                return losses.mean()

            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return step

    @jax.jit
    def scanned(carry: Any, x: Any, y: Any, rows: Any, *args: Any) -> Any:
        return jax.lax.scan(stepper(x, y, *args), carry, rows)[0]

    @jax.jit
    def single(carry: Any, x: Any, y: Any, rows: Any, *args: Any) -> Any:
        return stepper(x, y, *args)(carry, rows)[0]

    def one_by_one(carry: Any, x: Any, y: Any, rows: Any, *args: Any) -> Any:
        for batch in rows:  # a convolution in a scan is many times slower on a CPU
            carry = single(carry, x, y, batch, *args)
        return carry

    return init, scanned if net is NET else one_by_one


def batches(key: jax.Array, size: int, epochs: int) -> list[jax.Array]:
    """int32[steps, batch] of every epoch."""
    each = size // BATCH
    orders = [jax.random.permutation(k, size) for k in jax.random.split(key, epochs)]
    return [order[: each * BATCH].reshape(each, BATCH) for order in orders]


def measured(
    params: Any,
    sparsity: float,
    state: Any,
    file: Path,
    data: Any,
    net: nn.Module = NET,
) -> float:
    """Accuracy on the test images, in percent, of the file."""
    kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
    zeros = sum(int(jnp.sum(x == 0)) for x in kernels) / sum(x.size for x in kernels)
    # What grew at a pixel that is always black has no gradient and is still 0.
    assert sparsity - 1e-5 < zeros < sparsity + 2e-3, (sparsity, zeros)
    assert jc.strays(state) == 0
    jc.save(file, params)
    found = net.apply({"params": jc.load(file)}, data.test_x).argmax(axis=-1)
    return 100 * float(jnp.mean(found == data.test_y))


@app.command()
def train(out: Path, seed: int, longer: bool = False) -> None:
    """Trains all nets of a seed, or some for longer; accuracies go to OUT."""
    out.mkdir(parents=True, exist_ok=True)
    data = demo.load_fashion(demo.FASHION)
    keys = jax.random.split(jax.random.key(seed), 4)
    key_init, key_batches, key_way, key_again = keys
    rows = batches(key_batches, len(data.x), 30 if longer else EPOCHS)
    steps = sum(map(len, rows))
    adam = decayed_adam(steps)
    params = demo.LeNet().init(key_init, data.x[:1])["params"]
    file = out / f"{seed}.jxc"
    found: dict[str, float] = {}

    def note(name: str, target: float, value: float) -> None:
        found[f"{name} {target:.4f}"] = value
        print(f"seed {seed} {name} {target:.4f}: {value:.2f}", flush=True)
        (out / f"{seed}.json").write_text(json.dumps(found, indent=1))

    def fit(way: tuple[Any, Any], carry: Any, *args: Any) -> Any:
        for chunk in rows:
            carry = way[1](carry, data.x, data.y, chunk, *args)
        return carry

    plain = trainer(lambda t, k: adam)
    net, _ = fit(plain, (params, plain[0](params, 0.0, key_way)), 0.0, key_way)
    note("dense", 0, measured(net, 0.0, None, file, data))
    if longer:  # Han et al. prune what is trained
        way = trainer(ways(steps)["gradual, global"][0])
        args = jnp.float32(TWELVE), key_way
        net, state = fit(way, (net, way[0](net, *args)), *args)
        value = measured(net, TWELVE, state, file, data)
        note("gradual, global, after dense", TWELVE, value)
    for name, (make, start) in ways(steps).items():
        way = trainer(make)
        targets = LONGER.get(name, ()) if longer else TARGETS
        extra = (TWELVE,) if name == "gradual, global" else ()
        for target in (*targets, *extra):
            args = jnp.float32(target), key_way
            begun = start(params, target, key_way)
            net, state = fit(way, (begun, way[0](begun, *args)), *args)
            note(name, target, measured(net, target, state, file, data))

    if longer:
        return
    levels = jnp.array([0.0, *ROUNDS], jnp.float32)
    way = trainer(
        lambda t, k: jc.rewind_weights(adam, lambda r: levels[r], every=steps)
    )
    args = jnp.float32(0), key_way
    carry = fit(way, (params, way[0](params, *args)), *args)
    for level in ROUNDS:
        carry = way[1](carry, data.x, data.y, rows[0][:2], *args)  # the two that turn
        carry = fit(way, carry, *args)
        note("ticket", level, measured(carry[0], level, carry[1], file, data))
        if level == ROUNDS[8]:
            other = demo.LeNet().init(key_again, data.x[:1])["params"]
            other = jc.apply_masks(other, carry[1].masks)
            held = trainer(lambda t, k: optax.chain(adam, jc.keep_zeros()))
            net, state = fit(held, (other, held[0](other, *args)), *args)
            note("re-initialised", level, measured(net, level, state, file, data))


@app.command()
def twelve(out: Path, seed: int, longer: bool = False, held_out: bool = False) -> None:
    """Prunes a seed's net to 12 times fewer weights; accuracies go to OUT."""
    out.mkdir(parents=True, exist_ok=True)
    data = demo.load_fashion(demo.FASHION)
    if held_out:
        data = data._replace(
            x=data.x[:-5000],
            y=data.y[:-5000],
            test_x=data.x[-5000:],
            test_y=data.y[-5000:],
        )
    key_init, key_batches, *_ = jax.random.split(jax.random.key(seed), 4)
    epochs = 30 if longer else EPOCHS
    rows = batches(key_batches, len(data.x), epochs)
    steps = sum(map(len, rows))
    params = NET.init(key_init, data.x[:1])["params"]
    found = {}

    def fit(name: str, target: float, make: Callable[[Any, Any], Any]) -> None:
        init, epoch = trainer(make)
        carry = params, init(params, 0.0, key_init)
        for chunk in rows:
            carry = epoch(carry, data.x, data.y, chunk, 0.0, key_init)
        found[name] = measured(carry[0], target, carry[1], out / f"{seed}.jxc", data)
        print(f"seed {seed} {name}: {found[name]:.2f}", flush=True)
        (out / f"{seed}.json").write_text(json.dumps(found, indent=1))

    fit("dense 0.0000", 0.0, lambda t, k: decayed_adam(steps))
    for every, begin, end in SETTINGS if held_out else [CHOSEN[epochs]]:
        first, last = round(begin * steps), round(end * steps)
        ramp = optax.polynomial_schedule(0.0, TWELVE, 3, last - first, first)
        link = jc.prune_gradually(ramp, every=every, budget=global_budget)
        name = f"every {every}, ramp {begin} to {end} {TWELVE:.4f}"
        fit(
            name, TWELVE, lambda t, k, link=link: optax.chain(decayed_adam(steps), link)
        )


@app.command()
def convolve(out: Path, seed: int) -> None:
    """Trains the convolutional nets of a seed and writes their accuracies to OUT."""
    out.mkdir(parents=True, exist_ok=True)
    data, net = demo.load_fashion(demo.FASHION), Convolutional()
    key_init, key_batches, key_way = jax.random.split(jax.random.key(seed), 3)
    rows = batches(key_batches, 10_000, 20)
    steps = sum(map(len, rows))
    params = net.init(key_init, data.x[:1])["params"]
    some = {"dense": (lambda t, k: decayed_adam(steps), dense_start)}
    names = ("static", "SET", "RigL", "gradual, per leaf", "gradual, ERK")
    some |= {name: ways(steps)[name] for name in (*names, "gradual, global")}
    found = {}
    for name, (make, start) in some.items():
        way = trainer(make, net)
        for target in (0.0,) if name == "dense" else TARGETS[2:]:
            args = jnp.float32(target), key_way
            begun = start(params, target, key_way)
            carry = begun, way[0](begun, *args)
            for chunk in rows:
                carry = way[1](carry, data.x, data.y, chunk, *args)
            value = measured(*carry[:1], target, carry[1], out / "net.jxc", data, net)
            found[f"{name} {target:.4f}"] = value
            print(f"seed {seed} {name} {target:.4f}: {value:.2f}", flush=True)
            (out / f"{seed}.json").write_text(json.dumps(found, indent=1))


@app.command()
def table(out: Path) -> None:
    """Prints the mean over the seeds in OUT and the standard deviation."""
    runs = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    found = {key: [run[key] for run in runs] for key in runs[0]}

    def cell(name: str, target: float) -> str:
        values = found.get(f"{name} {target:.4f}")
        if values is None:
            return ""
        return f"{np.mean(values):.2f} ({np.std(values, ddof=1):.2f})"

    print(f"{len(runs)} seeds; dense {cell('dense', 0)}\n")
    print("| | " + " | ".join(f"{t:.0%}" for t in TARGETS) + " |")
    print("| :-- |" + " --: |" * len(TARGETS))
    for name in (*ways(1), "ticket"):
        if not any(key.startswith(f"{name} ") for key in found):
            continue
        print(f"| {name} | " + " | ".join(cell(name, t) for t in TARGETS) + " |")
    for name in found:
        if name.startswith("every "):
            print(f"{name}: {cell(name.removesuffix(f' {TWELVE:.4f}'), TWELVE)}")
    if f"gradual, global {TWELVE:.4f}" in found:
        print(f"\ngradual, global at 12x: {cell('gradual, global', TWELVE)}")
        print(f"after dense: {cell('gradual, global, after dense', TWELVE)}")
    kept = ROUNDS[8]
    if f"ticket {kept:.4f}" in found:
        print(f"ticket that keeps {1 - kept:.1%}: {cell('ticket', kept)}")
        print(f"its mask, re-initialised: {cell('re-initialised', kept)}")


if __name__ == "__main__":
    app()
