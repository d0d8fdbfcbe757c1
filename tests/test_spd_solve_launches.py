"""What ``spd_solve`` asks of a GPU: launches and waits, counted where CPU tensors stand for a GPU's; capture."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rewrite_core.errors import DiagonalShiftWarning, NonFiniteError, RewriteCoreError
from rewrite_core.ops import SPDFactor, spd_factor, spd_solve
from rewrite_core.ops.spd_solve_op import factor as factor_module
from rewrite_core.ops.spd_solve_op import reference, register

factor_here = functools.partial(spd_factor, backend="reference")
solve_here = functools.partial(spd_solve, backend="reference")
EMPTY = ("empty", "new_empty", "_unsafe_view", "detach", "alias", "lift_fresh")  # no kernel runs


class Machine(TorchDispatchMode):
    """Counts what a GPU would launch (by torch's operations, views aside), and what the host would wait for."""

    def __init__(self):
        super().__init__()
        self.launches, self.waits = [], 0

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        name = op.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.waits += 1
        elif not op.is_view and name not in EMPTY:
            self.launches.append(name)
        return op(*arguments, **(options or {}))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(reference, "_on_cpu", lambda data: False)
    machine = Machine()
    to_host = torch.Tensor.cpu

    def cpu(self):
        machine.waits += 1
        return to_host(self)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    return machine


def second_moment(*batch, n=24):
    rows = torch.randn(*batch, 3 * n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return rows.mT @ rows / (3 * n)


def residual(matrix, x, b):
    return ((matrix @ x - b).norm() / b.norm()).item()


CHECKS = ["sub", "amax", "_to_copy", "cat"]


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_solve_is_six_launches_and_one_wait(gpu, batch):
    matrix = second_moment(*batch)
    b = torch.ones(*batch, 24, 2, dtype=torch.float64)
    with gpu:
        x = register._solve(matrix, b, "reference")  # what the operator runs, which the mode would see as one
    assert gpu.launches == ["linalg_cholesky_ex", "cholesky_solve", *CHECKS] and gpu.waits == 1
    assert residual(matrix, x, b) < 1e-13


def test_a_factor_and_its_solves(gpu):
    matrix = second_moment()
    b = torch.ones(24, dtype=torch.float64)
    with gpu:
        factor = factor_here(matrix)
        assert gpu.launches == ["linalg_cholesky_ex", *CHECKS, "new_zeros"] and gpu.waits == 1
        gpu.launches.clear()
        x = factor.solve(b)
    assert gpu.launches == ["cholesky_solve"] and gpu.waits == 1 and not factor.shifted
    assert residual(matrix, x, b) < 1e-13


def test_the_real_second_moment(gpu):
    with np.load(Path(__file__).parent / "data/kitchen_second_moment.npz") as data:
        matrix = torch.from_numpy(data["mom2"]).double() / float(data["count"])
        keys, solution = (torch.from_numpy(data[name]).double() for name in ("keys", "solution"))
    for x in (solve_here(matrix, keys), factor_here(matrix).solve(keys)):
        assert residual(matrix, x, keys) <= 1e-10
        assert ((x - solution).norm() / solution.norm()).item() <= 1e-9


def test_what_is_shifted_is_refined(gpu):
    matrix = second_moment()
    matrix[5] = matrix[:, 5] = 0
    b = matrix @ torch.ones(24, dtype=torch.float64)
    with pytest.warns(DiagonalShiftWarning):
        factor = factor_here(matrix)
    assert factor.shifted and factor.shift > 0
    with gpu:
        x = factor.solve(b)
    assert gpu.launches.count("cholesky_solve") == 2
    assert residual(factor.matrix, x, b) < 1e-13
    with pytest.warns(DiagonalShiftWarning):
        assert residual(factor.matrix, solve_here(matrix, b), b) < 1e-13


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(
    ("place", "value", "error", "words"),
    [
        ((2, 1), float("nan"), NonFiniteError, "holds NaN"),
        ((1, 2), float("nan"), NonFiniteError, "holds NaN"),  # above the diagonal, where no factor looks
        ((3, 3), float("inf"), NonFiniteError, "holds NaN"),
        ((1, 2), 7.0, RewriteCoreError, "not symmetric"),
        ((3, 3), -1.0, RewriteCoreError, "not positive semidefinite"),
    ],
)
def test_what_is_wrong_is_found(gpu, batch, place, value, error, words):
    matrix = second_moment(*batch)
    matrix[(-1,) * len(batch) + place] = value
    b = torch.ones(*batch, 24, 1, dtype=torch.float64)
    for call in (lambda: solve_here(matrix, b), lambda: factor_here(matrix)):
        with pytest.raises(error, match=words):
            call()


def test_a_capture_is_refused_before_anything_is_launched(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():  # of tensors on a GPU that is not there any launch is an error of another kind
        matrices, one, b = (
            torch.empty(*shape, device="cuda", dtype=torch.float64) for shape in ((2, 4, 4), (4, 4), (2, 4))
        )
        for call in (
            lambda: spd_solve(matrices, b),
            lambda: spd_factor(one),
            lambda: SPDFactor(matrices, matrices, b).solve(b),
            lambda: SPDFactor(one, one, b).condition,
        ):
            with pytest.raises(RewriteCoreError, match=r"^[^.]*which a CUDA graph cannot hold: [^.]*\.$"):
                call()


def test_one_matrix_may_be_solved_with_in_a_capture(monkeypatch):
    """By cuSOLVER; what goes to MAGMA is refused."""
    refused = []
    monkeypatch.setattr(factor_module, "refuse_in_graph", lambda matrix, *words: refused.append(words))
    factor, b = factor_here(second_moment()), torch.ones(24)
    refused.clear()
    factor.solve(b)
    assert not refused
    monkeypatch.setattr(torch.backends.cuda, "preferred_linalg_library", lambda: "_LinalgBackend.Magma")
    factor.solve(b)
    assert len(refused) == 1 and "MAGMA" in refused[0][0]
