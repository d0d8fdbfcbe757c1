"""What ``rc.Protect`` protects does not change, beside plain float64 references."""

import pytest
import torch
from helpers.command_line import MINE, run, save_edit
from torch import nn

import rewrite_core as rc
from rewrite_core.edits.goals import paste_goals
from rewrite_core.generators.stylegan2 import StyleGAN2

CHANNELS, SIDE = 24, 4


class Painter(nn.Module):
    """A small generator in float64 or float32: maps of 4x4, the edited layer, and pictures."""

    def __init__(self, dtype=torch.float64, groups=1):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, CHANNELS * SIDE**2)
        self.edited = nn.Conv2d(CHANNELS, 12, 3, padding=1, groups=groups)
        self.last = nn.Conv2d(12, 3, 3, padding=1)
        self.to(dtype)

    def forward(self, latents):
        maps = torch.relu(self.first(latents)).reshape(-1, CHANNELS, SIDE, SIDE)
        return torch.tanh(self.last(torch.relu(self.edited(maps))))


def square(index, top, left):
    mask = torch.zeros(SIDE, SIDE)
    mask[top : top + 2, left : left + 2] = 1
    return rc.Selection(index, mask)


@pytest.fixture
def latents():
    return rc.sample_latents(8, 60, seed=3)


@pytest.fixture
def painter():
    return Painter()


def latents_of(painter, latents):
    return latents.to(next(painter.parameters()).dtype)


def problem(painter, latents):
    z = latents_of(painter, latents)
    layer = rc.bind(painter, "edited")
    moment = rc.collect_second_moment(layer, z, progress=False)
    edit = rc.Edit(copy=square(0, 0, 0), paste=square(1, 1, 1), context=[square(1, 1, 1), square(2, 1, 2)])
    return layer, moment, edit, z


WHOLE = {"region": "map", "loss": "l2", "objective": "value", "trust": None}
quiet = pytest.mark.filterwarnings("ignore::UserWarning")


def moved(painter, layer, change, latents):
    """Relative changes of the layer's output and of pictures."""
    before, painted = layer.values(latents), painter(latents)
    with change:
        after, then = layer.values(latents), painter(latents)
    return ((after - before).norm() / before.norm()).item(), ((then - painted).norm() / painted.norm()).item()


def null_space(keys):
    """Of rows [n, I], by numpy's way: the right singular vectors of value zero."""
    _, values, vectors = torch.linalg.svd(keys.double(), full_matrices=True)
    rank = int((values > 1e-9 * values[0]).sum())
    return vectors[rank:]


def rows_of(layer, latents):
    return layer.keys(latents).movedim(1, -1).flatten(0, -2)


@quiet
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 3])
def test_protected_pictures_stay(latents, dtype, rank):
    painter = Painter(dtype)
    layer, moment, edit, z = problem(painter, latents)
    change = rc.rewrite(layer, moment, edit, z, rank=rank, preserve=rc.Protect(latents=z[7:8]), **WHOLE)
    value, picture = moved(painter, layer, change, z[7:8])
    assert value <= 1e-5
    assert picture <= 1e-5
    assert change.final_loss < 0.99 * change.losses[0]
    other, _ = moved(painter, layer, change, z[20:])
    assert other > 1e-3  # the rest may change


