"""What is observed is what NumPy says of activations that were captured by hand."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.program.observe import observe
from jaxcomp.program.statistics import (
    Statistic,
    absmax,
    entropy,
    feature_rank,
    mean,
    norm,
    second_moment,
    zero_fraction,
)


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def random_params(model, x):
    """Of the model's shapes; to run its own initialisers would take longer."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    return jax.tree.map(lambda leaf: normal(*leaf.shape, seed=leaf.size) / 2, shapes)


NORM = {"norm": norm}
ALL = {"norm": norm, "moment": second_moment}


def check(row, *inputs, **close):
    """A row is what NumPy says of inputs, float[rows, channels], of all uses."""
    x = np.concatenate([np.asarray(x, np.float64) for x in inputs])
    close = {"rtol": 1e-5, "atol": 1e-5} | close
    assert row.reason == ""
    if "norm" in row.inputs:
        found = np.ravel(row.inputs["norm"])
        np.testing.assert_allclose(found, np.linalg.norm(x, axis=0), **close)
    if "moment" in row.inputs:
        moment = row.inputs["moment"]
        assert moment.rows == len(x)
        np.testing.assert_allclose(moment.total, x.T @ x, **close)


def test_a_net_of_two_layers_by_hand():
    params = {
        "in": {
            "kernel": jnp.array([[1.0, -1.0], [2.0, 0.0]]),
            "bias": jnp.ones((1, 2)),
        },
        "out": {"kernel": jnp.array([[1.0], [1.0]])},
    }

    def f(p, x):
        return jax.nn.relu(x @ p["in"]["kernel"] + p["in"]["bias"]) @ p["out"]["kernel"]

    # relu([[2, 0], [3, 1]]) and relu([[0, 2]])
    batches = [(jnp.array([[1.0, 0.0], [0.0, 1.0]]),), (jnp.array([[-1.0, 0.0]]),)]
    asked = {"top": absmax, "zero": zero_fraction, "moment": second_moment}
    found = observe(f, params, batches, asked, outputs={"mean": mean})
    assert found.keys() == {"in/kernel", "out/kernel"}
    row = found["in/kernel"]
    assert (row.axes, row.units, row.window, row.stacked) == ((0,), (1,), (), ())
    assert row.inputs["top"].tolist() == [1, 1]
    assert row.inputs["moment"].total.tolist() == [[2, 0], [0, 1]]
    np.testing.assert_allclose(row.outputs["mean"], [2 / 3, 0], atol=1e-7)
    row = found["out/kernel"]
    assert row.inputs["top"].tolist() == [3, 2]
    np.testing.assert_allclose(row.inputs["zero"], [1 / 3, 1 / 3])
    assert row.inputs["moment"].total.tolist() == [[13, 3], [3, 5]]
    assert row.inputs["moment"].rows == 3
    np.testing.assert_allclose(row.outputs["mean"], [8 / 3])
    assert (row.groups, row.masked, row.reason) == (1, False, "")


def two_layers(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


TWO = {"a": normal(3, 4), "b": normal(4, 2, seed=1)}
BATCH = hnp.arrays(np.float32, (5, 3), elements=st.integers(-8, 8).map(lambda n: n / 4))


@settings(max_examples=5)  # each is a compilation
@given(BATCH, BATCH)
def test_batches_add_up_to_the_statistics_of_one(x, y):
    found = observe(two_layers, TWO, iter([(x,), (y,)]), NORM)
    check(found["a"], x, y)
    check(found["b"], np.tanh(x @ TWO["a"]), np.tanh(y @ TWO["a"]))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="ln")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="mix")(y)
        return x + nn.Dense(8, name="down")(nn.relu(nn.Dense(12, name="up")(x)))


X = normal(4, 5, 8)


