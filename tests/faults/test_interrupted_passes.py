"""What an interrupt leaves: the next pass is seeded, the generator is in its own mode, a weight is folded or not."""

import copy
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import rewrite_core as rc
from rewrite_core.adapters.weights import computed_weight


class Noisy(nn.Module):
    def __init__(self, source):
        super().__init__()
        torch.manual_seed(0)
        self.source, self.stop = source, False
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, z):
        x = self.first(z)
        if self.stop:
            raise KeyboardInterrupt
        if self.source == "numpy":
            noise = torch.from_numpy(np.random.standard_normal(x.shape)).float()
        elif self.source == "python":
            import random

            noise = random.random()
        else:
            noise = torch.randn(x.shape)
        return self.last(x + noise)


@pytest.mark.parametrize("source", ["numpy", "python", "torch"])
@pytest.mark.parametrize("first", [True, False])
def test_the_pass_after_an_interrupted_one_is_seeded(source, first):
    def sums(generator):
        return rc.collect_second_moment(rc.bind(generator, "last"), rc.sample_latents(6, 20), progress=False).matrix()

    wanted = sums(Noisy(source))
    generator = Noisy(source)
    if not first:
        assert torch.equal(sums(generator), wanted)
    generator.stop = True
    with pytest.raises(KeyboardInterrupt):
        sums(generator)
    generator.stop = False
    assert torch.equal(sums(generator), wanted)
    assert generator.training and not generator.last._forward_pre_hooks


class SNLinear(nn.Linear):
    def __init__(self, *size):
        super().__init__(*size)
        self.register_buffer("u", torch.ones(1))

    def W_(self):
        return self.weight / (1 + self.weight.abs().sum()) * self.u

    def forward(self, x):
        return nn.functional.linear(x, self.W_(), self.bias)


KINDS = {
    "older weight norm": lambda: nn.utils.weight_norm(nn.Linear(6, 4)),
    "older spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 4)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
    "method": lambda: SNLinear(6, 4),
}


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that a file of ours runs."""

    def __init__(self, line):
        self.left = line

    def __call__(self, frame, event, argument):
        if "rewrite_core/adapters/weights" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def interrupted(call, line):
    """Whether it was."""
    sys.settrace(Interrupt(line))
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_folding_and_unfolding_survive_an_interrupt_at_any_line(kind):
    torch.manual_seed(0)
    original = KINDS[kind]().eval()
    z = torch.randn(3, 6)
    with torch.no_grad():
        wanted = original(z)
    state, hooks = original.state_dict(), list(original._forward_pre_hooks)
    for start in ("fold", "unfold"):
        line = 0
        while True:
            line += 1
            module = copy.deepcopy(original)
            if start == "unfold":
                computed_weight(module).fold()
            stopped = interrupted(getattr(computed_weight(module), start), line)
            with torch.no_grad():
                assert torch.allclose(computed_weight(module).read(), computed_weight(original).read())
                computed_weight(module).fold()
                assert torch.allclose(module(z), wanted, atol=1e-6)
                computed_weight(module).unfold()
                computed_weight(module).unfold()
                assert torch.equal(module(z), wanted)
            assert [*module.state_dict()] == [*state] and list(module._forward_pre_hooks) == hooks
            assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
            if not stopped:
                break
        assert line > 3
