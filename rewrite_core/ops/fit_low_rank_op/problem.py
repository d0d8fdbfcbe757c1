"""The coefficients of a rank-R change: one nonlinear fit per output channel (docs/method.md; paper eq. 10 to 15).

Lambda enters the layer's output through the basis maps u only, and what follows the convolution acts per
channel, so the fit splits into O independent problems of J = R kh kw unknowns each.

The algorithm ("lm"), the same in reference.py, csrc/fit_low_rank*.cpp and kernels/fit_low_rank, name for name:

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

import contextlib
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends import transformed
from ...errors import ArgumentError, NonFiniteError, RewriteCoreError, number, whole_number
from ..finite import all_finite
from ..losses import LOSSES
from ..memory import check_dense

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

# Shared with kernels/fit_low_rank; csrc/fit_low_rank/constants.h repeats them, and a test compares.
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
SHIFTS = 12  # closed form: shifts that are tried, each ten times the one before
REFINEMENTS = 3  # closed form: solves, each for what those before left over
NEGLIGIBLE = 1e-15  # a first residual below this share of the target's level is zero
STATIONARY = 1e-12  # a rejected step that was to lower the objective by less than this share of it: stationary
EXACT = 1e-10  # l2: a residual below this share of the first one ends the fit


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


class FitLowRankProblem(NamedTuple):
    """The operator's arguments: fit_low_rank's, checked and batched; shift broadcast, small ones float64."""

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

    @property
    def solver(self) -> str:
        return "closed_form" if self.exact else "lm"


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

AXES = {  # of each tensor: B edits, O channels, J unknowns, P pixels
    "basis": "BJP",
    "base": "BOP",
    "target": "BOP",
    "shift": "BOP",
    "constant": "BO",  # with segments these three have G demodulations after B
    "linear": "BOJ",
    "quadratic": "BJJ",
    "pixel_weights": "BP",
    "penalty": "BJJ",
    "penalty_scale": "BO",
    "segments": "BP",
}
DEMODULATION = ("constant", "linear", "quadratic")
DATA = ("basis", "base", "target", "shift")  # of one type, float32 or float64; the others are float64


def is_plain(given: FitLowRankProblem) -> bool:
    """Whether the caller gave nothing but data, on the CPU, which the kernels can read as it is: then :func:`prepare`
    would change nothing but add the dimension B, and refuse nothing but NaN and infinity. Of a small closed form all
    that prepare does would take longer than the kernel."""
    basis, base, target, shift = given[:4]
    weights, penalty, scale = given.pixel_weights, given.penalty, given.penalty_scale
    data_alone = (
        given.constant is given.linear is given.quadratic is weights is penalty is scale is given.segments is None
    )
    if not data_alone or type(base) is not Tensor:
        return False
    dtype = base.dtype
    for data in (basis, base, target, base if shift is None else shift):
        if type(data) is not Tensor or data.is_nested or data.layout is not torch.strided or not data.is_cpu:
            return False
        if data.dtype is not dtype or data.requires_grad or data.is_neg():
            return False
    rows, shape = basis.shape, base.shape
    return (
        (dtype is torch.float32 or dtype is torch.float64)
        and (len(rows) == len(shape) == 2 or (len(rows) == len(shape) == 3 and rows[0] == shape[0]))
        and target.shape == shape
        and (shift is None or shift.shape == shape)
        and rows[-2] > 0
        and shape[-2] > 0
        and rows[-1] == shape[-1] > 0
        and basis.is_contiguous()
        and base.is_contiguous()
        and target.is_contiguous()
        and type(given.slope) is type(given.gain) is type(given.tolerance) is float
        and math.isfinite(given.slope)
        and math.isfinite(given.gain)
        and 0 <= given.tolerance < math.inf
        and type(given.max_iterations) is int
        and 1 <= given.max_iterations < 2**31
        and given.loss in LOSSES
    )


def prepare(given: FitLowRankProblem, demodulation: tuple[Tensor, Tensor, Tensor] | None) -> FitLowRankProblem:
    """The arguments of :func:`fit_low_rank`, looked at and batched, small ones in float64."""
    if demodulation is not None and (len(demodulation) != 3 or any(part is None for part in demodulation)):
        raise RewriteCoreError("demodulation must be three tensors (constant, linear, quadratic), or None.")
    if demodulation is not None:
        constant, linear, quadratic = demodulation
        given = given._replace(constant=constant, linear=linear, quadratic=quadratic)
    tensors = {name: getattr(given, name) for name in AXES}
    for name, data in tensors.items():
        if data is None and name not in ("basis", "base", "target"):
            continue
        if not isinstance(data, Tensor):
            raise ArgumentError(
                f"{_label(name)} must be a torch tensor, not {type(data).__name__}: use torch.as_tensor."
            )
        if data.is_nested:
            raise ArgumentError(f"{_label(name)} is a nested tensor: pad the edits with pixels of weight 0.")
        check_dense(_label(name), data)
    batched = given.basis.ndim == 3

    def ready(name: str, data: Tensor) -> Tensor:
        data = data.detach()
        if name == "shift":
            with contextlib.suppress(RuntimeError):  # one that does not broadcast is refused below
                data = data.expand(given.base.shape)
        if name == "segments" and (data.is_floating_point() or data.dtype == torch.bool):
            raise ArgumentError(f"segments is {data.dtype} and must hold integers: convert it with .long().")
        if name not in DATA:
            data = data.to(torch.int64 if name == "segments" else torch.float64)
        return data if batched else data[None]

    taken: dict[str, Any] = {name: None if data is None else ready(name, data) for name, data in tensors.items()}
    if taken["penalty"] is not None and taken["penalty_scale"] is None:
        taken["penalty_scale"] = given.base.new_ones(taken["base"].shape[:2], dtype=torch.float64)
    problem = given._replace(**taken, max_iterations=whole_number("max_iterations", given.max_iterations))
    check(problem, batched)
    return _finished(problem)


def check(problem: FitLowRankProblem, batched: bool = True) -> None:
    """Types, shapes and options of a prepared problem, not the numbers in its tensors.

    The operator of torch comes here with what it was called with, :func:`prepare` with what it made; `batched` says
    whether the caller's own tensors have the dimension B.
    """
    basis, base = problem.basis, problem.base
    if basis.ndim != 3:
        raise RewriteCoreError(f"basis must be [B, J, P] or [J, P], not {list(basis.shape[not batched :])}.")
    if base.ndim != 3:
        axes = "[B, O, P]" if batched else "[O, P]"
        raise RewriteCoreError(f"base must be {axes}, not {list(base.shape[not batched :])}.")
    sizes = {"B": basis.shape[0], "O": base.shape[1], "J": basis.shape[1], "P": basis.shape[2]}
    if not sizes["J"] or not sizes["P"]:
        raise RewriteCoreError(f"basis is {list(basis.shape[not batched :])}: it needs at least one row and one pixel.")
    if len({getattr(problem, name) is None for name in DEMODULATION}) > 1:
        raise RewriteCoreError("demodulation must be three tensors (constant, linear, quadratic), or None.")
    if (problem.penalty is None) != (problem.penalty_scale is None):
        given, missing = ("penalty", "penalty_scale") if problem.penalty_scale is None else ("penalty_scale", "penalty")
        raise RewriteCoreError(f"{given} was given without a {missing}: pass both, or neither.")
    several = ""
    if problem.segments is not None:
        if problem.constant is None:
            raise RewriteCoreError("segments say which demodulation a pixel has: pass demodulation too, or neither.")
        if problem.constant.ndim != 3 or not problem.constant.shape[1]:
            raise RewriteCoreError("with segments demodulation's constant must be [B, G, O], G at least 1.")
        several, sizes["G"] = "G", problem.constant.shape[1]
    for name, axes in AXES.items():
        data = getattr(problem, name)
        if data is None:
            continue
        axes = f"B{several}{axes[1:]}" if name in DEMODULATION else axes
        axes = axes if batched else axes[1:]
        _check_type(name, data, base)
        shape, found = [sizes[axis] for axis in axes], list(data.shape[not batched :])
        if found != shape:
            raise RewriteCoreError(
                f"{_label(name)} must be [{', '.join(axes)}] = {shape} to go with basis and base, not {found}."
            )
    if problem.loss not in LOSSES:
        raise RewriteCoreError(f"there is no loss {problem.loss!r}: use 'l1' (absolute) or 'l2' (square).")
    whole_number("max_iterations", problem.max_iterations)
    for name in ("slope", "gain", "tolerance"):
        number(name, getattr(problem, name), least=0 if name == "tolerance" else -math.inf)


def _label(name: str) -> str:
    return f"demodulation's {name}" if name in DEMODULATION else name


def _check_type(name: str, data: Tensor, base: Tensor) -> None:
    if name in DATA:
        if data.dtype not in (torch.float32, torch.float64):
            raise ArgumentError(f"{name} is {data.dtype} and must be float32 or float64: convert it with .float().")
        if data.dtype != base.dtype:
            raise ArgumentError(f"{name} is {data.dtype} and base is {base.dtype}: convert one to the other's type.")
    elif data.dtype != (torch.int64 if name == "segments" else torch.float64):
        raise ArgumentError(f"{_label(name)} is {data.dtype}: call rewrite_core.ops.fit_low_rank, which converts it.")
    if data.device != base.device:
        raise RewriteCoreError(f"{_label(name)} is on {data.device} and base on {base.device}: move one to the other.")


def check_segments(problem: FitLowRankProblem) -> None:
    """Refuse segments that are no indices: the kernels trust them."""
    if problem.segments is not None and problem.constant is not None:
        several = problem.constant.shape[1]
        if not ((problem.segments >= 0) & (problem.segments < several)).all():
            raise RewriteCoreError(f"segments must be from 0 to {several - 1}, as there are {several} demodulations.")


def _seen_in_losses(problem: FitLowRankProblem) -> bool:
    """Whether NaN and infinity in the data show in the first losses, so that nobody looks for them before: that would
    be a good part of a closed form's time. A pixel of weight 0 shows in no loss."""
    return problem.exact and problem.pixel_weights is None


