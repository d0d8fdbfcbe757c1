"""The second moment itself: updates, solving, merging, over processes too."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import DATA, PROGRAMS, relative

import rewrite_core as rc
from rewrite_core.errors import DiagonalShiftWarning


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
        return of.layer, of.fingerprint, of.latents, of.count, of._updates, of._spread, of.matrix().tolist()

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


def test_nonfinite_rows_are_skipped_and_too_large_ones_are_not():
    moment = rc.SecondMoment(2)
    moment.update(torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [3.0, -torch.inf]]), skip_nonfinite=True)
    assert moment.count == 1 and moment.skipped == 2
    assert torch.equal(moment.matrix(), torch.tensor([[1.0, 2.0], [2.0, 4.0]]).double())
    with pytest.raises(rc.NonFiniteError, match="squares overflow"):
        moment.update(torch.tensor([[torch.nan, 1.0], *[[1e30, 1.0]] * 32]), skip_nonfinite=True)
    assert moment.count == 1 and moment.skipped == 2


@pytest.mark.parametrize("features", [torch.full((32, 3), 1e20), torch.full((2, 3), 1e200, dtype=torch.float64)])
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


def test_all_reduce_over_two_processes(tmp_path, layer):
    sums = [tmp_path / f"{rank}.safetensors" for rank in range(2)]
    children = [
        subprocess.Popen(
            [sys.executable, PROGRAMS / "all_reduce.py", str(rank), tmp_path / "store", *sums], cwd=tmp_path
        )
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
        assert not moment.within_groups(16).factor.shift.any()
    with pytest.warns(DiagonalShiftWarning):
        assert moment.factor.shift > 0


def test_a_large_mean_needs_no_shift():
    moment = rc.SecondMoment(32)
    moment.update(1000 + torch.randn(4000, 32, generator=torch.Generator().manual_seed(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert moment.factor.shift == 0


def test_a_moment_elsewhere_leaves_this_one():
    moment = rc.SecondMoment(4, "layer", "print")
    moment.update(torch.randn(20, 4))
    moment.latents["seed"] = 1
    before = moment.matrix()
    assert moment.to("cpu") is moment
    moved = moment.to("meta")  # any other device
    assert moved._sum.is_meta and (moved.count, moved.layer, moved.latents) == (20, "layer", {"seed": 1})
    moved.latents["seed"], moved.count = 2, 0
    assert torch.equal(moment.matrix(), before) and moment.latents == {"seed": 1}
    with pytest.raises(rc.ArgumentError, match="'nowhere' is no device of this machine"):
        moment.to("nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(rc.ArgumentError, match="no device of this machine"):
            moment.to("cuda")
