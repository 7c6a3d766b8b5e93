"""Our losses give the numbers that torchdistill and Tunix print for the same arrays.

``python -m benchmarks.distill_peers`` runs the two and prints these numbers again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.distill.losses.correlation import class_correlation_loss, correlation_loss
from jaxcomp.distill.losses.features import (
    attention_transfer_loss,
    cosine_loss,
    hint_loss,
)
from jaxcomp.distill.losses.relations import angle_loss, distance_loss, similarity_loss


class Arrays(NamedTuple):
    """Of a student and of its teacher: of eight images, ten classes and a 4x4 map."""

    logits: tuple[np.ndarray, np.ndarray]  # float32[8, 10]
    labels: np.ndarray  # int64[8]
    maps: tuple[np.ndarray, np.ndarray]  # float32[8, 4, 4, 6 and 16]
    features: tuple[np.ndarray, np.ndarray]  # float32[8, 12]


def make_arrays():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return Arrays(
        (draw(8, 10), 3 * draw(8, 10)),
        rng.integers(0, 10, 8),
        (draw(8, 4, 4, 6), draw(8, 4, 4, 16)),
        (draw(8, 12), draw(8, 12)),
    )


def mixed(x, temperature, hard):
    """The loss of a step for logits that are there already."""
    loss = jc.distill_loss(
        lambda params, x: x[0],
        lambda params, x: x[1],
        temperature=temperature,
        hard=hard,
    )
    return loss({}, {}, (x.logits, jnp.asarray(x.labels)))[0]


def top_4(x):
    student, teacher = x.logits
    best, indices = jax.lax.top_k(teacher, 4)
    return jc.soft_target_loss(
        jnp.take_along_axis(jnp.asarray(student), indices, axis=-1), best, 3.0
    ).mean()


def correlations(x):
    rows, columns = (
        f(*x.logits, 4.0) for f in (correlation_loss, class_correlation_loss)
    )
    return 2 * rows.mean() + 2 * columns.mean()


OURS = {
    "KDLoss, tau=4": lambda x: jc.soft_target_loss(*x.logits, 4.0).mean() / 4**2,
    "KDLoss, tau=4, alpha=0.1": lambda x: mixed(x, 4.0, 0.1),
    "DISTLoss, tau=4, beta=gamma=2": correlations,
    "ATLoss, mode=paper": lambda x: attention_transfer_loss(*x.maps).mean(),
    "RKDLoss, distances": lambda x: distance_loss(*x.maps).mean(),
    "RKDLoss, angles": lambda x: angle_loss(*x.maps).mean(),
    "SPKDLoss, rows of L1 norm 1": lambda x: similarity_loss(*x.maps).mean(),
    "SPKDLoss, rows of L2 norm 1": lambda x: similarity_loss(*x.maps).mean(),
    "MSELoss, as FitNets": lambda x: 2 * hint_loss(*x.features).mean(),
    "LogitStrategy, T=3, alpha=1": lambda x: mixed(x, 3.0, 0.0),
    "LogitStrategy, T=3, alpha=0.5": lambda x: mixed(x, 3.0, 0.5),
    "LogitStrategy, T=3, alpha=1, top 4": top_4,
    "FeaturePoolingStrategy": lambda x: cosine_loss(*x.features).mean(),
    "FeatureProjectionStrategy": lambda x: 2 * hint_loss(*x.features).mean(),
}

# Printed by torchdistill 1.1.5 with torch 2.13.0, and by google-tunix 0.1.7.
THEIRS = {
    "KDLoss, tau=4": 0.20119652,
    "KDLoss, tau=4, alpha=0.1": 3.2013812,
    "DISTLoss, tau=4, beta=gamma=2": 58.928013,
    "ATLoss, mode=paper": 0.60803843,
    "RKDLoss, distances": 0.0025395874,
    "RKDLoss, angles": 0.0026699738,
    "SPKDLoss, rows of L1 norm 1": 0.0077217566,
    "SPKDLoss, rows of L2 norm 1": 0.010984868,
    "MSELoss, as FitNets": 2.7589023,
    "LogitStrategy, T=3, alpha=1": 2.9468985,
    "LogitStrategy, T=3, alpha=0.5": 2.994206,
    "LogitStrategy, T=3, alpha=1, top 4": 1.2244118,
    "FeaturePoolingStrategy": 1.0251904,
    "FeatureProjectionStrategy": 2.7589023,
}

# The paper scales rows to L2 norm 1. torchdistill's call of `normalize` says p=1.
DIFFERS = "SPKDLoss, rows of L1 norm 1"


@pytest.mark.parametrize("name", [name for name in OURS if name != DIFFERS])
def test_the_number_is_the_peers(name):
    np.testing.assert_allclose(OURS[name](make_arrays()), THEIRS[name], rtol=2e-5)


def test_similarities_are_scaled_as_in_the_paper_and_not_as_in_torchdistill():
    def rows(x):
        flat = np.float64(x).reshape(8, -1)
        return flat @ flat.T

    grams = [rows(x) for x in make_arrays().maps]
    for order, name in ((1, DIFFERS), (2, "SPKDLoss, rows of L2 norm 1")):
        a, b = (g / np.linalg.norm(g, order, axis=1, keepdims=True) for g in grams)
        found = np.sum((a - b) ** 2) / 8**2
        np.testing.assert_allclose(found, THEIRS[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("hard", "theirs"), [(0.0, 0.818179), (0.5, 1.530153), (1.0, 2.242127)]
)
def test_the_numbers_in_the_tests_of_tunix_are_ours(hard, theirs):
    with jax.threefry_partitionable(False):
        keys = jax.random.split(jax.random.key(0), 3)
        student, teacher = (jax.random.normal(key, (4, 10)) for key in keys[:2])
        labels = jax.random.randint(keys[2], (4,), 0, 10)
    arrays = Arrays((student, teacher), labels, (), ())
    np.testing.assert_allclose(mixed(arrays, 3.0, hard), theirs, rtol=1e-5)
    losses = optax.softmax_cross_entropy_with_integer_labels(student, labels)
    np.testing.assert_allclose(losses.mean(), 2.242127, rtol=1e-5)
