"""The paper's comparisons (benchmarks/rules/paper.py): intervals, a quick run, going on with one, the table."""

from __future__ import annotations

import json

import pytest
import torch

from rewrite_core.benchmarks import runner
from rewrite_core.benchmarks.rules import paper

RATES = {"fine-tuned": (0.003,)}


def test_intervals_are_those_of_means_of_drawn_scenes():
    torch.manual_seed(0)
    values = torch.randn(400) * 2 + 5
    mean, low, high = paper.interval(values)
    error = 1.96 * values.std().item() / 20
    assert mean == pytest.approx(values.mean().item())
    assert low == pytest.approx(mean - error, abs=0.15 * error) and high == pytest.approx(
        mean + error, abs=0.15 * error
    )
    assert paper.interval(values) == (mean, low, high), "seeded"
    assert paper.interval(values, seed=1) != (mean, low, high)
    assert paper.interval(torch.ones(7, dtype=torch.bool)) == (1.0, 1.0, 1.0)


def test_a_quick_run_makes_the_table_and_the_figure_and_is_gone_on_with(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper, "QUICK", paper.Size(32, 16, 8, RATES, dict.fromkeys(paper.STOPS, (1, 2))))
    assert runner.main(["paper"], tmp_path, True) == 0
    path = tmp_path / "paper-quick.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    named = {row["way"]: row for row in rows}
    assert list(named) == ["ours, value, rank 1", "single context", "30 units zeroed", "fine-tuned"]
    ours = named["ours, value, rank 1"]
    assert ours["efficacy"][0] > 0.9 and ours["completed"][0] > 0.8 and ours["rank"] == 1 and ours["size"] > 0
    assert 0 < ours["unrelated"][1] < ours["unrelated"][0] < ours["unrelated"][2] < 0.01, "measured against before"
    assert named["fine-tuned"]["steps"] in (1, 2) and named["fine-tuned"]["size"] is None
    tried = [json.loads(line) for line in (tmp_path / "paper-quick.tuned.jsonl").read_text().splitlines()]
    assert [(each["lr"], each["steps"]) for each in tried] == [(0.003, 1), (0.003, 2)]
    assert (tmp_path / "paper-quick.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "| way | efficacy, % |" in out and "| ours, value, rank 1 | 100 (100 to 100) |" in out
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:3]) + '{"rule": "water')
    monkeypatch.setattr(paper, "row_of", lambda world, rule, way, kept: named[way] | {"seconds": 1e9})
    assert paper.main(tmp_path, True) == 0
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert again[:3] == rows[:3] and again[3] == rows[3] | {"seconds": 1e9}, "what was cut off is made again"


def test_every_way_has_a_mark_and_every_rule_a_layer():
    assert set(paper._MARKS) == {*paper.ways(), *paper.TUNED}
    assert set(paper.LAYERS) == set(paper.CASES) == {"spire", "watermark", "reflection", "glow"}
