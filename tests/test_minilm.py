import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def module(name):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


bert = module("bert")
CONFIG = bert.Config(
    vocab_size=30,
    max_position_embeddings=16,
    type_vocab_size=2,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    layer_norm_eps=1e-12,
)
TEXTS = [[1, 7, 2], [1, 29, 4, 4, 11, 3, 2], [1, 2]]


@pytest.fixture(scope="module")
def tensors():
    """Random weights under PyTorch's names and in its layout."""
    rng = np.random.default_rng(0)
    hidden, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    shapes = {
        "embeddings.word_embeddings.weight": (CONFIG.vocab_size, hidden),
        "embeddings.position_embeddings.weight": (16, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
    }
    names = ["embeddings.LayerNorm"]
    for i in range(CONFIG.num_hidden_layers):
        at = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{at}.attention.{name}.weight"] = (hidden, hidden)
            shapes[f"{at}.attention.{name}.bias"] = (hidden,)
        shapes[f"{at}.intermediate.dense.weight"] = (inner, hidden)
        shapes[f"{at}.intermediate.dense.bias"] = (inner,)
        shapes[f"{at}.output.dense.weight"] = (hidden, inner)
        shapes[f"{at}.output.dense.bias"] = (hidden,)
        names += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    for name in names:
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def padded(texts, length):
    ids = np.zeros((len(texts), length), np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    lengths = np.array([len(text) for text in texts])
    return jnp.asarray(ids), jnp.asarray(np.arange(length) < lengths[:, None])


@pytest.mark.parametrize("length", [7, 10])
def test_the_flax_model_equals_numpy_whatever_the_padding(tensors, length):
    params = bert.from_torch(tensors)
    found = bert.Bert(CONFIG).apply({"params": params}, *padded(TEXTS, length))
    expected = [bert.reference(tensors, CONFIG, text) for text in TEXTS]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-6)


def test_the_loader_fills_the_tree_that_the_model_declares(tensors):
    ids, mask = padded(TEXTS, 7)
    declared = bert.Bert(CONFIG).init(jax.random.key(0), ids, mask)["params"]
    found = bert.from_torch(tensors)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, declared)
