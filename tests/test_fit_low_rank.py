import base64
import functools
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import needs_triton, needs_triton_compiler, needs_triton_interpreter
from PIL import Image
from torch import library

from rewrite_core import ops
from rewrite_core.backends import BackendUnavailable, backends_of, extension, triton_reason
from rewrite_core.ops.fit_low_rank_op import problem as facts
from rewrite_core.ops.fit_low_rank_op import reference, register
from rewrite_core.ops.fit_low_rank_op.model import Model

DATA = Path(__file__).parent / "data"
ISAS = ("portable", "avx2", "avx512")
CPU = {
    "reference": reference.run_reference,
    **{f"cpp-{isa}": functools.partial(register.run_cpp, isa=isa) for isa in ISAS},
}


NO_GPU = triton_reason(facts.TRITON) if torch.cuda.is_available() else "there is no GPU here"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]


def needs_gpu(test):
    return ON_GPU[0](ON_GPU[1](test))


def to(problem, device):
    return type(problem)(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in problem))


def on_gpu(problem, config=None):
    """The kernel, for a problem that lies on the CPU and is checked; without a search for the fastest configuration."""
    from rewrite_core.kernels import fit_low_rank as kernels

    config = config or kernels.candidates(kernels.plan(problem)[1])[0]
    return [part.cpu() for part in kernels.launch(to(problem, "cuda"), config)]


# The kernel is compiled anew for every mode: it takes part where a mode, a size or hostile data is its own.
# It has no segments.
ON_GPU_TOO = pytest.mark.parametrize("fit", [*CPU, pytest.param("triton", marks=ON_GPU)], indirect=True)


@pytest.fixture(params=CPU)
def fit(request):
    """The public function on one implementation; with ON_GPU_TOO also on a GPU."""
    if request.param == "triton":
        return functools.partial(run, on_gpu)
    isa = request.param.removeprefix("cpp-")
    if isa in ISAS[ISAS.index(extension().isa()) + 1 :]:
        pytest.skip(f"this CPU has no {isa}")
    return functools.partial(run, CPU[request.param])


