"""What could only fail when a result is saved is found before the result is made, or does not fail."""

import json
import math
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import rewrite_core as rc
from rewrite_core.cli.entry import main
from rewrite_core.files import plain, save_record, save_tensors, to_json


def generator():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Unflatten(1, (4, 1, 1)), torch.nn.Conv2d(4, 3, 1))


Z = rc.sample_latents(4, 40)


@pytest.fixture
def layer():
    return rc.bind(generator(), "1")


@pytest.mark.parametrize("seed", [np.int64(7), np.uint32(7), torch.tensor(7), np.array(7)])
def test_numbers_of_numpy_are_plain_in_files(layer, tmp_path, seed):
    moment = rc.collect_second_moment(layer, Z, latent_seed=seed, batch_size=np.int32(8), until=np.float32(9))
    moment.save(tmp_path / "m")
    assert rc.SecondMoment.load(tmp_path / "m").latents["seed"] == 7


def test_what_no_file_has_room_for_is_told_before_anything_runs(layer, monkeypatch, tmp_path):
    monkeypatch.setattr(layer.generator, "forward", None)
    for seed in ({1, 2}, object(), 1j, b"7", 10**30):
        with pytest.raises(rc.ArgumentError, match=r"latents\['seed'\] is .* which a file has no room for"):
            rc.collect_second_moment(layer, Z, latent_seed=seed)
    long = "m" * 300
    for collect in (
        lambda: rc.collect_second_moment(layer, Z, checkpoint=tmp_path / long),
        lambda: rc.collect_second_moments([layer], Z, checkpoints=[tmp_path / long]),
    ):
        with pytest.raises(OSError, match="300 bytes and .* takes 255; give a shorter"):
            collect()
    for path in (3, b"m", ["m"]):
        with pytest.raises(rc.ArgumentError, match="A file is named by a str or a Path"):
            rc.collect_second_moment(layer, Z, checkpoint=path)


def test_facts_that_a_loader_would_refuse_are_not_saved(tmp_path):
    for wrong in ({"fingerprint": 5}, {"merged": {}}, {"merged": [5]}, {"used": -1}):
        moment = rc.SecondMoment(3)
        moment.latents = wrong
        with pytest.raises(rc.ArgumentError, match="A second moment's `latents`"):
            moment.save(tmp_path / "m")
    assert os.listdir(tmp_path) == []
    for text in (5, b"conv"):
        with pytest.raises(rc.ArgumentError, match="is text, or None"):
            rc.SecondMoment(3, layer=text)


def test_json_holds_no_nan(tmp_path):
    text = to_json({"a": [math.nan, np.float32("inf"), -math.inf, 1.5], "b": torch.tensor([1.0, math.nan])})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, None, None, 1.5], "b": [1.0, None]}
    assert plain({1: (2, True, None, "x")}, "it") == {"1": [2, True, None, "x"]}
    moment = rc.SecondMoment(2)
    moment.update(torch.full((3, 2), 1e100, dtype=torch.float64))
    moment.key_errors = torch.tensor([math.nan, 1.0], dtype=torch.float64)
    moment._spread = math.inf
    moment.save(tmp_path / "m")
    loaded = rc.SecondMoment.load(tmp_path / "m")
    assert math.isnan(loaded._spread) and loaded.key_errors is None


def test_deep_and_long_metadata(tmp_path):
    deep = []
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(rc.ArgumentError, match="which a file has no room for"):
        to_json(deep)
    with pytest.raises(rc.RewriteCoreError, match="more than a safetensors file takes"):
        save_record(tmp_path / "m", "second_moment", 1, {"sum": torch.eye(2)}, {"text": "x" * 60_000_000})
    assert os.listdir(tmp_path) == []


def test_tensors_that_share_memory_are_saved(tmp_path):
    both, tied = torch.arange(8.0), torch.eye(3)
    tensors = {"a": both[:4], "b": both[2:6], "c": both.view(2, 4).T, "d": tied, "e": tied, "f": both, "g": both[:0]}
    save_tensors(tmp_path / "m", tensors, {"format": "pt"})
    found = load_file(tmp_path / "m")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items()) and len(found) == 7
    lazy = torch.ones(3, dtype=torch.complex64).mul(1j).conj().imag  # read with the wrong sign unless resolved
    save_tensors(tmp_path / "m", {"a": lazy})
    assert torch.equal(load_file(tmp_path / "m")["a"], lazy)
    for odd in (torch.eye(2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.complex128)):
        with pytest.raises(rc.RewriteCoreError, match="m cannot hold"):
            save_tensors(tmp_path / "m", {"a": odd})


def test_state_dicts_of_tied_weights_are_written(tmp_path, monkeypatch):
    """The layer's own, or others: by `rewrite edit --state-dict` and `rewrite export`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tied_generator.py").write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    maps = torch.nn.Unflatten(1, (6, 1, 1)), torch.nn.ConvTranspose2d(6, 8, 4)\n"
        "    G = torch.nn.Sequential(*maps, torch.nn.Conv2d(8, 3, 3, padding=1), torch.nn.PReLU(), torch.nn.PReLU())\n"
        "    G[4].weight = G[3].weight\n"
        "    return G\n"
    )
    mask = np.zeros((4, 4))
    mask[1:3, 1:3] = 1
    rc.Edit(copy=rc.Selection(0, mask), paste=rc.Selection(1, mask), context=[rc.Selection(1, mask)]).save("e.json")
    words = ["--generator", "tied_generator:make", "--latent-size", "6", "--quiet"]
    edit = [
        "edit",
        "e.json",
        "--layer",
        "2",
        "--count",
        "30",
        "--out",
        "r.safetensors",
        "--state-dict",
        "s.safetensors",
    ]
    assert main([*edit, *words]) == 0
    assert main(["export", "r.safetensors", "--format", "state-dict", "--out", "x.safetensors", *words]) == 0
    for name in ("s.safetensors", "x.safetensors"):
        assert torch.equal(load_file(name)["3.weight"], load_file(name)["4.weight"])
