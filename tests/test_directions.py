import numpy as np
import pytest
import torch

import rewrite_core as rc
from rewrite_core.edits.directions import DIRECTIONS, _top_right_vectors, rank_units


def subspace_cosine(a, b):
    """Cosine of the largest angle between the row spaces of a and b."""
    q, _ = torch.linalg.qr(b.double().T)
    return torch.linalg.svdvals(a.double() @ q).min().item()


CASES = [
    ("zca_rank1", "whitened", 1),
    ("zca_rank2", "whitened", 2),
    ("zca_rank4", "whitened", 4),
    ("svd_rank1", "svd", 1),
    ("svd_rank2", "svd", 2),
    ("mean_rank1", "mean", 1),
]


@pytest.fixture(scope="module")
def context(latents, edit):
    from conftest import DATA

    layer = rc.bind(rc.load_proggan(DATA / "proggan_state.npz"), "layer5.conv")
    return rc.context_keys(layer, edit.where, latents)


@pytest.mark.parametrize(("name", "method", "rank"), CASES)
def test_golden_directions_given_the_same_second_moment(golden, golden_moment, context, name, method, rank):
    directions = rc.context_directions(golden_moment, *context, rank=rank, directions=method)
    assert directions.shape == (rank, 64) and directions.dtype == torch.float64
    assert subspace_cosine(directions, golden[name]) > 1 - 1e-7
    # row by row too, with the sign
    assert ((directions * golden[name]).sum(1) > 0.9999).all()


@pytest.mark.parametrize(("name", "method", "rank"), [case for case in CASES if case[1] != "svd"])
def test_golden_directions_from_collection(golden, moment, context, name, method, rank):
    directions = rc.context_directions(moment, *context, rank=rank, directions=method)
    assert subspace_cosine(directions, golden[name]) > 0.9999


@pytest.mark.parametrize("rank", [1, 2])
def test_golden_svd_from_collection(golden, moment, context, rank):
    # C^-1 is twice as sensitive as whitening to the rounding error of the recorded float32 sum (next test)
    directions = rc.context_directions(moment, *context, rank=rank, directions="svd")
    assert subspace_cosine(directions, golden[f"svd_rank{rank}"]) > 0.9998


def test_golden_svd_from_a_float32_sum_of_outer_products(golden, layer, latents, context):
    """Summing one rank-1 update a pixel in float32, as was recorded, gives the recorded C and svd directions."""
    with torch.no_grad():
        keys = layer.keys(latents).permute(0, 2, 3, 1).reshape(-1, 64)
    total = torch.zeros(64, 64)
    for key in keys:
        total.addr_(key, key)
    recorded = golden["c_matrix"]
    assert (total / len(keys) - recorded).norm() < 1e-6 * recorded.norm()
    moment = rc.SecondMoment(64)
    moment._sum, moment.count = total.double(), len(keys)
    for rank in (1, 2):
        directions = rc.context_directions(moment, *context, rank=rank, directions="svd")
        assert subspace_cosine(directions, golden[f"svd_rank{rank}"]) > 0.9999


def test_golden_query_key(golden, moment, edit, layer, latents):
    key = rc.query_key(layer, moment, edit.context[0], latents)
    assert torch.dot(key, golden["query_key"].double()) > 0.9999


def test_units_without_quantiles_are_normdissect(golden, moment, context):
    assert rank_units(moment, *context)[:8].tolist() == golden["normdissect_rank8"].tolist()
    directions = rc.context_directions(moment, *context, rank=8, directions="units")
    assert directions.argmax(1).tolist() == golden["normdissect_rank8"].tolist()
    assert torch.equal(directions.sum(1), torch.ones(8, dtype=torch.float64))


def test_units_with_quantiles_are_gandissect(golden, moment, layer, edit, latents):
    quantiles = rc.collect_unit_quantiles(layer, latents)
    rows = rc.context_keys(layer, edit.where, latents, inside_only=False)
    units = rc.context_directions(moment, *rows, rank=4, directions="units", quantiles=quantiles).argmax(1)
    wanted = set(golden["gandissect_rank4"].argmax(1).tolist())
    assert len(wanted & set(units.tolist())) >= 3