def run(implementation, *args, **kwargs):
    class Record:
        load = staticmethod(lambda: implementation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(register, "select", lambda *args: Record)
        return ops.fit_low_rank(*args, **kwargs)


def prepared(basis, base, target, demodulation=None, **options):
    """What the implementations are given: a FitLowRankProblem."""
    plain = {"slope": 1.0, "gain": 1.0, "loss": "l1", "max_iterations": 60, "tolerance": 1e-5}
    given = dict.fromkeys(facts.FitLowRankProblem._fields) | plain | options
    given |= {"basis": basis, "base": base, "target": target}
    return facts.prepare(facts.FitLowRankProblem(**given), demodulation)


# Problems: dictionaries of fit_low_rank's arguments, unbatched, float64.


def basis_maps(op, key, directions, taps):
    """The linear operator on one-hot kernels: [R taps taps, P]."""
    kernels = torch.eye(taps * taps, dtype=key.dtype).reshape(-1, 1, 1, taps, taps)
    maps = torch.einsum("ri,ihw->rhw", directions, key)
    return torch.stack([op(one[None, None], kernel).flatten() for one in maps for kernel in kernels])


def demodulation_of(weight, style, directions, scale, eps=1e-8):
    """[O, I, T] weight: constant, linear and quadratic term of sum (scale style W1)^2 + eps."""
    square = (scale * style) ** 2
    out, taps = weight.shape[0], weight.shape[2]
    constant = torch.einsum("oit,i->o", weight**2, square) + eps
    linear = torch.einsum("oit,i,ri->ort", weight, square, directions).reshape(out, -1)
    gram = torch.einsum("ri,i,si->rs", directions, square, directions)
    return constant, linear, torch.kron(gram, torch.eye(taps, dtype=gram.dtype))


@functools.cache
def stylegan2_problem(kind):
    with np.load(DATA / "stylegan2_layer.npz") as arrays:
        data = {k.removeprefix(f"{kind}_"): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(kind)}
    get = {k: v.double() for k, v in data.items()}
    weight, key, style, directions = (
        get["weight"][0],
        get["fmap_modulated"][0],
        get["style"][0],
        get["directions"],
    )
    _out, inner, taps, _ = weight.shape
    scale = 1 / math.sqrt(inner * taps * taps)
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)
    blur = torch.outer(line, line) / 64 * 4

    def op(maps, kernel):
        if kind == "same":
            return F.conv2d(maps, kernel, padding=taps // 2)
        wide = F.pad(F.conv_transpose2d(maps, kernel.transpose(0, 1), stride=2), (1, 1, 1, 1))
        return F.conv2d(wide, blur.expand(wide.shape[1], 1, 4, 4), groups=wide.shape[1])

    problem = {
        "basis": scale * basis_maps(op, key, directions, taps),
        "base": op(key[None], weight * scale)[0].flatten(1),
        "target": get["goal"][0].flatten(1),
        "shift": (get["noise_weight"] * get["noise"])[0].flatten(1) + get["bias"][:, None],
        "demodulation": demodulation_of(weight.flatten(2), style, directions, scale),
        "slope": 0.2,
        "gain": math.sqrt(2.0),
    }
    return problem, get["value"][0].flatten(1), get["linear_loss"]


@functools.cache
def proggan_problem(rank):
    """The golden edit at layer5: the tight crop of the paste, object composited through its mask."""
    with np.load(DATA / "proggan_expected.npz") as arrays:
        keys = torch.from_numpy(arrays["keys_3_7_11_19"]).double()
        directions = torch.from_numpy(arrays["zca_rank4"][:rank]).double()
        first_loss = arrays[f"projected_rank{rank}_loss"][0]
    with np.load(DATA / "proggan_state.npz") as arrays:
        weight = torch.from_numpy(arrays["layer5.conv.weight"]).double()
    values = F.conv2d(keys, weight, padding=1)
    _, url = json.loads((DATA / "proggan_edit.json").read_text())["object"]
    mask = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB").getchannel(0)
    mask = torch.from_numpy(np.asarray(mask.resize((16, 16), Image.BILINEAR)) / 255.0)
    rows, columns = (mask > 0).nonzero().amin(0), (mask > 0).nonzero().amax(0) + 1
    crop = (..., slice(rows[0], columns[0]), slice(rows[1], columns[1]))
    place = (..., slice(3, 11), slice(1, 9))  # the same box, centred on the paste mask
    key, alpha = keys[2][place], mask[crop]
    op = functools.partial(F.conv2d, padding=1)
    problem = {
        "basis": basis_maps(op, key, directions, 3),
        "base": op(key[None], weight)[0].flatten(1),
        "target": ((1 - alpha) * values[2][place] + alpha * values[1][crop]).flatten(1),
    }
    return problem, first_loss


@functools.cache
def random_problem(seed, rank, size, demodulated=True, slope=0.2, channels=32, inner=64, scale=16.0):
    """A 3x3 layer on smooth random maps, its goal the value of another map. `scale` multiplies the basis, so
    that Adam's step of 0.05 suits the coefficients; ours are scaled anyway."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    height, width = size
    style = 1 + 0.3 * normal(inner)
    maps = normal(2, inner, height + 2, width + 2)
    keys = style[:, None, None] * (2 * F.avg_pool2d(maps, 3, 1) + 0.4 * normal(2, inner, height, width))
    fan = 1 / math.sqrt(inner * 9)
    weight = normal(channels, inner, 3, 3)
    mean = keys[0].mean((1, 2))[:, None]
    directions = torch.linalg.qr(mean + 0.7 * normal(inner, rank)).Q.T.contiguous()
    op = functools.partial(F.conv2d, padding=1)
    base, other = op(keys, weight * fan).flatten(2)
    shift = 0.3 * normal(1, height * width) + 0.3 * normal(channels, 1)
    problem = {
        "basis": scale * fan * basis_maps(op, keys[0], directions, 3),
        "base": base,
        "shift": shift,
        "slope": slope,
        "gain": math.sqrt(2.0),
    }
    if demodulated:
        constant, linear, quadratic = demodulation_of(weight.flatten(2), style, directions, fan)
        problem["demodulation"] = constant, linear * scale, quadratic * scale**2
        other = other * constant.rsqrt()[:, None]
    problem["target"] = problem["gain"] * F.leaky_relu(other + shift, slope)
    return problem


def runaway_problem():
    """A small box wants the sign of its value turned, so no size of the change over the weight is enough."""
    problem = random_problem(9, 1, (3, 3), slope=1.0)
    problem["target"] = -3 * problem["target"]
    return problem


SIZES = ((4, 4), (5, 5), (6, 8), (8, 8), (10, 10), (12, 12))
RANDOM = [(seed, 1 + seed % 4, SIZES[seed % 6], seed % 8 != 7) for seed in range(20)]


def value_of(x, basis, base, target, shift=None, demodulation=None, slope=1.0, gain=1.0):
    """The model of the docstring, written once more: any dtype, batched or not, under autograd."""
    lin = base + x @ basis
    if demodulation is not None:
        constant, linear, quadratic = demodulation
        lin = lin * (constant + 2 * (linear * x).sum(-1) + ((x @ quadratic) * x).sum(-1)).rsqrt()[..., None]
    return gain * F.leaky_relu(lin if shift is None else lin + shift, slope)


def losses_of(x, problem, loss="l1"):
    r = value_of(x, **problem) - problem["target"]
    return (r.abs() if loss == "l1" else r.square()).mean(-1)


def cast(problem, dtype):
    def one(item):
        if isinstance(item, tuple):
            return tuple(map(one, item))
        return item.to(dtype) if isinstance(item, torch.Tensor) else item

    return {name: one(item) for name, item in problem.items()}


def adam(problem, weights=None, loss="l1"):
    """The yardstick: the final loss of 2001 steps of Adam on Lambda from zero, lr 0.05; one number per edit
    where the problem is batched. weights [B, P] sum to 1."""
    problem = cast(problem, torch.float32)
    x = torch.zeros(*problem["base"].shape[:-1], problem["basis"].shape[-2], requires_grad=True)
    optimiser = torch.optim.Adam([x], lr=0.05)

    def objective():
        r = value_of(x, **problem) - problem["target"]
        rho = r.abs() if loss == "l1" else r.square()
        return (rho.mean(-1) if weights is None else (weights[:, None] * rho).sum(-1)).mean(-1)

    for _ in range(2001):
        optimiser.zero_grad()
        objective().sum().backward()
        optimiser.step()
    return objective().detach().double()


def stack(problems):
    """Several problems as one batch: zero rows and pixels of weight zero make up the difference."""
    rows, pixels = (max(p["basis"].shape[axis] for p in problems) for axis in (0, 1))

    def grow(item, *sizes):
        return F.pad(item, [n for size, have in zip(sizes[::-1], item.shape[::-1]) for n in (0, size - have)])

    batch = {"basis": torch.stack([grow(p["basis"], rows, pixels) for p in problems])}
    for name in ("base", "target", "shift"):
        batch[name] = torch.stack([grow(p[name].expand(len(p["base"]), -1), 32, pixels) for p in problems])
    parts = []
    for p in problems:
        none = torch.ones(32).double(), torch.zeros(32, rows).double(), torch.zeros(rows, rows).double()
        constant, linear, quadratic = p.get("demodulation") or none
        parts.append((constant, grow(linear, 32, rows), grow(quadratic, rows, rows)))
    batch["demodulation"] = tuple(map(torch.stack, zip(*parts)))
    counts = torch.tensor([p["basis"].shape[1] for p in problems])
    weights = (torch.arange(pixels) < counts[:, None]) / counts[:, None]
    return {**batch, "slope": problems[0]["slope"], "gain": problems[0]["gain"]}, weights


@functools.cache
def adam_on_random(loss):
    return adam(*stack([random_problem(*case) for case in RANDOM]), loss=loss)


def assert_sound(result, problem=None, loss="l1"):
    """What holds for every result: finite, never worse than no change, the loss that of the coefficients."""
    for part in result[:3]:
        assert part.isfinite().all()
    assert (result.loss <= result.initial_loss).all()
    assert set(result.status.flatten().tolist()) <= set(facts.STATUS)
    if problem is not None:
        got = losses_of(result.coefficients, problem, loss)
        torch.testing.assert_close(got, result.loss, rtol=1e-6, atol=1e-12 * (1 + result.initial_loss.max().item()))


def test_demodulated_change_keeps_a_share_of_the_weight(fit):
    problem = runaway_problem()
    constant, _, quadratic = problem["demodulation"]
    for loss in ("l1", "l2"):
        result = fit(**problem, loss=loss)
        x = result.coefficients
        reach = ((x @ quadratic) * x).sum(-1).div(constant).sqrt()
        assert reach.max() < facts.REACH * (1 + 1e-9)
        bounded = result.status == facts.BOUNDED
        assert bounded.any() and (reach[bounded] > 0.99 * facts.REACH).all()
        assert_sound(result, problem, loss)


# Quality


def test_problems_are_the_recorded_ones():
    for kind in ("same", "up"):
        problem, value, linear_loss = stylegan2_problem(kind)
        zero = torch.zeros(len(problem["base"]), len(problem["basis"]), dtype=torch.float64)
        torch.testing.assert_close(value_of(zero, **problem), value, rtol=0, atol=1e-5)
        assert losses_of(zero, problem).mean().item() == pytest.approx(linear_loss[0].item(), rel=1e-5)
    problem, first_loss = proggan_problem(1)
    assert (problem["base"] - problem["target"]).abs().mean().item() == pytest.approx(first_loss, rel=1e-5)


GOLDEN = {
    "stylegan2-same": lambda: stylegan2_problem("same")[0],
    "stylegan2-up": lambda: stylegan2_problem("up")[0],
    "proggan-1": lambda: proggan_problem(1)[0],
    "proggan-3": lambda: proggan_problem(3)[0],
}


@functools.cache
def adam_on_golden(name):
    return adam(GOLDEN[name]()).item()


@pytest.mark.parametrize("name", GOLDEN)
def test_l1_is_no_worse_than_adam_on_golden_layers(fit, name):
    problem = GOLDEN[name]()
    result = fit(**problem)
    assert_sound(result, problem)
    assert result.loss.mean().item() <= 1.001 * adam_on_golden(name)
    assert (result.status == facts.CONVERGED).all()


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize(
    "number", range(len(RANDOM)), ids=lambda i: "seed{}-rank{}-{}-demodulated={}".format(*RANDOM[i])
)
def test_no_worse_than_adam_on_random_layers(number, loss):
    problem = random_problem(*RANDOM[number])
    result = ops.fit_low_rank(**problem, loss=loss)
    assert_sound(result, problem, loss)
    assert result.loss.mean().item() <= 1.01 * adam_on_random(loss)[number].item()


@pytest.mark.parametrize("rank", [1, 3])
def test_linear_l1_is_optimal(fit, rank):
    """A linear program, so duality certifies the optimum: any |z| <= 1 with basis z = 0 bounds the loss from
    below by z . r0. At the optimum J residuals vanish, and there z is whatever makes basis z = 0."""
    problem, _ = proggan_problem(rank)
    basis = problem["basis"]
    result = fit(**problem)
    r0 = problem["base"] - problem["target"]
    r = r0 + result.coefficients @ basis
    zero = r.abs().argsort(-1)[:, : len(basis)]
    z = r.sign().scatter(1, zero, 0.0)
    solved = torch.linalg.solve(basis.T[zero].mT, -(z @ basis.T))
    z = z.scatter(1, zero, solved)
    assert (z @ basis.T).abs().max() < 1e-6
    bound = (z / z.abs().amax(-1, keepdim=True).clamp_min(1.0) * r0).mean(-1)
    assert (result.loss <= (1 + 1e-4) * bound).all()


# The closed form


def linear_problem(seed=0, unknowns=9, pixels=40, channels=7):
    generator = torch.Generator().manual_seed(seed)
    basis, base, target = (
        torch.randn(n, pixels, generator=generator, dtype=torch.float64) for n in (unknowns, channels, channels)
    )
    return {"basis": basis, "base": base, "target": target}


@ON_GPU_TOO
@pytest.mark.parametrize("unknowns", [1, 9, 36, 100])
def test_closed_form_is_least_squares(fit, unknowns):
    problem = linear_problem(unknowns=unknowns, pixels=120)
    weights = torch.rand(120, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = fit(**problem, gain=1.7, pixel_weights=weights, loss="l2")
    root = weights.sqrt()
    wanted = root * (problem["target"] - 1.7 * problem["base"])
    exact = torch.linalg.lstsq((1.7 * root * problem["basis"]).T, wanted.T).solution.T
    torch.testing.assert_close(result.coefficients, exact, rtol=1e-8, atol=1e-10)
    assert (result.status == facts.CONVERGED).all() and result.solver == "closed_form"
    assert (result.iterations == 1).all()


@ON_GPU_TOO
@pytest.mark.parametrize("kind", ["fewer pixels", "twin rows", "zero row", "constant maps", "nearly twin rows"])
def test_closed_form_of_rank_deficient_basis(fit, kind):
    problem = linear_problem(pixels=5 if kind == "fewer pixels" else 40)
    basis = problem["basis"]
    if kind == "twin rows":
        basis[4] = basis[2]
    elif kind == "nearly twin rows":
        basis[4] = basis[2] + 1e-9 * basis[4]
    elif kind == "zero row":
        basis[4] = 0
    elif kind == "constant maps":
        basis[:] = basis[:, :1]
    result = fit(**problem, loss="l2")
    wanted = problem["target"] - problem["base"]
    best = (wanted - wanted @ torch.linalg.pinv(basis, rtol=1e-7) @ basis).square().mean(-1)
    assert_sound(result, None)
    assert (result.status == facts.SHIFTED).all()
    # what tells nearly equal rows apart is fitted a little too, with coefficients that stay bounded
    torch.testing.assert_close(result.loss, best, rtol=1e-5 if kind == "nearly twin rows" else 1e-8, atol=1e-20)
    assert result.coefficients.abs().max() < 1e3 * wanted.abs().max()


@ON_GPU_TOO
@pytest.mark.parametrize("same_scale", [True, False])
def test_closed_form_with_penalty(fit, same_scale):
    problem = linear_problem()
    factor = linear_problem(1)["basis"]
    penalty = factor @ factor.T / 40
    scale = torch.full((7,), 0.3, dtype=torch.float64)
    if not same_scale:
        scale = scale * torch.arange(7)
    result = fit(**problem, loss="l2", penalty=penalty, penalty_scale=scale)
    gram = problem["basis"] @ problem["basis"].T / 40
    right = (problem["target"] - problem["base"]) @ problem["basis"].T / 40
    exact = torch.linalg.solve(gram + scale[:, None, None] * penalty, right)
    torch.testing.assert_close(result.coefficients, exact, rtol=1e-9, atol=1e-12)


# Agreement


AGREEMENT = {
    "proggan-3": lambda: proggan_problem(3)[0],
    "same": lambda: stylegan2_problem("same")[0],
    "demodulated": lambda: random_problem(4, 1, (10, 10)),
    "demodulated, identity": lambda: random_problem(4, 1, (10, 10), slope=1.0),
    "activation only": lambda: random_problem(5, 2, (8, 8), demodulated=False),
    "over pixels": lambda: random_problem(6, 3, (4, 4)),
    "over pixels, activation only": lambda: random_problem(7, 4, (5, 5), demodulated=False),
    "two panels": lambda: random_problem(8, 2, (13, 12)),
    "runaway": runaway_problem,
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("name", AGREEMENT)
def test_cpp_agrees_with_reference(isa, loss, name):
    if isa in ISAS[ISAS.index(extension().isa()) + 1 :]:
        pytest.skip(f"this CPU has no {isa}")
    problem = AGREEMENT[name]()
    ours, theirs = run(CPU[f"cpp-{isa}"], **problem, loss=loss), run(CPU["reference"], **problem, loss=loss)
    assert_sound(ours, problem, loss)
    torch.testing.assert_close(ours.initial_loss, theirs.initial_loss, rtol=1e-12, atol=0)
    # near a kink a rounding error can send a channel down another slope: the typical channel agrees to the
    # last digits, every one in what it reached
    gap = (ours.loss - theirs.loss).abs() / theirs.initial_loss
    assert gap.median() < 1e-9 and gap.max() < 5e-3, f"worst channel {gap.argmax()}"
    little = 1e-5 * theirs.initial_loss.mean().item()  # where next to nothing is left
    assert ours.loss.mean().item() == pytest.approx(theirs.loss.mean().item(), rel=1e-3, abs=little)
    assert (ours.status == theirs.status).double().mean() > 0.9
    apart = (ours.coefficients - theirs.coefficients).norm(dim=-1) / (theirs.coefficients.norm(dim=-1) + 1e-300)
    assert (apart < 1e-3).double().mean() > 0.75
    if name == "proggan-3":  # well-conditioned and convex: the same path
        assert (apart < 1e-6).all() and torch.equal(ours.iterations, theirs.iterations)


@pytest.mark.parametrize("steps", [1, 7])
def test_cpp_takes_the_steps_of_reference(steps):
    """A few steps leave no time for rounding to matter, so every piece of the step must agree."""
    problem = random_problem(2, 2, (6, 8))
    spread = linear_problem(3, unknowns=18)["basis"]
    extra = {
        "pixel_weights": torch.arange(48.0).remainder(5),
        "penalty": 1e-3 * spread @ spread.T,
        "penalty_scale": torch.linspace(0, 1, 32),
    }
    for more in ({}, extra):
        for loss in ("l1", "l2"):
            ours, theirs = (
                run(CPU[name], **problem, **more, loss=loss, max_iterations=steps)
                for name in (f"cpp-{extension().isa()}", "reference")
            )
            torch.testing.assert_close(ours.coefficients, theirs.coefficients, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-9, atol=0)


def test_threads_do_not_change_a_bit():
    problem = cast(random_problem(9, 2, (8, 8), channels=256), torch.float32)  # work enough for three threads
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.fit_low_rank(**problem, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for ours, theirs in zip(results[0][:5], result[:5]):
            assert torch.equal(ours, theirs)


def test_more_edits_than_one_group():
    """Prepared arrays of 2^24 doubles at most are held at a time; a later group must find its own edits."""
    generator = torch.Generator().manual_seed(11)
    basis = torch.randn(64, 576, 60, generator=generator)
    base, target = torch.randn(2, 64, 2, 60, generator=generator)
    assert 64 * 576 * 576 > 1 << 24
    together = ops.fit_low_rank(basis, base, target, backend="cpp", max_iterations=2)
    for i in (0, 43, 44, 63):
        alone = ops.fit_low_rank(basis[i], base[i], target[i], backend="cpp", max_iterations=2)
        assert torch.equal(together.coefficients[i], alone.coefficients)


# Several demodulations


def segmented_problem(seed=0, rank=2, sizes=((6, 6), (4, 5), (5, 5)), **options):
    """Regions of pictures with styles of their own, side by side; the first problem's size of the coefficients. Also
    the problems they are made of."""
    parts = [random_problem(seed + i, rank, size, **options) for i, size in enumerate(sizes)]
    parts = [part | {"shift": part["shift"].expand_as(part["base"])} for part in parts]
    together = {name: torch.cat([part[name] for part in parts], -1) for name in ("basis", "base", "target", "shift")}
    together["demodulation"] = tuple(map(torch.stack, zip(*(part["demodulation"] for part in parts))))
    counts = torch.tensor([part["base"].shape[1] for part in parts])
    together["segments"] = torch.arange(len(parts)).repeat_interleave(counts)
    return together | {"slope": parts[0]["slope"], "gain": parts[0]["gain"]}, parts


def shared_losses(x, parts, loss="l1"):
    counts = [part["base"].shape[1] for part in parts]
    return sum(count * losses_of(x, part, loss) for count, part in zip(counts, parts)) / sum(counts)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("slope", [1.0, 0.2])
@pytest.mark.parametrize(
    ("rank", "sizes"), [(1, ((9, 9), (9, 9))), (2, ((6, 6), (4, 5), (5, 5))), (4, ((3, 3), (4, 4)))]
)
def test_segments_have_their_own_demodulation(fit, rank, sizes, slope, loss):
    problem, parts = segmented_problem(3, rank, sizes, slope=slope)
    result = fit(**problem, loss=loss)
    zero = torch.zeros_like(result.coefficients)
    torch.testing.assert_close(result.initial_loss, shared_losses(zero, parts, loss), rtol=1e-9, atol=0)
    torch.testing.assert_close(result.loss, shared_losses(result.coefficients, parts, loss), rtol=1e-9, atol=1e-12)
    assert (result.loss <= result.initial_loss).all() and result.loss.mean() < 0.9 * result.initial_loss.mean()
    theirs = run(CPU["reference"], **problem, loss=loss)
    gap = (result.loss - theirs.loss).abs() / theirs.initial_loss
    assert gap.median() < 1e-8 and gap.max() < 0.02


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_segments_are_no_worse_than_adam(loss):
    problem, parts = segmented_problem(11, 1, ((8, 8), (6, 7)))
    result = ops.fit_low_rank(**problem, loss=loss)
    x = torch.zeros_like(result.coefficients).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.05)
    for _ in range(2001):
        optimiser.zero_grad()
        shared_losses(x, parts, loss).sum().backward()
        optimiser.step()
    assert result.loss.mean().item() <= 1.01 * shared_losses(x.detach(), parts, loss).mean().item()


def test_equal_segments_are_none(fit):
    problem = random_problem(5, 2, (6, 7))
    alone = fit(**problem)
    constant, linear, quadratic = problem["demodulation"]
    for places in (torch.zeros(42), torch.arange(42) % 3, torch.ones(42)):
        three = torch.stack([constant] * 3), torch.stack([linear] * 3), torch.stack([quadratic] * 3)
        parted = fit(**problem | {"demodulation": three, "segments": places.int()})
        torch.testing.assert_close(parted.initial_loss, alone.initial_loss, rtol=1e-12, atol=0)
        gap = (parted.loss - alone.loss).abs() / alone.initial_loss
        assert gap.median() < 1e-9 and gap.max() < 5e-3


def test_segments_in_any_order_batch_and_weight(fit):
    problem, parts = segmented_problem(7, 1)
    alone = fit(**problem)
    order = torch.randperm(problem["base"].shape[1], generator=torch.Generator().manual_seed(0))
    moved = {
        k: v[..., order] if k in ("basis", "base", "target", "shift", "segments") else v for k, v in problem.items()
    }
    gap = (fit(**moved).loss - alone.loss).abs() / alone.initial_loss
    assert gap.median() < 1e-9 and gap.max() < 5e-3
    # weight zero removes a segment; a batch has edits with fewer of them
    first = parts[0]["base"].shape[1]
    weights = torch.stack([torch.ones(len(order)), (torch.arange(len(order)) < first).float()])
    batch = {k: v if k in ("slope", "gain") else torch.stack([v, v]) for k, v in problem.items() if k != "demodulation"}
    batch["demodulation"] = tuple(torch.stack([part, part]) for part in problem["demodulation"])
    both = fit(**batch, pixel_weights=weights)
    torch.testing.assert_close(both.loss[0], alone.loss, rtol=1e-6, atol=1e-9)
    gap = (both.loss[1] - fit(**parts[0]).loss).abs() / both.initial_loss[1]
    assert gap.median() < 1e-9 and gap.max() < 5e-3


# Derivatives


def test_derivative_of_segments_against_finite_differences():
    problem, _ = segmented_problem(3, 1)
    names = ("basis", "base", "target", "shift")
    rest = (problem[name] for name in ("demodulation", "slope", "gain", "segments"))
    model = Model(*(problem[name] for name in names), *rest)
    x = 0.02 * torch.randn(32, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def value(x):
        lin, m, _ = model.linearise(x)
        return model.spread(m) * lin

    jacobian, h = model.jacobian(*model.linearise(x)), 1e-6
    for j in range(9):
        side = torch.zeros_like(x)
        side[:, j] = h
        torch.testing.assert_close((value(x + side) - value(x - side)) / (2 * h), jacobian[:, j], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("demodulated", [True, False])
def test_derivative_against_finite_differences(demodulated):
    problem = random_problem(3, 2, (5, 5), demodulated)
    demodulation = problem.get("demodulation")
    model = Model(
        problem["basis"],
        problem["base"],
        problem["target"],
        problem["shift"].expand_as(problem["base"]),
        None if demodulation is None else tuple(part[None] for part in demodulation),
        problem["slope"],
        problem["gain"],
    )
    x = 0.05 * linear_problem(2, unknowns=18, pixels=32)["basis"].T.contiguous()
    kink = torch.full((32,), 0.1, dtype=torch.float64)

    def residual(x):
        lin, m, dm = model.linearise(x)
        return model.residual(lin, m, kink), (lin, m, dm)

    (_, steep, bend), (lin, m, dm) = residual(x)
    jacobian = steep[:, None] * model.jacobian(lin, m, dm)
    h = 1e-6
    for j in range(18):
        side = torch.zeros_like(x)
        side[:, j] = h
        (above, steep_above, _), (lin_above, m_above, _) = residual(x + side)
        (below, steep_below, _), (lin_below, m_below, _) = residual(x - side)
        torch.testing.assert_close((above - below) / (2 * h), jacobian[:, j], rtol=1e-6, atol=1e-7)
        turn = (m_above * lin_above - m_below * lin_below) / (2 * h)
        torch.testing.assert_close((steep_above - steep_below) / (2 * h), bend * turn, rtol=1e-4, atol=1e-4)


def test_sharp_kink_is_the_limit_of_the_rounded_one():
    problem = random_problem(3, 2, (5, 5))
    model = Model(*(problem[k] for k in ("basis", "base", "target", "shift")), None, 0.2, 1.4)
    lin, m, _ = model.linearise(torch.zeros(32, 18, dtype=torch.float64))
    rounded = model.residual(lin, m, torch.full((32,), 1e-9, dtype=torch.float64))
    for ours, sharp in zip(rounded[:2], model.residual(lin, m)[:2]):
        torch.testing.assert_close(ours, sharp, rtol=0, atol=1e-6)


# Weights, batches, penalty


def pad(problem, pixels):
    padded = dict(problem)
    for name in ("basis", "base", "target", "shift"):
        rows = problem[name].expand(len(problem["base"]), -1) if name == "shift" else problem[name]
        padded[name] = F.pad(rows, (0, pixels - rows.shape[-1]), value=3.0)  # must not matter
    return padded


UNEQUAL = ((20, 1, (4, 5)), (21, 1, (6, 6)), (22, 1, (2, 3)))


def batch_of_unequal_edits(channels=32):
    """Edits padded to the largest, and the pixel weights that say so."""
    pixels = 36
    problems = [few(random_problem(*case), channels) for case in UNEQUAL]
    padded = [pad(problem, pixels) for problem in problems]
    batch = {name: torch.stack([p[name] for p in padded]) for name in ("basis", "base", "target", "shift")}
    batch["demodulation"] = tuple(map(torch.stack, zip(*(p["demodulation"] for p in problems))))
    counts = torch.tensor([p["basis"].shape[1] for p in problems])
    return {**batch, "slope": 0.2, "gain": math.sqrt(2.0)}, (torch.arange(pixels) < counts[:, None]).double()


@ON_GPU_TOO
def test_batch_of_padded_edits_equals_single_ones(fit):
    problems = [random_problem(*case) for case in UNEQUAL]
    batch, weights = batch_of_unequal_edits()
    kwargs = {"slope": 0.2, "gain": math.sqrt(2.0), "max_iterations": 8}
    together = fit(**{**batch, **kwargs}, pixel_weights=weights)
    assert together.coefficients.shape == (3, 32, 9) and together.loss.shape == (3, 32)
    for i, problem in enumerate(problems):
        alone = fit(**{**problem, **kwargs})
        torch.testing.assert_close(together.loss[i], alone.loss, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(together.initial_loss[i], alone.initial_loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(together.coefficients[i], alone.coefficients, rtol=1e-5, atol=1e-7)


@ON_GPU_TOO
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_zero_weight_removes_a_pixel(fit, loss):
    problem = proggan_problem(1)[0]
    keep = torch.arange(problem["base"].shape[1]).remainder(3) > 0
    less = {name: item[:, keep] for name, item in problem.items()}
    weighted = fit(**problem, pixel_weights=7.0 * keep, loss=loss)
    torch.testing.assert_close(weighted.coefficients, fit(**less, loss=loss).coefficients, rtol=1e-6, atol=1e-9)


def test_integer_weight_is_a_repeated_pixel(fit):
    problem = linear_problem()
    weights = torch.arange(40).remainder(3)
    repeated = {name: item.repeat_interleave(weights, 1) for name, item in problem.items()}
    for loss in ("l1", "l2"):
        one, other = fit(**problem, pixel_weights=weights.double(), loss=loss), fit(**repeated, loss=loss)
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=0)


@ON_GPU_TOO
@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("linear", [True, False])
def test_penalty_trades_loss_for_preservation(fit, loss, linear):
    problem = proggan_problem(1)[0] if linear else random_problem(1, 1, (8, 8))
    basis = problem["basis"]
    penalty = basis @ basis.T / basis.shape[1]
    penalties, losses = [], []
    for strength in (0.0, 1e-3, 1e-2, 1e-1, 1.0, 1e3):
        scale = torch.full((len(problem["base"]),), strength)
        result = fit(**problem, loss=loss, penalty=penalty, penalty_scale=scale, max_iterations=100)
        x = result.coefficients
        penalties.append(torch.einsum("oj,jk,ok->o", x, penalty, x).mean().item())
        losses.append(result.loss.mean().item())
        assert_sound(result, problem, loss)
    slack = 1e-4 if linear else 1e-2  # other minima when nonconvex
    for i in range(1, len(penalties)):
        assert penalties[i] <= (1 + slack) * penalties[i - 1]
        assert losses[i] >= (1 - slack) * losses[i - 1]
    assert penalties[-1] < 1e-2 * penalties[0]
    free = fit(**problem, loss=loss, max_iterations=100)
    assert losses[0] == pytest.approx(free.loss.mean().item(), rel=1e-2)


# Hostile input


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("demodulated", [True, False])
def test_zero_residual_is_left_alone(fit, loss, demodulated):
    problem = dict(random_problem(0, 1, (4, 4), demodulated))
    zero = torch.zeros(32, 9, dtype=torch.float64)
    met = value_of(zero, **problem)
    problem["target"] = torch.cat([met[:16], problem["target"][16:]])
    result = fit(**problem, loss=loss)
    assert_sound(result, problem, loss)
    assert (result.status[:16] == facts.ZERO_RESIDUAL).all() and not result.coefficients[:16].any()
    assert (result.loss[16:] < 0.8 * result.initial_loss[16:]).all()


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_reachable_target_is_reached(fit, loss):
    problem = dict(random_problem(0, 1, (6, 6)))
    x = 0.1 * linear_problem(5, pixels=32)["basis"].T
    problem["target"] = value_of(x, **problem)
    result = fit(**problem, loss=loss, max_iterations=200)
    found = result.loss < 1e-4 * result.initial_loss ** (1 if loss == "l1" else 2)
    assert found.double().mean() > 0.8
    torch.testing.assert_close(result.coefficients[found], x[found], rtol=0.02, atol=1e-2)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("slope", [1.0, 0.2])
@pytest.mark.parametrize("kind", ["constant maps", "twin rows", "zero basis", "one pixel", "relu", "zero gain"])
def test_degenerate_problems(fit, loss, slope, kind):
    problem = dict(random_problem(0, 1, (4, 4)), slope=slope)
    if kind == "constant maps":
        problem = {k: v[:, :1].expand_as(v) if k in ("basis", "base", "target") else v for k, v in problem.items()}
    elif kind == "twin rows":
        problem["basis"] = problem["basis"][:1].expand(9, -1)
        problem["demodulation"] = None
    elif kind == "zero basis":
        problem["basis"] = torch.zeros_like(problem["basis"])
        problem["demodulation"] = None
    elif kind == "one pixel":
        problem = {k: v[:, :1] if k in ("basis", "base", "target", "shift") else v for k, v in problem.items()}
    elif kind == "relu":
        problem["slope"] = 0.0
    elif kind == "zero gain":
        problem["gain"] = 0.0
    result = fit(**problem, loss=loss)
    assert_sound(result, problem, loss)
    if kind in ("zero basis", "zero gain"):
        assert (result.status == facts.DEGENERATE).all() and not result.coefficients.any()
    elif kind == "one pixel":  # bounded by demodulation, so not always reachable
        assert (result.loss < 0.5 * result.initial_loss).double().mean() > 0.5
    else:
        assert result.loss.mean() < 0.99 * result.initial_loss.mean()


@ON_GPU_TOO
def test_no_pixel_counts(fit):
    """All weights zero in one edit of a batch."""
    problem = random_problem(0, 1, (4, 4))
    batch = {name: problem[name].expand(2, -1, -1) for name in ("basis", "base", "target")}
    weights = torch.tensor([0.0, 1.0])[:, None].expand(2, 16)
    for slope, loss in ((0.2, "l1"), (0.2, "l2"), (1.0, "l1"), (1.0, "l2")):
        result = fit(**batch, slope=slope, pixel_weights=weights, loss=loss)
        assert_sound(result)
        assert (result.status[0] == facts.DEGENERATE).all() and not result.coefficients[0].any()
        assert not result.loss[0].any() and (result.status[1] != facts.DEGENERATE).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-8, 1e-4, 1e4, 1e8])
@pytest.mark.parametrize("what", ["values", "basis"])
def test_scales(fit, dtype, size, what):
    """The result scales as it should, so the algorithm sees the same problem at any scale."""
    problem = dict(random_problem(0, 1, (6, 6)), shift=None)
    plain = fit(**problem, max_iterations=12)
    scaled = dict(problem)
    constant, linear, quadratic = problem["demodulation"]
    if what == "values":  # demodulation forgets the scale of the weights, so put it into the gain
        scaled.update(gain=problem["gain"] * size, target=problem["target"] * size)
    else:
        scaled.update(basis=problem["basis"] * size, demodulation=(constant, linear * size, quadratic * size**2))
    result = fit(**cast(scaled, dtype), max_iterations=12)
    assert_sound(result)
    ratio = size if what == "values" else 1.0
    rtol = 1e-6 if dtype == torch.float64 else 1e-3
    assert (result.loss / ratio / plain.loss - 1).abs().median() < rtol
    assert result.coefficients.dtype == dtype and result.loss.dtype == torch.float64


def single(item):
    if isinstance(item, tuple):
        return tuple(map(single, item))
    return item.float() if isinstance(item, torch.Tensor) else item


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("demodulated", [True, False])
def test_float32_input_leads_to_the_same_optimum(fit, loss, rank, demodulated):
    """The normal equations of float32 input may be summed in float32; what they lead to is as good."""
    problem = random_problem(3, rank, (8, 9), demodulated)
    wide = fit(**problem, loss=loss)
    narrow = fit(**{name: single(item) for name, item in problem.items()}, loss=loss)
    assert_sound(narrow)
    assert narrow.loss.mean() <= 1.01 * wide.loss.mean()  # not convex: rounding may lead to another minimum
    convex = random_problem(3, rank, (8, 9), False, slope=1.0)
    wide, narrow = (fit(**{n: cast(i) for n, i in convex.items()}, loss=loss) for cast in (lambda i: i, single))
    torch.testing.assert_close(narrow.loss, wide.loss, rtol=1e-4, atol=0)


HOSTILE = ("zero residual", "constant maps", "one pixel", "dead channel", "twin rows", "one huge row", "one huge pixel")


def hostile_problem(kind, demodulated, size):
    problem = dict(random_problem(2, 1, (4, 4), demodulated))
    if kind == "zero residual":
        problem["target"] = value_of(torch.zeros(32, 9, dtype=torch.float64), **problem)
    elif kind == "constant maps":
        maps = ("basis", "base", "target")
        problem = {name: item[:, :1].expand_as(item) if name in maps else item for name, item in problem.items()}
    elif kind == "one pixel":
        maps = ("basis", "base", "target", "shift")
        problem = {name: item[:, :1] if name in maps else item for name, item in problem.items()}
    elif kind == "dead channel":  # all its weights are zero
        problem["base"] = problem["base"].clone()
        problem["base"][5] = 0
        if demodulated:
            constant, linear, quadratic = (part.clone() for part in problem["demodulation"])
            constant[5], linear[5] = 1e-8, 0
            problem["demodulation"] = constant, linear, quadratic
    elif kind == "twin rows":
        problem["basis"] = problem["basis"][:1].expand(9, -1)
        if demodulated:
            constant, linear, quadratic = problem["demodulation"]
            problem["demodulation"] = constant, linear, quadratic[:1, :1].expand(9, 9)
    elif kind == "one huge row":
        problem["basis"] = problem["basis"].clone()
        problem["basis"][4] *= 1e8
    elif kind == "one huge pixel":
        problem["target"] = problem["target"].clone()
        problem["target"][:, 3] *= 1e8
    problem["gain"] *= size
    problem["target"] = problem["target"] * size
    return problem


@ON_GPU_TOO
@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("demodulated", [True, False])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_float32_input(fit, kind, size, demodulated, loss):
    problem = hostile_problem(kind, demodulated, size)
    result = fit(**{name: single(item) for name, item in problem.items()}, loss=loss)
    assert_sound(result)
    assert (result.status != facts.NONFINITE).all()
    if kind == "zero residual":  # but for its rounding to float32
        assert (result.loss <= 1e-5 * size * (1 if loss == "l1" else size)).all()


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("slope", [1.0, 0.2])
def test_numbers_too_large_are_reported(fit, loss, slope):
    problem = linear_problem()
    huge = {name: item * 1e300 for name, item in problem.items()}
    result = fit(**huge, slope=slope, loss=loss)
    assert result.coefficients.isfinite().all() and not result.loss.isnan().any()
    tiny = cast({**problem, "basis": problem["basis"] * 1e-30, "target": problem["target"] * 1e30}, torch.float32)
    result = fit(**tiny, slope=slope, loss=loss)  # the answer does not fit float32
    assert (result.status == facts.NONFINITE).all() and not result.coefficients.any()


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_many_unknowns(fit, loss):
    """Rank 20 and more unknowns than pixels, both ways of solving."""
    problem = random_problem(11, 20, (7, 7), channels=3)
    assert_sound(fit(**problem, loss=loss, max_iterations=20), problem, loss)
    weights = torch.ones(49)
    weights[10:] = 0
    few = fit(**problem, loss=loss, pixel_weights=weights)
    assert (few.loss < 0.2 * few.initial_loss).all()
    assert_sound(fit(**random_problem(11, 4, (12, 12), channels=3), loss=loss, max_iterations=10))


# Interface


def test_unbatched_batched_and_broadcast_shift():
    problem = random_problem(1, 1, (4, 4))
    alone = ops.fit_low_rank(**problem)
    assert alone.coefficients.shape == (32, 9) and alone.status.shape == (32,) and alone.solver == "lm"
    batch = dict(problem, **{k: problem[k][None] for k in ("basis", "base", "target")})
    batch["demodulation"] = tuple(item[None] for item in problem["demodulation"])
    full = problem["shift"].expand(1, 32, 16).contiguous()
    for shift in (problem["shift"], problem["shift"][None], full, full.mT.contiguous().mT):
        result = ops.fit_low_rank(**dict(batch, shift=shift))
        for ours, theirs in zip(result[:5], alone[:5]):
            assert torch.equal(ours[0], theirs)
    noise = dict(problem, shift=problem["shift"][:1])
    same = dict(problem, shift=problem["shift"][:1].expand(32, 16).contiguous())
    assert torch.equal(ops.fit_low_rank(**noise).coefficients, ops.fit_low_rank(**same).coefficients)


def test_no_channels():
    problem = linear_problem()
    empty = {name: item if name == "basis" else item[:0] for name, item in problem.items()}
    for backend in ("cpp", "reference"):
        assert ops.fit_low_rank(**empty, backend=backend).coefficients.shape == (0, 9)


def test_strides_and_gradients_are_accepted():
    problem = cast(proggan_problem(1)[0], torch.float32)
    plain = ops.fit_low_rank(**problem)
    odd = {name: item.T.contiguous().T.requires_grad_() for name, item in problem.items()}
    result = ops.fit_low_rank(**odd)
    assert torch.equal(result.coefficients, plain.coefficients) and not result.coefficients.requires_grad


def test_custom_op_contract():
    problem = cast(random_problem(1, 1, (4, 4)), torch.float32)
    keys = ("basis", "base", "target", "shift", "demodulation", "slope", "gain")
    args = prepared(**{k: problem[k] for k in keys}, max_iterations=5)
    library.opcheck(torch.ops.rewrite_core.fit_low_rank, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": torch.zeros(1, 1, 1)}, r"target must be \[B, O, P\]"),
        ({"basis": torch.zeros(1, 9, 99)}, r"base must be \[B, O, P\]"),
        ({"basis": torch.zeros(9, 16)}, r"\[B, J, P\]"),
        ({"basis": torch.zeros(1, 9, 16, dtype=torch.float64)}, "convert one to the other"),
        ({"linear": None}, "three tensors"),
        ({"penalty": torch.eye(9, dtype=torch.float64)[None]}, "without a penalty_scale"),
        ({"constant": torch.ones(1, 32)}, "constant is torch.float32"),
        ({"constant": torch.ones(1, 31).double()}, r"constant must be \[B, O\]"),
        ({"loss": "huber"}, "no loss 'huber'"),
        ({"segments": torch.zeros(1, 16).long()}, r"\[B, G, O\]"),
    ],
)
def test_the_raw_op_checks_too(change, words):
    problem = cast(random_problem(1, 1, (4, 4)), torch.float32)
    keys = ("basis", "base", "target", "shift", "demodulation", "slope", "gain")
    good = prepared(**{k: problem[k] for k in keys}, max_iterations=5)
    with pytest.raises(ValueError, match=words):
        torch.ops.rewrite_core.fit_low_rank(*good._replace(**change))


GOOD = linear_problem()
NAN = torch.full((7, 40), float("nan"), dtype=torch.float64)
SEGMENTED = {
    "demodulation": (torch.ones(2, 7), torch.zeros(2, 7, 9), torch.zeros(2, 9, 9)),
    "segments": torch.ones(40).long(),
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"basis": [1.0]}, TypeError, "basis must be a torch tensor"),
        ({"base": [1.0]}, TypeError, "base must be a torch tensor, not list"),
        ({"base": GOOD["base"].numpy()}, TypeError, "base must be a torch tensor, not ndarray"),
        ({"target": torch.nested.nested_tensor([torch.ones(40)])}, TypeError, "target is a nested tensor"),
        ({"base": GOOD["base"].half()}, TypeError, "base is torch.float16"),
        ({"target": GOOD["target"].float()}, TypeError, "convert one to the other"),
        ({"basis": GOOD["basis"][0]}, ValueError, r"basis must be \[B, J, P\]"),
        ({"basis": GOOD["basis"][:0]}, ValueError, "at least one row"),
        ({"base": GOOD["base"][None]}, ValueError, r"base must be \[O, P\]"),
        ({"target": GOOD["target"][:, 1:]}, ValueError, r"target must be \[O, P\] = \[7, 40\]"),
        ({"target": NAN}, ValueError, "target holds NaN"),
        ({"base": NAN / 0}, ValueError, "base holds NaN or infinity"),
        ({"shift": torch.zeros(6, 40, dtype=torch.float64)}, ValueError, "shift must be"),
        ({"loss": "huber"}, ValueError, "no loss 'huber'"),
        ({"max_iterations": 0}, ValueError, "max_iterations"),
        (
            {"max_iterations": 2**40},
            ValueError,
            "max_iterations must be an integer of at least 1, and at most 2147483647",
        ),
        ({"max_iterations": 5.0}, ValueError, "max_iterations must be an integer"),
        ({"tolerance": -1.0}, ValueError, "tolerance"),
        ({"slope": float("nan")}, ValueError, "slope"),
        ({"pixel_weights": -torch.ones(40)}, ValueError, "pixel_weights has a negative"),
        ({"pixel_weights": torch.ones(39)}, ValueError, r"pixel_weights must be \[P\]"),
        ({"penalty": torch.eye(8)}, ValueError, r"penalty must be \[J, J\]"),
        ({"penalty_scale": torch.ones(7)}, ValueError, "without a penalty"),
        ({"penalty": torch.eye(9), "penalty_scale": -torch.ones(7)}, ValueError, "penalty_scale has a neg"),
        ({"demodulation": (torch.ones(7),)}, ValueError, "three tensors"),
        ({"demodulation": (torch.ones(7), None, None)}, ValueError, "three tensors"),
        ({"demodulation": (None, torch.zeros(7, 9), torch.eye(9))}, ValueError, "three tensors"),
        ({"demodulation": (torch.zeros(7), torch.zeros(7, 9), torch.eye(9))}, ValueError, "must be positive"),
        ({"segments": torch.zeros(40).long()}, ValueError, "pass demodulation too"),
        (SEGMENTED | {"segments": torch.zeros(40)}, TypeError, "must hold integers"),
        (SEGMENTED | {"segments": torch.zeros(39).long()}, ValueError, r"segments must be \[P\]"),
        (SEGMENTED | {"segments": torch.full((40,), 2)}, ValueError, "from 0 to 1"),
        (SEGMENTED | {"segments": torch.full((40,), -1)}, ValueError, "from 0 to 1"),
        (SEGMENTED | {"demodulation": (torch.ones(7), torch.zeros(7, 9), torch.eye(9))}, ValueError, r"\[B, G, O\]"),
        (SEGMENTED | {"segments": None}, ValueError, r"constant must be \[O\]"),
        ({"backend": "abacus"}, ValueError, "no backend"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words) as caught:
        ops.fit_low_rank(**{**GOOD, **change})
    assert "\n" not in str(caught.value)


def test_whole_numbers_of_numpy():
    one, other = (ops.fit_low_rank(**GOOD, max_iterations=number) for number in (np.int64(5), 5))
    assert torch.equal(one.coefficients, other.coefficients)


def test_explained():
    assert {record.name for record in backends_of("fit_low_rank")} >= {"cpp", "reference"}
    assert all(isinstance(code, int) and word for code, word in facts.STATUS.items())


# The GPU kernel: in Triton's interpreter, compiled for GPUs this machine lacks, and on one


def few(problem, channels):
    """The first channels of a problem."""
    part = dict(problem)
    for name in ("base", "target", "penalty_scale"):
        if name in part:
            part[name] = part[name][:channels]
    if part.get("shift") is not None:
        part["shift"] = part["shift"].expand(len(problem["base"]), -1)[:channels]
    if part.get("demodulation") is not None:
        constant, linear, quadratic = part["demodulation"]
        part["demodulation"] = constant[:channels], linear[:channels], quadratic
    return part


def agree(kernel, problem, tolerance=1e-7, **options):
    """The kernel takes the steps of the reference: same status, same number, the same numbers but for rounding."""
    ours, theirs = run(kernel, **problem, **options), run(reference.run_reference, **problem, **options)
    assert_sound(ours)
    assert torch.equal(ours.status, theirs.status), (ours.status, theirs.status)
    assert torch.equal(ours.iterations, theirs.iterations), (ours.iterations, theirs.iterations)
    torch.testing.assert_close(ours.initial_loss, theirs.initial_loss, rtol=1e-12, atol=0)
    assert ((ours.loss - theirs.loss).abs() <= tolerance * theirs.initial_loss).all()
    apart = (ours.coefficients - theirs.coefficients).norm(dim=-1)
    assert (apart <= tolerance * theirs.coefficients.norm(dim=-1)).all(), apart
    return ours


INTERPRETED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_fit_low_rank as t
from rewrite_core.kernels import fit_low_rank as kernels
torch.use_deterministic_algorithms(True)  # what is allocated is NaN, so what is never written shows
torch.utils.deterministic.fill_uninitialized_memory = True

def agree(problem, channels=2, tolerance=1e-7, config=None, max_iterations=5, **options):
    problem = t.few(problem, channels)
    run = lambda given: kernels.launch(given, config)
    return t.agree(run, problem, tolerance, max_iterations=max_iterations, **options)

penalty = t.linear_problem(3, unknowns=18)["basis"]
penalty = {"penalty": 1e-3 * penalty @ penalty.T, "penalty_scale": torch.linspace(1, 0, 32).double()}
weights = torch.arange(48.0).remainder(5)
for loss in ("l1", "l2"):  # every mode; tiles and blocks that are not whole
    for slope in (0.2, 1.0):
        for demodulated in (True, False):
            problem = t.random_problem(2, 2, (6, 8), demodulated, slope)
            agree(problem, loss=loss, channels=1, max_iterations=3)
            agree({**problem, **penalty, "pixel_weights": weights}, channels=1, loss=loss, max_iterations=2)
    agree(t.random_problem(6, 3, (4, 4)), loss=loss, max_iterations=3)  # over pixels, one block of them
    agree(t.random_problem(7, 4, (5, 5), demodulated=False), channels=1, loss=loss, max_iterations=3)  # and two
    agree(t.random_problem(8, 1, (13, 12)), channels=1, loss=loss, max_iterations=3)  # two tiles
    agree(t.random_problem(11, 4, (7, 6), channels=3), channels=1, loss=loss, max_iterations=3)  # two blocks
    one_pixel = t.random_problem(5, 1, (1, 1), False)
    agree({name: one_pixel[name] for name in ("basis", "base", "target")}, loss=loss, gain=2.0)
agree(t.linear_problem(unknowns=70, pixels=90), loss="l2")
for config in kernels.CANDIDATES:
    for rank, size in ((2, (4, 3)), (3, (6, 6))):
        agree(t.random_problem(12, rank, size), channels=1, config=config, max_iterations=2)
    agree(t.linear_problem(unknowns=20, pixels=37), channels=1, config=config, loss="l2")
# to the end: the same path
for problem in (t.proggan_problem(1)[0], t.cast(t.random_problem(4, 1, (6, 6)), torch.float32), t.runaway_problem()):
    agree(problem, channels=1, tolerance=1e-5, max_iterations=60)
# edits of unequal size in one launch, more channels than programs, broadcast shift; twice the same bits
kernels.SCRATCH = 20000
batch, weights = t.batch_of_unequal_edits(3)
both = [t.agree(kernels.launch, batch, pixel_weights=weights, max_iterations=2) for _ in range(2)]
kernels.SCRATCH = 1 << 27
assert all(torch.equal(one, other) for one, other in zip(both[0][:5], both[1][:5]))
# hostile: see test_hostile_float32_input for what each is
for number, kind in enumerate(t.HOSTILE):
    for size in (1e-8, 1e8)[number % 2 :][:1]:
        demodulated = kind != "one huge row"
        problem = t.cast(t.hostile_problem(kind, demodulated, size), torch.float32)
        problem = {name: part[4:] if name in ("base", "target", "shift") else part for name, part in problem.items()}
        if demodulated:
            problem["demodulation"] = *(part[4:] for part in problem["demodulation"][:2]), problem["demodulation"][2]
        ours = t.run(kernels.launch, **t.few(problem, 2), max_iterations=3)
        theirs = t.run(t.reference.run_reference, **t.few(problem, 2), max_iterations=3)
        t.assert_sound(ours)
        assert torch.equal(ours.status, theirs.status), kind
        assert ((ours.loss - theirs.loss).abs() <= 1e-3 * theirs.initial_loss).all(), kind
for loss in ("l1", "l2"):
    for slope in (0.2, 1.0):
        problem = t.linear_problem()
        agree(problem, slope=slope, loss=loss, gain=0.0)
        agree({**problem, "basis": 0 * problem["basis"]}, slope=slope, loss=loss)
        agree({**problem, "target": problem["base"]}, slope=1.0, loss=loss)
        agree(problem, slope=slope, loss=loss, pixel_weights=torch.zeros(40))
        tiny = t.cast({**problem, "basis": problem["basis"] * 1e-30, "target": problem["target"] * 1e30}, torch.float32)
        found = t.run(kernels.launch, **t.few(tiny, 2), slope=slope, loss=loss, max_iterations=5)
        assert (found.status == t.facts.NONFINITE).all() and found.loss.isfinite().all()
        assert not found.coefficients.any()
for kind in ("twin rows", "zero row", "constant maps"):
    problem = t.linear_problem()
    basis = problem["basis"]
    basis[4] = basis[2] if kind == "twin rows" else 0
    basis[:] = basis[:, :1] if kind == "constant maps" else basis
    found = agree(problem, loss="l2", tolerance=0.1)  # what nothing determines differs
    assert (found.status == t.facts.SHIFTED).all()
# on a GPU nothing is looked into: NaN and wrong signs come out as a status
good = t.prepared(max_iterations=2, **t.few(t.random_problem(0, 1, (4, 4)), 3))
for name in ("basis", "base", "target", "shift", "constant", "linear", "quadratic"):
    data = getattr(good, name).clone()
    data.view(-1)[0] = float("nan") if name != "constant" else -1.0
    statuses = kernels.launch(good._replace(**{name: data}))[4][0]
    assert statuses[0] == t.facts.NONFINITE, name
    assert name in ("basis", "quadratic") or (statuses[1:] != t.facts.NONFINITE).all(), name
assert t.ops.fit_low_rank(**t.few(t.linear_problem(), 2), backend="triton", loss="l2").status.eq(0).all()
print("all of it ran")
"""


@needs_triton_interpreter
def test_triton_interpreted(tmp_path):
    """In a process of its own: TRITON_INTERPRET must be set before Triton decorates the kernels."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, os.path.dirname(os.path.abspath(__file__))],
        cwd=tmp_path,  # away from the source tree, which would be imported in place of the installed package
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "all of it ran" in done.stdout, done.stderr


@needs_triton
def test_triton_constants_are_those_of_the_others():
    """What the kernel does not import is how its scratch is laid out: as many vectors as it counts."""
    from rewrite_core.kernels import fit_low_rank as kernels

    source = Path(kernels.__file__).read_text()
    body = source[source.index("def fit_kernel(") : source.index("def exact_kernel(")]
    assert (
        len(re.findall(r"^    \w+ = \w+ \+ (?:2 \* )?size$", body, re.M)) == 9
    )  # of 13: three pairs, one at the front
    assert '"enable_fp_fusion": False' in source  # as test_triton_compiles_ahead_of_time has it
    for config in kernels.CANDIDATES:
        assert config.pixels % config.tile == 0 == config.pixels % config.block
        assert 32 * config.warps <= config.pixels, (
            "a number that several threads hold would be read after it is written"
        )


def triton_resources(compiled, folder):
    """Registers, stack (spills) and local memory of machine code, by cuobjdump, which comes with Triton."""
    import triton

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    text = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()))


def triton_compile(kernel, capability, types, constants, warps, stages, known=()):
    """known: arguments that are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(constants, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in known}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False},
    )


