"""A teacher's logits on disk, computed once: safetensors shards in a folder.

Each shard holds whole batches; its structure (see storage/file.py) says which, of what
teacher and with what settings. The index is written last: without it, a folder is
incomplete, and `cache_teacher` goes on where it was stopped.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxcomp import _check
from jaxcomp.distill.losses.logits import check_temperature
from jaxcomp.distill.losses.sparse import SparseTargets, top_k_targets
from jaxcomp.distill.outputs import outputs_of
from jaxcomp.node import densify, path_of
from jaxcomp.storage.file import NATIVE, read_file, write_file


INDEX = "index.safetensors"
Part = dict[str, np.ndarray]  # by name, the examples along the first axis
_MEND = "Delete it and call cache_teacher again."


class CachedTeacher:
    """What `cache_teacher` wrote, read from disk as it is asked for.

    Attributes:
      path: the folder.
      settings: what it was made with: teacher (a checksum), top_k, temperature, dtype.
    """

    def __init__(self, path: Path, index: dict[str, Any]):
        self.path = path
        self.settings = index["settings"]
        self._ends = np.cumsum(index["rows"])
        self._opened: dict[int, dict[str, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, indices: Any) -> Any:
        """What the teacher said to some examples, in any order, as NumPy arrays.

        Args:
          indices: int[...], positions of examples in the order of the batches.

        Returns:
          Logits [..., *example], of the dtype of the cache; where the cache has a
          ``top_k``, `SparseTargets` of it, which hold at its temperature only.

        Raises:
          TypeError: the indices are not integers.
          IndexError: one of them is negative, or not below the number of examples.
          ValueError: a shard is missing, cut off or damaged.
        """
        indices = np.asarray(indices)
        if not np.issubdtype(indices.dtype, np.integer):
            raise TypeError(
                f"CachedTeacher.rows needs integers, got {_check.describe(indices)}."
            )
        asked = indices.reshape(-1)
        beyond = asked[(asked < 0) | (asked >= len(self))]
        if beyond.size:
            raise IndexError(
                f"CachedTeacher.rows needs 0 <= index < {len(self)}, the examples in "
                f"{self.path}, got {beyond[0]}."
            )
        homes = np.searchsorted(self._ends, asked, side="right")
        found = {
            name: np.empty((asked.size, *x.shape[1:]), x.dtype)
            for name, x in self._shard(0).items()
        }
        for home in np.unique(homes):
            here = homes == home
            for name, x in self._shard(int(home)).items():
                found[name][here] = x[asked[here] - (self._ends[home] - len(x))]
        shaped = {k: x.reshape(*indices.shape, *x.shape[1:]) for k, x in found.items()}
        if "logits" in shaped:
            return shaped["logits"]
        probs = np.exp(shaped["log_probs"].astype(np.float32))
        return SparseTargets(shaped["indices"].astype(np.int32), probs)

    def _shard(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of a shard, mapped; its checksums are read when it is opened."""
        if number not in self._opened:
            file = _file_of(self.path, number)
            _read(file, self.settings)
            self._opened[number] = _mapped(file)
        return self._opened[number]


def open_cache(path: str | os.PathLike) -> CachedTeacher:
    """Opens the folder that `cache_teacher` wrote.

    Raises:
      FileNotFoundError: there is no cache.
      ValueError: it is incomplete, or a shard is missing, cut off or damaged. What is
        in a shard is checked when it is first read.
    """
    folder = Path(path)
    if not (folder / INDEX).exists():
        if not _file_of(folder, 0).exists():
            raise FileNotFoundError(
                f"open_cache needs a folder that cache_teacher wrote, got {folder}, "
                f"which has no {INDEX}."
            )
        raise ValueError(
            f"open_cache needs a complete cache, but {folder} has shards and no "
            f"{INDEX}: its writer was stopped. Call cache_teacher again to go on."
        )
    index = _read(folder / INDEX)
    for number, size in enumerate(index["bytes"]):
        file = _file_of(folder, number)
        found = file.stat().st_size if file.exists() else 0
        if found != size:
            raise ValueError(
                f"open_cache needs {size} bytes of {file}, got {found}: it is "
                f"{'cut off' if found else 'missing'}. {_MEND}"
            )
    return CachedTeacher(folder, index)


