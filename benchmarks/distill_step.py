"""One step of distillation: ours, the same by hand, and in PyTorch.

    taskset -c 1 env OMP_NUM_THREADS=1 python benchmarks/distill_step.py

All in one process and interleaved, the order turned in every round; a ratio is the
median over rounds of the ratio within a round. The seconds are those that the process
had the core, which are seconds of the clock where it has no other work. The step by
hand is there twice: what the two differ by is the noise. Where torch is installed, its
steps run beside ours, on one thread, from the same weights. It takes five minutes.
"""

import importlib.util
import math
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.nn import log_softmax, relu, softmax

import jaxcomp as jc


ROUNDS = 21
T, HARD = 2.0, 0.1
# So low that the nets stay what they are: those that fit their batch have gradients so
# small that arithmetic with them is slow.
RATE = 1e-7
TX = optax.adam(RATE)

Run = Callable[[], Any]
halved = partial(
    jax.lax.conv_general_dilated,
    window_strides=(2, 2),
    padding=((1, 1), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
)


# The nets. Each gives logits and new statistics, of which most have none.


def mlp(weights: Any, stats: Any, x: Any, train: bool) -> tuple[jax.Array, Any]:
    for layer in weights[:-1]:
        x = relu(x @ layer["kernel"] + layer["bias"])
    return x @ weights[-1]["kernel"] + weights[-1]["bias"], stats


def conv(weights: Any, stats: Any, x: Any, train: bool) -> tuple[jax.Array, Any]:
    """Convolutions with batch norm that halve height and width, a mean, a layer."""
    found = []
    for layer, old in zip(weights[:-1], stats, strict=True):
        x = halved(x, layer["kernel"])
        now = old
        if train:
            now = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
        scale = layer["scale"] * jax.lax.rsqrt(now["var"] + 1e-5)
        x = relu((x - now["mean"]) * scale + layer["bias"])
        found.append(jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, old, now))
    x = x.mean((1, 2))
    return x @ weights[-1]["kernel"] + weights[-1]["bias"], found


