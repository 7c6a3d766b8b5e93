"""Vector palettes: short runs of weights share the vectors of one codebook.

One code stands for several weights, so that a weight may take less than one bit, and a
codebook can follow what neighbours have in common. In more than one dimension the best
codebook cannot be found; k-means from a random start comes near.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp import bits as packing
from jaxcomp.node import CompressedArray
from jaxcomp.share.palette import checked_values


_WIDEST = 64
_SAMPLE = 2**16  # vectors that k-means sees, or more where that gives it
_PER_CLUSTER = 64  # less than so many for a cluster
_STEPS = 50
_GAIN = 1e-3  # what an iteration must lower the error by, as a fraction
_TABLE = 2**20  # distances held at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class VectorTensor(CompressedArray):
    """Codes into a codebook of shared vectors: ``vector = table[code]``.

    The table is the codebook, with a vector of zeros before it if ``zero``. A vector is
    ``width`` consecutive entries along one axis; where they do not divide the axis, the
    last one of each lane sticks out.

    Attributes:
      codes: uint8[packed], codes of ``bits`` bits, one for each vector, in C order with
        the axis ``along`` last; see `bits.pack`.
      codebook: float[entries, width]; its dtype is the dtype of `dense`. Trainable.
      zero: whether code 0 means nothing but zeros and is not in the codebook (static).
      bits: width of a code (static).
      shape: shape of `dense` (static).
      along: the axis that vectors run along, not negative (static).
    """

    codes: jax.Array
    codebook: jax.Array
    zero: bool = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    along: int = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        return self.codebook.dtype

    def table(self) -> jax.Array:
        """float[vectors, width]: what each code stands for."""
        return jnp.pad(self.codebook, ((int(self.zero), 0), (0, 0)))

    def _old_codes(self) -> jax.Array:
        width = self.codebook.shape[-1]
        lanes, length = _lanes(self.shape, self.along)
        return packing.unpack(self.codes, self.bits, lanes * -(-length // width))

    @jax.jit
    def dense(self) -> jax.Array:
        if self.codebook.ndim > 2:  # a stack of nodes, as vmap makes
            return jax.vmap(VectorTensor.dense)(self)
        return _joined(self.table()[self._old_codes()], self.shape, self.along)

    def nbits(self) -> int:
        width = jnp.finfo(self.codebook.dtype).bits
        return self.codes.size * 8 + self.codebook.size * width

    def encode(self, x: jax.Array) -> "VectorTensor":
        """A node with the nearest vectors; vectors of zeros stay zeros.

        Zeros that stand in a vector with other values cannot stay. Under jit, where
        they cannot be seen, they take what the nearest vector has in their place.

        Raises:
          ValueError: concrete ``x`` has such zeros; or it has vectors of zeros, or is
            traced, and the node has no code for them, and none to give up.
        """
        if _check.is_concrete(x):
            lone, whole = map(int, _zeros(self, x))
            width = self.codebook.shape[-1]
            _check_lone("VectorTensor.encode", lone, x, width, self.along)
        else:
            whole = 1
        if self.zero or not whole:
            return dataclasses.replace(self, codes=self._nearest(x))
        if not _check.is_concrete(x):
            raise ValueError(
                "VectorTensor.encode needs to know whether there are zeros in "
                f"{_check.describe(x)}, which it has no code for. Call it outside jit, "
                "or begin with a vector of zeros."
            )
        if self.codebook.shape[0] == 1 and bool(jnp.any(x != 0)):
            raise ValueError(
                "VectorTensor.encode needs a code for vectors of zeros in "
                f"{_check.describe(x)}, but its only one is taken. Take clusters >= 2."
            )
        return self._with_zero().encode(x)

    @jax.jit
    def _with_zero(self) -> "VectorTensor":
        """With zeros in place of the vector that is nearest to them."""
        gone = jnp.argmin(jnp.max(jnp.abs(self.codebook), axis=-1))
        stay = jnp.arange(1, self.codebook.shape[0])
        stay = jnp.where(stay <= gone, stay - 1, stay)
        old = self._old_codes().astype(jnp.int32)
        codes = jnp.where(old == gone, 0, jnp.where(old < gone, old + 1, old))
        packed, kept = packing.pack(codes, self.bits), self.codebook[stay]
        return dataclasses.replace(self, codes=packed, codebook=kept, zero=True)

    @jax.jit
    def _nearest(self, x: jax.Array) -> jax.Array:
        """Packed codes of the nearest vectors; those that are as they were keep theirs.

        Where a code is a zero of its own, zeros take it.
        """
        width, table = self.codebook.shape[-1], self.table()
        vectors = _vectors(x, self.along, width)
        same = jnp.all(vectors == _vectors(self.dense(), self.along, width), axis=-1)
        wide = _check.wide(table.dtype)
        vectors, table = vectors.astype(wide), table.astype(wide)
        unit = jnp.maximum(_unit_of(vectors), _unit_of(table))
        inside = _vectors(jnp.ones(x.shape, bool), self.along, width)
        new, _ = _nearest(vectors / unit, inside, table / unit)
        old = self._old_codes()
        codes = jnp.where(same, old, new.astype(old.dtype))
        if self.zero:
            codes = jnp.where(jnp.all(vectors == 0, axis=-1), 0, codes)
        return packing.pack(codes, self.bits)

    def describe(self) -> str:
        entries, width = self.codebook.shape[-2:]
        return f"{entries + self.zero} shared vectors of {width}"


def palettize_vectors(
    key: jax.Array, x: jax.Array, clusters: int, width: int, *, along: int = -2
) -> VectorTensor:
    """Gives the vectors of ``x`` at most ``clusters`` distinct values.

    Gong et al., "Compressing Deep Convolutional Networks using Vector Quantization",
    arXiv:1412.6115, section 3.3, with one codebook for all positions in place of one
    for each. It starts as Arthur and Vassilvitskii, "k-means++: The Advantages of
    Careful Seeding", SODA 2007; then there are Lloyd's iterations, at most 50, while
    they gain 0.1%. A cluster that loses all of its vectors begins anew at one that is
    drawn by its squared error.

    k-means sees 65536 vectors, or 64 for each cluster if that is more, spread evenly
    over those that are not all zero; then every vector takes the nearest.

    Args:
      key: PRNG key; the same key gives the same codebook.
      x: float[*shape], concrete: the codebook is not solved under jit.
      clusters: the most distinct vectors of the result, 1 to 65536. If ``x`` has
        vectors of zeros, they are one of them.
      width: entries of a vector, 2 to 64. A weight takes ``log2(clusters) / width``
        bits, and the codebook ``clusters * width`` entries.
      along: the axis that vectors run along. Of a Flax kernel, (in, out) or
        (h, w, in, out), -2 is the contraction. The last vector of a lane may stick out.

    Returns:
      A `VectorTensor`; vectors of zeros stay exactly zero. If ``x`` has no more than
      ``clusters`` distinct vectors, ``dense`` equals ``x`` bit for bit (-0.0 becomes
      0.0).

    Raises:
      ValueError: a number is out of range, ``x`` is empty, traced or not finite, zeros
        stand in a vector with other values, or one cluster would have to hold both
        zeros and other vectors.
      TypeError: ``x`` is not floating point.

    >>> x = jnp.array([[0.0, 1.0], [0.0, 2.0], [1.0, 5.0], [2.0, 7.0]])
    >>> node = palettize_vectors(jax.random.key(0), x, clusters=4, width=2)
    >>> node.dense().tolist() == x.tolist(), node.codebook.shape, node.bits
    (True, (2, 2), 2)
    """
    caller = "palettize_vectors"
    x = _check.floating(caller, x)
    _check.integer_within(caller, "clusters", clusters, 1, 2**packing.WIDEST)
    _check.integer_within(caller, "width", width, 2, _WIDEST)
    if x.ndim and not -x.ndim <= along < x.ndim:
        raise ValueError(
            f"{caller} needs an axis of {_check.describe(x)}, got along={along}. Pass "
            "another, e.g. along=-1, or leave this leaf out with `where`."
        )
    axis = along % x.ndim if x.ndim else 0
    values = checked_values(caller, x).astype(_check.wide(x.dtype)) + 0  # no -0.0
    inside = np.asarray(_vectors(np.ones(x.shape, bool), axis, width))
    vectors = np.asarray(_vectors(values.reshape(x.shape), axis, width))
    live: np.ndarray = np.any(vectors != 0, axis=-1)
    lone = int(np.count_nonzero((vectors == 0) & inside & live[:, None]))
    _check_lone(caller, lone, x, width, axis)
    zero = not live.all()
    room = clusters - zero
    if live.any() and not room:
        raise ValueError(
            f"{caller} needs clusters >= 2 for an array with vectors of zeros, which "
            f"keep one to themselves, got clusters={clusters}."
        )
    codes = np.zeros(live.size, np.uint16)
    codebook = np.zeros((0, width), vectors.dtype)
    if live.any():
        codebook, nearest = _clustered(key, vectors, inside, live, room, x.dtype)
        codes[live] = nearest + zero
    bits = max(1, (len(codebook) + zero - 1).bit_length())
    packed = packing.pack(jnp.asarray(codes), bits)
    shared = jnp.asarray(codebook.astype(x.dtype))
    return VectorTensor(packed, shared, bool(zero), bits, x.shape, axis)


def _lanes(shape: tuple[int, ...], along: int) -> tuple[int, int]:
    """How many lanes there are along an axis, and the length of each."""
    length = shape[along] if shape else 1
    return math.prod(shape) // max(length, 1), length


def _vectors(x: Any, along: int, width: int) -> Any:
    """[*shape] -> [vectors, width], the ragged tail padded with zeros."""
    np_or_jnp: Any = np if isinstance(x, np.ndarray) else jnp
    lanes, length = _lanes(x.shape, along)
    rows = np_or_jnp.moveaxis(x, along, -1) if x.ndim else x
    rows = np_or_jnp.pad(rows.reshape(lanes, length), [(0, 0), (0, -length % width)])
    return rows.reshape(lanes * -(-length // width), width)


def _joined(vectors: jax.Array, shape: tuple[int, ...], along: int) -> jax.Array:
    """The inverse of `_vectors`."""
    lanes, length = _lanes(shape, along)
    width = vectors.shape[-1]
    rows = vectors.reshape(lanes, -(-length // width) * width)[:, :length]
    rest = shape[:along] + shape[along + 1 :]
    whole = rows.reshape(*rest, *shape[along : along + 1])
    return jnp.moveaxis(whole, -1, along) if shape else whole


@jax.jit
def _zeros(node: VectorTensor, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """New zeros in vectors with other values, and how many vectors are all zero."""
    width = node.codebook.shape[-1]
    vectors = _vectors(x, node.along, width)
    old = _vectors(node.dense(), node.along, width)
    inside = _vectors(jnp.ones(x.shape, bool), node.along, width)
    whole = jnp.all(vectors == 0, axis=-1)
    new = jnp.any(vectors != old, axis=-1) & ~whole
    lone = (vectors == 0) & inside & new[:, None]
    return jnp.sum(lone, dtype=jnp.int32), jnp.sum(whole, dtype=jnp.int32)


def _check_lone(caller: str, lone: int, x: Any, width: int, along: int) -> None:
    if lone:
        raise ValueError(
            f"{caller} keeps zeros only where all of a vector is zero, but {lone} of "
            f"{_check.describe(x)} stand in vectors of {width} along axis {along} with "
            "other values. Prune in blocks that cover whole vectors, e.g. with "
            f"`in_blocks(budget, ({width}, 1))` along axis -2, or use `palettize`."
        )


def _clustered(
    key: jax.Array,
    vectors: np.ndarray,
    inside: np.ndarray,
    live: np.ndarray,
    clusters: int,
    dtype: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """A codebook for the live vectors, rounded to a dtype, and the nearest of each."""
    ours = vectors[live]
    if len(np.unique(ours[: 4 * clusters], axis=0)) <= clusters:  # else more in all
        codebook, codes = np.unique(ours, axis=0, return_inverse=True)
        if len(codebook) <= clusters:
            return codebook, codes.reshape(-1)
    keys = jax.random.split(key)
    size = min(len(vectors), max(_SAMPLE, _PER_CLUSTER * clusters))
    at = np.arange(min(len(ours), size))
    if len(ours) > size:  # one of each of so many equal parts
        part = np.asarray(jax.random.uniform(keys[0], (size,)), np.float64)
        at = ((at + part) * (len(ours) / size)).astype(int)
    # At most 1 by magnitude, that squares neither overflow nor vanish; it is exact.
    shift = int(np.frexp(np.abs(ours).max())[1])
    short = [(0, size - len(at)), (0, 0)]  # one shape for any sparsity
    seen = np.pad(np.ldexp(ours[at], -shift), short)
    found = _lloyd(keys[1], seen, np.pad(inside[live][at], short), clusters)
    codebook = np.ldexp(np.asarray(found), shift).astype(dtype).astype(ours.dtype)
    codebook = np.unique(codebook, axis=0)  # narrow floats may coincide
    units = np.ldexp(vectors, -shift), inside, np.ldexp(codebook, -shift)
    return codebook, np.asarray(_nearest(*units)[0])[live]


@partial(jax.jit, static_argnames="clusters")
def _lloyd(
    key: jax.Array, vectors: jax.Array, inside: jax.Array, clusters: int
) -> jax.Array:
    """float[clusters, width]: k-means of vectors of magnitude 1 or less.

    ``inside``: bool, like ``vectors``; the other entries have no weight.
    """
    keys = jax.random.split(key)

    def add(i: jax.Array, state: tuple) -> tuple:
        codebook, error = state
        new = vectors[_drawn(jax.random.fold_in(keys[0], i), error, 1)]
        away = jnp.sum(jnp.where(inside, vectors - new, 0) ** 2, axis=-1)
        return codebook.at[i].set(new[0]), jnp.minimum(error, away)

    def step(state: tuple) -> tuple:
        i, codebook, _, last = state
        codes, error = _nearest(vectors, inside, codebook)
        sums, counts = _sums(vectors, inside, codes, clusters)
        means = jnp.where(counts > 0, sums / jnp.maximum(counts, 1), codebook)
        fresh = vectors[_drawn(jax.random.fold_in(keys[1], i), error, clusters)]
        used = jnp.any(counts > 0, axis=-1, keepdims=True)
        return i + 1, jnp.where(used, means, fresh), last, jnp.sum(error)

    def goes_on(state: tuple) -> jax.Array:
        i, _, before, last = state
        return (i < _STEPS) & (last < before * (1 - _GAIN))

    first = jnp.zeros((clusters, vectors.shape[1]), vectors.dtype)
    chance = jnp.any(inside, axis=-1).astype(vectors.dtype)
    codebook, _ = jax.lax.fori_loop(0, clusters, add, (first, chance))
    most = jnp.asarray(jnp.finfo(vectors.dtype).max, vectors.dtype)
    start = jnp.int32(0), codebook, most, most / 2
    return jax.lax.while_loop(goes_on, step, start)[1]


def _drawn(key: jax.Array, error: jax.Array, count: int) -> jax.Array:
    """int32[count]: places drawn with a chance that is proportional to their error."""
    total = jnp.cumsum(error)
    at = jax.random.uniform(key, (count,), error.dtype) * total[-1]
    return jnp.minimum(jnp.searchsorted(total, at, side="right"), error.size - 1)


def _blocks(x: jax.Array, entries: int) -> jax.Array:
    """[n, ...] -> [blocks, rows, ...], so that a block has few distances; padded."""
    rows = max(1, min(_TABLE // max(entries, 1), x.shape[0]))
    x = jnp.pad(x, [(0, -x.shape[0] % rows)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(x.shape[0] // rows, rows, *x.shape[1:])


@jax.jit
def _nearest(
    vectors: jax.Array, inside: jax.Array, table: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The index of the nearest vector of a table, the lowest on a tie; its error.

    Vectors are 0 where they are not inside.
    """
    terms = jnp.concatenate([table**2, -2 * table], axis=1)
    index = jnp.arange(len(table))[:, None]

    def of_block(block: tuple) -> tuple[jax.Array, jax.Array]:
        values, weight = block[0], block[1].astype(table.dtype)
        both = jnp.concatenate([weight, values], axis=1)
        away = jnp.dot(terms, both.T, precision=jax.lax.Precision.HIGHEST)
        # Twice a minimum, as XLA's argmin takes four times as long on a CPU.
        least = away == jnp.min(away, axis=0)[None]
        codes = jnp.min(jnp.where(least, index, len(table) - 1), axis=0)
        return codes, jnp.sum(weight * (values - table[codes]) ** 2, axis=-1)

    blocks = _blocks(vectors, len(table)), _blocks(inside, len(table))
    codes, error = jax.lax.map(of_block, blocks)
    return codes.reshape(-1)[: len(vectors)], error.reshape(-1)[: len(vectors)]


