"""Second moments within groups of channels, as grouped and depthwise convolutions need them."""

from __future__ import annotations

import pytest
import torch
from torch import library, nn

import rewrite_core as rc
from rewrite_core import ops
from rewrite_core.ops.second_moment_op.register import run_cpp
from rewrite_core.statistics import blocks
from rewrite_core.statistics.standard_errors import KeyErrors

Z = rc.sample_latents(16, 48, seed=2)


def generator(groups, channels=24):
    torch.manual_seed(0)
    first = nn.ConvTranspose2d(16, channels, 8)
    edited = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
    return nn.Sequential(nn.Unflatten(1, (16, 1, 1)), first, nn.ReLU(), edited, nn.ReLU()).eval()


def layer_of(groups, channels=24):
    return rc.bind(generator(groups, channels), "3")


def rows_of(layer, latents):
    return layer.keys(latents).double().movedim(1, -1).flatten(0, 2)


def exact(rows, groups):
    """The sums within groups of rows [n, C], float64 [G, C/G, C/G]."""
    own = rows.double().unflatten(1, (groups, -1))
    return torch.einsum("ngi,ngj->gij", own, own)


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


# --- the operation

SHAPES = [(16, 16), (7, 7), (40, 20), (30, 10), (64, 16), (35, 7), (48, 8), (21, 3), (96, 6), (64, 2)]


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_groups_are_the_blocks_of_the_whole(isa, dtype):
    torch.manual_seed(0)
    for channels, groups in SHAPES:
        for shape in ((3, channels, 5, 7), (2, channels, 32, 33), (1, channels, 1, 1), (20, channels)):
            features = torch.randn(shape).to(dtype)
            for given in (features, features.movedim(1, -1).contiguous().movedim(-1, 1)):
                out = torch.ones(groups, channels // groups, channels // groups, dtype=torch.float64)
                try:
                    run_cpp(given, out, isa=isa, groups=groups)
                except ValueError:
                    pytest.skip(f"this CPU has no {isa}")
                wanted = 1 + exact(features.movedim(1, -1).reshape(-1, channels), groups)
                assert relative(out, wanted) < (1e-14 if dtype == torch.float64 else 1e-6)
                assert torch.equal(out, out.mT)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_nan_stays_in_its_row_and_column(backend):
    features = torch.randn(2, 12, 9, 9)
    features[1, 5, 2, 3] = torch.nan
    found = ops.second_moment(features, backend=backend, groups=4).isnan()
    wanted = torch.zeros(4, 3, 3, dtype=torch.bool)
    wanted[1, 2], wanted[1, :, 2] = True, True
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("channels", "groups"), [(64, 64), (6, 2), (96, 4), (160, 10)])
def test_the_bits_are_the_same_for_any_number_of_threads(channels, groups):
    features, threads = torch.randn(3, channels, 60, 61), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(ops.second_moment(features, groups=groups))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_operator_is_torchs():
    features = torch.randn(2, 6, 3, 3)
    library.opcheck(torch.ops.rewrite_core.second_moment.default, (features, "auto", "x3", 3))
    out = torch.zeros(3, 2, 2, dtype=torch.float64)
    assert ops.second_moment(features, out=out, groups=3) is out
    assert torch.equal(out, ops.second_moment(features, groups=3))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"groups": 4}, "6 channels do not fall into 4 groups"),
        ({"groups": 0}, "groups must be an integer of at least 1"),
        ({"groups": 3, "out": torch.zeros(6, 6, dtype=torch.float64)}, r"contiguous \[3, 2, 2\] tensor"),
    ],
)
def test_what_is_refused(given, words):
    with pytest.raises(rc.RewriteCoreError, match=words):
        ops.second_moment(torch.randn(2, 6, 3, 3), **given)


# --- moments


