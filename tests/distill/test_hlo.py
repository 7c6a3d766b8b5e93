"""The compiled step does no more than one that is written by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.distill import Outputs


T, HARD = 2.0, 0.1
TX = optax.adam(1e-3)
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def mlp(weights, stats, x, train):
    for kernel in weights[:-1]:
        x = jax.nn.relu(x @ kernel)
    return x @ weights[-1], stats


def conv(weights, stats, x, train):
    """Two convolutions with batch norm, a mean over positions, a layer."""
    found = []
    for kernel, old in zip(weights[:-1], stats, strict=True):
        axes = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=axes
        )
        mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else old
        unit = (x - mean[None, None, None]) / jnp.sqrt(var + 1e-5)[None, None, None]
        x = jax.nn.relu(unit)
        found.append((mean, var))
    return x.mean((1, 2)) @ weights[-1], found


def nets(name):
    """A net, the student's and the teacher's weights and statistics, inputs."""
    if name == "mlp":
        ours = [normal(6, 8), normal(8, 8), normal(8, 3)]
        theirs = [normal(6, 64), normal(64, 64), normal(64, 3)]
        return mlp, (ours, None), (theirs, None), normal(16, 6)

    def stats(*widths):
        return [(jnp.zeros(n), jnp.ones(n)) for n in widths]

    ours = [normal(3, 3, 1, 4), normal(3, 3, 4, 8), normal(8, 3)]
    theirs = [normal(3, 3, 1, 16), normal(3, 3, 16, 32), normal(32, 3)]
    return conv, (ours, stats(4, 8)), (theirs, stats(16, 32)), normal(16, 8, 8, 1)


def lowered_steps(name):
    """Ours and the one by hand, for one pair, and the teacher's weights."""
    net, ours, theirs, x = nets(name)
    batch = x, jnp.arange(16) % 3

    def student(params, x):
        logits, stats = net(*params, x, train=True)
        return Outputs(logits, state={1: stats})  # the second of the params

    def teacher(params, x):
        return net(*params, x, train=False)[0]

    @jax.jit
    def by_hand(weights, stats, state, theirs, batch):
        x, y = batch
        log_p = jax.nn.log_softmax(teacher(theirs, x) / T)

        def loss(weights):
            logits, new = net(weights, stats, x, train=True)
            log_q = jax.nn.log_softmax(logits / T)
            soft = T**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()
            hard = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return (1 - HARD) * soft + HARD * hard, (new, soft, hard)

        grads, (new, *parts) = jax.grad(loss, has_aux=True)(weights)
        updates, state = TX.update(grads, state, weights)
        return optax.apply_updates(weights, updates), new, state, parts

    step = jc.distill_step(student, teacher, TX, temperature=T, hard=HARD)
    return (
        step.lower(ours, TX.init(ours), theirs, batch),
        by_hand.lower(*ours, TX.init(ours[0]), theirs, batch),
        theirs,
    )


@pytest.fixture(scope="module", params=["mlp", "conv"])
def steps(request):
    return lowered_steps(request.param)


def products(lowered):
    """How many dots, convolutions and calls of libraries the machine is to do."""
    text = lowered.compile().as_text()
    words = ("dot", "convolution", "custom-call")
    return {word: len(re.findall(rf" {word}\(", text)) for word in words}


def test_the_step_has_the_products_of_one_by_hand(steps):
    ours, by_hand, _ = steps
    assert products(ours) == products(by_hand)
    # Three layers: forwards of both, gradients of weights, and of all inputs but one.
    assert sum(products(ours).values()) == 3 + 3 + 3 + 2


def longest_constant(lowered):
    """Characters, of which each number takes one at least."""
    return max(map(len, re.findall(r"constant dense<(.*?)>", lowered.as_text())))


def test_the_teacher_is_no_constant_of_the_program(steps):
    ours, _, theirs = steps
    matrix = theirs[0][0]
    assert longest_constant(ours) < matrix.size
    # In a closure it would be one.
    closed = jax.jit(lambda x: x + matrix).lower(jnp.ones_like(matrix))
    assert longest_constant(closed) >= matrix.size
