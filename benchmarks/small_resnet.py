"""A small ResNet for 28 x 28 images, and the same net in torch."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxcomp.node import flatten


class Block(nn.Module):
    inner: int
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, not train, momentum=0.9)
        y = nn.relu(norm()(conv(self.inner, (3, 3), self.stride)(x)))
        y = norm()(conv(self.width, (3, 3))(y))
        if self.stride > 1:
            x = norm()(conv(self.width, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-8 with a stem of stride 2: 77,754 parameters, 2.6 M multiply-adds."""

    inner: Sequence[int] = (16, 32, 64)
    width: Sequence[int] = (16, 32, 64)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(self.width[0], (3, 3), 2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        for inner, width, stride in zip(self.inner, self.width, (1, 2, 2), strict=True):
            x = Block(inner, width, stride)(x, train)
        # The mean comes last, so that every weight reads maps.
        return nn.Conv(10, (1, 1))(x).mean((1, 2))


NET = ResNet()


def logits(variables: Any, x: jax.Array, net: ResNet = NET) -> jax.Array:
    return net.apply(variables, x)  # type: ignore[return-value]


def training(variables: Any, x: jax.Array, net: ResNet = NET) -> tuple[Any, Any]:
    """(logits, new batch statistics)"""
    return net.apply(variables, x, True, mutable=["batch_stats"])  # type: ignore


def torch_twin(variables: Any) -> Any:
    """The net as a `torch.nn.Module`, in evaluation; modules have the paths of Flax."""
    import torch
    from torch.nn import functional as F

    table = dict(zip(*flatten(jax.tree.map(np.array, variables))[:2], strict=True))

    class Twin(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for path, value in table.items():
                _, _, name = path.rpartition("/")
                module = path.removeprefix("params/").removesuffix(f"/{name}")
                if name == "kernel":
                    has_bias = f"params/{module}/bias" in table
                    *window, n, m = value.shape
                    stride = 2 if module in halving else 1
                    conv = torch.nn.Conv2d(n, m, window, stride, bias=has_bias)
                    conv.weight.data = torch.tensor(value).permute(3, 2, 0, 1)
                    if has_bias:
                        conv.bias.data = torch.tensor(table[f"params/{module}/bias"])
                    self.add_module(module, conv)
                elif name == "scale":
                    norm = torch.nn.BatchNorm2d(len(value))
                    norm.weight.data = torch.tensor(value)
                    norm.bias.data = torch.tensor(table[f"params/{module}/bias"])
                    stats = f"batch_stats/{module}"
                    norm.running_mean = torch.tensor(table[f"{stats}/mean"])
                    norm.running_var = torch.tensor(table[f"{stats}/var"])
                    self.add_module(module, norm)

        def conv(self, name: str, x: Any) -> Any:
            """A convolution padded as XLA pads it."""
            layer = self.get_submodule(name)
            (step, _), (window, _), n = layer.stride, layer.kernel_size, x.shape[-1]
            extra = max((-(-n // step) - 1) * step + window - n, 0)
            sides = (extra // 2, extra - extra // 2)
            return layer(F.pad(x, sides * 2) if extra else x)

        def normed(self, block: str, i: int, x: Any) -> Any:
            x = self.conv(f"{block}Conv_{i}", x)
            return self.get_submodule(f"{block}BatchNorm_{i}")(x)

        def forward(self, x: Any) -> Any:
            x = F.relu(self.normed("", 0, x))
            for block in ("Block_0/", "Block_1/", "Block_2/"):
                y = F.relu(self.normed(block, 0, x))
                y = self.normed(block, 1, y)
                x = self.normed(block, 2, x) if block != "Block_0/" else x
                x = F.relu(x + y)
            return self.conv("Conv_1", x).mean((2, 3))

    halving = {"Conv_0"} | {f"Block_{b}/Conv_{i}" for b in (1, 2) for i in (0, 2)}
    return Twin().eval()