def cache_teacher(
    teacher: Callable[[Any, Any], Any],
    teacher_params: Any,
    batches: Iterable[Any],
    path: Any,
    *,
    top_k: int | None = None,
    temperature: float = 1.0,
    dtype: DTypeLike = jnp.float16,
    shard_bytes: int = 2**26,
) -> CachedTeacher:
    """Runs a teacher once over all batches and keeps what it says in a folder.

    In float32 a loss of what is read back equals that of the live teacher, bit for bit.
    In float16 a logit ``z`` of at least 6.2e-5 in size is off by at most ``2**-11
    |z|``, a smaller one by 3e-8; in bfloat16 it is ``2**-8 |z|``. With ``top_k`` that
    holds for the logarithms of probabilities. Minus infinity is kept.

    Stopped and called again with the same arguments, it keeps the shards that are there
    and runs the teacher on the batches that are missing only. The code of ``teacher``
    is not looked at: use another folder for another function.

    Args:
      teacher: (teacher_params, inputs) -> float[batch, ..., classes] logits, or
        `Outputs`; run under jit.
      teacher_params: any pytree; it may be compressed.
      batches: trees of arrays, each the ``inputs`` of a call, in the same order always.
      path: the folder, made if there is none.
      top_k: most probable classes to keep, by `top_k_targets`; None keeps all logits.
      temperature: of the probabilities that ``top_k`` keeps, the one to train at.
      dtype: of what is stored: float16, bfloat16 or float32.
      shard_bytes: how large a shard grows before the next; it holds a batch at least.

    Returns:
      The `CachedTeacher`, for ``step(params, opt_state, cache.rows(i), (x[i], None))``
      with ``lambda spoken, x: spoken`` for a teacher.

    Raises:
      ValueError: an argument is out of range; a logit is NaN, plus infinity or too
        large for ``dtype``; there are no batches; the folder was made of another
        teacher, other settings or other inputs, or a shard in it is damaged.
      TypeError: the logits or ``dtype`` are not floating.

    >>> import tempfile
    >>> def double(params, x):
    ...     return params * x
    >>> batches = [jnp.ones((2, 3)), jnp.zeros((2, 3))]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache = cache_teacher(double, jnp.float32(2.0), batches, folder)
    ...     len(cache), cache.rows([3, 0])
    (4, array([[0., 0., 0.],
               [2., 2., 2.]], dtype=float16))
    """
    check_temperature("cache_teacher", temperature)
    if top_k is None and temperature != 1:
        raise ValueError(
            "cache_teacher needs no temperature where it keeps all logits, got "
            f"{temperature}. Pass it to the loss, or pass top_k."
        )
    if top_k is not None:
        top_k = _check.integer_within("cache_teacher", "top_k", top_k, 1, 2**31 - 1)
    if jnp.dtype(dtype).name not in ("float16", "bfloat16", "float32"):
        raise TypeError(
            "cache_teacher needs dtype float16, bfloat16 or float32, got "
            f"{jnp.dtype(dtype).name}."
        )
    settings = {
        "teacher": _checksum(teacher_params),
        "top_k": top_k,
        "temperature": float(temperature),
        "dtype": jnp.dtype(dtype).name,
    }

    @jax.jit
    def speak(params: Any, inputs: Any) -> dict[str, jax.Array]:
        return _said(teacher(densify(params), inputs), top_k, temperature)

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / INDEX
    planned = len(_read(index, settings)["rows"]) if index.exists() else None
    stream = iter(batches)
    shards: list[dict[str, Any]] = []
    begun = 0  # batches that are in the shards
    while True:
        file = _file_of(folder, len(shards))
        if file.exists():
            facts = _read(file, settings)
            _check_inputs(file, facts, stream, begun)
        elif len(shards) == planned:
            if next(stream, None) is not None:
                raise ValueError(_other_inputs(index, begun))
            break
        else:
            said = _run(partial(speak, teacher_params), stream, begun, dtype)
            sums, parts = _gather(said, shards, shard_bytes)
            if not parts:
                break
            tensors = {k: np.concatenate([x[k] for x in parts]) for k in parts[0]}
            facts = {
                "settings": settings,
                "begun": begun,
                "inputs": sums,
                "rows": len(next(iter(tensors.values()))),
                "example": _example(tensors),
            }
            write_file(file, json.dumps(facts), tensors)
        shards.append(facts | {"bytes": file.stat().st_size})
        begun += len(facts["inputs"])
    if not shards:
        raise ValueError("cache_teacher needs at least one batch, got none.")
    facts = {k: [shard[k] for shard in shards] for k in ("rows", "bytes")}
    write_file(index, json.dumps({"settings": settings} | facts), {})
    return open_cache(folder)


def _said(outputs: Any, top_k: int | None, temperature: float) -> dict[str, jax.Array]:
    """What a shard keeps of a teacher's outputs."""
    logits = _check.floating("cache_teacher", outputs_of(outputs).logits)
    if logits.ndim < 2 or not logits.size:
        raise ValueError(
            "cache_teacher needs logits [batch, ..., classes] of at least one example, "
            f"got {_check.describe(logits)}."
        )
    if top_k is None:
        return {"logits": logits.astype(jnp.float32)}
    kept = top_k_targets(logits, top_k, temperature)
    narrow = jnp.uint16 if logits.shape[-1] <= 2**16 else jnp.uint32
    indices = jnp.asarray(kept.indices, narrow)
    return {"indices": indices, "log_probs": jnp.log(kept.probs)}


