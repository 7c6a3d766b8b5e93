"""Masks of leaves on eight devices: those of one device, without moving a leaf.

Run as a script, this file checks every row of `BUDGETS` on a mesh of devices.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcomp.prune import erk_budget, global_budget, lamp_budget, leaf_budget
from jaxcomp.prune.lamp import BINS


LEAVES = {  # sorted, as jit sorts them: on a tie the earlier leaf is kept
    "both": ((4, 5, 6), PartitionSpec("x", None, "y")),
    "columns": ((3, 40), PartitionSpec(None, "y")),
    "rows": ((16, 24), PartitionSpec("x")),
    "whole": ((7, 9), PartitionSpec()),
}
# The most numbers that may travel in one all-reduce.
BUDGETS = {
    global_budget: len(LEAVES),
    leaf_budget: len(LEAVES),
    erk_budget: len(LEAVES),
    lamp_budget: (BINS + 1) * len(LEAVES),
}


def sent(text):
    """The names of the collectives of a compiled program, and how many numbers each."""
    found = []
    for line in text.split("\n"):
        call = re.search(r"= (.*?) (all-|collective-|reduce-scatter)([a-z-]*)\(", line)
        if call:
            shapes = re.findall(r"\w+\[([\d,]*)\]", call[1])
            numbers = [np.prod([int(n) for n in s.split(",") if n]) for s in shapes]
            found.append((call[2] + call[3], int(sum(numbers))))
    return found


def spread_over(kind, scores):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    return {
        k: jax.device_put(s, NamedSharding(mesh, LEAVES[k][1]))
        for k, s in scores.items()
    }


def assert_masks(masks, expected, scores):
    for k, mask in masks.items():
        np.testing.assert_array_equal(mask, expected[k], err_msg=k)
        is_like = mask.sharding.is_equivalent_to(scores[k].sharding, mask.ndim)
        assert is_like, (k, mask.sharding)


def choose_on_a_mesh():
    """Masks on eight devices, under jit and not, beside those on one."""
    rng = np.random.default_rng(0)
    shapes = {k: shape for k, (shape, _) in LEAVES.items()}
    alone = {
        k: jnp.asarray(rng.integers(0, 4, s), "float32") for k, s in shapes.items()
    }
    auto, explicit = (spread_over(k, alone) for k in (AxisType.Auto, AxisType.Explicit))
    for budget, most in BUDGETS.items():
        expected = budget(alone, 0.6)
        compiled = jax.jit(lambda s, b=budget: b(s, 0.6)).lower(auto).compile()
        assert_masks(compiled(auto), expected, auto)
        assert_masks(budget(auto, 0.6), expected, auto)
        assert_masks(budget(explicit, 0.6), expected, explicit)
        collectives = sent(compiled.as_text())
        assert {name for name, _ in collectives} == {"all-reduce"}, collectives
        assert max(numbers for _, numbers in collectives) <= most, collectives
        print(budget.__name__)


def test_eight_devices_choose_what_one_does_and_only_sums_travel(on_eight_devices):
    assert on_eight_devices(__file__) == [budget.__name__ for budget in BUDGETS]


def test_what_a_compiled_program_sends_is_read_from_its_text():
    text = """
  %a.1 = (s32[], s32[3,4]{1,0}) all-reduce(%x, %y), channel_id=1
  ROOT %g = f32[16,24]{1,0} all-gather(%z), dimensions={0}
  %f = s32[9]{0} fusion(%all-reduce.3), kind=kLoop"""
    assert sent(text) == [("all-reduce", 13), ("all-gather", 384)]


if __name__ == "__main__":
    choose_on_a_mesh()
