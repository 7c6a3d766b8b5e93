"""Integer grids for a file that is entropy coded: squared error against coded bits.

What a coder spends on a code is not its width but how rare it is. So the grid may reach
as far as it likes, its step alone decides about the size of the file, and a weight near
the middle of two codes goes to the one that is cheaper to write.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import _check
from jaxcomp import bits as packing
from jaxcomp._extremes import divided
from jaxcomp.quant.grid import (
    Axis,
    QTensor,
    checked_settings,
    packed,
    scale_for,
    to_groups,
)


_TOP = 2 ** (packing.WIDEST - 1) - 1  # the largest code, that many steps from 0
_BIT = float(np.log(2)) / 6  # squared steps that a bit is worth, at small steps
_TABLE = 10  # bits that a code takes in the coder's table, about
_ROUNDS = 4  # of prices that follow from codes, and codes from prices
_HALVINGS = 24
_CLOSE = 0.999  # of the rate: nearer is not worth another pass
_SAMPLE = 2**18  # weights that the step is searched with; then all of them are counted


def quantize_to_rate(
    x: jax.Array, rate: float, *, axis: Axis = None, group: int | None = None
) -> QTensor:
    """Rounds ``x`` to a symmetric grid whose codes take ``rate`` bits in the file.

    Entropy-constrained scalar quantization (Chou, Lookabaugh and Gray, "Entropy-
    constrained vector quantization", IEEE Trans. ASSP 37, 1989) on a uniform grid: a
    weight takes the code of the two beside it with the least squared error plus price
    times bits, and the step is the finest that meets the rate. `share_to_rate` moves
    the values of a codebook as well and is slightly better; this keeps integer codes.

    Args:
      x: float[*shape], concrete: the width of the codes follows from the values.
      rate: bits per weight in the file, scales included; positive.
      axis: the axis, or axes, that keep a scale per index; None shares one, which gives
        the least squared error in all. With more, the steps of a group are in the
        proportion of its root mean square, so that the relative errors are alike.
      group: entries that share a scale, in C order over all axes but ``axis``; None
        takes them all.

    Returns:
      A `QTensor` of 2 to 16 bits a code. Exact zeros stay exactly zero, and small
      weights join them. At rates above some 14 bits the codes end, and less is taken.

    Raises:
      ValueError: ``rate`` is not positive, or too low for the scales and two codes,
        ``axis`` or ``group`` is out of range, or ``x`` is traced, empty or not finite.
      TypeError: ``x`` is not floating point.

    >>> w = jax.random.normal(jax.random.key(0), (100, 100))
    >>> small = quantize_to_rate(w, 2.0)
    >>> small.bits, round(float(jnp.mean((small.dense() - w) ** 2)), 3)
    (4, 0.093)
    """
    caller = "quantize_to_rate"
    x, _, kept, length = checked_settings(caller, x, 8, axis, group)
    known = _check.number(caller, "rate", rate)
    if known is None or not known > 0:
        raise ValueError(
            f"{caller} needs a rate above 0, in bits per weight, got {rate}."
        )
    if not _check.is_concrete(x) or not x.size or not bool(jnp.isfinite(x).all()):
        raise ValueError(
            f"{caller} needs finite values at hand, one at least, got "
            f"{_check.describe(x)} that is empty, not finite or traced. Call it "
            "outside jit, or leave this leaf out with `where`."
        )
    groups = to_groups(x, kept, length)
    size = _sizes(groups)
    budget = known * x.size - size.size * jnp.finfo(x.dtype).bits
    if budget <= 0:
        raise ValueError(
            f"{caller} needs a rate above that of the scales alone, "
            f"{known - budget / x.size:.4g} bits per weight for {size.size} scales of "
            f"{_check.describe(x)}, got {rate}. Take larger groups."
        )
    padding = groups.size - x.size
    every = max(1, groups.size // _SAMPLE)
    ratios = _ratios(groups, size)
    part = ratios.reshape(-1)[::every]
    most = max(float(jnp.max(jnp.abs(ratios))), 1e-30)
    step, prices = _search(
        part, most, budget * part.size / groups.size, padding / every
    )
    while True:
        scale = scale_for(size * step, 1, x.dtype)
        codes, counts = _rounded(_ratios(groups, scale), jnp.float32(1), prices)
        if _spent(np.asarray(counts), padding) <= budget or step >= 4 * most:
            break
        step *= 1.01  # the sample was too kind
    seen = 4 * float(jnp.finfo(x.dtype).tiny)  # no scale is less than half of it
    if not bool(jnp.any(codes)) and bool(jnp.any(jnp.abs(x) > seen)):
        raise ValueError(
            f"{caller} needs a rate that leaves something of {_check.describe(x)}, got "
            f"{rate}: its scales and a table of two codes take all of it."
        )
    scale = _fitted(groups, codes, scale)
    bits = max(2, int(jnp.max(jnp.abs(codes))).bit_length() + 1)
    stored = (codes + (2 ** (bits - 1) - 1)).astype(jnp.uint16)
    return QTensor(packed(stored, bits), scale, None, bits, x.shape, kept, length)


@jax.jit
def _sizes(groups: jax.Array) -> jax.Array:
    """float[channels, groups]: root mean square of the weights that are not 0."""
    wide = groups.astype(_check.wide(groups.dtype))
    most = jnp.max(jnp.abs(wide), axis=-1, initial=0)
    total = jnp.sum(divided(wide, most[..., None]) ** 2, axis=-1)  # none overflows
    count = jnp.maximum(jnp.sum(wide != 0, axis=-1, dtype=jnp.int32), 1)
    return scale_for(most * jnp.sqrt(total / count.astype(total.dtype)), 1, wide.dtype)


@jax.jit
def _ratios(groups: jax.Array, scale: jax.Array) -> jax.Array:
    wide = _check.wide(groups.dtype)
    return divided(groups.astype(wide), scale.astype(wide)[..., None])


@jax.jit
def _rounded(
    ratios: jax.Array, step: jax.Array, prices: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """int32 codes of least cost, and how often each is taken, from -_TOP to _TOP."""
    steps = jnp.clip(ratios / step, -_TOP, _TOP)
    below = jnp.clip(jnp.floor(steps), -_TOP, _TOP - 1)
    at = below.astype(jnp.int32) + _TOP
    edge = 0.5 + _BIT / 2 * (prices[at + 1] - prices[at])
    above = steps - below > jnp.clip(edge, 1e-3, 1 - 1e-3)
    codes = jnp.where(ratios == 0, 0, at - _TOP + above.astype(jnp.int32))
    return codes, jnp.zeros(2 * _TOP + 1, jnp.int32).at[codes + _TOP].add(1)


@jax.jit
def _fitted(groups: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """Scales times the factor that has the least squared error with these codes."""
    wide = _check.wide(groups.dtype)
    ratios, held = _ratios(groups, scale), codes.astype(wide)
    weight = (scale.astype(wide) / jnp.max(scale).astype(wide))[..., None] ** 2
    power = jnp.sum(weight * held * held)
    factor = jnp.sum(weight * ratios * held) / jnp.where(power > 0, power, 1)
    factor = jnp.where(power > 0, factor, 1)
    return scale_for(scale.astype(wide) * factor, 1, groups.dtype)


def _spent(counts: np.ndarray, padding: float) -> float:
    """Bits of the codes and of the coder's table; the file leaves out padding."""
    held = counts.astype(np.float64)
    held[_TOP] = max(held[_TOP] - padding, 0)
    held = held[held > 0]
    return float(held @ np.log2(held.sum() / held)) + _TABLE * held.size


def _prices(counts: np.ndarray, padding: float) -> jax.Array:
    """Bits of each code; of those that do not occur, as if they did once."""
    held = counts.astype(np.float64)
    held[_TOP] = max(held[_TOP] - padding, 1)
    held = np.maximum(held, 1)
    return jnp.asarray(np.log2(held.sum() / held), jnp.float32)


def _search(
    part: jax.Array, most: float, budget: float, padding: float
) -> tuple[float, Any]:
    """The finest step that meets the budget, and the prices of its codes."""

    def solve(step: float) -> tuple[float, Any]:
        prices = jnp.zeros(2 * _TOP + 1, jnp.float32)
        for _ in range(_ROUNDS):
            counts = np.asarray(_rounded(part, jnp.float32(step), prices)[1])
            prices = _prices(counts, padding)
        return _spent(counts, padding), prices

    low, high = most / _TOP, 4 * most
    best = high, solve(high)[1]
    spent, prices = solve(low)
    if spent <= budget:
        return low, prices
    for _ in range(_HALVINGS):
        middle = float(np.sqrt(low * high))
        spent, prices = solve(middle)
        if spent > budget:
            low = middle
        else:
            high, best = middle, (middle, prices)
            if spent > _CLOSE * budget:
                break
    return best