def test_quantiles_in_bounded_memory_are_close_to_exact():
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(40, 3, 20, 20, generator=generator) * torch.tensor([1.0, 5.0, 0.1])[:, None, None]
    quantiles = rc.UnitQuantiles(3, capacity=1000)
    for batch in data.split(7):
        quantiles.update(batch)
    assert len(quantiles._rows) <= 1000
    rows = data.movedim(1, -1).reshape(-1, 3)
    probe = rows[::97]
    exact = (rows[None] < probe[:, None]).double().mean(1)
    assert (quantiles.quantile(probe) - exact).abs().max() < 0.06
    top = rows.amax(0)[None]
    assert quantiles.quantile(top).eq(1).all() and quantiles.quantile(0.99 * top).lt(1).all()


def test_whitened_span_equals_whitening_by_the_symmetric_root(moment, context):
    keys, weights = context
    values, vectors = torch.linalg.eigh(moment.matrix())
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    _, _, top = torch.linalg.svd((keys.double() @ root) * weights.double()[:, None])
    directions = rc.context_directions(moment, keys, weights, rank=5)
    assert subspace_cosine(directions, top[:5] @ root) > 1 - 1e-9


@pytest.mark.parametrize("rank", [1, 3, 17, 40])
@pytest.mark.parametrize("method", ["whitened", "svd", "units"])
def test_rows_are_orthonormal(moment, context, rank, method):
    directions = rc.context_directions(moment, *context, rank=rank, directions=method)
    gram = directions @ directions.T
    assert (gram - torch.eye(rank, dtype=torch.float64)).abs().max() < 1e-10


def test_sign_agrees_with_the_mean_key(moment, context):
    keys, weights = context
    mean = (keys * weights[:, None]).sum(0).double()
    assert (rc.context_directions(moment, keys, weights, rank=6) @ mean >= 0).all()


def test_one_key_gives_its_own_direction(moment, context):
    key = context[0][:1]
    direction = rc.context_directions(moment, key)
    wanted = moment.solve(key)
    assert torch.allclose(direction, wanted / wanted.norm(), atol=1e-9)


def test_dead_channels_stay_finite():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 12, generator=generator)
    features[:, 3] = 0
    features[:, 7] = features[:, 8]
    moment = rc.SecondMoment(12)
    moment.update(features)
    with pytest.warns(UserWarning, match="rank-deficient"):
        directions = rc.context_directions(moment, features[:20], rank=4)
    assert torch.isfinite(directions).all()
    assert moment.factor.shift > 0
    assert (directions @ directions.T - torch.eye(4)).abs().max() < 1e-9


@pytest.mark.parametrize("spread", [0.5, 2.9, 3.1, 7])
@pytest.mark.parametrize("shape", [(30, 80), (80, 30), (40, 40)])
def test_top_vectors_are_the_singular_ones(shape, spread):
    """By the smaller product, or where the values spread too far for it (10^-3) by a decomposition of the rows."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, 9, generator=generator, dtype=torch.float64)).Q for n in shape)
    rows = left * torch.logspace(0, -spread, 9, dtype=torch.float64) @ right.T
    found = _top_right_vectors(rows, 9)
    assert (found @ found.T - torch.eye(9)).abs().max() < 1e-9
    assert ((found * right.T).sum(1).abs() > 1 - 1e-12).all()
    with pytest.raises(rc.RankError, match="span only 9 directions"):
        _top_right_vectors(rows, 10)


def singular_keys(kind):
    """Keys [n, 24] whose second moment is singular."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(400, 24, generator=generator, dtype=torch.float64)
    if kind == "one dead":
        rows[:, 0] = 0
    elif kind == "many dead":
        rows[:, 1::2] = 0
    elif kind == "last dead":
        rows[:, -1] = 0
    elif kind == "one twin":
        rows[:, 3] = rows[:, 17]
    elif kind == "many twins":
        rows[:, :12] = rows[:, 12:]
    elif kind == "opposite":
        rows[:, 5] = -rows[:, 6]
    elif kind == "one below":
        rows = rows[:23]
    elif kind == "few keys":
        rows = rows[:6]
    elif kind == "sums":
        rows[:, 2] = rows[:, 7] + rows[:, 8] - rows[:, 9]
    elif kind == "dead, twins and scales":
        rows *= torch.logspace(-5, 5, 24, dtype=torch.float64)
        rows[:, 4], rows[:, 10] = 0, 3 * rows[:, 11]
    return rows


