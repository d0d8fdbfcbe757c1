"""Masks: read from whatever a user draws one in, kept as bytes (255: marked; between: by that share)."""

from __future__ import annotations

import io
import os
import struct
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import FileFormatError, MaskError

MOST_PIXELS = 2**26  # of one mask, 8192 x 8192; a small file may say that it holds far more
# what drawing programs write; not what Pillow hands to other programs (PostScript)
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_UNREADABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError, MemoryError)


def mask_bytes(mask: Any) -> np.ndarray:
    """A mask as uint8 [H, W] or [D, H, W].

    Args:
        mask: a tensor, array or nested list, a PIL picture, or the path of a picture, as
            :class:`~rewrite_core.Selection` says.

    Raises:
        MaskError: of another shape or type, too large, or with values outside 0..1. FileNotFoundError.
    """
    if isinstance(mask, str | os.PathLike):
        return _from_file(mask)
    if isinstance(mask, Image.Image):
        return _from_picture(mask)
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu()
        mask = (mask.double() if mask.is_floating_point() else mask).numpy()  # numpy has no bfloat16
    try:
        mask = np.asarray(mask)
    except ValueError as error:
        raise MaskError(f"A mask is an array with rows of one length ({error}).") from error
    return _from_numbers(mask)


def _from_numbers(mask: np.ndarray) -> np.ndarray:
    if not 1 <= mask.ndim <= 3 or 0 in mask.shape:
        raise MaskError(f"A mask is an array [H, W], [L] or [D, H, W], not one of shape {list(mask.shape)}.")
    check_size(mask.shape)
    mask = np.atleast_2d(mask)
    if mask.dtype == bool:
        return mask.astype(np.uint8) * np.uint8(255)
    if not (np.issubdtype(mask.dtype, np.floating) or np.issubdtype(mask.dtype, np.integer)):
        raise MaskError(f"A mask holds booleans or numbers in 0..1, not {mask.dtype}.")
    if not np.isfinite(mask).all() or mask.min() < 0 or mask.max() > 1:
        raise MaskError("A mask holds values in 0..1; divide 0..255 masks by 255.")
    return np.rint(mask.astype(np.float64) * 255).astype(np.uint8)


def check_size(shape: tuple[int, ...]) -> None:
    """Raises MaskError for more pixels than :data:`MOST_PIXELS`."""
    pixels = int(np.prod(shape, dtype=np.float64))
    if pixels > MOST_PIXELS:
        size = "x".join(map(str, shape))
        raise MaskError(f"A mask of {size} has more than the {MOST_PIXELS} pixels that one may have; scale it down.")


def _from_file(path: str | os.PathLike) -> np.ndarray:
    name = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no picture at {name} to read a mask from.")
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            check_size(picture.size)
            return _from_picture(ImageOps.exif_transpose(picture))
    except MaskError:
        raise
    except _UNREADABLE as error:
        raise MaskError(f"{name} cannot be read as a picture ({error}); save the mask as PNG.") from error


def _from_picture(picture: Image.Image) -> np.ndarray:
    """Where a picture has transparency, what is painted; else how bright it is."""
    check_size(picture.size)
    if picture.mode == "F":
        return _from_numbers(np.asarray(picture))
    if picture.mode.startswith("I"):  # 16 bits, which some versions of Pillow open as 32
        numbers = np.asarray(picture)
        return _from_numbers(numbers / (65535 if picture.mode != "I" or numbers.max(initial=0) > 255 else 255))
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        straight = picture.convert("LA") if picture.mode == "La" else picture
        painted = np.array(straight.convert("RGBA").getchannel("A"))
        if (painted < 255).any():
            return painted
    if picture.mode == "LAB":
        return np.array(picture.getchannel("L"))
    return np.array((picture.convert("LA") if picture.mode == "La" else picture.convert("RGB")).convert("L"))


def picture_array(path: str | os.PathLike, mode: str) -> np.ndarray:
    """The picture at `path` as uint8 [H, W, C] in a mode of Pillow's, "RGB" or "L"; its transparency is dropped.

    Raises FileFormatError where it cannot be read, FileNotFoundError.
    """
    name = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no picture at {name}.")
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            check_size(picture.size)
            pixels = np.array(ImageOps.exif_transpose(picture).convert(mode))
    except MaskError as error:
        raise FileFormatError(f"{name}: {error}") from error
    except _UNREADABLE as error:
        raise FileFormatError(f"{name} cannot be read as a picture ({error}); save it as PNG.") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def png_of(plane: np.ndarray) -> bytes:
    """A plane of bytes [H, W] as PNG, grey."""
    buffer = io.BytesIO()
    Image.fromarray(plane).save(buffer, format="png")
    return buffer.getvalue()


def read_png(data: bytes, what: str) -> np.ndarray:
    """The first channel of a PNG (the one that the reference reads) as uint8 [H, W]. No other format is tried.

    Raises:
        FileFormatError: it is none, truncated, or larger than a mask may be, which its first bytes say.
    """
    try:
        if data[:8] == _SIGNATURE and len(data) >= 24:  # before Pillow warns of it
            check_size(struct.unpack(">II", data[16:24]))
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            check_size(picture.size)
            if picture.mode not in ("L", "LA", "RGB", "RGBA"):
                return np.array(picture.convert("RGB").getchannel(0))
            return np.array(picture.getchannel(0))
    except MaskError as error:
        raise FileFormatError(f"{what}: {error}") from error
    except _UNREADABLE as error:
        raise FileFormatError(f"{what} cannot be decoded as PNG ({error}).") from error
