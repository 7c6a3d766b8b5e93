"""Draws the groups of a small transformer, and what is left of half its multiply-adds.

python benchmarks/structured_pictures.py docs/results
"""

from pathlib import Path
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import typer

import jaxcomp as jc
from jaxcomp.plot import plot_groups, plot_widths


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm(name="norm_1")(x)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(y)
        y = nn.gelu(nn.Dense(128, name="up")(nn.LayerNorm(name="norm_2")(x)))
        return x + nn.Dense(32, name="down")(y)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(16, 32, name="embed")(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (12, 32))
        for i in range(2):
            x = Block(name=f"block_{i}")(x)
        return nn.Dense(16, name="head")(nn.LayerNorm(name="norm")(x))


def main(out: Annotated[Path, typer.Argument(help="Where the pictures go.")]) -> None:
    tokens = jnp.zeros((4, 12), int)
    params = Transformer().init(jax.random.key(0), tokens)["params"]

    def f(params: object, tokens: jax.Array) -> jax.Array:
        return Transformer().apply({"params": params}, tokens)

    groups = jc.coupled_groups(f, params, tokens)
    sizes = {family.name: family.size for family in groups.families}
    scores = jc.prune.normalized(jc.prune.group_squares)(params, groups.families)
    half = jc.prune.total(groups.multiply_adds, sizes) / 2
    keep = jc.prune.cost_budget(scores, groups.families, groups.multiply_adds, half)
    figures = {
        "groups": plot_groups(groups, params),
        "widths": plot_widths(groups, keep),
    }
    for name, figure in figures.items():
        figure.savefig(out / f"structured_{name}.png", dpi=100)


if __name__ == "__main__":
    typer.run(main)
