"""All cores at work: leaves ahead of their turn in threads, symbols in processes.

The coder holds Python's lock while it works, so that two threads take as long as one.
It runs in child processes instead, which import NumPy and the coder and nothing else;
symbols and streams go through their pipes. A thread waits for each.
"""

import contextlib
import os
import queue
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from jaxcomp.entropy import decode_ranks, encode_block


T = TypeVar("T")
_MOST = 8  # threads; each takes some memory of its own
_WORTH = 1 << 25  # bytes; what is less is done before a process has started
_SHORT = 1 << 14  # symbols; as many take no longer than the way through the pipes
_AHEAD = 1 << 29  # bytes of items that are worked on at once

_REQUEST = struct.Struct("<BQQQ")  # what to do, two numbers for it, bytes that follow
_ENCODE, _DECODE = 0, 1
_ANSWER = struct.Struct("<BQ")  # how it went, bytes that follow
_FINE, _WRONG = 0, 1
_READY = b"jaxcomp codes"

# Of the package the child sees this file and `entropy`, not JAX.
_PROGRAM = (
    "import sys, types; package = types.ModuleType('jaxcomp'); "
    "package.__path__ = sys.argv[1:]; sys.modules['jaxcomp'] = package; "
    "from jaxcomp.coders import serve; serve()"
)


def threads_for(nbytes: int) -> int:
    """How many threads, and processes, that much is worth: up to 8 cores, or none."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min(cores, _MOST) if cores > 1 and nbytes >= _WORTH else 0


def ahead(
    fn: Callable[[T], Any], items: Iterable[T], sizes: Iterable[int], threads: int
) -> Iterator[Any]:
    """``fn`` of each item, in order; threads work on those whose turn comes next.

    Args:
      fn: is called once for each item, in any thread.
      items: taken when there is room for them.
      sizes: bytes that each takes. At most 512 MiB are worked on at once, or one item.
      threads: how many; with 0 nothing is done ahead.

    >>> list(ahead(abs, [-1, 2, -3], [1, 1, 1], threads=2))
    [1, 2, 3]
    """
    if not threads:
        yield from map(fn, items)
        return
    waiting: deque[tuple[Future, int]] = deque()
    held = 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item, size in zip(items, sizes, strict=True):
                while waiting and (held + size > _AHEAD or len(waiting) > 4 * threads):
                    first, freed = waiting.popleft()
                    yield first.result()
                    held -= freed
                waiting.append((pool.submit(fn, item), size))
                held += size
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            for future, _ in waiting:
                future.cancel()


class Coders:
    """Child processes that code symbols; any thread may ask.

    Each starts when it is first needed. What finds none idle is coded here.

    Args:
      count: how many there may be.

    >>> with Coders(2) as coders:
    ...     coders.encode_block(np.array([6, 7, 7, 6], np.uint8), True).hex(" ")
    '01 06 06'
    """

    def __init__(self, count: int):
        self._idle: queue.SimpleQueue[subprocess.Popen | None] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(None)

    def __enter__(self) -> "Coders":
        return self

    def __exit__(self, *_: Any) -> None:
        while not self._idle.empty():
            _end(self._idle.get())

    def encode_block(self, symbols: np.ndarray, is_last: bool) -> bytes:
        """What `entropy.encode_block` does."""
        with self._child(symbols.size) as child:
            if child is None:
                return encode_block(symbols, is_last)
            _ask(child, _ENCODE, symbols.itemsize, is_last, symbols.tobytes())
            return _answer(child)

    def decode_ranks(
        self, payload: bytes, roots: np.ndarray, count: int
    ) -> Iterator[np.ndarray]:
        """What `entropy.decode_ranks` does."""
        with self._child(count) as child:
            if child is None:
                yield from decode_ranks(payload, roots, count)
                return
            table = roots.astype(np.uint16).tobytes()
            _ask(child, _DECODE, roots.size, count, table + payload)
            while piece := _answer(child):
                yield np.frombuffer(piece, _narrow(roots.size))

    @contextlib.contextmanager
    def _child(self, size: int) -> Iterator[subprocess.Popen | None]:
        try:
            child = self._idle.get_nowait() if size >= _SHORT else None
            if size >= _SHORT and child is None:
                child = _start()
        except (queue.Empty, OSError):  # no more processes: then do without
            child = None
        if child is None:
            yield None
            return
        try:
            yield child
        except BaseException:  # it may be amidst an answer that nobody will read
            _end(child, kill=True)
            child = None
            raise
        finally:
            self._idle.put(child)


def serve() -> None:
    """Answers one request after the other, until there are no more."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sink.write(_READY)
    sink.flush()
    while head := source.read(_REQUEST.size):
        kind, first, second, length = _REQUEST.unpack(head)
        data = source.read(length)
        try:
            for answer in _answers(kind, first, second, data):
                _send(sink, _FINE, answer)
        except ValueError as error:
            _send(sink, _WRONG, str(error).encode())


def _answers(kind: int, first: int, second: int, data: bytes) -> Iterator[bytes]:
    if kind == _ENCODE:
        yield encode_block(np.frombuffer(data, f"u{first}"), bool(second))
        return
    roots = np.frombuffer(data, np.uint16, first)
    for piece in decode_ranks(data[roots.nbytes :], roots, second):
        yield piece.astype(_narrow(first)).tobytes()
    yield b""


def _send(sink: BinaryIO, kind: int, data: bytes) -> None:
    sink.write(_ANSWER.pack(kind, len(data)))
    sink.write(data)
    sink.flush()


def _narrow(alphabet: int) -> np.dtype:
    return np.dtype(np.uint8 if alphabet <= 256 else np.uint16)


def _start() -> subprocess.Popen:
    """A child that is ready; an `OSError` where there is none to be had."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise OSError("this is no Python that could be started again")
    child = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # an interrupt from the keyboard is not for it
    )
    assert child.stdout
    if child.stdout.read(len(_READY)) != _READY:
        _end(child, kill=True)
        raise OSError("a process that codes symbols cannot start")
    return child


def _end(child: subprocess.Popen | None, kill: bool = False) -> None:
    if child is None:
        return
    if kill:
        child.kill()
    with contextlib.suppress(OSError):
        child.communicate()


def _ask(child: subprocess.Popen, kind: int, one: int, two: int, data: bytes) -> None:
    assert child.stdin
    try:
        child.stdin.write(_REQUEST.pack(kind, one, two, len(data)))
        child.stdin.write(data)
        child.stdin.flush()
    except BrokenPipeError as error:
        raise _died() from error


def _answer(child: subprocess.Popen) -> bytes:
    assert child.stdout
    head = child.stdout.read(_ANSWER.size)
    kind, length = _ANSWER.unpack(head or bytes(_ANSWER.size))
    data = child.stdout.read(length)
    if len(head) < _ANSWER.size or len(data) < length:
        raise _died()
    if kind == _WRONG:
        raise ValueError(data.decode())
    return data


def _died() -> RuntimeError:
    return RuntimeError(
        "a process that codes symbols has ended by itself: the memory may have been "
        "full. Try again."
    )
