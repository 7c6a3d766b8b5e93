"""The shape of the package: imports point down, files are short, JAX is public JAX."""

import ast
from pathlib import Path

import pytest

import jaxcomp


ROOT = Path(jaxcomp.__file__).parent

# DESIGN.md, "Files and levels". A room is a file or a folder of the package.
LEVELS = {
    **dict.fromkeys(["_check", "_extremes", "bits", "cuts", "node", "tables"], 0),
    **dict.fromkeys(["tree", "entropy", "coders", "schedules"], 1),
    **dict.fromkeys(["prune", "quant", "share", "lowrank"], 2),
    **dict.fromkeys(["train", "storage", "testing", "program", "solve"], 3),
    **dict.fromkeys(["distill", "report", "plot", "difference", "inspection"], 4),
    **dict.fromkeys(["compress", "recipe"], 5),
    **dict.fromkeys(["demo", "cli", "commands"], 6),
    "jaxcomp": 7,  # __init__.py
}
ALONE = (2, 3)  # rooms of these levels do not import each other

FILES = sorted(ROOT.rglob("*.py"))


def imported(source, package):
    """The absolute names of all modules that a file of ``package`` may import."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -(node.level - 1) or None]
            base = ".".join(parents) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(name):
    """The room of an absolute name, or None if it is somebody else's.

    >>> room_of("jaxcomp.quant.grid.QTensor"), room_of("jaxcomp.__version__")
    ('quant', 'jaxcomp')
    """
    first, *rest = name.split(".")
    if first != "jaxcomp":
        return None
    is_room = rest and any(
        (ROOT / rest[0]).with_suffix(s).exists() for s in ("", ".py")
    )
    return rest[0] if is_room else "jaxcomp"


def faults(room, source, package):
    """What the imports of a file do that they must not."""
    ours = LEVELS[room]
    for name in imported(source, package):
        if "jax._src" in name:
            yield f"imports {name}, which is not public"
        other = room_of(name)
        if other is None or other == room:
            continue
        if LEVELS[other] > ours:
            yield f"imports {name}, upwards from level {ours} to {LEVELS[other]}"
        if LEVELS[other] == ours and ours in ALONE:
            yield f"imports {name}, sideways at level {ours}"


def place(path):
    """(room, package) of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    room = "jaxcomp" if parts == ("__init__",) else parts[0]
    return room, ".".join(["jaxcomp", *parts[:-1]])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_and_never_sideways(path):
    room, package = place(path)
    assert room in LEVELS, f"give the new room {room!r} a level here and in DESIGN.md"
    assert not list(faults(room, path.read_text(), package))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_over_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_reaches_into_the_private_parts_of_jax(path):
    assert "jax._src" not in path.read_text()


def test_every_room_of_the_package_is_found():
    assert {place(path)[0] for path in FILES} >= {
        *("_check", "bits", "node", "tree", "entropy", "prune", "quant", "share"),
        *("train", "storage", "distill", "jaxcomp"),
    }


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("node", "from jaxcomp.tree import select", "upwards from level 0 to 1"),
        ("tree", "def f():\n    import jaxcomp.prune.top", "upwards from level 1 to 2"),
        ("storage", "from jaxcomp import distill", "upwards from level 3 to 4"),
        ("demo", "import jaxcomp as jc", "upwards from level 6 to 7"),
        ("demo", "from jaxcomp import quantize", "upwards from level 6 to 7"),
        ("share", "from jaxcomp.prune import masks", "sideways at level 2"),
        ("share", "from ..prune import masks", "sideways at level 2"),
        ("share", "from .. import prune", "sideways at level 2"),
        ("train", "from jaxcomp.storage import save", "sideways at level 3"),
        ("tree", "from jax._src import core", "which is not public"),
        ("tree", "from jax import _src", "which is not public"),
        ("tree", "import jax._src.core", "which is not public"),
    ],
)
def test_a_wrong_import_is_found(room, source, found):
    assert [found in fault for fault in faults(room, source, f"jaxcomp.{room}")] == [
        True
    ]


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("share", "from jaxcomp.share.kmeans import assign"),
        ("share", "from .kmeans import assign"),
        ("share", "from jaxcomp import _check\nfrom jaxcomp import bits as packing"),
        ("bits", "from jaxcomp import _check"),
        ("storage", "from jaxcomp.quant import QTensor\nimport jax, numpy as np"),
    ],
)
def test_a_right_import_is_not(room, source):
    assert not list(faults(room, source, f"jaxcomp.{room}"))
