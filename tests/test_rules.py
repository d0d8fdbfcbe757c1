"""Rules on three generators: what is recorded of them fits together."""

import json

import pytest
import torch

from rewrite_core import RewriteCoreError
from rewrite_core.benchmarks import rules


@pytest.mark.parametrize("name", rules.NAMES + rules.PAINTED)
def test_rules_select_from_their_latents(name):
    rule = rules.rule(name)
    assert (rule.edit.copy is None) == (name in rules.PAINTED) == (rule.retouch is not None)
    assert rule.edit.pastes and len(rule.edit.where) >= 4
    rule.edit.check(rule.subject.edit_latents)  # refused where a row is another one
    for rows in (rule.concerned, rule.unrelated):
        assert len(rows) >= 40 and rows.unique().equal(rows) and rows.min() >= 0 and rows.max() < rules.UNSEEN_ROWS
    assert not set(rule.concerned.tolist()) & set(rule.unrelated.tolist())


def test_no_edit_has_seen_the_unseen_latents():
    for subject in rules.SUBJECTS.values():
        seen, unseen = (latents.flatten(1) for latents in (subject.edit_latents, subject.unseen_latents))
        assert torch.cdist(seen, unseen).min() > 0.1


@pytest.mark.parametrize("subject", rules.SUBJECTS.values(), ids=lambda subject: subject.name)
def test_generators_paint_in_their_span(subject):
    try:
        generator = subject.generator()
    except RewriteCoreError as error:
        pytest.skip(str(error))
    with torch.no_grad():
        images = generator(subject.edit_latents[:4])
    assert images.shape[:2] == (4, 3) and not generator.training
    low, high = subject.span
    assert images.amin() >= low - 0.5 and images.amax() <= high + 0.5 and images.std() > 0.2


def test_weights_that_are_not_there_are_told_of(tmp_path):
    with pytest.raises(RewriteCoreError, match="REWRITE_GENERATORS"):
        rules.SUBJECTS["faces_dcgan"].generator(tmp_path)
    with pytest.raises(RewriteCoreError, match="faces_glasses"):
        rules.rule("hats")


def test_the_edits_are_those_that_their_maker_makes():
    from rewrite_core.benchmarks.rules.make_edits import edits

    for name, edit in edits().items():
        assert rules.rule(name).edit == edit, name


def test_the_grid_prints_a_row_for_every_setting(tmp_path, capsys, monkeypatch):
    from rewrite_core.benchmarks.rules import grid

    monkeypatch.setattr(grid, "CHAPELS", 12)
    monkeypatch.setattr(grid, "NAMES", ("watermark",))
    monkeypatch.setattr(grid, "PAINTED", ())
    monkeypatch.setattr(grid, "SETTINGS", {"values": {"objective": "value", "region": "map", "loss": "l2"}})
    monkeypatch.setattr(grid, "TUNED", 1)
    monkeypatch.setattr(grid, "STRENGTHS", (0.5, 1.0))
    assert grid.main(tmp_path, quick=False) == 0
    rows = [json.loads(line) for line in (tmp_path / "rules.jsonl").read_text().splitlines()]
    assert [row["settings"] for row in rows] == ["values", "fine-tuning"]
    assert rows[0]["efficacy"] > 0.9 and rows[0]["progress"] > 0.5 and 0 < rows[0]["strength at equal progress"] < 1
    assert rows[0]["unrelated at equal progress"] < rows[0]["unrelated"] < 0.02
    assert "watermark      values" in capsys.readouterr().out
    path = tmp_path / "rules.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"rule": "waterm')
    monkeypatch.setattr(grid, "rows_of", lambda judged, settings, steps, equal: iter([]) if not settings else 1 / 0)
    assert grid.main(tmp_path, quick=False) == 0 and path.read_text() == whole, "a run goes on where one was ended"
    assert "values: less than fine-tuning in " in capsys.readouterr().out
