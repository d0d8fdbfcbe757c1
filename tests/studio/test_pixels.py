"""Pictures on their way to the page: the pixels that a canvas gets are those of `pictures.to_image`."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from rewrite_core.pictures import to_image

pytest.importorskip("starlette", reason="the studio needs the extra `studio`")

from rewrite_core.studio.pixels import tiles


@pytest.mark.parametrize("side", [8, 16, 5])
@pytest.mark.parametrize("channels", [3, 1])
def test_pixels_are_those_of_the_picture(side, channels):
    pictures = torch.rand(3, channels, 6, 8, generator=torch.Generator().manual_seed(0))
    found = tiles(pictures, side)
    size = 4 * found.width * found.height
    assert len(found.data) == 3 * size and found.width == side
    for i, picture in enumerate(pictures):
        image = Image.frombytes("RGBA", (found.width, found.height), found.data[i * size : (i + 1) * size])
        wanted = to_image(picture, side)
        assert image.convert("RGB").tobytes() == wanted.tobytes() and image.getchannel("A").getextrema() == (255, 255)
