"""Shared fixtures: the golden ProGAN problem, recorded from the reference implementation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import user_generator  # noqa: F401  a fixture
from helpers.studio_page import browser, browser_is_there, page, server  # noqa: F401  fixtures

import rewrite_core as rc
from rewrite_core.backends import triton_reason, triton_version
from rewrite_core.cli import allocator
from rewrite_core.solvers.choice import SOLVERS

DATA = Path(__file__).parent / "data"
PROGRAMS = Path(__file__).parent / "programs"
# It is for a process's whole life, and tests that look at this one's memory may come later in it.
allocator.keep_freed_memory = lambda: True

needs_triton = pytest.mark.skipif(triton_reason() is not None, reason=str(triton_reason()))
# What is said of machine code, its instructions, registers and spills, was found so with Triton 3.9. With 3.6 some of
# it does not hold, and what suffers is speed: no float64 tensor cores on sm_100, a few spills, fewer programs side by
# side.
needs_triton_compiler = pytest.mark.skipif(triton_reason((3, 9)) is not None, reason=str(triton_reason((3, 9))))
# Triton 3.6's interpreter was found not to run with NumPy 2.4, and 3.9's to run.
_OLD = (
    triton_version() is not None
    and triton_version() < (3, 9)
    and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
)
needs_triton_interpreter = pytest.mark.skipif(
    triton_reason() is not None or _OLD,
    reason=triton_reason() or "this Triton's interpreter does not run with NumPy 2.4",
)


def read_npz(name: str) -> dict[str, torch.Tensor]:
    with np.load(DATA / name, allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def state_bits(generator):
    return {name: tensor.clone() for name, tensor in generator.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def solver_of(name, steps):
    """The solver of that name, with so many steps if it has steps."""
    return rc.LM() if name == "lm" else SOLVERS[name](steps=steps)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def square(index, size, top, side):
    mask = torch.zeros(size, size)
    mask[top : top + side, top : top + side] = 1
    return rc.Selection(index, mask)


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    return read_npz("proggan_expected.npz")


@pytest.fixture(scope="session")
def latents() -> torch.Tensor:
    return rc.sample_latents(64, 200, seed=1)


@pytest.fixture(scope="session")
def edit(latents) -> rc.Edit:
    return rc.Edit.load(DATA / "proggan_edit.json").on(latents)


@pytest.fixture
def generator():
    return rc.load_proggan(DATA / "proggan_state.npz")


@pytest.fixture
def layer(generator):
    return rc.bind(generator, "layer5.conv")


@pytest.fixture(scope="session")
def moment(latents) -> rc.SecondMoment:
    layer = rc.bind(rc.load_proggan(DATA / "proggan_state.npz"), "layer5.conv")
    return rc.collect_second_moment(layer, latents, batch_size=10, progress=False)


@pytest.fixture(scope="session")
def golden_moment(golden) -> rc.SecondMoment:
    """The reference's own C. It was summed in float32 one pixel at a time, which leaves a relative error of
    7e-6 in it; times its condition number of 6.5e4 that turns directions by up to 2e-2, so what follows from
    C is compared given the same C."""
    moment = rc.SecondMoment(64)
    moment._sum, moment.count = golden["c_matrix"].double() * 4096, 4096
    return moment
