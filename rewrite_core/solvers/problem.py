"""What a solver is given and what it returns: the coefficients Lambda of a rank-R change W1 = W0 + Lambda D (paper,
eq. 10 to 15)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..adapters.base import Capture, PostOperation
from ..errors import NoImprovementWarning, SolverError, UnderdeterminedWarning, warn
from ..layers.bound import BoundLayer
from ..statistics import blocks
from ..waits import likely, on_gpu, sent

_USELESS = 0.99  # of the loss before: a fit that leaves so much of it did next to nothing
_AT_ONCE = 2**21  # numbers of u, on a CPU: 8 MiB, for which no new pages are asked of the system each time
_AT_ONCE_ON_GPU = 2**27


@dataclasses.dataclass(frozen=True)
class Beyond:
    """What should come out beyond the layer, of some pictures: what `follow` makes of the layer's value."""

    capture: Capture  # of the pictures, [N, I, *map]
    follow: Callable[[Tensor], Tensor]  # a value [N, O, *map] -> [N, C, *size], differentiable
    target: Tensor  # [N, C, *size]
    weights: Tensor | None = None  # of the places, [N, 1, *size]; None: all alike

    def distance(self, layer: BoundLayer, weight: Tensor, loss: str) -> Tensor:
        """Mean absolute (l1) or squared (l2) error over the places, by their weights, with that weight of the layer."""
        error = self.follow(layer.value(self.capture, weight)).to(self.target) - self.target
        error = error.abs() if loss == "l1" else error.square()
        if self.weights is None:
            return error.mean()
        return (error * self.weights).sum() / (self.weights.sum() * error.shape[1])


