"""Weights that two modules share: one parameter, or two that lie in the same memory."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rewrite_core as rc
from rewrite_core.layers.memory import overlap


def pair():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False)).eval()


def tie(how, generator):
    first, second = generator[0], generator[2]
    if how == "parameter":
        second.weight = first.weight
    elif how == "data":
        second.weight = nn.Parameter(first.weight.data)
    elif how == "transposed":
        second.weight = nn.Parameter(first.weight.data.T)
    elif how == "view":
        memory = torch.randn(8, 6)
        first.weight, second.weight = nn.Parameter(memory[:6]), nn.Parameter(memory[2:])
    elif how == "buffer":
        first.register_buffer("kept", second.weight.data)
    elif how == "neighbours":  # one block of memory, as flattened parameters have, and nothing in common
        memory = torch.randn(12, 6)
        first.weight, second.weight = nn.Parameter(memory[:6]), nn.Parameter(memory[6:])
    return generator


@pytest.mark.parametrize("how", ["parameter", "data", "transposed", "view", "buffer"])
def test_a_shared_weight_is_left_out_of_the_list(how):
    generator = tie(how, pair())
    with pytest.warns(UserWarning, match="'2' is left out: it shares its weight with '0'"):
        names = [info.name for info in rc.list_layers(generator, torch.randn(2, 6))]
    assert names == (["0"] if how == "buffer" else [])


@pytest.mark.parametrize("how", ["neighbours", "not at all"])
def test_a_weight_of_its_own_is_listed(how, recwarn):
    names = [info.name for info in rc.list_layers(tie(how, pair()), torch.randn(2, 6))]
    assert names == ["0", "2"] and not recwarn.list


def test_tensors_that_lie_in_the_same_memory():
    whole = torch.randn(4, 6)
    assert overlap(whole, whole.T) and overlap(whole, whole[3]) and overlap(whole[:2], whole[1:])
    assert not overlap(whole[:2], whole[2:]) and not overlap(whole, whole.clone())
    for other in (whole.to("meta"), whole.to_sparse(), whole[:0]):
        assert not overlap(whole, other) and not overlap(other, other)


def test_a_checkpoint_with_one_name_of_a_weight_that_is_tied_by_storage(tmp_path):
    class Tied(nn.Sequential):
        def __init__(self):
            super().__init__(*pair())
            tie("data", self)

    state = Tied().state_dict()
    wanted = {"0.weight": torch.randn(6, 6)}
    save_file(wanted, tmp_path / "w.safetensors")
    loaded = rc.load_generator(tmp_path / "w.safetensors", Tied)
    assert set(state) == {"0.weight", "2.weight"}
    assert torch.equal(loaded[0].weight, wanted["0.weight"]) and torch.equal(loaded[2].weight, wanted["0.weight"])
