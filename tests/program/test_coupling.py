import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.program.axes import Axis, Value, freeze
from jaxcomp.program.count import count
from jaxcomp.program.coupling import coupled_groups
from jaxcomp.program.labels import Labels
from jaxcomp.program.moves import blocks
from jaxcomp.program.rules import RULES
from jaxcomp.program.shrink import shrink
from jaxcomp.prune.groups import total


def shaped(**shapes):
    return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}


def mlp(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"][None]) @ params["down"]


MLP = shaped(up=(3, 4), bias=(4,), down=(4, 2))
X = jax.ShapeDtypeStruct((5, 3), jnp.float32)


def test_a_unit_is_a_column_its_bias_and_a_row():
    found = coupled_groups(mlp, MLP, X)
    (family,) = found.families
    assert (family.name, family.size, family.exact) == ("units of up", 4, True)
    assert family.groups[2] == [("up", 1, [2]), ("bias", 0, [2]), ("down", 0, [2])]
    assert {(x.path, x.axis): x.reason for x in found.frozen} == {
        ("down", 1): "output",
        ("up", 0): "input",
    }


def test_it_prints_families_and_reasons():
    text = str(coupled_groups(mlp, MLP, X))
    assert text.splitlines() == [
        "units of up: 4 groups",
        "  up axis 1",
        "  bias axis 0",
        "  down axis 0",
        "frozen:",
        "  down axis 1 (2): output",
        "  up axis 0 (3): input",
    ]


def test_a_family_that_is_not_exact_prints_why_and_where():
    def f(params, x):
        y = x @ params["up"]
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        return y @ params["down"]

    (family,) = coupled_groups(f, shaped(up=(3, 4), down=(4, 2)), X).families
    line = f.__code__.co_firstlineno + 2
    assert family.reason == f"a mean spans it, at test_coupling.py:{line}"
    assert f"not exact: {family.reason}" in str(
        coupled_groups(f, shaped(up=(3, 4), down=(4, 2)), X)
    )


def test_flattening_gives_every_channel_a_row_for_each_place():
    def f(params, x):
        y = jax.lax.conv(x, params["kernel"], (1, 1), "SAME")  # [batch, 2, 2, 2]
        return y.reshape(len(y), -1) @ params["dense"]

    params = shaped(kernel=(2, 1, 3, 3), dense=(8, 5))
    (family,) = coupled_groups(f, params, np.ones((1, 1, 2, 2), np.float32)).families
    assert family.groups == [
        [("kernel", 0, [0]), ("dense", 0, [0, 1, 2, 3])],
        [("kernel", 0, [1]), ("dense", 0, [4, 5, 6, 7])],
    ]


def test_heads_of_a_fused_kernel_own_columns_of_all_three_parts():
    def f(params, x):
        q, k, v = jnp.moveaxis((x @ params["qkv"]).reshape(5, 3, 2, 4), 1, 0)
        weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k))
        return jnp.einsum("hts,shd->thd", weights, v).reshape(5, 8) @ params["out"]

    found = coupled_groups(f, shaped(qkv=(3, 24), out=(8, 3)), X)
    (family,) = found.families
    assert family.name.startswith("heads of")
    columns = np.arange(24).reshape(3, 2, 4)
    for head, group in enumerate(family.groups):
        assert group == [
            ("qkv", 1, columns[:, head].reshape(-1).tolist()),
            ("out", 0, list(range(4 * head, 4 * head + 4))),
        ]


def test_a_residual_stream_is_one_family_named_so():
    def f(params, x):
        x = x @ params["embed"]
        x = x + jax.nn.relu(x @ params["up"]) @ params["down"]
        return x @ params["head"]

    params = shaped(embed=(3, 6), up=(6, 4), down=(4, 6), head=(6, 2))
    stream, inner = coupled_groups(f, params, X).families
    assert stream.name == "stream from embed"
    assert [(m.path, m.axis) for m in stream.members] == [
        ("embed", 1),
        ("up", 0),
        ("down", 1),
        ("head", 0),
    ]
    assert inner.name == "units of up"