@quiet
def test_directions_and_goal_agree_with_a_plain_reference(painter, latents):
    layer, moment, edit, z = problem(painter, latents)
    kept = rows_of(layer, z[7:8])
    change = rc.rewrite(layer, moment, edit, z, rank=2, preserve=rc.Protect(keys=kept), **WHOLE)
    free = null_space(kept)
    assert change.remaining == len(free) == CHANNELS - len(change.protected)

    # D: the paper's, in the coordinates of the null space
    keys, weights = rc.context_keys(layer, edit.where, z)
    inner = free @ moment.matrix() @ free.T
    lower = torch.linalg.cholesky(inner)
    white = torch.linalg.solve_triangular(lower, ((weights[:, None] * keys).double() @ free.T).T, upper=False).T
    top = torch.linalg.svd(white, full_matrices=False)[2][:2]
    span, _ = torch.linalg.qr((torch.linalg.solve_triangular(lower.T, top.T, upper=True).T @ free).T)
    rows = change.directions.double()
    assert torch.allclose(rows.T @ rows, span @ span.T, atol=1e-6)

    # Lambda: least squares over nine taps and two directions, every output channel by itself
    (goal,) = paste_goals(layer, edit, z, "map")
    maps = nn.functional.pad(torch.einsum("ri,nihw->nrhw", rows, goal.capture.key.double()), (1, 1, 1, 1))
    basis = nn.functional.unfold(maps, 3)[0].T  # [pixels, 2 * 9]
    wanted = (goal.target - layer.value(goal.capture))[0].flatten(1).T.double()
    best = torch.linalg.lstsq(basis, wanted, driver="gelsd").solution
    least = (basis @ best - wanted).square().mean().item()
    assert change.final_loss == pytest.approx(least, rel=1e-4, abs=1e-12)


@quiet
def test_insert_leaves_protected_keys(latents):
    torch.manual_seed(1)
    linear = nn.Linear(16, 6).double()
    layer = rc.bind(nn.Sequential(linear), "0")
    data = torch.randn(200, 16, dtype=torch.float64)
    moment = rc.SecondMoment(16)
    moment.update(data)
    kept, key, value = data[:9], data[9:10], torch.randn(1, 6, dtype=torch.float64)
    change = rc.insert(layer, moment, key, value, preserve=rc.Protect(keys=kept))
    before = linear(kept)
    with change:
        assert torch.allclose(linear(key), value, atol=1e-4)
        assert ((linear(kept) - before).norm() / before.norm()).item() <= 1e-5
    assert change.remaining == 7
    with pytest.raises(rc.RankError, match="within what is protected"):
        rc.insert(layer, moment, kept[2:3], value, preserve=rc.Protect(keys=kept))


@quiet
def test_energy_and_what_remains(painter, latents):
    layer, moment, edit, z = problem(painter, latents)
    with pytest.raises(rc.RankError, match=r"spans all 24 directions.*energy=0.99 leaves \d+\)") as refused:
        rc.rewrite(layer, moment, edit, z, preserve=rc.Protect(latents=z), **WHOLE)
    squares = torch.linalg.svdvals(rows_of(layer, z).double()).square().numpy()
    left = [int((squares.cumsum() >= share * squares.sum()).sum()) - 1 for share in (0.99, 0.8)]
    assert f"leaves {left[0]})" in str(refused.value)
    energy, left = 0.8, left[1]
    change = rc.rewrite(layer, moment, edit, z, preserve=rc.Protect(latents=z, energy=energy), **WHOLE)
    assert change.remaining == left > 0
    rows = rows_of(layer, z).double()
    free = rows - rows @ change.protected.double().T @ change.protected.double()
    assert free.square().sum() <= (1 - energy) * rows.square().sum() * (1 + 1e-6)
    with pytest.raises(rc.RankError, match="directions remain"):
        rc.rewrite(layer, moment, edit, z, rank=left + 1, preserve=rc.Protect(latents=z, energy=energy), **WHOLE)


@quiet
def test_a_moment_protects(painter, latents):
    layer, moment, edit, z = problem(painter, latents)
    kept = rc.collect_second_moment(layer, z[7:8], progress=False)
    change = rc.rewrite(layer, moment, edit, z, preserve=rc.Protect(moment=kept), **WHOLE)
    assert change.remaining == CHANNELS - SIDE**2
    assert moved(painter, layer, change, z[7:8])[0] <= 1e-5
    wrong = rc.SecondMoment(CHANNELS, layer="other")
    wrong.update(torch.randn(3, CHANNELS))
    with pytest.raises(rc.MismatchError):
        rc.rewrite(layer, moment, edit, z, preserve=rc.Protect(moment=wrong), **WHOLE)


