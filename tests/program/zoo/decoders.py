"""Attention and experts as bare functions, the sizes read off the arrays."""

from typing import Any

import jax
import jax.numpy as jnp

from tests.program.zoo.model import Model, array, float32, model, tokens


SCALE = 0.5  # of the scores, whatever is left of the width that it was made for


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    size = jnp.mean(x * x, -1, keepdims=True)
    return x * jax.lax.rsqrt(size + 1e-6) * scale[None, None]


def rotate(x: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotary positions: pairs of channels that are half of the width apart."""
    angles = jnp.arange(x.shape[1])[:, None] * frequencies[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    left, right = jnp.split(x, 2, -1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of float[batch, time, heads, width]."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    causal = jnp.tril(jnp.ones(scores.shape[2:], bool))[None, None]
    scores = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", scores, v)


def project(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("btd,dhk->bthk", x, w)


def grouped_queries(params: Any, words: jax.Array) -> jax.Array:
    """Two query heads share a key and a value head; the embedding is the output."""
    x = params["embedding"][words]
    for p in params["layers"]:
        y = rms_norm(x, p["scale0"])
        q = rotate(project(y, p["query"]), params["frequencies"])
        k = rotate(project(y, p["key"]), params["frequencies"])
        k, v = (jnp.repeat(z, 2, axis=2) for z in (k, project(y, p["value"])))
        x = x + jnp.einsum("bthk,hkd->btd", attend(q, k, v), p["out"])
        y = rms_norm(x, p["scale1"])
        x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
    return rms_norm(x, params["scale"]) @ params["embedding"].T


def decoder(widths: tuple[int, ...] = (8, 2, 2, 5, 12)) -> Model:
    """What is cut of queries and keys is a pair of channels, with its frequency."""
    features, heads, pairs, value, wide = widths
    layer = float32(
        scale0=(features,),
        query=(features, 2 * heads, 2 * pairs),
        key=(features, heads, 2 * pairs),
        value=(features, heads, value),
        out=(2 * heads, value, features),
        scale1=(features,),
        gate=(features, wide),
        up=(features, wide),
        down=(wide, features),
    )
    shapes = float32(embedding=(11, features), frequencies=(pairs,), scale=(features,))
    into = ("scale0", "query", "key", "value", "scale1", "gate", "up", "scale")
    return model(
        "decoder",
        grouped_queries,
        shapes | {"layers": [layer, layer]},
        (tokens(11, 2, 5),),
        lambda shapes: grouped_queries,
        frozen={"": {"embedding": (0,)}},
        inexact={
            **dict.fromkeys(into, (0,)),
            **{"out": (2,), "down": (1,), "embedding": (1,)},
        },
    )


def literal_rotary(widths: tuple[int, ...] = (8, 2, 3, 5)) -> Model:
    """The frequencies are written into the program."""
    features, heads, pairs, value = widths

    def f(params, x):
        frequencies = 0.1 ** (jnp.arange(0, 2 * pairs, 2) / (2 * pairs))
        x = x @ params["into"]
        q, k = (rotate(project(x, params[n]), frequencies) for n in ("query", "key"))
        found = attend(q, k, project(x, params["value"]))
        return jnp.einsum("bthk,hkd,de->bte", found, params["out"], params["head"])

    shapes = float32(
        into=(6, features),
        query=(features, heads, 2 * pairs),
        key=(features, heads, 2 * pairs),
        value=(features, heads, value),
        out=(heads, value, features),
        head=(features, 4),
    )
    frozen = {"input": {"into": (0,)}, "output": {"head": (1,)}}
    inputs = (array(2, 5, 6),)
    return model("literal_rotary", f, shapes, inputs, None, frozen=frozen)


def linear_attention(widths: tuple[int, ...] = (8, 2, 4, 5)) -> Model:
    """Features elu + 1, which are 1 of a channel that is masked."""
    features, heads, inner, value = widths

    def f(params, x):
        x = x @ params["into"]
        q, k = (jax.nn.elu(project(x, params[n])) + 1 for n in ("query", "key"))
        state = jnp.einsum("bthd,bthe->bhde", k, project(x, params["value"]))
        total = jnp.einsum("bthd,bhd->bth", q, k.sum(1))
        found = jnp.einsum("bthd,bhde->bthe", q, state) / total[..., None]
        x = x + jnp.einsum("bthe,hed->btd", found, params["out"])
        return x @ params["head"]

    shapes = float32(
        into=(6, features),
        query=(features, heads, inner),
        key=(features, heads, inner),
        value=(features, heads, value),
        out=(heads, value, features),
        head=(features, 4),
    )
    return model(
        "linear_attention",
        f,
        shapes,
        (array(2, 5, 6),),
        lambda shapes: f,
        frozen={"input": {"into": (0,)}, "output": {"head": (1,)}},
        inexact={"query": (2,), "key": (2,)},
    )


def mixture_of_experts(widths: tuple[int, ...] = (8, 10)) -> Model:
    """Every expert sees every token; the softmax over experts freezes them."""
    features, wide = widths

    def f(params, x):
        x = x @ params["into"]
        gate = jax.nn.softmax(x @ params["router"])
        y = jnp.einsum("btd,edf->btef", x, params["up"])
        y = jax.nn.gelu(y + params["bias"][None, None])
        y = jnp.einsum("btef,efd->bted", y, params["down"])
        x = x + jnp.einsum("bted,bte->btd", y, gate)
        return x @ params["head"]

    shapes = float32(
        into=(6, features),
        router=(features, 3),
        up=(3, features, wide),
        bias=(3, wide),
        down=(3, wide, features),
        head=(features, 4),
    )
    return model(
        "mixture_of_experts",
        f,
        shapes,
        (array(2, 5, 6),),
        lambda shapes: f,
        frozen={
            "reduce_max": {"router": (1,), "up": (0,), "bias": (0,), "down": (0,)},
            "input": {"into": (0,)},
            "output": {"head": (1,)},
        },
    )