@pytest.fixture(scope="module")
def block():
    model = Block()
    params = random_params(model, X)

    def f(params, x):
        return model.apply({"params": params}, x)

    @jax.jit
    def capture(params, x):
        _, found = model.apply(
            {"params": params}, x, capture_intermediates=True, mutable=["intermediates"]
        )
        return found["intermediates"]

    seen = capture(params, X)
    y = seen["ln"]["__call__"][0]
    heads = [seen["mix"][k]["__call__"][0] for k in ("query", "key", "value")]
    query, key, value = map(np.asarray, heads)
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / 2
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = np.einsum("bhqk,bkhd->bqhd", weights, value)
    after = X + seen["mix"]["__call__"][0]
    inputs = {
        **{f"mix/{k}/kernel": y for k in ("query", "key", "value")},
        "mix/out/kernel": mixed.reshape(4, 5, 8),
        "up/kernel": after,
        "down/kernel": np.maximum(seen["up"]["__call__"][0], 0),
    }
    return f, params, inputs


def test_every_weight_of_a_transformer_has_its_own_inputs(block):
    f, params, inputs = block
    found = observe(f, params, [(X,)], ALL)
    assert found.keys() == inputs.keys()
    for path, x in inputs.items():
        check(found[path], np.reshape(x, (-1, x.shape[-1])), rtol=1e-4)
    out = found["mix/out/kernel"]
    assert out.axes == (0, 1)
    assert out.units == (2,)
    assert out.inputs["norm"].shape == (2, 4)  # heads, of the attention
    assert found["mix/query/kernel"].units == (1, 2)


def test_weights_that_share_an_input_share_its_statistics(block):
    f, params, _ = block
    calls = []

    def of(x, weight):
        calls.append(x)
        return second_moment.of(x, weight)

    found = observe(f, params, [(X,)] * 3, {"moment": second_moment._replace(of=of)})
    assert len(calls) == 4  # of six weights
    moments = [found[f"mix/{k}/kernel"].inputs["moment"] for k in ("query", "key")]
    assert moments[0].total is moments[1].total


def test_padding_is_left_out_and_may_be_anything(block):
    f, params, inputs = block
    keep = np.arange(5) < np.array([[5], [3], [1], [4]])

    def g(params, x, keep):  # a net that does not look at the mask
        return f(params, jnp.where(keep[..., None], x, x))

    found = observe(g, params, [(X, jnp.asarray(keep))], ALL, mask=lambda x, keep: keep)
    for path, x in inputs.items():
        check(found[path], np.asarray(x)[keep], rtol=1e-4)
        assert found[path].masked

    def spoilt(p, x):
        x = jnp.where(jnp.asarray(keep)[..., None], x, jnp.nan)
        return x.reshape(20, 8) @ p["flat"] + (x @ p["whole"]).reshape(20, 3)

    params = {"flat": normal(8, 3), "whole": normal(8, 3, seed=1)}
    asked = {"norm": norm, "zero": zero_fraction}
    found = observe(
        spoilt, params, [(X,)], asked, outputs=ALL, mask=lambda x: jnp.asarray(keep)
    )
    for path, row in found.items():
        check(row, np.asarray(X)[keep])
        assert row.inputs["zero"].tolist() == [0] * 8
        outputs = np.asarray(X)[keep] @ params[path]
        check(row._replace(inputs=row.outputs), outputs, rtol=1e-4)
        assert row.masked


def test_where_the_mask_does_not_fit_every_row_counts_and_the_row_says_so():
    def f(p, x):
        return jnp.tanh(x @ p["in"]).mean(1) @ p["pooled"]

    params = {"in": normal(8, 3), "pooled": normal(3, 2)}
    keep = jnp.asarray(np.arange(5) < np.array([[5], [3], [1], [4]]))
    found = observe(f, params, [(X,)], NORM, mask=lambda x: keep)
    check(found["pooled"], np.tanh(X @ params["in"]).mean(1))
    assert found["in"].masked
    assert not found["pooled"].masked
    # A mask of whole examples fits both.
    found = observe(f, params, [(X,)], NORM, mask=lambda x: jnp.arange(4) > 1)
    check(found["pooled"], np.tanh(X[2:] @ params["in"]).mean(1))
    check(found["in"], np.reshape(X[2:], (-1, 8)))
    assert found["in"].masked
    assert found["pooled"].masked


