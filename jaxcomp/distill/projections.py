"""Learned projections between features of a student and of a wider teacher."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp import _check
from jaxcomp.distill.outputs import Outputs, outputs_of
from jaxcomp.node import DependentArray, densify, flatten
from jaxcomp.tree import list_paths


class Projected(NamedTuple):
    """A student whose features have the shapes of its teacher's.

    Attributes:
      f: (params, *inputs, **options) -> `Outputs`.
      params: {"student": the student's own, "projections": {name: {"kernel": float32[
        ours, theirs], "bias": float32[theirs]}}}, all to be trained.
    """

    f: Callable[..., Outputs]
    params: dict[str, Any]


def with_projections(
    key: jax.Array,
    student: Callable[..., Any],
    params: Any,
    teacher: Callable[..., Any],
    teacher_params: Any,
    *inputs: Any,
) -> Projected:
    """A student with a linear map from each of its features to its teacher's shape.

    The regressor of Romero et al., "FitNets: Hints for Thin Deep Nets",
    arXiv:1412.6550, section 2.2. There it is a convolution whose window is so wide that
    the sizes of the maps agree; here it is one of 1x1, a matrix along the last axis,
    after a linear `jax.image.resize`, with antialiasing, of the axes between the first
    and the last whose lengths differ. Features of equal shapes are left as they
    are. Nothing is computed of either model but shapes.

    Args:
      key: for the kernels, LeCun normal; biases are 0.
      student: (params, *inputs) -> `Outputs` with features float[batch, ..., ours]. One
        that needs a keyword, such as ``key``, is given it by `functools.partial`; what
        a call of the result passes goes before that.
      params: of the student, any pytree; it may be compressed, but not tied.
      teacher: (teacher_params, *inputs) -> `Outputs` with features float[batch, ...,
        theirs] of the same names.
      teacher_params: arrays, nodes or shapes.
      *inputs: arrays or shapes.

    Returns:
      `Projected`; its ``f`` and ``params`` take the place of the student's. When it is
      trained, ``params["student"]`` is the student alone. Projections are computed in
      float32. `Outputs.state` is put at the paths of the student.

    Raises:
      ValueError: a feature has no partner, or one of another rank or another first
        axis, there are no features, or the student has tied leaves.

    >>> def model(params, x):
    ...     hidden = x @ params["a"]
    ...     return Outputs(hidden @ params["b"], {"hidden": hidden})
    >>> small = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3))}
    >>> big = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 3))}
    >>> x, key = jnp.ones((5, 4)), jax.random.key(0)
    >>> f, params = with_projections(key, model, small, model, big, x)
    >>> params["projections"]["hidden"]["kernel"].shape
    (2, 8)
    >>> f(params, x).features["hidden"].shape
    (5, 8)
    """
    paths, leaves, _ = flatten(params)
    tied = [isinstance(leaf, DependentArray) for leaf in leaves]
    if any(tied):
        raise ValueError(
            "with_projections cannot nest tied leaves, which name others by their "
            f"path, got {paths[tied.index(True)]!r}. Call `densify` on the params."
        )
    ours = _shapes(student, params, inputs)
    theirs = _shapes(teacher, teacher_params, inputs)
    if ours.keys() != theirs.keys() or not ours:
        raise ValueError(
            "with_projections needs student and teacher to return features of the same "
            f"names, got {_listed(ours)} and {_listed(theirs)}. Rename or drop those "
            "without a partner."
        )
    targets = {}
    for name in sorted(ours):
        mine, wanted = ours[name], theirs[name]
        if mine.shape == wanted.shape:
            continue
        if len(mine.shape) != len(wanted.shape) or mine.shape[0] != wanted.shape[0]:
            raise ValueError(
                "with_projections needs features of one rank and one first axis, got "
                f"{_check.describe(mine)} and {_check.describe(wanted)} for {name!r}. "
                "Pool or reshape one of them; of layers that are stacked along the "
                "first axis select as many from both."
            )
        targets[name] = wanted.shape
    keys = jax.random.split(key, len(targets))
    make = jax.nn.initializers.lecun_normal()
    projections = {
        name: {
            "kernel": make(one, (ours[name].shape[-1], shape[-1]), jnp.float32),
            "bias": jnp.zeros(shape[-1], jnp.float32),
        }
        for one, (name, shape) in zip(keys, targets.items(), strict=True)
    }

    def f(params: Any, *inputs: Any, **options: Any) -> Outputs:
        found = outputs_of(student(params["student"], *inputs, **options))
        features = dict(found.features or {})
        for name, weights in params["projections"].items():
            x = jnp.asarray(features[name], jnp.float32)
            sizes = zip(x.shape, ours[name].shape, targets[name], strict=True)
            # The first axis and those that agreed are as long as they are now.
            space = [n if old == new else new for n, old, new in sizes][1:-1]
            shape = (x.shape[0], *space, x.shape[-1])
            x = x if shape == x.shape else jax.image.resize(x, shape, "linear")
            y = x @ weights["kernel"]
            features[name] = y + jnp.broadcast_to(weights["bias"], y.shape)
        state = None if found.state is None else {"student": found.state}
        return Outputs(found.logits, features, state)

    return Projected(f, {"student": params, "projections": projections})


def _shapes(f: Callable[..., Any], params: Any, inputs: Any) -> dict[str, Any]:
    def features(params: Any, inputs: Any) -> Any:
        return outputs_of(f(densify(params), *inputs)).features

    return jax.eval_shape(features, params, inputs)


def _listed(features: dict[str, Any]) -> str:
    return list_paths(sorted(features)) or "none"
