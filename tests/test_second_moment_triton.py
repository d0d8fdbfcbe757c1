"""The Triton kernels of ``second_moment``: precision, machine code for GPUs this machine lacks, and runs on one.

Their numbers in Triton's interpreter: tests/interpreted/second_moment.py.
"""

import re

import pytest
import torch
from conftest import needs_triton, needs_triton_compiler
from helpers.moment_features import LAYOUTS, assert_close, features_of, normal, oracle, prefilled, rows_of
from helpers.triton_compiler import ATOMICS, SHARED_MEMORY, compile_kernel, resources

from rewrite_core.errors import RewriteCoreError
from rewrite_core.ops import second_moment


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


def compile_for(capability, dtype, mode, config, single, layout):
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
    types = dict.fromkeys(kernel.arg_names, "i64" if layout == "long" else "i32")
    types |= {"features": f"*{dtype}", "partials": "*fp32"}
    known = {"features", "partials"}
    if layout != "cropped":
        known |= {"channels", "positions", "pixels", "stride_n", "stride_c", "stride_w"}
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    return compile_kernel(kernel, capability, types, constants, known, **options)


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
            assert not ATOMICS.search(ptx), "sums in any order"
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
@pytest.mark.parametrize("slices", ["few", "many"])
def test_the_adding_kernel_compiles_ahead_of_time(capability, block, slices, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from rewrite_core.kernels.second_moment import FEW_SLICES, MANY_SLICES, add_partials_kernel

    height, width, together = FEW_SLICES if slices == "few" else MANY_SLICES
    constants = {"BLOCK_C": block, "SYMMETRISE": True, "TOGETHER": together}
    constants |= {"HEIGHT": min(height, block), "WIDTH": min(width, block)}
    types = {"partials": "*fp32", "out": "*fp64"}
    compiled = compile_kernel(add_partials_kernel, capability, types, constants, num_warps=4, enable_fp_fusion=True)
    _, stack, local = resources(compiled, tmp_path)
    assert stack == local == 0 and "add.f64" in compiled.asm["ptx"]
    assert not ATOMICS.search(compiled.asm["ptx"]), "sums in any order"


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
    from rewrite_core.kernels import launching, tuning

    features = normal(8, 96, 16, 16).cuda()
    out = prefilled(96).cuda()
    tuning._chosen.clear()
    launching.forget()
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
