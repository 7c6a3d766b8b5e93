"""A walk that binds every equation computes what the function computes."""

import functools
import weakref

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.program.walk import bind, called, trace, walk


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def inline(eqn, values):
    """Walks what an equation calls, and binds the rest."""
    inner = called(eqn)
    return bind(eqn, values) if inner is None else walk(*inner, values, inline)


def walked(f, params, *inputs, visit=bind):
    """``f(params, *inputs)`` by way of its equations."""
    traced = trace(f, params, *inputs)
    values = [*traced.params, *traced.inputs]
    found = walk(traced.jaxpr, traced.consts, values, visit)
    return jax.tree.unflatten(traced.out_tree, found)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return nn.Dense(3)(nn.gelu(x))


class Images(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        x = nn.max_pool(nn.Conv(4, (3, 3), feature_group_count=2)(x), (2, 2))
        return nn.Dense(3)(x.mean(axis=(1, 2)))


class Dropout(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x))


def attention():
    x = normal(2, 3, 4)
    model = Attention()
    return model.apply, jax.jit(model.init)(jax.random.key(0), x), x


def images():
    x = normal(2, 8, 8, 4)
    model = Images()

    def f(variables, x):
        return model.apply(variables, x, mutable=["batch_stats"])

    return f, jax.jit(model.init)(jax.random.key(0), x), x


def dropout():
    x = normal(5, 4)
    model = Dropout()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}

    def f(variables, x, key):
        return model.apply(variables, x, rngs={"dropout": key})

    return f, jax.jit(model.init)(keys, x), x, jax.random.key(2)


def nnx_module():
    module = nnx.Sequential(
        nnx.Linear(4, 5, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(5, 2, rngs=nnx.Rngs(1))
    )
    graph, state = nnx.split(module)
    return lambda state, x: nnx.merge(graph, state)(x), state, normal(3, 4)


def layers():
    def f(params, x):
        def layer(x, row):
            y = jax.nn.relu(x @ row["kernel"] + row["bias"])
            return y, y.sum()

        return jax.lax.scan(layer, x, params)

    return f, {"kernel": normal(3, 4, 4), "bias": normal(3, 1, 4)}, normal(2, 4)


def checkpointed():
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def block(w, x):
        return jnp.tanh(x @ w)

    return lambda p, x: block(p[1], block(p[0], x)), [normal(4, 4)] * 2, normal(2, 4)


def branches():
    def f(w, x, up):
        return jax.lax.cond(up, lambda: x @ w, lambda: jnp.zeros_like(x))

    return f, normal(4, 4), normal(2, 4), jnp.array(True)


def turns():
    def f(w, x):
        return jax.lax.while_loop(
            lambda carry: carry[0] < 5, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x)
        )

    return f, normal(4, 4), normal(2, 4)


def own_derivatives():
    @jax.custom_vjp
    def half(x):
        return x / 2

    half.defvjp(lambda x: (x / 2, x), lambda x, g: (7 * g,))

    def f(w, x):
        y = jax.nn.gelu(jax.nn.relu(x @ w))
        return jax.nn.logsumexp(half(y), axis=-1), jax.nn.softmax(y)

    return f, normal(4, 4), normal(2, 4)


def closed_over():
    table, number = np.arange(12, dtype=np.float32).reshape(4, 3), jnp.float32(3)
    return lambda w, x: (x @ w) @ table + number, normal(4, 4), normal(2, 4)


def dropped_results():
    def f(w, x):
        values, _ = jax.lax.top_k(x @ w, 2)
        first, _ = jnp.split(values, 2, axis=1)
        return first

    return f, normal(4, 4), normal(2, 4)


def narrow():
    def f(w, x):
        y = (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)) * 1.5

        def turn(carry, _):
            return carry + y.sum(), None

        return jax.lax.scan(turn, jnp.zeros((), jnp.bfloat16), None, length=3)[0]

    return f, normal(4, 4), normal(2, 4)


def nothing_computed():
    return lambda p, x: {"again": (x, p["w"], x)}, {"w": normal(2, 2)}, normal(3)


def numbers():
    return lambda p, x: (x, 2.5, jnp.float32(3), jnp.ones(2)), normal(2), normal(3)


def trees():
    def f(p, x):
        out = jax.jit(lambda x: {"b": x @ p["w"], "a": [x, None]})(x["x"])
        return out, (p["n"] + 1, x["mask"])

    p = {"w": normal(4, 4), "n": 2, "none": None}
    return f, p, {"x": normal(2, 4), "mask": jnp.array([True])}


ZOO = [
    *(attention, images, dropout, nnx_module, layers, checkpointed, branches, turns),
    *(own_derivatives, closed_over, dropped_results, narrow, nothing_computed),
    *(numbers, trees),
]


@pytest.mark.parametrize("visit", [bind, inline])
@pytest.mark.parametrize("model", ZOO)
def test_a_walk_computes_what_the_function_computes(model, visit):
    f, params, *inputs = model()
    expected = jax.jit(f)(params, *inputs)
    found = jax.jit(functools.partial(walked, f, visit=visit))(params, *inputs)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    assert jax.tree.map(jnp.result_type, found) == jax.tree.map(
        jnp.result_type, expected
    )


