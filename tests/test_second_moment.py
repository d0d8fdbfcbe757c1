import functools
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import needs_triton, needs_triton_compiler, needs_triton_interpreter
from torch import library

from rewrite_core import ops
from rewrite_core.backends import BackendUnavailable, extension
from rewrite_core.errors import RewriteCoreError
from rewrite_core.ops.second_moment_op import problem, reference, register

second_moment = ops.second_moment

ISAS = ("portable", "avx2", "avx512")
CPU = {
    "reference": reference.run_reference,
    **{f"cpp-{isa}": functools.partial(register.run_cpp, isa=isa) for isa in ISAS},
}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 1e-6, torch.float16: 1e-6}


@pytest.fixture(params=CPU)
def accumulate(request):
    isa = request.param.removeprefix("cpp-")
    if isa in ISAS[ISAS.index(extension().isa()) + 1 :]:
        pytest.skip(f"this CPU has no {isa}")
    return CPU[request.param]


def rows_of(features):
    return features.movedim(1, -1).reshape(-1, features.shape[1]).double()


def oracle(features):
    """Independent of the library: exact products, one long float64 sum per entry."""
    rows = rows_of(features)
    return (rows[:, :, None] * rows[:, None, :]).sum(0)


def assert_close(got, want, tolerance):
    """By norm, and entry by entry relative to sqrt(C_ii C_jj), so that small channels count too."""
    assert got.dtype == torch.float64 and torch.equal(got, got.T), "not symmetric"
    scale = want.diagonal().sqrt()
    error = (got - want).abs() / (scale[:, None] * scale).clamp_min(torch.finfo(torch.float64).tiny)
    worst = divmod(int(error.argmax()), len(want))
    assert error.max() <= tolerance, f"entry {worst}: {got[worst]}, not {want[worst]} ({error.max():.2e})"
    assert (got - want).norm() <= tolerance * want.norm()


def prefilled(channels, value=0.0):
    return torch.full((channels, channels), value, dtype=torch.float64)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# make(*shape) gives a contiguous tensor; what is returned has the strides the name says
LAYOUTS = {
    "map": lambda make: make(3, 37, 7, 11),
    "one channel": lambda make: make(2, 1, 5, 3),
    "one position": lambda make: make(1, 6, 1, 1),
    "whole panels": lambda make: make(2, 64, 16, 16),
    "several chunks": lambda make: make(2, 97, 83, 89),
    "rows": lambda make: make(131, 53),
    "column-major rows": lambda make: make(53, 131).T,
    "every other row and channel": lambda make: make(200, 60)[::2, 1::3],
    "every other sample": lambda make: make(6, 19, 5, 5)[::2],
    "cropped": lambda make: make(2, 17, 12, 13)[:, :, 1:-2, 3:-1],
    "every other pixel": lambda make: make(2, 17, 12, 13)[:, :, ::2, 1::2],
    "channel slice": lambda make: make(2, 40, 6, 6)[:, 5:38],
    "transposed map": lambda make: make(2, 17, 8, 13).transpose(2, 3),
    "samples last": lambda make: make(17, 8, 13, 3).permute(3, 0, 1, 2),
    "channels_last": lambda make: make(3, 33, 7, 9).to(memory_format=torch.channels_last),
    "cropped channels_last": lambda make: make(3, 33, 7, 9).to(memory_format=torch.channels_last)[:, :32, 1:, :-1],
    "expanded samples": lambda make: make(1, 13, 4, 5).expand(6, -1, -1, -1),
    "expanded positions": lambda make: make(2, 13, 1, 1).expand(-1, -1, 9, 31),
    "expanded channels": lambda make: make(2, 1, 6, 7).expand(-1, 23, -1, -1),
    "overlapping windows": lambda make: make(90).as_strided((4, 8, 5, 3), (11, 2, 5, 1)),
}


def features_of(layout, dtype=torch.float32):
    return LAYOUTS[layout](lambda *shape: normal(*shape).to(dtype))


@pytest.mark.parametrize("dtype", problem.DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, accumulate):
    features = features_of(layout, dtype)
    out = prefilled(features.shape[1])
    accumulate(features, out)
    rows = rows_of(features)
    assert_close(out, oracle(features) if len(rows) < 5000 else rows.T @ rows, TOLERANCE[dtype])


