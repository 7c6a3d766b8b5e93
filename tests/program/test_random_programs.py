"""The law of exact families, on programs that are drawn at random.

`python tests/program/test_random_programs.py FIRST LAST` tries many more.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.program.coupling import coupled_groups
from jaxcomp.program.shrink import shrink
from jaxcomp.prune.group_patterns import group_masks
from jaxcomp.prune.oneshot import apply_masks


WIDTH, TIME, BATCH = 6, 3, 2

# Each is (new parameter, fixed array) -> (params, value, an earlier value) -> value, of
# values [BATCH, TIME, WIDTH].
STEPS = {}


def step(make):
    STEPS[make.__name__] = make
    return make


def plain(name, fn):
    STEPS[name] = lambda param, fixed: lambda p, v, o: fn(v, o)


def heads(x):
    return x.reshape(BATCH, TIME, 2, WIDTH // 2)


def attention(v, o):
    scores = jnp.einsum("bthd,bshd->bhts", heads(v), heads(o))
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), heads(v))
    return mixed.reshape(v.shape)


def normed(v, o):
    return (v - v.mean(-1, keepdims=True)) / jnp.sqrt(v.var(-1, keepdims=True) + 1e-3)


def pooled(v, o):
    ends = (1, 2, 1), (1, 1, 1), "SAME"
    return jax.lax.reduce_window(v, -jnp.inf, jax.lax.max, *ends)


def one_of(v, o):
    return jax.lax.cond(v.sum() > 0, lambda a, b: a + b, lambda a, b: a * b, v, o)


plain("relu", lambda v, o: jax.nn.relu(v))
plain("gelu", lambda v, o: jax.nn.gelu(v))
plain("silu", lambda v, o: jax.nn.silu(v))
plain("sigmoid", lambda v, o: jax.nn.sigmoid(v))
plain("decay", lambda v, o: jnp.exp(-jnp.abs(v)))
plain("softplus", lambda v, o: jax.nn.softplus(v))
plain("add", lambda v, o: v + o)
plain("gate", lambda v, o: v * jax.nn.sigmoid(o))
plain("layer norm", normed)
plain(
    "rms norm", lambda v, o: v * jax.lax.rsqrt((v * v).mean(-1, keepdims=True) + 1e-3)
)
plain("length", lambda v, o: v / jnp.sqrt((v * v).sum(-1, keepdims=True) + 1e-3))
plain("swap", lambda v, o: jnp.concatenate(jnp.split(v, 2, -1)[::-1], -1))
plain("rotate", lambda v, o: jnp.concatenate([-v[..., 3:], v[..., :3]], -1))
plain("shuffle", lambda v, o: heads(v).swapaxes(-1, -2).reshape(v.shape))
plain("attention", attention)
plain("softmax", lambda v, o: jax.nn.softmax(v))
plain("cumsum", lambda v, o: jnp.cumsum(v, 1))
plain("roll", lambda v, o: jnp.roll(v, 1, -1))
plain("pad", lambda v, o: jnp.pad(v, ((0, 0), (0, 0), (1, 1)))[..., 1:-1])
plain("sum of times", lambda v, o: v + v.sum(1, keepdims=True))
plain("sum of channels", lambda v, o: v + 0.1 * v.sum(-1, keepdims=True))
plain("cond", one_of)
plain("clip", lambda v, o: jnp.clip(v, -1, 0.5))
plain("clip away from zero", lambda v, o: jnp.clip(v, 0.1, 0.5))
plain("where", lambda v, o: jnp.where(o > 0, v, 0.0))
plain("where, else one", lambda v, o: jnp.where(o > 0, v, 1.0))
plain("pool", pooled)
plain("square", lambda v, o: v**2)
plain("power", lambda v, o: jnp.abs(v) ** 1.5)
plain("divide", lambda v, o: v / (1 + o * o))
plain("mapped", lambda v, o: jax.vmap(jnp.tanh)(v))


@step
def dense(param, fixed):
    kernel, bias = param(WIDTH, WIDTH), param(WIDTH)
    return lambda p, v, o: v @ p[kernel] + p[bias]


STEPS["dense again"] = STEPS["and again"] = dense


@step
def scale(param, fixed):
    name = param(WIDTH)
    return lambda p, v, o: v * p[name]


@step
def scale_heads(param, fixed):
    name = param(2, WIDTH // 2)
    return lambda p, v, o: (heads(v) * p[name]).reshape(v.shape)


@step
def constant(param, fixed):
    return lambda p, v, o: v + fixed


@step
def permute(param, fixed):
    order = np.argsort(fixed)
    return lambda p, v, o: jnp.take(v, order, -1)


@step
def recurrent(param, fixed):
    name = param(WIDTH, WIDTH)

    def run(p, v, o):
        def turn(h, x):
            h = jnp.tanh(x + h @ p[name])
            return h, h

        start = jnp.zeros((BATCH, WIDTH))
        return jax.lax.scan(turn, start, v.swapaxes(0, 1))[1].swapaxes(0, 1)

    return run


@step
def checkpointed(param, fixed):
    name = param(WIDTH, WIDTH)
    return lambda p, v, o: jax.checkpoint(lambda a, w: jnp.tanh(a @ w))(v, p[name])


def convolution(groups):
    def make(param, fixed):
        name = param(2, WIDTH // groups, WIDTH)
        numbers = {"dimension_numbers": ("NWC", "WIO", "NWC")}

        def run(p, v, o):
            settings = {"feature_group_count": groups, **numbers}
            return jax.lax.conv_general_dilated(v, p[name], (1,), "SAME", **settings)

        return run

    return make


STEPS |= {"conv": convolution(1), "groups": convolution(2), "depth": convolution(WIDTH)}


def drawn(seed):
    """A function, its parameters, and what it does."""
    rng = np.random.default_rng(seed)
    params = {}

    def param(*shape):
        name = f"p{len(params):02d}"
        params[name] = jnp.asarray(rng.normal(0.1, 0.6, shape), jnp.float32)
        return name

    names = rng.choice(list(STEPS), rng.integers(2, 9)).tolist()
    fixed = rng.normal(size=WIDTH).astype(np.float32)
    steps = [STEPS[name](param, fixed) for name in names]
    earlier = [int(rng.integers(i + 1)) for i in range(len(steps))]
    into, bias, out = param(4, WIDTH), param(WIDTH), param(WIDTH, 3)

    def f(p, x):
        values = [jnp.tanh(x @ p[into] + p[bias])]
        for run, i in zip(steps, earlier, strict=True):
            values.append(run(p, values[-1], values[i]))
        return values[-1] @ p[out]

    x = jnp.asarray(rng.normal(size=(BATCH, TIME, 4)), jnp.float32)
    return f, params, x, names, rng


def check(seed):
    """How many families were exact."""
    f, params, x, names, rng = drawn(seed)
    if not np.abs(f(params, x)).max() < 1e4:
        return 0
    families = coupled_groups(f, params, x).families
    for family in families:
        keep = {family.name: rng.permutation(np.arange(family.size) * 2 < family.size)}
        g, smaller, _ = shrink(f, params, keep, x)
        found = g(smaller, x)
        assert np.shape(found) == (BATCH, TIME, 3)
        zeros = apply_masks(params, group_masks(params, families, keep))
        wanted = f(zeros, x)
        apart = np.abs(found - wanted).max() / (np.abs(wanted).max() + 1e-6)
        assert not family.exact or apart < 1e-4, (seed, names, family.name, apart)
    return sum(family.exact for family in families)


@pytest.mark.parametrize("first", range(0, 20, 5))
def test_exact_families_of_random_programs_shrunk_equal_masked(first):
    with jax.numpy_rank_promotion("allow"):
        exact = sum(map(check, range(first, first + 5)))
    assert exact > 0


if __name__ == "__main__":
    first, last = map(int, sys.argv[1:])
    print(f"{sum(map(check, range(first, last)))} exact families, all equal to masked")
