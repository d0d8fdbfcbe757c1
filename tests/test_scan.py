"""rc.scan_layers: which layer and rank hold a rule."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from helpers import small
from helpers.command_line import run
from torch import nn

import rewrite_core as rc
from rewrite_core.cli import scan as command
from rewrite_core.demo import chapels, load_edit
from rewrite_core.evaluation import scan as scanning

UNSEEN = rc.sample_latents(16, 20, seed=3)
HOW = {"trust": None, "unseen": UNSEEN, "ranks": (1, 2)}


class Branch(nn.Module):
    """x + share * conv(x): what an edit of the convolution can show is up to `share`."""

    def __init__(self, share):
        super().__init__()
        self.conv, self.share = nn.Conv2d(8, 8, 3, padding=1), share

    def forward(self, x):
        return x + self.share * self.conv(x)


def with_branch(share):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (16, 1, 1)),
        nn.ConvTranspose2d(16, 8, 4),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        Branch(share),
        nn.ReLU(),
        nn.Conv2d(8, 3, 3, padding=1),
    ).eval()


def free(generator):
    """Whether another thread gets its turn at the generator."""
    got = []

    def take():
        lock = scanning.generator_lock(generator)
        with lock:
            got.append(True)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(10)
    return bool(got)


def test_the_first_choice_is_the_layer_that_holds_the_rule():
    """Of the embedded generator's layers the fourth turns domes into spires (92 %), and the ninth none (5 %)."""
    generator, z = chapels(), rc.sample_latents(16, 1000, seed=1)
    names = [f"synthesis.layer{n}.conv" for n in (9, 4)]
    found = rc.scan_layers(
        generator, load_edit("spire"), z, unseen=rc.sample_latents(16, 48, seed=5), layers=names, ranks=(4,)
    )
    assert [(row.layer, row.rank) for row in found.rows] == [(names[1], 4), (names[0], 4)]
    first, last = found.rows
    assert first.score > last.score + 0.2 and first.report.reach > last.report.reach + 0.3
    assert found.best is first and found.complete


def test_rows_say_what_measure_says():
    made = small.generator()
    found = rc.scan_layers(made, small.EDIT, small.Z, **HOW)
    assert {row.layer for row in found.rows} == {"1", "4", "6"} and len(found.rows) == 6
    assert [row.score for row in found.rows] == sorted((row.score for row in found.rows), reverse=True)
    for row in found.rows:
        layer = rc.bind(made, row.layer)
        moment = rc.collect_second_moment(layer, small.Z, progress=False)
        own = rc.rewrite(layer, moment, small.EDIT, small.Z, rank=row.rank, trust=None, **scanning.FIT)
        assert torch.allclose(own.weight_delta(), row.change.weight_delta(), rtol=1e-3, atol=1e-5)
        told = rc.measure(row.change, small.EDIT, small.Z, UNSEEN, moment=moment)
        mine, its = row.report.to_dict(), told.to_dict()
        rows = [len(small.Z) + number for number in its["matching"]]  # of z and unseen together
        assert mine["matching"] == rows and mine["layer"] == its["layer"]
        for name in ("reach", "agreement", "paste", "inside", "outside", "unrelated", "size", "weight_size"):
            want = None if its[name] is None else pytest.approx(its[name], rel=1e-4, abs=1e-6)
            assert mine[name] == want, name
        moved = [min(max(far, 0), 1) for far in its["moved"]]
        spill = [change for change in (its["outside"], its["unrelated"]) if change is not None]
        want = (sum(moved) / len(moved) if moved else 0) - sum(spill) / len(spill) / its["wanted"]
        assert row.score == pytest.approx(want - (its["verdict"] == "destroys"), rel=1e-3, abs=1e-4)


def test_a_layer_that_does_not_show_the_paste_is_left_out():
    for share, kept in ((1e-3, False), (3.0, True)):
        found = rc.scan_layers(with_branch(share), small.EDIT, small.Z, **HOW)
        assert ("4.conv" in {row.layer for row in found.rows}) == kept
        if not kept:
            assert "shows 0%" in found.left_out["4.conv"]
            assert "left out: 4.conv" in str(found) and "4.conv" in found._repr_html_()
    seen = {each.layer: each for each in found.visibility}
    assert seen["6"].shown == pytest.approx(1, abs=0.05) and seen["6"].elsewhere < 0.05


