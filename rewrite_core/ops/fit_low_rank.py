"""The coefficients of a rank-R change: one nonlinear fit per output channel (DESIGN 2; paper eq. 10 to 15).

Lambda enters the layer's output through the basis maps u only, and what follows the convolution acts per
channel, so the fit splits into O independent problems of J = R kh kw unknowns each.

The algorithm ("lm"), the same in ``_reference``, csrc/fit_low_rank*.cpp and kernels/fit_low_rank.py, name for name:

- Unknowns are scaled so that every basis row has unit root mean square over the weighted pixels.
- Levenberg-Marquardt with one damping per channel: a step that does not lower the objective is not taken.
- l1: |r| becomes eta = sqrt(r^2 + smoothing^2). The curvature is (1 - dual * r / eta) / eta with a running
  estimate ``dual`` of r / eta (Chan, Golub, Mulet 1999): reweighted least squares at first (dual = 0), Newton
  near the optimum, where reweighting alone is slow.
- Leaky ReLU: the kink is rounded over a width proportional to the smoothing. Both shrink together, slowly at
  first: this continuation finds lower minima than a sharp kink from the start (1 % to 2 %, measured). After a step
  that did what was predicted they shrink faster, but for convex problems: a third of the steps less, and losses the
  same within 0.2 %.
- Demodulation divides the size of the weight out again, so that many a channel has its infimum at infinity,
  where nothing of W0 is left. Steps are therefore shortened to keep x^T quadratic x <= REACH^2 constant.
- The best iterate by the true objective is returned, so the result is never worse than no change (before its
  coefficients are rounded to the type of the data).
- Damped normal equations are solved over unknowns, or over pixels where these are fewer.

A problem that is linear (slope 1, no demodulation) with the l2 loss has its exact solution from one factor.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from ..backends import (
    Backend,
    dispatched,
    extension,
    extension_reason,
    select,
    transformed,
    triton_declines,
    triton_interpreted,
    triton_reason,
)
from ..errors import ArgumentError, NonFiniteError, RewriteCoreError, whole_number

LOSSES = ("l1", "l2")

CONVERGED, MAX_ITERATIONS, ZERO_RESIDUAL, DEGENERATE, NONFINITE, SHIFTED, BOUNDED = range(7)
STATUS = {
    CONVERGED: "converged",
    MAX_ITERATIONS: "max_iterations",  # the best iterate so far is returned
    ZERO_RESIDUAL: "zero_residual",  # the target is met without any change
    DEGENERATE: "degenerate",  # no coefficient changes the value (zero basis, gain or pixel weights): zeros
    NONFINITE: "nonfinite",  # numbers overflowed float64: zeros, or the best finite iterate
    BOUNDED: "bounded",  # demodulation: the change reached REACH times the weight's own norm and was held there
    SHIFTED: "shifted",  # exact solution of a rank-deficient problem, with the smallest diagonal shift
}

TRITON = (3, 5)  # the oldest that compiles the kernel; 3.4 (torch 2.8) takes no float64 products of tiles
MOST_UNKNOWNS = 1024  # of "triton", whose programs each keep two square matrices of that size: rank 64 takes 576 at 3x3

# Shared with csrc/fit_low_rank_isa.cpp and kernels/fit_low_rank.py.
DAMPING_START = 1e-2  # relative to the mean curvature
DAMPING_MIN = 1e-6
DAMPING_STALL = 1e6  # a rejected step this short: stationary
DAMPING_UP = 8.0  # after a rejected step; doubled for each more in a row
DAMPING_DOWN = 0.3  # after a step with GOOD of the predicted decrease; twice the damping below POOR
GOOD, POOR = 0.75, 0.1
SMOOTHING_SLOW = 3e-2  # smoothing, relative to the first residual: 1 .. SLOW slowly, SLOW .. END fast
SMOOTHING_END = 1e-5
SMOOTHING_RATE = 0.5  # the fast pace, and the only one for convex problems
SMOOTHING_FAST = 0.3  # the fast pace after a step with GOOD of the predicted decrease; the slow one is squared then
SLOW_SHARE = 0.35  # share of max_iterations that the slow part takes, where no step is good
KINK = 3.0  # width of the rounded kink, over the smoothing
REACH = 10.0  # demodulation: largest norm of the change over that of the weight, both weighted by the style
REACHED = 0.999  # share of that, squared, that counts as "bounded"
PIVOT = 1e-12  # closed form: smallest pivot of a unit-diagonal matrix that counts, and the first shift


class FitResult(NamedTuple):
    """The result of :func:`fit_low_rank`; leading dimensions as in the input.

    coefficients  [B, O, J], the dtype of ``base``
    loss          [B, O] float64, weighted mean of |r| (l1) or r^2 (l2) over the pixels, without the penalty
    initial_loss  [B, O] float64, the same without any change
    iterations    [B, O] int32, steps tried (1 for the closed form)
    status        [B, O] int32, a key of ``STATUS``
    solver        "lm" or "closed_form"
    """

    coefficients: Tensor
    loss: Tensor
    initial_loss: Tensor
    iterations: Tensor
    status: Tensor
    solver: str


class Problem(NamedTuple):
    """The custom op's arguments: fit_low_rank's, checked and batched; shift broadcast, small ones float64."""

    basis: Tensor
    base: Tensor
    target: Tensor
    shift: Tensor | None
    constant: Tensor | None
    linear: Tensor | None
    quadratic: Tensor | None
    slope: float
    gain: float
    pixel_weights: Tensor | None
    penalty: Tensor | None
    penalty_scale: Tensor | None
    loss: str
    max_iterations: int
    tolerance: float
    segments: Tensor | None = None  # then constant, linear and quadratic have a second dimension G

    @property
    def exact(self) -> bool:
        """Whether the closed form applies."""
        return self.loss == "l2" and self.slope == 1.0 and self.constant is None


def fit_low_rank(
    basis: Tensor,
    base: Tensor,
    target: Tensor,
    *,
    shift: Tensor | None = None,
    demodulation: tuple[Tensor, Tensor, Tensor] | None = None,
    slope: float = 1.0,
    gain: float = 1.0,
    pixel_weights: Tensor | None = None,
    penalty: Tensor | None = None,
    penalty_scale: Tensor | None = None,
    loss: str = "l1",
    max_iterations: int = 60,
    tolerance: float = 1e-5,
    segments: Tensor | None = None,
    backend: str = "auto",
) -> FitResult:
    """Fit x[b, o] so that channel o's value meets its target: DESIGN 2 "Finding Lambda", paper eq. 10 to 15.

        lin    = base[b, o] + x @ basis[b]
        m      = (constant + 2 linear . x + x^T quadratic x)^(-1/2), or 1 without demodulation
        value  = gain * leaky_relu(m * lin + shift[b, o], slope)
        x      = argmin sum_p w_p rho(value_p - target_p) / sum_p w_p + penalty_scale * x^T penalty x

    basis          [B, J, P]  maps the coefficients enter through; P pixels, J = R kh kw
    base, target   [B, O, P]  linear output without the change; wanted value
    shift          [B, O, P] or broadcastable to it (bias, noise), or None for 0
    demodulation   (constant [B, O] > 0, linear [B, O, J], quadratic [B, J, J]) or None
    slope, gain    of the leaky ReLU; slope 1 is the identity
    pixel_weights  [B, P] >= 0, or None for 1; 0 removes the pixel (to pad edits of unequal size)
    penalty        [B, J, J] positive semidefinite, with penalty_scale [B, O] >= 0 (None: 1); or None
    loss           "l1": rho = |r|; "l2": rho = r^2
    max_iterations steps per channel. It also sets the pace of the continuation: more steps, lower minima
    tolerance      stop when a step lowers the objective by less than this share of it
    segments       [B, P] integers: pixel p has demodulation segments[b, p] of G, and demodulation is (constant
                   [B, G, O], linear [B, G, O, J], quadratic [B, G, J, J]): for pixels of pictures with styles of their
                   own. None: all pixels have one
    backend        "auto", "triton", "cpp" or "reference" (see ``rc.explain()``)

    All may lack B (then basis is [J, P], base [O, P], constant [O], ...); so does the result. basis, base,
    target and shift: one dtype, float32 or float64, one device; the others any floating dtype. Arithmetic is
    float64. "cpp" gives the same bits for any number of threads, "triton" from run to run (on GPUs of one kind with one
    cache of measured configurations, ``$XDG_CACHE_HOME/rewrite_core``). Not differentiable: gradients stop here.

    Returns a :class:`FitResult`. Never NaN: a channel that cannot be fitted says so in ``status``.
    Raises ArgumentError for a wrong type; RewriteCoreError (a ValueError) for a wrong shape, a negative weight or
    an unknown loss; NonFiniteError (also a ValueError) for NaN or infinity. Tensors on a GPU are not looked into, as
    that would wait for it, and tensors that ``torch.func`` transforms cannot be: NaN, infinity and wrong signs then make
    the status of the channels concerned "nonfinite" (or "degenerate", where no weight is positive).
    SciPy: ``scipy.optimize.least_squares(loss="soft_l1" or "linear", method="lm")`` per channel.
    """
    problem = _check(
        basis,
        base,
        target,
        shift,
        demodulation,
        slope,
        gain,
        pixel_weights,
        penalty,
        penalty_scale,
        loss,
        max_iterations,
        tolerance,
        segments,
    )
    if dispatched(base):
        outputs = torch.ops.rewrite_core.fit_low_rank(*problem, backend)
    else:  # what the op does, without checking a second time
        outputs = select("fit_low_rank", backend, *problem).load()(problem)
    if basis.ndim == 2:
        outputs = [output[0] for output in outputs]
    return FitResult(*outputs, "closed_form" if problem.exact else "lm")


def _check(
    basis,
    base,
    target,
    shift,
    demodulation,
    slope,
    gain,
    pixel_weights,
    penalty,
    penalty_scale,
    loss,
    max_iterations,
    tolerance,
    segments=None,
) -> Problem:
    for name, data in (("base", base), ("basis", basis), ("target", target), ("shift", shift)):
        if data is None and name == "shift":
            continue
        if not isinstance(data, Tensor):
            raise ArgumentError(f"{name} must be a torch tensor, not {type(data).__name__}: use torch.as_tensor.")
        if data.is_nested:
            raise ArgumentError(f"{name} is a nested tensor: pad the edits with pixels of weight 0.")
        if data.dtype not in (torch.float32, torch.float64):
            raise ArgumentError(f"{name} is {data.dtype} and must be float32 or float64: convert it with .float().")
        if data.dtype != base.dtype:
            raise ArgumentError(f"{name} is {data.dtype} and base is {base.dtype}: convert one to the other's type.")
    if loss not in LOSSES:
        raise RewriteCoreError(f"there is no loss {loss!r}: use 'l1' (absolute) or 'l2' (square).")
    max_iterations = whole_number("max_iterations", max_iterations)
    for name, number in (("slope", slope), ("gain", gain), ("tolerance", tolerance)):
        if not math.isfinite(number) or (name == "tolerance" and number < 0):
            raise RewriteCoreError(f"{name} must be a finite number{' >= 0' * (name == 'tolerance')}, not {number}.")
    if basis.ndim not in (2, 3):
        raise RewriteCoreError(f"basis must be [B, J, P] or [J, P], not {list(basis.shape)}.")
    batched = basis.ndim == 3
    if demodulation is not None and (len(demodulation) != 3 or any(part is None for part in demodulation)):
        raise RewriteCoreError("demodulation must be three tensors (constant, linear, quadratic), or None.")
    if penalty is None and penalty_scale is not None:
        raise RewriteCoreError("penalty_scale was given without a penalty: pass both, or neither.")

    if base.ndim != basis.ndim:
        raise RewriteCoreError(f"base must be {'[B, O, P]' if batched else '[O, P]'}, not {list(base.shape)}.")
    edits, unknowns, pixels = basis.shape if batched else (1, *basis.shape)
    channels = base.shape[-2]
    if not unknowns or not pixels:
        raise RewriteCoreError(f"basis is {list(basis.shape)}: it needs at least one row and one pixel.")
    sizes = {"B": edits, "O": channels, "J": unknowns, "P": pixels}
    constant, linear, quadratic = demodulation or (None, None, None)
    several = ""
    if segments is not None:
        if constant is None:
            raise RewriteCoreError("segments say which demodulation a pixel has: pass demodulation too, or neither.")
        if isinstance(segments, Tensor) and (segments.is_floating_point() or segments.dtype == torch.bool):
            raise ArgumentError(f"segments is {segments.dtype} and must hold integers: convert it with .long().")
        several = "G"
        if isinstance(constant, Tensor) and constant.ndim == 2 + batched:
            sizes["G"] = constant.shape[-2]
        if not sizes.get("G"):
            raise RewriteCoreError("with segments demodulation's constant must be [B, G, O], G at least 1.")
    known = not transformed()
    here = known and base.device.type == "cpu"  # elsewhere a look at the numbers waits for everything before them

    def take(name: str, data: Tensor | None, axes: str, dtype: torch.dtype) -> Tensor | None:
        if data is None:
            return None
        if not isinstance(data, Tensor):
            raise ArgumentError(f"{name} must be a torch tensor, not {type(data).__name__}: use torch.as_tensor.")
        if data.device != base.device:
            raise RewriteCoreError(f"{name} is on {data.device} and base on {base.device}: move one to the other.")
        axes = axes if batched else axes[1:]
        shape = [sizes[axis] for axis in axes]
        data = data.detach()
        if (
            name == "shift"
            and data.ndim <= len(shape)
            and all(have in (1, want) for have, want in zip(reversed(data.shape), reversed(shape)))
        ):
            data = data.expand(shape)
        if list(data.shape) != shape:
            raise RewriteCoreError(
                f"{name} must be [{', '.join(axes)}] = {shape} to go with basis and base, not {list(data.shape)}."
            )
        if here and not data.isfinite().all():
            raise NonFiniteError(f"{name} holds NaN or infinity: check the generator's activations and weights.")
        return (data if batched else data[None]).to(dtype)

    wide = torch.float64
    basis_ = take("basis", basis, "BJP", base.dtype)
    base_ = take("base", base, "BOP", base.dtype)
    target_ = take("target", target, "BOP", base.dtype)
    shift_ = take("shift", shift, "BOP", base.dtype)
    constant = take("demodulation's constant", constant, f"B{several}O", wide)
    linear = take("demodulation's linear", linear, f"B{several}OJ", wide)
    quadratic = take("demodulation's quadratic", quadratic, f"B{several}JJ", wide)
    segments = take("segments", segments, "BP", torch.int64)
    if known and segments is not None and not ((segments >= 0) & (segments < sizes["G"])).all():
        raise RewriteCoreError(f"segments must be from 0 to {sizes['G'] - 1}, as there are {sizes['G']} demodulations.")
    if here and constant is not None and not (constant > 0).all():
        raise RewriteCoreError("demodulation's constant must be positive: it is a squared norm plus epsilon.")
    weights = take("pixel_weights", pixel_weights, "BP", wide)
    penalty = take("penalty", penalty, "BJJ", wide)
    scale = take("penalty_scale", penalty_scale, "BO", wide)
    if penalty is not None and scale is None:
        scale = base.new_ones((edits, channels), dtype=wide)
    for name, data in (("pixel_weights", weights), ("penalty_scale", scale)):
        if here and data is not None and (data < 0).any():
            raise RewriteCoreError(f"{name} has a negative entry: they must be zero or positive.")
    if not here:  # what is refused above comes out as "nonfinite"
        weights, scale = (None if a is None else torch.where(a >= 0, a, torch.nan) for a in (weights, scale))
    quadratic, penalty = (None if a is None else (a + a.mT) / 2 for a in (quadratic, penalty))
    if segments is not None:  # a demodulation of no pixel that counts limits no step
        every = torch.arange(sizes["G"], device=segments.device)
        used = segments[:, None] == every[:, None]  # [B, G, P]
        used = (used if weights is None else used & (weights > 0)[:, None]).any(-1, keepdim=True)
        constant = torch.where(used, constant, 1.0)
        linear, quadratic = linear * used[..., None], quadratic * used[..., None]
    return Problem(
        basis_,
        base_,
        target_,
        shift_,
        constant,
        linear,
        quadratic,
        float(slope),
        float(gain),
        weights,
        penalty,
        scale,
        loss,
        max_iterations,
        float(tolerance),
        segments,
    )


class _Model:
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
    model: _Model, weights: Tensor, penalty: Tensor | None, loss: str, max_iterations: int, tolerance: float
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
        status[~(scale > 1e-15 * level)] = ZERO_RESIDUAL
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
        new = objective(residual(new_lin, new_m, smoothing)[0], smoothing, new_x)
        taken = active & good & (new < now)  # False for NaN
        drop = now - new
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
        stalled = active & ~taken & ((damping > DAMPING_STALL) | (good & (predicted <= 1e-12 * now)))
        at_end = smoothing <= smoothing_end
        damping = (damping * torch.where(taken, factor, growth)).clamp_min(DAMPING_MIN)
        growth = torch.where(taken, DAMPING_UP, growth * 2)
        damping = torch.where(stalled, DAMPING_START, damping)
        small = taken & (drop <= tolerance * now)
        if not absolute:
            small = small | (taken & (new <= (1e-10 * scale) ** 2))
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


def _fit_exactly(model: _Model, weights: Tensor, penalty: Tensor | None, penalty_scale: Tensor | None):
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
    for power in (None, *range(12)):  # no shift, then PIVOT, 10 PIVOT, ...: the smallest that factors
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
    for _ in range(3):  # each time the shift's error shrinks by shift / eigenvalue
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
        status[~(initial.sqrt() > 1e-15 * level)] = ZERO_RESIDUAL
    status[~initial.isfinite() | (pending & (size != 0)).expand(len(x))] = NONFINITE
    keep = worse | (status > MAX_ITERATIONS) & (status != SHIFTED)
    return torch.where(keep[:, None], zero, x), torch.where(keep, initial, data), initial, 1, status


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _reference(problem: Problem) -> Outputs:
    basis, base = problem.basis, problem.base
    coefficients, final, initial, iterations, status = outputs = _empty(basis, base)
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
            model = _Model(
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


def _empty(basis: Tensor, base: Tensor) -> Outputs:
    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return base.new_empty(*base.shape[:2], *shape, dtype=dtype)

    wide, count = torch.float64, torch.int32
    return (
        empty(basis.shape[1], dtype=base.dtype),
        empty(dtype=wide),
        empty(dtype=wide),
        empty(dtype=count),
        empty(dtype=count),
    )


def _cpp(problem: Problem, isa: str = "") -> Outputs:
    outputs = _empty(problem.basis, problem.base)
    # Kept alive until the call returns. A broadcast shift is read where it lies.
    inputs = [
        data if data is None or name == "shift" else data.contiguous()
        for name, data in zip(Problem._fields, problem)
        if data is None or isinstance(data, Tensor)
    ]
    edits, unknowns, pixels = problem.basis.shape
    styles = 1 if problem.segments is None else problem.constant.shape[1]
    extension().fit_low_rank(
        inputs=[0 if data is None else data.data_ptr() for data in inputs],
        shift_strides=(0, 0, 0) if problem.shift is None else problem.shift.stride(),
        is_double=problem.base.dtype == torch.float64,
        sizes=(edits, problem.base.shape[1], unknowns, pixels, styles),
        slope=problem.slope,
        gain=problem.gain,
        absolute=problem.loss == "l1",
        max_iterations=problem.max_iterations,
        tolerance=problem.tolerance,
        outputs=[data.data_ptr() for data in outputs],
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return outputs


def _cpp_supports(basis: Tensor, *args: object) -> str | None:
    if basis.device.type != "cpu":
        return f"it reads CPU tensors, and the basis is on {basis.device}"
    return extension_reason()


def _triton(problem: Problem) -> Outputs:
    from ..kernels.fit_low_rank import launch

    return launch(problem)


def _triton_supports(basis: Tensor, *args: Tensor | float | str | None) -> str | None:
    reason = triton_reason(TRITON)
    if reason is None and Problem(basis, *args).segments is not None:
        reason = "it has one demodulation per edit, and segments ask for several"
    if reason is None and basis.device.type != "cuda" and not triton_interpreted():
        reason = f"it reads CUDA tensors, and the basis is on {basis.device}"
    if reason is None and basis.shape[1] > MOST_UNKNOWNS:
        reason = (
            f"it takes up to {MOST_UNKNOWNS} unknowns per channel, and there are {basis.shape[1]}: use a lower rank"
        )
    return reason


def _triton_declines(basis: Tensor, *args: object) -> str | None:
    return triton_declines(basis.device)


BACKENDS = (
    Backend("fit_low_rank", "triton", f"{__name__}:_triton", _triton_supports, _triton_declines),
    Backend("fit_low_rank", "cpp", f"{__name__}:_cpp", _cpp_supports),
    Backend("fit_low_rank", "reference", f"{__name__}:_reference"),
)


def example(device: str) -> Problem:
    basis, base = torch.ones(1, 9, 16, device=device), torch.zeros(1, 4, 16, device=device)
    return Problem(basis, base, base, None, None, None, None, 1.0, 1.0, None, None, None, "l1", 1, 0.0)


# define + impl and not custom_op, whose first call imports torch._dynamo: more than a second of CPU time.
library.define(
    "rewrite_core::fit_low_rank",
    "(Tensor basis, Tensor base, Tensor target, Tensor? shift, Tensor? constant, Tensor? linear, "
    "Tensor? quadratic, float slope, float gain, Tensor? pixel_weights, Tensor? penalty, Tensor? penalty_scale, "
    "str loss, int max_iterations, float tolerance, Tensor? segments=None, str backend='auto') "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _verify(problem: Problem) -> None:
    """For those who call torch.ops: the kernels trust what they are given."""
    basis, base = problem.basis, problem.base
    if basis.ndim != 3 or base.ndim != 3:
        raise RewriteCoreError("basis must be [B, J, P] and base [B, O, P]: call rewrite_core.ops.fit_low_rank.")
    (edits, unknowns, pixels), channels = basis.shape, base.shape[1]
    main, wide = (torch.float32, torch.float64), (torch.float64,)
    wanted = {
        "basis": ((edits, unknowns, pixels), main),
        "base": ((edits, channels, pixels), main),
        "target": ((edits, channels, pixels), main),
        "shift": ((edits, channels, pixels), main),
        "constant": ((edits, channels), wide),
        "linear": ((edits, channels, unknowns), wide),
        "quadratic": ((edits, unknowns, unknowns), wide),
        "pixel_weights": ((edits, pixels), wide),
        "penalty": ((edits, unknowns, unknowns), wide),
        "penalty_scale": ((edits, channels), wide),
    }
    if problem.segments is not None:
        if problem.constant is None or problem.constant.ndim != 3:
            raise RewriteCoreError("segments need demodulation's [B, G, O]: call rewrite_core.ops.fit_low_rank.")
        for name in ("constant", "linear", "quadratic"):
            (first, *rest), dtypes = wanted[name]
            wanted[name] = (first, problem.constant.shape[1], *rest), dtypes
        wanted["segments"] = (edits, pixels), (torch.int64,)
    for name, (shape, dtypes) in wanted.items():
        data = getattr(problem, name)
        if data is None:
            continue
        if data.shape != shape or data.dtype not in dtypes or data.device != base.device:
            raise RewriteCoreError(f"{name} has the wrong shape, type or device: call rewrite_core.ops.fit_low_rank.")
        if dtypes is main and data.dtype != base.dtype:
            raise RewriteCoreError(f"{name} is {data.dtype} and base is {base.dtype}: they must be equal.")
    for names in (("constant", "linear", "quadratic"), ("penalty", "penalty_scale")):
        if len({getattr(problem, name) is None for name in names}) > 1:
            raise RewriteCoreError(f"{', '.join(names)} come together, or not at all.")
    segments = problem.segments
    if segments is not None and not ((segments >= 0) & (segments < problem.constant.shape[1])).all():
        raise RewriteCoreError("segments must be indices of demodulations: call rewrite_core.ops.fit_low_rank.")
    if not unknowns or not pixels or problem.loss not in LOSSES or problem.max_iterations < 1:
        raise RewriteCoreError("an empty basis, an unknown loss or no iterations: call rewrite_core.ops.fit_low_rank.")


@library.impl("rewrite_core::fit_low_rank", "CompositeExplicitAutograd")
def _op(*args: Any) -> Outputs:
    arguments = list(args)
    backend = arguments.pop() if len(arguments) > len(Problem._fields) else "auto"
    problem = Problem(*arguments)
    _verify(problem)
    return select("fit_low_rank", backend, *problem).load()(problem)


@library.register_fake("rewrite_core::fit_low_rank")
def _(basis: Tensor, base: Tensor, *args: Any) -> Outputs:
    return _empty(basis, base)