def test_layouts_stay_strided():
    """The cases above would show little if PyTorch had made them contiguous."""
    assert sum(not features_of(layout).is_contiguous() for layout in LAYOUTS) >= 13
    assert sum(0 in features_of(layout).stride() for layout in LAYOUTS) == 3


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3, 3), (2, 5, 0, 3), (2, 5, 3, 0)], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_no_positions(shape, backend):
    assert torch.equal(second_moment(torch.empty(shape), backend=backend), prefilled(5))
    out = torch.eye(5, dtype=torch.float64)
    assert second_moment(torch.empty(shape), out=out, backend=backend) is out
    assert torch.equal(out, torch.eye(5, dtype=torch.float64))


def test_mixed_scales(accumulate):
    """Channels from 1e-6 to 1e6: each entry is right on its own channels' scale."""
    scales = torch.logspace(-6, 6, 45, dtype=torch.float64)
    features = (normal(700, 45) * scales).float()
    out = prefilled(45)
    accumulate(features, out)
    assert_close(out, oracle(features), 1e-6)


def test_large_mean(accumulate):
    """A mean 1000 times the deviation, correlated channels: C is ill-conditioned, its entries are right."""
    features = 1000 + normal(4, 20, 16, 16)
    features[:, 10:] = features[:, :10] + 1e-3 * features[:, 10:]
    out = prefilled(20)
    accumulate(features, out)
    rows = rows_of(features)
    assert_close(out, rows.T @ rows, 1e-6)


def test_constant_channels_do_not_drift(accumulate):
    """Equal terms round the same way each time; straight float32 runs of 256 reach 3.8e-6 here."""
    values = torch.linspace(1, 2, 500)
    features = values.expand(4096, -1)
    out = prefilled(500)
    accumulate(features, out)
    assert_close(out, 4096 * torch.outer(values.double(), values.double()), 1e-6)


def test_ten_million_vectors_however_batched():
    generator = torch.Generator().manual_seed(5)
    once, batched, want = prefilled(4), prefilled(4), prefilled(4)
    for _ in range(10):
        features = torch.randn(1_000_000, 4, generator=generator)
        features[:, 1] += 30
        features[:, 2] = 0.1
        second_moment(features, out=once)
        for part in features.split(99_991):
            assert second_moment(part, out=batched) is batched
        rows = features.double()
        want += rows.T @ rows
    assert_close(once, want, 1e-6)
    assert_close(batched, want, 1e-6)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_many_small_batches(backend):
    features = normal(60, 21, 3, 3)
    out = prefilled(21)
    for one in features:
        second_moment(one[None], out=out, backend=backend)
    assert_close(out, second_moment(features, backend=backend), 1e-6)
    assert_close(out, oracle(features), 1e-6)


def test_out_is_added_to_and_mirrored(accumulate):
    """The documented contract: the lower triangle of out is read, the upper one written."""
    features = normal(50, 40)
    out = torch.arange(1600, dtype=torch.float64).view(40, 40)
    want = oracle(features) + out.tril() + out.tril(-1).T
    accumulate(features, out)
    assert torch.equal(out, out.T)
    assert (out - want).abs().max() < 1e-3


