"""What every link of a chain promises. A new one is one more row.

Of `ROWS` if it holds masks, else of `LINKS`. Run as a script, this file trains every
row of `ROWS` on a mesh of devices.
"""

import operator
from functools import partial

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import jaxcomp as jc
from jaxcomp.train.decay import decay_learning_rate, restart_decay
from jaxcomp.train.latent import prune_straight_through
from jaxcomp.train.norms import freeze_after
from jaxcomp.train.project import harden, project
from jaxcomp.train.regrow import regrow_randomly, rigl
from jaxcomp.train.rewind import rewind_learning_rate, rewind_weights
from jaxcomp.train.rounding import round_stochastically, round_to_step_stochastically
from jaxcomp.train.saliency import (
    prune_by_movement,
    prune_by_saliency,
    prune_by_soft_movement,
)
from jaxcomp.train.shrinkage import shrink_groups, shrink_l1


STEPS = 6
HALF = optax.constant_schedule(0.5)
SCHEDULE = optax.linear_schedule(0.25, 0.5, 3)
SPARSE = {"fraction": optax.constant_schedule(0.3), "score": jc.magnitude, "every": 3}


def array(rng, shape):
    """Normal values of which every fourth is 0."""
    x = rng.normal(size=shape).astype(np.float32)
    return jnp.asarray(np.where(np.arange(x.size).reshape(shape) % 4 == 1, 0, x))


def make_layer(seed=0):
    rng = np.random.default_rng(seed)
    kernel, bias = array(rng, (4, 6)), array(rng, (6,))
    return {"kernel": kernel, "bias": bias, "gain": jnp.float32(2.0)}


def make_params():
    return {"dense": make_layer(), "pair": (array(np.random.default_rng(5), (3, 5)),)}


