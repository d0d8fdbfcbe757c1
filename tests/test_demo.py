import json

import pytest
import torch
from PIL import Image

import rewrite_core as rc
from rewrite_core.demo import LATENT_SIZE, RULES, chapels, load_edit
from rewrite_core.demo.generator import ProgGANChapels, StyleGAN2Chapels
from rewrite_core.demo.rules import INVERSES, score
from rewrite_core.demo.run import EDIT_LATENTS, EDIT_SEED, run_demo, table
from rewrite_core.demo.training import evaluate, train
from rewrite_core.demo.world import FACTORS, factor_region, region, render, scene_from_latents
from rewrite_core.pictures import paint


@pytest.fixture(scope="module")
def scene():
    return scene_from_latents(rc.sample_latents(LATENT_SIZE, 120, seed=9))


def test_the_scene_is_a_function_of_the_latent(scene):
    again = scene_from_latents(rc.sample_latents(LATENT_SIZE, 120, seed=9))
    assert torch.equal(render(scene), render(again))
    pictures = render(scene)
    assert pictures.shape == (120, 3, 64, 64) and pictures.min() >= 0 and pictures.max() <= 1
    assert torch.allclose(pictures[7], render(scene[7:8])[0], atol=1e-6)


def test_every_state_of_every_factor_occurs(scene):
    assert {0, 1, 2} == set(scene.roof.tolist())
    for flag in (scene.lit, scene.watermark, scene.tree):
        assert 0.2 < flag.float().mean() < 0.8
    assert torch.equal(scene.glow, scene.lit)


def test_counterfactuals_are_local_and_visible(scene):
    for factor, states in FACTORS.items():
        share = factor_region(scene, factor).float().mean((1, 2))
        assert share.min() > 0.01 and share.max() < 0.15
        for state in states:
            changed = render(scene.replace(**{factor: state}))
            same = (getattr(scene, factor) == state).nonzero()[:, 0]
            assert torch.equal(changed[same], render(scene)[same])
    mask = region(render(scene), render(scene.replace(glow=~scene.glow)))
    assert not mask[:, :50].any(), "light falls on the ground only"


def test_replace_refuses_unknown_factors(scene):
    with pytest.raises(ValueError, match="no factor 'colour'"):
        scene.replace(colour=1)
    with pytest.raises(ValueError, match="16"):
        scene_from_latents(torch.zeros(3, 15))


def test_the_shipped_generator_paints_what_it_should():
    report = evaluate(chapels(), rc.sample_latents(LATENT_SIZE, 500, seed=2))
    for factor in FACTORS:
        assert report[factor]["nearest_is_true"] >= 0.97, report
        assert report[factor]["error"] <= 0.06, report


def test_quality_is_bad_for_a_bad_generator():
    torch.manual_seed(0)
    report = evaluate(ProgGANChapels().eval(), rc.sample_latents(LATENT_SIZE, 50, seed=2))
    assert min(report[factor]["nearest_is_true"] for factor in FACTORS) < 0.7
    assert min(report[factor]["error"] for factor in FACTORS) > 0.06


@pytest.mark.parametrize("architecture", [ProgGANChapels, StyleGAN2Chapels])
def test_training_learns_and_is_seeded(architecture):
    def run():
        torch.manual_seed(3)
        generator = architecture()
        return train(generator, steps=10, batch_size=4, progress=False)

    first, second = run(), run()
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(first.parameters(), second.parameters()))
    torch.manual_seed(3)
    untrained = architecture()
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), untrained.parameters()))


def test_scores_of_perfect_and_idle_changes():
    latents = rc.sample_latents(LATENT_SIZE, 60, seed=4)
    scene = scene_from_latents(latents)
    before = render(scene)
    for rule in (*RULES.values(), *INVERSES.values()):
        mine = rule.concerns(scene)
        perfect = before.clone()
        perfect[mine] = render(scene[mine].replace(**rule.change))
        best = score(rule, before, perfect, latents)
        assert best.efficacy == 1 and best.completed == pytest.approx(1) and best.efficacy_before == 0
        assert best.collateral < 1e-3 and best.collateral_unrelated == 0
        idle = score(rule, before, before, latents)
        assert idle.efficacy == 0 and idle.collateral == 0
        assert best.scenes + best.scenes_unrelated == 60


@pytest.mark.parametrize("name", [*RULES, *INVERSES])
def test_edits_are_a_users_edits(name):
    edit = load_edit(name)
    scene = scene_from_latents(rc.sample_latents(LATENT_SIZE, EDIT_LATENTS, seed=EDIT_SEED))
    rule = (RULES | INVERSES)[name]
    assert 3 <= len(edit.context) <= 5 and edit.copy and edit.paste
    assert rule.concerns(scene)[[s.index for s in edit.context]].all()
    assert rule.concerns(scene)[edit.paste.index] and not rule.concerns(scene)[edit.copy.index]
    with pytest.raises(ValueError, match="choose from"):
        load_edit("moustache")


def test_the_demo_changes_three_rules(tmp_path):
    report = run_demo(tmp_path / "out", progress=False)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert set(report["edits"]) == {"spire", "watermark", "reflection"}
    for name, row in report["edits"].items():
        assert row["efficacy"] >= 0.8 and row["collateral"] <= 0.02 and row["collateral_unrelated"] <= 0.02, (name, row)
        assert row["efficacy_before"] < 0.05
        assert {"collect", "rewrite", "render", "fit"} <= set(row["seconds"])
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.size[0] > 1000 and picture.size[1] > 800
    assert {"torch", "device", "threads"} <= set(report["environment"])
    assert report["edits"]["spire"]["completed"] > 0.4 and report["edits"]["watermark"]["completed"] > 0.9
    head, _, spire, *_ = table(report).splitlines()
    assert "completed" in head and spire.startswith("spire")


@pytest.mark.parametrize("name", ["spire.png", "reflection.png", "report.json"])
def test_the_demo_finds_out_before_the_work_that_it_cannot_write(tmp_path, name, monkeypatch):
    monkeypatch.setattr("rewrite_core.demo.run.chapels", None)  # the work would fail
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=name):
        run_demo(tmp_path, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="name a folder"):
        run_demo(tmp_path / "file", progress=False)


def test_the_rules_hold_in_a_stack():
    """All three edits at once: each still works."""
    generator = chapels()
    latents, unseen = (
        rc.sample_latents(LATENT_SIZE, EDIT_LATENTS, seed=EDIT_SEED),
        rc.sample_latents(LATENT_SIZE, 120, seed=6),
    )
    before = paint(generator, unseen)
    changes = {}
    from rewrite_core.demo.run import CHOSEN, OPTIONS

    for name, (path, rank) in CHOSEN.items():
        layer = rc.bind(generator, path)
        moment = rc.collect_second_moment(layer, latents, batch_size=50, progress=False)
        changes[name] = rc.rewrite(layer, moment, load_edit(name), latents, rank=rank, **OPTIONS)
    for change in changes.values():
        change.apply()
    after = paint(generator, unseen)
    for name in changes:
        assert score(RULES[name], before, after, unseen).efficacy > 0.7
    for change in changes.values():
        change.revert()
    assert torch.equal(paint(generator, unseen), before)
