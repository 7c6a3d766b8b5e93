"""BERT sentence embeddings: a Flax model, its weights from PyTorch, a NumPy reference.

The encoder of Devlin et al., arXiv:1810.04805, with the mean over tokens and the unit
length of Sentence-BERT (Reimers and Gurevych, arXiv:1908.10084). The pooler of BERT has
no part in these embeddings and is left out.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import erf


class Config(NamedTuple):
    """The sizes of a BERT, under the names of its config.json."""

    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each added and then normalized."""

    config: Config

    @nn.compact
    def __call__(self, x, mask):
        c = self.config
        heads = (*x.shape[:2], c.num_attention_heads, -1)
        query, key, value = (
            nn.Dense(c.hidden_size, name=name)(x).reshape(heads)
            for name in ("query", "key", "value")
        )
        mixed = nn.dot_product_attention(query, key, value, mask=mask[:, None, None])
        mixed = nn.Dense(c.hidden_size, name="out")(mixed.reshape(x.shape))
        x = _norm(c, "mixed_norm")(x + mixed)
        hidden = nn.gelu(nn.Dense(c.intermediate_size, name="up")(x), approximate=False)
        return _norm(c, "norm")(x + nn.Dense(c.hidden_size, name="down")(hidden))


class Bert(nn.Module):
    """ids: int32[batch, tokens], mask: bool[batch, tokens] -> float[batch, hidden]."""

    config: Config

    @nn.compact
    def __call__(self, ids, mask):
        c = self.config
        place = jnp.arange(ids.shape[1])[None]
        x = nn.Embed(c.vocab_size, c.hidden_size, name="words")(ids)
        x += nn.Embed(c.max_position_embeddings, c.hidden_size, name="places")(place)
        x += nn.Embed(c.type_vocab_size, c.hidden_size, name="types")(0 * place)
        x = _norm(c, "norm")(x)
        for i in range(c.num_hidden_layers):
            x = Layer(c, name=f"layer_{i}")(x, mask)
        total = jnp.sum(x * mask[..., None], axis=1)  # its length goes with the mean's
        return total / jnp.linalg.norm(total, axis=-1, keepdims=True)


def _norm(config: Config, name: str) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, loses digits that 1e-5 needs.
    return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, name=name)


def from_torch(tensors: dict[str, np.ndarray]) -> dict:
    """The params of `Bert` from the tensors of a PyTorch BertModel."""

    def dense(name: str) -> dict:
        kernel = np.ascontiguousarray(tensors[f"{name}.weight"].T)  # (out, in) there
        return {"kernel": jnp.asarray(kernel), "bias": tensor(f"{name}.bias")}

    def norm(name: str) -> dict:
        return {"scale": tensor(f"{name}.weight"), "bias": tensor(f"{name}.bias")}

    def embed(name: str) -> dict:
        return {"embedding": tensor(f"embeddings.{name}_embeddings.weight")}

    def tensor(name: str) -> jax.Array:
        return jnp.asarray(tensors[name])

    def layer(at: str) -> dict:
        return {
            "query": dense(f"{at}.attention.self.query"),
            "key": dense(f"{at}.attention.self.key"),
            "value": dense(f"{at}.attention.self.value"),
            "out": dense(f"{at}.attention.output.dense"),
            "mixed_norm": norm(f"{at}.attention.output.LayerNorm"),
            "up": dense(f"{at}.intermediate.dense"),
            "down": dense(f"{at}.output.dense"),
            "norm": norm(f"{at}.output.LayerNorm"),
        }

    found = {
        "words": embed("word"),
        "places": embed("position"),
        "types": embed("token_type"),
        "norm": norm("embeddings.LayerNorm"),
    }
    while (at := f"encoder.layer.{len(found) - 4}") + ".output.dense.bias" in tensors:
        found[f"layer_{len(found) - 4}"] = layer(at)
    return found


def reference(
    tensors: dict[str, np.ndarray], config: Config, ids: list[int]
) -> np.ndarray:
    """float32[hidden]: the embedding of one text by NumPy, straight from the tensors.

    It shares nothing with `Bert`: PyTorch's layout and names, one text, no padding.
    """

    def affine(x: np.ndarray, name: str) -> np.ndarray:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def normalize(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        spread = np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.layer_norm_eps)
        return x / spread * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    table = "embeddings.{}_embeddings.weight".format
    x = tensors[table("word")][ids] + tensors[table("token_type")][0]
    x = normalize(x + tensors[table("position")][: len(ids)], "embeddings.LayerNorm")
    width = config.hidden_size // config.num_attention_heads
    for i in range(config.num_hidden_layers):
        at = f"encoder.layer.{i}"
        query, key, value = (
            affine(x, f"{at}.attention.self.{name}")
            for name in ("query", "key", "value")
        )
        heads = []
        for j in range(0, config.hidden_size, width):
            q, k, v = (a[:, j : j + width] for a in (query, key, value))
            scores = q @ k.T / np.sqrt(np.float32(width))
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            heads.append(weights / weights.sum(axis=-1, keepdims=True) @ v)
        mixed = affine(np.concatenate(heads, axis=-1), f"{at}.attention.output.dense")
        x = normalize(x + mixed, f"{at}.attention.output.LayerNorm")
        hidden = affine(x, f"{at}.intermediate.dense")
        hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(np.float32(2))))
        x = x + affine(hidden, f"{at}.output.dense")
        x = normalize(x, f"{at}.output.LayerNorm")
    mean = x.mean(axis=0)
    return mean / np.linalg.norm(mean)