def _run(
    speak: Callable[[Any], dict[str, jax.Array]],
    stream: Iterator[Any],
    begun: int,
    dtype: DTypeLike,
) -> Iterator[tuple[str, Part]]:
    """For each batch the checksum of its inputs, and what is stored of it."""
    for number, inputs in enumerate(stream, begun):
        said = jax.device_get(speak(inputs))
        part = {k: _stored(x, dtype, number) for k, x in said.items()}
        yield _checksum(inputs), part


def _stored(x: np.ndarray, dtype: DTypeLike, number: int) -> np.ndarray:
    """The values in the dtype of the cache, once it is known to hold them."""
    if not np.issubdtype(x.dtype, np.floating):
        return x
    with np.errstate(over="ignore"):
        stored = x.astype(dtype)
    bad = ~np.isfinite(stored) & ~np.isneginf(x)
    if bad.any():
        raise ValueError(
            f"cache_teacher needs logits that are finite in {stored.dtype.name}, or "
            f"minus infinity, but batch {number} has {x[bad][0]} at index "
            f"{tuple(map(int, np.argwhere(bad)[0]))}. Pass a wider dtype, or mend the "
            "teacher."
        )
    return stored


def _example(part: Part) -> dict[str, list]:
    """The dtype and shape of what is stored of one example."""
    return {name: [x.dtype.name, *x.shape[1:]] for name, x in part.items()}


def _gather(
    said: Iterator[tuple[str, Part]], shards: list[dict[str, Any]], limit: int
) -> tuple[list[str], list[Part]]:
    """The batches of one shard: as many as fit the limit, but at least one."""
    sums: list[str] = []
    parts: list[Part] = []
    size = 0
    for checksum, part in said:
        sums.append(checksum)
        parts.append(part)
        first = shards[0]["example"] if shards else _example(parts[0])
        if _example(part) != first:
            raise ValueError(
                "cache_teacher needs logits of one shape for all examples, got "
                f"{_example(part)} after {first}. Pad the inputs."
            )
        last = sum(x.nbytes for x in part.values())
        size += last
        if size + last > limit:
            break
    return sums, parts


def _checksum(tree: Any) -> str:
    """CRC-32 of the paths, dtypes, shapes and bytes of all leaves, 8 hex digits."""
    crc = 0
    for keys, leaf in jax.tree.leaves_with_path(tree):
        if _check.is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        x = np.asarray(leaf)
        label = f"{path_of(keys)} {x.dtype.name} {list(x.shape)} "
        crc = zlib.crc32(label.encode() + x.tobytes(), crc)
    return f"{crc:08x}"


def _check_inputs(
    file: Path, facts: dict[str, Any], stream: Iterator[Any], begun: int
) -> None:
    """Takes the batches of a shard that is there, once it is known to be of them."""
    if facts["begun"] != begun:
        raise ValueError(
            f"cache_teacher needs {file} to begin at batch {begun}, but it begins at "
            f"batch {facts['begun']}: shard_bytes was another. {_MEND}"
        )
    for number, wanted in enumerate(facts["inputs"], begun):
        inputs = next(stream, None)
        if inputs is None or _checksum(inputs) != wanted:
            raise ValueError(_other_inputs(file, number))


def _other_inputs(file: Path, number: int) -> str:
    return (
        f"cache_teacher needs the batches that {file} was made of, in their order, but "
        f"batch {number} is another, is missing or is one too many. Use another folder "
        "for other data."
    )


def _file_of(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _read(file: Path, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """The facts of a shard or an index, once checksums and settings are right."""
    try:
        facts = json.loads(read_file(file)[0])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The cache of a teacher is damaged: {error} {_MEND}"
        ) from error
    if not isinstance(facts, dict) or "settings" not in facts:
        raise ValueError(f"{file} is no part of the cache of a teacher. {_MEND}")
    if settings is not None and facts["settings"] != settings:
        raise ValueError(
            f"{file} was made with {facts['settings']}, which differs from {settings}. "
            "Use another folder for another teacher or other settings."
        )
    return facts


def _mapped(file: Path) -> Part:
    """The tensors of a safetensors file, left on disk until they are read."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    del header["__metadata__"]
    return {
        name: np.memmap(
            file,
            jnp.dtype(NATIVE[tensor["dtype"]]),
            mode="r",
            offset=8 + size + tensor["data_offsets"][0],
            shape=tuple(tensor["shape"]),
        )
        for name, tensor in header.items()
    }
