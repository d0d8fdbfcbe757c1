"""Adam on a layer's whole weight with projection onto directions: the reference implementation's trajectory, fused.

What the layer does after its linear operator acts per output channel, and Adam acts per number, so the channels never
meet but in the loss that is reported. The trajectory is the same in reference.py, csrc/fit_projected*.cpp and
kernels/fit_projected (which says how it is made on a GPU). On a CPU:

- With V the change of the weight, linear output = base + V . operator. After steps 0, every, 2 every, ... and the last
  one V becomes its projection on the directions: then the reference's ``orthogonal part of W0 + projection of W`` is
  W0 + V, and linear output = base + Lambda . basis maps, which spares that step its forward pass.
- A step reads the operator once: for a few inputs at a time the gradient, Adam's update, and what the new weight adds
  to the outputs, while these inputs' maps are in the first-level cache.
- A 3x3 convolution of stride 1 is multiplied by Winograd's algorithm, tiles of 2x2, 4x4 or 5x5 outputs, both ways.
  The maps are transformed once, in float64, so that kernels are transformed by small whole numbers and halves.

Floor, for 512 -> 512 channels, 3x3, 10x10 pixels and 2001 steps: 0.94 TFLOP for each of the two products and 4.7e9
updates by Adam, of about 16 vector operations for as many numbers as a vector has. 5x5 tiles need 196 multiplications
where the plain sum has 784 (900 with the zeros around), and about 210 additions for the transforms.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ArgumentError, RewriteCoreError, whole_number
from ..losses import LOSSES
from ..memory import check_dense

TRITON = (3, 5)  # the oldest that compiles the kernel; 3.4 (torch 2.8) takes no products of tiles this small
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch.optim.Adam's; as in csrc/fit_projected/constants.h
LARGEST = 1 << 26  # numbers in the operator (256 MiB): what the kernel is worth its memory for
MOST_TAPS = 64


class ProjectedResult(NamedTuple):
    """coefficients [O, R, kh, kw] (without directions the change itself, [O, I, kh, kw]); losses [steps] float64: the
    mean over channels and pixels before each step."""

    coefficients: Tensor
    losses: Tensor


class FitProjectedProblem(NamedTuple):
    """The operator's arguments: fit_projected's, checked; directions [0, I] where there are none."""

    operator: Tensor
    base: Tensor
    target: Tensor
    value: Tensor
    shift: Tensor | None
    weight: Tensor | None
    style: Tensor | None
    eps: float
    slope: float
    gain: float
    directions: Tensor
    loss: str
    steps: int
    lr: float
    project_every: int
    project_gradient: bool


def rates_of(problem: FitProjectedProblem) -> Tensor:
    """Adam's step size and one over the root of its second bias correction, step by step: [steps, 2] float32."""
    count = torch.arange(1, problem.steps + 1, dtype=torch.float64, device=problem.base.device)
    return torch.stack([problem.lr / (1 - BETA1**count), (1 - BETA2**count).rsqrt()], 1).float()


def value_of(problem: FitProjectedProblem, lin: Tensor, weight: Tensor | None) -> Tensor:
    """The value [O, P] of a linear output; weight [O, I kh kw] is read for demodulation only."""
    out = lin
    if weight is not None and problem.style is not None:
        taps = weight.shape[1] // len(problem.style)
        square = problem.style.square().repeat_interleave(taps)
        out = (weight.square() @ square + problem.eps).rsqrt()[:, None] * lin
    if problem.shift is not None:
        out = out + problem.shift.flatten(1)
    return problem.gain * F.leaky_relu(out, problem.slope)


