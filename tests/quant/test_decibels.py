"""Errors on normal and Laplace weights: those of papers.md, C1 and C2, to 0.03 dB."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.quant import least_error


SIZE = 2**19
# Quantiles in a random order: as many plain draws would be 0.02 dB off.
AT = (jax.random.permutation(jax.random.key(1), SIZE) + 0.5) / SIZE
TAIL = -jnp.log1p(-jnp.abs(2 * AT - 1))
SOURCES = {
    "normal": jax.scipy.special.ndtri(AT),
    "laplace": jnp.where(AT < 0.5, -TAIL, TAIL),
}


def decibels(node, x):
    off = (node.dense() - x).astype(jnp.float32)
    return 10 * np.log10(float(jnp.sum(x * x)) / float(jnp.sum(off * off)))


four = partial(jc.quantize, bits=4, axis=None)
full = partial(jc.quantize, bits=4, axis=None, top=7.01, reach=least_error())
affine = partial(jc.quantize_affine, bits=4, axis=None)
searched = partial(jc.quantize_affine, bits=4, axis=None, reach=least_error())
# grid, settings, decibels of normal and of Laplace weights
ROWS = [
    (four, {"group": 32}, 20.26, 18.33),
    (four, {"group": 64}, 19.36, 17.03),
    (four, {"group": 128}, 18.61, 15.89),
    (full, {"group": 64}, 20.47, 18.07),
    (full, {"group": 128}, 19.92, 17.18),
    (affine, {"group": 32}, 21.86, 20.50),
    (affine, {"group": 64}, 20.82, 18.99),
    (affine, {"group": 128}, 19.95, 17.71),
    (searched, {"group": 32}, 22.15, 20.73),
    (searched, {"group": 64}, 21.18, 19.29),
    (searched, {"group": 128}, 20.44, 18.15),
    (jc.quantize_ternary, {}, 5.79, 4.05),
    (jc.quantize_ternary, {"threshold": 0.5}, 6.71, 4.98),
    (jc.quantize_ternary, {"threshold": 0.7}, 7.17, 5.49),
    (jc.quantize_binary, {}, 4.39, 3.01),
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("grid", "settings", "normal", "laplace"), ROWS)
def test_the_decibels_of_a_grid_are_the_published_ones(
    grid, settings, normal, laplace, source
):
    x = SOURCES[source]
    found = decibels(grid(x, **settings), x)
    published = {"normal": normal, "laplace": laplace}[source]
    assert found > published - 0.03, found
    if "reach" not in getattr(grid, "keywords", {}):
        assert found < published + 0.03, found  # a search may be the better one


@pytest.mark.parametrize(
    ("bits", "published"),
    [(2, 7.208), (3, 13.292), (4, 18.898), (5, 24.326), (6, 29.709), (8, 40.540)],
)
def test_one_searched_scale_is_the_best_uniform_grid_of_a_normal_source(
    bits, published
):
    x = SOURCES["normal"]
    found = decibels(jc.quantize_searched(x, bits, axis=None), x)
    assert abs(found - published) < 0.03


@pytest.mark.parametrize(
    ("source", "largest", "published"),
    [("normal", 5.35, 38.30), ("laplace", 10.28 * 2**0.5, 32.62)],
)
def test_eight_bits_per_tensor_go_by_the_largest_weight(source, largest, published):
    # C2 had 4 M samples, whose largest, so many deviations, its figure tells: the error
    # is that of rounding to steps of a 127th of it.
    x = SOURCES[source].at[0].set(largest)
    rounding = 10 * np.log10(12 * float(jnp.mean(x * x)) * (127 / largest) ** 2)
    found = decibels(jc.quantize(x, bits=8, axis=None), x)
    assert found == pytest.approx(published, abs=0.03)
    assert found == pytest.approx(rounding, abs=0.03)
