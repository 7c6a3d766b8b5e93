import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.prune.at_init import given, grasp, masks_in_rounds, saliency, synflow


WIDTHS = (6, 8, 7, 3)
X = jax.ShapeDtypeStruct((1, WIDTHS[0]), jnp.float32)
FLOATS = st.floats(-8, 8, width=32)


def network(scale=(1.0, 1.0, 1.0), seed=0):
    """Kernels of a relu network without biases."""
    rng = np.random.default_rng(seed)
    shapes = list(zip(WIDTHS, WIDTHS[1:], strict=False))
    return {
        f"layer_{i}": {"kernel": jnp.asarray(c * rng.normal(size=shape), jnp.float32)}
        for i, (shape, c) in enumerate(zip(shapes, scale, strict=True))
    }


def apply(params, x):
    kernels = [layer["kernel"] for layer in jc.densify(params).values()]
    for kernel in kernels[:-1]:
        x = jax.nn.relu(x @ kernel)
    return x @ kernels[-1]


def squared(params):
    x = jnp.asarray(np.random.default_rng(9).normal(size=(5, WIDTHS[0])), jnp.float32)
    return jnp.mean(apply(params, x) ** 2)


def flow_of(params):
    return synflow(apply, params, X)


@jax.jit
def scores_of(params):
    return saliency(squared, params), grasp(squared, params), flow_of(params)


# given


def test_the_lowest_of_the_given_scores_go():
    params = {"a": {"kernel": jnp.ones((1, 4)), "bias": jnp.ones(2)}}
    scores = {"a": {"kernel": jnp.array([[4.0, 1.0, 2.0, 3.0]]), "bias": jnp.ones(2)}}
    masks = jc.prune.masks(params, 0.5, score=given(scores))
    assert masks["a"]["kernel"].tolist() == [[True, False, False, True]]
    assert masks["a"]["bias"].shape == ()


def test_paths_that_read_alike_get_their_own_scores():
    params = {"a/b": jnp.ones((1, 2)), "a": {"b": jnp.ones((1, 2))}}
    scores = {"a/b": jnp.array([[1.0, 2.0]]), "a": {"b": jnp.array([[2.0, 1.0]])}}
    masks = jc.prune.masks(params, 0.5, score=given(scores))
    assert masks["a/b"].tolist() == [[False, True]]
    assert masks["a"]["b"].tolist() == [[True, False]]


def test_any_tree_and_one_array_are_looked_up_too():
    scores = network()
    params = {"layer_1": network(seed=1)["layer_1"]}
    assert given(scores)(params)["layer_1"]["kernel"] is scores["layer_1"]["kernel"]
    assert given(jnp.arange(3.0))(jnp.ones(3)).tolist() == [0, 1, 2]


def test_a_path_without_a_score_is_an_error():
    text = "given needs a score for leaf 'kernel', got scores for b, c."
    with pytest.raises(ValueError, match=re.escape(text)):
        given({"b": 1.0, "c": 2.0})({"kernel": jnp.ones((1, 3))})
    with pytest.raises(ValueError, match="got scores for no leaf. Make them"):
        given({})({"kernel": jnp.ones(2)})


@pytest.mark.parametrize(("score", "got"), [(jnp.ones(3), "float32[3]"), (1.5, "1.5")])
def test_a_score_of_another_shape_is_an_error(score, got):
    text = f"given needs a score of shape [1, 3] for leaf 'kernel', got {got}."
    with pytest.raises(ValueError, match=re.escape(text)):
        given({"kernel": score})({"kernel": jnp.ones((1, 3))})


# saliency


def test_saliency_is_weight_times_gradient_by_hand():
    # loss = (2 * w0 - w1 - 1)**2 / 2 at w = (3, 1): slope 4 * (2, -1)
    params = {"kernel": jnp.array([[3.0], [1.0]])}

    def loss(params):
        return jnp.sum((jnp.array([[2.0, -1.0]]) @ params["kernel"] - 1) ** 2) / 2

    assert saliency(loss, params)["kernel"].tolist() == [[24.0], [4.0]]


