"""Gives an NNX model four values in each kernel, and fine-tunes the values.

Takes about 15 seconds on one CPU core: `python examples/share_and_finetune.py`.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxcomp as jc


def bars(key, size):
    """Noisy, shifted bars: x float[size, 64], label int32[size] of 8 directions."""
    key_label, key_shift, key_noise = jax.random.split(key, 3)
    label = jax.random.randint(key_label, (size,), 0, 8)
    shift = jax.random.uniform(key_shift, (size, 1, 1), minval=-1.5, maxval=1.5)
    rows, columns = jnp.meshgrid(jnp.arange(8) - 3.5, jnp.arange(8) - 3.5)
    angle = (label * jnp.pi / 8)[:, None, None]
    away = rows * jnp.sin(angle) - columns * jnp.cos(angle) - shift
    x = jnp.exp(-(away**2)).reshape(size, 64)
    return x + 0.4 * jax.random.normal(key_noise, x.shape), label


def train(graph, tree, steps, rate):
    """Trains what is floating in a tree: arrays, or the codebooks of nodes."""
    trainable, rest = jc.split(tree)
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(trainable, state, rest):
        def loss(trainable):
            model = nnx.merge(graph, jc.densify(jc.join(trainable, rest)))
            losses = optax.softmax_cross_entropy_with_integer_labels(model(x), label)
            return losses.mean()

        updates, state = tx.update(jax.grad(loss)(trainable), state)
        return optax.apply_updates(trainable, updates), state

    state = tx.init(trainable)
    for _ in range(steps):
        trainable, state = step(trainable, state, rest)
    return jc.join(trainable, rest)


def accuracy(tree):
    model = nnx.merge(graph, jc.densify(tree))
    return float(jnp.mean(model(test_x).argmax(axis=-1) == test_label))


x, label = bars(jax.random.key(0), 2000)
test_x, test_label = bars(jax.random.key(1), 4000)
rngs = nnx.Rngs(0)
graph, start = nnx.split(
    nnx.Sequential(
        nnx.Linear(64, 48, rngs=rngs),
        jax.nn.relu,
        nnx.Linear(48, 48, rngs=rngs),
        jax.nn.relu,
        nnx.Linear(48, 8, rngs=rngs),
    )
)

dense = train(graph, start, steps=200, rate=3e-3)
shared = jc.share_tree(dense, clusters=4)
tuned = train(graph, shared, steps=200, rate=3e-3)
jc.testing.assert_at_most_k_values(tuned, 4)
model = nnx.merge(graph, jc.densify(tuned))  # an ordinary model again

print(f"dense                {accuracy(dense):.1%}")
print(f"4 values in a kernel {accuracy(shared):.1%}")
print(f"values fine-tuned    {accuracy(tuned):.1%}")
print(jc.report(tuned, dense))
