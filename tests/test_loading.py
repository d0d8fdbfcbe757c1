"""load_generator: state dicts into a module, pickled networks where asked for."""

import pickle

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

import rewrite_core as rc


def make():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return make()


class Bomb:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_state_dict(tmp_path, network, suffix, prefix):
    state = {prefix + key: value for key, value in network.state_dict().items()}
    path = tmp_path / f"weights.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    loaded = rc.load_generator(path, make)
    assert not loaded.training
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in loaded.state_dict().items())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight


def test_a_tied_weight_under_one_of_its_names(tmp_path):
    network = Tied()
    save_model(network, tmp_path / "tied.safetensors")
    loaded = rc.load_generator(tmp_path / "tied.safetensors", Tied)
    assert torch.equal(loaded.head.weight, network.head.weight) and loaded.embed.weight is loaded.head.weight
    state = network.state_dict()
    del state["middle.weight"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(rc.FileFormatError, match="Missing key.*middle.weight"):
        rc.load_generator(tmp_path / "w.pt", Tied)


def test_a_state_dict_that_does_not_fit(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    with pytest.raises(rc.FileFormatError, match="w.pt does not fit Linear: .*Missing key"):
        rc.load_generator(tmp_path / "w.pt", lambda: nn.Linear(3, 4))
    with pytest.raises(FileNotFoundError):
        rc.load_generator(tmp_path / "nowhere.pt", make)


def test_nothing_is_unpickled_unasked(tmp_path, network, capsys):
    def old(content, path):
        torch.save(content, path, _use_new_zipfile_serialization=False)

    for name, save in (
        ("torch.pt", torch.save),
        ("old.pth", old),
        ("plain.pkl", lambda content, path: path.write_bytes(pickle.dumps(content))),
    ):
        path = tmp_path / name
        save({"G_ema": network, "extra": Bomb()}, path)
        with pytest.raises(
            rc.RewriteCoreError, match="runs whatever code is in it; give make= and a state dict, or allow_pickle"
        ):
            rc.load_generator(path)
        with pytest.raises(rc.FileFormatError):
            rc.load_generator(path, make)
        assert "run" not in capsys.readouterr().out
        loaded = rc.load_generator(path, allow_pickle=True)
        assert capsys.readouterr().out == "run\n", "which is the risk"
        assert torch.equal(loaded[0].weight, network[0].weight) and not loaded.training


def test_a_pickle_without_a_network(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    with pytest.raises(rc.FileFormatError, match="looks like a state dict, so give make= instead"):
        rc.load_generator(tmp_path / "w.pt", allow_pickle=True)
    torch.save([1, 2], tmp_path / "l.pt")
    with pytest.raises(rc.FileFormatError, match="holds a list and no network"):
        rc.load_generator(tmp_path / "l.pt", allow_pickle=True)
    (tmp_path / "t.pkl").write_text("nothing")
    with pytest.raises(rc.FileFormatError, match="cannot be unpickled"):
        rc.load_generator(tmp_path / "t.pkl", allow_pickle=True)
    (tmp_path / "code.pkl").write_bytes(b"cnowhere_at_all\nNetwork\n.")
    with pytest.raises(rc.RewriteCoreError, match="needs nowhere_at_all to be opened"):
        rc.load_generator(tmp_path / "code.pkl", allow_pickle=True)
    with pytest.raises(FileNotFoundError):
        rc.load_generator(tmp_path / "nowhere.pkl", allow_pickle=True)