def energies(row, kernel):
    """The sum of squares of each output, from the second moment of the inputs."""
    total = np.asarray(row.inputs["moment"].total, np.float64)
    if row.groups == 1:
        total = total[None]
    w = np.asarray(kernel, np.float64).reshape(
        -1, row.groups, kernel.shape[-1] // row.groups
    )
    return np.einsum("igo,gij,jgo->go", w, total, w).ravel()


def patches_of(x, size, stride, pad):
    """[rows, size * size * channels] of images, by hand."""
    x = np.pad(np.asarray(x), ((0, 0), pad, pad, (0, 0)))
    starts = range(0, x.shape[1] - size + 1, stride)
    cuts = [x[:, i : i + size, j : j + size] for i in starts for j in starts]
    return np.stack(cuts, axis=1).reshape(-1, size * size * x.shape[-1])


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), 2, padding=((1, 1), (1, 1)), name="stride")(x)
        x = nn.Conv(
            6, (3, 2), feature_group_count=2, kernel_dilation=(1, 2), name="grouped"
        )(nn.relu(x))
        return nn.ConvTranspose(2, (3, 3), (2, 2), name="transposed")(x)


def test_convolutions_see_patches():
    model = Convolutions()
    x = normal(2, 7, 7, 3)
    params = random_params(model, x)

    def f(params, x):
        return model.apply({"params": params}, x)

    where = jc.path_matches(".*kernel")
    found = observe(f, params, [(x,)], ALL, outputs={"norm": norm}, where=where)
    row = found["stride/kernel"]
    assert (row.axes, row.window, row.units) == ((2,), (0, 1), (3,))
    patches = patches_of(x, 3, 2, (1, 1))
    check(row._replace(inputs={"moment": row.inputs["moment"]}), patches)
    check(row._replace(inputs={"norm": row.inputs["norm"]}), np.reshape(x, (-1, 3)))
    # w'Mw is the energy of an output, whatever the stride, dilation, padding or groups.
    for name in ("stride", "grouped", "transposed"):
        row = found[f"{name}/kernel"]
        energy = np.square(row.outputs["norm"])
        expected = energies(row, params[name]["kernel"])
        np.testing.assert_allclose(energy, expected, rtol=1e-4)
    row = found["grouped/kernel"]
    assert row.groups == 2
    assert row.inputs["norm"].shape == (2, 2)
    assert row.inputs["moment"].total.shape == (2, 12, 12)


def test_other_layouts_of_a_convolution_give_the_order_of_the_parameter():
    layout = ("NCHW", "OIHW", "NCHW")
    w, x = normal(4, 3, 2, 2), normal(2, 3, 5, 5, seed=1)

    def f(p, x):
        return jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "VALID", dimension_numbers=layout
        )

    def g(p, x):
        return f({"w": jnp.transpose(p["w"], (2, 3, 1, 0))}, x)

    row = observe(f, {"w": w}, [(x,)], ALL)["w"]
    assert (row.axes, row.window, row.units) == ((1,), (2, 3), (0,))
    nhwc = np.transpose(x, (0, 2, 3, 1))
    patches = patches_of(nhwc, 2, 1, (0, 0)).reshape(-1, 4, 3).swapaxes(1, 2)
    moment = {"moment": row.inputs["moment"]}
    check(row._replace(inputs=moment), patches.reshape(-1, 12))
    # The same function with a kernel that is stored (height, width, out, in).
    moved = observe(g, {"w": jnp.transpose(w, (3, 2, 0, 1))}, [(x,)], ALL)["w"]
    assert (moved.axes, moved.window, moved.units) == ((3,), (0, 1), (2,))
    turned = patches.reshape(-1, 3, 2, 2).transpose(0, 3, 2, 1).reshape(-1, 12)
    check(moved._replace(inputs={"moment": moved.inputs["moment"]}), turned)
    np.testing.assert_array_equal(moved.inputs["norm"], row.inputs["norm"])


