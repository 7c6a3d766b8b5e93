"""Masks of JaxPruner's algorithms beside ours, on the same nets, batches and schedules.

    python benchmarks/jaxpruner_masks.py

JaxPruner (google-research/jaxpruner) is not on PyPI: clone it and put it on PYTHONPATH.
Its `jax.tree_map` is given back to it here. LeNet-300-100 on Fashion-MNIST, without
biases, as JaxPruner's RigL fails on a net that has leaves it does not prune; Adam. At
every step both sides get the weights and gradients of JaxPruner's run, as two runs of
one algorithm drift apart by rounding; states are their own. Masks are compared after
every step in which JaxPruner chooses them, weights after every step. It takes some
minutes on one core.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxcomp as jc
from jaxcomp import demo
from jaxcomp.prune import given, global_budget, leaf_budget, nm_budget
from jaxcomp.train import prune_by_saliency, prune_straight_through
from jaxcomp.train.latent import latent_of


jax.tree_map = jax.tree.map  # JAX 0.4.26 took it away

import jaxpruner  # noqa: E402
from jaxpruner import sparsity_schedules, sparsity_types  # noqa: E402
from jaxpruner.algorithms import global_pruners, ste  # noqa: E402


BATCH, STEPS, EVERY, START, END = 128, 400, 25, 25, 300
TARGET = 0.9
adam = optax.adam(1e-3)
RAMP = sparsity_schedules.PolynomialSchedule(EVERY, START, END)
ONCE = sparsity_schedules.OneShotSchedule(START)
UNIFORM = partial(jaxpruner.sparsity_distributions.uniform, sparsity=TARGET)
ERK = partial(jaxpruner.sparsity_distributions.erk, sparsity=TARGET)


def cubic(step: Any) -> jax.Array:
    """The schedule of JaxPruner, which is one step ahead of the paper's."""
    done = jnp.clip((step + 1 - START) / (END - START), 0, 1)
    level = TARGET * (1 - (1 - done) ** 3)
    return jnp.where(step < START, 0.0, level)


