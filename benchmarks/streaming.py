"""A checkpoint larger than the memory that it may take: compressed and restored.

`python benchmarks/streaming.py [GB]` makes a checkpoint of 4 GB beside the temporary
files, runs the commands on it, each in a process of its own whose memory is watched,
and writes docs/results/streaming.md. It takes some minutes and three times the space.
"""

import datetime
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

import jaxcomp as jc
from jaxcomp.coders import threads_for


PAGE = Path(__file__).parents[1] / "docs" / "results" / "streaming.md"
WIDTH, HIDDEN, WORDS = 4096, 11008, 32000
RUNS = {
    "compress --bits 4 --group 64": "small.jxc",
    "restore": "back.safetensors",
    "compress --lossless": "lossless.jxc",
    "restore (lossless)": "same.safetensors",
}


class Drawn:
    """Normal weights that are drawn when they are written."""

    dtype = np.dtype(np.float32)

    def __init__(self, *shape: int, seed: int):
        self.shape, self.seed = shape, seed

    def __array__(self, dtype=None, copy=None):
        rng = np.random.default_rng(self.seed)
        return 0.02 * rng.standard_normal(self.shape, np.float32)


class Run(NamedTuple):
    """What a command took."""

    name: str
    read: int  # bytes
    wrote: int
    seconds: float
    cpu: float  # seconds, of all its processes
    rss: int  # bytes at the worst moment, of all its processes
    anonymous: int  # of these, what is not a page of the mapped file


def checkpoint(gigabytes):
    """Layers of a language model, an embedding first, as large as asked."""
    tree = {"embedding": Drawn(WORDS, WIDTH, seed=0)}
    size, layer = 4 * WORDS * WIDTH, 0
    while size < gigabytes * 1e9:
        shapes = {f"attention/{name}": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {"mlp/gate": (WIDTH, HIDDEN), "mlp/up": (WIDTH, HIDDEN)}
        shapes |= {"mlp/down": (HIDDEN, WIDTH), "norm/scale": (WIDTH,)}
        for i, (name, shape) in enumerate(shapes.items()):
            if size < gigabytes * 1e9:
                tree[f"{layer}/{name}"] = Drawn(*shape, seed=100 * layer + i + 1)
                size += 4 * int(np.prod(shape))
        layer += 1
    return tree


def of_status(pid, field):
    try:
        found = re.search(rf"{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:  # it has just ended
        return 0
    return 1024 * int(found[1]) if found else 0


def watched(name, words, read, wrote):
    """Runs a command and looks at its memory fifty times a second."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    program = "from jaxcomp.cli import app; app()"
    process = subprocess.Popen([sys.executable, "-c", program, *words])
    rss = anonymous = 0
    while process.poll() is None:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            pids = [process.pid, *map(int, listed.read_text().split())]
        except OSError:
            pids = []
        rss = max(rss, sum(of_status(pid, "VmRSS") for pid in pids))
        anonymous = max(anonymous, sum(of_status(pid, "RssAnon") for pid in pids))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}")
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    sizes = read.stat().st_size, wrote.stat().st_size
    return Run(name, *sizes, seconds, cpu, rss, anonymous)


def page(runs, largest, leaves):
    names = ["jaxcomp", "jax", "numpy", "constriction"]
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    whole = runs[0].read
    lines = [
        "# A checkpoint of 4 GB through the commands",
        "",
        f"What `python benchmarks/streaming.py` wrote on {datetime.date.today()} with "
        f"{versions}, Python {platform.python_version()},",
        f"on {threads_for(1 << 40)} CPU cores.",
        "",
        f"{whole:,} bytes of float32 weights of a language model in {leaves} leaves, "
        f"the largest of {largest:,} bytes. Each command",
        "is a process of its own; its time has Python's start and all compilation in "
        "it. MB/s are 10^6 bytes of the float32",
        "checkpoint a second. *Memory* is the most that all its processes held at "
        "once, pages of the mapped files with it;",
        "*own* is without those, which the system takes back when it needs them. "
        "*Cores* is processor time to time.",
        "",
        "| command | read | written | s | MB/s | cores | memory | own |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for run in runs:
        cells = [
            f"`{run.name}`",
            f"{run.read:,}",
            f"{run.wrote:,}",
            f"{run.seconds:.0f}",
            f"{whole / run.seconds / 1e6:.0f}",
            f"{run.cpu / run.seconds:.2f}",
            f"{run.rss / 1e9:.2f} GB",
            f"{run.anonymous / 1e9:.2f} GB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    limit = 1.5e9 + largest
    most = max(run.rss for run in runs)
    speed = min(whole / run.seconds / 1e6 for run in runs[:2])
    lines += [
        "",
        f"At most {most / 1e9:.2f} GB; 1.5 GB and the largest leaf are "
        f"{limit / 1e9:.2f} GB. At 4 bits the slower way is {speed:.0f} MB/s.",
        "The restored lossless checkpoint is the first one, byte for byte. Normal "
        "weights are the worst case for a coder:",
        "those of trained networks take fewer bytes.",
    ]
    return "\n".join(lines) + "\n"


def main(gigabytes):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = folder / "model.safetensors"
        tree = checkpoint(gigabytes)
        jc.write_checkpoint(first, tree)
        os.sync()
        source = {"restore": "small.jxc", "restore (lossless)": "lossless.jxc"}
        runs = []
        for command, out in RUNS.items():
            read = folder / source.get(command, first.name)
            verb, *words = command.replace(" (lossless)", "").split()
            line = [verb, str(read), "-o", str(folder / out), *words]
            runs.append(watched(command, line, read, folder / out))
            os.sync()
        same = subprocess.run(["cmp", first, folder / "same.safetensors"], check=False)
        if same.returncode:
            raise SystemExit("the restored checkpoint is another")
    largest = max(4 * int(np.prod(leaf.shape)) for leaf in tree.values())
    text = page(runs, largest, len(tree))
    print(text)
    if gigabytes >= 4:
        PAGE.write_text(text)


if __name__ == "__main__":
    main(float(sys.argv[1]) if sys.argv[1:] else 4.0)