@pytest.mark.parametrize(
    "kind",
    [
        "one dead",
        "many dead",
        "last dead",
        "one twin",
        "many twins",
        "opposite",
        "one below",
        "few keys",
        "sums",
        "dead, twins and scales",
    ],
)
@pytest.mark.parametrize("method", ["whitened", "svd"])
def test_ten_singular_second_moments(kind, method):
    rows = singular_keys(kind)
    moment = rc.SecondMoment(24)
    moment.update(rows)
    assert torch.linalg.matrix_rank(moment.matrix(), hermitian=True) < 24
    with pytest.warns(UserWarning, match="rank-deficient.* added to its diagonal"):
        shift = moment.factor.shift.item()
    assert 0 < shift <= 1e-6 * moment.matrix().diagonal().mean()  # known to whoever asks, and small
    for rank in (1, 3, 5):
        directions = rc.context_directions(moment, rows[:6], rank=rank, directions=method)
        assert directions.isfinite().all() and directions.shape == (rank, 24)
        assert (directions @ directions.T - torch.eye(rank)).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"rank": 65}, rc.RankError, "64 channels"),
        ({"rank": 0}, rc.RankError, "from 1"),
        ({"rank": 1.0}, rc.RankError, "whole number"),
        ({"rank": True}, rc.RankError, "whole number"),
        ({"rank": np.int64(65)}, rc.RankError, "64 channels"),
        ({"keys": torch.eye(64)[:1] * torch.tensor([[1.0], [-1.0]]), "directions": "mean"}, rc.RankError, "cancel out"),
        ({"rank": 2, "directions": "mean"}, rc.RankError, "one direction"),
        ({"directions": "pca"}, rc.RewriteCoreError, "'units', not 'pca'"),
        ({"weights": torch.ones(3)}, rc.RewriteCoreError, "one each"),
        ({"weights": torch.zeros(5)}, rc.SelectionError, "positive weight"),
        ({"keys": torch.ones(5, 63)}, rc.RewriteCoreError, "64"),
        ({"keys": torch.full((5, 64), torch.nan)}, rc.NonFiniteError, "NaN"),
        ({"keys": torch.zeros(5, 64)}, rc.SelectionError, "zero"),
        ({"keys": torch.ones(5, 64), "rank": 2}, rc.RankError, "lower the rank"),
        ({"rank": 6}, rc.RankError, "5 context keys"),
    ],
)
def test_bad_input(moment, arguments, error, words):
    keys = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    with pytest.raises(error, match=words):
        rc.context_directions(moment, **({"keys": keys} | arguments))


def test_the_rank_may_be_a_numpy_number(moment, context):
    assert torch.equal(
        rc.context_directions(moment, *context, rank=np.int64(3)), rc.context_directions(moment, *context, rank=3)
    )


def test_nan_in_the_population_is_refused(layer, latents):
    bad = latents.clone()
    bad[37] = torch.nan
    with pytest.raises(rc.NonFiniteError, match="batch 3 .*30 to 39"):
        rc.collect_unit_quantiles(layer, bad, batch_size=10)
    quantiles = rc.UnitQuantiles(2)
    with pytest.raises(rc.NonFiniteError, match="NaN or infinity"):
        quantiles.update(torch.full((1, 2, 3, 3), torch.inf))
    assert (quantiles._seen, len(quantiles._rows)) == (0, 0)


def test_another_default_device(moment, layer, edit, latents):
    rows = rc.context_keys(layer, edit.where, latents)

    def directions():
        quantiles = rc.collect_unit_quantiles(layer, latents[:20])
        return [rc.context_directions(moment, *rows, directions=method, quantiles=quantiles) for method in DIRECTIONS]

    plain = directions()
    with torch.device("meta"):
        found = directions()
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
