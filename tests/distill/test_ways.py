"""Ways to use one step: accumulation, 16 bits, teachers of all kinds, many devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import NamedSharding, PartitionSpec

import jaxcomp as jc


CLASSES = 3


def model(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def array(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def make_params(seed, width=5):
    rng = np.random.default_rng(seed)
    return {"a": array(rng, 4, width), "b": array(rng, width, CLASSES)}


def make_batch(seed, size=8):
    rng = np.random.default_rng(seed)
    return array(rng, size, 4), jnp.asarray(rng.integers(0, CLASSES, size))


STUDENT, TEACHER, BATCH = make_params(0), make_params(1, width=8), make_batch(2)


def test_small_batches_accumulated_are_one_large_one():
    adam = optax.adam(0.05)
    tx = optax.MultiSteps(adam, 4).gradient_transformation()
    step = jc.distill_step(model, model, tx)
    params, state = STUDENT, tx.init(STUDENT)
    for i in range(4):
        part = jax.tree.map(lambda a, i=i: a[2 * i : 2 * i + 2], BATCH)
        params, state, _ = step(params, state, TEACHER, part)
    whole = jc.distill_step(model, model, adam)
    wanted, _, _ = whole(STUDENT, adam.init(STUDENT), TEACHER, BATCH)
    chex.assert_trees_all_close(params, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_in_bfloat16_over_float32_weights_keeps_them_float32():
    def narrow(params, x):
        params, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
        return model(params, x)

    tx = optax.sgd(0.1)
    args = STUDENT, tx.init(STUDENT), TEACHER, BATCH
    final, _, metrics = jc.distill_step(narrow, narrow, tx)(*args)
    wanted, _, _ = jc.distill_step(model, model, tx)(*args)
    chex.assert_trees_all_equal_dtypes(final, STUDENT)
    chex.assert_type(list(metrics.values()), jnp.float32)
    chex.assert_trees_all_close(final, wanted, atol=3e-3)


def test_a_scale_that_follows_the_gradients_drops_after_an_overflow():
    def narrow(params, x):
        return model(jax.tree.map(lambda a: a.astype(jnp.float16), params), x)

    loss = jc.distill_loss(narrow, model)
    x = BATCH[0].astype(jnp.float16)

    @jax.jit
    def gradient(scale, params):
        return scale.value_and_grad(loss, has_aux=True)(params, TEACHER, (x, BATCH[1]))

    high = DynamicScale(scale=jnp.float32(2.0**30))
    lower, finite, _, _ = gradient(high, STUDENT)
    assert not finite
    assert lower.scale == 2.0**29
    good = DynamicScale(scale=jnp.float32(2.0**10))
    _, finite, (_, measured), grads = gradient(good, STUDENT)
    wanted = jax.grad(jc.distill_loss(model, model), has_aux=True)(
        STUDENT, TEACHER, BATCH
    )[0]
    assert finite
    assert measured.metrics["loss"] < 10  # not scaled
    chex.assert_trees_all_close(grads, wanted, atol=5e-3)


def test_a_teacher_in_int8_teaches_nearly_the_same_and_stays_int8_in_the_program():
    small = jc.quantize_tree(TEACHER, bits=8)
    tx = optax.sgd(0.1)
    step = jc.distill_step(model, model, tx)
    ours, _, _ = step(STUDENT, tx.init(STUDENT), small, BATCH)
    wanted, _, _ = step(STUDENT, tx.init(STUDENT), TEACHER, BATCH)
    chex.assert_trees_all_close(ours, wanted, atol=2e-3)
    lowered = step.lower(STUDENT, tx.init(STUDENT), small, BATCH)
    codes = [x for x in jax.tree.leaves(lowered.in_avals) if x.dtype == jnp.uint8]
    assert len(codes) == 2  # arguments, packed; not constants
    assert 'dense<"0x' not in lowered.as_text()


def test_a_teacher_that_is_a_moving_average_of_the_student():
    tx = optax.sgd(0.1)
    step = jc.distill_step(model, model, tx, hard=0.5)
    params, state, teacher = STUDENT, tx.init(STUDENT), STUDENT
    wanted = STUDENT
    for seed in range(3):
        params, state, _ = step(params, state, teacher, make_batch(seed))
        teacher = optax.incremental_update(params, teacher, step_size=0.1)
        wanted = jax.tree.map(lambda t, p: 0.9 * t + 0.1 * p, wanted, params)
    chex.assert_trees_all_close(teacher, wanted, rtol=1e-5)
    assert step._cache_size() == 1


def test_two_students_that_teach_each_other_come_to_agree():
    # Zhang et al., arXiv:1706.00384: in turn, each by the other as it is now.
    tx = optax.adam(0.02)
    one, two = make_params(3), make_params(4, width=7)
    states = tx.init(one), tx.init(two)
    first = jc.distill_step(model, model, tx, temperature=1.0, hard=0.5)
    x, labels = BATCH
    apart = jc.soft_target_loss(model(one, x), model(two, x)).mean()
    for _ in range(100):
        one, state, _ = first(one, states[0], two, BATCH)
        two, other, metrics = first(two, states[1], one, BATCH)
        states = state, other
    together = jc.soft_target_loss(model(one, x), model(two, x)).mean()
    assert together < 0.2 * apart
    assert metrics["hard"] < 0.7


def test_a_chain_of_assistants_is_a_loop_over_sizes():
    # Mirzadeh et al., arXiv:1902.03393.
    tx, teacher, losses = optax.adam(0.05), TEACHER, []
    step = jc.distill_step(model, model, tx, hard=0.0)
    for width in (6, 4):
        params = make_params(width, width)
        state = tx.init(params)
        for _ in range(60):
            params, state, metrics = step(params, state, teacher, BATCH)
        teacher = params
        losses.append(float(metrics["soft"]))
    assert teacher["a"].shape == (4, 4)
    assert max(losses) < 0.1


def test_a_penalty_leaves_zeros_alone():
    tx = optax.chain(optax.sgd(0.1), jc.keep_zeros())
    params = jc.prune_tree(STUDENT, theta=0.5)
    step = jc.distill_step(model, model, tx, penalty=lambda w: 1e-3 * jc.l1_penalty(w))
    final, _, metrics = step(params, tx.init(params), TEACHER, BATCH)
    assert metrics["penalty"] > 0
    np.testing.assert_array_equal(final["a"] == 0, params["a"] == 0)


def distill_on_a_mesh():
    """One step on eight devices and on one, with four layouts of the teacher."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

    def put(tree, *axes):
        spec = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.device_put(tree, spec)

    def with_hidden(params, x):
        hidden = x @ params["a"]
        logits = jnp.tanh(hidden) @ params["b"]
        return jc.distill.Outputs(logits, {"hidden": hidden})

    def relation(ours, theirs, batch):  # between examples of different devices
        grams = [f @ f.T for f in (ours.features["hidden"], theirs.features["hidden"])]
        return jnp.mean((grams[0] - grams[1]) ** 2, axis=-1)

    tx = optax.adam(0.1)
    step = jc.distill_step(with_hidden, with_hidden, tx, terms={"gram": relation})
    x, labels = make_batch(0, size=16)
    mask = jnp.arange(16) % 5 > 0
    wanted = step(STUDENT, tx.init(STUDENT), TEACHER, (x, labels, mask))
    small = jc.quantize_tree(TEACHER, bits=8)
    split = {"a": put(TEACHER["a"], None, "model"), "b": put(TEACHER["b"], "model")}
    teachers = {"replicated": put(TEACHER), "sharded": split, "int8": put(small)}
    for name, teacher in teachers.items():
        params = put(STUDENT)
        batch = put((x, labels, mask), "data")
        final, state, metrics = step(params, tx.init(params), teacher, batch)
        again = step(final, state, teacher, batch)
        tolerance = 2e-2 if name == "int8" else 1e-5
        chex.assert_trees_all_close(final, wanted[0], rtol=tolerance, atol=tolerance)
        chex.assert_trees_all_close(metrics, wanted[2], rtol=10 * tolerance)
        assert np.isfinite(again[2]["loss"])
        assert len(final["a"].sharding.device_set) == 8
        assert final["a"].sharding.is_fully_replicated
        print(name)


def test_eight_devices_do_what_one_does_however_the_teacher_lies(on_eight_devices):
    assert on_eight_devices(__file__) == ["replicated", "sharded", "int8"]


if __name__ == "__main__":
    distill_on_a_mesh()
