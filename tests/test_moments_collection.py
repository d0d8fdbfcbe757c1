"""Collecting a second moment: passes, layers, latents, memory."""

import ctypes
import functools
import gc
import re
import sys
from pathlib import Path

import pytest
import torch
import tqdm
from conftest import DATA, relative

import rewrite_core as rc


def test_forward_stops_at_the_layer(generator, latents):
    def never(*_):
        raise AssertionError("a layer after the bound one ran")

    layer = rc.bind(generator, "layer5.conv")
    layer.keys(latents[:2])  # the first pass goes to the end, to see how often the layer runs
    for name, module in generator.named_modules():
        if name.startswith(("layer6", "output")) or name == "layer5.conv":
            module.register_forward_hook(never)
    rc.collect_second_moment(layer, latents[:8], progress=False)


@pytest.mark.parametrize("names", [["layer5.conv", "layer2.conv", "layer4.conv"], ["layer2.conv"]])
def test_several_layers_in_one_pass(generator, latents, names):
    ran = []
    for name, module in generator.named_modules():
        if name.endswith("conv"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    layers = [rc.bind(generator, name) for name in names]
    together = rc.collect_second_moments(layers, latents[:20], batch_size=8, progress=False)
    ran.clear()
    again = rc.collect_second_moments(layers, latents[:20], batch_size=20, progress=False)
    last = max(int(name[5]) for name in names)
    # one pass for the batch, one for the fingerprints (as `ran`, which hooks hold, has changed), none beyond the
    # deepest
    assert ran.count("layer1.conv") == 2 and f"layer{last}.conv" not in ran
    for layer, moment, other in zip(layers, together, again, strict=True):
        alone = rc.collect_second_moment(layer, latents[:20], batch_size=8, progress=False)
        assert moment.layer == layer.name and torch.equal(moment.matrix(), alone.matrix())
        assert (moment.fingerprint, moment.latents) == (alone.fingerprint, alone.latents)
        assert relative(other.matrix(), alone.matrix()) < 1e-6
        moment.check(layer, latents)


class Overwriting(torch.nn.Module):
    """Writes to the keys of its first convolution after that has run."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(4, 4, 1), torch.nn.Conv2d(4, 3, 1)

    def forward(self, z):
        x = z[:, :, None, None] * 1
        y = self.first(x)
        return self.second(x.add_(y))


def test_keys_are_taken_before_the_generator_overwrites_them():
    torch.manual_seed(0)
    generator, z = Overwriting(), torch.randn(10, 4)
    layers = [rc.bind(generator, name) for name in ("first", "second")]
    first, second = rc.collect_second_moments(layers, z, progress=False)
    assert relative(first.matrix(), z.double().T @ z.double() / 10) < 1e-6
    assert torch.equal(second.matrix(), rc.collect_second_moment(layers[1], z, progress=False).matrix())


def test_layers_that_cannot_go_together(generator, latents):
    layer = rc.bind(generator, "layer5.conv")
    other = rc.bind(rc.load_proggan(DATA / "proggan_state.npz"), "layer4.conv")
    for layers, words in (
        ([layer, other], "same generator object"),
        ([layer, rc.bind(generator, "layer4.conv", forward=lambda g, z: g(z))], "same `forward`"),
        ([layer, rc.bind(generator, "layer5")], "twice"),
        ([], "no layer"),
    ):
        with pytest.raises(rc.RewriteCoreError, match=words):
            rc.collect_second_moments(layers, latents[:4], progress=False)
    layers = [layer, rc.bind(generator, "layer4.conv")]
    with pytest.raises(rc.RewriteCoreError, match="`checkpoints` is a list of as many"):
        rc.collect_second_moments(layers, latents[:4], checkpoints="one.safetensors")


def test_one_layer_or_several_by_name(layer, latents):
    for given in ([layer], None, "layer5.conv"):
        with pytest.raises(rc.ArgumentError, match=r"layer is what rc.bind\(generator, name\) returns, not"):
            rc.collect_second_moment(given, latents)
    with pytest.raises(rc.ArgumentError, match=r"layers is a list of what .* for one layer there is collect_second"):
        rc.collect_second_moments(layer, latents)
    with pytest.raises(rc.ArgumentError, match=r"layer is what rc.bind\(generator, name\) returns, not str"):
        rc.collect_second_moments(["layer5.conv"], latents)
    (one,) = rc.collect_second_moments((layer,), latents[:4], progress=False)
    assert torch.equal(one.matrix(), rc.collect_second_moment(layer, latents[:4], progress=False).matrix())
    for size in (0, -1, 2.5, "16", None):
        with pytest.raises(rc.RewriteCoreError, match="batch_size must be an integer of at least 1"):
            rc.collect_second_moment(layer, latents, batch_size=size)
    with pytest.raises(rc.RewriteCoreError, match="at least one latent"):
        rc.collect_second_moment(layer, latents[:0])


def test_a_layer_that_is_never_reached(latents):
    generator = Overwriting()
    generator.forward = lambda z: generator.first(z[:, :, None, None])
    layers = [rc.bind(generator, name) for name in ("first", "second")]
    with pytest.raises(rc.UnknownLayerError, match="never reached 'second'"):
        rc.collect_second_moments(layers, torch.randn(3, 4), progress=False)


def test_several_layers_name_the_one_that_is_not_finite(generator, latents):
    bad = latents[:20].clone()
    bad[13] = torch.nan
    layers = [rc.bind(generator, name) for name in ("layer5.conv", "layer4.conv")]
    with pytest.raises(rc.NonFiniteError, match="'layer4.conv', batch 3 .*12 to 15"):
        rc.collect_second_moments(layers, bad, batch_size=4, progress=False)


def test_another_default_device(layer, latents):
    plain = rc.collect_second_moment(layer, latents[:20], progress=False)
    with torch.device("meta"):
        found = rc.collect_second_moment(layer, latents[:20], progress=False)
        found.check(layer, latents)
    assert torch.equal(found.matrix(), plain.matrix())


@pytest.mark.parametrize("kind", [list, iter, torch.Tensor.numpy])
def test_latents_that_are_no_tensor(layer, latents, kind):
    with pytest.raises(TypeError, match="use torch.as_tensor, or torch.stack"):
        rc.collect_second_moment(layer, kind(latents), progress=False)


def test_nan_activations_name_the_batch(generator, latents):
    bad = latents.clone()
    bad[37] = torch.nan
    with pytest.raises(rc.NonFiniteError, match="batch 3 .*30 to 39"):
        rc.collect_second_moment(rc.bind(generator, "layer5.conv"), bad, batch_size=10, progress=False)


def test_nonfinite_images_are_skipped_and_counted(tmp_path, generator, latents):
    bad = latents[:40].clone()
    bad[[3, 37]] = torch.nan
    bad[20:24] = torch.inf  # all of a batch
    good = latents[[i for i in range(40) if i not in (3, 20, 21, 22, 23, 37)]]
    layer = rc.bind(generator, "layer5.conv")
    moment = rc.collect_second_moment(layer, bad, batch_size=4, progress=False, skip_nonfinite=True)
    whole = rc.collect_second_moment(layer, good, batch_size=4, progress=False)
    assert moment.skipped == 6 and whole.skipped == 0 and moment.count == whole.count == 34 * 256
    assert relative(moment.matrix(), whole.matrix()) < 1e-6
    moment.save(tmp_path / "moment.safetensors")
    loaded = rc.SecondMoment.load(tmp_path / "moment.safetensors")
    assert loaded.skipped == 6 and rc.SecondMoment(64).merge(loaded).merge(loaded.__class__(64)).skipped == 6


def test_the_bar_shows_rate_and_time_left(capsys, monkeypatch, layer, latents):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("tqdm.tqdm", functools.partial(tqdm.tqdm, mininterval=0))
    rc.collect_second_moment(layer, latents[:20], batch_size=2)
    shown = capsys.readouterr().err
    assert re.search(r"moment of layer5.conv: .*18/20 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+img/s, error [\d.]+%\]", shown)
    assert "nan" not in shown


def peak_memory(run):
    """The most resident memory, in bytes, that `run` adds to what there is, and what it returns."""

    def resident(name):
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests used and malloc kept would be used again, and not be seen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError as error:
        pytest.skip(f"the peak of the resident memory cannot be reset here ({error})")
    before = resident("VmRSS")
    result = run()
    return resident("VmHWM") - before, result


@pytest.mark.parametrize("with_keys", [False, True])
def test_memory_of_a_collection(tmp_path, monkeypatch, with_keys):
    """Under 3 C^2 doubles, files included; the activations are small here."""
    channels = 2048  # a matrix is larger than any block that malloc keeps for itself
    layer = rc.bind(torch.nn.Sequential(torch.nn.Conv2d(channels, 1, 1)), "0")
    latents = torch.randn(4096, channels, 1, 1, generator=torch.Generator().manual_seed(0))
    collect = functools.partial(
        rc.collect_second_moment,
        layer,
        latents,
        batch_size=256,
        progress=False,
        keys=latents[:2, :, 0, 0] if with_keys else None,
    )
    ticks = iter(range(0, 10**6, 100))
    monkeypatch.setattr(
        "rewrite_core.statistics.collection.time.monotonic", lambda: next(ticks)
    )  # a checkpoint after every batch
    rc.collect_second_moment(layer, latents[:2], checkpoint=tmp_path / "warm", progress=False)
    peak, moment = peak_memory(lambda: collect(checkpoint=tmp_path / "moment"))
    assert channels**2 * 4 <= peak < 3 * channels**2 * 8
    assert (moment.key_errors is not None) == with_keys
    del moment
    peak, _ = peak_memory(lambda: collect(checkpoint=tmp_path / "moment"))
    assert channels**2 * 4 <= peak < 3 * channels**2 * 8
