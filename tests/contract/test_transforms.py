"""What every link of a chain promises. A new one is one more row of `ROWS`."""

import operator

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxcomp as jc
from jaxcomp.train import regrow_randomly, rigl


STEPS = 6
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


def make_grads(params, seed=1):
    """Gradients of all steps, stacked. They push against the zeros as well."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=(STEPS, *p.shape)).astype(np.float32)),
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
}


@pytest.fixture(params=ROWS)
def row(request):
    return ROWS[request.param]


@pytest.fixture(params=["prune_gradually", "keep_zeros", "regrow_randomly"])
def local_row(request):
    """A row for tests of one matrix, in which a budget says nothing."""
    return ROWS[request.param]


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


def test_a_scan_equals_a_loop_that_traces_once(local_row, strict):
    tx = optax.chain(optax.sgd(0.1), local_row[0])
    params = make_layer()
    grads = make_grads(params)
    chex.clear_trace_counter()  # it counts by name
    step = jax.jit(chex.assert_max_traces(stepper(tx), n=1))
    carry = params, tx.init(params)
    for i in range(STEPS):
        carry, _ = step(carry, jax.tree.map(operator.itemgetter(i), grads))
    local_row[1](params, carry[0])
    assert_alike(train(tx, params, grads), carry[0])


def test_vmap_over_seeds_equals_each_alone(local_row):
    tx = optax.chain(optax.adam(0.1), local_row[0])
    seeds = [(make_layer(s), make_grads(make_layer(s), s + 10)) for s in range(3)]
    params, grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)

    def alone(params, grads):
        return jax.lax.scan(stepper(tx), (params, tx.init(params)), grads)[0][0]

    together = jax.jit(jax.vmap(alone))(params, grads)
    jitted = jax.jit(alone)
    for i, seed in enumerate(seeds):
        assert_alike(jitted(*seed), jax.tree.map(operator.itemgetter(i), together))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adam(0.1),
        optax.lion(0.1),
        optax.rmsprop(0.1),
        optax.adafactor(0.1),
    ],
    ids=["sgd", "adam", "lion", "rmsprop", "adafactor"],
)
def test_holds_after_any_optimizer(local_row, optimizer):
    assert_holds(local_row, optax.chain(optimizer, local_row[0]), make_layer())


def test_holds_under_multi_steps(local_row):
    tx = optax.MultiSteps(optax.chain(optax.adam(0.1), local_row[0]), 2)
    params = make_layer()
    doubled = jax.tree.map(lambda g: jnp.repeat(g, 2, axis=0), make_grads(params))
    local_row[1](params, train(tx, params, doubled))


def test_holds_under_masked_and_leaves_the_rest_to_the_optimizer(row):
    plain = optax.sgd(0.1)
    mask = {"dense": True, "pair": False}
    tx = optax.chain(plain, optax.masked(row[0], mask))
    params = make_params()
    grads = make_grads(params)
    final, free = train(tx, params, grads), train(plain, params, grads)
    row[1](params["dense"], final["dense"])
    assert_alike(final["pair"], free["pair"])
    assert_alike(final["dense"]["bias"], free["dense"]["bias"])


def test_holds_under_partition_of_which_a_part_has_no_matrices(row):
    labels = {
        "dense": {"kernel": "fast", "bias": "none", "gain": "none"},
        "pair": ("slow",),
    }
    parts = {
        "fast": optax.chain(optax.adam(0.1), row[0]),
        "slow": optax.chain(optax.sgd(0.1), row[0]),
        "none": optax.chain(optax.sgd(0.1), row[0]),
    }
    params = make_params()
    final = assert_holds(row, optax.partition(parts, labels), params)
    for name in ("dense", "pair"):  # each part has a budget of its own
        row[1](params[name], final[name])


def test_holds_under_inject_hyperparams_that_change(local_row):
    def optimizer(learning_rate):
        return optax.chain(optax.adam(learning_rate), local_row[0])

    rates = optax.piecewise_constant_schedule(0.5, {2: 0.1})
    tx = optax.inject_hyperparams(optimizer)(learning_rate=rates)
    assert_holds(local_row, tx, make_layer())


def test_holds_under_apply_if_finite_which_skips_a_bad_step(local_row):
    tx = optax.apply_if_finite(optax.chain(optax.adam(0.1), local_row[0]), 3)
    params = make_layer()
    grads = make_grads(params)
    grads["gain"] = grads["gain"].at[2].set(jnp.nan)
    final = train(tx, params, grads)
    chex.assert_tree_all_finite(final)
    local_row[1](params, final)


def test_holds_for_an_nnx_state(local_row):
    state = nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    holed = jax.tree.map(lambda x: (x + 0.01).at[0].set(0), state)
    tx = optax.chain(optax.adam(0.1), local_row[0])
    assert isinstance(assert_holds(local_row, tx, holed), type(holed))


def test_holds_for_a_tuple(local_row):
    tx = optax.chain(optax.adam(0.1), local_row[0])
    assert_holds(local_row, tx, (jnp.ones(3), make_layer()["kernel"]))


@pytest.mark.parametrize(
    ("weights", "updates"), [("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_lands_on_exact_zero_at_once_whatever_the_dtypes(local_row, weights, updates):
    params = jax.tree.map(lambda p: p.astype(weights), make_layer())
    params["kernel"] = params["kernel"].at[1:].add(0.1)  # leaves two zeros of six
    grads = jax.tree.map(lambda p: 3 * p.astype(updates), params)
    tx = optax.chain(optax.scale(0.3), local_row[0])
    moves, state = jax.jit(tx.update)(grads, tx.init(params), params)
    final = optax.apply_updates(params, moves)
    chex.assert_trees_all_equal_dtypes(final, params)
    masks = np.asarray(state[1].masks["kernel"])
    assert not masks.all()
    np.testing.assert_array_equal(final["kernel"] != 0, masks)


def through_flax(state, tx, params, folder):
    data = flax.serialization.to_bytes(state)
    return flax.serialization.from_bytes(tx.init(params), data)


def through_a_file(state, tx, params, folder):
    jc.save(folder / "state.jxc", state)
    return jc.load(folder / "state.jxc", like=tx.init(params))


def test_a_stored_state_resumes_bit_for_bit(local_row, tmp_path):
    tx = optax.chain(optax.adam(0.1), local_row[0])
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


def test_update_without_params_says_what_to_call(row):
    params = make_params()
    tx = row[0]
    with pytest.raises(
        ValueError, match=r"needs the current weights: call tx.update\(grads, state, p"
    ):
        tx.update(params, tx.init(params))


def test_a_tree_in_which_nothing_is_selected_is_an_error(row):
    with pytest.raises(
        ValueError, match="selected none of the 2 leaves, which are a, b"
    ):
        row[0].init({"a": jnp.ones(3), "b": jnp.float32(0)})


def test_lowers_for_every_platform(row):
    params = make_params()
    platforms = ("cpu", "cuda", "tpu")
    update = jax.export.export(jax.jit(row[0].update), platforms=platforms)
    assert update(params, row[0].init(params), params).platforms == platforms


def test_shapes_of_the_state_never_change(row):
    params = make_params()
    state = jax.eval_shape(row[0].init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, row[0].init(params))
    updates, after = jax.eval_shape(row[0].update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def test_optax_tells_its_masks_from_its_counts(row):
    params = make_params()
    state = row[0].init(params)
    swapped = optax.tree.map_params(row[0], jnp.logical_not, state)
    chex.assert_trees_all_equal(
        swapped, state._replace(masks=jax.tree.map(jnp.logical_not, state.masks))
    )
