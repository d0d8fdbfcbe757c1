"""``fit_projected`` in plain PyTorch: autograd and torch.optim.Adam."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import FitProjectedProblem, value_of


def run_reference(problem: FitProjectedProblem, progress: object = None) -> tuple[Tensor, Tensor]:
    """Autograd and torch.optim.Adam, on the operator as a matrix."""
    operator, directions = problem.operator, problem.directions
    inputs, *kernel = operator.shape[:3]
    maps, base, target = operator.flatten(0, 2).flatten(1), problem.base.flatten(1), problem.target.flatten(1)
    original = None if problem.weight is None else problem.weight.flatten(1)
    exact = target == problem.value.flatten(1)
    target = torch.where(exact, value_of(problem, base, original), target)
    change = torch.zeros(len(base), len(maps), dtype=base.dtype, device=base.device, requires_grad=True)
    distance = F.l1_loss if problem.loss == "l1" else F.mse_loss
    optimiser = torch.optim.Adam([change], lr=problem.lr)

    def coefficients(rows: Tensor) -> Tensor:
        return torch.einsum("oit,ri->ort", rows.unflatten(1, (inputs, -1)), directions)

    def project(rows: Tensor) -> Tensor:
        return torch.einsum("ort,ri->oit", coefficients(rows), directions).flatten(1)

    losses = []
    for step in range(problem.steps):
        with torch.enable_grad():
            weight = None if original is None else original + change
            loss = distance(value_of(problem, base + change @ maps, weight), target)
            optimiser.zero_grad()
            loss.backward()
        losses.append(loss.detach().double())
        with torch.no_grad():
            if problem.project_gradient and change.grad is not None:
                change.grad.copy_(project(change.grad))
            optimiser.step()
            if len(directions) and (step % problem.project_every == 0 or step == problem.steps - 1):
                change.copy_(project(change))
    result = coefficients(change.detach()) if len(directions) else change.detach()
    return result.reshape(len(base), len(directions) or inputs, *kernel), torch.stack(losses)
