"""A function is rounded as one that was written with rounding by hand."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.program.fake import fake_quantized


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


W4 = partial(jc.fake_quantize, bits=4)  # of weights
A8 = partial(jc.fake_quantize, bits=8, axis=None)  # of activations
rounded = partial(fake_quantized, weights=W4, activations=A8)


def agree(f, by_hand, params, *inputs, atol=1e-6):
    """Values and gradients of the rounded ``f`` are those of ``by_hand``."""

    def loss(f, params):
        out = f(params, *inputs)
        return sum(jnp.sum(jnp.cos(y)) for y in jax.tree.leaves(out)), out

    found = jax.jit(jax.grad(partial(loss, rounded(f)), has_aux=True))(params)
    expected = jax.jit(jax.grad(partial(loss, by_hand), has_aux=True))(params)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=atol)
    plain = jax.tree.leaves(jax.jit(f)(params, *inputs))
    assert not all(map(np.allclose, plain, jax.tree.leaves(found[1])))


def test_a_product_by_hand():
    g = fake_quantized(
        lambda p, x: x @ p["kernel"] + p["bias"],
        weights=partial(jc.fake_quantize, bits=2, axis=None),
        activations=partial(jc.fake_quantize, bits=2, axis=None),
    )
    params = {
        "kernel": jnp.array([[1.0, 0.2], [0.4, -0.8]]),
        "bias": jnp.array([[0.3, 0]]),
    }
    x = jnp.array([[0.5, 2.0]])
    # Codes -1, 0, 1: the kernel is [[1, 0], [0, -1]], the input [[0, 2]].
    np.testing.assert_allclose(g(params, x), [[0.3, -2.0]], rtol=1e-6)


def perceptron(w, a):
    def f(p, x):
        x = jax.nn.relu(a(x) @ w(p["in"]["kernel"]) + p["in"]["bias"])
        return a(x) @ w(p["out"]["kernel"]).astype(x.dtype) + p["out"]["bias"]

    return f


def same(x):
    return x


def perceptron_params(seed=0):
    return {
        "in": {"kernel": normal(4, 6, seed=seed), "bias": normal(1, 6)},
        "out": {"kernel": normal(6, 3, seed=seed + 1), "bias": normal(1, 3)},
    }


def test_a_perceptron():
    f, by_hand = perceptron(same, same), perceptron(W4, A8)
    agree(f, by_hand, perceptron_params(), normal(5, 4))


class Images(nn.Module):
    conv: type = nn.Conv

    @nn.compact
    def __call__(self, x):
        return nn.relu(self.conv(4, (3, 3), strides=2, feature_group_count=2)(x))


def rounding(product):
    """A dot or a convolution for a Flax layer that rounds both its operands."""
    return lambda x, kernel, *args, **kwargs: product(
        A8(x), W4(kernel), *args, **kwargs
    )


def applied(model):
    return lambda params, x: model.apply({"params": params}, x)


def test_linen_convolutions():
    by_hand = Images(
        partial(nn.Conv, conv_general_dilated=rounding(jax.lax.conv_general_dilated))
    )
    x = normal(2, 6, 6, 2)
    params = jax.jit(Images().init)(jax.random.key(0), x)["params"]
    agree(applied(Images()), applied(by_hand), params, x, atol=1e-5)


def attention(w, a):
    """With kernels (d, heads, head_dim), one of them stored the other way round."""

    def f(p, x):
        d = x.shape[-1]

        def heads(kernel):
            return (a(x) @ kernel.reshape(d, d)).reshape(*x.shape[:-1], 2, d // 2)

        q, k = heads(w(p["q"])), heads(w(p["k"]))
        v = heads(w(p["v"]).T.reshape(d, d))
        scores = jnp.einsum("qhd,khd->hqk", q, k)  # of activations: as it is
        y = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v)
        return jnp.einsum("qhd,hdo->qo", a(y), w(p["o"]))

    return f


def test_attention_with_reshaped_kernels():
    names = dict(zip("qkvo", range(4), strict=True))
    params = {name: normal(4, 2, 2, seed=seed) for name, seed in names.items()}
    params["v"], params["o"] = normal(4, 4, seed=5), normal(2, 2, 4, seed=6)
    agree(attention(same, same), attention(W4, A8), params, normal(3, 4))


def tied(w, a):
    def f(p, tokens):
        x = jnp.tanh(p["embedding"][tokens])
        return a(x) @ w(p["embedding"]).T

    return f


def test_a_tied_embedding_is_looked_up_as_it_is():
    params = {"embedding": normal(7, 4)}
    agree(tied(same, same), tied(W4, A8), params, jnp.array([1, 5, 1]))


def test_a_fused_kernel_is_rounded_before_it_is_split():
    def fused(w, a):
        def f(p, x):
            left, right = jnp.split(w(p["w"]), 2, axis=1)
            return a(x) @ left * (a(x) @ right.astype(jnp.bfloat16).astype(jnp.float32))

        return f

    agree(fused(same, same), fused(W4, A8), {"w": normal(4, 6)}, normal(5, 4))


def stack(w, a):
    def f(p, x):
        kernels, shared = w(p["kernel"]), w(p["shared"])

        def layer(carry, row):
            x, turn = carry
            kernel, bias = row
            x = jnp.tanh(a(x) @ kernel.T + bias)
            return (a(x) @ shared, turn + 1), x.sum()

        carry = x, 0
        return jax.lax.scan(layer, carry, (kernels, p["bias"]), reverse=True)

    return lambda p, x: (f(p, x)[0][0], f(p, x)[1])


STACK = {
    "kernel": normal(3, 4, 4),
    "bias": normal(3, 1, 4),
    "shared": normal(4, 4, seed=1),
}


def test_layers_in_a_scan():
    agree(stack(same, same), stack(W4, A8), STACK, normal(2, 4))


def test_checkpointed_layers():
    def model(w, a):
        dots = jax.checkpoint_policies.dots_saveable

        @partial(jax.checkpoint, policy=dots)
        def block(x, kernel):
            return jnp.tanh(a(x) @ kernel.T) + jnp.eye(4)[:1]

        return lambda p, x: block(jax.checkpoint(block)(x, w(p["a"])), w(p["b"]))

    params = {"a": normal(4, 4), "b": normal(4, 4, seed=1)}
    f, x = model(same, same), normal(2, 4)
    agree(f, model(W4, A8), params, x)
    text = str(jax.make_jaxpr(rounded(f))(params, x))
    assert text.count("dots_saveable") == str(jax.make_jaxpr(f)(params, x)).count(
        "dots_saveable"
    )


@pytest.mark.parametrize("up", [True, False])
def test_branches(up):
    def model(w, a):
        def f(p, x, up):
            return jax.lax.cond(
                up,
                lambda w1, w2: (a(x) @ w1, 0.0),
                lambda w1, w2: (a(x) @ w2.T, x.sum()),
                w(p["a"]),
                w(p["b"]),
            )

        return f

    params = {"a": normal(4, 3), "b": normal(3, 4, seed=1)}
    agree(model(same, same), model(W4, A8), params, normal(2, 4), jnp.array(up))


def test_a_switch_on_a_number():
    def model(w, a):
        def f(p, x, i):
            ways = [lambda k: a(x) @ k, lambda k: x, lambda k: a(x) @ k.T]
            return jax.lax.switch(i, ways, w(p))

        return f

    params = normal(4, 4)
    agree(model(same, same), model(W4, A8), params, normal(2, 4), jnp.array(2))


def test_loops():
    def model(w, a):
        def f(p, x):
            asked, kernel = w(p["asked"]), w(p["kernel"])
            return jax.lax.while_loop(
                lambda c: jnp.logical_and(c[0] < 4, jnp.sum(a(c[1]) @ asked) < 50),
                lambda c: (c[0] + 1, jnp.tanh(a(c[1]) @ kernel.T) + c[1]),
                (0, x),
            )

        return f

    params = {"asked": normal(4, 1), "kernel": normal(4, 4)}
    x = normal(2, 4)
    found = jax.jit(rounded(model(same, same)))(params, x)
    expected = jax.jit(model(W4, A8))(params, x)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    plain = jax.jit(model(same, same))(params, x)
    assert not np.allclose(plain[1], found[1])


def test_what_is_carried_is_no_parameter_any_more():
    def f(w, x):
        return jax.lax.scan(lambda c, _: (c @ c.T, x @ c), w, None, length=2)

    w, x = normal(4, 4), normal(2, 4)
    g = fake_quantized(f, weights=W4)
    chex.assert_trees_all_close(jax.jit(g)(w, x), jax.jit(f)(w, x), rtol=1e-6)


def test_only_what_is_selected_is_rounded():
    f = perceptron(same, same)
    params, x = perceptron_params(), normal(5, 4)
    g = jax.jit(fake_quantized(f, weights=W4, where=jc.path_matches("out/kernel")))
    held = params | {"out": params["out"] | {"kernel": W4(params["out"]["kernel"])}}
    np.testing.assert_allclose(g(params, x), f(held, x), rtol=1e-5)


def test_biases_and_norms_are_left_alone():
    def f(p, x):
        x = x * p["norm"]["scale"] + p["dense"]["bias"]
        return x @ p["norm"]["scale"].T  # a product, but not of a matrix

    p = {
        "norm": {"scale": normal(1, 4)},
        "dense": {"bias": normal(1, 4), "kernel": normal(4, 4)},
    }
    x = normal(2, 4)
    np.testing.assert_array_equal(jax.jit(rounded(f))(p, x), jax.jit(f)(p, x))


def test_a_product_of_two_weights_is_left_alone():
    f = lambda p, x: x + p["a"] @ p["b"]  # noqa: E731
    p = {"a": normal(2, 4), "b": normal(4, 3)}
    np.testing.assert_array_equal(rounded(f)(p, normal(2, 3)), f(p, normal(2, 3)))


def test_nothing_selected_is_an_error():
    g = fake_quantized(lambda p, x: x, weights=W4, where=jc.path_matches("nowhere"))
    with pytest.raises(
        ValueError, match="`where` selected none of the 1 leaves.*kernel"
    ):
        g({"kernel": normal(2, 2)}, normal(2))


def test_a_weight_that_enters_what_cannot_be_walked_is_an_error():
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.PartitionSpec()
    f = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=whole, out_specs=whole)
    with pytest.raises(ValueError, match="enters a 'shard_map', which it does"):
        rounded(f)(normal(4, 3), normal(2, 4))
    g = rounded(lambda p, x: f(normal(4, 4), x) @ p)
    assert g(normal(4, 3), normal(2, 4)).shape == (2, 3)


def test_experts():
    def model(w, a):
        sizes = jnp.array([2, 0, 3])
        return lambda p, x: jax.lax.ragged_dot(a(x), w(p), sizes)

    agree(model(same, same), model(W4, A8), normal(3, 4, 2), normal(5, 4))


def test_numbers_come_back_as_arrays():
    found = rounded(lambda p, x: (x @ p, 1.0, np.int32(2)))(normal(4, 3), normal(2, 4))
    assert all(isinstance(x, jax.Array) for x in found)
    assert [x.dtype for x in found[1:]] == [jnp.float32, jnp.int32]


@pytest.mark.parametrize("model", [perceptron, attention, stack])
def test_with_nothing_to_round_it_is_the_function(model):
    f = model(same, same)
    params = {perceptron: perceptron_params(), stack: STACK}.get(model)
    if params is None:
        params = {name: normal(4, 2, 2) for name in "qk"}
        params |= {"v": normal(4, 4), "o": normal(2, 2, 4)}
    x = normal(2, 4)
    chex.assert_trees_all_equal(
        jax.jit(fake_quantized(f))(params, x), jax.jit(f)(params, x)
    )


KERNELS = hnp.arrays(np.float32, (4, 3), elements=st.floats(-4, 4, width=32))
INPUTS = hnp.arrays(np.float32, (2, 4), elements=st.floats(-4, 4, width=32))
by_walk = jax.jit(rounded(lambda w, x: jnp.tanh(x) @ jnp.flip(w, 1)))
by_hand = jax.jit(lambda w, x: A8(jnp.tanh(x)) @ jnp.flip(W4(w), 1))


@given(KERNELS, INPUTS)
def test_values_do_not_matter(w, x):
    np.testing.assert_allclose(by_walk(w, x), by_hand(w, x), rtol=1e-6, atol=1e-6)


def test_it_runs_under_jit_grad_vmap_and_other_batch_sizes():
    f, by_hand = rounded(perceptron(same, same)), perceptron(W4, A8)
    params = perceptron_params()
    traces = []

    @jax.jit
    def slopes(params, xs):
        traces.append(1)
        return jax.vmap(jax.grad(lambda p, x: jnp.sum(f(p, x) ** 2)), (None, 0))(
            params, xs
        )

    expected = jax.jit(
        jax.vmap(jax.grad(lambda p, x: jnp.sum(by_hand(p, x) ** 2)), (None, 0))
    )
    for seed in range(2):
        xs = normal(3, 2, 4, seed=seed)
        chex.assert_trees_all_close(
            slopes(params, xs), expected(params, xs), rtol=1e-4, atol=1e-4
        )
    assert traces == [1]
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params)
    np.testing.assert_allclose(
        *(jax.jit(jax.vmap(g))(stacked, normal(2, 5, 4)) for g in (f, by_hand)),
        rtol=1e-4,
    )


def test_it_lowers_for_every_platform():
    f = jax.jit(rounded(stack(same, same)))
    exported = jax.export.export(f, platforms=("cpu", "cuda", "tpu"))(
        STACK, normal(2, 4)
    )
    assert exported.platforms == ("cpu", "cuda", "tpu")


def test_derivatives_of_ones_own_are_kept():
    @jax.custom_vjp
    def strange(x):
        return jnp.sin(x)

    strange.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (100 * g + x,))

    @jax.custom_jvp
    def odd(x):
        return jnp.cos(x)

    odd.defjvp(lambda primals, tangents: (jnp.cos(primals[0]), 7 * tangents[0]))

    def model(w, a):
        return lambda p, x: odd(jax.nn.relu(strange(a(x) @ w(p))))

    agree(model(same, same), model(W4, A8), normal(4, 3), normal(2, 4), atol=1e-4)


def test_derivatives_of_a_weights_own_are_kept_where_nothing_is_rounded():
    @jax.custom_vjp
    def sign(w):
        return jnp.sign(w)

    sign.defvjp(lambda w: (jnp.sign(w), None), lambda _, g: (g,))

    @jax.custom_jvp
    def scaled_slope(w):
        return w

    scaled_slope.defjvp(lambda primals, tangents: (primals[0], 3 * tangents[0]))

    def model(w, a):
        def f(p, x):
            y = x @ sign(p["binary"])  # not a weight that moved: left alone
            return a(y) @ scaled_slope(w(p["kernel"]))

        return f

    params = {"binary": normal(4, 4), "kernel": normal(4, 3)}
    agree(model(same, same), model(W4, A8), params, normal(2, 4))


def test_a_product_with_its_own_derivative_is_rounded():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(
        lambda x, w: (x @ w, (x, w)), lambda xw, g: (g @ xw[1].T, xw[0].T @ g)
    )

    def model(w, a):
        dot = product if w is same else jnp.matmul
        return lambda p, x: dot(a(x), w(p))

    agree(model(same, same), model(W4, A8), normal(4, 3), normal(2, 4))


def test_a_weight_that_chooses_a_slice_does_no_harm():
    def f(w, x):
        start = jnp.int32(0) * w[0, 0].astype(int)
        return jax.lax.dynamic_slice(x, (start, 0), (1, 4)) @ w

    w, x = normal(4, 3), normal(2, 4)
    np.testing.assert_allclose(rounded(f)(w, x), A8(x[:1]) @ W4(w), rtol=1e-5)


def test_what_is_compressed_is_rounded_as_what_it_stands_for():
    params, x = perceptron_params(), normal(5, 4)
    small = jc.quantize_tree(params, bits=4)
    g = jax.jit(fake_quantized(perceptron(same, same), weights=W4))
    np.testing.assert_allclose(
        g(small, x), perceptron(same, same)(jc.densify(small), x), rtol=1e-5, atol=1e-5
    )


def test_zeros_of_a_pruned_tree_stay_zero():
    seen = []

    def keep(w):
        seen.append(W4(w))
        return seen[-1]

    w = jc.prune_tree({"w": normal(4, 3)}, theta=0.5)["w"]
    fake_quantized(lambda w, x: x @ w, weights=keep)(w, normal(2, 4))
    (found,) = seen
    assert np.all(np.asarray(found)[np.asarray(w) == 0] == 0)


def test_a_random_key_and_trees_pass_through():
    def f(p, x, key):
        noise = jax.random.normal(key, x["x"].shape)
        return {"y": (x["x"] + noise) @ p["w"], "key": key, "n": 2, "p": p["w"]}

    p, x, key = {"w": normal(4, 3)}, {"x": normal(2, 4)}, jax.random.key(0)
    found = jax.jit(rounded(f))(p, x, key)
    x = x["x"] + jax.jit(jax.random.normal, static_argnums=1)(key, (2, 4))
    expected = A8(x) @ W4(p["w"])
    np.testing.assert_allclose(found["y"], expected, rtol=1e-5)
    assert found["key"] == key
    assert found["n"] == 2
    np.testing.assert_array_equal(found["p"], p["w"])


def test_half_precision_stays_half_precision():
    def f(p, x):
        def turn(carry, w):
            return jnp.tanh(carry @ w.astype(jnp.bfloat16)), None

        return jax.lax.scan(turn, x.astype(jnp.bfloat16), p)[0]

    w, x = normal(2, 4, 4), normal(3, 4)
    found = jax.jit(rounded(f))(w, x)
    assert found.dtype == jnp.bfloat16

    @jax.jit
    def by_hand(w, x):
        y = x.astype(jnp.bfloat16)
        for row in W4(w).astype(jnp.bfloat16):
            y = jnp.tanh(A8(y) @ row)
        return y

    expected = np.float32(by_hand(w, x))
    np.testing.assert_allclose(np.float32(found), expected, atol=0.02)


def test_a_linen_transformer_trains_rounded():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.MultiHeadDotProductAttention(num_heads=2)(x))

    model, x = Block(), normal(2, 3, 4)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    g = rounded(applied(model))
    grads = jax.jit(jax.grad(lambda p: jnp.mean(g(p, x) ** 2)))(params)
    assert all(np.any(grad != 0) for grad in jax.tree.leaves(grads["Dense_0"]))
    assert all(np.all(np.isfinite(grad)) for grad in jax.tree.leaves(grads))