def test_nothing_hides_nan_in_out(accumulate):
    out = prefilled(40, float("nan"))
    accumulate(normal(50, 40), out)
    assert out.isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_channels_stay_apart(value, accumulate):
    features = normal(3, 37, 7, 11)
    features[1, 20, 3, 3] = value
    out = prefilled(37)
    accumulate(features, out)
    touched = torch.zeros(37, 37, dtype=torch.bool)
    touched[20] = touched[:, 20] = True
    assert not out[touched].isfinite().any()
    assert out[~touched].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_value_is_read_exactly(dtype, accumulate):
    """A channel of ones beside every number of the type: C_01 is the sum of the latter."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    size = every.double().abs()
    every = every[((size > 1e-18) & (size < 1e18)) | (size == 0)]  # the documented range; NaN fails both
    ones = torch.ones_like(every)
    for strided in (torch.stack([ones, every]), torch.stack([ones, every], 1).T):
        for k in range(0, strided.shape[1], 4999):  # a few alone, as single keys
            out = prefilled(2)
            accumulate(strided[:, k : k + 1].T, out)
            assert out[0, 1] == every[k].double()
        out = prefilled(2)
        accumulate(strided.T, out)
        want = every.double()
        assert abs(out[0, 1] - want.sum()) <= 1e-6 * want.abs().sum()
        assert abs(out[1, 1] - (want**2).sum()) <= 1e-6 * (want**2).sum()


# in groups of runs with many threads and few, and in blocks of channels
@pytest.mark.parametrize("shape", [(2, 24, 96, 96), (3, 150, 40, 41), (5, 300, 16, 16), (3000, 1000)], ids=str)
@pytest.mark.parametrize("isa", ["portable", ""])
def test_same_bits_for_any_number_of_threads(shape, isa):
    features = normal(*shape)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(prefilled(shape[1]))
            register.run_cpp(features, results[-1], isa)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_features_are_not_written_and_gradients_stop():
    features = normal(4, 9, 5, 5).requires_grad_()
    before = features.detach().clone()
    result = second_moment(features)
    assert not result.requires_grad
    assert torch.equal(features.detach(), before)


def test_lazily_negated_features():
    features = torch.complex(normal(20, 6), normal(21, 6)[:20]).conj().imag
    assert features.is_neg()
    assert_close(second_moment(features), oracle(features.resolve_neg().clone()), 1e-6)


@pytest.mark.parametrize(
    ("features", "out", "error", "words"),
    [
        ([[1.0]], None, TypeError, "list.*as_tensor"),
        (torch.ones(3, 3, dtype=torch.int64), None, TypeError, "int64.*float"),
        (torch.ones(3, 3, dtype=torch.complex64), None, TypeError, "complex64"),
        (torch.eye(3).to_sparse(), None, TypeError, "sparse.*to_dense"),
        (torch.ones(3), None, RewriteCoreError, r"\[N, C, H, W\].*\[3\]"),
        (torch.ones(2, 3, 4), None, RewriteCoreError, r"\[2, 3, 4\]"),
        (torch.ones(2, 0), None, RewriteCoreError, "at least one channel"),
        (torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]), None, TypeError, "nested tensor"),
        (torch.ones(2, 3), torch.zeros(3, 3), TypeError, "float64.*float32"),
        (torch.ones(2, 3), prefilled(4), RewriteCoreError, r"\[3, 3\].*\[4, 4\]"),
        (torch.ones(2, 3), prefilled(6)[::2, ::2], RewriteCoreError, "contiguous"),
        (torch.ones(2, 3), prefilled(3).requires_grad_(), RewriteCoreError, "detach"),
        (torch.ones(2, 3), prefilled(3).to("meta"), RewriteCoreError, "meta.*cpu"),
    ],
    ids=lambda value: "",
)
def test_bad_input_is_refused_with_advice(features, out, error, words):
    with pytest.raises(error, match=words):
        second_moment(features, out=out)


def test_the_torch_op_checks_too():
    """The kernels trust sizes and pointers, so no way in may skip the checks."""
    with pytest.raises(RewriteCoreError, match="contiguous"):
        torch.ops.rewrite_core.second_moment_(prefilled(2), torch.ones(2, 3))
    with pytest.raises(TypeError, match="int32"):
        torch.ops.rewrite_core.second_moment(torch.ones(2, 3, dtype=torch.int32))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_autograd_notices_the_write(backend):
    out = prefilled(5)
    y = (torch.ones(5, 5, dtype=torch.float64, requires_grad=True) * out).sum()
    second_moment(normal(20, 5), out=out, backend=backend)
    with pytest.raises(RuntimeError, match="inplace"):
        y.backward()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_output_over_the_features_is_refused(backend):
    memory = torch.eye(6, dtype=torch.float64).flatten()
    out, apart = memory[:9].view(3, 3), memory[9:18].view(3, 3)
    second_moment(apart, out=out, backend=backend)
    with pytest.raises(RewriteCoreError, match="shares memory"):
        second_moment(memory[6:12].view(2, 3), out=out, backend=backend)


def test_subnormal_halves_survive_flushing_to_zero():
    features = torch.tensor([[3e-5, 1.0, 6e-8]], dtype=torch.float16).expand(10, 3)
    exact = oracle(features)
    assert torch.set_flush_denormal(True)
    try:
        got = second_moment(features, backend="cpp")
    finally:
        torch.set_flush_denormal(False)
    assert_close(got, exact, 1e-6)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_is_a_well_behaved_torch_op(backend):
    features = normal(2, 5, 3, 4)
    library.opcheck(torch.ops.rewrite_core.second_moment, (features, backend))
    library.opcheck(torch.ops.rewrite_core.second_moment_, (prefilled(5), features, backend))


def test_shape_without_computing():
    result = second_moment(torch.empty(2, 5, 3, 4, dtype=torch.bfloat16, device="meta"))
    assert result.shape == (5, 5) and result.dtype == torch.float64 and result.device.type == "meta"


INTERPRETED = """
import importlib, sys, torch
sys.path.insert(0, sys.argv[1])
import test_second_moment as t
from rewrite_core.kernels import second_moment as kernels

