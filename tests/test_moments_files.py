"""Files of second moments."""

import struct

import numpy as np
import pytest
import torch
from conftest import DATA, relative
from torch import nn

import rewrite_core as rc
from rewrite_core.files import save_record
from rewrite_core.statistics.distributed import merge_files


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


def save_as_rome(path, keys, dtype=np.float32, name="mom2", more=None):
    """As the statistics of ROME, MEMIT and EasyEdit lie in their files: a sum and a count under a prefix, the name of
    the class that wrote them, and None as a NaN of its own."""
    null = np.array(struct.unpack(">d", struct.pack(">Q", 0xFFF8000000000002))[0])
    np.savez(
        path,
        **{
            f"{name}.constructor": "util.runningstats.SecondMoment()",
            f"{name}.count": len(keys),
            f"{name}.mom2": (keys.T @ keys).numpy().astype(dtype),
            "sample_size": null,
            **(more or {}),
        },
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_statistics_of_rome_and_easyedit(dtype, tmp_path):
    layer = rc.bind(nn.Sequential(nn.Linear(12, 5)), "0", forward=lambda g, z: g(z))
    keys = torch.randn(400, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 8
    wanted = keys.T @ keys / 400
    mean = {"mean.count": 400, "mean.batchcount": 4, "mean.mean": keys.mean(0).numpy(), "mean.data_shape": (12,)}
    for file, more in (("alone.npz", {}), ("with_mean.npz", mean)):
        save_as_rome(tmp_path / file, keys, dtype, more=more)
        moment = rc.SecondMoment.load(tmp_path / file, layer)
        assert (moment.count, moment.channels, moment.layer, moment.fingerprint) == (400, 12, None, None)
        assert relative(moment.matrix(), wanted) <= 2 * np.finfo(dtype).eps
    values = torch.randn(1, 5)
    change = rc.insert(layer, moment, keys[:1].float(), values)
    with change, torch.no_grad():
        assert torch.allclose(layer.generator(keys[:1].float()), values, atol=1e-4)
    with pytest.raises(rc.MismatchError, match="12 channels and '0' has 7"):
        rc.SecondMoment.load(tmp_path / "alone.npz", rc.bind(nn.Sequential(nn.Linear(7, 5)), "0"))
    merge_files([tmp_path / "alone.npz"]).save(tmp_path / "ours")
    assert torch.equal(
        rc.SecondMoment.load(tmp_path / "ours").matrix(), rc.SecondMoment.load(tmp_path / "alone.npz").matrix()
    )


def test_what_are_no_statistics_of_rome(tmp_path):
    keys = torch.randn(40, 3, dtype=torch.float64)
    for more, words in (
        ({"other.mom2": np.eye(3), "other.count": 3}, "several second moments"),
        ({"mom2.count": 0}, "does not hold the 'count'"),
        ({"mom2.mom2": -np.eye(3)}, "negative squares"),
        ({"mom2.mom2": np.eye(3)[:2]}, "finite"),
        ({"mom2.mom2": np.full((3, 3), np.nan)}, "finite"),
    ):
        save_as_rome(tmp_path / "s.npz", keys)
        with np.load(tmp_path / "s.npz") as arrays:
            content = dict(arrays)
        np.savez(tmp_path / "s.npz", **(content | more))
        with pytest.raises(rc.FileFormatError, match=words):
            rc.SecondMoment.load(tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", **{"mean.mean": np.zeros(3), "mean.count": 4})
    with pytest.raises(rc.FileFormatError, match=r"lacks the numbers 'mom2' and 'count', or 'mom2\.mom2'"):
        rc.SecondMoment.load(tmp_path / "s.npz")
