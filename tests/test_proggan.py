"""The ProgGAN module and the reading of checkpoints; golden numbers are the reference implementation's."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rewrite_core.files import read_state_dict
from rewrite_core.generators.proggan import ProgGAN, Upsample, load_proggan

DATA = Path(__file__).parent / "data"
STATE = DATA / "proggan_state.npz"


@pytest.fixture
def tiny() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return ProgGAN([6, 5, 4, 3]).state_dict()


def test_golden_images_and_keys():
    generator = load_proggan(STATE)
    assert generator.sizes == [64, 64, 64, 48, 32]
    latents = np.random.RandomState(1).standard_normal(200 * 64).reshape(200, 64)
    keys = []
    generator.layer5.conv.register_forward_pre_hook(lambda module, args: keys.append(args[0]))
    with torch.no_grad():
        images = generator(torch.from_numpy(latents[[3, 7, 11, 19]]).float())
    expected = np.load(DATA / "proggan_expected.npz")
    np.testing.assert_allclose(images.numpy(), expected["images_3_7_11_19"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(keys[0].numpy(), expected["keys_3_7_11_19"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_nearest_pixels_are_torchs(layout, dtype):
    x = torch.randn(3, 5, 4, 6).to(dtype).contiguous(memory_format=layout)
    plain = torch.nn.Upsample(scale_factor=2, mode="nearest")
    with torch.no_grad():
        found, wanted = Upsample()(x), plain(x)
    assert torch.equal(found, wanted) and found.stride() == wanted.stride()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(Upsample()(x).square().sum(), x)
    assert torch.equal(gradient, torch.autograd.grad(plain(x).square().sum(), x)[0])


@pytest.mark.parametrize("sizes", [[7, 6], [6, 5, 4, 3], [3, 4, 8, 5, 9]])
def test_loads_what_it_saves(sizes):
    model = ProgGAN(sizes)
    loaded = load_proggan(model.state_dict())
    assert loaded.sizes == sizes
    latents = torch.randn(2, sizes[0])
    assert torch.equal(loaded(latents), model(latents))
    loaded.layer1.conv.weight.data.zero_()
    assert model.layer1.conv.weight.abs().min() > 0, "the loaded generator owns its weights"


@pytest.mark.parametrize("kind", ["pt", "pth", "safetensors", "npz", "wrapped", "legacy", "ema", "arrays"])
def test_every_container(tmp_path, tiny, kind):
    path = tmp_path / f"state.{kind if kind in ('pt', 'pth', 'safetensors', 'npz') else 'pt'}"
    source = path
    if kind == "safetensors":
        save_file(tiny, path)
    elif kind == "npz":
        np.savez(path, **{key: value.numpy() for key, value in tiny.items()})
    elif kind == "wrapped":
        torch.save({"state_dict": tiny, "epoch": 3}, path)
    elif kind == "legacy":
        torch.save(tiny, path, _use_new_zipfile_serialization=False)
    elif kind == "ema":
        torch.save({"g_ema": tiny, "args": argparse.Namespace(batch=4, lr=0.002)}, path)
    elif kind == "arrays":
        source = {key: value.numpy() for key, value in tiny.items()}
    else:
        torch.save(tiny, path)
    state = read_state_dict(source)
    assert sorted(state) == sorted(tiny)
    assert all(torch.equal(state[key], tiny[key]) for key in tiny)
    assert load_proggan(source).sizes == [6, 5, 4, 3]


def test_half_checkpoint_gives_a_float32_generator(tiny):
    model = load_proggan({key: value.half() for key, value in tiny.items()})
    assert model.layer2.conv.weight.dtype == torch.float32
    assert torch.equal(model.layer2.conv.weight, tiny["layer2.conv.weight"].half().float())


def test_loading_draws_no_random_numbers(tiny):
    before = torch.get_rng_state()
    load_proggan(tiny)
    assert torch.equal(torch.get_rng_state(), before)


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layer1.conv.weight"), "'layer1.conv.weight' is missing"),
        (without("layer3.conv.weight"), "'layer3.conv.weight' is missing"),
        (without("layer4.conv.weight"), "'layer4.conv.weight' is missing"),
        (without("layer3.wscale.b"), "'layer3.wscale.b' is missing"),
        (without("output_16x16.conv.weight"), "'output_16x16.conv.weight' is missing"),
        (lambda s: s | {"layer9.extra": torch.zeros(1)}, "'layer9.extra' does not belong"),
        (lambda s: s | {"layer2.conv.weight": torch.zeros(5, 4, 3, 3)}, r"'layer2.* shape \[5, 4, 3, 3\]"),
        (lambda s: s | {"layer3.conv.weight": torch.zeros(5, 4)}, "'layer3.*' must have 4 dimensions"),
        (lambda s: {"features.0.weight": torch.zeros(2)}, "no Progressive GAN.*first key is 'features.0"),
        (lambda s: {}, "holds no state dict but nothing"),
        (lambda s: {"state_dict": 3}, "entry 'state_dict' is a int"),
        (lambda s: s | {"epoch": 3}, "entry 'epoch' is a int"),
    ],
)
def test_foreign_state(tiny, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_proggan(change(dict(tiny)))
    assert str(caught.value).count(". ") == 0, "one sentence"


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "npz"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.9])
def test_truncated_file(tmp_path, tiny, suffix, kept):
    path = tmp_path / f"state.{suffix}"
    if suffix == "pt":
        torch.save(tiny, path)
    elif suffix == "npz":
        np.savez(path, **{key: value.numpy() for key, value in tiny.items()})
    else:
        save_file(tiny, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=f"state.{suffix} cannot be read as a checkpoint .*truncated"):
        load_proggan(path)


class Untrusted:
    """Would run code if it were unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("suffix", ["pt", "npz"])
def test_nothing_is_unpickled(tmp_path, tiny, suffix, capsys):
    path = tmp_path / f"state.{suffix}"
    if suffix == "pt":
        torch.save(tiny | {"extra": Untrusted()}, path)
    else:
        np.savez(path, extra=np.array([Untrusted()], dtype=object))
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_state_dict(path)
    assert "unpickled" not in capsys.readouterr().out


def test_other_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file at .*nowhere.pt"):
        load_proggan(tmp_path / "nowhere.pt")
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        load_proggan(tmp_path)
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt holds no state dict but a list"):
        load_proggan(tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="text.pt cannot be read as a checkpoint"):
        load_proggan(tmp_path / "text.pt")


def test_another_default_device(tiny):
    with torch.device("meta"):
        loaded = load_proggan({key: value.numpy() for key, value in tiny.items()})
    assert all(torch.equal(value, tiny[key]) for key, value in loaded.state_dict().items())