def ramp(step: Any) -> jax.Array:
    """What JaxPruner reads of it: ours would choose in step END - 1, too, its top."""
    return cubic(step // EVERY * EVERY)


def once(level: float) -> optax.Schedule:
    return lambda step: jnp.where(step < START, 0.0, level)


class Pair(NamedTuple):
    """The same algorithm twice."""

    theirs: Any
    ours: Any  # the starting masks -> a transformation
    steps: int = STEPS
    is_sparse: bool = False  # from the first step on
    masks_of: Any = None  # theirs, if they are not in the state


def their_erk(scores: Any, level: Any) -> Any:
    """JaxPruner scales the densities of its target; `erk_budget` solves for each."""
    shapes = {tuple(path.split("/")): score for path, score in scores.items()}
    goals = jaxpruner.sparsity_distributions.erk(unflatten_dict(shapes), TARGET)
    goals = flatten_dict(goals, sep="/")
    return leaf_budget(scores, {p: level / TARGET * goals[p] for p in scores})


def gradual(budget: Any, schedule: Any = ramp) -> Any:
    return lambda masks: optax.chain(
        adam, jc.prune_gradually(schedule, every=EVERY, budget=budget)
    )


def rigl(masks: Any) -> Any:
    score = given(jax.tree.map(lambda mask: 1.0 * mask, masks))  # those it started with
    share = optax.cosine_decay_schedule(0.3, END)
    return jc.rigl(adam, TARGET, fraction=share, score=score, every=EVERY)


def regrowing() -> Any:
    schedule = sparsity_schedules.PeriodicSchedule(EVERY, EVERY, END - 1)
    share = optax.cosine_decay_schedule(0.3, END)
    return jaxpruner.RigL(
        scheduler=schedule,
        sparsity_distribution_fn=UNIFORM,
        drop_fraction_fn=share,
        skip_gradients=False,
    )


def straight_through(pruner: Any, params: Any, step: Any) -> Any:
    """What its forward pass multiplies by, which it does not keep."""
    levels = RAMP.get_sparsity_at_step(UNIFORM(params), step)
    return pruner.create_masks(pruner.calculate_scores(params), levels)


PAIRS = {
    "magnitude, uniform": Pair(
        jaxpruner.MagnitudePruning(scheduler=RAMP, sparsity_distribution_fn=UNIFORM),
        gradual(leaf_budget),
    ),
    "magnitude, ERK": Pair(
        jaxpruner.MagnitudePruning(scheduler=RAMP, sparsity_distribution_fn=ERK),
        gradual(their_erk),
    ),
    "magnitude, global": Pair(
        global_pruners.GlobalMagnitudePruning(
            scheduler=RAMP, sparsity=TARGET, use_normalization=False
        ),
        gradual(global_budget),
    ),
    "magnitude, 2:4": Pair(
        jaxpruner.MagnitudePruning(
            scheduler=ONCE,
            sparsity_distribution_fn=partial(
                jaxpruner.sparsity_distributions.uniform, sparsity=0.5
            ),
            sparsity_type=sparsity_types.NByM(2, 4, axis=0),
        ),
        gradual(nm_budget(2, 4), once(0.5)),
    ),
    "saliency, one batch": Pair(
        jaxpruner.SaliencyPruning(scheduler=RAMP, sparsity_distribution_fn=UNIFORM),
        lambda masks: prune_by_saliency(adam, ramp, memory=0, every=EVERY),
    ),
    "RigL, with its steps": Pair(regrowing(), rigl, is_sparse=True),
    "magnitude-STE": Pair(
        ste.SteMagnitudePruning(scheduler=RAMP, sparsity_distribution_fn=UNIFORM),
        lambda masks: prune_straight_through(adam, lambda step: cubic(step + 1)),
        steps=END + 10,
        masks_of=straight_through,
    ),
}


def run(pair: Pair, start: Any, data: Any) -> tuple[int, int, int, float]:
    """Choices compared, those with equal masks, entries that differ, and weights."""
    pruner = pair.theirs
    their_tx = pruner.wrap_optax(adam)
    their_state = their_tx.init(start)
    our_tx = pair.ours(their_state.masks)
    if pair.is_sparse:
        start = pruner.post_gradient_update(start, their_state)
    our_state = our_tx.init(start)

    def loss(params: Any, rows: Any) -> jax.Array:
        x = data.x[rows]
        for name in ("Dense_0", "Dense_1"):
            x = jax.nn.relu(x @ params[name]["kernel"])
        z = x @ params["Dense_2"]["kernel"]
        losses = optax.softmax_cross_entropy_with_integer_labels(z, data.y[rows])
        return losses.mean()

    @jax.jit
    def step(params: Any, their_state: Any, our_state: Any, rows: Any) -> Any:
        seen = pruner.pre_forward_update(params, their_state)
        grads = jax.grad(loss)(seen, rows)
        updates, their_state = their_tx.update(grads, their_state, params)
        theirs = optax.apply_updates(params, updates)
        theirs = pruner.post_gradient_update(theirs, their_state)
        masks, ours = their_state.masks, params
        target = theirs
        if pair.masks_of:  # its weights are the latent ones
            masks = pair.masks_of(pruner, theirs, their_state.count)
            ours = jc.apply_masks(params, our_state.masks)
            our_state = our_state._replace(latent=latent_of(our_state.masks, params))
            target = pruner.pre_forward_update(theirs, their_state)
        updates, our_state = our_tx.update(grads, our_state, ours)
        ours = optax.apply_updates(ours, updates)
        links = our_state if type(our_state) is tuple else (our_state,)
        found = next(link.masks for link in links if hasattr(link, "masks"))
        pairs = zip(kernels(masks), kernels(found), strict=True)
        off = sum(jnp.sum(a.astype(bool) != b) for a, b in pairs)
        gaps = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), target, ours)
        gap = jnp.max(jnp.stack(jax.tree.leaves(gaps)))
        return theirs, their_state, our_state, off, gap

    choices = equal = different = 0
    worst, params = 0.0, start
    order = jax.random.permutation(jax.random.key(5), len(data.x))
    for i in range(pair.steps):
        rows = order[i * BATCH :][:BATCH]
        params, their_state, our_state, off, gap = step(
            params, their_state, our_state, rows
        )
        worst = max(worst, float(gap))
        if pair.masks_of or bool(pruner.scheduler.is_mask_update_iter(i)):
            choices, equal = choices + 1, equal + int(off == 0)
            different += int(off)
    return choices, equal, different, worst


def kernels(masks: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(masks) if x.ndim == 2]


def main() -> None:
    data = demo.load_fashion(demo.FASHION)
    net = demo.LeNet().init(jax.random.key(1), data.x[:1])["params"]
    start = {name: {"kernel": layer["kernel"]} for name, layer in net.items()}
    print("| algorithm | choices | equal | entries that differ | weights differ by |")
    print("| :-- | --: | --: | --: | --: |")
    for name, pair in PAIRS.items():
        choices, equal, different, gap = run(pair, start, data)
        print(f"| {name} | {choices} | {equal} | {different} | {gap:.1e} |", flush=True)


if __name__ == "__main__":
    main()
