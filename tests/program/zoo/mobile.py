"""Depthwise convolutions, squeeze and excitation, shuffled channels, in Linen."""

from functools import partial

import flax.linen as nn

from tests.program.zoo.model import Model, array, linen


IMAGES = (array(2, 8, 8, 3),)

batch_norm = partial(nn.BatchNorm, use_running_average=True)


class MobilenetV2(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        stem, wide, wider, last = self.widths
        x = nn.relu6(batch_norm()(nn.Conv(stem, (3, 3), 2)(x)))
        x = x + Inverted(wide, stem, 1)(x)
        x = Inverted(wider, last, 2)(x)
        return nn.Dense(4)(x.mean((1, 2)))


class Inverted(nn.Module):
    """Narrow to wide, one filter for each channel, wide to narrow."""

    wide: int
    features: int
    strides: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(batch_norm()(nn.Conv(self.wide, (1, 1), use_bias=False)(x)))
        depthwise = nn.Conv(
            self.wide, (3, 3), self.strides, feature_group_count=self.wide
        )
        x = nn.relu6(batch_norm()(depthwise(x)))
        return batch_norm()(nn.Conv(self.features, (1, 1), use_bias=False)(x))


def mobilenet_v2(widths: tuple[int, ...] = (6, 12, 10, 8)) -> Model:
    spatial = (
        "params/Conv_0/kernel",
        "Inverted_0/Conv_1/kernel",
        "Inverted_1/Conv_1/kernel",
    )
    return linen(
        "mobilenet_v2",
        MobilenetV2,
        widths,
        (
            ("params/Conv_0/kernel", 3),
            ("params/Inverted_0/Conv_0/kernel", 3),
            ("params/Inverted_1/Conv_0/kernel", 3),
            ("params/Inverted_1/Conv_2/kernel", 3),
        ),
        IMAGES,
        frozen={
            "conv_general_dilated": dict.fromkeys(spatial, (0, 1)),
            "input": {"params/Conv_0/kernel": (2,)},
            "output": {"Dense_0/kernel": (1,), "Dense_0/bias": (0,)},
        },
    )


class MobilenetV3(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        stem, wide, squeezed, last = self.widths
        x = nn.hard_swish(batch_norm()(nn.Conv(stem, (3, 3))(x)))
        y = nn.hard_swish(batch_norm()(nn.Conv(wide, (1, 1))(x)))
        y = nn.Conv(wide, (5, 5), feature_group_count=wide)(y)
        gate = nn.relu(nn.Dense(squeezed)(y.mean((1, 2), keepdims=True)))
        gate = nn.Dense(wide)(gate)
        y = batch_norm()(nn.hard_swish(y * nn.hard_sigmoid(gate)))
        x = x + nn.Conv(stem, (1, 1))(y)
        x = nn.hard_swish(nn.Dense(last)(x.mean((1, 2))))
        return nn.Dense(4)(x)


def mobilenet_v3(widths: tuple[int, ...] = (6, 12, 5, 8)) -> Model:
    return linen(
        "mobilenet_v3",
        MobilenetV3,
        widths,
        (
            ("params/Conv_0/kernel", 3),
            ("params/Conv_1/kernel", 3),
            ("params/Dense_0/kernel", 1),
            ("params/Dense_2/kernel", 1),
        ),
        IMAGES,
        frozen={
            "conv_general_dilated": {"Conv_0/kernel": (0, 1), "Conv_2/kernel": (0, 1)},
            "input": {"Conv_0/kernel": (2,)},
            "output": {"Dense_3/kernel": (1,), "Dense_3/bias": (0,)},
        },
    )


class ChannelShuffle(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        groups, last = self.widths
        x = nn.relu(nn.Conv(2 * groups, (3, 3))(x))
        x = x.reshape(*x.shape[:3], groups, 2).swapaxes(3, 4)
        x = x.reshape(*x.shape[:3], 2 * groups)
        x = nn.Conv(2 * groups, (3, 3), feature_group_count=2 * groups)(x)
        x = nn.relu(nn.Conv(last, (1, 1))(nn.relu(x)))
        return nn.Dense(4)(x.mean((1, 2)))


def channel_shuffle(widths: tuple[int, ...] = (4, 6)) -> Model:
    """A unit is a group of the shuffle: two channels, far apart behind it."""
    return linen(
        "channel_shuffle",
        ChannelShuffle,
        widths,
        (("params/Conv_0/kernel", 3, 2), ("params/Conv_2/kernel", 3)),
        IMAGES,
        frozen={
            "conv_general_dilated": {"Conv_0/kernel": (0, 1), "Conv_1/kernel": (0, 1)},
            "input": {"Conv_0/kernel": (2,)},
            "output": {"Dense_0/kernel": (1,), "Dense_0/bias": (0,)},
        },
    )


class Convnext(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        stem, wide, deep = self.widths
        x = nn.LayerNorm()(nn.Conv(stem, (2, 2), 2)(x))
        y = nn.Conv(stem, (7, 7), feature_group_count=stem)(x)
        y = nn.gelu(nn.Dense(wide)(nn.LayerNorm()(y)))
        y = nn.Dense(stem)(y)
        gamma = self.param("gamma", nn.initializers.ones, (stem,))
        x = x + y * gamma[None, None, None]
        x = nn.Conv(deep, (2, 2), 2)(nn.LayerNorm()(x))
        return nn.Dense(4)(nn.LayerNorm()(x.mean((1, 2))))


def convnext(widths: tuple[int, ...] = (8, 12, 10)) -> Model:
    norms = {
        f"LayerNorm_{i}/{name}": (0,) for i in range(4) for name in ("scale", "bias")
    }
    return linen(
        "convnext",
        Convnext,
        widths,
        (
            ("params/Conv_0/kernel", 3),
            ("params/Dense_0/kernel", 1),
            ("params/Conv_2/kernel", 3),
        ),
        IMAGES,
        frozen={
            "conv_general_dilated": {f"Conv_{i}/kernel": (0, 1) for i in range(3)},
            "input": {"Conv_0/kernel": (2,)},
            "output": {"Dense_2/kernel": (1,), "Dense_2/bias": (0,)},
        },
        inexact={
            **norms,
            **{"Conv_0/kernel": (3,), "Conv_0/bias": (0,)},
            **{"Conv_1/kernel": (3,), "Conv_1/bias": (0,)},
            **{"Dense_0/kernel": (0,), "Dense_1/kernel": (1,), "Dense_1/bias": (0,)},
            **{"gamma": (0,), "Conv_2/kernel": (2, 3), "Conv_2/bias": (0,)},
            "Dense_2/kernel": (0,),
        },
    )


class LayerNorm(nn.Module):
    widths: tuple[int, ...]
    use_fast_variance: bool

    @nn.compact
    def __call__(self, x):
        stream, wide = self.widths
        norm = partial(nn.LayerNorm, use_fast_variance=self.use_fast_variance)
        x = norm()(nn.Dense(stream)(x))
        y = nn.silu(nn.Dense(wide)(x))
        y = nn.Dense(stream)(y)
        return nn.Dense(4)(norm()(x + y))


def _layer_norm(name: str, fast: bool, widths: tuple[int, ...]) -> Model:
    return linen(
        name,
        partial(LayerNorm, use_fast_variance=fast),
        widths,
        (("params/Dense_0/kernel", 1), ("params/Dense_1/kernel", 1)),
        (array(2, 6),),
        frozen={
            "input": {"Dense_0/kernel": (0,)},
            "output": {"Dense_3/kernel": (1,), "Dense_3/bias": (0,)},
        },
        inexact={
            **{"Dense_0/kernel": (1,), "Dense_0/bias": (0,)},
            **{"LayerNorm_0/scale": (0,), "LayerNorm_0/bias": (0,)},
            **{"Dense_1/kernel": (0,), "Dense_2/kernel": (1,), "Dense_2/bias": (0,)},
            **{"LayerNorm_1/scale": (0,), "LayerNorm_1/bias": (0,)},
            "Dense_3/kernel": (0,),
        },
    )


def layer_norm_fast(widths: tuple[int, ...] = (8, 12)) -> Model:
    """The variance is the mean of the squares less the square of the mean."""
    return _layer_norm("layer_norm_fast", True, widths)


def layer_norm_two_pass(widths: tuple[int, ...] = (8, 12)) -> Model:
    """The variance is the mean of the squares of what is left without the mean."""
    return _layer_norm("layer_norm_two_pass", False, widths)
