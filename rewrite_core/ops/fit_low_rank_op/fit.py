"""The reference's fit: Levenberg-Marquardt on all channels of a block at once."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .linear_system import damped_step
from .model import Model
from .problem import (
    BOUNDED,
    CONVERGED,
    DAMPING_DOWN,
    DAMPING_MIN,
    DAMPING_STALL,
    DAMPING_START,
    DAMPING_UP,
    DEGENERATE,
    EXACT,
    GOOD,
    KINK,
    MAX_ITERATIONS,
    NEGLIGIBLE,
    NONFINITE,
    POOR,
    REACHED,
    SLOW_SHARE,
    SMOOTHING_END,
    SMOOTHING_FAST,
    SMOOTHING_RATE,
    SMOOTHING_SLOW,
    STATIONARY,
    ZERO_RESIDUAL,
)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What n channels minimise: the weighted loss of the model, and a penalty.

    model, weights   weights [P] sum to 1
    penalty          [n, J, J] or None
    absolute         whether the loss is l1
    """

    model: Model
    weights: Tensor
    penalty: Tensor | None
    absolute: bool

    @property
    def rounded(self) -> bool:
        """Whether there is a kink to round."""
        return self.model.slope != 1.0

    @property
    def convex(self) -> bool:
        return not self.rounded and self.model.demodulation is None

    def penalised(self, x: Tensor) -> Tensor:
        if self.penalty is None:
            return torch.zeros_like(x[:, 0])
        return (x * (self.penalty @ x[..., None])[..., 0]).sum(-1)

    def true(self, lin: Tensor, m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and with the penalty."""
        r = self.model.residual(lin, m)[0]
        data = (self.weights * (r.abs() if self.absolute else r * r)).sum(-1)
        return data, data + self.penalised(x)

    def residual(self, lin: Tensor, m: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.model.residual(lin, m, KINK / abs(self.model.gain) * smoothing if self.rounded else None)

    def smoothed(self, r: Tensor, smoothing: Tensor, x: Tensor) -> Tensor:
        rho = (r * r + smoothing[:, None] ** 2).sqrt() if self.absolute else r * r
        return (self.weights * rho).sum(-1) + self.penalised(x)


@dataclasses.dataclass(frozen=True)
class Pace:
    """How fast the smoothing shrinks after a step that was taken, and after a good one."""

    slow: float
    slow_well: float
    fast_well: float

    @classmethod
    def of(cls, objective: Objective, max_iterations: int) -> Pace:
        if objective.convex:
            return cls(SMOOTHING_RATE, SMOOTHING_RATE, SMOOTHING_RATE)
        slow = SMOOTHING_SLOW ** (1 / (SLOW_SHARE * max_iterations))
        return cls(slow, slow**2, SMOOTHING_FAST)

    def rate(self, smoothing: Tensor, scale: Tensor, well: Tensor) -> Tensor:
        one = torch.ones_like(scale)  # between two numbers torch.where would choose float32
        slow = torch.where(well, self.slow_well * one, self.slow)
        fast = torch.where(well, self.fast_well * one, SMOOTHING_RATE)
        return torch.where(smoothing > SMOOTHING_SLOW * scale, slow, fast)


@dataclasses.dataclass(frozen=True)
class Derivatives:
    """At the present point: residual, its smoothed size (l1), and what a step is made of."""

    r: Tensor
    eta: Tensor | None
    steep: Tensor
    slopes: Tensor
    curvature: Tensor
    rows: Tensor
    gradient: Tensor


class _Fit:
    """The state of n channels; :meth:`advance` takes one step of each that is active."""

    def __init__(self, objective: Objective, max_iterations: int, tolerance: float):
        model, weights = objective.model, objective.weights
        n, unknowns = len(model.base), len(model.basis)
        self.objective, self.tolerance = objective, tolerance
        self.pace = Pace.of(objective, max_iterations)
        self.dual_form = objective.penalty is None and unknowns > int((weights > 0).sum())
        self.x = model.base.new_zeros(n, unknowns)
        self.lin, self.m, self.dm = model.linearise(self.x)
        self.initial, self.best = objective.true(self.lin, self.m, self.x)
        self.best_loss, self.best_x = self.initial.clone(), self.x.clone()
        self.scale = self.initial if objective.absolute else self.initial.sqrt()
        self.smoothing_end = SMOOTHING_END * self.scale
        smooth = objective.absolute or objective.rounded
        self.smoothing = self.scale.clone() if smooth else self.smoothing_end.clone()
        self.damping = torch.full_like(self.scale, DAMPING_START)
        self.growth = torch.full_like(self.scale, DAMPING_UP)
        self.dual = torch.zeros_like(self.lin)
        self.iterations = torch.zeros(n, dtype=torch.int32, device=self.x.device)
        self.status = torch.full_like(self.iterations, MAX_ITERATIONS)
        level = (weights * model.target.abs()).sum(-1)
        if model.gain == 0 or not weights.any():
            self.status.fill_(DEGENERATE)
        if weights.any():
            self.status[~(self.scale > NEGLIGIBLE * level)] = ZERO_RESIDUAL
        self.status[~(self.initial.isfinite() & level.isfinite())] = NONFINITE
        self.active = self.status == MAX_ITERATIONS

    def derive(self) -> tuple[Tensor, Derivatives]:
        """The smoothed objective at the present point, and its derivatives."""
        objective, x, weights = self.objective, self.x, self.objective.weights
        r, steep, bend = objective.residual(self.lin, self.m, self.smoothing)
        now = objective.smoothed(r, self.smoothing, x)
        eta = None
        if objective.absolute:
            eta = (r * r + self.smoothing[:, None] ** 2).sqrt()
            slopes, curvature = weights * r / eta, weights * (1 - self.dual * r / eta) / eta
        else:
            slopes, curvature = 2 * weights * r, (2 * weights).expand_as(r)
        curvature = curvature * steep * steep + (slopes * bend).clamp_min(0.0)  # the convex half of the bend
        slopes = slopes * steep
        rows = objective.model.jacobian(self.lin, self.m, self.dm)
        gradient = (rows @ slopes[..., None])[..., 0]
        if objective.penalty is not None:
            gradient = gradient + 2 * (objective.penalty @ x[..., None])[..., 0]
        return now, Derivatives(r, eta, steep, slopes, curvature, rows, gradient)

    def drop_out(self, mean: Tensor, now: Tensor) -> None:
        """End the channels where nothing bends, or numbers overflowed."""
        flat = self.active & (mean == 0)  # no coefficient matters here
        self.status[flat] = torch.where(self.iterations[flat] == 0, DEGENERATE, CONVERGED).to(torch.int32)
        broken = self.active & ~(mean.isfinite() & now.isfinite())
        self.status[broken] = NONFINITE
        self.active = self.active & ~flat & ~broken
        self.iterations += self.active

    def advance(self) -> None:
        objective, model = self.objective, self.objective.model
        now, at = self.derive()
        penalty = None if objective.penalty is None else 2 * objective.penalty
        step, mean, good = damped_step(
            at.rows, at.curvature, at.slopes, at.gradient, penalty, self.damping, self.dual_form
        )
        self.drop_out(mean, now)
        predicted = 0.5 * (self.damping * mean * step.square().sum(-1) - (at.gradient * step).sum(-1))
        new_x = self.x + step
        far = model.reach(new_x)[:, None]
        new_x = torch.where(far > 1, new_x * far.rsqrt(), new_x)  # back to where W0 still counts
        step = torch.where(far > 1, new_x - self.x, step)
        new_lin, new_m, new_dm = model.linearise(new_x)
        after = objective.smoothed(objective.residual(new_lin, new_m, self.smoothing)[0], self.smoothing, new_x)
        taken = self.active & good & (after < now)  # False for NaN
        if at.eta is not None:
            self.follow(at, at.eta, step, new_lin, taken)
        keep = taken[:, None]
        self.x, self.lin = torch.where(keep, new_x, self.x), torch.where(keep, new_lin, self.lin)
        self.m = torch.where(keep, new_m, self.m)
        if self.dm is not None and new_dm is not None:
            self.dm = torch.where(keep[..., None], new_dm, self.dm)
        self.remember(taken)
        self.adapt(now, after, predicted, taken, good)

    def follow(self, at: Derivatives, eta: Tensor, step: Tensor, new_lin: Tensor, taken: Tensor) -> None:
        """l1: the running estimate of r / eta moves along with the step."""
        model = self.objective.model
        change = (model.spread(self.m) * (new_lin - self.lin)) * at.steep
        if self.dm is not None:
            change = change + self.lin * model.spread((self.dm * step[:, None]).sum(-1)) * at.steep
        new_dual = (at.r + change - self.dual * (at.r / eta) * change) / eta
        self.dual = torch.where(taken[:, None], new_dual.clamp(-1.0, 1.0), self.dual)

    def remember(self, taken: Tensor) -> None:
        """The best iterate by the true objective."""
        data, true = self.objective.true(self.lin, self.m, self.x)
        better = taken & (true < self.best)
        self.best, self.best_loss = torch.where(better, true, self.best), torch.where(better, data, self.best_loss)
        self.best_x = torch.where(better[:, None], self.x, self.best_x)

    def adapt(self, now: Tensor, after: Tensor, predicted: Tensor, taken: Tensor, good: Tensor) -> None:
        """Damping and smoothing after a step, and which channels are done."""
        one = torch.ones_like(self.scale)  # between two numbers torch.where would choose float32
        drop = now - after
        quality = drop / predicted
        factor = torch.where(quality > GOOD, DAMPING_DOWN, torch.where(quality > POOR, one, 2.0))
        stationary = (self.damping > DAMPING_STALL) | (good & (predicted <= STATIONARY * now))
        stalled = self.active & ~taken & stationary
        at_end = self.smoothing <= self.smoothing_end
        self.damping = (self.damping * torch.where(taken, factor, self.growth)).clamp_min(DAMPING_MIN)
        self.growth = torch.where(taken, DAMPING_UP, self.growth * 2)
        self.damping = torch.where(stalled, DAMPING_START, self.damping)
        small = taken & (drop <= self.tolerance * now)
        if not self.objective.absolute:
            small = small | (taken & (after <= (EXACT * self.scale) ** 2))
        done = self.active & at_end & (small | stalled)
        self.status[done] = CONVERGED
        self.active = self.active & ~done
        rate = self.pace.rate(self.smoothing, self.scale, taken & (quality > GOOD))
        shrunk = (self.smoothing * rate).maximum(self.smoothing_end)
        self.smoothing = torch.where(taken | stalled, shrunk, self.smoothing)


def fit_channels(
    objective: Objective, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The best coefficients [n, J], their loss, the first loss, steps and status, [n] each."""
    fit = _Fit(objective, max_iterations, tolerance)
    for _ in range(max_iterations):
        if not fit.active.any():
            break
        fit.advance()
    bounded = (objective.model.reach(fit.best_x) > REACHED) & (fit.status != NONFINITE)
    status = torch.where(bounded, BOUNDED, fit.status).to(torch.int32)
    return fit.best_x, fit.best_loss, fit.initial, fit.iterations, status
