"""Layers that no hook sees: called by conv.forward(x), functionally, or through another module's forward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rewrite_core as rc


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.first, self.conv, self.unused = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        if self.way == "forward":
            return self.conv.forward(self.first.forward(x))
        if self.way == "functional":
            return F.conv2d(self.first(x), self.conv.weight, self.conv.bias)
        return self.conv(self.first(x))


def maps():
    return torch.randn(2, 3, 5, 5)


@pytest.mark.parametrize("way", ["forward", "functional"])
def test_a_layer_that_is_not_called_as_a_module_is_told_so(way):
    layer = rc.bind(Net(way), "conv")
    for call in (lambda: layer.keys(maps()), lambda: layer.fingerprint(maps()), lambda: layer.values(maps())):
        with pytest.raises(rc.UnknownLayerError, match=r"never calls 'conv': it uses its weight.*conv\(x\)"):
            call()


def test_a_layer_that_does_not_run_is_told_so():
    with pytest.raises(
        rc.UnknownLayerError, match="never reached 'unused'; bind a layer that this generator really runs"
    ):
        rc.bind(Net(""), "unused").keys(maps())


def test_the_list_is_not_empty_in_silence():
    with pytest.warns(UserWarning) as seen:
        assert rc.list_layers(Net("forward"), maps()) == []
    assert [str(each.message).split(":")[0] for each in seen] == [
        "Layer 'first' is left out",
        "Layer 'conv' is left out",
    ]
    with pytest.warns(UserWarning, match="'conv' is left out: the forward pass uses its weight without calling"):
        assert [info.name for info in rc.list_layers(Net("functional"), maps())] == ["first"]
    with pytest.warns(UserWarning, match="no layer that can be bound"):
        assert rc.list_layers(nn.Sequential(nn.ReLU()), maps()) == []
    idle = nn.Sequential(nn.ReLU())
    idle[0].unused = nn.Conv2d(3, 3, 1)
    with pytest.warns(UserWarning, match=r"never reached '0.unused'"):
        assert rc.list_layers(idle, maps()) == []


def test_layers_that_do_not_run_beside_others_are_left_out_in_silence(recwarn):
    assert [info.name for info in rc.list_layers(Net(""), maps())] == ["first", "conv"] and not recwarn.list


def test_a_copy_whose_forward_is_the_originals_is_told_so():
    generator = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    generator.forward = torch.compile(generator.forward, backend="eager")
    z = maps()
    assert rc.bind(generator, "2").keys(z).shape == (2, 4, 5, 5)
    twin = copy.deepcopy(generator)
    with pytest.raises(rc.UnknownLayerError, match="the generator has a forward put on it.*compile the copy"):
        rc.bind(twin, "2").keys(z)


@pytest.mark.parametrize("how", ["compiled", "compiled in place", "a part"])
def test_copies_of_compiled_generators_are_edited_by_themselves(how):
    generator = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    z = torch.randn(8, 3, 5, 5)
    if how == "compiled":
        generator = torch.compile(generator, backend="eager")
    elif how == "compiled in place":
        generator.compile(backend="eager")
    else:
        generator[0] = torch.compile(generator[0], backend="eager")
    before = generator(z)
    twin = copy.deepcopy(generator)
    layer = rc.bind(twin, "2")
    moment = rc.collect_second_moment(layer, z, progress=False)
    with rc.insert(layer, moment, torch.randn(2, 4), torch.randn(2, 3)):
        assert not torch.allclose(twin(z), before, atol=1e-3) and torch.equal(generator(z), before)
    assert torch.equal(twin(z), before)
