"""Selections and edits: what the user marks, and the reference implementation's JSON for it."""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .errors import FileFormatError, MaskError, RewriteCoreError, SelectionError
from .files import atomic_write

_URL_PREFIX = "data:image/png;base64,"
_FIELDS = {"object": "copy", "paste": "paste", "key": "context", "query": "query"}


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


class Edit:
    """A rule change as a user marks it: copy here, paste there, and do so wherever the context looks alike.

    Args:
        copy: the patch to copy (``object`` in the JSON); None for an erasure.
        paste: where it goes. Only its centre matters, as in the reference. Or several selections, of one picture or
            of several: the copied patch goes to each of them, and one change is fitted to all.
        context: the places that share the context (``key`` in the JSON); by default the paste itself.
        query: the selection last searched for; kept, not used by :func:`rewrite_core.rewrite`.
    """

    def __init__(
        self,
        copy: Selection | None = None,
        paste: Selection | Sequence[Selection] | None = None,
        context: Iterable[Selection] | None = None,
        query: Selection | None = None,
    ):
        if not isinstance(context, Iterable | None):
            raise SelectionError(f"context is a list of rc.Selection objects, not one {type(context).__name__}.")
        context = list(() if context is None else context) or None
        pastes = paste if isinstance(paste, Sequence) else (paste,)
        for part in (copy, query, *pastes, *(context or ())):
            if part is not None and not isinstance(part, Selection):
                raise SelectionError(f"An edit is made of rc.Selection objects, not {type(part).__name__}.")
        self.pastes = tuple(part for part in pastes if part is not None)
        if not (copy or self.pastes or context or query):
            raise SelectionError("An edit needs at least one selection.")
        self.copy, self.context, self.query = copy, context, query

    @property
    def paste(self) -> Selection | tuple[Selection, ...] | None:
        """The paste; a tuple of them where there are several (``pastes`` is one in any case)."""
        return self.pastes if len(self.pastes) > 1 else self.pastes[0] if self.pastes else None

    @property
    def keys(self) -> list[Selection]:
        """The context selections, or the pastes where no context was marked."""
        if self.context:
            return self.context
        if self.pastes:
            return list(self.pastes)
        raise SelectionError("This edit marks no context and no paste; add one to say where the rule applies.")

    @property
    def selections(self) -> list[Selection]:
        return [part for part in (self.copy, *self.pastes, *(self.context or ()), self.query) if part is not None]

    def __eq__(self, other) -> bool:
        return isinstance(other, Edit) and all(getattr(self, name) == getattr(other, name) for name in _FIELDS.values())

    def __repr__(self) -> str:
        return f"Edit(copy={self.copy}, paste={self.paste}, context={self.context}, query={self.query})"

    def to_json(self) -> str:
        """The edit in the reference implementation's JSON. Several pastes, which that has not, are a list in the place
        of one, as ``key`` is."""
        record = {}
        for field, name in _FIELDS.items():
            part = getattr(self, name)
            if part is not None:
                record[field] = part._to_json() if isinstance(part, Selection) else [p._to_json() for p in part]
        return json.dumps(record)

    @classmethod
    def from_json(cls, text: str) -> Edit:
        """Read the reference implementation's JSON. Raises FileFormatError, MaskError or SelectionError."""
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise FileFormatError(f"Not JSON, or cut off (line {error.lineno}): {error.msg}.") from error
        except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
            raise FileFormatError(f"Not an edit: its JSON cannot be read ({error}).") from error
        if not isinstance(record, dict):
            raise FileFormatError(f"An edit is a JSON object, not a {type(record).__name__}.")
        foreign = sorted(set(record) - set(_FIELDS))
        if foreign or not record:
            raise FileFormatError(
                f"Not an edit: it holds {foreign[:3] or 'nothing'}, where an edit has some of {list(_FIELDS)}."
            )
        parts = {}
        for field, value in record.items():
            several = field == "paste" and isinstance(value, list) and all(isinstance(part, list) for part in value)
            if field == "key" or several:
                if not isinstance(value, list) or (several and not value):
                    raise FileFormatError(f"{field!r} should hold a list of [index, PNG data URL].")
                parts[_FIELDS[field]] = [Selection._from_json(part, field) for part in value]
            else:
                parts[_FIELDS[field]] = Selection._from_json(value, field)
        return cls(**parts)

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON, all or nothing."""
        with atomic_write(path) as partial:
            partial.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Edit:
        """Read the JSON at `path`. Errors name the file."""
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{os.fspath(path)} is not an edit: it is not text.") from error
        try:
            return cls.from_json(text)
        except RewriteCoreError as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from error
