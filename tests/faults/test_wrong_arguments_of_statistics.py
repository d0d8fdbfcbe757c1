"""Arguments of wrong types: one sentence of the library's own, before anything runs."""

import numpy as np
import pytest
import torch

import rewrite_core as rc

Z = rc.sample_latents(4, 20)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return rc.bind(torch.nn.Sequential(torch.nn.Unflatten(1, (4, 1, 1)), torch.nn.Conv2d(4, 3, 1)), "1")


WRONG = {
    "until": ["0.01", True, b"1", [0.1], 1j, 0, -1, float("nan"), torch.ones(2), np.True_],
    "batch_size": ["4", 4.0, True, None, 0, -1, [4], 2**40],
    "checkpoint": [3, b"m", ["m"], True],
    "mask": [3, "mask", [True]],
    "keys": [3, "k", [[1.0] * 4], torch.ones(2, 5), torch.zeros(1, 4), torch.full((4,), torch.nan), 1j * torch.ones(4)],
    "latent_seed": [{1}, object(), 1j],
}


@pytest.mark.parametrize("name", WRONG)
def test_of_a_collection(layer, name, monkeypatch):
    monkeypatch.setattr(layer.generator, "forward", None)  # not reached
    for value in WRONG[name]:
        with pytest.raises(rc.RewriteCoreError) as caught:
            rc.collect_second_moment(layer, Z, **{name: value})
        assert str(caught.value).endswith(".") and len(str(caught.value)) < 300
        if not isinstance(value, int | float | torch.Tensor) or isinstance(value, bool):
            assert isinstance(caught.value, TypeError), value


def test_numbers_of_every_kind_are_taken(layer):
    for number in (0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), 1, np.int64(1)):
        rc.collect_second_moment(layer, Z, until=number, batch_size=np.int64(2), progress=False)


def test_of_layers_and_latents(layer):
    moment = rc.collect_second_moment(layer, Z, progress=False)
    for wrong in (None, "1", layer.generator, 3):
        for call in (
            lambda wrong=wrong: rc.collect_second_moment(wrong, Z),
            lambda wrong=wrong: rc.collect_second_moments([wrong], Z),
            lambda wrong=wrong: rc.collect_second_moments(wrong, Z),
            lambda wrong=wrong: rc.collect_unit_quantiles(wrong, Z),
            lambda wrong=wrong: moment.check(wrong),
            lambda wrong=wrong: rc.SecondMoment.load(wrong) if not isinstance(wrong, str) else moment.check(wrong),
        ):
            with pytest.raises(rc.ArgumentError):
                call()
    for latents in (None, "z", Z.numpy(), [1.0]):
        for collect in (rc.collect_second_moment, rc.collect_unit_quantiles):
            with pytest.raises(rc.ArgumentError, match="latents must be a torch tensor"):
                collect(layer, latents)
    for latents in (Z[0], Z[:0], torch.tensor(1.0)):
        for collect in (rc.collect_second_moment, rc.collect_unit_quantiles):
            with pytest.raises(rc.RewriteCoreError, match="latent"):
                collect(layer, latents)


def test_of_quantiles(layer):
    for arguments in (("4",), (0,), (True,), (4, 0), (4, 2.5)):
        with pytest.raises(rc.RewriteCoreError, match="must be an integer"):
            rc.UnitQuantiles(*arguments)
    quantiles = rc.UnitQuantiles(4)
    with pytest.raises(rc.RewriteCoreError, match="of no keys yet"):
        quantiles.quantile(torch.ones(1, 4))
    for features in ([[1.0] * 4], np.ones((2, 4)), torch.ones(2, 3), torch.ones(4), torch.ones(2, 4).to_sparse()):
        with pytest.raises(rc.RewriteCoreError):
            quantiles.update(features)
    quantiles.update(torch.ones(2, 4, 3))
    quantiles.update(torch.ones(0, 4, 3))
    for keys in ([1.0] * 4, torch.ones(4), torch.ones(1, 5), torch.ones(1, 4).long()):
        with pytest.raises(rc.RewriteCoreError):
            quantiles.quantile(keys)
    with pytest.raises(rc.RewriteCoreError, match="batch_size"):
        rc.collect_unit_quantiles(layer, Z, batch_size=0)


def test_of_what_is_merged_or_reduced():
    for wrong in (None, 3, torch.eye(2)):
        with pytest.raises(rc.ArgumentError, match="merges with another"):
            rc.SecondMoment(2).merge(wrong)