@needs_triton_compiler
@pytest.mark.parametrize(
    ("capability", "kind"),
    [(80, "over unknowns"), (90, "over unknowns"), (90, "over pixels"), (90, "exact"), (100, "over pixels")],
)
def test_triton_compiles_ahead_of_time(capability, kind, tmp_path, monkeypatch):
    """For GPUs this machine lacks, from source to machine code, in the fullest modes.

    What spills is uniform: the pointers and numbers that live through the whole loop, some 300 registers of them, read
    back a few times per step of about 10^4 cycles. Above a kilobyte it would be tiles."""
    from rewrite_core.kernels import fit_low_rank as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # compile now, whatever was compiled before
    config = kernels.LARGE[0] if kind == "over pixels" else kernels.SMALL[0]
    kernel = kernels.exact_kernel if kind == "exact" else kernels.fit_kernel
    numbers = ("slope", "gain", "tolerance", "slow_rate", "slow_rate_well", "fast_rate_well")
    types = dict.fromkeys(kernel.arg_names, "*fp64") | dict.fromkeys(numbers, "fp64")
    types |= dict.fromkeys(("basis", "base", "target", "shift", "coefficients"), "*fp32")
    types |= dict.fromkeys(("iterations", "statuses"), "*i32")
    counts = (
        "tasks",
        "channels",
        "unknowns",
        "pixels",
        "weight_stride",
        "shift_edit",
        "shift_channel",
        "shift_pixel",
        "max_iterations",
        "stride",
    )
    types |= dict.fromkeys(counts, "i32")
    constants = {
        "PENALISED": kind != "over pixels",
        "SHIFT": True,
        "BLOCK": config.block,
        "TILE": config.tile,
        "PIXELS": config.pixels,
    }
    if kind == "over pixels":
        constants |= dict.fromkeys(("penalty", "penalty_scale"))
    if kind == "over unknowns":
        constants["products"] = None
    if kind != "exact":
        constants |= {"ABSOLUTE": True, "ROUNDED": True, "DEMODULATED": True, "OVER_PIXELS": kind == "over pixels"}
    types = {name: what for name, what in types.items() if name in kernel.arg_names}
    compiled = triton_compile(kernel, capability, types, constants, config.warps, 1)
    ptx = compiled.asm["ptx"]
    registers, stack, local = triton_resources(compiled, tmp_path)
    assert f"sm_{capability}" in ptx and registers <= 255 and local == 0
    assert stack <= 1280, f"spills: {stack}"
    assert compiled.metadata.shared <= 48 << 10
    # Triton 3.9 takes m8n8k4, 3.6 on sm_90 m16n8k16
    assert re.search(r"mma\.sync\.aligned\.m\d+n8k\d+\.row\.col\.f64", ptx), "float64 products without tensor cores"
    assert "fma.rn.f64" not in ptx, "fused across a butterfly, the copies of one sum would differ"
    assert not re.search(r"^\s*(@\S+\s+)?(atom|red)\.", ptx, re.MULTILINE), "sums in any order"


