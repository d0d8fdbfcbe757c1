"""The Triton kernels of ``fit_low_rank``: compiled for GPUs this machine lacks, and run on one where there is one.

Their numbers in Triton's interpreter: tests/interpreted/fit_low_rank.py.
"""

import functools
import re
from pathlib import Path

import pytest
import torch
from conftest import needs_triton, needs_triton_compiler
from helpers.fit_problems import (
    AGREEMENT,
    CPU,
    NO_GPU,
    agree,
    assert_sound,
    cast,
    linear_problem,
    on_gpu,
    random_problem,
    run,
)
from helpers.triton_compiler import ATOMICS, compile_kernel, resources

from rewrite_core import ops
from rewrite_core.backends import BackendUnavailable, backends_of, triton_reason
from rewrite_core.ops.fit_low_rank_op import problem as facts
from rewrite_core.ops.fit_low_rank_op import reference, register


def needs_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))(test))


@needs_triton
def test_configurations():
    from rewrite_core.kernels.fit_low_rank import host

    for config in host.CANDIDATES:
        assert config.pixels % config.tile == 0 == config.pixels % config.block
        assert 32 * config.warps <= config.pixels, (
            "a number that several threads hold would be read after it is written"
        )


@needs_triton
def test_constants_are_those_of_the_reference():
    """Each under its own name; and no function has a threshold of its own."""
    import triton.language as tl

    from rewrite_core.kernels.fit_low_rank import constants

    found = {name: each.value for name, each in vars(constants).items() if isinstance(each, tl.constexpr)}
    assert len(found) > 20 and found == {name: getattr(facts, name) for name in found}
    for path in Path(constants.__file__).parent.glob("*.py"):
        assert not re.search(r"\d[eE]-?\d", path.read_text(encoding="utf-8")), path.name


KINDS = {  # the fullest modes: constants, and whether the configuration is for large systems
    "over unknowns": ({"PENALISED": True, "DUAL_FORM": False, "gram": None}, False),
    "over pixels": ({"PENALISED": False, "DUAL_FORM": True, "penalty": None, "penalty_scale": None}, True),
    "exact": ({"PENALISED": True}, False),
}


def compile_kind(kind, capability):
    from rewrite_core.kernels.fit_low_rank import exact, fit, host

    constants, large = KINDS[kind]
    config = host.LARGE[0] if large else host.SMALL[0]
    kernel = exact.exact_kernel if kind == "exact" else fit.fit_kernel
    constants = {"ABSOLUTE": True, "ROUNDED": True, "DEMODULATED": True, "SHIFT": True, **constants}
    constants |= {"BLOCK": config.block, "TILE": config.tile, "PIXELS": config.pixels}
    numbers = ("slope", "gain", "tolerance", "slow_rate", "slow_rate_well", "fast_rate_well")
    pointers = {name for name in kernel.arg_names if name not in kernel.do_not_specialize and name not in numbers}
    types = dict.fromkeys(pointers, "*fp64") | dict.fromkeys(numbers, "fp64")
    types |= dict.fromkeys(("basis", "base", "target", "shift", "coefficients"), "*fp32")
    types |= dict.fromkeys(("iterations", "status"), "*i32")
    options = {"num_warps": config.warps, "num_stages": 1, "enable_fp_fusion": False}
    return compile_kernel(kernel, capability, types, constants, pointers, **options)


@needs_triton_compiler
@pytest.mark.parametrize(
    ("capability", "kind"),
    [(80, "over unknowns"), (90, "over unknowns"), (90, "over pixels"), (90, "exact"), (100, "over pixels")],
)
def test_triton_compiles_ahead_of_time(capability, kind, tmp_path, monkeypatch):
    """From source to machine code, in the fullest modes.

    What spills is uniform: the pointers and numbers that live through the whole loop, some 300 registers of them, read
    back a few times per step of about 10^4 cycles. Above a kilobyte it would be tiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # compile now, whatever was compiled before
    compiled = compile_kind(kind, capability)
    ptx = compiled.asm["ptx"]
    registers, stack, local = resources(compiled, tmp_path)
    assert f"sm_{capability}" in ptx and registers <= 255 and local == 0
    assert stack <= 1280, f"spills: {stack}"
    assert compiled.metadata.shared <= 48 << 10
    # Triton 3.9 takes m8n8k4, 3.6 on sm_90 m16n8k16
    assert re.search(r"mma\.sync\.aligned\.m\d+n8k\d+\.row\.col\.f64", ptx), "float64 products without tensor cores"
    assert "fma.rn.f64" not in ptx, "fused across a butterfly, the copies of one sum would differ"
    assert not ATOMICS.search(ptx), "sums in any order"


@needs_triton_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("large", [False, True])
def test_what_edits_share_compiles_ahead_of_time(capability, large, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from rewrite_core.kernels.fit_low_rank import host, shared

    config = max(host.CANDIDATES, key=lambda config: config.pixels) if large else host.SMALL[0]
    constants = {"WEIGHTED": True, "DEMODULATED": True, "PENALISED": True, "BLOCK": config.block}
    constants |= {"PIXELS": config.pixels, "CHUNK": host.CHUNK}
    for kernel in (shared.share_kernel, shared.scale_kernel):
        pointers = {name for name in kernel.arg_names if name not in ("unknowns", "pixels", "channels", *constants)}
        types = dict.fromkeys(pointers, "*fp64") | {"basis": "*fp32"}
        options = {"num_warps": max(4, config.warps), "num_stages": 1, "enable_fp_fusion": False}
        compiled = compile_kernel(kernel, capability, types, constants, pointers, **options)
        _, stack, local = resources(compiled, tmp_path)
        assert stack == local == 0
        assert not ATOMICS.search(compiled.asm["ptx"]), "sums in any order"


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
    from rewrite_core.kernels.fit_low_rank import host

    for config in host.CANDIDATES:
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
