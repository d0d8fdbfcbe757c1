"""Sessions on other kinds of generators, large pictures and long work: replays with rules on are the full pass."""

from __future__ import annotations

import pytest
import torch
from helpers.small import dcgan
from torch import nn

import rewrite_core as rc
from rewrite_core.demo import LATENT_SIZE, chapels
from rewrite_core.generators.proggan import ProgGAN
from rewrite_core.generators.stylegan2 import StyleGAN2


def decoder():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return diffusers.AutoencoderKL(
        up_block_types=["UpDecoderBlock2D"] * 2,
        down_block_types=["DownEncoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        layers_per_block=1,
        norm_num_groups=4,
    )


def decode(autoencoder, z):
    return autoencoder.decode(z).sample


CASES = {
    "chapels": (chapels, "synthesis.layer4.conv", (LATENT_SIZE,), None),
    "proggan": (lambda: ProgGAN([16, 16, 16, 8]), "layer3.conv", (16,), None),
    "stylegan2": (lambda: StyleGAN2(32, 16, 2, {4: 16, 8: 16, 16: 16, 32: 8}), "convs.2.conv", (16,), None),
    "dcgan": (dcgan, "3", (16, 1, 1), None),
    "diffusers": (decoder, "decoder.up_blocks.0.resnets.0.conv1", (4, 8, 8), decode),
}


@pytest.fixture(params=CASES)
def session(request):
    make, name, shape, forward = CASES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = make().eval()
    layer, z = rc.bind(generator, name, forward=forward), rc.sample_latents(shape, 40, seed=3)
    return rc.Session(layer, rc.collect_second_moment(layer, z, progress=False), z)


def square(session, row, top):
    height, width = session.layer.values(session.latents[:1]).shape[2:]
    return rc.Selection.box(row, (top, top, top + height // 2, top + width // 2), (height, width))


def test_pictures_with_rules_on_are_those_of_the_full_pass(session):
    edit = rc.Edit(copy=square(session, 0, 1), paste=square(session, 1, 2), context=[square(session, 2, 1)])
    how = {"rank": 2, "loss": "l2", "region": "map"}
    paste, gone = session.rewrite(edit, **how), session.zero(edit, rank=1)
    for changes, strengths in (([], []), ([paste], [1.0]), ([paste, gone], [0.5, -0.25])):
        for rows in ([3], [0, 1, 5, 9]):
            replayed = session.images(rows, changes, strengths)
            for change, strength in zip(changes, strengths, strict=True):
                change.apply(session.layer.generator, strength=strength)
            assert torch.equal(replayed, session.layer.render(session.latents[rows]))
            for change in changes:
                change.revert(session.layer.generator)
    assert session.replays


@pytest.mark.parametrize("name", ["convs.2.conv", "convs.3.conv"])  # one that enlarges its map, and one that does not
def test_clicks_of_a_stylegan2_are_those_of_the_free_function(name):
    """What is made of the weight alone is remembered, and made again where the weight is another one."""
    generator, z = CASES["stylegan2"][0]().eval(), rc.sample_latents(16, 8)
    layer = rc.bind(generator, name)
    moment = rc.collect_second_moment(layer, z, progress=False)
    session = rc.Session(layer, moment, z)
    how = rc.REFERENCE | {"solver": "lm", "loss": "l2"}
    for top in (2, 4, 5):
        drawn = [rc.Selection.box(row, (top, 3, top + 5, 9), (16, 16)) for row in (0, 1, 2)]
        edit = rc.Edit(copy=drawn[0], paste=drawn[1], context=drawn[2:], latents=z)
        change = session.rewrite(edit, **how)
        assert torch.equal(change.coefficients, rc.rewrite(layer, moment, edit, z, **how).coefficients)
        if top == 4:
            change.apply()
    assert any(key[0][0] == "weight" for key in session._kept._items if isinstance(key[0], tuple))


@pytest.mark.slow
def test_memory_stays_under_its_bound_over_two_thousand_edits():
    """Each with other masks, of all pictures, with pictures in between."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1)).eval()
    z = torch.randn(64, 4, 6, 6)
    layer = rc.bind(generator, "0")
    bound = 120_000
    session = rc.Session(layer, rc.collect_second_moment(layer, z, progress=False), z, memory=bound)
    largest = 0
    for number in range(2000):
        top, left = number % 4, number // 4 % 4

        def mask(row, top=top, left=left):
            return rc.Selection.box(row % 64, (top, left, top + 2, left + 3), (6, 6))

        edit = rc.Edit(copy=mask(number), paste=mask(3 * number + 1), context=[mask(5 * number + 2)])
        change = session.rewrite(edit, rank=1, loss="l2", region="map")
        largest = max(largest, session.nbytes)
        if number % 20 == 0:
            session.images([number % 64, (number + 7) % 64], [change])
        assert session.nbytes <= bound
    assert largest > bound // 2  # it is used
    held = sum(nbytes for _, nbytes in session._kept._items.values())
    assert held == session.nbytes


def test_pictures_of_a_thousand_pixels(tmp_path):
    """A generator of random weights: tiles are scaled, masks are taken as they are."""
    pytest.importorskip("starlette", reason="the studio needs the extra `studio`")
    import io

    from PIL import Image

    from rewrite_core.studio.workshop import Workshop

    torch.manual_seed(0)
    stages = dict.fromkeys((4, 8, 16, 32, 64, 128, 256, 512, 1024), 8)
    generator = StyleGAN2(1024, 16, 2, stages).eval()
    z = rc.sample_latents(16, 6)
    layer = rc.bind(generator, "convs.6.conv")
    session = rc.Session(layer, rc.collect_second_moment(layer, z, progress=False), z, memory=256 << 20)
    with Workshop(session, tmp_path / "studio").open() as shop:
        state = shop.describe()
        assert (state["height"], state["width"], state["map"]) == (1024, 1024, [64, 64])
        assert Image.open(io.BytesIO(shop.sheet([0, 1], 96))).size == (192, 96)
        mask = torch.zeros(1024, 1024)
        mask[301:417, 200:333] = 1
        drawn = [rc.Selection(row, mask) for row in (0, 1, 2)]
        shop.take_edit(rc.Edit(copy=drawn[0], paste=drawn[1], context=[drawn[2]]).to_json())
        shop.fit()
        assert shop.live_edit.copy.mask.shape == (1024, 1024) and torch.equal(
            torch.as_tensor(shop.live_edit.copy.mask), mask
        )
        assert not torch.equal(shop.paint([1]), shop.paint([1], original=True))
        assert session.nbytes <= 256 << 20
