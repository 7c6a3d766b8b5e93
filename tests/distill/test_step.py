"""The distillation step equals the loop one would write by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc


CLASSES = 3


def model(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"] + params["bias"][None]


def make_params(seed, width=5):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=(4, width)).astype(np.float32)),
        "b": jnp.asarray(rng.normal(size=(width, CLASSES)).astype(np.float32)),
        "bias": jnp.asarray(rng.normal(size=CLASSES).astype(np.float32)),
    }


def make_batch(seed=9):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(8, 4)).astype(np.float32))
    return x, jnp.asarray(rng.integers(0, CLASSES, 8))


STUDENT = make_params(0)
TEACHER = make_params(1, width=7)
BATCH = make_batch()


def loss_by_hand(params, teacher_params, batch, temperature, hard):
    x, labels = batch
    ours, theirs = model(params, x), model(teacher_params, x)
    p = jax.nn.softmax(theirs / temperature)
    log_q = jax.nn.log_softmax(ours / temperature)
    soft = temperature**2 * jnp.mean(jnp.sum(p * (jnp.log(p) - log_q), axis=-1))
    log_likelihood = jax.nn.log_softmax(ours)[jnp.arange(labels.size), labels]
    firm = -jnp.mean(log_likelihood)
    return (1 - hard) * soft + hard * firm, soft, firm


def total_by_hand(*args):
    return loss_by_hand(*args)[0]


def raw(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in leaves]


@pytest.mark.parametrize(("temperature", "hard"), [(2.0, 0.1), (4.0, 1.0)])
def test_steps_equal_an_unjitted_loop_by_hand(temperature, hard):
    tx = optax.adam(0.05)
    step = jc.distill_step(model, model, tx, temperature=temperature, hard=hard)
    params, state = STUDENT, tx.init(STUDENT)
    ours, our_state = STUDENT, tx.init(STUDENT)
    for seed in range(3):
        batch = make_batch(seed)
        params, state, metrics = step(params, state, TEACHER, batch)
        terms = loss_by_hand(ours, TEACHER, batch, temperature, hard)
        grads = jax.grad(total_by_hand)(ours, TEACHER, batch, temperature, hard)
        updates, our_state = tx.update(grads, our_state, ours)
        ours = optax.apply_updates(ours, updates)
        assert set(metrics) == {"loss", "soft", "hard"}
        for name, value in zip(("loss", "soft", "hard"), terms, strict=True):
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6)
            assert (metrics[name].shape, metrics[name].dtype) == ((), jnp.float32)
    chex.assert_trees_all_close(params, ours, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state, our_state, rtol=1e-3, atol=1e-5)


def test_new_weights_and_batches_do_not_trace_again():
    traced = []

    def student(params, x):
        traced.append(x)
        return model(params, x)

    tx = optax.sgd(0.1)
    step = jc.distill_step(student, model, tx)
    params, state = STUDENT, tx.init(STUDENT)
    for seed in range(3):
        params, state, _ = step(
            params, state, make_params(seed, width=7), make_batch(seed)
        )
    assert len(traced) == 1


def test_the_student_comes_to_agree_with_its_teacher():
    tx = optax.adam(0.02)
    step = jc.distill_step(model, model, tx, hard=0.0)
    params, state = STUDENT, tx.init(STUDENT)
    losses = []
    for _ in range(60):
        params, state, metrics = step(params, state, TEACHER, (BATCH[0], None))
        losses.append(float(metrics["soft"]))
    assert losses[-1] < 0.1 * losses[0]


def test_a_compressed_teacher_is_its_dense_form():
    tx = optax.sgd(0.1)
    step = jc.distill_step(model, model, tx)
    small = jc.quantize_tree(TEACHER, bits=3)
    ours = step(STUDENT, tx.init(STUDENT), small, BATCH)
    theirs = step(STUDENT, tx.init(STUDENT), jc.densify(small), BATCH)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6, atol=1e-7)


def dense_grads(tree, batch):
    """The gradient in the dense arrays, at the step's defaults."""
    return jax.grad(total_by_hand)(jc.densify(tree), TEACHER, batch, 2.0, 0.1)


