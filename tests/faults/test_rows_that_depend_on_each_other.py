"""Keys of a latent that depend on the others of its batch: batch normalisation without running statistics, say."""

import warnings

import pytest
import torch
from torch import nn

import rewrite_core as rc


class Deviation(nn.Module):
    """One more channel: how much the maps of the batch differ, as progressive discriminators have."""

    def forward(self, x):
        return torch.cat([x, x.std(0, unbiased=False).mean().expand(len(x), 1, *x.shape[2:])], 1)


class Random(nn.Module):
    """Noise of its own, which nobody can seed."""

    def __init__(self):
        super().__init__()
        self.source = torch.Generator().manual_seed(0)

    def forward(self, x):
        return x + torch.randn(x.shape, generator=self.source)


class Seeded(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def make(*middle, channels=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), *middle, nn.ReLU(), nn.Conv2d(channels, 3, 1))


def maps(count=8):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def told(call):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in seen if each.category is rc.BatchDependenceWarning]


DEPENDENT = {
    "batch statistics": lambda: make(nn.BatchNorm2d(4, track_running_stats=False)),
    "minibatch deviation": lambda: make(Deviation(), channels=5),
}
CALLS = {
    "collect": lambda layer: rc.collect_second_moment(layer, maps(), progress=False),
    "fingerprint": lambda layer: layer.fingerprint(maps()),
    "keys": lambda layer: layer.keys(maps()),
    "after one latent": lambda layer: (layer.keys(maps(1)), layer.keys(maps())),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", DEPENDENT)
def test_it_is_told_once_with_advice(kind, call):
    layer = rc.bind(DEPENDENT[kind](), "3")
    messages = told(lambda: [CALLS[call](layer) for _ in range(2)])
    assert len(messages) == 1 and "'3'" in messages[0] and "batch_size=1" in messages[0]


@pytest.mark.parametrize("kind", DEPENDENT)
def test_one_latent_at_a_time_is_nothing_to_tell(kind):
    layer = rc.bind(DEPENDENT[kind](), "3")
    assert told(lambda: rc.collect_second_moment(layer, maps(), batch_size=1, progress=False)) == []


@pytest.mark.parametrize("middle", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4), Random(), Seeded(), nn.Dropout()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_do_not_depend_on_each_other_are_nothing_to_tell(middle, dtype):
    if dtype != torch.float32 and isinstance(middle, Random):
        pytest.skip("its noise is float32")
    generator = make(middle)
    generator(maps())
    layer = rc.bind(generator.to(dtype), "3")
    assert told(lambda: [call(layer) for call in CALLS.values()]) == []