def test_names_are_unique_and_groups_are_apart():
    found = coupled_groups(mlp, MLP, X)
    names = [family.name for family in found.families]
    assert len(set(names)) == len(names)
    owned = [
        (m.path, m.axis, i)
        for family in found.families
        for m in family.members
        for i in m.indices.reshape(-1).tolist()
    ]
    assert len(set(owned)) == len(owned)


def test_an_unknown_primitive_freezes_what_it_takes_with_its_line():
    def f(params, x):
        y = jnp.linalg.cholesky(params["square"])
        return x @ params["up"] @ y @ params["down"]

    params = shaped(up=(3, 4), square=(4, 4), down=(4, 2))
    found = coupled_groups(f, params, X)
    assert found.families == ()
    line = f.__code__.co_firstlineno + 1
    reasons = {(x.path, x.axis): x.reason for x in found.frozen}
    assert reasons["square", 0] == f"cholesky at test_coupling.py:{line}"


def test_a_rule_can_be_added():
    def f(params, x):
        return x * jnp.linalg.cholesky(params["stack"]).sum((1, 2)) @ params["down"]

    def cholesky(book, eqn, ins):
        (axes,) = (x.axes for x in ins)
        freeze(book, eqn, [Value(axes[-2:])])
        return [Value((*axes[:-2], "", ""))]

    params, x = shaped(stack=(4, 3, 3), down=(4, 2)), np.float32(1)
    assert coupled_groups(f, params, x).families == ()
    rules = {**RULES, "cholesky": cholesky}
    (family,) = coupled_groups(f, params, x, rules=rules).families
    assert [(m.path, m.axis) for m in family.members] == [("stack", 0), ("down", 0)]
    eyes = jnp.stack([jnp.eye(3)] * 4)
    keep = {family.name: np.array([True, False, True, False])}
    params = {"stack": eyes, "down": jnp.ones((4, 2))}
    g, smaller, _ = shrink(f, params, keep, x, rules=rules)
    np.testing.assert_allclose(g(smaller, x), [6, 6])


