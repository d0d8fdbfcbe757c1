import ctypes
import functools
import gc
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm
from conftest import DATA

import rewrite_core as rc
from rewrite_core.files import save_record
from rewrite_core.layers.fingerprints import tensor_fingerprint
from rewrite_core.ops.spd_solve import DiagonalShiftWarning


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_golden_second_moment(golden, moment):
    assert moment.count == 200 * 16 * 16 and moment.layer == "layer5.conv"
    assert moment.matrix().dtype == torch.float64
    assert relative(moment.matrix(), golden["c_matrix"].double()) <= 1e-5


def test_solve_matches_inverse(moment):
    keys = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(moment.solve(keys), keys.double() @ torch.linalg.inv(moment.matrix()), rtol=1e-8)
    assert moment.solve(keys[0]).shape == (64,)


def test_kitchen_second_moment(tmp_path):
    with np.load(DATA / "kitchen_second_moment.npz") as kitchen:
        keys, solution = torch.tensor(kitchen["keys"]), torch.tensor(kitchen["solution"])
    moment = rc.SecondMoment.load(DATA / "kitchen_second_moment.npz")  # the layout of the reference's r2m.npz
    assert moment.count == 256000 and moment.channels == 512
    assert relative(moment.solve(keys.T).T, solution) <= 1e-9


def test_update_invalidates_the_factor():
    moment = rc.SecondMoment(4)
    moment.update(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)))
    before = moment.solve(torch.ones(4))
    moment.update(10 * torch.randn(50, 4, generator=torch.Generator().manual_seed(1)))
    assert not torch.allclose(before, moment.solve(torch.ones(4)))


def test_batching_and_merge_do_not_matter(layer, latents, moment):
    parts = [rc.collect_second_moment(layer, part, batch_size=7, progress=False) for part in latents.split(90)]
    total = parts[0]
    for part in parts[1:]:
        total.merge(part)
    assert total.count == moment.count
    assert relative(total.matrix(), moment.matrix()) < 1e-7  # float32 sums of other runs of keys


def test_forward_stops_at_the_layer(generator, latents):
    def never(*_):
        raise AssertionError("a layer after the bound one ran")

    for name, module in generator.named_modules():
        if name.startswith(("layer6", "output")) or name == "layer5.conv":
            module.register_forward_hook(never)
    rc.collect_second_moment(rc.bind(generator, "layer5.conv"), latents[:8], progress=False)


