"""Counters, observers and vectors of spectral norm are no weights: a fingerprint does not see them."""

import pytest
import torch
from torch import nn

import rewrite_core as rc


class Buffered(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.write = write
        self.register_buffer("n", torch.zeros(3))

    def forward(self, x):
        self.write(self, x)
        return x


class SpectralNorm(nn.Module):
    """As in the first public implementations: u and v are parameters, and every pass assigns their data."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        weight = module.weight
        self.bar = nn.Parameter(weight.data)
        del module._parameters["weight"]
        self.u = nn.Parameter(torch.randn(len(weight)), requires_grad=False)
        self.v = nn.Parameter(torch.randn(weight[0].numel()), requires_grad=False)

    def forward(self, x):
        flat = self.bar.flatten(1)
        self.v.data = nn.functional.normalize(flat.data.T @ self.u.data, dim=0)
        self.u.data = nn.functional.normalize(flat.data @ self.v.data, dim=0)
        self.module.weight = self.bar / (self.u @ flat @ self.v)
        return self.module(x)


class Standardized(nn.Module):
    """Writes its weight to itself, standardized: after the first pass with the same numbers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        with torch.no_grad():
            self.weight.copy_(self.weight.sign())

    def forward(self, x):
        with torch.no_grad():
            self.weight.copy_(self.weight.sign())
        return torch.einsum("oi,nihw->nohw", self.weight, x)


def observer():
    from torch.ao.quantization import MinMaxObserver

    return MinMaxObserver()


WRITING = {
    "in place": lambda: Buffered(lambda self, x: self.n.add_(1)),
    "in place, of its data": lambda: Buffered(lambda self, x: self.n.data.mul_(0.5).add_(1)),
    "in place, a part": lambda: Buffered(lambda self, x: self.n[:1].add_(1)),
    "out=": lambda: Buffered(lambda self, x: torch.add(self.n, 1, out=self.n)),
    "replaced": lambda: Buffered(lambda self, x: setattr(self, "n", self.n + 1)),
    "data assigned": lambda: Buffered(lambda self, x: setattr(self.n, "data", self.n + 1)),
    "an observer": observer,
    "spectral norm": lambda: SpectralNorm(nn.Conv2d(3, 3, 1)),
}


def make(first):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 1), first, nn.Conv2d(3, 4, 1)).eval()


def maps(count=6):
    return torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRITING)
def test_a_moment_fits_the_layer_that_it_was_collected_from(kind):
    generator = make(WRITING[kind]())
    moment = rc.collect_second_moment(rc.bind(generator, "2"), maps(), batch_size=2, progress=False)
    for count in (1, 2, 6):
        with torch.no_grad():
            generator(3 * maps(count))
        layer = rc.bind(generator, "2")
        moment.check(layer, maps(count))
        moment.check(layer, maps())
        assert rc.collect_second_moment(layer, maps(), progress=False).fingerprint == moment.fingerprint


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRITING)
def test_other_weights_before_the_layer_are_seen_all_the_same(kind):
    generator = make(WRITING[kind]())
    moment = rc.collect_second_moment(rc.bind(generator, "2"), maps(), progress=False)
    weights = [generator[0].weight, *([generator[1].bar] if kind == "spectral norm" else [])]
    for weight in weights:
        before = weight.detach().clone()
        with torch.no_grad():
            weight[0, 0] += 1
        with pytest.raises(rc.MismatchError, match="other weights"):
            moment.check(rc.bind(generator, "2"), maps())
        with torch.no_grad():
            weight.copy_(before)
        moment.check(rc.bind(generator, "2"), maps())


def test_a_weight_that_is_written_with_its_own_numbers_is_seen():
    generator = make(Standardized())
    moment = rc.collect_second_moment(rc.bind(generator, "2"), maps(), progress=False)
    moment.check(rc.bind(generator, "2"), maps())
    with torch.no_grad():
        generator[1].weight[0, 0] *= -1
    with pytest.raises(rc.MismatchError, match="other weights"):
        moment.check(rc.bind(generator, "2"), maps())
