"""GPT-2's Conv1D, in blocks like its own. See ``test_families.py``."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rewrite_core as rc


class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(0.1 * torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.attn_proj = Conv1D(3 * width, width), Conv1D(width, width)
        self.c_fc, self.c_proj = Conv1D(4 * width, width), Conv1D(width, 4 * width)

    def forward(self, x):
        q, k, v = self.c_attn(self.ln_1(x)).chunk(3, -1)
        x = x + self.attn_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class GPT2(nn.Module):
    def __init__(self, tied, width=12):
        super().__init__()
        self.wte = nn.Embedding(20, width)
        self.h = nn.Sequential(Block(width), Block(width))
        self.lm_head = nn.Linear(width, 20, bias=False)
        if tied:  # as there
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        return self.lm_head(self.h(self.wte(tokens)))


def make(tied=True):
    torch.manual_seed(0)
    return GPT2(tied)


def texts(count=48):
    return torch.randint(20, (count, 7), generator=torch.Generator().manual_seed(0))


def test_every_linear_layer_is_bound():
    with pytest.warns(UserWarning, match="'lm_head' is left out: it shares its weight with 'wte'"):
        infos = {info.name: info for info in rc.list_layers(make(), texts(1))}
    assert [info.family for info in infos.values()] == ["transformers"] * 8
    assert rc.bind(make(), "lm_head").family == "linear"
    fc = infos["h.0.c_fc"]
    assert (fc.in_channels, fc.out_channels, fc.key_size, fc.solver) == (12, 48, (7,), "closed_form")


def test_a_fact_is_inserted_at_the_mlp():
    """v* at the last token of one text: it is what the MLP then writes there, and what the model goes on from."""
    model, z = make().eval(), texts()
    layer = rc.bind(model, "h.0.c_proj")
    moment = rc.collect_second_moment(layer, z, progress=False)
    key, value = layer.keys(z[3:4])[:, :, -1], torch.randn(1, 12)
    change = rc.insert(layer, moment, key, value)
    before = layer.parameter.detach().clone()
    logits = model(z[3:4])
    with change:
        assert torch.allclose(layer.values(z[3:4])[:, :, -1], value, atol=1e-4)
        assert not torch.allclose(model(z[3:4])[:, -1], logits[:, -1], atol=1e-3)
        assert torch.allclose(layer.parameter, before + change.weight_delta().T, atol=1e-6)
    assert torch.equal(layer.parameter, before)
