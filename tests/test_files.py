import os
import stat
import subprocess
import sys

import pytest

import rewrite_core as rc
from rewrite_core.files import atomic_write, writable_path


def write(path, text="new"):
    with atomic_write(path) as partial:
        partial.write_text(text)


def test_a_file_is_made_and_replaced(tmp_path):
    write(tmp_path / "a.txt")
    write(str(tmp_path / "a.txt"), "newer")
    assert (tmp_path / "a.txt").read_text() == "newer" and os.listdir(tmp_path) == ["a.txt"]


def test_a_failure_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_links_are_followed(tmp_path):
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "real.txt"
    for exists in (False, True):  # a link may point to a file that is yet to be made
        link = tmp_path / f"link{exists}"
        link.symlink_to("there/real.txt")
        write(link, str(exists))
        assert link.is_symlink() and target.read_text() == str(exists)
    assert os.listdir(tmp_path / "there") == ["real.txt"]


def test_only_regular_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # stands for every device
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "to_pipe").symlink_to("pipe")
    before = sorted(os.listdir(tmp_path))
    for name in ("pipe", "loop", "to_pipe"):
        with pytest.raises(FileExistsError, match="name another"):
            write(tmp_path / name)
    assert stat.S_ISFIFO(os.lstat(tmp_path / "pipe").st_mode) and (tmp_path / "loop").is_symlink()
    for path, error, words in (
        ("", FileNotFoundError, "empty"),
        (tmp_path, IsADirectoryError, "name a file in it"),
        (f"{tmp_path}/new/", IsADirectoryError, "name a file in it"),
        (tmp_path / "no" / "a.txt", FileNotFoundError, "make it first"),
        (tmp_path / "pipe" / "a.txt", FileNotFoundError, "make it first"),
    ):
        with pytest.raises(error, match=words):
            write(path)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_that_may_not_be_written_to_is_refused_before_the_work(tmp_path, monkeypatch):
    assert writable_path(tmp_path / "a.txt") == (tmp_path / "a.txt").resolve() and not os.listdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="choose another"):
        writable_path(tmp_path / "a.txt")


def test_a_full_disk_is_an_os_error(tmp_path):
    """A limit on a file's size stands in for the disk's."""
    path = tmp_path / "m.safetensors"
    path.write_text("old")
    script = f"""
import resource, signal, torch
from rewrite_core import SecondMoment
moment = SecondMoment(64)
moment.update(torch.randn(100, 64))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    moment.save({str(path)!r})
except OSError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("OSError") and "m.safetensors cannot be written" in done.stdout
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["m.safetensors"]


def test_a_folder_in_the_place_of_a_file_is_told(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"is a folder; name a file in it\.$"):
        rc.SecondMoment.load(tmp_path)
