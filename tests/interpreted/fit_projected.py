"""The kernel makes the steps of plain autograd: see tests/test_interpreted.py.

The interpreter multiplies in float32, where a GPU takes three TF32 products.
"""

import pytest
import torch
from helpers import projected_problems as t

from rewrite_core.kernels.fit_projected import host, launch
from rewrite_core.ops import fit_projected


@pytest.fixture(autouse=True)
def unwritten_shows():
    """What is allocated is NaN."""
    torch.use_deterministic_algorithms(True)


def run(*arguments, **options):
    return fit_projected(*arguments, **options, backend="triton")


def agree(arguments, options, tolerance=2e-4, steps=6, **more):
    t.agree(arguments, options | {"steps": steps, "project_every": 4}, tolerance, run, **more)


SIZES = (
    {},
    {"size": (13, 12)},
    {"size": (1, 1)},
    {"kernel": 1, "inputs": 70, "channels": 19},
    {"inputs": 1, "rank": 1},
    {"rank": 0, "size": (12, 12)},
    {"rank": 17, "inputs": 20, "kernel": 1},
)


@pytest.mark.parametrize("number", range(len(SIZES)), ids=map(str, SIZES))
def test_sizes(number):
    agree(*t.make(**SIZES[number], demodulated=number % 2 == 0), steps=2, loss=("l1", "l2")[number // 2 % 2])


@pytest.mark.parametrize("demodulated", [False, True])
def test_projected_gradient_and_rhythm(demodulated):
    agree(*t.make(size=(13, 12) if demodulated else (3, 3), demodulated=demodulated), steps=2, project_gradient=True)
    agree(*t.make(demodulated=demodulated), steps=6)


@pytest.fixture
def problem():
    """Arguments and options, float32."""
    arguments, options = t.make(channels=9, inputs=40, size=(3, 4), kernel=1, demodulated=True)
    return t.single(arguments), {name: t.single(part) for name, part in options.items()} | {"steps": 2}


def test_configurations(problem):
    arguments, options = problem
    once = run(*arguments, **options)
    for config in host.CANDIDATES:
        found = launch(t.problem_of(*arguments, **options), config=config)
        torch.testing.assert_close(found[1], once.losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(found[0], once.coefficients, rtol=1e-3, atol=1e-4)
    again = run(*arguments, **options, progress=lambda ranges, count: ranges)
    assert torch.equal(once.losses, again.losses) and torch.equal(once.coefficients, again.coefficients)


@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_a_goal_equal_to_the_value_pulls_at_nothing(problem, slope):
    (operator, base, _), options = problem
    weight, style, eps = options["demodulation"]
    power = (weight * style[:, None, None]).square().sum((1, 2, 3)) + eps
    value = 1.4 * torch.nn.functional.leaky_relu(base / power.sqrt()[:, None, None] + options["shift"], slope)
    fit = run(operator, base, value, value=value, **options | {"slope": slope})
    assert (fit.losses == 0).all() and (fit.coefficients == 0).all()


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_huge_and_tiny_numbers_stay_finite(problem, scale):
    arguments, options = problem
    fit = run(*(scale * part for part in arguments), **options)
    assert fit.coefficients.isfinite().all() and fit.losses.isfinite().all()


def test_dead_inputs_dead_channels_and_nan(problem):
    arguments, options = problem
    operator, base, target = (part.clone() for part in arguments)
    weight, style, eps = options["demodulation"]
    operator[3], base[4] = 0, 0
    weight = weight.clone()
    weight[:, 3], weight[4] = 0, 0
    wide = {name: t.double(part) for name, part in options.items()}
    wide |= {"demodulation": (weight.double(), style.double(), eps)}
    agree((operator.double(), base.double(), target.double()), wide, 1e-2)
    target[2, 2, 3] = torch.nan
    assert run(operator, base, target, **options).losses.isnan().all()


def test_no_channels():
    maps = torch.empty(0, 5, 5)
    none = run(torch.randn(4, 3, 3, 5, 5), maps, maps, directions=torch.eye(4)[:1], steps=2)
    assert none.coefficients.shape == (0, 1, 3, 3)
