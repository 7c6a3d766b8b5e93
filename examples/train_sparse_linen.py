"""Prunes an MLP to 90% zeros while it trains on digits, and trains a dense one beside.

Takes about 20 seconds on one CPU core: `python examples/train_sparse_linen.py`.
It needs scikit-learn for the digits.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import jaxcomp as jc


STEPS = 1500
END = 1000  # the last 500 steps win back what the last cut cost
BATCH = 100
TRAINED = 1200  # of 1,797 images; the others are for the test


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (128, 64):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


pixels, digits = load_digits(return_X_y=True)
order = jax.random.permutation(jax.random.key(0), len(digits))
images = jnp.asarray(pixels, jnp.float32)[order] / 16
labels = jnp.asarray(digits, jnp.int32)[order]
x, label = images[:TRAINED], labels[:TRAINED]
test_x, test_label = images[TRAINED:], labels[TRAINED:]

model = MLP()
start = model.init(jax.random.key(1), x)["params"]


@jax.jit
def step(state, key):
    batch = jax.random.randint(key, (BATCH,), 0, TRAINED)

    def loss(params):
        logits = state.apply_fn({"params": params}, x[batch])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label[batch])
        return losses.mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def train(tx):
    state = TrainState.create(apply_fn=model.apply, params=start, tx=tx)
    for key in jax.random.split(jax.random.key(2), STEPS):
        state = step(state, key)
    return state


def accuracy(params):
    logits = model.apply({"params": params}, test_x)
    return float(jnp.mean(logits.argmax(axis=-1) == test_label))


sparsity = optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=END)
link = jc.prune_gradually(sparsity, every=50, budget=jc.prune.lamp_budget)
dense = train(optax.adam(2e-3))
sparse = train(optax.chain(optax.adam(2e-3), link))
jc.testing.assert_sparsity(sparse.params, 0.9, state=sparse.opt_state)

print(f"dense      {accuracy(dense.params):.1%}")
print(f"90% zeros  {accuracy(sparse.params):.1%}")
print(jc.report(sparse.params, state=sparse.opt_state))
