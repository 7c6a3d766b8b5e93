"""Scores of groups are what NumPy finds in the slices, one group after the other."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.prune.group_inputs import by_inputs, group_obs
from jaxcomp.prune.group_scores import (
    group_distance,
    group_l1,
    group_l2,
    group_obd,
    group_scale,
    group_squares,
    group_taylor,
    normalized,
    random_groups,
)
from jaxcomp.prune.groups import Family, Member


RANDOM = np.random.default_rng(0)
ONE_EACH = np.arange(3, dtype=np.int32)[:, None]
SHAPES = {
    "conv/kernel": (2, 1, 3),
    "norm/bias": (3,),
    "norm/mean": (3,),
    "norm/scale": (3,),
    "norm/var": (3,),
    "out/kernel": (6, 2),  # rows of two pixels, each of three channels
    "square": (2, 2),
}
CHANNELS = Family(
    "channels",
    (
        Member("conv/kernel", 2, ONE_EACH),
        *(Member(f"norm/{k}", 0, ONE_EACH) for k in ("bias", "mean", "scale", "var")),
        Member("out/kernel", 0, np.array([[0, 3], [1, 4], [2, 5]], np.int32)),
    ),
    True,
    "",
)
STREAM = Family(
    "stream",
    (Member("square", 0, ONE_EACH[:2]), Member("square", 1, ONE_EACH[:2])),
    False,
    "a mean spans it",
)
FAMILIES = (CHANNELS, STREAM)
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
FLATS = hnp.arrays(np.float32, SIZE, elements=st.sampled_from([-3.0, -0.5, 0.0, 2.0]))


def tree_of(flat, batch=()):
    """{"conv": {"kernel": float[*batch, 2, 1, 3]}, ...}"""
    tree, begin = {}, 0
    for path, shape in SHAPES.items():
        end = begin + int(np.prod(shape))
        *above, last = path.split("/")
        inner = tree.setdefault(above[0], {}) if above else tree
        inner[last] = np.reshape(flat[..., begin:end], (*batch, *shape))
        begin = end
    return tree


PARAMS = tree_of(RANDOM.normal(size=SIZE).astype(np.float32))


def leaf_of(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return np.asarray(tree, np.float64)


def slices_of(tree, family):
    """One list of flat slices for each group, without means and variances."""
    members = [m for m in family.members if m.path[-4:] not in ("mean", "/var")]
    return [
        [
            np.take(leaf_of(tree, m.path), m.indices[g], axis=m.axis).ravel()
            for m in members
        ]
        for g in range(family.size)
    ]


def reference(tree, fn):
    return {f.name: [fn(group) for group in slices_of(tree, f)] for f in FAMILIES}


def assert_scores(found, expected, **near):
    assert list(found) == list(expected)
    for name, score in found.items():
        assert score.dtype == jnp.float32
        np.testing.assert_allclose(score, expected[name], **{"rtol": 1e-5, **near})


# Of the weights alone


def test_norms_by_hand():
    params = {"w": jnp.array([[3.0, 0.0], [4.0, 0.0]]), "b": jnp.array([-12.0, 0.0])}
    members = Member("w", 1, ONE_EACH[:2]), Member("b", 0, ONE_EACH[:2])
    family = (Family("units", members, True, ""),)
    assert group_l1(params, family)["units"].tolist() == [19, 0]
    assert group_l2(params, family)["units"].tolist() == [13, 0]
    assert group_squares(params, family)["units"].tolist() == [169 / 2, 0]


NORMS = {
    group_l1: lambda group: sum(np.abs(x).sum() for x in group),
    group_l2: lambda group: np.sqrt(sum((x**2).sum() for x in group)),
    group_squares: lambda group: np.mean([(x**2).sum() for x in group]),
}


@pytest.mark.parametrize("score", NORMS)
def test_norms_are_those_of_a_loop_over_groups(score, strict):
    run = jax.jit(partial(score, families=FAMILIES))

    @given(FLATS)
    def check(flat):
        params = tree_of(flat)
        found = dict(sorted(run(params).items()))
        assert_scores(found, reference(params, NORMS[score]))

    check()


def test_an_entry_where_two_members_cross_counts_in_both():
    params = PARAMS | {"square": jnp.array([[1.0, 10.0], [100.0, 1000.0]])}
    assert group_l1(params, [STREAM])["stream"].tolist() == [112, 2110]


def test_a_mean_and_a_var_do_not_count_unless_they_are_selected():
    params = PARAMS | {"norm": PARAMS["norm"] | {"mean": np.full(3, 9.0, np.float32)}}
    assert_scores(group_l1(params, FAMILIES), reference(PARAMS, NORMS[group_l1]))
    where = jc.path_matches(".*mean")
    found = group_l1(params, [CHANNELS], where=where)["channels"]
    assert found.tolist() == [9, 9, 9]


def test_sixteen_bits_are_added_in_thirty_two():
    family = Family("units", (Member("w", 1, ONE_EACH[:1]),), True, "")
    w = jnp.ones((3001, 1), jnp.bfloat16)  # bfloat16 would stop at 256
    found = group_l1({"w": w}, [family])["units"]
    assert found.dtype == jnp.float32
    assert found.tolist() == [3001]


def test_nodes_count_as_the_arrays_they_stand_for():
    small = jc.quantize_tree(PARAMS, bits=4)
    expected = group_l2(jc.densify(small), FAMILIES)
    assert_scores(group_l2(small, FAMILIES), expected)


def test_distances_are_those_of_all_pairs():
    def distances(params, family):
        flat = np.array([np.concatenate(group) for group in slices_of(params, family)])
        return np.linalg.norm(flat[:, None] - flat[None], axis=2).sum(axis=1)

    expected = {f.name: distances(PARAMS, f) for f in FAMILIES}
    assert_scores(group_distance(PARAMS, FAMILIES), expected)


def test_equal_groups_have_equal_distances():
    w = jnp.asarray(RANDOM.normal(size=(5, 3)), jnp.float32)[:, jnp.array([0, 1, 0])]
    family = Family("units", (Member("w", 1, ONE_EACH),), True, "")
    first, other, again = group_distance({"w": w}, [family])["units"].tolist()
    assert first == again < other  # between two that are the same, and it is alone


def test_the_scale_of_a_norm_is_the_mean_of_several():
    members = Member("a/scale", 0, ONE_EACH), Member("b/scale", 0, ONE_EACH)
    family = Family("units", (*members, Member("w", 0, ONE_EACH)), True, "")
    params = {
        "a": {"scale": jnp.array([1.0, -2.0, 0.0])},
        "b": {"scale": jnp.array([3.0, 2.0, 0.0])},
        "w": jnp.full((3, 4), 9.0),
    }
    assert group_scale(params, [family])["units"].tolist() == [2, 2, 0]
    text = (
        "group_scale needs a leaf whose last key is scale in family 'stream', got "
        "square axis 0, square axis 1. Leave the family out, or take another score."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        group_scale(PARAMS, FAMILIES)


def test_random_scores_differ_between_families_and_keys():
    twins = (CHANNELS, CHANNELS._replace(name="twins"))
    found = random_groups(jax.random.key(0))(PARAMS, twins)
    again = random_groups(jax.random.key(0))(PARAMS, twins)
    other = random_groups(jax.random.key(1))(PARAMS, twins)
    for name, score in found.items():
        assert score.shape == (3,)
        assert np.all((score >= 0) & (score < 1))
        np.testing.assert_array_equal(score, again[name])
        assert np.all(score != other[name])
    assert np.all(found["channels"] != found["twins"])


def test_normalized_scores_have_a_mean_or_a_largest_of_one_in_every_family():
    found = normalized(group_squares)(PARAMS, FAMILIES)
    np.testing.assert_allclose([x.mean() for x in found.values()], 1, rtol=1e-6)
    found = normalized(group_squares, jnp.max)(PARAMS, FAMILIES)
    assert [float(x.max()) for x in found.values()] == [1, 1]
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    assert not any(np.any(x) for x in normalized(group_l1)(zeros, FAMILIES).values())


# Of gradients


def test_taylor_by_hand():
    family = Family("units", (Member("w", 0, ONE_EACH[:2]),), True, "")
    params = {"w": jnp.array([[1.0, 2.0], [3.0, 0.0]])}
    grads = {"w": jnp.array([[[1.0, 1.0], [1.0, 5.0]], [[1.0, -1.0], [0.0, 5.0]]])}
    # Sums of products 3 and -1, squared 9 and 1; 3 and 0.
    assert group_taylor(grads)(params, [family])["units"].tolist() == [5, 4.5]


def test_taylor_is_the_change_of_a_linear_loss_when_a_group_goes():
    rates = tree_of(RANDOM.normal(size=(4, SIZE)).astype(np.float32), (4,))
    found = group_taylor(rates)(PARAMS, [CHANNELS])["channels"]

    def loss(params, batch):
        paths = {m.path for m in CHANNELS.members} - {"norm/mean", "norm/var"}
        return sum((leaf_of(params, p) * leaf_of(rates, p)[batch]).sum() for p in paths)

    for g, score in enumerate(found):
        cut = jax.tree.map(np.array, PARAMS)
        for m in CHANNELS.members:
            *above, last = m.path.split("/")
            leaf = (cut[above[0]] if above else cut)[last]
            np.moveaxis(leaf, m.axis, 0)[m.indices[g]] = 0
        changes = [loss(PARAMS, b) - loss(cut, b) for b in range(4)]
        np.testing.assert_allclose(score, np.mean(np.square(changes)), rtol=1e-4)


def test_obd_is_half_of_curvature_times_squares():
    curvature = tree_of(RANDOM.uniform(size=SIZE).astype(np.float32))
    products = jax.tree.map(lambda h, w: h * w * w / 2, curvature, PARAMS)
    expected = reference(products, lambda group: sum(x.sum() for x in group))
    assert_scores(group_obd(curvature)(PARAMS, FAMILIES), expected)


def test_gradients_that_do_not_count_may_be_missing():
    grads = jax.tree.map(lambda w: w[None], PARAMS)
    only = {k: grads["norm"][k] for k in ("bias", "scale")}
    some, grads = grads, grads | {"norm": only}
    expected = group_taylor(some)(PARAMS, FAMILIES)
    assert_scores(group_taylor(grads)(PARAMS, FAMILIES), expected, rtol=0)


@pytest.mark.parametrize(
    ("score", "needed"),
    [(group_taylor(PARAMS), "[batches, 2, 1, 3]"), (group_obd({}), "[2, 1, 3]")],
)
def test_a_tree_of_other_shapes_is_an_error(score, needed):
    text = (
        f" needs a leaf 'conv/kernel' of shape {needed} in the tree that it was made "
        f"with, got "
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        score(PARAMS, FAMILIES)


# Of inputs


def test_inputs_by_hand():
    values = {"out/kernel": jnp.array([1.0, 2.0, 3.0, 5.0, 6.0, 7.0]), "other": 0}
    score = by_inputs(values, {"out/kernel": (0,), "other": (0,)})
    assert score(PARAMS, [CHANNELS])["channels"].tolist() == [3, 4, 5]


def test_values_of_layers_and_of_other_axes_are_averaged():
    params = {"a": jnp.ones((3, 2, 4)), "b": jnp.ones((5, 3, 1))}
    members = Member("a", 0, ONE_EACH), Member("b", 1, ONE_EACH)
    family = Family("heads", members, True, "")
    values = {"a": RANDOM.uniform(size=(3, 2)), "b": RANDOM.uniform(size=(5, 3))}
    found = by_inputs(values, {"a": (0, 1), "b": (1,)})(params, [family])
    expected = (values["a"].mean(axis=1) + values["b"].mean(axis=0)) / 2
    assert_scores(found, {"heads": expected})


def test_a_family_that_no_observed_weight_reads_is_an_error():
    values = {"conv/kernel": jnp.ones(1)}
    text = (
        "by_inputs needs a weight that reads it, of those observed (conv/kernel), in "
        "family 'channels', got conv/kernel axis 2, norm/bias axis 0"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        by_inputs(values, {"conv/kernel": (1,)})(PARAMS, [CHANNELS])


def test_values_of_other_lengths_are_an_error():
    score = by_inputs({"out/kernel": jnp.ones(5)}, {"out/kernel": (0,)})
    text = (
        "by_inputs needs values of the lengths [6] of axes [0] of leaf 'out/kernel', "
        "got float32[5]."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        score(PARAMS, [CHANNELS])


def obs_reference(x, w, own, damp):
    """The least of |x w - x v|**2 + ridge |w - v|**2, where v is 0 on some rows."""
    ridge = damp * np.mean(np.diagonal(x.T @ x))
    x = np.concatenate([x, np.sqrt(ridge) * np.eye(x.shape[1])])
    others = np.setdiff1d(np.arange(x.shape[1]), own)
    target = x @ w
    v = np.linalg.lstsq(x[:, others], target, rcond=None)[0]
    return np.sum((target - x[:, others] @ v) ** 2)


def test_obs_is_what_least_squares_cannot_make_up_for():
    x = RANDOM.normal(size=(40, 6)) @ RANDOM.normal(size=(6, 6))
    w = RANDOM.normal(size=(2, 3, 4)).astype(np.float32)  # [d, heads, out]
    heads = Family("heads", (Member("w", 1, ONE_EACH),), True, "")
    rows = [[h, 3 + h] for h in range(3)]
    score = group_obs({"w": jnp.asarray(x.T @ x)}, {"w": (0, 1)}, damp=0.01)
    expected = [obs_reference(x, w.reshape(6, 4), own, 0.01) for own in rows]
    assert_scores(score({"w": w}, [heads]), {"heads": expected}, rtol=1e-3)


def test_obs_of_inputs_that_do_not_correlate_is_squares_times_moments():
    w, h = jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.diag(jnp.array([2.0, 4.0]))
    family = Family("units", (Member("w", 0, ONE_EACH[:2]),), True, "")
    found = group_obs({"w": h}, {"w": (0,)}, damp=1e-6)({"w": w}, [family])["units"]
    np.testing.assert_allclose(found, [2 * 5, 4 * 9], rtol=1e-4)


def test_obs_of_a_family_of_one_group_and_of_no_inputs():
    w = jnp.array([[1.0], [2.0]])
    family = Family("all", (Member("w", 0, np.array([[0, 1]])),), True, "")
    h = jnp.array([[2.0, 1.0], [1.0, 2.0]])
    one = group_obs({"w": h}, {"w": (0,)}, damp=1e-6)({"w": w}, [family])["all"]
    np.testing.assert_allclose(one, [2 + 8 + 4], rtol=1e-4)
    none = group_obs({"w": 0 * h}, {"w": (0,)})({"w": w}, [family])["all"]
    assert none.tolist() == [0]


def test_obs_needs_damping_and_square_moments():
    with pytest.raises(ValueError, match=re.escape("group_obs needs damp > 0, got 0.")):
        group_obs({}, {}, damp=0)
    text = "group_obs needs a moment of shape [6, 6] for axes [0] of leaf 'out/kernel',"
    score = group_obs({"out/kernel": jnp.ones((5, 5))}, {"out/kernel": (0,)})
    with pytest.raises(ValueError, match=re.escape(text + " got float32[5, 5].")):
        score(PARAMS, [CHANNELS])


# All of them


def test_jit_changes_nothing():
    values = jnp.arange(6.0)
    moments = values[:, None] * values[None] + jnp.eye(6)
    scores = [
        group_distance,
        normalized(group_l2),
        random_groups(jax.random.key(0)),
        group_taylor(jax.tree.map(lambda w: w[None], PARAMS)),
        group_obd(PARAMS),
        by_inputs({"out/kernel": values}, {"out/kernel": (0,)}),
        group_obs({"out/kernel": moments}, {"out/kernel": (0,)}),
        group_scale,
    ]

    def run(params):
        return [score(params, [CHANNELS])["channels"] for score in scores]

    for plain, jitted in zip(run(PARAMS), jax.jit(run)(PARAMS), strict=True):
        np.testing.assert_allclose(plain, jitted, rtol=1e-5)
        assert plain.dtype == jnp.float32


def test_scores_lower_for_cpu_cuda_and_tpu():
    score = group_obs({"out/kernel": jnp.eye(6)}, {"out/kernel": (0,)})

    def run(params):
        return group_distance(params, FAMILIES), score(params, [CHANNELS])

    platforms = ("cpu", "cuda", "tpu")
    assert jax.export.export(jax.jit(run), platforms=platforms)(PARAMS)


def test_no_families_have_no_scores():
    assert group_l1(PARAMS, ()) == {}
    assert random_groups(jax.random.key(0))(PARAMS, ()) == {}


def test_a_where_that_leaves_a_family_out_is_an_error():
    text = (
        "group_l1 needs a leaf that `where` selects in family 'stream', got square "
        "axis 0, square axis 1."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        group_l1(PARAMS, FAMILIES, where=jc.path_matches("norm/.*"))


def test_params_that_do_not_fit_the_families_are_an_error():
    without = {k: v for k, v in PARAMS.items() if k != "square"}
    text = (
        "group_l1 needs the leaf 'square' of family 'stream', got conv/kernel, "
        "norm/bias, norm/mean, norm/scale, norm/var, .... Pass the params that the "
        "families were found for."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        group_l1(without, FAMILIES)
    text = (
        "group_l1 needs index 5 of axis 0 of leaf 'out/kernel' for family 'channels', "
        "got shape [4, 2]. Pass the params that the families were found for."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        group_l1(PARAMS | {"out": {"kernel": jnp.ones((4, 2))}}, FAMILIES)
