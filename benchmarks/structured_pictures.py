"""Draws what is coupled in a small transformer, and what is left of half of its cost.

    python benchmarks/structured_pictures.py docs/results  # half a minute on one core

It is trained to sort what it reads. `structured_groups.png` and `structured_widths.png`
come from `plot_groups` and `plot_widths`.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import typer

import jaxcomp as jc
from jaxcomp.plot import plot_groups, plot_widths


TOKENS, LENGTH, FEATURES, UNITS = 16, 12, 32, 128
STEPS, BATCH = 600, 128


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attention = nn.MultiHeadDotProductAttention(4, name="attention")
        x = x + attention(nn.LayerNorm(name="norm_1")(x))
        y = nn.gelu(nn.Dense(UNITS, name="up")(nn.LayerNorm(name="norm_2")(x)))
        return x + nn.Dense(FEATURES, name="down")(y)


class Sorter(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        normal = nn.initializers.normal(0.02)
        x = nn.Embed(TOKENS, FEATURES, name="embed")(tokens)
        x = x + self.param("positions", normal, (LENGTH, FEATURES))
        for i in range(2):
            x = Block(name=f"block_{i}")(x)
        return nn.Dense(TOKENS, name="head")(nn.LayerNorm(name="norm")(x))


def logits(params: Any, tokens: jax.Array) -> Any:
    return Sorter().apply({"params": params}, tokens)


def trained() -> Any:
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        tokens = jax.random.randint(key, (BATCH, LENGTH), 0, TOKENS)

        def loss(params: Any) -> jax.Array:
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits(params, tokens), jnp.sort(tokens)
            )
            return losses.mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    tokens = jnp.zeros((1, LENGTH), jnp.int32)
    params = Sorter().init(jax.random.key(0), tokens)["params"]
    state = tx.init(params)
    for key in jax.random.split(jax.random.key(1), STEPS):
        params, state, loss = step(params, state, key)
    print(f"loss {loss:.3f}")
    return params


def main(out: Path) -> None:
    params = trained()
    groups = jc.coupled_groups(logits, params, jnp.zeros((1, LENGTH), jnp.int32))
    families, terms = groups.families, groups.multiply_adds
    whole = jc.prune.total(terms, {f.name: f.size for f in families})
    scores = jc.prune.normalized(jc.prune.group_squares)(params, families)
    keep = jc.prune.cost_budget(scores, families, terms, whole / 2)
    pictures = {"groups": plot_groups(groups, params)}
    pictures["widths"] = plot_widths(groups, keep)
    for name, figure in pictures.items():
        path = out / f"structured_{name}.png"
        figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
        print(path, f"{path.stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(main)