def check_outcome(problem: FitLowRankProblem, initial_loss: Tensor) -> None:
    """Refuse what :func:`prepare` left to the first losses."""
    if not problem.base.is_cpu or not _seen_in_losses(problem) or transformed():
        return
    if not all_finite(initial_loss):  # finite numbers may overflow too: the status says so
        check_numbers(problem, DATA)


def check_numbers(problem: FitLowRankProblem, names: Iterable[str]) -> None:
    for name in names:
        data = getattr(problem, name)
        if data is not None and name != "segments" and not all_finite(data):
            raise NonFiniteError(
                f"{_label(name)} holds NaN or infinity: check the generator's activations and weights."
            )
    if problem.constant is not None and not (problem.constant > 0).all():
        raise RewriteCoreError("demodulation's constant must be positive: it is a squared norm plus epsilon.")
    for name in ("pixel_weights", "penalty_scale"):
        data = getattr(problem, name)
        if data is not None and (data < 0).any():
            raise RewriteCoreError(f"{name} has a negative entry: they must be zero or positive.")


def _finished(problem: FitLowRankProblem) -> FitLowRankProblem:
    """Numbers looked at where that waits for nothing; matrices symmetric; demodulations of no pixel set aside."""
    known = not transformed()
    weights, scale = problem.pixel_weights, problem.penalty_scale
    if known:
        check_segments(problem)
    if known and problem.base.device.type == "cpu":  # elsewhere a look waits for everything before it
        later = DATA[1:] if _seen_in_losses(problem) else ()
        check_numbers(problem, (name for name in AXES if name not in later))
    else:  # what would be refused comes out as "nonfinite"
        weights, scale = (None if a is None else torch.where(a >= 0, a, torch.nan) for a in (weights, scale))
    quadratic, penalty = (None if a is None else (a + a.mT) / 2 for a in (problem.quadratic, problem.penalty))
    constant, linear, segments = problem.constant, problem.linear, problem.segments
    if segments is not None and constant is not None and linear is not None and quadratic is not None:
        every = torch.arange(constant.shape[1], device=segments.device)
        used = segments[:, None] == every[:, None]  # [B, G, P]
        used = (used if weights is None else used & (weights > 0)[:, None]).any(-1, keepdim=True)
        constant = torch.where(used, constant, 1.0)  # of a demodulation without pixels that count: limits no step
        linear, quadratic = linear * used[..., None], quadratic * used[..., None]
    return problem._replace(
        constant=constant,
        linear=linear,
        quadratic=quadratic,
        pixel_weights=weights,
        penalty=penalty,
        penalty_scale=scale,
        slope=float(problem.slope),
        gain=float(problem.gain),
        tolerance=float(problem.tolerance),
    )


def empty_outputs(basis: Tensor, base: Tensor) -> Outputs:
    """With the dimension B if they have it."""
    channels, wide, count = base.shape[:-1], torch.float64, torch.int32
    return (  # torch takes sizes one by one in half the time of a tuple
        base.new_empty(*channels, basis.shape[-2]),
        base.new_empty(*channels, dtype=wide),
        base.new_empty(*channels, dtype=wide),
        base.new_empty(*channels, dtype=count),
        base.new_empty(*channels, dtype=count),
    )
