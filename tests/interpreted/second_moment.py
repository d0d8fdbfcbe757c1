"""The kernels' sums against float64: see tests/test_interpreted.py.

The interpreter does split numbers in two for "x3", and drops the product of the low parts.
"""

import pytest
import torch
import triton
import triton.language as tl
from helpers.moment_features import LAYOUTS, assert_close, features_of, normal, oracle, prefilled, rows_of

from rewrite_core.kernels import second_moment as kernels
from rewrite_core.ops import second_moment


def close(features, tolerance=2e-6, run=None, **how):
    out = torch.full((features.shape[1],) * 2, float("nan"), dtype=torch.float64).tril(-1).T.contiguous()  # NaN above
    (run or second_moment)(features, out=out, **({} if run else {"backend": "triton"}), **how)
    rows = rows_of(features)
    assert_close(out, oracle(features) if len(rows) < 5000 else rows.T @ rows, tolerance)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "several chunks"])
def test_layouts(layout):
    close(features_of(layout))


@pytest.mark.parametrize(
    "layout",
    ["map", "one channel", "one position", "column-major rows", "cropped channels_last", "expanded positions"],
)
def test_modes(layout):
    for precision in ("tf32", "ieee"):
        close(features_of(layout), precision=precision)
    for dtype in (torch.bfloat16, torch.float16):
        close(features_of(layout, dtype))


CONFIGS = {(mode, config) for table in kernels.CANDIDATES.values() for mode in table for config in table[mode]}
CONFIGS |= set(kernels.SCATTERED.items())


@pytest.mark.parametrize(("mode", "config"), sorted(CONFIGS, key=str), ids=str)
def test_configurations(mode, config):
    """Every one of every kind of GPU, with one tile and with several."""
    dtype = torch.bfloat16 if mode == "half" else torch.float32
    precision = "x3" if mode == "half" else mode
    for channels in (config.block - 3, config.block + 1):
        close(normal(3, channels, 13, 11).to(dtype), run=kernels.launch, precision=precision, config=config)


def test_sizes():
    """1, primes, odd: rows and maps of them."""
    for channels in (1, 2, 17, 67):
        for rows in (1, 31, 257):
            close(normal(rows, channels))
    for side in (1, 3, 5):
        close(normal(7, 19, side, side + 2))


def test_added_to_the_lower_triangle_and_mirrored():
    """Twice the same bits."""
    base = torch.arange(1369, dtype=torch.float64).view(37, 37)
    want = oracle(features_of("map")) + base.tril() + base.tril(-1).T
    results = [second_moment(features_of("map"), out=base.clone(), backend="triton") for _ in range(2)]
    assert torch.equal(*results) and torch.equal(results[0], results[0].T) and (results[0] - want).abs().max() < 1e-3


def test_constant_keys_do_not_drift():
    values = torch.linspace(1, 2, 16)
    got = second_moment(values.expand(2048, -1), backend="triton")
    assert_close(got, 2048 * torch.outer(values.double(), values.double()), 1e-6)
    # many runs in one program: without compensation their float32 sum would be off by 2e-6
    config = kernels.SecondMomentConfig(16, 16, 1, warps=4, stages=1, resident=1)
    close(torch.full((32768, 8), 1.1), 5e-7, run=kernels.launch, precision="ieee", config=config)


def test_the_split_keeps_channels_and_scales_apart():
    close((normal(700, 45) * torch.logspace(-6, 6, 45, dtype=torch.float64)).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("channels", [37, 70])
def test_nonfinite_channels_stay_apart(value, channels):
    features = normal(3, channels, 7, 11)
    features[1, 20, 3, 3] = value
    got = second_moment(features, backend="triton")
    touched = torch.zeros(channels, channels, dtype=torch.bool)
    touched[20] = touched[:, 20] = True
    assert not got[touched].isfinite().any() and got[~touched].isfinite().all()


def test_no_positions():
    assert torch.equal(second_moment(torch.empty(0, 3), backend="triton"), prefilled(3))


def test_distances_that_int32_does_not_hold(monkeypatch):
    monkeypatch.setattr(kernels.Layout, "near", lambda *args: False)
    for layout in ("map", "rows", "cropped", "channels_last", "expanded positions"):
        close(features_of(layout))


@triton.jit
def blocks_kernel(out, positions, BLOCK: tl.constexpr):
    tl.store(out, kernels.cdiv(positions, BLOCK))


@pytest.mark.parametrize("positions", [1, 127, 128, 129, 2**31 - 127, 2**31 - 1, 2**31, 2**40 + 1])
def test_blocks_are_counted_up_to_the_last_number_of_int32(positions):
    """A sum with the block would wrap around, and no block be read."""
    out = torch.zeros(1, dtype=torch.int64)
    blocks_kernel[(1,)](out, positions, 128)
    assert out.item() == -(-positions // 128)


@pytest.mark.parametrize("part", [kernels.FEW_SLICES, kernels.MANY_SLICES], ids=["few slices", "many slices"])
@pytest.mark.parametrize("symmetrise", [False, True])
def test_adding_up_in_the_parts_that_a_gpu_has(part, symmetrise):
    """launch() gives the interpreter larger ones."""
    block, channels, slices = 32, 45, 9
    height, width, together = part
    tiles = 1 if symmetrise else 3
    channels = min(channels, block) if symmetrise else channels
    partials = torch.randn(slices, tiles, block, block)
    out = normal(channels, channels).double()  # its upper triangle is not read
    wanted = out.tril() + out.tril(-1).T
    whole = torch.zeros(2 * block, 2 * block, dtype=torch.float64)
    for tile, (row, column) in enumerate([(0, 0), (1, 0), (1, 1)][:tiles]):
        added = partials[:, tile].double().sum(0)
        whole[row * block :, column * block :][:block, :block] = (added + added.T) / 2 if symmetrise else added
    whole = whole[:channels, :channels]
    grid = (tiles, block * block // (height * width))
    sizes = {"BLOCK_C": block, "HEIGHT": height, "WIDTH": width, "TOGETHER": together, "SYMMETRISE": symmetrise}
    kernels.add_partials_kernel[grid](partials, out, channels, slices, **sizes)
    torch.testing.assert_close(out, wanted + whole.tril() + whole.tril(-1).T, rtol=1e-13, atol=1e-13)
