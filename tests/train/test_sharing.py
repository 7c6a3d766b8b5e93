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
from jaxcomp.train import sharing
from jaxcomp.train.sharing import codebook_pull, fake_share, soft_share


# Shares of what is near the least normal number would be flushed to 0.
VALUES = st.sampled_from([0.0, 1.0, -1.0, 0.5]) | st.floats(-4, 4, width=32).map(
    lambda value: value if abs(value) > 1e-30 else 0.0
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


# soft_share


def soft_in_numpy(x, centroids, temperature, steps):
    """The paper's iteration over the weights that are not 0, in float64."""
    live = x[x != 0].astype(np.float64)

    def attention(middle):
        scores = np.exp(-np.abs(live[:, None] - middle) / temperature)
        return scores / scores.sum(axis=1, keepdims=True)

    middle = centroids.astype(np.float64)
    for _ in range(steps):
        a = attention(middle)
        middle = (a * live[:, None]).sum(axis=0) / a.sum(axis=0)
    shared = np.zeros(x.shape)
    shared[x != 0] = attention(middle) @ middle
    return shared, middle


soft = jax.jit(soft_share, static_argnames="steps")


def test_one_soft_step_by_hand(strict):
    x, heat = jnp.array([0.0, 1.0, 3.0]), float(1 / np.log(3))  # a third for each 1
    shared, centroids = soft_share(x, jnp.array([1.0, 2.0]), heat, steps=1)
    # 1 attends by 3/4 and 1/4, 3 by 1/4 and 3/4.
    np.testing.assert_allclose(centroids, [1.5, 2.5], rtol=1e-6)
    # Then by 0.5 against 1.5: 3/4 and 1/4 again.
    np.testing.assert_allclose(shared, [0, 1.75, 2.25], rtol=1e-6)
    assert float(shared[0]) == 0


@given(WEIGHTS, CODEBOOKS, st.sampled_from([0.2, 1.0]))
def test_soft_sharing_is_that_of_the_paper_in_numpy(x, centroids, temperature):
    found = soft(jnp.asarray(x), jnp.asarray(centroids), temperature, steps=3)
    assert not np.asarray(found[0])[x == 0].any()
    if x.any():
        for ours, theirs in zip(
            found, soft_in_numpy(x, centroids, temperature, 3), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)
    else:
        np.testing.assert_allclose(found[1], centroids, rtol=0, atol=1e-37)


@given(WEIGHTS, CODEBOOKS)
def test_in_the_cold_each_weight_has_the_nearest_of_the_new_values(x, centroids):
    shared, moved = soft(jnp.asarray(x), jnp.asarray(centroids), 1e-30, steps=3)
    assert np.all(np.isfinite(moved)) and np.all(np.isfinite(shared))
    away = distances(x, np.asarray(moved))
    second = np.sort(away, axis=-1)[..., 1]
    is_clear = second > away.min(axis=-1) + 1e-5
    hard = np.asarray(fake_share(jnp.asarray(x), moved))
    np.testing.assert_allclose(
        np.where(is_clear, shared, 0), np.where(is_clear, hard, 0), rtol=1e-5, atol=1e-6
    )


def test_in_the_cold_it_is_k_means():
    x = jnp.array([[0.0, 1.0, 2.0, 9.0], [0.0, 10.0, 11.0, -4.0]])
    shared, moved = soft_share(x, jnp.array([3.0, 4.0, 50.0]), 1e-6)
    # First -4, 1 and 2 go with 3 and the rest with 4; nothing is near 50.
    np.testing.assert_allclose(moved, [-1 / 3, 10, 50], rtol=1e-6)
    want = np.array([[0, -1 / 3, -1 / 3, 10], [0, 10, 10, -1 / 3]])
    np.testing.assert_allclose(shared, want, rtol=1e-5)


def test_its_gradient_is_that_of_finite_differences_in_blocks_too(monkeypatch):
    rng = np.random.default_rng(0)
    x = np.where(rng.random((4, 6)) < 0.2, 0, rng.normal(size=(4, 6)))
    centroids, weight = np.array([-1.1, 0.2, 0.9]), rng.normal(size=(4, 6))

    def loss(x, centroids):
        shared, moved = soft_share(x, centroids, 0.3, steps=2)
        return jnp.sum(weight.astype(np.float32) * shared) + jnp.sum(moved**2)

    def in_numpy(x, centroids):
        shared, moved = soft_in_numpy(x, centroids, 0.3, 2)
        return np.sum(weight * shared) + np.sum(moved**2)

    def grads_of(x, centroids):
        args = jnp.asarray(x, jnp.float32), jnp.asarray(centroids, jnp.float32)
        return jax.jit(jax.grad(lambda *a: loss(*a), argnums=(0, 1)))(*args)

    grads = grads_of(x, centroids)
    h = 1e-5
    for place in ((0, 1), (2, 3), (3, 5)):
        step = np.zeros_like(x)
        step[place] = h
        slope = (in_numpy(x + step, centroids) - in_numpy(x - step, centroids)) / 2 / h
        np.testing.assert_allclose(
            grads[0][place], slope if x[place] else 0, rtol=1e-3, atol=1e-4
        )
    for step in h * np.eye(3):
        slope = (in_numpy(x, centroids + step) - in_numpy(x, centroids - step)) / 2 / h
        np.testing.assert_allclose(grads[1] @ (step / h), slope, rtol=1e-3, atol=1e-4)
    assert x[x == 0].size and not np.asarray(grads[0])[x == 0].any()
    monkeypatch.setattr(sharing, "_BLOCK", 21)  # 7 weights: the last block is ragged
    for ours, whole in zip(grads_of(x, centroids), grads, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-4, atol=1e-5)


@jax.jit
def soft_gradients(x, centroids, heat):
    def loss(*args):
        shared, moved = soft_share(*args)
        return shared[0] / 4 + moved[0] / 4, (shared, moved)

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, centroids, heat)


