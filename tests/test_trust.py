"""The trust bound: a fit that is too large on ordinary keys is fitted again, or scaled back, and says so."""

import dataclasses
import math
import warnings

import pytest
import torch
from test_protect import WHOLE, Painter, problem, square

import rewrite_core as rc
from rewrite_core.benchmarks.rules import NAMES, rule
from rewrite_core.edits.goals import paste_goals
from rewrite_core.rewrites.trust import TRUST

LOOSE = {**WHOLE, "rank": 2}  # eighteen unknowns for sixteen pixels: any goal is met
quiet = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def given():
    return problem(Painter(), rc.sample_latents(8, 60, seed=3))


def plain_size(layer, moment, change):
    """sqrt(tr dW C dW^T / tr W C W^T), tap by tap."""
    matrix = moment.matrix()

    def energy(weight):
        taps = weight.double().flatten(2).unbind(2)
        return sum(torch.trace(tap @ matrix @ tap.T).item() for tap in taps)

    return math.sqrt(energy(change.weight_delta()) / energy(layer.weight))


@quiet
def test_a_large_fit_is_fitted_again_with_the_least_preserve_that_is_enough(given):
    layer, moment, edit, z = given
    free = rc.rewrite(layer, moment, edit, z, **LOOSE)
    size = plain_size(layer, moment, free)
    bound = 0.4 * size
    with pytest.warns(rc.TrustWarning, match="fitted again with preserve="):
        held = rc.rewrite(layer, moment, edit, z, **LOOSE | {"trust": bound})
    assert free.limited is None
    assert held.limited.size == pytest.approx(size, rel=1e-6)
    assert held.limited.strength == 1
    assert plain_size(layer, moment, held) <= bound
    same = rc.rewrite(layer, moment, edit, z, **LOOSE, preserve=held.limited.preserve)
    assert torch.allclose(same.coefficients, held.coefficients, rtol=1e-6, atol=1e-9)
    steps = [weight for weight in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0) if weight < held.limited.preserve]
    for weight in steps:
        looser = rc.rewrite(layer, moment, edit, z, **LOOSE, preserve=weight)
        assert plain_size(layer, moment, looser) > bound


@quiet
def test_what_no_preserve_brings_within_the_bound_is_scaled(given, tmp_path):
    layer, moment, edit, z = given
    with pytest.warns(rc.TrustWarning, match="scaled by"):
        held = rc.rewrite(layer, moment, edit, z, **LOOSE | {"trust": 1e-4})
    assert plain_size(layer, moment, held) == pytest.approx(1e-4, rel=1e-4)
    assert 0 < held.limited.strength < 1
    full = rc.rewrite(layer, moment, edit, z, **LOOSE, preserve=held.limited.preserve)
    assert torch.allclose(held.coefficients, held.limited.strength * full.coefficients, rtol=1e-5, atol=1e-9)
    capture = layer.capture(z[1:2])
    (goal,) = paste_goals(layer, edit, z, "map")
    value = layer.value(capture, layer.weight + held.weight_delta().to(layer.weight))
    assert held.final_loss == pytest.approx((value - goal.target).square().mean().item(), rel=1e-5)
    held.save(tmp_path / "held.safetensors")
    assert rc.Rewrite.load(tmp_path / "held.safetensors").limited == held.limited


@quiet
def test_only_those_that_pass_it_are_touched(given):
    layer, moment, edit, z = given
    other = rc.Edit(copy=square(3, 0, 0), paste=square(3, 0, 0), context=[square(3, 0, 0)])
    sizes = [plain_size(layer, moment, rc.rewrite(layer, moment, each, z, **LOOSE)) for each in (edit, other)]
    assert sizes[1] < 0.5 * sizes[0]
    changes = rc.rewrite_many(layer, moment, [edit, other], z, **LOOSE | {"trust": 0.6 * sizes[0]})
    assert changes[0].limited is not None
    assert changes[1].limited is None
    alone = rc.rewrite(layer, moment, other, z, **LOOSE)
    assert torch.equal(changes[1].coefficients, alone.coefficients)


@quiet
def test_pictures_are_fitted_again_too(given):
    layer, moment, edit, z = given
    options = LOOSE | {"objective": "pictures", "preserve": 0.0}
    free = rc.rewrite(layer, moment, edit, z, **options)
    bound = 0.5 * plain_size(layer, moment, free)
    with pytest.warns(rc.TrustWarning):
        held = rc.rewrite(layer, moment, edit, z, **options | {"trust": bound})
    assert plain_size(layer, moment, held) <= bound * (1 + 1e-6)


@quiet
@pytest.mark.parametrize("solver", ["projected", "unconstrained"])
def test_baselines_run_to_the_step(given, solver):
    layer, moment, edit, z = given
    kind = {"projected": rc.Projected, "unconstrained": rc.Unconstrained}[solver](steps=21)
    one, two = (rc.rewrite(layer, moment, edit, z, region="map", solver=kind, trust=bound) for bound in (1e-4, None))
    assert one.limited is None
    assert torch.equal(one.coefficients, two.coefficients)


def test_refusals(given):
    layer, moment, edit, z = given
    for wrong in (0, -1.0, math.nan):
        with pytest.raises(rc.RewriteCoreError, match="trust"):
            rc.rewrite(layer, moment, edit, z, trust=wrong)


@pytest.mark.parametrize("name", NAMES)
def test_no_default_edit_destroys_or_is_a_silent_no_op(name):
    """On every rule of every test generator that is here, by the defaults and by what the docs begin with."""
    own = rule(name)
    try:
        generator = own.subject.generator()
    except rc.RewriteCoreError as error:
        pytest.skip(str(error))
    z = own.subject.edit_latents
    layer = rc.bind(generator, own.subject.layers[0])
    moment = rc.collect_second_moment(layer, z[:300], progress=False)
    for options in ({}, {"rank": 4, "region": "map", "loss": "l2"}):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            change = rc.rewrite(layer, moment, own.edit, z, **options)
        kinds = {each.category for each in told}
        assert change.size_on_keys(moment) <= TRUST * (1 + 1e-6)
        assert (change.limited is not None) == (rc.TrustWarning in kinds)
        if rc.NoImprovementWarning not in kinds:
            assert change.final_loss < 0.99 * change.losses[0]
            with torch.no_grad():
                before = generator(z[:1])
                with change:
                    assert not torch.equal(generator(z[:1]), before)


@quiet
def test_a_solver_made_from_lm_is_held_back_too(given):
    """Its `solve` takes what every solver's takes, and what it returns is what is looked at."""

    class Doubled(rc.LM):
        def solve(self, problems, *, progress=False, backend="auto"):
            found = super().solve(problems, progress=progress, backend=backend)
            return [dataclasses.replace(each, coefficients=2 * each.coefficients) for each in found]

    layer, moment, edit, z = given
    size = plain_size(layer, moment, rc.rewrite(layer, moment, edit, z, **LOOSE))
    free = rc.rewrite(layer, moment, edit, z, **LOOSE | {"trust": 3 * size}, solver=Doubled())
    assert free.limited is None and plain_size(layer, moment, free) == pytest.approx(2 * size, rel=1e-6)
    with pytest.warns(rc.TrustWarning):
        held = rc.rewrite(layer, moment, edit, z, **LOOSE | {"trust": 1.5 * size}, solver=Doubled())
    assert held.limited.size == pytest.approx(2 * size, rel=1e-6)
    assert plain_size(layer, moment, held) <= 1.5 * size * (1 + 1e-6)
