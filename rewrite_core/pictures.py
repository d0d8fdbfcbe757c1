"""Pictures: what a generator paints, as tensors in 0..1 and in Pillow; outlines, heat maps and labelled grids.

``rc.pictures.paint``, ``before_after`` and ``grid`` are for notebooks too; the command line draws with the rest, too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn

from .edits.masks import picture_array
from .edits.selection import Selection
from .errors import ArgumentError, RewriteCoreError
from .files import atomic_write
from .layers.latents import for_generator
from .modes import seeded
from .progress import progress_bar

Cell = tuple[Image.Image | None, str]
"""One place of a grid: an image, or none, and the text below it."""

_BACKGROUND, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
_LEAST_TITLE = 480  # pixels: a sheet is at least so wide before its title goes on in another line


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
    """Pictures of latents, on whatever device and in whatever precision the generator works.

    Noise that the generator draws is the same in every call.

    Args:
        generator: images [n, C, H, W] = generator(latents [n, ...]).
        latents: [N, ...].
        batch_size: so many at a time.
        span: what the generator's images lie in.
        progress: show a bar.

    Returns float32 [N, C, H, W] in 0..1, on the CPU.

    Raises ArgumentError where the generator returns more than images, or no tensor.
    """
    pictures = []
    with torch.inference_mode(), progress_bar(total=len(latents), label="paint", unit="img", show=progress) as bar:
        for batch in latents.split(batch_size):
            with seeded(generator):
                images = generator(for_generator(batch, generator))
            if not isinstance(images, Tensor):
                raise ArgumentError(f"The generator returns a {type(images).__name__} and not images alone; wrap it.")
            pictures.append(to_unit(images, span))
            bar.update(len(batch))
    return torch.cat(pictures)


def read(path: str | os.PathLike, channels: int = 3) -> Tensor:
    """A picture file as float32 [channels, H, W] in 0..1: 3 channels of colour or 1 of grey.

    Raises FileFormatError where it is no picture, FileNotFoundError.
    """
    return torch.from_numpy(picture_array(path, "RGB" if channels == 3 else "L")).permute(2, 0, 1).float() / 255


def to_image(picture: Tensor, side: int | None = None) -> Image.Image:
    """One picture [3, H, W] in 0..1 (or [1, H, W]) as an RGB image, its longer side scaled to `side` pixels.

    NaN is drawn black. Raises RewriteCoreError on another shape.
    """
    if picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise RewriteCoreError(f"A picture has shape [3, H, W] or [1, H, W], not {list(picture.shape)}.")
    pixels = picture.detach().float().cpu().nan_to_num(0, 1, 0).clamp(0, 1) * 255
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


def outline(image: Image.Image, mask: ArrayLike, colour: tuple[int, int, int] = (255, 60, 40)) -> Image.Image:
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


# --- sheets ------------------------------------------------------------------------------------------------------


class _Text:
    """Text of one size and colour, in lines that are never wider than there is room."""

    def __init__(self, size: int, line: int, colour: tuple[int, int, int]):
        self.font, self.line, self.colour = ImageFont.load_default(size), line, colour

    def width(self, text: str) -> float:
        return self.font.getlength(text)

    def wrap(self, text: str, room: int) -> list[str]:
        """`text` in lines of at most `room` pixels, broken between words, and inside of one that has no room alone."""
        lines: list[str] = []
        for word in text.split():
            if lines and self.width(f"{lines[-1]} {word}") <= room:
                lines[-1] += f" {word}"
                continue
            while word:
                fits = next(n for n in range(len(word), 0, -1) if n == 1 or self.width(word[:n]) <= room)
                lines.append(word[:fits])
                word = word[fits:]
        return lines

    def draw(self, canvas: ImageDraw.ImageDraw, left: int, top: int, lines: Sequence[str]) -> None:
        for number, line in enumerate(lines):
            canvas.text((left, top + self.line * number), line, self.colour, font=self.font)


_TITLE, _NOTE, _LABEL = _Text(20, 28, _INK), _Text(13, 18, _FAINT), _Text(13, 18, _FAINT)


def grid(
    rows: Sequence[Sequence[Cell]],
    title: str = "",
    notes: Sequence[str] = (),
    gap: int = 6,
) -> Image.Image:
    """A sheet of rows of labelled images. Text that is wider than its place goes on in another line; none is cut.

    Args:
        rows: of cells, each an image (or None) and the label below it.
        title: above all.
        notes: lines below the title.
        gap: pixels between images.

    Raises RewriteCoreError where there is no image.
    """
    images = [image for row in rows for image, _ in row if image]
    if not images:
        raise RewriteCoreError("A grid needs at least one image.")
    width, columns = max(image.width for image in images), max(map(len, rows))
    room = max(columns * (width + gap) - gap, min(_LEAST_TITLE, round(_TITLE.width(title)) + 1))
    labels = [[_LABEL.wrap(label, width) for _, label in row] for row in rows]
    titled = _TITLE.wrap(title, room)
    noted = [line for note in notes for line in _NOTE.wrap(note, room)]
    head = gap + _TITLE.line * len(titled) + _NOTE.line * len(noted) + gap * bool(titled or noted)
    tall = [max((image.height for image, _ in row if image), default=0) for row in rows]
    heights = [
        image + _LABEL.line * max(map(len, lines), default=0) + gap for image, lines in zip(tall, labels, strict=True)
    ]
    sheet = Image.new("RGB", (room + 2 * gap, head + sum(heights)), _BACKGROUND)
    canvas = ImageDraw.Draw(sheet)
    _TITLE.draw(canvas, gap, gap, titled)
    _NOTE.draw(canvas, gap, gap + _TITLE.line * len(titled), noted)
    top = head
    for row, lines, height in zip(rows, labels, heights, strict=True):
        left = gap
        for (image, _), label in zip(row, lines, strict=True):
            if image:
                sheet.paste(image, (left, top))
                _LABEL.draw(canvas, left, top + image.height + 1, label)
            left += width + gap
        top += height
    return sheet


def in_rows(images: Sequence[Image.Image], labels: Sequence[str], columns: int) -> list[list[Cell]]:
    """Rows for :func:`grid`: labelled images, `columns` to a row."""
    cells: list[Cell] = list(zip(images, labels, strict=True))
    return [cells[i : i + columns] for i in range(0, len(cells), columns)]


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two images of one height as one."""
    pair = Image.new("RGB", (left.width + right.width + 2, left.height), _BACKGROUND)
    pair.paste(left, (0, 0))
    pair.paste(right, (left.width + 2, 0))
    return pair


def before_after(
    before: Tensor, after: Tensor, side: int, labels: Sequence[str] | None = None, columns: int = 8
) -> list[list[Cell]]:
    """Rows for :func:`grid`: pairs of pictures side by side, before on the left, `columns` pairs to a row.

    Args:
        before, after: pictures [N, 3, H, W] (or one channel) in 0..1.
        side: pixels of one picture's longer side.
        labels: N texts, one below each pair.
    """
    pairs = []
    for old, new in zip(before, after, strict=True):
        pairs.append(side_by_side(to_image(old, side), to_image(new, side)))
    return in_rows(pairs, labels or [""] * len(pairs), columns)


def save_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Write a PNG, all or nothing."""
    with atomic_write(path) as partial:
        image.save(partial, format="png")
