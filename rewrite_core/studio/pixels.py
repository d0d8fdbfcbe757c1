"""Pictures on their way to the page: as bare pixels, which a canvas takes as they are, and as PNG."""

from __future__ import annotations

import dataclasses
import io

import torch
from PIL import Image
from torch import Tensor

from ..pictures import to_image


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Pictures of one size: `data` holds red, green, blue and alpha of each pixel, row by row, picture by picture."""

    width: int
    height: int
    data: bytes


def tiles(pictures: Tensor, side: int) -> Tiles:
    """Pictures [N, 3 or 1, H, W] in 0..1, the longer side scaled to `side` as :func:`.pictures.to_image` does."""
    if max(pictures.shape[-2:]) != side:
        images = [to_image(picture, side) for picture in pictures]
        return Tiles(*images[0].size, b"".join(image.convert("RGBA").tobytes() for image in images))
    number, _, height, width = pictures.shape
    pixels = torch.full((number, height, width, 4), 255, dtype=torch.uint8)
    pixels[..., :3] = (pictures * 255).round_().permute(0, 2, 3, 1)
    return Tiles(width, height, pixels.numpy().tobytes())


def sheet(pictures: Tensor, side: int) -> bytes:
    """A PNG of pictures side by side, each `side` pixels at its longer side."""
    images = [to_image(picture, side) for picture in pictures]
    whole = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width
    return png(whole)


def png(image: Image.Image) -> bytes:
    """An image as a PNG, made fast rather than small."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
