"""Trains an NNX model 2:4 sparse and in 4 bits at once, over latent weights.

Takes about 20 seconds on one CPU core: `python examples/train_sparse_nnx.py`.
It needs scikit-learn for the digits.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jaxcomp as jc


STEPS = 1000
BATCH = 100
TRAINED = 1200  # of 1,797 images; the others are for the test


def make_model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(64, 128, rngs=rngs),
        jax.nn.relu,
        nnx.Linear(128, 64, rngs=rngs),
        jax.nn.relu,
        nnx.Linear(64, 10, rngs=rngs),
    )


pixels, digits = load_digits(return_X_y=True)
order = jax.random.permutation(jax.random.key(0), len(digits))
images = jnp.asarray(pixels, jnp.float32)[order] / 16
labels = jnp.asarray(digits, jnp.int32)[order]
x, label = images[:TRAINED], labels[:TRAINED]
test_x, test_label = images[TRAINED:], labels[TRAINED:]


def four_bits(model):
    """The model with the weights that 4 bits leave, and the gradient of all."""
    graph, params = nnx.split(model, nnx.Param)
    rounded = jc.map_where(lambda w: jc.fake_quantize(w, bits=4), params)
    return nnx.merge(graph, rounded)


def train(tx, view):
    @nnx.jit
    def step(model, optimizer, key):
        batch = jax.random.randint(key, (BATCH,), 0, TRAINED)

        def loss(model):
            losses = optax.softmax_cross_entropy_with_integer_labels(
                view(model)(x[batch]), label[batch]
            )
            return losses.mean()

        optimizer.update(model, nnx.grad(loss)(model))

    model = make_model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for key in jax.random.split(jax.random.key(1), STEPS):
        step(model, optimizer, key)
    return model


def show(name, model, params):
    graph = nnx.graphdef(model)
    logits = nnx.merge(graph, jc.densify(params))(test_x)
    right = float(jnp.mean(logits.argmax(axis=-1) == test_label))
    with tempfile.TemporaryDirectory() as folder:
        size = jc.save(Path(folder) / "mlp.jxc", params)
    print(f"{name:16} accuracy {right:.1%}, file {size:,} bytes")


adam = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
ramp = optax.linear_schedule(0.0, 0.5, STEPS // 2)
tx = jc.prune_straight_through(adam, ramp, decay=2e-4, budget=jc.prune.nm_budget(2, 4))
dense = train(adam, view=lambda model: model)
sparse = train(tx, view=four_bits)
params = nnx.state(sparse, nnx.Param)
small = jc.quantize_tree(params, bits=4)
jc.testing.assert_nm_sparse(small, 2, 4)

show("dense", dense, nnx.state(dense, nnx.Param))
show("2:4 and 4 bits", sparse, small)
print(jc.report(small, params))
