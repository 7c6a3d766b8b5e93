"""Checkpoints of any format, opened leaf by leaf."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxcomp import _check
from jaxcomp.difference import leaves_of
from jaxcomp.node import is_compressed
from jaxcomp.storage import open_file, read_checkpoint
from jaxcomp.storage.named_arrays import read_safetensors


INDEX = ".safetensors.index.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Watched(Mapping[str, Any]):
    """The leaves of a checkpoint by path, each read when it is asked for.

    Attributes:
      leaves: gives them.
      sizes: the bytes of each.
      format: "jaxcomp", whose leaves have checksums, or what others call theirs.
      tell: is told the bytes of each leaf that was read.
    """

    leaves: Mapping[str, Any]
    sizes: dict[str, int]
    format: str
    tell: Callable[[int], Any] = lambda size: None

    def __getitem__(self, path: str) -> Any:
        leaf = self.leaves[path]
        self.tell(self.sizes[path])
        return leaf

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())


def open_leaves(path: Path) -> Watched:
    """The leaves of a checkpoint of any format; those of jaxcomp's own are left there.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged, or its name says no format that is known.
    """
    if is_own(path):
        own = open_file(path)
        own.check_pool()
        return Watched(own, own.sizes, "jaxcomp")
    found = leaves_of(read_checkpoint(path))
    kind = "folder" if path.is_dir() else path.suffix.removeprefix(".")
    sizes = {name: nbytes(leaf) for name, leaf in found.items()}
    return Watched(found, sizes, "shards" if path.name.endswith(INDEX) else kind)


def nbytes(leaf: Any) -> int:
    """The bytes of a leaf that is in memory, or mapped."""
    if is_compressed(leaf):
        return -(-leaf.nbits() // 8)
    return leaf.nbytes if _check.is_array(leaf) else 0


def size_on_disk(path: Path) -> int:
    """The bytes of a file, a folder, or an index and its shards."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    size = path.stat().st_size
    if path.name.endswith(INDEX):
        shards = set(json.loads(path.read_bytes())["weight_map"].values())
        size += sum(path.with_name(shard).stat().st_size for shard in shards)
    return size


def is_own(path: Path) -> bool:
    """Whether `save` wrote it."""
    if path.suffix == ".safetensors" and path.is_file():
        return "jaxcomp" in read_safetensors(path)[0]
    return path.suffix == ".jxc"
