"""The loss of a net one leaf of which is changed is that of the net so changed."""

import re
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.program.sensitivity import sensitivity


PARAMS = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [1.0]])}
OPERATIONS = {
    "doubled": lambda w: 2 * w,
    "3 bits": partial(jc.quantize, bits=3),
    "bfloat16": lambda w: w.astype(jnp.bfloat16),
}


def f(params, x, y):
    return x @ params["a"] @ params["b"]


def squared(z, x, y):
    return jnp.mean((z - y) ** 2)


ONE = [(jnp.ones((1, 1)), jnp.full((1, 1), 5.0))]


def test_a_net_of_two_numbers_by_hand():
    # 1 * 3 + 2 * 1 = 5, which is right; doubled it is 10.
    operations = {"doubled": OPERATIONS["doubled"], "no 2": lambda w: w * (w != 2)}
    found = sensitivity(f, PARAMS, ONE, squared, operations)
    assert found.loss == 0
    assert [tuple(row) for row in found.changes] == [
        ("a", "doubled", 25.0, 25.0),
        ("a", "no 2", 4.0, 4.0),
        ("b", "doubled", 25.0, 25.0),
        ("b", "no 2", 0.0, 0.0),
    ]


@given(hnp.arrays(np.float32, (2, 3, 1), elements=st.integers(-8, 8)))
def test_every_leaf_is_changed_alone(x):
    y = x + 1
    batches = [(x[0], y[0]), (x[1], y[1])]
    found = sensitivity(f, PARAMS, iter(batches), squared, OPERATIONS)
    losses = {}
    for path in PARAMS:
        for name, operation in OPERATIONS.items():
            params = jc.densify(PARAMS | {path: operation(PARAMS[path])})
            parts = [
                np.mean(
                    (x @ np.float32(params["a"]) @ np.float32(params["b"]) - y) ** 2
                )
                for x, y in batches
            ]
            losses[path, name] = np.mean(parts)
    for row in found.changes:
        expected = losses[row.path, row.operation]
        np.testing.assert_allclose(row.loss, expected, rtol=1e-5, atol=1e-6)
        assert row.difference == row.loss - found.loss
    assert len(found.changes) == len(losses)


def test_one_compiled_function_does_for_all_leaves_and_operations():
    traces = []

    def counted(params, x, y):
        traces.append(x.shape)
        return f(params, x, y)

    sensitivity(counted, PARAMS, ONE * 3, squared, OPERATIONS)
    assert traces == [(1, 1)]


def test_compressed_and_tied_leaves_are_changed_by_what_they_stand_for():
    params = {"a": jnp.eye(2), "b": jnp.eye(2), "c": jnp.eye(2)}
    tree = jc.tie_layers(params, [("a", "b")])
    tree = jc.quantize_tree(tree, bits=8, where=jc.path_matches("c"))

    def g(params, x):
        return x @ params["a"] @ params["b"] @ params["c"]

    operations = {"doubled": OPERATIONS["doubled"]}
    found = sensitivity(g, tree, [(jnp.eye(2),)], lambda z, x: z.max(), operations)
    rows = [(row.path, round(row.loss, 5)) for row in found.changes]
    assert rows == [("a", 4.0), ("c", 2.0)]  # b follows a


def test_the_table_has_a_row_for_each_change_and_one_for_none():
    where = jc.path_matches("b")
    operations = {"[doubled]": OPERATIONS["doubled"]}
    found = sensitivity(f, PARAMS, ONE, squared, operations, where=where)
    lines = [line.split() for line in str(found).splitlines()]
    assert lines[1] == ["leaf", "operation", "loss", "difference"]
    assert lines[3] == ["b", "[doubled]", "25", "+25"]
    assert lines[5] == ["unchanged", "0"]
    assert len(lines) == 6


def raises(text, *args, error=ValueError, **more):
    with pytest.raises(error, match=re.escape(text)):
        sensitivity(*args, **more)


def test_a_loss_must_be_one_number():
    text = "sensitivity needs a loss that is one number, got shape [1, 1]. Take its"
    raises(text, f, PARAMS, ONE, lambda z, x, y: z, OPERATIONS)


def test_an_operation_must_keep_the_shape():
    text = (
        "sensitivity needs operations that keep the shape, but 'turned' makes [2, 1] "
        "of leaf 'a' [1, 2]."
    )
    raises(text, f, PARAMS, ONE, squared, {"turned": jnp.transpose})


def test_there_must_be_a_batch_and_an_operation():
    text = "needs a batch and an operation at least, got 0 batches and 3 operations."
    raises(text, f, PARAMS, [], squared, OPERATIONS)
    text = "got 1 batches and 0 operations."
    raises(text, f, PARAMS, ONE, squared, {})


def test_a_batch_must_be_a_tuple():
    text = "sensitivity needs batches that are tuples of inputs, got one of type"
    raises(text, f, PARAMS, [jnp.ones((1, 1))], squared, OPERATIONS, error=TypeError)


def test_values_must_be_finite_and_something_selected():
    params = PARAMS | {"a": jnp.array([[jnp.nan, 1.0]])}
    text = "sensitivity needs finite values, but leaf 'a' float32[1, 2] holds nan"
    raises(text, f, params, ONE, squared, OPERATIONS)
    text = "`where` selected none of the 2 leaves"
    where = jc.path_matches("z")
    raises(text, f, PARAMS, ONE, squared, OPERATIONS, where=where)
