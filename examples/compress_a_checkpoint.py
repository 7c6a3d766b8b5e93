"""Compresses a checkpoint by path: prunes, shares, quantizes; saves and loads it.

Takes about 8 seconds on one CPU core: `python examples/compress_a_checkpoint.py`.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc


def make_params(key, vocabulary=2000, width=128, blocks=1):
    """Weights shaped like those of a small transformer, with tails as trained ones."""
    keys = iter(jax.random.split(key, 1 + 6 * blocks))

    def kernel(*shape):
        return {"kernel": jax.random.laplace(next(keys), shape) / np.sqrt(shape[0])}

    tree = {"embed": kernel(vocabulary, width)}
    for i in range(blocks):
        tree[f"block_{i}"] = {
            "attn": {name: kernel(width, width) for name in ("q", "k", "v", "out")},
            "mlp": {"up": kernel(width, 4 * width), "down": kernel(4 * width, width)},
            "norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
        }
    return tree


params = make_params(jax.random.key(0))
is_mlp = jc.path_matches("block_.*/mlp/.*")

# Of several calls the first that takes a leaf wins.
masks = jc.prune.masks(params, 0.8, where=is_mlp)
small = jc.apply_masks(params, masks)
small = jc.share_tree(small, clusters=16, where=is_mlp)
small = jc.quantize_tree(small, bits=8, axis=0, where=jc.path_matches("embed/.*"))
small = jc.quantize_tree(small, jc.quantize_affine, bits=4, group=64)

with tempfile.TemporaryDirectory() as folder:
    dense_bytes = jc.save(Path(folder) / "dense.jxc", params)
    small_bytes = jc.save(Path(folder) / "small.jxc", small)
    again = jc.load(Path(folder) / "small.jxc")

for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(small), strict=True):
    np.testing.assert_array_equal(ours, theirs)

found = jc.report(small, params)
print(found)
print(f"float32     {found.total.dense_bytes:9,} bytes")
print(f"dense file  {dense_bytes:9,} bytes, lossless")
print(f"in memory   {found.total.nbytes:9,} bytes, {found.total.ratio:.1f}x smaller")
ratio = found.total.dense_bytes / small_bytes
print(f"small file  {small_bytes:9,} bytes, {ratio:.1f}x smaller")
