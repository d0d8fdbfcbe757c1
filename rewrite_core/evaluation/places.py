"""Where unseen pictures hold what an edit's context shows: found by its whitened key, without ground truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.base import Box
from ..edits.edit import Edit
from ..edits.goals import bounding_box
from ..edits.selection import Selection
from ..errors import DiagonalShiftWarning, NonFiniteError, SelectionError, silent
from ..layers.bound import BoundLayer
from ..layers.capture import run_to
from ..ops.finite import all_finite
from ..statistics.collection import collect_second_moments
from ..statistics.second_moment import SecondMoment
from .steps import PLAIN, Steps

_CELLS = 6  # a context is looked for on a map where it is at most so many cells long; finer maps are averaged
_LOWEST = 0.1  # the pictures without the context begin as this share of all: those with the lowest scores
_TOP = 0.05  # of a context marked in one picture alone, what such a picture scores: the mean of this share, the highest
_TOUCHED = 0.3  # of the fullest cell's share: a cell with less is at the edge of a mask, and not of it
_PART = 4  # batches of a collection between two turns of others
_ROUNDS = 50  # of moving the centre of the pictures without; it settles in a few
_SURE = 0.25  # of the way from the centre without to the centre with: so far from the level a picture is clear


@dataclasses.dataclass(frozen=True)
class Window:
    """A box of the picture of fixed size that a context fills, on a grid of cells.

    cells: (height, width) in cells; grid: the map's (height, width) in cells.
    """

    cells: tuple[int, int]
    grid: tuple[int, int]

    def box(self, corner: tuple[int, int], size: Sequence[int]) -> tuple[slice, slice]:
        """The index of the window at a corner, in cells, in a picture of (height, width) pixels."""
        slices = []
        for start, cells, grid, pixels in zip(corner, self.cells, self.grid, size, strict=True):
            first = min(round(start * pixels / grid), pixels - self._pixels(cells, grid, pixels))
            slices.append(slice(first, first + self._pixels(cells, grid, pixels)))
        return slices[0], slices[1]

    @staticmethod
    def _pixels(cells: int, grid: int, pixels: int) -> int:
        return max(1, round(cells * pixels / grid))

    def corner(self, area: Tensor) -> tuple[int, int]:
        """The corner of the window around the cells that an area [*grid] fills."""
        top, left, bottom, right = cells_of(area)
        found = []
        for start, stop, cells, grid in zip((top, left), (bottom, right), self.cells, self.grid, strict=True):
            found.append(max(0, min(grid - cells, (start + stop) // 2 - cells // 2)))
        return found[0], found[1]


def cells_of(area: Tensor) -> Box:
    """The box of the cells that an area [h, w] fills, not counting those that it hardly touches."""
    return bounding_box((area >= _TOUCHED * area.max()).float())


@dataclasses.dataclass(frozen=True)
class Places:
    """What one layer tells of where a context is in unseen pictures.

    layer: the layer. window: the size of a place. heat: float [N, h, w], the score at every corner, a cosine. level:
    halfway between pictures with the context and without. low, high: the mean score of the pictures without it, and of
    the contexts themselves. spread: standard deviation of the former.
    """

    layer: BoundLayer
    window: Window
    heat: Tensor
    level: float
    low: float
    high: float
    spread: float

    @property
    def scores(self) -> Tensor:
        """Of the best place of each picture, float [N]."""
        return self.heat.flatten(1).amax(1)

    @property
    def distinct(self) -> float:
        """How far the context stands out from pictures without it, in standard deviations of theirs."""
        return (self.high - self.low) / max(self.spread, 1e-12)

    @property
    def matching(self) -> list[int]:
        """The pictures that clearly hold the context, best first."""
        scores = self.scores
        order = scores.argsort(descending=True, stable=True)
        return [int(row) for row in order if scores[row] > self.level + self._margin]

    @property
    def unrelated(self) -> list[int]:
        """The pictures that clearly do not hold it; what is between is left alone."""
        return [int(row) for row in (self.scores < self.level - self._margin).nonzero()[:, 0]]

    @property
    def _margin(self) -> float:
        return _SURE * (self.high - self.low)

    def best(self, row: int) -> tuple[int, int]:
        """The corner of the best place of a picture."""
        top, left = divmod(int(self.heat[row].argmax()), self.heat.shape[-1])
        return top, left

    def all_in(self, row: int) -> list[tuple[int, int]]:
        """The corners of all places of a picture above the level, best first, none within half a window of a better
        one."""
        reach = [2 * max(1, cells // 2) + 1 for cells in self.window.cells]
        heat = self.heat[row][None, None]
        around = F.max_pool2d(heat, reach, 1, [side // 2 for side in reach])
        top = ((heat == around) & (heat > self.level))[0, 0].nonzero()
        return sorted(((int(y), int(x)) for y, x in top), key=lambda at: -heat[0, 0][at].item())


class _Sight:
    """One layer's view of a context."""

    def __init__(self, layer: BoundLayer, moment: SecondMoment, where: Sequence[Selection], keys: Tensor):
        self.layer = layer
        with silent(DiagonalShiftWarning):
            lower = moment.factor.lower
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
        self._whitening = torch.linalg.solve_triangular(lower, eye, upper=False).float()  # L^-1 of C = L L^T
        size = tuple(keys.shape[2:])
        areas = [selection.area(size) for selection in where]
        longest = max(
            max(stop - start for start, stop in zip(box[:2], box[2:], strict=True)) for box in map(cells_of, areas)
        )
        self._pool = 1
        while longest > _CELLS * self._pool and not any(side % (2 * self._pool) for side in size):
            self._pool *= 2
        grid = size[0] // self._pool, size[1] // self._pool
        self._areas = [selection.area(grid) for selection in where]
        self._maps = self.white(keys).split(1)
        boxes = [cells_of(area) for area in self._areas]
        self.window = Window(
            (max(box[2] - box[0] for box in boxes), max(box[3] - box[1] for box in boxes)),
            grid,
        )
        self.corners = [self.window.corner(area) for area in self._areas]
        self._parts = [(self._cut(own[0], i), self._cut(self._areas[i][None], i)) for i, own in enumerate(self._maps)]
        self.found: list[Tensor] = []

    def _cut(self, maps: Tensor, context: int) -> Tensor:
        """The window of one of the contexts in its own maps [I, h, w]."""
        (top, left), (height, width) = self.corners[context], self.window.cells
        return maps[:, top : top + height, left : left + width]

    def white(self, keys: Tensor) -> Tensor:
        """Key maps [N, I, h, w] whitened, L^-1 k, averaged over cells: float32 on the CPU, as is all that follows."""
        whitening = self._whitening.to(keys.device)
        if whitening.ndim == 2:
            rows = torch.einsum("ij,njhw->nihw", whitening, keys.float())
        else:  # of groups of channels
            own = keys.float().unflatten(1, (len(whitening), -1))
            rows = torch.einsum("gij,ngjhw->ngihw", whitening, own).flatten(1, 2)
        return F.avg_pool2d(rows, self._pool).cpu()

    def _heat(self, white: Tensor, contexts: Sequence[int]) -> Tensor:
        """The score of every corner of the window in maps [N, I, h, w], by some of the contexts."""
        cover = torch.stack([self._parts[i][1] for i in contexts]).sum(0)
        keys = torch.stack([self._parts[i][0] * self._parts[i][1] for i in contexts]).sum(0)
        mean = keys / cover.clamp_min(1e-12)
        along = F.conv2d(white, keys[None])[:, 0]
        length = F.conv2d(white.square().sum(1, keepdim=True), cover[None])[:, 0].clamp_min(1e-12).sqrt()
        return along / (length * (cover * mean.square()).sum().sqrt().clamp_min(1e-12))

    def look(self, keys: Tensor) -> None:
        """Score the pictures of some key maps."""
        heat = self._heat(self.white(keys), range(len(self._maps)))
        if not all_finite(heat):
            raise NonFiniteError(f"The keys of {self.layer.name!r} hold NaN or infinity; leave those pictures out.")
        self.found.append(heat)

    def places(self) -> Places:
        """What was found. Each context is scored by the others, so that it does not match itself."""
        heat = torch.cat(self.found)
        scores = heat.flatten(1).amax(1).double()
        number = len(self._maps)
        if number > 1:
            own = [
                self._heat(self._maps[i], [j for j in range(number) if j != i])[0][self.corners[i]].item()
                for i in range(number)
            ]
            high = sum(own) / number
        else:
            high = scores.sort(descending=True).values[: max(1, round(_TOP * len(scores)))].mean().item()
        low = scores.quantile(_LOWEST).item()
        for _ in range(_ROUNDS):  # k-means of two centres, one of which is known
            below = scores[scores <= (low + high) / 2]
            if not len(below):
                break
            low = below.mean().item()
        below = scores[scores <= (low + high) / 2]
        spread = below.std().item() if len(below) > 1 else 0.0
        return Places(self.layer, self.window, heat, (low + high) / 2, low, high, spread)


