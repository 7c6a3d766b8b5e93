"""How far files are from the rate-distortion bound of Gaussian weights.

    python benchmarks/rate_distortion.py

A million of them, sizes of whole files; half a minute on one core. The bound of squared
error D at R bits per weight is R = log2(variance / D) / 2.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc


def main() -> None:
    x = np.random.default_rng(0).standard_normal((1000, 1000), np.float32)
    rows = [
        *[
            (f"`share_to_rate`, {r} bits", r, rate)
            for r in (0.7, 1.1, 2.1, 3.1, 4.1, 6.1)
        ],
        *[(f"`share_tree`, {k} values", k, clusters) for k in (4, 8, 16)],
        *[(f"`quantize_tree`, {b} bits", b, bits) for b in (3, 4)],
        ("`quantize_tree`, step 0.5", 0.5, step),
    ]
    print(
        "| | file, bits per weight | signal to noise, dB | above the bound | seconds |"
    )
    print("| :-- | --: | --: | --: | --: |")
    for name, setting, make in rows:
        start = time.perf_counter()
        small = jax.block_until_ready(make(setting)({"kernel": jnp.asarray(x)}))
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            size = 8 * jc.save(Path(folder) / "w.jxc", small) / x.size
            dense = np.asarray(jc.densify(jc.load(Path(folder) / "w.jxc"))["kernel"])
        ratio = np.var(x, dtype=float) / np.mean(np.square(dense - x, dtype=float))
        print(
            f"| {name} | {size:.4f} | {10 * np.log10(ratio):.2f} "
            f"| {size - np.log2(ratio) / 2:.4f} | {seconds:.2f} |"
        )


def rate(bits: float):
    return partial(jc.share_to_rate, rate=bits)


def clusters(count: int):
    return partial(jc.share_tree, clusters=count)


def bits(width: int):
    return partial(jc.quantize_tree, bits=width, axis=None)


def step(size: float):
    return partial(jc.quantize_tree, grid=jc.quantize_step, step=size)


if __name__ == "__main__":
    main()
