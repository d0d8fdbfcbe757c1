"""Depthwise and grouped layers: groups are solved together, with what each by itself gives."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import reference
from torch import nn

import rewrite_core as rc
from rewrite_core.edits.goals import paste_goals
from rewrite_core.solvers.lm import all_fit_inputs, fit_inputs
from rewrite_core.solvers.problem import LayerProblem, basis_maps, generic_second_moment, inputs_of

Z = rc.sample_latents(16, 40)
LAYERS = {
    "depthwise": lambda: nn.Conv2d(24, 24, 3, padding=1, groups=24),
    "depthwise, two outputs each": lambda: nn.Conv2d(24, 48, 3, padding=1, groups=24),
    "few groups": lambda: nn.Conv2d(24, 36, 3, padding=1, groups=3),
    "1x1": lambda: nn.Conv2d(24, 24, 1, groups=8),
    "strided": lambda: nn.Conv2d(24, 24, 3, stride=2, padding=1, groups=12),
    "transposed": lambda: nn.ConvTranspose2d(24, 24, 4, stride=2, padding=1, groups=12),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Unflatten(1, (16, 1, 1)), nn.ConvTranspose2d(16, 24, 8), nn.ReLU(), LAYERS[request.param](), nn.ReLU()
    )
    return rc.bind(generator.double().eval(), "3")


def edit(rows=((0, 1), (1, 4))):
    (a, first), (b, second) = rows
    return rc.Edit(
        copy=rc.Selection.box(a, (first, first, first + 3, first + 3), (8, 8)),
        paste=rc.Selection.box(b, (second, second, second + 3, second + 3), (8, 8)),
    )


def eye(layer):
    """The blocks of a moment that is the identity."""
    size = layer.in_channels // layer.groups
    return torch.eye(size, dtype=torch.float64).repeat(layer.groups, 1, 1)


def problem_of(layer, preserve=0.0, rank=2):
    goals = paste_goals(layer, edit(), Z, "map")
    directions = torch.randn(rank, layer.in_channels, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    generic = None
    if preserve:
        generic = generic_second_moment(layer, directions, Z[:20], eye(layer))
    regions = tuple((goal.capture, goal.target) for goal in goals)
    return LayerProblem(layer, regions, directions, "l2", preserve, generic)


@pytest.mark.parametrize("preserve", [0.0, 0.3])
def test_groups_together_are_groups_alone(layer, preserve):
    problem = problem_of(layer, preserve)
    together = all_fit_inputs(problem)
    for group in range(layer.groups):
        wanted = fit_inputs(problem, group)
        assert together.keys() == wanted.keys()
        for name, value in wanted.items():
            if isinstance(value, torch.Tensor):
                found = together[name]
                assert len(found) == layer.groups and found[group].shape == value.shape
                assert torch.allclose(found[group], value, rtol=1e-12, atol=1e-12), name
            else:
                assert together[name] == value


def test_what_preserve_penalises_is_that_of_each_group(layer):
    directions = torch.randn(2, layer.in_channels, dtype=torch.float64)
    found = generic_second_moment(layer, directions, Z[:20], eye(layer))
    if math.prod(layer.kernel_size) == 1:
        pytest.skip("a 1x1 layer has it exactly, from C")
    for group in range(layer.groups):
        own = inputs_of(layer, group)
        maps = basis_maps(layer, layer.keys(Z[:20])[:, own], directions[:, own]).flatten(2)
        wanted = torch.einsum("njp,nkp->jk", maps, maps) / (maps.shape[0] * maps.shape[2])
        assert torch.allclose(found[group], wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_a_grouped_edit_meets_its_goal(layer, loss):
    moment = rc.collect_second_moment(layer, Z, progress=False)
    change = reference.rewrite(layer, moment, edit(), Z, loss=loss, region="map", rank=1)
    goal = paste_goals(layer, edit(), Z, "map")[0].target
    with change:
        difference = layer.values(Z[1:2]).double() - goal
    found = difference.abs().mean() if loss == "l1" else difference.square().mean()
    assert found.item() == pytest.approx(change.final_loss, rel=1e-5) and change.final_loss <= change.losses[0]


def test_a_moment_within_groups_is_zero_between_them():
    keys = torch.randn(500, 12, dtype=torch.float64)
    moment = rc.SecondMoment(12)
    moment.update(keys)
    found, whole = moment.within_groups(4).matrix(), moment.matrix()
    for i in range(12):
        for j in range(12):
            assert found[i, j] == (whole[i, j] if i // 3 == j // 3 else 0)
