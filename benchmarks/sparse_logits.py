"""Memory and time of distillation losses over a vocabulary of 128,000.

    python benchmarks/sparse_logits.py

Value and gradient for 512 tokens. First of losses of logits that are there: all of the
teacher's against its 64 most probable classes. Then from hidden states of width 512 and
a head, whose gradients are taken: all tokens at once against chunks of 64. Memory is
what XLA plans (`memory_analysis` of the compiled function): arguments, outputs and
temporaries. Times are medians of interleaved calls. It takes a few minutes on one core.
"""

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxcomp as jc
from jaxcomp.distill.losses.chunks import in_chunks
from jaxcomp.distill.losses.logits import soft_target_loss
from jaxcomp.distill.losses.sparse import sparse_target_loss, top_k_targets


TOKENS, CLASSES, WIDTH, KEPT, CHUNK, ROUNDS = 512, 128_000, 512, 64, 64, 3


def soft(logits: Any, teacher: Any) -> jax.Array:
    return soft_target_loss(logits, teacher, 1.0)


def at_once(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda kernel, hidden, teacher: loss(hidden @ kernel, teacher).mean()


def chunked(loss: Callable[..., Any]) -> Callable[..., Any]:
    def mean(kernel: Any, hidden: Any, teacher: Any) -> jax.Array:
        return in_chunks(
            lambda h: h @ kernel, loss, hidden, teacher, chunk=CHUNK
        ).mean()

    return mean


def compare(name: str, ways: dict[str, tuple[Callable[..., Any], tuple]]) -> None:
    compiled = {way: fn.lower(*args).compile() for way, (fn, args) in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(ROUNDS + 1):
        for way, (_, args) in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled[way](*args))
            if turn:  # the first call touches new memory
                seconds[way].append(time.perf_counter() - start)
    base: list[float] = []
    for way, fn in compiled.items():
        plan = fn.memory_analysis()
        temporary = plan.temp_size_in_bytes
        peak = plan.argument_size_in_bytes + plan.output_size_in_bytes + temporary
        middle = statistics.median(seconds[way])
        base = base or [temporary, peak, middle]
        print(
            f"| {name} | {way} | {temporary / 1e6:.0f} | {temporary / base[0]:.3f} "
            f"| {peak / 1e6:.0f} | {peak / base[1]:.3f} | {1000 * middle:.0f} "
            f"| {middle / base[2]:.2f} |",
            flush=True,
        )


def from_logits(dtype: Any) -> None:
    keys = jax.random.split(jax.random.key(0))
    ours, theirs = (jax.random.normal(k, (TOKENS, CLASSES), dtype) for k in keys)
    few = jax.jit(top_k_targets, static_argnums=1)(theirs, KEPT)
    ways: dict[str, Any] = {
        "all classes": (soft, theirs),
        f"{KEPT} classes": (sparse_target_loss, few),
    }

    def graded(loss: Callable[..., Any]) -> Any:
        return jax.jit(jax.value_and_grad(lambda z, t: loss(z, t).mean()))

    compare(
        f"logits, {jnp.dtype(dtype).name}",
        {way: (graded(loss), (ours, given)) for way, (loss, given) in ways.items()},
    )


def from_hidden() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, spoken = (jax.random.normal(k, (TOKENS, WIDTH)) for k in keys[:2])
    kernel, other = (jax.random.normal(k, (WIDTH, CLASSES)) / 20 for k in keys[2:])
    few = jax.jit(lambda h, w: top_k_targets(h @ w, KEPT))(spoken, other)

    def dense(logits: Any, spoken: Any, other: Any) -> jax.Array:
        return soft(logits, spoken @ other)

    def graded(way: Callable[..., Any], args: tuple) -> tuple[Any, tuple]:
        def mean(kernel: Any, hidden: Any, teacher: Any, *other: Any) -> jax.Array:
            loss = (lambda z, t: dense(z, t, *other)) if other else sparse_target_loss
            return way(loss)(kernel, hidden, teacher)

        return jax.jit(jax.value_and_grad(mean, argnums=(0, 1))), args

    full, sparse = (kernel, hidden, spoken, other), (kernel, hidden, few)
    compare(
        "hidden states, float32",
        {
            "all classes": graded(at_once, full),
            "all classes, chunks": graded(chunked, full),
            f"{KEPT} classes": graded(at_once, sparse),
            f"{KEPT} classes, chunks": graded(chunked, sparse),
        },
    )


if __name__ == "__main__":
    print(f"{platform.machine()}, jaxcomp {jc.__version__}, JAX {jax.__version__}.\n")
    print("| from | loss | temporaries, MB | ratio | peak, MB | ratio | ms | ratio |")
    print("| :-- | :-- | --: | --: | --: | --: | --: | --: |")
    from_logits(jnp.float32)
    from_logits(jnp.bfloat16)
    from_hidden()
