"""What observing costs: statistics of all inputs, beside a plain forward pass.

    python benchmarks/observe.py

A transformer and a convolutional net, the same batch again and again. Both passes are
jitted, and take turns in one process; medians of the rounds are compared, without the
batches for which `observe` compiles. The plain pass runs twice: the spread of the two
is the noise. Second moments take n multiply-adds for each row and each of its n inputs,
whatever the weight gives: the bound is what the forward pass and the moments multiply
together, to the forward pass. It takes five minutes on one core.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax

import jaxcomp as jc
from jaxcomp.program.observe import observe
from jaxcomp.program.statistics import norm, second_moment


BATCHES, ROUNDS = 12, 7


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y)
        y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(1000, 256)(tokens)
        for _ in range(4):
            x = Block()(x)
        return nn.Dense(1000)(nn.LayerNorm()(x))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width, stride in ((32, 1), (64, 2), (64, 1), (128, 2)):
            x = nn.relu(nn.Conv(width, (3, 3), stride)(x))
        return nn.Dense(10)(x.mean((1, 2)))


def compare(name: str, model: nn.Module, x: jax.Array) -> None:
    params = model.init(jax.random.key(0), x)["params"]

    def f(params: Any, x: jax.Array) -> Any:
        return model.apply({"params": params}, x)

    plain = jax.jit(f)

    def forward() -> float:
        jax.block_until_ready(plain(params, x))
        start = time.perf_counter()
        jax.block_until_ready([plain(params, x) for _ in range(BATCHES)])
        return time.perf_counter() - start

    def observing(**asked: Any) -> Callable[[], float]:
        start = [0.0]

        def batches() -> Iterator[tuple[jax.Array]]:
            yield from [(x,)] * 2  # compile
            time.sleep(0.5)  # they end
            start[0] = time.perf_counter()
            yield from [(x,)] * BATCHES

        def run() -> float:
            found = observe(f, params, batches(), asked)
            jax.block_until_ready([row.inputs for row in found.values()])
            return time.perf_counter() - start[0]

        return run

    # Weights that share an input, as query, key and value do, share its moments.
    found = observe(f, params, [(x,)], {"moment": second_moment}).values()
    moments = {
        id(row.inputs["moment"].total): row.inputs["moment"]
        for row in found
        if not row.reason
    }
    extra = sum(float(m.rows) * m.total.shape[-1] ** 2 for m in moments.values())
    bound = 1 + extra / jc.count(f, params, x).multiply_adds

    runs = {
        "forward pass": forward,
        "forward pass again": forward,
        "norms": observing(norm=norm),
        "second moments": observing(moment=second_moment),
    }
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(ROUNDS):
        for way, run in runs.items():
            seconds[way].append(run())
    base = statistics.median(seconds["forward pass"])
    for way, times in seconds.items():
        middle = statistics.median(times)
        least = {"norms": "1.00", "second moments": f"{bound:.2f}"}.get(way, "")
        print(
            f"| {name} | {way} | {1000 * middle / BATCHES:.1f} | {middle / base:.2f} "
            f"| {least} |",
            flush=True,
        )


if __name__ == "__main__":
    print(f"{platform.machine()}, JAX {jax.__version__}.\n")
    print("| net | | ms per batch | to the forward pass | bound |")
    print("| --- | --- | --: | --: | --: |")
    tokens = jax.random.randint(jax.random.key(1), (8, 128), 0, 1000)
    compare("transformer", Transformer(), tokens)
    images = jax.random.normal(jax.random.key(2), (16, 32, 32, 3))
    compare("convolutional net", ConvNet(), images)
