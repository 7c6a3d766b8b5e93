"""What a link adds to a step: to the update of 10 M weights, to a whole small step.

    python benchmarks/step_overhead.py

Whole cycles of 100 steps, one choice of masks in each, interleaved in one process,
medians after one cycle for compilation; donated buffers. Plain Adam runs twice: the
spread of the two is the noise. With JaxPruner (google-research/jaxpruner, a clone on
PYTHONPATH) its magnitude pruning runs beside. It takes ten minutes on one core.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxcomp as jc
from jaxcomp import demo


EVERY, BATCH = 100, 256
RAMP = optax.linear_schedule(0.0, 0.9, 100 * EVERY)
adam = optax.adam(1e-3)
gradual = optax.chain(adam, jc.prune_gradually(RAMP, every=EVERY))


def jaxpruner_tx() -> tuple[Any, Any]:
    """Its transformation and the function that it wants called after each step."""
    jax.tree_map = jax.tree.map  # type: ignore[attr-defined]  # JAX took it away
    import jaxpruner

    schedules, distributions = (
        jaxpruner.sparsity_schedules,
        jaxpruner.sparsity_distributions,
    )
    pruner = jaxpruner.MagnitudePruning(
        scheduler=schedules.PolynomialSchedule(EVERY, 0, 100 * EVERY, power=1),
        sparsity_distribution_fn=partial(distributions.uniform, sparsity=0.9),
    )
    return pruner.wrap_optax(adam), pruner.post_gradient_update


def cycle_of(
    grads_of: Callable[[Any, Any], Any],
    tx: Any,
    params: Any,
    batch: Any,
    after: Callable[[Any, Any], Any] = lambda params, state: params,
) -> Callable[[], float]:
    """A function that runs one cycle and returns its seconds."""

    def step(params: Any, state: Any, batch: Any) -> Any:
        updates, state = tx.update(grads_of(params, batch), state, params)
        return after(optax.apply_updates(params, updates), state), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, params)
    carry = [params, tx.init(params)]

    def run() -> float:
        start = time.perf_counter()
        for _ in range(EVERY):
            carry[:] = compiled(*carry, batch)
        jax.block_until_ready(carry)
        return time.perf_counter() - start

    return run


def compare(runs: dict[str, Callable[[], float]], cycles: int) -> None:
    first = {name: run() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(cycles):
        for name, run in runs.items():
            seconds[name].append(run())
    plain = statistics.median(seconds["Adam"])
    print("| | ms per step | to Adam | first cycle, s |")
    print("| :-- | --: | --: | --: |")
    for name, found in seconds.items():
        middle = statistics.median(found)
        print(
            f"| {name} | {1000 * middle / EVERY:.2f} | {middle / plain:.2f} "
            f"| {first[name]:.1f} |",
            flush=True,
        )


def large_updates() -> dict[str, Callable[[], float]]:
    """The update alone: ten kernels of 1024 x 1024, the same gradients always."""
    keys = jax.random.split(jax.random.key(0), 21)
    params = {str(i): jax.random.normal(keys[i], (1024, 1024)) for i in range(10)}
    grads = {str(i): jax.random.normal(keys[10 + i], (1024, 1024)) for i in range(10)}
    fraction = optax.cosine_decay_schedule(0.3, 100 * EVERY)
    score = jc.random_scores(keys[20])
    ways = {
        "Adam": adam,
        "Adam again": adam,
        "prune_gradually": gradual,
        "keep_zeros": optax.chain(adam, jc.keep_zeros()),
        "rigl": jc.rigl(adam, 0.9, fraction=fraction, score=score, every=EVERY),
    }

    def given(params: Any, grads: Any) -> Any:
        return grads

    runs = {name: cycle_of(given, tx, params, grads) for name, tx in ways.items()}
    if importlib.util.find_spec("jaxpruner"):
        tx, after = jaxpruner_tx()
        runs["JaxPruner, magnitude"] = cycle_of(given, tx, params, grads, after)
    return runs


def whole_steps() -> dict[str, Callable[[], float]]:
    """LeNet-300-100 on a batch of 256, forward and backward pass included."""
    key_net, key_x, key_y = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(key_x, (BATCH, 784))
    y = jax.random.randint(key_y, (BATCH,), 0, 10)
    params = demo.LeNet().init(key_net, x)["params"]

    def loss(params: Any, batch: Any) -> jax.Array:
        z = demo.logits(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(z, batch[1]).mean()

    def rounded(params: Any, batch: Any) -> jax.Array:
        fake = partial(jc.fake_quantize, bits=4)
        return loss(jc.map_where(fake, params), batch)

    def run(loss: Any, tx: Any, **more: Any) -> Callable[[], float]:
        return cycle_of(jax.grad(loss), tx, params, (x, y), **more)

    runs = {
        "Adam": run(loss, adam),
        "Adam again": run(loss, adam),
        "prune_gradually": run(loss, gradual),
        "fake_quantize, 4 bits": run(rounded, adam),
    }
    if importlib.util.find_spec("jaxpruner"):
        tx, after = jaxpruner_tx()
        runs["JaxPruner, magnitude"] = run(loss, tx, after=after)
    return runs


if __name__ == "__main__":
    print("The update of 10 M weights:\n")
    compare(large_updates(), cycles=5)
    print("\nA whole step of LeNet-300-100, batch 256:\n")
    compare(whole_steps(), cycles=25)
