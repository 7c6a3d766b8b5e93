"""What is inside a model is taken out of its program, at no cost and with gradients."""

import re

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies

import jaxcomp as jc
from jaxcomp.distill.features import with_features
from jaxcomp.distill.outputs import Outputs


def array(*shape, seed=0):
    values = np.random.default_rng(seed + len(shape)).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


X = array(4, 3)
FLOATS = st.floats(-10, 10, width=32)
ROWS = array(2, 5, 6)
IMAGES = array(2, 6, 6, 3)


def two_layers(params, x):
    hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return hidden @ params["b"]["kernel"]


TWO = {
    "a": {"kernel": array(3, 5), "bias": array(5)},
    "b": {"kernel": array(5, 2, seed=1)},
}


def products(compiled):
    """How many dots and convolutions the optimised program has."""
    return len(re.findall(r" (?:dot|convolution|custom-call)\(", compiled.as_text()))


def forward_and_backward(f, *args):
    """The compiled ``f`` with the gradient of a loss of its logits and features."""

    def loss(*args):
        outputs = f(*args)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs)), outputs

    return jax.jit(jax.grad(loss, has_aux=True)).lower(*args).compile()


def assert_same_model(g, native, *args):
    """Values, gradients and their cost are those of the model that says it itself."""
    found, wanted = (forward_and_backward(f, *args) for f in (g, native))
    chex.assert_trees_all_close(found(*args), wanted(*args), rtol=1e-4, atol=1e-5)
    assert products(found) == products(wanted) > 0


def test_products_sums_and_what_flows_in_by_hand():
    params = {"w": jnp.array([[1.0, 2.0]]), "bias": jnp.array([1.0, -9.0])}
    params["v"] = jnp.array([[1.0], [1.0]])

    def f(params, x):
        return nn.relu(x @ params["w"] + params["bias"][None]) @ params["v"]

    g = with_features(f, {"product": "w", "sum": "bias"}, inputs={"in": "v", "x": "w"})
    found = g(params, jnp.array([[3.0]]))
    np.testing.assert_array_equal(found.logits, [[4]])
    np.testing.assert_array_equal(found.features["product"], [[3, 6]])
    np.testing.assert_array_equal(found.features["sum"], [[4, -3]])
    np.testing.assert_array_equal(found.features["in"], [[4, 0]])
    np.testing.assert_array_equal(found.features["x"], [[3]])
    assert found.features.keys() == {"product", "sum", "in", "x"}


@given(hnp.arrays(np.float32, (4, 3), elements=FLOATS))
def test_a_feature_is_what_numpy_finds(x):
    g = jax.jit(with_features(two_layers, {"sum": "a/bias"}, inputs={"in": "b/kernel"}))
    found = g(TWO, x)
    wanted = x @ np.asarray(TWO["a"]["kernel"]) + np.asarray(TWO["a"]["bias"])
    np.testing.assert_allclose(found.features["sum"], wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        found.features["in"], np.tanh(wanted), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(found.logits, two_layers(TWO, x), rtol=1e-4, atol=1e-4)


class ConvNet(nn.Module):
    """Says itself what is inside, if asked."""

    says: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        early = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(not train)(early))
        late = nn.Conv(5, (3, 3), strides=2)(x)
        logits = nn.Dense(3)(nn.relu(late).mean((1, 2)))
        features = {"early": early, "late": late, "flows": x}
        return Outputs(logits, features) if self.says else logits


def test_a_linen_convnet_is_the_one_that_returns_its_features():
    variables = jax.jit(ConvNet().init)(jax.random.key(0), IMAGES)
    g = with_features(
        ConvNet().apply,
        {"early": "params/Conv_0/kernel", "late": "params/Conv_1/bias"},
        inputs={"flows": "params/Conv_1/kernel"},
    )
    native = ConvNet(says=True).apply
    assert_same_model(g, native, variables, IMAGES)
    found, wanted = (jax.jit(f).lower(variables, IMAGES) for f in (g, native))
    assert products(found.compile()) == products(wanted.compile()) == 3