@dataclasses.dataclass(frozen=True)
class LayerProblem:
    """Make the layer's value of each region's capture equal its target, by changing the weight along `directions`.

    Several regions are an edit's several pastes: one change for all of them. With `beyond` it is what follows the layer
    that is compared, and the value counts `value_weight` beside it; `ordinary` should stay as it is.
    """

    layer: BoundLayer
    regions: tuple[tuple[Capture, Tensor], ...]  # each one latent, perhaps cropped, and its goal [1, O, *map]
    directions: Tensor  # [R, I], orthonormal rows
    loss: str = "l1"
    preserve: float = 0.0
    generic: Tensor | None = None  # [R kh kw, R kh kw] (or one per group): generic_second_moment, where preserve > 0
    beyond: Beyond | None = None
    ordinary: Beyond | None = None  # where preserve > 0 and `beyond` is there
    value_weight: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: that of the goals, float32 at least."""
        if self.beyond is not None:
            return self.beyond.capture.key.dtype
        return self.regions[0][1].dtype if self.regions else torch.float64

    @property
    def nbytes(self) -> int:
        """Of its keys and goals."""
        held = [part for capture, target in self.regions for part in (capture.key, target)]
        for pictures in (self.beyond, self.ordinary):
            held += [] if pictures is None else [pictures.capture.key, pictures.target]
        return sum(part.nbytes for part in held)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight.to(self.dtype)

    @property
    def own_weight(self) -> Tensor:
        """The weight without the zeros between groups, [O, I / groups, *kernel]."""
        return self.layer.own_weight.to(self.dtype)

    @property
    def coefficient_shape(self) -> tuple[int, ...]:
        return (self.layer.out_channels, len(self.directions), *self.layer.kernel_size)

    def distance(self, weight: Tensor) -> Tensor:
        """Mean absolute (l1) or mean squared (l2) error with that weight, as torch.nn.functional defines them, over all
        pixels of all regions."""
        values = [self.layer.value(capture, weight) for capture, _ in self.regions]
        targets = [target for _, target in self.regions]
        if len(self.regions) > 1:
            values, targets = ([torch.cat([part.flatten(2) for part in parts], 2)] for parts in (values, targets))
        return (F.l1_loss if self.loss == "l1" else F.mse_loss)(values[0], targets[0])


@dataclasses.dataclass(frozen=True)
class LayerSolution:
    """coefficients [O, R, *kernel]; losses: before the first step, then one per step; solver: what ran; final_loss:
    of the coefficients, None where nothing was fitted; last_loss: after the last step, where steps are counted; status:
    how many output channels ended how ("lm"), or ran as what ("projected", "unconstrained": "fused" or "autograd")."""

    coefficients: Tensor
    losses: list[float]
    solver: str
    final_loss: float | None
    status: dict[str, int] = dataclasses.field(default_factory=dict)
    iterations: int = 0  # "lm": tried by all channels together; else the number of steps
    last_loss: float | None = None
    finite: bool = False  # whether the coefficients were looked at and are finite


def combine(coefficients: Tensor, directions: Tensor, groups: int = 1) -> Tensor:
    """Lambda D: [O, R, *kernel] and [R, I] -> [O, I, *kernel]; of several groups what is inside them, [O, I / groups,
    *kernel]."""
    if groups == 1:
        return torch.einsum("or...,ri->oi...", coefficients, directions)
    outputs, rows = coefficients.unflatten(0, (groups, -1)), directions.unflatten(1, (groups, -1))
    return torch.einsum("gor...,rgi->goi...", outputs, rows).flatten(0, 1)


def basis_maps(layer: BoundLayer, key: Tensor, directions: Tensor) -> Tensor:
    """The maps u that a rank-R change enters through: [N, R kh kw, *map'] for keys [N, I, *map].

    u[(r, y, x)] is the layer's linear operator on the single map D[r] . k with the kernel that is one at
    (y, x), so that linear output = base + Lambda u for strided, transposed and blurred layers alike.
    """
    maps = torch.einsum("ri,ni...->nr...", directions.to(key.dtype), key)
    out = layer.taps(maps.flatten(0, 1))
    return out.reshape(len(maps), -1, *out.shape[2:])


def grouped_basis_maps(layer: BoundLayer, key: Tensor, directions: Tensor) -> Tensor:
    """:func:`basis_maps` of every group, each from its own input channels, at once: [N, groups, R kh kw, *map']."""
    own = directions.to(key.dtype).unflatten(1, (layer.groups, -1))  # [R, groups, I / groups]
    maps = torch.einsum("rgi,ngi...->ngr...", own, key.unflatten(1, (layer.groups, -1)))
    out = layer.taps(maps.flatten(0, 2))
    return out.reshape(len(maps), layer.groups, -1, *out.shape[2:])


def generic_second_moment(layer: BoundLayer, directions: Tensor, latents: Tensor, moment: Tensor) -> Tensor:
    """E[u u^T] over ordinary images, float64 [R kh kw, R kh kw]: what `preserve` penalises. Of a grouped layer
    one for each group, [groups, R kh kw, R kh kw].

    A 1x1 layer (stride 1, no padding) has it exactly, D C D^T; others estimate it from the images of `latents`.
    `moment` is C, or of a grouped layer its blocks, [groups, I / groups, I / groups].
    """
    weight = layer.weight
    if math.prod(layer.kernel_size) == 1:
        axes = max(1, len(layer.kernel_size))
        with torch.no_grad():
            ones = weight.new_ones(1, 1, *[2] * axes), weight.new_ones(1, 1, *layer.kernel_size)
            scales = layer.linear(*ones).double()
        scale = scales.flatten()[0]
        if scales.shape[2:] == (2,) * axes and likely((scales == scale).all()):
            rows, moment = directions.double(), sent(moment, weight.device)
            if layer.groups == 1:
                return scale.square() * rows @ moment @ rows.T
            return scale.square() * blocks.grams(rows, moment)
    total: Tensor | None = None
    count = 0
    with torch.no_grad():
        for batch in latents.split(8):
            keys = layer.keys(batch)
            if layer.groups == 1:
                basis = basis_maps(layer, keys, directions)
                total = ops.second_moment(basis.flatten(2)[..., None], out=total)
                count += basis.numel() // basis.shape[1]
            else:
                part, positions = _of_groups(layer, keys, directions)
                total = part if total is None else total.add_(part)
                count += positions
    assert total is not None  # there is at least one latent
    return total / count


def _of_groups(layer: BoundLayer, key: Tensor, directions: Tensor) -> tuple[Tensor, int]:
    """The sum of u u^T over the positions of keys [N, I, *map], [groups, J, J], and the number of these. All u at once
    would be `taps` times as large as the keys: some are made and added up at a time, so that they stay in the cache."""
    groups, taps = layer.groups, math.prod(layer.kernel_size)
    own = directions.to(key.dtype).unflatten(1, (groups, -1))  # [R, groups, I / groups]
    most = _AT_ONCE_ON_GPU if on_gpu(key) else _AT_ONCE
    size = max(1, len(own) * taps * math.prod(key.shape[2:]))  # of one image's u of one group
    some, images = min(groups, max(1, most // size)), max(1, most // (size * groups))
    parts, positions = [], 0
    for first in range(0, groups, some):
        rows = own[:, first : first + some]
        total: Tensor | None = None
        for keys in key.unflatten(1, (groups, -1))[:, first : first + some].split(images):
            maps = torch.einsum("rgi,ngi...->ngr...", rows, keys)
            basis = layer.taps(maps.flatten(0, 2))  # [N some R, taps, *map']
            basis = basis.reshape(len(keys), -1, math.prod(basis.shape[2:]), 1)
            total = ops.second_moment(basis, out=total, groups=rows.shape[1])
            positions += basis.shape[0] * basis.shape[2]
        assert total is not None  # there is at least one key
        parts.append(total.reshape(rows.shape[1], *total.shape[-2:]))
    return torch.cat(parts), positions // len(parts)


def inputs_of(layer: BoundLayer, group: int) -> slice:
    """The input channels of a group."""
    size = layer.in_channels // layer.groups
    return slice(group * size, (group + 1) * size)


def is_known(problem: LayerProblem) -> bool:
    """Whether what follows the layer is known, per channel."""
    return problem.layer.post_operation(problem.regions[0][0]) is not None


def after(problem: LayerProblem, capture: Capture) -> PostOperation:
    """What follows the layer. Raises SolverError where that is not known."""
    operation = problem.layer.post_operation(capture)
    if operation is None:
        raise SolverError(f"What follows {problem.layer.name!r} is not known per channel.")
    return operation


def warn_underdetermined(problem: LayerProblem) -> None:
    """Warn where a channel has at least as many unknowns as pixels."""
    rank, taps = len(problem.directions), math.prod(problem.coefficient_shape[2:])
    pixels = sum(math.prod(target.shape[2:]) for _, target in problem.regions)
    if rank * taps >= pixels and not problem.preserve:
        warn(
            f"Each channel has {rank * taps} unknowns for {pixels} pixels, so the goal is met whatever that does to "
            "other images: use region='map' where only a part of the map is fitted, a lower rank, or preserve=0.3.",
            UnderdeterminedWarning,
            advice={"region": "map", "preserve": 0.3},
        )


def warn_of_no_use(problem: LayerProblem, solution: LayerSolution, whole: bool) -> None:
    """Warn where the solution is no better than no change, and say what to do; `whole`: whole maps were fitted."""
    if solution.final_loss is None or not solution.losses:
        return  # nothing was fitted
    first, final, kind = solution.losses[0], solution.final_loss, NoImprovementWarning
    little = f"The fit changed next to nothing (loss {first:.4g} -> {final:.4g})"
    if first == 0:
        warn("The layer's value is the goal already, so the change is none: paste what is not there yet.", kind)
    elif final > first:
        warn(
            f"The fit of {solution.solver!r} ended worse than it began (loss {first:.4g} -> {final:.4g}): use "
            "solver='lm', or a lower lr.",
            kind,
            advice={"solver": "lm"},
        )
    elif final <= _USELESS * first:
        return
    elif problem.preserve:
        warn(f"{little}: lower `preserve`, or raise the rank.", kind)
    elif whole and problem.loss == "l1":
        warn(
            f"{little}: on a whole map l1 is often lowest where nothing changes, so use loss='l2' or region='box'.",
            kind,
            advice={"loss": "l2", "region": "box"},
        )
    else:
        warn(
            f"{little}: mark context that is more like the pasted place, raise the rank, or choose another layer.",
            kind,
        )
