"""Collections that stop and go on."""

import functools
import os
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import DATA, PROGRAMS, relative
from helpers import small
from helpers.stand_in import Machine

import rewrite_core as rc
from rewrite_core.layers.fingerprints import tensor_fingerprint
from rewrite_core.statistics import collection


def test_several_layers_resume_from_files_that_are_not_equally_far(tmp_path, generator, latents, monkeypatch):
    """As a crash leaves them: some files written, others one checkpoint behind or finished."""
    layers = [rc.bind(generator, name) for name in ("layer5.conv", "layer2.conv", "layer4.conv")]
    paths = [tmp_path / f"{layer.name}.safetensors" for layer in layers]
    ticks = iter(range(0, 10**6, 100))
    monkeypatch.setattr("rewrite_core.statistics.collection.time.monotonic", lambda: next(ticks))
    bad = latents[:40].clone()
    for stop, path in ((12, paths[0]), (24, paths[2])):
        bad[stop:] = torch.nan
        with pytest.raises(rc.NonFiniteError):
            rc.collect_second_moments(layers, bad, batch_size=4, checkpoints=paths, progress=False)
        # a run of other latents: what counts is the state, which is given the name of the right ones
        saved, progress, _ = rc.SecondMoment._load(path)
        assert progress == {"done": stop, "batch_size": 4}
        saved.latents["fingerprint"] = tensor_fingerprint(latents[:40])
        for each in paths:
            each.unlink()
        saved._save(tmp_path / f"kept{stop}", progress, {})
        bad = latents[:40].clone()
    (tmp_path / "kept12").rename(paths[0])
    (tmp_path / "kept24").rename(paths[2])
    resumed = rc.collect_second_moments(layers, latents[:40], batch_size=4, checkpoints=paths, progress=False)
    for layer, moment, path in zip(layers, resumed, paths, strict=True):
        whole = rc.collect_second_moment(layer, latents[:40], batch_size=4, progress=False)
        assert torch.equal(moment.matrix(), whole.matrix()) and moment.count == whole.count
        assert torch.equal(rc.SecondMoment.load(path, layer).matrix(), whole.matrix())


@pytest.mark.parametrize("began_on_gpu", [True, False])
def test_a_checkpoint_goes_on_on_another_device(began_on_gpu, tmp_path, monkeypatch):
    """It holds no device, and the rest is added there, within the tolerance of docs/gpu.md. The GPU is not there:
    the reference's sums are in place of its kernel's."""
    monkeypatch.setattr(collection, "side_stream", lambda device: None)  # the stand-in has no streams
    ticks = iter(range(0, 10**6, 100))
    monkeypatch.setattr("rewrite_core.statistics.collection.time.monotonic", lambda: next(ticks))
    latents = torch.randn(24, *small.Z.shape[1:], generator=torch.Generator().manual_seed(3))
    path = tmp_path / "moment.safetensors"

    def collect(machine, stop=None, checkpoint=path):
        generator, passes = small.generator(), iter(range(100))
        layer = rc.bind(generator if machine is None else machine.move(generator), small.LAYER)

        def interrupt(*_):
            if next(passes) == stop:
                raise KeyboardInterrupt

        layer.generator.register_forward_pre_hook(interrupt)
        moment = rc.collect_second_moment(layer, latents, batch_size=4, checkpoint=checkpoint, progress=False)
        moment.check(layer, latents)
        return moment, next(passes)

    def on(gpu, **how):
        if not gpu:
            return collect(None, **how)
        with Machine() as machine:
            found = collect(machine, **how)
            assert "second_moment_kernel" in machine.kernels
            return found

    whole, passes = on(False, checkpoint=None)
    with pytest.raises(KeyboardInterrupt):
        on(began_on_gpu, stop=passes - 3)
    saved, progress, _ = rc.SecondMoment._load(path)
    assert 0 < progress["done"] < 24 and saved._sum.device.type == "cpu"
    resumed, rest = on(not began_on_gpu)
    assert rest < passes
    facts, wanted = resumed._facts(), whole._facts()
    assert facts.pop("spread") == pytest.approx(wanted.pop("spread"), rel=2e-6) and facts == wanted
    assert relative(resumed.matrix(), whole.matrix()) <= 2e-6
    assert torch.equal(rc.SecondMoment.load(path).matrix(), resumed.matrix())


def test_killed_collection_resumes_to_the_same_bits(tmp_path):
    """SIGKILL at random moments, again and again until it is through; compare with an uninterrupted run."""
    paths = [str(tmp_path / name) for name in ("five.safetensors", "two.safetensors")]
    command = [sys.executable, PROGRAMS / "killed_collection.py", *paths]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2  # kills that left a checkpoint
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in there: torch's sums depend on it in their last bits
    try:
        uninterrupted = runpy.run_path(PROGRAMS / "killed_collection.py")["collect"](None)
    finally:
        torch.set_num_threads(threads)
    for path, whole in zip(paths, uninterrupted, strict=True):
        resumed = rc.SecondMoment.load(path)
        assert torch.equal(resumed.matrix(), whole.matrix()) and resumed._facts() == whole._facts()
        assert resumed.standard_error == whole.standard_error <= 0.22 and 32 < whole.latents["used"] < 200
    assert torch.equal(resumed.key_errors, whole.key_errors) and whole.key_errors.max() <= 0.22