def transformer(weights: Any, stats: Any, x: Any, train: bool) -> tuple[jax.Array, Any]:
    """Causal, norms before the branches; padding is seen by nobody."""
    words, mask = x
    seen = mask[:, None, None, :] & jnp.tril(jnp.ones((words.shape[1],) * 2, bool))
    x = weights["words"][words] + weights["places"]
    for block in weights["blocks"]:
        q, k, v = (
            (norm(x) @ block[name]).reshape(*x.shape[:2], 4, -1) for name in "qkv"
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        mixed = softmax(jnp.where(seen, scores, -1e9))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", mixed, v).reshape(x.shape)
        x = x + mixed @ block["out"]
        x = x + jax.nn.gelu(norm(x) @ block["up"]) @ block["down"]
    return norm(x) @ weights["head"], stats


def norm(x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


class Task(NamedTuple):
    """A net in two sizes: (weights, statistics) of each; a batch (x, labels, mask)."""

    net: Callable[..., tuple[jax.Array, Any]]
    student: tuple[Any, Any]
    teacher: tuple[Any, Any]
    batch: tuple[Any, Any, Any]


def normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape) * math.sqrt(2 / math.prod(shape[:-1]))


def dense(key: jax.Array, *widths: int) -> list[Any]:
    keys = jax.random.split(key, len(widths) - 1)
    pairs = zip(keys, widths, widths[1:], strict=False)
    return [{"kernel": normal(k, i, o), "bias": jnp.zeros(o)} for k, i, o in pairs]


def convolutions(key: jax.Array, *widths: int) -> tuple[list[Any], list[Any]]:
    first, last = jax.random.split(key)
    keys = jax.random.split(first, len(widths) - 1)
    layers = [
        {"kernel": normal(k, 3, 3, i, o), "scale": jnp.ones(o), "bias": jnp.zeros(o)}
        for k, i, o in zip(keys, widths, widths[1:], strict=False)
    ]
    stats = [{"mean": jnp.zeros(o), "var": jnp.ones(o)} for o in widths[1:]]
    return [*layers, *dense(last, widths[-1], 10)], stats


def blocks(key: jax.Array, count: int, d: int = 128, words: int = 1000) -> Any:
    shapes = {"q": (d, d), "k": (d, d), "v": (d, d), "out": (d, d)}
    shapes |= {"up": (d, 4 * d), "down": (4 * d, d)}
    keys = iter(jax.random.split(key, 3 + count * len(shapes)))
    return {
        "words": normal(next(keys), words, d),
        "places": normal(next(keys), 64, d),
        "head": normal(next(keys), d, words),
        "blocks": [
            {name: normal(next(keys), *shape) for name, shape in shapes.items()}
            for _ in range(count)
        ],
    }


def tasks() -> dict[str, Task]:
    ours, theirs, key_x, key_y = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(key_x, (256, 784))
    y = jax.random.randint(key_y, (256,), 0, 10)
    words = jax.random.randint(key_x, (16, 64), 0, 1000)
    there = jnp.arange(64) < jax.random.randint(key_y, (16, 1), 16, 65)
    return {
        "MLP": Task(
            mlp,
            (dense(ours, 784, 300, 100, 10), None),
            (dense(theirs, 784, 1024, 1024, 10), None),
            (x, y, None),
        ),
        "convolutions": Task(
            conv,
            convolutions(ours, 1, 16, 32),
            convolutions(theirs, 1, 32, 64),
            (x[:128].reshape(-1, 28, 28, 1), y[:128], None),
        ),
        "transformer": Task(
            transformer,
            (blocks(ours, 1), None),
            (blocks(theirs, 2), None),
            ((words, there), jnp.roll(words, -1, axis=1), there),
        ),
    }


# The steps. Each is a jitted function and what it is first called with.


class Step(NamedTuple):
    """``f(*carry, *given) -> (*carry, metrics)``"""

    f: Any
    carry: tuple[Any, ...]
    given: tuple[Any, ...]


def our_step(task: Task, said: Any = None, **options: Any) -> Step:
    """With ``said`` the teacher is not run: it is what the teacher has said."""

    def student(params: Any, x: Any) -> jc.distill.Outputs:
        logits, stats = task.net(*params, x, train=True)
        # Of a tuple, the leaves of the second part have paths that begin with 1.
        return jc.distill.Outputs(logits, state={1: stats})

    def teacher(params: Any, x: Any) -> Any:
        return params if said is not None else task.net(*params, x, train=False)[0]

    theirs = task.teacher if said is None else said
    step = jc.distill_step(student, teacher, TX, temperature=T, hard=HARD, **options)
    return Step(step, (task.student, TX.init(task.student)), (theirs, task.batch))


def mean(values: jax.Array, mask: Any) -> jax.Array:
    if mask is None:
        return values.mean()
    return jnp.where(mask, values, 0).sum() / mask.sum()


def step_by_hand(task: Task, distil: bool = True, said: Any = None) -> Step:
    """With ``distil=False`` the student's own step, without a teacher."""
    given = task.teacher if said is None else said

    @jax.jit
    def step(
        weights: Any, stats: Any, state: Any, teacher: Any, batch: Any
    ) -> tuple[Any, Any, Any, Any]:
        x, y, mask = batch
        if distil:
            theirs = task.net(*teacher, x, train=False)[0] if said is None else teacher

        def loss(weights: Any) -> tuple[jax.Array, Any]:
            ours, new = task.net(weights, stats, x, train=True)
            hard = optax.softmax_cross_entropy_with_integer_labels(ours, y)
            hard = mean(hard, mask)
            if not distil:
                return hard, (new, {"loss": hard})
            log_q, log_p = log_softmax(ours / T), log_softmax(theirs / T)
            soft = T**2 * mean((jnp.exp(log_p) * (log_p - log_q)).sum(-1), mask)
            total = (1 - HARD) * soft + HARD * hard
            return total, (new, {"loss": total, "soft": soft, "hard": hard})

        grads, (new, metrics) = jax.grad(loss, has_aux=True)(weights)
        updates, state = TX.update(grads, state, weights)
        return optax.apply_updates(weights, updates), new, state, metrics

    weights, stats = task.student
    return Step(step, (weights, stats, TX.init(weights)), (given, task.batch))


def repeated(step: Step) -> Run:
    """A call goes on from where the last one ended, and gives the loss."""
    carry = step.carry

    def run() -> Any:
        nonlocal carry
        *carry, metrics = step.f(*carry, *step.given)
        return metrics["loss"]

    return run


def torch_steps(task: Task) -> dict[str, Run]:
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(1)

    def tensor(x: jax.Array) -> Any:
        return torch.tensor(jax.device_get(x))

    def linear(layer: Any) -> Any:
        found = nn.Linear(*layer["kernel"].shape)
        found.weight.data = tensor(layer["kernel"].T)
        found.bias.data = tensor(layer["bias"])
        return found

    def module(weights: Any) -> Any:
        parts: list[Any] = []
        for layer in weights[:-1]:
            if layer["kernel"].ndim == 2:
                parts += [linear(layer), nn.ReLU()]
                continue
            *_, i, o = layer["kernel"].shape
            kernel = nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False)
            kernel.weight.data = tensor(layer["kernel"].transpose(3, 2, 0, 1))
            parts += [kernel, nn.BatchNorm2d(o), nn.ReLU()]
        if task.net is conv:
            parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*parts, linear(weights[-1]))

    x, y = map(tensor, task.batch[:2])
    if task.net is conv:
        x = x.permute(0, 3, 1, 2).contiguous()

    def step(change: Callable[[Any], Any]) -> Run:
        student = change(module(task.student[0]).train())
        teacher = change(module(task.teacher[0]).eval())
        optimizer = torch.optim.Adam(student.parameters(), RATE)

        def run() -> Any:
            with torch.no_grad():
                theirs = teacher(x)
            ours = student(x)
            log_q, log_p = F.log_softmax(ours / T, -1), F.log_softmax(theirs / T, -1)
            soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
            loss = (1 - HARD) * T**2 * soft + HARD * F.cross_entropy(ours, y.long())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run

    return {"PyTorch": step(lambda net: net), "torch.compile": step(torch.compile)}


