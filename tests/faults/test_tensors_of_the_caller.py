"""What a generator writes to what it is given: the latents are the caller's."""

import pytest
import torch
from helpers import reference
from torch import nn

import rewrite_core as rc
from rewrite_core.layers.latents import for_generator


class Scaling(nn.Module):
    """Its first operation writes to its input."""

    def forward(self, x):
        return x.mul_(0.5).add_(1)


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        Scaling(), nn.Unflatten(1, (6, 1, 1)), nn.ConvTranspose2d(6, 8, 4), nn.ReLU(inplace=True), nn.Conv2d(8, 3, 1)
    ).eval()


def edit():
    mask = torch.ones(4, 4)
    return rc.Edit(copy=rc.Selection(0, mask), paste=rc.Selection(1, mask), context=[rc.Selection(2, mask)])


CALLS = {
    "keys": lambda layer, moment, z: layer.keys(z),
    "values": lambda layer, moment, z: layer.values(z),
    "render": lambda layer, moment, z: layer.render(z),
    "fingerprint": lambda layer, moment, z: layer.fingerprint(z),
    "list": lambda layer, moment, z: rc.list_layers(layer.generator, z),
    "collect": lambda layer, moment, z: rc.collect_second_moment(layer, z, progress=False),
    "units": lambda layer, moment, z: rc.collect_unit_quantiles(layer, z),
    "search": lambda layer, moment, z: rc.search(layer, moment, rc.Selection(0, torch.ones(4, 4)), z),
    "rewrite": lambda layer, moment, z: reference.rewrite(layer, moment, edit(), z, region="map", loss="l2"),
}


@pytest.mark.parametrize("call", CALLS)
def test_latents_are_as_they_were(call):
    z = rc.sample_latents(6, 12)
    layer = rc.bind(make(), "4")
    moment = rc.collect_second_moment(layer, z.clone(), progress=False)
    mine = z.clone()
    CALLS[call](layer, moment, mine)
    CALLS[call](rc.bind(make(), "4"), moment, mine)
    assert torch.equal(mine, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_what_a_generator_is_given_is_a_copy(dtype):
    for generator in (nn.Linear(3, 3), nn.ReLU()):
        z = torch.arange(6).reshape(2, 3).to(dtype)
        for given in (z, z.T, z[:1].expand(4, 3)):
            for_generator(given, generator).fill_(7)
            assert torch.equal(z, torch.arange(6).reshape(2, 3).to(dtype))
