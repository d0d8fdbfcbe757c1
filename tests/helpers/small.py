"""A small generator, an edit of it and the change: what tests of faults begin with."""

import torch
from helpers import reference
from torch import nn

import rewrite_core as rc

LAYER = "4"


def generator(wrap=lambda module: module, seed=0):
    """16 numbers to 3 x 8 x 8; `wrap` wraps the convolution that is edited."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (16, 1, 1)),
        nn.ConvTranspose2d(16, 8, 4),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        wrap(nn.Conv2d(8, 8, 3, padding=1)),
        nn.ReLU(),
        nn.Conv2d(8, 3, 3, padding=1),
    ).eval()


def painter() -> nn.Module:
    """8 numbers to 3 x 16 x 16, as generators of pictures are: what tests of rules work on."""
    return nn.Sequential(
        nn.ConvTranspose2d(8, 16, 4),
        nn.LeakyReLU(0.2),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 3, 3, padding=1),
        nn.Tanh(),
    )


def dcgan(seed=0):
    """[16, 1, 1] to 3 x 8 x 8, with batch normalisation and in-place rectifiers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.ConvTranspose2d(16, 32, 4),
        nn.BatchNorm2d(32),
        nn.ReLU(True),
        nn.ConvTranspose2d(32, 16, 4, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(True),
        nn.Conv2d(16, 3, 3, 1, 1),
        nn.Tanh(),
    ).eval()


Z = rc.sample_latents(16, 64)
COPY, PASTE = rc.Selection.box(0, (1, 1, 4, 4), 8), rc.Selection.box(1, (4, 4, 7, 7), 8)
EDIT = rc.Edit(COPY, PASTE, [PASTE, rc.Selection.box(2, (4, 4, 7, 7), 8)], latents=Z)


def solve(layer, edit=EDIT, z=Z, **options):
    """The change of a layer by l2 on the whole map, from a moment of its own."""
    moment = rc.collect_second_moment(layer, z, batch_size=16, progress=False)
    return reference.rewrite(layer, moment, edit, z, **({"loss": "l2", "region": "map"} | options))


def fit(made, name=LAYER):
    """(the bound layer, its change)"""
    layer = rc.bind(made, name)
    return layer, solve(layer)


def bits(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(before, module):
    """Whether the state dict is as it was: names, their order, and every bit."""
    after = module.state_dict()
    return list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
