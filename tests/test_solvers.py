"""What the solvers refuse, warn of and estimate; their results are tested in test_rewriting and test_fit_low_rank."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import rewrite_core as rc
from rewrite_core.solvers.choice import solver_of
from rewrite_core.solvers.lm import solve_lm
from rewrite_core.solvers.problem import LayerProblem, basis_maps, generic_second_moment, warn_underdetermined


def bound(convolution: nn.Module) -> rc.BoundLayer:
    torch.manual_seed(0)
    first = nn.Unflatten(1, (4, 3, 3)), nn.Conv2d(4, 6, 3, padding=1)
    return rc.bind(nn.Sequential(*first, convolution).double(), "2")


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(6, 5, 1),
        nn.Conv2d(6, 5, 1, padding=2),
        nn.Conv2d(6, 5, 1, stride=2),
        nn.ConvTranspose2d(6, 5, 1, stride=2),
    ],
    ids=["plain", "padded", "strided", "transposed"],
)
def test_generic_second_moment_of_1x1_layers(convolution):
    layer = bound(convolution)
    latents = torch.randn(20, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moment = rc.collect_second_moment(layer, latents, batch_size=5, progress=False)
    directions = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q.T
    with torch.no_grad():
        maps = basis_maps(layer, layer.keys(latents), directions).transpose(0, 1).flatten(1)
    wanted = maps @ maps.T / maps.shape[1]
    torch.testing.assert_close(generic_second_moment(layer, directions, latents, moment.matrix()), wanted)


def problem(pixels: int, preserve: float = 0.0) -> LayerProblem:
    layer = bound(nn.Conv2d(6, 5, 3, padding=1))
    with torch.no_grad():
        capture = layer.capture(torch.randn(1, 36, dtype=torch.float64))
        capture = layer.crop(capture, (0, 0, 1, pixels), (0, 0, 1, pixels))
        value = layer.value(capture, layer.weight)
    directions = torch.eye(6, dtype=torch.float64)[:1]
    generic = torch.eye(9, dtype=torch.float64) if preserve else None
    return LayerProblem(layer, ((capture, value + 1),), directions, preserve=preserve, generic=generic)


def test_more_unknowns_than_pixels_warn():
    with pytest.warns(rc.UnderdeterminedWarning, match="9 unknowns for 3 pixels.*region='map'") as caught:
        warn_underdetermined(problem(3))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_underdetermined(problem(3, preserve=0.3))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: rc.Adam(steps=2.5), rc.ArgumentError, "steps must be an integer"),
        (lambda: rc.Adam(steps="5"), rc.ArgumentError, "steps must be an integer"),
        (lambda: rc.Projected(steps=0), rc.RewriteCoreError, "at least 1"),
        (lambda: rc.Adam(steps=True), rc.ArgumentError, "steps must be an integer"),
        (lambda: rc.Unconstrained(lr="x"), rc.ArgumentError, "lr must be a number above 0"),
        (lambda: rc.Unconstrained(lr=0), rc.RewriteCoreError, "above 0"),
        (lambda: rc.Projected(lr=float("nan")), rc.RewriteCoreError, "lr must be a number"),
        (lambda: rc.Projected(project_every=0), rc.RewriteCoreError, "project_every must be an integer"),
        (lambda: rc.Projected(project_gradient=1), rc.ArgumentError, "project_gradient must be True or False"),
        (lambda: rc.LM(steps=5), TypeError, "steps"),
        (lambda: rc.Adam(project_every=5), TypeError, "project_every"),
        (lambda: solver_of("newton"), rc.SolverError, "choose from"),
        (lambda: solver_of(rc.LM), rc.ArgumentError, "not LM"),
        (lambda: solver_of(None), rc.ArgumentError, "rc.Projected"),
    ],
)
def test_options_are_checked_as_a_solver_is_made(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_name_is_a_solver_with_its_defaults():
    for name, solver in (("lm", rc.LM()), ("projected", rc.Projected()), ("adam", rc.Adam(2001, 0.05))):
        assert solver_of(name) == solver and solver_of(solver) is solver and solver.name == name
    assert solver_of("unconstrained") == rc.Unconstrained(steps=np.int64(2001), lr=np.float64(0.05))


def test_infinite_loss_is_reported():
    wrong = problem(3, preserve=0.3)
    wrong.regions[0][1].fill_(float("inf"))
    with pytest.raises(rc.NonFiniteError, match="NaN or infinite"):
        rc.Adam(steps=2).solve([wrong])


class Coupled:
    """A layer of a family that does not say what follows the convolution."""

    def __init__(self, layer):
        self.layer = layer

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def post_operation(self, capture):
        return None


@pytest.mark.filterwarnings("ignore::rewrite_core.UnderdeterminedWarning")
def test_unknown_post_operation_is_refused():
    known = problem(3, preserve=0.3)
    coupled = dataclasses.replace(known, layer=Coupled(known.layer))
    with pytest.raises(rc.SolverError, match="solver='adam'"):
        solve_lm([coupled])
    with pytest.raises(rc.SolverError, match="preserve=0"):
        rc.Adam().solve([coupled])
    assert rc.Adam(steps=3).solve([dataclasses.replace(coupled, preserve=0.0)])[0].solver == "adam"
