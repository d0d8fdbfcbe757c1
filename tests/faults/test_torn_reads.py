"""What is read is of one file, and stays what it was, whatever becomes of the file meanwhile."""

import os
import signal
import time

import pytest
import torch
from safetensors.torch import save_file

import rewrite_core as rc
from rewrite_core.files import load_record, read_state_dict, save_record


def replaced_again_and_again(path, *writers):
    """A child that replaces `path` until it is killed."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        try:
            while True:
                for write in writers:
                    write()
        finally:
            os._exit(1)
    return child


def test_a_file_that_is_replaced_meanwhile_is_one_or_the_other(tmp_path):
    path = tmp_path / "m"
    one, two = rc.SecondMoment(48), rc.SecondMoment(48)
    one.update(torch.ones(100, 48))
    two.update(torch.ones(300, 48))
    one.save(path)
    child, loads, end = (
        replaced_again_and_again(path, lambda: two.save(path), lambda: one.save(path)),
        0,
        time.time() + 3,
    )
    try:
        counts = set()
        while time.time() < end or (len(counts) < 2 and time.time() < end + 20):
            moment = rc.SecondMoment.load(path)
            assert (moment.matrix() == 1).all()
            counts.add(moment.count)
            loads += 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert counts == {100, 300} and loads > 50


def overwrite(path):
    """In place, as no atomic writer does: whoever has mapped the file sees it, and dies of reading past its end."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
        file.truncate(size // 2)


@pytest.mark.parametrize("kind", ["record", "state dict", "moment"])
def test_what_was_loaded_does_not_change_with_its_file(tmp_path, kind):
    path, tensor = tmp_path / "x.safetensors", torch.randn(512, 512, dtype=torch.float64)
    tensor = tensor @ tensor.T
    if kind == "record":
        save_record(path, "thing", 1, {"a": tensor}, {})
        loaded = load_record(path, "thing", 1)[0]["a"]
    elif kind == "state dict":
        save_file({"a": tensor}, path)
        loaded = read_state_dict(path)["a"]
    else:
        moment = rc.SecondMoment(512)
        moment._sum, moment.count = tensor, 1
        moment.save(path)
        loaded = rc.SecondMoment.load(path)._sum
    overwrite(path)
    assert torch.equal(loaded, tensor)
    loaded.mul_(2)  # and is the caller's to write to
