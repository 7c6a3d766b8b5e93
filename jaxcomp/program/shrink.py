"""A function of fewer parameters: groups of slices really removed.

The program is walked once more with the smaller parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.node import densify, flatten
from jaxcomp.program.axes import Rule
from jaxcomp.program.coupling import Groups, analyse, grouped
from jaxcomp.program.rebuild import REBUILDS, Rebuild, Run, taken
from jaxcomp.program.rules import RULES
from jaxcomp.prune.groups import Family, Keep, gone_slices


class Shrunk(NamedTuple):
    """What `shrink` gives."""

    function: Callable[..., Any]  # (smaller params, *inputs) -> as the function before
    params: Any  # the smaller ones
    widths: dict[str, tuple[int, ...]]  # path -> shape, of all that became smaller


def shrink(
    f: Callable[..., Any],
    params: Any,
    keep: Keep,
    *inputs: Any,
    rules: Mapping[str, Rule] = RULES,
    rebuilds: Mapping[str, Rebuild] = REBUILDS,
) -> Shrunk:
    """Removes groups of slices, so that ``f`` computes less.

    The result is the function with the removed slices at zero, to float precision,
    where a family is exact. Where a mean spans a family, as layer norms do the residual
    stream, it is ``f`` as it would be if written for the smaller shapes.

    Args:
      f: (params, *inputs) -> any pytree.
      params: any pytree of arrays; nodes are densified.
      keep: name of a family of `coupled_groups` -> bool[groups], which stay. A family
        that is left out stays whole.
      *inputs: arrays or shapes, of the shapes that ``f`` takes.
      rules: as in `coupled_groups`.
      rebuilds: primitive -> how to bind it to smaller arrays, if it holds shapes.

    Returns:
      `Shrunk`, the function, the parameters, the widths. The function traces ``f``
      where it is called, so call it under `jax.jit`; it has derivatives and takes other
      shapes of inputs. Constants that ``f`` computes from a width of its own, such as
      the scale of attention, stay what they were.

    Raises:
      ValueError: a family is not known, a mask has the wrong length, or nothing is left
        of an axis.

    >>> f = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    >>> keep = {"units of up": np.array([True, False, True, False])}
    >>> g, smaller, widths = shrink(f, params, keep, jnp.ones((5, 3)))
    >>> widths, g(smaller, jnp.ones(3))
    ({'down': (2, 2), 'up': (3, 2)}, Array([6., 6.], dtype=float32))
    """
    params = densify(params)
    shapes = jax.eval_shape(lambda: params)
    found = analyse(f, shapes, inputs, rules)
    groups = grouped(found)
    slices = gone_slices("shrink", groups.families, keep)
    smaller = cut(params, params, groups, keep)
    new = jax.eval_shape(lambda: smaller)

    def g(params: Any, *inputs: Any) -> Any:
        params = densify(params)
        _check_shapes(params, new)
        found = analyse(f, shapes, inputs, rules)
        run = Run(found, slices, rebuilds)
        leaves = [*flatten(params)[1], *found.program.inputs]
        outs = map(jnp.asarray, run.plan(found.plan, leaves))
        return jax.tree.unflatten(found.program.out_tree, outs)

    jax.eval_shape(g, new, *inputs)  # an axis of which nothing is left shows now
    pairs = zip(*flatten(shapes)[:2], flatten(new)[1], strict=True)
    widths = {path: b.shape for path, a, b in pairs if a.shape != b.shape}
    return Shrunk(g, smaller, widths)


def cut(tree: Any, params: Any, families: Groups | Sequence[Family], keep: Keep) -> Any:
    """Removes the same slices from what belongs to the parameters.

    Args:
      tree: the state of an optimizer, averages of parameters, parameters themselves.
      params: the parameters before, or their shapes.
      families: as found by `coupled_groups`.
      keep: as in `shrink`.

    Returns:
      ``tree`` with a cut in every leaf that has the shape of a parameter and a path
      that ends in its path; all other leaves as they are.

    Raises:
      ValueError: as `shrink`; or a leaf has the path of a parameter that is cut, but
        neither its shape nor a single entry, as in factored second moments.

    >>> f = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    >>> from jaxcomp.program import coupled_groups
    >>> groups = coupled_groups(f, params, jnp.ones((5, 3)))
    >>> keep = {"units of up": np.arange(4) < 3}
    >>> jax.tree.map(jnp.shape, cut({"mu": params}, params, groups, keep))
    {'mu': {'down': (3, 2), 'up': (3, 3)}}
    """
    if isinstance(families, Groups):
        families = families.families
    slices = gone_slices("cut", families, keep)
    owned: dict[str, dict[int, np.ndarray]] = {}
    for (path, axis), gone in slices.items():
        owned.setdefault(path, {})[axis] = gone
    paths, leaves, _ = flatten(params)
    shapes = dict(zip(paths, map(np.shape, leaves), strict=True))
    paths, leaves, treedef = flatten(tree)
    mine = {}  # of each leaf that is cut, what is kept of its axes
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        parts = path.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        own = next((end for end in ends if end in shapes), None)
        if own not in owned or np.size(leaf) == 1:
            continue
        if np.shape(leaf) != shapes[own]:
            raise ValueError(
                f"cut needs leaves shaped like the parameters, got {path!r} of shape "
                f"{np.shape(leaf)} for {own!r} of shape {shapes[own]}. Make this state "
                "anew from the smaller parameters."
            )
        mine[i] = {
            axis: np.delete(np.arange(leaf.shape[axis]), gone)
            for axis, gone in owned[own].items()
        }

    @jax.jit  # compiled once, not for every leaf
    def less(leaves: dict[int, Any]) -> dict[int, Any]:
        for i, kept in mine.items():
            for axis, indices in kept.items():
                leaves[i] = taken(leaves[i], indices, axis)
        return leaves

    found = less({i: leaves[i] for i in mine})
    return jax.tree.unflatten(treedef, [found.get(i, x) for i, x in enumerate(leaves)])


def _check_shapes(params: Any, new: Any) -> None:
    paths, leaves, _ = flatten(params)
    wanted = dict(zip(*flatten(new)[:2], strict=True))
    if missing := [path for path in wanted if path not in paths]:
        raise ValueError(
            f"a function from shrink needs the smaller parameters, got none at "
            f"{missing[0]!r}."
        )
    for path, leaf in zip(paths, leaves, strict=True):
        if path not in wanted or np.shape(leaf) != wanted[path].shape:
            has = f"of shape {wanted[path].shape}" if path in wanted else "none there"
            raise ValueError(
                f"a function from shrink needs the smaller parameters, {has} at "
                f"{path!r}, got shape {np.shape(leaf)}."
            )
