"""What the solvers refuse, warn of and estimate; their results are tested in test_rewriting and test_fit_low_rank."""

import dataclasses
import re
import warnings

import numpy as np
import pytest
import torch
from helpers import reference
from torch import nn

import rewrite_core as rc
from rewrite_core.solvers.choice import solver_of
from rewrite_core.solvers.lm import solve_lm
from rewrite_core.solvers.problem import (
    LayerProblem,
    LayerSolution,
    basis_maps,
    combine,
    generic_second_moment,
    warn_of_no_use,
    warn_underdetermined,
)


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
        (lambda: rc.Unconstrained(keep="first"), rc.RewriteCoreError, "'best' or 'last'"),
        (lambda: rc.Adam(keep=True), rc.ArgumentError, "'best' or 'last'"),
        (lambda: rc.Projected(keep="best"), TypeError, "keep"),
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
    for name, solver in (("lm", rc.LM()), ("projected", rc.Projected()), ("adam", rc.Adam(2001, 0.01))):
        assert solver_of(name) == solver and solver_of(solver) is solver and solver.name == name
    assert solver_of("unconstrained") == rc.Unconstrained(steps=np.int64(2001), lr=np.float64(0.002))


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


# --- steps as long as the weight is large, and the best of them ------------------------------------------


def scaled_problem(scale: float) -> LayerProblem:
    """The same problem, with the weight and the goal in other units."""
    known = problem(9)
    with torch.no_grad():
        known.layer.parameter.mul_(scale)
        known.layer.module.bias.mul_(scale)
    (capture, target), *_ = known.regions
    return dataclasses.replace(known, regions=((capture, target * scale),))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", [rc.Adam, rc.Unconstrained])
def test_steps_are_as_long_as_the_weight_is_large(kind, backend):
    (usual,), (large,) = (
        kind(steps=40, lr=0.3).solve([scaled_problem(scale)], backend=backend) for scale in (1.0, 1000.0)
    )
    assert usual.final_loss < usual.losses[0]
    np.testing.assert_allclose(np.array(large.losses) / 1000, usual.losses, rtol=1e-5)
    torch.testing.assert_close(large.coefficients / 1000, usual.coefficients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("preserve", [0.0, 3.0])
@pytest.mark.parametrize("kind", [rc.Adam, rc.Unconstrained])
def test_the_best_step_is_returned_with_both_losses(kind, preserve, backend):
    given = problem(9, preserve if kind.preserves else 0.0)

    def distance(solution):
        return given.distance(given.weight + combine(solution.coefficients, rows)).item()

    rows = given.directions if kind.reduced else torch.eye(6, dtype=torch.float64)
    for lr in (0.02, 500.0):  # steps that end well, and steps that are far too long
        (best,), (last,) = (kind(30, lr, keep).solve([given], backend=backend) for keep in ("best", "last"))
        assert best.losses == last.losses and best.last_loss == pytest.approx(last.last_loss, rel=1e-9)
        assert distance(last) == pytest.approx(last.last_loss, rel=1e-6) == last.final_loss
        assert distance(best) == pytest.approx(best.final_loss, rel=1e-6)
        if not given.preserve:
            assert best.final_loss == pytest.approx(min([*best.losses, best.last_loss]), rel=1e-6)
        assert best.final_loss <= best.losses[0] * (1 + 1e-9)
    assert last.last_loss > 1.3 * best.final_loss


@pytest.mark.parametrize("solver", [rc.Adam(steps=2), rc.Unconstrained(steps=2)])
def test_a_weight_of_zeros_gives_steps_no_length(solver):
    given = problem(9)
    with torch.no_grad():
        given.layer.parameter.zero_()
    with pytest.raises(rc.SolverError, match="zero everywhere.*solver='lm'"):
        solver.solve([given])


# --- what did nothing says so ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "changed", "whole", "words"),
    [
        ((1.0, 1.5), {}, True, "worse than it began .loss 1 -> 1.5.*solver='lm', or a lower lr"),
        ((1.0, 0.995), {}, True, "next to nothing .*loss='l2' or region='box'"),
        ((1.0, 0.995), {}, False, "next to nothing .*raise the rank, or choose another layer"),
        ((1.0, 1.0), {"loss": "l2"}, True, "next to nothing .*mark context"),
        ((1.0, 0.995), {"preserve": 3.0}, True, "lower `preserve`"),
        ((0.0, 0.0), {}, True, "the goal already"),
        ((1.0, 0.98), {}, True, None),
        ((), {}, True, None),  # nothing was fitted
    ],
)
def test_a_fit_of_no_use_warns(losses, changed, whole, words):
    given = dataclasses.replace(problem(9), **changed)
    solution = LayerSolution(torch.zeros(5, 1, 3, 3), list(losses[:1]), "projected", losses[-1] if losses else None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_no_use(given, solution, whole)
    assert [warning.category for warning in caught] == ([] if words is None else [rc.NoImprovementWarning])
    if words is not None:
        assert re.search(words, str(caught[0].message))


def test_l1_on_a_whole_map_that_should_stay_warns_and_l2_does_not():
    """The paste is one pixel in 144, which l1 gives up for the rest."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Unflatten(1, (4, 12, 12)), nn.ReLU(), nn.Conv2d(4, 5, 1))
    layer, z = rc.bind(generator, "2"), rc.sample_latents(4 * 144, 60)
    moment = rc.collect_second_moment(layer, z, progress=False)
    edit = rc.Edit(rc.Selection.box(1, (2, 2, 3, 3), 12), rc.Selection.box(2, (6, 6, 7, 7), 12), latents=z)
    with pytest.warns(rc.NoImprovementWarning, match="loss='l2'"):
        reference.rewrite(layer, moment, edit, z, region="map")
    with warnings.catch_warnings():
        warnings.simplefilter("error", rc.NoImprovementWarning)
        reference.rewrite(layer, moment, edit, z, region="map", loss="l2")
        reference.rewrite(layer, moment, edit, z, region="box")


def test_the_references_own_steps_that_end_worse_warn(moment, layer, edit, latents):
    with pytest.warns(rc.NoImprovementWarning, match="'projected' ended worse.*solver='lm'"):
        change = reference.rewrite(layer, moment, edit, latents, solver=rc.Projected(steps=20, lr=1.0))
    assert change.final_loss == change.last_loss > change.losses[0]  # the last step, as the reference returns it