@pytest.mark.parametrize("names", [["layer5.conv", "layer2.conv", "layer4.conv"], ["layer2.conv"]])
def test_several_layers_in_one_pass(generator, latents, names):
    ran = []
    for name, module in generator.named_modules():
        if name.endswith("conv"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    layers = [rc.bind(generator, name) for name in names]
    together = rc.collect_second_moment(layers=layers, latents=latents[:20], batch_size=8, progress=False)
    ran.clear()
    again = rc.collect_second_moment(layers=layers, latents=latents[:20], batch_size=20, progress=False)
    last = max(int(name[5]) for name in names)
    # one pass for the batch, none for the fingerprints, and none beyond the deepest layer
    assert ran.count("layer1.conv") == 1 and f"layer{last}.conv" not in ran
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
    first, second = rc.collect_second_moment(layers=layers, latents=z, progress=False)
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
            rc.collect_second_moment(layers=layers, latents=latents[:4], progress=False)
    with pytest.raises(rc.RewriteCoreError, match="`checkpoint` is a list of as many"):
        rc.collect_second_moment(
            layers=[layer, rc.bind(generator, "layer4.conv")], latents=latents[:4], checkpoint="one.safetensors"
        )


def test_one_layer_or_several_by_name(layer, latents):
    for args, kwargs in (
        ((layer, latents), {"layers": [layer]}),
        (([layer], latents), {}),
        ((None, latents), {}),
        (("layer5.conv", latents), {}),
        ((), {"layers": layer, "latents": latents}),
        ((), {"layers": ["layer5.conv"], "latents": latents}),
    ):
        with pytest.raises(rc.RewriteCoreError, match=r"Give one bound layer, .* or a list of them by name, .*layers="):
            rc.collect_second_moment(*args, **kwargs)
    with pytest.raises(TypeError, match="latents must be a torch tensor"):
        rc.collect_second_moment(layers=[layer])
    (one,) = rc.collect_second_moment(layers=(layer,), latents=latents[:4], progress=False)
    assert torch.equal(one.matrix(), rc.collect_second_moment(layer, latents[:4], progress=False).matrix())
    for size in (0, -1, 2.5, "16", None):
        with pytest.raises(rc.RewriteCoreError, match="batch size of at least 1"):
            rc.collect_second_moment(layer, latents, size)
    with pytest.raises(rc.RewriteCoreError, match="at least one latent"):
        rc.collect_second_moment(layer, latents[:0])


def test_a_layer_that_is_never_reached(latents):
    generator = Overwriting()
    generator.forward = lambda z: generator.first(z[:, :, None, None])
    layers = [rc.bind(generator, name) for name in ("first", "second")]
    with pytest.raises(rc.UnknownLayerError, match="never reached 'second'"):
        rc.collect_second_moment(layers=layers, latents=torch.randn(3, 4), progress=False)


def test_several_layers_name_the_one_that_is_not_finite(generator, latents):
    bad = latents[:20].clone()
    bad[13] = torch.nan
    layers = [rc.bind(generator, name) for name in ("layer5.conv", "layer4.conv")]
    with pytest.raises(rc.NonFiniteError, match="'layer4.conv', batch 3 .*12 to 15"):
        rc.collect_second_moment(layers=layers, latents=bad, batch_size=4, progress=False)


def test_several_layers_resume_from_files_that_are_not_equally_far(tmp_path, generator, latents, monkeypatch):
    """As a crash leaves them: some files written, others one checkpoint behind or finished."""
    layers = [rc.bind(generator, name) for name in ("layer5.conv", "layer2.conv", "layer4.conv")]
    paths = [tmp_path / f"{layer.name}.safetensors" for layer in layers]
    ticks = iter(range(0, 10**6, 100))
    monkeypatch.setattr("rewrite_core.statistics.moments.time.monotonic", lambda: next(ticks))
    bad = latents[:40].clone()
    for stop, path in ((12, paths[0]), (24, paths[2])):
        bad[stop:] = torch.nan
        with pytest.raises(rc.NonFiniteError):
            rc.collect_second_moment(layers=layers, latents=bad, batch_size=4, checkpoint=paths, progress=False)
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
    resumed = rc.collect_second_moment(
        layers=layers, latents=latents[:40], batch_size=4, checkpoint=paths, progress=False
    )
    for layer, moment, path in zip(layers, resumed, paths, strict=True):
        whole = rc.collect_second_moment(layer, latents[:40], batch_size=4, progress=False)
        assert torch.equal(moment.matrix(), whole.matrix()) and moment.count == whole.count
        assert torch.equal(rc.SecondMoment.load(path, layer).matrix(), whole.matrix())


def test_save_and_load(tmp_path, layer, moment, latents):
    path = tmp_path / "moment.safetensors"
    moment.save(path)
    loaded = rc.SecondMoment.load(path, layer)
    assert torch.equal(loaded.matrix(), moment.matrix()) and loaded.fingerprint == moment.fingerprint
    assert loaded.latents["count"] == 200
    loaded.check(layer, latents)
    assert [p.name for p in tmp_path.iterdir()] == ["moment.safetensors"]


def test_a_moment_of_another_layer_or_model_is_refused(tmp_path, generator, moment, latents):
    path = tmp_path / "moment.safetensors"
    moment.save(path)
    with pytest.raises(rc.MismatchError, match="layer5.conv"):
        rc.SecondMoment.load(path, rc.bind(generator, "layer4.conv"))
    with pytest.raises(rc.MismatchError, match="channels"):
        rc.SecondMoment.load(path, rc.bind(generator, "layer7.conv"))
    with torch.no_grad():
        generator.layer2.conv.weight[0, 0, 0, 0] += 1
    with pytest.raises(rc.MismatchError, match="other weights"):
        moment.check(rc.bind(generator, "layer5.conv"), latents)


def test_edits_at_or_after_the_layer_leave_the_moment_valid(generator, moment, latents):
    with torch.no_grad():
        generator.layer5.conv.weight.mul_(2)
        generator.layer7.conv.weight.zero_()
    moment.check(rc.bind(generator, "layer5.conv"), latents)


def test_a_moment_of_an_earlier_version_says_so(layer, latents):
    moment = rc.collect_second_moment(layer, latents[:2], progress=False)
    moment.fingerprint = 32 * "0"
    with pytest.raises(rc.MismatchError, match="earlier version of rewrite_core"):
        moment.check(layer, latents)


def test_merge_refuses_other_layers(generator, moment, latents):
    other = rc.collect_second_moment(rc.bind(generator, "layer4.conv"), latents[:4], progress=False)
    with pytest.raises(rc.MismatchError, match="layer"):
        other.merge(moment)


def test_merging_many_shards(tmp_path, generator, latents):
    layer = rc.bind(generator, "layer2.conv")
    shards = [rc.collect_second_moment(layer, part, progress=False) for part in latents[:4].split(2)]
    total = rc.SecondMoment(64)
    for number in range(1500):
        shard = rc.SecondMoment(64)
        shard.update(torch.ones(1, 64))
        shard.latents = {"seed": number}
        total.merge(shard)
    for shard in shards:
        total.merge(shard)
    total.save(tmp_path / "moment.safetensors")
    loaded = rc.SecondMoment.load(tmp_path / "moment.safetensors")
    assert loaded.count == 1500 + sum(shard.count for shard in shards)
    assert [part["seed"] for part in loaded.latents["merged"]] == [*range(1500), None, None]
    assert loaded.latents["merged"][-1] == shards[1].latents


def test_merging_the_same_latents_twice_warns(generator, latents):
    layer = rc.bind(generator, "layer2.conv")
    shards = [rc.collect_second_moment(layer, part, progress=False) for part in latents[:6].split(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        total = rc.SecondMoment(64).merge(shards[0]).merge(shards[1])
    with pytest.warns(UserWarning, match="count twice"):
        total.merge(shards[1])
    with pytest.warns(UserWarning, match="count twice"):
        shards[2].merge(shards[2])


def test_a_merge_that_fails_changes_nothing(monkeypatch):
    def moment(layer, fingerprint):
        made = rc.SecondMoment(3, layer, fingerprint)
        made.update(torch.ones(2, 3))
        made.latents = {"fingerprint": "same"}
        return made

    def parts(of):
        return of.layer, of.fingerprint, of.latents, of.count, of._groups, of._spread, of.matrix().tolist()

    one, before = moment(None, "A"), parts(moment(None, "A"))
    with pytest.raises(rc.MismatchError, match="differ in fingerprint"):
        one.merge(moment("x", "B"))
    assert parts(one) == before
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="count twice"):
        warnings.simplefilter("error")
        one.merge(moment("x", "A"))
    assert parts(one) == before
    with pytest.raises(TypeError, match="merges with another, not with Tensor"):
        one.merge(torch.eye(3))

    def lost(*args, **kwargs):
        raise RuntimeError("connection lost")

    for name, value in {
        "is_initialized": lambda: True,
        "get_world_size": lambda group: 1,
        "get_backend": lambda group: "gloo",
        "all_gather_object": lambda facts, own, group: facts.__setitem__(slice(None), [own, own | {"latents": []}]),
        "all_reduce": lost,
    }.items():
        monkeypatch.setattr(torch.distributed, name, value)
    with pytest.raises(RuntimeError, match="connection lost"):
        one.all_reduce()
    assert parts(one) == before


def test_inference_mode_inside_and_outside(layer, latents, moment):
    with torch.inference_mode():
        total = rc.collect_second_moment(layer, latents[:100], batch_size=10, progress=False)
        total.solve(torch.ones(64))
    with pytest.warns(UserWarning, match="rank-deficient"):
        dead = rc.SecondMoment(3)
        with torch.inference_mode():
            dead.update(torch.ones(2, 3))
            dead.solve(torch.ones(3))
    assert dead.solve(torch.ones(3)).isfinite().all()
    assert total.solve(torch.ones(64)).isfinite().all()
    for batch in latents[100:150].split(10):
        total.update(layer.keys(batch))
    with torch.inference_mode():
        other = rc.collect_second_moment(layer, latents[150:], batch_size=10, progress=False)
    total.merge(other)
    assert torch.equal(total.matrix(), moment.matrix()) or relative(total.matrix(), moment.matrix()) < 1e-12
    assert total.count == moment.count


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


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_features_are_refused_and_change_nothing(value):
    moment = rc.SecondMoment(3)
    moment.update(torch.ones(2, 3, 4, 4))
    before = moment.matrix().clone()
    bad = torch.ones(2, 3, 4, 4)
    bad[1, 2, 3, 0] = value
    with pytest.raises(rc.NonFiniteError):
        moment.update(bad)
    assert torch.equal(moment.matrix(), before) and moment.count == 32


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


def test_nonfinite_rows_are_skipped_and_too_large_ones_are_not():
    moment = rc.SecondMoment(2)
    moment.update(torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [3.0, -torch.inf]]), skip_nonfinite=True)
    assert moment.count == 1 and moment.skipped == 2
    assert torch.equal(moment.matrix(), torch.tensor([[1.0, 2.0], [2.0, 4.0]]).double())
    with pytest.raises(rc.NonFiniteError, match="squares overflow"):
        moment.update(torch.tensor([[torch.nan, 1.0], [1e30, 1.0]]), skip_nonfinite=True)
    assert moment.count == 1 and moment.skipped == 2


