"""Checkpoints: extra state, wrappers' prefixes, numbers of NumPy's, and small files that ask for much memory."""

import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import rewrite_core as rc
from rewrite_core.generators.proggan import ProgGAN
from rewrite_core.generators.stylegan2 import StyleGAN2


class Extra(nn.Module):
    """Has state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Linear(3, 4), 1

    def get_extra_state(self):
        return {"scale": self.scale}

    def set_extra_state(self, state):
        self.scale = state["scale"]


def small():
    torch.manual_seed(0)
    return StyleGAN2(8, style_dim=6, n_mlp=1, channels={4: 4, 8: 4})


def test_extra_state_is_loaded(tmp_path):
    network = nn.Sequential(Extra())
    network[0].scale = 7
    for prefix in ("", "module."):
        torch.save({prefix + key: value for key, value in network.state_dict().items()}, tmp_path / "w.pt")
        loaded = rc.load_generator(tmp_path / "w.pt", lambda: nn.Sequential(Extra()))
        assert loaded[0].scale == 7 and torch.equal(loaded[0].first.weight, network[0].first.weight)
    with pytest.raises(rc.FileFormatError, match="does not fit"):
        rc.load_generator(tmp_path / "w.pt", lambda: nn.Sequential(nn.Linear(3, 4)))
    torch.save(
        {"0._extra_state": 5} | {k: v for k, v in network.state_dict().items() if "extra" not in k}, tmp_path / "b.pt"
    )
    with pytest.raises(rc.FileFormatError, match="does not fit"):
        rc.load_generator(tmp_path / "b.pt", lambda: nn.Sequential(Extra()))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_prefixes_are_taken_off(prefix):
    network = small()
    state = {prefix + key: value for key, value in network.state_dict().items()}
    for source in (state, {"g_ema": state}):
        loaded = rc.load_stylegan2(source)
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in network.state_dict().items())
    proggan = ProgGAN([6, 4, 4])
    loaded = rc.load_proggan({prefix + key: value for key, value in proggan.state_dict().items()})
    assert torch.equal(loaded.layer1.conv.weight, proggan.layer1.conv.weight)


def test_numbers_of_numpys_beside_the_weights(tmp_path):
    content = {"g_ema": small().state_dict(), "step": np.int64(7), "loss": np.float32(0.5), "kept": np.bool_(True)}
    torch.save(content, tmp_path / "g.pt")
    assert torch.equal(rc.load_stylegan2(tmp_path / "g.pt").input.input, small().input.input)
    torch.save({"0.weight": np.str_("x" * 10)}, tmp_path / "s.pt")
    with pytest.raises(rc.FileFormatError):
        rc.load_generator(tmp_path / "s.pt", lambda: nn.Sequential(nn.Linear(1, 1)))


def cases():
    whole = small().state_dict()
    many = {f"convs.{n}.conv.weight": torch.zeros(1, 1, 1, 1, 1) for n in range(28)}
    many |= {"input.input": torch.zeros(1, 1, 4, 4), "conv1.conv.modulation.weight": torch.zeros(1, 1)}
    large = {
        k: torch.zeros(1).expand(v.shape[0], *(4096 if n < 3 else s for n, s in enumerate(v.shape[1:])))
        for k, v in whole.items()
    }
    return {
        "layers without an end": many,
        "a number in place of thousands": large,
        "no channels": whole | {"input.input": torch.zeros(1, 0, 4, 4)},
        "no style": whole | {"conv1.conv.modulation.weight": torch.zeros(4, 0)},
        "thousands of digits": {f"layer{'9' * 5000}.conv.weight": torch.zeros(1, 1, 1, 1)},
        "one layer far away": {"layer999.conv.weight": torch.zeros(1, 1, 4, 4)},
        "empty layers": {"layer1.conv.weight": torch.zeros(1, 0, 4, 4)},
    }


PROGRAM = """
import resource, sys
import torch
import rewrite_core as rc

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for load in (rc.load_stylegan2, rc.load_proggan):
    try:
        load(sys.argv[1])
    except rc.FileFormatError as error:
        assert len(str(error)) < 500, len(str(error))
    else:
        sys.exit("it was taken")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("case", cases())
def test_a_small_file_takes_no_memory(case, tmp_path):
    torch.save({"g_ema": cases()[case]}, tmp_path / "g.pt")
    assert (tmp_path / "g.pt").stat().st_size < 2**20
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "g.pt")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) < 200_000, "kilobytes"


def test_noise_maps_are_drawn_for_layers_that_are_there():
    state = {key: value for key, value in small().state_dict().items() if not key.startswith("noises.")}
    loaded = rc.load_stylegan2(state)
    wanted = np.random.RandomState(1).standard_normal((1, 1, 4, 4))
    assert torch.equal(loaded.noises.noise_0, torch.from_numpy(wanted).float())
    for key in ("convs.1.conv.weight", "style.1.weight"):
        with pytest.raises(rc.FileFormatError, match=key):
            rc.load_stylegan2({name: value for name, value in state.items() if name != key})


def test_weights_from_the_meta_device_are_none(tmp_path):
    torch.save(small().to("meta").state_dict(), tmp_path / "g.pt")
    with pytest.raises(rc.FileFormatError, match="meta"):
        rc.load_stylegan2(tmp_path / "g.pt")