def find_places(
    layers: Sequence[BoundLayer],
    edit: Edit,
    latents: Tensor,
    unseen: Tensor,
    batch_size: int,
    steps: Steps = PLAIN,
) -> list[Places]:
    """Where unseen pictures hold what an edit's context shows, as each layer tells.

    The score of a place is the cosine of two lists of whitened keys ``L^-1 k``, C = L L^T: those in its window, and the
    mean of those in the windows of the contexts, cell by cell. The level lies halfway between what the contexts
    themselves score and the mean of the pictures without.

    Args:
        layers: layers of one generator, whose maps have two axes.
        edit: whose ``where`` marks the context in rows of `latents` [M, ...].
        unseen: [N, ...], the pictures to look through. C is that of their keys.

    Raises:
        MaskError: a mask vanishes on a layer's map. NonFiniteError: keys are NaN or infinite.
    """
    if len(unseen) < 2:
        raise SelectionError("Places are looked for in at least two unseen pictures; give more latents.")
    moments = moments_of(layers, unseen, batch_size, steps)
    keys: dict[int, Tensor] = {}
    marked = torch.cat([selection.latent(latents) for selection in edit.where])
    with steps.turn():
        run_to(layers, marked, lambda number, capture: keys.__setitem__(number, capture.key.clone()))
    sights = [_Sight(layer, moments[i], edit.where, keys[i]) for i, layer in enumerate(layers)]
    stage = "find the context"
    for batch in steps.over(steps.own(unseen.split(batch_size)), stage):
        with steps.turn():
            run_to(layers, batch, lambda number, capture: sights[number].look(capture.key))
    for sight in sights:
        sight.found = steps.all(sight.found, stage)
    return [sight.places() for sight in sights]


def moments_of(
    layers: Sequence[BoundLayer], latents: Tensor, batch_size: int, steps: Steps = PLAIN
) -> list[SecondMoment]:
    """The second moments of several layers in one pass over latents [N, ...], in steps between which others may have
    their turn."""
    stage, parts = "second moments", latents.split(_PART * batch_size)
    processes = 1 if steps.shard is None else steps.shard.of
    found: list[SecondMoment] = []
    for some in steps.over([parts[i : i + processes] for i in range(0, len(parts), processes)], stage):
        own: list[list[SecondMoment]] = [[] for _ in layers]
        for part in steps.own(some):  # one at most
            with steps.turn():
                moments = collect_second_moments(layers, part, batch_size=batch_size, progress=False)
            own = [[moment] for moment in moments]
        # in the order of the parts, which is that of one process: so the sums have the same bits
        for moments in map(list, zip(*(steps.all(each, stage) for each in own), strict=True)):
            found = [whole.merge(more) for whole, more in zip(found, moments, strict=True)] if found else moments
    return found