def test_options_and_what_the_model_returns_besides_pass_through():
    def f(params, x, train, scale=1.0):
        logits = two_layers(params, x) * scale
        # A flag that is not traced, and a state.
        return Outputs(logits, {"x": x}, {"a": {"bias": x.mean()}} if train else None)

    g = with_features(f, {"hint": "a/bias"})
    found, wanted = g(TWO, X, True, scale=2.0), f(TWO, X, True, scale=2.0)
    assert found.features.keys() == {"x", "hint"}
    chex.assert_trees_all_close(found._replace(features={"x": X}), wanted, rtol=1e-5)
    assert g(TWO, X, train=False).state is None


def test_a_key_is_passed_on():
    def f(params, x, key):
        kept = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.where(kept, x, 0) @ params["w"]

    g, params = with_features(f, inputs={"in": "w"}), {"w": jnp.eye(3)}
    key = jax.random.key(3)
    found = jax.jit(g)(params, X, key=key)
    np.testing.assert_array_equal(found.features["in"], f(params, X, key))


POLICY = checkpoint_policies.save_only_these_names("mid")


class Block(nn.Module):
    """A layer of a scan: all positions together, then an MLP."""

    says: bool = False

    @nn.compact
    def __call__(self, x, _):
        x = x + nn.softmax(x @ x.transpose(0, 2, 1)) @ nn.Dense(6)(x)
        up = nn.Dense(7, name="up")(x)
        mid = checkpoint_name(nn.tanh(up), "mid")
        x = x + nn.Dense(6, name="down")(mid)
        return x, (up, mid) if self.says else None


class Transformer(nn.Module):
    says: bool = False

    @nn.compact
    def __call__(self, tokens):
        words = nn.Embed(11, 6, name="words")(tokens)
        layer = nn.remat(Block, policy=POLICY, prevent_cse=False)
        layers = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, inside = layers(self.says, name="layers")(words, None)
        logits = nn.Dense(4, name="head")(x)
        if not self.says:
            return logits
        return Outputs(logits, {"words": words, "up": inside[0], "mid": inside[1]})


TOKENS = jnp.arange(10).reshape(2, 5)


def test_layers_of_a_scan_are_stacked_and_stay_rematerialized():
    net, says = Transformer(), Transformer(says=True)
    variables = jax.jit(net.init)(jax.random.key(0), TOKENS)
    places = {
        "words": "params/words/embedding",
        "up": "params/layers/up/bias",
        "mid": "mid",
    }
    g = with_features(net.apply, places)
    assert jax.eval_shape(g, variables, TOKENS).features["mid"].shape == (3, 2, 5, 7)
    assert_same_model(g, says.apply, variables, TOKENS)
    inside = str(jax.make_jaxpr(g)(variables, TOKENS))
    assert inside.count("remat2[") == 1


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 5, rngs=rngs)
        self.last = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


@pytest.mark.parametrize("place", ["first/bias", "first/bias/value"])
def test_nnx_paths_may_leave_out_value(place):
    model = NnxNet(nnx.Rngs(0))
    graph, state = nnx.split(model)
    g = with_features(lambda s, x: nnx.merge(graph, s)(x), {"hint": place})
    found = g(state, X)
    np.testing.assert_allclose(found.features["hint"], model.first(X), rtol=1e-5)
    np.testing.assert_allclose(found.logits, model(X), rtol=1e-5)