def layers(p, x):
    """A scan over layers, one weight of which is the same in all."""

    def layer(x, w):
        y = x @ w["own"].T
        return jnp.tanh(y + x @ p["shared"]), y

    return jax.lax.scan(layer, x, p["layers"])


def layer_inputs(p, x):
    found = [np.asarray(x)]
    for own in p["layers"]["own"][:-1]:
        found.append(np.tanh(found[-1] @ own.T + found[-1] @ p["shared"]))
    return found


LAYERS = {"layers": {"own": normal(3, 4, 4)}, "shared": normal(4, 4, seed=1)}


def test_layers_of_a_scan_have_their_own_inputs_and_a_shared_weight_has_all():
    x = normal(5, 4, seed=2)
    found = observe(layers, LAYERS, [(x,), (-x,)], ALL, outputs={"norm": norm})
    own, shared = found["layers/own"], found["shared"]
    assert (own.stacked, own.axes, own.units) == ((0,), (2,), (1,))
    assert (shared.stacked, shared.axes) == ((), (0,))
    seen = layer_inputs(LAYERS, np.concatenate([x, -x]))
    for i, x in enumerate(seen):
        each = {k: jax.tree.map(lambda v, i=i: v[i], own.inputs[k]) for k in ALL}
        check(own._replace(inputs=each), x)
        outputs = np.linalg.norm(x @ LAYERS["layers"]["own"][i].T, axis=0)
        np.testing.assert_allclose(own.outputs["norm"][i], outputs, rtol=1e-5)
    check(shared, *seen)


def test_loops_in_loops_stack_the_outer_one_first():
    params = {"w": normal(2, 3, 4, 4), "once": normal(2, 4, 4), "c": normal(4, 4)}

    def f(p, x):
        def outer(x, w):
            def inner(x, v):
                return jnp.tanh(x @ v + x @ w["once"] + x @ p["c"]), None

            return jax.lax.scan(inner, x, w["w"])[0], None

        return jax.lax.scan(outer, x, {"w": p["w"], "once": p["once"]}, reverse=True)

    x = normal(5, 4)
    found = observe(f, params, [(x,)], NORM)
    assert found["w"].stacked == (0, 1)
    assert found["w"].inputs["norm"].shape == (2, 3, 4)
    x, seen = np.asarray(x), {}
    for i in (1, 0):
        for j in range(3):
            seen[i, j] = x
            sums = x @ params["w"][i, j] + x @ params["once"][i] + x @ params["c"]
            x = np.tanh(sums)
    for (i, j), y in seen.items():
        expected = np.linalg.norm(y, axis=0)
        np.testing.assert_allclose(found["w"].inputs["norm"][i, j], expected, rtol=1e-5)
    for i in (0, 1):
        each = {
            k: jax.tree.map(lambda v, i=i: v[i], found["once"].inputs[k]) for k in NORM
        }
        check(found["once"]._replace(inputs=each), *(seen[i, j] for j in range(3)))
    check(found["c"], *seen.values())


def test_experts_have_their_own_inputs():
    x, w = normal(6, 2, 4), normal(2, 4, 3, seed=1)

    def f(p, x):
        return jnp.einsum("bei,eio->beo", x, p["w"])

    row = observe(f, {"w": w}, [(x,)], NORM, outputs={"norm": norm})["w"]
    assert (row.stacked, row.axes, row.units) == ((0,), (1,), (2,))
    np.testing.assert_allclose(row.inputs["norm"], np.linalg.norm(x, axis=0), rtol=1e-5)
    outputs = np.linalg.norm(f({"w": w}, x), axis=0)
    np.testing.assert_allclose(row.outputs["norm"], outputs, rtol=1e-5)


