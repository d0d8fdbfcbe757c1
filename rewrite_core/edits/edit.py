"""Edits: what the user marks, and the reference implementation's JSON for it."""

from __future__ import annotations

import copy
import html
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import (
    ArgumentError,
    FileFormatError,
    LatentsWarning,
    RewriteCoreError,
    SelectionError,
    number,
    quoted,
    warn,
    whole_number,
)
from ..files import atomic_write, from_json, open_file, shown, to_json
from ..layers.bound import BoundLayer
from ..layers.latents import LatentRecipe, check_latents, check_rows, recipe_of, row_digests
from ..statistics.second_moment import SecondMoment
from .selection import Selection
from .spreading import SLACK, find_places, spread_pastes

_FIELDS = {"object": "copy", "paste": "paste", "key": "context", "query": "query"}
_LATENTS = "latents"  # a field of ours: the latents that the edit's selections index


class Edit:
    """A rule change as a user marks it: copy here, paste there, and do so wherever the context looks alike.

    Args:
        copy: the patch to copy (``object`` in the JSON); None for an erasure.
        paste: where it goes. Only its centre matters, as in the reference. Or several selections, of one picture or
            of several: the copied patch goes to each of them, and one change is fitted to all.
        context: the places that share the context (``key`` in the JSON); by default the paste itself.
        query: the selection last searched for; kept, not used by :func:`rewrite_core.rewrite`.
        latents: [N, ...] that the selections index, where they are at hand: the edit then knows them again, and calls
            with others are refused. ``change.edit`` always does.

    Attributes:
        recipe: how those latents are drawn (``normal 512, seed 1, 1000 rows``); None where it is not known.
        rows: {index: digest} of each latent that a selection names; empty where they are not known.

    Two edits are equal where they mark the same places.

    Raises:
        SelectionError: it marks nothing, holds what is no selection, an empty list, or an index beyond `latents`.
    """

    def __init__(
        self,
        copy: Selection | None = None,
        paste: Selection | Sequence[Selection] | None = None,
        context: Iterable[Selection] | None = None,
        query: Selection | None = None,
        latents: Tensor | None = None,
    ):
        if not isinstance(context, Iterable | None):
            raise SelectionError(f"context is a list of rc.Selection objects, not one {type(context).__name__}.")
        if isinstance(paste, Sequence) and not paste:
            raise SelectionError("paste is an empty list; give at least one rc.Selection, or leave it out.")
        context = list(() if context is None else context) or None
        self.pastes = tuple(paste) if isinstance(paste, Sequence) else () if paste is None else (paste,)
        single = [part for part in (copy, query) if part is not None]
        for part in (*single, *self.pastes, *(context or ())):
            if not isinstance(part, Selection):
                raise SelectionError(f"An edit is made of rc.Selection objects, not {type(part).__name__}.")
        if not (copy or self.pastes or context or query):
            raise SelectionError("An edit needs at least one selection.")
        self.copy, self.context, self.query = copy, context, query
        self.recipe: LatentRecipe | None = None
        self.rows: dict[int, str] = {}
        self._warns = False  # of a file that does not say what latents it is of
        if latents is not None:
            self._learn(latents)

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
        """All of them: copy, pastes, context, query."""
        return [part for part in (self.copy, *self.pastes, *(self.context or ()), self.query) if part is not None]

    def without_copy(self) -> Edit:
        """The same places, with nothing copied there: the edit of what only takes away."""
        edit = copy.copy(self)
        edit.copy = None
        edit.rows = {index: self.rows[index] for index in {part.index for part in edit.selections} & set(self.rows)}
        return edit

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and all(getattr(self, name) == getattr(other, name) for name in _FIELDS.values())

    def __repr__(self) -> str:
        made = f", latents={self.recipe}" if self.recipe else ""
        return f"Edit(copy={self.copy}, paste={self.paste}, context={self.context}, query={self.query}{made})"

    def _repr_html_(self) -> str:
        """For notebooks: the masks, by what they are for."""
        left = 'style="text-align: left; vertical-align: top"'  # a notebook's tables are set to the right
        marked = {"copy": [self.copy], "paste": self.pastes, "context": self.context or (), "query": [self.query]}
        rows = "".join(
            f"<tr><th {left}>{name}</th><td {left}>{''.join(part._repr_html_() for part in parts)}</td></tr>"
            for name, selected in marked.items()
            if (parts := [part for part in selected if part is not None])
        )
        made = f"<small>{html.escape(str(self.recipe))}</small>" if self.recipe else ""
        return f"<table>{rows}</table>{made}"

    # --- the same paste in more places

    def spread(
        self,
        layer: BoundLayer,
        moment: SecondMoment,
        latents: Tensor,
        *,
        matches: int = 0,
        slack: float = SLACK,
        progress: bool = False,
    ) -> Edit:
        """This edit with its copy pasted into every place of the context, and of search matches, not into one place.

        A patch moves by whole cells of the layer's map. A place is taken where that brings the centre of the copy's
        mask to the centre of the place's mask, but for `slack` of a cell; others are left out, with a warning. So it is
        an edit for layers with maps of this size.

        Args:
            layer, moment, latents: those that the edit is solved with.
            matches: so many pictures that search finds, by the first context selection, become context first.
            slack: how far, in cells, the patch may land beside the mask on each axis, 0 to 0.5.
            progress: show a bar while searching.

        Raises:
            SelectionError: it has no copy, no place is left, or there are not so many other pictures.
            MaskError, MismatchError, NonFiniteError: as their names say.
        """
        if self.copy is None:
            raise SelectionError("This edit has no copy to paste in more places; add one, or use rc.erase or rc.zero.")
        slack = number("slack", slack, least=0)
        known = self.on(latents)
        if matches:
            known = known.with_matches(layer, moment, latents, matches, progress=progress)
        size = tuple(layer.values(self.copy.latent(latents)).shape[2:])
        pastes = spread_pastes(self.copy, known.pastes, known.where, size, slack)
        return Edit(self.copy, pastes, known.where, self.query, latents)

    def with_matches(
        self, layer: BoundLayer, moment: SecondMoment, latents: Tensor, count: int, *, progress: bool = False
    ) -> Edit:
        """This edit with `count` more context selections: where search finds most of what the first context selection
        shows, in pictures that the edit does not select from yet. Look at them before you believe them.

        Raises:
            SelectionError: there are not so many other pictures.
            MaskError, MismatchError, NonFiniteError: as their names say.
        """
        count, known = whole_number("count", count), self.on(latents)
        found = find_places(layer, moment, known.where[0], known.selections, latents, count, progress)
        return Edit(self.copy, self.pastes or None, [*known.where, *found], self.query, latents)

    # --- the latents that it was made on

    def _learn(self, latents: Tensor) -> None:
        check_latents(latents)
        for part in self.selections:
            part.latent(latents)  # out of range
        self.recipe, self.rows = recipe_of(latents), row_digests(latents, {part.index for part in self.selections})

    def on(self, latents: Tensor) -> Edit:
        """This edit, knowing its latents [N, ...] again: the same object where it does already.

        Raises MismatchError where it knows other ones, SelectionError where it selects beyond them.
        """
        if self.rows:
            self.check(latents)
            return self
        return Edit(self.copy, self.pastes or None, self.context, self.query, latents)

    def check(self, latents: Tensor) -> None:
        """Check that `latents` [N, ...] are those that the edit was made on, where it knows them. Every call that takes
        both does. An edit from a file that does not say warns, once (LatentsWarning).

        Raises MismatchError where a row that a selection names is another one, SelectionError where there is none.
        """
        check_latents(latents)
        for part in self.selections:
            part.latent(latents)
        if self.rows:
            check_rows(self.rows, self.recipe, latents, "The edit")
        elif self._warns:
            self._warns = False
            warn(
                "The edit's file does not say which latents its selections index (the reference's does not): make sure "
                "that they are these; edit.on(latents) remembers them.",
                LatentsWarning,
            )

    # --- in files

    def _to_record(self, entry: Callable[[Selection], list]) -> dict[str, Any]:
        record: dict[str, Any] = {}
        for field, name in _FIELDS.items():
            part = getattr(self, name)
            if part is not None:
                record[field] = entry(part) if isinstance(part, Selection) else [*map(entry, part)]
        if self.rows:
            recipe = None if self.recipe is None else self.recipe.to_dict()
            record[_LATENTS] = {"recipe": recipe, "rows": {str(index): row for index, row in self.rows.items()}}
        return record

    @classmethod
    def _from_record(cls, record: Any, entry: Callable[[Any, str], Selection]) -> Edit:
        if not isinstance(record, dict):
            raise FileFormatError(f"An edit is a JSON object, not a {type(record).__name__}.")
        foreign = sorted(set(record) - set(_FIELDS) - {_LATENTS})
        if foreign or not record:
            found = quoted(foreign[:3]) if foreign else "nothing"
            raise FileFormatError(f"Not an edit: it holds {found}, where an edit has some of {list(_FIELDS)}.")
        parts: dict[str, Any] = {}
        for field, name in _FIELDS.items():
            if field not in record:
                continue
            value = record[field]
            several = field == "paste" and isinstance(value, list) and all(isinstance(part, list) for part in value)
            if field == "key" or several:
                if not isinstance(value, list) or (several and not value):
                    raise FileFormatError(f"{field!r} should hold a list of [index, PNG data URL].")
                parts[name] = [entry(part, field) for part in value]
            else:
                parts[name] = entry(value, field)
        edit = cls(**parts)
        edit._warns = _LATENTS not in record
        if not edit._warns:
            edit.recipe, edit.rows = _read_latents(record[_LATENTS])
        return edit

    def to_json(self) -> str:
        """The edit in the reference implementation's JSON. Several pastes, which that has not, are a list in the place
        of one, as ``key`` is; and ``latents``, where they are known, is a field of ours: their recipe, and a digest of
        each row that a selection names."""
        return to_json(self._to_record(Selection._to_json), "the edit")

    @classmethod
    def from_json(cls, text: str) -> Edit:
        """Read the reference implementation's JSON. Raises FileFormatError, MaskError or SelectionError."""
        if not isinstance(text, str | bytes):
            raise ArgumentError(f"from_json takes the text of an edit, not {quoted(text)}; rc.Edit.load reads a file.")
        return cls._from_record(from_json(text, "The edit"), Selection._from_json)

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON, all or nothing."""
        with atomic_write(path) as partial:
            partial.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Edit:
        """Read the JSON at `path`. Errors name the file."""
        with open_file(path, "edit") as file:
            data = file.read()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{shown(path)} is not an edit: it is not text.") from error
        try:
            return cls.from_json(text)
        except RewriteCoreError as error:
            raise type(error)(f"{shown(path)}: {error}", advice=error.advice) from error


def _read_latents(record: Any) -> tuple[LatentRecipe | None, dict[int, str]]:
    """The recipe and the digests of rows from a file."""
    rows = record.get("rows") if isinstance(record, dict) else None
    if not isinstance(rows, dict) or not rows or record.keys() != {"recipe", "rows"} or not all(_is_row(rows)):
        raise FileFormatError(
            "'latents' should hold a recipe and, by their numbers, digests of rows; the edit is damaged or foreign."
        )
    recipe = None if record["recipe"] is None else LatentRecipe.from_dict(record["recipe"])
    return recipe, {int(index): digest for index, digest in rows.items()}


def _is_row(rows: Mapping[str, Any]) -> Iterable[bool]:
    for index, digest in rows.items():
        whole = index.isascii() and index.isdecimal() and len(index) < 19 and str(int(index)) == index
        yield whole and isinstance(digest, str) and len(digest) == 16 and set(digest) <= set("0123456789abcdef")