@pytest.mark.parametrize("features", [torch.full((2, 3), 1e20), torch.full((2, 3), 1e200, dtype=torch.float64)])
def test_features_too_large_to_square_say_so(features):
    moment = rc.SecondMoment(3)
    with pytest.raises(rc.NonFiniteError, match=r"as large as 1e\+20+ and their squares overflow") as caught:
        moment.update(features)
    assert "NaN" not in str(caught.value) and moment.count == 0


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (5,), (2, 4, 3), (3, 4)])
def test_wrong_shapes(shape):
    with pytest.raises(rc.RewriteCoreError, match="takes features"):
        rc.SecondMoment(3).update(torch.ones(shape))


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ([[1.0, 2.0, 3.0]], "torch tensor, not list"),
        (np.ones((2, 3)), "torch tensor, not ndarray"),
        (torch.ones(2, 3, dtype=torch.int64), "int64, and must be float32"),
        (torch.ones(2, 3).bool(), "bool, and must be"),
        (torch.ones(2, 3).to_sparse(), "must be dense"),
    ],
)
def test_features_of_wrong_types(features, words):
    moment = rc.SecondMoment(3)
    with pytest.raises(TypeError, match=words):
        moment.update(features)
    assert moment.count == 0 and not moment._sum.any()


def test_nothing_but_zeros_and_nothing_at_all(layer, latents):
    moment = rc.SecondMoment(3)
    moment.update(torch.empty(0, 3))
    moment.update(torch.empty(2, 3, 0, 4))
    with pytest.raises(rc.RewriteCoreError, match="no keys yet"):
        moment.solve(torch.ones(3))
    moment.update(torch.zeros(5, 3))
    assert moment.count == 5 and not moment.matrix().any() and moment.standard_error != moment.standard_error
    with pytest.raises(rc.RewriteCoreError, match="not all zero"):
        moment.solve(torch.ones(3))
    moment = rc.collect_second_moment(layer, latents[:4] * torch.nan, progress=False, skip_nonfinite=True)
    assert (moment.count, moment.skipped) == (0, 4) and moment.fingerprint is not None
    with pytest.raises(rc.RewriteCoreError, match="all 4 images were left out"):
        moment.matrix()