@pytest.mark.parametrize("model", [layers, checkpointed, own_derivatives, branches])
def test_a_walk_differentiates_vmaps_and_traces_once(model):
    f, params, x, *rest = model()

    def loss(run, params, x):
        return sum(jnp.sum(y**2) for y in jax.tree.leaves(run(params, x, *rest)))

    traces = []

    @jax.jit
    def slopes(params, xs):
        traces.append(1)
        grad = jax.grad(functools.partial(loss, functools.partial(walked, f)))
        return jax.vmap(grad, (None, 0))(params, xs)

    xs = jnp.stack([x, x + 1])
    grad = jax.grad(functools.partial(loss, f))
    expected = jax.jit(jax.vmap(grad, (None, 0)))(params, xs)
    for _ in range(2):
        chex.assert_trees_all_close(slopes(params, xs), expected, rtol=1e-4, atol=1e-5)
    assert traces == [1]


@jax.jit
def loop(w, x):
    y = jax.lax.fori_loop(0, 2, lambda i, x: jax.nn.relu(x @ w), x)
    return jnp.where(y > 1, y, jax.nn.logsumexp(y, axis=-1, keepdims=True))


walked_loop = jax.jit(functools.partial(walked, loop))
SMALL = st.floats(-4, 4, width=32)


@given(
    hnp.arrays(np.float32, (2, 3), elements=SMALL),
    hnp.arrays(np.float32, (3, 3), elements=SMALL),
)
def test_values_do_not_matter(x, w):
    expected = loop(w, x)
    np.testing.assert_allclose(walked_loop(w, x), expected, rtol=1e-6, atol=1e-6)


def test_what_a_program_is():
    params = {"b": {"kernel": jnp.ones((3, 2))}, "a": jnp.ones(2)}
    table = np.ones((2, 2), np.float32)
    f = lambda p, x, y: {"out": (x @ p["b"]["kernel"] + p["a"]) @ table + y}  # noqa: E731
    traced = trace(f, params, jnp.ones(3), 1.0)
    assert traced.paths == ["a", "b/kernel"]
    assert [x.shape for x in traced.params] == [(2,), (3, 2)]
    assert traced.inputs[1] == 1.0
    assert [np.shape(c) for c in traced.consts] == [(2, 2)]
    assert traced.out_tree == jax.tree.structure({"out": 0})
    names = [eqn.primitive.name for eqn in traced.jaxpr.eqns]
    assert names.count("dot_general") == 2


def test_a_compressed_tree_is_dense_in_its_program():
    params = {"kernel": normal(4, 6), "other": normal(4, 6), "bias": normal(6)}
    small = jc.quantize_tree(params, bits=4, where=jc.path_matches("kernel"))
    small["other"] = jc.node.TiedTensor("kernel", (4, 6), "float32")
    x = normal(2, 4)

    def f(p, x):
        return x @ p["kernel"] + x @ p["other"] + p["bias"][None]

    traced = trace(f, small, x)
    assert traced.paths == ["bias", "kernel", "other"]
    assert [leaf.shape for leaf in traced.params] == [(6,), (4, 6), (4, 6)]
    np.testing.assert_allclose(walked(f, small, x), f(jc.densify(small), x), rtol=1e-6)


def test_a_program_of_shapes_computes_nothing():
    small = {"kernel": jc.quantize(normal(4, 6), bits=4, axis=-1)}
    shapes = jax.eval_shape(lambda: small)
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    traced = trace(lambda p, x: x @ p["kernel"], shapes, x)
    assert traced.params == [jax.ShapeDtypeStruct((4, 6), jnp.float32)]


def test_random_bits_are_those_that_the_function_draws():
    def f(w, key):
        with jax.threefry_partitionable(False):
            return w * jax.random.normal(key, (3, 5))

    w, key = normal(3, 5), jax.random.key(0)
    np.testing.assert_array_equal(walked(f, w, key), f(w, key))


def test_a_value_is_let_go_after_its_last_use():
    class Value:
        pass

    living = weakref.WeakSet()
    most = 0

    def visit(eqn, values):
        nonlocal most
        most = max(most, len(living))
        found = [Value() for _ in eqn.outvars]
        living.update(found)
        return found

    def f(w, x):
        for _ in range(5):
            x, _ = jax.lax.top_k(jnp.sin(x) @ w, 4)
        return x

    traced = trace(f, normal(4, 4), normal(2, 4))
    walk(traced.jaxpr, traced.consts, [None, None], visit, constant=lambda value: None)
    assert len(traced.jaxpr.eqns) == 15
    assert most <= 2  # an operand, and what the last equation dropped


def test_constants_are_what_the_caller_makes_of_them():
    traced = trace(lambda p, x: (x * 2.0 + np.arange(3.0), 1.0), normal(3), normal(3))
    seen = []
    walk(
        *(traced.jaxpr, traced.consts, ["p", "x"]),
        lambda eqn, values: [seen.append(values)],
        constant=lambda value: np.shape(value),
    )
    assert [() in values or (3,) in values for values in seen].count(True) == 2
