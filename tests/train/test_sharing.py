"""Training with shared values: few of them, gradients for both, zeros apart."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.train.sharing import codebook_pull, fake_share


VALUES = st.sampled_from([0.0, 1.0, -1.0, 0.5]) | st.floats(
    -4, 4, width=32, allow_subnormal=False
)
WEIGHTS = hnp.arrays(np.float32, (4, 6), elements=VALUES)
CODEBOOKS = hnp.arrays(np.float32, (5,), elements=VALUES, unique=True)


def distances(x, codebook):
    return np.abs(x[..., None].astype(np.float64) - codebook)


def test_an_example_by_hand(strict):
    x = jnp.array([[0.0, -0.4, 1.1], [2.0, 0.3, 1.0]])
    codebook = jnp.array([1.0, -0.5, 3.0])
    weight = jnp.array([[1.0, 10.0, 100.0], [1000.0, 1e4, 1e5]])

    def loss(x, codebook):
        y = fake_share(x, codebook)
        return jnp.sum(weight * y), y

    grads, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, codebook)
    # 2.0 is as far from 1 as from 3 and goes to the lower one.
    np.testing.assert_array_equal(y, [[0, -0.5, 1], [1, 1, 1]])
    np.testing.assert_array_equal(grads[0], weight)
    np.testing.assert_array_equal(grads[1], [111100, 10, 0])
    pull = codebook_pull(x, codebook)
    assert float(pull) == pytest.approx((0.01 + 0.01 + 1 + 0.49 + 0) / 5, rel=1e-5)


@given(WEIGHTS, CODEBOOKS)
@settings(max_examples=40)
def test_every_weight_has_its_nearest_value_and_zeros_stay(x, codebook):
    y = np.asarray(fake_share(jnp.asarray(x), jnp.asarray(codebook)))
    assert not y[x == 0].any()
    assert np.isin(y[x != 0], codebook).all()
    away = np.abs(x.astype(np.float64) - y)[x != 0]
    least = distances(x, codebook).min(axis=-1)[x != 0]
    np.testing.assert_allclose(away, least, rtol=1e-6, atol=1e-6)
    pull = float(codebook_pull(jnp.asarray(x), jnp.asarray(codebook)))
    assert pull == pytest.approx(np.mean(least**2) if least.size else 0, abs=1e-5)


@jax.jit
def gradients(x, codebook):
    """Shared weights, the gradients of half their squares, and of the pull."""
    y, back = jax.vjp(fake_share, x, codebook)
    return y, back(y), jax.grad(codebook_pull, argnums=(0, 1))(x, codebook)


@given(WEIGHTS, CODEBOOKS)
@settings(max_examples=30)
def test_gradients_are_those_of_the_paper_in_numpy(x, codebook):
    args = jnp.asarray(x), jnp.asarray(codebook)
    y, (by_x, by_codebook), pulls = jax.tree.map(np.asarray, gradients(*args))
    np.testing.assert_array_equal(by_x, y)
    sums = [np.sum(y[(x != 0) & (y == value)]) for value in codebook]
    np.testing.assert_allclose(by_codebook, sums, rtol=1e-5, atol=1e-5)
    away = np.where(x == 0, 0, x - y) * 2 / max(np.sum(x != 0), 1)
    np.testing.assert_allclose(pulls[0], away, rtol=1e-4, atol=1e-6)
    sums = [-np.sum(away[(x != 0) & (y == value)]) for value in codebook]
    np.testing.assert_allclose(pulls[1], sums, rtol=1e-4, atol=1e-6)


def test_the_end_of_training_is_stored_bit_for_bit():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (128, 8))
    start = jax.random.normal(keys[1], (8, 6))
    kernel = jnp.where(jnp.abs(start) < 0.2, 0, start)
    outputs = x @ jax.random.normal(keys[2], (8, 6))
    params = {"kernel": kernel, "codebook": jc.palettize(kernel, 5).codebook}
    rate = optax.cosine_decay_schedule(2e-2, 200)
    tx = optax.chain(optax.adam(rate), jc.keep_zeros())

    def shared(params):
        return fake_share(params["kernel"], params["codebook"])

    def loss(params):
        pull = codebook_pull(params["kernel"], params["codebook"])
        return jnp.mean((x @ shared(params) - outputs) ** 2) + pull

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    first, state, begun = loss(params), tx.init(params), params
    for _ in range(200):
        params, state = step(params, state)
    assert float(loss(params)) < 0.2 * float(first)
    assert np.all(np.asarray(begun["codebook"]) != params["codebook"])
    small = jc.palettize(shared(params), 5)  # 4 values, and 0
    np.testing.assert_array_equal(small.dense(), shared(params))
    assert len(np.unique(small.dense())) <= 5
    np.testing.assert_array_equal(small.dense() == 0, kernel == 0)


def test_the_pull_alone_brings_the_weights_to_the_codebook():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32))
    codebook = jnp.array([-1.0, 0.2, 1.0])

    @jax.jit
    def pulled(carry):
        x, codebook = carry
        grads = jax.grad(codebook_pull, argnums=(0, 1))(x, codebook)
        return x - 2.0 * grads[0], codebook - 0.1 * grads[1]

    carry = x, codebook
    for _ in range(200):
        carry = pulled(carry)
    assert float(codebook_pull(*carry)) < 1e-6
    assert np.all(carry[1] != codebook)


@pytest.mark.parametrize("fn", [fake_share, codebook_pull])
def test_jit_vmap_and_the_other_platforms(fn, strict):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 4, 6)).astype(np.float32))
    codebook = jnp.asarray(rng.normal(size=(3, 5)).astype(np.float32))

    def both(x, codebook):
        return jax.vmap(fn)(x, codebook)

    each = [fn(*pair) for pair in zip(x, codebook, strict=True)]
    np.testing.assert_allclose(jax.jit(both)(x, codebook), jnp.stack(each), rtol=1e-6)

    def grads(x, codebook):
        return jax.grad(lambda *a: jnp.sum(fn(*a)), argnums=(0, 1))(x, codebook)

    jitted = jax.jit(jax.vmap(grads))
    jax.export.export(jitted, platforms=("cpu", "cuda", "tpu"))(x, codebook)


def test_one_weight_one_value_and_nothing_at_all():
    one = jnp.array([0.5])
    np.testing.assert_array_equal(fake_share(jnp.float32(3.0), one), 0.5)
    np.testing.assert_array_equal(fake_share(jnp.float32(0.0), one), 0.0)
    assert fake_share(jnp.zeros((0, 3)), one).shape == (0, 3)
    for zeros in (jnp.zeros((2, 3)), jnp.zeros((0, 3))):
        value, grads = jax.value_and_grad(codebook_pull, argnums=(0, 1))(zeros, one)
        assert float(value) == 0
        assert not any(np.asarray(grad).any() for grad in grads)


def test_values_at_the_end_of_float32_have_a_nearest_one():
    x = jnp.array([3.4e38, -3.4e38, 2e38])
    codebook = jnp.array([3e38, -3e38, 3.4e38])
    want = np.asarray(codebook)[[2, 1, 0]]
    np.testing.assert_array_equal(fake_share(x, codebook), want)


def test_narrow_weights_add_up_their_gradients_in_float32(strict):
    x = jnp.ones((40, 40), jnp.bfloat16)
    codebook = jnp.ones(1)
    y, back = jax.vjp(fake_share, x, codebook)
    assert y.dtype == jnp.bfloat16
    by_x, by_codebook = back(jnp.ones_like(x))
    assert by_x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(by_codebook, [1600])  # bfloat16 stops at 256
    narrow = jax.vjp(fake_share, x, codebook.astype(jnp.bfloat16))[1]
    np.testing.assert_array_equal(narrow(jnp.ones_like(x))[1].astype(float), [1600])
    assert codebook_pull(x, codebook).dtype == jnp.float32


@pytest.mark.parametrize("fn", [fake_share, codebook_pull])
def test_bad_arguments_are_errors(fn):
    x, name = jnp.ones((2, 3)), fn.__name__
    with pytest.raises(TypeError, match=f"{name} needs a floating array, got int32"):
        fn(jnp.ones((2, 3), jnp.int32), jnp.ones(2))
    with pytest.raises(TypeError, match=f"{name} needs a floating array, got int32"):
        fn(x, jnp.ones(2, jnp.int32))
    for codebook, got in ((jnp.ones((2, 2)), r"\[2, 2\]"), (jnp.ones(0), r"\[0\]")):
        with pytest.raises(
            ValueError, match=f"{name} needs a codebook of one .*float32{got}. Begin"
        ):
            fn(x, codebook)
