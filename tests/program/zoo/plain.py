"""Bare functions of trees, each with one thing of JAX in it.

They read their widths off the arrays, so each is its own native form.
"""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from tests.program.zoo.model import Model, array, float32, model


ROWS = (array(2, 6),)
ENDS = {"input": {"w0": (0,)}, "output": {"w2": (1,), "b2": (0,)}}


def dense(params: Any, i: int, x: jax.Array) -> jax.Array:
    return x @ params[f"w{i}"] + params[f"b{i}"][None]


def layers(*widths: int) -> Any:
    """Shapes of kernels w and biases b from each width to the next."""
    kernels = {f"w{i}": pair for i, pair in enumerate(pairwise(widths))}
    return float32(**kernels, **{f"b{i}": (n,) for i, n in enumerate(widths[1:])})


def _model(name: str, f: Any, shapes: Any, inputs: Any = ROWS, **axes: Any) -> Model:
    return model(name, f, shapes, inputs, lambda shapes: f, **axes)


def tied_autoencoder(widths: tuple[int, ...] = (8, 5)) -> Model:
    def f(params, x):
        x = jnp.tanh(dense(params, 0, x))
        x = jnp.tanh(dense(params, 1, x))
        x = jnp.tanh(x @ params["w1"].T + params["c1"][None])
        return x @ params["w0"].T + params["c0"][None]

    shapes = layers(6, *widths) | float32(c1=(widths[0],), c0=(6,))
    frozen = {"": {"w0": (0,), "c0": (0,)}}
    return _model("tied_autoencoder", f, shapes, frozen=frozen)


def transposed_linear(widths: tuple[int, ...] = (8, 10)) -> Model:
    """Weights are (out, in)."""

    def f(params, x):
        for name in ("0", "2"):
            x = x @ params[name]["weight"].T + params[name]["bias"][None]
            x = jax.nn.relu(x)
        return jnp.einsum("oi,ni->no", params["4"]["weight"], x)

    first, second = widths
    shapes = {
        "0": float32(weight=(first, 6), bias=(first,)),
        "2": float32(weight=(second, first), bias=(second,)),
        "4": float32(weight=(4, second)),
    }
    frozen = {"input": {"0/weight": (1,)}, "output": {"4/weight": (0,)}}
    return _model("transposed_linear", f, shapes, frozen=frozen)


def mapped(widths: tuple[int, ...] = (8, 10)) -> Model:
    """Written for one example, with a map over units inside of a map over examples."""

    def unit(row, bias, x):
        return jnp.tanh(row @ x + bias)

    def one(params, x):
        x = jax.vmap(unit, (1, 0, None))(params["w0"], params["b0"], x)
        return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"]

    def f(params, x):
        return jax.vmap(one, (None, 0))(params, x) + params["b2"][None]

    return _model("mapped", f, layers(6, *widths, 4), frozen=ENDS)


def branching(widths: tuple[int, ...] = (8, 10)) -> Model:
    def f(params, x):
        x0 = jnp.tanh(dense(params, 0, x))
        x1 = jax.lax.cond(
            x[0, 0] > 0,
            lambda y: jnp.tanh(dense(params, 1, y)),
            lambda y: jax.nn.relu(y @ params["w1"]),
            x0,
        )
        return dense(params, 2, x1)

    return _model("branching", f, layers(6, *widths, 4), frozen=ENDS)


def looping(widths: tuple[int, ...] = (8, 10)) -> Model:
    """A scan of `jax.lax.fori_loop`, and a while loop."""

    def f(params, x):
        def first(step, x):
            return x + jnp.tanh(dense(params, 1, x)) / (1.0 + step)

        def second(carry):
            step, x = carry
            return step + 1, x + jnp.tanh(dense(params, 3, x)) / (1.0 + step)

        x = jax.lax.fori_loop(0, 3, first, jnp.tanh(dense(params, 0, x)))
        x = jnp.tanh(dense(params, 2, x))
        _, x = jax.lax.while_loop(lambda carry: carry[0] < 2, second, (0, x))
        return dense(params, 4, x)

    one, two = widths
    shapes = layers(6, one, one, two, two, 4)
    frozen = {"input": {"w0": (0,)}, "output": {"w4": (1,), "b4": (0,)}}
    return _model("looping", f, shapes, frozen=frozen)


@jax.custom_vjp
def rounded(x: jax.Array) -> jax.Array:
    return jnp.round(4 * x) / 4


rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))


def straight_through(widths: tuple[int, ...] = (8, 10)) -> Model:
    def f(params, x):
        x = rounded(jnp.tanh(dense(params, 0, x)))
        x = rounded(jax.nn.relu(dense(params, 1, x)))
        return dense(params, 2, x)

    return _model("straight_through", f, layers(6, *widths, 4), frozen=ENDS)


def weight_norm_by_hand(widths: tuple[int, ...] = (8, 10)) -> Model:
    """A unit without weights is 0 / 0: masked it is NaN, shrunk it is gone."""

    def f(params, x):
        for i in range(2):
            v = params[f"w{i}"]
            length = jnp.sqrt((v * v).sum(0, keepdims=True))
            w = params[f"scale{i}"][None] * v / length
            x = jax.nn.relu(x @ w + params[f"b{i}"][None])
        return dense(params, 2, x)

    first, second = widths
    units = {f"{name}0": (0,) for name in ("b", "scale")}
    units |= {f"{name}1": (0,) for name in ("b", "scale")}
    return _model(
        "weight_norm_by_hand",
        f,
        layers(6, *widths, 4) | float32(scale0=(first,), scale1=(second,)),
        frozen=ENDS,
        inexact={**units, "w0": (1,), "w1": (0, 1), "w2": (0,)},
    )


def odd_tree(widths: tuple[int, ...] = (8, 10)) -> Model:
    """Params are a tuple of a list, a number and a dict with numbers for keys."""

    def f(params, x):
        (w0, b0), gain, rest = params
        x = jnp.tanh(gain * (x @ w0) + b0[None])
        x = jax.nn.relu(x @ rest[0] + rest[1])
        return {"logits": (x @ rest[2],), "gain": gain}

    first, second = widths
    shapes = layers(6, first, second, 4) | float32(gain=())
    params = (
        [shapes["w0"], shapes["b0"]],
        shapes["gain"],
        {0: shapes["w1"], 1: shapes["gain"], 2: shapes["w2"]},
    )
    frozen = {"input": {"0/0": (0,)}, "output": {"2/2": (1,)}}
    return _model("odd_tree", f, params, frozen=frozen)


def sinusoids(widths: tuple[int, ...] = (8, 10)) -> Model:
    """A table of numbers lies along the channels of the first layer."""

    def f(params, x):
        channels = jnp.arange(widths[0], dtype=jnp.float32)
        angles = jnp.arange(5.0)[:, None] * jnp.exp(-0.5 * channels)[None]
        x = jax.nn.relu(dense_of_rows(params, 0, x) + jnp.sin(angles)[None])
        x = jnp.tanh(dense_of_rows(params, 1, x))
        return dense_of_rows(params, 2, x)

    shapes, inputs = layers(6, *widths, 4), (array(2, 5, 6),)
    return model("sinusoids", f, shapes, inputs, None, frozen=ENDS)


def dense_of_rows(params: Any, i: int, x: jax.Array) -> jax.Array:
    return x @ params[f"w{i}"] + params[f"b{i}"][None, None]
