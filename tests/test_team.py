"""The threads of the C++ kernels (csrc/team.h): whoever helps, and whoever does not come, the bits are the same."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from rewrite_core.backends import extension, extension_reason
from rewrite_core.ops import second_moment, spd_solve

pytestmark = pytest.mark.skipif(extension_reason() is not None, reason=f"no extension: {extension_reason()}")

KINDS = ("openmp", "own", "")
SHAPES = ((64, 32), (200, 16), (200, 32), (512, 8), (130, 3))  # groups; blocks, with a part of a run and without


@pytest.fixture(autouse=True)
def as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    extension().choose_helpers("")


def results():
    generator = torch.Generator().manual_seed(1)
    found = []
    for channels, side in SHAPES:
        found.append(second_moment(torch.randn(3, channels, side, side, generator=generator), backend="cpp"))
    keys = torch.randn(900, 300, generator=generator, dtype=torch.float64)
    return [*found, spd_solve(second_moment(keys, backend="cpp"), keys[:40].T.contiguous(), backend="cpp")]


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_helps_the_bits_are_the_same(kind):
    torch.set_num_threads(1)
    alone = results()
    extension().choose_helpers(kind)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert all(map(torch.equal, results(), alone))


def test_callers_share_the_helpers():
    torch.set_num_threads(1)
    alone = results()
    torch.set_num_threads(3)
    extension().choose_helpers("own")
    wrong = []

    def call():
        for _ in range(3):
            if not all(map(torch.equal, results(), alone)):
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_forked_child_has_helpers_of_its_own(tmp_path):
    code = """
import os, torch
from rewrite_core.backends import extension
from rewrite_core.ops import second_moment
torch.set_num_threads(3)
extension().choose_helpers("own")
keys = torch.randn(2, 96, 32, 32)
before = second_moment(keys, backend="cpp")
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(second_moment(keys, backend="cpp"), before) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(second_moment(keys, backend="cpp"), before)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="no helpers torch's"):
        extension().choose_helpers("torch's")