def test_a_codebook_takes_the_sum_of_the_gradients_of_its_weights():
    pruned = jc.prune_tree(STUDENT, theta=0.6)
    tree = jc.share_tree(pruned, clusters=4)
    tx = optax.sgd(0.1)
    step = jc.distill_step(model, model, tx)
    final, _, _ = step(tree, tx.init(jc.split(tree)[0]), TEACHER, BATCH)
    grads = dense_grads(tree, BATCH)
    for name in ("a", "b"):
        values, grad = np.asarray(tree[name].dense()), np.asarray(grads[name])
        assert tree[name].zero
        expected = [v - 0.1 * grad[values == v].sum() for v in tree[name].codebook]
        np.testing.assert_allclose(final[name].codebook, expected, rtol=1e-4, atol=1e-6)
        assert raw(final[name].codes) == raw(tree[name].codes)
        np.testing.assert_array_equal(final[name].dense() == 0, pruned[name] == 0)
    assert jax.tree.structure(final) == jax.tree.structure(tree)
    np.testing.assert_allclose(
        final["bias"], tree["bias"] - 0.1 * grads["bias"], rtol=1e-4, atol=1e-6
    )


def test_a_scale_takes_the_sum_of_the_gradients_of_its_weights_times_their_codes():
    tree = jc.quantize_tree(STUDENT, bits=4)
    tx = optax.sgd(0.1)
    final, _, _ = jc.distill_step(model, model, tx)(
        tree, tx.init(jc.split(tree)[0]), TEACHER, BATCH
    )
    grads = dense_grads(tree, BATCH)
    for name in ("a", "b"):
        scale = np.asarray(tree[name].scale)[:, 0]  # of each output unit
        steps = np.round(np.asarray(tree[name].dense()) / scale)
        expected = scale - 0.1 * np.sum(np.asarray(grads[name]) * steps, axis=0)
        np.testing.assert_allclose(
            final[name].scale[:, 0], expected, rtol=1e-4, atol=1e-6
        )
        assert raw(final[name].codes) == raw(tree[name].codes)


def test_tied_layers_take_one_gradient_and_stay_tied():
    def looped(params, x):
        return jnp.tanh(x @ params["one"]["w"]) @ params["two"]["w"]

    w = jnp.asarray(np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32))
    free = {"one": {"w": w}, "two": {"w": w}}
    tied = jc.tie_layers(free, [("one", "two")])
    teacher = {"one": {"w": w + 1}, "two": {"w": w - 1}}
    tx = optax.sgd(0.1)
    step = jc.distill_step(looped, looped, tx, hard=0.0)
    batch = (BATCH[0], None)
    final, _, _ = step(tied, tx.init(jc.split(tied)[0]), teacher, batch)
    apart, _, _ = step(free, tx.init(free), teacher, batch)
    assert isinstance(final["two"]["w"], jc.TiedTensor)
    moved = sum((apart[name]["w"] - w for name in ("one", "two")), start=jnp.zeros(()))
    np.testing.assert_allclose(final["one"]["w"], w + moved, rtol=1e-4, atol=1e-5)


def test_a_pruned_student_stays_pruned_with_keep_zeros():
    params = jc.prune_tree(STUDENT, theta=0.6)
    tx = optax.chain(optax.adam(0.1), jc.keep_zeros())
    step = jc.distill_step(model, model, tx)
    final, state = params, tx.init(params)
    for _ in range(3):
        final, state, _ = step(final, state, TEACHER, BATCH)
    for name in ("a", "b"):
        np.testing.assert_array_equal(final[name] == 0, params[name] == 0)
        assert np.any(params[name] == 0)


def test_leaves_that_are_not_floating_are_passed_on():
    params = STUDENT | {"calls": jnp.int32(7), "name": None}
    tx = optax.sgd(0.1)
    step = jc.distill_step(model, model, tx)
    final, _, _ = step(params, tx.init(jc.split(params)[0]), TEACHER, BATCH)
    assert final["calls"] == 7
    assert jax.tree.structure(final) == jax.tree.structure(params)


def test_narrow_weights_stay_narrow_and_the_loss_is_float32():
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), STUDENT)
    batch = (BATCH[0].astype(jnp.bfloat16), BATCH[1])
    tx = optax.sgd(0.1)
    final, _, metrics = jc.distill_step(model, model, tx)(
        narrow, tx.init(narrow), TEACHER, batch
    )
    chex.assert_trees_all_equal_dtypes(final, narrow)
    chex.assert_type(list(metrics.values()), jnp.float32)


