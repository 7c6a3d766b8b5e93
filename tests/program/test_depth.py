import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.node import flatten
from jaxcomp.program.depth import block_changes, drop_blocks, residual_blocks
from tests.program.zoo import attention, convolutions, decoders, layers


def f(params, x):
    for block in params["blocks"]:
        x = x + jnp.tanh(x @ block["up"]) @ block["down"]
    return x @ params["head"]


def made(depth=3, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    blocks = [{"up": draw(4, 6), "down": draw(6, 4)} for _ in range(depth)]
    return {"blocks": blocks, "head": draw(4, 2)}


X = jnp.asarray(np.random.default_rng(9).normal(size=(5, 4)), jnp.float32)


def test_blocks_are_found_with_what_is_theirs_alone():
    found = residual_blocks(f, made(), X)
    assert [block.name for block in found] == [f"blocks/{i}" for i in range(3)]
    assert found[1].paths == ("blocks/1/down", "blocks/1/up")
    line = f.__code__.co_firstlineno + 2
    assert found[0].line == f"test_depth.py:{line}"


def test_a_net_without_a_block_is_the_shallower_net():
    params = made()
    blocks = residual_blocks(f, params, X)
    g, left = drop_blocks(f, params, blocks[1:2], X)
    shallow = {**params, "blocks": [params["blocks"][0], params["blocks"][2]]}
    np.testing.assert_array_equal(g(left, X), f(shallow, X))
    assert left["blocks"][1] == {}  # a list keeps its places
    assert jax.tree.leaves(left["blocks"][0]) == jax.tree.leaves(params["blocks"][0])
    np.testing.assert_allclose(jax.jit(g)(left, X[:2]), f(shallow, X[:2]), rtol=1e-6)
    slope = jax.grad(lambda p: g(p, X).sum())(left)
    assert jax.tree.structure(slope) == jax.tree.structure(left)


def test_nothing_dropped_is_the_same_net():
    params = made()
    g, left = drop_blocks(f, params, (), X)
    assert jax.tree.structure(left) == jax.tree.structure(params)
    np.testing.assert_array_equal(g(left, X), f(params, X))


def test_changes_are_one_minus_the_cosine_by_hand():
    params = made()
    blocks = residual_blocks(f, params, X)
    found = block_changes(f, params, [(X,), (2 * X,)], blocks)
    wanted = np.zeros((2, 3))
    for i, x in enumerate((np.asarray(X, float), 2 * np.asarray(X, float))):
        for j, block in enumerate(params["blocks"]):
            y = x + np.tanh(x @ np.asarray(block["up"])) @ np.asarray(block["down"])
            lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
            wanted[i, j] = 1 - np.mean(np.sum(x * y, axis=-1) / lengths)
            x = y
    np.testing.assert_allclose(found, wanted.mean(axis=0), rtol=1e-4)


def test_a_block_that_does_nothing_changes_nothing():
    params = made()
    params["blocks"][1] = jax.tree.map(jnp.zeros_like, params["blocks"][1])
    blocks = residual_blocks(f, params, X)
    found = block_changes(f, params, [(X,), (0 * X,)], blocks)
    assert found[1] == 0 < found[0]


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (layers.mlp, []),
        (convolutions.densenet, []),
        (convolutions.resnet_batch_norm, ["Residual_0"]),  # one has a projection
        (attention.bert, ["params/Attention_0", "params/Mlp_0"]),
        (decoders.decoder, ["layers/0", "layers/0", "layers/1", "layers/1"]),
        (layers.rematerialized, ["params/first", "params/second"]),
    ],
)
def test_blocks_of_the_zoo(make, wanted):
    model = make()
    blocks = residual_blocks(model.f, model.params, *model.inputs)
    assert [block.name for block in blocks] == wanted
    g, left = drop_blocks(model.f, model.params, blocks, *model.inputs)
    gone = {path for block in blocks for path in block.paths}
    kept = set(flatten(left)[0])
    # What two blocks share is gone with both.
    assert kept.isdisjoint(gone) and kept <= set(flatten(model.params)[0])
    assert np.isfinite(jax.tree.leaves(g(left, *model.inputs))[0]).all()


def test_the_key_of_a_module_is_gone_from_the_dict_of_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.Dense(4, name="extra")(nn.LayerNorm(name="norm")(x))
            return nn.Dense(2, name="head")(x)

    params = Net().init(jax.random.key(0), X)
    blocks = residual_blocks(Net().apply, params, X)
    g, left = drop_blocks(Net().apply, params, blocks, X)
    assert list(left["params"]) == ["head"]
    head = nn.Dense(2).apply({"params": left["params"]["head"]}, X)
    np.testing.assert_array_equal(g(left, X), head)


def test_a_sum_without_parameters_of_its_own_is_no_block():
    def gelu(params, x):
        y = x @ params["w"]
        return jnp.tanh(y + 0.04 * y**3)

    assert residual_blocks(gelu, {"w": jnp.ones((4, 4))}, X) == ()


def test_other_inputs_without_the_blocks_are_an_error():
    def g(params, x):
        y = x @ params["w"]
        return x * y if len(x) == 1 else x + y

    params = {"w": jnp.ones((4, 4))}
    blocks = residual_blocks(g, params, X)
    h, left = drop_blocks(g, params, blocks, X)
    text = "got one that is added where there is a mul"
    with pytest.raises(ValueError, match=re.escape(text)):
        h(left, X[:1])
    with pytest.raises(ValueError, match="which is not there"):
        drop_blocks(lambda params, x: x, params, blocks, X)


def test_no_batches_are_an_error():
    params = made()
    blocks = residual_blocks(f, params, X)
    with pytest.raises(ValueError, match="needs at least one batch, got none"):
        block_changes(f, params, [], blocks)