def make_grads(params, seed=1, steps=STEPS):
    """Gradients of all steps, stacked. They push against the zeros as well."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=(steps, *p.shape)).astype(np.float32)),
        params,
    )


def matrices(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if leaf.ndim >= 2]


def zeros(tree):
    return [int(np.sum(m == 0)) for m in matrices(tree)]


def pruned_each(initial, final):
    assert zeros(final) == [round(0.5 * m.size) for m in matrices(final)]


def pruned_together(initial, final):
    assert sum(zeros(final)) == round(0.5 * sum(m.size for m in matrices(final)))


def zeros_held(initial, final):
    for before, after in zip(matrices(initial), matrices(final), strict=True):
        np.testing.assert_array_equal(before == 0, after == 0)


def pruned_some(initial, final):
    assert all(
        0 < n < m.size for n, m in zip(zeros(final), matrices(final), strict=True)
    )


def has_zeros(initial, final):
    assert all(zeros(final))


def has_empty_units(initial, final):
    assert all(np.any(np.all(m == 0, axis=0)) for m in matrices(final))


def moved_little(initial, final, most=0.3):
    for before, after in zip(matrices(initial), matrices(final), strict=True):
        assert np.max(np.abs(after - before)) < most


def on_quarters(initial, final):
    jc.testing.assert_on_grid(final, 0.25)


def to_quarters(w):
    return jnp.round(4 * w) / 4


# The transformation, and what holds of the matrices once it has run.
ROWS = {
    "prune_gradually": (jc.prune_gradually(SCHEDULE, every=2), pruned_each),
    "prune_gradually, global budget": (
        jc.prune_gradually(SCHEDULE, every=2, budget=jc.prune.global_budget),
        pruned_together,
    ),
    "keep_zeros": (jc.keep_zeros(), zeros_held),
    "rigl": (rigl(optax.identity(), 0.5, **SPARSE), pruned_each),
    "regrow_randomly": (
        regrow_randomly(jax.random.key(0), optax.identity(), 0.5, **SPARSE),
        pruned_each,
    ),
    "prune_straight_through": (
        prune_straight_through(optax.identity(), SCHEDULE, every=2, decay=0.1),
        pruned_each,
    ),
    "prune_by_saliency": (
        prune_by_saliency(optax.identity(), SCHEDULE, every=2),
        pruned_each,
    ),
    "prune_by_movement": (
        prune_by_movement(optax.identity(), SCHEDULE, every=2),
        pruned_each,
    ),
    "prune_by_soft_movement": (
        prune_by_soft_movement(optax.identity(), 0.4, rate=0.5, penalty=HALF),
        pruned_some,
    ),
    # One round that ends with the second step; there are two more updates at its turn.
    "rewind_weights": (
        rewind_weights(optax.identity(), HALF, every=2, to=1),
        pruned_each,
    ),
    "rewind_learning_rate": (
        rewind_learning_rate(optax.identity(), HALF, every=2),
        pruned_each,
    ),
}

# Links without masks.
LINKS = {
    "shrink_l1": (shrink_l1(0.2), has_zeros),
    "shrink_groups": (shrink_groups(0.3), has_empty_units),
    "harden": (
        harden(to_quarters, optax.linear_schedule(0.25, 1.0, 3), every=2),
        on_quarters,
    ),
    "project": (project(to_quarters, every=3), on_quarters),
    "freeze_after": (freeze_after(1, where=jc.is_matrix), moved_little),
    "round_to_step_stochastically": (
        round_to_step_stochastically(jax.random.key(0), 0.25),
        on_quarters,
    ),
    "decay_learning_rate": (decay_learning_rate(0.125, every=1), moved_little),
    # The first step makes weights of zeros, and so the second is a whole one too.
    "restart_decay": (
        restart_decay(optax.exponential_decay(1.0, 1, 0.125)),
        partial(moved_little, most=0.4),
    ),
}
ALL = ROWS | LINKS

# For tests of one matrix, in which a budget says nothing.
LOCAL = [
    "prune_gradually",
    "keep_zeros",
    "regrow_randomly",
    "prune_by_movement",
    "rewind_weights",
]


@pytest.fixture(params=ROWS)
def row(request):
    """A row that holds masks."""
    return ROWS[request.param]


@pytest.fixture(params=ALL)
def any_row(request):
    return ALL[request.param]


@pytest.fixture(params=LOCAL)
def local_row(request):
    return ROWS[request.param]


@pytest.fixture(params=[*LOCAL, *LINKS])
def any_local_row(request):
    return ALL[request.param]


@pytest.fixture
def compiled_quickly():
    """For tests of what goes where; those of exact values are compiled as ever."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


QUICK = pytest.mark.usefixtures("compiled_quickly")


def raw(tree):
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf) for leaf in leaves]
    return treedef, [(a.dtype, a.shape, a.tobytes()) for a in arrays]


def stepper(tx):
    """(params, state), grads -> (params, state), None: the body of a scan."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return step


def train(tx, params, grads):
    carry, _ = jax.jit(lambda c, g: jax.lax.scan(stepper(tx), c, g))(
        (params, tx.init(params)), grads
    )
    return carry[0]


def assert_holds(row, tx, params):
    """Trains with ``tx``, which has the row's link in it, and checks the matrices."""
    final = train(tx, params, make_grads(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(final, params)
    chex.assert_tree_all_finite(final)
    row[1](params, final)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(final), strict=True)
    assert all(np.any(before != after) for before, after in pairs)  # it did train
    return final


def assert_alike(ours, theirs):
    """Equal up to the fusing of XLA, and exactly in what is zero."""
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x == 0, (ours, theirs))))


def test_a_scan_of_seeds_equals_a_loop_for_each_that_traces_once(any_local_row):
    tx = optax.chain(optax.sgd(0.1), any_local_row[0])
    seeds = [(make_layer(s), make_grads(make_layer(s), s + 10)) for s in range(3)]

    def scan(params, grads):
        return jax.lax.scan(stepper(tx), (params, tx.init(params)), grads)[0]

    together = jax.jit(jax.vmap(scan))(
        *jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    )
    chex.clear_trace_counter()  # it counts by name
    step = jax.jit(chex.assert_max_traces(stepper(tx), n=1))
    for seed, (params, grads) in enumerate(seeds):
        carry = params, tx.init(params)
        for i in range(STEPS):
            carry, _ = step(carry, jax.tree.map(operator.itemgetter(i), grads))
        any_local_row[1](params, carry[0])
        assert_alike(carry, jax.tree.map(operator.itemgetter(seed), together))


