"""The two laws of cutting, on every model of the zoo.

Where a family is exact, the smaller function is the function with zeros. Where a mean
spans it, it is the same architecture built for the smaller widths.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp.node import flatten
from jaxcomp.program.coupling import coupled_groups
from jaxcomp.program.shrink import cut, shrink
from jaxcomp.prune.group_patterns import group_masks
from jaxcomp.prune.oneshot import apply_masks
from tests.program.zoo import layers
from tests.program.zoo.models import MODELS


every_model = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
CLOSE = 1e-5
# To compile is most of the time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def made(make):
    found = make()
    return found, coupled_groups(found.f, found.params, *found.inputs)


def half(families, rng):
    """Half of the groups of each family, drawn."""
    return {
        family.name: rng.permutation(np.arange(family.size) < max(1, family.size // 2))
        for family in families
    }


def value_and_gradients(f, params, inputs):
    """What f returns, and the gradients of a sum of it in which every entry counts."""

    def loss(params, *inputs):
        outs = f(params, *inputs)
        found = (x for x in jax.tree.leaves(outs) if is_float(x))
        return sum(jnp.sum(jnp.sin(x)) for x in found), outs

    def both(params, *inputs):
        slope = jax.value_and_grad(loss, has_aux=True, allow_int=True)
        (_, outs), grads = slope(params, *inputs)
        return outs, grads

    def value(params, *inputs):
        return f(params, *inputs), {}

    loops = "while[" in str(jax.make_jaxpr(f)(params, *inputs))  # no reverse mode
    run = jax.jit(value if loops else both).lower(params, *inputs)
    return run.compile(FAST)(params, *inputs)


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def check_close(found, wanted):
    """Equal up to rounding, by the largest entry of the tree."""
    found, wanted = (
        list(filter(is_float, jax.tree.leaves(x))) for x in (found, wanted)
    )
    reach = CLOSE * max((float(np.abs(y).max()) for y in wanted), default=0)
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0, atol=reach)


def masked(params, families, keep):
    return jax.jit(lambda p: apply_masks(p, group_masks(p, families, keep)))(params)


def value(f, params, inputs):
    run = jax.jit(lambda *args: f(*args)).lower(params, *inputs)
    return run.compile(FAST)(params, *inputs)


@every_model
def test_what_can_be_cut_is_found_and_what_cannot_says_why(make):
    model, groups = made(make)
    owner = {(m.path, m.axis): f for f in groups.families for m in f.members}
    reasons = {(x.path, x.axis): x.reason for x in groups.frozen}
    for pair in model.prunable:
        assert pair in owner, (pair, reasons.get(pair))
        exact = pair not in model.inexact
        assert owner[pair].exact == exact, (pair, owner[pair].reason)
        assert (owner[pair].reason == "") == exact
    for pair, word in model.frozen.items():
        assert pair not in owner
        assert word in reasons[pair], (pair, word, reasons[pair])


@every_model
def test_exact_families_shrunk_equal_masked_with_gradients(make):
    model, groups = made(make)
    exact = [family for family in groups.families if family.exact]
    keep = half(exact, np.random.default_rng(0))
    g, smaller, widths = shrink(model.f, model.params, keep, *model.inputs)
    assert bool(widths) == bool(exact)
    zeros = masked(model.params, groups.families, keep)
    wanted, slopes = value_and_gradients(model.f, zeros, model.inputs)
    found, grads = value_and_gradients(g, smaller, model.inputs)
    shapes = {x.shape for x in jax.tree.leaves(wanted)}
    if shapes == {x.shape for x in jax.tree.leaves(found)}:  # no statistics come back
        check_close(found, wanted)
    else:
        check_close(found[0], wanted[0])
        check_close(found[1], cut(wanted[1], model.params, groups, keep))
    check_close(grads, cut(slopes, model.params, groups, keep))


@every_model
def test_all_families_shrunk_equal_the_net_built_for_these_widths(make):
    model, groups = made(make)
    keep = half(groups.families, np.random.default_rng(1))
    g, smaller, _ = shrink(model.f, model.params, keep, *model.inputs)
    if model.native is None:  # the first law holds for it
        assert all(family.exact for family in groups.families)
        return
    paths, leaves, _ = flatten(smaller)
    f = model.native({p: x.shape for p, x in zip(paths, leaves, strict=True)})
    if all(family.exact for family in groups.families):  # gradients: the first law
        check_close(*(value(h, smaller, model.inputs) for h in (g, f)))
        return
    found, grads = value_and_gradients(g, smaller, model.inputs)
    wanted, slopes = value_and_gradients(f, smaller, model.inputs)
    check_close(found, wanted)
    check_close(grads, slopes)


@every_model
def test_a_family_that_is_not_exact_differs_from_the_masked_net(make):
    model, groups = made(make)
    for family in groups.families:
        if family.exact:
            continue
        keep = half([family], np.random.default_rng(2))
        g, smaller, _ = shrink(model.f, model.params, keep, *model.inputs)
        found = jax.tree.leaves(value(g, smaller, model.inputs))[0]
        zeros = masked(model.params, groups.families, keep)
        wanted = jax.tree.leaves(value(model.f, zeros, model.inputs))[0]
        apart = np.abs(found - wanted).max()
        assert not apart < 1e-4 * np.abs(found).max()  # NaN counts


@pytest.mark.parametrize("make", [layers.mlp, layers.lstm])
@settings(max_examples=4)
@given(data=st.data())
def test_both_laws_hold_for_any_positions(make, data):
    model, groups = made(make)
    keep = {
        family.name: np.array(
            data.draw(st.permutations(np.arange(family.size) < family.size // 2))
        )
        for family in groups.families
    }
    exact = {f.name: keep[f.name] for f in groups.families if f.exact}
    g, smaller, _ = shrink(model.f, model.params, exact, *model.inputs)
    zeros = masked(model.params, groups.families, exact)
    check_close(value(g, smaller, model.inputs), value(model.f, zeros, model.inputs))
    g, smaller, _ = shrink(model.f, model.params, keep, *model.inputs)
    paths, leaves, _ = flatten(smaller)
    f = model.native({p: x.shape for p, x in zip(paths, leaves, strict=True)})
    check_close(value(g, smaller, model.inputs), value(f, smaller, model.inputs))
