"""The loop is the loop one would write, also where it was cut off and taken up."""

import math
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.distill.fit import fit_distill


KEY = jax.random.key(7)
PER_EPOCH = 3


def teacher(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def student(params, x, key):
    hidden = jnp.tanh(x @ params["a"])
    kept = jax.random.bernoulli(key, 0.8, hidden.shape)
    return jnp.where(kept, hidden / 0.8, 0) @ params["b"]


def make_params(seed, width=5):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=(4, width)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(width, 3)), jnp.float32),
    }


def batches(epoch):
    for i in range(PER_EPOCH):
        rng = np.random.default_rng([epoch, i])
        x = rng.normal(size=(8, 4)).astype(np.float32)
        yield x, rng.integers(0, 3, 8)


TEACHER = make_params(1, width=7)
STUDENT = make_params(0)
SHARED = jc.share_tree(STUDENT, clusters=4)
TX = optax.adam(0.05)
STEP = jc.distill_step(student, teacher, TX)
PLAIN = jc.distill_step(teacher, teacher, TX)


def start(tree):
    return tree, TX.init(jc.split(tree)[0]), TEACHER


def score(params):
    return -float(jnp.sum(jc.densify(params)["a"] ** 2))


def bits(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in leaves]


def cut_off_in(epoch):
    def some(e):
        for i, batch in enumerate(batches(e)):
            if e == epoch and i == 1:
                raise KeyboardInterrupt
            yield batch

    return some


