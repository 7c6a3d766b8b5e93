"""Masks beside those of torch.nn.utils.prune, where PyTorch is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc


torch = pytest.importorskip("torch")
peer = pytest.importorskip("torch.nn.utils.prune")

RNG = np.random.default_rng(0)
WEIGHTS = {
    "a": RNG.standard_normal((48, 32)).astype(np.float32),
    "b": RNG.standard_normal((16, 8, 3, 3)).astype(np.float32),
}
PARAMS = jax.tree.map(jnp.asarray, WEIGHTS)


def theirs(w, method):
    return method.compute_mask(torch.from_numpy(w), torch.ones(w.shape)).numpy() > 0


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_the_masks_of_single_leaves_are_those_of_l1_unstructured(sparsity):
    ours = jc.prune.masks(PARAMS, sparsity)
    for name, w in WEIGHTS.items():
        mask = theirs(w, peer.L1Unstructured(sparsity))
        np.testing.assert_array_equal(ours[name], mask)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_the_masks_of_all_leaves_are_those_of_global_unstructured(sparsity):
    modules = [torch.nn.Module() for _ in WEIGHTS]
    for module, w in zip(modules, WEIGHTS.values(), strict=True):
        module.w = torch.nn.Parameter(torch.from_numpy(w))
    peer.global_unstructured(
        [(module, "w") for module in modules],
        pruning_method=peer.L1Unstructured,
        amount=sparsity,
    )
    ours = jc.prune.masks(PARAMS, sparsity, budget=jc.prune.global_budget)
    for module, mask in zip(modules, ours.values(), strict=True):
        np.testing.assert_array_equal(mask, module.w_mask.numpy() > 0)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_masks_of_units_are_those_of_ln_structured(axis):
    budget = jc.prune.in_units(jc.prune.leaf_budget, axis)
    ours = jc.prune.masks(PARAMS, 0.5, budget=budget)
    for name, w in WEIGHTS.items():
        mask = theirs(w, peer.LnStructured(0.5, n=1, dim=axis))
        np.testing.assert_array_equal(ours[name], mask)


def test_random_masks_have_the_same_count():
    ours = jc.prune.masks(PARAMS, 0.3, score=jc.random_scores(jax.random.key(0)))
    for name, w in WEIGHTS.items():
        mask = theirs(w, peer.RandomUnstructured(0.3))
        assert int(ours[name].sum()) == mask.sum()
