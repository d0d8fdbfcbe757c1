"""The verdict on a change, from what was measured: limits, in one place, and the next thing to try.

The limits are calibrated against the embedded world's ground truth (``rewrite bench rules``): of changes whose true
outcome is known, the verdict is the true one for nine of ten.
"""

from __future__ import annotations

from typing import NamedTuple

FOLLOWS = 0.6  # a change with less reach is weak
SPILLS = 0.02  # mean change, 0..1, outside or of unrelated pictures: more is seen at once
DESTROYS = 0.05  # the same: more, and the pictures are not what they were
HALF_DONE = 0.3  # a paste that got less far to its goal was hardly fitted
FAINT = 2.0  # a context that stands out by fewer standard deviations is hardly told apart


class Numbers(NamedTuple):
    """What a verdict follows from; see :class:`rewrite_core.Report`. distinct: how far the context stands out, in
    standard deviations."""

    reach: float | None
    outside: float | None
    unrelated: float | None
    size: float | None = None
    paste: float | None = None
    distinct: float = 10.0


def verdict_of(numbers: Numbers) -> str:
    """ "destroys", "weak", "spills" or "holds", the first that is true."""
    elsewhere = max(numbers.outside or 0.0, numbers.unrelated or 0.0)
    if not elsewhere <= DESTROYS:  # NaN too
        return "destroys"
    if numbers.reach is None or numbers.reach < FOLLOWS:
        return "weak"
    return "spills" if elsewhere > SPILLS else "holds"


def advice_of(numbers: Numbers) -> str:
    """The next thing to try, one sentence."""
    verdict = verdict_of(numbers)
    if verdict == "holds":
        return "Keep it; the sheet shows the pictures that followed least."
    if verdict == "destroys":
        return (
            "Lower the rank or raise preserve, or try another layer with rc.scan_layers: this one ruins other pictures."
        )
    if verdict == "spills":
        return "Raise preserve, or lower the rank: too much changes where the rule does not apply."
    if numbers.reach is None:
        return "No unseen picture holds the context: give more unseen latents, or mark the context more closely."
    if numbers.distinct < FAINT:
        return "The context is hardly told apart from other places: mark more of it, with rc.search."
    if numbers.paste is not None and numbers.paste < HALF_DONE:
        return "Even its own paste hardly moved: try another layer with rc.scan_layers, or a higher rank."
    return (
        "Its own paste follows, too few others do: mark more context, paste into several pictures, or raise strength."
    )
