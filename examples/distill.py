"""Teaches a small network what a big one knows, from inputs without labels.

The teacher saw 4000 labels. The student sees 60 of them, or none but the teacher.
Takes about 15 seconds on one CPU core: `python examples/distill.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxcomp as jc


STEPS = 600
LABELLED = 60


class MLP(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(4)(x)


def checkers(key, size):
    """x: float[size, 2] in [-2, 2), label: int32[size] of 4 colours in 16 squares."""
    x = jax.random.uniform(key, (size, 2), minval=-2.0, maxval=2.0)
    square = jnp.floor(x).astype(jnp.int32)
    return x, (square[:, 0] + 2 * square[:, 1]) % 4


big, little = MLP(128), MLP(24)
x, label = checkers(jax.random.key(0), 4000)
test_x, test_label = checkers(jax.random.key(1), 4000)
tx = optax.adam(5e-3)


def teacher(params, x):
    return big.apply({"params": params}, x)


def student(params, x):
    return little.apply({"params": params}, x)


def train(model, params, x, label):
    @jax.jit
    def step(params, state, x, label):
        def loss(params):
            losses = optax.softmax_cross_entropy_with_integer_labels(
                model(params, x), label
            )
            return losses.mean()

        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state, x, label)
    return params


def accuracy(model, params):
    return float(jnp.mean(model(params, test_x).argmax(axis=-1) == test_label))


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


taught = train(teacher, big.init(jax.random.key(2), x)["params"], x, label)
start = little.init(jax.random.key(3), x)["params"]
alone = train(student, start, x[:LABELLED], label[:LABELLED])

step = jc.distill_step(student, teacher, tx, temperature=2.0, hard=0.0)
params, state = start, tx.init(start)
for _ in range(STEPS):
    params, state, metrics = step(params, state, taught, (x, None))

print(f"teacher, {count(taught):,} weights         {accuracy(teacher, taught):.1%}")
print(f"student, {count(start):,} weights")
print(f"  on {LABELLED} labels               {accuracy(student, alone):.1%}")
print(f"  on the teacher, no labels  {accuracy(student, params):.1%}")
