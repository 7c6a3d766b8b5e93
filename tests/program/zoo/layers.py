"""Small Linen nets, one for each thing that Linen does to a layer."""

from functools import partial

import flax.linen as nn
import jax

from tests.program.zoo.attention import Attention
from tests.program.zoo.model import Model, array, linen, model, read


ROWS = (array(2, 6),)
SEQUENCES = (array(2, 5, 6),)
HEAD = {
    "input": {"Dense_0/kernel": (0,)},
    "output": {"head/kernel": (1,), "head/bias": (0,)},
}


class Mlp(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.widths[0])(x))
        x = nn.gelu(nn.Dense(self.widths[1])(x))
        return nn.Dense(4, name="head")(x)


MLP_READS = (("params/Dense_0/kernel", 1), ("params/Dense_1/kernel", 1))


def mlp(widths: tuple[int, ...] = (8, 10)) -> Model:
    return linen("mlp", Mlp, widths, MLP_READS, ROWS, frozen=HEAD)


LAYERS = ("first", "second")


class Recurrent(nn.Module):
    widths: tuple[int, ...]
    cell: type[nn.RNNCellBase]

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(self.cell(self.widths[0], name="first"))(x)
        x = nn.RNN(self.cell(self.widths[1], name="second"))(x)
        return nn.Dense(4, name="head")(x[:, -1])


def _recurrent(
    name: str, cell: type[nn.RNNCellBase], gates: str, widths: tuple[int, ...]
) -> Model:
    """Two layers; the kernels that take an input are called i and a gate."""
    return linen(
        name,
        partial(Recurrent, cell=cell),
        widths,
        tuple((f"params/{layer}/i{gates[0]}/kernel", 1) for layer in LAYERS),
        SEQUENCES,
        frozen={
            "input": {f"first/i{gate}/kernel": (0,) for gate in gates},
            "output": HEAD["output"],
        },
    )


def lstm(widths: tuple[int, ...] = (6, 8)) -> Model:
    return _recurrent("lstm", nn.LSTMCell, "ifgo", widths)


def gru(widths: tuple[int, ...] = (6, 8)) -> Model:
    return _recurrent("gru", nn.GRUCell, "rzn", widths)


class WeightNormalized(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for features in self.widths:
            x = nn.relu(nn.WeightNorm(nn.Dense(features))(x))
        return nn.Dense(4, name="head")(x)


def weight_norm(widths: tuple[int, ...] = (8, 10)) -> Model:
    return linen("weight_norm", WeightNormalized, widths, MLP_READS, ROWS, frozen=HEAD)


class Branch(nn.Module):
    wide: int
    features: int

    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Dense(self.wide)(x))
        return nn.Dense(self.features)(x)


class Rematerialized(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        stream, first, second = self.widths
        x = nn.Dense(stream)(x)
        x = x + nn.remat(Branch)(first, stream, name="first")(x)
        policy = jax.checkpoint_policies.dots_saveable
        x = x + nn.remat(Branch, policy=policy)(second, stream, name="second")(x)
        return nn.Dense(4, name="head")(x)


def rematerialized(widths: tuple[int, ...] = (6, 8, 10)) -> Model:
    return linen(
        "rematerialized",
        Rematerialized,
        widths,
        (
            ("params/Dense_0/kernel", 1),
            ("params/first/Dense_0/kernel", 1),
            ("params/second/Dense_0/kernel", 1),
        ),
        ROWS,
        frozen={
            "input": {"params/Dense_0/kernel": (0,)},
            "output": HEAD["output"],
        },
    )


class TrainedBatchNorm(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for features in self.widths:
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(features)(x))
            x = nn.relu(x)
        return nn.Dense(4, name="head")(x)


def trained_batch_norm(widths: tuple[int, ...] = (8, 10)) -> Model:
    """Returns new statistics, which shrink with those that it takes."""
    found = linen(
        "trained_batch_norm",
        TrainedBatchNorm,
        widths,
        MLP_READS,
        (array(8, 6),),
        frozen=HEAD,
    )

    def native(shapes):
        return partial(found.native(shapes), mutable=["batch_stats"])

    return found._replace(f=partial(found.f, mutable=["batch_stats"]), native=native)


class Attending(nn.Module):
    """The attention of Linen, which takes its scale from the width of a head."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        features, heads, inner = self.widths
        x = nn.Dense(features)(x)
        attention = nn.MultiHeadDotProductAttention(
            heads, qkv_features=heads * inner, name="attention"
        )
        return nn.Dense(4, name="head")(x + attention(x))


class AttendingAsBefore(nn.Module):
    """The same with values of a width of their own and the scale of a head of four."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        features, *inner = self.widths
        x = nn.Dense(features)(x)
        attention = Attention(*inner, features, name="attention")
        return nn.Dense(4, name="head")(x + attention(x))


def linen_attention(widths: tuple[int, ...] = (8, 2, 4)) -> Model:
    reads = (
        ("params/Dense_0/kernel", 1),
        ("params/attention/query/kernel", 1),
        ("params/attention/query/kernel", 2),
        ("params/attention/value/kernel", 2),
    )
    shapes = jax.eval_shape(Attending(widths).init, jax.random.key(0), *SEQUENCES)
    return model(
        "linen_attention",
        Attending(widths).apply,
        shapes,
        SEQUENCES,
        lambda shapes: AttendingAsBefore(read(reads, shapes)).apply,
        frozen=HEAD,
    )


class Dropout(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x, key):
        x = nn.relu(nn.Dense(self.widths[0])(x))
        x = nn.Dropout(0.5, deterministic=False)(x, rng=key)
        x = nn.gelu(nn.Dense(self.widths[1])(x))
        return nn.Dense(4, name="head")(x)


def dropout(widths: tuple[int, ...] = (8, 10)) -> Model:
    inputs = (*ROWS, jax.random.key(0))
    return linen("dropout", Dropout, widths, MLP_READS, inputs, frozen=HEAD)._replace(
        native=None
    )
