"""Prunes an MLP to 80% zeros while it trains, then stores it in 4 bits.

Takes about 20 seconds on one CPU core: `python examples/prune_then_quantize.py`.
"""

import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxcomp as jc


STEPS = 1500
END = 1000  # the last 500 steps win back what the last cut cost


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (64, 64):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(2)(x)


def two_spirals(key, size):
    """x: float[size, 2], label: int32[size]."""
    key_t, key_label, key_noise = jax.random.split(key, 3)
    label = jax.random.bernoulli(key_label, shape=(size,)).astype(jnp.int32)
    t = 3.0 * jnp.sqrt(jax.random.uniform(key_t, (size,)))
    angle = 2.0 * t + jnp.pi * label
    x = t[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return x + 0.05 * jax.random.normal(key_noise, x.shape), label


model = MLP()
x, label = two_spirals(jax.random.key(0), 2000)
test_x, test_label = two_spirals(jax.random.key(1), 2000)
start = model.init(jax.random.key(2), x)["params"]


def loss(params, x, label):
    logits = model.apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


def train(tx, params):
    @jax.jit
    def step(params, state, x, label):
        updates, state = tx.update(jax.grad(loss)(params, x, label), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state, x, label)
    return params


@jax.jit
def accuracy(params):
    logits = model.apply({"params": jc.densify(params)}, test_x)
    return jnp.mean(logits.argmax(axis=-1) == test_label)


def show(name, params):
    with tempfile.TemporaryDirectory() as folder:
        size = jc.save(Path(folder) / "mlp.jxc", params)
    print(f"{name:12} accuracy {accuracy(params):.1%}, file {size:,} bytes")


sparsity = optax.polynomial_schedule(0.0, 0.8, power=3, transition_steps=END)
dense = train(optax.adam(3e-3), start)
pruned = train(
    optax.chain(optax.adam(3e-3), jc.prune_gradually(sparsity, every=50)), start
)
# A scale for each output unit would serve two weights in the first layer: share one.
small = jc.quantize_tree(pruned, axis=None, where=jc.path_matches("Dense_0/kernel"))
small = jc.quantize_tree(small, bits=4)
jc.testing.assert_sparsity(pruned, 0.8)

show("dense", dense)
show("80% zeros", pruned)
show("and 4 bits", small)
print(jc.report(small, pruned))
