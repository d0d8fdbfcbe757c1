"""The fused kernel makes the steps of plain autograd in float64, on every instruction set, in every form."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_triton, needs_triton_compiler, needs_triton_interpreter, read_npz

import rewrite_core as rc
from rewrite_core.backends import BackendUnavailable, backends_of, extension, triton_reason
from rewrite_core.ops import fit_projected
from rewrite_core.ops.fit_projected_op import register
from rewrite_core.ops.fit_projected_op.problem import TRITON
from rewrite_core.ops.fit_projected_op.winograd import POINTS, transformed_maps, winograd_tile

ISAS = ["portable", "avx2", "avx512"]


def make(inputs=13, channels=5, size=(7, 6), kernel=3, rank=2, demodulated=False, seed=0):
    """Arguments and options of one problem, float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    key, weight = random(inputs, *size), random(channels, inputs, kernel, kernel)
    taps = torch.eye(kernel**2, dtype=torch.float64).reshape(-1, 1, kernel, kernel)
    operator = F.conv2d(key[:, None], taps, padding=kernel // 2).reshape(inputs, kernel, kernel, *size)
    base = F.conv2d(key[None], weight, padding=kernel // 2)[0]
    options = {"directions": torch.linalg.qr(random(inputs, rank)).Q.T if rank else None, "steps": 23, "lr": 0.02}
    target = base + 3 * random(*base.shape)
    if demodulated:
        style = (1 + 0.3 * random(inputs)) / (inputs * kernel**2) ** 0.5
        options |= {
            "demodulation": (weight, style, 1e-8),
            "shift": 0.1 * random(channels, 1, 1),
            "slope": 0.2,
            "gain": 1.4,
        }
        target = target / base.std()
    return (operator, base, target), options


def single(part):
    if isinstance(part, tuple):
        return tuple(map(single, part))
    return part.float() if isinstance(part, torch.Tensor) else part


def agree(arguments, options, tolerance=2e-4, run=None, **more):
    right = fit_projected(*arguments, **options, **more, backend="reference")
    run = run or (lambda *a, **k: fit_projected(*a, **k, backend="cpp"))
    found = run(*single(arguments), **{name: single(part) for name, part in options.items()}, **more)
    assert found.coefficients.dtype == torch.float32 and found.losses.dtype == torch.float64
    assert found.coefficients.shape == right.coefficients.shape
    worst = ((found.losses - right.losses).abs() / right.losses).argmax()
    torch.testing.assert_close(found.losses, right.losses, rtol=tolerance, atol=0, msg=lambda m: f"step {worst}: {m}")
    assert (found.coefficients - right.coefficients).norm() <= tolerance * right.coefficients.norm()


@pytest.mark.parametrize("demodulated", [False, True])
@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"size": (10, 10), "channels": 33},
        {"size": (4, 5)},
        {"size": (7, 6)},
        {"size": (1, 1)},
        {"size": (1, 9)},
        {"kernel": 1},
        {"kernel": 5, "size": (6, 7)},
        {"inputs": 1, "rank": 1},
        {"channels": 1, "inputs": 8},
        {"rank": 0},
        {"rank": 13},
    ],
    ids=str,
)
def test_steps_of_autograd(sizes, loss, demodulated):
    agree(*make(**sizes, demodulated=demodulated), loss=loss)