def test_a_tied_embedding_is_observed_in_the_output_layer_only():
    params = {"embedding": normal(7, 4), "w": normal(4, 4, seed=1)}

    def f(p, tokens):
        return jnp.tanh(p["embedding"][tokens] @ p["w"]) @ p["embedding"].T

    tokens = jnp.array([[1, 2, 6], [0, 0, 3]])
    row = observe(f, params, [(tokens,)], NORM)["embedding"]
    assert (row.axes, row.units) == ((1,), (0,))
    check(row, np.tanh(np.asarray(params["embedding"])[tokens.ravel()] @ params["w"]))


def test_slices_of_a_fused_weight_count_for_the_whole():
    params = {"qkv": normal(4, 6), "three": normal(3, 4, 2, seed=1)}

    def f(p, x, y):
        q, k, v = jnp.split(p["qkv"], 3, axis=1)
        kept = (x @ q) * (x @ k) + x @ v  # one input, three times
        return kept + x @ p["three"][0] + y @ p["three"][1] + y @ p["three"][2]

    x, y = normal(5, 4, seed=2), normal(5, 4, seed=3)
    found = observe(f, params, [(x, y)], NORM)
    assert found["qkv"].axes == (0,)
    check(found["qkv"], x)
    assert found["three"].axes == (1,)
    check(found["three"], x, y)


def test_a_reversed_or_reshaped_weight_is_observed_in_its_own_order():
    params = {"back": normal(4, 3), "heads": normal(3, 2, 2, seed=1)}
    x = normal(5, 4, seed=2)

    def f(p, x):
        flat = p["heads"].transpose(2, 1, 0).reshape(4, 3)
        return x @ p["back"][::-1] + x @ flat

    found = observe(f, params, [(x,)], ALL)
    check(found["back"], x[:, ::-1])
    assert found["heads"].axes == (1, 2)
    check(found["heads"], np.reshape(x, (5, 2, 2)).swapaxes(1, 2).reshape(5, 4))
    assert found["heads"].inputs["norm"].shape == (2, 2)


def test_axes_of_one_entry_are_found():
    params = {"a": normal(4, 1), "b": normal(1, 1, 4), "c": normal(1, 3, 1)}
    x = normal(5, 1)

    def f(p, x):
        def layer(x, w):
            return x, x @ w.T

        return x @ p["a"].T, jax.lax.scan(layer, x, p["c"])[1], x @ p["b"][0]

    found = observe(f, params, [(x,)], NORM)
    assert (found["a"].axes, found["a"].units) == ((1,), (0,))
    assert found["a"].inputs["norm"].shape == (1,)
    assert (found["c"].stacked, found["c"].axes) == ((0,), (2,))
    assert found["c"].inputs["norm"].shape == (1, 1)
    assert found["b"].inputs["norm"].shape == (1,)
    for row in found.values():
        total = row.inputs["norm"]
        np.testing.assert_allclose(total.ravel(), np.linalg.norm(x, axis=0), rtol=1e-6)


def test_calls_are_looked_into():
    @jax.custom_jvp
    def product(x, w):
        return x @ w

    product.defjvp(lambda primals, tangents: (product(*primals), tangents[0]))

    @jax.checkpoint
    def remat(x, w):
        return jnp.tanh(x @ w)

    def f(p, x):
        return product(jax.jit(remat)(x, p["a"]), p["b"])

    x = normal(5, 3)
    found = observe(f, TWO, [(x,)], NORM)
    check(found["a"], x)
    check(found["b"], np.tanh(x @ TWO["a"]))


