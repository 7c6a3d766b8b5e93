"""Prunes units of an MLP while it trains, and really removes them at the end.

Takes about 20 seconds on one CPU core: `python examples/structured_pruning.py`.
"""

import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomp as jc


STEPS = 1000
END = 700  # the last 300 steps win back what the last cut cost


class MLP(nn.Module):
    widths: tuple[int, ...] = (128, 128)

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
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


def f(params, x):
    return MLP().apply({"params": params}, x)


x, label = two_spirals(jax.random.key(0), 2000)
test_x, test_label = two_spirals(jax.random.key(1), 2000)
params = MLP().init(jax.random.key(2), x)["params"]

groups = jc.coupled_groups(f, params, x)
sparsity = optax.polynomial_schedule(0.0, 0.75, power=3, transition_steps=END)
link = jc.prune_gradually(
    sparsity,
    every=50,
    budget=jc.prune.in_groups(jc.prune.global_budget, groups.families),
    where=jc.is_trained,  # biases go with their units
)
tx = optax.chain(optax.adam(3e-3), link)


@jax.jit
def step(params, state):
    def loss(params):
        losses = optax.softmax_cross_entropy_with_integer_labels(f(params, x), label)
        return losses.mean()

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


state = tx.init(params)
for _ in range(STEPS):
    params, state = step(params, state)

keep = jc.prune.kept_groups(params, groups.families)
g, smaller, widths = jc.shrink(f, params, keep, x)
features = tuple(widths[f"Dense_{i}/bias"][0] for i in range(2))
native = MLP(features).apply({"params": smaller}, test_x)
np.testing.assert_allclose(g(smaller, test_x), native, rtol=1e-5, atol=1e-5)

for name, h, p in (("with zeros", f, params), ("cut", g, smaller)):
    accuracy = jnp.mean(h(p, test_x).argmax(axis=-1) == test_label)
    found = jc.count(h, p, test_x[:1])
    costs = f"{found.parameters:,} parameters, {found.multiply_adds:,} multiply-adds"
    with tempfile.TemporaryDirectory() as folder:
        size = jc.save(Path(folder) / "net.jxc", p)
    print(f"{name:10} {accuracy:.1%}, {costs}, file {size:,} bytes")
print(f"widths of 128 and 128 are now {features[0]} and {features[1]}")
