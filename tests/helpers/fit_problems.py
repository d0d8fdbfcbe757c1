"""What the tests of ``fit_low_rank`` share: its implementations, problems to fit, and what a sound result is."""

import base64
import functools
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from rewrite_core import ops
from rewrite_core.backends import triton_reason
from rewrite_core.ops.fit_low_rank_op import problem as facts
from rewrite_core.ops.fit_low_rank_op import reference, register

DATA = Path(__file__).parent.parent / "data"


ISAS = ("portable", "avx2", "avx512")


CPU = {
    "reference": reference.run_reference,
    **{f"cpp-{isa}": functools.partial(register.run_cpp, isa=isa) for isa in ISAS},
}


NO_GPU = triton_reason(facts.TRITON) if torch.cuda.is_available() else "there is no GPU here"


def to(problem, device):
    return type(problem)(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in problem))


def on_gpu(problem, config=None):
    """The kernel, for a problem that lies on the CPU and is checked; without a search for the fastest configuration."""
    from rewrite_core.kernels.fit_low_rank import host

    config = config or host.candidates(host.plan(problem)[1])[0]
    return [part.cpu() for part in host.launch(to(problem, "cuda"), config)]


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


def assert_sound(result, problem=None, loss="l1"):
    """What holds for every result: finite, never worse than no change, the loss that of the coefficients."""
    for part in result[:3]:
        assert part.isfinite().all()
    assert (result.loss <= result.initial_loss).all()
    assert set(result.status.flatten().tolist()) <= set(facts.STATUS)
    if problem is not None:
        got = losses_of(result.coefficients, problem, loss)
        torch.testing.assert_close(got, result.loss, rtol=1e-6, atol=1e-12 * (1 + result.initial_loss.max().item()))


def linear_problem(seed=0, unknowns=9, pixels=40, channels=7):
    generator = torch.Generator().manual_seed(seed)
    basis, base, target = (
        torch.randn(n, pixels, generator=generator, dtype=torch.float64) for n in (unknowns, channels, channels)
    )
    return {"basis": basis, "base": base, "target": target}


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


ROUNDING_ALONE = 2e-3  # of the coefficients' size, where they are not determined


def agree(kernel, problem, tolerance=1e-7, **options):
    """The kernel takes the steps of the reference: same status, same number, the same numbers but for rounding.

    The closed form with more unknowns than pixels does not determine its coefficients: one bit of the input moves the
    reference's own by ROUNDING_ALONE (tests/test_fit_low_rank.py). There what they add to the values is compared."""
    ours, theirs = run(kernel, **problem, **options), run(reference.run_reference, **problem, **options)
    assert_sound(ours)
    assert torch.equal(ours.status, theirs.status), (ours.status, theirs.status)
    assert torch.equal(ours.iterations, theirs.iterations), (ours.iterations, theirs.iterations)
    torch.testing.assert_close(ours.initial_loss, theirs.initial_loss, rtol=1e-12, atol=0)
    assert ((ours.loss - theirs.loss).abs() <= tolerance * theirs.initial_loss).all()
    unknowns, pixels = problem["basis"].shape[-2:]
    assert ours.solver == theirs.solver
    if theirs.solver == "closed_form" and unknowns > pixels:
        one, other = (found.coefficients.to(problem["basis"]) @ problem["basis"] for found in (ours, theirs))
        assert ((one - other).norm(dim=-1) <= tolerance * other.norm(dim=-1)).all()
        tolerance = max(tolerance, 10 * ROUNDING_ALONE)
    apart = (ours.coefficients - theirs.coefficients).norm(dim=-1)
    assert (apart <= tolerance * theirs.coefficients.norm(dim=-1)).all(), apart
    return ours
