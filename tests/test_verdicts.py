"""How rc.measure is held against the truth (benchmarks/rules/verdicts.py): the arithmetic, and a few edits."""

from __future__ import annotations

import json

import pytest

from rewrite_core.benchmarks.rules import verdicts
from rewrite_core.evaluation.verdict import DESTROYS, FOLLOWS, SPILLS, Numbers, verdict_of


def test_rank_correlation_is_spearmans():
    assert verdicts.rank_correlation([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert verdicts.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4: covariance 3, squares 4.5 and 5
    assert verdicts.rank_correlation([1, 2, 2, 3], [20, 10, 30, 40]) == pytest.approx(3 / (4.5 * 5) ** 0.5)


@pytest.mark.parametrize(
    ("truth", "verdict"),
    [
        ((0.9, 0.01, 0.01), "holds"),
        ((0.59, 0.01, 0.01), "weak"),
        ((0.9, 0.021, 0.01), "spills"),
        ((0.9, 0.01, 0.051), "destroys"),
        ((0.1, 0.051, 0.01), "destroys"),
    ],
)
def test_true_verdicts(truth, verdict):
    names = ("efficacy", "collateral", "collateral_unrelated")
    assert verdicts.true_verdict(dict(zip(names, truth, strict=True))) == verdict


def test_verdicts_with_the_librarys_limits_are_the_librarys():
    for reach in (None, 0.1, 0.6, 0.9):
        for outside in (0.0, 0.03, 0.06):
            for unrelated in (None, 0.0, 0.03, 0.06):
                row = {"reach": reach, "outside": outside, "unrelated": unrelated}
                own = verdict_of(Numbers(reach, outside, unrelated))
                assert verdicts.verdict_with(row, FOLLOWS, SPILLS, DESTROYS) == own


def test_edits_are_measured_and_summed_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verdicts, "UNSEEN", 40)
    monkeypatch.setattr(verdicts, "STATISTICS", 64)
    way = {**verdicts.MAP, "rank": 1, "preserve": 0.0, "pastes": 1}
    layers = ("synthesis.layer4.conv", "synthesis.layer5.conv", "synthesis.layer2.conv")
    monkeypatch.setattr(verdicts, "edits", lambda: [("watermark", layer, way) for layer in layers])
    out = tmp_path / "rows.jsonl"
    verdicts.main(["--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    good, fine, bad = rows
    assert good["truth"]["efficacy"] > 0.9 > good["truth"]["efficacy"] - good["reach"] and good["reach"] > 0.9
    assert fine["reach"] > 0.9 and bad["reach"] < 0.5 and bad["truth"]["efficacy"] < 0.5
    assert "watermark        3" in capsys.readouterr().out
    monkeypatch.setattr(verdicts, "World", None)  # nothing is made again
    verdicts.main(["--out", str(out)])
    assert len(out.read_text().splitlines()) == 3
