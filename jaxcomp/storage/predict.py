"""What a leaf will take in a file, from a part of it."""

from typing import Any

import numpy as np

from jaxcomp.entropy import order0_entropy
from jaxcomp.node import is_compressed
from jaxcomp.storage.leaves import code_counts, node_parts
from jaxcomp.storage.planes import encode_array


SAMPLE = 1 << 16  # weights of a leaf that a prediction looks at, about


def sample(x: np.ndarray, axis: int | None) -> np.ndarray:
    """Evenly spaced channels of a large array, or runs if no axis is kept, as rows."""
    if axis is None:
        x, axis = x.reshape(-1)[: x.size // 256 * 256].reshape(-1, 256), 0
    count = x.shape[axis]
    taken = min(count, max(8, SAMPLE * count // x.size))
    rows = np.arange(taken) * (count - 1) // max(taken - 1, 1)
    return np.moveaxis(x.take(rows, axis), axis, 0).reshape(taken, -1)


def coded_bytes(stored: Any, times: float) -> float:
    """Bytes that the coder leaves of what is stored, if it were that much more."""
    if not is_compressed(stored):
        return times * len(encode_array(np.asarray(stored)))
    total, packed = 0.0, code_counts(stored)
    for counts in packed.values():
        bits = times * int(counts.sum()) * order0_entropy(counts)
        total += bits / 8 + np.count_nonzero(counts)  # its table: a byte a symbol
    for name, x in node_parts(stored)[1].items():
        if name not in packed:
            size = len(encode_array(np.asarray(x)))
            total += size if name == "codebook" else times * size
    return total
