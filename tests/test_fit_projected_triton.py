"""The Triton kernel of ``fit_projected``: compiled for GPUs this machine lacks, and run on one where there is one.

Its numbers in Triton's interpreter: tests/interpreted/fit_projected.py.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_triton, needs_triton_compiler, read_npz
from helpers import reference
from helpers.projected_problems import agree, make, problem_of, single
from helpers.triton_compiler import ATOMICS, compile_kernel, resources

import rewrite_core as rc
from rewrite_core.backends import BackendUnavailable, backends_of, triton_reason
from rewrite_core.ops import fit_projected
from rewrite_core.ops.fit_projected_op.problem import TRITON


@needs_triton
def test_all_threads_have_read_before_one_writes():
    """A number of a small tile is held by several threads. A late one must not read what another wrote."""
    from rewrite_core.kernels.fit_projected import directions, fit

    for module, first, last in (
        (fit, "after = tl.load(change + at)", "tl.store(mean + at, m)"),
        (directions, "tl.dot(tl.load(own", "tl.store(own + i[None, :], new)"),
    ):
        source = Path(module.__file__).read_text()
        read = source.index(first)
        between = source[read : source.index(last, read)]
        assert "tl.debug_barrier()" in between and "tl.store(own" not in between


POINTERS = (
    *("maps", "change", "mean", "power", "slopes", "bend", "weight", "square", "directions", "leaning", "rates"),
    *("partial", "norms", "base", "target", "value", "shift", "goal", "combined", "basis"),
)


def compiled_for(capability, kernel, config, **constants):
    """A kernel in the fullest modes, as a launch has it: sizes are multiples of 16."""
    from rewrite_core.kernels.fit_projected import host

    types = dict.fromkeys(POINTERS, "*fp32") | {"losses": "*fp64"}
    types |= dict.fromkeys(("share", "eps", "slope", "gain"), "fp32")
    constants = {"DEMODULATED": True, "SHIFT": True, "FEW": host.FEW, "PRECISION": host.PRECISION} | constants
    known = (*POINTERS, "losses", "weights", "inputs", "width", "span", "padded")
    warps, stages = (config.warps, config.stages) if config else (host.WARPS, 3)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    return compile_kernel(kernel, capability, types, constants, known, **options)


def sound(compiled, capability, folder):
    """Registers, spills, shared memory; what is multiplied and added how."""
    ptx = compiled.asm["ptx"]
    registers, stack, local = resources(compiled, folder)
    assert f"sm_{capability}" in ptx and registers <= 255 and local == 0
    # multiplied from registers alone, some numbers do not fit, in a configuration that need not be chosen
    assert stack <= (128 if capability == 80 else 16), f"spills: {stack}"
    assert compiled.metadata.shared <= 99 << 10
    assert not re.search(r"fma\.rn\.f32", ptx), "a value and the goal equal to it would leave something"
    assert not ATOMICS.search(ptx), "sums in any order"
    return ptx


@needs_triton_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kind", ["first", "second", "third", "fourth", "many tiles", "projected gradient"])
def test_updates_compile_ahead_of_time(capability, kind, tmp_path, monkeypatch):
    """For GPUs this machine lacks, from source to machine code."""
    from rewrite_core.kernels.fit_projected import fit, host

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # compile now, whatever was compiled before
    assert len(host.CANDIDATES) == 4
    config = host.CANDIDATES[{"second": 1, "third": 2, "fourth": 3}.get(kind, 0)]
    sizes = {"CHANNELS": config.channels, "ROWS": config.rows, "PIXELS": config.pixels}
    modes = {"ONE_TILE": kind != "many tiles", "PROJECTS_GRADIENT": kind == "projected gradient"}
    ptx = sound(compiled_for(capability, fit.update_kernel, config, **sizes, **modes), capability, tmp_path)
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 8, "read 4 bytes at a time"
    assert re.search(r"mma\S*tf32", ptx), "no tensor cores"


@needs_triton_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kind", ["compare", "project", "lean"])
def test_the_others_compile_ahead_of_time(capability, kind, tmp_path, monkeypatch):
    from rewrite_core.kernels.fit_projected import directions, fit, host

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    if kind == "compare":
        sizes = {"CHANNELS": host.COMPARED, "PIXELS": host.CANDIDATES[0].pixels, "ABSOLUTE": True}
        ptx = sound(compiled_for(capability, fit.compare_kernel, None, **sizes), capability, tmp_path)
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= fit.TOGETHER, "read 4 bytes at a time"
        return
    kernel = getattr(directions, f"{kind}_kernel")
    sizes = {"CHANNELS": host.TURNED, "ROWS": host.TURNED_INPUTS, "PIXELS": host.FEW}
    ptx = sound(compiled_for(capability, kernel, None, **sizes), capability, tmp_path)
    assert re.search(r"mma\S*tf32", ptx), "no tensor cores"


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


@pytest.mark.parametrize("channels", [pytest.param(count, marks=needs_gpu) for count in (5, 19, 70)])
def test_gpu_small(channels):
    """For compute-sanitizer too: every configuration, few steps; the same bits from run to run."""
    from rewrite_core.kernels.fit_projected import host

    arguments, options = make(channels=channels, inputs=40, demodulated=True)
    options |= {"steps": 4}
    problem = problem_of(*single(arguments), **{name: single(part) for name, part in options.items()})
    problem = type(problem)(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in problem))
    for config in host.CANDIDATES:
        ours, again = host.launch(problem, config=config), host.launch(problem, config=config)
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
    change = reference.rewrite(layer, golden_moment, edit, latents.cuda(), solver=solver, backend="triton")
    curve = read_npz("proggan_expected.npz")[f"{name}_loss"]
    assert ((torch.tensor(change.losses) - curve).abs() / curve).max() < 0.02
    assert change.status == {"fused": 48}
