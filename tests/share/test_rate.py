import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp import bits, palettize_to_rate, share_to_rate
from jaxcomp.entropy import order0_entropy
from jaxcomp.share import histogram, palette, rate
from jaxcomp.share.rate import palettize_at_price


VALUES = st.sampled_from([0.0, 0.0, 0.0]) | st.floats(-1e6, 1e6, width=32)
SAMPLES = hnp.arrays(np.float32, (4, 16), elements=VALUES)
RATES = st.sampled_from([0.3, 1.0, 3.0, 8.0, 40.0])


def codes_of(node):
    return np.asarray(bits.unpack(node.codes, node.bits, node.size))


def rate_of(node):
    """Bits per weight: the entropy of the codes, and the codebook with its table."""
    entropy = order0_entropy(np.bincount(codes_of(node)))
    width = 8 * node.codebook.dtype.itemsize + 10
    return entropy + node.codebook.size * width / node.size


def error_of(node, x):
    return float(np.mean((np.asarray(node.dense(), np.float64) - x) ** 2))


def gaussian(size, seed=0):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def uniform_grid(x, step):
    """An ideal coder's bits per weight, and the error around the mean of each cell."""
    cells = np.rint(np.asarray(x, np.float64).ravel() / step).astype(int)
    _, cells, counts = np.unique(cells, return_inverse=True, return_counts=True)
    means = np.bincount(cells, x.ravel()) / counts
    return order0_entropy(counts), np.mean((means[cells] - x.ravel()) ** 2)


def test_a_value_that_is_not_worth_its_place_in_the_codebook_goes(strict):
    x = jnp.array([0.0] * 64 + [1.0, 1.5])
    # In bits: 64 log2(66/64) + 2 log2(66) = 14.9 and twice 42 for all three values,
    # 64 log2(66/64) + 2 log2(33) = 12.9 and 42 for two, nothing for zeros alone.
    assert palettize_to_rate(x, 99 / 66).codebook.tolist() == [1.0, 1.5]
    assert palettize_to_rate(x, 98 / 66).codebook.tolist() == [1.25]
    assert palettize_to_rate(x, 55 / 66).codebook.tolist() == [1.25]
    assert palettize_to_rate(x, 54 / 66).codebook.tolist() == []


@given(SAMPLES, RATES)
def test_the_rate_is_kept_zeros_stay_and_codes_keep_the_order(x, rate):
    node = palettize_to_rate(jnp.asarray(x), rate)
    dense = np.asarray(node.dense())
    assert dense.shape == x.shape and dense.dtype == x.dtype
    assert rate_of(node) <= rate
    assert not dense[x == 0].any()
    assert np.all(np.diff(dense.ravel()[np.argsort(x.ravel(), kind="stable")]) >= 0)
    assert np.all(np.abs(dense) <= np.abs(x).max())


@given(SAMPLES)
def test_a_rate_that_all_values_fit_in_loses_nothing(x):
    dense = palettize_to_rate(jnp.asarray(x), 42.0 + 6.0).dense()
    np.testing.assert_array_equal(dense, x)


@given(SAMPLES, st.sampled_from([2.0**-40, 2.0**20]), RATES)
def test_the_unit_of_the_weights_does_not_matter(x, unit, rate):
    x = np.where(np.abs(x) < 1e-20, 0, x)  # 2**-40 of less is not a normal number
    here = palettize_to_rate(jnp.asarray(x), rate)
    there = palettize_to_rate(jnp.asarray(x * np.float32(unit)), rate)
    np.testing.assert_array_equal(there.dense(), here.dense() * np.float32(unit))


@pytest.mark.parametrize(
    ("step", "entropy", "error"),
    [(2.0, 1.2412, 0.25351), (1.0, 2.1048, 0.076915), (0.5, 3.0620, 0.020408)],
)
def test_the_error_is_that_of_an_ideal_entropy_coded_grid(step, entropy, error):
    x = gaussian(200_000)
    found, spread = uniform_grid(x, step)
    assert (found, spread) == pytest.approx((entropy, error), rel=0.01)
    node = palettize_to_rate(jnp.asarray(x), found)
    assert error_of(node, x) <= 1.015 * spread  # 42 bits a value, of 200,000 weights


@pytest.mark.parametrize("rate", [2.1, 3.1, 4.1])
def test_a_file_of_gaussians_is_close_to_the_rate_distortion_bound(rate, tmp_path):
    x = gaussian((500, 400))
    node = palettize_to_rate(jnp.asarray(x), rate)
    spent = 8 * jc.save(tmp_path / "w.jxc", {"kernel": node}) / x.size
    assert spent <= rate + 0.02  # 64 bytes of container and 250 of header
    bound = 0.5 * np.log2(np.var(x) / error_of(node, x))
    assert spent - bound <= 0.285  # 0.27 of a million weights: benchmarks/


