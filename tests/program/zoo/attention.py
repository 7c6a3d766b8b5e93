"""Attention and what surrounds it, in Linen."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.program.zoo.model import Axes, Model, array, linen, tokens


SCALE = 0.5  # of the scores: one over the root of four, however many there are left


class Attention(nn.Module):
    """Self-attention whose inner widths are free of each other."""

    heads: int
    inner: int  # of a query and a key
    value: int
    features: int

    @nn.compact
    def __call__(self, x, drop=lambda p: p):
        query = nn.DenseGeneral((self.heads, self.inner), name="query")(x) * SCALE
        key = nn.DenseGeneral((self.heads, self.inner), name="key")(x)
        value = nn.DenseGeneral((self.heads, self.value), name="value")(x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        found = jnp.einsum("bhqk,bkhd->bqhd", drop(jax.nn.softmax(scores)), value)
        return nn.DenseGeneral(self.features, axis=(-2, -1), name="out")(found)


class Mlp(nn.Module):
    wide: int
    features: int

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(self.wide, name="up")(x))
        return nn.Dense(self.features, name="down")(x)


class Block(nn.Module):
    """Norms before attention and before the units."""

    features: int
    heads: int
    inner: int
    value: int
    wide: int

    @nn.compact
    def __call__(self, x):
        attention = Attention(self.heads, self.inner, self.value, self.features)
        x = x + attention(nn.LayerNorm()(x))
        return x + Mlp(self.wide, self.features)(nn.LayerNorm()(x))


def block_reads(block: str, layers: int = 0) -> tuple[tuple[Any, ...], ...]:
    """The paths that tell heads, inner, value and wide, behind ``layers`` axes."""
    return (
        (f"{block}/Attention_0/query/kernel", layers + 1),
        (f"{block}/Attention_0/query/kernel", layers + 2),
        (f"{block}/Attention_0/value/kernel", layers + 2),
        (f"{block}/Mlp_0/up/kernel", layers + 1),
    )


def block_stream(layers: int = 0) -> Axes:
    """Axes of a block that lie along the residual stream."""
    first, second, third = (layers + i for i in range(3))
    return {
        **{"LayerNorm_0/scale": (first,), "LayerNorm_0/bias": (first,)},
        **{"LayerNorm_1/scale": (first,), "LayerNorm_1/bias": (first,)},
        **{f"{name}/kernel": (first,) for name in ("query", "key", "value", "up")},
        **{"out/kernel": (third,), "out/bias": (first,)},
        **{"down/kernel": (second,), "down/bias": (first,)},
    }


class Vit(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        features, *block = self.widths
        normal = nn.initializers.normal()
        x = nn.Conv(features, (4, 4), (4, 4))(x)
        x = x.reshape(x.shape[0], -1, features)
        first = self.param("class", normal, (1, 1, features))
        x = jnp.concatenate([jnp.tile(first, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("positions", normal, (1, x.shape[1], features))
        x = nn.LayerNorm()(Block(features, *block)(x))
        return nn.Dense(4)(x[:, 0])


def vit(widths: tuple[int, ...] = (8, 2, 4, 5, 12)) -> Model:
    return linen(
        "vit",
        Vit,
        widths,
        (("params/Conv_0/kernel", 3), *block_reads("params/Block_0")),
        (array(2, 8, 8, 3),),
        frozen={
            "conv_general_dilated": {"Conv_0/kernel": (0, 1)},
            "": {"positions": (1,)},
            "input": {"Conv_0/kernel": (2,)},
            "output": {"Dense_0/kernel": (1,), "Dense_0/bias": (0,)},
        },
        inexact={
            **block_stream(),
            **{"Conv_0/kernel": (3,), "Conv_0/bias": (0,)},
            **{"class": (2,), "positions": (2,), "Dense_0/kernel": (0,)},
        },
    )


class Bert(nn.Module):
    """Norms behind the sums; dropout takes whole tokens and whole pairs of tokens."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, words, key):
        features, pooled, *attention, wide = self.widths
        keys = iter(jax.random.split(key, 3))

        def drop(x, axis):
            layer = nn.Dropout(0.25, broadcast_dims=(axis,), deterministic=False)
            return layer(x, rng=next(keys))

        x = nn.Embed(11, features, name="words")(words)
        x = x + nn.Embed(5, features, name="positions")(jnp.arange(5)[None])
        x = drop(nn.LayerNorm(name="norm")(x), 2)
        y = Attention(*attention, features)(x, partial(drop, axis=1))
        x = nn.LayerNorm()(x + y)
        x = nn.LayerNorm()(x + drop(Mlp(wide, features)(x), 2))
        x = jnp.tanh(nn.Dense(pooled, name="pooler")(x[:, 0]))
        return nn.Dense(3, name="head")(x)


def bert(widths: tuple[int, ...] = (8, 6, 2, 4, 5, 12)) -> Model:
    return linen(
        "bert",
        Bert,
        widths,
        (
            ("params/words/embedding", 1),
            ("params/pooler/kernel", 1),
            *block_reads("params"),
        ),
        # This kind of key compiles fast.
        (tokens(11, 2, 5), jax.random.key(0, impl="unsafe_rbg")),
        frozen={
            "gather": {"words/embedding": (0,)},
            "": {"positions/embedding": (0,)},
            "output": {"head/kernel": (1,), "head/bias": (0,)},
        },
        inexact={
            **block_stream(),
            **{"words/embedding": (1,), "positions/embedding": (1,)},
            **{"norm/scale": (0,), "norm/bias": (0,), "pooler/kernel": (0,)},
        },
    )


