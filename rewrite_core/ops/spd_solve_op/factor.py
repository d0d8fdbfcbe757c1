"""A Cholesky factor to solve with many times: shifts of rank-deficient matrices, refinement, condition."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...backends import recorded, select, watched
from ...errors import NonFiniteError, RewriteCoreError
from ..memory import plain, without_gradient
from .problem import (
    EPSILON,
    LARGEST_SHIFT,
    SMALLEST,
    Cholesky,
    Facts,
    asymmetry,
    check_matrix,
    check_rhs,
    refuse_in_graph,
    warn_of_shift,
)


@dataclass(frozen=True)
class SPDFactor:
    """A Cholesky factor to solve with many times; made by :func:`spd_factor`.

    matrix  [n, n] or [B, n, n] float64: the matrix solved with, ``shift`` included
    lower   the same shape: matrix = lower @ lower.T
    shift   scalar or [B], float64: what was added to a diagonal entry of mean size, 0 where nothing was; to each in
            proportion, so that channels of small scale keep their digits, and to a dead one as if it were of mean size
    shifted whether any shift may not be 0: what the host knows without a look at the device
    """

    matrix: Tensor
    lower: Tensor
    shift: Tensor
    backend: str = "auto"
    shifted: bool = True

    def solve(self, rhs: Tensor) -> Tensor:
        """The solution of ``matrix @ x = rhs``, float64, in the shape of ``rhs`` ([n] or [n, m]; batched:
        [B, n] or [B, n, m]), refined where it is not exact to rounding. From 256 rows on the "cpp" backend judges
        that by sums of all equations, and keeps sums of the matrix from the first solve on: entries far smaller than
        the largest may keep Cholesky's error, and `matrix` must not be changed. NaN and infinity in ``rhs`` raise
        NonFiniteError on the CPU; on a GPU, where a look would wait for it, they come out as NaN. There one matrix's
        solve can be captured in a CUDA graph, after a first call; a batch's is refused where torch.linalg does it
        (RewriteCoreError). So is a call that torch records or transforms, as in :func:`spd_factor`."""
        x = NotImplemented if watched() else self._backend[1].at_once(self.matrix, self.lower, self._sketch, rhs)
        if x is NotImplemented:
            x = self._solved(rhs)
        if x is None:
            raise NonFiniteError(
                "The right-hand side holds NaN or infinity: look for overflow in the layer's activations."
            )
        return x

    def _solved(self, rhs: Tensor) -> Tensor | None:
        """With the checks in full."""
        check_rhs(self.matrix, rhs)
        name, kernels = self._backend
        if name != "reference":  # which torch can follow
            _refuse_recorded("A factor's solve")
        elif self._by_magma():  # in a capture MAGMA does not raise, it aborts the process
            refuse_in_graph(self.matrix, "This solve is MAGMA's", "solve with one matrix at a time, by cuSOLVER")
        wide = without_gradient(rhs if rhs.dtype == torch.float64 else rhs.double())
        return kernels.solve(self.matrix, self.lower, wide, self.shifted, self._sketch)

    @functools.cached_property
    def _backend(self) -> tuple[str, Cholesky]:
        """Chosen once: each time it would take a fourth of a small solve."""
        record = select("spd_solve", self.backend, self.matrix)
        return record.name, record.load()

    @functools.cached_property
    def _sketch(self) -> Tensor | None:
        """What solves see their residual by, made once: to read the whole matrix takes each half as long again."""
        return self._backend[1].sketch(self.matrix)

    def _by_magma(self) -> bool:
        return self.matrix.ndim == 3 or "Magma" in str(torch.backends.cuda.preferred_linalg_library())

    @functools.cached_property
    def condition(self) -> Tensor:
        """An estimate of the condition number in the 1-norm, scalar or [B]: a lower bound, seldom below a
        third of it (Hager 1984; SciPy: ``scipy.linalg.lapack.dpocon``)."""
        refuse_in_graph(self.matrix, "The estimate looks at its numbers on the host", "take it before the capture")
        if self.matrix.ndim == 3:
            if not len(self.matrix):
                return self.matrix.new_empty(0)
            return torch.stack(
                [
                    SPDFactor(*parts, self.backend, self.shifted).condition
                    for parts in zip(self.matrix, self.lower, self.shift, strict=True)
                ]
            )
        n = len(self.matrix)
        x = self.matrix.new_full((n,), 1 / n)
        largest = x.new_zeros(())
        for _ in range(5):
            y = self.solve(x)
            largest = torch.maximum(largest, y.abs().sum())
            gradient = self.solve(torch.where(y < 0, -1.0, 1.0).to(y))
            j = gradient.abs().argmax()
            if gradient[j].abs() <= gradient @ x:
                break
            x = torch.zeros_like(x)
            x[j] = 1
        ramp = torch.linspace(1, 2, n, dtype=x.dtype, device=x.device)
        ramp[1::2] *= -1  # a second guess that cancellation cannot hide from (Higham 1988)
        largest = torch.maximum(largest, 2 * self.solve(ramp).abs().sum() / (3 * n))
        return largest * self.matrix.abs().sum(0).max()


def _refuse_recorded(what: str) -> None:
    if recorded():
        raise RewriteCoreError(
            f"{what} cannot be recorded or transformed (torch.jit.trace, make_fx, fake tensors, torch.func): call "
            "spd_solve, which can, or call this outside."
        )


def spd_factor(matrix: Tensor, backend: str = "auto", noise: float = 0.0, rank: int | None = None) -> SPDFactor:
    """The Cholesky factor of a symmetric positive (semi)definite matrix, to solve with many times.

    matrix   [n, n] or [B, n, n], float32 or float64 (computed in float64); the lower triangle is factored
    backend  "auto", "cuda", "cpp" or "reference"
    noise    how exact the entries are: the error of a_ij relative to sqrt(a_ii a_jj)
    rank     what the rank is known to be at most (the number of keys in a second moment)

    A rank-deficient matrix (dead or duplicated channels, fewer keys than channels) gets the smallest of
    0, s, 10 s, 100 s, ... added to its diagonal that makes a factor fit to solve with, where s is eps times
    each entry (of a dead channel: the mean one), and a DiagonalShiftWarning tells the size. "Fit" means that every
    pivot is above n eps and above `noise` times its diagonal entry; below that it is rounding error. Where `rank` is
    below n, rounding error is all that any factor has there: no shift below n eps or `noise` times an entry will do.

    Raises ArgumentError for a wrong type, NonFiniteError for NaN or infinity, RewriteCoreError for a wrong shape,
    an asymmetric matrix, a zero matrix (or a mean diagonal below 1e-292), one with a clearly negative eigenvalue, or
    where a CUDA graph is being captured or torch records or transforms the call (``torch.jit.trace``, ``torch.func``).
    On a GPU the host waits once, and once more for each shift that is tried.
    SciPy: ``scipy.linalg.cho_factor``.
    """
    check_matrix(matrix)
    refuse_in_graph(matrix, "spd_factor looks at its checks on the host", "factor before the capture")
    _refuse_recorded("spd_factor")
    eps = torch.finfo(matrix.dtype).eps  # a sum in float32 need not be symmetric to the last bit
    matrix = plain(matrix.detach().double()).contiguous()  # once, not in each solve
    full = matrix if matrix.ndim == 3 else matrix[None]
    kernels = select("spd_solve", backend, matrix).load()
    given = full
    if eps > EPSILON:
        full = (full + full.mT) / 2
    n = full.shape[-1]
    least = max(n * EPSILON, noise)
    lower, facts = kernels.factor(given, full, least)
    for b, (mean, largest, difference, _pivot) in enumerate(facts):
        which = f" {b} of the batch" if matrix.ndim == 3 else ""
        if not math.isfinite(difference):
            raise NonFiniteError(
                f"The matrix{which} holds NaN or infinity: look for overflow in the layer's activations."
            )
        if difference > asymmetry(n, eps) * largest:
            raise RewriteCoreError(
                f"The matrix{which} is not symmetric: pass the whole of C, or (A + A.mT) / 2 if that is what you mean."
            )
        if mean <= 0:
            raise RewriteCoreError(
                f"The mean diagonal of the matrix{which} is {mean:.3g}, and a second moment's is positive: collect "
                "keys that are not all zero first."
            )
        if mean < SMALLEST:
            raise RewriteCoreError(
                f"The mean diagonal of the matrix{which} is {mean:.3g}, too close to float64's smallest number to "
                "solve with: scale the keys up."
            )
    shift = full.new_zeros(len(full))
    deficient = rank is not None and rank < n
    shifted = deficient or any(each.pivot for each in facts)
    if shifted:
        full = full.clone()
        _shift(kernels, full, lower, facts, shift, least, deficient, batched=matrix.ndim == 3)
    if matrix.ndim == 3:
        return SPDFactor(full, lower, shift, backend, shifted)
    return SPDFactor(full[0], lower[0], shift[0], backend, shifted)


def _shift(
    kernels: Cholesky,
    full: Tensor,
    lower: Tensor,
    facts: list[Facts],
    shift: Tensor,
    least: float,
    deficient: bool,
    batched: bool,
) -> None:
    """Factors those matrices that have a bad pivot (or all, if they are known to be rank-deficient) again, in place,
    with ever larger shifts from eps (or `least`) times each diagonal entry on; warns or raises."""
    means = [each.mean for each in facts]
    for b, mean in enumerate(means):
        if not facts[b].pivot and not deficient:
            continue
        diagonal = full[b].diagonal()
        plain = diagonal.clone()
        sizes = torch.where(plain > 0, plain, mean)
        step, bad = least if deficient else EPSILON, True
        while bad:
            if step > LARGEST_SHIFT:
                which = f" {b} of the batch" if batched else ""
                raise RewriteCoreError(
                    f"The matrix{which} is not positive semidefinite, even with {LARGEST_SHIFT:.0e} of its diagonal "
                    "added: a second moment has no negative eigenvalues, so pass sums of k k^T."
                )
            shift[b] = step * mean
            diagonal.copy_(plain + step * sizes)
            part, again = kernels.factor(full[b : b + 1], full[b : b + 1], least)
            lower[b], bad = part[0], bool(again[0].pivot)
            step = 10 * step
    warn_of_shift(shift.tolist(), means, batched)