@pytest.mark.parametrize("groups", [1, 3, 8, 24])
def test_a_collection_is_of_the_layers_groups(groups):
    layer = layer_of(groups)
    moment = rc.collect_second_moment(layer, Z, progress=False)
    rows = rows_of(layer, Z)
    assert (moment.groups, moment.channels, moment.count) == (groups, 24, len(rows))
    wanted = exact(rows, groups) / len(rows)
    assert relative(moment.blocks().reshape(wanted.shape), wanted) < 1e-6
    assert torch.equal(moment.matrix(), torch.block_diag(*moment.blocks().reshape(wanted.shape)))
    keys = rows[::100]
    solved = torch.cat([torch.linalg.solve(block, part.T).T for block, part in zip(wanted, keys.chunk(groups, 1))], 1)
    assert relative(moment.solve(keys), solved) < 1e-4
    assert moment.solve(keys[0]).shape == (24,)


def test_thousands_of_channels_take_a_number_each():
    moment = rc.SecondMoment(4096, groups=4096)
    moment.update(torch.randn(2, 4096, 4, 4))
    assert moment._sum.numel() == 4096 and moment.solve(torch.ones(3, 4096)).shape == (3, 4096)


def test_a_group_that_is_never_alight_is_told_of_and_solved_around():
    torch.manual_seed(0)
    keys = torch.randn(100, 12)
    keys[:, 4:6] = 0
    moment = rc.SecondMoment(12, groups=6)
    moment.update(keys)
    with pytest.warns(rc.DiagonalShiftWarning, match="1 of 6 groups"):
        found = moment.solve(keys[:5])
    others = [*range(4), *range(6, 12)]
    alone = rc.SecondMoment(10, groups=5)
    alone.update(keys[:, others])
    assert torch.allclose(found[:, others], alone.solve(keys[:5, others])) and not found[:, 4:6].any()


@pytest.mark.parametrize("directions", ["whitened", "svd", "mean", "units"])
def test_directions_are_those_of_the_matrix_with_zeros(directions):
    torch.manual_seed(0)
    keys = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    own, whole = rc.SecondMoment(12, groups=4), rc.SecondMoment(12)
    own.update(keys)
    whole._sum, whole.count, whole._wide = own.matrix() * own.count, own.count, True
    rank = 1 if directions == "mean" else 3
    found, wanted = (rc.context_directions(m, keys[:9], None, rank, directions) for m in (own, whole))
    assert torch.allclose(found, wanted, atol=1e-8)


def test_errors_of_keys_are_those_of_the_matrix_with_zeros():
    torch.manual_seed(0)
    keys, found = torch.randn(3, 12, dtype=torch.float64), []
    batches = [exact(torch.randn(50, 12, dtype=torch.float64), 4) for _ in range(32)]
    for form in (lambda part: part, blocks.whole):
        errors, total = KeyErrors(keys, 12), form(torch.zeros(4, 3, 3, dtype=torch.float64)).clone()
        for number, part in enumerate(batches, 1):
            total += form(part)
            errors.count(errors.add(form(part)), 50)
            last = errors.errors(total, 50 * number, 0.0)
        found.append(last)
    assert found[0] is not None and torch.allclose(found[0], found[1], rtol=1e-8)


def test_until_looks_at_the_groups():
    moment = rc.collect_second_moment(layer_of(24), Z, progress=False, batch_size=2, until=0.5, keys=torch.randn(2, 24))
    assert moment.key_errors.isfinite().all() and moment.standard_error <= 0.5


# --- whole moments of grouped layers, which earlier versions made


def whole_of(layer, latents):
    moment = rc.SecondMoment(layer.in_channels, layer.name, layer.fingerprint(latents))
    for batch in latents.split(16):
        moment.update(layer.keys(batch))
    return moment


