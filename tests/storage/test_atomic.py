"""A save is done or not begun: killed, out of space, refused or read meanwhile."""

import contextlib
import errno
import importlib.util
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.storage.container import open_file


def script():
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NOISE = {"w": np.frombuffer(np.random.default_rng(0).bytes(10**6), np.uint8)}


@pytest.fixture
def path(tmp_path):
    jc.save(tmp_path / "w.jxc", {"old": 1})
    return tmp_path / "w.jxc"


def assert_is_old(path):
    assert jc.load(path) == {"old": 1}
    assert os.listdir(path.parent) == [path.name]


@contextlib.contextmanager
def size_limit(size):
    """No file may grow beyond it, as on a disk that is full."""
    _, most = usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@contextlib.contextmanager
def nobody():
    """Root may write everywhere, nobody may not."""
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_save_that_is_killed_leaves_the_old_file_or_the_new_one(tmp_path):
    _, wrong = script().kill_saves(tmp_path, times=10, seed=0)
    assert not wrong


@pytest.mark.parametrize("size", [0, 100, 999_999])
def test_a_full_disk_is_one_error_that_names_the_file(path, size):
    with size_limit(size), pytest.raises(OSError, match=r"w\.jxc'$") as error:
        jc.save(path, NOISE)
    assert error.value.errno == errno.EFBIG
    assert error.value.filename == str(path)
    assert_is_old(path)
    jc.save(path, NOISE)  # with space again
    np.testing.assert_array_equal(jc.load(path)["w"], NOISE["w"])


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_late_is_the_same_error(path, monkeypatch, failing, number):
    def fail(*args):
        raise OSError(number, os.strerror(number), *args[:1])

    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(os, failing, fail)
        jc.save(path, NOISE)
    assert str(error.value) == f"[Errno {number}] {os.strerror(number)}: '{path}'"
    assert_is_old(path)


def test_a_folder_that_is_read_only_is_one_error(path, monkeypatch):
    monkeypatch.chdir(path.parent)  # nobody may not even enter the folders above
    path.parent.chmod(0o555)
    try:
        with nobody(), pytest.raises(PermissionError, match=r"denied: 'w\.jxc'$"):
            jc.save("w.jxc", NOISE)
    finally:
        path.parent.chmod(0o755)
    assert_is_old(path)


def test_a_folder_that_is_not_there_is_one_error(tmp_path):
    path = tmp_path / "no" / "w.jxc"
    with pytest.raises(FileNotFoundError, match=r"no/w\.jxc'$"):
        jc.save(path, NOISE)


def test_a_folder_in_the_place_of_the_file_is_one_error(tmp_path):
    (tmp_path / "w.jxc").mkdir()
    with pytest.raises(IsADirectoryError, match=r"w\.jxc'$"):
        jc.save(tmp_path / "w.jxc", NOISE)
    assert os.listdir(tmp_path) == ["w.jxc"]


def test_readers_see_the_old_file_or_the_new_one_while_it_is_replaced(tmp_path):
    fuzz = script()
    path = tmp_path / "w.jxc"
    trees = fuzz.old_and_new()
    jc.save(path, trees[0])
    whole = [fuzz.raw(tree) for tree in trees]
    code = [sys.executable, "-W", "ignore", fuzz.__file__, "saver", str(path)]
    seen, files = set(), set()
    with subprocess.Popen(code, stdin=-1, stdout=-1, text=True, bufsize=1) as saver:
        saver.stdin.write("\n")
        child = int(saver.stdout.readline())
        try:
            for number in range(500):
                leaves = open_file(path)
                files.add(os.stat(path).st_ino)
                tree = jc.load(path) if number % 2 else dict(leaves)
                seen.add(whole.index(fuzz.raw(tree)))
                if number > 20 and len(seen) == 2:
                    break
        finally:
            os.kill(child, signal.SIGKILL)
            saver.stdin.close()
    assert seen == {0, 1}
    assert len(files) > 2  # it was replaced while it was open
