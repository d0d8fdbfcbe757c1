"""Selections: an area of one generated image, and how the reference implementation's JSON holds it."""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import FileFormatError, MaskError, SelectionError

_URL_PREFIX = "data:image/png;base64,"


def _mask_bytes(mask) -> np.ndarray:
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu()
        mask = (mask.double() if mask.is_floating_point() else mask).numpy()  # numpy has no bfloat16
    try:
        mask = np.asarray(mask)
    except ValueError as error:
        raise MaskError(f"A mask is an array with rows of one length ({error}).") from error
    if not 1 <= mask.ndim <= 3 or 0 in mask.shape:
        raise MaskError(f"A mask is an array [H, W], [L] or [D, H, W], not one of shape {list(mask.shape)}.")
    mask = np.atleast_2d(mask)
    if mask.dtype == bool:
        return mask.astype(np.uint8) * 255
    if not (np.issubdtype(mask.dtype, np.floating) or np.issubdtype(mask.dtype, np.integer)):
        raise MaskError(f"A mask holds booleans or numbers in 0..1, not {mask.dtype}.")
    if not np.isfinite(mask).all() or mask.min() < 0 or mask.max() > 1:
        raise MaskError("A mask holds values in 0..1; divide 0..255 masks by 255.")
    return np.rint(mask.astype(np.float64) * 255).astype(np.uint8)


def _resized(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))


class Selection:
    """An area of one generated image.

    Args:
        index: row of the latents `z` that the edit is used with.
        mask: [H, W], bool or numbers in 0..1, at any resolution. Stored in 8 bits, as the JSON does. Of a sequence (the
            tokens at a linear layer) [L], which becomes [1, L]; of a volume [D, H, W], or [H, W] for all its slices.

    Raises:
        MaskError: wrong shape or type, values outside 0..1, or an empty mask.
        SelectionError: the index is not a whole number of at least zero.
    """

    def __init__(self, index: int, mask):
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or index < 0:
            raise SelectionError(f"A selection's index is a row of the latents, 0 or more, not {index!r}.")
        self.index = int(index)
        self._bytes = _mask_bytes(mask)
        if not self._bytes.any():
            raise MaskError(f"The mask of selection {self.index} is empty; mark at least one pixel.")

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
        planes = [_resized(plane, height, width) for plane in self._bytes.reshape(-1, *self._bytes.shape[-2:])]
        if len(size) == 3:
            planes = _resized(np.stack(planes).reshape(len(planes), -1), size[0], height * width)
        area = torch.from_numpy(np.asarray(planes, dtype=np.float32) / 255).reshape(size)
        if not area.any():
            raise MaskError(
                f"The mask of selection {self.index} vanishes on a {'x'.join(map(str, size))} map; "
                "mark a larger area or choose a layer with a larger map."
            )
        return area

    def __eq__(self, other) -> bool:
        return isinstance(other, Selection) and self.index == other.index and np.array_equal(self._bytes, other._bytes)

    def __hash__(self) -> int:
        return hash((self.index, self._bytes.tobytes()))

    def __repr__(self) -> str:
        size = "x".join(map(str, self._bytes.shape))
        return f"Selection({self.index}, {size} mask, {self.mask.mean():.1%} marked)"

    def _to_json(self) -> list:
        """The reference implementation's [index, PNG data URL]."""
        buffer = io.BytesIO()
        planes = self._bytes.reshape(-1, self._bytes.shape[-1])
        Image.fromarray(planes).convert("RGB").save(buffer, format="png")
        record = [self.index, _URL_PREFIX + base64.b64encode(buffer.getvalue()).decode("ascii")]
        return record if self._bytes.ndim == 2 else [*record, len(self._bytes)]  # slices one above the other

    @classmethod
    def _from_json(cls, record, field: str) -> Selection:
        if not (isinstance(record, list) and len(record) in (2, 3) and isinstance(record[1], str)):
            raise FileFormatError(f"{field!r} should hold [index, PNG data URL].")
        index, url, *slices = record
        head, comma, data = url.partition(",")
        if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
            raise FileFormatError(f"The mask of {field!r} is not a base64 image data URL.")
        try:
            image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            pixels = np.asarray(image.convert("RGB"))[:, :, 0]  # the reference reads the first channel
        except (
            binascii.Error,
            UnidentifiedImageError,
            Image.DecompressionBombError,
            OSError,
            ValueError,
            SyntaxError,
        ) as error:
            raise FileFormatError(f"The mask of {field!r} cannot be decoded ({error}).") from error
        if slices:
            if type(slices[0]) is not int or slices[0] < 1 or len(pixels) % slices[0]:
                raise FileFormatError(f"{field!r} says that its mask has {slices[0]!r} slices, which do not divide it.")
            pixels = pixels.reshape(slices[0], -1, pixels.shape[-1])
        return cls(index, pixels.astype(np.float64) / 255)