@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e37])
@pytest.mark.parametrize("heat", [1e-4, 1.0])
def test_soft_sharing_is_finite_at_both_ends_of_float32(scale, heat):
    x = (np.array([-3.0, 0, 1, 1, 8]) * scale).astype(np.float32)
    centroids = (np.array([1.0, -3, 9]) * scale).astype(np.float32)
    grads, (shared, moved) = soft_gradients(x, centroids, np.float32(heat))
    chex.assert_tree_all_finite((grads, shared, moved))
    if scale == 1e37:
        np.testing.assert_allclose(shared, x, rtol=1e-6)
        np.testing.assert_allclose(moved, np.array([1.0, -3, 8]) * scale, rtol=1e-6)


def test_soft_sharing_keeps_dtypes_and_lowers_for_every_platform(strict):
    x, centroids = jnp.ones((4, 6), jnp.bfloat16), jnp.ones(2, jnp.float32)
    shared, moved = soft(x, centroids, 0.1, steps=0)
    assert (shared.dtype, moved.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(shared.astype(jnp.float32), x.astype(jnp.float32))
    for empty in (jnp.zeros((0, 3)), jnp.float32(0)):
        nothing = soft_share(empty, centroids, 0.1, steps=1)
        assert nothing[0].shape == empty.shape and not np.asarray(nothing[0]).any()
        np.testing.assert_array_equal(nothing[1], centroids)
    step = jax.jit(jax.grad(lambda x: jnp.sum(soft_share(x, centroids, 0.1)[0])))
    jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(jnp.ones((4, 6)))


def test_training_through_soft_values_that_cool_beats_clustering_at_the_end():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (64, 4)) @ jax.random.normal(keys[1], (4, 12))
    kernel = jax.random.normal(keys[2], (12, 4))
    outputs, codebook = x @ kernel, jc.palettize(kernel, 4).codebook
    tx = optax.adam(0.02)

    def loss(kernel, centroids, heat):
        shared, centroids = soft_share(kernel, centroids, heat)
        return jnp.mean((x @ shared - outputs) ** 2), centroids

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(kernel, centroids, state, heat):
        grads, centroids = jax.grad(loss, has_aux=True)(kernel, centroids, heat)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(kernel, updates), centroids, state

    def final(kernel, centroids):
        return float(jnp.mean((x @ fake_share(kernel, centroids) - outputs) ** 2))

    trained, centroids, state = kernel, codebook, tx.init(kernel)
    for i in range(200):
        heat = np.float32(0.3 * 0.98**i)
        trained, centroids, state = step(trained, centroids, state, heat)
    assert final(trained, centroids) < 0.3 * final(kernel, codebook)
    small = jc.palettize(fake_share(trained, centroids), 4)
    np.testing.assert_array_equal(small.dense(), fake_share(trained, centroids))


def test_bad_arguments_of_soft_sharing_are_errors():
    x, centroids = jnp.ones((2, 3)), jnp.ones(2)
    for heat in (0.0, -1.0, np.inf):
        text = f"soft_share needs a positive finite temperature, got {heat}. Take"
        with pytest.raises(ValueError, match=text):
            soft_share(x, centroids, heat)
    with pytest.raises(ValueError, match="soft_share needs a number for temperature"):
        soft_share(x, centroids, np.nan)
    with pytest.raises(ValueError, match="soft_share needs 0 <= steps <= "):
        soft_share(x, centroids, 1.0, steps=-1)
    with pytest.raises(TypeError, match="soft_share needs an integer steps, got 1.5"):
        soft_share(x, centroids, 1.0, steps=1.5)
    with pytest.raises(TypeError, match="soft_share needs a floating array, got int32"):
        soft_share(x, jnp.ones(2, jnp.int32), 1.0)
    with pytest.raises(
        ValueError, match="soft_share needs a codebook of one dimension"
    ):
        soft_share(x, jnp.ones((2, 2)), 1.0)
