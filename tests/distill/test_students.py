"""What is taught stays what it is: pruned, on its grid, shared, of low rank, small."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomp as jc
from jaxcomp import program


X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)


def make_params(seed=1):
    rng = np.random.default_rng(seed)
    shapes = {"a": (8, 8), "b": (8, 8), "c": (8, 4)}
    return {
        k: jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32)
        for k, s in shapes.items()
    }


def model(params, x):
    x = jax.nn.relu(x @ params["a"])
    x = x + jnp.tanh(x @ params["b"])
    return x @ params["c"]


TEACHER = make_params()


def taught(student, params, tx, steps=20, **options):
    """The params after some steps; the loss has gone down."""
    step = jc.distill_step(student, model, tx, hard=0.0, **options)
    state, losses = tx.init(jc.split(params)[0]), []
    for _ in range(steps):
        params, state, metrics = step(params, state, TEACHER, (X,))
        losses.append(float(metrics["soft"]))
    assert min(losses[-3:]) < losses[0]
    return params, state


def test_a_student_that_is_pruned_while_it_learns_has_its_sparsity_exactly():
    ramp = optax.linear_schedule(0.0, 0.75, 10)
    tx = optax.chain(optax.adam(0.01), jc.prune_gradually(ramp, every=2))
    worse = jax.tree.map(lambda w: w + 0.5, TEACHER)
    params, state = taught(model, worse, tx, steps=40)
    jc.testing.assert_sparsity(params, 0.75, state=state)


def test_a_student_in_two_of_four_keeps_its_pattern():
    budget = jc.prune.nm_budget(2, 4)
    masks = jc.prune.masks(TEACHER, 0.5, budget=budget)
    params = jc.apply_masks(TEACHER, masks)
    final, _ = taught(model, params, optax.chain(optax.adam(0.01), jc.keep_zeros()))
    jc.testing.assert_nm_sparse(final, 2, 4)
    for name, mask in masks.items():
        np.testing.assert_array_equal(np.asarray(final[name])[~np.asarray(mask)], 0)


def test_a_fake_quantized_student_lands_on_the_grid_that_it_learned_on():
    def grid(w):
        return jc.fake_quantize(w, bits=3)

    def student(params, x):
        return model(jc.map_where(grid, params), x)

    final, _ = taught(student, make_params(2), optax.adam(0.01))
    hard = jc.quantize_tree(final, bits=3)
    np.testing.assert_allclose(
        model(jc.densify(hard), X), student(final, X), rtol=1e-4, atol=1e-5
    )


def test_a_program_in_few_bits_learns_and_its_weights_stay_what_they_are():
    student = jc.fake_quantized(model, weights=lambda w: jc.fake_quantize(w, bits=3))
    final, _ = taught(student, make_params(2), optax.adam(0.01))
    chex.assert_trees_all_equal_shapes_and_dtypes(final, TEACHER)


def test_a_shared_student_keeps_its_codes_and_at_most_k_values():
    small = jc.share_tree(jc.prune_tree(TEACHER, theta=0.2), clusters=4)
    final, _ = taught(model, small, optax.adam(0.01))
    jc.testing.assert_at_most_k_values(final, 5)
    for name, node in small.items():
        np.testing.assert_array_equal(final[name].codes, node.codes)
        zeros = np.asarray(node.dense()) == 0
        np.testing.assert_array_equal(np.asarray(final[name].dense())[zeros], 0)


def test_a_student_of_low_rank_stays_of_low_rank():
    def student(params, x):
        dense = params | {"b": params["b"]["in"] @ params["b"]["out"]}
        return model(dense, x)

    u, s, v = np.linalg.svd(TEACHER["b"])
    factors = {"in": jnp.asarray(u[:, :2] * s[:2]), "out": jnp.asarray(v[:2])}
    final, _ = taught(student, TEACHER | {"b": factors}, optax.adam(0.01))
    product = np.asarray(final["b"]["in"] @ final["b"]["out"])
    assert np.linalg.matrix_rank(product, tol=1e-5) == 2


def test_tied_layers_stay_tied():
    tied = {
        "a": TEACHER["a"],
        "first": {"w": TEACHER["b"]},
        "second": {"w": TEACHER["b"]},
    }
    tied = jc.tie_layers(tied | {"c": TEACHER["c"]}, [("first", "second")])

    def student(params, x):
        x = jax.nn.relu(x @ params["a"])
        for name in ("first", "second"):
            x = x + jnp.tanh(x @ params[name]["w"])
        return x @ params["c"]

    final, _ = taught(student, tied, optax.adam(0.01))
    dense = jc.densify(final)
    np.testing.assert_array_equal(dense["first"]["w"], dense["second"]["w"])
    assert isinstance(final["second"]["w"], jc.TiedTensor)


def test_a_student_cut_from_its_teacher_learns_in_its_smaller_shapes():
    groups = jc.coupled_groups(model, TEACHER, X)
    masks = jc.prune.masks(
        TEACHER,
        0.5,
        budget=jc.prune.in_groups(jc.prune.leaf_budget, groups.families),
    )
    masked = jc.apply_masks(TEACHER, masks)
    keep = jc.prune.kept_groups(masked, groups.families)
    student, params, _ = jc.shrink(model, TEACHER, keep, X)
    assert params["a"].shape[1] < 8
    final, _ = taught(student, params, optax.adam(0.01))
    chex.assert_trees_all_equal_shapes(final, params)


def test_a_student_with_fewer_blocks_learns_from_the_whole():
    blocks = program.residual_blocks(model, TEACHER, X)
    student, params = program.drop_blocks(model, TEACHER, blocks, X)
    assert "b" not in params
    final, _ = taught(student, params, optax.adam(0.01))
    assert set(final) == {"a", "c"}
