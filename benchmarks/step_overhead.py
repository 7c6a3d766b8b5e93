"""What a pruning link adds to an optimizer's update of 10 M weights.

    python benchmarks/step_overhead.py

Whole cycles of 100 steps, one choice of masks in each, interleaved in one process,
medians of 5 after one for compilation; donated buffers. Plain Adam runs twice: the
spread of the two is the noise. It takes a few minutes on one core.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import optax

import jaxcomp as jc


EVERY, CYCLES = 100, 5


def cycle_of(tx, params, grads):
    """A function that runs one cycle and returns its seconds."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, params)
    carry = [params, tx.init(params)]

    def run():
        start = time.perf_counter()
        for _ in range(EVERY):
            carry[:] = compiled(*carry, grads)
        jax.block_until_ready(carry)
        return time.perf_counter() - start

    return run


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 21)
    params = [{"kernel": jax.random.normal(key, (1024, 1024))} for key in keys[:10]]
    grads = [{"kernel": jax.random.normal(key, (1024, 1024))} for key in keys[10:20]]
    adam = optax.adam(1e-3)
    ramp = optax.linear_schedule(0.0, 0.9, 100 * EVERY)
    fraction = optax.cosine_decay_schedule(0.3, 100 * EVERY)
    score = jc.random_scores(keys[20])
    ways = {
        "Adam": adam,
        "Adam again": adam,
        "prune_gradually": optax.chain(adam, jc.prune_gradually(ramp, every=EVERY)),
        "keep_zeros": optax.chain(adam, jc.keep_zeros()),
        "rigl": jc.rigl(adam, 0.9, fraction=fraction, score=score, every=EVERY),
    }
    runs = {name: cycle_of(tx, params, grads) for name, tx in ways.items()}
    first = {name: run() for name, run in runs.items()}
    seconds = {name: [] for name in runs}
    for _ in range(CYCLES):
        for name, run in runs.items():
            seconds[name].append(run())
    plain = statistics.median(seconds["Adam"])
    print("| | ms per step | to Adam | first cycle, s |")
    print("| :-- | --: | --: | --: |")
    for name, found in seconds.items():
        middle = statistics.median(found)
        print(
            f"| {name} | {1000 * middle / EVERY:.1f} | {middle / plain:.2f} "
            f"| {first[name]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
