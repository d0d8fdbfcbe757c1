"""Calls of tests/csrc/run_spd_solve.cpp, the GPU kernel of spd_solve on the CPU."""

import struct
from dataclasses import dataclass

import numpy as np

EPSILON = np.finfo(np.float64).eps
SMALLEST = np.finfo(np.float64).tiny / EPSILON
FACTS = ("mean", "largest", "difference", "pivot", "shift", "verdict")


@dataclass
class Call:
    """One launch; what is None is not handed over."""

    matrix: np.ndarray  # [batch, n, n]
    rhs: np.ndarray  # [batch, n, sides]
    given: np.ndarray | None = None
    factor: np.ndarray | None = None
    lower: bool = False
    blocks: int = 1
    threads: int = 64
    passes: int = 1
    seed: int = 0
    removed: int = -1
    first_shift: float = EPSILON
    limit: float = 1e-6  # asymmetry
    smallest: float = SMALLEST

    def write(self, file):
        batch, n, sides = self.rhs.shape
        whole = [n, batch, sides, self.blocks, self.threads, self.passes, self.seed, self.removed]
        whole += [self.given is not None, self.factor is not None, self.lower]
        real = [self.limit, self.smallest, n * EPSILON, self.first_shift, 1e-2]
        file.write(struct.pack("<11q5d", *map(int, whole), *real))
        for part in (self.matrix, self.given, self.factor, self.rhs):
            if part is not None:
                file.write(np.ascontiguousarray(part, dtype=np.float64).tobytes())

    def read(self, file):
        batch, n, sides = self.rhs.shape

        def numbers(*shape):
            count = int(np.prod(shape))
            return np.frombuffer(file.read(8 * count), dtype=np.float64).reshape(shape)

        x, facts = numbers(batch, n, sides), numbers(batch, len(FACTS))
        return x, facts, numbers(batch, n, n) if self.lower else None
