"""``fit_projected`` by a CUDA kernel of our own (csrc/fit_projected.cu): all steps in one launch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...backends import extension
from ..cuda_kernels import capability, first_launch, index_of, missing, not_run
from ..memory import address, plain_fields
from .problem import MOST_TAPS, FitProjectedProblem, rates_of

# What "auto" takes this backend for: compute capabilities on which the GPU check has recorded it as faster than the
# Triton kernels. No GPU has run it yet.
FASTER_ON: frozenset[tuple[int, int]] = frozenset()

Plan = tuple[int, int]  # tiles of weights that a warp has, 0: it does not fit; blocks that work together


@functools.cache
def _plan(weights: int, pixels: int, taps: int, index: int) -> Plan:
    with torch.cuda.device(index):
        tiles, blocks = extension().fit_projected_plan(weights=weights, pixels=pixels, taps=taps, device=index)
    return tiles, blocks


def _plan_of(operator: Tensor) -> Plan:
    inputs, *kernel, height, width = operator.shape
    taps = kernel[0] * kernel[1]
    return _plan(inputs * taps, height * width, taps, index_of(operator))


def supports(operator: Tensor, *args: object) -> str | None:
    """None where the kernel can run, else why not."""
    reason = missing(operator, "operator", "fit_projected_cuda")
    if reason is not None:
        return reason
    if operator.dtype != torch.float32:
        return f"it works in float32, and the operator is {operator.dtype}"
    if operator.shape[1] * operator.shape[2] > MOST_TAPS:
        return f"it takes kernels of up to {MOST_TAPS} taps, and this one is {list(operator.shape[1:3])}"
    try:
        tiles, _ = _plan_of(operator)
    except RuntimeError as error:
        return not_run(error)
    if not tiles:
        return (
            f"an operator of {operator.numel()} numbers is more than the shared memory of as many blocks as work "
            "together on this GPU: one, or a cluster of up to 16 (compute capability 9.0 or newer)"
        )
    return None


def declines(operator: Tensor, *args: object) -> str | None:
    """None where it was measured to be faster than the Triton kernels."""
    if capability(index_of(operator)) in FASTER_ON:
        return None
    return "no GPU check has recorded it as faster than triton here; ask for it by name to try it"


def run_cuda(problem: FitProjectedProblem, progress: Callable | None = None) -> tuple[Tensor, Tensor]:
    """What ops.fit_projected returns. Nothing here waits for the GPU."""
    problem = plain_fields(problem)
    operator, base, directions = problem.operator, problem.base, problem.directions
    inputs, *kernel, height, width = operator.shape
    channels, ranks, taps, pixels = len(base), len(directions), kernel[0] * kernel[1], height * width
    coefficients = base.new_empty(channels, ranks or inputs, *kernel)
    if not channels:
        return coefficients, base.new_full((problem.steps,), float("nan"), dtype=torch.float64)  # means over nothing
    index = index_of(operator)
    tiles, blocks = _plan_of(operator)
    first_launch("fit_projected", index, tiles, blocks > 1, problem.project_gradient)
    parts = extension().fit_projected_parts(channels=channels, tiles=tiles, blocks=blocks)
    basis = torch.einsum("ri,iyxp->ryxp", directions, operator.flatten(3)) if problem.project_gradient else None
    losses = base.new_empty(parts, problem.steps, dtype=torch.float64)
    arrays: dict[str, Tensor | None] = {
        "maps": operator,
        "base": base,
        "target": problem.target,
        "value": problem.value,
        "shift": problem.shift,
        "weight": problem.weight,
        "square": None if problem.style is None else problem.style.square(),
        "directions": directions,
        "basis": basis,
        "rates": rates_of(problem),
        "goal": torch.empty_like(base, memory_format=torch.contiguous_format),
        "leaning": None if basis is None else torch.empty_like(coefficients),
        "coefficients": coefficients,
        "losses": losses,
    }
    arrays = {name: None if data is None else data.contiguous() for name, data in arrays.items()}
    for _ in [None] if progress is None else progress(iter([(0, 1)]), 1):
        with torch.cuda.device(index):
            extension().fit_projected_cuda(
                **{name: address(data) for name, data in arrays.items()},
                channels=channels,
                inputs=inputs,
                taps=taps,
                pixels=pixels,
                ranks=ranks,
                steps=problem.steps,
                project_every=problem.project_every,
                absolute=problem.loss == "l1",
                eps=problem.eps,
                slope=problem.slope,
                gain=problem.gain,
                tiles=tiles,
                blocks=blocks,
                device=index,
                stream=torch.cuda.current_stream(index).cuda_stream,
            )
    return coefficients, losses.sum(0) / base.numel()
