"""Scores that come from a loss or from the whole function, and pruning in rounds.

They are made for weights that have not been trained yet, and hold for trained ones too.
A tree of them becomes a `Score` by `given`, or `masks_in_rounds` asks for one a round.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp.node import (
    DependentArray,
    dense_of,
    flatten,
    is_compressed,
    resolver,
)
from jaxcomp.prune.budgets import Budget, global_budget
from jaxcomp.prune.oneshot import unique_names
from jaxcomp.prune.scores import Score
from jaxcomp.prune.top import check_sparsity
from jaxcomp.tree import (
    Where,
    check_finite,
    is_matrix,
    join,
    list_paths,
    select,
    split,
)


def given(scores: Any) -> Score:
    """A score that is read off a tree of scores, by path.

    Args:
      scores: a tree of float[*shape] shaped like the params: what `saliency`, `grasp`
        or `synflow` returns, or any other.

    Returns:
      A `Score`: tree of float[*shape] -> their scores. It raises a ValueError if it is
      asked for a path that ``scores`` does not have, or has in another shape.

    >>> import jaxcomp as jc
    >>> params = {"kernel": jnp.array([[3.0, 2.0, 1.0]])}
    >>> scores = {"kernel": jnp.array([[0.0, 5.0, 4.0]])}
    >>> jc.prune.masks(params, 1 / 3, score=given(scores))
    {'kernel': Array([[False,  True,  True]], dtype=bool)}
    """

    def score(params: Any) -> Any:
        paths, leaves, treedef = flatten(params)
        names = unique_names(paths)
        found = _by_name("given", scores, dict(zip(names, leaves, strict=True)))
        return jax.tree.unflatten(treedef, [found[name] for name in names])

    return score


def saliency(loss: Callable[[Any], jax.Array], params: Any) -> Any:
    """How much the loss would change without each weight, to first order.

    Lee, Ajanthan and Torr, "SNIP: Single-shot Network Pruning based on Connection
    Sensitivity", arXiv:1810.02340, at initialisation; the first-order Taylor score on
    trained weights. The paper divides by the sum of all scores, which changes no order.

    Args:
      loss: params -> float[]; it closes over a batch.
      params: any pytree. A node counts as its dense array; tied leaves need a ``loss``
        that calls `densify`.

    Returns:
      A tree of ``|w * dloss/dw|`` shaped like ``params``: float[*shape], float32 for
      narrower weights; zeros of float32 for leaves that are not floating.

    Raises:
      TypeError: ``loss`` does not return one floating number.

    >>> saliency(lambda p: jnp.sum(p["a"] ** 2), {"a": jnp.array([1.0, -3.0])})
    {'a': Array([ 2., 18.], dtype=float32)}
    """
    values, rest = parted(params)
    slopes = jax.grad(checked_loss("saliency", loss, rest))(values)
    return jax.tree.map(jnp.abs, products(values, slopes, rest))


def grasp(loss: Callable[[Any], jax.Array], params: Any) -> Any:
    """How much each weight carries of the gradient flow: the weight times ``H g``.

    Wang, Zhang and Grosse, "Picking Winning Tickets Before Training by Preserving
    Gradient Flow", arXiv:2002.07376. The paper's score is ``-w * (H g)`` and it removes
    the largest; here higher is better, so the sign is the other. Its loss divides the
    logits by a temperature of 200: do that in ``loss``.

    Args:
      loss: params -> float[]; it closes over a batch, in the paper one with equally
        many examples of each class.
      params: any pytree, as for `saliency`.

    Returns:
      A tree of ``w * (H g)`` shaped like ``params``, for the gradient ``g`` and the
      Hessian ``H`` of the loss; dtypes as `saliency`. Scores may be negative.

    Raises:
      TypeError: ``loss`` does not return one floating number.

    >>> loss = lambda p: (3 * p["a"] ** 2 + p["b"] ** 2) / 2
    >>> grasp(loss, {"a": jnp.array(1.0), "b": jnp.array(2.0)})
    {'a': Array(9., dtype=float32), 'b': Array(4., dtype=float32)}
    """
    values, rest = parted(params)
    slopes, hessian_times = jax.linearize(
        jax.grad(checked_loss("grasp", loss, rest)), values
    )
    return products(values, hessian_times(slopes), rest)


def synflow(f: Callable[[Any, Any], jax.Array], params: Any, x: Any) -> Any:
    """How much of what flows through the network passes each weight; needs no data.

    Tanaka et al., "Pruning neural networks without any data by iteratively conserving
    synaptic flow", arXiv:2006.05467: ``|w| * dR/d|w|``, where R is the sum of the
    outputs for absolute weights and an input of ones. Use it with `masks_in_rounds`.

    R is a product over the layers. In a deep network it overflows float32, where the
    authors use float64: let ``f`` divide its weights by a constant, which changes no
    order if there are no biases. Leave normalisation layers out of ``f``, or in
    inference mode.

    Args:
      f: (params, x) -> float[...].
      params: any pytree, as for `saliency`. All floating leaves are made absolute,
        biases too.
      x: float[batch, ...], an array or a `jax.ShapeDtypeStruct`: shape and dtype of the
        input. A batch of one is enough.

    Returns:
      A tree of scores shaped like ``params``, none negative; dtypes as `saliency`. Of
      a relu network without biases, those of each layer add up to R.

    Raises:
      TypeError: ``x`` or the output of ``f`` is not a floating array.

    >>> params = {"in": jnp.array([[1.0, -2.0]]), "out": jnp.array([[3.0], [-1.0]])}
    >>> f = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
    >>> synflow(f, params, jax.ShapeDtypeStruct((1, 1), jnp.float32))
    {'in': Array([[3., 2.]], dtype=float32),
     'out': Array([[3.],
           [2.]], dtype=float32)}
    """
    if not _check.is_floating(x):
        raise TypeError(
            f"synflow needs a floating x, got {_word(x)}. Let f begin where its input "
            "is floating, e.g. behind an embedding."
        )
    values, rest = parted(params)
    sizes = jax.tree.map(jnp.abs, values)

    def flow(sizes: Any) -> jax.Array:
        outputs = f(join(sizes, rest), jnp.ones(x.shape, x.dtype))
        if not _check.is_floating(outputs):
            raise TypeError(
                "synflow needs f(params, x) to return a floating array, got "
                f"{_word(outputs)}. Return the logits alone."
            )
        return jnp.sum(outputs, dtype=_check.wide(outputs.dtype))

    return products(sizes, jax.grad(flow)(sizes), rest)


def masks_in_rounds(
    score_of: Callable[[Any], Any],
    params: Any,
    sparsity: float | jax.Array | Mapping[str, float],
    *,
    rounds: int = 100,
    budget: Budget = global_budget,
    where: Where = is_matrix,
) -> Any:
    """Masks that are reached little by little, with fresh scores after every round.

    Tanaka et al., "Pruning neural networks without any data by iteratively conserving
    synaptic flow", arXiv:2006.05467, algorithm 1: a fraction ``(1 - sparsity) ** (k /
    rounds)`` of the weights is left after round k. A weight that is gone scores
    ``-inf`` from then on, whatever ``score_of`` says, so masks only shrink; in the
    paper it scores 0, the least that its own score can be.

    Args:
      score_of: params -> tree of scores shaped like them, higher is better, e.g.
        ``lambda params: synflow(f, params, x)``. It is traced once, and sees the params
        as they are masked so far, selected nodes as arrays.
      params: any pytree of arrays and nodes.
      sparsity: fraction of the selected entries to remove, in [0, 1); with
        `leaf_budget` also path -> fraction.
      rounds: how many times to score and prune.
      budget: how the fraction is shared out.
      where: (path, leaf) -> bool.

    Returns:
      Masks as those of `masks`, with the same counts: a tree of bools shaped like
      ``params``, the scalar True where not selected.

    Raises:
      ValueError: ``rounds`` is less than 1, what `masks` raises, or ``score_of`` does
        not return scores of the shapes of the selected leaves.

    >>> params = {"in": jnp.array([[1.0, -2.0]]), "out": jnp.array([[9.0], [3.0]])}
    >>> f = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
    >>> x = jnp.ones((1, 1))
    >>> masks_in_rounds(lambda p: synflow(f, p, x), params, 0.5, rounds=4)
    {'in': Array([[ True, False]], dtype=bool), 'out': Array([[ True],
           [False]], dtype=bool)}
    """
    _check.integer_within("masks_in_rounds", "rounds", rounds, 1, 2**31 - 1)
    for fraction in jax.tree.leaves(sparsity):
        check_sparsity("masks_in_rounds", fraction)
    chosen = jax.tree.leaves(select(params, where, compressed=True))
    paths, leaves, treedef = flatten(params)
    names = unique_names(paths)
    taken = [name for name, is_taken in zip(names, chosen, strict=True) if is_taken]
    whole = dict(zip(names, leaves, strict=True))

    def masks_of(scores: Mapping[str, jax.Array], fraction: Any) -> Any:
        # JAX gives a dict back sorted by key, where layer/10 comes before layer/2.
        return budget({name: scores[name] for name in taken}, fraction)

    @jax.jit
    def run(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def prune_and_score(k: Any, scores: Any) -> Any:
            masks = masks_of(
                scores,
                jax.tree.map(lambda s: 1 - (1 - s) ** (k / rounds), sparsity),
            )
            masked = {
                name: jnp.where(masks[name], w, jnp.zeros((), w.dtype))
                for name, w in weights.items()
            }
            tree = jax.tree.unflatten(treedef, list((whole | masked).values()))
            fresh = _by_name("masks_in_rounds", score_of(tree), masked)
            return {
                name: jnp.where(masks[name], score.astype(jnp.float32), -jnp.inf)
                for name, score in fresh.items()
            }

        # Round 0 removes nothing, so its scores may be anything. The last masks are
        # chosen outside, for the sparsity as it was given: exact, and one trace.
        start = {name: jnp.zeros(w.shape, jnp.float32) for name, w in weights.items()}
        scores = jax.lax.fori_loop(0, rounds, prune_and_score, start)
        return masks_of(scores, sparsity)

    held = resolver("masks_in_rounds", paths, leaves)
    weights = {name: dense_of(held(names.index(name))) for name in taken}
    check_finite("masks_in_rounds", list(weights.items()))
    found = run(weights)
    keep = jnp.ones((), bool)
    return jax.tree.unflatten(treedef, [found.get(name, keep) for name in names])


def _by_name(caller: str, scores: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The score of each weight, once it is known to be there and to fit."""
    paths, values, _ = flatten(scores)
    table = dict(zip(unique_names(paths), values, strict=True))
    for name, weight in weights.items():
        if name not in table:
            raise ValueError(
                f"{caller} needs a score for leaf {name!r}, got scores for "
                f"{list_paths(list(table)) or 'no leaf'}. Make them with the shape of "
                "params, as `saliency(loss, params)` does."
            )
        score = table[name]
        if not _check.is_array(score) or score.shape != weight.shape:
            raise ValueError(
                f"{caller} needs a score of shape {list(weight.shape)} for leaf "
                f"{name!r}, got {_word(score)}. Make it with the shape of the leaf."
            )
    return {name: table[name] for name in weights}