def test_equinox_under_vmap_gives_rows_first():
    net = eqx.nn.MLP(3, 2, 5, 1, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_array)

    def f(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    g = with_features(
        f,
        {"product": "layers/0/weight", "sum": "layers/0/bias"},
        inputs={"x": "layers/0/weight", "after": "layers/1/weight"},
    )
    found = g(params, X).features
    wanted = X @ net.layers[0].weight.T
    np.testing.assert_allclose(found["product"], wanted, rtol=1e-4, atol=1e-6)
    wanted = wanted + net.layers[0].bias[None]
    np.testing.assert_allclose(found["sum"], wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found["x"], X)
    np.testing.assert_allclose(found["after"], nn.relu(wanted), rtol=1e-4, atol=1e-6)


def test_equinox_convolutions_keep_the_batch_first():
    net = eqx.nn.Conv2d(3, 4, 3, key=jax.random.key(0))
    images = jnp.transpose(IMAGES, (0, 3, 1, 2))
    g = with_features(lambda net, x: jax.vmap(net)(x), {"sum": "bias"})
    found = jax.jit(g)(net, images)
    np.testing.assert_array_equal(found.features["sum"], found.logits)


def test_haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([5, 2])(x)))
    params = jax.jit(net.init)(jax.random.key(0), X)
    g = with_features(net.apply, inputs={"after": "mlp/~/linear_1/w"})
    first = params["mlp/~/linear_0"]
    wanted = nn.relu(X @ first["w"] + first["b"][None])
    found = g(params, X).features["after"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_parameter_is_followed_through_all_that_is_made_of_parameters_alone():
    def weight_norm(params, x):
        v = params["v"].astype(jnp.bfloat16).astype(jnp.float32)
        w = params["g"][None] * v / jnp.linalg.norm(v, axis=0, keepdims=True)
        return jnp.einsum("oi,...i->...o", jax.jit(jnp.transpose)(w), x)

    params = {"v": array(3, 5), "g": array(5)}
    for path in ("v", "g"):
        found = with_features(weight_norm, {"hint": path}, inputs={"x": path})
        outputs = found(params, ROWS[..., :3])
        np.testing.assert_allclose(
            outputs.features["hint"], outputs.logits, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_array_equal(outputs.features["x"], ROWS[..., :3])


def test_of_a_fake_quantized_model_it_is_the_rounded_product():
    f = jc.fake_quantized(two_layers, weights=lambda w: jc.fake_quantize(w, bits=2))
    rounded = jc.fake_quantize(TWO["a"]["kernel"], bits=2)
    g = with_features(f, {"hint": "a/kernel"})
    np.testing.assert_allclose(
        g(TWO, X).features["hint"], X @ rounded, rtol=1e-5, atol=1e-6
    )
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(g(p, X).features["hint"])))(TWO)
    assert jnp.all(grads["a"]["kernel"] != 0)  # straight through


def test_compressed_params_are_made_dense():
    small = jc.quantize_tree(TWO, bits=4)
    g = with_features(two_layers, {"hint": "a/kernel"})
    wanted = X @ jc.densify(small)["a"]["kernel"]
    np.testing.assert_allclose(g(small, X).features["hint"], wanted, rtol=1e-5)


def test_a_parameter_that_is_used_twice_gives_its_first_use():
    def tied(params, tokens):
        x = params["words"][tokens]
        return jnp.tanh(x) @ params["words"].T

    words = array(11, 6)
    found = with_features(tied, {"words": "words"})({"words": words}, TOKENS)
    np.testing.assert_array_equal(found.features["words"], words[TOKENS])


def test_calls_that_share_a_program_are_told_apart():
    @jax.jit
    def layer(w, x):
        return checkpoint_name(jnp.tanh(x @ w), "mid")

    def f(params, x):
        return layer(params["b"], layer(params["a"], x))

    params = {"a": array(3, 3), "b": array(3, 3, seed=1)}
    g = with_features(f, {"b": "b", "first": "mid/0", "last": "mid/1"})
    found = g(params, X)
    first = jnp.tanh(X @ params["a"])
    np.testing.assert_allclose(found.features["first"], first, rtol=1e-5)
    np.testing.assert_allclose(found.features["b"], first @ params["b"], rtol=1e-4)
    np.testing.assert_allclose(found.features["last"], found.logits, rtol=1e-5)


