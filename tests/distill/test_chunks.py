"""Losses in chunks are those of all tokens at once, without their logits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcomp.distill.losses.chunks import in_chunks
from jaxcomp.distill.losses.logits import soft_target_loss
from jaxcomp.distill.losses.sparse import sparse_target_loss, top_k_targets


D, CLASSES = 4, 7
KERNEL = jax.random.normal(jax.random.key(0), (D, CLASSES))
TEACHER = jax.random.normal(jax.random.key(1), (D, CLASSES))
FLOATS = st.floats(-3, 3, width=32)


def dense(logits, hidden):
    return soft_target_loss(logits, hidden @ TEACHER)


def total(kernel, hidden, chunk):
    def head(h):
        return h @ kernel

    if chunk is None:
        return dense(head(hidden), hidden).sum()
    return in_chunks(head, dense, hidden, hidden, chunk=chunk).sum()


graded = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), static_argnums=2)


def test_labels_by_hand():
    hidden = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    labels = jnp.array([0, 0, 1])
    found = in_chunks(
        lambda h: h * jnp.log(3.0),
        optax.softmax_cross_entropy_with_integer_labels,
        hidden,
        labels,
        chunk=2,
    )
    np.testing.assert_allclose(found, np.log([4 / 3, 4, 2]), rtol=1e-6)


@given(hnp.arrays(np.float32, (2, 5, D), elements=FLOATS), st.sampled_from([3, 5, 64]))
def test_values_and_gradients_are_those_of_all_tokens(hidden, chunk):
    chex.assert_trees_all_close(
        graded(KERNEL, hidden, chunk),
        graded(KERNEL, hidden, None),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("shape", [(7, D), (6, D), (2, 3, D), (D,), (0, D)])
def test_any_number_of_tokens_in_their_shape(shape):
    hidden = jax.random.normal(jax.random.key(2), shape)
    found = in_chunks(lambda h: h @ KERNEL, dense, hidden, hidden, chunk=3)
    assert found.shape == shape[:-1]
    np.testing.assert_allclose(found, dense(hidden @ KERNEL, hidden), rtol=1e-4)


def test_sparse_targets_and_a_mask_go_along():
    hidden = jax.random.normal(jax.random.key(2), (2, 4, D))
    targets = jax.jit(top_k_targets, static_argnums=1)(hidden @ TEACHER, 2)
    mask = jnp.arange(8).reshape(2, 4) < 6

    @jax.jit
    def loss(logits, targets, mask):
        return sparse_target_loss(logits, targets, mask=mask)

    @jax.jit
    def chunked(hidden):
        return in_chunks(lambda h: h @ KERNEL, loss, hidden, targets, mask, chunk=3)

    found = chunked(hidden)
    np.testing.assert_allclose(
        found, loss(hidden @ KERNEL, targets, mask), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(found[1, 2:], 0)


def test_several_losses_of_the_same_logits_come_as_a_tree():
    hidden = jax.random.normal(jax.random.key(2), (5, D))

    def loss(logits):
        return {"top": logits.max(-1), "all": logits}

    found = in_chunks(lambda h: h @ KERNEL, loss, hidden, chunk=2)
    chex.assert_trees_all_close(found, loss(hidden @ KERNEL), rtol=1e-5, atol=1e-6)


def test_the_logits_never_exist():
    tokens, width, classes = 512, 16, 4096

    def loss(kernel, hidden, targets, chunk):
        def of(logits, targets):
            return sparse_target_loss(logits, targets)

        if chunk is None:
            return of(hidden @ kernel, targets).mean()
        return in_chunks(lambda h: h @ kernel, of, hidden, targets, chunk=chunk).mean()

    hidden = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    kernel = jax.ShapeDtypeStruct((width, classes), jnp.float32)
    targets = jax.eval_shape(lambda h, k: top_k_targets(h @ k, 8), hidden, kernel)
    sizes = [
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=3)
        .lower(kernel, hidden, targets, chunk)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for chunk in (32, None)
    ]
    logits = 4 * tokens * classes
    assert sizes[0] < logits / 2
    assert sizes[1] > logits


def test_lowers_for_every_platform():
    platforms = ("cpu", "cuda", "tpu")
    grad = jax.jit(jax.grad(total), static_argnums=2)
    args = KERNEL, jnp.ones((5, D)), 2
    assert jax.export.export(grad, platforms=platforms)(*args).platforms == platforms


@pytest.mark.parametrize(
    ("chunk", "labels", "kind", "text"),
    [
        (0, 5, ValueError, "in_chunks needs 1 <= chunk <= .*, got 0"),
        (2.0, 5, TypeError, "in_chunks needs an integer chunk, got 2.0"),
        (2, 4, ValueError, r"int32\[4\] beside hidden float32\[5, 4\]"),
    ],
)
def test_what_does_not_fit_is_an_error_that_shows_it(chunk, labels, kind, text):
    with pytest.raises(kind, match=text):
        in_chunks(
            lambda h: h @ KERNEL,
            optax.softmax_cross_entropy_with_integer_labels,
            jnp.ones((5, D)),
            jnp.zeros(labels, jnp.int32),
            chunk=chunk,
        )


def test_hidden_states_without_an_axis_are_an_error():
    with pytest.raises(ValueError, match=r"in_chunks needs hidden \[..., d\]"):
        in_chunks(lambda h: h, lambda z: z, jnp.float32(1.0))
