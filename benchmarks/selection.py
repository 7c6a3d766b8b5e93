"""Times an exact selection among 22.7 M scores: `top_mask` against NumPy's partition.

Takes half a minute: `python benchmarks/selection.py`. Both find the masks of the same
random scores; the two take turns in one process, and the medians are compared.
"""

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc


SIZE = 22_713_216  # weights of all-MiniLM-L6-v2
SPARSITY = 0.9
ROUNDS = 7


def seconds(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def partitioned(scores: np.ndarray, zeros: int) -> np.ndarray:
    """The threshold alone: of scores that tie with it, more or fewer may stay."""
    return scores > np.partition(scores, zeros - 1)[zeros - 1]


def main() -> None:
    rng = np.random.default_rng(0)
    scores = np.abs(rng.standard_normal(SIZE, dtype=np.float32))
    tied = np.round(scores * 8) / 8  # few values, almost all of which tie
    zeros = round(SPARSITY * SIZE)
    lowered = jax.jit(jc.top_mask).lower(scores, jnp.float32(SPARSITY))
    start = time.perf_counter()
    compiled = lowered.compile()
    compilation = time.perf_counter() - start

    sparsity = jnp.float32(zeros / SIZE)
    rows = []
    for name, values in (("distinct", scores), ("tied", tied)):
        given = jnp.asarray(values)
        ways = {
            "`numpy.partition`": lambda values=values: partitioned(values, zeros),
            "`top_mask`": lambda given=given: compiled(given, sparsity),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, run in ways.items():
                times[way].append(seconds(run))
        base = statistics.median(times["`numpy.partition`"])
        for way, run in ways.items():
            median = statistics.median(times[way])
            removed = SIZE - int(np.count_nonzero(np.asarray(run())))
            rows.append((name, way, median, median / base, removed))

    print(f"{SIZE:,} float32 scores, {zeros:,} to remove, {ROUNDS} rounds in turn.")
    print(f"{platform.machine()}, JAX {jax.__version__}, NumPy {np.__version__}.")
    print(f"Compiling `top_mask` took {compilation:.2f} s, not counted below.\n")
    print("| scores | | median s | ratio | removed |")
    print("| --- | --- | --- | --- | --- |")
    for name, way, median, ratio, removed in rows:
        print(f"| {name} | {way} | {median:.3f} | {ratio:.2f} | {removed:,} |")


if __name__ == "__main__":
    main()
