"""Bad input, through the tree functions: the documented result, or one clear error.

An error names the function, the leaf, the index and the value, and says what to do.
The details of each function are tested beside it; this is the table that a user meets.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc


GOOD = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def tree(bad):
    return {"good": {"kernel": jnp.asarray(GOOD)}, "bad": {"kernel": bad}}


def spoilt(value):
    return jnp.asarray(GOOD).at[1, 2].set(value)


KEY = jax.random.key(0)


def mapped(fn):
    return lambda t: jc.map_where(fn, t, caller=fn.__name__)


def grid(fn, **settings):
    return lambda t: jc.quantize_tree(t, partial(fn, **settings))


def by_score(score):
    return lambda t: jc.apply_masks(t, jc.prune.masks(t, 0.5, score=score))


def by_budget(budget):
    return lambda t: jc.apply_masks(t, jc.prune.masks(t, 0.5, budget=budget))


EACH = {
    "prune_tree": lambda t: jc.prune_tree(t, 0.5),
    "clip_tree": lambda t: jc.clip_tree(t, -0.5, 0.5),
    "masks": lambda t: jc.prune.masks(t, 0.5),
    "quantize_tree": lambda t: jc.quantize_tree(t, bits=4),
    "quantize_tree searched": lambda t: jc.quantize_tree(t, jc.quantize_searched),
    "share_tree": lambda t: jc.share_tree(t, clusters=4),
    "share_to_rate": lambda t: jc.share_to_rate(t, 3.0),
    "tie_layers": lambda t: jc.tie_layers(t, [("good", "bad")]),
}
# What else lifts a function to a tree: all of it by `map_where`, `masks` or the like.
MORE = {
    "masks of units": by_score(jc.prune.unit_entropy()),
    "masks by density": by_score(jc.prune.unit_density()),
    "masks by deviations": by_score(jc.prune.deviations),
    "masks of random units": by_score(jc.prune.random_units(KEY)),
    "masks by LAMP": by_budget(jc.prune.lamp_budget),
    "masks by ERK": by_budget(jc.prune.erk_budget),
    "masks 1:2": by_budget(jc.prune.nm_budget(1, 2)),
    "masks_above": lambda t: jc.apply_masks(t, jc.prune.masks_above(t, 0.5)),
    "quantize_tree affine": grid(jc.quantize_affine, bits=3, group=32),
    "quantize_tree percentile": grid(
        jc.quantize, bits=4, reach=jc.quant.percentile(90), top=7.5
    ),
    "quantize_tree least error": grid(
        jc.quantize_affine, bits=2, reach=jc.quant.least_error()
    ),
    "quantize_tree double": grid(
        jc.quantize, bits=4, group=2, scales=partial(jc.quantize_affine, axis=None)
    ),
    "quantize_tree step": grid(jc.quantize_step, step=0.25, bits=8),
    "quantize_tree interval": grid(jc.quantize_interval, lo=-1, hi=1),
    "quantize_tree ternary": grid(jc.quantize_ternary, threshold=0.7),
    "quantize_tree binary": grid(jc.quantize_binary),
    "quantize_tree stochastic": grid(partial(jc.quantize_stochastically, KEY), bits=4),
    "quantize_tree float8": grid(jc.quantize_float),
    "quantize_tree NF4": grid(jc.quantize_nf4),
    "quantize_tree MXFP4": grid(jc.quantize_mx, exponent=jc.quant.best_exponent),
    "quantize_tree MXFP8": grid(jc.quantize_mx, dtype=jnp.float8_e5m2),
    "quantize_tree NVFP4": grid(jc.quantize_nvfp4),
    "quantize_tree bfloat16": grid(jc.quant.to_float, dtype=jnp.bfloat16),
    "quantize_tree to a rate": grid(jc.quantize_to_rate, rate=60.0),
    "palettize zero": mapped(
        lambda x: jc.palettize(x, 4, centroids=jc.share.zero_centroids)
    ),
    "palettize exact": mapped(
        lambda x: jc.palettize(x, 4, centroids=jc.share.exact_centroids)
    ),
    "palettize Lloyd": mapped(lambda x: jc.palettize(x, 4, centroids=jc.share.lloyd)),
    "palettize_at_price": mapped(lambda x: jc.palettize_at_price(x, 1e-3)),
    "palettize_rows": mapped(lambda x: jc.palettize_rows(x, 3)),
    "palettize_vectors": mapped(lambda x: jc.palettize_vectors(KEY, x, 4, 2)),
    "share_together": lambda t: jc.share_together(t, 4),
    "pack_nonzero": mapped(jc.pack_nonzero),
    "factorize": mapped(lambda x: jc.factorize(x, 1)),
    "share_basis": lambda t: jc.share_basis(t, [("good/kernel", "bad/kernel")], 2),
    "similar_layers": lambda t: jc.share.similar_layers(t, ["good", "bad"], 1),
}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", EACH)
def test_one_bad_value_is_an_error_that_names_leaf_index_and_value(name, value):
    text = (
        rf"{name.split()[0]} needs finite values, but leaf 'bad/kernel' "
        rf"float32\[3, 4\] holds {value} at index \(1, 2\) \(1 such of 12\)\. "
        "Mend the leaf"
    )
    with pytest.raises(ValueError, match=text):
        EACH[name](tree(spoilt(value)))


@pytest.mark.parametrize("name", EACH)
def test_a_leaf_of_zeros_stays_a_leaf_of_zeros(name):
    if name == "masks":
        masks = EACH[name](tree(jnp.zeros((3, 4))))
        assert int(masks["bad"]["kernel"].sum()) == 6  # exactly half, by index
        return
    dense = jc.densify(EACH[name]({"good": tree(0)["good"]} | tree(jnp.zeros((3, 4)))))
    half = dense["good"]["kernel"] if name == "tie_layers" else 0
    np.testing.assert_array_equal(dense["bad"]["kernel"], half)


@pytest.mark.parametrize("name", ["quantize_tree", "share_tree"])
def test_integers_are_left_out_by_default_and_an_error_when_asked_for(name):
    integers = tree(jnp.arange(12).reshape(3, 4))
    assert EACH[name](integers)["bad"]["kernel"] is integers["bad"]["kernel"]
    asked = {
        "quantize_tree": lambda: jc.quantize_tree(
            integers, where=jc.path_matches("bad/.*")
        ),
        "share_tree": lambda: jc.share_tree(integers, where=jc.path_matches("bad/.*")),
    }
    text = r"needs a floating array, got int32\[3, 4\].*leaf 'bad/kernel'"
    with pytest.raises(TypeError, match=text):
        asked[name]()


def test_a_leaf_of_no_dimensions_is_left_out_by_default_and_works_when_asked_for():
    scalar = tree(jnp.float32(0.75))
    assert jc.quantize_tree(scalar)["bad"]["kernel"] is scalar["bad"]["kernel"]
    every = jc.path_matches(".*")
    assert float(
        jc.densify(jc.quantize_tree(scalar, where=every))["bad"]["kernel"]
    ) == (pytest.approx(0.75))
    assert (
        float(jc.densify(jc.share_tree(scalar, where=every))["bad"]["kernel"]) == 0.75
    )


def test_an_empty_leaf_comes_back_empty_or_is_an_error_that_names_it():
    empty = tree(jnp.zeros((0, 4)))
    for name in ("prune_tree", "clip_tree", "quantize_tree"):
        assert jc.densify(EACH[name](empty))["bad"]["kernel"].shape == (0, 4)
    with pytest.raises(ValueError, match="at least one value.*leaf 'bad/kernel'"):
        EACH["share_tree"](empty)


def test_ragged_groups_are_padded_and_counted():
    small = jc.quantize_tree(tree(jnp.asarray(GOOD)), bits=4, axis=-1, group=2)
    node = small["bad"]["kernel"]
    assert node.shape == (3, 4) and node.scale.shape == (4, 2)
    assert node.nbits() == 4 * 2 * (2 * 4 + 32)  # the second group of each is padded
    off = np.abs(jc.densify(small)["bad"]["kernel"] - GOOD)
    assert off.max() <= float(node.scale.max()) * 0.51


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range_are_an_error_that_names_the_leaf(bits):
    text = rf"quantize needs 2 <= bits <= 8, got {bits}\. \(leaf 'bad/kernel'\)"
    with pytest.raises(ValueError, match=text):
        jc.quantize_tree(tree(jnp.asarray(GOOD)), bits=bits)


def test_more_clusters_than_values_keep_every_value():
    small = jc.share_tree(tree(jnp.asarray(GOOD)), clusters=100)
    np.testing.assert_array_equal(small["bad"]["kernel"].dense(), GOOD)
    assert small["bad"]["kernel"].codebook.size == 12


@pytest.mark.parametrize("name", [name for name in EACH if name != "tie_layers"])
def test_a_where_that_selects_nothing_lists_real_paths(name):
    vectors = {"a": {"bias": jnp.ones(3)}, "b": {"scale": jnp.ones(3)}}
    with pytest.raises(
        ValueError, match="selected none of the 2 leaves, which are a/bi"
    ):
        EACH[name](vectors)


def test_a_failed_call_leaves_its_input_as_it_was():
    bad = tree(spoilt(np.nan))
    before = [np.asarray(leaf).tobytes() for leaf in (bad["good"]["kernel"],)]
    with pytest.raises(ValueError):
        jc.share_tree(bad)
    assert [np.asarray(bad["good"]["kernel"]).tobytes()] == before


def test_a_truncated_and_a_foreign_file_are_errors_that_name_the_file(tmp_path):
    file = tmp_path / "model.jxc"
    jc.save(file, tree(jnp.asarray(GOOD)))
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"whole safetensors file, but .*model\.jxc"):
        jc.load(file)
    file.write_bytes(b"PK\x03\x04 some archive, not a model at all")
    with pytest.raises(ValueError, match=r"model\.jxc .* something else"):
        jc.load(file)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", MORE)
def test_no_function_takes_a_bad_value(name, value):
    text = (
        r"needs finite values, but leaf 'bad/kernel' float32\[3, 4\] holds "
        rf"{value} at index \(1, 2\)"
    )
    with pytest.raises(ValueError, match=text):
        MORE[name](tree(spoilt(value)))


# Values that a user may have; a new shape would have to be compiled for each function.
ODD = {
    "zeros": np.zeros((3, 4)),
    "constant": np.full((3, 4), 0.37),
    "subnormal": np.full((3, 4), 1e-41),
    "huge": np.where(np.eye(3, 4), 1e37, -1e37),
    "far apart": np.where(np.eye(3, 4), 1e30, 1e-30),
}
ENDS = [0.0, -0.0, 1e37, -1e37, 1e-37, 1e-41, 3e38, 1e30, 1e-30]
DRAWN = hnp.arrays(
    np.float32,
    (3, 4),
    elements=st.sampled_from(ENDS) | st.floats(-10, 10, width=32),
)
# What is refused, and what its error says.
REFUSED = {
    "quantize_tree step": (lambda x: abs(x).max() > 10, "needs .* bits|finite values"),
    "palettize_vectors": (lambda x: (x == 0).any(), "zeros only where all of a vector"),
    "factorize": (lambda x: (x == 0).any(), "cannot keep the exact zeros"),
    "share_basis": (lambda x: (x == 0).any(), "cannot keep the exact zeros"),
}
EVERY = EACH | MORE


@pytest.mark.parametrize("name", [n for n in EVERY if n != "similar_layers"])
@given(st.sampled_from(list(ODD.values())) | DRAWN)
def test_any_finite_values_give_finite_ones_and_zeros_stay(name, x):
    x = x.astype(np.float32)
    try:
        found = EVERY[name](tree(jnp.asarray(x)))
    except ValueError as error:
        may, text = REFUSED[name]
        assert may(x) and re.search(f"({text}).*bad/kernel", str(error)), error
        return
    if name == "masks":
        found = jc.apply_masks(tree(jnp.asarray(x)), found)
    dense = jc.densify(found)
    assert np.isfinite(dense["good"]["kernel"]).all()
    assert np.isfinite(dense["bad"]["kernel"]).all()
    zero = x == 0
    if name == "tie_layers":  # two become one
        zero &= GOOD == 0
    if name == "quantize_tree binary":  # of two levels neither is 0
        zero &= not x.any()
    assert not np.asarray(dense["bad"]["kernel"])[zero].any()


@pytest.mark.parametrize("shape", [(1, 1), (0, 4)])
@pytest.mark.parametrize("name", [n for n in MORE if n != "share_basis"])
def test_a_leaf_of_one_value_or_none_works_or_is_an_error_that_names_it(name, shape):
    bad = jnp.full(shape, 0.5)
    if name == "similar_layers":
        layers = {"good": {"kernel": bad}, "bad": {"kernel": bad + 1}}
        assert MORE[name](layers) == [("good", "bad")]
        return
    try:
        found = MORE[name](tree(bad))
    except ValueError as error:
        assert shape == (0, 4) and "bad/kernel" in str(error), error
        return
    array = np.asarray(jc.densify(found)["bad"]["kernel"])
    assert array.shape == shape and np.isfinite(array).all()
