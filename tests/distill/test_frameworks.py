"""One step for Linen, NNX, Equinox and Haiku: batch norm, dropout, TrainState."""

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

import jaxcomp as jc
from jaxcomp.distill import Outputs


CLASSES = 3
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
LABELS = jnp.arange(8) % CLASSES
THEIRS = jnp.asarray(np.random.default_rng(1).normal(size=(4, CLASSES)), jnp.float32)
KEY = jax.random.key(7)


def teacher(params, x):
    return x @ params


class Net(nn.Module):
    """Dense, batch norm and dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(not train, momentum=0.5)(nn.Dense(6)(x)))
        return nn.Dense(CLASSES)(nn.Dropout(0.5, deterministic=not train)(x))


NET = Net()
VARIABLES = NET.init(jax.random.key(2), X, train=False)


def linen(variables, x, key):
    logits, found = NET.apply(
        variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
    )
    return Outputs(logits, state=found)


def loss_of(logits):
    soft = jc.soft_target_loss(logits, teacher(THEIRS, X)).mean()
    hard = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
    return 0.9 * soft + 0.1 * hard


def test_linen_with_batch_norm_and_dropout_is_the_loop_by_hand():
    tx = optax.sgd(0.1, momentum=0.9)

    def by_hand(params, stats):
        outputs = linen({"params": params, "batch_stats": stats}, X, KEY)
        return loss_of(outputs.logits), outputs.state

    params, stats = VARIABLES["params"], VARIABLES["batch_stats"]
    state, tree = tx.init(params), VARIABLES
    step, opt_state = jc.distill_step(linen, teacher, tx), tx.init(VARIABLES)
    for _ in range(2):
        grads, found = jax.grad(by_hand, has_aux=True)(params, stats)
        updates, state = tx.update(grads, state, params)
        params, stats = optax.apply_updates(params, updates), found["batch_stats"]
        tree, opt_state, _ = step(tree, opt_state, THEIRS, (X, LABELS), KEY)
    chex.assert_trees_all_close(tree["params"], params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(tree["batch_stats"], stats, rtol=1e-5)


def test_a_train_state_takes_what_the_step_gives():

    def apply(params, x, key):
        return linen(params, x, key)

    tx = optax.adam(0.05)
    state = TrainState.create(apply_fn=NET.apply, params=VARIABLES, tx=tx)
    step = jc.distill_step(apply, teacher, state.tx)
    for _ in range(2):
        params, opt_state, _ = step(
            state.params, state.opt_state, THEIRS, (X, LABELS), KEY
        )
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    assert state.step == 2
    old, new = VARIABLES["batch_stats"], state.params["batch_stats"]
    assert np.any(old["BatchNorm_0"]["mean"] != new["BatchNorm_0"]["mean"])


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(6, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def test_nnx_trains_and_its_statistics_and_random_counts_move_on():
    model = NnxNet(nnx.Rngs(0))
    graph, params, others = nnx.split(model, nnx.Param, ...)
    tree = {"params": params, "others": others}

    def student(tree, x):
        merged = nnx.merge(graph, tree["params"], tree["others"])
        logits = merged(x)
        return Outputs(logits, state={"others": nnx.state(merged, nnx.Not(nnx.Param))})

    tx = optax.sgd(0.1)
    step = jc.distill_step(student, teacher, tx)
    state = tx.init(jc.split(tree)[0])
    final, state, _ = step(tree, state, THEIRS, (X, LABELS))

    def by_hand(model):
        return loss_of(model(X))

    grads = nnx.grad(by_hand)(model)  # which also moves its statistics and counts
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
    _, params, others = nnx.split(model, nnx.Param, ...)
    chex.assert_trees_all_close(final["params"], params, rtol=1e-4, atol=1e-6)
    floats = jc.split(final["others"])[0], jc.split(others)[0]
    chex.assert_trees_all_close(*floats, rtol=1e-5)
    counts = (
        final["others"]["dropout"]["rngs"]["count"],
        others["dropout"]["rngs"]["count"],
    )
    assert counts[0][...] == counts[1][...] > 0


def test_equinox_trains_what_is_an_array():
    net = eqx.nn.MLP(4, CLASSES, 6, 1, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_array)

    def student(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    tx = optax.sgd(0.1)
    step = jc.distill_step(student, teacher, tx)
    final, _, _ = step(params, tx.init(params), THEIRS, (X, LABELS))

    grads = jax.grad(lambda p: loss_of(student(p, X)))(params)
    wanted = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    chex.assert_trees_all_close(final, wanted, rtol=1e-4, atol=1e-6)
    assert eqx.combine(final, static)(X[0]).shape == (CLASSES,)


def test_haiku_trains_with_its_state():
    def forward(x):
        x = hk.BatchNorm(True, True, 0.5)(hk.Linear(6)(x), is_training=True)
        return hk.Linear(CLASSES)(jax.nn.relu(x))

    net = hk.transform_with_state(forward)
    params, state = net.init(jax.random.key(0), X)

    def student(tree, x):
        logits, found = net.apply(tree["params"], tree["state"], None, x)
        return Outputs(logits, state={"state": found})

    tx, tree = optax.sgd(0.1), {"params": params, "state": state}
    step = jc.distill_step(student, teacher, tx)
    final, _, _ = step(tree, tx.init(jc.split(tree)[0]), THEIRS, (X, LABELS))

    def by_hand(params):
        logits, found = net.apply(params, state, None, X)
        return loss_of(logits), found

    grads, found = jax.grad(by_hand, has_aux=True)(params)
    wanted = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    chex.assert_trees_all_close(final["params"], wanted, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(final["state"], found, rtol=1e-5)


def test_the_teacher_may_be_of_another_framework_and_have_a_state_of_its_own():
    tx = optax.sgd(0.1)

    def spoken(variables, x):  # in evaluation, without a key
        return NET.apply(variables, x, train=False)

    step = jc.distill_step(teacher, spoken, tx, hard=0.0)
    final, _, metrics = step(THEIRS, tx.init(THEIRS), VARIABLES, (X,))
    assert metrics["soft"] > 0
    assert np.any(final != THEIRS)
