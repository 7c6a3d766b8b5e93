"""Twins in torch of models of the tests, for `torch_pruning_groups`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxcomp.node import flatten
from tests.program.zoo import attention, convolutions, decoders, layers, mobile


# The twins: functions of a module with the layers of the model, and the inputs.

relu, tanh = F.relu, torch.tanh
gelu = partial(F.gelu, approximate="tanh")
STRIDED = {"stride": (2, 2), "padding": (0, 0)}


def down(x: Tensor) -> Tensor:
    """The padding that Flax gives a kernel of three with a stride of two."""
    return F.pad(x, (0, 1, 0, 1))


def mlp(m: Any, x: Tensor) -> Tensor:
    return m.head(gelu(m.Dense_1(relu(m.Dense_0(x)))))


def lenet5(m: Any, x: Tensor) -> Tensor:
    x = F.avg_pool2d(tanh(m.Conv_0(x)), 2)
    x = F.avg_pool2d(tanh(m.Conv_1(x)), 2).flatten(1)
    return m.Dense_2(tanh(m.Dense_1(tanh(m.Dense_0(x)))))


def vgg(m: Any, x: Tensor) -> Tensor:
    x = relu(m.BatchNorm_0(m.Conv_0(x)))
    x = F.max_pool2d(relu(m.BatchNorm_1(m.Conv_1(x))), 2)
    x = F.max_pool2d(relu(m.BatchNorm_2(m.Conv_2(x))), 2)
    return m.Dense_0(x.mean((2, 3)))


def resnet(m: Any, x: Tensor, norm: str = "BatchNorm") -> Tensor:
    def block(m: Any, x: Tensor) -> Tensor:
        strided = m.Conv_0.stride == (2, 2)
        y = getattr(m, f"{norm}_0")(m.Conv_0(down(x) if strided else x))
        y = getattr(m, f"{norm}_1")(m.Conv_1(relu(y)))
        return relu(y + (m.projection_norm(m.projection(x)) if strided else x))

    x = relu(getattr(m, f"{norm}_0")(m.Conv_0(x)))
    return m.Dense_0(block(m.Residual_1, block(m.Residual_0, x)).mean((2, 3)))


def resnext(m: Any, x: Tensor) -> Tensor:
    x = relu(m.BatchNorm_0(m.Conv_0(x)))
    y = m.Conv_2(relu(m.BatchNorm_1(m.Conv_1(x))))
    y = m.Conv_3(relu(m.BatchNorm_2(y)))
    return m.Dense_0(relu(x + y).mean((2, 3)))


def densenet(m: Any, x: Tensor) -> Tensor:
    x = m.Conv_0(x)
    x = torch.cat([x, m.Conv_1(relu(m.BatchNorm_0(x)))], 1)
    x = torch.cat([x, m.Conv_2(relu(m.BatchNorm_1(x)))], 1)
    x = F.avg_pool2d(m.Conv_3(relu(m.BatchNorm_2(x))), 2)
    return m.Dense_0(relu(m.BatchNorm_3(x)).mean((2, 3)))


def unet(m: Any, x: Tensor) -> Tensor:
    skip = relu(m.Conv_0(x))
    x = relu(m.Conv_1(F.max_pool2d(skip, 2)))
    x = torch.cat([skip, m.ConvTranspose_0(x)], 1)
    return m.Conv_3(relu(m.Conv_2(x)))


def split_and_joined(m: Any, x: Tensor) -> Tensor:
    left, right = relu(m.Conv_0(x)).split([5, 4], 1)
    x = torch.cat([relu(m.Conv_1(right)), left], 1)
    return m.Dense_0(relu(m.Conv_2(x)).mean((2, 3)))


def mobilenet_v2(m: Any, x: Tensor) -> Tensor:
    def block(m: Any, x: Tensor) -> Tensor:
        x = F.relu6(m.BatchNorm_0(m.Conv_0(x)))
        x = m.Conv_1(down(x) if m.Conv_1.stride == (2, 2) else x)
        return m.BatchNorm_2(m.Conv_2(F.relu6(m.BatchNorm_1(x))))

    x = F.relu6(m.BatchNorm_0(m.Conv_0(down(x))))
    x = x + block(m.Inverted_0, x)
    return m.Dense_0(block(m.Inverted_1, x).mean((2, 3)))


def mobilenet_v3(m: Any, x: Tensor) -> Tensor:
    x = F.hardswish(m.BatchNorm_0(m.Conv_0(x)))
    y = m.Conv_2(F.hardswish(m.BatchNorm_1(m.Conv_1(x))))
    gate = m.Dense_1(relu(m.Dense_0(y.mean((2, 3)))))
    y = F.hardswish(y * F.hardsigmoid(gate)[:, :, None, None])
    x = x + m.Conv_3(m.BatchNorm_2(y))
    return m.Dense_3(F.hardswish(m.Dense_2(x.mean((2, 3)))))


def channel_shuffle(m: Any, x: Tensor) -> Tensor:
    x = relu(m.Conv_0(x)).unflatten(1, (-1, 2))
    x = relu(m.Conv_1(x.transpose(1, 2).flatten(1, 2)))
    return m.Dense_0(relu(m.Conv_2(x)).mean((2, 3)))


def convnext(m: Any, x: Tensor) -> Tensor:
    x = m.LayerNorm_0(m.Conv_0(x).permute(0, 2, 3, 1))
    y = m.Conv_1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    x = x + m.Dense_1(gelu(m.Dense_0(m.LayerNorm_1(y)))) * m.gamma
    x = m.Conv_2(m.LayerNorm_2(x).permute(0, 3, 1, 2))
    return m.Dense_2(m.LayerNorm_3(x.mean((2, 3))))


def by_heads(layer: Any, x: Tensor) -> Tensor:
    return layer(x).unflatten(2, (layer.heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = (q * attention.SCALE @ k.transpose(2, 3)).softmax(-1) @ v
    return y.transpose(1, 2).flatten(2)


def attended(m: Any, x: Tensor) -> Tensor:
    return m.out(attend(*(by_heads(part, x) for part in (m.query, m.key, m.value))))


def units(m: Any, x: Tensor) -> Tensor:
    return m.down(gelu(m.up(x)))


def vit(m: Any, x: Tensor) -> Tensor:
    x = m.Conv_0(x).flatten(2).transpose(1, 2)
    x = torch.cat([getattr(m, "class").expand(len(x), -1, -1), x], 1) + m.positions
    x = x + attended(m.Block_0.Attention_0, m.Block_0.LayerNorm_0(x))
    x = x + units(m.Block_0.Mlp_0, m.Block_0.LayerNorm_1(x))
    return m.Dense_0(m.LayerNorm_0(x)[:, 0])


def bert(m: Any, words: Tensor) -> Tensor:
    x = m.norm(m.words(words) + m.positions(torch.arange(5)[None]))
    x = m.LayerNorm_0(x + attended(m.Attention_0, x))
    x = m.LayerNorm_1(x + units(m.Mlp_0, x))
    return m.head(tanh(m.pooler(x[:, 0])))


def mixer(m: Any, x: Tensor) -> Tensor:
    x = m.Conv_0(x).flatten(2).transpose(1, 2)
    x = x + units(m.mixing, m.LayerNorm_0(x).transpose(1, 2)).transpose(1, 2)
    x = x + units(m.Mlp_0, m.LayerNorm_1(x))
    return m.Dense_0(m.LayerNorm_2(x).mean(1))


def fused_qkv(m: Any, x: Tensor) -> Tensor:
    x = m.Dense_0(x)
    y = m.qkv(x).unflatten(2, (3, m.qkv.heads, -1)).permute(2, 0, 3, 1, 4)
    return m.Dense_1(x + m.out(attend(*y.unbind(0))))


def decoder(m: Any, words: Tensor) -> Tensor:
    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * scale

    def rotated(x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * torch.cat(2 * [m.frequencies])
        half = x.shape[3] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], 3)
        return x * angles.cos() + turned * angles.sin()

    def repeated(x: Tensor) -> Tensor:
        b, heads, *rest = x.shape
        return x[:, :, None].expand(b, heads, 2, *rest).reshape(b, 2 * heads, *rest)

    x = m.embedding(words)
    for p in m.layers.children():
        y = norm(x, p.scale0)
        q, k = rotated(by_heads(p.query, y)), rotated(by_heads(p.key, y))
        scores = q @ repeated(k).transpose(2, 3) * decoders.SCALE
        later = ~torch.ones(scores.shape[2:]).tril().bool()
        weights = scores.masked_fill(later, -1e30).softmax(-1)
        y = weights @ repeated(by_heads(p.value, y))
        x = x + p.out(y.transpose(1, 2).flatten(2))
        y = norm(x, p.scale1)
        x = x + p.down(F.silu(p.gate(y)) * p.up(y))
    return norm(x, m.scale) @ m.embedding.weight.T


def lstm(m: Any, x: Tensor) -> Tensor:
    return m.head(m.second(m.first(x)[0])[0][:, -1])


# Name -> model, twin, attributes of layers that the shapes do not tell.
RESIDUAL = {"Residual_1.Conv_0": STRIDED, "Residual_1.projection": STRIDED}
INVERTED = {"Conv_0": STRIDED, "Inverted_1.Conv_1": STRIDED}
grouped = partial(resnet, norm="GroupNorm")
nets, mobiles = convolutions, mobile
PAIRS: dict[str, tuple[Any, ...]] = {
    "MLP": (layers.mlp(), mlp),
    # Torch flattens pixels behind their channel, Flax before.
    "LeNet-5": (nets.lenet5(), lenet5, {"Dense_0": {"pixels": 4}}),
    "VGG, batch norm": (nets.vgg_batch_norm(), vgg),
    "ResNet, batch norm": (nets.resnet_batch_norm(), resnet, RESIDUAL),
    "ResNet, group norm": (nets.resnet_group_norm(), grouped, RESIDUAL),
    "ResNeXt": (nets.resnext(), resnext, {"Conv_2": {"groups": 4, "in_channels": 8}}),
    "DenseNet": (nets.densenet(), densenet),
    "U-Net": (nets.unet(), unet),
    "split, joined": (nets.split_and_joined(), split_and_joined),
    "MobileNet-v2": (mobiles.mobilenet_v2(), mobilenet_v2, INVERTED),
    "MobileNet-v3": (mobiles.mobilenet_v3(), mobilenet_v3),
    "channel shuffle": (mobiles.channel_shuffle(), channel_shuffle),
    "ConvNeXt": (mobiles.convnext(), convnext),
    "ViT": (attention.vit((8, 2, 4, 4, 12)), vit),
    "ViT, wider values": (attention.vit(), vit),
    "BERT": (attention.bert((8, 6, 2, 4, 4, 12)), bert),
    "Mixer": (attention.mixer(), mixer),
    "fused QKV": (attention.fused_qkv(), fused_qkv),
    "decoder, shared keys": (decoders.decoder((8, 2, 2, 4, 12)), decoder),
    "LSTM": (layers.lstm(), lstm),
}
WORDS = {
    "weight": ("kernel", "scale", "embedding", ""),
    "bias": ("bias",),
    "running_mean": ("mean",),
    "running_var": ("var",),
}
Entries = frozenset[tuple[str, int]]  # name of a weight of the twin, number in it


class Net(nn.Module):
    """A twin: its layers are added by `twin_of`."""

    def __init__(self, f: Callable[..., Tensor]):
        super().__init__()
        self.f = f

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.f(self, *inputs)


def leaves_of(tree: Any) -> dict[str, np.ndarray]:
    paths, leaves, _ = flatten(tree)
    short = [p.removeprefix("params/").removeprefix("batch_stats/") for p in paths]
    return dict(zip(short, map(np.asarray, leaves), strict=True))


def layer_of(name: str, shapes: dict[str, tuple[int, ...]]) -> Any:
    """What has weights of these shapes."""
    shape = shapes.get("kernel") or shapes.get("")
    if "mean" in shapes:
        return nn.BatchNorm2d(*shapes["mean"])
    if "scale" in shapes:
        (n,) = shapes["scale"]
        if "Group" in name or name == "projection_norm":
            return nn.GroupNorm(n // 2, n, 1e-6)
        return nn.LayerNorm(n, 1e-6)
    if shape is None or name == "embedding":
        return nn.Embedding(*(shape or shapes["embedding"]))
    if "" in shapes and (len(shape) == 1 or shape[0] == 1):
        return nn.Parameter(torch.ones(shape), name != "frequencies")
    if len(shape) == 4:
        size, _, i, o = shape
        if "Transpose" in name:
            return nn.ConvTranspose2d(i, o, size, size)
        stride, padding = (1, size // 2) if size % 2 else (size, 0)
        layer = nn.Conv2d(i, o, size, stride, padding, bias="bias" in shapes)
        if i == 1:
            layer.groups = layer.in_channels = o
        return layer
    i = math.prod(shape[:-1]) if name == "out" else shape[0]
    layer = nn.Linear(i, math.prod(shape) // i, "bias" in shapes)
    if name in ("query", "key", "value", "qkv"):
        layer.heads = shape[1] // 12 if name == "qkv" else shape[1]
    return layer


def twin_of(params: Any, f: Callable[..., Tensor], more: dict[str, Any]) -> Net:
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, leaf in leaves_of(params).items():
        stem, _, word = path.rpartition("/")
        if not any(word in words for words in WORDS.values()) or not stem:
            stem, word = path, ""
        parts.setdefault(stem, {})[word] = leaf.shape
    net = Net(f)
    for path, shapes in parts.items():
        *stem, name = path.split("/")
        if name in ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho"):
            shape = parts["/".join([*stem, "ii"])]["kernel"]
            layer, (*stem, name) = nn.LSTM(*shape, batch_first=True), stem
        else:
            layer = layer_of(name, shapes)
        owner: nn.Module = net
        for part in stem:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        setattr(owner, name, layer)
    for path, attributes in more.items():
        vars(net.get_submodule(path)).update(attributes)
    state = {k: torch.tensor(x.copy()) for k, x in converted(net, params).items()}
    net.load_state_dict(state, strict=False)
    return net.eval()


def converted(net: Net, tree: Any) -> dict[str, np.ndarray]:
    """Leaves in the layout of the weights of the twin."""
    leaves, found = leaves_of(tree), {}
    for name, x in net.state_dict().items():
        *parents, last = name.split(".")
        layer = net.get_submodule(".".join(parents))
        if last == "num_batches_tracked":
            continue
        if isinstance(layer, nn.LSTM):
            kind = {"weight_ih_l0": "i{}/kernel", "weight_hh_l0": "h{}/kernel"}
            end = kind.get(last, "h{}/bias")
            gates = [leaves["/".join([*parents, end.format(g)])].T for g in "ifgo"]
            # Torch has two biases, which it adds.
            found[name] = np.concatenate(gates) / (2 if "bias" in end else 1)
            continue
        paths = ("/".join([*parents, w]).strip("/") for w in WORDS.get(last, (last,)))
        leaf = next(leaves[path] for path in paths if path in leaves)
        if isinstance(layer, nn.ConvTranspose2d) and leaf.ndim == 4:
            leaf = leaf.transpose(2, 3, 0, 1)[..., ::-1, ::-1]
        elif leaf.ndim == 4:
            leaf = leaf.transpose(3, 2, 0, 1)
        elif isinstance(layer, nn.Linear) and x.ndim == 2:
            rows = leaf.reshape(getattr(layer, "pixels", 1), -1, len(x))
            leaf = rows.swapaxes(0, 1).reshape(-1, len(x)).T
        found[name] = leaf.reshape(x.shape)
    return found