def test_checkpoints_that_are_done_or_of_something_else(tmp_path, generator, latents):
    layer, path = rc.bind(generator, "layer2.conv"), tmp_path / "checkpoint.safetensors"
    collect = functools.partial(rc.collect_second_moment, layer, progress=False, checkpoint=path, batch_size=4)
    whole = collect(latents[:60])
    assert torch.equal(collect(latents[:60]).matrix(), whole.matrix())
    with pytest.raises(rc.MismatchError, match="another layer, model or set"):
        collect(latents[:50])
    bad = latents[:40].clone()
    bad[20:] = torch.nan
    path.unlink()
    keys = torch.eye(64)[:2]
    with pytest.MonkeyPatch.context() as patch:
        ticks = iter(range(0, 10**6, 100))
        patch.setattr("rewrite_core.statistics.collection.time.monotonic", lambda: next(ticks))
        with pytest.raises(rc.NonFiniteError):
            collect(bad, keys=keys)
    with pytest.raises(rc.FileFormatError, match="unfinished"):
        rc.SecondMoment.load(path)
    for words, changed in (("batch size 4", {"batch_size": 5}), ("other keys", {"keys": 2 * keys})):
        with pytest.raises(rc.MismatchError, match=words):
            collect(bad, **({"keys": keys} | changed))
    with pytest.raises(rc.MismatchError, match="another layer, model or set"):
        rc.collect_second_moment(rc.bind(generator, "layer4.conv"), bad, batch_size=4, checkpoint=path, progress=False)
    with pytest.raises(rc.MismatchError, match="another layer, model or set"):
        collect(rc.sample_latents(64, 40, seed=2), keys=keys)
    with torch.no_grad():
        generator.layer1.conv.weight.mul_(1.01)
    with pytest.raises(rc.MismatchError, match="another layer, model or set"):
        collect(bad, keys=keys)
    with torch.no_grad():
        generator.layer1.conv.weight.copy_(rc.load_proggan(DATA / "proggan_state.npz").layer1.conv.weight)
    saved, _, state = rc.SecondMoment._load(path)
    for progress, other in (
        ({"done": 41, "batch_size": 4}, state),
        ({"done": 20, "batch_size": 4}, {"keys": keys.double()}),
    ):
        saved._save(path, progress, other)
        with pytest.raises(rc.FileFormatError):
            collect(bad, keys=keys)


def test_checkpoints_that_cannot_be(tmp_path, layer, generator, latents, monkeypatch):
    """Said before anything is computed."""
    monkeypatch.setattr(generator, "forward", None)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        rc.collect_second_moment(layer, latents, checkpoint=tmp_path / "none" / "checkpoint", progress=False)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    layers = [layer, rc.bind(generator, "layer4.conv")]
    for other in (tmp_path / "one", os.path.relpath(tmp_path / "one"), tmp_path / "link"):
        with pytest.raises(rc.RewriteCoreError, match="give each its own"):
            rc.collect_second_moments(layers, latents, checkpoints=[tmp_path / "one", other])


def test_a_collection_that_stopped_goes_on_when_more_is_asked(tmp_path, layer, latents):
    path = tmp_path / "checkpoint.safetensors"
    collect = functools.partial(rc.collect_second_moment, layer, latents, batch_size=4, checkpoint=path, progress=False)
    rough = collect(until=0.3)
    assert 32 <= rough.latents["used"] < 100 and rough.standard_error <= 0.3
    assert rough.count == rough.latents["used"] * 256
    assert torch.equal(rc.SecondMoment.load(path, layer).matrix(), rough.matrix())
    assert torch.equal(collect(until=0.3).matrix(), rough.matrix())
    whole = collect()
    assert whole.count == 200 * 256 and "used" not in whole.latents
    straight = rc.collect_second_moment(layer, latents, batch_size=4, progress=False)
    assert torch.equal(whole.matrix(), straight.matrix()) and whole.standard_error == straight.standard_error


def test_several_layers_go_on_from_where_each_stopped(tmp_path):
    """Places that no common batch begins at: no latent is left out, and none counts twice."""
    torch.manual_seed(0)
    generator = torch.nn.Sequential(
        torch.nn.Unflatten(1, (4, 1, 1)), torch.nn.Conv2d(4, 6, 1), torch.nn.Conv2d(6, 3, 1)
    )
    layers, z = [rc.bind(generator, name) for name in "12"], rc.sample_latents(4, 200, seed=1)
    paths = [tmp_path / name for name in "12"]
    for layer, path, batch_size, until in zip(layers, paths, (16, 5), (0.2, 0.9), strict=True):
        rc.collect_second_moment(layer, z, batch_size=batch_size, checkpoint=path, progress=False, until=until)
    used = [rc.SecondMoment.load(path).latents["used"] for path in paths]
    assert used[0] != used[1] and 64 not in used and max(used) < 200
    for moment, layer in zip(
        rc.collect_second_moments(layers, z, batch_size=64, checkpoints=paths, progress=False), layers
    ):
        whole = rc.collect_second_moment(layer, z, progress=False)
        assert moment.count == 200 and moment.latents == whole.latents
        assert relative(moment.matrix(), whole.matrix()) < 1e-6
