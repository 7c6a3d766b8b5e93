"""Integer grids beside those of torchao, qwix and gguf, where they are installed."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.quant.grid import QTensor


RNG = np.random.default_rng(0)
NORMAL = RNG.standard_normal((64, 256)).astype(np.float32)
GRIDS = [(bits, group) for bits in (2, 4, 8) for group in (32, 256)]
ONE_IN = 2000  # codes may differ by one where a quotient is rounded otherwise


def codes_of(node: QTensor) -> np.ndarray:
    return np.asarray(node._codes()).reshape(NORMAL.shape).astype(int)


def assert_alike(node, codes, dense):
    ours = codes_of(node)
    differ = ours != codes
    # The largest of a group may be just half a step from two codes.
    groups = np.abs(NORMAL).reshape(-1, node.group)
    extreme = (groups == groups.max(axis=1, keepdims=True)).reshape(codes.shape)
    assert np.sum(differ & ~extreme) * ONE_IN <= codes.size
    assert np.abs(ours - codes).max() <= 1
    np.testing.assert_allclose(
        np.asarray(node.dense())[~differ], dense[~differ], rtol=1e-6, atol=1e-6
    )


def torchao_grid(mapping, bits, group):
    torch = pytest.importorskip("torch")
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    x, block, levels = torch.from_numpy(NORMAL), (1, group), (0, 2**bits - 1)
    kind = getattr(ao.MappingType, mapping)
    scale, zero = ao.choose_qparams_affine(x, kind, block, torch.int32, *levels)
    codes = ao.quantize_affine(x, block, scale, zero, torch.int32, *levels)
    dense = ao.dequantize_affine(codes, block, scale, zero, torch.int32, *levels)
    return codes.numpy(), dense.numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("bits", "group"), GRIDS)
def test_the_affine_grid_is_that_of_torchao(bits, group):
    codes, dense = torchao_grid("ASYMMETRIC", bits, group)
    assert_alike(
        jc.quantize_affine(jnp.asarray(NORMAL), bits, axis=0, group=group), codes, dense
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("bits", "group"), GRIDS)
def test_half_a_step_more_is_the_symmetric_grid_of_torchao(bits, group):
    codes, dense = torchao_grid("SYMMETRIC", bits, group)
    top = 2 ** (bits - 1) - 0.5
    node = jc.quantize(jnp.asarray(NORMAL), bits, axis=0, group=group, top=top)
    assert_alike(node, codes, dense)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 256])
def test_half_a_step_more_is_the_symmetric_grid_of_qwix(bits, group):
    qarray = pytest.importorskip("qwix._src.core.qarray")
    how = qarray.HowToQuantize(
        qtype=f"int{bits}", channelwise_axes=[0], tiled_axes={1: group}
    )
    theirs = qarray.quantize(jnp.asarray(NORMAL), how)
    codes = np.asarray(theirs.qvalue).astype(int) + 2 ** (bits - 1)
    dense = np.asarray(qarray.dequantize(theirs))
    top = 2 ** (bits - 1) - 0.5
    node = jc.quantize(jnp.asarray(NORMAL), bits, axis=0, group=group, top=top)
    assert_alike(node, codes, dense)


def test_eight_bits_in_groups_of_32_are_q8_0_of_gguf():
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(NORMAL, kind).reshape(-1, 34)  # a half and 32 codes
    halves = partial(jc.quant.to_float, dtype=jnp.float16)
    node = jc.quantize(jnp.asarray(NORMAL), 8, axis=0, group=32)
    codes = blocks[:, 2:].view(np.int8).reshape(NORMAL.shape).astype(int) + 127
    differ = codes_of(node) != codes  # theirs goes by the scale before it is a half
    assert differ.sum() * ONE_IN <= codes.size
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    stored = jc.quantize(jnp.asarray(NORMAL), 8, axis=0, group=32, scales=halves)
    np.testing.assert_array_equal(
        np.asarray(stored.scale.dense()).reshape(-1), scale[:, 0]
    )


def test_an_extreme_on_the_side_with_more_codes_is_q4_0_of_gguf():
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q4_0
    rows = NORMAL.reshape(-1, 32)
    most = rows[np.arange(len(rows)), np.abs(rows).argmax(axis=1)]
    turned = np.where(most > 0, -1, 1)[:, None] * rows  # so that the extreme is below
    dense = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
    node = jc.quantize(jnp.asarray(turned), 4, axis=0, top=8)
    ours = np.where(most > 0, -1, 1)[:, None] * np.asarray(node.dense())
    step = np.abs(most)[:, None] / 8
    off = np.abs(ours - dense) / step
    # Their scale is a half, and ties go up.
    assert np.mean(off > 0.01) < 1 / ONE_IN and off.max() < 1.01