def test_the_bar_shows_rate_and_time_left(capsys, monkeypatch, layer, latents):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("tqdm.tqdm", functools.partial(tqdm.tqdm, mininterval=0))
    rc.collect_second_moment(layer, latents[:20], batch_size=2)
    shown = capsys.readouterr().err
    assert re.search(r"moment of layer5.conv: .*18/20 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+img/s, error [\d.]+%\]", shown)
    assert "nan" not in shown


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5, 6), (4, 3, 0)])
def test_maps_of_any_number_of_axes(shape):
    features = torch.randn(shape)
    moment = rc.SecondMoment(3)
    moment.update(features.transpose(0, 1).contiguous().transpose(0, 1))
    rows = features.movedim(1, -1).reshape(-1, 3).double()
    assert moment.count == len(rows)
    assert torch.allclose(moment._sum, rows.T @ rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [0, -1, 2.5, "3", None])
def test_channels_are_a_number(channels):
    with pytest.raises(rc.RewriteCoreError, match="number of channels must be an integer of at least 1"):
        rc.SecondMoment(channels)
    assert rc.SecondMoment(np.int64(3)).channels == 3


def test_keys_and_features_that_are_no_plain_tensor():
    moment = rc.SecondMoment(2)
    nested = torch.nested.nested_tensor([torch.ones(2, 2), torch.ones(3, 2)])
    moment.update(torch.eye(2))
    for keys, words in (([1.0, 2.0], "not list"), (np.ones(2), "not ndarray"), (nested, "not a nested one")):
        with pytest.raises(TypeError, match=f"Keys must be a plain torch tensor, {words}"):
            moment.solve(keys)
    with pytest.raises(TypeError, match="not a nested one"):
        moment.update(nested)


def test_an_empty_moment_says_so():
    with pytest.raises(rc.RewriteCoreError, match="no keys yet"):
        rc.SecondMoment(3).matrix()


