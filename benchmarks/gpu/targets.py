"""S2: what the kernels are to reach, timed.

Ours tuned, with every candidate's time, against the best stock PyTorch expressions for the same job on the same GPU,
beside the floor of what this GPU was measured to do (S0)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewrite_core.ops import fit_low_rank, fit_projected, second_moment, spd_solve

from .. import bench_collect
from ..harness import Case, Checked, Contender, Problem, measurement
from . import modes, problems
from .summary import latest
from .timing import DeviceRace, compiled, peak_bytes, so_far, sound, there
from .worker import Setting, Skipped, why

__all__ = ["run", "sound"]

CHANNELS = 512
FEW, REFERENCE = 21, 2001  # of the reference's steps, for contenders that would take seconds
EDIT_LOSS = 0.01  # l1 above the goal, relative
WAITS = "it waits for the GPU to look at a status"
MAGMA = "a batch's cholesky_solve is MAGMA's, which aborts the process inside a capture"


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of input, and what stock may do for the same.

    allowed   the largest error of ours
    rivals    the largest error of stock that counts: what bfloat16 sums are expected to have
    products  multiplications in place of each one of the job, at the rate `rate`
    """

    dtype: torch.dtype
    allowed: float
    rivals: float
    products: int
    rate: str


KINDS = {
    "x3": Kind(torch.float32, 2e-6, 2e-6, 3, "tf32"),
    "bfloat16": Kind(torch.bfloat16, 2e-6, 1e-2, 1, "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A case with its data made.

    op          that is timed
    work        operations, by the rate of S0 that does them
    uncaptured  contenders that cannot go into a CUDA graph, and why
    allowed     the largest error of ours, where that is less than stock's
    backend     that ours runs
    """

    problem: Problem
    op: str
    work: dict[str, float]
    uncaptured: dict[str, str] = dataclasses.field(default_factory=dict)
    allowed: float | None = None
    backend: str = "auto"


def run(name: str, arguments: dict[str, Any], setting: Setting) -> dict[str, Any]:
    if setting.device == "cuda" and not there():
        raise Skipped(f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU")
    makers: dict[str, Callable[..., Target]] = {
        "moment": moment,
        "fit": fit,
        "projected": projected,
        "solve": solve,
        "collect": collect,
    }
    rest = {key: value for key, value in arguments.items() if key != "of"}
    ops = ("second_moment", "fit_low_rank", "fit_projected")
    before, known = so_far(), {op: set(_tuned(op)) for op in ops}
    target = makers[arguments["of"]](setting.device, setting.small, **rest)
    problem, errors, failed = _checked(target.problem)
    more = {"candidates": [trial for op in ops for trial in _candidates(op, known[op])], **compiled(before)}
    more |= {"op": target.op, "tolerance": problem.tolerance if target.allowed is None else target.allowed}
    more |= {"failed_contenders": failed} if failed else {}
    ours = errors[problem.ours.name]
    if not ours <= more["tolerance"]:  # also NaN
        reason = f"{problem.error_kind} {ours:.2e}, above {more['tolerance']:.0e}, so it is not timed"
        return {"state": "wrong", "reason": reason, "error": ours, "errors": errors, "details": problem.details, **more}
    race = DeviceRace(problem, target.uncaptured)
    race.run(False)
    checked = Checked(Case(name, lambda backend: problem), problem, target.backend, "see S1 and S3", errors)
    record = race.more(measurement(target.op, checked, race, False))
    record["details"] = {**record["details"], **floor(target, setting)}
    record["peak_bytes"] = peak_bytes()
    return {**record, **more}


def _checked(problem: Problem) -> tuple[Problem, dict[str, float], dict[str, str]]:
    """The problem with the contenders that run, their errors, and why each of the others does not. Ours must."""
    errors, failed = {}, {}
    for contender in problem.contenders:
        try:
            contender.prepare()
            errors[contender.name] = problem.error(contender.run())
        except Exception as error:
            if contender is problem.ours or not sound():
                raise
            failed[contender.name] = why(error)
    stock = [contender for contender in problem.stock if contender.name in errors]
    if not stock:
        raise RuntimeError(f"no stock expression runs: {failed}")
    return dataclasses.replace(problem, stock=stock), errors, failed


def _tuned(op: str) -> dict[str, Any]:
    from rewrite_core.kernels import tuning

    return tuning.measured(op)


def _candidates(op: str, before: set[str]) -> list[dict[str, Any]]:
    """Every configuration tried since, for classes of problems not met before: its seconds, or why it did not run."""
    found = []
    for name, trials in _tuned(op).items():
        if name not in before:
            found += [
                {
                    "op": op,
                    "class": name,
                    "config": dataclasses.asdict(trial.config),
                    "seconds": trial.seconds,
                    "reason": trial.reason,
                }
                for trial in trials
            ]
    return found


def floor(target: Target, setting: Setting) -> dict[str, Any]:
    """The least seconds by the rates that S0 measured here: bytes over bandwidth, operations over their rates."""
    rates = {}
    for line in latest(setting.lines, setting.common):
        if line["stage"] == "S0" and line.get("rate"):
            rates[line["case"].removeprefix("rate ")] = line["rate"]
    lacking = [name for name in ("copy bandwidth", *target.work) if name not in rates]
    if lacking:
        return {"floor_reason": f"S0 has no {', '.join(lacking)}"}
    traffic = target.problem.traffic / rates["copy bandwidth"]
    arithmetic = sum(operations / rates[name] for name, operations in target.work.items())
    return {"floor_seconds": max(traffic, arithmetic), "floor_traffic": traffic, "floor_arithmetic": arithmetic}


# --- second moment ---


def moment(device: str, small: bool, channels: int, side: int, batch: int, kind: str) -> Target:
    if small:
        channels, side, batch = min(channels, 20), min(side, 4), 2
    how, backend = KINDS[kind], modes.backend_of(device)
    features = modes.features_of(batch, channels, side, how.dtype, device)
    exact = modes.exact_moment(features)
    count = batch * side * side

    def addmm(total: Tensor) -> Tensor:
        keys = features.permute(0, 2, 3, 1).reshape(-1, channels)
        return total.addmm_(keys.T, keys) if keys.dtype == total.dtype else total.add_(keys.T @ keys)

    def bmm(total: Tensor) -> Tensor:
        flat = features.flatten(2)
        return total.add_(torch.bmm(flat, flat.mT).sum(0))

    def einsum(total: Tensor) -> Tensor:
        return total.add_(torch.einsum("nchw,ndhw->cd", features, features))

    def contender(name: str, call: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Contender:
        total = torch.zeros(channels, channels, dtype=dtype, device=device)

        def prepare() -> None:
            torch.backends.cuda.matmul.allow_tf32 = False
            total.zero_()

        return Contender(name, lambda: call(total), prepare)

    operations = float(count * channels * (channels + 1))
    problem = Problem(
        ours=contender(
            "rewrite_core", lambda total: second_moment(features, out=total, backend=backend), torch.float64
        ),
        stock=[
            contender("addmm, permuted copy", addmm, torch.float32),
            contender("bmm on NCHW", bmm, torch.float32),
            contender("einsum", einsum, torch.float32),
        ],
        shapes={"features": list(features.shape)},
        dtype=str(how.dtype).removeprefix("torch."),
        operations=operations,
        traffic=float(features.nbytes + channels * (channels + 1) * 8),
        error=lambda total: ((total.double() - exact).norm() / exact.norm()).item(),
        error_kind="relative Frobenius error",
        tolerance=how.rivals,
    )
    return Target(problem, "second_moment", {how.rate: operations * how.products}, backend=backend, allowed=how.allowed)


# --- edits ---


def _size(small: bool) -> dict[str, int]:
    return {"inputs": 3, "outputs": 2, "side": 4} if small else {"inputs": CHANNELS, "outputs": CHANNELS, "side": 10}


def _goal(what: str, edit: problems.Edit, small: bool) -> tuple[Tensor, dict[str, str]]:
    """What float64 reaches, and where that is not what is kept the reason, for the line."""
    reason = "small"
    if not small:
        try:
            return torch.from_numpy(problems.goal(what, edit)), {}
        except RuntimeError as error:  # another machine's numbers: seconds are better spent than lost
            reason = str(error)
    made = problems.fit_goal(edit) if what.startswith("fit") else problems.projected_goal(edit, FEW + 4)
    return torch.from_numpy(made), {"goal_made_here": reason}


def _loop(edit: problems.Edit, device: str) -> Callable[[int], Tensor]:
    """The reference's loop for a linear 3x3 layer: F.conv2d, autograd, torch.optim.Adam, projection every ten steps."""
    (operator, _, target), options = problems.projected_arguments(edit, device=device)
    key = operator[None, :, 1, 1]  # the tap in the middle is the map itself
    original = torch.from_numpy(edit.weight).to(device, torch.float32).unflatten(2, (3, 3))
    rows = options["directions"]

    def project(weight: Tensor) -> Tensor:
        return torch.einsum("oryx,ri->oiyx", torch.einsum("oiyx,ri->oryx", weight, rows), rows)

    def steps(count: int) -> Tensor:
        weight = original.clone().requires_grad_(True)
        orthogonal = original - project(original)
        optimiser = torch.optim.Adam([weight], lr=0.05)
        losses = []
        for step in range(count):
            with torch.enable_grad():
                loss = F.l1_loss(F.conv2d(key, weight, padding=1), target[None])
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
            losses.append(loss.detach())
            with torch.no_grad():
                if step % 10 == 0 or step == count - 1:
                    weight.copy_(orthogonal + project(weight))
        return torch.stack(losses)

    return steps


def _stock(edit: problems.Edit, device: str, steps: int, part: float) -> list[Contender]:
    """The reference's loop, so many steps of it: its losses."""
    arguments, options = problems.projected_arguments(edit, device=device)

    def as_matrix() -> Tensor:
        return fit_projected(*arguments, **options, steps=steps, backend="reference").losses

    stock = [Contender("the reference's loop, operator as a matrix", as_matrix, rounds=5, part=part)]
    if edit.style is None:
        loop = _loop(edit, device)
        stock.append(Contender("the reference's loop", lambda: loop(steps), rounds=5, part=part))
    return stock


def _uncaptured(stock: list[Contender]) -> dict[str, str]:
    return {contender.name: "autograd and Adam as they are used" for contender in stock}


def _repeated(part: Any, edits: int) -> Any:
    return problems.to(part, lambda item: item.expand(edits, *item.shape).contiguous())


def fit(device: str, small: bool, kind: str, rank: int, edits: int) -> Target:
    """Basis maps in, coefficients out; the other edits of a batch have goals of their own."""
    edit = problems.make(kind, rank, **_size(small))
    goal, note = _goal(f"fit {kind}, rank {rank}", edit, small)
    goal = goal.to(device)
    edits = min(edits, 2) if small else edits
    many = _repeated(problems.fit_arguments(edit, device=device), edits)
    noise = torch.randn(many["target"].shape, generator=torch.Generator(device).manual_seed(edits), device=device)
    noise[0] = 0
    many["target"] = many["target"] + 0.1 * many["target"].std() * noise
    backend = modes.backend_of(device)
    found = fit_low_rank(**many, backend=backend)
    steps = found.iterations.sum().item()
    _, unknowns, pixels = many["basis"].shape
    system = min(unknowns, pixels)

    def error(result: Any) -> float:
        if isinstance(result, Tensor):  # the first losses of a loop that does a part of the job
            return 0.0
        really = problems.losses_of(many, result.coefficients, "l1")
        dishonest = ((really - result.loss).abs().max() / really.mean()).item()
        first = result.loss[0, : len(goal)].mean().item()
        excess = (first - goal.mean().item()) / goal.mean().item()
        return max(excess, dishonest, 0.0) if excess == excess else float("nan")

    few = 3 if small else FEW
    stock = _stock(edit, device, few, few / REFERENCE / edits)
    operations = float(steps * (pixels * unknowns * (system + 5) + system**3 / 3 + 2 * system**2))
    problem = Problem(
        ours=Contender("rewrite_core", lambda: fit_low_rank(**many, backend=backend)),
        stock=stock,
        shapes={name: list(many[name].shape) for name in ("basis", "base")},
        dtype="float32",
        operations=operations,
        traffic=4.0 * (many["basis"].numel() + 3 * many["base"].numel() + found.coefficients.numel()),
        error=error,
        error_kind="l1 above the float64 reference's, relative",
        tolerance=EDIT_LOSS,
        details={"steps": steps, "edits": edits, "final_l1": found.loss.mean().item(), **note},
    )
    return Target(problem, "fit_low_rank", {"float64": operations}, _uncaptured(stock), backend=backend)


def projected(device: str, small: bool, kind: str, steps: int, backend: str = "") -> Target:
    """By Triton's kernels, two launches a step, or ("cuda") by one kernel in one launch, and Triton's beside it."""
    edit = problems.make(kind, 1, **_size(small))
    curve, note = _goal(f"projected {kind}", edit, small)
    curve = curve.to(device)
    steps = min(steps, 5) if small else steps
    arguments, options = problems.projected_arguments(edit, device=device)
    # the last step projects, which the curve's own last step does alone; before that rounding adds up
    few = min(FEW, steps - 1)

    def error(result: Any) -> float:
        losses = result if isinstance(result, Tensor) else result.losses
        return ((losses[:few].double() - curve[:few]).abs() / curve[:few]).max().item()

    beside = modes.backend_of(device)
    backend = backend or beside
    modes.need_backend("fit_projected", backend, arguments[0])

    def by(name: str) -> Callable[[], Any]:
        return lambda: fit_projected(*arguments, **options, steps=steps, backend=name)

    last = by(backend)().losses[-1].item()
    weights, pixels = edit.weight[0].size, edit.side**2
    channels = len(edit.weight)
    products, adam = 4.0 * steps * channels * weights * pixels, 16.0 * steps * channels * weights
    if backend == beside:
        stock = _stock(edit, device, steps, 1.0)
    else:  # the other case has timed all of the loop
        stock = _stock(edit, device, few, few / steps)
        stock.append(Contender("the Triton kernels", by(beside), aside=True))
    problem = Problem(
        ours=Contender("rewrite_core", by(backend)),
        stock=stock,
        shapes={"operator": list(arguments[0].shape), "base": list(arguments[1].shape)},
        dtype="float32",
        operations=products + adam,
        traffic=4.0 * (weights * pixels + 3 * channels * pixels),
        error=error,
        error_kind="largest relative error of the first losses",
        tolerance=0.02,
        details={
            "steps": steps,
            "last_loss": last,
            "last_loss_float64": curve[min(steps, len(curve)) - 1].item(),
            **note,
        },
    )
    work = {"tf32": 3 * products, "float32": adam}
    return Target(problem, "fit_projected", work, _uncaptured(stock), backend=backend)


# --- solves ---


def solve(device: str, small: bool, n: int, batch: int, sides: int, backend: str = "reference") -> Target:
    """Ours on a GPU: torch.linalg's Cholesky factor and solve with checks, or ("cuda") a kernel that does all of it."""
    if small:
        n, batch, sides = min(n, 24), min(batch, 2), min(sides, 2)
    matrix = modes.moment_matrix(batch, n, 4 * n, device)
    generator = torch.Generator(device).manual_seed(n)
    rhs = torch.randn(batch, n, sides, generator=generator, device=device, dtype=torch.float64)
    modes.need_backend("spd_solve", backend, matrix, rhs)

    def refined() -> Tensor:
        lower = torch.linalg.cholesky_ex(matrix.float())[0]
        x = torch.zeros_like(rhs)
        for _ in range(4):
            x = x + torch.cholesky_solve((rhs - matrix @ x).float(), lower).double()
        return x

    operations = batch * (n**3 / 3 + 2.0 * n * n * sides)
    problem = Problem(
        ours=Contender("rewrite_core", lambda: spd_solve(matrix, rhs, backend=backend)),
        stock=[
            Contender("linalg.solve", lambda: torch.linalg.solve(matrix, rhs)),
            Contender(
                "cholesky, cholesky_solve", lambda: torch.cholesky_solve(rhs, torch.linalg.cholesky_ex(matrix)[0])
            ),
            Contender("linalg.inv", lambda: torch.linalg.inv(matrix) @ rhs),
            Contender("float32 cholesky, refined", refined),
        ],
        shapes={"matrix": list(matrix.shape), "rhs": list(rhs.shape)},
        dtype="float64",
        operations=operations,
        traffic=8.0 * batch * (n * (n + 1) // 2 + 2 * n * sides),
        error=lambda x: ((matrix @ x - rhs).norm() / rhs.norm()).item(),
        error_kind="relative residual",
        tolerance=1e-10,
    )
    uncaptured = dict.fromkeys(("rewrite_core", "linalg.solve", "linalg.inv"), WAITS)
    if batch > 1:
        uncaptured |= dict.fromkeys(("cholesky, cholesky_solve", "float32 cholesky, refined"), MAGMA)
    return Target(problem, "spd_solve", {"float64": operations}, uncaptured, backend=backend)


# --- collection ---


def collect(device: str, small: bool, layer: str) -> Target:
    """A whole collection against the bare forward pass, which it shall not exceed by more than 5 %.

    The floor is that of all updates: what comes on top of the passes."""
    if small:
        made = bench_collect.make(bench_collect.small_stylegan2, "convs.1.conv", 32, "triton", device, 2)
    else:
        made = bench_collect.make(bench_collect.stylegan2_256, layer, 512, "triton", device, 32)
    problem = dataclasses.replace(made, details={})
    why_not = dict.fromkeys((contender.name for contender in problem.contenders), "a whole collection, with its waits")
    return Target(problem, "second_moment", {"tf32": 3 * problem.operations}, why_not, backend="auto")