def test_a_thousand_steps_in_place_trace_once(local_row):
    tx = optax.chain(optax.adam(0.01), local_row[0])
    params = make_layer()
    initial = jax.tree.map(np.asarray, params)
    grads = make_grads(params)
    rows = [jax.tree.map(operator.itemgetter(i), grads) for i in range(STEPS)]
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(stepper(tx), n=1), donate_argnums=0)
    carry = jax.tree.map(jnp.copy, params), tx.init(params)
    given = jax.tree.leaves(carry)
    for i in range(1000):
        carry, _ = step(carry, rows[i % STEPS])
    assert all(leaf.is_deleted() for leaf in given if leaf.ndim)
    chex.assert_tree_all_finite(carry)
    local_row[1](initial, carry[0])
    assert jc.strays(carry[1]) == 0


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1),
    "adafactor": optax.adafactor(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
}


@QUICK
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [(name, "adamw") for name in LOCAL]
    + [(name, o) for name in LOCAL[:2] for o in OPTIMIZERS if o != "adamw"],
)
def test_holds_after_any_optimizer(name, optimizer):
    tx = optax.chain(OPTIMIZERS[optimizer], ROWS[name][0])
    assert_holds(ROWS[name], tx, make_layer())


@QUICK
def test_holds_under_masked_and_leaves_the_rest_to_the_optimizer(row):
    mask = {"dense": True, "pair": False}
    tx = optax.chain(optax.sgd(0.1), optax.masked(row[0], mask))
    params = make_params()
    grads = make_grads(params)
    final = train(tx, params, grads)
    row[1](params["dense"], final["dense"])
    free = params["pair"][0] - 0.1 * jnp.sum(grads["pair"][0], axis=0)
    chex.assert_trees_all_close(final["pair"][0], free, rtol=1e-5, atol=1e-6)


@QUICK
def test_holds_under_partition_of_which_a_part_has_no_matrices(any_row):
    labels = {
        "dense": {"kernel": "fast", "bias": "none", "gain": "none"},
        "pair": ("slow",),
    }
    parts = {
        "fast": optax.chain(optax.adam(0.1), any_row[0]),
        "slow": optax.chain(optax.sgd(0.1), any_row[0]),
        "none": optax.chain(optax.sgd(0.1), any_row[0]),
    }
    params = make_params()
    final = assert_holds(any_row, optax.partition(parts, labels), params)
    for name in ("dense", "pair"):  # each part has a budget of its own
        any_row[1](params[name], final[name])


@QUICK
def test_holds_under_multi_steps_that_skip_a_bad_one_at_rates_that_change(
    any_local_row,
):
    def optimizer(learning_rate):
        return optax.chain(optax.adam(learning_rate), any_local_row[0])

    rates = optax.piecewise_constant_schedule(0.1, {2: 0.5})
    injected = optax.inject_hyperparams(optimizer)(learning_rate=rates)
    steps = optax.MultiSteps(injected, 2).gradient_transformation()
    tx = optax.apply_if_finite(steps, 3)
    params = make_layer()
    grads = make_grads(params, steps=STEPS + 1)
    grads["gain"] = grads["gain"].at[2].set(jnp.nan)
    final = train(tx, params, jax.tree.map(lambda g: jnp.repeat(g, 2, axis=0), grads))
    chex.assert_tree_all_finite(final)
    any_local_row[1](params, final)


def holed_linear():
    """An NNX layer, a row of whose kernel is zero."""
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda x: (x + 0.01).at[0].set(0), state))
    return model