# What is measured.


def built(name: str, make: Callable[[], Step]) -> None:
    """Prints a row: what is compiled, and in how many seconds, the median of three."""
    traces, compiles = [], []
    for _ in range(3):
        step = make()
        start = time.process_time()
        lowered = step.f.lower(*step.carry, *step.given)
        traced = time.process_time()
        compiled = lowered.compile()
        traces.append(traced - start)
        compiles.append(time.process_time() - traced)
    text, words = compiled.as_text(), ("dot", "convolution", "custom-call")
    counts = " | ".join(str(len(re.findall(rf" {word}\(", text))) for word in words)
    space = compiled.memory_analysis().temp_size_in_bytes
    trace, compilation = statistics.median(traces), statistics.median(compiles)
    row = f"| {name} | {counts} | {space:,} | {trace:.2f} s | {compilation:.2f} s |"
    print(row, flush=True)


def timed(runs: dict[str, Run]) -> dict[str, list[float]]:
    """Seconds of a call of each in every round, interleaved."""
    calls = {}
    for name, run in runs.items():
        for _ in range(3):  # compilation, and what a second call still finds to do
            jax.block_until_ready(run())
        start = time.process_time()
        jax.block_until_ready(run())
        calls[name] = math.ceil(0.1 / (time.process_time() - start))
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(ROUNDS):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.process_time()
            for _ in range(calls[name]):
                last = runs[name]()
            jax.block_until_ready(last)
            found[name].append((time.process_time() - start) / calls[name])
    return found


def ratio(above: list[float], below: list[float]) -> str:
    """The median over rounds, and the quartiles."""
    low, middle, high = statistics.quantiles(
        (a / b for a, b in zip(above, below, strict=True)), n=4
    )
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def compare(title: str, runs: dict[str, Run], ours: str) -> None:
    """Prints rows: milliseconds, the ratio to the first of them, that of ours to it."""
    found = timed(runs)
    base = next(iter(found))
    for name, seconds in found.items():
        to_base = "1" if name == base else ratio(seconds, found[base])
        of_ours = "1" if name == ours else ratio(found[ours], seconds)
        ms = 1000 * statistics.median(seconds)
        print(f"| {title} | {name} | {ms:.2f} | {to_base} | {of_ours} |", flush=True)


def head(*names: str) -> None:
    print(f"\n| {' | '.join(names)} |")
    print(f"| {' | '.join(':--' if not name else '--:' for name in names)} |")


def main() -> None:
    everything = tasks()
    head("", "dots", "convolutions", "library calls", "temporaries", "trace", "compile")
    for title, task in everything.items():
        built(f"{title}, by hand", partial(step_by_hand, task))
        built(f"{title}, ours", partial(our_step, task))
    head("", "", "ms", "to the step by hand", "ours to it")
    for title, task in everything.items():
        runs = {
            "by hand": repeated(step_by_hand(task)),
            "by hand again": repeated(step_by_hand(task)),
            "ours": repeated(our_step(task)),
        }
        if importlib.util.find_spec("torch") and task.net is not transformer:
            runs |= torch_steps(task)
        losses = {name: float(run()) for name, run in runs.items()}
        assert max(losses.values()) - min(losses.values()) < 1e-3, losses
        compare(title, runs, "ours")
    head("", "", "ms", "to the student's own step", "ours to it")
    for title, task in everything.items():
        said = task.net(*task.teacher, task.batch[0], train=False)[0]
        runs = {
            "its own step": repeated(step_by_hand(task, distil=False)),
            "its own step again": repeated(step_by_hand(task, distil=False)),
            "cached, by hand": repeated(step_by_hand(task, said=said)),
            "cached, ours": repeated(our_step(task, said)),
        }
        if task.net is transformer:
            top = jc.distill.top_k_targets(said, 16, T)
            step = our_step(task, top, soft=jc.distill.sparse_target_loss)
            runs["16 classes cached, ours"] = repeated(step)
        compare(title, runs, "cached, ours")


if __name__ == "__main__":
    main()
