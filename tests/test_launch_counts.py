"""How many kernels a call of an op launches on a GPU, ours and torch's, counted with one that is not there.

A launch costs the host some microseconds, and small calls are nothing else. The numbers are those of calls after the
first of their kind. What a solve launches: test_spd_solve_launches.py.
"""

import pytest
import torch
from conftest import needs_triton
from helpers import projected_problems
from helpers.stand_in import Machine
from torch.utils._pytree import tree_map

from rewrite_core import ops

pytestmark = needs_triton


@pytest.fixture
def gpu():
    with Machine() as machine:
        yield machine


def second(gpu, call):
    """What the second call launches: (ours, torch's), and how often it waits."""
    call()
    gpu.clear()
    call()
    return gpu.kernels, gpu.launches, len(gpu.waits)


def random(gpu, *shape, dtype=torch.float32):
    return gpu.put(torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 32, 8, 8), (8, 512, 4, 4), (100, 64)], ids=str)
def test_a_second_moment(shape, dtype, gpu):
    """One kernel, or one more that adds the parts up; added to a sum that is there, torch launches nothing."""
    features = random(gpu, *shape).to(dtype)
    out = gpu.put(torch.zeros(shape[1], shape[1], dtype=torch.float64))
    ours, torches, waits = second(gpu, lambda: ops.second_moment(features, out))
    assert len(ours) in (1, 2) and not torches and not waits
    assert len(second(gpu, lambda: ops.second_moment(features))[1]) <= 1  # zeros


@pytest.mark.parametrize("demodulated", [False, True])
@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("edits", [1, 8])
def test_a_fit(edits, penalised, demodulated, gpu):
    """Two or three kernels for all edits, channels and steps; torch prepares quadratic forms, and the weights."""
    basis, base, target = random(gpu, edits, 4, 20), random(gpu, edits, 3, 20), random(gpu, edits, 3, 20)
    options = {"slope": 0.2}
    wide = {"dtype": torch.float64}
    if demodulated:
        ones = gpu.put(torch.ones(edits, 3, **wide))
        options["demodulation"] = (
            ones,
            random(gpu, edits, 3, 4, **wide) / 100,
            gpu.put(torch.eye(4, **wide).repeat(edits, 1, 1)),
        )
    if penalised:
        options["penalty"] = gpu.put(torch.eye(4, **wide).repeat(edits, 1, 1))
    ours, torches, waits = second(gpu, lambda: ops.fit_low_rank(basis, base, target, **options))
    assert ours == ["share_kernel", *["scale_kernel"] * (demodulated or penalised), "fit_kernel"]
    # (A + A^T) / 2 of each matrix; the penalty's scale, one where none was given, and NaN where it is negative
    assert len(torches) == 2 * (demodulated + penalised) + 4 * penalised, torches
    assert not waits


@pytest.mark.parametrize("demodulated", [False, True])
def test_a_projected_step(demodulated, gpu):
    """Two kernels a step, and one more where it projects; the rest does not grow with the steps."""
    given, options = projected_problems.make(demodulated=demodulated)
    put = lambda part: gpu.put(part.float()) if isinstance(part, torch.Tensor) else part
    given, options = tree_map(put, (given, options))
    found = []
    for steps in (20, 40):
        call = lambda steps=steps: ops.fit_projected(*given, **options | {"steps": steps})
        ours, torches, _ = second(gpu, call)
        found.append((len(ours), len(torches)))
    (short, prepared), (long, more) = found
    assert prepared == more
    assert 2 * 20 <= long - short <= 2 * 20 + 4, found