def close(features, tolerance=2e-6, run=None, **how):
    out = torch.full((features.shape[1],) * 2, float("nan"), dtype=torch.float64).tril(-1).T.contiguous()  # NaN above
    (run or t.second_moment)(features, out=out, **({} if run else {"backend": "triton"}), **how)
    rows = t.rows_of(features)
    t.assert_close(out, t.oracle(features) if len(rows) < 5000 else rows.T @ rows, tolerance)

# every layout in the default mode, some in the others; one long one, with whole panels, in all of them
for layout in t.LAYOUTS:
    if layout != "several chunks":
        close(t.features_of(layout))
layouts = ("map", "one channel", "one position", "column-major rows", "cropped channels_last", "expanded positions")
for layout in layouts:
    for precision in ("tf32", "ieee"):
        close(t.features_of(layout), precision=precision)
    for dtype in (torch.bfloat16, torch.float16):
        close(t.features_of(layout, dtype))
# every configuration of every kind of GPU, with one tile and with several
configs = {(mode, config) for table in kernels.CANDIDATES.values() for mode in table for config in table[mode]}
configs |= set(kernels.SCATTERED.items())
for mode, config in sorted(configs, key=str):
    dtype = torch.bfloat16 if mode == "half" else torch.float32
    precision = "x3" if mode == "half" else mode
    for channels in (config.block - 3, config.block + 1):
        close(t.normal(3, channels, 13, 11).to(dtype), run=kernels.launch, precision=precision, config=config)
# 1, primes, odd: rows and maps of them
for channels in (1, 2, 17, 67):
    for rows in (1, 31, 257):
        close(t.normal(rows, channels))
for side in (1, 3, 5):
    close(t.normal(7, 19, side, side + 2))
# added to the lower triangle, mirrored; twice the same bits
base = torch.arange(1369, dtype=torch.float64).view(37, 37)
want = t.oracle(t.features_of("map")) + base.tril() + base.tril(-1).T
results = [t.second_moment(t.features_of("map"), out=base.clone(), backend="triton") for _ in range(2)]
assert torch.equal(*results) and torch.equal(results[0], results[0].T) and (results[0] - want).abs().max() < 1e-3
values = torch.linspace(1, 2, 16)
got = t.second_moment(values.expand(2048, -1), backend="triton")
t.assert_close(got, 2048 * torch.outer(values.double(), values.double()), 1e-6)
# many runs in one program: without compensation their float32 sum would be off by 2e-6
close(torch.full((32768, 8), 1.1), 5e-7, run=kernels.launch, precision="ieee",
      config=kernels.Config(16, 16, 1, warps=4, stages=1, resident=1))
# the split into two parts keeps channels apart, and scales from 1e-6 to 1e6
close((t.normal(700, 45) * torch.logspace(-6, 6, 45, dtype=torch.float64)).float())
for value in (float("nan"), float("inf")):
    for channels in (37, 70):
        features = t.normal(3, channels, 7, 11)
        features[1, 20, 3, 3] = value
        got = t.second_moment(features, backend="triton")
        touched = torch.zeros(channels, channels, dtype=torch.bool)
        touched[20] = touched[:, 20] = True
        assert not got[touched].isfinite().any() and got[~touched].isfinite().all()
assert torch.equal(t.second_moment(torch.empty(0, 3), backend="triton"), t.prefilled(3))
# distances that int32 does not hold
kernels.Layout.near = lambda *args: False
for layout in ("map", "rows", "cropped", "channels_last", "expanded positions"):
    close(t.features_of(layout))