def test_what_the_gpu_kernel_leaves_to_others(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = linear_problem()
    with pytest.raises(BackendUnavailable, match="triton: .*on cpu|triton is not installed"):
        ops.fit_low_rank(**problem, backend="triton")
    if triton_reason() is None:
        record = next(record for record in backends_of("fit_low_rank") if record.name == "triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        small = register.example("cpu")
        number = torch.empty(())
        assert record.supports(*small._replace(basis=number.expand(1, 576, 4096))) is None
        assert "up to 1024" in record.supports(*small._replace(basis=number.expand(1, 1025, 4)))
        assert "segments" in record.supports(*small._replace(segments=torch.zeros(1, 16, dtype=torch.int64)))
        assert "interpreter" in record.declines(*small)


@needs_gpu
@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in AGREEMENT),
        *((name, torch.float64) for name in ("proggan-3", "demodulated", "over pixels")),  # a compilation each
    ],
    ids=str,
)
def test_gpu_agrees_with_cpu(name, dtype, loss):
    problem = cast(AGREEMENT[name](), dtype)
    ours, theirs = run(on_gpu, **problem, loss=loss), run(CPU["reference"], **problem, loss=loss)
    assert_sound(ours)
    torch.testing.assert_close(ours.initial_loss, theirs.initial_loss, rtol=1e-12, atol=0)
    gap = (ours.loss - theirs.loss).abs() / theirs.initial_loss  # as test_cpp_agrees_with_reference has it
    assert gap.median() < 1e-9 and gap.max() < 5e-3, f"worst channel {gap.argmax()}"
    assert ours.loss.mean().item() == pytest.approx(theirs.loss.mean().item(), rel=1e-3, abs=1e-9)
    assert (ours.status == theirs.status).double().mean() > 0.9
    apart = (ours.coefficients - theirs.coefficients).double().norm(dim=-1)
    apart = apart / (theirs.coefficients.double().norm(dim=-1) + 1e-300)  # 0 / 0 in float32, where that is none
    assert (apart < 1e-3).double().mean() > 0.75
    if name == "proggan-3":
        assert (apart < 1e-5).all() and torch.equal(ours.iterations, theirs.iterations)
    again = run(on_gpu, **problem, loss=loss)
    assert all(torch.equal(one, other) for one, other in zip(ours[:5], again[:5])), "other bits"