@pytest.mark.parametrize("kind", ["laplace", "standard_cauchy", "lognormal"])
def test_no_uniform_grid_of_the_same_rate_has_a_smaller_error(kind):
    x = getattr(np.random.default_rng(0), kind)(size=50_000).astype(np.float32)
    x = np.clip(x, -100, 100)
    for step in (0.1, 0.5, 1.5):
        found, spread = uniform_grid(x, step)
        cells = np.unique(np.rint(x / step)).size
        node = palettize_to_rate(jnp.asarray(x), found + 42 * cells / x.size)
        assert error_of(node, x) <= 1.01 * spread


def test_at_the_same_entropy_the_error_is_far_below_that_of_the_best_codebook():
    x = gaussian((500, 400))
    best = jc.palettize(jnp.asarray(x), clusters=8)
    ours = palettize_to_rate(jnp.asarray(x), rate_of(best))
    decibel = 10 * np.log10(error_of(best, x) / error_of(ours, x))
    assert decibel == pytest.approx(0.85, abs=0.1)  # 2.39 - 1.53, papers.md C1


def test_a_bit_buys_as_much_in_every_leaf():
    wide, narrow = gaussian((200, 100)), 0.3 * gaussian((200, 100), seed=1)
    params = {"a": {"kernel": jnp.asarray(wide)}, "b": {"kernel": jnp.asarray(narrow)}}
    small = share_to_rate(params, 3.0)
    a, b = small["a"]["kernel"], small["b"]["kernel"]
    # Reverse water-filling: the same error in both, hence log2(1 / 0.3) bits apart.
    assert rate_of(a) - rate_of(b) == pytest.approx(np.log2(1 / 0.3), abs=0.1)
    assert error_of(a, wide) == pytest.approx(error_of(b, narrow), rel=0.1)
    assert 2.99 < (rate_of(a) + rate_of(b)) / 2 <= 3.0


def test_a_pruned_leaf_keeps_its_zeros_and_costs_little():
    x = gaussian((200, 100))
    pruned = np.where(np.abs(x) > 2, x, 0)
    small = share_to_rate({"kernel": jnp.asarray(pruned), "bias": jnp.ones(3)}, 0.4)
    assert isinstance(small["bias"], jax.Array)
    dense = np.asarray(small["kernel"].dense())
    assert not dense[pruned == 0].any()
    assert error_of(small["kernel"], pruned) < 0.003 < np.var(pruned)


