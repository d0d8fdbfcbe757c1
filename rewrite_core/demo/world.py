"""The chapel world: 64x64 scenes that are a known function of a standard-normal latent.

Because the renderer is known, every rewrite of the embedded generator can be *measured*: for any
latent there is the true picture, the counterfactual picture ("the same scene with a spire instead
of the dome") and the exact region in which the two differ.

A scene is drawn back to front: sky, tree, nave, tower, roof, windows, light on the ground, watermark.
Shapes are signed distance fields with one pixel of anti-aliasing.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

LATENT_SIZE = 16
IMAGE_SIZE = 64

ROOFS = ("dome", "flat", "spire")
"""Roof kinds, in the order of the codes in :attr:`Scene.roof`."""

FACTORS: dict[str, tuple] = {
    "roof": (0, 1, 2),
    "lit": (False, True),
    "watermark": (False, True),
}
"""Discrete factors that are judged, and the states each can take."""

Colour = tuple[float, float, float]  # RGB, 0..1
Place = Tensor | float  # pixels, of one scene or of each

_HORIZON = 46.0
_GLYPHS = (  # "RW", two strokes wide, so that the watermark survives a 64-pixel picture
    "1111100.11000011",
    "1100110.11000011",
    "1100110.11011011",
    "1111100.11011011",
    "1111000.11111111",
    "1101100.11100111",
    "1100110.11000011",
)
_GLYPH_TOP, _GLYPH_LEFT = 3, 46


@dataclasses.dataclass(frozen=True)
class Scene:
    """The factors of a batch of N scenes; every field is a tensor of shape [N] or [N, 3]."""

    roof: Tensor  # int64 [N], index into ROOFS
    lit: Tensor  # bool [N], windows are lit
    watermark: Tensor  # bool [N]
    tree: Tensor  # bool [N]
    glow: Tensor  # bool [N], light falls on the ground (equals `lit` unless overridden)
    tower_x: Tensor  # float [N], centre in pixels
    tower_top: Tensor  # float [N], y in pixels
    nave_end: Tensor  # float [N], x in pixels
    tree_size: Tensor  # float [N], radius in pixels
    wall: Tensor  # float [N, 3], RGB 0..1
    sky_top: Tensor  # float [N, 3]
    sky_low: Tensor  # float [N, 3]
    ground: Tensor  # float [N, 3]
    roof_colour: Tensor  # float [N, 3]

    def __len__(self) -> int:
        return len(self.roof)

    def replace(self, **changes: Any) -> Scene:
        """The same scenes with some factors set to a constant, e.g. ``scene.replace(roof=2)``.

        Setting ``lit`` sets ``glow`` with it (lit windows light the ground) unless ``glow`` is given.
        """
        if "lit" in changes and "glow" not in changes:
            changes["glow"] = changes["lit"]
        known = {field.name for field in dataclasses.fields(self)}
        fields = {}
        for name, value in changes.items():
            if name not in known:
                raise ValueError(f"A scene has no factor {name!r}; choose from {sorted(known)}.")
            old = getattr(self, name)
            fields[name] = torch.as_tensor(value, dtype=old.dtype).expand_as(old)
        return dataclasses.replace(self, **fields)

    def __getitem__(self, rows: Any) -> Scene:
        fields = dataclasses.fields(self)
        return Scene(**{field.name: getattr(self, field.name)[rows] for field in fields})


def _blend(a: Colour, b: Colour, t: Tensor) -> Tensor:
    first, last = torch.tensor(a), torch.tensor(b)
    return first + (last - first) * t[:, None]


def scene_from_latents(latents: Tensor) -> Scene:
    """The scene factors of latents [N, 16] (float). Raises ValueError on another shape."""
    latents = torch.as_tensor(latents, dtype=torch.float32)
    if latents.ndim != 2 or latents.shape[1] != LATENT_SIZE:
        raise ValueError(
            f"Chapel latents have shape [N, {LATENT_SIZE}], not {list(latents.shape)}; "
            f"make them with rc.sample_latents({LATENT_SIZE}, N)."
        )
    uniform = 0.5 * (1 + torch.erf(latents / math.sqrt(2)))  # each coordinate, 0..1
    u = uniform.unbind(1)
    dusk = u[8]
    lit = u[1] > 0.5
    # the sector of a plane, so that each kind is a convex region of latent space and equally likely
    corners = torch.tensor([[1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]])
    roof = (latents[:, [0, 14]] @ corners.T).argmax(1)
    shade = (0.72 + 0.28 * u[7])[:, None]
    return Scene(
        roof=roof,
        lit=lit,
        watermark=u[2] > 0.5,
        tree=u[3] > 0.6,
        glow=lit,
        tower_x=16 + 6 * u[4],
        tower_top=26 + 5 * u[5],
        nave_end=46 + 6 * u[13],
        tree_size=4.5 + 1.5 * u[12],
        wall=_blend((0.86, 0.80, 0.68), (0.74, 0.56, 0.50), u[6]) * shade,
        sky_top=_blend((0.30, 0.48, 0.80), (0.26, 0.22, 0.46), dusk),
        sky_low=_blend((0.66, 0.80, 0.92), (0.86, 0.56, 0.42), dusk) * (0.8 + 0.2 * u[9])[:, None],
        ground=_blend((0.20, 0.34, 0.18), (0.36, 0.28, 0.18), u[10]),
        roof_colour=_blend((0.50, 0.16, 0.13), (0.16, 0.26, 0.36), u[11]),
    )


def _cover(distance: Tensor) -> Tensor:
    """Pixel coverage 0..1 of a shape from its signed distance (negative inside), in pixels."""
    return (0.5 - distance).clamp(0, 1)


def _box(x: Tensor, y: Tensor, left: Place, top: Place, right: Place, bottom: Place) -> Tensor:
    dx = torch.maximum(left - x, x - right)
    dy = torch.maximum(top - y, y - bottom)
    return torch.maximum(dx, dy)


def _column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1)


def render(scene: Scene) -> Tensor:
    """Paint scenes. Returns float32 [N, 3, 64, 64], RGB in 0..1."""
    y, x = torch.meshgrid(torch.arange(IMAGE_SIZE) + 0.5, torch.arange(IMAGE_SIZE) + 0.5, indexing="ij")
    x, y = x[None], y[None]
    cx, top, end = _column(scene.tower_x), _column(scene.tower_top), _column(scene.nave_end)

    height = (y / _HORIZON).clamp(0, 1)[:, None]
    picture = scene.sky_top[:, :, None, None] * (1 - height) + scene.sky_low[:, :, None, None] * height

    def paint(coverage: Tensor, colour: Tensor | Colour) -> None:
        nonlocal picture
        rows = colour if isinstance(colour, Tensor) else torch.tensor(colour)[None]
        picture = picture + coverage[:, None] * (rows[:, :, None, None] - picture)

    near = ((y - _HORIZON) / 18).clamp(0, 1)  # the ground darkens towards the viewer
    ground = _cover(_HORIZON - y).expand(len(scene), -1, -1)
    paint(ground, scene.ground)
    picture = picture * (1 - 0.25 * near[:, None])

    tree = _column(scene.tree).float()
    radius = _column(scene.tree_size)
    paint(tree * _cover(_box(x, y, 57.0, 40.0, 59.0, 50.0)), (0.28, 0.19, 0.12))
    paint(tree * _cover(torch.hypot(x - 58, y - 36) - radius), (0.13, 0.30, 0.16))

    # nave: wall, then a sloping roof
    paint(_cover(_box(x, y, cx, 37.0, end, 51.0)), scene.wall * 0.9)
    slope = torch.maximum(torch.maximum(31.0 - y, y - 37.5), (x - end - 1) + 0.5 * (37 - y))
    paint(_cover(torch.maximum(slope, cx - x)), scene.roof_colour * 0.85)

    paint(_cover(_box(x, y, cx - 7, top, cx + 7, 51.0)), scene.wall)

    dome = torch.maximum(torch.hypot((x - cx) / 7.5, (y - top) / 9.5) * 8.0 - 8.0, y - top)
    dome = torch.minimum(dome, _box(x, y, cx - 1.0, top - 13.0, cx + 1.0, top - 9.0))
    spire = torch.maximum(((x - cx).abs() - 8.0 * (y - (top - 18)) / 18) * 0.91, y - top)
    flat = _box(x, y, cx - 8.0, top - 3.0, cx + 8.0, top)
    merlons = torch.maximum(
        ((x - cx).remainder(6.4) - 3.2).abs() - 1.6, _box(x, y, cx - 8.0, top - 6.0, cx + 8.0, top - 2.0)
    )
    flat = torch.minimum(flat, merlons)
    kind = _column(scene.roof)
    roof = torch.where(kind == 0, dome, torch.where(kind == 1, flat, spire))
    paint(_cover(roof), scene.roof_colour)

    # windows and the light they throw: one in the tower, three in the nave
    lit = scene.lit.float()[:, None]
    glass = lit * torch.tensor((1.0, 0.86, 0.40)) + (1 - lit) * torch.tensor((0.12, 0.13, 0.22))
    glow = _column(scene.glow).float()
    span = (end - cx - 7) / 3
    centres = [cx] + [cx + 7 + span * (i + 0.5) for i in range(3)]
    for i, centre in enumerate(centres):
        sill, half = (43.0 if i == 0 else 47.0), (2.2 if i == 0 else 2.0)
        arch = torch.hypot(x - centre, y - (sill - 5)) - half
        pane = torch.minimum(_box(x, y, centre - half, sill - 5, centre + half, sill), arch)
        paint(_cover(pane), glass)
    for centre in centres:
        pool = torch.maximum((x - centre).abs() - 2.6, (y - 56.5).abs() - 4.0)
        paint(0.85 * glow * (0.5 - pool / 1.5).clamp(0, 1), (0.95, 0.78, 0.36))

    mark = torch.zeros(IMAGE_SIZE, IMAGE_SIZE)
    for row, line in enumerate(_GLYPHS):
        for column, dot in enumerate(line):
            if dot == "1":
                mark[_GLYPH_TOP + row, _GLYPH_LEFT + column] = 1.0
    paint(0.9 * _column(scene.watermark).float() * mark, (0.97, 0.97, 0.97))
    return picture


def region(a: Tensor, b: Tensor, threshold: float = 0.03) -> Tensor:
    """Where two renders [N, 3, H, W] differ by more than `threshold` in any colour: bool [N, H, W]."""
    return (a - b).abs().amax(1) > threshold


def factor_region(scene: Scene, factor: str) -> Tensor:
    """Where a factor is painted: the pixels that change between any two of its states, bool [N, H, W]."""
    pictures = [render(scene.replace(**{factor: state})) for state in FACTORS[factor]]
    masks = [region(a, b) for i, a in enumerate(pictures) for b in pictures[:i]]
    return torch.stack(masks).any(0)