class Layer(nn.Module):
    """A block as `nn.scan` wants it."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x, _):
        return Block(*self.widths, name="block")(x), None


class ScannedLayers(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x = nn.Dense(self.widths[0])(x)
        x, _ = scan(self.widths, name="layers")(x, None)
        return nn.Dense(4)(nn.LayerNorm(name="norm")(x))


def scanned_layers(widths: tuple[int, ...] = (8, 2, 4, 5, 12)) -> Model:
    reads = block_reads("params/layers/block", 1)
    stream = block_stream(1)
    rest = {"query/bias", "key/bias", "value/bias", "up/bias"}
    return linen(
        "scanned_layers",
        ScannedLayers,
        widths,
        (("params/Dense_0/kernel", 1), *reads),
        (array(2, 5, 6),),
        frozen={
            "scan": dict.fromkeys({*stream, *rest}, (0,)),
            "input": {"Dense_0/kernel": (0,)},
            "output": {"Dense_1/kernel": (1,), "Dense_1/bias": (0,)},
        },
        inexact={
            **stream,
            **{"Dense_0/kernel": (1,), "Dense_0/bias": (0,), "norm/scale": (0,)},
            **{"norm/bias": (0,), "Dense_1/kernel": (0,)},
        },
    )


class Mixer(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        features, mixing, wide = self.widths
        x = nn.Conv(features, (4, 4), (4, 4))(x)
        x = x.reshape(x.shape[0], -1, features)
        y = nn.LayerNorm()(x).transpose(0, 2, 1)
        y = Mlp(mixing, x.shape[1], name="mixing")(y)
        x = x + y.transpose(0, 2, 1)
        x = x + Mlp(wide, features)(nn.LayerNorm()(x))
        return nn.Dense(4)(nn.LayerNorm()(x).mean(1))


def mixer(widths: tuple[int, ...] = (8, 6, 12)) -> Model:
    norms = {
        f"LayerNorm_{i}/{name}": (0,) for i in range(3) for name in ("scale", "bias")
    }
    return linen(
        "mixer",
        Mixer,
        widths,
        (
            ("params/Conv_0/kernel", 3),
            ("params/mixing/up/kernel", 1),
            ("params/Mlp_0/up/kernel", 1),
        ),
        (array(2, 8, 8, 3),),
        frozen={
            "conv_general_dilated": {"Conv_0/kernel": (0, 1)},
            "": {
                **{"mixing/up/kernel": (0,), "mixing/down/kernel": (1,)},
                "mixing/down/bias": (0,),
            },
            "input": {"Conv_0/kernel": (2,)},
            "output": {"Dense_0/kernel": (1,), "Dense_0/bias": (0,)},
        },
        inexact={
            **norms,
            **{"Conv_0/kernel": (3,), "Conv_0/bias": (0,), "Mlp_0/up/kernel": (0,)},
            **{"Mlp_0/down/kernel": (1,), "Mlp_0/down/bias": (0,)},
            "Dense_0/kernel": (0,),
        },
    )


class FusedQkv(nn.Module):
    """One layer makes queries, keys and values of four; heads are in between."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        features, heads = self.widths
        x = nn.Dense(features)(x)
        found = nn.Dense(12 * heads, name="qkv")(x)
        found = found.reshape(*x.shape[:2], 3, heads, 4)
        q, k, v = found[:, :, 0], found[:, :, 1], found[:, :, 2]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q * SCALE, k)
        found = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        x = x + nn.Dense(features, name="out")(found.reshape(*x.shape[:2], -1))
        return nn.Dense(4)(x)


class SplitQkv(nn.Module):
    """One layer makes queries, keys and values of four; heads are inside of each."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        features, heads = self.widths
        x = nn.Dense(features)(x)
        parts = jnp.split(nn.Dense(12 * heads, name="qkv")(x), 3, -1)
        q, k, v = (part.reshape(*x.shape[:2], heads, 4) for part in parts)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q * SCALE, k)
        found = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        x = x + nn.Dense(features, name="out")(found.reshape(*x.shape[:2], -1))
        return nn.Dense(4)(x)


def _qkv(name: str, module: Any, widths: tuple[int, ...]) -> Model:
    return linen(
        name,
        module,
        widths,
        (("params/Dense_0/kernel", 1), ("params/qkv/kernel", 1, 12)),
        (array(2, 5, 6),),
        frozen={
            "input": {"Dense_0/kernel": (0,)},
            "output": {"Dense_1/kernel": (1,), "Dense_1/bias": (0,)},
        },
    )


def fused_qkv(widths: tuple[int, ...] = (8, 3)) -> Model:
    """The axis of three comes before the heads, which are cut all the same."""
    return _qkv("fused_qkv", FusedQkv, widths)


def split_qkv(widths: tuple[int, ...] = (8, 3)) -> Model:
    return _qkv("split_qkv", SplitQkv, widths)