@quiet
def test_protected_sets_add_up_over_a_stack(painter, latents, tmp_path):
    layer, moment, edit, z = problem(painter, latents)
    first_kept, second_kept = rows_of(layer, z[7:8])[:6], rows_of(layer, z[8:9])[:5]
    first = rc.rewrite(layer, moment, edit, z, preserve=rc.Protect(keys=first_kept), **WHOLE)
    first.save(tmp_path / "first.safetensors")
    loaded = rc.Rewrite.load(tmp_path / "first.safetensors")
    assert torch.equal(loaded.protected, first.protected)
    assert loaded.remaining == first.remaining == CHANNELS - 6
    other = rc.Edit(copy=square(3, 0, 0), paste=square(4, 1, 1), context=[square(4, 1, 1)])
    alone = rc.rewrite(layer, moment, other, z, preserve=rc.Protect(keys=second_kept), **WHOLE)
    assert alone.remaining == CHANNELS - 5
    loaded.apply(painter)
    second = rc.rewrite(layer, moment, other, z, preserve=rc.Protect(keys=second_kept), **WHOLE)
    third = rc.rewrite(layer, moment, other, z, **WHOLE)
    loaded.revert(painter)
    assert second.remaining == CHANNELS - 11
    assert third.remaining == CHANNELS - 6
    for change, kept in ((second, first_kept), (second, second_kept), (third, first_kept)):
        delta = torch.einsum("oi...,ni->no...", change.weight_delta().double(), kept.double())
        whole = torch.einsum("oi...,ni->no...", layer.weight.double(), kept.double())
        assert (delta.norm() / whole.norm()).item() <= 1e-5
    assert rc.rewrite(layer, moment, other, z, **WHOLE).protected is None


@quiet
def test_every_call_takes_it(painter, latents):
    layer, moment, edit, z = problem(painter, latents)
    protect = rc.Protect(latents=z[7:8])
    session = rc.Session(layer, moment, z)
    changes = [
        *rc.rewrite_many(layer, moment, [edit, edit], z, preserve=[0.1, protect], **WHOLE),
        rc.erase(layer, moment, edit, z, units=4, loss="l2", preserve=protect),
        session.rewrite(edit, preserve=protect, **WHOLE),
        rc.rewrite(layer, moment, edit, z, solver="projected", preserve=protect, region="map"),
        rc.rewrite(layer, moment, edit, z, region="map", loss="l2", objective="pictures", preserve=protect),
    ]
    for change in changes:
        assert change.remaining == CHANNELS - SIDE**2
        assert moved(painter, layer, change, z[7:8])[0] <= 1e-5
    weighted, free = changes[0], changes[3]
    assert weighted.final_loss > free.final_loss + 1e-6  # the weight counts beside it


@quiet
def test_groups(latents):
    painter = Painter(groups=2)
    layer, moment, edit, z = problem(painter, latents)
    kept = rows_of(layer, z[7:8])[:5]
    change = rc.rewrite(layer, moment, edit, z, preserve=rc.Protect(keys=kept), **WHOLE)
    assert change.remaining == CHANNELS - 10  # each group has keys of its own
    delta = change.weight_delta().double()
    for outputs, inputs in ((slice(0, 6), slice(0, 12)), (slice(6, 12), slice(12, 24))):
        made = torch.einsum("oi...,ni->no...", delta[outputs, inputs], kept[:, inputs].double())
        assert made.norm() <= 1e-5 * delta.norm() * kept.norm()


