"""A view says where every element of an operand is in its parameter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.ad_checkpoint import checkpoint_name

from jaxcomp.program.releases import closed, scan_split
from jaxcomp.program.views import View, index_map, is_move, moved
from jaxcomp.program.walk import bind, called, trace, walk


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def both(found):
    """(view or None, array) for each array."""
    return [(None, x) for x in found]


def products(f, params, *inputs):
    """What enters the products of a function: (view, array) for every operand.

    The arrays of a scan are those of its first turn.
    """
    met = []

    def visit(eqn, values):
        views, arrays = zip(*values, strict=True)
        if inner := called(eqn):
            return walk(*inner, values, visit, constant=lambda x: (None, x))
        if eqn.primitive.name == "scan":
            jaxpr, consts = closed(eqn.params["jaxpr"])
            fixed, carried = scan_split(eqn.params)
            inside = [
                *values[:fixed],
                *both(arrays[fixed : fixed + carried]),
                *(
                    (view and view.sliced(eqn.params["length"]), x[0])
                    for view, x in values[fixed + carried :]
                ),
            ]
            walk(jaxpr, consts, inside, visit, constant=lambda x: (None, x))
        elif eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            met.extend(values)
        results = bind(eqn, arrays)
        if is_move(eqn) and views[0] is not None:
            return list(zip(moved(eqn, views[0]), results, strict=True))
        return both(results)

    traced = trace(f, params, *inputs)
    values = [(View(i), x) for i, x in enumerate(traced.params)]
    values += both(traced.inputs)
    walk(traced.jaxpr, traced.consts, values, visit, constant=lambda x: (None, x))
    return traced, met


def check(f, params, *inputs):
    """The views that enter products; the index maps of all are right."""
    traced, met = products(f, params, *inputs)
    views = []
    for view, operand in met:
        if view is None:
            continue
        leaf = np.asarray(traced.params[view.leaf])
        places = index_map(view, leaf.shape)
        if view.layers:
            assert places.shape[: len(view.layers)] == view.layers
            places = places[(0,) * len(view.layers)]
        assert places.dtype == np.int32
        expected = leaf.reshape(-1)[places].astype(operand.dtype)
        np.testing.assert_array_equal(expected, operand)
        views.append(view)
    return [traced.paths[view.leaf] for view in views]


def test_a_map_by_hand():
    def f(w, x):
        return x @ w.T.reshape(2, 3)[1:]

    _, met = products(f, normal(2, 3), normal(4, 1))
    (view,) = [view for view, _ in met if view is not None]
    assert [eqn.primitive.name for eqn, _ in view.chain] == [
        *("transpose", "reshape", "slice")
    ]
    # w.T holds places [[0, 3], [1, 4], [2, 5]], so reshaped [[0, 3, 1], [4, 2, 5]].
    np.testing.assert_array_equal(index_map(view, (2, 3)), [[4, 2, 5]])


W = jnp.arange(24.0).reshape(4, 6)  # exact in 8 bits
X = normal(2, 4)
MOVED = {
    "as it is": lambda w, x: x @ w,
    "transposed": lambda w, x: x @ w.reshape(6, 4).T,
    "einsum": lambda w, x: jnp.einsum("oi,bi->bo", w.reshape(6, 4), x),
    "heads": lambda w, x: jnp.einsum("bi,ihd->bhd", x, w.reshape(4, 2, 3)),
    "bfloat16": lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
    "reduced": lambda w, x: x @ jax.lax.reduce_precision(w, 8, 7),
    "sliced": lambda w, x: x @ w[:, 2:4],
    "strided": lambda w, x: x @ w[:, ::2],
    "column": lambda w, x: x @ w[:, 1],
    "reversed": lambda w, x: x @ w[::-1, ::-1],
    "indexed": lambda w, x: x @ w.reshape(6, 4)[3],
    "from the end": lambda w, x: x @ w.reshape(6, 4)[-1],
    "literal start": lambda w, x: x @ jax.lax.dynamic_slice(w, (0, 1), (4, 3)),
    "new axis": lambda w, x: jnp.einsum("bi,nio->bno", x, w[None]),
    "axis lost": lambda w, x: x @ jnp.squeeze(w[:, None]),
    "last split": lambda w, x: x @ jnp.split(w, 3, axis=1)[-1],
    "unstacked": lambda w, x: x @ jnp.unstack(w.reshape(2, 4, 3))[1],
    "jit": lambda w, x: jax.jit(lambda w, x: x @ w.T)(w.reshape(6, 4), x),
    "checkpoint": lambda w, x: jax.checkpoint(lambda w: x @ w.T)(w.reshape(6, 4)),
    "named": lambda w, x: x @ checkpoint_name(w, "w"),
    "copied": lambda w, x: x @ jnp.array(jax.lax.stop_gradient(w)),
    "on a device": lambda w, x: x @ jax.device_put(w),
    "sharded": lambda w, x: (
        x
        @ jax.lax.with_sharding_constraint(
            w, jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_a_movement_is_followed(name):
    assert check(MOVED[name], W, X) == [""]


NOT_MOVED = {
    "scaled": lambda w, x: x @ (2 * w),
    "duplicated": lambda w, x: jnp.einsum(
        "bi,bio->bo", x, jnp.broadcast_to(w, (2, 4, 6))
    ),
    "looked up": lambda w, x: w.reshape(6, 4)[x[:, 0].astype(int)] @ x.T,
    "moved by data": lambda w, x: (
        x @ jax.lax.dynamic_slice(w, (0, x[0, 0].astype(int)), (4, 3))
    ),
}


@pytest.mark.parametrize("name", NOT_MOVED)
def test_what_is_more_than_a_movement_is_not(name):
    assert check(NOT_MOVED[name], W, X) == []


def test_a_weight_that_chooses_what_is_moved_is_not_seen_through():
    def f(w, x):
        return x @ jax.lax.dynamic_slice(x, (w[0, 0].astype(int), 0), (4, 4))

    assert check(f, W, normal(4, 4)) == []


@pytest.mark.parametrize("slices", ["slice", "split"])
def test_a_fused_kernel_is_three_views_of_one(slices):
    def f(params, x):
        w = params["qkv"]
        if slices == "split":
            q, k, v = jnp.split(w, 3, axis=1)
        else:
            q, k, v = w[:, :2], w[:, 2:4], w[:, 4:]
        scores = jax.nn.softmax((x @ q) @ (x @ k).T)
        return scores @ (x @ v)

    assert check(f, {"qkv": normal(4, 6)}, normal(5, 4)) == ["qkv"] * 3


def test_a_weight_that_is_used_twice_is_two_views():
    def f(params, x):
        return (x @ params["w"]) @ params["w"].T

    assert check(f, {"w": W}, X) == ["w", "w"]


def test_two_weights_are_told_apart():
    def f(params, x):
        return jnp.stack([x @ params["b"].T, x @ params["a"]])

    assert check(f, {"a": normal(4, 3), "b": normal(3, 4)}, X) == ["b", "a"]


def test_attention_kernels_are_views():
    model = nn.MultiHeadDotProductAttention(num_heads=2, dtype=jnp.bfloat16)
    x = normal(1, 3, 4)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    found = check(lambda p, x: model.apply({"params": p}, x), params, x)
    assert sorted(found) == [
        f"{name}/kernel" for name in ("key", "out", "query", "value")
    ]


def test_a_convolution_kernel_is_a_view():
    model = nn.Conv(6, (3,), feature_group_count=2)
    x = normal(1, 5, 4)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    assert check(lambda p, x: model.apply({"params": p}, x), params, x) == ["kernel"]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_gives_every_turn_its_own_slice(reverse):
    w = normal(3, 4, 4)

    def f(w, x):
        def layer(x, row):
            return jnp.tanh(x @ row.T), None

        return jax.lax.scan(layer, x, w.swapaxes(1, 2), reverse=reverse)[0]

    _, met = products(f, w, X)
    (view,) = [view for view, _ in met if view is not None]
    assert view.layers == (3,)
    # Swapped outside and swapped back inside.
    np.testing.assert_array_equal(
        index_map(view, w.shape), np.arange(48).reshape(w.shape)
    )
    assert check(f, w, X) == [""]


def test_a_scan_in_a_scan_gives_two_axes():
    w = normal(2, 3, 4, 4)

    def f(w, x):
        def layer(x, row):
            return x @ row, None

        def block(x, rows):
            return jax.lax.scan(layer, x, rows[::-1])[0], None

        return jax.lax.scan(block, x, w)[0]

    _, met = products(f, w, X)
    (view,) = [view for view, _ in met if view is not None]
    assert view.layers == (2, 3)
    expected = np.arange(96).reshape(w.shape)[:, ::-1]
    np.testing.assert_array_equal(index_map(view, w.shape), expected)
    assert check(f, w, X) == [""]


def test_what_a_scan_does_not_slice_stays_whole():
    def f(w, x):
        return jax.lax.scan(lambda x, _: (x @ w.T, None), x, None, length=3)[0]

    assert check(f, normal(4, 4), X) == [""]


def test_a_map_can_be_read_while_tracing():
    _, met = products(lambda w, x: x @ w.reshape(6, 4).T, W, X)
    view = met[1][0]

    @jax.jit
    def g(w):
        places = index_map(view, w.shape)
        assert isinstance(places, np.ndarray)
        return w.reshape(-1)[places]

    np.testing.assert_array_equal(g(W), W.reshape(6, 4).T)


@given(
    hnp.arrays(np.float32, (4, 6), elements=st.floats(-4, 4, width=32)),
    st.permutations([0, 1, 2, 3]),
)
def test_a_chain_of_transposes_is_followed(w, order):
    def f(w, x):
        return jnp.tensordot(x, w.reshape(2, 2, 2, 3).transpose(order), axes=0)

    _, met = products(f, w, jnp.ones(1))
    (view,) = [view for view, _ in met if view is not None]
    moved = w.reshape(2, 2, 2, 3).transpose(order)
    np.testing.assert_array_equal(
        w.reshape(-1)[index_map(view, w.shape)].ravel(), moved.ravel()
    )