def test_nodes_are_dense_and_tied_layers_have_rows_of_their_own():
    params = {"a": normal(4, 4), "b": normal(4, 4, seed=1)}
    small = jc.quantize_tree(jc.tie_layers(params, [("a", "b")]), bits=8)

    def f(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    x = normal(5, 4)
    found = observe(f, small, [(x,)], NORM)
    check(found["a"], x)
    check(found["b"], np.tanh(x @ jc.densify(small)["a"]))


def test_a_function_is_traced_once_for_many_batches_of_one_shape():
    traces = []

    def f(p, x):
        traces.append(x.shape)
        return two_layers(p, x)

    batches = ((normal(n, 3, seed=n),) for n in (5, 5, 5, 2, 5, 2))
    found = observe(f, TWO, batches, NORM)
    assert traces == [(5, 3), (2, 3)]
    check(found["a"], *(normal(n, 3, seed=n) for n in (5, 5, 5, 2, 5, 2)))


def test_a_loop_that_is_written_out_may_be_longer_for_other_shapes():
    def f(p, x):
        for row in x:
            y = jnp.tanh(row @ p["a"])
        return y

    params = {"a": normal(3, 3)}
    x, y = normal(2, 4, 3), normal(5, 4, 3, seed=1)
    check(observe(f, params, [(x,), (y,)], NORM)["a"], *x, *y)


def test_a_vector_is_one_row():
    x = normal(3)
    row = observe(two_layers, TWO, [(x,), (2 * x,)], ALL, outputs={"top": absmax})["a"]
    check(row, x[None], 2 * x[None])
    np.testing.assert_allclose(row.outputs["top"], abs(2 * x @ TWO["a"]), rtol=1e-6)


def test_bfloat16_is_summed_in_float32():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), TWO)
    x = normal(64, 3).astype(jnp.bfloat16)
    row = observe(two_layers, params, [(x,)], ALL | {"top": absmax})["a"]
    assert row.inputs["norm"].dtype == row.inputs["moment"].total.dtype == jnp.float32
    assert row.inputs["top"].dtype == jnp.bfloat16
    check(row, x)


def test_a_statistic_of_your_own():
    least = Statistic(  # a state of zeros is that of no rows
        of=lambda x, weight: jnp.max(
            jnp.where(weight[..., None] > 0, 1 / (1 + jnp.abs(x)), 0),
            range(x.ndim - 1),
        ),
        merge=jnp.maximum,
        finish=lambda state: 1 / state - 1,
    )
    x = normal(2, 5, 4)
    keep = jnp.arange(5) < 3
    found = observe(
        lambda p, x: layers(p, x)[0],
        LAYERS,
        [(x,)],
        {"least": least},
        mask=lambda x: jnp.broadcast_to(keep, (2, 5)),
    )
    seen = np.stack(layer_inputs(LAYERS, x))[:, :, :3]
    expected = np.abs(seen).min((1, 2))
    np.testing.assert_allclose(found["layers/own"].inputs["least"], expected, rtol=1e-4)
    expected = np.abs(seen).min((0, 1, 2))
    np.testing.assert_allclose(found["shared"].inputs["least"], expected, rtol=1e-4)


def test_maps_and_samples_reach_the_statistics_as_they_are():
    x = normal(6, 4, 4, 2)
    x = x.at[..., 0].set(1.0)  # rank 1, and no entropy

    def f(p, x):
        return jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    asked = {"rank": feature_rank, "entropy": entropy(bins=3)}
    row = observe(f, {"w": normal(3, 3, 2, 5)}, [(x[:2],), (x[2:],)], asked)["w"]
    np.testing.assert_allclose(row.inputs["rank"], [1, 4])
    pooled = np.asarray(x, np.float64).mean((1, 2))[:, 1]
    p = np.histogram(pooled, 3)[0] / 6
    expected = -(p[p > 0] * np.log(p[p > 0])).sum()
    np.testing.assert_allclose(row.inputs["entropy"], [0, expected], rtol=1e-5)