print("all of it ran")
"""


@needs_triton_interpreter
def test_triton_interpreted(tmp_path):
    """In a process of its own: TRITON_INTERPRET must be set before Triton decorates the kernel.

    The interpreter multiplies in full float32, so it cannot show what tensor cores cut off: see the emulation below.
    It does split numbers in two for "x3", and drops the product of the low parts.
    """
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, os.path.dirname(os.path.abspath(__file__))],
        cwd=tmp_path,  # away from the source tree, which would be imported in place of the installed package
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "all of it ran" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("features", "words"),
    [(torch.ones(2, 3), "cpp: .*no precision 'tf32'.*GPUs"), (torch.ones(2, 3).double(), "no precision 'tf32'")],
    ids=["float32", "float64"],
)
def test_precisions_are_for_gpus(features, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert torch.equal(second_moment(features, precision="x3"), second_moment(features))
    with pytest.raises(BackendUnavailable, match=words):
        second_moment(features, precision="tf32")
    with pytest.raises(BackendUnavailable, match="reference.*'ieee'"):
        second_moment(features, backend="reference", precision="ieee")
    with pytest.raises(RewriteCoreError, match="precision='half'.*x3, tf32, ieee"):
        second_moment(features, precision="half")


def cut(values, bits):
    """float64 numbers, cut (not rounded) to so many significant bits."""
    fraction, exponent = torch.frexp(values)
    return torch.ldexp(torch.trunc(torch.ldexp(fraction, torch.tensor(bits))), exponent - bits)


def on_tensor_cores(products, run, step, compensated=True):
    """[keys, ...] summed as tensor cores do at their worst: `step` exact products at a time into a float32 sum, cut
    to 24 bits; after `run` products into a compensated float32 sum, as the kernel does."""
    total, excess = (torch.zeros(products.shape[1:], dtype=torch.float32) for _ in range(2))
    for part in products.split(run):
        short = torch.zeros(products.shape[1:], dtype=torch.float64)
        for few in part.split(step):
            short = cut(short + few.sum(0), 24)
        term = short.float() - excess
        wide = total + term
        if compensated:
            excess = (wide - total) - term
        total = wide
    return total.double() - excess.double()


def emulated(rows, mode, run, compensated=True):
    """The kernel's arithmetic for rows [keys, channels] in plain PyTorch, tensor cores' cuts included."""
    if mode == "half":
        a = rows.double()
        return on_tensor_cores(a[:, :, None] * a[:, None, :], run, 16, compensated)
    if mode == "tf32":
        a = cut(rows.double(), 11)
        return on_tensor_cores(a[:, :, None] * a[:, None, :], run, 8, compensated)
    high = ((rows.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    low = cut((rows - high).double(), 11)
    high = high.double()
    parts = [
        low[:, :, None] * high[:, None, :],
        high[:, :, None] * low[:, None, :],
        high[:, :, None] * high[:, None, :],
    ]
    # in steps of 8 keys: 8 of each product, one after the other
    keys = len(rows) // 8 * 8
    mixed = torch.stack([part[:keys].unflatten(0, (-1, 8)) for part in parts], 1).flatten(0, 2)
    return on_tensor_cores(mixed, 3 * run, 8, compensated)


KEYS = {
    "normal": lambda: normal(4096, 6),
    "positive": lambda: normal(4096, 6).abs(),
    "constant": lambda: torch.linspace(1, 2, 6).expand(4096, -1).contiguous(),
    "worst to split": lambda: (
        (1 + 2.0**-11 - 2.0**-23) * torch.ones(4096, 6)
    ),  # low parts of one sign, as long as can be
    "mixed scales": lambda: normal(4096, 6) * torch.logspace(-6, 6, 6),
}


@needs_triton
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("mode", ["x3", "half"])
def test_precision_of_tensor_cores_emulated(mode, kind):
    """What cannot be seen without a GPU: operands cut to 11 bits, sums cut to 24, in runs as long as the kernel's."""
    from rewrite_core.kernels.second_moment import CANDIDATES, SCATTERED

    rows = KEYS[kind]()
    if mode == "half":
        rows = rows.bfloat16()
    exact = rows.double().T @ rows.double()
    for run in {c.positions * c.run for table in CANDIDATES.values() for c in (*table[mode], SCATTERED[mode])}:
        got = emulated(rows, mode, run)
        scale = exact.diagonal().sqrt()
        assert ((got - exact).abs() / (scale[:, None] * scale)).max() <= 2e-6, run
        assert (got - exact).norm() <= 2e-6 * exact.norm(), run


def test_what_the_splitting_and_the_wide_sum_are_for():
    """The emulation shows the errors they are there to prevent."""
    rows = KEYS["positive"]()
    exact = rows.double().T @ rows.double()

    def error(got):
        return ((got - exact).norm() / exact.norm()).item()

    assert 1e-4 < error(emulated(rows, "tf32", 64)) < 2e-3
    assert error(emulated(rows, "x3", 64)) < 2e-6 < 1e-5 < error(emulated(rows, "x3", 1 << 20))


