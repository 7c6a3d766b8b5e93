"""What must survive what: every technique after every other.

The table of DESIGN.md, first technique by second. What a technique promises is checked
anew, by NumPy alone, after the second has run.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc


CLUSTERS = 5
BITS = 4
RANK = 2
LAYERS = ("a", "b")


def model(params, x):
    for name in LAYERS:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=(6, 6)).astype(np.float32)),
            "bias": jnp.asarray(rng.normal(size=6).astype(np.float32)),
        }
        for name in LAYERS
    }


BATCH = (
    jnp.asarray(np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)),
    None,
)
TEACHER = make_params(2)


# The techniques: tree -> tree. `where` is for those that take a part of the tree.


def prune(tree, folder, where=jc.is_matrix):
    return jc.prune_tree(tree, theta=0.5, where=where)


def share(tree, folder, where=jc.is_matrix):
    return jc.share_tree(tree, clusters=CLUSTERS, where=where)


def quantize(tree, folder, where=jc.is_matrix):
    return jc.quantize_tree(tree, jc.quantize_affine, bits=BITS, where=where)


def factor(tree, folder, where=jc.is_matrix):
    return jc.map_where(lambda w: jc.factorize(w, RANK), tree, where)


def tie(tree, folder):
    return jc.tie_layers(tree, [LAYERS])


def train(tree, folder):
    """Four steps of Adam on what is floating; zeros of dense matrices are held."""
    trainable, _ = jc.split(tree)
    tx = optax.adam(0.05)
    if any(jc.is_matrix("", leaf) for leaf in dense_leaves(tree)):
        tx = optax.chain(tx, jc.keep_zeros())
    step = jc.distill_step(model, model, tx, hard=0.0)
    state = tx.init(trainable)
    for _ in range(4):
        tree, state, _ = step(tree, state, TEACHER, BATCH)
    return tree


def save(tree, folder):
    jc.save(folder / "w.jxc", tree)
    return jc.load(folder / "w.jxc")


def dense_leaves(tree):
    leaves = jax.tree.leaves(tree, is_leaf=jc.is_compressed)
    return [leaf for leaf in leaves if not jc.is_compressed(leaf)]


# What each promises of the tree it made, whatever came after it.


def kernels(tree):
    return {name: np.asarray(jc.densify(tree)[name]["kernel"]) for name in LAYERS}


def zeros_stay(first, final):
    for name in LAYERS:
        zeros = kernels(first)[name] == 0
        assert zeros.any()
        assert np.all(kernels(final)[name][zeros] == 0)


def zeros_of_all_stay(first, final):
    """A merge by mean keeps the zeros that all layers have."""
    a, b = (kernels(first)[name] == 0 for name in LAYERS)
    assert (a & b).any()
    for name in LAYERS:
        np.testing.assert_array_equal(kernels(final)[name] == 0, a & b)


def few_values(first, final):
    for name in LAYERS:
        assert np.unique(kernels(final)[name]).size <= CLUSTERS


def on_the_grid(first, final):
    for name in LAYERS:
        node, dense = held(final, name), kernels(final)[name]
        assert isinstance(node, jc.QTensor)
        scale = np.asarray(node.scale)[:, 0]  # of each column
        steps = np.round(dense / scale)
        np.testing.assert_array_equal(np.float32(steps) * scale, dense)
        reach = steps.max(axis=0, initial=0) - steps.min(axis=0, initial=0)
        assert np.all(reach <= 2**BITS - 1)  # zero included: it is on the grid


def tied(first, final):
    a, b = (kernels(final)[name] for name in LAYERS)
    np.testing.assert_array_equal(a, b)
    for key in ("kernel", "bias"):
        assert final["b"][key].source == f"a/{key}"
        assert isinstance(final["b"][key], jc.TiedTensor)
    assert not isinstance(final["a"]["kernel"], jc.TiedTensor)


def of_low_rank(first, final):
    for name in LAYERS:
        node = held(final, name)
        assert isinstance(node, jc.LowRankTensor)
        assert node.left.shape[1] == RANK
        assert np.linalg.matrix_rank(kernels(final)[name], tol=1e-5) <= RANK


def anything(first, final):
    """What training found is free to change."""


PROMISES = {
    prune: zeros_stay,
    share: few_values,
    quantize: on_the_grid,
    factor: of_low_rank,
    tie: tied,
    train: anything,
    save: anything,
}


def held(tree, name):
    """The leaf that holds a layer's kernel: its source if it is tied."""
    leaf = tree[name]["kernel"]
    return tree["a"]["kernel"] if isinstance(leaf, jc.TiedTensor) else leaf