@pytest.mark.parametrize("demodulated", [False, True])
@pytest.mark.parametrize(("every", "steps"), [(10, 1), (10, 11), (1, 7), (5, 12)])
def test_projected_gradient_and_rhythm(every, steps, demodulated):
    arguments, options = make(demodulated=demodulated)
    options |= {"steps": steps, "project_every": every}
    for projected in (False, True):
        agree(arguments, options, project_gradient=projected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tile", [0, 2, 4, 5])
def test_every_instruction_set_and_tile(isa, tile):
    if ISAS.index(isa) > ISAS.index(extension().isa()):
        pytest.skip(f"this CPU has no {isa}")

    def run(*arguments, **options):
        problem = []

        class Catch:
            load = staticmethod(lambda: lambda given, _: problem.append(given) or (torch.empty(0), torch.empty(0)))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(register, "select", lambda *_: Catch)
            fit_projected(*arguments, **options)
        return rc.ops.ProjectedResult(*register.run_cpp(problem[0], isa=isa, tile=tile))

    for demodulated in (False, True):
        agree(*make(channels=19, size=(6, 11), demodulated=demodulated), run=run)


def test_the_same_bits_for_any_number_of_threads():
    arguments, options = make(channels=40, size=(5, 5))
    arguments, options = single(arguments), {name: single(part) for name, part in options.items()}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(fit_projected(*arguments, **options, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    parts = []  # in parts, as for a progress bar: the same again
    watched = fit_projected(*arguments, **options, backend="cpp", progress=lambda ranges, n: parts.append(n) or ranges)
    assert parts[0] > 1
    for other in (*found[1:], watched):
        assert torch.equal(found[0].coefficients, other.coefficients) and torch.equal(found[0].losses, other.losses)


@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_a_goal_equal_to_the_value_pulls_at_nothing(slope):
    """The value as the layer computes it differs from ours by rounding: that must not become an l1 gradient."""
    arguments, options = make(demodulated=True)
    operator, base, _ = single(arguments)
    options = {name: single(part) for name, part in options.items()} | {"slope": slope}
    weight, style, eps = options["demodulation"]
    power = (weight * style[:, None, None]).square().sum((1, 2, 3)) + eps
    value = 1.4 * F.leaky_relu(base / power.sqrt()[:, None, None] + options["shift"], slope)
    fit = fit_projected(operator, base, value, value=value, **options, backend="cpp")
    assert (fit.losses == 0).all() and (fit.coefficients == 0).all()


def test_strides_and_padding_of_the_input_do_not_matter():
    arguments, options = make(demodulated=True)
    operator, base, target = single(arguments)
    options = {name: single(part) for name, part in options.items()}
    plain = fit_projected(operator, base, target, **options, backend="cpp")
    odd = [
        torch.stack([part, part], -1)[..., 0].transpose(-1, -2).contiguous().transpose(-1, -2)
        for part in (base, target)
    ]
    options["shift"] = options["shift"].expand_as(base).transpose(1, 2).contiguous().transpose(1, 2)
    found = fit_projected(operator, *odd, **options, backend="cpp")
    assert torch.equal(plain.coefficients, found.coefficients) and torch.equal(plain.losses, found.losses)


def test_no_channels():
    operator = torch.randn(4, 3, 3, 5, 5)
    for backend in ("cpp", "reference"):
        fit = fit_projected(
            operator, torch.empty(0, 5, 5), torch.empty(0, 5, 5), directions=torch.eye(4)[:1], steps=2, backend=backend
        )
        assert fit.coefficients.shape == (0, 1, 3, 3)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_huge_and_tiny_numbers_stay_finite(scale):
    arguments, options = make()
    operator, base, target = (scale * part for part in single(arguments))
    options = {name: single(part) for name, part in options.items()}
    fit = fit_projected(operator, base, target, **options, backend="cpp")
    assert fit.coefficients.isfinite().all() and fit.losses.isfinite().all()


def test_dead_inputs_and_dead_channels():
    arguments, options = make(channels=20, demodulated=True)
    operator, base, target = arguments
    weight, style, eps = options["demodulation"]
    operator[3], weight[:, 3], base[4], weight[4] = 0, 0, 0, 0
    options |= {"demodulation": (weight, style, eps), "steps": 40}
    agree((operator, base, target), options, tolerance=1e-2)  # a weight of zero: its first steps turn on rounding


def test_nan_comes_out_as_losses():
    arguments, options = make()
    operator, base, target = single(arguments)
    options = {name: single(part) for name, part in options.items()}
    target[2, 3, 3] = torch.nan
    assert fit_projected(operator, base, target, **options, backend="cpp").losses.isnan().all()


def test_winograd_is_chosen_where_it_is_right():
    (operator, *_), _ = make(size=(10, 10))
    assert winograd_tile(operator) == 5 and winograd_tile(operator[:, :, :, :8, :8]) == 0  # cut: no zeros around
    assert winograd_tile(make(size=(8, 8))[0][0]) == 4 and winograd_tile(make(size=(4, 4))[0][0]) == 2
    assert winograd_tile(make(size=(1, 1))[0][0]) == 0
    assert winograd_tile(make(kernel=1)[0][0]) == 0
    operator[0, 0, 0, 5, 5] += 1e-9
    assert winograd_tile(operator) == 0


@pytest.mark.parametrize("tile", [2, 4, 5])
def test_transformed_maps_multiply_as_the_convolution_does(tile):
    (operator, *_), _ = make(inputs=8, size=(9, 11))
    weight = torch.randn(8, 3, 3, dtype=torch.float64)
    maps = transformed_maps(operator, tile).double()[0]  # [products, slots, 8]
    points = torch.tensor(POINTS[tile], dtype=torch.float64)
    n = tile + 2
    rows = torch.cat([points[:, None] ** torch.arange(3), torch.eye(3, dtype=torch.float64)[2:]])
    kernels = (rows @ weight @ rows.T).reshape(8, n * n)
    sums = torch.einsum("qsi,iq->qs", maps, kernels).reshape(n, n, -1, -(-11 // tile))
    out = torch.cat([points[:, None] ** torch.arange(tile), torch.eye(tile, dtype=torch.float64)[-1:]])
    tiles = torch.einsum("jk,jlab,lm->akbm", out, sums, out).flatten(0, 1).flatten(1)[:9, :11]
    wanted = torch.einsum("iyxhw,iyx->hw", operator, weight)
    torch.testing.assert_close(tiles, wanted, rtol=0, atol=2e-6 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"operator": torch.ones(3, 3, 5, 5)}, rc.RewriteCoreError, "kh, kw"),
        ({"operator": torch.ones(4, 3, 3, 5, 5, dtype=torch.int64)}, TypeError, "float32"),
        ({"base": torch.ones(5, 5)}, rc.RewriteCoreError, r"\[O, H, W\]"),
        ({"target": torch.ones(2, 5, 4)}, rc.RewriteCoreError, "target must be"),
        ({"target": torch.ones(2, 5, 5).double()}, TypeError, "target"),
        ({"directions": torch.ones(1, 3)}, rc.RewriteCoreError, "directions must be"),
        ({"shift": torch.ones(3)}, rc.RewriteCoreError, "broadcast"),
        ({"loss": "l3"}, rc.RewriteCoreError, "no loss"),
        ({"shift": [1.0]}, TypeError, "shift must be a tensor"),
        ({"steps": 0}, rc.RewriteCoreError, "at least 1"),
        ({"steps": 3.0}, rc.RewriteCoreError, "steps must be an integer"),
        ({"project_every": "2"}, rc.RewriteCoreError, "project_every must be an integer"),
        ({"project_every": 0}, rc.RewriteCoreError, "at least 1"),
        ({"directions": None, "project_gradient": True}, rc.RewriteCoreError, "needs directions"),
        ({"slope": float("nan")}, rc.RewriteCoreError, "finite"),
        ({"demodulation": (torch.ones(2, 4, 3, 3), torch.ones(3), 0.0)}, rc.RewriteCoreError, "style must be"),
    ],
)
def test_bad_input(change, error, words):
    good = {
        "operator": torch.ones(4, 3, 3, 5, 5),
        "base": torch.ones(2, 5, 5),
        "target": torch.zeros(2, 5, 5),
        "directions": torch.eye(4)[:1],
    }
    with pytest.raises(error, match=words):
        fit_projected(**(good | change))


def test_what_the_kernel_leaves_to_others():
    cpp = next(record for record in backends_of("fit_projected") if record.name == "cpp")

    def stub(*shape, **options):
        return torch.empty((), **options).expand(shape)

    assert cpp.supports(stub(512, 3, 3, 64, 64)) is None
    assert "256" in cpp.supports(stub(512, 3, 3, 256, 256)) or "at most" in cpp.supports(stub(512, 3, 3, 256, 256))
    assert "taps" in cpp.supports(stub(4, 9, 9, 5, 5))
    assert "float64" in cpp.supports(stub(4, 3, 3, 5, 5, dtype=torch.float64))
    assert "meta" in cpp.supports(stub(4, 3, 3, 5, 5, device="meta"))
    with pytest.raises(BackendUnavailable, match="float32"):
        arguments, options = make()
        fit_projected(*arguments, **options, backend="cpp")


@pytest.mark.parametrize("name", ["projected_rank1", "lowrankgrad_rank1"])
def test_golden_curve_of_the_reference(name, golden_moment, layer, edit, latents):
    """test_rewriting holds the others, fused; here the steps through autograd are held to the same."""
    golden = read_npz("proggan_expected.npz")
    solver = rc.Projected(steps=201, project_gradient=name.startswith("lowrank"))
    for backend, status in (("reference", "autograd"), ("cpp", "fused")):
        change = rc.rewrite(layer, golden_moment, edit, latents, solver=solver, backend=backend)
        curve = golden[f"{name}_loss"]
        assert ((torch.tensor(change.losses) - curve).abs() / curve).max() < 0.02
        assert change.solver == "projected" and change.status == {status: 48}


INTERPRETED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_fit_projected as t
from rewrite_core.kernels import fit_projected as kernels
torch.use_deterministic_algorithms(True)  # what is allocated is NaN, so what is never written shows

def run(*arguments, **options):
    return t.fit_projected(*arguments, **options, backend="triton")

def agree(arguments, options, tolerance=2e-4, steps=6, **more):
    t.agree(arguments, options | {"steps": steps, "project_every": 4}, tolerance, run, **more)

for number, sizes in enumerate((
    {}, {"size": (13, 12)}, {"size": (1, 1)}, {"kernel": 1, "inputs": 70, "channels": 19}, {"inputs": 1, "rank": 1},
    {"rank": 0, "size": (12, 12)}, {"rank": 17, "inputs": 20, "kernel": 1},
)):
    agree(*t.make(**sizes, demodulated=number % 2 == 0), steps=2, loss=("l1", "l2")[number // 2 % 2])
for demodulated in (False, True):
    agree(*t.make(size=(13, 12) if demodulated else (3, 3), demodulated=demodulated), steps=2, project_gradient=True)
    agree(*t.make(demodulated=demodulated), steps=6)
arguments, options = t.make(channels=9, inputs=40, size=(3, 4), kernel=1, demodulated=True)
options = {name: t.single(part) for name, part in options.items()} | {"steps": 2}
arguments = t.single(arguments)
problem = t.problem_of(*arguments, **options)
once = run(*arguments, **options)
for config in kernels.CANDIDATES:
    found = kernels.launch(problem, config=config)
    torch.testing.assert_close(found[1], once.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0], once.coefficients, rtol=1e-3, atol=1e-4)
again = run(*arguments, **options, progress=lambda ranges, count: ranges)
assert torch.equal(once.losses, again.losses) and torch.equal(once.coefficients, again.coefficients)
# a goal that is the layer's own value, to the bit, pulls at nothing
operator, base, _ = arguments
weight, style, eps = options["demodulation"]
power = (weight * style[:, None, None]).square().sum((1, 2, 3)) + eps
for slope in (0.2, 1.0):
    value = 1.4 * torch.nn.functional.leaky_relu(base / power.sqrt()[:, None, None] + options["shift"], slope)
    fit = run(operator, base, value, value=value, **options | {"slope": slope})
    assert (fit.losses == 0).all() and (fit.coefficients == 0).all()
# hostile
for scale in (1e-8, 1e8):
    fit = run(*(scale * part for part in arguments), **options)
    assert fit.coefficients.isfinite().all() and fit.losses.isfinite().all()
operator, base, target = (part.clone() for part in arguments)
operator[3], base[4] = 0, 0
weight = weight.clone()
weight[:, 3], weight[4] = 0, 0
options_double = {name: t.double(part) for name, part in options.items()}
agree((operator.double(), base.double(), target.double()),
      options_double | {"demodulation": (weight.double(), style.double(), eps)}, 1e-2)
target[2, 2, 3] = torch.nan
assert run(operator, base, target, **options).losses.isnan().all()
none = run(torch.randn(4, 3, 3, 5, 5), torch.empty(0, 5, 5), torch.empty(0, 5, 5), directions=torch.eye(4)[:1], steps=2)
assert none.coefficients.shape == (0, 1, 3, 3)
print("all of it ran")
"""


def double(part):
    if isinstance(part, tuple):
        return tuple(map(double, part))
    return part.double() if isinstance(part, torch.Tensor) else part


def problem_of(*arguments, **options):
    """What fit_projected hands to a backend."""
    given = []
    with pytest.MonkeyPatch.context() as patch:
        record = type(
            "Record", (), {"load": lambda self: lambda problem, progress: given.append(problem) or (None, None)}
        )
        patch.setitem(fit_projected.__globals__, "select", lambda *a: record())
        fit_projected(*arguments, **options)
    return given[0]


@needs_triton_interpreter
def test_triton_interpreted(tmp_path):
    """In a process of its own: TRITON_INTERPRET must be set before Triton decorates the kernel.
    The interpreter multiplies in float32, where a GPU takes three TF32 products."""
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
def test_all_threads_have_read_a_change_before_one_writes_it():
    """128 numbers of a tile on 256 threads: each is held twice. A late thread must not read what the other wrote."""
    from rewrite_core.kernels import fit_projected as kernels

    source = Path(kernels.__file__).read_text()
    read = source.index("before = tl.load(_change_rows(change,")
    write = source.index("tl.store(_change_rows(mean_at, start, ROWS, CHANNELS), mean)")
    assert "tl.debug_barrier()" in source[read:write] and "tl.store" not in source[read:write]


@needs_triton_compiler
@pytest.mark.parametrize(
    ("capability", "kind"), [(80, "one tile"), (90, "one tile"), (90, "many tiles"), (100, "one tile")]
)
def test_triton_compiles_ahead_of_time(capability, kind, tmp_path, monkeypatch):
    """For GPUs this machine lacks, from source to machine code, in the fullest modes."""
    from test_fit_low_rank import triton_compile, triton_resources

    from rewrite_core.kernels import fit_projected as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # compile now, whatever was compiled before
    config, one, kernel = kernels.CANDIDATES[0], kind == "one tile", kernels.fit_kernel
    pointers = (
        "maps",
        "base",
        "target",
        "value",
        "shift",
        "weight",
        "square",
        "directions",
        "basis",
        "rates",
        "scratch",
        "coefficients",
    )
    types = (
        dict.fromkeys(pointers, "*fp32")
        | {"losses": "*fp64"}
        | dict.fromkeys(("share", "eps", "slope", "gain"), "fp32")
    )
    constants = {
        "ABSOLUTE": one,
        "DEMODULATED": True,
        "SHIFT": True,
        "PROJECTS": True,
        "PROJECTS_GRADIENT": not one,
        "ONE_TILE": one,
        "CHANNELS": config.channels,
        "ROWS": config.rows,
        "PIXELS": config.pixels,
        "PRECISION": kernels.PRECISION,
    }
    known = (*pointers, "losses", "inputs", "width", "stride")  # as a launch has them: multiples of 16
    compiled = triton_compile(kernel, capability, types, constants, config.warps, config.stages, known)
    ptx = compiled.asm["ptx"]
    registers, stack, local = triton_resources(compiled, tmp_path)
    assert f"sm_{capability}" in ptx and registers <= 255 and local == 0
    assert stack <= (8 if capability == 80 else 0), f"spills: {stack}"
    assert compiled.metadata.shared <= 99 << 10
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 8, "read 4 bytes at a time"
    assert re.search(r"mma\S*tf32", ptx), "no tensor cores"
    # three products, of numbers split in two
    assert not re.search(r"fma\.rn\.f32", ptx), "a value and the goal equal to it would leave something"
    assert not re.search(r"^\s*(@\S+\s+)?(atom|red)\.", ptx, re.MULTILINE), "sums in any order"


def test_what_the_gpu_kernel_leaves_to_others(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments, options = make()
    with pytest.raises(BackendUnavailable, match="triton: .*on cpu|triton is not installed"):
        fit_projected(*arguments, **options, backend="triton")
    if triton_reason() is None:
        record = next(record for record in backends_of("fit_projected") if record.name == "triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        empty = torch.empty(())
        assert record.supports(empty.expand(512, 3, 3, 64, 64)) is None
        assert "float64" in record.supports(empty.double().expand(4, 3, 3, 5, 5))
        assert "at most" in record.supports(empty.expand(512, 3, 3, 256, 256))
        assert "interpreter" in record.declines(empty.expand(4, 3, 3, 5, 5))


def on_gpu(*arguments, **options):
    def move(part):
        if isinstance(part, tuple):
            return tuple(map(move, part))
        return part.cuda() if isinstance(part, torch.Tensor) else part

    found = fit_projected(
        *map(move, arguments), **{name: move(part) for name, part in options.items()}, backend="triton"
    )
    return type(found)(*(part.cpu() for part in found))


NO_GPU = triton_reason(TRITON) if torch.cuda.is_available() else "there is no GPU here"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]


@pytest.mark.parametrize("demodulated", [pytest.param(False, marks=needs_gpu), pytest.param(True, marks=needs_gpu)])
@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"size": (10, 10), "channels": 33},
        {"size": (7, 6)},
        {"size": (1, 1)},
        {"size": (13, 12)},
        {"kernel": 1},
        {"kernel": 5, "size": (6, 7)},
        {"inputs": 1, "rank": 1},
        {"rank": 0},
        {"rank": 13},
        {"inputs": 200, "rank": 33},
    ],
    ids=str,
)
def test_gpu_steps_of_autograd(sizes, loss, demodulated):
    arguments, options = make(**sizes, demodulated=demodulated)
    agree(arguments, options, run=on_gpu, loss=loss)
    if options["directions"] is not None:
        agree(arguments, options, run=on_gpu, loss=loss, project_gradient=True)


@pytest.mark.parametrize("channels", [pytest.param(5, marks=needs_gpu), pytest.param(19, marks=needs_gpu)])
def test_gpu_small(channels):
    """For compute-sanitizer too: every configuration, few steps; the same bits from run to run."""
    from rewrite_core.kernels import fit_projected as kernels

    arguments, options = make(channels=channels, inputs=40, demodulated=True)
    options |= {"steps": 4}
    problem = problem_of(*single(arguments), **{name: single(part) for name, part in options.items()})
    problem = type(problem)(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in problem))
    for config in kernels.CANDIDATES:
        ours, again = kernels.launch(problem, config=config), kernels.launch(problem, config=config)
        assert all(torch.equal(one, other) for one, other in zip(ours, again))
        agree(
            arguments,
            options,
            run=lambda *a, ours=ours, **k: rc.ops.ProjectedResult(*(p.cpu() for p in ours)),
        )


@pytest.mark.parametrize("slope", [pytest.param(0.2, marks=needs_gpu), pytest.param(1.0, marks=needs_gpu)])
def test_gpu_goal_equal_to_the_value_pulls_at_nothing(slope):
    arguments, options = make(demodulated=True)
    operator, base, _ = single(arguments)
    options = {name: single(part) for name, part in options.items()} | {"slope": slope}
    weight, style, eps = options["demodulation"]
    power = (weight * style[:, None, None]).square().sum((1, 2, 3)) + eps
    value = 1.4 * F.leaky_relu(base / power.sqrt()[:, None, None] + options["shift"], slope)
    fit = on_gpu(operator, base, value, value=value, **options)
    assert (fit.losses == 0).all() and (fit.coefficients == 0).all()


@pytest.mark.parametrize("name", [pytest.param("projected_rank1", marks=needs_gpu)])
def test_gpu_golden_curve_of_the_reference(name, golden_moment, generator, edit, latents):
    layer = rc.bind(generator.cuda(), "layer5.conv")
    solver = rc.Projected(steps=201)
    change = rc.rewrite(layer, golden_moment, edit, latents.cuda(), solver=solver, backend="triton")
    curve = read_npz("proggan_expected.npz")[f"{name}_loss"]
    assert ((torch.tensor(change.losses) - curve).abs() / curve).max() < 0.02
    assert change.status == {"fused": 48}