def prepare(
    given: FitProjectedProblem,
    demodulation: tuple[Tensor, Tensor, float] | None,
    value: Tensor | None,
    directions: Tensor | None,
) -> FitProjectedProblem:
    """The arguments of :func:`fit_projected`, looked at; what was left out is filled in."""
    operator, base = given.operator, given.base
    for name, data in (("operator", operator), ("base", base)):
        if not isinstance(data, Tensor) or data.dtype not in (torch.float32, torch.float64):
            raise ArgumentError(f"{name} must be a float32 or float64 tensor: convert it with .float().")
        check_dense(name, data)
    weight, style, eps = demodulation or (None, None, 0.0)
    shift = given.shift
    maps = (len(base) if base.ndim else 0, *operator.shape[3:])
    if isinstance(shift, Tensor):  # anything else is refused below
        check_dense("shift", shift)
        try:
            shift = shift.expand(maps)
        except RuntimeError:
            raise RewriteCoreError(f"shift is {list(shift.shape)} and must broadcast to {list(maps)}.") from None
    steps, every = whole_number("steps", given.steps), whole_number("project_every", given.project_every)
    if directions is None:
        directions = operator.new_empty(0, *operator.shape[:1])
    problem = given._replace(
        value=base if value is None else value,
        shift=shift,
        weight=weight,
        style=style,
        eps=eps,
        directions=directions,
        steps=steps,
        project_every=every,
    )
    check(problem)
    tensors: dict[str, Any] = {
        name: part.detach() for name, part in problem._asdict().items() if isinstance(part, Tensor)
    }
    problem = problem._replace(**tensors)
    if value is None:
        weight = None if problem.weight is None else problem.weight.flatten(1)
        problem = problem._replace(value=value_of(problem, problem.base.flatten(1), weight).reshape(base.shape))
    return problem


def check(problem: FitProjectedProblem) -> None:
    """Types, shapes and numbers, but for those in the tensors; the operator of torch comes here too."""
    operator, base = problem.operator, problem.base
    if operator.ndim != 5 or not operator.numel():
        raise RewriteCoreError(f"operator must be [I, kh, kw, H, W], none of them 0, not {list(operator.shape)}.")
    if base.ndim != 3:
        raise RewriteCoreError("base must be a tensor [O, H, W].")
    inputs, *kernel = operator.shape[:3]
    maps = (len(base), *operator.shape[3:])
    directions, rank = problem.directions, 0
    if isinstance(directions, Tensor):  # anything else is refused below
        check_dense("directions", directions)
        if directions.ndim != 2:
            raise RewriteCoreError(f"directions must be [R, {inputs}], not {list(directions.shape)}.")
        rank = len(directions)
    for name, data, shape in (
        ("base", base, maps),
        ("target", problem.target, maps),
        ("value", problem.value, maps),
        ("shift", problem.shift, maps),
        ("demodulation's weight", problem.weight, (len(base), inputs, *kernel)),
        ("demodulation's style", problem.style, (inputs,)),
        ("directions", directions, (rank, inputs)),
    ):
        if data is None and name in ("shift", "demodulation's weight", "demodulation's style"):
            continue
        if not isinstance(data, Tensor) or data.dtype != operator.dtype or data.device != operator.device:
            raise ArgumentError(f"{name} must be a tensor of the operator's type and device.")
        check_dense(name, data)
        if data.shape != shape:
            raise RewriteCoreError(
                f"{name} must be {list(shape)} to go with operator and base, not {list(data.shape)}."
            )
    if (problem.weight is None) != (problem.style is None):
        raise RewriteCoreError("demodulation must be (weight, style, eps), or None.")
    if problem.loss not in LOSSES:
        raise RewriteCoreError(f"there is no loss {problem.loss!r}: use 'l1' (absolute) or 'l2' (square).")
    whole_number("steps", problem.steps)
    whole_number("project_every", problem.project_every)
    if problem.project_gradient and not rank:
        raise RewriteCoreError("project_gradient needs directions.")
    if not all(map(math.isfinite, (problem.slope, problem.gain, problem.eps, problem.lr))):
        raise RewriteCoreError("slope, gain, eps and lr must be finite numbers.")
