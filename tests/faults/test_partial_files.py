"""Writing: what a killed writer leaves goes away, names fit, permissions are those of any other file."""

import multiprocessing
import os
import signal
import stat
import threading
import time

import pytest
import torch

import rewrite_core as rc
from rewrite_core.files import atomic_write, writable_path


def killed_while_writing(path):
    """A child that is killed in the middle of writing `path`; returns when it is dead."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with atomic_write(path) as partial:
            partial.write_text("half")
            (partial.parent / ".tmp123").write_text("a library's own half")
            os.write(write, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read), os.close(write)


@pytest.mark.parametrize("name", ["m.safetensors", "n" * 255, "ü" * 127, "[a]*?.json"])
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path, name):
    path = tmp_path / name
    (tmp_path / "m.safetensors.other.partial").write_text("a file of somebody else")
    killed_while_writing(path)
    killed_while_writing(path)
    left = [each for each in os.listdir(tmp_path) if each.startswith(".")]
    assert len(left) == 1 and not path.exists()  # the second took the place of the first
    with atomic_write(path) as partial:
        assert partial.name == name
        partial.write_text("whole")
    assert path.read_text() == "whole" and sorted(os.listdir(tmp_path)) == sorted([name, "m.safetensors.other.partial"])


def test_writers_that_live_are_left_alone(tmp_path):
    path = tmp_path / "m"
    with atomic_write(path) as first:
        first.write_text("first")
        with atomic_write(path) as second:
            second.write_text("second")
        assert path.read_text() == "second" and first.exists()
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["m"]


def many_writes(path, text, times):
    for _ in range(times):
        with atomic_write(path) as partial:
            partial.write_text(text)


def test_many_writers_of_one_file_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=many_writes, args=(tmp_path / "m", str(n) * 1000, 60)) for n in range(4)]
    [child.start() for child in children]
    [child.join() for child in children]
    assert [child.exitcode for child in children] == [0] * 4
    text = (tmp_path / "m").read_text()
    assert len(text) == 1000 and len(set(text)) == 1 and os.listdir(tmp_path) == ["m"]


def test_another_machine_s_are_left_for_a_day(tmp_path, monkeypatch):
    path = tmp_path / "m"
    with monkeypatch.context() as patch:
        patch.setattr("platform.node", lambda: "elsewhere")
        killed_while_writing(path)
    (left,) = os.listdir(tmp_path)
    many_writes(path, "x", 1)
    assert sorted(os.listdir(tmp_path)) == [left, "m"]
    killed_while_writing(path)
    assert len(os.listdir(tmp_path)) == 3
    many_writes(path, "x", 1)
    assert sorted(os.listdir(tmp_path)) == [left, "m"]
    os.utime(tmp_path / left, (0, time.time() - 90000))
    many_writes(path, "x", 1)
    assert os.listdir(tmp_path) == ["m"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", unsupported)
    many_writes(tmp_path / "m", "x", 2)
    with atomic_write(tmp_path / "m") as first:
        many_writes(tmp_path / "m", "x", 1)
        assert first.exists()  # nobody can tell that it is in use, so nobody takes it for left
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("length", [237, 238, 255])
def test_names_as_long_as_they_may_be(tmp_path, length):
    moment = rc.SecondMoment(2)
    moment.update(torch.eye(2))
    moment.save(tmp_path / ("m" * length))
    assert rc.SecondMoment.load(tmp_path / ("m" * length)).count == 2


@pytest.mark.parametrize("name", ["m" * 256, "ü" * 128, "/".join(["m" * 200] * 30)])
def test_names_that_are_too_long_are_told_before_the_work(tmp_path, name):
    with pytest.raises(OSError) as caught:
        writable_path(tmp_path / name)
    assert (
        "give a shorter one" in str(caught.value)
        or "name another" in str(caught.value)
        or "no folder" in str(caught.value)
    )
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o027])
def test_permissions_are_the_umask_s_and_never_more(tmp_path, mask):
    before = os.umask(mask)
    try:
        moment = rc.SecondMoment(2)
        moment.update(torch.eye(2))
        moment.save(tmp_path / "m")  # by a library that makes a file of its own
        with atomic_write(tmp_path / "text") as partial:
            partial.write_text("x")
            inside = stat.S_IMODE(os.stat(partial.parent).st_mode)
    finally:
        os.umask(before)
    assert inside == 0o700
    for name in ("m", "text"):
        assert stat.S_IMODE(os.stat(tmp_path / name).st_mode) == 0o666 & ~mask


def test_the_umask_of_other_threads_is_left_alone(tmp_path):
    """It is the process's: to ask for it by setting it opens a window for the files of others."""
    seen, stop = set(), threading.Event()

    def watch():
        while not stop.is_set():
            os.close(os.open(tmp_path / "other", os.O_CREAT | os.O_WRONLY, 0o666))
            seen.add(stat.S_IMODE(os.stat(tmp_path / "other").st_mode))
            os.unlink(tmp_path / "other")

    before = os.umask(0o077)
    thread = threading.Thread(target=watch)
    try:
        thread.start()
        many_writes(tmp_path / "m", "x", 300)
    finally:
        stop.set()
        thread.join()
        os.umask(before)
    assert seen == {0o600}
