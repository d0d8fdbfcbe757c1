"""rc.measure: what a change did, without ground truth; compared with the embedded world's and plain references."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from helpers import small
from helpers.command_line import run

import rewrite_core as rc
from rewrite_core.demo import chapels, load_edit
from rewrite_core.demo.rules import RULES, score
from rewrite_core.demo.world import scene_from_latents
from rewrite_core.edits.goals import bounding_box, landing
from rewrite_core.evaluation import measuring
from rewrite_core.evaluation.aligning import best_shift
from rewrite_core.evaluation.measuring import Given, measured, scene_of, several_changes
from rewrite_core.evaluation.places import find_places
from rewrite_core.evaluation.showing import composite, visibility
from rewrite_core.evaluation.verdict import DESTROYS, FOLLOWS, SPILLS, Numbers, advice_of, verdict_of
from rewrite_core.pictures import paint

UNSEEN = rc.sample_latents(16, 40, seed=11)
HOW = {"objective": "value", "rank": 1, "loss": "l2", "region": "map"}


@pytest.fixture(scope="module")
def world():
    """The embedded generator with its watermark rule: layer, moment, edit, latents, and the scene to measure in."""
    generator, z = chapels(), rc.sample_latents(16, 1000, seed=1)
    layer = rc.bind(generator, "synthesis.layer4.conv")
    moment = rc.collect_second_moment(layer, z[:200], progress=False)
    edit = load_edit("watermark")
    return layer, moment, edit, z


@pytest.fixture(scope="module")
def change(world):
    layer, moment, edit, z = world
    return rc.rewrite(layer, moment, edit, z, **HOW)


@pytest.fixture(scope="module")
def scene(world):
    layer, _, edit, z = world
    return scene_of(layer, Given([], edit, z, UNSEEN, layer))


@pytest.fixture(scope="module")
def before(world):
    return paint(world[0].generator, UNSEEN, batch_size=16)


def report_of(world, scene, changes, **options):
    layer, moment, edit, z = world
    given = Given(several_changes(changes), edit, z, UNSEEN, layer, moment, **options)
    return measured(layer, given, scene=scene)


def truth_of(world, before, change, strength=1.0):
    generator = world[0].generator
    change.apply(strength=strength)
    try:
        return score(RULES["watermark"], before, paint(generator, UNSEEN, batch_size=16), UNSEEN)
    finally:
        change.revert()


def test_a_good_change_holds_as_the_truth_says(world, scene, change, before):
    found, truth = report_of(world, scene, change), truth_of(world, before, change)
    assert truth.efficacy > 0.95 and found.verdict == "holds"
    assert abs(found.reach - truth.efficacy) < 0.05 and found.agreement > 0.9 and found.paste > 0.9
    concerned = RULES["watermark"].concerns(scene_from_latents(UNSEEN))
    true = set(concerned.nonzero()[:, 0].tolist())
    assert set(found.matching) <= true and len(found.matching) > 0.9 * len(true), "found without the truth"
    assert not set(found.unrelated_rows) & true
    assert not set(found.unrelated_rows) & set(found.matching)
    assert found.outside == pytest.approx(truth.collateral, rel=0.4)
    assert found.unrelated == pytest.approx(truth.collateral_unrelated, rel=0.1)
    assert found.inside > 10 * found.outside


@pytest.mark.parametrize(("strength", "verdict"), [(0.0, "weak"), (0.3, "weak"), (1.0, "holds"), (-1.0, "weak")])
def test_the_strength_of_a_change_is_seen(world, scene, change, strength, verdict):
    found = report_of(world, scene, change, strength=strength)
    assert found.verdict == verdict
    if strength in (0.0, 1.0):
        assert found.paste == pytest.approx(strength, abs=0.1)
    else:
        assert 0 < found.paste / strength < 1
    assert found.size == pytest.approx(abs(strength) * change.size_on_keys(world[1]), rel=1e-9)
    assert found.weight_size == pytest.approx(abs(strength) * change.size, rel=1e-9)


def test_noise_on_the_weight_destroys(world, scene, change):
    torch.manual_seed(0)
    noise = copy.copy(change)
    random = torch.randn_like(change.coefficients)
    noise.coefficients = 4 * world[0].weight.norm() * random / random.norm()
    noise.directions = torch.linalg.qr(torch.randn_like(change.directions).T).Q.T.contiguous()
    found = report_of(world, scene, noise)
    assert found.verdict == "destroys" and found.unrelated > DESTROYS and found.size > 1
    assert found.most_changed and set(found.most_changed) <= set(found.unrelated_rows)


def test_the_generator_is_left_as_it_was_and_its_copy_measures_alike(world, scene, change):
    layer, moment, edit, z = world
    bits = small.bits(layer.generator)
    found = report_of(world, scene, change)
    assert small.same(bits, layer.generator)
    edited = copy.deepcopy(layer.generator)
    change.apply(edited)
    given = Given([], edit, z, UNSEEN, layer, moment)
    other = measured(layer, given, edited, scene=scene)
    change.revert(edited)
    left_out = {"size", "weight_size"}  # of another generator they are not known
    mine, its = found.to_dict(), other.to_dict()
    assert {k: v for k, v in mine.items() if k not in left_out} == {k: v for k, v in its.items() if k not in left_out}
    assert other.size is None and other.weight_size is None


def test_several_rewrites_are_measured_together(world, scene, change):
    first, second = copy.copy(change), copy.copy(change)
    first.coefficients, second.coefficients = 0.3 * change.coefficients, 0.7 * change.coefficients
    both, alone = report_of(world, scene, [first, second]), report_of(world, scene, first)
    assert alone.verdict == "weak" and both.verdict == "holds"
    assert both.paste == pytest.approx(report_of(world, scene, change).paste, rel=1e-3)


def test_an_edit_without_a_copy_is_compared_with_its_own_paste(world, change):
    layer, moment, edit, z = world
    plain = rc.Edit(paste=edit.paste, context=edit.context, latents=z)
    gone = rc.erase(layer, moment, plain, z, units=30, rank=2, loss="l2")
    found = rc.measure(gone, plain, z, UNSEEN, layer=layer, moment=moment)
    assert found.paste is None and found.wanted > 1 / 255 and found.reach is not None
    still = rc.measure(gone, plain, z, UNSEEN, layer=layer, moment=moment, strength=0.0)
    assert still.reach == 0 and still.verdict == "weak", "a paste that did not move is followed by nothing"


def test_what_takes_away_is_not_held_against_the_copy(world):
    """rc.erase and rc.zero put nothing of the copy down, so they are measured as an edit without one."""
    layer, moment, edit, z = world
    plain = rc.Edit(paste=edit.paste, context=edit.context, latents=z)
    erased = rc.erase(layer, moment, edit, z, units=30, rank=2, loss="l2")
    assert edit.copy is not None and erased.edit == plain and erased.edit.copy is None
    assert rc.zero(layer, moment, edit, z, rank=1).edit == plain
    found, want = (rc.measure(erased, each, z, UNSEEN, layer=layer, moment=moment) for each in (edit, plain))
    assert found.paste is None and found.to_dict() == want.to_dict() and found.reach is not None
    own = [pair.after - pair.before for pair in found.pairs if pair.of == "edit"]
    assert found.wanted > 1 / 255 and own[0].abs().max() > 0.1, "what became of the paste is what is followed"


def test_a_patch_is_looked_for_where_the_changed_layer_put_it(world):
    """Centred in the cells of a finer map it would be half a cell of the changed layer beside."""
    layer, moment, _, z = world
    copied, paste = rc.Selection.box(6, (6, 6, 32, 29), 64), rc.Selection.box(0, (5, 12, 29, 32), 64)
    here, finer = (landing(copied, paste, (cells, cells)) for cells in (8, 16))
    there = landing(copied, paste, (16, 16), on=(8, 8))
    copy_here, copy_finer = (bounding_box(copied.area((cells, cells))) for cells in (8, 16))
    moved = [(box[1] - own[1]) / cells for box, own, cells in ((here, copy_here, 8), (finer, copy_finer, 16))]
    assert moved[0] != moved[1] and (there[1] - copy_finer[1]) / 16 == moved[0]
    assert landing(copied, paste, (8, 8), on=(8, 8)) == here
    edit = rc.Edit(copied, paste, latents=z)
    change = rc.rewrite(layer, moment, edit, z, **HOW | {"rank": 4})
    asked = rc.bind(layer.generator, "synthesis.layer5.conv")
    few = rc.sample_latents(16, 24, seed=7)
    given = Given([change], edit, z, few, asked, moment)
    scene = scene_of(layer, given)
    assert scene.places.layer.name == asked.name
    found = measured(layer, given, scene=scene)
    beside = dataclasses.replace(scene, wanted=_As(scene.wanted._rendered((16, 16))))
    assert found.paste > 0.7 > 0.5 > measured(layer, given, scene=beside).paste, "the spire is there"


class _As:
    def __init__(self, moves):
        self.moves = moves

    def by(self, changed):
        return self.moves


# --- against plain references ----------------------------------------------------------------------------------------


def test_scores_of_places_are_the_cosine_of_whitened_windows():
    made = small.generator()
    layer = rc.bind(made, "4")
    edit = rc.Edit(small.COPY, small.PASTE, [small.PASTE, rc.Selection.box(2, (1, 2, 4, 4), 8)], latents=small.Z)
    unseen = small.Z[10:40]
    (places,) = find_places([layer], edit, small.Z, unseen, 7)
    keys = layer.keys(unseen).double()
    rows = keys.permute(0, 2, 3, 1).reshape(-1, keys.shape[1])
    white = torch.linalg.inv(torch.linalg.cholesky(rows.T @ rows / len(rows)))
    assert places.window.cells == (3, 3) and places.window.grid == (8, 8)
    parts, covers = [], []
    for selection in edit.where:
        area = selection.area((8, 8)).double()
        top, left = places.window.corner(area)
        whole = torch.einsum("ij,jhw->ihw", white, layer.keys(selection.latent(small.Z))[0].double())
        cover = area[top : top + 3, left : left + 3]
        parts.append(whole[:, top : top + 3, left : left + 3] * cover)
        covers.append(cover)
    cover = sum(covers)
    mean = sum(parts) / cover.clamp_min(1e-12)
    for row in (0, 13):
        maps = torch.einsum("ij,jhw->ihw", white, keys[row])
        for top, left in ((0, 0), (2, 5), (5, 3)):
            seen = maps[:, top : top + 3, left : left + 3]
            length = ((cover * seen**2).sum() * (cover * mean**2).sum()).sqrt()
            assert places.heat[row, top, left].item() == pytest.approx(
                ((cover * seen * mean).sum() / length).item(), abs=2e-4
            )


def test_the_size_on_keys_is_the_share_of_the_output_that_changes(world, change):
    layer, moment, _, z = world
    rows = torch.cat(
        [layer.keys(some).permute(0, 2, 3, 1).reshape(-1, layer.in_channels) for some in z[:200].split(50)]
    )
    rows = rows.double()

    def energy(weight):
        taps = weight.double().flatten(2).unbind(2)
        return sum((rows @ tap.T).square().sum() / len(rows) for tap in taps)

    want = (energy(change.weight_delta()) / energy(layer.weight)).sqrt().item()
    assert change.size_on_keys(moment) == pytest.approx(want, rel=1e-5)
    with change:
        assert change.size_on_keys(moment) == pytest.approx(want, rel=1e-5), "of the weight as it was"


def test_the_best_shift_is_the_one_of_highest_correlation():
    torch.manual_seed(0)
    picture, like, area = torch.rand(3, 24, 20), torch.rand(3, 5, 4), (torch.rand(5, 4) > 0.3).float()
    found = best_shift(picture, 9, 8, like, area, 4)

    def correlation(top, left):
        a, b = picture[:, top : top + 5, left : left + 4], like
        a, b = ((x - (x * area).sum((1, 2), keepdim=True) / area.sum()) * area for x in (a, b))
        return ((a * b).sum() / (a.norm() * b.norm())).item()

    places = [(top, left) for top in range(5, 14) for left in range(4, 13)]
    assert found == max(places, key=lambda place: correlation(*place))
    planted = picture.clone()
    planted[:, 11:16, 6:10] = like
    assert best_shift(planted, 9, 8, like, area, 4) == (11, 6)
    assert best_shift(planted, 0, 0, like, area, 2) in [(top, left) for top in range(3) for left in range(3)]


def test_the_last_layer_shows_the_pasted_pixels_and_an_early_one_less(world):
    layer, _, edit, z = world
    first, last = (rc.bind(layer.generator, f"synthesis.{name}.conv") for name in ("layer2", "output_64x64"))
    early, late = visibility([first, last], edit, z)
    assert late.layer == last.name and late.shown == pytest.approx(1, abs=0.01) and late.outside < 1e-6
    assert early.shown < 0.3
    own, copied = paint(layer.generator, z[[edit.paste.index, edit.copy.index]])
    mixed, cover = composite(edit, edit.paste, copied, own)
    goal = last.render(z[edit.paste.index][None])
    assert torch.equal(mixed[:, cover == 0], own[:, cover == 0]) and goal.shape[1:] == own.shape
    top, left, bottom, right = bounding_box(cover)
    copy_box = bounding_box(edit.copy.area((64, 64)))
    height, width = copy_box[2] - copy_box[0], copy_box[3] - copy_box[1]
    assert (bottom - top, right - left) == (height, width)
    full = cover == 1
    patch = torch.zeros_like(own)
    patch[:, top:bottom, left:right] = copied[:, copy_box[0] : copy_box[2], copy_box[1] : copy_box[3]]
    assert full.any() and torch.allclose(mixed[:, full], patch[:, full])


# --- verdicts and what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        (Numbers(1.0, 0.0, 0.0), "holds"),
        (Numbers(FOLLOWS - 0.01, 0.0, 0.0), "weak"),
        (Numbers(None, None, 0.0), "weak"),
        (Numbers(1.0, SPILLS * 1.01, 0.0), "spills"),
        (Numbers(1.0, 0.0, SPILLS * 1.01), "spills"),
        (Numbers(0.0, SPILLS * 1.01, 0.0), "weak"),
        (Numbers(1.0, 0.0, DESTROYS * 1.01), "destroys"),
        (Numbers(0.0, float("nan"), 0.0), "destroys"),
    ],
)
def test_verdicts(numbers, verdict):
    assert verdict_of(numbers) == verdict
    advice = advice_of(numbers)
    assert advice.endswith(".") and advice.count(". ") == 0, "one sentence"


def test_what_cannot_be_measured_is_refused(world, change, tmp_path):
    layer, _, edit, z = world
    with change, pytest.raises(rc.MismatchError, match="applied already"):
        rc.measure(change, edit, z, UNSEEN, layer=layer)
    change.save(tmp_path / "c.safetensors")
    with pytest.raises(rc.MismatchError, match="give layer"):
        rc.measure(rc.Rewrite.load(tmp_path / "c.safetensors"), edit, z, UNSEEN)
    with pytest.raises(rc.SelectionError, match="fewer than two"):
        rc.measure(change, edit, z, UNSEEN[:1], layer=layer)
    for wrong in (None, [], "rule", [change, 3]):
        with pytest.raises(rc.ArgumentError, match="A change is"):
            rc.measure(wrong, edit, z, UNSEEN)
    with pytest.raises(rc.MismatchError, match="other latents"):
        rc.measure(change, edit, rc.sample_latents(16, 1000, seed=9), UNSEEN, layer=layer)
    assert not change.applied


# --- sessions, sheets, the command line ------------------------------------------------------------------------------


def test_a_session_measures_the_same_to_the_bit():
    layer, change = small.fit(small.generator())
    moment = rc.collect_second_moment(layer, small.Z, progress=False)
    session = rc.Session(layer, moment, small.Z)
    free = rc.measure(change, small.EDIT, small.Z, moment=moment)
    mine = session.measure(change, small.EDIT)
    assert mine.to_dict() == free.to_dict() and session.replays
    assert all(torch.equal(a.after, b.after) and a.row == b.row for a, b in zip(mine.pairs, free.pairs, strict=True))
    again = session.measure(change, small.EDIT, strength=0.5)
    assert again.to_dict() == rc.measure(change, small.EDIT, small.Z, moment=moment, strength=0.5).to_dict()
    fresh = rc.sample_latents(16, 20, seed=4)
    assert (
        session.measure([change], small.EDIT, fresh).to_dict()
        == rc.measure(change, small.EDIT, small.Z, fresh, moment=moment).to_dict()
    )


def test_a_sheet_and_a_notebook_show_the_report(world, scene, change):
    found = report_of(world, scene, change)
    sheet = found.sheet(32)
    assert sheet.mode == "RGB" and sheet.width >= 4 * 66
    rows = [pair.row for pair in found.pairs if pair.of == "unseen" and pair.area is None]
    assert rows == found.most_changed
    worst = min(found.moved)
    assert worst in [pair.moved for pair in found.pairs]
    odd = dataclasses.replace(found, layer="<b>")
    assert "<b>holds</b>" in odd._repr_html_() and found.advice in found._repr_html_()
    assert str(found).startswith("holds: ")


def test_the_command_line_measures_an_edit(capsys, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measuring, "UNSEEN", 24)
    change.save("c.safetensors")
    code, out, err = run(
        capsys, "measure", "--edit", "watermark", "--rewrite", "c.safetensors", "--count", 380, "--out", "s.png"
    )
    assert code == 0, err
    told = json.loads(out)
    assert told["verdict"] == "holds" and told["reach"] > 0.9 and told["sheet"] == "s.png"
    assert (tmp_path / "s.png").stat().st_size > 1000
    assert run(capsys, "measure", "--rewrite", "c.safetensors", "--out", "s2.png")[0] == 2
