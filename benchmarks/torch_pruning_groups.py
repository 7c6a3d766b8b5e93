"""Coupled groups beside those that Torch-Pruning finds, on the same architectures.

    python -m benchmarks.torch_pruning_groups

Needs torch and torch-pruning. The JAX side are models of the tests; each has a twin in
torch with the same names, weights and outputs. Of every group the entries that go are
compared: ours as `coupled_groups` has them, Torch-Pruning's read off a twin whose
weights are their own numbers, after it was pruned. Then both lose every second group of
every family, the same ones where they have the same ones. It takes two minutes on one
core.
"""

import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import jaxcomp as jc
from benchmarks.torch_twins import PAIRS, Entries, Net, converted, twin_of
from jaxcomp.node import flatten
from jaxcomp.program.coupling import coupled_groups
from jaxcomp.program.shrink import shrink
from tests.program.zoo.model import Model


def ours(net: Net, params: Any, families: Any) -> list[list[Entries]]:
    """What each group of each family removes."""
    paths, leaves, treedef = flatten(params)

    def entries(group: Any) -> Entries:
        gone = [np.zeros(np.shape(x), np.float32) for x in leaves]
        for path, axis, indices in group:
            np.moveaxis(gone[paths.index(path)], axis, 0)[indices] = 1
        masks = converted(net, jax.tree.unflatten(treedef, gone)).items()
        return frozenset((k, i) for k, x in masks for i in np.flatnonzero(x).tolist())

    return [[entries(group) for group in family.groups] for family in families]


class Theirs(NamedTuple):
    """A family of Torch-Pruning's: what its pruners take at once."""

    root: str  # the layer that is pruned first
    side: str  # of it: in or out
    units: list[list[int]]
    heads: tuple[str, ...]  # layers that have one head less for each unit


def theirs(net: Net, inputs: Any, ends: list[nn.Module]) -> list[Theirs]:
    """Its groups of full layers, in the units of `BasePruner`."""
    graph = tp.DependencyGraph().build_dependency(net, inputs, verbose=False)
    names = {module: name for name, module in net.named_modules()}
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.LSTM)
    is_out = graph.is_out_channel_pruning_fn
    found = []
    for group in graph.get_all_groups(ends, kinds):
        sides = [
            (dep.target.module, "out" if is_out(dep.handler) else "in")
            for dep, _ in group
        ]
        heads = [m for m, side in sides if side == "out" and hasattr(m, "heads")]
        root = 0
        if heads:  # the layer behind is pruned first
            into = [isinstance(m, nn.Linear) and side == "in" for m, side in sides]
            if not any(into):
                continue
            root = into.index(True)
        # One channel of every group, or of every head, goes at once.
        count = max([m.heads for m in heads], default=1)
        for module, side in sides:
            if getattr(module, "groups", 0) != getattr(module, "out_channels", 1):
                pruner = graph.get_pruner_of_module(module)
                count = max(
                    count, getattr(pruner, f"get_{side}_channel_groups")(module)
                )
        module, side = sides[root]
        rows = np.arange(len(group[root].idxs)).reshape(count, -1)
        found.append(Theirs(names[module], side, rows.T.tolist(), ()))
        if len({m.heads for m in heads}) == 1:
            layers = tuple(names[m] for m in heads)
            found.append(Theirs(names[module], side, rows.tolist(), layers))
    return found


Cuts = dict[tuple[str, str], list[int]]  # layer, side of it -> indices that go


def pruned(net: Net, inputs: Any, cuts: Cuts) -> Net:
    """A copy that Torch-Pruning has pruned."""
    net = copy.deepcopy(net)
    graph = tp.DependencyGraph().build_dependency(net, inputs, verbose=False)
    for (root, side), indices in cuts.items():
        layer = net.get_submodule(root)
        prune = getattr(graph.get_pruner_of_module(layer), f"prune_{side}_channels")
        graph.get_pruning_group(layer, prune, sorted(set(indices))).prune()
    return net


def gone(net: Net, inputs: Any, cuts: Cuts) -> Entries:
    """The entries that a pruning removes."""
    net = copy.deepcopy(net)
    for x in net.state_dict().values():
        x.copy_(torch.arange(x.numel()).reshape(x.shape))
    every, left = (
        {(k, int(i)) for k, x in m.state_dict().items() for i in x.flatten()}
        for m in (net, pruned(net, inputs, cuts))
    )
    return frozenset(every - left)


def masked(net: Net, entries: Entries) -> Net:
    net = copy.deepcopy(net)
    for name, i in entries:
        net.state_dict()[name].view(-1)[i] = 0
    return net


def run(net: Net, inputs: Any) -> np.ndarray:
    y = net(*inputs).detach().numpy()
    return np.moveaxis(y, 1, 3) if y.ndim == 4 else y


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def gap(a: Any, b: Any) -> str:
    return f"{np.abs(np.asarray(a) - b).max():.0e}"


def half(
    net: Net, inputs: Any, rows: Any, known: set[Entries], dropped: set[Entries]
) -> tuple[Net, Entries]:
    """Every second unit goes; of those that we know, the ones that we drop."""
    cuts: Cuts = {}
    fewer: dict[str, int] = {}
    for family, row in rows:
        units = [
            unit
            for i, (unit, entries) in enumerate(zip(family.units, row, strict=True))
            if (entries in dropped if entries in known else i % 2)
        ]
        cuts.setdefault(family[:2], []).extend(i for unit in units for i in unit)
        fewer |= dict.fromkeys(family.heads, len(units))
    less = pruned(net, inputs, cuts)
    for layer, n in fewer.items():
        less.get_submodule(layer).heads -= n
    return less, gone(net, inputs, cuts)


