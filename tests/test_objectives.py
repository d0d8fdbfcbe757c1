"""Goals beyond the layer: what follows is differentiable, and fits in pictures are what they should be."""

from __future__ import annotations

import pytest
import torch
from helpers import small
from torch import nn

import rewrite_core as rc
from rewrite_core.edits.goals import paste_goals
from rewrite_core.generators.stylegan2 import StyleGAN2
from rewrite_core.layers.replay import record
from rewrite_core.rewrites.following import goal_beyond, ordinary
from rewrite_core.solvers.objective import Objective
from rewrite_core.solvers.problem import LayerProblem, combine


class Strided(nn.Module):
    """A grouped, strided convolution, then a transposed one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.ConvTranspose2d(16, 8, 8)
        self.grouped = nn.Conv2d(8, 12, 4, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(12)
        self.last = nn.ConvTranspose2d(12, 3, 4, stride=2, padding=1)

    def forward(self, z):
        x = torch.tanh(self.first(z[..., None, None]))
        return torch.tanh(self.last(torch.nn.functional.leaky_relu(self.norm(self.grouped(x)), 0.2)))


def stylegan2():
    torch.manual_seed(0)
    return StyleGAN2(16, 16, 2, {4: 8, 8: 8, 16: 8}).eval()


CASES = {
    "plain": (small.generator, "4", 8),
    "grouped, strided": (lambda: Strided().eval(), "grouped", 8),
    "transposed": (lambda: Strided().eval(), "last", 8),
    "modulated": (stylegan2, "convs.1.conv", 16),
}


@pytest.fixture(params=CASES)
def case(request):
    """(layer of a float64 generator, edit of two pastes in two pictures, latents)"""
    make, name, size = CASES[request.param]
    z = small.Z.double()
    boxes = [rc.Selection.box(row, (2, 2, size // 2 + 1, size // 2 + 1), size) for row in (1, 2, 3)]
    edit = rc.Edit(rc.Selection.box(0, (1, 1, size // 2, size // 2), size), boxes[:2], boxes)
    return rc.bind(make().double(), name), edit, z


def quietly(layer, edit, z, **options):
    moment = rc.collect_second_moment(layer, z, batch_size=16, progress=False)
    return rc.rewrite(layer, moment, edit, z, **({"loss": "l2", "region": "map", "trust": None} | options))


# --- what follows


@pytest.mark.parametrize("name", CASES)
def test_what_follows_is_what_the_generator_renders(name):
    make, layer, _ = CASES[name]
    layer, z = rc.bind(make(), layer), small.Z[:3]
    kept, value = record(layer, z), layer.values(z)
    assert torch.equal(kept.follow(value), layer.render(z, value))
    assert torch.equal(kept.follow(value + 1), layer.render(z, value + 1))
    assert not kept.follow(value).requires_grad
    assert torch.equal(kept.replay(), kept.images)


def test_nothing_of_the_layer_runs_as_what_follows_is_made(monkeypatch):
    layer, z = rc.bind(small.generator(), "4"), small.Z[:3]
    kept, value = record(layer, z), layer.values(z)
    for number in (1, 4):
        monkeypatch.setattr(layer.generator[number], "forward", lambda *a: pytest.fail("it ran"))
    kept.follow(value)


def test_the_next_activation_is_what_the_next_layer_is_given():
    layer, z = rc.bind(small.generator(), "4"), small.Z[:3]
    kept, value = record(layer, z), layer.values(z)
    assert torch.equal(kept.follow(value, "activation"), value.relu())
    last = rc.bind(layer.generator, "6")
    with pytest.raises(rc.RewriteCoreError, match="objective='pictures'"):
        record(last, z).follow(last.values(z), "activation")
    with pytest.raises(rc.RewriteCoreError, match="is \\[3, 8, \\*map\\]"):
        kept.follow(value[:2])


# --- the objective


@pytest.mark.parametrize("preserve", [0.0, 0.5])
@pytest.mark.parametrize("objective", ["pictures", "activation", "value"])
def test_gradients_are_those_of_finite_differences(case, objective, preserve):
    layer, edit, z = case
    if objective == "activation" and layer.name == "last":
        return  # nothing follows it
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(layer.in_channels, 2, dtype=torch.float64))[0].T
    goals = paste_goals(layer, edit, z, "map")
    regions = tuple((goal.capture, goal.target) for goal in goals)
    problem = LayerProblem(layer, regions, directions, "l2")
    if objective != "value":
        kept = ordinary(layer, edit, z, directions, objective) if preserve else None
        beyond = goal_beyond(layer, edit, z, goals, objective)
        problem = LayerProblem(
            layer, regions, directions, "l2", preserve, beyond=beyond, ordinary=kept, value_weight=0.1
        )
    made = Objective(problem)
    place = 0.1 * torch.randn(problem.coefficient_shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda part: made(part)[0], place.requires_grad_(), fast_mode=True)
    if objective != "value":
        assert made(made.zero())[0].item() == pytest.approx(1.1)


def test_the_objective_is_what_a_plain_pass_says(case):
    """With the weight really changed, and the whole generator run."""
    layer, edit, z = case
    goals = paste_goals(layer, edit, z, "map")
    rows = [paste.index for paste in edit.pastes]
    with torch.no_grad():
        target = layer.render(z[rows], torch.cat([goal.target for goal in goals]))
        start = (layer.render(z[rows]) - target).square().mean()
    change = quietly(layer, edit, z, objective="pictures", solver=rc.LBFGS(4))
    with change, torch.no_grad():
        now = (layer.render(z[rows]) - target).square().mean()
    assert change.losses[0] == pytest.approx(start.item(), rel=1e-9)
    assert change.final_loss == pytest.approx(now.item(), rel=1e-6)


# --- the fit


@pytest.mark.parametrize("preserve", [0.0, 1.0])
@pytest.mark.parametrize("objective", ["pictures", "activation", "value"])
def test_a_fit_ends_below_where_it_began_and_the_same_twice(case, objective, preserve):
    layer, edit, z = case
    if objective == "activation" and layer.name == "last":
        return
    options = {"objective": objective, "preserve": preserve, "solver": rc.LBFGS(iterations=6)}
    first, second = (quietly(layer, edit, z, **options) for _ in range(2))
    assert first.final_loss < first.losses[0] and first.solver == "lbfgs"
    assert torch.equal(first.coefficients, second.coefficients) and first.losses == second.losses


def test_a_fit_in_pictures_is_the_least_squares_solution_where_all_is_linear():
    """Against torch.linalg.lstsq, the pictures being an affine function of Lambda."""
    torch.manual_seed(3)
    layers = (
        nn.Unflatten(1, (16, 1, 1)),
        nn.ConvTranspose2d(16, 6, 8),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.Conv2d(5, 3, 1),
    )
    layer, z = rc.bind(nn.Sequential(*layers).double().eval(), "2"), small.Z.double()
    goal = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    edit = rc.Edit(paste=small.PASTE, context=small.EDIT.where)
    options = {"objective": "pictures", "goal": goal, "preserve": 0.0, "rank": 2}
    change = quietly(layer, edit, z, **options, solver=rc.LBFGS(iterations=300, memory=60))
    directions = change.directions

    def pictures(flat):
        weight = layer.weight + combine(flat.reshape(change.coefficients.shape), directions)
        return torch.func.functional_call(layer.generator, {"2.weight": weight}, (z[[1]],)).flatten()

    zero = torch.zeros(change.coefficients.numel(), dtype=torch.float64)
    matrix = torch.func.jacrev(pictures)(zero)
    best = torch.linalg.lstsq(matrix, goal.flatten() - pictures(zero), driver="gelsd").solution
    least = (matrix @ best - goal.flatten() + pictures(zero)).square().mean().item()
    assert change.final_loss == pytest.approx(least, rel=1e-5)


def test_a_users_own_pictures_are_a_goal_without_a_copy():
    layer, z = rc.bind(small.generator(), "4"), small.Z
    with torch.no_grad():
        goal = layer.generator(z[[1]])
        goal[:, :, 4:7, 4:7] = 0.5
    edit = rc.Edit(paste=small.PASTE, context=small.EDIT.where, latents=z)
    change = small.solve(layer, edit, objective="pictures", goal=goal)
    with change, torch.no_grad():
        now = (layer.generator(z[[1]]) - goal).square().mean().item()
    assert change.final_loss == pytest.approx(now, rel=1e-4) and now < 0.7 * change.losses[0]


def test_ordinary_pictures_hold_nothing_of_the_context():
    layer, z = rc.bind(small.generator(), "4"), small.Z
    directions = small.solve(layer).directions
    kept = ordinary(layer, small.EDIT, z, directions, "pictures")
    assert torch.equal(kept.target, kept.follow(layer.value(kept.capture)).detach())
    strength = torch.einsum("ri,ni...->nr...", directions, kept.capture.key).norm(dim=1).flatten(1).amax(1)
    everywhere = torch.einsum("ri,ni...->nr...", directions, layer.keys(z)).norm(dim=1).flatten(1).amax(1)
    assert strength.median() < everywhere.median()


def test_preserve_leaves_ordinary_pictures_more_alone():
    layer, z = rc.bind(small.generator(), "4"), small.Z
    kept = ordinary(layer, small.EDIT, z, small.solve(layer).directions, "pictures")

    def changed(preserve):
        change = small.solve(layer, objective="pictures", preserve=preserve)
        weight = layer.weight + change.weight_delta()
        return kept.distance(layer, weight, "l2").item()

    assert changed(5.0) < 0.8 * changed(0.0)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"objective": "pixels"}, rc.RewriteCoreError, "objective must be"),
        ({"objective": "pictures", "solver": "lm"}, rc.SolverError, "solver='lbfgs'"),
        ({"objective": "activation", "solver": rc.Projected(steps=2)}, rc.SolverError, "values alone"),
        ({"goal": torch.zeros(1, 3, 8, 8)}, rc.RewriteCoreError, "objective='pictures'"),
        ({"objective": "pictures", "goal": torch.zeros(3, 8, 8)}, rc.RewriteCoreError, r"\[1, 3, 8, 8\]"),
        ({"objective": "pictures", "goal": torch.zeros(2, 3, 8, 8)}, rc.RewriteCoreError, "pictures \\[1\\]"),
        ({"objective": "pictures", "goal": torch.full((1, 3, 8, 8), torch.nan)}, rc.NonFiniteError, "finite"),
        ({"objective": "pictures", "goal": [[0.0]]}, rc.ArgumentError, "tensor of pictures"),
    ],
)
def test_what_cannot_be_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        small.solve(rc.bind(small.generator(), "4"), **options)


def test_several_edits_need_a_goal_each():
    layer, z = rc.bind(small.generator(), "4"), small.Z
    moment = rc.collect_second_moment(layer, z, batch_size=16, progress=False)
    with pytest.raises(rc.ArgumentError, match="one for each edit"):
        rc.rewrite_many(layer, moment, [small.EDIT], z, objective="pictures", goal=torch.zeros(1, 3, 8, 8))


def test_a_generator_that_makes_nan_is_told_of():
    generator = small.generator()
    layer = rc.bind(generator, "4")
    with torch.no_grad():
        generator[6].bias.fill_(float("nan"))
    with pytest.raises(rc.NonFiniteError, match="NaN or infinite"):
        small.solve(layer, objective="pictures")


# --- what is left open


def test_what_is_left_open_compares_pictures():
    layer, z = rc.bind(small.generator(), "4"), small.Z
    moment = rc.collect_second_moment(layer, z, batch_size=16, progress=False)
    whole = {"rank": None, "objective": None, "region": "map", "loss": "l2"}
    default = rc.rewrite(layer, moment, small.EDIT, z, **whole)
    named = {"rank": 4, "region": "map", "blend": "mask", "loss": "l2", "objective": "pictures", "preserve": 1.0}
    same = rc.rewrite(layer, moment, small.EDIT, z, **named, solver=rc.LBFGS(iterations=40))
    assert torch.equal(default.coefficients, same.coefficients) and default.solver == "lbfgs"
    values = rc.rewrite(layer, moment, small.EDIT, z, **whole, solver="lm")
    assert values.solver in ("lm", "closed_form") and values.rank == 4
    assert torch.equal(
        values.coefficients,
        rc.rewrite(layer, moment, small.EDIT, z, **whole | {"objective": "value", "preserve": 0.0}).coefficients,
    )


def test_a_rank_left_open_is_what_the_context_has():
    layer, z = rc.bind(small.generator(), "4"), small.Z
    moment = rc.collect_second_moment(layer, z, batch_size=16, progress=False)
    pixel = rc.Selection.box(2, (3, 3, 4, 4), 8)
    few = rc.Edit(small.COPY, small.PASTE, [pixel, rc.Selection.box(3, (3, 3, 4, 4), 8)])
    with pytest.raises(rc.RankError):
        rc.rewrite(layer, moment, few, z, rank=4)
    ranks = [change.rank for change in rc.rewrite_many(layer, moment, [few, small.EDIT], z, rank=None, region="map")]
    assert ranks == [2, 4]
    assert rc.rewrite(layer, moment, few, z, rank=None, region="map", directions="mean").rank == 1


def test_a_generator_without_gradients_is_told_of():
    class Served(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small.generator()

        @torch.no_grad()
        def forward(self, z):
            return self.body(z)

    layer = rc.bind(Served().eval(), "body.4")
    with pytest.raises(rc.RewriteCoreError, match="objective='value'"):
        small.solve(layer, objective="pictures")
    assert small.solve(layer, objective="value").final_loss < 1


def test_a_generator_of_more_than_images_is_told_of():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small.generator()

        def forward(self, z):
            return self.body(z), z

    layer = rc.bind(Pair().eval(), "body.4")
    with pytest.raises(rc.RewriteCoreError, match="objective='value'"):
        small.solve(layer, objective="pictures")
