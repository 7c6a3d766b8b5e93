"""Several teachers teach what the mean of their logits would."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

import jaxcomp as jc


def model(params, x):
    return x @ params["kernel"]


def test_the_mean_of_two_is_halfway():
    mean = jc.ensemble(lambda params, x: params * x)
    np.testing.assert_array_equal(mean([1.0, 4.0], jnp.array([2.0, -2.0])), [5, -5])


@given(
    hnp.arrays(
        np.float32,
        (3, 2, 4),
        elements=hnp.from_dtype(np.dtype(np.float32), min_value=-20, max_value=20),
    )
)
def test_it_predicts_the_geometric_mean_of_the_predictions(kernels):
    x = jnp.eye(2)
    trees = [{"kernel": jnp.asarray(k)} for k in kernels]
    found = jax.nn.softmax(jc.ensemble(model)(trees, x))
    product = np.prod([jax.nn.softmax(model(t, x)) for t in trees], axis=0) ** (1 / 3)
    wanted = product / product.sum(-1, keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-5)


def test_a_step_learns_the_same_from_the_list_as_from_logits_kept():
    keys = jax.random.split(jax.random.key(0), 4)
    trees = [{"kernel": jax.random.normal(k, (3, 2))} for k in keys[:3]]
    x = jax.random.normal(keys[3], (8, 3))
    student, tx = {"kernel": jnp.zeros((3, 2))}, optax.sgd(0.5)
    mean = jc.ensemble(model)
    live = jc.distill_step(model, mean, tx, hard=0.0)
    kept = jc.distill_step(model, lambda spoken, x: spoken, tx, hard=0.0)
    ours, _, _ = live(student, tx.init(student), trees, (x, None))
    theirs, _, _ = kept(student, tx.init(student), mean(trees, x), (x, None))
    np.testing.assert_allclose(ours["kernel"], theirs["kernel"], rtol=1e-6)


def test_a_compressed_teacher_is_one_of_them():
    tree = {"kernel": jnp.array([[1.0, -1.0]])}
    small = jc.quantize_tree(tree, bits=8)
    student, tx = {"kernel": jnp.zeros((1, 2))}, optax.sgd(0.5)
    step = jc.distill_step(model, jc.ensemble(model), tx, hard=0.0)
    ours, _, _ = step(
        student, tx.init(student), [tree, small], (jnp.ones((1, 1)), None)
    )
    assert ours["kernel"][0, 0] > 0


def test_no_teacher_is_an_error():
    with pytest.raises(ValueError, match="at least one tree"):
        jc.ensemble(model)([], jnp.ones((1, 1)))
