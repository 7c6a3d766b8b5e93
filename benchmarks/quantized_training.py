"""Learned step sizes (LSQ) against absmax scales, 4 to 2 bits, on Fashion-MNIST.

    python benchmarks/quantized_training.py

LeNet-300-100, three seeds: every kernel and what flows into the hidden layers' kernels
has as many bits, the images and the biases stay in float32. Each net starts from the
trained float32 net of its seed and trains for 20 epochs more; so does the float32 net
beside it. Kernels have levels from -(2**(b-1) - 1) to 2**(b-1) - 1, of one scale. It
takes half an hour on one core.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomp as jc
from jaxcomp import demo


BATCH, EPOCHS = 256, 20
SEEDS = (1, 2, 3)
LAYERS = ("Dense_0", "Dense_1", "Dense_2")


def plain(x, step, bits, is_weight):
    return x


def learned(x, step, bits, is_weight):
    high = 2 ** (bits - 1) - 1 if is_weight else 2**bits - 1
    return jc.learned_step(x, step, -high if is_weight else 0, high)


def absmax(x, step, bits, is_weight):
    grid = jc.quantize if is_weight else jc.quantize_affine
    return jc.fake_quantize(x, grid, bits=bits, axis=None)


def logits(rounded, bits, params, x):
    for name in LAYERS:
        layer, steps = params["net"][name], params["steps"][name]
        if name != LAYERS[0]:  # what a relu gives, not the images
            x = rounded(jax.nn.relu(x), steps["inputs"], bits, False)
        x = x @ rounded(layer["kernel"], steps["kernel"], bits, True) + layer["bias"]
    return x


def first_steps(net, x, bits):
    """2 * mean(|v|) / sqrt(highest code), of kernels and of a batch of activations."""
    steps = {}
    for name in LAYERS:
        kernel = net[name]["kernel"]
        steps[name] = {
            "kernel": 2 * jnp.abs(kernel).mean() / jnp.sqrt(2 ** (bits - 1) - 1.0),
            "inputs": 2 * jnp.abs(x).mean() / jnp.sqrt(2.0**bits - 1),
        }
        x = jax.nn.relu(x @ kernel + net[name]["bias"])
    return steps


def fit(model, params, data, key):
    per_epoch = len(data.x) // BATCH
    tx = optax.adam(optax.cosine_decay_schedule(1e-3, EPOCHS * per_epoch))

    def step(carry, rows):
        def loss(params):
            z = model(params, data.x[rows])
            losses = optax.softmax_cross_entropy_with_integer_labels(z, data.y[rows])
            return losses.mean()

        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    epoch = jax.jit(partial(jax.lax.scan, step))
    carry = params, tx.init(params)
    for key_epoch in jax.random.split(key, EPOCHS):
        order = jax.random.permutation(key_epoch, len(data.x))[: per_epoch * BATCH]
        carry = epoch(carry, order.reshape(per_epoch, BATCH))[0]
    return carry[0]


def accuracy(model, params, data):
    """In batches as long as in training: the range of absmax depends on it."""
    batches = data.test_x[: len(data.test_x) // 250 * 250].reshape(-1, 250, 784)
    found = jax.lax.map(lambda x: model(params, x).argmax(-1), batches)
    return 100 * float(jnp.mean(found.reshape(-1) == data.test_y))


def main() -> None:
    data = demo.load_fashion(demo.FASHION)
    ways = {"float32": (plain, 32)}
    ways |= {f"LSQ, {b} bits": (learned, b) for b in (4, 3, 2)}
    ways |= {f"absmax, {b} bits": (absmax, b) for b in (4, 3, 2)}
    found = {name: [] for name in ways}
    for seed in SEEDS:
        key_init, key_dense, key_tune = jax.random.split(jax.random.key(seed), 3)
        net = demo.LeNet().init(key_init, data.x[:1])["params"]
        start = {"net": net, "steps": first_steps(net, data.x[:1000], 8)}
        dense = fit(partial(logits, plain, 32), start, data, key_dense)["net"]
        for name, (rounded, bits) in ways.items():
            steps = first_steps(dense, data.x[:1000], min(bits, 8))
            model = partial(logits, rounded, bits)
            params = fit(model, {"net": dense, "steps": steps}, data, key_tune)
            found[name].append(accuracy(model, params, data))
            print(f"seed {seed} {name}: {found[name][-1]:.2f}", flush=True)
    base = np.array(found["float32"])
    print("\n| weights and activations | accuracy | to float32 | sd |")
    print("| :-- | --: | --: | --: |")
    for name, scores in found.items():
        delta = np.array(scores) - base
        mean, spread = delta.mean(), delta.std(ddof=1)
        print(f"| {name} | {np.mean(scores):.2f} | {mean:+.2f} | {spread:.2f} |")


if __name__ == "__main__":
    main()
