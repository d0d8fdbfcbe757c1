"""S1: every kernel and mode, once, in its default configuration, against float64 on the same machine.

With the registers, spills and shared memory of what was compiled."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewrite_core.backends import select, triton_interpreted
from rewrite_core.errors import BackendUnavailable
from rewrite_core.ops import fit_low_rank, fit_projected, second_moment, spd_factor, spd_solve

from . import problems
from .timing import compiled, peak_bytes, so_far, sound, synchronize, there
from .worker import SKIPPED, Setting, Skipped, die_with_parent

__all__ = ["launch", "run", "sound"]

CHANNELS, REGION = 64, 10
SIDE, BATCH = 32, 4  # of feature maps
STEPS = 21  # of the projected solver
TOLERANCES = {"tf32": 3e-3}  # of the second moment, else
TOLERANCE = 2e-6
FIT = 1e-3  # of the mean loss, relative: channels may end in other minima
MET = 1e-3  # of the initial loss: where less is left, errors are parts of so much (and FIT of it is 1e-6)
EXACT = 1e-6
DESCENT = {"l1": 0.02, "l2": 1e-3}  # of every loss, relative: at l1's kinks rounding decides
RESIDUAL = 1e-10

Checked = tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]  # what runs the kernel, and what judges its result


def backend_of(device: str) -> str:
    """The kernels', on a GPU or in the interpreter; in a rehearsal without it the CPU's own."""
    return "triton" if device == "cuda" or triton_interpreted() else "auto"


def run(name: str, arguments: dict[str, Any], setting: Setting) -> dict[str, Any]:
    if setting.device == "cuda" and not there():
        raise Skipped(f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU")
    op = arguments["op"]
    before = so_far()
    launches, judge = case(arguments, setting.device, setting.small)
    synchronize()
    started = time.perf_counter()
    result = launches()
    synchronize()
    first = time.perf_counter() - started
    record = judge(result)
    wrong = not record["error"] <= record["tolerance"]  # also NaN
    record |= {"op": op, "first_call_seconds": first, "peak_bytes": peak_bytes(), **compiled(before)}
    return record | ({"state": "wrong", "reason": _says(record)} if wrong else {})


def _says(record: dict[str, Any]) -> str:
    return f"{record['error_kind']} {record['error']:.2e}, above {record['tolerance']:.0e}"


def launch(words: str) -> None:
    """Only runs the kernel of a case, for tools that watch it (S4). words: its arguments, as JSON."""
    die_with_parent()
    arguments = json.loads(words)
    try:
        case(arguments, "cuda" if there() else "cpu", small=not there(), few=True)[0]()
    except Skipped as error:
        print(f"{SKIPPED}{error}", file=sys.stderr, flush=True)
        return
    synchronize()
    print("launched", file=sys.stderr, flush=True)


def case(arguments: dict[str, Any], device: str, small: bool, few: bool = False) -> Checked:
    """`few`: as few steps as there may be."""
    rest = {name: value for name, value in arguments.items() if name != "op"}
    make = {"second_moment": moment, "fit_low_rank": fit, "fit_projected": descent, "spd_solve": solve}[arguments["op"]]
    return make(rest, device, small, few)


def need_backend(op: str, backend: str, *arguments: Any) -> None:
    """Skip the case, with the reason, where this build or GPU lacks the backend that it names."""
    try:
        select(op, backend, *arguments)
    except BackendUnavailable as error:
        raise Skipped(str(error)) from None


# --- second moment ---


def features_of(batch: int, channels: int, side: int, dtype: torch.dtype, device: str, layout: str = "nchw") -> Tensor:
    """As a leaky ReLU leaves them: their mean is not zero."""
    generator = torch.Generator(device).manual_seed(channels + side)
    more = 3 if layout == "cropped" else 0
    wide = torch.randn(batch, channels, side + more, side + more, generator=generator, device=device)
    features = torch.nn.functional.leaky_relu(wide, 0.2).to(dtype)
    if layout == "channels_last":
        return features.to(memory_format=torch.channels_last)
    return features[:, :, 1 : side + 1, 2 : side + 2] if layout == "cropped" else features


def exact_moment(features: Tensor) -> Tensor:
    channels = features.shape[1]
    exact = torch.zeros(channels, channels, dtype=torch.float64, device=features.device)
    for image in features:  # float64 copies of all of them would fill a GPU
        flat = image.flatten(1).double()
        exact.addmm_(flat, flat.T)
    return exact


def moment(arguments: dict[str, Any], device: str, small: bool, few: bool) -> Checked:
    precision = arguments.get("precision", "x3")
    channels = min(arguments["channels"], 24) if small else arguments["channels"]
    batch, side = (2, 5) if small or few else (BATCH, SIDE)
    dtype = getattr(torch, arguments.get("dtype", "float32"))
    backend = backend_of(device)
    how = {"precision": precision} if backend == "triton" else {}
    features = features_of(batch, channels, side, dtype, device, arguments.get("layout", "nchw"))

    def judge(found: Tensor) -> dict[str, Any]:
        exact = exact_moment(features)
        error = ((found - exact).norm() / exact.norm()).item()
        if not torch.equal(found, found.T):
            error = float("nan")
        return {
            "error": error,
            "error_kind": "relative Frobenius error",
            "tolerance": TOLERANCES.get(precision, TOLERANCE),
            "backend": backend,
            "dtype": str(dtype).removeprefix("torch."),
            "shapes": {"features": list(features.shape)},
        }

    return lambda: second_moment(features, backend=backend, **how), judge


# --- the fit ---


def _penalty(unknowns: int, device: str) -> Tensor:
    """As `preserve` makes it: a second moment, here of unknowns that follow one another."""
    rows = np.random.RandomState(7).randn(4 * unknowns, unknowns).cumsum(1)
    return torch.from_numpy(0.05 * rows.T @ rows / len(rows)).to(device)


def _segmented(inputs: dict[str, Any]) -> dict[str, Any]:
    """The pixels in two groups, the second of another style: twice the size."""
    groups = torch.arange(inputs["base"].shape[1], device=inputs["base"].device) % 3 // 2
    demodulation = tuple(torch.stack([part, 4 * part]) for part in inputs["demodulation"])
    return inputs | {"demodulation": demodulation, "segments": groups}


def fit(arguments: dict[str, Any], device: str, small: bool, few: bool) -> Checked:
    loss, rank, side = arguments.get("loss", "l1"), arguments.get("rank", 1), arguments.get("side", REGION)
    channels = 2 if small else CHANNELS
    if small:
        rank, side = min(rank, 2), 4 if rank == 1 else 3
    kind = "stylegan2" if arguments.get("demodulated") else "linear"
    edit = problems.make(kind, rank, max(channels, rank), channels, side, arguments.get("slope"))
    inputs = problems.fit_arguments(edit, device=device)
    if arguments.get("preserve"):
        inputs["penalty"] = _penalty(inputs["basis"].shape[0], device)
    backend = backend_of(device)
    if arguments.get("segments"):
        inputs, backend = _segmented(inputs), "reference"  # the kernel has none of them
    steps = 3 if small or few else 60

    def judge(found: Any) -> dict[str, Any]:
        wide = problems.to(inputs, lambda part: part.double() if part.is_floating_point() else part)
        if device != "cpu" and backend == "reference":  # of its own, the same code proves nothing
            wide = problems.to(wide, Tensor.cpu)
        theirs = fit_low_rank(**wide, loss=loss, max_iterations=steps, backend="reference")
        mean = theirs.loss.mean().item()
        scale = max(mean, MET * theirs.initial_loss.mean().item())  # a goal that is met leaves rounding alone
        really = problems.losses_of(inputs, found.coefficients, loss)
        apart = (
            found.coefficients.double().cpu() - theirs.coefficients.cpu()
        ).norm() / theirs.coefficients.norm().cpu()
        gaps = (found.loss.cpu() - theirs.loss.cpu()).abs() / theirs.initial_loss.cpu()
        off = {
            "mean loss": abs(found.loss.mean().item() - mean) / scale,
            "what the coefficients really leave": ((really - found.loss).abs().max() / scale).item(),
        }
        if found.solver == "closed_form":
            off["coefficients"] = apart.item()
        worst = max(off, key=lambda which: off[which] if off[which] == off[which] else float("inf"))
        return {
            "error": off[worst],
            "error_kind": f"relative error, of: {worst}",
            "tolerance": EXACT if found.solver == "closed_form" else FIT,
            "backend": backend,
            "dtype": "float32",
            "shapes": {name: list(inputs[name].shape) for name in ("basis", "base")},
            "details": {
                **off,
                "coefficients apart": apart.item(),
                "median gap": gaps.median().item(),
                "worst gap": gaps.max().item(),
                "same status": (found.status.cpu() == theirs.status.cpu()).double().mean().item(),
                "steps": found.iterations.sum().item(),
                "reference steps": theirs.iterations.sum().item(),
            },
        }

    return lambda: fit_low_rank(**inputs, loss=loss, max_iterations=steps, backend=backend), judge


# --- the projected solver ---


def descent(arguments: dict[str, Any], device: str, small: bool, few: bool) -> Checked:
    loss = arguments.get("loss", "l1")
    channels = 3 if small else arguments.get("channels", CHANNELS)
    kind = "stylegan2" if arguments.get("demodulated") else "linear"
    side = 4 if small else arguments.get("side", REGION)
    edit = problems.make(kind, arguments.get("rank", 1), channels, channels, side, arguments.get("slope"))
    given, options = problems.projected_arguments(edit, device=device)
    options |= {"loss": loss, "steps": 3 if small or few else STEPS}
    options["project_gradient"] = bool(arguments.get("project_gradient"))
    backend = arguments.get("backend", backend_of(device))
    need_backend("fit_projected", backend, given[0])

    def judge(found: Any) -> dict[str, Any]:
        wide, more = problems.to((given, options), Tensor.double)
        theirs = fit_projected(*wide, **more, backend="reference")
        error = ((found.losses - theirs.losses).abs() / theirs.losses).max().item()
        apart = (found.coefficients.double() - theirs.coefficients).norm() / theirs.coefficients.norm()
        return {
            "error": error,
            "error_kind": "largest relative error of a loss",
            "tolerance": DESCENT[loss],
            "backend": backend,
            "dtype": "float32",
            "shapes": {"operator": list(given[0].shape), "base": list(given[1].shape)},
            "details": {"coefficients apart": apart.item(), "last loss": found.losses[-1].item()},
        }

    return lambda: fit_projected(*given, **options, backend=backend), judge


# --- solves ---


def moment_matrix(batch: int, n: int, keys: int, device: str) -> Tensor:
    """Second moments of so many keys whose channels differ in scale by 30: condition number about 1e4."""
    generator = torch.Generator(device).manual_seed(n)
    rows = torch.randn(batch, keys, n, generator=generator, device=device, dtype=torch.float64)
    rows *= torch.logspace(-1.5, 0, n, device=device, dtype=torch.float64)
    return rows.mT @ rows / keys


def solve(arguments: dict[str, Any], device: str, small: bool, few: bool) -> Checked:
    backend = arguments.get("backend", "auto")
    n, batch = min(arguments["n"], 48) if small else arguments["n"], arguments.get("batch", 1)
    keys = min(arguments.get("keys", 4 * n), n // 2 if "keys" in arguments else 4 * n)
    matrix = moment_matrix(batch, n, keys, device)
    matrix = matrix if batch > 1 else matrix[0]
    need_backend("spd_solve", backend, matrix)
    rhs = torch.randn(*matrix.shape[:-1], 8, dtype=torch.float64).to(device)
    if "keys" in arguments:
        rhs = matrix @ rhs  # else no finite solution is near

    def judge(found: tuple[Any, Tensor]) -> dict[str, Any]:
        factor, x = found
        solved = factor.matrix  # with the shift that a rank-deficient matrix needs
        shifted = bool((factor.shift != 0).any())
        error = ((solved @ x - rhs).norm() / rhs.norm()).item()
        return {
            "error": error if shifted == ("keys" in arguments) else float("nan"),
            "error_kind": "relative residual",
            "tolerance": RESIDUAL,
            "backend": factor.backend,
            "dtype": "float64",
            "shapes": {"matrix": list(matrix.shape), "rhs": list(rhs.shape)},
            "details": {"shift": factor.shift.max().item()},
        }

    def solved() -> tuple[Any, Tensor]:
        factor = spd_factor(matrix, backend)
        return factor, spd_solve(matrix, rhs, backend) if backend == "cuda" else factor.solve(rhs)

    return solved, judge
