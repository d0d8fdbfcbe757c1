"""Selections: an area of one generated image, and how the reference implementation's JSON holds it."""

from __future__ import annotations

import base64
import binascii
import html
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import FileFormatError, MaskError, SelectionError, quoted
from .masks import mask_bytes, png_of, read_png

_URL_PREFIX = "data:image/png;base64,"


def _resized(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))


def _row(index: object) -> int:
    if isinstance(index, bool) or not isinstance(index, int | np.integer) or index < 0:
        raise SelectionError(f"A selection's index is a row of the latents, 0 or more, not {quoted(index)}.")
    return int(index)


class Selection:
    """An area of one generated image.

    Args:
        index: row of the latents `z` that the edit is used with.
        mask: what is marked, at any resolution; kept in 8 bits, as the JSON does. One of

            * a tensor, array or nested list [H, W], bool or numbers in 0..1; of a sequence (the tokens at a linear
              layer) [L], which becomes [1, L]; of a volume [D, H, W], or [H, W] for all its slices.
            * a PIL picture of any mode, or the path of a picture (PNG, JPEG, WEBP, TIFF, BMP, GIF, PPM or TGA).
              Where it has transparency, what is painted counts, in whatever colour: its alpha is the mask. Where it
              has none, or is opaque everywhere, its brightness is the mask: white is marked, black is not.

    Raises:
        MaskError: wrong shape or type, values outside 0..1, more than 8192 x 8192 pixels, or an empty mask.
        SelectionError: the index is not a whole number of at least zero.
        FileNotFoundError: there is no picture at that path.
    """

    def __init__(self, index: int, mask: Any):
        self.index = _row(index)
        self._bytes = mask_bytes(mask)
        self._check_marked()

    def _check_marked(self) -> None:
        if not self._bytes.any():
            raise MaskError(f"The mask of selection {self.index} is empty; mark at least one pixel.")

    @classmethod
    def box(cls, index: int, box: Sequence[int], size: int | Sequence[int]) -> Selection:
        """The selection of a box.

        Args:
            index: row of the latents.
            box: (top, left, bottom, right) in pixels of the picture, bottom and right exclusive. In general where it
                starts on each axis, then where it ends: (start, stop) of a sequence, six numbers of a volume.
            size: of the picture, (height, width), or one number where it is as wide as high.

        Raises:
            MaskError: no such box in a picture of that size.
        """
        try:
            ends = [operator.index(number) for number in box]
            axes = len(ends) // 2
            sizes = [operator.index(size)] * axes if not isinstance(size, Sequence) else [*map(operator.index, size)]
        except TypeError:
            raise MaskError(
                f"A box is whole numbers (top, left, bottom, right) and a size (height, width), not {quoted(box)} and "
                f"{quoted(size)}."
            ) from None
        starts, stops = ends[:axes], ends[axes:]
        if not 1 <= axes <= 3 or len(ends) != 2 * axes or len(sizes) != axes:
            raise MaskError(f"A box (top, left, bottom, right) needs a size (height, width), not {ends} in {sizes}.")
        if not all(0 <= start < stop <= whole for start, stop, whole in zip(starts, stops, sizes)):
            raise MaskError(f"The box {ends} is empty, or not inside a picture of {sizes}.")
        mask = np.zeros(sizes, dtype=bool)
        mask[tuple(map(slice, starts, stops))] = True
        return cls(index, mask)

    @property
    def mask(self) -> np.ndarray:
        """The mask as drawn: float32 [H, W] (or [D, H, W]) in 0..1."""
        return self._bytes.astype(np.float32) / 255

    def area(self, size: tuple[int, ...]) -> Tensor:
        """The mask at a map's resolution: float32 [*size], Pillow's BILINEAR filter as the reference uses.

        Raises MaskError where nothing of the mask is left at that size, or where it has other axes than the map.
        """
        rows, *slices = self._bytes.shape[-2], *self._bytes.shape[:-2]
        if (len(size) == 1 and (rows > 1 or slices)) or (len(size) == 2 and slices) or len(size) > 3:
            raise MaskError(
                f"The mask of selection {self.index} has shape {list(self._bytes.shape)} and the layer's map is "
                f"{list(size)}; give a mask with the axes of that map."
            )
        height, width = (1, *size)[-2:]
        drawn = self._bytes.reshape(-1, *self._bytes.shape[-2:])
        planes = np.stack([_resized(plane, height, width) for plane in drawn])
        if len(size) == 3:
            planes = _resized(planes.reshape(len(planes), -1), size[0], height * width)
        area = torch.from_numpy(np.asarray(planes, dtype=np.float32) / 255).reshape(size)
        if not area.any():
            raise MaskError(
                f"The mask of selection {self.index} vanishes on a {'x'.join(map(str, size))} map; "
                "mark a larger area or choose a layer with a larger map."
            )
        return area

    def latent(self, latents: Tensor) -> Tensor:
        """The one-row batch of `latents` [N, ...] that it points at. Raises SelectionError out of range."""
        if self.index >= len(latents):
            raise SelectionError(
                f"Selection {self.index} is out of range: there are {len(latents)} latents; "
                "sample more, with the seed the edit was made with."
            )
        return latents[self.index : self.index + 1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and self.index == other.index and np.array_equal(self._bytes, other._bytes)

    def __hash__(self) -> int:
        return hash((self.index, self._bytes.tobytes()))

    def _facts(self) -> str:
        size = "x".join(map(str, self._bytes.shape))
        return f"{size} mask, {self._bytes.mean() / 255:.1%} marked"

    def __repr__(self) -> str:
        return f"Selection({self.index}, {self._facts()})"

    def _repr_html_(self) -> str:
        """For notebooks: the mask, and whose it is. A volume's slices one above the other."""
        planes = self._plane()
        side = max(planes.shape)
        height, width = (max(1, round(96 * length / side)) for length in planes.shape)
        small = planes if side <= 192 else _resized(planes, 2 * height, 2 * width)
        source = _URL_PREFIX + base64.b64encode(png_of(small)).decode("ascii")
        text = html.escape(f"picture {self.index}: {self._facts()}")
        picture = f'<img src="{source}" width="{width}" height="{height}" alt="{text}" style="border: 1px solid gray">'
        shape = f"display: inline-block; margin: 2px; width: {max(width, 112)}px; text-align: left; vertical-align: top"
        below = f"<small><b>picture {self.index}</b><br>{html.escape(self._facts())}</small>"
        return f'<div style="{shape}; line-height: 1.25">{picture}<br>{below}</div>'

    # --- in files

    def _plane(self) -> np.ndarray:
        """The mask [H, W]; slices of a volume one above the other."""
        return self._bytes.reshape(-1, self._bytes.shape[-1])

    @property
    def _slices(self) -> list[int]:
        """How many slices the plane has, in a list; an empty one where the mask is no volume."""
        return [] if self._bytes.ndim == 2 else [len(self._bytes)]

    @classmethod
    def _of_plane(cls, index: object, plane: np.ndarray, slices: Sequence[object], field: str) -> Selection:
        if slices:
            if type(slices[0]) is not int or slices[0] < 1 or len(plane) % slices[0]:
                raise FileFormatError(
                    f"{field!r} says that its mask has {quoted(slices[0])} slices, which do not divide it."
                )
            plane = plane.reshape(slices[0], -1, plane.shape[-1])
        selection = cls.__new__(cls)
        selection.index, selection._bytes = _row(index), plane
        selection._check_marked()
        return selection

    def _to_json(self) -> list:
        """The reference implementation's [index, PNG data URL]."""
        colours = np.repeat(self._plane()[..., None], 3, -1)  # as the reference writes it
        return [self.index, _URL_PREFIX + base64.b64encode(png_of(colours)).decode("ascii"), *self._slices]

    @classmethod
    def _from_json(cls, record: Any, field: str) -> Selection:
        if not (isinstance(record, list) and len(record) in (2, 3) and isinstance(record[1], str)):
            raise FileFormatError(f"{field!r} should hold [index, PNG data URL].")
        index, url, *slices = record
        head, comma, data = url.partition(",")
        if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
            raise FileFormatError(f"The mask of {field!r} is not a base64 image data URL.")
        try:
            coded = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise FileFormatError(f"The mask of {field!r} cannot be decoded ({error}).") from error
        return cls._of_plane(index, read_png(coded, f"The mask of {field!r}"), slices, field)