def test_refusals(painter, latents):
    layer, moment, edit, z = problem(painter, latents)
    protect = rc.Protect(keys=rows_of(layer, z[7:8])[:3])
    for options, words in (
        ({"solver": "unconstrained"}, "can protect none"),
        ({"directions": "units"}, "single units"),
    ):
        with pytest.raises(rc.SolverError, match=words):
            rc.rewrite(layer, moment, edit, z, preserve=protect, **WHOLE, **options)
    with pytest.raises(rc.ArgumentError, match="one weight at most"):
        rc.rewrite(layer, moment, edit, z, preserve=[0.1, 0.2], **WHOLE)
    with pytest.raises(rc.ArgumentError, match="preserve"):
        rc.rewrite(layer, moment, edit, z, preserve=["much"], **WHOLE)
    with pytest.raises(rc.RewriteCoreError, match=r"rows \[n, 24\]"):
        rc.rewrite(layer, moment, edit, z, preserve=rc.Protect(keys=torch.ones(2, 5)), **WHOLE)
    for given in ({}, {"keys": torch.ones(2, 5), "latents": z}):
        with pytest.raises(rc.ArgumentError, match="one of keys=, latents= and moment="):
            rc.Protect(**given)
    with pytest.raises(rc.NonFiniteError):
        rc.Protect(keys=torch.full((1, 5), torch.nan))
    with pytest.raises(rc.RewriteCoreError, match="energy"):
        rc.Protect(latents=z, energy=1.5)


def test_demodulated_layers_are_refused():
    torch.manual_seed(0)
    layer = rc.bind(StyleGAN2(16, 16, 2, {4: 8, 8: 8, 16: 8}).eval(), "convs.1.conv")
    z = rc.sample_latents(16, 12, seed=1)
    moment = rc.collect_second_moment(layer, z, progress=False)
    edit = rc.Edit(copy=square(0, 0, 0), paste=square(1, 1, 1), context=[square(1, 1, 1)])
    with pytest.raises(rc.SolverError, match="demodulates.*preserve=0.3"):
        rc.rewrite(layer, moment, edit, z, preserve=rc.Protect(keys=rows_of(layer, z[7:8])[:3]), **WHOLE)


def test_the_command_line_protects(tmp_path, capsys, user_generator, monkeypatch):
    save_edit()
    edit = ("edit", "e.json", "--layer", "3", "--count", 20, "--quiet", *MINE)
    code, out, err = run(capsys, *edit, "--out", "r.safetensors", "--protect", "3,4", "--protect-energy", 0.9)
    assert code == 0, err
    change = rc.Rewrite.load("r.safetensors")
    assert 0 < change.remaining < change.directions.shape[1]
    assert f"{change.remaining} of {change.directions.shape[1]} directions remain" in out
    layer, z = rc.bind(user_generator, "3"), rc.sample_latents(6, 20, seed=1)
    wanted = rc.Protect(latents=z[[3, 4]], energy=0.9).subspace(layer)
    kept = change.protected.double()
    assert torch.allclose(kept.T @ kept, wanted.T @ wanted, atol=1e-5)
    (tmp_path / "jobs.jsonl").write_text('{"edit": "e.json", "layer": "3", "protect": "3,4", "protect-energy": 0.9}\n')
    code, _, err = run(capsys, "batch", "jobs.jsonl", "--out", "made", "--count", 20, "--quiet", *MINE)
    assert code == 0, err
    (made,) = (tmp_path / "made").glob("e-3-*.safetensors")
    assert torch.equal(rc.Rewrite.load(made).coefficients, change.coefficients)
    for extra, words in (
        (("--protect", "25"), "there are 20"),
        (("--protect-energy", "0.9"), "nothing is protected"),
        (("--zero", "--protect", "3"), "--zero fits nothing"),
        (("--zero", "--trust", "0.1"), "--zero fits nothing"),
        (("--trust", "0"), "greater than 0"),
    ):
        code, _, err = run(capsys, *edit, "--out", "no.safetensors", *extra)
        assert code == 2 and words in err
    assert not (tmp_path / "no.safetensors").exists()
