"""Edits: what the user marks, and the reference implementation's JSON for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence

from ..errors import FileFormatError, RewriteCoreError, SelectionError
from ..files import atomic_write
from .selection import Selection

_FIELDS = {"object": "copy", "paste": "paste", "key": "context", "query": "query"}


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
    def where(self) -> list[Selection]:
        """Where the rule applies: the context selections, or the pastes where no context was marked."""
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
