"""``fit_projected``: the public function, its operator of torch, its backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
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
from ..memory import address, plain_fields
from . import cuda
from .problem import (
    LARGEST,
    MOST_TAPS,
    TRITON,
    FitProjectedProblem,
    ProjectedResult,
    check,
    prepare,
    rates_of,
)
from .winograd import GROUP, transformed_maps, winograd_tile

Range = tuple[int, int]  # first of some blocks of channels, and how many
Progress = Callable[[Iterator[Range], int], Iterable[Range]]


def fit_projected(
    operator: Tensor,
    base: Tensor,
    target: Tensor,
    *,
    value: Tensor | None = None,
    shift: Tensor | None = None,
    demodulation: tuple[Tensor, Tensor, float] | None = None,
    slope: float = 1.0,
    gain: float = 1.0,
    directions: Tensor | None = None,
    loss: str = "l1",
    steps: int = 2001,
    lr: float = 0.05,
    project_every: int = 10,
    project_gradient: bool = False,
    progress: Progress | None = None,
    backend: str = "auto",
) -> ProjectedResult:
    """Adam on V [O, I, kh, kw], the change of a weight W0, projected onto directions every few steps.

        lin    = base + sum_iyx V[:, iyx] operator[iyx]
        m      = (sum_iyx (style_i (W0 + V)_iyx)^2 + eps)^(-1/2), or 1 without demodulation
        loss   = mean over channels and pixels of rho(gain * leaky_relu(m * lin + shift, slope) - target)

    operator      [I, kh, kw, H, W]  the layer's linear operator on each single input map with each one-hot kernel
    base, target  [O, H, W]  linear output of W0; wanted value
    value         [O, H, W]  what the layer itself makes of W0; None: as computed here. Where the target is equal to it,
                  to the bit, the first residual is exactly zero
    shift         broadcastable to [O, H, W], or None for 0
    demodulation  (W0 [O, I, kh, kw], style [I], eps) or None
    directions    [R, I], orthonormal rows, or None: no projection
    loss          "l1": rho = |r|; "l2": rho = r^2
    steps, lr     of torch.optim.Adam with its other arguments as they are by default
    project_every after steps 0, project_every, ... and the last; project_gradient: the gradient too, at every step
    progress      called with an iterator over ranges of channels, and the number of ranges; or None. Not called where
                  torch compiles, traces or transforms the caller
    backend       "auto", "cuda", "triton" or "cpp" (all float32), or "reference"

    All of one floating dtype on one device. "cpp" gives the same bits for any number of threads, "triton" and "cuda"
    from run to run (on GPUs of one kind; "triton" with one cache of measured configurations). Not differentiable.
    NaN and infinity in the input come out as losses that are not finite.

    Raises ArgumentError for a wrong type, RewriteCoreError (a ValueError) for a wrong shape or number.
    """
    given = FitProjectedProblem(
        operator,
        base,
        target,
        base,
        shift,
        None,
        None,
        0.0,
        slope,
        gain,
        base,
        loss,
        steps,
        lr,
        project_every,
        project_gradient,
    )
    problem = prepare(given, demodulation, value, directions)
    if dispatched(base):
        return ProjectedResult(*torch.ops.rewrite_core.fit_projected(*problem, backend))
    return ProjectedResult(*select("fit_projected", backend, *problem).load()(problem, progress))


def _ranges(blocks: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, blocks, size):
        yield first, min(size, blocks - first)


def run_cpp(
    problem: FitProjectedProblem, progress: Progress | None = None, isa: str = "", tile: int | None = None
) -> tuple[Tensor, Tensor]:
    problem = plain_fields(problem)
    operator, directions = problem.operator, problem.directions
    inputs, *kernel, height, width = operator.shape
    channels, rank, taps = len(problem.base), len(directions), kernel[0] * kernel[1]
    tile = winograd_tile(operator) if tile is None else tile
    maps = transformed_maps(operator, tile)
    padded = len(maps) * GROUP
    basis = torch.einsum("ri,iyxp->ryxp", directions, operator.flatten(3)).contiguous()
    extra = padded - inputs
    directions = F.pad(directions, (0, extra)).contiguous()
    weight = square = None
    if problem.weight is not None and problem.style is not None:
        weight = F.pad(problem.weight.flatten(2), (0, 0, 0, extra)).contiguous()
        square = F.pad(problem.style.square(), (0, extra)).contiguous()
    base, target, value = (part.contiguous() for part in (problem.base, problem.target, problem.value))
    shift = base.new_zeros(()) if problem.shift is None else problem.shift
    shift = shift.expand(channels, height, width)
    if height > 1 and width > 1 and shift.stride(1) != width * shift.stride(2):  # one stride over all pixels
        shift = shift.contiguous()
    over_pixels = shift.stride(2) if width > 1 else shift.stride(1)  # an axis of one entry may have any stride
    rates = rates_of(problem)

    lanes = extension().projected_lanes(isa)
    blocks, threads = -(-channels // lanes), torch.get_num_threads()
    losses = torch.empty(blocks, problem.steps, dtype=torch.float64, device=base.device)
    coefficients = base.new_empty(channels, rank or padded, *kernel)
    arrays = {"maps": maps, "base": base, "target": target, "value": value, "shift": shift, "weight": weight}
    arrays |= {"square": square, "directions": directions, "basis": basis, "rates": rates}
    arrays |= {"losses": losses, "coefficients": coefficients}
    fields = {name: address(data) for name, data in arrays.items()}
    ranges = _ranges(blocks, max(blocks, 1) if progress is None else threads)
    for first, size in ranges if progress is None else progress(ranges, -(-blocks // threads)):
        extension().fit_projected(
            **fields,
            shift_strides=(shift.stride(0), over_pixels),
            tile=tile,
            inputs=padded,
            taps=taps,
            height=height,
            width=width,
            channels=channels,
            rank=rank,
            products=maps.shape[1],
            slots=maps.shape[2],
            eps=problem.eps,
            slope=problem.slope,
            gain=problem.gain,
            absolute=problem.loss == "l1",
            steps=problem.steps,
            project_every=problem.project_every,
            project_gradient=problem.project_gradient,
            first=first,
            count=size,
            threads=threads,
            isa=isa,
        )
    mean = losses.sum(0) / problem.base.numel()
    return coefficients if rank else coefficients[:, :inputs].clone(), mean


def run_triton(problem: FitProjectedProblem, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
    from ...kernels.fit_projected import launch

    return launch(plain_fields(problem), progress)


def _kernels_support(operator: Tensor) -> str | None:
    if operator.dtype != torch.float32:
        return f"it works in float32, and the operator is {operator.dtype}"
    if operator.shape[1] * operator.shape[2] > MOST_TAPS:
        return f"it takes kernels of up to {MOST_TAPS} taps, and this one is {list(operator.shape[1:3])}"
    if operator.numel() > LARGEST:
        return f"the operator has {operator.numel()} numbers, and it would keep at most {LARGEST}"
    return None


def _cpp_supports(operator: Tensor, *args: object) -> str | None:
    if operator.device.type != "cpu":
        return f"it reads CPU tensors, and the operator is on {operator.device}"
    return _kernels_support(operator) or extension_reason()


def _triton_supports(operator: Tensor, *args: object) -> str | None:
    reason = triton_reason(TRITON)
    if reason is None and operator.device.type != "cuda" and not triton_interpreted():
        reason = f"it reads CUDA tensors, and the operator is on {operator.device}"
    return reason or _kernels_support(operator)


def _triton_declines(operator: Tensor, *args: object) -> str | None:
    return triton_declines(operator.device)


BACKENDS = (
    Backend("fit_projected", "cuda", f"{__package__}.cuda:run_cuda", cuda.supports, cuda.declines),
    Backend("fit_projected", "triton", f"{__name__}:run_triton", _triton_supports, _triton_declines),
    Backend("fit_projected", "cpp", f"{__name__}:run_cpp", _cpp_supports),
    Backend("fit_projected", "reference", f"{__package__}.reference:run_reference"),
)


def example(device: str) -> FitProjectedProblem:
    operator, base = torch.ones(8, 3, 3, 4, 4, device=device), torch.zeros(4, 4, 4, device=device)
    return FitProjectedProblem(
        operator, base, base, base, None, None, None, 0.0, 1.0, 1.0, operator.new_zeros(0, 8), "l1", 1, 0.05, 10, False
    )


# define + impl and not custom_op, whose first call imports torch._dynamo: more than a second of CPU time.
library.define(
    "rewrite_core::fit_projected",
    "(Tensor operator, Tensor base, Tensor target, Tensor value, Tensor? shift, Tensor? weight, Tensor? style, "
    "float eps, float slope, float gain, Tensor directions, str loss, int steps, float lr, int project_every, "
    "bool project_gradient, str backend='auto') -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@library.impl("rewrite_core::fit_projected", "CompositeExplicitAutograd")
def _op(*args: Any) -> tuple[Tensor, Tensor]:
    arguments = list(args)
    backend = arguments.pop() if len(arguments) > len(FitProjectedProblem._fields) else "auto"
    problem = FitProjectedProblem(*arguments)
    check(problem)
    return select("fit_projected", backend, *problem).load()(problem)


@library.register_fake("rewrite_core::fit_projected")
def _(operator: Tensor, base: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    problem = FitProjectedProblem(operator, base, *args[: len(FitProjectedProblem._fields) - 2])
    rows = len(problem.directions) or len(operator)
    coefficients = base.new_empty(len(base), rows, *operator.shape[1:3])
    return coefficients, base.new_empty(problem.steps, dtype=torch.float64)
