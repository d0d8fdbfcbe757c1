"""Edits with several pastes: one change for all of them."""

import dataclasses
import json

import pytest
import torch
from helpers import reference

import rewrite_core as rc
from rewrite_core.edits.goals import erase_goals, paste_goals
from rewrite_core.generators.stylegan2 import StyleGAN2
from rewrite_core.solvers.choice import SOLVERS
from rewrite_core.solvers.lm import fit_inputs, solve_lm
from rewrite_core.solvers.problem import LayerProblem, combine, generic_second_moment

FEW = {name: SOLVERS[name](steps=60) for name in ("adam", "projected", "unconstrained")}


def box(size, top, left, height=None, width=None):
    mask = torch.zeros(size, size)
    mask[top : top + (height or size // 4), left : left + (width or size // 4)] = 1
    return mask


@pytest.fixture
def several(edit):
    """The golden edit, pasted into three pictures by masks of different resolutions."""
    size = edit.paste.mask.shape[0]
    pastes = [edit.paste, rc.Selection(23, box(64, 20, 20)), rc.Selection(31, box(2 * size, size, size // 2))]
    return rc.Edit(copy=edit.copy, paste=pastes, context=edit.context)


@pytest.fixture(params=[False, True], ids=["same", "up"])
def styled(request):
    """A StyleGAN2 layer in float64, its moment and latents: every picture has a style of its own."""
    torch.manual_seed(0)
    generator = StyleGAN2(16, style_dim=16, n_mlp=2, channels={4: 24, 8: 24, 16: 24}).double().eval()
    layer = rc.bind(generator, "convs.2.conv" if request.param else "convs.1.conv")
    latents = rc.sample_latents(16, 40, seed=3).double()
    return layer, rc.collect_second_moment(layer, latents, progress=False), latents


def styled_edit(*pictures):
    pastes = [rc.Selection(picture, box(16, 4, 4, 8, 8)) for picture in pictures]
    context = [rc.Selection(number, box(16, 4, 4, 8, 8)) for number in (20, 21, 22)]
    return rc.Edit(copy=rc.Selection(7, box(16, 2, 2, 10, 10)), paste=pastes, context=context)


def problem_of(layer, edit, latents, change, loss="l1", **options):
    goals = paste_goals(layer, edit, latents, **options)
    regions = [(goal.capture, goal.target) for goal in goals]
    rows = change.directions.to(goals[0].target)
    return LayerProblem(layer, tuple(regions), rows, loss)


def each_loss(problem, weight):
    """The l1 of each region, by itself."""
    return [
        dataclasses.replace(problem, regions=(region,), loss="l1").distance(weight).item() for region in problem.regions
    ]


# --- edits and their files -------------------------------------------------------------------------------


def test_one_paste_is_a_selection_and_several_are_a_tuple(edit):
    other = rc.Selection(5, box(16, 2, 2))
    one, two = rc.Edit(edit.copy, [edit.paste], edit.context), rc.Edit(edit.copy, [edit.paste, other])
    assert one.paste == edit.paste and one.pastes == (edit.paste,) and one == edit
    assert two.paste == two.pastes == (edit.paste, other) and two != one
    assert two.where == [edit.paste, other] and two.selections == [edit.copy, edit.paste, other]
    for none in ([], ()):
        with pytest.raises(rc.SelectionError, match="empty list"):
            rc.Edit(edit.copy, none)
    with pytest.raises(rc.SelectionError, match="not int"):
        rc.Edit(edit.copy, [edit.paste, 3])


def test_json(edit, several, tmp_path):
    text = rc.Edit(edit.copy, edit.paste, edit.context).to_json()
    assert rc.Edit(edit.copy, [edit.paste], edit.context).to_json() == text  # one paste: the reference's own form
    record = json.loads(several.to_json())
    assert list(record) == ["object", "paste", "key"] and len(record["paste"]) == 3
    assert record["paste"][0] == json.loads(text)["paste"] and record["object"] == json.loads(text)["object"]
    several.save(tmp_path / "several.json")
    assert rc.Edit.load(tmp_path / "several.json") == several
    record["paste"] = record["paste"][:1]
    assert rc.Edit.from_json(json.dumps(record)) == rc.Edit(edit.copy, edit.paste, edit.context)
    for wrong in ([], [[]], [[1]], [record["paste"][0], 3], [[3, "no url"]]):
        with pytest.raises(rc.FileFormatError, match="paste"):
            rc.Edit.from_json(json.dumps(record | {"paste": wrong}))


def test_a_rewrite_keeps_them(moment, layer, several, latents, tmp_path):
    change = reference.rewrite(layer, moment, several, latents)
    assert change.edit == several and len(change.box) == 3
    change.save(tmp_path / "change.safetensors")
    assert rc.Rewrite.load(tmp_path / "change.safetensors").edit == several


# --- the fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "l2"},
        {"region": "map"},
        {"blend": "box"},
        {"solver": FEW["adam"]},
        {"solver": FEW["projected"]},
        {"solver": FEW["unconstrained"]},
        {"solver": FEW["projected"], "backend": "reference"},
        {"preserve": 0.3},
    ],
)
def test_identical_pastes_are_one(moment, layer, edit, latents, options):
    latents = torch.cat([latents, latents[edit.paste.index, None]])  # one picture twice
    twin = rc.Selection(len(latents) - 1, edit.paste.mask)
    twice = rc.Edit(edit.copy, [edit.paste, twin], edit.context)
    one, two = reference.rewrite_many(layer, moment, [edit, twice], latents, **options)
    assert two.solver == one.solver and two.status == one.status
    torch.testing.assert_close(torch.tensor(two.losses), torch.tensor(one.losses), rtol=2e-3, atol=1e-5)
    assert two.final_loss == pytest.approx(one.final_loss, rel=2e-3)
    delta, wanted = two.weight_delta(), one.weight_delta()
    assert (delta - wanted).norm() < 0.02 * wanted.norm()
    # the same place of the same picture counts once, to the bit
    again = rc.Edit(edit.copy, [edit.paste, edit.paste], edit.context)
    with pytest.warns(UserWarning, match="same place of the map, and count once"):
        assert torch.equal(reference.rewrite(layer, moment, again, latents, **options).coefficients, one.coefficients)


@pytest.mark.parametrize("solver", [{}, {"solver": rc.Adam(steps=200)}, {"solver": rc.Projected(steps=400)}])
@pytest.mark.parametrize(
    "goal",
    [
        {},
        {"region": "map", "loss": "l2"},
        {"blend": "box"},
        {"region": "map", "blend": "box", "loss": "l2"},
        {"rank": 3},
    ],
)
def test_every_paste_comes_closer(moment, layer, several, latents, goal, solver):
    change = reference.rewrite(layer, moment, several, latents, **goal, **solver)
    options = {name: value for name, value in goal.items() if name != "rank"}
    problem = problem_of(layer, several, latents, change, **{"loss": "l1", **options})
    assert len(problem.regions) == 3
    before, after = each_loss(problem, layer.weight), each_loss(problem, layer.weight + change.weight_delta())
    if change.solver != "projected":  # whose steps of 0.05 are too long for this generator
        assert change.final_loss < change.losses[0]
        if goal.get("region") != "map":  # of a whole map most is as it should be
            assert all(now < then for now, then in zip(after, before))
    assert change.losses[0] == pytest.approx(problem.distance(layer.weight).item(), rel=1e-5)
    assert change.final_loss == pytest.approx(problem.distance(layer.weight + change.weight_delta()).item(), rel=1e-4)


def test_demodulated_pastes_have_styles_of_their_own(styled):
    layer, moment, latents = styled
    edit = styled_edit(1, 2, 3)
    change = reference.rewrite(layer, moment, edit, latents)
    problem = problem_of(layer, edit, latents, change)
    assert fit_inputs(problem)["demodulation"][0].shape == (3, layer.out_channels)
    before, after = each_loss(problem, layer.weight), each_loss(problem, layer.weight + change.weight_delta())
    assert change.solver == "lm" and all(now < 0.9 * then for now, then in zip(after, before))
    # what the fit says is what the layer does, pixel by pixel its own demodulation
    assert change.losses == pytest.approx([sum(before) / 3, sum(after) / 3], rel=1e-9)
    (adam,) = rc.Adam().solve([problem])
    assert change.final_loss <= 1.01 * adam.final_loss
    # one picture's goal alone is met better alone, and the others worse
    alone = reference.rewrite(layer, moment, styled_edit(1), latents)
    losses = each_loss(problem, layer.weight + combine(alone.coefficients, change.directions))
    assert losses[0] < after[0] and sum(losses) > sum(after)


def test_the_optimum_is_stationary_for_autograd(styled):
    layer, moment, latents = styled
    edit = styled_edit(1, 2, 3)
    change = reference.rewrite(layer, moment, edit, latents, loss="l2")
    problem = problem_of(layer, edit, latents, change, "l2")
    gradients = []
    for start in (change.coefficients, torch.zeros_like(change.coefficients)):
        coefficients = start.clone().requires_grad_()
        problem.distance(layer.weight + combine(coefficients, problem.directions)).backward()
        gradients.append(coefficients.grad.norm().item())
    assert gradients[0] < 1e-2 * gradients[1]


def test_stepwise_solvers_say_how_they_ran(styled, moment, layer, several, latents):
    assert reference.rewrite(layer, moment, several, latents, solver=rc.Projected(steps=5)).status.keys() == {"fused"}
    layer, moment, latents = styled
    for solver in ("projected", "unconstrained"):
        change = reference.rewrite(layer, moment, styled_edit(1, 2), latents, solver=FEW[solver])
        assert change.status == {"autograd": layer.out_channels} and change.final_loss < change.losses[0]
    layer.generator.float()
    moment = rc.collect_second_moment(layer, latents.float(), progress=False)
    change = reference.rewrite(layer, moment, styled_edit(1), latents.float(), solver=FEW["projected"])
    problem = problem_of(layer, styled_edit(1, 2), latents.float(), change)
    with pytest.raises(rc.SolverError, match="different styles"):
        rc.Projected(steps=5).solve([problem], backend="cpp")
    # two pastes on one picture have one style, and fuse
    first, second = rc.Selection(1, box(16, 2, 2, 4, 4)), rc.Selection(1, box(16, 10, 10, 4, 4))
    edit = rc.Edit(rc.Selection(7, box(16, 4, 4, 4, 4)), [first, second], [rc.Selection(20, box(16, 4, 4, 8, 8))])
    fused, slow = (
        reference.rewrite(layer, moment, edit, latents.float(), solver=FEW["projected"], backend=backend)
        for backend in ("cpp", "reference")
    )
    assert fused.status.keys() == {"fused"} and slow.status.keys() == {"autograd"}
    torch.testing.assert_close(torch.tensor(fused.losses), torch.tensor(slow.losses), rtol=0.02, atol=0)


def test_many_edits_of_mixed_counts(styled):
    layer, moment, latents = styled
    edits = [styled_edit(1), styled_edit(1, 2, 3), styled_edit(4), styled_edit(5, 6)]
    together = reference.rewrite_many(layer, moment, edits, latents)
    for change, edit in zip(together, edits):
        alone = reference.rewrite(layer, moment, edit, latents)
        assert change.edit == edit and change.final_loss == pytest.approx(alone.final_loss, rel=1e-3)
        assert change.losses[0] == pytest.approx(alone.losses[0], rel=1e-9)
    plain = reference.rewrite_many(layer, moment, edits, latents, backend="reference")
    for change, other in zip(together, plain):
        assert change.final_loss == pytest.approx(other.final_loss, rel=5e-3)


def test_preserve_holds_several_back(styled):
    layer, moment, latents = styled
    edit = styled_edit(1, 2, 3)
    free, held = (reference.rewrite(layer, moment, edit, latents, preserve=weight) for weight in (0.0, 3.0))
    assert held.weight_delta().norm() < free.weight_delta().norm()
    problem = problem_of(layer, edit, latents, free)
    generic = generic_second_moment(layer, problem.directions, latents[:32], moment.matrix())
    problem = dataclasses.replace(problem, preserve=3.0, generic=generic)

    def objective(coefficients):
        parts = fit_inputs(problem)
        flat = coefficients.flatten(1)
        return (
            problem.distance(layer.weight + combine(coefficients, problem.directions))
            + (parts["penalty_scale"] * ((flat @ parts["penalty"]) * flat).sum(1)).mean()
        ).item()

    assert objective(held.coefficients) < objective(free.coefficients)
    (adam,) = rc.Adam(steps=1000).solve([problem])
    assert objective(held.coefficients) <= 1.01 * objective(adam.coefficients)
    torch.testing.assert_close(solve_lm([problem])[0].coefficients, held.coefficients)


# --- goals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", ["box", "map"])
def test_pastes_of_one_picture(moment, layer, edit, latents, region):
    size = 16
    copy = rc.Selection(7, box(size, 4, 4, 3, 3))
    pastes = [rc.Selection(11, box(size, 1, 1, 3, 3)), rc.Selection(11, box(size, 9, 10, 3, 3))]
    goals = paste_goals(layer, rc.Edit(copy, pastes, edit.context), latents, region)
    patch = layer.values(latents[7, None])[..., 4:7, 4:7]
    whole = layer.values(latents[11, None]).clone()
    whole[..., 1:4, 1:4] = whole[..., 9:12, 10:13] = patch
    if region == "box":
        assert [goal.box for goal in goals] == [(1, 1, 4, 4), (9, 10, 12, 13)]
        for goal in goals:
            torch.testing.assert_close(goal.target, patch)
    else:
        assert len(goals) == 1 and goals[0].box is None
        torch.testing.assert_close(goals[0].target, whole)


def test_a_crop_that_reaches_into_another_paste_shows_it(styled):
    layer, _, latents = styled
    if not layer._adapter.module.upsample:
        pytest.skip("a crop of this layer is the pasted box")
    copy = rc.Selection(7, box(16, 4, 4, 3, 3))
    pastes = [rc.Selection(1, box(16, 4, 4, 3, 3)), rc.Selection(1, box(16, 4, 7, 3, 3))]
    goals = paste_goals(layer, rc.Edit(copy, pastes), latents)
    (whole,) = paste_goals(layer, rc.Edit(copy, pastes), latents, region="map")
    assert goals[0].box[3] > goals[1].box[1]  # key pixels are two value pixels wide
    for goal in goals:
        top, left, bottom, right = goal.box
        torch.testing.assert_close(goal.target, whole.target[..., top:bottom, left:right])


def test_overlapping_pastes_are_refused(moment, layer, edit, latents):
    copy, first = rc.Selection(7, box(16, 4, 4, 4, 4)), rc.Selection(11, box(16, 2, 2, 4, 4))
    over, beside = rc.Selection(11, box(16, 4, 4, 4, 4)), rc.Selection(11, box(16, 2, 6, 4, 4))
    for options in ({}, {"region": "map"}, {"blend": "box"}):
        with pytest.raises(rc.SelectionError, match="picture 11 overlap") as caught:
            reference.rewrite(layer, moment, rc.Edit(copy, [first, over], edit.context), latents, **options)
        assert "\n" not in str(caught.value)
    reference.rewrite(layer, moment, rc.Edit(copy, [first, beside], edit.context), latents)
    # through a mask only what it covers overlaps
    corners = box(16, 4, 4, 1, 4) + box(16, 5, 4, 3, 1)
    shaped = rc.Edit(rc.Selection(7, corners), [first, rc.Selection(11, box(16, 3, 3, 4, 4))], edit.context)
    reference.rewrite(layer, moment, shaped, latents)
    with pytest.raises(rc.SelectionError, match="overlap"):
        reference.rewrite(layer, moment, shaped, latents, blend="box")


@pytest.mark.parametrize("region", ["box", "map"])
def test_erasures_of_several(golden_moment, layer, several, latents, region):
    goals = erase_goals(layer, golden_moment, several, latents, 8, region)
    assert len(goals) == 3 and all((goal.box is not None) == (region == "box") for goal in goals)
    change = rc.erase(layer, golden_moment, several, latents, units=8, region=region)
    rows = change.directions.to(goals[0].target)
    regions = tuple((goal.capture, goal.target) for goal in goals)
    problem, weight = LayerProblem(layer, regions, rows), layer.weight + change.weight_delta()
    assert sum(each_loss(problem, weight)) < sum(each_loss(problem, layer.weight))
    assert change.final_loss == pytest.approx(problem.distance(weight).item(), rel=1e-4)