def test_a_rank_with_too_few_context_keys_is_left_out():
    found = rc.scan_layers(small.generator(), small.EDIT, small.Z, unseen=UNSEEN, ranks=(1, 8), layers=["4"])
    assert {row.rank for row in found.rows} == {1, 8}  # 18 context keys of 8 channels
    few = rc.Edit(small.COPY, rc.Selection.box(1, (4, 4, 5, 5), 8), latents=small.Z)
    found = rc.scan_layers(small.generator(), few, small.Z, unseen=UNSEEN, ranks=(1, 8), layers=["4"])
    assert {row.rank for row in found.rows} == {1} and "1 context keys" in found.left_out["4, rank 8"]


def test_a_cancelled_scan_has_what_was_done_and_leaves_no_trace():
    made, stages = small.generator(), []
    bits = small.bits(made)
    found = rc.scan_layers(
        made,
        small.EDIT,
        small.Z,
        told=lambda *step: stages.append(step),
        cancelled=lambda: stages[-1:] == [("fit and judge", 1, 6)],
        **HOW,
    )
    assert not found.complete and len(found.rows) == 1 and "cancelled" in str(found)
    assert small.same(bits, made) and free(made)
    nothing = rc.scan_layers(made, small.EDIT, small.Z, cancelled=lambda: True, **HOW)
    assert nothing.rows == [] and not nothing.complete
    with pytest.raises(rc.RewriteCoreError, match="ended before"):
        nothing.best  # noqa: B018
    with pytest.raises(rc.RewriteCoreError, match="no row"):
        nothing.sheet()


@pytest.mark.parametrize("stage", ["what layers show", "find the context", "second moments", "fit and judge"])
def test_an_interrupt_leaves_no_trace(stage):
    made = small.generator()
    bits = small.bits(made)

    def told(now, done, total):
        assert 0 <= done <= total
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rc.scan_layers(made, small.EDIT, small.Z, told=told, **HOW)
    assert small.same(bits, made) and free(made)


def test_a_scan_beside_a_session_disturbs_neither():
    made = small.generator()
    alone = rc.scan_layers(made, small.EDIT, small.Z, **HOW)
    layer, change = small.fit(made)
    session = rc.Session(layer, rc.collect_second_moment(layer, small.Z, progress=False), small.Z)
    want = session.images([0, 1], [change]).clone(), session.images([0, 1]).clone()
    results = []
    thread = threading.Thread(target=lambda: results.append(rc.scan_layers(made, small.EDIT, small.Z, **HOW)))
    thread.start()
    looks = 0
    while thread.is_alive():
        assert torch.equal(session.images([0, 1], [change]), want[0]) and torch.equal(session.images([0, 1]), want[1])
        looks += 1
    thread.join()
    assert looks > 3
    assert [row.report.to_dict() for row in results[0].rows] == [row.report.to_dict() for row in alone.rows]


def test_what_cannot_be_scanned_is_refused():
    made = small.generator()
    with pytest.raises(rc.UnknownLayerError, match="no layer 'nine'"):
        rc.scan_layers(made, small.EDIT, small.Z, layers=["nine"])
    with pytest.raises(rc.ArgumentError, match="rc.Edit"):
        rc.scan_layers(made, "edit.json", small.Z)
    with pytest.raises(rc.SelectionError, match="no copy"):
        rc.scan_layers(made, rc.Edit(paste=small.PASTE, latents=small.Z), small.Z, layers=["4"])
    with pytest.raises(rc.RewriteCoreError, match="A rank"):
        rc.scan_layers(made, small.EDIT, small.Z, ranks=(0,))


def test_the_command_line_scans(capsys, tmp_path, monkeypatch, user_generator):
    assert command.RANKS == scanning.RANKS
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scanning, "_STATISTICS", 64)
    monkeypatch.setattr("rewrite_core.evaluation.measuring.UNSEEN", 24)
    one = ["scan", "watermark", "--count", 380, "--layers", "synthesis.layer5.conv", "--ranks", "1"]
    code, out, err = run(capsys, *one, "--out", "s.png", "--size", 32)
    assert code == 0, err
    assert "first choice: --layer synthesis.layer5.conv --rank 1" in out and "holds" in out
    assert (tmp_path / "s.png").stat().st_size > 1000
    code, out, err = run(capsys, *one, "--json")
    told = json.loads(out)
    assert code == 0 and told["rows"][0]["layer"] == "synthesis.layer5.conv" and told["complete"]