@drawn(hnp.arrays(np.float32, (4, 3), elements=FLOATS))
def test_saliency_is_that_of_numpy_for_a_linear_model(w):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 4)).astype(np.float32)
    y = rng.normal(size=(5, 3)).astype(np.float32)

    def loss(params):
        return jnp.sum((x @ params["kernel"] - y) ** 2)

    expected = np.abs(w * (2 * x.T @ (x @ w - y)))
    found = saliency(loss, {"kernel": jnp.asarray(w)})["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_saliency_is_what_a_gate_on_each_weight_would_move(strict):
    params = network()

    @jax.jit
    def moves(gates):
        return jax.grad(lambda g: squared(jax.tree.map(jnp.multiply, params, g)))(gates)

    expected = moves(jax.tree.map(jnp.ones_like, params))  # the paper's c_j
    chex.assert_trees_all_close(
        jax.jit(lambda p: saliency(squared, p))(params),
        jax.tree.map(jnp.abs, expected),
        rtol=1e-5,
        atol=1e-7,
    )


def test_leaves_that_are_not_floating_score_zero():
    params = {"w": jnp.array([2.0]), "step": jnp.arange(3), "name": "net", "n": 3}
    scores = saliency(lambda p: jnp.sum(p["w"]) * p["n"], params)
    assert scores["w"].tolist() == [6.0]
    chex.assert_trees_all_equal(scores["step"], jnp.zeros(3, jnp.float32))
    assert scores["n"].shape == scores["name"].shape == ()


def test_nodes_score_as_the_arrays_that_they_stand_for():
    params = network()
    layer = jc.quantize(params["layer_1"]["kernel"], bits=4)
    small = params | {"layer_1": {"kernel": layer}}
    found = scores_of(small)
    chex.assert_trees_all_close(found, scores_of(jc.densify(small)))
    asked = given(found[0])(jax.tree.map(jnp.zeros_like, jc.densify(small)))
    chex.assert_trees_all_equal(asked, found[0])


def test_the_source_of_a_tie_scores_for_all_its_uses():
    w = jnp.arange(4.0)[None]
    tied = {"a": w, "b": jc.tie_layers({"a": w, "b": w}, [("a", "b")])["b"]}

    def loss(params):
        params = jc.densify(params)
        return jnp.sum(params["a"]) + jnp.sum(params["b"])

    scores = saliency(loss, tied)
    assert scores["a"].tolist() == [[0.0, 2.0, 4.0, 6.0]]
    masks = jc.prune.masks(tied, 0.5, score=given(scores))
    assert masks["a"].tolist() == [[False, False, True, True]]


def test_narrow_weights_score_in_float32():
    params = {"w": jnp.array([1e-4, 1.0], jnp.float16)}
    scores = saliency(lambda p: jnp.sum(p["w"] ** 2), params)["w"]
    assert scores.dtype == jnp.float32
    assert float(scores[0]) == pytest.approx(2e-8, rel=1e-2)  # 0 in float16


def test_masked_weights_score_zero():
    params = jax.tree.map(lambda w: jnp.where(w > 0, w, 0), network())
    for scores in scores_of(params):
        for w, score in zip(*map(jax.tree.leaves, (params, scores)), strict=True):
            assert not np.any(np.asarray(score)[np.asarray(w) == 0])


@pytest.mark.parametrize("score", [saliency, grasp])
@pytest.mark.parametrize(
    ("value", "got"), [(jnp.ones(3), "float32[3]"), (jnp.array(1), "int32[]")]
)
def test_a_loss_that_is_not_one_number_is_an_error(score, value, got):
    text = f"{score.__name__} needs loss(params) to return one floating number, "
    with pytest.raises(TypeError, match=re.escape(f"{text}float[], got {got}.")):
        score(lambda params: value, {"w": jnp.ones(3)})
    with pytest.raises(TypeError, match=re.escape(f"{text}float[], got (")):
        score(lambda params: (jnp.ones(()), value), {"w": jnp.ones(3)})


# grasp


@drawn(hnp.arrays(np.float32, (7,), elements=st.integers(-4, 4)))
def test_grasp_of_a_quadratic_loss_is_the_weight_times_a_twice(theta):
    root = np.random.default_rng(3).integers(-2, 3, (7, 7)).astype(np.float32)
    a = root + root.T  # whole numbers, so that all of it is exact

    def loss(params):
        flat = jnp.concatenate([params["bias"], params["kernel"].reshape(-1)])
        return flat @ (a @ flat) / 2

    params = {"bias": jnp.asarray(theta[:3]), "kernel": jnp.asarray(theta[3:, None])}
    scores = grasp(loss, params)
    found = np.concatenate([scores["bias"], scores["kernel"].reshape(-1)])
    np.testing.assert_array_equal(found, theta * (a @ (a @ theta)))


def test_grasp_removes_what_the_paper_removes():
    # The paper's score is -w * Hg, and its largest go.
    w = np.array([1.0, 2.0, -1.0, 3.0], np.float32)
    h = np.array([[3, 0, 0, 0], [0, 1, 2, 0], [0, 2, 1, 0], [0, 0, 0, 1]], np.float32)
    theirs = -w * (h @ (h @ w))
    params = {"w": jnp.asarray(w[None])}
    scores = grasp(lambda p: jnp.sum((p["w"] @ h) * p["w"]) / 2, params)
    assert scores["w"].tolist() == [(-theirs).tolist()]
    masks = jc.prune.masks(params, 0.5, score=given(scores))
    gone = np.flatnonzero(~np.asarray(masks["w"]))
    assert set(gone) == set(np.argsort(theirs)[2:])


def test_the_function_is_traced_once_for_a_score():
    for score in (saliency, grasp):
        chex.clear_trace_counter()
        loss = chex.assert_max_traces(squared, n=1)
        jax.eval_shape(lambda params, s=score, f=loss: s(f, params), network())


# synflow


def test_synflow_by_hand():
    params = {
        "a": jnp.array([[1.0, -2.0], [0.0, 3.0]]),
        "b": jnp.array([[-4.0], [5.0]]),
    }
    scores = synflow(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, X_2)
    assert scores["a"].tolist() == [[4.0, 10.0], [0.0, 15.0]]
    assert scores["b"].tolist() == [[4.0], [25.0]]


X_2 = jnp.full((1, 2), -7.0)  # only its shape counts


def numpy_synflow(kernels):
    """|w| times what comes in at one end and can leave at the other."""
    kernels = [np.abs(np.asarray(k, np.float64)) for k in kernels]
    into, out = [np.ones(kernels[0].shape[0])], [np.ones(kernels[-1].shape[1])]
    for k in kernels[:-1]:
        into.append(into[-1] @ k)
    for k in kernels[:0:-1]:
        out.insert(0, k @ out[0])
    return [i[:, None] * k * o for i, k, o in zip(into, kernels, out, strict=True)]


def kernels_of(tree):
    return [np.asarray(layer["kernel"]) for layer in tree.values()]


@drawn(st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e3]))
def test_every_layer_and_both_sides_of_every_unit_score_the_same(seed, scale):
    params = network((scale, 1.0, 0.1), seed)
    scores = kernels_of(flow_of(params))
    for found, expected in zip(scores, numpy_synflow(kernels_of(params)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    sums = [score.sum(dtype=np.float64) for score in scores]
    np.testing.assert_allclose(sums, sums[0], rtol=1e-5)
    for before, after in zip(scores, scores[1:], strict=False):
        np.testing.assert_allclose(before.sum(0), after.sum(1), rtol=1e-4)


def test_biases_are_absolute_and_score_too():
    params = {"kernel": jnp.array([[-2.0]]), "bias": jnp.array([-3.0]), "n": 1}
    scores = synflow(
        lambda p, x: x @ p["kernel"] + p["bias"][None] * p["n"], params, X_1
    )
    assert scores["kernel"].tolist() == [[2.0]]
    assert scores["bias"].tolist() == [3.0]


X_1 = jnp.zeros((1, 1))


@pytest.mark.parametrize(("x", "got"), [(jnp.ones((1, 6), int), "int32[1, 6]"), (2, 2)])
def test_an_input_that_is_not_floating_is_an_error(x, got):
    text = f"synflow needs a floating x, got {got}. Let f begin"
    with pytest.raises(TypeError, match=re.escape(text)):
        synflow(apply, network(), x)


def test_an_output_that_is_not_one_array_is_an_error():
    text = "synflow needs f(params, x) to return a floating array, got ("
    with pytest.raises(TypeError, match=re.escape(text)):
        synflow(lambda params, x: (apply(params, x), x), network(), X)


# masks_in_rounds


def plain_rounds(score_of, params, sparsity, rounds):
    """Algorithm 1 as a loop, with a global threshold by a sort."""
    size = sum(kernel.size for kernel in kernels_of(params))
    kept = np.ones(size, bool)
    for k in range(1, rounds + 1):
        flat = np.concatenate([kernel.ravel() for kernel in kernels_of(params)])
        ends = np.cumsum([kernel.size for kernel in kernels_of(params)])[:-1]
        pieces = np.split(np.where(kept, flat, 0).astype(np.float32), ends)
        rows = zip(params.items(), pieces, strict=True)
        masked = {
            name: {"kernel": jnp.asarray(piece.reshape(layer["kernel"].shape))}
            for (name, layer), piece in rows
        }
        scores = kernels_of(score_of(masked))
        scores = np.concatenate([score.ravel() for score in scores])
        scores = np.where(kept, scores, -np.inf)
        zeros = round((1 - (1 - sparsity) ** (k / rounds)) * size)
        order = np.lexsort((-np.arange(size), scores))
        kept = np.ones(size, bool)
        kept[order[:zeros]] = False
    return np.split(kept, ends)


scored_by_flow = jax.jit(flow_of)
scored_by_grasp = jax.jit(lambda params: grasp(squared, params))


@pytest.mark.parametrize(
    "score_of", [scored_by_flow, scored_by_grasp], ids=["synflow", "grasp"]
)
def test_rounds_are_those_of_a_plain_loop(score_of):
    params = network()
    masks = masks_in_rounds(score_of, params, 0.8, rounds=7)
    expected = plain_rounds(score_of, params, 0.8, rounds=7)
    for mask, kept in zip(kernels_of(masks), expected, strict=True):
        np.testing.assert_array_equal(mask.ravel(), kept)


@pytest.mark.parametrize(
    ("sparsity", "budget", "zeros"),
    [
        # 42.5 of 125, half to even; in float32 it is a little more or less.
        (0.34, jc.prune.global_budget, 42),
        ({"layer_0/kernel": 0.5, "layer_2/kernel": 0.3}, jc.prune.leaf_budget, 24 + 6),
    ],
)
def test_a_score_that_looks_at_each_weight_alone_needs_no_rounds(
    sparsity, budget, zeros
):
    params = network((1.0, 0.5, 2.0))
    masks = masks_in_rounds(jc.magnitude, params, sparsity, rounds=9, budget=budget)
    chex.assert_trees_all_equal(masks, jc.prune.masks(params, sparsity, budget=budget))
    assert sum(int((~mask).sum()) for mask in kernels_of(masks)) == zeros


@drawn(
    hnp.arrays(np.float32, (4, 3), elements=st.sampled_from([-1.0, 0.0, 1.0, 2.0])),
    st.integers(0, 99),
)
@settings(max_examples=15)
def test_the_count_is_that_of_one_shot_pruning(w, percent):
    masks = small_rounds({"kernel": jnp.asarray(w)}, jnp.float32(percent / 100))
    expected = jc.prune.masks({"kernel": jnp.asarray(w)}, jnp.float32(percent / 100))
    assert int(masks["kernel"].sum()) == int(expected["kernel"].sum())


@jax.jit
def small_rounds(params, sparsity):
    def loss(params):
        return jnp.sum(jnp.ones((1, 4)) @ params["kernel"]) ** 2

    return masks_in_rounds(lambda p: grasp(loss, p), params, sparsity, rounds=5)


def test_a_weight_that_is_gone_stays_gone_though_others_score_less():
    # The better of equals is scored down as soon as the other is gone.
    def score_of(params):
        gone = params["kernel"] == 0
        scores = jnp.array([[1.0, 2.0, 3.0, 4.0]])
        return {"kernel": jnp.where(gone, 0.0, jnp.where(gone.any(), -scores, scores))}

    params = {"kernel": jnp.ones((1, 4))}
    masks = masks_in_rounds(score_of, params, 0.5, rounds=2)
    # Round 1 takes 1.17 of 4, which is the first; then 4 is the worst of the others.
    assert masks["kernel"].tolist() == [[False, True, True, False]]


def test_synflow_leaves_every_layer_connected_where_magnitude_cuts_one_off():
    params = network((1.0, 0.02, 1.0))
    by_size = jc.prune.masks(params, 0.9, budget=jc.prune.global_budget)
    by_flow = masks_in_rounds(flow_of, params, 0.9, rounds=50)
    assert not np.any(by_size["layer_1"]["kernel"])
    ones = jnp.ones((1, WIDTHS[0]))
    kept = [jc.apply_masks(params, masks) for masks in (by_size, by_flow)]
    flows = [float(apply(jax.tree.map(jnp.abs, tree), ones).sum()) for tree in kept]
    assert flows[0] == 0 < flows[1]
    assert all(m.any() for m in kernels_of(by_flow))
    counts = [sum(m.sum() for m in kernels_of(masks)) for masks in (by_size, by_flow)]
    assert counts[0] == counts[1] == 13  # of 125


def test_only_the_leaves_of_where_are_pruned_and_all_are_seen_nodes_as_arrays():
    seen = []

    def score_of(params):
        seen.append(jax.tree.map(jnp.shape, params))
        return jc.magnitude(params)

    w = jnp.ones((2, 2))
    params = {"a": w, "b": jc.quantize(w, bits=4), "n": jnp.ones(3)}
    is_b = jc.path_matches("b")
    masks = masks_in_rounds(score_of, params, 0.5, rounds=2, where=is_b)
    assert seen == [{"a": (2, 2), "b": (2, 2), "n": (3,)}]
    assert [m.shape for m in masks.values()] == [(), (2, 2), ()]
    assert masks["b"].tolist() == [[True, True], [False, False]]


def test_paths_that_read_alike_and_leaves_that_are_no_arrays_pass():
    params = {
        "a/b": jnp.array([[1.0, 4.0]]),
        "a": {"b": jnp.array([[3.0, 2.0]])},
        "n": "x",
    }
    masks = masks_in_rounds(
        lambda p: saliency(lambda q: jnp.sum(q["a/b"]) + jnp.sum(q["a"]["b"]), p),
        params,
        0.5,
        rounds=2,
    )
    assert masks["a/b"].tolist() == [[False, True]]
    assert masks["a"]["b"].tolist() == [[True, False]]


def test_rounds_are_the_same_under_jit_and_vmap_with_one_trace():
    chex.clear_trace_counter()
    trees = [network(seed=seed) for seed in (0, 1)]
    score_of = chex.assert_max_traces(flow_of, n=1)
    both = jax.tree.map(lambda *rows: jnp.stack(rows), *trees)
    mapped = jax.jit(
        jax.vmap(lambda params: masks_in_rounds(score_of, params, 0.8, rounds=7))
    )(both)
    for i, tree in enumerate(trees):
        expected = plain_rounds(scored_by_flow, tree, 0.8, rounds=7)
        for mask, kept in zip(kernels_of(mapped), expected, strict=True):
            np.testing.assert_array_equal(mask[i].ravel(), kept)


def test_it_lowers_for_every_platform():
    platforms = ("cpu", "cuda", "tpu")

    def call(params):
        one_shot = given(saliency(squared, params))
        return (
            jc.prune.masks(params, 0.5, score=one_shot),
            masks_in_rounds(lambda p: grasp(squared, p), params, 0.5),
            masks_in_rounds(flow_of, params, 0.5),
        )

    exported = jax.export.export(jax.jit(call), platforms=platforms)(network())
    assert exported.platforms == platforms


@pytest.mark.parametrize("rounds", [0, -1])
def test_rounds_must_be_positive(rounds):
    text = rf"masks_in_rounds needs 1 <= rounds <= .*, got {rounds}\."
    with pytest.raises(ValueError, match=text):
        masks_in_rounds(flow_of, network(), 0.5, rounds=rounds)


def test_rounds_must_be_an_integer():
    with pytest.raises(TypeError, match="masks_in_rounds needs an integer rounds"):
        masks_in_rounds(flow_of, network(), 0.5, rounds=2.5)


@pytest.mark.parametrize("sparsity", [1.0, -0.5, {"layer_0/kernel": 1.5}])
def test_masks_in_rounds_needs_a_sparsity_in_range(sparsity):
    with pytest.raises(ValueError, match="masks_in_rounds needs 0 <= sparsity < 1"):
        masks_in_rounds(flow_of, network(), sparsity, budget=jc.prune.leaf_budget)


def test_what_the_budget_refuses_is_refused_before_any_round():
    with pytest.raises(ValueError, match="nm_budget needs a sparsity of at most"):
        params = {"kernel": jnp.ones((4, 4))}
        masks_in_rounds(jc.magnitude, params, 0.9, budget=jc.prune.nm_budget(2, 4))


def test_nothing_to_prune_is_an_error_that_lists_the_leaves():
    with pytest.raises(ValueError, match="selected none of the 1 leaves"):
        masks_in_rounds(jc.magnitude, {"bias": jnp.ones((2, 3))}, 0.5)


def test_a_weight_that_is_not_finite_is_an_error_with_its_place():
    params = {"kernel": jnp.array([[1.0, jnp.nan]])}
    with pytest.raises(ValueError, match="masks_in_rounds needs finite values, but"):
        masks_in_rounds(jc.magnitude, params, 0.5)


def test_scores_that_do_not_fit_the_params_are_an_error():
    params = {"kernel": jnp.ones((2, 3))}
    text = "masks_in_rounds needs a score for leaf 'kernel', got scores for k."
    with pytest.raises(ValueError, match=re.escape(text)):
        masks_in_rounds(lambda p: {"k": p["kernel"]}, params, 0.5)
    text = "masks_in_rounds needs a score of shape [2, 3] for leaf 'kernel', got "
    with pytest.raises(ValueError, match=re.escape(text + "float32[3, 2].")):
        masks_in_rounds(lambda p: {"kernel": p["kernel"].T}, params, 0.5)
