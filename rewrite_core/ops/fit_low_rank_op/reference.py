"""``fit_low_rank`` in plain PyTorch, float64: the algorithm that the kernels mirror, part by part.

model.py, linear_system.py, fit.py and exact.py are its parts, as in csrc/fit_low_rank/ and kernels/fit_low_rank/.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .exact import fit_exactly
from .fit import Objective, fit_channels
from .model import Model
from .problem import NONFINITE, FitLowRankProblem, Outputs, empty_outputs


class _Edit(NamedTuple):
    """What the channels of one edit share: rows of unit root mean square, pixel weights that sum to 1."""

    basis: Tensor  # [J, P]
    size: Tensor  # [J], what the rows were divided by
    weights: Tensor  # [P]
    penalty: Tensor | None  # [J, J]
    demodulation: tuple[Tensor, Tensor, Tensor] | None  # [G, O], [G, O, J], [G, J, J]
    segments: Tensor | None


def _edit(problem: FitLowRankProblem, b: int) -> _Edit:
    rows = problem.basis[b].double()
    weights = torch.ones_like(rows[0]) if problem.pixel_weights is None else problem.pixel_weights[b].double()
    weights = weights / weights.sum().clamp_min(torch.finfo(torch.float64).tiny)
    size = (weights * rows.square()).sum(-1).sqrt()
    size = torch.where(size > 0, size, 1.0)
    square = size * size[:, None]
    penalty = None if problem.penalty is None else problem.penalty[b] / square
    segments = None if problem.segments is None else problem.segments[b]
    demodulation = None
    if problem.constant is not None and problem.linear is not None and problem.quadratic is not None:
        constant, linear, quadratic = problem.constant[b], problem.linear[b], problem.quadratic[b]
        if segments is None:  # one demodulation
            constant, linear, quadratic = constant[None], linear[None], quadratic[None]
        demodulation = constant.double(), linear / size, quadratic / square
    return _Edit(rows / size[:, None], size, weights, penalty, demodulation, segments)


def _model(problem: FitLowRankProblem, edit: _Edit, b: int, part: slice) -> Model:
    base = problem.base[b, part].double()
    demodulation = edit.demodulation
    if demodulation is not None:
        demodulation = demodulation[0][:, part], demodulation[1][:, part], demodulation[2]
    return Model(
        edit.basis,
        base,
        problem.target[b, part].double(),
        torch.zeros_like(base) if problem.shift is None else problem.shift[b, part].double(),
        demodulation,
        problem.slope,
        problem.gain,
        edit.segments,
    )


def run_reference(problem: FitLowRankProblem) -> Outputs:
    basis, base = problem.basis, problem.base
    coefficients, final, initial, iterations, status = outputs = empty_outputs(basis, base)
    edits, unknowns, pixels = basis.shape
    block = max(1, (1 << 24) // (unknowns * (pixels + unknowns)))  # channels at a time: bounds the memory
    for b in range(edits):
        edit = _edit(problem, b)
        for o in range(0, base.shape[1], block):
            part = slice(o, o + block)
            model = _model(problem, edit, b, part)
            scale = None if problem.penalty_scale is None else problem.penalty_scale[b, part].double()
            if problem.exact:
                found = fit_exactly(model, edit.weights, edit.penalty, scale)
            else:
                penalty = None
                if edit.penalty is not None and scale is not None:
                    penalty = scale[:, None, None] * edit.penalty
                objective = Objective(model, edit.weights, penalty, problem.loss == "l1")
                found = fit_channels(objective, problem.max_iterations, problem.tolerance)
            x, final[b, part], initial[b, part], iterations[b, part], status[b, part] = found
            coefficients[b, part] = (x / edit.size).to(coefficients.dtype)
    huge = ~coefficients.isfinite().all(-1)  # too large for the output's type
    coefficients[huge], final[huge], status[huge] = 0, initial[huge], NONFINITE
    return outputs