def resources(compiled, tmp_path):
    """What cuobjdump, which comes with Triton, says of machine code: registers, stack (spills) and the like."""
    import triton

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    text = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found, text
    return tuple(map(int, found.groups()))


def compile_for(capability, dtype, mode, config, single, layout):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rewrite_core.kernels.second_moment import second_moment_kernel as kernel

    constants = {
        "BLOCK_C": config.block,
        "BLOCK_P": config.positions,
        "RUN": config.run,
        "SINGLE": single,
        "MODE": "ieee" if mode == "half" else mode,
        "FLAT": layout != "cropped",
        "LONG": layout == "long",
        "NEAR": layout != "long",
        "WIDEN": False,
    }
    # as a launch would specialise it: arguments that are 1 are constants, multiples of 16 are known to be
    constants["stride_c" if layout == "channels_last" else "stride_w"] = 1
    signature = dict.fromkeys(kernel.arg_names, "i64" if layout == "long" else "i32")
    signature |= {"features": f"*{dtype}", "partials": "*fp32"} | dict.fromkeys(constants, "constexpr")
    known = {"features", "partials", "channels", "positions", "pixels", "stride_n", "stride_c", "stride_w"}
    known = known - set(constants) if layout != "cropped" else {"features", "partials"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in known}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.warps, "num_stages": config.stages},
    )


SHARED_MEMORY = {80: 163, 90: 227, 100: 227}  # KiB per multiprocessor and, but for 1 KiB each, per program
TENSOR_CORES = {80: "mma.sync.aligned", 90: "wgmma.mma_async.sync", 100: "tcgen05.mma"}


