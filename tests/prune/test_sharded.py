"""Masks of leaves that lie on eight devices: the same, where the leaves are, by counts.

Run as a script, this file is the process that has the devices.
"""

import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxcomp as jc


BUDGETS = {
    "leaf": jc.prune.leaf_budget,
    "global": jc.prune.global_budget,
    "erk": jc.prune.erk_budget,
    "lamp": jc.prune.lamp_budget,
    "units": jc.prune.in_units(jc.prune.global_budget),
    "2 of 4": jc.prune.nm_budget(2, 4, along=1),
}
SPREAD = {
    "a": PartitionSpec("rows", "columns"),
    "b": PartitionSpec("rows"),
    "c": PartitionSpec(None, "columns"),
    "d": PartitionSpec(),
}
MOVES = r"(all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
REDUCTION = r"= \(?([a-z0-9]+)\[([0-9,]*)\][^=]* all-reduce(?:-start)?\("


def check_on_eight_devices():
    """Prints each budget whose masks are right."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("rows", "columns"))
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.integers(-4, 5, (64, 48)).astype(np.float32))
        for name in SPREAD
    }
    apart = {
        name: jax.device_put(x, NamedSharding(mesh, SPREAD[name]))
        for name, x in params.items()
    }
    for name, budget in BUDGETS.items():
        masks = partial(jc.prune.masks, sparsity=0.5, budget=budget)
        one, many = masks(params), jax.jit(masks)(apart)
        for found in (many, masks(apart)):
            for path, mask in found.items():
                np.testing.assert_array_equal(mask, one[path])
        compiled = jax.jit(masks).lower(apart).compile().as_text()
        if name in ("leaf", "global", "erk"):
            for path, mask in many.items():
                assert mask.sharding.is_equivalent_to(apart[path].sharding, 2), path
        if name in ("leaf", "global", "erk", "lamp"):
            assert not re.findall(MOVES, compiled), re.findall(MOVES, compiled)
            sizes = [
                np.prod([int(n) for n in dims.split(",") if n])
                for _, dims in re.findall(REDUCTION, compiled)
            ]
            assert sizes, "no sum over the devices was found"
            assert max(sizes) <= 2**16, sizes
        print(name)


def test_masks_over_eight_devices_are_those_of_one_and_only_counts_travel():
    flags = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    )
    run = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:-1] == list(BUDGETS)


if __name__ == "__main__":
    check_on_eight_devices()