REASONS = {
    "it meets no activation": lambda p, x: jnp.sum(p["odd"]) * x,
    "it enters a 'while', which is not looked into": lambda p, x: jax.lax.while_loop(
        lambda x: x.sum() < 0, lambda x: x @ p["odd"], x
    ),
    "it enters a 'cond', which is not looked into": lambda p, x: jax.lax.cond(
        x.sum() > 0, lambda: x @ p["odd"], lambda: x
    ),
    "a scan carries it": lambda p, x: jax.lax.scan(
        lambda c, _: (2 * c, x @ c), p["odd"], None, length=2
    ),
    "its axis 0 is mixed with others before it is multiplied": lambda p, x: (
        x[:, :2] @ p["odd"].reshape(2, 8)
    ),
    "only a part of its axes (0,) meets an input": lambda p, x: x[:, :2] @ p["odd"][:2],
    "not all its uses contract the same axes": lambda p, x: x @ p["odd"] @ p["odd"].T,
    "it is stacked along what is not one of its axes": lambda p, x: jax.lax.scan(
        lambda x, w: (x, x @ w), x, p["odd"][::-1]
    ),
    "it enters a 'conv_general_dilated', which is not looked into": lambda p, x: (
        jax.lax.conv(p["odd"][None, None], x[:4][None, None], (1, 1), "VALID")
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_observed_has_a_reason_and_no_statistics(reason):
    params = {"odd": normal(4, 4), "plain": normal(4, 2)}
    x = normal(5, 4)
    found = observe(
        lambda p, x: (REASONS[reason](p, x), x @ p["plain"]), params, [(x,)], NORM
    )
    assert found["odd"].reason == reason
    assert found["odd"].inputs == {}
    check(found["plain"], x)


def test_outputs_need_all_units_in_one_product():
    params = {"qkv": normal(4, 6), "plain": normal(4, 2)}

    def f(p, x):
        return x @ p["qkv"][:, :3], x @ p["qkv"][:, 3:], x @ p["plain"]

    found = observe(f, params, [(normal(5, 4),)], {}, outputs=ALL)
    assert found["qkv"].reason == "only a part of its outputs is in one product"
    assert found["plain"].outputs["norm"].shape == (2,)
    assert found["plain"].inputs == {}


def raises(text, *args, error=ValueError, **more):
    with pytest.raises(error, match=re.escape(text)):
        observe(*args, **more)


def test_nothing_to_observe_is_an_error_that_says_why():
    text = (
        "observe needs a weight that it can observe, but of the 1 selected there is "
        "none: 'w', for one, since it meets no activation."
    )
    raises(text, lambda p, x: x * p["w"].sum(), {"w": normal(2, 2)}, [(1.0,)], ALL)


def test_a_where_that_selects_nothing_is_an_error():
    where = jc.path_matches("c")
    text = "`where` selected none of the 2 leaves, which are a, b."
    raises(text, two_layers, TWO, [(normal(5, 3),)], ALL, where=where)


def test_no_batch_is_an_error():
    raises("observe needs at least one batch, got none.", two_layers, TWO, [], ALL)


def test_a_batch_that_is_no_tuple_is_an_error():
    text = "observe needs batches that are tuples of inputs, got one of type"
    raises(text, two_layers, TWO, [normal(5, 3)], ALL, error=TypeError)


def test_a_mask_that_is_not_bool_is_an_error():
    text = "observe needs a mask of bools, one for each position, got int32[5]."
    batches = [(normal(5, 3),)]
    mask = lambda x: jnp.ones(5, jnp.int32)  # noqa: E731
    raises(text, two_layers, TWO, batches, ALL, mask=mask, error=TypeError)


def test_a_mask_that_fits_nowhere_is_an_error():
    text = (
        "observe needs a mask over the leading axes of inputs of weights, got bool[4], "
        "which fits none of them."
    )
    batches = [(normal(5, 3),)]
    raises(text, two_layers, TWO, batches, ALL, mask=lambda x: jnp.ones(4, bool))


def test_what_a_statistic_raises_says_at_which_weight():
    with pytest.raises(ValueError, match="feature_rank needs maps") as caught:
        observe(two_layers, TWO, [(normal(5, 3),)], {"rank": feature_rank})
    assert "This is 'rank' at the weight 'a'." in caught.value.__notes__


def test_observing_leaks_no_tracer():
    with jax.checking_leaks():
        check(observe(two_layers, TWO, [(X[0, :, :3],)], ALL)["a"], X[0, :, :3])