@QUICK
def test_holds_for_a_tuple_with_an_nnx_state(any_local_row):
    state = nnx.state(holed_linear())
    tx = optax.chain(optax.adam(0.1), any_local_row[0])
    final = assert_holds(any_local_row, tx, (jnp.ones(3), state))
    assert isinstance(final[1], type(state))


@QUICK
def test_holds_for_an_nnx_optimizer(local_row):
    model = holed_linear()
    tx = optax.chain(optax.adam(0.1), local_row[0])
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    initial = jax.tree.map(np.asarray, nnx.state(model))

    def loss(model, x):
        return jnp.mean((model(x) - 1) ** 2)

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(loss)(model, x))

    for x in make_grads(jnp.zeros((3, 4))):
        step(model, optimizer, x)
    local_row[1](initial, nnx.state(model))


@QUICK
def test_holds_for_a_train_state_of_linen(local_row):
    model, rows = nn.Dense(6), make_grads(jnp.zeros((3, 4)))
    params = model.init(jax.random.key(0), rows[0])["params"]
    params["kernel"] = params["kernel"].at[0].set(0)
    tx = optax.chain(optax.adam(0.1), local_row[0])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def step(state, x):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - 1) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params)), None

    final, _ = jax.jit(lambda state: jax.lax.scan(step, state, rows))(state)
    local_row[1](params, final.params)
    assert final.step == STEPS


