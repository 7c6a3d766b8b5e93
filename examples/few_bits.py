"""Stores the kernels of a small net in ten formats: bits, file and what it costs.

Takes about ten seconds on one CPU core: `python examples/few_bits.py`.
"""

import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import jaxcomp as jc


KEYS = jax.random.split(jax.random.key(0), 5)
FORMATS = {
    "8 bits": partial(jc.quantize, bits=8),
    "float8": jc.quantize_float,
    "4 bits": partial(jc.quantize, bits=4, group=32),
    "NF4": jc.quantize_nf4,
    "MXFP4": partial(jc.quantize_mx, exponent=jc.quant.best_exponent),
    "NVFP4": jc.quantize_nvfp4,
    "16 values": partial(jc.palettize, clusters=16),
    "64 pairs": partial(jc.palettize_vectors, KEYS[4], clusters=64, width=2),
    "3 bits in the file": partial(jc.quantize_to_rate, rate=3.0),
    "ternary": partial(jc.quantize_ternary, axis=-1, threshold=0.7),
}


def model(params, x):
    x = jnp.tanh(x @ params["in"]["kernel"])
    x = jnp.tanh(x @ params["hidden"]["kernel"])
    return x @ params["out"]["kernel"]


@jax.jit
def step(params, state):
    def loss(params):
        return jnp.mean((model(params, x) - y) ** 2)

    value, slopes = jax.value_and_grad(loss)(params)
    updates, state = tx.update(slopes, state)
    return optax.apply_updates(params, updates), state, value


lecun = jax.nn.initializers.lecun_normal()
shapes = {"in": (8, 128), "hidden": (128, 128), "out": (128, 4)}
params = {
    name: {"kernel": lecun(key, shape)}
    for (name, shape), key in zip(shapes.items(), KEYS, strict=False)
}
x = jax.random.normal(KEYS[3], (2048, 8))
y = jnp.stack([x[:, 0] * x[:, 1], jnp.sin(2 * x[:, 2]), x[:, 3] ** 2, x[:, 4]], axis=1)
tx = optax.adam(3e-3)
state = tx.init(params)
for _ in range(400):
    params, state, value = step(params, state)

print(f"{'format':20} {'bits':>6} {'bytes':>7} {'loss':>7}")
print(f"{'float32':20} {32:6} {'':7} {value:7.4f}")
with tempfile.TemporaryDirectory() as folder:
    for name, make in FORMATS.items():
        small = jc.map_where(make, params)
        bits = jc.report(small).total.bits
        size = jc.save(Path(folder) / "net.jxc", small)
        error = jnp.mean((model(jc.densify(small), x) - y) ** 2)
        print(f"{name:20} {bits:6.2f} {size:7,} {error:7.4f}")
