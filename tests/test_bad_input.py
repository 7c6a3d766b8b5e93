"""Bad input, through the tree functions: the documented result, or one clear error.

An error names the function, the leaf, the index and the value, and says what to do.
The details of each function are tested beside it; this is the table that a user meets.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc


GOOD = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def tree(bad):
    return {"good": {"kernel": jnp.asarray(GOOD)}, "bad": {"kernel": bad}}


def spoilt(value):
    return jnp.asarray(GOOD).at[1, 2].set(value)


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
