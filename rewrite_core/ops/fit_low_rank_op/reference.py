"""``fit_low_rank`` in plain PyTorch, float64. The kernels mirror it name for name."""

from __future__ import annotations

import torch
from torch import Tensor

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
    PIVOT,
    POOR,
    REACH,
    REACHED,
    REFINEMENTS,
    SHIFTED,
    SHIFTS,
    SLOW_SHARE,
    SMOOTHING_END,
    SMOOTHING_FAST,
    SMOOTHING_RATE,
    SMOOTHING_SLOW,
    STATIONARY,
    ZERO_RESIDUAL,
    FitLowRankProblem,
    Outputs,
    empty_outputs,
)


class Model:
    """Value, residual and derivatives of n channels of one edit; float64, unknowns scaled. G demodulations."""

    def __init__(self, basis, base, target, shift, constant, linear, quadratic, slope, gain, segments=None) -> None:
        self.basis, self.base, self.target, self.slope, self.gain = basis, base, target, slope, gain
        self.shift = torch.zeros_like(base) if shift is None else shift
        # [G, n], [G, n, J], [G, J, J]
        self.constant, self.linear, self.quadratic = constant, linear, quadratic
        self.segments = segments  # [P], or None where G is 1

    def spread(self, own: Tensor) -> Tensor:
        """What is each demodulation's own, [n, G, ...], for the pixels: [n, P, ...], or [n, 1, ...] where G is 1."""
        return own if self.segments is None else own[:, self.segments]

    def linearise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """lin [n, P], m [n, G], dm [n, G, J] or None."""
        lin = self.base + x @ self.basis
        if self.constant is None:
            return lin, torch.ones_like(lin[:, :1]), None
        half = self.linear + x @ self.quadratic  # half the gradient of the squared norm
        m = (self.constant + ((self.linear + half) * x).sum(-1)).rsqrt()  # NaN where not positive: rejected
        return lin, m.mT, (-(m[..., None] ** 3) * half).transpose(0, 1)

    def reach(self, x: Tensor) -> Tensor:
        """x^T quadratic x over its largest allowed value, [n], for the demodulation where that is most; 0 without."""
        if self.constant is None:
            return torch.zeros_like(x[:, 0])
        return (((x @ self.quadratic) * x).sum(-1) / (REACH**2 * self.constant)).amax(0)

    def residual(self, lin: Tensor, m: Tensor, kink: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """r and two derivatives of the value by m lin; the kink is rounded over a width [n], or sharp."""
        pre = self.spread(m) * lin + self.shift
        if kink is None:
            steep = self.gain * torch.where(pre > 0, torch.ones_like(pre), self.slope)
            return steep * pre - self.target, steep, torch.zeros_like(steep)
        square = kink[:, None] ** 2
        root = (pre * pre + square).sqrt()
        up, down = 0.5 * self.gain * (1 + self.slope), 0.5 * self.gain * (1 - self.slope)
        return up * pre + down * root - self.target, up + down * pre / root, down * square / root**3

    def jacobian(self, lin: Tensor, m: Tensor, dm: Tensor | None) -> Tensor:
        """d (m lin) / dx, [n, J, P]."""
        rows = self.spread(m)[:, None] * self.basis
        return rows if dm is None else rows + self.spread(dm).mT * lin[:, None, :]


def _damped_step(rows, curvature, slopes, gradient, penalty, damping, dual_form) -> tuple[Tensor, Tensor, Tensor]:
    """-(H + mu I)^-1 gradient with H = rows diag(curvature) rows^T + penalty; also mu and whether it exists.

    In dual form (fewer pixels than unknowns, no penalty) the system is over pixels:
    step = -rows S (S rows^T rows S + mu I)^-1 S^-1 slopes, S = sqrt(curvature), gradient = rows slopes.
    """
    unknowns = rows.shape[1]
    if dual_form:
        root = curvature.sqrt()
        matrix = root[:, :, None] * (rows.mT @ rows) * root[:, None, :]
        right = torch.where(root > 0, slopes / root, 0.0)
    else:
        matrix = (rows * curvature[:, None, :]) @ rows.mT
        right = gradient
        if penalty is not None:
            matrix = matrix + penalty
    mean = matrix.diagonal(dim1=1, dim2=2).sum(-1) / unknowns
    mu = damping * mean
    factor, info = torch.linalg.cholesky_ex(matrix + torch.diag_embed(mu[:, None].expand_as(right)))
    step = -torch.cholesky_solve(right[..., None], factor)
    step = (rows @ (root[..., None] * step) if dual_form else step)[..., 0]
    good = (info == 0) & step.isfinite().all(-1)
    return torch.where(good[:, None], step, 0.0), mean, good


def _fit_channels(
    model: Model, weights: Tensor, penalty: Tensor | None, loss: str, max_iterations: int, tolerance: float
) -> tuple[Tensor, ...]:
    """Levenberg-Marquardt on n channels at once; weights [P] sum to 1; penalty [n, J, J] or None."""
    n, unknowns = len(model.base), len(model.basis)
    absolute, rounded = loss == "l1", model.slope != 1.0
    convex = not rounded and model.constant is None
    dual_form = penalty is None and unknowns > (weights > 0).sum()
    slow_rate = SMOOTHING_RATE if convex else SMOOTHING_SLOW ** (1 / (SLOW_SHARE * max_iterations))
    slow_rate_well, fast_rate_well = (SMOOTHING_RATE,) * 2 if convex else (slow_rate**2, SMOOTHING_FAST)

    def penalised(x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, 0]) if penalty is None else (x * (penalty @ x[..., None])[..., 0]).sum(-1)

    def true_objective(lin: Tensor, m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and with the penalty."""
        r = model.residual(lin, m)[0]
        data = (weights * (r.abs() if absolute else r * r)).sum(-1)
        return data, data + penalised(x)

    def residual(lin: Tensor, m: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return model.residual(lin, m, KINK / abs(model.gain) * smoothing if rounded else None)

    def objective(r: Tensor, smoothing: Tensor, x: Tensor) -> Tensor:
        rho = (r * r + smoothing[:, None] ** 2).sqrt() if absolute else r * r
        return (weights * rho).sum(-1) + penalised(x)

    x = model.base.new_zeros(n, unknowns)
    lin, m, dm = model.linearise(x)
    initial, best = true_objective(lin, m, x)
    best_loss, best_x = initial.clone(), x.clone()
    scale = initial if absolute else initial.sqrt()
    smoothing_end = SMOOTHING_END * scale
    smoothing = scale.clone() if absolute or rounded else smoothing_end.clone()
    damping = torch.full_like(scale, DAMPING_START)
    growth = torch.full_like(scale, DAMPING_UP)
    one = torch.ones_like(scale)  # between two numbers torch.where would choose float32
    dual = torch.zeros_like(lin)
    iterations = torch.zeros(n, dtype=torch.int32, device=x.device)
    status = torch.full_like(iterations, MAX_ITERATIONS)
    level = (weights * model.target.abs()).sum(-1)
    finite = initial.isfinite() & level.isfinite()
    if model.gain == 0 or not weights.any():
        status.fill_(DEGENERATE)
    if weights.any():
        status[~(scale > NEGLIGIBLE * level)] = ZERO_RESIDUAL
    status[~finite] = NONFINITE
    active = status == MAX_ITERATIONS

    for _ in range(max_iterations):
        if not active.any():
            break
        r, steep, bend = residual(lin, m, smoothing)
        now = objective(r, smoothing, x)
        if absolute:
            eta = (r * r + smoothing[:, None] ** 2).sqrt()
            slopes, curvature = weights * r / eta, weights * (1 - dual * r / eta) / eta
        else:
            slopes, curvature = 2 * weights * r, (2 * weights).expand_as(r)
        curvature = curvature * steep * steep + (slopes * bend).clamp_min(0.0)  # the convex half of the bend
        slopes = slopes * steep
        rows = model.jacobian(lin, m, dm)
        gradient = (rows @ slopes[..., None])[..., 0]
        if penalty is not None:
            gradient = gradient + 2 * (penalty @ x[..., None])[..., 0]
        step, mean, good = _damped_step(
            rows, curvature, slopes, gradient, None if penalty is None else 2 * penalty, damping, dual_form
        )
        flat = active & (mean == 0)  # nothing bends: no coefficient matters here
        status[flat] = torch.where(iterations[flat] == 0, DEGENERATE, CONVERGED).to(torch.int32)
        broken = active & ~(mean.isfinite() & now.isfinite())
        status[broken] = NONFINITE
        active = active & ~flat & ~broken
        iterations += active

        predicted = 0.5 * (damping * mean * step.square().sum(-1) - (gradient * step).sum(-1))
        new_x = x + step
        far = model.reach(new_x)[:, None]
        new_x = torch.where(far > 1, new_x * far.rsqrt(), new_x)  # back to where W0 still counts
        step = torch.where(far > 1, new_x - x, step)
        new_lin, new_m, new_dm = model.linearise(new_x)
        after = objective(residual(new_lin, new_m, smoothing)[0], smoothing, new_x)
        taken = active & good & (after < now)  # False for NaN
        drop = now - after
        if absolute:
            change = (model.spread(m) * (new_lin - lin)) * steep
            if dm is not None:
                change = change + lin * model.spread((dm * step[:, None]).sum(-1)) * steep
            new_dual = (r + change - dual * (r / eta) * change) / eta
            dual = torch.where(taken[:, None], new_dual.clamp(-1.0, 1.0), dual)
        keep = taken[:, None]
        x, lin, m = torch.where(keep, new_x, x), torch.where(keep, new_lin, lin), torch.where(keep, new_m, m)
        if dm is not None:
            dm = torch.where(keep[..., None], new_dm, dm)
        data, true = true_objective(lin, m, x)
        better = taken & (true < best)
        best, best_loss = torch.where(better, true, best), torch.where(better, data, best_loss)
        best_x = torch.where(better[:, None], x, best_x)

        quality = drop / predicted
        factor = torch.where(quality > GOOD, DAMPING_DOWN, torch.where(quality > POOR, one, 2.0))
        stalled = active & ~taken & ((damping > DAMPING_STALL) | (good & (predicted <= STATIONARY * now)))
        at_end = smoothing <= smoothing_end
        damping = (damping * torch.where(taken, factor, growth)).clamp_min(DAMPING_MIN)
        growth = torch.where(taken, DAMPING_UP, growth * 2)
        damping = torch.where(stalled, DAMPING_START, damping)
        small = taken & (drop <= tolerance * now)
        if not absolute:
            small = small | (taken & (after <= (EXACT * scale) ** 2))
        done = active & at_end & (small | stalled)
        status[done] = CONVERGED
        active = active & ~done
        well = taken & (quality > GOOD)
        slow = torch.where(well, slow_rate_well * one, slow_rate)
        fast = torch.where(well, fast_rate_well * one, SMOOTHING_RATE)
        rate = torch.where(smoothing > SMOOTHING_SLOW * scale, slow, fast)
        smoothing = torch.where(taken | stalled, (smoothing * rate).maximum(smoothing_end), smoothing)
    bounded = (model.reach(best_x) > REACHED) & (status != NONFINITE)
    status = torch.where(bounded, BOUNDED, status).to(torch.int32)
    return best_x, best_loss, initial, iterations, status


def _fit_exactly(model: Model, weights: Tensor, penalty: Tensor | None, penalty_scale: Tensor | None):
    """The linear l2 problem of n channels by one factor, or one per channel where penalty_scale differs."""
    wanted = model.target - model.gain * (model.base + model.shift)
    gram = model.gain**2 * (model.basis * weights) @ model.basis.T
    right = model.gain * (wanted * weights) @ model.basis.T
    matrix = gram[None]
    if penalty is not None:
        shared = bool((penalty_scale == penalty_scale[0]).all())
        matrix = gram + (penalty_scale[:1] if shared else penalty_scale)[:, None, None] * penalty
    size = matrix.diagonal(dim1=1, dim2=2).amax(-1)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    added, pending = torch.zeros_like(size), torch.ones_like(size, dtype=torch.bool)
    factor = torch.zeros_like(matrix)
    for power in (None, *range(SHIFTS)):  # no shift, then PIVOT, 10 PIVOT, ...: the smallest that factors
        added = torch.where(pending, 0.0 if power is None else PIVOT * 10.0**power * size, added)
        trial, info = torch.linalg.cholesky_ex(matrix + added[:, None, None] * eye)
        good = (info == 0) & (trial.diagonal(dim1=1, dim2=2).square().amin(-1) > 0.5 * PIVOT * size)
        factor = torch.where((pending & good)[:, None, None], trial, factor)
        pending = pending & ~good
        if not pending.any():
            break

    def objective(x: Tensor) -> tuple[Tensor, Tensor]:
        data = (weights * (model.gain * (x @ model.basis) - wanted) ** 2).sum(-1)
        if penalty is None:
            return data, data
        return data, data + penalty_scale * (x * (x @ penalty)).sum(-1)

    zero = torch.zeros_like(right)
    x = zero
    for _ in range(REFINEMENTS):  # each time the shift's error shrinks by shift / eigenvalue
        rest = right - (matrix @ x[..., None])[..., 0]
        x = x + torch.cholesky_solve(rest[..., None], factor.expand(len(x), -1, -1))[..., 0]
    (initial, first), (data, last) = objective(zero), objective(x)
    worse = ~(last < first)  # also NaN
    status = torch.where(added > 0, SHIFTED, CONVERGED).expand(len(x)).clone()
    level = (weights * model.target.abs()).sum(-1)
    status[(size == 0).expand(len(x))] = DEGENERATE
    if model.gain == 0 or not weights.any():
        status.fill_(DEGENERATE)
    if weights.any():
        status[~(initial.sqrt() > NEGLIGIBLE * level)] = ZERO_RESIDUAL
    status[~initial.isfinite() | (pending & (size != 0)).expand(len(x))] = NONFINITE
    keep = worse | (status > MAX_ITERATIONS) & (status != SHIFTED)
    return torch.where(keep[:, None], zero, x), torch.where(keep, initial, data), initial, 1, status


def run_reference(problem: FitLowRankProblem) -> Outputs:
    basis, base = problem.basis, problem.base
    coefficients, final, initial, iterations, status = outputs = empty_outputs(basis, base)
    edits, unknowns, pixels = basis.shape
    block = max(1, (1 << 24) // (unknowns * (pixels + unknowns)))  # channels at a time: bounds the memory

    def wide(data: Tensor | None, part: object) -> Tensor | None:
        return None if data is None else data[part].double()

    for b in range(edits):
        rows = basis[b].double()
        weights = wide(problem.pixel_weights, b)
        weights = torch.ones_like(rows[0]) if weights is None else weights
        weights = weights / weights.sum().clamp_min(torch.finfo(torch.float64).tiny)
        size = (weights * rows.square()).sum(-1).sqrt()
        size = torch.where(size > 0, size, 1.0)
        square = size * size[:, None]
        segments = None if problem.segments is None else problem.segments[b]

        def demodulations(data: Tensor | None) -> Tensor | None:  # [G, ...]
            return data if data is None or problem.segments is not None else data[:, None]

        constants, linears, quadratics = map(demodulations, (problem.constant, problem.linear, problem.quadratic))
        quadratic = None if quadratics is None else quadratics[b] / square
        penalty = None if problem.penalty is None else problem.penalty[b] / square
        for o in range(0, base.shape[1], block):
            part = (b, slice(o, o + block))
            own = (b, slice(None), part[1])
            linear = None if linears is None else linears[own] / size
            model = Model(
                rows / size[:, None],
                wide(base, part),
                wide(problem.target, part),
                wide(problem.shift, part),
                wide(constants, own),
                linear,
                quadratic,
                problem.slope,
                problem.gain,
                segments,
            )
            scale = wide(problem.penalty_scale, part)
            if problem.exact:
                x, *rest = _fit_exactly(model, weights, penalty, scale)
            else:
                each = None if penalty is None else scale[:, None, None] * penalty
                x, *rest = _fit_channels(model, weights, each, problem.loss, problem.max_iterations, problem.tolerance)
            coefficients[part] = (x / size).to(coefficients.dtype)
            final[part], initial[part], iterations[part], status[part] = rest
    huge = ~coefficients.isfinite().all(-1)  # too large for the output's type
    coefficients[huge], final[huge], status[huge] = 0, initial[huge], NONFINITE
    return outputs
