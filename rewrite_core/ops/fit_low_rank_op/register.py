"""``fit_low_rank``: the public function, its operator of torch, its backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from ...backends import (
    Backend,
    dispatched,
    extension,
    extension_reason,
    select,
    triton_declines,
    triton_interpreted,
    triton_reason,
)
from ..memory import address, plain, plain_fields
from .problem import (
    DATA,
    MOST_UNKNOWNS,
    TRITON,
    FitLowRankProblem,
    FitResult,
    Outputs,
    check,
    check_numbers,
    check_outcome,
    check_segments,
    empty_outputs,
    is_plain,
    prepare,
)


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
    """Fit x[b, o] so that channel o's value meets its target: docs/method.md "Finding Lambda", paper eq. 10 to 15.

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
    that would wait for it, and tensors that ``torch.func`` transforms cannot be: NaN, infinity and wrong signs then
    make the status of the channels concerned "nonfinite" (or "degenerate", where no weight is positive).
    SciPy: ``scipy.optimize.least_squares(loss="soft_l1" or "linear", method="lm")`` per channel.
    """
    given = FitLowRankProblem(
        basis,
        base,
        target,
        shift,
        *(None, None, None),
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
    apart = dispatched(base)
    plain_data = not apart and demodulation is None and is_plain(given)
    if plain_data and select("fit_low_rank", backend, *given).load() is run_cpp:
        return _fit_plain(given)
    problem = prepare(given, demodulation)
    if apart:
        outputs = torch.ops.rewrite_core.fit_low_rank(*problem, backend)
    else:  # what the op does, without checking a second time
        outputs = select("fit_low_rank", backend, *problem).load()(problem)
    check_outcome(problem, outputs[2])
    coefficients, final, initial, iterations, status = outputs if basis.ndim == 3 else [output[0] for output in outputs]
    return FitResult(coefficients, final, initial, iterations, status, problem.solver)


def _call_cpp(problem: FitLowRankProblem, outputs: Outputs, isa: str = "") -> bool:
    """Fills `outputs`; whether all numbers of the basis and the data were finite, as far as pixels count. The tensors
    are plain, and all but the shift contiguous; they may lack the dimension B where they are data and nothing else."""
    basis, base, target, shift = problem[:4]
    constant, linear, quadratic = problem.constant, problem.linear, problem.quadratic
    single = base.ndim == 2
    strides = (0, 0, 0) if shift is None else (0, *shift.stride()) if single else shift.stride()
    coefficients, loss, initial_loss, iterations, status = outputs
    return extension().fit_low_rank(
        basis=address(basis),
        base=address(base),
        target=address(target),
        shift=address(shift),
        shift_strides=strides,
        is_double=base.dtype == torch.float64,
        constant=address(constant),
        linear=address(linear),
        quadratic=address(quadratic),
        segments=address(problem.segments),
        pixel_weights=address(problem.pixel_weights),
        penalty=address(problem.penalty),
        penalty_scale=address(problem.penalty_scale),
        edits=1 if single else base.shape[0],
        channels=base.shape[-2],
        unknowns=basis.shape[-2],
        pixels=basis.shape[-1],
        styles=1 if problem.segments is None or constant is None else constant.shape[1],
        slope=problem.slope,
        gain=problem.gain,
        absolute=problem.loss == "l1",
        max_iterations=problem.max_iterations,
        tolerance=problem.tolerance,
        coefficients=coefficients.data_ptr(),
        loss=loss.data_ptr(),
        initial_loss=initial_loss.data_ptr(),
        iterations=iterations.data_ptr(),
        status=status.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )


def run_cpp(problem: FitLowRankProblem, isa: str = "") -> Outputs:
    outputs = empty_outputs(problem.basis, problem.base)
    inputs: dict[str, Any] = {n: plain(data) for n, data in problem._asdict().items() if isinstance(data, Tensor)}
    inputs |= {n: data.contiguous() for n, data in inputs.items() if n != "shift"}  # a broadcast one stays so
    _call_cpp(problem._replace(**inputs), outputs, isa)
    return outputs


def _fit_plain(given: FitLowRankProblem) -> FitResult:
    """The C++ kernels on what :func:`is_plain`."""
    outputs = empty_outputs(given.basis, given.base)
    if not _call_cpp(given, outputs):  # finite numbers may overflow too: the status says so
        check_numbers(given, DATA)
    return FitResult(*outputs, given.solver)


def _cpp_supports(basis: Tensor, *args: object) -> str | None:
    if not basis.is_cpu:
        return f"it reads CPU tensors, and the basis is on {basis.device}"
    return extension_reason()


def run_triton(problem: FitLowRankProblem) -> Outputs:
    from ...kernels.fit_low_rank import launch

    return launch(plain_fields(problem))


def _triton_supports(basis: Tensor, *args: Any) -> str | None:
    reason = triton_reason(TRITON)
    if reason is None and not basis.is_cuda and not triton_interpreted():
        reason = f"it reads CUDA tensors, and the basis is on {basis.device}"
    if reason is None and FitLowRankProblem(basis, *args).segments is not None:
        reason = "it has one demodulation per edit, and segments ask for several"
    if reason is None and basis.shape[-2] > MOST_UNKNOWNS:
        reason = (
            f"it takes up to {MOST_UNKNOWNS} unknowns per channel, and there are {basis.shape[-2]}: use a lower rank"
        )
    return reason


def _triton_declines(basis: Tensor, *args: object) -> str | None:
    return triton_declines(basis.device)


BACKENDS = (
    Backend("fit_low_rank", "triton", f"{__name__}:run_triton", _triton_supports, _triton_declines),
    Backend("fit_low_rank", "cpp", f"{__name__}:run_cpp", _cpp_supports),
    Backend("fit_low_rank", "reference", f"{__package__}.reference:run_reference"),
)


def example(device: str) -> FitLowRankProblem:
    basis, base = torch.ones(1, 9, 16, device=device), torch.zeros(1, 4, 16, device=device)
    return FitLowRankProblem(basis, base, base, None, None, None, None, 1.0, 1.0, None, None, None, "l1", 1, 0.0)


# define + impl and not custom_op, whose first call imports torch._dynamo: more than a second of CPU time.
library.define(
    "rewrite_core::fit_low_rank",
    "(Tensor basis, Tensor base, Tensor target, Tensor? shift, Tensor? constant, Tensor? linear, "
    "Tensor? quadratic, float slope, float gain, Tensor? pixel_weights, Tensor? penalty, Tensor? penalty_scale, "
    "str loss, int max_iterations, float tolerance, Tensor? segments=None, str backend='auto') "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@library.impl("rewrite_core::fit_low_rank", "CompositeExplicitAutograd")
def _op(*args: Any) -> Outputs:
    arguments = list(args)
    backend = arguments.pop() if len(arguments) > len(FitLowRankProblem._fields) else "auto"
    problem = FitLowRankProblem(*arguments)
    check(problem)
    check_segments(problem)
    return select("fit_low_rank", backend, *problem).load()(problem)


@library.register_fake("rewrite_core::fit_low_rank")
def _(basis: Tensor, base: Tensor, *args: Any) -> Outputs:
    return empty_outputs(basis, base)
