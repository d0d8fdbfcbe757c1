"""Positions that are padding are no keys: `mask=`, wherever a population of keys is gathered."""

import pytest
import torch
from conftest import relative

import rewrite_core as rc

RANDOM = torch.Generator().manual_seed(0)


def rows_of(features, mask):
    return features.movedim(1, -1)[mask].double()


@pytest.mark.parametrize("shape", [(4, 8, 6), (4, 8), (3, 8, 5, 4), (2, 8, 2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_update_counts_the_positions_of_the_mask(shape, dtype):
    features = torch.randn(shape, generator=RANDOM).to(dtype)
    mask = torch.rand(shape[0], *shape[2:], generator=RANDOM) < 0.6
    rows, moment = rows_of(features, mask), rc.SecondMoment(8)
    before = features.clone()
    moment.update(features, mask=mask)
    assert moment.count == len(rows) and relative(moment._sum, rows.T @ rows) < 1e-6
    assert torch.equal(features, before)
    numbers = rc.SecondMoment(8)
    numbers.update(features, mask=mask.long() * 3)  # an attention mask is of whole numbers
    assert torch.equal(numbers._sum, moment._sum) and numbers._facts() == moment._facts()


def test_what_is_outside_the_mask_is_not_looked_at():
    features = torch.randn(5, 3, 4, generator=RANDOM)
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[:, 3] = False
    mask[2] = False  # a whole image
    features[:, :, 3] = torch.nan
    features[2] = torch.inf
    moment, quantiles = rc.SecondMoment(3), rc.UnitQuantiles(3)
    moment.update(features, mask=mask)
    quantiles.update(features, mask=mask)
    rows = rows_of(features, mask)
    assert moment.count == 12 and relative(moment._sum, rows.T @ rows) < 1e-6
    assert torch.equal(quantiles.maximum, rows.float().amax(0)) and quantiles._seen == 12
    features[0, 0, 0] = torch.nan
    with pytest.raises(rc.NonFiniteError):
        moment.update(features, mask=mask)
    moment.update(features, mask=mask, skip_nonfinite=True)
    assert (moment.count, moment.skipped) == (12 + 9, 1)
    moment.update(features, mask=torch.zeros(5, 4, dtype=torch.bool))
    assert (moment.count, moment._updates) == (12 + 9, 2)


def test_masks_of_wrong_types_and_shapes():
    moment, features = rc.SecondMoment(3), torch.randn(2, 3, 4)
    for mask in (torch.ones(2, 4), [[1] * 4] * 2, torch.ones(2, 4, dtype=torch.complex64), None.__class__):
        with pytest.raises(rc.ArgumentError, match="mask must be a tensor of booleans or whole numbers"):
            moment.update(features, mask=mask)
    for shape in ((2,), (2, 3, 4), (2, 3), (1, 4)):
        with pytest.raises(rc.RewriteCoreError, match=r"The mask of features \[2, 3, 4\] is \[2, 4\]"):
            moment.update(features, mask=torch.ones(shape, dtype=torch.bool))
    assert moment.count == 0


class Tokens(torch.nn.Module):
    """Token ids [N, L], of which 0 is padding, to hidden states [N, L, 6]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(20, 6)
        self.up, self.down = torch.nn.Linear(6, 10), torch.nn.Linear(10, 6)

    def forward(self, ids):
        return self.down(torch.relu(self.up(self.embedding(ids))))


@pytest.fixture
def ids():
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 20, (23, 9), generator=random)
    return ids * (torch.arange(9) < torch.randint(3, 10, (23, 1), generator=random))


def test_collections_take_attention_masks(ids):
    net, mask = Tokens(), ids != 0
    layer = rc.bind(net, "down")
    with torch.no_grad():
        rows = torch.relu(net.up(net.embedding(ids)))[mask].double()
    exact = rows.T @ rows / len(rows)
    moment = rc.collect_second_moment(layer, ids, batch_size=4, mask=mask, progress=False)
    assert moment.count == len(rows) and relative(moment.matrix(), exact) < 1e-6
    without = rc.collect_second_moment(layer, ids, batch_size=4, progress=False)
    assert relative(without.matrix(), exact) > 0.1
    by_function = rc.collect_second_moment(layer, ids, batch_size=4, mask=lambda part: part != 0, progress=False)
    both = rc.collect_second_moments([rc.bind(net, "up"), layer], ids, batch_size=4, mask=mask.long(), progress=False)
    for same in (by_function, both[1]):
        assert torch.equal(same._sum, moment._sum) and same.count == both[0].count == moment.count
    quantiles = rc.collect_unit_quantiles(layer, ids, batch_size=4, mask=mask)
    assert torch.equal(quantiles.maximum, rows.float().amax(0)) and quantiles._seen == len(rows)


def test_masks_of_collections_are_checked(ids, tmp_path):
    layer, mask = rc.bind(Tokens(), "down"), ids != 0
    for wrong in (mask[:5], torch.tensor(True)):
        for collect in (rc.collect_second_moment, rc.collect_unit_quantiles):
            with pytest.raises(rc.RewriteCoreError, match="for 23 latents; give a row for each"):
                collect(layer, ids, mask=wrong)
    with pytest.raises(rc.ArgumentError, match="mask is a tensor"):
        rc.collect_second_moment(layer, ids, mask=[[1]])
    with pytest.raises(rc.RewriteCoreError, match="a number for each position"):
        rc.collect_second_moment(layer, ids, mask=mask[:, :4], progress=False)
    path = tmp_path / "m"
    whole = rc.collect_second_moment(layer, ids, mask=mask, checkpoint=path, progress=False)
    same = rc.collect_second_moment(layer, ids, mask=mask, checkpoint=path, progress=False)
    assert torch.equal(same._sum, whole._sum) and "mask" in rc.SecondMoment.load(path).latents
    for other in (None, ids > 1):
        with pytest.raises(rc.MismatchError, match="another mask"):
            rc.collect_second_moment(layer, ids, mask=other, checkpoint=path, progress=False)