def kinds(tree):
    leaves = jax.tree.leaves(tree, is_leaf=jc.is_compressed)
    return [type(leaf).__name__ for leaf in leaves]


def raw(tree):
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf) for leaf in leaves]
    return treedef, [(a.dtype, a.shape, a.tobytes()) for a in arrays]


TIE_FIRST = "error: Tie first, then compress"
NO_ZEROS = "error: exact zeros"
CELLS = {
    (prune, prune): "holds",
    (prune, share): "holds",
    (prune, quantize): "holds",
    (prune, factor): NO_ZEROS,
    (prune, tie): "holds where all members are zero",
    (prune, train): "holds",
    (prune, save): "holds",
    (share, prune): "encodes again in place",
    (share, share): "left alone",
    (share, quantize): "left alone",
    (share, factor): "left alone",
    (share, tie): TIE_FIRST,
    (share, train): "holds",
    (share, save): "holds",
    (quantize, prune): "encodes again in place",
    (quantize, share): "left alone",
    (quantize, quantize): "left alone",
    (quantize, factor): "left alone",
    (quantize, tie): TIE_FIRST,
    (quantize, train): "holds",
    (quantize, save): "holds",
    (factor, prune): NO_ZEROS,
    (factor, share): "left alone",
    (factor, quantize): "left alone",
    (factor, factor): "left alone",
    (factor, tie): TIE_FIRST,
    (factor, train): "holds",
    (factor, save): "holds",
    (tie, prune): "holds",
    (tie, share): "holds",
    (tie, quantize): "holds",
    (tie, factor): "holds",
    (tie, tie): TIE_FIRST,
    (tie, train): "holds",
    (tie, save): "holds",
    (train, prune): "holds",
    (train, share): "holds",
    (train, quantize): "holds",
    (train, factor): "holds",
    (train, tie): "holds",
    (train, train): "holds",
    (train, save): "holds",
    (save, prune): "as if it had not been stored",
    (save, share): "as if it had not been stored",
    (save, quantize): "as if it had not been stored",
    (save, factor): "as if it had not been stored",
    (save, tie): "as if it had not been stored",
    (save, train): "as if it had not been stored",
    (save, save): "as if it had not been stored",
}


def test_the_table_has_every_cell():
    assert set(CELLS) == {(first, second) for first in PROMISES for second in PROMISES}


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [(*pair, outcome) for pair, outcome in CELLS.items()],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_survives(tmp_path, first, second, outcome):
    params = make_params()
    if outcome == "left alone":
        assert_left_alone(tmp_path, first, second)
        return
    tree = first(params, tmp_path)
    PROMISES[first](tree, tree)
    if outcome.startswith("error: "):
        with pytest.raises(ValueError, match=outcome.removeprefix("error: ")):
            second(tree, tmp_path)
        return
    final = second(tree, tmp_path)
    PROMISES[second](final, final)
    if outcome == "holds":
        PROMISES[first](tree, final)
    elif outcome == "holds where all members are zero":
        zeros_of_all_stay(tree, final)
    elif outcome == "encodes again in place":
        PROMISES[first](tree, final)
        assert_encoded_in_place(tree, final)
    else:
        assert outcome == "as if it had not been stored"
        assert raw(final) == raw(second(params, tmp_path))
    if second is save:
        assert raw(final) == raw(tree)
    if second is train:
        assert_only_floats_moved(tree, final)
    if second in (prune, share, quantize, factor):
        for name in LAYERS:  # what is not selected is the same object
            assert final[name]["bias"] is tree[name]["bias"]


def assert_left_alone(folder, first, second):
    """The second takes what the first left; if that is nothing, it says so."""
    partly = first(make_params(), folder, where=jc.path_matches("a/kernel"))
    final = second(partly, folder)
    assert final["a"]["kernel"] is partly["a"]["kernel"]
    assert jc.is_compressed(final["b"]["kernel"])
    wholly = first(make_params(), folder)
    with pytest.raises(ValueError, match="leaves that are compressed are skipped"):
        second(wholly, folder)


def assert_encoded_in_place(tree, final):
    """Pruning a node zeroes its small values and keeps the bits of the others."""
    assert kinds(final) == kinds(tree)
    for name in LAYERS:
        before, after = kernels(tree)[name], kernels(final)[name]
        small = np.abs(before) < 0.5
        assert 0 < small.sum() < small.size
        np.testing.assert_array_equal(after, np.where(small, 0, before))
        if isinstance(tree[name]["kernel"], jc.QTensor):
            assert raw(final[name]["kernel"].scale) == raw(tree[name]["kernel"].scale)
            assert raw(final[name]["kernel"].zero) == raw(tree[name]["kernel"].zero)


