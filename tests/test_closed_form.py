"""The closed form's kernels at every remainder of pixels, channels and unknowns, against the float64 reference."""

import pytest
import torch
from helpers.fit_problems import CPU, ISAS, cast, linear_problem, run

from rewrite_core.backends import extension
from rewrite_core.ops.fit_low_rank_op import problem as facts

HERE = ISAS[: ISAS.index(extension().isa()) + 1]


def shifted(problem, kind):
    noise = linear_problem(1, pixels=problem["base"].shape[1], channels=len(problem["base"]))["base"].to(
        problem["base"]
    )
    if kind is None:
        return problem
    if kind == "strided":
        return problem | {"shift": noise.repeat_interleave(2, 1)[:, ::2]}
    return problem | {"shift": {"bias": noise[:, :1], "noise": noise[:1], "full": noise}[kind]}


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [None, "bias", "noise", "full", "strided"])
def test_pixels_channels_and_unknowns_of_any_count(isa, dtype, shift):
    sizes = [(unknowns, pixels, 1 + (pixels + unknowns) % 18) for unknowns in (1, 4, 9) for pixels in range(1, 36)]
    for unknowns, pixels, channels in sizes:
        problem = shifted(cast(linear_problem(pixels, unknowns, pixels, channels), dtype), shift)
        if pixels % 5 == 4:
            problem["pixel_weights"] = (torch.arange(pixels) % 3).double()
        found = run(CPU[f"cpp-{isa}"], **problem, gain=1.3, loss="l2")
        exact = run(CPU["reference"], **cast(problem, torch.float64), gain=1.3, loss="l2")
        assert torch.equal(found.status, exact.status), (unknowns, pixels, channels)
        torch.testing.assert_close(found.initial_loss, exact.initial_loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.loss, exact.loss, rtol=1e-9, atol=1e-15)
        if (found.status == facts.CONVERGED).all() and unknowns < pixels / 2:
            rtol = 1e-7 if dtype == torch.float32 else 1e-10
            torch.testing.assert_close(found.coefficients.double(), exact.coefficients, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-5, 1e-3, 1.0])
@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("alike", [1.0, 1e-2, 1e-4])
def test_loss_is_that_of_the_coefficients(isa, noise, penalised, alike):
    """Found by difference where much is left, over the pixels where little is, and right in either way."""
    problem = linear_problem(channels=20)
    generator = torch.Generator().manual_seed(2)
    problem["basis"] = problem["basis"][:1] + alike * problem["basis"]
    change = torch.randn(20, 9, generator=generator, dtype=torch.float64) @ problem["basis"]
    problem["target"] = problem["base"] + change + noise * problem["target"]
    penalty = {"penalty": 1e-3 * torch.eye(9, dtype=torch.float64)} if penalised else {}
    result = run(CPU[f"cpp-{isa}"], **problem, **penalty, loss="l2")
    left = problem["base"] + result.coefficients @ problem["basis"] - problem["target"]
    torch.testing.assert_close(result.loss, left.square().mean(-1), rtol=1e-9, atol=1e-18)
    assert (result.loss <= result.initial_loss).all() and (result.status == facts.CONVERGED).all()
