"""``spd_solve``: the public function, its operator of torch, its backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, get_num_threads, library

from ...backends import Backend, dispatched, extension, extension_at_once, extension_reason, select
from ..memory import plain, without_gradient
from . import cuda
from .factor import spd_factor
from .problem import ASYMMETRY, EPSILON, SMALLEST, Cholesky, Facts, check_matrix, check_rhs, refuse_in_graph


def spd_solve(matrix: Tensor, rhs: Tensor, backend: str = "auto") -> Tensor:
    """The solution x of ``matrix @ x = rhs`` for a symmetric positive definite matrix, accurate to float64.

    matrix   [n, n] or [B, n, n], float32 or float64
    rhs      [n] or [n, m]; with a batch [B, n] or [B, n, m]; any real floating type
    backend  "auto", "cuda", "cpp" or "reference"

    Returns float64 in the shape of ``rhs``. Factors, solves, refines where that is needed; use :func:`spd_factor` to
    solve again with the same matrix, and see it for rank-deficient matrices (DiagonalShiftWarning) and for
    what is raised. Not differentiable: gradients stop here. On a GPU the host waits once, to look at the checks; inside
    the capture of a CUDA graph that is refused (RewriteCoreError).
    SciPy: ``scipy.linalg.solve(a, b, assume_a="pos")``.
    """
    kernels = extension_at_once(_CPP, _CPP_KERNELS, backend)
    if kernels is not None:
        x = kernels.spd_solve_at_once(matrix, rhs, ASYMMETRY, SMALLEST, EPSILON, get_num_threads())
        if x is not NotImplemented:
            return _by_factor(matrix, rhs, backend) if x is None else x
    check_matrix(matrix)
    check_rhs(matrix, rhs)
    refuse_in_graph(matrix, "spd_solve looks at its checks on the host", "factor with spd_factor before the capture")
    op = torch.ops.rewrite_core.spd_solve if dispatched(matrix, rhs) else _solve
    return op(without_gradient(matrix), without_gradient(rhs), backend)


SKETCHED_FROM = 256  # rows: a smaller matrix is read as fast, and many a factor of one solves once


def _cpp_examine(matrix: Tensor) -> list[list[float]]:
    matrix = matrix.contiguous()
    return extension().examine(
        matrices=matrix.data_ptr(), batch=len(matrix), n=matrix.shape[-1], threads=torch.get_num_threads()
    )


def _cpp_factor(matrix: Tensor, least: float, isa: str = "") -> tuple[Tensor, Tensor]:
    matrix = matrix.contiguous()
    lower = torch.empty_like(matrix)
    info = torch.empty(len(matrix), dtype=torch.int64, device="cpu")
    extension().cholesky(
        matrices=matrix.data_ptr(),
        lower=lower.data_ptr(),
        batch=len(matrix),
        n=matrix.shape[-1],
        least=least,
        info=info.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return lower, info


def _cpp_examined(given: Tensor, matrix: Tensor, least: float) -> tuple[Tensor, list[Facts]]:
    found = _cpp_examine(given)
    lower, pivots = _cpp_factor(matrix, least)
    parts = zip(found, pivots.tolist(), strict=True)
    return lower, [Facts(mean, largest, apart, pivot) for (mean, largest, apart), pivot in parts]


def _cpp_sketch(matrix: Tensor, isa: str = "") -> Tensor:
    """Of [n, n] or [B, n, n]: [..., n, 2, rows], weights that look like chance, and sums of the equations with them."""
    matrix = matrix.contiguous()
    sketches = matrix.new_empty(*matrix.shape[:-1], 2, extension().sketch_rows)
    extension().sketch(
        matrices=matrix.data_ptr(),
        batch=len(matrix) if matrix.ndim == 3 else 1,
        n=matrix.shape[-1],
        sketches=sketches.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return sketches


def _cpp_solve(
    matrix: Tensor, lower: Tensor, rhs: Tensor, sketch: Tensor | None = None, isa: str = ""
) -> Tensor | None:
    matrix, lower, rhs = matrix.contiguous(), lower.contiguous(), plain(rhs).contiguous()  # kept for the call
    x = torch.empty_like(rhs)
    finite = extension().cholesky_solve(
        matrices=matrix.data_ptr(),
        lower=lower.data_ptr(),
        sketches=None if sketch is None else sketch.data_ptr(),
        batch=len(matrix) if matrix.ndim == 3 else 1,
        n=matrix.shape[-1],
        rhs=rhs.data_ptr(),
        sides=1 if rhs.ndim < matrix.ndim else rhs.shape[-1],
        x=x.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return x if finite else None


def _cpp_direct(matrix: Tensor, rhs: Tensor) -> Tensor | None:
    if matrix.dtype != torch.float64:  # sums in float32 are made symmetric first
        return None
    matrix, rhs = plain(matrix).contiguous(), plain(rhs if rhs.dtype == torch.float64 else rhs.double()).contiguous()
    x = torch.empty_like(rhs)
    good = extension().spd_solve(
        matrices=matrix.data_ptr(),
        batch=len(matrix) if matrix.ndim == 3 else 1,
        n=matrix.shape[-1],
        asymmetry=ASYMMETRY,
        smallest_mean=SMALLEST,
        epsilon=EPSILON,
        rhs=rhs.data_ptr(),
        sides=1 if rhs.ndim < matrix.ndim else rhs.shape[-1],
        x=x.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return x if good else None


def _cpp_refined(
    matrix: Tensor, lower: Tensor, rhs: Tensor, shifted: bool, sketch: Tensor | None = None
) -> Tensor | None:
    return _cpp_solve(matrix, lower, rhs, sketch)  # looks at the residual itself


def _cpp_sketched(matrix: Tensor) -> Tensor | None:
    return _cpp_sketch(matrix) if matrix.shape[-1] >= SKETCHED_FROM else None


def _cpp_at_once(matrix: Tensor, lower: Tensor, sketch: Tensor | None, rhs: Tensor) -> Any:
    return extension().cholesky_solve_at_once(matrix, lower, sketch, rhs, get_num_threads())


run_cpp = Cholesky(_cpp_examined, _cpp_refined, _cpp_direct, _cpp_sketched, _cpp_at_once)


def _cpp_supports(matrix: Tensor, rhs: Tensor | None = None) -> str | None:
    if matrix.device.type != "cpu":
        reason = f"it works on CPU tensors, and the matrix is on {matrix.device}"
        if matrix.device.type == "cuda":
            reason += ", where cuda or torch.linalg (cuSOLVER) factors"
        return reason
    return extension_reason()


_CPP_KERNELS = run_cpp  # whatever the name comes to mean
_CPP = Backend("spd_solve", "cpp", f"{__name__}:run_cpp", _cpp_supports)
BACKENDS = (
    Backend("spd_solve", "cuda", f"{__package__}.cuda:run_cuda", cuda.supports, cuda.declines),
    _CPP,
    Backend("spd_solve", "reference", f"{__package__}.reference:run_reference"),
)


def example(device: str) -> tuple[Tensor, Tensor]:
    return torch.eye(64, dtype=torch.float64, device=device), torch.ones(64, dtype=torch.float64, device=device)


# define + impl and not custom_op, whose first call imports torch._dynamo: more than a second of CPU time.
library.define(
    "rewrite_core::spd_solve",
    "(Tensor matrix, Tensor rhs, str backend='auto') -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _solve(matrix: Tensor, rhs: Tensor, backend: str = "auto") -> Tensor:
    x = select("spd_solve", backend, matrix, rhs).load().direct(matrix, rhs)
    return _by_factor(matrix, rhs, backend) if x is None else x


def _by_factor(matrix: Tensor, rhs: Tensor, backend: str) -> Tensor:
    """The long way, which says what is wrong, or shifts."""
    return spd_factor(matrix, backend).solve(rhs).contiguous()


library.impl("rewrite_core::spd_solve", "CompositeExplicitAutograd", _solve)


@library.register_fake("rewrite_core::spd_solve")
def _(matrix: Tensor, rhs: Tensor, backend: str = "auto") -> Tensor:
    return rhs.new_empty(rhs.shape, dtype=torch.float64)