@pytest.mark.parametrize(
    ("weights", "updates"), [("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_lands_on_exact_zero_and_leaves_other_leaves_alone_whatever_the_dtypes(
    local_row, weights, updates
):
    params = jax.tree.map(lambda p: p.astype(weights), make_layer())
    params["kernel"] = params["kernel"].at[1:].add(0.1)  # leaves two zeros of six
    grads = jax.tree.map(lambda p: 3 * p.astype(updates), params)
    tx = optax.chain(optax.scale(0.25), local_row[0])
    update, state = jax.jit(tx.update), tx.init(params)
    for i in range(3):
        moves, state = update(grads, state, params)
        if i == 0:  # a later one may rewind
            for name in ("bias", "gain"):
                np.testing.assert_array_equal(moves[name], grads[name] / 4)
        params = optax.apply_updates(params, moves)
        masks = np.asarray(state[1].masks["kernel"])
        assert not np.any(np.asarray(params["kernel"])[~masks])
        chex.assert_type(jax.tree.leaves(params), weights)
    assert not masks.all()


def through_flax(state, tx, params, folder):
    data = flax.serialization.to_bytes(state)
    return flax.serialization.from_bytes(tx.init(params), data)


def through_a_file(state, tx, params, folder):
    jc.save(folder / "state.jxc", state)
    return jc.load(folder / "state.jxc", like=tx.init(params))


def test_a_stored_state_resumes_bit_for_bit(any_local_row, tmp_path):
    tx = optax.chain(optax.adam(0.1), any_local_row[0])
    start = make_layer()
    grads = make_grads(start)
    step = jax.jit(stepper(tx))

    def run(carry, first, last):
        for i in range(first, last):
            carry, _ = step(carry, jax.tree.map(operator.itemgetter(i), grads))
        return carry

    params, state = run((start, tx.init(start)), 0, 3)
    final = run((params, state), 3, STEPS)
    for pass_through in (through_flax, through_a_file):
        back = pass_through(state, tx, start, tmp_path)
        assert raw(back) == raw(state)
        assert raw(run((params, back), 3, STEPS)) == raw(final)


def test_orbax_stores_states_bit_for_bit(tmp_path):
    params = make_params()
    states = {name: tx.init(params) for name, (tx, _) in ALL.items()}
    rng = np.random.default_rng(0)
    trained = jax.tree.map(
        lambda x: jnp.asarray(rng.integers(0, 2, x.shape), x.dtype), states
    )
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", trained)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "states", states)
    assert raw(back) == raw(trained)


NEEDS_PARAMS = [k for k in ALL if k not in ("freeze_after", "decay_learning_rate")]


@pytest.mark.parametrize("name", NEEDS_PARAMS)
def test_update_without_params_says_what_to_call(name):
    params = make_params()
    tx = ALL[name][0]
    with pytest.raises(
        ValueError, match=r"needs the current weights: call tx.update\(grads, state, p"
    ):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("name", [k for k in ALL if k != "decay_learning_rate"])
def test_a_tree_in_which_nothing_is_selected_is_an_error(name):
    with pytest.raises(
        ValueError, match="selected none of the 2 leaves, which are a, b"
    ):
        ALL[name][0].init({"a": jnp.ones(3), "b": jnp.float32(0)})


def test_lowers_for_every_platform(any_row):
    params = make_params()
    platforms = ("cpu", "cuda", "tpu")
    update = jax.export.export(jax.jit(any_row[0].update), platforms=platforms)
    assert update(params, any_row[0].init(params), params).platforms == platforms


def test_shapes_of_the_state_never_change(any_row, strict):
    params = make_params()
    state = jax.eval_shape(any_row[0].init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, any_row[0].init(params))
    updates, after = jax.eval_shape(any_row[0].update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def test_optax_tells_its_masks_from_its_counts(any_row):
    state = any_row[0].init(make_params())
    gone = optax.tree.map_params(any_row[0], lambda leaf: "like params", state)
    for before, after in zip(*map(jax.tree.leaves, (state, gone)), strict=True):
        if before.dtype == bool:
            assert after == "like params"
        elif jnp.issubdtype(before.dtype, jnp.integer):
            assert after is before


def test_bfloat16_weights_round_at_random_alike_in_a_scan_and_after_a_restore():
    tx = optax.chain(optax.sgd(0.1), round_stochastically(jax.random.key(0)))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_layer())
    grads = make_grads(params)
    step = jax.jit(stepper(tx))
    carry = params, tx.init(params)
    for i in range(STEPS):
        carry = flax.serialization.from_bytes(carry, flax.serialization.to_bytes(carry))
        carry, _ = step(carry, jax.tree.map(operator.itemgetter(i), grads))
    chex.assert_trees_all_equal_dtypes(carry[0], params)
    chex.assert_trees_all_equal(train(tx, params, grads), carry[0])


def train_on_a_mesh():
    """Trains every row of `ROWS` on eight devices and on one, and compares."""
    mesh = jax.sharding.Mesh(jax.devices(), ("in",))  # of Auto axes
    rng = np.random.default_rng(0)
    params = {"kernel": array(rng, (8, 6)), "bias": array(rng, (6,))}
    grads = make_grads(params)

    def spread(x):
        spec = PartitionSpec("in") if x.shape == (8, 6) else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    for name, (tx, holds) in ROWS.items():
        step = jax.jit(stepper(optax.chain(optax.adam(0.1), tx)))
        one = params, optax.chain(optax.adam(0.1), tx).init(params)
        many = jax.tree.map(spread, one)
        for i in range(STEPS):
            row = jax.tree.map(operator.itemgetter(i), grads)
            one, _ = step(one, row)
            many, _ = step(many, jax.tree.map(spread, row))
        (alone, state), (final, split) = one, many
        chex.assert_trees_all_equal(split[1].masks, state[1].masks)
        chex.assert_trees_all_close(final, alone, rtol=1e-5, atol=1e-6)
        holds(params, final)
        kernels = [x for x in jax.tree.leaves(many) if x.shape == (8, 6)]
        assert len(kernels) >= 4  # weights, two moments, masks
        for x in kernels:
            assert x.sharding.shard_shape(x.shape) == (1, 6), (name, x.sharding)
        print(name)


def test_eight_devices_do_what_one_does_and_masks_stay_where_their_weights_are(
    on_eight_devices,
):
    assert on_eight_devices(__file__) == list(ROWS)


if __name__ == "__main__":
    train_on_a_mesh()