def _word(x: Any) -> str:
    return _check.describe(x) if _check.is_array(x) else repr(x)


def parted(params: Any) -> tuple[Any, Any]:
    """What to differentiate by, and the rest: `split`, with nodes as their arrays."""
    _, leaves, treedef = flatten(params)
    values = [
        leaf.dense()
        if is_compressed(leaf) and not isinstance(leaf, DependentArray)
        else leaf
        for leaf in leaves
    ]
    return split(jax.tree.unflatten(treedef, values))


def checked_loss(
    caller: str, loss: Callable[[Any], jax.Array], rest: Any
) -> Callable[[Any], jax.Array]:
    """The loss as a function of the floating leaves, checked to give one number."""

    def checked(values: Any) -> jax.Array:
        value = loss(join(values, rest))
        if not _check.is_floating(value) or value.shape:
            raise TypeError(
                f"{caller} needs loss(params) to return one floating number, float[], "
                f"got {_word(value)}. Take its mean, and leave metrics out."
            )
        return value

    return checked


def products(values: Any, slopes: Any, rest: Any) -> Any:
    """Weights times slopes; zeros where there is no slope."""

    def product(value: jax.Array, slope: jax.Array) -> jax.Array:
        wide = _check.wide(value.dtype)  # float16 has no room for such products
        return value.astype(wide) * slope.astype(wide)

    def zeros(leaf: Any) -> jax.Array:
        shape = leaf.shape if _check.is_array(leaf) else ()
        return jnp.zeros(shape, jnp.float32)

    return join(jax.tree.map(product, values, slopes), jax.tree.map(zeros, rest))
