"""Narrow floats beside those of qwix, torchao and gguf, where they are installed."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.quant import blocks, floats


X = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)


def differ(ours, theirs):
    """How many entries are more than float32 rounding apart, and by how much at most.

    A quotient next to a midpoint may round either way: XLA multiplies by a reciprocal.
    """
    theirs = np.asarray(theirs, np.float32).reshape(X.shape)
    off = np.abs(np.asarray(ours) - theirs) / np.abs(X).max()
    return int(np.sum(off > 1e-6)), off.max()


def ceil_exponent(groups, dtype):
    """The rule of qwix: no value is beyond the largest of the dtype."""
    reach = jnp.max(jnp.abs(groups), axis=-1) / float(jnp.finfo(dtype).max)
    return jnp.round(jnp.log2(floats.to_powers(reach).dense())).astype(jnp.int32)


@pytest.mark.parametrize("qtype", ["nf4", "float8_e4m3fn", "float8_e5m2"])
def test_scaled_values_are_those_of_qwix(qtype):
    qarray = pytest.importorskip("qwix._src.core.qarray")
    how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=(0,), tiled_axes={1: 64})
    theirs = qarray.dequantize(qarray.quantize(jnp.asarray(X), how))
    if qtype == "nf4":
        ours = blocks.quantize_nf4(X, axis=0)
    else:
        ours = floats.quantize_float(X, qtype, axis=0, group=64)
    count, _ = differ(ours.dense(), theirs)
    assert count == 0


@pytest.mark.parametrize("qtype", ["mxfp4", "mxfp8"])
def test_mx_with_the_rule_of_qwix_is_that_of_qwix(qtype):
    qarray = pytest.importorskip("qwix._src.core.qarray")
    how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=(0,), tiled_axes={1: 32})
    theirs = qarray.dequantize(qarray.quantize(jnp.asarray(X), how))
    dtype = {"mxfp4": jnp.float4_e2m1fn, "mxfp8": jnp.float8_e4m3fn}[qtype]
    ours = blocks.quantize_mx(X, dtype, axis=0, exponent=ceil_exponent)
    np.testing.assert_array_equal(ours.dense(), theirs)


def test_narrow_scales_without_one_for_all_are_nvfp4_of_qwix():
    qarray = pytest.importorskip("qwix._src.core.qarray")
    how = qarray.HowToQuantize(qtype="nvfp4", channelwise_axes=(0,), tiled_axes={1: 16})
    theirs = qarray.dequantize(qarray.quantize(jnp.asarray(X), how))
    ours = floats.quantize_float(
        X,
        jnp.float4_e2m1fn,
        axis=0,
        group=16,
        scales=lambda scale: floats.to_float(scale, jnp.float8_e4m3fn),
    )
    assert differ(ours.dense(), theirs)[0] == 0


@pytest.mark.parametrize("name", ["float4_e2m1fn_x2", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e30])
def test_mx_is_that_of_torchao(name, size):
    torch = pytest.importorskip("torch")
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = X * np.float32(size)
    tensor = mx.MXTensor.to_mx(torch.from_numpy(x), getattr(torch, name), 32)
    theirs = tensor.dequantize(torch.float32).numpy()
    ours = blocks.quantize_mx(x, name.removesuffix("_x2"), axis=0)
    np.testing.assert_array_equal(ours.dense(), theirs)


def test_nvfp4_is_that_of_torchao():
    torch = pytest.importorskip("torch")
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = torch.from_numpy(X)
    whole = nv.per_tensor_amax_to_scale(x.abs().max())
    tensor = nv.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=whole)
    theirs = tensor.dequantize(torch.float32).numpy()
    assert differ(blocks.quantize_nvfp4(X, axis=0).dense(), theirs)[0] == 0


def test_mxfp4_is_that_of_gguf_but_for_ties():
    quants = pytest.importorskip("gguf.quants")
    packed = quants.MXFP4.quantize(X)
    theirs = quants.MXFP4.dequantize(packed)
    ours = blocks.quantize_mx(X, axis=0)
    np.testing.assert_array_equal(ours.dense(), theirs)  # no value of X is a tie
    tie = np.zeros((1, 32), np.float32)
    tie[0, :3] = 4, 0.75, 1.25  # ours: to the even code; gguf: to the lower level
    down = quants.MXFP4.dequantize(quants.MXFP4.quantize(tie))
    assert down[0, :3].tolist() == [4, 0.5, 1]
    assert blocks.quantize_mx(tie, axis=0).dense()[0, :3].tolist() == [4, 1, 1]


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "bfloat16"])
def test_casts_are_those_of_torch(name):
    torch = pytest.importorskip("torch")
    x = X * np.float32(100)
    theirs = torch.from_numpy(x).to(getattr(torch, name)).float().numpy()
    np.testing.assert_array_equal(floats.to_float(x, name).dense(), theirs)
