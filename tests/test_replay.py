"""Replay: only what follows a layer runs, and the pictures are those of a full pass to the bit."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers.small import dcgan
from torch import nn

import rewrite_core as rc
from rewrite_core.demo import LATENT_SIZE, chapels
from rewrite_core.generators.proggan import ProgGAN
from rewrite_core.generators.stylegan2 import StyleGAN2
from rewrite_core.layers.replay import modules_before, record


def stylegan2():
    torch.manual_seed(0)
    return StyleGAN2(32, 16, 2, {4: 16, 8: 16, 16: 16, 32: 8}).eval()


def proggan():
    torch.manual_seed(0)
    return ProgGAN([16, 16, 16, 8]).eval()


class Decoder(nn.Module):
    """Residual blocks with a skip around them, an attention over places, a functional end."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1)) for _ in range(3)
        )
        self.mix = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, z):
        x = self.first(z)
        for number, block in enumerate(self.blocks):
            x = x + block(x)
            if number == 0:
                rows = x.flatten(2).mT
                x = x + self.mix(rows, rows, rows)[0].mT.reshape(x.shape)
        return torch.tanh(self.last(nn.functional.interpolate(x, scale_factor=2)))


CASES = {
    "chapels": (chapels, "synthesis.layer6.conv", (LATENT_SIZE,)),
    "proggan": (proggan, "layer3.conv", (16,)),
    "stylegan2": (stylegan2, "convs.2.conv", (16,)),
    "dcgan, early": (dcgan, "3", (16, 1, 1)),
    "dcgan, late": (dcgan, "6", (16, 1, 1)),
    "dcgan, first": (dcgan, "0", (16, 1, 1)),
    "decoder": (Decoder, "blocks.1.2", (4, 8, 8)),
}


@pytest.fixture(params=CASES)
def case(request):
    make, name, shape = CASES[request.param]
    generator = make()
    return rc.bind(generator, name), rc.sample_latents(shape, 5, seed=3)


def full(layer, z):
    with torch.no_grad():
        return layer.generator.eval()(z.clone())


def test_a_replay_is_the_full_pass_to_the_bit(case):
    layer, z = case
    kept = record(layer, z)
    assert torch.equal(kept.images, full(layer, z))
    assert torch.equal(kept.replay(), kept.images)
    assert torch.equal(kept.replay(), kept.images)  # what follows wrote to nothing that is kept


def test_a_replay_follows_the_layers_weight(case):
    layer, z = case
    kept, before = record(layer, z), layer.parameter.detach().clone()
    with torch.no_grad():
        layer.parameter.add_(0.1 * torch.randn_like(layer.parameter))
    assert torch.equal(kept.replay(), full(layer, z)) and not torch.equal(kept.replay(), kept.images)
    with torch.no_grad():
        layer.parameter.copy_(before)
    assert torch.equal(kept.replay(), kept.images)


def test_nothing_before_the_layer_runs_again(case, monkeypatch):
    layer, z = case
    kept = record(layer, z)
    ran = []
    for module in modules_before(layer):
        for part in module.modules():
            for kind in (nn.Conv2d, nn.ConvTranspose2d, nn.Linear):
                if isinstance(part, kind) and kept.touches(part):
                    monkeypatch.setattr(part, "forward", lambda *a, part=part: ran.append(part))
    kept.replay()
    assert not ran


def test_only_what_is_read_again_is_kept():
    """Of a chain of modules before the layer, the last one's output alone."""
    layer, z = rc.bind(dcgan(), "6"), rc.sample_latents((16, 1, 1), 5)
    kept = record(layer, z)
    last = 5 * 16 * 8 * 8 * 4
    assert last <= kept.nbytes - z.nbytes - kept.images.nbytes <= 2 * last  # the norm and the ReLU in its place


def test_the_generator_is_left_as_it_was(case):
    layer, z = case
    before = {
        id(m): (dict(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in layer.generator.modules()
    }
    kept = record(layer, z)
    kept.replay()
    for module in layer.generator.modules():
        state, hooks, pre_hooks = before[id(module)]
        assert "forward" not in module.__dict__ or module.__dict__["forward"] is state.get("forward")
        assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == (hooks, pre_hooks)


def test_errors_leave_the_generator_as_it_was():
    layer, z = rc.bind(dcgan(), "3"), rc.sample_latents((16, 1, 1), 2)
    kept = record(layer, z)
    wanted = full(layer, z)
    with torch.no_grad():
        weight = layer.generator[6].weight
        layer.generator[6].weight = None
        with pytest.raises(TypeError):
            kept.replay()
        layer.generator[6].weight = weight
    assert torch.equal(full(layer, z), wanted)


def test_a_pass_of_another_thread_is_a_full_pass():
    generator = dcgan()
    layer, z = rc.bind(generator, "6"), rc.sample_latents((16, 1, 1), 64)
    kept, other = record(layer, z), rc.sample_latents((16, 1, 1), 3, seed=9)
    wanted, wrong, stop = full(layer, other), [], threading.Event()

    def serve():
        with torch.no_grad():
            while not stop.is_set():
                if not torch.equal(generator(other.clone()), wanted):
                    wrong.append(1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(30):
            assert torch.equal(kept.replay(), kept.images)
    finally:
        stop.set()
        thread.join()
    assert not wrong


def test_a_generator_that_returns_no_images():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, z):
            return self.conv(z), 1

    with pytest.raises(rc.RewriteCoreError, match="images alone"):
        record(rc.bind(Pair(), "conv"), torch.randn(2, 4, 3, 3))
