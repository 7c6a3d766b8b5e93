"""One magnitude for each group, with exact zeros and hardly any bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.quant.coarse import quantize_binary, quantize_ternary


GRIDS = {"ternary": quantize_ternary, "binary": quantize_binary}
LAYOUTS = {
    "one scale": {},
    "axis": {"axis": -1},
    "ragged groups": {"axis": 0, "group": 4},
}
VALUES = st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-(2.0**90), 2.0**90, width=32)
SAMPLES = hnp.arrays(np.float32, (4, 6), elements=VALUES)


def normal(shape=(4, 6), seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def reference(name, x, axis=None, group=None):
    """The papers' formulas in float64, group by group."""
    lanes = x.astype(np.float64)
    lanes = lanes.reshape(1, -1) if axis is None else np.moveaxis(lanes, axis, 0)
    out = np.zeros_like(lanes)
    for lane, row in zip(lanes, out, strict=True):
        length = group or lane.size
        for at in range(0, lane.size, length):
            part = lane[at : at + length]
            live = np.abs(part[part != 0])
            mean = live.mean() if live.size else 1.0
            steps = np.sign(part) if name == "binary" else np.rint(part / mean)
            row[at : at + length] = np.clip(steps, -1, 1) * mean
    return out.reshape(x.shape) if axis is None else np.moveaxis(out, 0, axis)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GRIDS)
def test_it_is_the_formula_of_the_paper(name, layout):
    x = np.asarray(normal()).copy()
    x[1, ::2] = 0
    small = GRIDS[name](jnp.asarray(x), **LAYOUTS[layout])
    want = reference(name, x, **LAYOUTS[layout])
    np.testing.assert_allclose(small.dense(), want, rtol=1e-6)
    assert small.bits == 2


def test_an_example_by_hand():
    x = jnp.array([[0.1, -0.9], [2.0, 1.0]])  # the mean magnitude is 1
    np.testing.assert_allclose(quantize_ternary(x).dense(), [[0, -1], [1, 1]])
    np.testing.assert_allclose(quantize_binary(x).dense(), [[1, -1], [1, 1]])
    y = quantize_binary(x, axis=-1).dense()
    np.testing.assert_allclose(y, [[1.05, -0.95], [1.05, 0.95]], rtol=1e-6)


@given(SAMPLES, st.sampled_from(list(GRIDS)), st.sampled_from(list(LAYOUTS)))
@settings(max_examples=40)
def test_zeros_and_signs_are_exact_and_a_second_rounding_changes_nothing(
    x, name, layout
):
    def grid(x):
        return GRIDS[name](x, **LAYOUTS[layout])

    small = grid(jnp.asarray(x))
    y = np.asarray(small.dense())
    assert np.isfinite(y).all()
    assert np.all(np.asarray(small.scale) > 0)
    assert not y[x == 0].any()
    if name == "binary":
        np.testing.assert_array_equal(np.sign(y), np.sign(x))
    else:
        assert np.all(y * np.sign(x) >= 0)
    np.testing.assert_allclose(grid(small.dense()).dense(), y, rtol=1e-6)


# XLA takes subnormal numbers for zeros, which have no say in the scale.
NORMAL = st.floats(-4, 4, width=32, allow_subnormal=False)


@given(hnp.arrays(np.float32, (4, 6), elements=NORMAL))
def test_no_binary_values_have_a_smaller_error(x):
    def error(scale):
        return np.sum((x - np.sign(x) * np.float64(scale)) ** 2)

    scale = float(quantize_binary(jnp.asarray(x)).scale[0, 0])
    for other in (scale * 0.99, scale * 1.01):
        assert error(scale) <= error(other) + 1e-6


def test_zeros_have_no_say_in_the_scale():
    x = normal()
    padded = jnp.concatenate([x, jnp.zeros((20, 6))])
    for grid in GRIDS.values():
        np.testing.assert_array_equal(grid(padded).dense()[:4], grid(x).dense())


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
    "x",
    [np.zeros((2, 3)), np.zeros((0, 3)), np.float64(-2.5), np.full((2, 2), 3e38)],
    ids=["zeros", "nothing", "one number", "huge"],
)
def test_the_ends_of_what_there_is(name, x):
    x = jnp.asarray(x, jnp.float32)
    small = GRIDS[name](x)
    assert np.all(np.asarray(small.scale) > 0)
    np.testing.assert_array_equal(small.dense(), x)