@needs_gpu
@pytest.mark.parametrize(("rank", "size"), [(1, (3, 5)), (2, (4, 3)), (3, (9, 9))], ids=str)
def test_gpu_small(rank, size):
    """For compute-sanitizer too: every configuration, few steps."""
    from rewrite_core.kernels import fit_low_rank as kernels

    for config in kernels.CANDIDATES:
        for loss, slope in (("l1", 0.2), ("l2", 0.2), ("l2", 1.0)):
            problem = random_problem(12, rank, size, slope == 0.2, slope, channels=8)
            agree(functools.partial(on_gpu, config=config), problem, 1e-5, loss=loss, max_iterations=3)


@needs_gpu
@pytest.mark.parametrize(("rank", "size"), [(64, (12, 12)), (64, (4, 4)), (32, (20, 20)), (1, (64, 64))], ids=str)
def test_gpu_large(rank, size):
    problem = random_problem(13, rank, size, channels=4)
    ours, theirs = (run(which, **problem, max_iterations=4) for which in (on_gpu, reference.run_reference))
    assert ((ours.loss - theirs.loss).abs() <= 1e-3 * theirs.initial_loss).all()


@needs_gpu
def test_gpu_waits_for_nothing():
    """From arguments to result without a look at the GPU's numbers, on the current stream, and in a graph."""
    problem = cast(random_problem(4, 1, (10, 10)), torch.float32)
    move = functools.partial(cast_to, device="cuda")
    problem = {name: move(item) for name, item in problem.items()}
    plain = ops.fit_low_rank(**problem)  # compiles and chooses
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = ops.fit_low_rank(**problem)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(found.coefficients, plain.coefficients)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.fit_low_rank(**problem)
    graph.replay()
    assert torch.equal(found.coefficients, plain.coefficients)


def cast_to(item, device):
    if isinstance(item, tuple):
        return tuple(cast_to(part, device) for part in item)
    return item.to(device) if isinstance(item, torch.Tensor) else item
