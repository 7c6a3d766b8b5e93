"""Plain, residual and concatenating convolutional nets, in Linen."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.program.zoo.model import Model, array, linen, model


IMAGES = (array(2, 8, 8, 3),)

batch_norm = partial(nn.BatchNorm, use_running_average=True)


class Lenet5(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for features in self.widths[:2]:
            x = jnp.tanh(nn.Conv(features, (5, 5))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for features in self.widths[2:]:
            x = jnp.tanh(nn.Dense(features)(x))
        return nn.Dense(4)(x)


def lenet5(widths: tuple[int, ...] = (6, 8, 12, 10)) -> Model:
    return linen(
        "lenet5",
        Lenet5,
        widths,
        (
            ("params/Conv_0/kernel", 3),
            ("params/Conv_1/kernel", 3),
            ("params/Dense_0/kernel", 1),
            ("params/Dense_1/kernel", 1),
        ),
        IMAGES,
        frozen={
            "conv_general_dilated": {"Conv_0/kernel": (0, 1), "Conv_1/kernel": (0, 1)},
            "input": {"Conv_0/kernel": (2,)},
            "output": {"Dense_2/kernel": (1,), "Dense_2/bias": (0,)},
        },
    )


class VggBatchNorm(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for i, features in enumerate(self.widths):
            x = nn.relu(batch_norm()(nn.Conv(features, (3, 3))(x)))
            if i:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(4)(x.mean((1, 2)))


def vgg_batch_norm(widths: tuple[int, ...] = (6, 8, 10)) -> Model:
    return linen(
        "vgg_batch_norm",
        VggBatchNorm,
        widths,
        tuple((f"params/Conv_{i}/kernel", 3) for i in range(3)),
        IMAGES,
        frozen={
            "conv_general_dilated": {f"Conv_{i}/kernel": (0, 1) for i in range(3)},
            "input": {"Conv_0/kernel": (2,)},
            "output": {"Dense_0/kernel": (1,), "Dense_0/bias": (0,)},
        },
    )


class Residual(nn.Module):
    """Two convolutions beside a shortcut, which is projected where it has to be."""

    inner: int
    features: int
    strides: int
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.inner, (3, 3), self.strides, use_bias=False)(x)
        y = nn.relu(self.norm()(y))
        y = self.norm()(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if self.strides > 1:
            x = nn.Conv(self.features, (1, 1), self.strides, name="projection")(x)
            x = self.norm(name="projection_norm")(x)
        return nn.relu(x + y)


class Resnet(nn.Module):
    widths: tuple[int, ...]
    norm: Callable[..., Any]
    per: int  # channels of a unit

    @nn.compact
    def __call__(self, x):
        stem, inner, deep, deep_inner = (w * self.per for w in self.widths)
        x = nn.relu(self.norm()(nn.Conv(stem, (3, 3))(x)))
        x = Residual(inner, stem, 1, self.norm)(x)
        x = Residual(deep_inner, deep, 2, self.norm)(x)
        return nn.Dense(4)(x.mean((1, 2)))


def _resnet(
    name: str, norm: Callable[..., Any], per: int, widths: tuple[int, ...]
) -> Model:
    spatial = (
        *("params/Conv_0/kernel", "Residual_0/Conv_0/kernel"),
        *("Residual_0/Conv_1/kernel", "Residual_1/Conv_0/kernel"),
        "Residual_1/Conv_1/kernel",
    )
    return linen(
        name,
        partial(Resnet, norm=norm, per=per),
        widths,
        (
            ("params/Conv_0/kernel", 3, per),
            ("params/Residual_0/Conv_0/kernel", 3, per),
            ("params/Residual_1/Conv_1/kernel", 3, per),
            ("params/Residual_1/Conv_0/kernel", 3, per),
        ),
        IMAGES,
        frozen={
            "conv_general_dilated": dict.fromkeys(spatial, (0, 1)),
            "input": {"params/Conv_0/kernel": (2,)},
            "output": {"Dense_0/kernel": (1,), "Dense_0/bias": (0,)},
        },
    )


def resnet_batch_norm(widths: tuple[int, ...] = (6, 8, 10, 7)) -> Model:
    return _resnet("resnet_batch_norm", batch_norm, 1, widths)


def resnet_group_norm(widths: tuple[int, ...] = (3, 4, 5, 3)) -> Model:
    """A unit is a group of the norm: two channels that share their mean."""
    norm = partial(nn.GroupNorm, num_groups=None, group_size=2)
    return _resnet("resnet_group_norm", norm, 2, widths)


class Resnext(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        features, groups = self.widths
        x = nn.relu(batch_norm()(nn.Conv(features, (3, 3))(x)))
        y = nn.relu(batch_norm()(nn.Conv(2 * groups, (1, 1), use_bias=False)(x)))
        y = nn.Conv(2 * groups, (3, 3), feature_group_count=groups)(y)
        y = nn.Conv(features, (1, 1))(nn.relu(batch_norm()(y)))
        return nn.Dense(4)(nn.relu(x + y).mean((1, 2)))


def resnext(widths: tuple[int, ...] = (6, 4)) -> Model:
    """A unit of the inner width is a group of the convolution: two channels."""
    return linen(
        "resnext",
        Resnext,
        widths,
        (("params/Conv_0/kernel", 3), ("params/Conv_2/kernel", 3, 2)),
        IMAGES,
        frozen={
            "conv_general_dilated": {"Conv_0/kernel": (0, 1), "Conv_2/kernel": (0, 1)},
            "": {"Conv_2/kernel": (2,)},  # within a group
            "input": {"Conv_0/kernel": (2,)},
            "output": {"Dense_0/kernel": (1,), "Dense_0/bias": (0,)},
        },
    )


class Densenet(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        stem, first, second, transition = self.widths
        x = nn.Conv(stem, (3, 3))(x)
        for growth in (first, second):
            y = nn.Conv(growth, (3, 3))(nn.relu(batch_norm()(x)))
            x = jnp.concatenate([x, y], -1)
        x = nn.Conv(transition, (1, 1))(nn.relu(batch_norm()(x)))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(4)(nn.relu(batch_norm()(x)).mean((1, 2)))


def densenet(widths: tuple[int, ...] = (6, 4, 5, 8)) -> Model:
    return linen(
        "densenet",
        Densenet,
        widths,
        tuple((f"params/Conv_{i}/kernel", 3) for i in range(4)),
        IMAGES,
        frozen={
            "conv_general_dilated": {f"Conv_{i}/kernel": (0, 1) for i in range(3)},
            "input": {"Conv_0/kernel": (2,)},
            "output": {"Dense_0/kernel": (1,), "Dense_0/bias": (0,)},
        },
    )


class Unet(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        down, bottom, up, last = self.widths
        skip = nn.relu(nn.Conv(down, (3, 3))(x))
        x = nn.max_pool(skip, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(bottom, (3, 3))(x))
        x = nn.ConvTranspose(up, (2, 2), (2, 2))(x)
        x = jnp.concatenate([skip, x], -1)
        x = nn.relu(nn.Conv(last, (3, 3))(x))
        return nn.Conv(3, (1, 1))(x)


def unet(widths: tuple[int, ...] = (6, 8, 7, 9)) -> Model:
    spatial = (
        *("Conv_0/kernel", "Conv_1/kernel"),
        *("ConvTranspose_0/kernel", "Conv_2/kernel"),
    )
    return linen(
        "unet",
        Unet,
        widths,
        tuple((f"params/{path}", 3) for path in spatial),
        IMAGES,
        frozen={
            "conv_general_dilated": dict.fromkeys(spatial, (0, 1)),
            "input": {"Conv_0/kernel": (2,)},
            "output": {"Conv_3/kernel": (3,), "Conv_3/bias": (0,)},
        },
    )


class Conv1d(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Conv(self.widths[0], (5,), strides=2)(x))
        x = nn.gelu(nn.Conv(self.widths[1], (3,), kernel_dilation=2)(x))
        x = nn.avg_pool(x, (2,), (2,))
        return nn.Dense(4)(x.mean(1))


def conv1d(widths: tuple[int, ...] = (6, 8)) -> Model:
    return linen(
        "conv1d",
        Conv1d,
        widths,
        (("params/Conv_0/kernel", 2), ("params/Conv_1/kernel", 2)),
        (array(2, 16, 3),),
        frozen={
            "conv_general_dilated": {"Conv_0/kernel": (0,), "Conv_1/kernel": (0,)},
            "input": {"Conv_0/kernel": (1,)},
            "output": {"Dense_0/kernel": (1,), "Dense_0/bias": (0,)},
        },
    )


class SplitAndJoined(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        left, part, convolved, last = self.widths
        x = nn.relu(nn.Conv(left + part, (3, 3))(x))
        left, right = jnp.split(x, [left], -1)
        right = nn.relu(nn.Conv(convolved, (3, 3))(right))
        x = nn.relu(nn.Conv(last, (1, 1))(jnp.concatenate([right, left], -1)))
        return nn.Dense(4)(x.mean((1, 2)))


def split_and_joined(widths: tuple[int, ...] = (5, 4, 6, 7)) -> Model:
    """The right part is convolved; its input and its result are cut apart."""

    def native(shapes):
        whole = shapes["params/Conv_0/kernel"][3]
        *_, part, convolved = shapes["params/Conv_1/kernel"]
        last = shapes["params/Conv_2/kernel"][3]
        return SplitAndJoined((whole - part, part, convolved, last)).apply

    module = SplitAndJoined(widths)
    return model(
        "split_and_joined",
        module.apply,
        jax.eval_shape(module.init, jax.random.key(0), *IMAGES),
        IMAGES,
        native,
        frozen={
            "conv_general_dilated": {"Conv_0/kernel": (0, 1), "Conv_1/kernel": (0, 1)},
            "input": {"Conv_0/kernel": (2,)},
            "output": {"Dense_0/kernel": (1,), "Dense_0/bias": (0,)},
        },
    )
