"""The levels of narrow float formats, and the nearest of them.

A format of up to 8 bits is a table of levels, one for each code; a wider one is a dtype
whose bits are the code.
"""

import jax
import jax.numpy as jnp
import numpy as np


POWERS = "float8_e8m0fnu"  # the exponent of a float32, without sign or fraction

# Dettmers et al., arXiv:2305.14314, appendix E: quantiles of a normal distribution.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


def width(format: str) -> int:
    """Bits of a code."""
    return 4 if format == "nf4" else jnp.finfo(format).bits


def top_of(format: str) -> float:
    """The largest level."""
    return 1.0 if format == "nf4" else float(jnp.finfo(format).max)


def levels(format: str) -> np.ndarray:
    """float32[2**bits]: what every code of a format of at most 8 bits stands for."""
    if format == "nf4":
        return np.array(NF4, np.float32)
    codes = np.arange(2 ** width(format), dtype=np.uint8)
    with np.errstate(invalid="ignore"):  # some codes are NaN, which none is rounded to
        return codes.view(jnp.dtype(format)).astype(np.float32)


def _bounds(format: str) -> tuple[list[np.float32], np.ndarray]:
    """Where the code changes, and the codes before, between and behind the bounds.

    ``x`` is beyond a bound where ``x > bound``. A midpoint goes to the even code.
    """
    table, order = np.unique(levels(format), return_index=True)  # 0 before -0
    middles = (table[:-1].astype(np.float64) + table[1:]) / 2  # exact
    bounds = middles.astype(np.float32)
    upper_takes_it = (bounds == middles) & (order[1:] % 2 == 0)
    below = np.nextafter(bounds, np.float32(-np.inf))
    return list(np.where((bounds > middles) | upper_takes_it, below, bounds)), order


def nearest(x: jax.Array, format: str) -> jax.Array:
    """The code of the nearest level: uint8, uint16 if wider. It saturates."""
    bits = width(format)
    if bits < 8:
        bounds, order = _bounds(format)
        code = jnp.full(x.shape, order[0], jnp.uint8)
        for bound, step in zip(bounds, np.diff(order).astype(np.uint8), strict=True):
            code += jnp.where(x > float(bound), step, np.uint8(0))  # modulo 256
        return code
    # Beyond its range a cast gives an infinity or a NaN.
    dtype, most = jnp.dtype(format), top_of(format)
    least = -most if format != POWERS else float(jnp.finfo(jnp.float32).tiny)
    narrow = jnp.clip(x, least, most).astype(dtype)
    code = jax.lax.bitcast_convert_type(narrow, jnp.uint8 if bits == 8 else jnp.uint16)
    if format.endswith("fnuz"):  # XLA may round to -0, which is the NaN of these
        code = jnp.where(code == 0x80, jnp.uint8(0), code)
    return code
