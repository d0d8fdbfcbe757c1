"""Whether rules hold, and the default edit beside fine-tuning, on a generator of one second: holds.py and equal.py."""

import json

import pytest
import torch
from helpers.small import painter
from safetensors.torch import save_file

import rewrite_core as rc
from rewrite_core.benchmarks import rules
from rewrite_core.benchmarks.rules import equal, holds, limits
from rewrite_core.demo.world import scene_from_latents

SIDE = 16


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_file(painter().state_dict(), tmp_path / "tiny.safetensors")
    monkeypatch.setenv(rules.FOLDER, str(tmp_path))
    subject = rules.Subject("tiny", (8, 1, 1), "normal", (-1.0, 1.0), ("3", "6"), painter)
    box = (4, 4, 12, 12)
    copy, paste, *others = (rc.Selection.box(row, box, SIDE) for row in (3, 5, 7, 9, 11))
    edit = rc.Edit(copy, paste, [paste, *others], latents=subject.edit_latents)
    return rules.Rule("tiny", subject, "a tiny rule", edit, torch.arange(8), torch.arange(20, 28))


def test_holds_tells_of_each_trial_and_of_fine_tuning(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(holds, "rule", lambda name: tiny)
    monkeypatch.setattr(holds, "MATCHES", 2)
    monkeypatch.setattr(holds, "STRENGTHS", (1.0, 2.0))
    monkeypatch.setattr(holds, "RANKS", (1,))
    monkeypatch.setattr(holds, "STEPS", 3)
    monkeypatch.setattr(holds, "SHARES", (0.5, 1.0))
    out = tmp_path / "out"
    assert holds.main(out, ["tiny"]) == 0
    rows = [json.loads(line) for line in (out / "holds.jsonl").read_text().splitlines()]
    ours, best, *tuned = [row for row in rows if row["way"] == "ours"], *rows[4:]
    assert [(row["layer"], row["strength"]) for row in ours] == [("3", 1.0), ("3", 2.0), ("6", 1.0), ("6", 2.0)]
    assert all(row["unrelated of all"] > 0 and 0 <= row["reach of all"] <= 1 for row in ours)
    assert ours[1]["size"] == pytest.approx(2 * ours[0]["size"]), "twice as strong, twice as large"
    assert ours[1]["unrelated of all"] > ours[0]["unrelated of all"]
    assert best["way"].startswith("best of ours (") and (out / "tiny.png").stat().st_size > 1000
    assert [row["way"][:24] for row in tuned] == ["fine-tuned, preserve 0, ", "fine-tuned, preserve 1, "]
    capsys.readouterr()
    monkeypatch.setattr(holds, "rows_of", lambda judged, out: 1 / 0)
    assert holds.main(out, ["tiny"]) == 0, "what is there is not done again"
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_equal_compares_at_the_reach_of_the_default_edit(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(equal, "rule", lambda name: tiny)
    monkeypatch.setattr(equal, "TUNINGS", ((0.0, 0.01, (2, 4)), (1.0, 0.01, (4,))))
    assert equal.main(tmp_path, ["tiny"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "equal.jsonl").read_text().splitlines()]
    assert [row["layer"] for row in rows] == ["3", "6"]
    for row in rows:
        assert list(row["all"]) == ["lr 0.01, 2 steps", "lr 0.01, 4 steps", "lr 0.01, 4 steps, preserve"]
        reached = [each for each in row["all"].values() if each is not None]
        assert row["fine-tuned"] == (min(reached) if reached else None)
    monkeypatch.setattr(equal, "row_of", lambda *given: 1 / 0)
    assert equal.main(tmp_path, ["tiny"]) == 0, "what is there is not done again"
    assert "all edits: the default changes less that is unrelated in" in capsys.readouterr().out


def test_fine_tuning_is_scaled_to_the_reach(tiny):
    judge = equal.Judge(tiny)
    trial = equal.Trial(tiny, judge, "6")
    with torch.no_grad():
        other = tiny.subject.generator()
        other[8].bias += 0.1  # lighter pictures, of every kind alike

    class Told:  # as far as pictures get lighter
        generator = judge.generator

        @staticmethod
        def outcome(part):
            far = (part[8].bias - judge.generator[8].bias).mean().item() * 10
            return equal.Judge.outcome.__globals__["Outcome"](far, 0.3 * far, {})

    trial.judge = Told
    assert trial._as_far(other, 0.4) == pytest.approx(0.12, rel=1e-3)
    assert trial._as_far(other, 1.2) is None, "not even all of it goes so far"


def test_the_summary_counts_what_never_gets_so_far():
    def row(ours, tuned, progress, paste, warned=()):
        facts = {"rule": "r", "layer": "l", "verdict": "weak", "paste": paste, "warnings": list(warned)}
        ways = {"lr 1": tuned, "lr 2": 0.15}
        return facts | {"unrelated": ours, "fine-tuned": tuned, "progress": progress, "all": ways}

    rows = [row(0.1, 0.2, 0.5, 0.9), row(0.2, 0.1, 0.4, 0.05), row(0.1, None, 0.05, 0.04, ["TrustWarning"])]
    told = list(equal.summary(rows))
    assert "in 2 of 3 (67%); in 1 of these no fine-tuning goes so far" in told[0]
    assert "in 1 of 2 (50%); in 0" in told[1]
    assert told[2:4] == [
        "against lr 1 alone: less in 2 of 3 (67%), 1 never so far",
        "against lr 2 alone: less in 2 of 3 (67%), 0 never so far",
    ]
    assert told[-1].endswith("own paste less than 0.1 of the way: 2, without a warning: r at l")


def test_twins_are_the_same_scenes_under_the_rule():
    latents = rc.sample_latents(16, 40, seed=3)
    scene = scene_from_latents(latents)
    for rule, change in (("spire", {"roof": 2}), ("watermark", {"watermark": False}), ("reflection", {"lit": False})):
        mine = limits.RULES[rule].concerns(scene)
        wanted = scene_from_latents(latents[mine]).replace(**change)
        got = scene_from_latents(limits.twins(rule, latents[mine]))
        for field, value in vars(wanted).items():
            assert torch.allclose(getattr(got, field).float(), value.float(), atol=1e-6), (rule, field)


def test_what_falls_short_of_what_is_wanted():
    good = {"efficacy": 0.99, "completed": 0.8, "collateral": 0.004}
    assert limits.missed(good) == 0
    assert limits.missed(good | {"collateral": 0.01}) == pytest.approx(1)
    assert limits.missed(good | {"completed": 0.6}) == pytest.approx(0.2)
