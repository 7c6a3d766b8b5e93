"""``jaxcomp bench``: how fast this machine codes and multiplies."""

import io
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jaxcomp.coders import Coders, ahead, threads_for
from jaxcomp.commands.terminal import show, show_json
from jaxcomp.entropy import decode_symbols, encode_symbols
from jaxcomp.storage.planes import decode_array, encode_array


_SIZE = 1 << 21  # symbols of a stream
_REPEATS = 5
_DOT = (64, 1024, 1024)


class Speed(NamedTuple):
    """The median times of coding one stream, and how small it came out."""

    name: str
    symbols: int
    nbytes: int  # before coding
    coded: int  # bytes after it
    encode_s: float
    decode_s: float
    encode_all_s: float  # of as many streams as there are cores, on all of them
    decode_all_s: float


class Bench(NamedTuple):
    """What `bench` found; prints as a table."""

    streams: tuple[Speed, ...]
    cores: int  # that this machine has
    float32_s: float  # median time of one product
    int8_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers."""
        streams = [
            row._asdict()
            | {
                "encode_msymbols": row.symbols / row.encode_s / 1e6,
                "decode_msymbols": row.symbols / row.decode_s / 1e6,
                "encode_mb": row.nbytes / row.encode_s / 1e6,
                "decode_mb": row.nbytes / row.decode_s / 1e6,
                "encode_all_mb": self.cores * row.nbytes / row.encode_all_s / 1e6,
                "decode_all_mb": self.cores * row.nbytes / row.decode_all_s / 1e6,
            }
            for row in self.streams
        ]
        dots = {
            "shape": list(_DOT),
            "float32_s": self.float32_s,
            "int8_s": self.int8_s,
            "ratio": self.int8_s / self.float32_s,
        }
        return {"cores": self.cores, "streams": streams, "dot": dots}

    def __rich__(self) -> Table:
        found = self.to_dict()
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("stream")
        both = [f"{name}, {self.cores} cores" for name in ("encode", "decode")]
        for name in ("encode", "decode", "encode", "decode", *both, "coded"):
            table.add_column(name, justify="right")
        for row in found["streams"]:
            table.add_row(
                row["name"],
                f"{row['encode_msymbols']:.0f} M/s",
                f"{row['decode_msymbols']:.0f} M/s",
                f"{row['encode_mb']:.0f} MB/s",
                f"{row['decode_mb']:.0f} MB/s",
                f"{row['encode_all_mb']:.0f} MB/s",
                f"{row['decode_all_mb']:.0f} MB/s",
                f"{row['coded'] / row['nbytes']:.1%}",
            )
        table.caption = (
            f"{'x'.join(map(str, _DOT))}: a product of int8 takes "
            f"{found['dot']['ratio']:.2f} of the time of one of float32 "
            f"({1e3 * self.float32_s:.2f} ms)."
        )
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=110).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def bench(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead.")
    ] = False,
) -> None:
    """Measure how fast this machine codes and multiplies: medians of a few seconds.

    M/s: millions of values a second. MB/s: of what is coded, before it is.
    """
    found = measure(_SIZE, _REPEATS)
    show_json(found.to_dict()) if as_json else show(found)


def measure(size: int, repeats: int) -> Bench:
    """Times all streams and products in turn, ``repeats`` times, and takes medians.

    Args:
      size: values of each stream.
      repeats: rounds; what disturbs the machine for a while disturbs all alike.
    """
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(size, np.float32)
    bf16 = weights.astype(jnp.bfloat16)
    codes = np.clip(np.rint(weights * 2.5) + 8, 1, 15).astype(np.uint8)
    pruned = np.where(rng.random(size) < 0.9, 0, weights).astype(np.float32)
    coders: dict[str, tuple[np.ndarray, Callable, Callable]] = {
        "bfloat16, lossless": (bf16, encode_array, decode_array),
        "4-bit codes": (
            codes,
            encode_symbols,
            lambda data, dtype, shape, ranks=None: decode_symbols(data, ranks=ranks),
        ),
        "float32, 90% zeros": (pruned, encode_array, decode_array),
    }
    coded = {name: encode(x) for name, (x, encode, _) in coders.items()}
    times: dict[str, list[list[float]]] = {name: [] for name in coders}
    m, k, n = _DOT
    floats = [
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((m, k), (k, n))
    ]
    ints = [(20 * x).astype(jnp.int8) for x in floats]
    dot = jax.jit(jnp.dot)
    int_dot = jax.jit(lambda x, y: jnp.dot(x, y, preferred_element_type=jnp.int32))
    float_s, int_s = [], []
    cores = max(1, threads_for(1 << 40))
    with Coders(cores) as workers:

        def on_all(fn: Callable, *args: Any) -> None:
            list(ahead(lambda _: fn(*args), range(cores), [1] * cores, cores))

        for warm in range(-1, repeats):
            for name, (x, encode, decode) in coders.items():
                stored = coded[name], x.dtype, x.shape
                found = [
                    _seconds(encode, x),
                    _seconds(decode, *stored),
                    _seconds(on_all, encode, x, workers.encode_block),
                    _seconds(on_all, decode, *stored, workers.decode_ranks),
                ]
                times[name] += [found] if warm >= 0 else []
            for _ in range(10):
                float_s += [_seconds(dot, *floats)] * (warm >= 0)
                int_s += [_seconds(int_dot, *ints)] * (warm >= 0)
    rows = []
    for name, (x, _, _) in coders.items():
        medians = map(statistics.median, zip(*times[name], strict=True))
        rows.append(Speed(name, size, x.nbytes, len(coded[name]), *medians))
    return Bench(
        tuple(rows), cores, statistics.median(float_s), statistics.median(int_s)
    )


def _seconds(fn: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - start
