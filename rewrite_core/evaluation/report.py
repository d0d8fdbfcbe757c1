"""What a change did to pictures, without ground truth: :func:`measure` and the report it makes."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

from PIL.Image import Image

from .sheet import Pair, sheet_of
from .verdict import Numbers, advice_of, verdict_of


@dataclasses.dataclass(frozen=True)
class Report:
    """What a change did, measured on its own pictures and on unseen ones. Pictures are compared in 0..1.

    Attributes:
        reach: share of the unseen pictures with the context that move there as the paste was meant to: at least half as
            far in that direction. None where no unseen picture holds the context.
        agreement: mean cosine of those movements with the wanted one, -1..1.
        paste: how far the edit's own paste moved towards its goal: 1 is all the way. None for an edit without a copy.
        inside: mean absolute change where the context is, in unseen pictures that hold it.
        outside: mean absolute change around it in the same pictures.
        unrelated: mean absolute change of pictures that clearly do not hold the context. None where there is none.
        size: of the change on the layer's ordinary keys, sqrt(tr dW C dW^T / tr W C W^T), every tap of a kernel counted
            by itself; of several changes the largest. None where it is not known (a generator given as the change).
        weight_size: |dW| / |W|, of several changes the largest. None as for `size`.
        verdict: "holds", "weak" (too few places follow), "spills" (much changes elsewhere) or "destroys".
        advice: the next thing to try, one sentence.
        layer: whose keys told where the context is, and whose value showed what was wanted.
        matching, unrelated_rows: rows of the unseen latents that hold the context, best match first, and that clearly
            do not.
        moved: of each of `matching`, how far it moved along the wanted movement: 1 is as far as that.
        most_changed: rows of `unrelated_rows`, the most changed first.
        wanted: mean absolute movement that was wanted, in the area of the paste.
    """

    reach: float | None
    agreement: float | None
    paste: float | None
    inside: float | None
    outside: float | None
    unrelated: float | None
    size: float | None
    weight_size: float | None
    layer: str
    matching: list[int]
    moved: list[float]
    unrelated_rows: list[int]
    most_changed: list[int]
    wanted: float
    distinct: float
    pairs: list[Pair] = dataclasses.field(default_factory=list, repr=False)

    @property
    def _numbers(self) -> Numbers:
        return Numbers(self.reach, self.outside, self.unrelated, self.size, self.paste, self.distinct)

    @property
    def verdict(self) -> str:
        return verdict_of(self._numbers)

    @property
    def advice(self) -> str:
        return advice_of(self._numbers)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON: all but the pictures."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "pairs"}
        return {"verdict": self.verdict, "advice": self.advice, **fields}

    def lines(self) -> list[str]:
        """The numbers in words, a line each."""
        rows = len(self.matching)
        return [
            f"{self.verdict}: {self.advice}",
            f"reach {_percent(self.reach)} of {rows} unseen pictures with the context, "
            f"agreement {_number(self.agreement)}",
            f"change inside {_change(self.inside)}, outside {_change(self.outside)}, "
            f"in {len(self.unrelated_rows)} unrelated pictures {_change(self.unrelated)}",
            f"size {_number(self.size)} on ordinary keys, |dW| / |W| {_number(self.weight_size)}",
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def sheet(self, side: int = 96) -> Image:
        """The unseen pictures that followed best and worst, and the unrelated ones that changed most, before and after:
        an RGB picture with the numbers above. `side`: pixels of one picture's longer side."""
        title, *notes = self.lines()
        return sheet_of(self.pairs, side, title, notes)

    def _repr_html_(self) -> str:
        """For notebooks: the verdict, the next thing to try, and the numbers."""
        first, *rest = self.lines()
        verdict, _, advice = first.partition(": ")
        rows = "".join(f"<br><small>{html.escape(line)}</small>" for line in rest)
        return f"<div><b>{html.escape(verdict)}</b>: {html.escape(advice)}{rows}</div>"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _change(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
