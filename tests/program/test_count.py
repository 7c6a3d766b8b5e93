"""What a program costs is what a hand count says."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.program.count import count


def shape(*lengths, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(lengths, dtype)


def linen(model, x):
    """(function, shapes of its params)"""
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    return lambda params, x: model.apply({"params": params}, x), params


def by_path(found):
    return {w.path: (w.uses, w.multiply_adds) for w in found.weights}


def test_a_dense_layer_by_hand():
    f, params = linen(nn.Dense(7), shape(2, 3, 5))
    found = count(f, params, shape(2, 3, 5))
    assert by_path(found) == {"bias": (0, 0), "kernel": (1, 6 * 5 * 7)}
    assert [(w.shape, w.size) for w in found.weights] == [((7,), 7), ((5, 7), 35)]
    assert found.parameters == 42
    assert found.multiply_adds == 210
    assert found.loops == 0


@settings(max_examples=10)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 4))
def test_a_chain_of_dense_layers_is_the_sum(widths, batch):
    pairs = list(zip(widths[:-1], widths[1:], strict=True))

    def f(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    found = count(f, [shape(*pair) for pair in pairs], shape(batch, widths[0]))
    assert found.parameters == sum(a * b for a, b in pairs)
    assert [w.multiply_adds for w in found.weights] == [batch * a * b for a, b in pairs]
    assert found.multiply_adds == sum(w.multiply_adds for w in found.weights)


CONVOLUTIONS = {
    # 2 images; each result takes 3 * 3 * 4 products.
    "same": (nn.Conv(6, (3, 3)), (2, 8, 8, 4), 2 * 8 * 8 * 6 * 36),
    "valid": (nn.Conv(6, (3, 3), padding="VALID"), (2, 8, 8, 4), 2 * 6 * 6 * 6 * 36),
    "stride 2": (nn.Conv(6, (3, 3), strides=2), (2, 8, 8, 4), 2 * 4 * 4 * 6 * 36),
    "grouped": (
        *(nn.Conv(6, (3, 3), feature_group_count=2), (2, 8, 8, 4)),
        2 * 8 * 8 * 6 * 9 * 2,
    ),
    "depthwise": (
        *(nn.Conv(4, (3, 3), feature_group_count=4), (2, 8, 8, 4)),
        2 * 8 * 8 * 4 * 9,
    ),
    "1-D": (nn.Conv(6, (3,), padding="VALID"), (2, 8, 4), 2 * 6 * 6 * 3 * 4),
    "pointwise": (nn.Conv(6, (1, 1)), (2, 8, 8, 4), 2 * 64 * 6 * 4),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_by_hand(name):
    model, lengths, expected = CONVOLUTIONS[name]
    f, params = linen(model, shape(*lengths))
    found = count(f, params, shape(*lengths))
    assert found.multiply_adds == expected
    assert by_path(found)["kernel"] == (1, expected)


def test_products_of_two_activations_are_in_the_total_alone():
    batch, tokens, width, heads = 2, 5, 8, 2
    model = nn.MultiHeadDotProductAttention(num_heads=heads)
    f, params = linen(model, shape(batch, tokens, width))
    found = count(f, params, shape(batch, tokens, width))
    each = batch * tokens * width * width
    kernels = {k: v for k, v in by_path(found).items() if k.endswith("kernel")}
    names = ("key", "out", "query", "value")
    assert kernels == {f"{name}/kernel": (1, each) for name in names}
    scores = batch * tokens * tokens * width  # and as many for the mix of values
    assert found.multiply_adds == 4 * each + 2 * scores


def test_a_scan_counts_every_turn():
    def f(params, x):
        def layer(x, w):
            return jnp.tanh(x @ w @ params["shared"]), None

        return jax.lax.scan(layer, x, params["layers"])[0]

    params = {"layers": shape(6, 4, 4), "shared": shape(4, 4)}
    found = count(f, params, shape(3, 4))
    assert by_path(found) == {"layers": (1, 6 * 48), "shared": (1, 6 * 48)}
    assert found.multiply_adds == 2 * 6 * 48


def test_a_scan_in_a_scan_multiplies():
    def f(w, x):
        def outer(x, rows):
            return jax.lax.scan(lambda x, row: (x @ row, None), x, rows)[0], None

        return jax.lax.scan(outer, x, w)[0]

    assert by_path(count(f, shape(2, 3, 4, 4), shape(5, 4))) == {"": (1, 6 * 80)}


def test_of_a_branch_the_dearest_counts():
    def f(params, x, up):
        return jax.lax.cond(
            up,
            lambda x: x @ params["a"] @ params["b"],
            lambda x: x @ params["c"],
            x,
        )

    params = {"a": shape(4, 2), "b": shape(2, 8), "c": shape(4, 8)}
    found = count(f, params, shape(3, 4), shape(dtype=bool))
    assert by_path(found) == {"a": (0, 0), "b": (0, 0), "c": (1, 96)}
    assert found.multiply_adds == 96


def test_a_loop_counts_one_turn_and_says_so():
    def f(params, x):
        return jax.lax.while_loop(
            lambda x: jnp.sum(x @ params["asked"]) < 1,
            lambda x: jnp.tanh(x @ params["done"].T),
            x @ params["done"],
        )

    params = {"asked": shape(4, 1), "done": shape(4, 4)}
    found = count(f, params, shape(3, 4))
    assert by_path(found) == {"asked": (1, 12), "done": (2, 96)}
    assert found.loops == 1
    assert "Loops of unknown length, counted as one turn: 1." in str(found)


def test_what_cannot_be_walked_counts_once_and_says_so():
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.PartitionSpec()
    f = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=whole, out_specs=whole)
    found = count(f, shape(4, 8), shape(3, 4))
    assert by_path(found) == {"": (0, 0)}
    assert (found.multiply_adds, found.loops) == (96, 1)


def test_functions_that_do_not_multiply_are_no_loops():
    def f(w, x):
        x = x.at[0].add(1.0).at[1].mul(2.0)
        return jax.lax.reduce(x, 0.0, lambda a, b: a + 2 * b, (0,)) * jnp.max(w)

    assert count(f, shape(4, 8), shape(3, 4))[2] == 0
    assert count(f, shape(4, 8), shape(3, 4)).loops == 0


def test_experts_count_for_the_rows_that_they_get():
    def f(w, x, sizes):
        return jax.lax.ragged_dot(x, w, sizes)

    found = count(f, shape(3, 4, 8), shape(5, 4), shape(3, dtype=jnp.int32))
    assert by_path(found) == {"": (1, 5 * 4 * 8)}


def test_a_tied_embedding_counts_every_product_and_no_lookup():
    def f(params, tokens, onehot):
        x = params["embedding"][tokens] + onehot @ params["embedding"]
        return x @ params["embedding"].T

    params = {"embedding": shape(10, 4)}
    found = count(f, params, shape(3, dtype=jnp.int32), shape(3, 10))
    assert by_path(found) == {"embedding": (2, 2 * 3 * 10 * 4)}


def test_calls_are_looked_into():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, x), lambda x, g: (g, g))

    def f(w, x):
        x = jax.jit(lambda x: x @ w)(jax.checkpoint(lambda x: x @ w)(x))
        return jax.nn.relu(product(x, w))

    assert by_path(count(f, shape(4, 4), shape(3, 4))) == {"": (3, 3 * 48)}


def test_nodes_count_as_the_arrays_they_stand_for():
    params = {
        "a": jc.quantize(jnp.ones((4, 6)), bits=4, axis=-1),
        "b": jc.node.TiedTensor("a", (4, 6), "float32"),
    }

    def f(p, x):
        return x @ p["a"] + x @ p["b"]

    found = count(f, params, shape(3, 4))
    again = count(f, jax.eval_shape(lambda: params), shape(3, 4))
    assert found == again
    assert by_path(found) == {"a": (1, 72), "b": (1, 72)}
    assert found.parameters == 24  # what is tied is held once


def test_numbers_among_the_parameters_count():
    found = count(lambda p, x: x * p["scale"], {"scale": 2.0, "none": None}, shape(3))
    assert found.parameters == 1


def test_memory_of_a_chain_by_hand():
    def f(w, x):
        y = x @ w  # 5 x 8 floats, 160 bytes
        z = jnp.tanh(y)  # 160 more; y is done
        v = z[:, :2]  # 40; z is still asked for
        return v.sum() + z.sum()

    assert count(f, shape(4, 8), shape(5, 4)).activation_bytes == 320


def test_memory_of_a_residual_holds_it():
    def f(w, x):
        y = jnp.tanh(x)
        return y + (y @ w) @ w.reshape(8, 4)

    # At the second dot y 80, y @ w 160, w as it is reshaped 128, the product 80.
    assert count(f, shape(4, 8), shape(5, 4)).activation_bytes == 448


def test_dropped_results_and_casts_have_their_own_sizes():
    def f(w, x):
        values, _ = jax.lax.top_k(x, 2)
        return values.astype(jnp.bfloat16)

    # 2 floats and 2 ints of a row, then 2 floats and 2 of 16 bits.
    assert count(f, shape(1), shape(3, 4)).activation_bytes == 3 * 16
    codes = count(lambda w, x: x.astype(jnp.int4), shape(1), shape(3, 5))
    assert codes.activation_bytes == 8  # 15 halves
    keys = count(lambda w, key: jax.random.split(key, 3), shape(1), jax.random.key(0))
    assert keys.activation_bytes >= 3 * 8
    assert count(lambda w, x: x, shape(1), shape(3, 4)).activation_bytes == 0


def test_a_call_holds_what_lives_inside_it():
    def inside(x):
        return jnp.exp(jnp.concatenate([x] * 10, axis=1)).sum(axis=1)

    plain = count(lambda w, x: inside(x), shape(1), shape(3, 4)).activation_bytes
    called = count(lambda w, x: jax.jit(inside)(x), shape(1), shape(3, 4))
    assert plain == called.activation_bytes == 2 * 3 * 40 * 4


def test_a_scan_holds_one_turn_and_all_that_it_stacks():
    def f(w, x):
        def layer(x, row):
            y = x @ row  # 3 x 8 floats, 96 bytes
            return y[:, :4], y.sum(axis=1)

        return jax.lax.scan(layer, x, w)

    # 5 rows of 3 floats are stacked; in a turn y, the next x and a row live.
    expected = 5 * 12 + 96 + 48 + 12
    assert count(f, shape(5, 4, 8), shape(3, 4)).activation_bytes == expected


LAYERS, WIDTH, VOCABULARY = 24, 1024, 32_000


def block(p, x):
    heads = lambda w: (x @ w).reshape(*x.shape[:2], 16, -1)  # noqa: E731
    scores = jnp.einsum("bqhd,bkhd->bhqk", heads(p["q"]), heads(p["k"]))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), heads(p["v"]))
    x = x + mixed.reshape(x.shape) @ p["o"]
    return x + jax.nn.gelu(x @ p["up"]) @ p["down"]


def plainly(params, tokens):
    x = params["embedding"][tokens]
    for i in range(LAYERS):
        x = block(params[f"layer_{i}"], x)
    return x @ params["embedding"].T


def scanned(params, tokens):
    x = params["embedding"][tokens]
    x = jax.lax.scan(lambda x, p: (block(p, x), None), x, params["layers"])[0]
    return x @ params["embedding"].T


def transformer(*layers):
    square, wide = (WIDTH, WIDTH), (WIDTH, 4 * WIDTH)
    lengths = {
        **dict.fromkeys("qkvo", square),
        **{"up": wide, "down": wide[::-1]},
    }
    return {name: shape(*layers, *pair) for name, pair in lengths.items()}


@pytest.mark.parametrize("stacked", [False, True])
def test_a_large_transformer_is_counted_from_its_shapes(stacked):
    batch, tokens = 8, 2048
    embedding = {"embedding": shape(VOCABULARY, WIDTH)}
    if stacked:
        f, params = scanned, embedding | {"layers": transformer(LAYERS)}
    else:
        layers = {f"layer_{i}": transformer() for i in range(LAYERS)}
        f, params = plainly, embedding | layers
    arrays = len(jax.live_arrays())
    start = time.process_time()
    found = count(f, params, shape(batch, tokens, dtype=jnp.int32))
    assert time.process_time() - start < 10
    assert len(jax.live_arrays()) <= arrays
    kernels, table = LAYERS * 12 * WIDTH**2, VOCABULARY * WIDTH
    scores = LAYERS * 2 * batch * tokens**2 * WIDTH
    assert found.parameters == kernels + table
    assert found.multiply_adds == batch * tokens * (kernels + table) + scores
    assert found.activation_bytes >= batch * tokens * VOCABULARY * 4


def test_the_table_has_one_line_for_each_weight():
    path = "encoder/" * 12 + "MultiHeadDotProductAttention_0/[kernel]"
    params = {path: shape(1024, 4096), "[bold]": shape(1, 4096), ":smile:": shape(4)}
    found = count(lambda p, x: x @ p[path] + p["[bold]"], params, shape(3, 1024))
    text = str(found)
    lines = text.splitlines()
    for weight in found.weights:
        assert sum(weight.path in line for line in lines) == 1
    row = next(line for line in lines if path in line)
    assert row.split()[-4:] == ["1024,4096", "4,194,304", "1", "12,582,912"]
    total = next(line for line in lines if line.split()[:1] == ["total"])
    assert total.split() == ["total", "4,198,404", "12,582,912"]
    assert "Activations:" in text
    assert "Loops" not in text


def test_the_table_is_plain_text_wherever_it_is_printed(monkeypatch):
    found = count(lambda p, x: x @ p["w"], {"w": shape(3, 2)}, shape(5, 3))
    expected = str(found)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    assert str(found) == expected
    assert "\x1b" not in expected


def test_nothing_to_count_is_zero():
    found = count(lambda p, x: x, {}, shape(3))
    assert found[1:] == (0, 0, 0, 0)
    assert "total" in str(found)