def _sums(
    vectors: jax.Array, inside: jax.Array, codes: jax.Array, entries: int
) -> tuple[jax.Array, jax.Array]:
    """Sums and counts of the entries that the vectors of each code have inside.

    By products, as additions that are scattered have no fixed order on a GPU.
    """
    both = jnp.concatenate([vectors, inside.astype(vectors.dtype)], axis=1)

    def add(total: jax.Array, block: tuple) -> tuple[jax.Array, None]:
        values, code = block
        mine = (code[None] == jnp.arange(entries)[:, None]).astype(values.dtype)
        return total + jnp.dot(mine, values, precision=jax.lax.Precision.HIGHEST), None

    zeros = jnp.zeros((entries, both.shape[1]), both.dtype)
    blocks = _blocks(both, entries), _blocks(codes, entries)  # pads add zeros
    sums, counts = jnp.split(jax.lax.scan(add, zeros, blocks)[0], 2, axis=1)
    return sums, counts


def _unit_of(x: jax.Array) -> jax.Array:
    """A power of 2 near the largest magnitude; no square overflows beside it."""
    power = jnp.frexp(jnp.max(jnp.abs(x), initial=0))[1]
    return jnp.ldexp(jnp.ones((), x.dtype), jnp.clip(power, -100, 100))
