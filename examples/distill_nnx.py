"""Teaches a small NNX network with batch norm and dropout what a big one knows.

Which of six tunes is in a noisy recording? The teacher heard 2000 with labels. The
student hears the same, with 60 of the labels or with none but the teacher.
Takes about 20 seconds on one CPU core: `python examples/distill_nnx.py`.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxcomp as jc


STEPS = 300
TUNES = jnp.array([(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)])  # two pitches
LENGTH = 32


class Listener(nnx.Module):
    def __init__(self, width, rngs):
        self.conv1 = nnx.Conv(1, width, (7,), rngs=rngs)
        self.norm1 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (7,), strides=2, rngs=rngs)
        self.norm2 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1)
        self.out = nnx.Linear(width, len(TUNES), rngs=rngs)

    def __call__(self, x, rngs=None):
        x = nnx.relu(self.norm1(self.conv1(x[..., None])))
        x = nnx.relu(self.norm2(self.conv2(x))).mean(axis=1)
        return self.out(self.dropout(x, rngs=rngs))


def recordings(key, size):
    """x: float[size, LENGTH], a tune from anywhere in it on; label: int32[size]."""
    key_label, key_begin, key_noise = jax.random.split(key, 3)
    label = jax.random.randint(key_label, (size,), 0, len(TUNES))
    begin = jax.random.randint(key_begin, (size, 1), 0, LENGTH)
    time = (jnp.arange(LENGTH)[None] + begin) % LENGTH
    pitch = jnp.where(time < LENGTH // 2, *jnp.split(TUNES[label], 2, axis=1))
    x = jnp.sin(4 * jnp.pi * pitch * time / LENGTH)
    return x + 0.7 * jax.random.normal(key_noise, x.shape), label


def in_training(graph):
    def model(params, x, key):
        listener = nnx.merge(graph, params)
        listener.train()
        logits = listener(x, rngs=nnx.Rngs(key))
        # The batch statistics that it has just updated go into the params.
        return jc.distill.Outputs(logits, state=nnx.state(listener, nnx.BatchStat))

    return model


def in_use(graph):
    def model(params, x):
        listener = nnx.merge(graph, params)
        listener.eval()
        return listener(x)

    return model


def fit(step, params, teacher_params, x, label):
    state = tx.init(jc.split(params)[0])
    for key in jax.random.split(jax.random.key(5), STEPS):
        key_rows, key = jax.random.split(key)
        rows = jax.random.randint(key_rows, (64,), 0, len(x))
        batch = (x[rows], None if label is None else label[rows])
        params, state, _ = step(params, state, teacher_params, batch, key)
    return params


def show(name, graph, params):
    right = jax.jit(in_use(graph))(params, test_x).argmax(axis=-1) == test_label
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{name:33} {size:6,} numbers, {right.mean():.1%} right")


x, label = recordings(jax.random.key(0), 2000)
test_x, test_label = recordings(jax.random.key(1), 2000)
tx = optax.adam(3e-3)
big, params = nnx.split(Listener(24, nnx.Rngs(2)))  # all arrays: statistics too
little, start = nnx.split(Listener(8, nnx.Rngs(3)))

# Without the soft part a step only learns the labels.
step = jc.distill_step(in_training(big), in_use(big), tx, soft=None, hard=1.0)
taught = fit(step, params, params, x, label)
step = jc.distill_step(in_training(little), in_use(big), tx, soft=None, hard=1.0)
alone = fit(step, start, taught, x[:60], label[:60])
step = jc.distill_step(in_training(little), in_use(big), tx, hard=0.0)
pupil = fit(step, start, taught, x, None)

show("teacher", big, taught)
show("student on 60 labels", little, alone)
show("student on the teacher, no labels", little, pupil)