def test_leaves_that_are_compressed_or_not_selected_are_the_same_objects():
    taken = jc.quantize(jnp.ones((2, 2)))
    params = {"q": taken, "bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}
    small = share_to_rate(params, 3.0)
    assert small["q"] is taken and small["bias"] is params["bias"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_dtype_keeps_its_own(dtype):
    x = gaussian((40, 50)).astype(dtype)
    node = palettize_to_rate(jnp.asarray(x), 3.0)
    assert node.dtype == node.dense().dtype == dtype
    assert np.all(np.diff(np.asarray(node.codebook, np.float64)) > 0)
    assert error_of(node, x.astype(np.float64)) < 0.04
    exact = palettize_to_rate(jnp.asarray(x), 64.0).dense()
    np.testing.assert_array_equal(np.asarray(exact), x)


@pytest.mark.parametrize("size", [3e38, 1e-38, 1e-44])
def test_the_ends_of_the_number_range_are_held(size):
    x = (np.linspace(-1, 1, 64) * size).astype(np.float32)
    dense = np.asarray(palettize_to_rate(jnp.asarray(x), 4.0).dense())
    assert np.isfinite(dense).all()
    assert np.abs(dense / size - x / size).max() <= max(0.6, 2e-45 / size)


@pytest.mark.parametrize("rate", [1e-6, 2.0, 32.0])
@pytest.mark.parametrize("shape", [(), (1,), (3, 2)])
def test_constant_leaves_are_whole_or_zero(shape, rate):
    for value in (0.0, 2.5, -2.5):
        x = jnp.full(shape, value)
        node = palettize_to_rate(x, rate)
        fits = rate * x.size >= 42
        np.testing.assert_array_equal(node.dense(), x if fits else jnp.zeros(shape))


def test_an_outlier_does_not_spoil_the_others():
    x = gaussian((100, 200))
    x[3, 5] = 1e20
    node = palettize_to_rate(jnp.asarray(x), 4.0)
    dense = np.asarray(node.dense())
    assert dense[3, 5] == x[3, 5]


def test_more_values_than_codes_are_merged():
    x = np.arange(70_000, dtype=np.float32)
    node = palettize_to_rate(jnp.asarray(x), 64.0)
    assert node.bits == 16 and np.abs(np.asarray(node.dense()) - x).max() <= 1


@pytest.fixture
def binned(monkeypatch):
    """Few values go through bins, and in pieces."""
    monkeypatch.setattr(histogram, "_MANY", 1)
    for module in (histogram, palette):
        monkeypatch.setattr(module, "PIECE", 2**12)


def test_a_histogram_serves_as_well_as_all_values(monkeypatch, request):
    x, wanted = gaussian((100, 100)), 3.0
    x[:20] = 0
    x[0, :3] = -0.0, 1e-42, -1e-42
    whole = error_of(palettize_to_rate(jnp.asarray(x), wanted), x)
    request.getfixturevalue("binned")
    monkeypatch.setattr(rate, "distinct", None)
    node = palettize_to_rate(jnp.asarray(x), wanted)
    assert wanted - 0.01 < rate_of(node) <= wanted
    assert error_of(node, x) == pytest.approx(whole, rel=0.005)
    assert not np.asarray(node.dense())[x == 0].any()
    order = np.argsort(x.ravel(), kind="stable")
    assert np.all(np.diff(np.asarray(node.dense()).ravel()[order]) >= 0)


def test_a_rate_too_high_for_a_histogram_takes_all_values(binned):
    x = (1 + np.arange(512) * 2.0**-23).astype(np.float32)  # one bin
    for node in (palettize_to_rate(x, 64.0), palettize_at_price(x, 1e-30)):
        np.testing.assert_array_equal(node.dense(), x)


def test_a_price_says_which_values_are_worth_their_bits(strict):
    x = jnp.array([0.0] * 64 + [1.0, 1.5])
    # All three values take 98.9 bits; two take 54.9 and an error of 1/8; zeros alone
    # take none and an error of 3.25. So 1/8 buys 44 bits, and 3.125 the other 54.9.
    assert palettize_at_price(x, 0.95 * 0.125 / 44).codebook.tolist() == [1.0, 1.5]
    assert palettize_at_price(x, 1.05 * 0.125 / 44).codebook.tolist() == [1.25]
    assert palettize_at_price(x, 0.95 * 3.125 / 54.9).codebook.tolist() == [1.25]
    assert palettize_at_price(x, 1.05 * 3.125 / 54.9).codebook.tolist() == []


@pytest.mark.parametrize("price", [0.002, 0.05])
def test_no_other_price_or_grid_costs_less_at_the_price(price):
    x = gaussian((200, 100))

    def cost(node):
        return error_of(node, x) + price * rate_of(node)

    ours = cost(palettize_at_price(x, price))
    for other in (price / 1.5, 4 * price):
        assert ours < cost(palettize_at_price(x, other)) * 1.0001
    for step in np.sqrt(price * 6 / np.log(2)) * np.array([0.7, 1.0, 1.4]):
        found, spread = uniform_grid(x, step)
        found += 42 * np.unique(np.rint(x / step)).size / x.size  # its codebook
        assert ours < spread + price * found


@settings(max_examples=15)
@given(SAMPLES, st.sampled_from([1e-30, 1e6, 1e30]))
def test_at_any_price_zeros_stay_and_the_others_keep_their_order(x, price):
    dense = np.asarray(palettize_at_price(jnp.asarray(x), price).dense())
    assert dense.shape == x.shape and not dense[x == 0].any()
    assert np.all(np.diff(dense.ravel()[np.argsort(x.ravel(), kind="stable")]) >= 0)


@pytest.mark.parametrize("price", [0, -1.0, float("nan"), float("inf")])
def test_a_price_must_be_positive_and_finite(price):
    with pytest.raises(
        ValueError, match=r"palettize_at_price needs a .* got (-|\d|n|i)"
    ):
        palettize_at_price(jnp.ones((2, 2)), price)


def test_an_empty_tree_stays_one():
    assert share_to_rate({}, 3.0) == {}


@pytest.mark.parametrize("rate", [0, -1.0, float("nan")])
def test_a_rate_must_be_positive(rate):
    with pytest.raises(ValueError, match=r"share_to_rate needs"):
        share_to_rate({"kernel": jnp.ones((2, 2))}, rate)


def test_bad_leaves_are_named():
    for bad, text in ((jnp.zeros((0, 2)), "at least one"), (jnp.eye(2) / 0, "finite")):
        with pytest.raises(ValueError, match=text) as caught:
            share_to_rate({"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": bad}}, 3)
        assert "b/kernel" in str(caught.value)
    with pytest.raises(TypeError, match="floating"):
        palettize_to_rate(jnp.arange(4), 3.0)
    with pytest.raises(ValueError, match="under jit"):
        jax.jit(lambda x: palettize_to_rate(x, 3.0))(jnp.ones(4))