def compare(name: str, model: Model, f: Any, more: Any = None) -> tuple[str, str, list]:
    """A row of groups, a row of sizes, and what only one side has."""
    net = twin_of(model.params, f, more or {})
    seen = [x for x in model.inputs if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    drawn = len(seen) < len(model.inputs)  # random bits, none of them in torch
    images = (np.moveaxis(x, 3, 1) if x.ndim == 4 else np.asarray(x) for x in seen)
    inputs = tuple(map(torch.tensor, images))
    if not drawn:
        y = jax.jit(model.f)(model.params, *model.inputs)
        np.testing.assert_allclose(run(net, inputs), y, atol=2e-6)
    last = {path for (path, _), word in model.frozen.items() if word == "output"}
    ends = [net.get_submodule(path.split("/")[-2]) for path in last]

    families = coupled_groups(model.f, model.params, *model.inputs).families
    mine = list(zip(families, ours(net, model.params, families), strict=True))
    other: list[tuple[Theirs, list[Any]]] = []
    for found in theirs(net, inputs, ends):
        other.append((found, []))
        for unit in found.units:
            try:
                other[-1][1].append(gone(net, inputs, {found[:2]: unit}))
            except Exception as error:
                other[-1][1].append(first_line(error))
    known, others = ({e for _, row in side for e in row} for side in (mine, other))
    notes = []
    for family, row in mine:
        if only := set(row) - others:
            notes.append(f"only ours: {len(only)} of {len(row)}, {family.name}")
    for found, row in other:
        if only := [entries for entries in row if entries not in known]:
            kind = "heads" if found.heads else f"{found.side}-channels"
            part = f"{len(only)} of {len(row)}, {kind} of {found.root}"
            errors = {entries for entries in only if isinstance(entries, str)}
            notes.append("; ".join([f"only theirs: {part}", *sorted(errors)]))
    counts = [
        len(mine),
        len(other),
        *(sum(len(r) for _, r in x) for x in (mine, other)),
    ]
    equal = "yes" if known == others else "no"

    def shrunk(some: Any) -> tuple[Any, Any]:
        keep = {family.name: np.arange(family.size) % 2 == 0 for family, _ in some}
        small = shrink(model.f, model.params, keep, *model.inputs)
        return small, jax.jit(small.function)(small.params, *model.inputs)

    dropped = {entries for _, row in mine for entries in row[1::2]}
    small, y = shrunk(mine)
    before = jc.count(model.f, model.params, *model.inputs)
    after = jc.count(small.function, small.params, *model.inputs)
    # Without the families that a mean spans, which cannot be the same as masked.
    exact = [(family, row) for family, row in mine if family.exact]
    spanned = {e for family, row in mine if not family.exact for e in row}
    rest = [(found, row) for found, row in other if spanned.isdisjoint(row)]
    lost = frozenset().union(*(e for _, row in exact for e in row[1::2]))
    own = "" if drawn else gap(shrunk(exact)[1], run(masked(net, lost), inputs))
    left = products = its = outputs = their = ""
    try:
        less, went = half(net, inputs, rest, known, dropped)
        their = gap(run(less, inputs), run(masked(net, went), inputs))
    except Exception as error:
        notes.append(f"theirs, without norms: {first_line(error)}")
    try:
        less, went = half(net, inputs, other, known, dropped)
        left = sum(x.numel() for x in less.state_dict().values() if x.ndim)
        with FlopCounterMode(display=False) as flops:
            z = run(less, inputs)
        products = flops.get_total_flops() // 2
        ops, _ = tp.utils.count_ops_and_params(less, inputs)
        its = int(ops * len(inputs[0]))  # it counts one of the batch
        outputs = gap(y, z) if went == frozenset().union(*dropped) and not drawn else ""
    except Exception as error:
        notes.append(f"theirs: {first_line(error)}")
    sizes = [before.parameters, after.parameters, left, before.multiply_adds]
    sizes += [after.multiply_adds, products, its, outputs, own, their]
    return cells(name, *counts, equal), cells(name, *sizes), notes


def cells(*values: Any) -> str:
    texts = (f"{x:,}" if isinstance(x, int) else x for x in values)
    return f"| {' | '.join(texts)} |"


def main() -> None:
    rows = {name: compare(name, *pair) for name, pair in PAIRS.items()}
    groups = ("families: ours", "theirs", "groups: ours", "theirs", "equal")
    sizes = (
        *("parameters", "ours", "theirs", "multiply-adds", "ours", "theirs"),
        *("its own count", "outputs", "ours to masked", "theirs to masked"),
    )
    for i, head in enumerate((groups, sizes)):
        print(cells("architecture", *head))
        print(cells(":--", *["--:"] * len(head)))
        print(*(row[i] for row in rows.values()), sep="\n", end="\n\n")
    for name, (_, _, notes) in rows.items():
        if notes:
            print(f"{name}:", *notes, sep="\n- ", end="\n\n")


if __name__ == "__main__":
    main()