def test_a_loop_over_time_gives_a_feature_of_every_turn():
    def rnn(params, x):
        def turn(h, row):
            h = jnp.tanh(row @ params["in"] + h @ params["own"])
            return h, None

        start = jnp.zeros((x.shape[1], 4))
        return jax.lax.scan(turn, start, x, reverse=True)[0]

    params = {"in": array(6, 4), "own": array(4, 4)}
    g = with_features(rnn, {"rows": "in"}, inputs={"h": "own"})
    found = g(params, ROWS)
    np.testing.assert_allclose(
        found.features["rows"], ROWS @ params["in"], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(found.features["h"][-1], 0)
    assert found.features["h"].shape == (2, 5, 4)


@jax.custom_vjp
def odd_dot(x, w):
    return 2 * (x @ w)


odd_dot.defvjp(
    lambda x, w: (odd_dot(x, w), (x, w)),
    lambda saved, g: (jnp.zeros_like(saved[0]), jnp.full_like(saved[1], 7)),
)


def test_a_call_with_a_derivative_of_its_own_is_one_equation_and_keeps_it():
    def f(params, x):
        return odd_dot(jnp.tanh(x), params["w"])

    params, g = {"w": array(3, 2)}, with_features(f, {"y": "w"}, inputs={"x": "w"})
    found = g(params, X)
    np.testing.assert_array_equal(found.features["y"], found.logits)
    np.testing.assert_allclose(found.features["x"], jnp.tanh(X), rtol=1e-6)
    grads = jax.grad(lambda p: g(p, X).features["y"].sum())(params)
    np.testing.assert_array_equal(grads["w"], 7)


def test_a_barrier_joins_nothing():
    def f(params, x):
        w, x = jax.lax.optimization_barrier((params["w"], x))
        return x @ w

    params = {"w": array(3, 2)}
    found = with_features(f, {"y": "w"})(params, X)
    np.testing.assert_array_equal(found.features["y"], found.logits)


def test_under_jit_the_model_is_traced_once_and_it_lowers_for_every_platform():
    f = chex.assert_max_traces(two_layers, 1)
    g = jax.jit(with_features(f, {"sum": "a/bias"}))
    for _ in range(2):
        g(TWO, X)
    plain = jax.jit(with_features(two_layers, {"sum": "a/bias"}))
    jax.export.export(plain, platforms=("cpu", "cuda", "tpu"))(TWO, X)


def test_a_step_learns_from_a_hint():
    g = with_features(two_layers, {"hint": "a/bias"})
    teacher = jax.tree.map(lambda x: x + 1, TWO)

    def hint(ours, theirs, batch):
        return jnp.mean((ours.features["hint"] - theirs.features["hint"]) ** 2, axis=-1)

    tx = optax.sgd(0.1)
    step = jc.distill_step(g, g, tx, hard=0.0, soft=None, terms={"hint": hint})
    params, state, values = TWO, tx.init(TWO), []
    for _ in range(5):
        params, state, metrics = step(params, state, teacher, (X,))
        values.append(float(metrics["hint"]))
    assert values[-1] < values[0] / 2


def refuses(f, places, params, match, inputs=None):
    with pytest.raises(ValueError, match=match):
        with_features(f, places, inputs=inputs or {})(params, X)


def test_an_unknown_place_lists_paths_and_names():
    def f(params, x):
        return checkpoint_name(two_layers(params, x), "out")

    refuses(f, {"hint": "c"}, TWO, r"'hint', got 'c'.*a/bias, a/kernel.*\(out\)")
    refuses(two_layers, {"hint": "c"}, TWO, "there is none")


def test_a_name_that_is_given_twice_wants_an_index():
    def f(params, x):
        return checkpoint_name(checkpoint_name(x, "mid") @ params, "mid")

    refuses(f, {"hint": "mid"}, jnp.eye(3), r"\(mid/0, mid/1\)")


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda w, x: jax.lax.cond(x[0, 0] > 0, jnp.dot, jnp.dot, x, w), "'cond'"),
        (
            lambda w, x: jax.lax.while_loop(
                lambda s: s.sum() > 1e9, lambda s: s @ w, x
            ),
            "'while'",
        ),
        (lambda w, x: x, "meets nothing"),
        (
            lambda w, x: jax.lax.scan(lambda h, r: (h + r, None), w[0], x)[0],
            "a scan carries it",
        ),
        (lambda w, x: jax.lax.sort((x[:3], w), num_keys=1)[0], "several results"),
    ],
)
def test_a_parameter_that_cannot_be_seen_to_meet_an_input_says_why(f, reason):
    refuses(f, {"hint": ""}, jnp.eye(3), f"cannot take 'hint' at '': .*{reason}")


def test_a_name_inside_what_is_not_looked_into_says_so():
    @jax.custom_jvp
    def call(x):
        return checkpoint_name(x, "mid")

    call.defjvps(lambda dx, y, x: dx)
    refuses(lambda w, x: call(x @ w), {"hint": "mid"}, jnp.eye(3), "'custom_jvp_call'")


def test_a_feature_has_one_name():
    with pytest.raises(ValueError, match="'hint' in both"):
        with_features(two_layers, {"hint": "a/bias"}, inputs={"hint": "b/kernel"})

    def f(params, x):
        return Outputs(two_layers(params, x), {"hint": x})

    refuses(f, {"hint": "a/bias"}, TWO, "own features do not have, got 'hint'")
