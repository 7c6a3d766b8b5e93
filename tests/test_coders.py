"""Coding elsewhere gives what coding here gives, and whatever dies is an error."""

import os
import signal
import sys
import threading
import time

import numpy as np
import pytest

from jaxcomp import coders
from jaxcomp.coders import Coders, ahead
from jaxcomp.entropy import (
    decode_pieces,
    decode_symbols,
    encode_block,
    encode_symbols,
)


RNG = np.random.default_rng(0)
STREAMS = {
    "few": RNG.geometric(0.5, 300_000).astype(np.uint8),
    "one": np.full(100_000, 7, np.uint8),
    "noise": RNG.integers(0, 256, 100_000).astype(np.uint8),
    "wide": RNG.geometric(0.002, 100_000).clip(max=65535).astype(np.uint16),
    "short": np.array([1, 2, 2], np.uint8),
    "empty": np.zeros(0, np.uint8),
}


@pytest.fixture(scope="module")
def workers():
    with Coders(2) as workers:
        yield workers


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_coded_elsewhere_is_the_same_bytes_and_comes_back(workers, name):
    symbols = STREAMS[name]
    stream = encode_symbols(symbols, workers.encode_block)
    assert stream == encode_symbols(symbols)
    pieces = decode_pieces(stream, symbols.size, workers.decode_ranks)
    back = np.concatenate([np.zeros(0, symbols.dtype), *pieces])
    np.testing.assert_array_equal(back, symbols)


def test_more_streams_at_once_than_processes_are_no_deadlock(workers):
    stream = encode_symbols(STREAMS["few"])
    open_ones = [decode_pieces(stream, None, workers.decode_ranks) for _ in range(5)]
    for pieces in zip(*open_ones, strict=True):
        assert all(np.array_equal(piece, pieces[0]) for piece in pieces)


def test_a_stream_that_nobody_reads_to_its_end_does_not_spoil_the_next(workers):
    stream = encode_symbols(STREAMS["few"])
    pieces = decode_pieces(stream, None, workers.decode_ranks)
    next(pieces)
    pieces.close()
    for _ in range(4):
        again = decode_pieces(stream, None, workers.decode_ranks)
        np.testing.assert_array_equal(np.concatenate(list(again)), STREAMS["few"])


def test_a_damaged_stream_is_the_same_error_as_here(workers):
    stream = bytearray(encode_symbols(STREAMS["few"]))
    stream[-9] ^= 1
    with pytest.raises(ValueError) as here:
        decode_symbols(bytes(stream))
    with pytest.raises(ValueError) as there:
        list(decode_pieces(bytes(stream), None, workers.decode_ranks))
    assert str(there.value) == str(here.value)


def test_a_process_that_is_killed_is_an_error_and_the_next_takes_its_place():
    symbols = STREAMS["few"]
    with Coders(1) as workers:
        workers.encode_block(symbols, True)
        child = workers._idle.get()
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        workers._idle.put(child)
        with pytest.raises(RuntimeError, match="has ended by itself"):
            for _ in range(3):  # a pipe may take a little before it is found broken
                workers.encode_block(symbols, True)
        assert workers.encode_block(symbols, True)


def test_no_process_is_left():
    with Coders(2) as workers:
        workers.encode_block(STREAMS["few"], True)
        child = workers._idle.get()
        child = child or workers._idle.get()
        workers._idle.put(child)
    assert child.poll() == 0


def test_without_processes_it_is_done_here(monkeypatch):
    def fail():
        raise OSError("no more processes")

    monkeypatch.setattr(coders, "_start", fail)
    with Coders(2) as workers:
        assert workers.encode_block(STREAMS["few"], True)


@pytest.mark.parametrize("program", ["1 / 0", "pass", "print('x' * 99)"])
def test_a_python_that_does_not_start_as_ours_is_done_without(monkeypatch, program):
    monkeypatch.setattr(coders, "_PROGRAM", program)
    with Coders(1) as workers:
        found = workers.encode_block(STREAMS["few"], True)
    assert found == encode_block(STREAMS["few"], True)


@pytest.mark.parametrize("name", ["executable", "frozen"])
def test_a_program_that_is_not_python_is_not_started_again(monkeypatch, name):
    monkeypatch.setattr(sys, name, name == "frozen" or "", raising=False)
    monkeypatch.setattr(coders.subprocess, "Popen", None)  # to call it is an error
    with Coders(1) as workers:
        assert workers.encode_block(STREAMS["few"], True)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_ahead_keeps_the_order_and_bounds_what_is_in_work(monkeypatch, threads):
    monkeypatch.setattr(coders, "_AHEAD", 10)
    inside, most, lock = 0, 0, threading.Lock()

    def work(item):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.005)  # so that they meet, if they may
        with lock:
            inside -= 1
        return item * 2

    items = list(range(30))
    assert list(ahead(work, items, [4] * 30, threads)) == [2 * i for i in items]
    assert most <= 2  # of 4 bytes each, where 10 are allowed


def test_an_error_of_an_item_comes_in_its_turn():
    def work(item):
        if item == 2:
            raise KeyError(item)
        return item

    found = ahead(work, range(5), [1] * 5, 2)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(KeyError):
        next(found)
