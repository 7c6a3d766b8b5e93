"""Shares the weights of a net to given bits per weight: accuracy against bytes.

Takes about 15 seconds on one CPU core: `python examples/share_to_rate.py`.
"""

import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import jaxcomp as jc


WIDTHS = (2, 96, 96, 3)


def spirals(key, size):
    """x: float[size, 2], label: int32[size] of three arms."""
    key_label, key_t, key_noise = jax.random.split(key, 3)
    label = jax.random.randint(key_label, (size,), 0, 3)
    t = 2.5 * jnp.sqrt(jax.random.uniform(key_t, (size,)))
    angle = 2.0 * t + 2 * jnp.pi / 3 * label
    x = t[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return x + 0.06 * jax.random.normal(key_noise, x.shape), label


def model(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def accuracy(params):
    return float(jnp.mean(model(jc.densify(params), test_x).argmax(-1) == test_label))


def train(params, tx, steps, teacher, hard):
    step = jc.distill_step(model, model, tx, hard=hard)
    state = tx.init(jc.split(params)[0])
    for _ in range(steps):
        params, state, _ = step(params, state, teacher, (x, label))
    return params


x, label = spirals(jax.random.key(0), 1000)
test_x, test_label = spirals(jax.random.key(1), 4000)
keys = jax.random.split(jax.random.key(2), len(WIDTHS) - 1)
he = jax.nn.initializers.he_normal()
start = [
    {"kernel": he(key, shape), "bias": jnp.zeros(shape[1])}
    for key, shape in zip(keys, zip(WIDTHS, WIDTHS[1:], strict=False), strict=True)
]
dense = train(start, optax.adam(3e-3), 800, start, hard=1.0)
sparsity = optax.polynomial_schedule(0.0, 0.75, power=3, transition_steps=600)
budget = jc.prune.global_budget
tx = optax.chain(optax.adam(3e-3), jc.prune_gradually(sparsity, budget=budget))
pruned = train(dense, tx, 1000, dense, hard=0.1)

ways = {
    "pruned, float32": lambda tree: tree,
    "8 values a kernel": partial(jc.share_tree, clusters=8),
    **{
        # Biases too: at such sizes they would be a third of the file.
        f"{rate} bits a weight": partial(
            jc.share_to_rate, rate=rate, where=lambda path, leaf: True
        )
        for rate in (2.0, 1.0)
    },
}
raw = sum(leaf.nbytes for leaf in jax.tree.leaves(dense))
print(f"{'dense, float32':20} {accuracy(dense):6.1%} {raw:7,} bytes")
for name, share in ways.items():
    small = share(pruned)
    if small is not pruned:  # codebooks can be trained: win back what sharing cost
        small = train(small, optax.adam(3e-4), 200, dense, hard=0.1)
    with tempfile.TemporaryDirectory() as folder:
        size = jc.save(Path(folder) / "net.jxc", small)
    print(
        f"{name:20} {accuracy(small):6.1%} {size:7,} bytes, {raw / size:.1f}x smaller"
    )
