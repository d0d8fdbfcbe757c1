"""Pictures: what a generator paints, as tensors in 0..1 and in Pillow; outlines, heat maps and labelled grids."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from .edits.selection import Selection
from .files import atomic_write
from .layers.latents import for_generator
from .modes import seeded

_BACKGROUND, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)


def to_unit(images: Tensor, span: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """A generator's images, which lie in `span`, as float32 pictures in 0..1 on the CPU."""
    low, high = span
    return (images.float().cpu() - low) / (high - low)


def paint(
    generator: nn.Module,
    latents: Tensor,
    batch_size: int = 50,
    span: tuple[float, float] = (-1.0, 1.0),
    progress: bool = False,
) -> Tensor:
    """Pictures [N, C, H, W] in 0..1 of latents [N, ...], on whatever device and in whatever precision it works. Noise
    that the generator draws is the same in every call."""
    pictures = []
    with (
        torch.inference_mode(),
        tqdm(total=len(latents), desc="paint", unit="img", disable=None if progress else True) as bar,
    ):
        for batch in latents.split(batch_size):
            with seeded(generator):
                images = generator(for_generator(batch, generator))
            if not isinstance(images, Tensor):
                raise TypeError(f"The generator returns a {type(images).__name__} and not images alone; wrap it.")
            pictures.append(to_unit(images, span))
            bar.update(len(batch))
    return torch.cat(pictures)


def to_image(picture: Tensor, side: int | None = None) -> Image.Image:
    """One picture [3, H, W] in 0..1 (or [1, H, W]) as an RGB image, its longer side scaled to `side` pixels."""
    if picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise ValueError(f"A picture has shape [3, H, W] or [1, H, W], not {list(picture.shape)}.")
    pixels = picture.detach().float().cpu().clamp(0, 1) * 255
    array = pixels.expand(3, -1, -1).permute(1, 2, 0).round().to(torch.uint8).numpy()
    image = Image.fromarray(array)
    if side is None:
        return image
    scale = side / max(image.size)
    # whole factors keep small pictures crisp
    kind = Image.Resampling.NEAREST if scale >= 1 and scale == int(scale) else Image.Resampling.BICUBIC
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), kind)


def _upscale(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))


def outline(image: Image.Image, mask, colour: tuple[int, int, int] = (255, 60, 40)) -> Image.Image:
    """The image with the border of a mask [h, w] (any resolution) drawn on it."""
    return _outline(image, _upscale(np.asarray(mask, dtype=np.float32), image.size) > 0.5, colour)


def _outline(image: Image.Image, inside: np.ndarray, colour: tuple[int, int, int]) -> Image.Image:
    grown = np.asarray(Image.fromarray(inside.astype(np.uint8)).filter(ImageFilter.MaxFilter(3)))
    pixels = np.asarray(image).copy()
    pixels[(grown > 0) & ~inside] = colour
    return Image.fromarray(pixels)


def selected(picture: Tensor, selection: Selection, side: int) -> Image.Image:
    """A picture with its selection outlined."""
    return outline(to_image(picture, side), selection.mask)


def heat(picture: Tensor, heatmap: Tensor, side: int, level: float, high: float) -> Image.Image:
    """A picture under a heat map [h, w] of scores, from 0 (transparent) to `high`, with an outline at `level`."""
    from matplotlib import colormaps  # takes a quarter of a second to import

    image = to_image(picture, side)
    scores = _upscale(heatmap.float().numpy(), image.size)
    strength = np.clip(scores / max(high, 1e-12), 0, 1)
    colours = colormaps["inferno"](strength)[..., :3] * 255
    share = 0.8 * strength[..., None]
    blend = Image.fromarray(((1 - share) * np.asarray(image) + share * colours).astype(np.uint8))
    return _outline(blend, scores > level, (255, 255, 255))


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def grid(
    rows: Sequence[Sequence[tuple[Image.Image | None, str]]],
    title: str = "",
    notes: Sequence[str] = (),
    gap: int = 6,
) -> Image.Image:
    """A labelled grid: each cell is (image or None, label below it)."""
    if not any(image for row in rows for image, _ in row):
        raise ValueError("A grid needs at least one image.")
    title_font, font = _font(20), _font(13)
    width = max(image.width for row in rows for image, _ in row if image)
    columns = max(map(len, rows))
    head = (34 if title else gap) + 18 * len(notes)
    heights = []
    for row in rows:
        label = 18 if any(text for _, text in row) else 0
        heights.append(max((image.height for image, _ in row if image), default=0) + label + gap)
    sheet = Image.new("RGB", (gap + columns * (width + gap), head + sum(heights) + gap), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 6), title, _INK, font=title_font)
    for i, note in enumerate(notes):
        draw.text((gap, 34 + 18 * i), note, _FAINT, font=font)
    top = head + gap
    for row, height in zip(rows, heights):
        left = gap
        for image, label in row:
            if image:
                sheet.paste(image, (left, top))
                draw.text((left, top + image.height + 1), label, _FAINT, font=font)
            left += width + gap
        top += height
    return sheet


def in_rows(
    images: Sequence[Image.Image], labels: Sequence[str], columns: int
) -> list[list[tuple[Image.Image | None, str]]]:
    """Rows for :func:`grid`: labelled images, `columns` to a row."""
    cells: list[tuple[Image.Image | None, str]] = list(zip(images, labels, strict=True))
    return [cells[i : i + columns] for i in range(0, len(cells), columns)]


def before_after(
    before: Tensor, after: Tensor, side: int, labels: Sequence[str] | None = None, columns: int = 8
) -> list[list[tuple[Image.Image | None, str]]]:
    """Rows for :func:`grid`: pairs [N, 3, H, W] side by side, before on the left, `columns` pairs to a row."""
    pairs = []
    for old, new in zip(before, after, strict=True):
        old, new = to_image(old, side), to_image(new, side)
        pair = Image.new("RGB", (old.width + new.width + 2, old.height), _BACKGROUND)
        pair.paste(old, (0, 0))
        pair.paste(new, (old.width + 2, 0))
        pairs.append(pair)
    return in_rows(pairs, labels or [""] * len(pairs), columns)


def save_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Write a PNG, all or nothing."""
    with atomic_write(path) as partial:
        image.save(partial, format="png")