def assert_only_floats_moved(tree, final):
    assert jax.tree.structure(final) == jax.tree.structure(tree)
    (before, codes), (after, same) = jc.split(tree), jc.split(final)
    assert raw(codes) == raw(same)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    assert all(np.any(old != new) for old, new in pairs)


def test_zeros_keep_a_code_to_themselves_when_a_pruned_tree_is_shared(tmp_path):
    pruned = prune(make_params(), tmp_path)
    trained = train(share(pruned, tmp_path), tmp_path)
    for name in LAYERS:
        zeros = np.asarray(pruned[name]["kernel"]) == 0
        np.testing.assert_array_equal(kernels(trained)[name] == 0, zeros)


def test_zeros_are_pinned_even_where_training_brought_a_value_to_zero():
    node = jc.palettize(jnp.array([[0.0, 1.0, 2.0, 3.0]]), clusters=4)
    for codebook in ([1.0, 0.0, 3.0], [0.0, -1.0, 3.0], [1.0, 2.0, 0.0]):
        trained = dataclasses.replace(node, codebook=jnp.array(codebook))
        again = trained.encode(trained.dense())
        np.testing.assert_array_equal(again.dense(), trained.dense())
        moved = dataclasses.replace(again, codebook=again.codebook + 9)
        np.testing.assert_array_equal(moved.dense() == 0, trained.dense() == 0)


@pytest.mark.parametrize("grid", [jc.quantize, jc.quantize_affine])
def test_codes_are_kept_where_training_brought_a_scale_to_zero(grid):
    node = grid(make_params()["a"]["kernel"], bits=BITS)
    trained = dataclasses.replace(node, scale=node.scale.at[2].set(0))
    assert raw(trained.encode(trained.dense())) == raw(trained)


@pytest.mark.parametrize("compress", [share, quantize])
def test_all_of_them_in_the_order_that_the_docs_recommend(tmp_path, compress):
    pruned = prune(tie(make_params(), tmp_path), tmp_path)
    trained = train(pruned, tmp_path)
    zeros_stay(pruned, trained)
    small = compress(trained, tmp_path)
    tuned = train(small, tmp_path)
    final = save(tuned, tmp_path)
    assert raw(final) == raw(tuned)
    for promise in (zeros_stay, PROMISES[compress], tied):
        promise(pruned, final)
    np.testing.assert_array_equal(
        model(jc.densify(final), BATCH[0]), model(jc.densify(tuned), BATCH[0])
    )


@pytest.mark.parametrize("compress", [share, quantize])
def test_pruning_after_training_a_compressed_tree_still_holds(tmp_path, compress):
    trained = train(compress(make_params(), tmp_path), tmp_path)
    final = prune(trained, tmp_path)
    PROMISES[compress](trained, final)
    assert_encoded_in_place(trained, final)
    again = train(final, tmp_path)
    PROMISES[compress](final, again)
    zeros_stay(final, again)


@pytest.mark.parametrize("compress", [share, quantize])
def test_masks_of_compressed_leaves_hit_their_count(tmp_path, compress):
    tree = compress(make_params(), tmp_path)
    masks = jc.prune.masks(tree, 0.5)
    final = jc.apply_masks(tree, masks)
    assert kinds(final) == kinds(tree)
    PROMISES[compress](tree, final)
    for name in LAYERS:
        mask = np.asarray(masks[name]["kernel"])
        assert mask.sum() == 18
        np.testing.assert_array_equal(
            kernels(final)[name] == 0, ~mask | (kernels(tree)[name] == 0)
        )


@pytest.mark.parametrize("compress", [share, quantize])
def test_clipping_a_compressed_leaf_is_an_error_that_says_what_to_do(
    tmp_path, compress
):
    partly = compress(make_params(), tmp_path, where=jc.path_matches("a/kernel"))
    with pytest.raises(ValueError, match="'a/kernel' is compressed .* Clip first, or"):
        jc.clip_tree(partly, -0.1, 0.1)
    final = jc.clip_tree(partly, -0.1, 0.1, where=jc.path_matches("b/kernel"))
    assert final["a"]["kernel"] is partly["a"]["kernel"]
    assert np.abs(kernels(final)["b"]).max() <= np.float32(0.1)


def test_a_tied_leaf_follows_whatever_is_done_to_its_source(tmp_path):
    tree = tie(make_params(), tmp_path)
    for technique in (prune, share, train):
        tree = technique(tree, tmp_path)
        tied(tree, tree)
    assert dataclasses.is_dataclass(tree["a"]["kernel"])
