"""The same few nets in Flax NNX, Equinox and Haiku."""

from functools import partial
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

from tests.program.zoo.model import Model, array, model, read


ROWS = (array(2, 6),)


class NnxMlp(nnx.Module):
    def __init__(self, widths: tuple[int, ...], rngs: nnx.Rngs):
        first, second = widths
        self.first = nnx.Linear(6, first, rngs=rngs)
        self.norm = nnx.BatchNorm(first, use_running_average=True, rngs=rngs)
        self.second = nnx.Linear(first, second, rngs=rngs)
        self.head = nnx.Linear(second, 4, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.first(x)))
        return self.head(jax.nn.gelu(self.second(x)))


class NnxAttention(nnx.Module):
    def __init__(self, widths: tuple[int, ...], rngs: nnx.Rngs):
        features, heads, inner, value = widths
        self.first = nnx.Linear(6, features, rngs=rngs)
        self.query = nnx.LinearGeneral(features, (heads, inner), rngs=rngs)
        self.key = nnx.LinearGeneral(features, (heads, inner), rngs=rngs)
        self.value = nnx.LinearGeneral(features, (heads, value), rngs=rngs)
        self.out = nnx.LinearGeneral((heads, value), features, axis=(-2, -1), rngs=rngs)
        self.head = nnx.Linear(features, 4, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", self.query(x) * 0.5, self.key(x))
        found = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), self.value(x))
        return self.head(x + self.out(found))


def _abstract(kind: Any, widths: tuple[int, ...]) -> Any:
    return nnx.split(nnx.eval_shape(lambda: kind(widths, nnx.Rngs(0))))


NNX_ENDS = {
    "input": {"first/kernel/value": (0,)},
    "output": {"head/kernel/value": (1,), "head/bias/value": (0,)},
}
PURE_ENDS = {
    "input": {"first/kernel": (0,)},
    "output": {"head/kernel": (1,), "head/bias": (0,)},
}


def nnx_mlp(widths: tuple[int, ...] = (8, 10)) -> Model:
    """Params are an `nnx.State`."""

    def build(widths):
        graph, _ = _abstract(NnxMlp, widths)
        return lambda params, x: nnx.merge(graph, params)(x)

    reads = (("first/kernel/value", 1), ("second/kernel/value", 1))
    return model(
        "nnx_mlp",
        build(widths),
        _abstract(NnxMlp, widths)[1],
        ROWS,
        lambda shapes: build(read(reads, shapes)),
        frozen=NNX_ENDS,
    )


def nnx_attention(widths: tuple[int, ...] = (8, 2, 4, 5)) -> Model:
    """Params are a plain dict."""

    def build(widths):
        graph, _ = _abstract(NnxAttention, widths)
        return lambda params, x: nnx.merge(graph, nnx.State(params))(x)

    reads = (
        ("first/kernel", 1),
        ("query/kernel", 1),
        ("query/kernel", 2),
        ("value/kernel", 2),
    )
    return model(
        "nnx_attention",
        build(widths),
        nnx.to_pure_dict(_abstract(NnxAttention, widths)[1]),
        (array(2, 5, 6),),
        lambda shapes: build(read(reads, shapes)),
        frozen=PURE_ENDS,
    )


class EquinoxConv(eqx.Module):
    layers: list[Any]

    def __init__(self, widths: tuple[int, ...], key: jax.Array):
        keys = jax.random.split(key, 3)
        first, second = widths
        self.layers = [
            eqx.nn.Conv2d(3, first, 3, padding=1, key=keys[0]),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(first, second, 3, stride=2, key=keys[1]),
            eqx.nn.Linear(second, 4, key=keys[2]),
        ]

    def __call__(self, x):
        first, pool, second, head = self.layers
        x = jax.nn.relu(second(pool(jax.nn.relu(first(x)))))
        return head(x.mean((1, 2)))


def _equinox(name: str, build: Any, inputs: tuple[Any, ...], frozen: Any) -> Model:
    """Params are the arrays of the module; it reads its widths off them."""
    net = eqx.filter_eval_shape(build, jax.random.key(0))
    shapes, rest = eqx.partition(net, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def f(params, x):
        return jax.vmap(eqx.combine(params, rest))(x)

    return model(name, f, shapes, inputs, lambda shapes: f, frozen=frozen)


def equinox_mlp(widths: tuple[int, ...] = (8,)) -> Model:
    frozen = {
        "input": {"layers/0/weight": (1,)},
        "output": {"layers/2/weight": (0,), "layers/2/bias": (0,)},
    }
    build = partial(eqx.nn.MLP, 6, 4, *widths, 2)
    return _equinox("equinox_mlp", lambda key: build(key=key), ROWS, frozen)


def equinox_conv(widths: tuple[int, ...] = (6, 8)) -> Model:
    frozen = {
        "conv_general_dilated": {"layers/0/weight": (2, 3), "layers/2/weight": (2, 3)},
        "input": {"layers/0/weight": (1,)},
        "output": {"layers/3/weight": (0,), "layers/3/bias": (0,)},
    }
    images = (array(2, 3, 8, 8),)
    return _equinox("equinox_conv", partial(EquinoxConv, widths), images, frozen)


def haiku_mlp(widths: tuple[int, ...] = (8, 10)) -> Model:
    """Params hold the state too; of an average that is not read nothing is said."""

    def build(widths):
        def net(x, is_training):
            first, second = widths
            x = hk.BatchNorm(True, True, 0.9)(hk.Linear(first)(x), is_training)
            return hk.nets.MLP([second, 4])(jax.nn.relu(x))

        return hk.without_apply_rng(hk.transform_with_state(net))

    def applied(widths):
        apply = build(widths).apply
        return lambda params, x: apply(params["params"], params["state"], x, False)[0]

    def init(key, x):
        params, state = build(widths).init(key, x, True)
        return {"params": params, "state": state}

    reads = (("params/linear/w", 1), ("params/mlp/~/linear_0/w", 1))
    return model(
        "haiku_mlp",
        applied(widths),
        jax.eval_shape(init, jax.random.key(0), *ROWS),
        ROWS,
        lambda shapes: applied(read(reads, shapes)),
        frozen={
            "input": {"params/linear/w": (0,)},
            "output": {"linear_1/w": (1,), "linear_1/b": (0,)},
        },
        unsure={"hidden": (1,)},
    )
