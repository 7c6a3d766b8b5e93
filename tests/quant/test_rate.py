"""Grids to a rate: the file takes it, and no other of single codes does better."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.quant.rate import quantize_to_rate


NORMAL = jax.random.normal(jax.random.key(0), (300, 400))
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


def file_bits(tmp_path, node):
    """Bits of a weight in a file, but for what a file of nothing takes."""
    empty = jc.save(tmp_path / "w.jxc", {})
    return 8 * (jc.save(tmp_path / "w.jxc", {"w": node}) - empty) / node.size


@pytest.mark.parametrize("rate", [1.0, 2.0, 4.0])
def test_normal_weights_are_as_near_to_the_bound_as_single_codes_can_be(tmp_path, rate):
    node = quantize_to_rate(NORMAL, rate)
    taken = file_bits(tmp_path, node)
    assert rate - 0.03 <= taken <= rate + 0.01
    bound = -0.5 * np.log2(float(jnp.mean((node.dense() - NORMAL) ** 2)))
    assert taken - bound < 0.275  # 0.2546 is the limit of single codes


def test_a_hand_computed_case_with_room_for_all():
    # Codes 1, 2 and -4 of a third each, and the step that fits them.
    node = quantize_to_rate(jnp.array([0.5, 1.0, -2.0] * 40), 8.0)
    np.testing.assert_allclose(node.dense()[:3], [0.5, 1.0, -2.0], rtol=1e-3)


@pytest.mark.parametrize("settings", [{"axis": -1}, {"axis": 0, "group": 150}])
def test_scales_of_groups_are_in_proportion_to_their_size(tmp_path, settings):
    grown = NORMAL * jnp.exp2(jnp.arange(400.0) % 7)[None]
    node = quantize_to_rate(grown, 3.0, **settings)
    assert file_bits(tmp_path, node) <= 3.02
    if settings["axis"] == -1:
        scale = np.asarray(node.scale)[:, 0] / 2.0 ** (np.arange(400) % 7)
        assert scale.std() / scale.mean() < 0.1  # but for chance alike
        error = np.square(np.asarray(node.dense() - grown)).mean(axis=0)
        relative = error / 4.0 ** (np.arange(400) % 7)
        assert relative.max() < 2 * relative.mean()


def test_pruned_weights_stay_and_cost_little(tmp_path):
    pruned = jnp.where(jnp.abs(NORMAL) > 1.6449, NORMAL, 0)  # 90%
    node = quantize_to_rate(pruned, 1.0)
    assert not jnp.any(node.dense()[pruned == 0])
    assert file_bits(tmp_path, node) < 1.02
    dense = quantize_to_rate(NORMAL, 1.0)

    def error(node, x):
        return float(jnp.sum((node.dense() - x) ** 2) / jnp.sum(x**2))

    assert error(node, pruned) < error(dense, NORMAL) / 5


@given(hnp.arrays(np.float32, 60, elements=FLOATS))
def test_any_values_stay_finite_zeros_stay_and_signs_hold(x):
    x[::5] = 0
    node = quantize_to_rate(jnp.asarray(x), 12.0)
    dense = np.asarray(node.dense())
    assert np.isfinite(dense).all()
    assert not dense[x == 0].any()
    assert np.all(dense * np.sign(x) >= 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_are_rounded_in_float32(dtype):
    x = NORMAL.astype(dtype)
    node = quantize_to_rate(x, 4.0)
    assert node.dtype == dtype
    wide = x.astype(jnp.float32)
    error = float(jnp.mean((node.dense().astype(jnp.float32) - wide) ** 2))
    assert error < 0.0064  # 4 bits and 0.2546 bit of gap give 0.0056


@pytest.mark.parametrize(
    ("x", "rate", "text"),
    [
        (jnp.ones((2, 3)), 0, "needs a rate above 0, in bits per weight, got 0"),
        (
            jnp.ones((2, 3)),
            5.0,
            "above that of the scales alone, 5.333 bits per weight",
        ),
        (jnp.ones((2, 3)), 6.0, r"leaves something of float32\[2, 3\], got 6.0"),
        (jnp.zeros((0, 3)), 6.0, r"one at least, got float32\[0, 3\]"),
        (jnp.full((2, 3), jnp.nan), 9.0, r"finite values at hand.*float32\[2, 3\]"),
    ],
)
def test_what_cannot_be_is_an_error_that_says_why(x, rate, text):
    with pytest.raises(ValueError, match=text):
        quantize_to_rate(x, rate)


def test_it_needs_values_at_hand():
    with pytest.raises(ValueError, match="Call it outside jit"):
        jax.jit(lambda x: quantize_to_rate(x, 3.0))(NORMAL)
    with pytest.raises(TypeError, match="quantize_to_rate needs a floating array"):
        quantize_to_rate(jnp.arange(6), 3.0)


def test_on_a_tree_an_error_names_the_leaf():
    with pytest.raises(ValueError, match="leaf 'kernel'"):
        jc.quantize_tree({"kernel": jnp.ones((2, 3))}, quantize_to_rate, rate=6.0)