def test_truncated_and_foreign_files(tmp_path, moment):
    path = tmp_path / "moment.safetensors"
    moment.save(path)
    data = path.read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:size])
        with pytest.raises(rc.FileFormatError, match="truncated"):
            rc.SecondMoment.load(tmp_path / "cut.safetensors")
    from safetensors.torch import save_file

    save_file({"sum": torch.eye(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(rc.FileFormatError, match="foreign"):
        rc.SecondMoment.load(tmp_path / "foreign.safetensors")
    np.savez(tmp_path / "foreign.npz", a=np.ones(3))
    with pytest.raises(rc.FileFormatError, match="r2m"):
        rc.SecondMoment.load(tmp_path / "foreign.npz")
    for wrong in (
        {"mom2": np.array([["a", "b"], ["c", "d"]])},
        {"mom2": 1j * np.eye(2)},
        {"mom2": np.zeros((0, 0))},
        {"mom2": np.eye(2), "count": np.array([3, 4])},
        {"mom2": np.eye(2), "count": 0},
    ):
        np.savez(tmp_path / "foreign.npz", **({"count": 3} | wrong))
        with pytest.raises(rc.FileFormatError, match="foreign.npz"):
            rc.SecondMoment.load(tmp_path / "foreign.npz")
    with pytest.raises(FileNotFoundError):
        rc.SecondMoment.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (["count"], "no JSON object but a list"),
        ({"count": True}, "no finite sum with its count"),
        ({"count": 3, "skipped": -1}, "no finite sum with its count"),
        ({"count": 3, "layer": 5}, "wrong types"),
        ({"count": 3, "latents": ["a"]}, "wrong types"),
        ({"count": 3, "progress": ["a"]}, "wrong types"),
        ({"count": 3, "progress": {"done": 3}}, "wrong types"),
        ({"count": 3, "progress": {"done": "3", "batch_size": 3}}, "wrong types"),
    ],
)
def test_files_with_impossible_metadata(tmp_path, metadata, words):
    path = tmp_path / "moment.safetensors"
    save_record(path, "second_moment", 1, {"sum": torch.eye(3).double()}, metadata)
    with pytest.raises(rc.FileFormatError, match=words):
        rc.SecondMoment.load(path)
    save_record(path, "second_moment", 1, {"sum": torch.zeros(0, 0).double()}, {"count": 3})
    with pytest.raises(rc.FileFormatError, match="no float64"):
        rc.SecondMoment.load(path)


def test_files_are_told_apart_by_content(tmp_path, layer, moment, latents):
    moment.save(tmp_path / "moment.npz")
    assert torch.equal(rc.SecondMoment.load(tmp_path / "moment.npz", layer).matrix(), moment.matrix())
    (tmp_path / "r2m").write_bytes((DATA / "kitchen_second_moment.npz").read_bytes())
    assert rc.SecondMoment.load(tmp_path / "r2m").count == 256000
    whole = rc.collect_second_moment(layer, latents[:8], checkpoint=tmp_path / "checkpoint.npz", progress=False)
    again = rc.collect_second_moment(layer, latents[:8], checkpoint=tmp_path / "checkpoint.npz", progress=False)
    assert torch.equal(again.matrix(), whole.matrix())


KINDS = {
    "centred": lambda normals: normals,
    "mean": lambda normals: normals.add_(1000),
    "scales": lambda normals: normals.mul_(torch.tensor([1e-6, 1.0, 1e6, 1e-2])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ten_million_keys_in_one_batch_and_in_ten_thousand(kind):
    rows = torch.randn(10_000_000, 4, generator=torch.Generator().manual_seed(6))
    rows[:, 3] += 0.5 * rows[:, 0]
    rows = KINDS[kind](rows)
    exact = sum(part.T @ part for part in (piece.double() for piece in rows.split(1_000_000))) / len(rows)
    scale = exact.diagonal().sqrt()
    once, often = rc.SecondMoment(4), rc.SecondMoment(4)
    once.update(rows.view(100, 250, 400, 4).permute(0, 3, 1, 2))
    for piece in rows.split(1000):
        often.update(piece)
    for moment in (once, often):
        assert moment.count == 10_000_000 and relative(moment.matrix(), exact) <= 1e-6
        assert ((moment.matrix() - exact).abs() / torch.outer(scale, scale)).max() <= 1e-6


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
        rc.collect_second_moment, layer, latents, 256, progress=False, keys=latents[:2, :, 0, 0] if with_keys else None
    )
    ticks = iter(range(0, 10**6, 100))
    monkeypatch.setattr(
        "rewrite_core.statistics.moments.time.monotonic", lambda: next(ticks)
    )  # a checkpoint after every batch
    rc.collect_second_moment(layer, latents[:2], checkpoint=tmp_path / "warm", progress=False)
    peak, moment = peak_memory(lambda: collect(checkpoint=tmp_path / "moment"))
    assert channels**2 * 4 <= peak < 3 * channels**2 * 8
    assert (moment.key_errors is not None) == with_keys
    del moment
    peak, _ = peak_memory(lambda: collect(checkpoint=tmp_path / "moment"))
    assert channels**2 * 4 <= peak < 3 * channels**2 * 8


def test_a_failed_save_harms_nothing(tmp_path, moment, monkeypatch):
    path = tmp_path / "moment.safetensors"
    moment.save(path)
    before = path.read_bytes()
    import rewrite_core.files as files

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        moment.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError, match="no folder"):
        moment.save(tmp_path / "nowhere" / "moment.safetensors")


KILLED = """
import os, random, signal, sys, time
from types import SimpleNamespace
sys.path[:0] = [sys.argv[1]]
import torch
torch.set_num_threads(1)  # no threads that a fork would lose
import rewrite_core as rc, rewrite_core.statistics.moments as moments
from test_moments import killed_collection

ticks = iter(range(0, 10**9, 100))
moments.time = SimpleNamespace(monotonic=lambda: next(ticks))  # a checkpoint after every batch
run_to = moments.run_to
moments.run_to = lambda *args: (time.sleep(0.01), run_to(*args))  # time to be killed in
random.seed(0)
for name in (".warm", ".whole"):  # the first call of all is slow
    start = time.perf_counter()
    killed_collection([path + name for path in sys.argv[2:]])
    seconds = time.perf_counter() - start
kills = 0
for attempt in range(100):
    child = os.fork()
    if not child:
        killed_collection(sys.argv[2:])
        os._exit(0)
    time.sleep(random.uniform(0.03, 0.1) * (attempt + 2) * seconds)  # longer and longer, so it ends
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    kills += os.path.exists(sys.argv[2])
print(kills, flush=True)
"""


def killed_collection(checkpoint):
    """Two layers, keys for the second, and an end before the latents'."""
    generator = rc.load_proggan(DATA / "proggan_state.npz")
    layers = [rc.bind(generator, name) for name in ("layer5.conv", "layer2.conv")]
    keys = [None, torch.eye(64)[:2]]
    return rc.collect_second_moment(
        layers=layers,
        latents=rc.sample_latents(64, 200),
        batch_size=4,
        checkpoint=checkpoint,
        progress=False,
        until=0.22,
        keys=keys,
    )


def test_killed_collection_resumes_to_the_same_bits(tmp_path):
    """SIGKILL at random moments, again and again until it is through; compare with an uninterrupted run."""
    paths = [str(tmp_path / name) for name in ("five.safetensors", "two.safetensors")]
    command = [sys.executable, "-c", KILLED, os.path.dirname(__file__), *paths]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2  # kills that left a checkpoint
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in there: torch's sums depend on it in their last bits
    try:
        uninterrupted = killed_collection(None)
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
        patch.setattr("rewrite_core.statistics.moments.time.monotonic", lambda: next(ticks))
        with pytest.raises(rc.NonFiniteError):
            collect(bad, keys=keys)
    with pytest.raises(rc.FileFormatError, match="unfinished"):
        rc.SecondMoment.load(path)
    for words, changed in (("batch size 4", {"batch_size": 5}), ("other keys", {"keys": 2 * keys})):
        with pytest.raises(rc.MismatchError, match=words):
            collect(bad, **({"keys": keys} | changed))
    with pytest.raises(rc.MismatchError, match="another layer, model or set"):
        rc.collect_second_moment(rc.bind(generator, "layer4.conv"), bad, 4, path, progress=False)
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
            rc.collect_second_moment(layers=layers, latents=latents, checkpoint=[tmp_path / "one", other])


def test_a_collection_that_stopped_goes_on_when_more_is_asked(tmp_path, layer, latents):
    path = tmp_path / "checkpoint.safetensors"
    collect = functools.partial(rc.collect_second_moment, layer, latents, 4, path, progress=False)
    rough = collect(until=0.3)
    assert 32 <= rough.latents["used"] < 100 and rough.standard_error <= 0.3
    assert rough.count == rough.latents["used"] * 256
    assert torch.equal(rc.SecondMoment.load(path, layer).matrix(), rough.matrix())
    assert torch.equal(collect(until=0.3).matrix(), rough.matrix())
    whole = collect()
    assert whole.count == 200 * 256 and "used" not in whole.latents
    straight = rc.collect_second_moment(layer, latents, 4, progress=False)
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
        rc.collect_second_moment(layer, z, batch_size, path, progress=False, until=until)
    used = [rc.SecondMoment.load(path).latents["used"] for path in paths]
    assert used[0] != used[1] and 64 not in used and max(used) < 200
    for moment, layer in zip(
        rc.collect_second_moment(layers=layers, latents=z, batch_size=64, checkpoint=paths, progress=False), layers
    ):
        whole = rc.collect_second_moment(layer, z, progress=False)
        assert moment.count == 200 and moment.latents == whole.latents
        assert relative(moment.matrix(), whole.matrix()) < 1e-6


class Scaled(torch.nn.Module):
    """Latents [N, 6] -> maps [N, 6, 4, 4] of correlated keys, whose size differs from image to image."""

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.mixing = torch.nn.Parameter(torch.randn(6, 6, generator=random) + 3 * torch.eye(6))
        self.pixels = torch.nn.Parameter(torch.randn(16, 6, generator=random))
        self.conv = torch.nn.Conv2d(6, 3, 1)

    def forward(self, z):
        maps = z[:, None, :] * (1 + 0.3 * self.pixels)  # the same latent in all positions of a map
        return self.conv((maps @ self.mixing).mT.unflatten(2, (4, 4)))


@pytest.mark.parametrize("batch_size", [5, 7])
def test_standard_errors_are_what_repeated_collections_show(batch_size):
    """The error said against the error made, in the root mean square over independent collections."""
    layer = rc.bind(Scaled(), "conv")
    random = torch.Generator().manual_seed(1)
    keys = torch.eye(6)[:3]
    spatial = 1 + 0.3 * layer.generator.pixels.detach().double()
    mixing = layer.generator.mixing.detach().double()
    truth = mixing.T @ ((spatial.T @ spatial / 16) * torch.eye(6)) @ mixing  # E z z^T is the identity
    said, made, said_keys, made_keys = [], [], [], []
    for _ in range(60):
        z = torch.randn(320, 6, generator=random)
        moment = rc.collect_second_moment(layer, z, batch_size, progress=False, keys=keys)
        said.append(moment.standard_error)
        made.append(relative(moment.matrix(), truth))
        exact = torch.linalg.solve(truth, keys.double().T).T
        said_keys.append(moment.key_errors)
        made_keys.append((moment.solve(keys) - exact).norm(dim=1) / exact.norm(dim=1))

    def rms(values):
        return torch.as_tensor(np.array(values)).square().mean(0).sqrt()

    assert rms(said) == pytest.approx(rms(made).item(), rel=0.15)
    assert np.std(said) < 0.3 * np.mean(said)
    assert torch.allclose(rms(said_keys), rms(made_keys), rtol=0.25), (rms(said_keys), rms(made_keys))


def test_until_stops_at_the_error_that_was_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    layer, z = rc.bind(Scaled(), "conv"), torch.randn(4000, 6, generator=torch.Generator().manual_seed(2))
    moment = rc.collect_second_moment(layer, z, 10, until=0.1)
    used = moment.latents["used"]
    assert moment.standard_error <= 0.1 and moment.count == used * 16 and "error" in capsys.readouterr().err
    assert rc.collect_second_moment(layer, z[: used - 10], 10, progress=False).standard_error > 0.1
    one = rc.collect_second_moment(layer, z, 10, progress=False, until=0.1, keys=torch.eye(6)[0])
    assert one.key_errors.shape == (1,) and one.key_errors.max() <= 0.1
    several = rc.collect_second_moment(layer, z, 10, progress=False, until=0.1, keys=torch.eye(6))
    assert used <= one.latents["used"] <= several.latents["used"] < 4000
    tight = rc.collect_second_moment(layer, z, 10, progress=False, until=0.04, keys=torch.eye(6)[0])
    assert tight.key_errors.max() <= 0.04 and tight.standard_error <= 0.04 and tight.latents["used"] > 4 * used
    with pytest.raises(rc.RewriteCoreError, match="`until`"):
        rc.collect_second_moment(layer, z, until=0)
    for keys, words in (
        (torch.ones(2, 5), "rows"),
        (torch.zeros(2, 6), "only zeros"),
        (torch.full((6,), torch.nan), "NaN"),
    ):
        with pytest.raises(rc.RewriteCoreError, match=words):
            rc.collect_second_moment(layer, z, keys=keys, progress=False)


def test_errors_survive_files_and_merges(tmp_path):
    layer, z = rc.bind(Scaled(), "conv"), torch.randn(400, 6, generator=torch.Generator().manual_seed(3))
    whole = rc.collect_second_moment(layer, z, 10, progress=False, keys=torch.eye(6))
    left, right = (rc.collect_second_moment(layer, part, 10, progress=False) for part in z.split(200))
    assert left.merge(right).standard_error == pytest.approx(whole.standard_error, rel=1e-9)
    whole.save(tmp_path / "moment")
    loaded = rc.SecondMoment.load(tmp_path / "moment")
    assert loaded.standard_error == whole.standard_error and torch.equal(loaded.key_errors, whole.key_errors)
    loaded.update(torch.ones(1, 6))
    assert loaded.key_errors is None and loaded.standard_error > 0
    unknown = rc.SecondMoment.load(DATA / "kitchen_second_moment.npz")
    unknown.save(tmp_path / "moment")
    for moment in (unknown, rc.SecondMoment.load(tmp_path / "moment"), rc.SecondMoment(3)):
        assert np.isnan(moment.standard_error)
    known = rc.SecondMoment(512)
    for _ in range(3):
        known.update(torch.ones(2, 512))
    assert known.standard_error == 0 and np.isnan(known.merge(unknown).standard_error)


def test_dead_channels_have_errors_too():
    features = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    features[:, 2] = 0
    generator = torch.nn.Sequential(torch.nn.Conv2d(4, 3, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moment = rc.collect_second_moment(
            rc.bind(generator, "0"), features[:, :, None, None], progress=False, keys=torch.eye(4)[:2]
        )
    assert ((moment.key_errors > 0.01) & (moment.key_errors < 0.2)).all()


REDUCED = """
import os, sys, warnings
sys.path[:0] = [sys.argv[1]]
import pytest, torch, torch.distributed as dist, rewrite_core as rc
from conftest import DATA
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)
generator = rc.load_proggan(DATA / "proggan_state.npz")
layer, latents = rc.bind(generator, "layer5.conv"), rc.sample_latents(64, 80).split(40)

def collect(layer, latents):
    return rc.collect_second_moment(layer, latents, batch_size=8, progress=False, skip_nonfinite=True)

mine = latents[rank].clone()
mine[7, rank] = torch.nan
with warnings.catch_warnings():
    warnings.simplefilter("error")
    collect(layer, mine).all_reduce().save(sys.argv[4 + rank])
for other, words in (
    (rc.SecondMoment(64 + rank), "channels"),
    (collect(rc.bind(generator, f"layer{4 + rank}.conv"), latents[0][:4]), "layer"),
):
    with pytest.raises(rc.MismatchError, match=f"differ in {words}"):
        other.all_reduce()
with torch.no_grad():
    generator.layer2.conv.weight.mul_(1 + rank)
with pytest.raises(rc.MismatchError, match="fingerprint"):
    collect(layer, latents[0][:4]).all_reduce()
with torch.no_grad():
    generator.layer2.conv.weight.div_(1 + rank)
with pytest.warns(UserWarning, match="count twice"):
    collect(layer, latents[0][:4]).all_reduce()
dist.destroy_process_group()
os._exit(0)  # gloo's threads now and then abort the interpreter's own way out
"""


def test_all_reduce_over_two_processes(tmp_path, layer):
    sums = [tmp_path / f"{rank}.safetensors" for rank in range(2)]
    args = [os.path.dirname(__file__), *map(str, (tmp_path / "store", *sums))]
    children = [
        subprocess.Popen([sys.executable, "-c", REDUCED, args[0], str(rank), *args[1:]], cwd=tmp_path)
        for rank in range(2)
    ]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    latents = rc.sample_latents(64, 80)
    latents[7, 0] = latents[47, 1] = torch.nan
    single = rc.collect_second_moment(layer, latents, batch_size=8, progress=False, skip_nonfinite=True)
    for path in sums:
        total = rc.SecondMoment.load(path, layer)
        assert relative(total.matrix(), single.matrix()) < 1e-12
        assert total.count == single.count == 78 * 256 and total.skipped == 2
        assert total.standard_error == pytest.approx(single.standard_error, rel=1e-9)
        assert total.fingerprint == single.fingerprint
        assert [part["count"] for part in total.latents["merged"]] == [40, 40]


def test_all_reduce_without_a_group():
    with pytest.raises(rc.RewriteCoreError, match="init_process_group"):
        rc.SecondMoment(3).all_reduce()


def test_fewer_keys_than_channels_are_noticed():
    """Rounding leaves such a C positive definite, by luck; its factor would hold nothing else."""
    for seed in range(8):
        keys = torch.randn(63, 64, generator=torch.Generator().manual_seed(seed))
        moment = rc.SecondMoment(64)
        moment.update(keys)
        with pytest.warns(DiagonalShiftWarning, match="rank-deficient"):
            assert 0 < moment.factor.shift < 1e-5
        directions = rc.context_directions(moment, keys[:8], rank=3)
        torch.testing.assert_close(directions @ directions.T, torch.eye(3, dtype=directions.dtype))


def test_a_channel_that_is_the_sum_of_others_is_noticed():
    """Where float32 rounding leaves no more of it than rounding usually does."""
    noticed = 0
    for seed in range(8):
        keys = torch.randn(1000, 64, generator=torch.Generator().manual_seed(seed))
        keys[:, 5] = keys[:, :5].sum(1)
        moment = rc.SecondMoment(64)
        moment.update(keys)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            noticed += bool(moment.factor.shift > 0)
        assert [warning.category for warning in caught] in ([], [DiagonalShiftWarning])
    assert noticed >= 6


def test_float64_keys_are_as_good_as_their_own_rounding(tmp_path):
    """Nothing of float32's rounding is in their sum: neither where it is saved nor where such sums are merged."""
    keys = torch.randn(4000, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys[:, 1] = keys[:, 0] + 1e-4 * keys[:, 1]
    moment = rc.SecondMoment(16)
    moment.update(keys)
    moment.save(tmp_path / "moment.safetensors")
    for same in (moment, rc.SecondMoment.load(tmp_path / "moment.safetensors"), rc.SecondMoment(16).merge(moment)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same.factor.shift == 0
    rough = rc.SecondMoment(16)
    rough.update(keys.float())
    with pytest.warns(DiagonalShiftWarning):
        assert rough.merge(moment).factor.shift > 0


def test_groups_have_the_rank_of_all_their_keys():
    moment = rc.SecondMoment(64)
    moment.update(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert moment.within_groups(16).factor.shift == 0
    with pytest.warns(DiagonalShiftWarning):
        assert moment.factor.shift > 0


def test_a_large_mean_needs_no_shift():
    moment = rc.SecondMoment(32)
    moment.update(1000 + torch.randn(4000, 32, generator=torch.Generator().manual_seed(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert moment.factor.shift == 0