@needs_triton_compiler
@pytest.mark.parametrize("mode", ["x3", "tf32", "half", "ieee"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_compiles_ahead_of_time(capability, mode, tmp_path, monkeypatch):
    """For GPUs this machine lacks, from source to machine code: every configuration that may be chosen there.

    Nothing may spill, and as many programs as it says fit a multiprocessor."""
    from rewrite_core.kernels.second_moment import CANDIDATES, SCATTERED

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # compile now, whatever was compiled before
    cases = [
        (config, single, layout)
        for config in CANDIDATES[capability // 10][mode]
        for single, layout in ((True, "map"), (False, "map"), (config.single, "channels_last"))
        if single or not config.single
    ]
    cases += [(SCATTERED[mode], single, "cropped") for single in (False, True)]
    cases.append((CANDIDATES[capability // 10][mode][0], False, "long"))
    for config, single, layout in cases:
        for dtype in ("bf16", "fp16")[: 1 + (layout in ("map", "cropped"))] if mode == "half" else ("fp32",):
            compiled = compile_for(capability, dtype, mode, config, single, layout)
            case = (config, single, layout, dtype)
            ptx = compiled.asm["ptx"]
            assert f"sm_{capability}" in ptx
            registers, stack, local = resources(compiled, tmp_path)
            if layout == "long":  # int64 sizes: these only have to compile
                continue
            assert stack == local == 0, f"spills: {case} {stack} {local} {registers}"
            allocated = -(-registers // 8) * 8 * 32 * config.warps
            assert allocated * config.resident <= 65536, f"registers: {case} {registers}"
            shared = compiled.metadata.shared / 1024 + 1
            assert shared * config.resident <= SHARED_MEMORY[capability] + 1, f"shared memory: {case} {shared}"
            assert not re.search(r"^\s*(@\S+\s+)?(atom|red)\.", ptx, re.MULTILINE), "sums in any order"
            if mode == "ieee":
                assert "mma" not in ptx and "tf32" not in ptx, "float32 products are rounded to TF32"
                continue
            kind = {"fp32": "tf32", "bf16": "f16" if capability == 100 else "bf16", "fp16": "f16"}[dtype]
            multiply = [line for line in ptx.splitlines() if TENSOR_CORES[capability] in line]
            assert multiply and all(kind in line for line in multiply), case
            if layout == "map":  # read in place, 16 bytes at a time, while the products before are under way
                assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", ptx), case


@needs_triton
def test_a_tile_that_spills_as_one_of_several_is_used_alone():
    from rewrite_core.kernels.second_moment import candidates

    def default(channels, mode="x3", major=9):
        return candidates(major, mode, channels)[0]

    assert [default(channels).block for channels in (64, 65, 128, 129, 512)] == [64, 128, 128, 64, 64]
    assert default(128).single and [default(channels, major=8).block for channels in (100, 512)] == [64, 64]
    assert [default(channels, "half").positions for channels in (64, 128, 512)] == [128, 128, 128]
    assert [default(channels, "half").block for channels in (64, 128, 512)] == [64, 128, 128]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_the_adding_kernel_compiles_ahead_of_time(capability, block, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rewrite_core.kernels.second_moment import REDUCED, TOGETHER, add_partials_kernel

    constants = {"BLOCK_C": block, "SYMMETRISE": True, "ENTRIES": REDUCED, "TOGETHER": TOGETHER}
    signature = dict.fromkeys(add_partials_kernel.arg_names, "i32") | {"partials": "*fp32", "out": "*fp64"}
    compiled = triton.compile(
        ASTSource(add_partials_kernel, signature | dict.fromkeys(constants, "constexpr"), constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4},
    )
    _, stack, local = resources(compiled, tmp_path)
    assert stack == local == 0 and "add.f64" in compiled.asm["ptx"]
    assert not re.search(r"^\s*(@\S+\s+)?(atom|red)\.", compiled.asm["ptx"], re.MULTILINE), "sums in any order"


@needs_triton
def test_slices_fill_the_gpu():
    from rewrite_core.kernels.second_moment import slices_of

    for programs in (108, 132, 264, 296):
        for tiles in (1, 3, 10, 36, 136, 528):
            slices = slices_of(tiles, 1 << 14, programs)
            used = tiles * slices
            waves = -(-used // programs)
            assert used / (waves * programs) > 0.9, (programs, tiles, slices)
            assert slices_of(tiles, 1, programs) == 1
            assert 1 <= slices_of(tiles, 5, programs) <= 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_have_as_few_axes_as_say_them(layout):
    """The kernel's arithmetic of positions, in plain PyTorch."""
    pytest.importorskip("triton")
    from rewrite_core.kernels.second_moment import Layout

    features = features_of(layout)
    found = Layout.of(features)
    sample = torch.arange(found.samples)[:, None]
    pixel = torch.arange(found.pixels)
    along = pixel * found.strides[2]
    if not found.flat:
        along = pixel // found.width * found.strides[1] + pixel % found.width * found.strides[2]
    offsets = (sample * found.strides[0] + along).flatten()
    start = features[:, :1].movedim(1, -1).reshape(-1) if features.ndim == 4 else features[:, 0]
    memory = features.as_strided((features.untyped_storage().nbytes() // 4 - features.storage_offset(),), (1,))
    assert torch.equal(memory[offsets], start)
    if layout in ("rows", "column-major rows", "channels_last", "one channel", "expanded positions"):
        assert found.samples == 1 or layout == "expanded positions"
    reach = max(features.stride(1) * features.shape[1] + offsets)
    assert found.near(features.stride(1), features.shape[1], 64) and reach < 2**31


def test_layouts_know_what_can_be_read_16_bytes_at_a_time():
    pytest.importorskip("triton")
    from rewrite_core.kernels.second_moment import Layout

    def scattered(features):
        return Layout.of(features).scattered(features.data_ptr(), features.stride(1))

    maps = torch.zeros(2, 32, 16, 16)
    assert not any(
        map(scattered, (maps, maps[:1, :, 1:], maps[:, 16:], maps.contiguous(memory_format=torch.channels_last)))
    )
    assert not any(
        map(scattered, (torch.zeros(7, 32), torch.zeros(32, 48).T, torch.zeros(3, 16, 4, 4), torch.zeros(1, 1, 4, 4)))
    )
    assert not scattered(torch.zeros(2, 8, 20, 48)[:, :, :, 16:32])
    for odd in (
        maps[:, :, 1:, 1:],
        maps[:, :, :, 1:],
        torch.zeros(3, 32, 7, 7),
        torch.zeros(7, 33),
        torch.zeros(7, 64)[:, ::2],
        maps.flatten()[1 : 1 + 4096].view(1, 16, 16, 16),
        torch.zeros(3, 33, 7, 9).to(memory_format=torch.channels_last),
        maps[..., ::2],
    ):
        assert scattered(odd)


@pytest.mark.parametrize(
    ("samples", "strides", "pixels", "near"),
    [
        (1 << 20, (1 << 20, 1 << 8, 1), 1 << 8, True),  # far more than 2^31 numbers, in blocks that lie near each other
        (1, (0, 1 << 30, 1), 1 << 8, False),
        (40, (1 << 26, 1 << 8, 1), 1 << 8, False),
        (20, (1 << 26, 1 << 8, 1), 1 << 8, True),
        (1, (0, 1, 64), 1 << 26, False),
        (1, (0, 1, 64), 1 << 24, True),
        (1, (0, 1, 0), 1 << 40, True),
    ],
)
def test_int32_is_used_where_it_holds_all_distances(samples, strides, pixels, near):
    pytest.importorskip("triton")
    from rewrite_core.kernels.second_moment import Layout

    layout = Layout(samples, pixels, pixels, (strides[0], 0, strides[2]), True)
    assert layout.near(strides[1], 64, 32) == near


def needs_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")(test))


def on_gpu(features, tolerance, **how):
    out = prefilled(features.shape[1], float("nan")).tril(-1).T.contiguous().cuda()
    second_moment(features, out=out, backend="triton", **how)
    rows = rows_of(features)
    assert_close(out.cpu(), (rows.T @ rows).cpu(), tolerance)
    return out


@needs_gpu
@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [
        ("x3", torch.float32, 2e-06),
        ("ieee", torch.float32, 2e-06),
        ("tf32", torch.float32, 0.003),
        ("x3", torch.bfloat16, 2e-06),
        ("x3", torch.float16, 2e-06),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_layouts(layout, precision, dtype, tolerance):
    features = LAYOUTS[layout](lambda *shape: normal(*shape).to(dtype).cuda())
    again = [on_gpu(features, tolerance, precision=precision) for _ in range(3)]
    assert torch.equal(again[0], again[1]) and torch.equal(again[0], again[2]), "other bits"


@needs_gpu
@pytest.mark.parametrize("channels", [1, 37, 65, 130])
def test_gpu_small(channels):
    """For compute-sanitizer too: every configuration, few keys."""
    from rewrite_core.kernels import second_moment as kernels

    major = torch.cuda.get_device_capability()[0]
    for mode, configs in kernels.CANDIDATES.get(major, kernels.CANDIDATES[8]).items():
        for config in (*configs, kernels.SCATTERED[mode]):
            features = normal(2, channels, 9, 13).to(torch.bfloat16 if mode == "half" else torch.float32)
            out = prefilled(channels).cuda()
            kernels.launch(features.cuda(), out, "x3" if mode == "half" else mode, config)
            assert_close(out.cpu(), oracle(features), 3e-3 if mode == "tf32" else 2e-6)


@needs_gpu
def test_gpu_more_than_2_31_numbers():
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("the GPU has too little memory")
    features = torch.ones(33, 1, 1, 1 << 26, dtype=torch.bfloat16, device="cuda")
    features[-1, :, :, -1] = 2
    features = features.expand(-1, 2, -1, -1)
    want = torch.full((2, 2), float(33 * (1 << 26) + 3), dtype=torch.float64)
    assert_close(second_moment(features, backend="triton").cpu(), want, 2e-6)


@needs_gpu
@pytest.mark.parametrize("shape", [(1 << 20, 64), (1 << 17, 256)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "positive", "constant"])
def test_gpu_many_keys(shape, kind):
    features = normal(*shape).cuda()
    if kind != "normal":
        features = features.abs() if kind == "positive" else torch.linspace(1, 2, shape[1], device="cuda").expand(shape)
    on_gpu(features, 2e-6)
    on_gpu(features.bfloat16(), 2e-6)


@needs_gpu
def test_gpu_graph_and_streams():
    """No wait for the GPU and no measurement while a graph is captured; the current stream is used."""
    from rewrite_core.kernels import tuning

    features = normal(8, 96, 16, 16).cuda()
    out = prefilled(96).cuda()
    tuning._chosen.clear()
    with (
        pytest.raises(RewriteCoreError, match="call it once before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        second_moment(features, out=out, backend="triton")
    torch.cuda.synchronize()
    assert not out.any()
    second_moment(features, out=out, backend="triton")  # compiles
    once = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        second_moment(features, out=out, backend="triton")
    out.zero_()
    graph.replay()
    assert torch.equal(out, once)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out.zero_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            second_moment(features, out=out, backend="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(out, once)
