"""What Flax modules collect is picked by path."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.distill.intermediates import pick
from jaxcomp.distill.outputs import Outputs


X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)


class Part(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5)(x)
        for i in range(3):
            self.sow("intermediates", "mix", x + i)
        self.sow("intermediates", "value", -x)
        return x, {"double": 2 * x}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(Part(name="part")(x)[0])


NET = Net()
VARIABLES = jax.jit(NET.init)(jax.random.key(0), X)


def collected(variables, x):
    return NET.apply(
        variables, x, capture_intermediates=True, mutable=["intermediates"]
    )


DENSE = VARIABLES["params"]["part"]["Dense_0"]
HIDDEN = X @ DENSE["kernel"] + DENSE["bias"][None]


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("part/Dense_0/__call__", HIDDEN),
        ("part/Dense_0/__call__/0", HIDDEN),
        ("part/__call__/0/0", HIDDEN),
        ("part/__call__/0/1", 2 * HIDDEN),
        ("part/__call__/0/1/double", 2 * HIDDEN),
        ("part/mix/0", HIDDEN),
        ("part/mix/2", HIDDEN + 2),
        ("part/value", -HIDDEN),
    ],
)
def test_linen_outputs_and_what_is_sown(path, wanted):
    found = pick(collected(VARIABLES, X)[1]["intermediates"], {"a": path})
    np.testing.assert_allclose(found["a"], wanted, rtol=1e-5, atol=1e-6)


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9), min_size=1))
def test_every_array_is_found_by_its_own_path(tree):
    nested = {"net": {key: (jnp.full(1, x), {"b": x}) for key, x in tree.items()}}
    names = {key: f"net/{key}/0" for key in tree}
    found = pick(nested, names)
    assert {key: int(x[0]) for key, x in found.items()} == tree
    assert pick(nested, {key: f"net/{key}/1" for key in tree}) == tree


def test_a_student_returns_them_and_is_differentiated_through_them():
    def student(variables, x):
        logits, found = collected(variables, x)
        return Outputs(logits, pick(found["intermediates"], {"hint": "part/mix/1"}))

    def loss(variables):
        return student(variables, X).features["hint"].sum()

    grads = jax.jit(jax.grad(loss))(VARIABLES)["params"]
    np.testing.assert_allclose(grads["part"]["Dense_0"]["bias"], len(X), rtol=1e-6)
    np.testing.assert_array_equal(grads["Dense_0"]["kernel"], 0)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.value = nnx.Linear(3, 5, rngs=rngs)

    def __call__(self, x):
        x = self.value(x)
        self.mid = nnx.Intermediate((x,))
        self.mix = nnx.Intermediate((x, 2 * x))
        return x


@pytest.mark.parametrize(
    ("path", "scale"),
    [("mid", 1), ("mid/value/0", 1), ("mix/0", 1), ("mix/1", 2), ("mix/value/1", 2)],
)
def test_nnx_intermediates(path, scale):
    model = NnxNet(nnx.Rngs(0))
    wanted = model(X)
    found = pick(nnx.pop(model, nnx.Intermediate), {"hint": path})
    np.testing.assert_allclose(found["hint"], scale * wanted, rtol=1e-6)


def test_a_path_to_nothing_lists_the_paths():
    tree = {"Conv_0": {"__call__": (X,)}}
    with pytest.raises(
        ValueError, match=r"'early', got 'Conv_1'.*are 0\. .*Conv_0/__c"
    ):
        pick(tree, {"early": "Conv_1"})
    with pytest.raises(ValueError, match="got 'Conv'.*there are 0"):
        pick(tree, {"early": "Conv"})
    with pytest.raises(ValueError, match="nothing was collected"):
        pick({}, {"early": "Conv_1"})


def test_a_path_to_several_wants_an_index():
    with pytest.raises(ValueError, match="got 'mix', where there are 2, mix/0, mix/1"):
        pick({"mix": (X, X)}, {"early": "mix"})