def test_a_file_of_groups_and_a_whole_one(tmp_path):
    layer = layer_of(8)
    own, whole = rc.collect_second_moment(layer, Z, progress=False), whole_of(layer, Z)
    for name, moment in (("own", own), ("whole", whole)):
        moment.save(tmp_path / name)
        loaded = rc.SecondMoment.load(tmp_path / name, layer)
        assert loaded.groups == moment.groups and torch.equal(loaded.matrix(), moment.matrix())
        assert loaded.standard_error == moment.standard_error or moment is whole
    assert relative(whole.within_groups(8).blocks(), own.blocks()) < 1e-12
    mask = torch.zeros(8, 8)
    mask[2:6, 2:6] = 1
    edit = rc.Edit(rc.Selection(1, mask), rc.Selection(2, mask), latents=Z)
    changes = [rc.rewrite(layer, moment, edit, Z, rank=1, region="map") for moment in (own, whole)]
    assert relative(changes[0].weight_delta(), changes[1].weight_delta()) < 1e-6
    with pytest.raises(rc.FileFormatError, match="holds no float64"):
        own._sum = own._sum.flatten(0, 1)[None]
        own.save(tmp_path / "odd")
        rc.SecondMoment.load(tmp_path / "odd")


def test_an_unfinished_whole_collection_goes_on_whole(tmp_path):
    layer = layer_of(8)
    begun = whole_of(layer, Z[:16])
    begun.latents = rc.collect_second_moment(layer, Z, progress=False).latents
    begun._save(tmp_path / "checkpoint", {"done": 16, "batch_size": 16}, {})
    moment = rc.collect_second_moment(layer, Z, progress=False, checkpoint=tmp_path / "checkpoint")
    assert moment.groups == 1 and torch.equal(moment.matrix(), whole_of(layer, Z).matrix())


def test_a_resumed_collection_of_groups_has_the_same_bits(tmp_path):
    layer = layer_of(8)
    wanted = rc.collect_second_moment(layer, Z, progress=False)
    begun = rc.SecondMoment(24, layer.name, layer.fingerprint(Z), groups=8)
    begun.update(layer.keys(Z[:16]))
    begun.latents = wanted.latents
    begun._save(tmp_path / "checkpoint", {"done": 16, "batch_size": 16}, {})
    moment = rc.collect_second_moment(layer, Z, progress=False, checkpoint=tmp_path / "checkpoint")
    assert torch.equal(moment.blocks(), wanted.blocks()) and moment.standard_error == wanted.standard_error


def test_moments_of_groups_add_up_and_mix_with_no_other():
    layer = layer_of(8)
    one, other = (rc.collect_second_moment(layer, part, progress=False) for part in (Z[:16], Z[16:]))
    rows = rows_of(layer, Z)
    assert relative(one.merge(other).blocks(), exact(rows, 8) / len(rows)) < 1e-6
    whole = whole_of(layer, Z)
    for first, second in ((one, whole), (whole, one)):
        with pytest.raises(rc.MismatchError, match="differ in groups of channels"):
            first.merge(second)
    assert relative(one.merge(whole.within_groups(8)).blocks(), exact(rows, 8) / len(rows)) < 1e-6


def test_groups_of_another_layer_are_refused():
    moment = rc.collect_second_moment(layer_of(8), Z, progress=False)
    for groups in (1, 3):
        with pytest.raises(rc.MismatchError, match="8 groups of channels"):
            moment.check(layer_of(groups))
    with pytest.raises(rc.MismatchError, match="not of 3"):
        moment.within_groups(3)
    with pytest.raises(rc.RewriteCoreError, match="24 channels do not fall into 7 groups"):
        rc.SecondMoment(24, groups=7)


def test_a_search_and_a_measure_take_it():
    layer = layer_of(24)
    moment = rc.collect_second_moment(layer, Z, progress=False)
    box = rc.Selection.box(3, (2, 2, 6, 6), 8)
    assert len(rc.search(layer, moment, box, Z, top=4).indices) == 4
    edit = rc.Edit(copy=box, paste=rc.Selection.box(5, (2, 2, 6, 6), 8), context=[box], latents=Z)
    change = rc.rewrite(layer, moment, edit, Z, rank=1, region="map")
    assert rc.measure(change, edit, Z).verdict
