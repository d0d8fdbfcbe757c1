"""The StyleGAN2 module; golden layer values are the rewriting paper's reference implementation's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from rewrite_core.generators.stylegan2 import (
    Blur,
    ModulatedConv2d,
    StyledConv,
    StyleGAN2,
    Upsample,
    load_stylegan2,
    published_channels,
)

DATA = Path(__file__).parent / "data"
CHANNELS = {4: 6, 8: 5, 16: 4}
STYLED = ["conv.weight", "conv.modulation.weight", "conv.modulation.bias", "noise.weight", "activate.bias"]
RGB = ["bias", "conv.weight", "conv.modulation.weight", "conv.modulation.bias"]


def small(**options) -> StyleGAN2:
    """A 16x16 generator in which every parameter matters."""
    torch.manual_seed(0)
    model = StyleGAN2(16, style_dim=7, n_mlp=2, channels=CHANNELS, **options)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") or name.endswith("noise.weight"):
                value += 0.3 * torch.randn_like(value)
    return model.requires_grad_(False)


def fused(layer: ModulatedConv2d, x: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """The paper's form: one modulated and demodulated weight per image, as one grouped convolution."""
    n, channels, height, width = x.shape
    outputs, side = layer.weight.shape[1], layer.weight.shape[-1]
    weight = layer.scale * layer.weight * layer.modulation(latent).view(n, 1, channels, 1, 1)
    if layer.demodulate:
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    x = x.reshape(1, n * channels, height, width)
    if not layer.upsample:
        out = F.conv2d(x, weight.reshape(n * outputs, channels, side, side), padding=side // 2, groups=n)
        return out.view(n, outputs, *out.shape[2:])
    weight = weight.transpose(1, 2).reshape(n * channels, outputs, side, side)
    out = F.conv_transpose2d(x, weight, stride=2, groups=n)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    blur = 4 * torch.outer(taps, taps)
    return F.conv2d(out.view(n * outputs, 1, *out.shape[2:]), blur[None, None], padding=1).view(
        n, outputs, 2 * height, 2 * width
    )


@pytest.mark.parametrize("kind", ["same", "up"])
def test_golden_layer(kind):
    golden = {
        name[len(kind) + 1 :]: torch.from_numpy(value)
        for name, value in np.load(DATA / "stylegan2_layer.npz").items()
        if name.startswith(kind)
    }
    layer = StyledConv(64, 48, style_dim=5, upsample=kind == "up").requires_grad_(False)
    layer.noise.weight.copy_(golden["noise_weight"])
    layer.activate.bias.copy_(golden["bias"])
    weight, style = golden["weight"][0], golden["style"][:1]
    out = layer.conv.linear(golden["fmap_modulated"][:1], weight)
    out = out * layer.conv.demodulation(style, weight)[:, :, None, None]
    value = layer.activate(layer.noise(out, golden["noise"]))
    assert value.shape == golden["value"].shape
    assert (value - golden["value"]).abs().max() <= 1e-5


@pytest.mark.parametrize(("upsample", "demodulate", "kernel"), [(0, 1, 3), (1, 1, 3), (0, 0, 1), (1, 0, 3), (0, 1, 1)])
@pytest.mark.parametrize("shape", [(4, 4), (7, 5), (1, 9)])
def test_separated_form_is_the_fused_form(upsample, demodulate, kernel, shape):
    torch.manual_seed(0)
    layer = ModulatedConv2d(6, 5, kernel, 7, bool(upsample), bool(demodulate)).double()
    x = torch.randn(3, 6, *shape, dtype=torch.float64, requires_grad=True)
    latent = torch.randn(3, 7, dtype=torch.float64)
    ours, theirs = layer(x, latent), fused(layer, x, latent)
    assert ours.shape == (3, 5, *(side * (1 + upsample) for side in shape))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    wanted = [x, layer.weight, layer.modulation.weight]
    gradients = [torch.autograd.grad(out.square().sum(), wanted) for out in (ours, theirs)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("upsample", [False, True])
def test_key_linear_demodulation_compose(upsample):
    layer = ModulatedConv2d(6, 5, 3, 7, upsample)
    x, latent = torch.randn(2, 6, 5, 3), torch.randn(2, 7)
    key, style = layer.key(x, latent)
    assert key.shape == x.shape and style.shape == (2, 6)
    gain = layer.demodulation(style, layer.weight[0])
    assert gain.shape == (2, 5)
    out = layer.linear(key, layer.weight[0]) * gain[:, :, None, None]
    assert torch.equal(out, layer(x, latent))


@pytest.mark.parametrize("upsample", [False, True])
def test_linear_works_for_any_channels(upsample):
    """A rank-one change is its coefficients times the operator applied to one map with one-hot kernels."""
    torch.manual_seed(0)
    layer = ModulatedConv2d(6, 5, 3, 7, upsample).double()
    key = torch.randn(2, 6, 5, 8, dtype=torch.float64)
    direction, coefficients = torch.randn(6, dtype=torch.float64), torch.randn(5, 3, 3, dtype=torch.float64)
    projected = torch.einsum("i,nihw->nhw", direction, key)[:, None]
    basis = layer.linear(projected, torch.eye(9, dtype=torch.float64).view(9, 1, 3, 3))
    through_basis = torch.einsum("ot,nthw->nohw", coefficients.view(5, 9), basis)
    delta = coefficients[:, None] * direction[None, :, None, None]
    torch.testing.assert_close(through_basis, layer.linear(key, delta), rtol=0, atol=1e-12)


def test_filters_are_true_convolutions():
    """Checked with a lopsided kernel, against zero-insertion written out."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    kernel = torch.randn(4, 4, dtype=torch.float64)
    blur, upsample = Blur(pad=(1, 1)).double(), Upsample().double()
    blur.kernel.copy_(kernel)
    upsample.kernel.copy_(kernel)

    def convolve(maps, before, after):
        maps = F.pad(maps, (before, after, before, after)).flatten(0, 1)[:, None]
        return F.conv2d(maps, kernel.flip(0, 1)[None, None])[:, 0].unflatten(0, x.shape[:2])

    torch.testing.assert_close(blur(x), convolve(x, 1, 1))
    spread = torch.zeros(2, 3, 8, 10, dtype=torch.float64)
    spread[:, :, ::2, ::2] = x
    torch.testing.assert_close(upsample(x), convolve(spread, 2, 1))


def test_upsampling_keeps_the_mean():
    flat = Upsample()(torch.ones(1, 1, 6, 6))
    torch.testing.assert_close(flat[:, :, 2:-2, 2:-2], torch.ones(1, 1, 8, 8))


def test_state_dict_names():
    names = [f"style.{n}.{part}" for n in (1, 2) for part in ("weight", "bias")] + ["input.input"]
    names += [f"conv1.{part}" for part in STYLED] + [f"to_rgb1.{part}" for part in RGB]
    names += [f"convs.{n}.{part}" for n in range(4) for part in STYLED]
    names += [f"convs.{n}.conv.blur.kernel" for n in (0, 2)]
    names += [f"to_rgbs.{n}.{part}" for n in range(2) for part in [*RGB, "upsample.kernel"]]
    names += [f"noises.noise_{n}" for n in range(5)]
    model = small()
    model.latent_avg = torch.zeros(7)
    state = model.state_dict()
    assert sorted(state) == sorted(names)
    assert state["convs.0.conv.weight"].shape == (1, 5, 6, 3, 3)
    assert state["to_rgb1.bias"].shape == (1, 3, 1, 1)
    assert [state[f"noises.noise_{n}"].shape[-1] for n in range(5)] == [4, 8, 8, 16, 16]


@pytest.mark.parametrize("kind", ["bare", "published", "pt", "safetensors", "training"])
def test_round_trip(tmp_path, kind):
    model = small()
    average = torch.randn(7)
    state = model.state_dict()
    dicts = {"bare": state, "published": {"g_ema": state, "latent_avg": average[None]}}
    source = dicts.get(kind, tmp_path / f"g.{kind}")
    if kind == "pt":
        torch.save({"g_ema": state, "latent_avg": average}, source)
    elif kind == "safetensors":
        save_file(state | {"latent_avg": average}, source)
    elif kind == "training":
        torch.save({"g": state, "g_ema": state, "d": {"x": 1}, "ada_aug_p": 0.0}, source)
    loaded = load_stylegan2(source)
    assert (loaded.size, loaded.style_dim, loaded.n_mlp, loaded.channels) == (16, 7, 2, CHANNELS)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    latents = torch.randn(3, 7)
    assert torch.equal(loaded(latents), model(latents))
    if kind in ("bare", "training"):
        assert loaded.latent_avg is None
    else:
        assert torch.equal(loaded.latent_avg, average)


@pytest.mark.parametrize(
    ("size", "channels"), [(4, {4: 3}), (8, {4: 2, 8: 7}), (64, {4: 12, 8: 12, 16: 9, 32: 6, 64: 3})]
)
def test_any_size_and_widths(size, channels):
    model = StyleGAN2(size, style_dim=5, n_mlp=0, channels=channels)
    assert model(torch.randn(2, 5)).shape == (2, 3, size, size)
    assert load_stylegan2(model.state_dict(), size=size).channels == channels


def test_published_widths():
    assert published_channels() == {
        4: 512,
        8: 512,
        16: 512,
        32: 512,
        64: 512,
        128: 256,
        256: 128,
        512: 64,
        1024: 32,
    }
    assert published_channels(1)[64] == 256 and published_channels(1)[1024] == 16
    with torch.device("meta"):
        assert StyleGAN2(256).channels == {s: c for s, c in published_channels().items() if s <= 256}


def test_truncation():
    model = small()
    latents = torch.randn(3, 7)
    model.latent_avg = torch.randn(7)
    mapped = model.style(latents)
    assert torch.equal(model.mapping(latents), mapped)
    torch.testing.assert_close(model.mapping(latents, 0.5), 0.5 * (mapped + model.latent_avg))
    assert torch.equal(model.mapping(latents, 0.0), model.latent_avg.expand(3, -1))
    half = model(latents, truncation=0.5)
    assert not torch.allclose(half, model(latents), atol=1e-3)
    loaded = load_stylegan2({"g_ema": model.state_dict(), "latent_avg": model.latent_avg}, truncation=0.5)
    assert torch.equal(loaded(latents), half)
    assert torch.equal(loaded(latents, truncation=1.0), model(latents))


def test_noise():
    model = small()
    latents = torch.randn(3, 7)
    fixed = model(latents)
    assert torch.equal(model(latents), fixed)
    torch.testing.assert_close(model(latents[1:2]), fixed[1:2], rtol=0, atol=1e-5)
    random = model(latents[:1].expand(2, -1), noise="random")
    assert not torch.allclose(random[0], random[1], atol=1e-3), "each image has its own noise"
    torch.manual_seed(5)
    first = model(latents, noise="random")
    torch.manual_seed(5)
    assert torch.equal(model(latents, noise="random"), first)
    none = model(latents, noise="none")
    assert not torch.allclose(none, fixed, atol=1e-3)
    for name, value in model.named_parameters():
        if name.endswith("noise.weight"):
            value.zero_()
    assert torch.equal(model(latents), none)


def test_checkpoint_without_noises_gets_seeded_ones():
    state = small().state_dict()
    bare = {name: value for name, value in state.items() if not name.startswith("noises.")}
    loaded = load_stylegan2(bare).noises
    rng = np.random.RandomState(1)
    for n, side in enumerate([4, 8, 8, 16, 16]):
        expected = rng.randn(1, 1, side, side).astype("float32")
        np.testing.assert_array_equal(getattr(loaded, f"noise_{n}").numpy(), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 3e-2), (torch.bfloat16, 2e-1)])
def test_dtypes(dtype, tolerance):
    model = small()
    model.latent_avg = torch.zeros(7)
    latents = torch.randn(2, 7)
    expected = model(latents, truncation=0.7)
    images = model.to(dtype)(latents.to(dtype), truncation=0.7)
    assert images.dtype == dtype
    assert (images.float() - expected).abs().max() <= tolerance * expected.abs().max()
    assert model(latents.to(dtype), noise="random").dtype == dtype


@pytest.mark.parametrize("autocast", [False, True])
def test_maps_are_overwritten_only_where_nobody_sees_them(autocast):
    """Without gradients the same bits, in every module's output after the pass, too."""
    model, latents = small(), torch.randn(2, 7)
    seen: list[torch.Tensor] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.enable_grad():
            model(latents)
        count = len(seen)
        with torch.no_grad():
            model(latents)
    assert count and len(seen) == 2 * count
    for kept, overwritten in zip(seen[:count], seen[count:], strict=True):
        assert kept.dtype == overwritten.dtype and torch.equal(kept, overwritten)


def test_half_demodulation_survives_a_dead_style():
    layer = ModulatedConv2d(6, 5, 3, 7).half()
    gain = layer.demodulation(torch.zeros(1, 6, dtype=torch.half), layer.weight[0])
    torch.testing.assert_close(gain, torch.full((1, 5), 1e4, dtype=torch.half))


def test_gradients_reach_every_parameter():
    model = small().requires_grad_(True)
    model(torch.randn(2, 7)).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in model.parameters())


def without(prefix):
    return lambda state: {name: value for name, value in state.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("input.input"), "no StyleGAN2 checkpoint.*'input.input' is missing"),
        (without("conv1.conv.modulation.weight"), "'conv1.conv.modulation.weight' is missing"),
        (without("convs.2.conv.weight"), "'convs.2.conv.weight' is missing"),
        (without("convs.3.activate.bias"), "'convs.3.activate.bias' is missing"),
        (without("noises.noise_3"), "'noises.noise_3' is missing"),
        (without("style.2.bias"), "'style.2.bias' is missing"),
        (without("convs.3"), "'convs.3.conv.weight' is missing"),
        (lambda s: s | {"torgb.extra": torch.zeros(1)}, "'torgb.extra' does not belong in a StyleGAN2"),
        (lambda s: s | {"convs.1.activate.bias": torch.zeros(9)}, r"'convs.1.activate.bias' has shape \[9\]"),
        (lambda s: s | {"input.input": torch.zeros(6)}, "'input.input' must have 4 dimensions"),
        (lambda s: {"layer1.conv.weight": torch.zeros(1)}, "its first key is 'layer1.conv.weight'"),
        (lambda s: {"latent_avg": torch.zeros(7)}, "no StyleGAN2 checkpoint"),
        (lambda s: s | {"latent_avg": torch.zeros(8)}, "latent_avg must have 7 values"),
        (lambda s: {"g_ema": 3, "latent_avg": torch.zeros(7)}, "entry 'g_ema' is a int"),
    ],
)
def test_foreign_state(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_stylegan2(change(dict(small().state_dict())))
    assert str(caught.value).count(". ") == 0, "one sentence"


def test_truncated_file(tmp_path):
    torch.save({"g_ema": small().state_dict()}, tmp_path / "g.pt")
    whole = (tmp_path / "g.pt").read_bytes()
    (tmp_path / "g.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="g.pt cannot be read as a checkpoint .*truncated"):
        load_stylegan2(tmp_path / "g.pt")


def test_bad_arguments():
    model = small()
    for size in (0, 2, 24, -8):
        with pytest.raises(ValueError, match="size must be a power of two"):
            StyleGAN2(size)
    with pytest.raises(ValueError, match=r"channels needs an entry .*\[16\] are missing"):
        StyleGAN2(16, channels={4: 3, 8: 3})
    with pytest.raises(ValueError, match=r"latents must be \[N, 7\], got \[2, 6\]"):
        model(torch.randn(2, 6))
    with pytest.raises(ValueError, match="noise must be one of .*'fixd'"):
        model(torch.randn(2, 7), noise="fixd")
    with pytest.raises(ValueError, match="truncation=0.5 needs the mean mapped latent"):
        model(torch.randn(2, 7), truncation=0.5)
    with pytest.raises(ValueError, match="truncation=0.5 needs latent_avg, which this checkpoint lacks"):
        load_stylegan2(model.state_dict(), truncation=0.5)
    with pytest.raises(ValueError, match="paints 16x16 images, not 32x32"):
        load_stylegan2(model.state_dict(), size=32)
