"""What the tests of ``fit_projected`` share: problems, and the steps of plain autograd in float64 to compare with."""

import pytest
import torch
import torch.nn.functional as F

from rewrite_core.ops import fit_projected


def make(inputs=13, channels=5, size=(7, 6), kernel=3, rank=2, demodulated=False, seed=0):
    """Arguments and options of one problem, float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    key, weight = random(inputs, *size), random(channels, inputs, kernel, kernel)
    taps = torch.eye(kernel**2, dtype=torch.float64).reshape(-1, 1, kernel, kernel)
    operator = F.conv2d(key[:, None], taps, padding=kernel // 2).reshape(inputs, kernel, kernel, *size)
    base = F.conv2d(key[None], weight, padding=kernel // 2)[0]
    options = {"directions": torch.linalg.qr(random(inputs, rank)).Q.T if rank else None, "steps": 23, "lr": 0.02}
    target = base + 3 * random(*base.shape)
    if demodulated:
        style = (1 + 0.3 * random(inputs)) / (inputs * kernel**2) ** 0.5
        options |= {
            "demodulation": (weight, style, 1e-8),
            "shift": 0.1 * random(channels, 1, 1),
            "slope": 0.2,
            "gain": 1.4,
        }
        target = target / base.std()
    return (operator, base, target), options


def single(part):
    if isinstance(part, tuple):
        return tuple(map(single, part))
    return part.float() if isinstance(part, torch.Tensor) else part


def agree(arguments, options, tolerance=2e-4, run=None, **more):
    right = fit_projected(*arguments, **options, **more, backend="reference")
    run = run or (lambda *a, **k: fit_projected(*a, **k, backend="cpp"))
    found = run(*single(arguments), **{name: single(part) for name, part in options.items()}, **more)
    assert found.coefficients.dtype == torch.float32 and found.losses.dtype == torch.float64
    assert found.coefficients.shape == right.coefficients.shape
    worst = ((found.losses - right.losses).abs() / right.losses).argmax()
    torch.testing.assert_close(found.losses, right.losses, rtol=tolerance, atol=0, msg=lambda m: f"step {worst}: {m}")
    assert (found.coefficients - right.coefficients).norm() <= tolerance * right.coefficients.norm()


def double(part):
    if isinstance(part, tuple):
        return tuple(map(double, part))
    return part.double() if isinstance(part, torch.Tensor) else part


def problem_of(*arguments, **options):
    """What fit_projected hands to a backend."""
    given = []
    with pytest.MonkeyPatch.context() as patch:
        record = type(
            "Record", (), {"load": lambda self: lambda problem, progress: given.append(problem) or (None, None)}
        )
        patch.setitem(fit_projected.__globals__, "select", lambda *a: record())
        fit_projected(*arguments, **options)
    return given[0]