def test_costs_are_those_that_count_finds_before_and_after():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3))(x))
            x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=4)(x))
            return nn.Dense(5)(nn.relu(nn.Dense(6)(x.reshape(len(x), -1))))

    x = np.ones((2, 6, 6, 1), np.float32)
    params = Net().init(jax.random.key(0), x)
    found = coupled_groups(Net().apply, params, x)
    whole = {family.name: family.size for family in found.families}
    before = count(Net().apply, params, x)
    assert total(found.parameters, whole) == before.parameters
    assert total(found.multiply_adds, whole) == before.multiply_adds
    keep = {f.name: np.arange(f.size) < f.size // 2 for f in found.families}
    g, smaller, _ = shrink(Net().apply, params, keep, x)
    kept = {name: int(mask.sum()) for name, mask in keep.items()}
    after = count(g, smaller, x)
    assert total(found.parameters, kept) == after.parameters
    assert total(found.multiply_adds, kept) == after.multiply_adds


def test_a_scan_counts_all_its_turns_and_a_cond_its_dearest_branch():
    def f(params, x):
        def turn(x, w):
            return jnp.tanh(x @ w), None

        x = jax.lax.scan(turn, x, params["layers"])[0]
        wide = lambda x: x @ params["big"] @ params["back"]  # noqa: E731
        return jax.lax.cond(x.sum() > 0, wide, lambda x: x, x)

    params = shaped(layers=(4, 3, 3), big=(3, 9), back=(9, 3))
    found = coupled_groups(f, params, X)
    whole = {family.name: family.size for family in found.families}
    assert total(found.multiply_adds, whole) == count(f, params, X).multiply_adds


def test_nothing_is_allocated_for_a_large_transformer():
    def f(params, tokens):
        x = params["embed"][tokens]
        for i in range(2):
            p = params[f"block_{i}"]
            x = x + jax.nn.gelu(x @ p["up"]) @ p["down"]
        return x @ params["embed"].T

    block = shaped(up=(8192, 32768), down=(32768, 8192))
    params = {**shaped(embed=(50000, 8192)), "block_0": block, "block_1": block}
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    stream, *inner = coupled_groups(f, params, tokens).families
    assert (stream.size, [x.size for x in inner]) == (8192, [32768, 32768])


def test_a_tree_of_nothing_has_no_groups():
    found = coupled_groups(lambda params, x: x, {}, X)
    assert (found.families, found.frozen, str(found)) == ((), (), "")


def test_blocks_part_shapes_where_products_meet():
    assert blocks((2, 3, 4), (6, 4)) == [([0, 1], [0]), ([2], [1])]
    assert blocks((4, 6), (3, 8)) == [([0, 1], [0, 1])]
    assert blocks((1, 5), (5, 1, 1)) == [([1], [0])]
    assert blocks((), ()) == []


def test_labels_that_are_joined_share_root_and_reason():
    labels = Labels()
    a, b, c = (labels.fresh(3) for _ in range(3))
    labels.join(a, b)
    labels.freeze(c[:1], "first")
    labels.join(b, c[::-1])
    np.testing.assert_array_equal(labels.roots(a), labels.roots(c[::-1]))
    np.testing.assert_array_equal(labels.is_frozen(a), [False, False, True])
    assert labels.reason(int(a[2])) == "first"
    labels.freeze(a, "second")
    assert labels.reason(int(a[2])) == "first"
    assert labels.reason(int(b[0])) == "second"


@pytest.mark.parametrize("seed", range(5))
def test_joins_are_those_of_a_graph(seed):
    rng = np.random.default_rng(seed)
    labels, size = Labels(), 40
    every = labels.fresh(size)
    near = np.eye(size, dtype=bool)
    for _ in range(6):
        left, right = rng.integers(size, size=(2, 8))
        labels.join(every[left], every[right])
        near[left, right] = near[right, left] = True
    for _ in range(size):
        near = near @ near
    roots = labels.roots(every)
    np.testing.assert_array_equal(roots[:, None] == roots[None], near)


def test_labels_grow_past_what_is_reserved():
    labels = Labels()
    first, many = labels.fresh(3), labels.fresh(5000)
    labels.join(first, many[-3:])
    np.testing.assert_array_equal(labels.roots(many[-3:]), labels.roots(first))
    assert isinstance(Axis(first, np.zeros(3, bool)), Axis)


def test_a_parameter_that_is_not_used_stays():
    found = coupled_groups(mlp, {**MLP, **shaped(more=(7,))}, X)
    assert [x.name for x in found.families] == ["units of up"]
    assert ("more", 0, 7, "not used") in found.frozen


def test_a_scan_without_turns_costs_nothing():
    def f(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"])[0]

    found = coupled_groups(f, shaped(layers=(0, 3, 3)), X)
    assert total(found.multiply_adds, {}) == 0


def units(f, **params):
    found = coupled_groups(f, shaped(up=(3, 4), down=(4, 2), **params), X)
    return next((x for x in found.families if x.members[0].path == "up"), None)


def test_what_is_not_finite_at_zero_makes_a_family_not_exact():
    def with_power(power):
        def f(params, x):
            lengths = (params["up"] ** 2).sum(0, keepdims=True)
            return (x @ (params["up"] * lengths**power)) @ params["down"]

        return f

    assert "pow at" in units(with_power(-0.5)).reason
    assert units(with_power(0.5)).exact


def test_the_axis_of_a_top_k_stays_and_no_other():
    def f(params, x):
        return jax.lax.top_k(x @ params["up"], 4)[0] @ params["down"]

    assert units(f) is None


def test_an_output_is_the_parameter_with_the_longest_path():
    def f(params, x):
        y = x @ params["up"] @ params["down"]
        return y, {"a": {"up": params["a"]["up"] * 2}}

    params = {**shaped(up=(3, 4), down=(4, 2)), "a": shaped(up=(3, 4))}
    found = coupled_groups(f, params, X)
    owners = [{(m.path, m.axis) for m in x.members} for x in found.families]
    assert {("up", 1), ("down", 0)} in owners
