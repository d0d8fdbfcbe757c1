"""Adam on a layer's whole weight with projection onto directions: the reference implementation's trajectory, fused.

What the layer does after its linear operator acts per output channel, and Adam acts per number, so the channels never
meet but in the loss that is reported. The algorithm, the same in ``_reference``, csrc/fit_projected*.cpp and
kernels/fit_projected.py (which has no Winograd, and reads the operator as it is):

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
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import (
    Backend,
    extension,
    extension_reason,
    select,
    transformed,
    triton_declines,
    triton_interpreted,
    triton_reason,
)
from ..errors import ArgumentError, RewriteCoreError, whole_number

LOSSES = ("l1", "l2")
TRITON = (3, 5)  # the oldest that compiles the kernel; 3.4 (torch 2.8) takes no products of tiles this small
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch.optim.Adam's; shared with csrc/fit_projected_isa.h
POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 1.0, -1.0, 2.0, -2.0), 5: (0.0, 1.0, -1.0, 2.0, -2.0, 0.5)}  # and infinity
GROUP = 8  # inputs that the kernel handles together
LARGEST = 1 << 26  # numbers in the operator (256 MiB): what the kernel is worth its memory for
MOST_TAPS = 64


class ProjectedResult(NamedTuple):
    """coefficients [O, R, kh, kw] (without directions the change itself, [O, I, kh, kw]); losses [steps] float64: the
    mean over channels and pixels before each step."""

    coefficients: Tensor
    losses: Tensor


class Problem(NamedTuple):
    """fit_projected's arguments, checked."""

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
    progress=None,
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
    progress      called with an iterator over ranges of channels, and the number of ranges; or None
    backend       "auto", "triton" (float32), "cpp" (float32) or "reference"

    All of one floating dtype on one device. "cpp" gives the same bits for any number of threads, "triton" from run to run
    (on GPUs of one kind with one cache of measured configurations). Not differentiable.
    NaN and infinity in the input come out as losses that are not finite.

    Raises ArgumentError for a wrong type, RewriteCoreError (a ValueError) for a wrong shape or number.
    """
    if transformed() or torch.jit.is_tracing():
        raise RewriteCoreError("fit_projected is no operator of torch: call it outside torch.func and torch.jit.trace.")
    if not isinstance(operator, Tensor) or operator.dtype not in (torch.float32, torch.float64):
        raise ArgumentError("operator must be a float32 or float64 tensor: convert it with .float().")
    if operator.ndim != 5 or not operator.numel():
        raise RewriteCoreError(f"operator must be [I, kh, kw, H, W], none of them 0, not {list(operator.shape)}.")
    inputs, *kernel = operator.shape[:3]
    if not isinstance(base, Tensor) or base.ndim != 3:
        raise RewriteCoreError("base must be a tensor [O, H, W].")
    maps = (len(base), *operator.shape[3:])
    weight, style, eps = demodulation or (None, None, 0.0)
    if isinstance(shift, Tensor):  # anything else is refused below
        try:
            shift = shift.expand(maps)
        except RuntimeError:
            raise RewriteCoreError(f"shift is {list(shift.shape)} and must broadcast to {list(maps)}.") from None
    rank = None if directions is None else len(directions)
    for name, data, shape in (
        ("base", base, maps),
        ("target", target, maps),
        ("value", value, maps),
        ("shift", shift, maps),
        ("demodulation's weight", weight, (len(base), inputs, *kernel)),
        ("demodulation's style", style, (inputs,)),
        ("directions", directions, (rank, inputs)),
    ):
        if data is None and name != "target":
            continue
        if not isinstance(data, Tensor) or data.dtype != operator.dtype or data.device != operator.device:
            raise ArgumentError(f"{name} must be a tensor of the operator's type and device.")
        if data.shape != shape:
            raise RewriteCoreError(
                f"{name} must be {list(shape)} to go with operator and base, not {list(data.shape)}."
            )
    if loss not in LOSSES:
        raise RewriteCoreError(f"there is no loss {loss!r}: use 'l1' (absolute) or 'l2' (square).")
    steps, project_every = whole_number("steps", steps), whole_number("project_every", project_every)
    if project_gradient and not rank:
        raise RewriteCoreError("project_gradient needs directions.")
    if not all(map(math.isfinite, (slope, gain, eps, lr))):
        raise RewriteCoreError("slope, gain, eps and lr must be finite numbers.")
    if directions is None:
        directions = operator.new_empty(0, inputs)
    parts = (operator, base, target, value, shift, weight, style)
    operator, base, target, value, shift, weight, style = (None if part is None else part.detach() for part in parts)
    if value is None:
        problem = Problem(
            operator, base, target, base, shift, weight, style, eps, slope, gain, directions, loss, 1, 0.0, 1, False
        )
        value = _value(problem, base.flatten(1), None if weight is None else weight.flatten(1)).reshape(maps)
    problem = Problem(
        operator,
        base,
        target,
        value,
        shift,
        weight,
        style,
        eps,
        slope,
        gain,
        directions.detach(),
        loss,
        steps,
        lr,
        project_every,
        project_gradient,
    )
    run = select("fit_projected", backend, *problem).load()
    return ProjectedResult(*run(problem, progress))


def _value(problem: Problem, lin: Tensor, weight: Tensor | None) -> Tensor:
    """The value [O, P] of a linear output; weight [O, I kh kw] is read for demodulation only."""
    out = lin
    if weight is not None:
        taps = weight.shape[1] // len(problem.style)
        square = problem.style.square().repeat_interleave(taps)
        out = (weight.square() @ square + problem.eps).rsqrt()[:, None] * lin
    if problem.shift is not None:
        out = out + problem.shift.flatten(1)
    return problem.gain * F.leaky_relu(out, problem.slope)


def _reference(problem: Problem, progress=None) -> tuple[Tensor, Tensor]:
    """Autograd and torch.optim.Adam, on the operator as a matrix."""
    operator, directions = problem.operator, problem.directions
    inputs, *kernel = operator.shape[:3]
    maps, base, target = operator.flatten(0, 2).flatten(1), problem.base.flatten(1), problem.target.flatten(1)
    original = None if problem.weight is None else problem.weight.flatten(1)
    exact = target == problem.value.flatten(1)
    target = torch.where(exact, _value(problem, base, original), target)
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
            loss = distance(_value(problem, base + change @ maps, weight), target)
            optimiser.zero_grad()
            loss.backward()
        losses.append(loss.detach().double())
        with torch.no_grad():
            if problem.project_gradient:
                change.grad.copy_(project(change.grad))
            optimiser.step()
            if len(directions) and (step % problem.project_every == 0 or step == problem.steps - 1):
                change.copy_(project(change))
    result = coefficients(change.detach()) if len(directions) else change.detach()
    return result.reshape(len(base), len(directions) or inputs, *kernel), torch.stack(losses)


def winograd_tile(operator: Tensor) -> int:
    """The output tile by which Winograd's algorithm multiplies fastest; 0 where the operator [I, kh, kw, H, W] is not a
    3x3 convolution of stride 1 with one row of zeros around, or a tile would not pay."""
    _, *kernel, height, width = operator.shape
    if kernel != [3, 3]:
        return 0
    middle = F.pad(operator[:, 1, 1], (1, 1, 1, 1))
    for y in range(3):
        for x in range(3):
            if not torch.equal(operator[:, y, x], middle[:, y : y + height, x : x + width]):
                return 0

    def cost(tile: int) -> int:
        """Vector operations for one input and channel: two products, and the transforms of the kernel."""
        tiles = -(-height // tile) * -(-width // tile)
        return 2 * tiles * (tile + 2) ** 2 + {2: 56, 4: 144, 5: 210}[tile]

    best = min(POINTS, key=cost)
    return best if cost(best) < 2 * 9 * height * width else 0


def transformed_maps(operator: Tensor, tile: int) -> Tensor:
    """What the kernel multiplies with: [I / GROUP, products, slots, GROUP], inputs padded with zeros."""
    inputs, *_, height, width = operator.shape
    if tile:
        n = tile + 2
        # the inverse of the polynomials' values at the points: a tile of the map is a linear form of products
        options = {"dtype": torch.float64, "device": operator.device}
        matrix = torch.zeros(n, n, **options)
        matrix[:, :-1] = torch.tensor(POINTS[tile], **options) ** torch.arange(n, **options)[:, None]
        matrix[-1, -1] = 1
        inverse = torch.linalg.inv(matrix)
        down, across = -(-height // tile), -(-width // tile)
        padded = F.pad(operator[:, 1, 1].double(), (1, across * tile + 1 - width, 1, down * tile + 1 - height))
        tiles = padded.unfold(1, n, tile).unfold(2, n, tile)  # [I, down, across, n, n]
        maps = (inverse @ tiles @ inverse.T).flatten(3).flatten(1, 2).mT  # [I, products, slots]
    else:
        maps = operator.flatten(3).flatten(1, 2)
    maps = F.pad(maps.float(), (0, 0, 0, 0, 0, -inputs % GROUP))
    return maps.reshape(-1, GROUP, *maps.shape[1:]).permute(0, 2, 3, 1).contiguous()


def _ranges(blocks: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, blocks, size):
        yield first, min(size, blocks - first)


def _cpp(problem: Problem, progress=None, isa: str = "", tile: int | None = None) -> tuple[Tensor, Tensor]:
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
    if problem.weight is not None:
        weight = F.pad(problem.weight.flatten(2), (0, 0, 0, extra)).contiguous()
        square = F.pad(problem.style.square(), (0, extra)).contiguous()
    base, target, value = (part.contiguous() for part in (problem.base, problem.target, problem.value))
    shift = base.new_zeros(()) if problem.shift is None else problem.shift
    shift = shift.expand(channels, height, width)
    if shift.stride(1) != width * shift.stride(2):  # one stride over all pixels
        shift = shift.contiguous()
    wide = {"dtype": torch.float64, "device": base.device}
    count = torch.arange(1, problem.steps + 1, **wide)
    rates = torch.stack([problem.lr / (1 - BETA1**count), (1 - BETA2**count).rsqrt()], 1).float()

    lanes = extension().projected_lanes(isa)
    blocks, threads = -(-channels // lanes), torch.get_num_threads()
    losses = torch.empty(blocks, problem.steps, **wide)
    coefficients = base.new_empty(channels, rank or padded, *kernel)
    inputs_of = [maps, base, target, value, shift, weight, square, directions, basis]
    ranges = _ranges(blocks, max(blocks, 1) if progress is None else threads)
    for first, size in ranges if progress is None else progress(ranges, -(-blocks // threads)):
        extension().fit_projected(
            inputs=[0 if data is None else data.data_ptr() for data in inputs_of],
            shift_strides=(shift.stride(0), shift.stride(2)),
            sizes=(tile, padded, taps, height, width, channels, rank, maps.shape[1], maps.shape[2]),
            numbers=(problem.eps, problem.slope, problem.gain),
            absolute=problem.loss == "l1",
            steps=problem.steps,
            project_every=problem.project_every,
            project_gradient=problem.project_gradient,
            rates=rates.data_ptr(),
            outputs=[losses.data_ptr(), coefficients.data_ptr()],
            first=first,
            count=size,
            threads=threads,
            isa=isa,
        )
    mean = losses.sum(0) / problem.base.numel()
    return coefficients if rank else coefficients[:, :inputs].clone(), mean


def _triton(problem: Problem, progress=None) -> tuple[Tensor, Tensor]:
    from ..kernels.fit_projected import launch

    return launch(problem, progress)


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
    Backend("fit_projected", "triton", f"{__name__}:_triton", _triton_supports, _triton_declines),
    Backend("fit_projected", "cpp", f"{__name__}:_cpp", _cpp_supports),
    Backend("fit_projected", "reference", f"{__name__}:_reference"),
)


def example(device: str) -> Problem:
    operator, base = torch.ones(8, 3, 3, 4, 4, device=device), torch.zeros(4, 4, 4, device=device)
    return Problem(
        operator, base, base, base, None, None, None, 0.0, 1.0, 1.0, operator.new_zeros(0, 8), "l1", 1, 0.05, 10, False
    )