@pytest.mark.parametrize("name", GRIDS)
def test_narrow_arrays_are_averaged_in_float32(name, strict):
    x = normal((64, 64)).astype(jnp.bfloat16)
    small = GRIDS[name](x)
    assert small.dense().dtype == jnp.bfloat16
    mean = np.abs(np.asarray(x, np.float64)).mean()
    assert float(small.scale[0, 0]) == pytest.approx(mean, rel=2**-8)


@pytest.mark.parametrize("name", GRIDS)
def test_jit_vmap_and_the_other_platforms(name, strict):
    x = normal((3, 4, 6))
    each = jnp.stack([GRIDS[name](row, axis=-1, group=3).dense() for row in x])

    def both(x):
        return jax.vmap(lambda row: GRIDS[name](row, axis=-1, group=3))(x).dense()

    np.testing.assert_array_equal(jax.jit(both)(x), each)
    jax.export.export(jax.jit(both), platforms=("cpu", "cuda", "tpu"))(x)


@pytest.mark.parametrize("name", GRIDS)
def test_a_tree_trains_prunes_saves_and_loads(name, tmp_path):
    x = jnp.where(normal() > 0.5, 0, normal())
    grid = GRIDS[name]
    y, grads = jax.value_and_grad(lambda x: jnp.sum(jc.fake_quantize(x, grid) ** 2))(x)
    dense = grid(x).dense()
    assert float(y) == pytest.approx(float(jnp.sum(dense**2)))
    np.testing.assert_allclose(grads, 2 * dense, rtol=1e-6)
    small = jc.quantize_tree({"kernel": x}, grid, axis=-1)
    jc.save(tmp_path / "small.jxc", small)
    loaded = jc.load(tmp_path / "small.jxc")
    np.testing.assert_array_equal(loaded["kernel"].dense(), small["kernel"].dense())
    pruned = jc.prune_tree(small, theta=10.0)
    assert not np.asarray(pruned["kernel"].dense()).any()


def test_a_binary_leaf_takes_one_bit_in_a_file():
    leaf = jc.report({"kernel": quantize_binary(normal((256, 128)))}).leaves[0]
    assert leaf.entropy == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", GRIDS)
def test_bad_arguments_are_errors(name):
    grid = GRIDS[name]
    with pytest.raises(TypeError, match=f"quantize_{name} needs a floating array"):
        grid(jnp.ones((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=f"quantize_{name} needs axes of an array of"):
        grid(jnp.ones((2, 3)), axis=2)
    with pytest.raises(ValueError, match=f"quantize_{name} needs 1 <= group"):
        grid(jnp.ones((2, 3)), group=0)


def test_a_threshold_takes_the_mean_of_what_is_above_it():
    x = jnp.array([0.0, 0.6, -1.0, 2.0, -0.4])  # of what is not 0 the mean is 1
    node = jc.quantize_ternary(x, threshold=0.7)
    np.testing.assert_allclose(node.dense(), [0, 0, -1.5, 1.5, 0])
    wide = jc.quantize_ternary(x, threshold=0.0)
    np.testing.assert_allclose(wide.dense(), [0, 1, -1, 1, -1])


def test_a_threshold_above_all_leaves_zeros_and_a_bad_one_is_an_error():
    x = jnp.array([[1.0, -1.0], [1e37, -1e37]])
    assert not jc.quantize_ternary(x, axis=0, threshold=3.0).dense().any()
    np.testing.assert_allclose(
        jc.quantize_ternary(x, axis=0, threshold=0.7).dense(), x, rtol=1e-6
    )
    for bad in (-0.1, np.inf, np.nan):
        with pytest.raises(ValueError, match="quantize_ternary needs a"):
            jc.quantize_ternary(x, threshold=bad)