def test_is_the_loop_one_would_write():
    params, state, _ = start(STUDENT)
    losses = []
    for i in range(2 * PER_EPOCH):
        batch = list(batches(i // PER_EPOCH))[i % PER_EPOCH]
        args = params, state, TEACHER, batch, jax.random.fold_in(KEY, i)
        params, state, metrics = STEP(*args)
        losses.append(float(metrics["loss"]))
    done = fit_distill(KEY, STEP, *start(STUDENT), batches, epochs=2)
    assert bits((done.params, done.opt_state)) == bits((params, state))
    assert set(done.history[0]) == {"loss", "soft", "hard"}
    means = [entry["loss"] for entry in done.history]
    np.testing.assert_allclose(means, np.reshape(losses, (2, 3)).mean(1), rtol=1e-6)
    assert done.best_epoch == 1
    assert all(type(value) is float for value in done.history[0].values())


def test_without_a_key_the_student_is_given_none():
    done = fit_distill(None, PLAIN, *start(STUDENT), batches, epochs=8)
    assert done.history[-1]["loss"] < 0.7 * done.history[0]["loss"]


@pytest.mark.parametrize("tree", [STUDENT, SHARED], ids=["dense", "shared"])
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(tree, epoch, tmp_path):
    options = {"epochs": 4, "evaluate": score}
    whole = fit_distill(KEY, STEP, *start(tree), batches, **options)
    with pytest.raises(KeyboardInterrupt):
        args = KEY, STEP, *start(tree), cut_off_in(epoch)
        fit_distill(*args, **options, folder=tmp_path)
    seen = []

    def watched(e):
        seen.append(e)
        return batches(e)

    again = fit_distill(KEY, STEP, *start(tree), watched, **options, folder=tmp_path)
    assert seen == list(range(epoch, 4))
    assert bits(again[:2]) == bits(whole[:2])
    assert again[2:] == whole[2:]
    assert again.history[0]["loss"] > 0


def test_a_run_that_is_over_is_only_read(tmp_path):
    options = {"epochs": 2, "folder": tmp_path / "new" / "run"}
    first = fit_distill(KEY, STEP, *start(SHARED), batches, **options)
    again = fit_distill(KEY, STEP, *start(SHARED), cut_off_in(0), **options)
    assert bits(again[:2]) == bits(first[:2])
    assert again[2:] == first[2:]
    options["epochs"] = 3
    longer = fit_distill(KEY, STEP, *start(SHARED), batches, **options)
    assert longer.history[:2] == first.history
    straight = fit_distill(KEY, STEP, *start(SHARED), batches, epochs=3)
    assert bits(longer[:2]) == bits(straight[:2])


def test_only_the_last_checkpoint_is_kept_and_what_is_not_whole_is_not_read(tmp_path):
    one = fit_distill(KEY, STEP, *start(STUDENT), batches, epochs=1, folder=tmp_path)
    half = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", half)
    shutil.rmtree(half / "arrays")
    seen = fit_distill(KEY, STEP, *start(STUDENT), batches, epochs=1, folder=tmp_path)
    assert bits(seen[:2]) == bits(one[:2])
    two = fit_distill(KEY, STEP, *start(STUDENT), batches, epochs=2, folder=tmp_path)
    straight = fit_distill(KEY, STEP, *start(STUDENT), batches, epochs=2)
    assert bits(two[:2]) == bits(straight[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_leaves_of_every_kind_come_back(tmp_path):
    params = {
        "bfloat16": jnp.array([1.5, -2], jnp.bfloat16),
        "float8": jnp.array([1.5, -2], jnp.float8_e4m3fn),
        "int4": jnp.array([-8, 7], jnp.int4),
        "uint2": jnp.array([3, 0], jnp.uint2),
        "bool": jnp.array([True, False]),
        "none": jnp.zeros((0, 2)),
        "key": jax.random.key(3, impl="rbg"),
        "keys": jax.random.split(KEY, 2),
        "host": np.array([0.1]),
        "count": 3,
    }

    @jax.jit
    def step(params, opt_state, teacher_params, batch):
        del teacher_params
        more = {"count": params["count"] + batch, "keys": params["keys"][::-1]}
        # Stays a bfloat16, as the state has a weak type, which no file of arrays has.
        moved = params["bfloat16"] + opt_state
        return params | more | {"bfloat16": moved}, opt_state * 2, {"loss": batch}

    def fit(epochs, **options):
        def ones(epoch):
            return [jnp.int32(1)]

        args = None, step, params, jnp.asarray(0.25), None, ones
        return fit_distill(*args, epochs=epochs, **options)

    def kept(done):
        plain = done.params | {
            name: jax.random.key_data(done.params[name]) for name in ("key", "keys")
        }
        return bits((plain, done.opt_state)), jax.random.key_impl(done.params["key"])

    fit(2, folder=tmp_path)
    found = fit(4, folder=tmp_path)
    assert kept(found) == kept(fit(4))
    assert found.params["count"] == 7
    assert found.opt_state.weak_type


def test_arrays_come_back_to_where_they_were(tmp_path):
    mesh = jax.make_mesh((1,), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params, state, theirs = start(STUDENT)
    params, state = jax.device_put((params, state), place)
    args = KEY, STEP, params, state, theirs, batches
    fit_distill(*args, epochs=1, folder=tmp_path)
    read = fit_distill(*args, epochs=1, folder=tmp_path)
    assert all(leaf.sharding == place for leaf in jax.tree.leaves(read[:2]))


def test_the_checkpoints_of_something_else_are_an_error(tmp_path):
    options = orbax.checkpoint.CheckpointManagerOptions(
        enable_async_checkpointing=False
    )
    args = orbax.checkpoint.args.StandardSave(STUDENT)
    with orbax.checkpoint.CheckpointManager(tmp_path, options=options) as manager:
        manager.save(5, args=args)
    with pytest.raises(ValueError, match="of its own, but .* a checkpoint 5 of some"):
        fit_distill(KEY, STEP, *start(STUDENT), batches, epochs=9, folder=tmp_path)


OTHERS = {
    "shape": (make_params(0, width=6), TX, r"a: float32\[4, 6\] where that has .* 5\]"),
    "node": (
        jc.share_tree(STUDENT, clusters=8),
        TX,
        r"a: SharedTensor.* where that has params/a: float32\[4, 5\]",
    ),
    "optimizer": (STUDENT, optax.sgd(0.1), "has nothing where that has opt_state/0/c"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_of_another_run_is_an_error_that_shows_the_leaf(name, tmp_path):
    fit_distill(KEY, STEP, *start(STUDENT), batches, epochs=1, folder=tmp_path)
    tree, tx, message = OTHERS[name]
    step, state = jc.distill_step(student, teacher, tx), tx.init(jc.split(tree)[0])
    with pytest.raises(ValueError, match=f"fit_distill needs the params.*{message}"):
        fit_distill(KEY, step, tree, state, TEACHER, batches, epochs=2, folder=tmp_path)


def test_what_is_static_in_a_node_must_be_the_same(tmp_path):
    args = KEY, STEP
    tree = jc.quantize_tree(STUDENT, bits=3)
    fit_distill(*args, *start(tree), batches, epochs=1, folder=tmp_path)
    other = jc.quantize_tree(STUDENT, bits=4)
    with pytest.raises(ValueError, match=r"bits=4.* where that has .*bits=3"):
        fit_distill(*args, *start(other), batches, epochs=2, folder=tmp_path)


def fake_step(params, opt_state, teacher_params, batch):
    return jax.tree.map(lambda x: x + 1, params), opt_state, {"loss": 0.0}


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, -math.inf, math.nan]), min_size=1),
    st.sampled_from([None, 1, 2]),
)
def test_the_best_epoch_is_kept_and_patience_ends_the_run(scores, patience):
    left = iter(scores)
    done = fit_distill(
        None,
        fake_step,
        np.zeros(1, np.float32),
        None,
        None,
        lambda epoch: [None],
        epochs=len(scores),
        evaluate=lambda params: next(left),
        patience=patience,
    )
    best, top, ran = 0, math.nan, 0
    for epoch, value in enumerate(scores):
        ran += 1
        if math.isnan(top) or value > top:
            best, top = epoch, value
        if patience is not None and epoch - best >= patience:
            break
    assert [str(entry["score"]) for entry in done.history] == list(
        map(str, scores[:ran])
    )
    assert done.best_epoch == best
    assert done.params == best + 1


def test_the_best_params_outlive_a_step_that_donates_its_own():
    step = jc.distill_step(student, teacher, TX, donate=True)
    # Copies for each, as the step reuses them.
    params, state, theirs = jax.tree.map(jnp.copy, start(STUDENT))
    args = KEY, step, params, state, theirs, batches
    done = fit_distill(*args, epochs=3, evaluate=lambda params: -params["b"][0, 0])
    kept = fit_distill(KEY, STEP, *start(STUDENT), batches, epochs=done.best_epoch + 1)
    chex.assert_trees_all_close(done.params, kept.params, rtol=1e-6)


def test_spoken_logits_in_the_inputs_stand_for_the_teacher():
    def spoken(epoch):
        for x, labels in batches(epoch):
            yield (x, teacher(TEACHER, x)), labels

    step = jc.distill_step(
        lambda params, inputs: teacher(params, inputs[0]),
        lambda _, inputs: inputs[1],
        TX,
    )
    params, state, _ = start(STUDENT)
    kept = fit_distill(None, step, params, state, None, spoken, epochs=2)
    live = fit_distill(None, PLAIN, params, state, TEACHER, batches, epochs=2)
    chex.assert_trees_all_close(kept.params, live.params, rtol=1e-4, atol=1e-6)


def test_a_metric_is_the_mean_over_the_batches_that_have_it():
    def some(epoch):
        return [{"loss": 1.0, "hard": 4.0}, {"loss": 3.0}]

    done = fit_distill(
        None, lambda p, o, t, b: (p, o, b), {}, None, None, some, epochs=1
    )
    assert done.history == [{"loss": 2.0, "hard": 4.0}]


def test_metrics_are_fetched_once_an_epoch(monkeypatch):
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x) or get(x))
    fit_distill(KEY, STEP, *start(STUDENT), batches, epochs=2)
    assert len(fetched) == 2


def test_progress_is_for_terminals_only(capfd, monkeypatch):
    def fit():
        args = None, fake_step, np.zeros(1), None, None, lambda epoch: [None] * 3
        fit_distill(*args, epochs=2, evaluate=lambda params: 0.5)
        return "".join(capfd.readouterr())

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    assert fit() == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    shown = fit()
    assert "epoch 2/2  loss 0  score 0.5" in shown
    assert "step" in shown


ARGS = KEY, STEP, *start(STUDENT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs >= 1, got 0"),
        ({"epochs": 2, "patience": 0}, "patience >= 1, got 0"),
        ({"epochs": 2, "patience": 3}, "a score for patience=3, got evaluate=None"),
    ],
)
def test_numbers_out_of_range_are_an_error(options, message):
    with pytest.raises(ValueError, match=f"fit_distill needs {message}"):
        fit_distill(*ARGS, batches, **options)


def test_batches_that_are_used_up_are_an_error():
    once = batches(0)
    with pytest.raises(ValueError, match="at least one batch, got none in epoch 1. A"):
        fit_distill(*ARGS, lambda epoch: once, epochs=2)


def test_batches_that_are_no_function_are_an_error():
    with pytest.raises(TypeError, match="function of the epoch, got list. For the"):
        fit_distill(*ARGS, list(batches(0)), epochs=2)
