"""Calls of tests/csrc/run_fit_projected.cpp, the GPU kernel of fit_projected on the CPU; the extension in its place."""

import struct
from dataclasses import dataclass, field

import numpy as np

from .gpu_kernels import launch, numbers

CHANNELS, TILES, ROWS = (32, 32, 64), (1, 3, 3), (8, 48, 96)  # by form, as with_form() there has them
MAPS = ("base", "target", "value")


@dataclass
class Call:
    """One launch, of what fit_projected_cuda was given."""

    given: dict
    form: int
    seed: int = 0
    removed: int = -1

    def __post_init__(self):
        sizes = ("channels", "inputs", "taps", "pixels", "ranks", "steps", "project_every", "absolute")
        self.sizes = [int(self.given[name]) for name in sizes]

    def shapes(self):
        """Of the arrays that are read, in their order."""
        channels, inputs, taps, pixels, ranks, steps, *_ = self.sizes
        maps = dict.fromkeys((*MAPS, "shift"), (channels, pixels))
        return {
            "maps": (inputs * taps, pixels),
            **maps,
            "weight": (channels, inputs * taps),
            "square": (inputs,),
            "directions": (ranks, inputs),
            "basis": (ranks, taps, pixels),
            "rates": (steps, 2),
        }

    def parts(self):
        return -(-self.sizes[0] // CHANNELS[self.form]) * self.given["blocks"]

    def write(self, file):
        given = self.given
        whole = [*self.sizes, *(given[name] is not None for name in ("shift", "weight", "basis"))]
        whole += [self.form, given["blocks"], self.seed, self.removed]
        file.write(struct.pack("<15q3d", *map(int, whole), given["eps"], given["slope"], given["gain"]))
        for name, shape in self.shapes().items():
            if given[name] is not None:
                file.write(numbers(given[name], *shape, dtype=np.float32).tobytes())

    def read(self, file):
        channels, inputs, taps, _, ranks, steps, *_ = self.sizes
        shape = (channels, ranks or inputs, taps)
        coefficients = np.frombuffer(file.read(4 * int(np.prod(shape))), dtype=np.float32).reshape(shape)
        shape = (self.parts(), steps)
        return coefficients, np.frombuffer(file.read(8 * int(np.prod(shape))), dtype=np.float64).reshape(shape)


@dataclass
class Extension:
    """The extension as REWRITE_CORE_CUDA=1 builds it, whose launches run on the CPU at once."""

    program: object
    folder: object
    form: int
    blocks: int
    options: dict = field(default_factory=dict)  # of each Call
    launches: list = field(default_factory=list)

    def fit_projected_plan(self, weights, pixels, taps, device):
        return (TILES[self.form], self.blocks) if weights <= ROWS[self.form] * self.blocks else (0, 0)

    def fit_projected_parts(self, channels, tiles, blocks):
        return -(-channels // CHANNELS[self.form]) * blocks

    def fit_projected_cuda(self, **given):
        self.launches.append(given)
        assert (given["tiles"], given["blocks"]) == (TILES[self.form], self.blocks)
        call = Call(given, self.form, **self.options)
        coefficients, losses = launch(self.program, [call], self.folder)[0]
        numbers(given["coefficients"], *coefficients.shape, dtype=np.float32)[:] = coefficients
        numbers(given["losses"], *losses.shape)[:] = losses