def test_the_key_reaches_the_student_and_only_where_there_is_one():
    def student(params, x, key=None):
        if key is None:
            return model(params, x)
        return model(params, x + jax.random.normal(key, x.shape))

    tx = optax.sgd(0.1)
    args = STUDENT, tx.init(STUDENT), TEACHER, BATCH
    step = jc.distill_step(student, model, tx)
    keyless = jc.distill_step(model, model, tx)
    chex.assert_trees_all_close(step(*args)[0], keyless(*args)[0], rtol=1e-6)
    noisy = [step(*args, jax.random.key(seed))[2]["loss"] for seed in (0, 1, 0)]
    assert noisy[0] == noisy[2] != noisy[1]
    assert noisy[0] != step(*args)[2]["loss"]


def test_inputs_may_be_any_tree():
    def wrapped(params, inputs):
        return model(params, inputs["x"] + inputs["more"][0])

    tx = optax.sgd(0.1)
    x, labels = BATCH
    ours = jc.distill_step(wrapped, wrapped, tx)(
        STUDENT, tx.init(STUDENT), TEACHER, ({"x": x, "more": (x,)}, labels)
    )
    theirs = jc.distill_step(model, model, tx)(
        STUDENT, tx.init(STUDENT), TEACHER, (2 * x, labels)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_no_labels_are_needed_without_a_hard_loss():
    tx = optax.sgd(0.1)
    step = jc.distill_step(model, model, tx, hard=0)
    args = STUDENT, tx.init(STUDENT), TEACHER
    final, _, metrics = step(*args, (BATCH[0], None))
    assert "hard" not in metrics
    assert metrics["loss"] == metrics["soft"] > 0
    labelled, _, measured = step(*args, BATCH)
    assert measured["hard"] > 0
    assert measured["loss"] == measured["soft"]
    chex.assert_trees_all_close(final, labelled, rtol=1e-6)


def test_missing_labels_are_an_error_that_says_what_to_pass():
    tx = optax.sgd(0.1)
    step = jc.distill_step(model, model, tx, hard=0.3)
    with pytest.raises(ValueError, match="needs labels for hard=0.3, got None. Pass"):
        step(STUDENT, tx.init(STUDENT), TEACHER, (BATCH[0], None))


@pytest.mark.parametrize("hard", [-0.1, 1.5, float("nan")])
def test_a_weight_that_is_no_fraction_is_an_error(hard):
    with pytest.raises(ValueError, match="distill_step needs 0 <= hard <= 1, got"):
        jc.distill_step(model, model, optax.sgd(0.1), hard=hard)


@pytest.mark.parametrize("temperature", [0.0, -2.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_an_error(temperature):
    with pytest.raises(ValueError, match="distill_step needs temperature > 0, got"):
        jc.distill_step(model, model, optax.sgd(0.1), temperature=temperature)


def test_logits_of_two_shapes_are_an_error():
    tx = optax.sgd(0.1)
    step = jc.distill_step(lambda p, x: model(p, x)[:, :2], model, tx)
    with pytest.raises(
        ValueError, match=r"student float32\[8, 2\] and teacher float32"
    ):
        step(STUDENT, tx.init(STUDENT), TEACHER, BATCH)


def test_the_arrays_of_the_caller_live_on_unless_donated():
    tx = optax.adam(0.1)

    def copies():
        params = jax.tree.map(jnp.copy, STUDENT)
        return params, tx.init(params)

    kept, donated = copies(), copies()
    ours = jc.distill_step(model, model, tx)(*kept, TEACHER, BATCH)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept))
    assert raw(kept[0]) == raw(STUDENT)
    theirs = jc.distill_step(model, model, tx, donate=True)(*donated, TEACHER, BATCH)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((TEACHER, BATCH)))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_donating_a_compressed_student_warns_of_nothing():
    tree = jc.share_tree(STUDENT, clusters=4)
    tx = optax.adam(0.1)
    state = tx.init(jc.split(tree)[0])
    step = jc.distill_step(model, model, tx, donate=True)
    for _ in range(2):
        tree, state, metrics = step(tree, state, TEACHER, BATCH)
    assert jnp.isfinite(metrics["loss"])


def test_lowers_for_every_platform():
    tree = jc.share_tree(STUDENT, clusters=4)
    tx = optax.adam(0.1)
    platforms = ("cpu", "cuda", "tpu")
    step = jc.distill_step(model, model, tx)
    args = tree, tx.init(jc.split(tree)[0]), TEACHER, BATCH
    assert jax.export.export(step, platforms=platforms)(*args).platforms == platforms
